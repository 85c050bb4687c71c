"""`y7 info`: variants compared with the paper, weights files, ONNX files, and the errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.support.deterministic import fill_model
from tests.support.slow_cases import some_fast
from tests.support.small_models import HW, exported_tiny
from yolov7_deploy._version import __version__
from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.cli.info import info
from yolov7_deploy.errors import CheckpointError, LoadError, UsageError
from yolov7_deploy.inspection.complexity import inspect_variant, inspect_weights
from yolov7_deploy.inspection.onnx_file import read_onnx
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.onnx_export.onnx_model import OnnxModel

ROOT = Path(__file__).parents[2]
NAMES = ("first thing", "second")
OWN_ANCHORS = (
    ((11.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
    ((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
    ((116.0, 90.0), (156.0, 198.0), (373.0, 326.0)),
)
TINY_FUSED = 6_219_709


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(info)
    return lambda *arguments: CliRunner().invoke(app, [str(text) for text in arguments], catch_exceptions=False)


def write_weights(path: Path, *, anchors=None, training=True, **fields) -> Path:
    model = fill_model(new_model("yolov7-tiny", classes=2, training_form=training, anchors=anchors))
    checkpoint = Checkpoint(
        tensors=dict(model.state_dict()),
        variant="yolov7-tiny",
        training=training,
        class_names=NAMES,
        anchors=model.anchors,
        **fields,
    )
    save_checkpoint(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("info") / "tiny.onnx"
    exported_tiny(80).save(path)
    return path


# --- variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", some_fast(VARIANTS, every=2))
def test_every_variant_is_compared_with_the_paper(run, variant):
    done = run(variant)
    record = inspect_variant(variant)
    assert done.exit_code == 0
    assert f"{record.cost.parameters_fused:,}" in done.stdout
    for entry in record.paper:
        assert f"{entry.row.params_m}M" in done.stdout and str(entry.row.gflops) in done.stdout
    assert record.strides == VARIANTS[variant].strides and record.anchors == VARIANTS[variant].anchors


def test_e6e_shows_the_numbers_of_the_paper_and_of_this_package(run):
    text = run("yolov7-e6e").stdout
    for part in ("166,408,884", "151,757,244", "151,687,420", "843.22", "843.2", "56.8", "36", "739,380"):
        assert part in text


def test_tiny_is_compared_at_both_sizes_of_the_paper():
    record = inspect_variant("yolov7-tiny")
    assert [(entry.size, entry.row.gflops, round(entry.gflops, 2)) for entry in record.paper] == [
        (416, 5.8, 5.81),
        (320, 3.5, 3.44),
    ]


def test_d6_has_a_note_that_the_paper_counts_the_training_graph(run):
    text = " ".join(run("yolov7-d6").stdout.split())
    assert "the paper's 154.7M and 806.8G are for the training form" in text
    assert "the fused network has 133.8M and 702.6G" in text
    assert "training form" not in " ".join(inspect_variant("yolov7-e6").notes)


def test_layers_are_listed_with_their_inputs(run):
    lines = [line.split() for line in run("yolov7-w6", "--layers").stdout.splitlines()]
    assert ["1", "Conv", "64", "3/1", "2", "7040", "6976", "0"] in lines
    assert ["118", "Conv", "320", "3/1", "8", "369280", "-", "83", "training"] in lines
    assert ["118", "Detect", "255", "-", "653820", "653820", "114,115,116,117", "deploy"] in lines
    assert not any("IAuxDetect" in line for line in run("yolov7-w6").stdout.splitlines())


def test_a_variant_wins_over_a_file_of_its_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("yolov7").write_bytes(b"something else")
    assert "compared with the paper" in run("yolov7").stdout


def test_a_file_wins_when_its_suffix_is_given(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_weights(tmp_path / "yolov7.safetensors")
    assert "yolov7-tiny, training form, 2 classes" in run("yolov7.safetensors").stdout


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_described_with_variant_classes_and_digest(run, tmp_path):
    path = write_weights(tmp_path / "mine.safetensors")
    text = run(path).stdout
    record = inspect_weights(path)
    assert "yolov7-tiny, training form, 2 classes" in text
    assert "0 first thing, 1 second" in text
    assert f"sha256 {record.sha256}" in text and len(record.sha256) == 64
    assert "anchors of the variant" in text
    assert record.parameters == record.cost.parameters_training
    assert record.size_bytes == path.stat().st_size


def test_weights_show_their_training_size_source_and_writer(run, tmp_path):
    path = write_weights(tmp_path / "mine.safetensors", training_size=160, source="first.pt", source_sha256="1a" * 32)
    text = run(path, "--json", tmp_path / "r.json").stdout
    for part in (
        "trained at  160x160",
        f"source      first.pt {'1a' * 32}",
        f"written by  yolov7-deploy {__version__}",
    ):
        assert part in text
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["training_size"], record["origin"], record["version"]) == (160, "first.pt", __version__)
    assert "trained at" not in run(write_weights(tmp_path / "unknown.safetensors")).stdout


def test_an_onnx_file_shows_the_training_size_of_its_weights(run, tmp_path):
    model = exported_tiny(80)
    OnnxModel.of(model.proto, replace(model.metadata, training_size=320)).save(tmp_path / "m.onnx")
    assert "trained at  320x320" in run(tmp_path / "m.onnx").stdout


def test_weights_in_deploy_form_have_the_parameters_of_that_form(tmp_path):
    record = inspect_weights(write_weights(tmp_path / "deploy.safetensors", training=False))
    assert (record.form, record.parameters) == ("deploy", record.cost.parameters_deploy)


def test_custom_anchors_are_shown(run, tmp_path):
    path = write_weights(tmp_path / "mine.safetensors", anchors=OWN_ANCHORS)
    text = run(path).stdout
    assert "custom anchors, different from the variant's" in text and "11,13" in text
    assert inspect_weights(path).custom_anchors


def test_official_state_dicts_are_described_as_well(run, tmp_path):
    torch.save(fill_model(new_model("yolov7-tiny")).state_dict(), tmp_path / "w.pt")
    assert "yolov7-tiny, deploy form, 80 classes" in run(tmp_path / "w.pt").stdout


def test_an_official_name_is_searched_in_the_weights_folder(run, tmp_path, monkeypatch):
    write_weights(tmp_path / "yolov7-e6.safetensors")
    monkeypatch.setenv("Y7_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    assert "yolov7-tiny, training form" in run("yolov7-e6.pt").stdout


def test_many_classes_are_truncated_in_the_text_and_complete_in_the_json(run, tmp_path):
    model = fill_model(new_model("yolov7-tiny", classes=120))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    done = run(tmp_path / "w.pt", "--json", tmp_path / "r.json")
    assert "and 20 more, all of them in --json" in " ".join(done.stdout.split())
    assert len(json.loads((tmp_path / "r.json").read_text())["class_names"]) == 120


# --- ONNX -------------------------------------------------------------------------------------------------------------


def test_onnx_files_of_this_package_show_their_metadata(run, onnx_file):
    text = run(onnx_file).stdout
    for part in ("yolov7-tiny, fp32, 80 classes", "58 Conv", "6,219,709", "y7 1", "conf 0.25", "thing 0"):
        assert part in text
    assert f"images float32 [1, 3, {HW[0]}, {HW[1]}]" in text
    assert "conf_threshold float32 [1] (optional)" in text


@pytest.mark.parametrize("nms", ["plugin", "standard", "efficient", "none"])
def test_reading_without_onnx_equals_reading_with_it(tmp_path, nms):
    model = exported_tiny(80, nms=nms)
    model.save(tmp_path / "m.onnx")
    record, graph = read_onnx(tmp_path / "m.onnx"), model.proto.graph
    assert record.metadata == model.metadata
    assert record.ir_version == model.proto.ir_version
    assert record.opsets == {entry.domain: entry.version for entry in model.proto.opset_import}
    assert sum(record.nodes.values()) == len(graph.node)
    assert record.nodes["Conv"] == sum(node.op_type == "Conv" for node in graph.node)
    assert record.functions == {body.name: len(body.node) for body in model.proto.functions}
    for ports, values in ((record.inputs, graph.input), (record.outputs, graph.output)):
        assert [port.name for port in ports] == [value.name for value in values]
        for port, value in zip(ports, values, strict=True):
            kind = value.type.tensor_type
            assert helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype)) == kind.elem_type
            assert port.shape == tuple(dim.dim_value or dim.dim_param or "?" for dim in kind.shape.dim)
    assert record.parameters == TINY_FUSED


def foreign(tmp_path: Path, nodes, weights, *, ir_version: int = 8, shape=("batch", 3, None, 8)) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape)]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in weights]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)
    path = tmp_path / "foreign.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def weight(name: str, *shape: int, dtype=np.float16) -> TensorProto:
    return numpy_helper.from_array(np.zeros(shape, dtype), name)


def test_foreign_onnx_files_are_described_without_metadata(run, tmp_path):
    path = foreign(tmp_path, [helper.make_node("Conv", ["x", "w"], ["y"])], [weight("w", 4, 3, 1, 1)])
    done = run(path, "--json", tmp_path / "r.json")
    assert "metadata    none: not written by this package" in done.stdout
    assert "x float16 [batch, 3, ?, 8]" in done.stdout
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["kind"], record["metadata"], record["parameters"]) == ("onnx", None, 12)


def test_only_weights_count_as_parameters_also_quantized_and_constant_ones(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"]),
        helper.make_node("Constant", [], ["c"], value=weight("", 2, 5)),
        helper.make_node("Conv", ["x", "w", "bias"], ["a"]),
        helper.make_node("MatMul", ["a", "c"], ["b"]),
        helper.make_node("Add", ["b", "grid"], ["y"]),
    ]
    weights = [weight("q", 4, 3, 1, 1, dtype=np.int8), weight("scale"), weight("bias", 4), weight("grid", 100)]
    assert read_onnx(foreign(tmp_path, nodes, weights)).parameters == 12 + 4 + 10


def test_old_files_that_list_weights_as_inputs_have_one_input(tmp_path):
    path = foreign(tmp_path, [helper.make_node("Conv", ["x", "w"], ["y"])], [weight("w", 4, 3, 1, 1)], ir_version=3)
    assert [port.name for port in read_onnx(path).inputs] == ["x"]


def test_truncated_files_are_refused_at_any_length(onnx_file, tmp_path):
    data = onnx_file.read_bytes()
    rng = np.random.default_rng(5)
    path = tmp_path / "cut.onnx"
    for length in (0, 1, 2, 100, len(data) // 2, *rng.integers(1, 5000, 20).tolist()):
        path.write_bytes(data[:length])
        with pytest.raises(LoadError, match=r"not an ONNX file|metadata"):
            read_onnx(path)


def test_random_bytes_are_refused_without_a_hang(tmp_path):
    rng = np.random.default_rng(6)
    path = tmp_path / "noise.onnx"
    for _ in range(300):
        path.write_bytes(rng.integers(0, 256, 200, dtype=np.uint8).tobytes())
        with pytest.raises(LoadError):
            read_onnx(path)


def test_corrupted_bytes_give_a_result_or_a_load_error(tmp_path):
    good = foreign(tmp_path, [helper.make_node("Conv", ["x", "w"], ["y"])], [weight("w", 4, 3, 1, 1)]).read_bytes()
    rng = np.random.default_rng(8)
    path = tmp_path / "damaged.onnx"
    refused = 0
    for _ in range(500):
        data = bytearray(good)
        data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)
        try:
            read_onnx(path)
        except LoadError:
            refused += 1
    assert 0 < refused < 500


def test_onnx_files_are_described_without_torch_onnx_and_onnxruntime(onnx_file):
    code = (
        "import sys\nsys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnxruntime', 'cv2', 'safetensors')))\n"
        "import typer\nfrom yolov7_deploy.cli.info import info\n"
        f"sys.argv = ['info', {str(onnx_file)!r}]\ntyper.run(info)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "6,219,709" in done.stdout


# --- records and refusals ---------------------------------------------------------------------------------------------


def test_stdout_contains_only_the_json(run):
    done = run("yolov7", "--json", "-")
    record = json.loads(done.stdout)
    assert record["kind"] == "variant"
    assert record["cost"]["parameters_fused"] == 36_905_341
    assert record["paper"][0]["row"]["fps"] == 161
    assert len(record["layers"]) == 105 + 2  # the head in both forms
    assert "compared with the paper" in done.stderr


@pytest.mark.parametrize("kind", ["weights", "onnx"])
def test_the_json_of_a_file_names_its_kind(run, tmp_path, onnx_file, kind):
    path = onnx_file if kind == "onnx" else write_weights(tmp_path / "w.safetensors")
    assert json.loads(run(path, "--json", "-").stdout)["kind"] == kind


@pytest.mark.parametrize("name", ["absent.pt", "absent.onnx", "yolov9"])
def test_missing_files_and_unknown_names_are_refused(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=name):
        run(name)


def test_layers_of_an_onnx_file_are_refused(run, onnx_file):
    with pytest.raises(UsageError, match="layers is for variants"):
        run(onnx_file, "--layers")


def test_weights_of_another_network_are_refused(run, tmp_path):
    torch.save({"model.0.conv.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError):
        run(tmp_path / "other.pt")


@pytest.mark.parametrize("target", ["yolov7", "w.pt"])
def test_without_torch_the_extra_is_named(target):
    code = (
        f"import sys\nsys.modules['torch'] = None\nsys.argv = ['y7', 'info', {target!r}]\n"
        "from yolov7_deploy.cli.app import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    expected = "MissingLibraryError: torch is needed for y7 info.\npip install 'yolov7-deploy[export]'\n"
    assert (done.returncode, done.stderr) == (1, expected)
