"""`y7 info F.engine`: the build record, the layers, the header of a foreign plan, and the errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.cli.info import info
from yolov7_deploy.errors import LoadError
from yolov7_deploy.inspection.engine_file import read_engine_file
from yolov7_deploy.metadata import ModelMetadata, NmsMetadata
from yolov7_deploy.tensorrt.build_record import (
    DlaUse,
    EngineRecord,
    EngineTensor,
    InputShape,
    NetworkLayer,
    PluginUse,
)
from yolov7_deploy.tensorrt.engine import Engine

INSPECTIONS = Path(__file__).parents[1] / "fixtures" / "inspector"
NAMES = tuple(f"thing {i}" for i in range(80))


def header(tag: bytes, size: int, version: tuple[int, int, int, int], targets: int = 0) -> bytes:
    """Return the first 64 bytes of a plan: tag, layout, length, version, and for TensorRT-RTX one bit per target."""
    start = tag + bytes(4) + (2).to_bytes(8, "little") + size.to_bytes(8, "little") + bytes(version)
    return (start + b"vtrt" + targets.to_bytes(8, "little")).ljust(64, b"\0")


def plan_of(tag: bytes = b"ftrt", version: tuple[int, int, int, int] = (10, 3, 0, 26), *, targets: int = 0) -> bytes:
    return header(tag, 4096, version, targets).ljust(4096, b"p")


PLAN = plan_of()
RECORD = EngineRecord(
    metadata=ModelMetadata(
        variant="yolov7-tiny",
        class_names=NAMES,
        strides=(8, 16, 32),
        anchors=(((12.0, 16.0), (19.0, 36.0), (40.0, 28.0)),) * 3,
        input_hw=(640, 640),
        precision="fp16",
        nms=NmsMetadata(
            kind="plugin",
            conf=0.25,
            iou=0.45,
            max_det=100,
            max_candidates=3840,
            multi_label=True,
            class_agnostic=False,
            runtime_thresholds=True,
        ),
    ),
    plan_bytes=len(PLAN),
    plan_sha256=sha256_hex(PLAN),
    product="tensorrt",
    tensorrt="10.3.0.26",
    cuda="12.6",
    driver="540.4.0",
    gpu="Orin",
    compute_capability="8.7",
    platform="linux-aarch64",
    plugin=PluginUse(path="/opt/y7/liby7_plugin.so", version="0.1.0", abi="v3"),
    nms_by="plugin",
    flags=("FP16", "TF32"),
    shapes=(InputShape(name="images", min=(1, 3, 640, 640), opt=(4, 3, 640, 640), max=(8, 3, 640, 640)),),
    inputs=(EngineTensor(name="images", dtype="float32", shape=(-1, 3, 640, 640)),),
    outputs=(
        EngineTensor(name="num_dets", dtype="int32", shape=(-1, 1)),
        EngineTensor(name="det_boxes", dtype="float32", shape=(-1, 100, 4)),
    ),
    workspace_bytes=2 * 2**30,
    optimization_level=3,
    timing_cache="/cache/orin.timing",
    network_layers=(
        NetworkLayer(name="/model.0/conv/Conv", type="CONVOLUTION", precision="HALF"),
        NetworkLayer(name="/model.105/Y7NMS", type="PLUGIN_V3", precision="INT32"),
    ),
    inspector=(INSPECTIONS / "detailed_8.6.json").read_text(encoding="utf-8"),
    device_memory_bytes=30_100_000,
    peak_memory_bytes=1_900_000_000,
    build_s=312.44,
    onnx_sha256="ab" * 32,
    notes=("kept in float32: the decode",),
    y7_version="0.1.0",
)


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(info)
    return lambda *arguments: CliRunner().invoke(app, [str(text) for text in arguments], catch_exceptions=False)


@pytest.fixture
def engine(tmp_path):
    """Return a function that saves the plan with a changed build record."""

    def save(name="tiny.engine", **changes):
        path = tmp_path / name
        Engine(plan=PLAN, record=replace(RECORD, **changes)).save(path)
        return path

    return save


def flat(text: str) -> str:
    return " ".join(text.split())


# --- with a record ----------------------------------------------------------------------------------------------------


def test_an_engine_shows_how_where_and_for_which_gpus_it_was_built(run, engine):
    text = flat(run(engine()).stdout)
    for part in (
        "tiny.engine: yolov7-tiny, fp16",
        f"sha256 {RECORD.plan_sha256}",
        "built by TensorRT 10.3.0.26 in 312.4 s, optimization level 3",
        "built on linux-aarch64, Orin (compute capability 8.7), CUDA 12.6, driver 540.4.0",
        "runs on compute capability 8.7",
        "typed weakly: flags allow other precisions",
        "flags FP16, TF32",
        "NMS our plugin, version 0.1.0 (v3), /opt/y7/liby7_plugin.so",
        "input images float32 [-1, 3, 640, 640]",
        "shapes images 1x3x640x640 to 8x3x640x640, optimized for 4x3x640x640",
        "output num_dets int32 [-1, 1] det_boxes float32 [-1, 100, 4]",
        "workspace at most 2.00 GiB",
        "memory 30.1 MB for an execution context, 1900.0 MB of main memory during the build",
        "cache /cache/orin.timing",
        "note kept in float32: the decode",
        "metadata yolov7-tiny, fp16, 80 classes",
    ):
        assert part in text


def test_the_layers_are_summarized_as_executed(run, engine):
    text = flat(run(engine()).stdout)
    for part in (
        "layers 5 as executed: 2 Reformat, 2 CaskConvolution, 1 PluginV2",
        "precision 3 fp16, 1 int8",
        "reformats 1",
        "plugin Y7NMS",
        "weights 0.1 MB",
        # The second convolution: int8 in, float16 out.
        f"activations about {(32 * 640 * 640 + 255 * 320 * 320 * 2) / 1e6:.1f} MB at the peak",
    ):
        assert part in text
    assert "sm80_xmma" not in text


def test_the_layer_table_has_one_row_per_layer(run, engine):
    lines = [line.split() for line in run(engine(), "--layers").stdout.splitlines()]
    table = lines[next(i for i, line in enumerate(lines) if line[:2] == ["layer", "type"]) :]
    assert [line[0] for line in table[1:]] == ["0", "1", "2", "3", "4"]
    assert table[4][-6:-1] == ["CaskConvolution", "int8", "1x255x320x320", "LINEAR", "74,460"]
    assert table[2][-1].startswith("sm80_xmma") and table[2][-1].endswith("...")


def test_an_engine_built_without_a_gpu_has_its_layers_as_parsed(run, engine):
    path = engine(
        inspector="", gpu="", compute_capability="", product="tensorrt_rtx", targets=("8.6", "8.9"), nms_by="operators"
    )
    text = run(path, "--layers").stdout
    assert "built by    TensorRT-RTX 10.3.0.26" in text and "no GPU" in text
    assert "runs on     compute capability 8.6, 8.9" in text
    assert "NMS         operators of the graph" in text
    assert "layers      2 as parsed, before fusion by TensorRT" in text
    assert ["1", "/model.105/Y7NMS", "PLUGIN_V3", "int32"] in [line.split() for line in text.splitlines()]
    assert "reformats" not in text


def test_an_engine_built_without_a_gpu_has_its_layers_as_its_builder_listed_them(run, engine):
    path = engine(inspector="", listing=(INSPECTIONS / "listing_rtx_1.7.txt").read_text(encoding="utf-8"))
    shown = run(path, "--layers").stdout
    text = flat(shown)
    assert "layers 10 as compiled ahead of time, before kernels are selected on the GPU: 2 correlation" in text
    assert "precision 4 fp16, 2 int8, 1 fp32, 1 bool conv layers 3 fp16, 1 int8 plugin nms weights 0.4 MB" in text
    assert "reformats" not in text and "activations" not in text
    row = next(line.split() for line in shown.splitlines() if "model.0.conv_U173" in line)
    assert row[1:6] == ["model.0.conv_U173_myl0_1", "correlation", "int8", "1x32x64x64", "HWC"]


@pytest.mark.parametrize("name", ["names_10.json", "names_11.json"])
def test_an_inspection_with_layer_names_only_is_reported_as_such(run, engine, name):
    text = flat(run(engine(inspector=(INSPECTIONS / name).read_text()), "--layers").stdout)
    assert "layers 3 as executed; only their names are stored" in text
    assert "precision not known reformats 1 plugin not known" in text
    assert "2 /model.105/Y7NMS" in text


def test_an_unreadable_inspection_becomes_a_note(run, engine):
    text = flat(run(engine(inspector='{"Layers": [')).stdout)
    assert "note The EngineInspector's description of the engine cannot be read: it is not JSON" in text
    assert "layers 2 as parsed" in text


def test_an_engine_without_layers_reports_them_as_unknown(run, engine):
    assert "The layers of this engine are not known." in run(engine(inspector="", network_layers=()), "--layers").stdout


def test_fields_that_the_record_does_not_contain_are_left_out(run, engine):
    path = engine(
        workspace_bytes=0, timing_cache="", device_memory_bytes=0, peak_memory_bytes=0, flags=(), optimization_level=-1
    )
    text = run(path).stdout
    assert "workspace   chosen by TensorRT" in text
    assert not [line for line in text.splitlines() if line.startswith(("cache", "memory", "flags", "DLA"))]
    assert "optimisation" not in text


def test_a_fixed_shape_is_shown_once(run, engine):
    fixed = (1, 3, 640, 640)
    path = engine(
        shapes=(InputShape(name="images", min=fixed, opt=fixed, max=fixed),),
        inputs=(EngineTensor(name="images", dtype="float32", shape=fixed),),
    )
    text = run(path).stdout
    assert "input       images float32 [1, 3, 640, 640]" in text and "shapes" not in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"strongly_typed": True}, "typed strongly, as in the graph"),
        ({"hardware_compatible": "ampere_plus"}, "compute capability 8.7, and any from Ampere on"),
        ({"version_compatible": True}, "compute capability 8.7; also with later versions of TensorRT"),
        ({"dla": DlaUse(core=1, fallback=("a", "b"))}, "DLA core 1; 2 layers on the GPU instead: a, b"),
        ({"dla": DlaUse(core=0, fallback=())}, "DLA core 0; all layers run on it"),
        ({"plugin": None}, "NMS TensorRT's EfficientNMS_TRT"),
        ({"nms_by": "none", "plugin": None}, "NMS none: the output is the decoded head"),
    ],
)
def test_build_options_are_shown(run, engine, changes, expected):
    assert expected in flat(run(engine(**changes)).stdout)


def test_the_json_contains_the_complete_record(run, engine):
    document = json.loads(run(engine(), "--json", "-").stdout)
    assert document["kind"] == "engine" and document["size_bytes"] == len(PLAN)
    assert document["record"]["plan_sha256"] == RECORD.plan_sha256
    assert document["record"]["metadata"]["class_names"] == list(NAMES)
    assert document["summary"]["types"] == {"Reformat": 2, "CaskConvolution": 2, "PluginV2": 1}
    assert document["table"]["layers"][1]["weights_bytes"] == (864 + 32) * 2


# --- foreign engines --------------------------------------------------------------------------------------------------


def test_a_foreign_engine_shows_what_its_header_contains(run, tmp_path):
    path = tmp_path / "foreign.engine"
    path.write_bytes(PLAN)
    text = flat(run(path, "--layers").stdout)
    assert "foreign.engine: TensorRT engine" in text
    assert "written by TensorRT 10.3.0.26, according to the plan" in text
    assert "note no build record (foreign.engine.json) next to the plan" in text
    assert f"trtexec --loadEngine={path} --dumpLayerInfo" in text
    assert "The layers of this engine are not known." in text


def test_a_foreign_engine_of_tensorrt_rtx_shows_its_targets(run, tmp_path):
    path = tmp_path / "rtx.plan"
    path.write_bytes(plan_of(b"vtrt", (1, 7, 1, 116), targets=0b001100))
    text = flat(run(path).stdout)
    assert "written by TensorRT-RTX 1.7.1.116" in text and "runs on compute capability 8.6, 8.9" in text


def test_the_header_of_a_real_tensorrt_rtx_engine_contains_version_length_and_targets(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx (pip install 'yolov7-deploy[tensorrt-rtx]')")
    path = tmp_path / "real.engine"
    code = """
import sys
import numpy, tensorrt_rtx as trt
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(0)
weights = numpy.ones((4, 3, 3, 3), numpy.float32)
layer = network.add_convolution_nd(network.add_input("images", trt.float32, (1, 3, 8, 8)), 4, (3, 3), weights)
network.mark_output(layer.get_output(0))
config = builder.create_builder_config()
config.num_compute_capabilities = 2
for index, name in enumerate(("SM75", "SM89")):
    config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
open(sys.argv[1], "wb").write(bytes(builder.build_serialized_network(network, config)))
print(trt.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    found = read_engine_file(path)
    assert found.product == "tensorrt_rtx" and found.targets == ("7.5", "8.9")
    assert found.tensorrt.split(".")[:3] == done.stdout.split()[-1].split(".")[:3]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoadError, match="truncated"):
        read_engine_file(path)


def test_a_plan_with_an_unknown_header_layout_is_described_without_a_version(run, tmp_path):
    path = tmp_path / "old.trt"
    path.write_bytes(b"ptrt" + bytes(100))
    text = run(path).stdout
    assert "written by" not in text and "old.trt: TensorRT engine" in text


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_truncated_engine_is_refused_with_both_lengths(run, engine):
    path = engine()
    path.write_bytes(PLAN[:1000])
    with pytest.raises(LoadError, match=r"was truncated: it has 1000 bytes, plan_bytes in tiny.engine.json is 4096"):
        run(path)


def test_a_truncated_foreign_engine_is_detected_by_its_header(run, tmp_path):
    path = tmp_path / "foreign.engine"
    path.write_bytes(PLAN[:1000])
    with pytest.raises(LoadError, match=r"truncated: it has 1000 bytes of at least 4096"):
        run(path)


def test_a_plan_shorter_than_its_header_is_refused_as_truncated(run, tmp_path):
    path = tmp_path / "tag.engine"
    path.write_bytes(b"ftrt")
    with pytest.raises(LoadError, match="truncated: it has 4 bytes of at least 28"):
        run(path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 500, b"PK\x03\x04 something", b"{}"])
def test_other_files_are_refused(run, tmp_path, content):
    path = tmp_path / "x.engine"
    path.write_bytes(content)
    with pytest.raises(LoadError, match="not a TensorRT engine"):
        run(path)


def test_a_plan_after_foreign_json_is_refused_with_the_command_that_extracts_it(run, tmp_path):
    path, extracted = tmp_path / "theirs.engine", tmp_path / "plan.engine"
    extra = json.dumps({"description": "a model", "stride": 32}).encode()
    path.write_bytes(len(extra).to_bytes(4, "little") + extra + PLAN)
    with pytest.raises(LoadError, match=r"after \d+ bytes of JSON") as caught:
        run(path)
    command = caught.value.fix.partition(":  ")[2].replace("plan.engine", str(extracted))
    subprocess.run(command, shell=True, check=True)
    assert extracted.read_bytes() == PLAN


@pytest.mark.parametrize("record", ["", "{", "[]", '{"schema": 99}', "\udcff"])
def test_an_unreadable_record_is_refused(run, engine, record):
    path = engine()
    path.with_name("tiny.engine.json").write_bytes(record.encode("utf-8", "surrogateescape"))
    with pytest.raises(LoadError, match=r"tiny\.engine\.json can"):
        run(path)


def test_a_folder_and_a_missing_file_are_refused(run, tmp_path):
    (tmp_path / "folder.engine").mkdir()
    with pytest.raises(LoadError, match="cannot be read"):
        run(tmp_path / "folder.engine")
    with pytest.raises(LoadError, match="does not exist"):
        run(tmp_path / "absent.engine")


def test_tensorrt_torch_and_onnx_are_not_needed(engine):
    code = """
import sys
for name in ("tensorrt", "tensorrt_rtx", "torch", "onnx", "onnxruntime"):
    sys.modules[name] = None
from yolov7_deploy.inspection.engine_file import read_engine_file
from yolov7_deploy.tensorrt.preflight import PlannedBuild, preflight
print(read_engine_file(sys.argv[1]).summary.layers)
preflight(PlannedBuild(product="tensorrt", tensorrt="10.3.0"))
"""
    done = subprocess.run([sys.executable, "-c", code, str(engine())], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr
