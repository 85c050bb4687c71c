"""`y7 build` and `y7 export --engine`: options, errors, output and files."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from tests.support.deterministic import fill_model
from tests.support.engines import HAS_RTX, IMAGE_SIZE, NO_RTX, exported, files, foreign
from tests.support.small_models import metadata_of
from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.cli.app import app
from yolov7_deploy.cli.build import parse_targets
from yolov7_deploy.errors import EngineError, LoadError, MissingLibraryError, UsageError, Y7Error
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.options import EngineOptions, compute_capability
from yolov7_deploy.tensorrt import builder
from yolov7_deploy.tensorrt.build_messages import Installation
from yolov7_deploy.tensorrt.builder import build_engine
from yolov7_deploy.tensorrt.engine import Engine
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx, prepare_graph
from yolov7_deploy.tensorrt.plugin_library import PluginLibrary

needs_rtx = pytest.mark.skipif(not HAS_RTX, reason=NO_RTX)
MIB = 2**20
TIMEOUT_S = 120


def y7(*arguments):
    """Run a command in this process and return its result, with our errors in `exception`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,capability", [("sm86", "8.6"), ("SM_120", "12.0"), ("8.6", "8.6"), ("75", "7.5"), (" sm121 ", "12.1")]
)
def test_targets_are_parsed_in_every_usual_form(text, capability):
    assert compute_capability(text) == capability


@pytest.mark.parametrize("text", ["", "ampere", "8", "sm", "8.6.1", "-86", "sm1200"])
def test_an_invalid_compute_capability_is_a_usage_error(text):
    with pytest.raises(UsageError, match="is not a compute capability"):
        compute_capability(text)


def test_targets_are_sorted_and_unique():
    assert EngineOptions(targets=parse_targets("sm120, 8.6,sm86")).targets == ("8.6", "12.0")


def test_an_empty_list_of_targets_is_a_usage_error():
    with pytest.raises(UsageError, match="does not contain a GPU"):
        parse_targets(" , ")


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"plugin": "maybe"}, "--plugin maybe"),
        ({"hardware_compatible": "all"}, "--hardware-compatible all"),
        ({"min_batch": 4, "max_batch": 2}, "4, 2"),
        ({"min_batch": 0}, "--min-batch"),
        ({"workspace_gib": 0.0}, "--workspace 0"),
        ({"workspace_gib": float("nan")}, "--workspace nan"),
        ({"opt_level": 6}, "--opt-level 6"),
        ({"dla": -1}, "--dla -1"),
        ({"timing_cache": Path("x"), "use_timing_cache": False}, "contradict"),
    ],
)
def test_invalid_options_are_a_usage_error(fields, message):
    with pytest.raises(UsageError) as raised:
        EngineOptions(**fields)
    assert message in raised.value.message


@pytest.mark.parametrize(
    "arguments,fix",
    [
        (["build", "--weights", "yolov7"], "y7 export --weights yolov7 --engine"),
        (["build", "--weights", "best.pt"], "y7 export --weights best.pt --engine"),
        (["build", "--weights", "best.engine"], "y7 export --weights WEIGHTS.pt --engine"),
        (["build", "--weights", "x.onnx", "--batch", "2", "--max-batch", "4"], "Leave one of them out"),
        (["build", "--weights", "x.onnx", "--batch", "0"], "--min-batch 1"),
        (["export", "--target", "sm86"], "Add  --engine"),
        (["export", "--workspace", "2"], "Add  --engine"),
    ],
)
def test_invalid_commands_are_a_usage_error_with_the_command_to_type(arguments, fix):
    error = y7(*arguments).exception
    assert isinstance(error, UsageError)
    assert fix in error.fix


# --- invalid files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"hello world\n" * 50, b"\x08\x08" * 1000, b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_not_onnx_is_a_load_error(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert isinstance(y7("build", "--weights", path).exception, LoadError)
    assert files(tmp_path) == ["x.onnx"]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_onnx_file_is_a_load_error(tiny_onnx, share):
    data = tiny_onnx.read_bytes()
    tiny_onnx.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(LoadError, match=r"truncated|no nodes"):
        open_onnx(tiny_onnx)


def test_a_damaged_graph_is_our_error_or_is_prepared(tmp_path):
    """Change bytes of names and functions, because names are decoded long after the file is read."""
    without_weights = onnx.ModelProto()
    without_weights.CopyFrom(exported().proto)
    for weight in without_weights.graph.initializer:
        weight.ClearField("raw_data")
    data, path = without_weights.SerializeToString(), tmp_path / "x.onnx"
    names = [found.start() for found in re.finditer(rb"num_dets|y7nms|Y7NMS|conf_threshold|batch|images", data)]
    generator = np.random.default_rng(3)
    rejected = 0
    for _ in range(300):
        damaged = bytearray(data)
        for offset in generator.choice(names, 3) + generator.integers(-4, 12, 3):
            damaged[offset % len(data)] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            prepare_graph(open_onnx(path), use_plugin=False)
        except Y7Error:
            rejected += 1
    assert 0 < rejected < 300


def test_a_missing_file_is_a_load_error(tmp_path):
    with pytest.raises(LoadError, match="No such file"):
        open_onnx(tmp_path / "nothing.onnx")


def test_metadata_of_a_file_of_another_exporter_lists_its_assumptions(foreign_onnx, caplog):
    metadata = open_onnx(foreign_onnx).metadata
    assert (metadata.variant, metadata.input_hw, metadata.batch, metadata.precision) == ("custom", (8, 8), 1, "fp32")
    assert metadata.notes[0] in caplog.text


def test_an_unknown_operator_set_is_an_error(tmp_path):
    path = tmp_path / "x.onnx"
    onnx.save(foreign(opset=99), path)
    with pytest.raises(EngineError, match=r"operator set 99.*supports sets up to \d+"):
        build_engine(open_onnx(path), installation=Installation(product="tensorrt_rtx", version="1.7"))


# --- installed TensorRT ----------------------------------------------------------------------------------------------


def not_installed(module):
    return False


def test_without_tensorrt_and_without_a_gpu_tensorrt_rtx_is_missing(monkeypatch):
    monkeypatch.setattr(builder, "is_installed", not_installed)
    monkeypatch.setattr(builder, "_GPU_DEVICES", ())
    with pytest.raises(MissingLibraryError, match=r"tensorrt_rtx is needed.*without a GPU") as caught:
        builder.find_tensorrt(EngineOptions())
    assert caught.value.fix == "pip install 'yolov7-deploy[tensorrt-rtx]'"


def test_without_tensorrt_and_with_a_gpu_tensorrt_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(builder, "is_installed", not_installed)
    monkeypatch.setattr(builder, "_GPU_DEVICES", (tmp_path,))
    with pytest.raises(MissingLibraryError, match="tensorrt is needed") as caught:
        builder.find_tensorrt(EngineOptions())
    assert caught.value.fix == "pip install 'yolov7-deploy[tensorrt]'"


def test_targets_require_tensorrt_rtx(monkeypatch):
    monkeypatch.setattr(builder, "is_installed", lambda module: module == "tensorrt")
    with pytest.raises(MissingLibraryError, match="tensorrt_rtx is needed"):
        builder.find_tensorrt(EngineOptions(targets=("8.6",)))


def test_export_with_engine_checks_tensorrt_before_the_weights(monkeypatch):
    monkeypatch.setattr(builder, "is_installed", not_installed)
    assert isinstance(y7("export", "--weights", "nowhere.pt", "--engine").exception, MissingLibraryError)


def test_a_tensorrt_that_cannot_build_here_is_an_error_with_its_message(monkeypatch):
    broken = Installation(product="tensorrt", version="8.6.1", error="CUDA initialization failure with error: 35")
    monkeypatch.setattr(builder, "is_installed", lambda module: module == "tensorrt")
    monkeypatch.setattr(builder, "probe", lambda product: broken)
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 cannot build here: CUDA init") as caught:
        builder.find_tensorrt(EngineOptions())
    assert "tensorrt-rtx" in caught.value.fix


@needs_rtx
def test_tensorrt_rtx_builds_where_tensorrt_cannot(monkeypatch):
    monkeypatch.setattr(builder, "is_installed", lambda module: True)
    found = builder.find_tensorrt(EngineOptions())
    if found.product == "tensorrt":
        pytest.skip("a TensorRT that builds is installed")
    assert (found.product, found.error, found.abi) == ("tensorrt_rtx", "", "v3")


def test_on_a_gpu_before_ampere_the_plugin_needs_code_for_that_gpu_only(monkeypatch):
    """TensorRT-RTX builds for that GPU then, and else for all from Ampere on."""
    library = PluginLibrary(
        path=Path("it.so"),
        abi="v3",
        version="1",
        kernels_abi=3,
        compute_capabilities=(75,),
        ptx=(),
        cuda="",
        headers="",
    )
    monkeypatch.setattr(builder, "find_plugin", lambda abi: library)
    here = Installation(product="tensorrt_rtx", version="1.7", compute_capability="7.5", targets=("7.5", "8.0", "8.6"))
    targets, (note,) = builder._select_targets(EngineOptions(), here)
    assert targets == ("7.5",) and "7.5, the GPU of this machine" in note
    assert builder.select_plugin(exported(), EngineOptions(), targets, here) == (library, ())
    elsewhere = replace(here, compute_capability="")
    assert builder._select_targets(EngineOptions(), elsewhere)[0] == ()
    assert builder.select_plugin(exported(), EngineOptions(), (), elsewhere)[0] is None


# --- output and files -----------------------------------------------------------------------------------------------


@needs_rtx
def test_a_build_prints_a_description_and_writes_both_files(tiny_onnx, tmp_path):
    arguments = ("--target", "sm86,sm120", "--plugin", "off", "--json", tmp_path / "r.json")
    result = y7("build", "--weights", tiny_onnx, *arguments)
    assert result.exception is None, result.output
    assert files(tmp_path) == ["r.json", "tiny.engine", "tiny.engine.json", "tiny.onnx"]
    engine = Engine.load(tmp_path / "tiny.engine")
    assert json.loads((tmp_path / "r.json").read_text())["record"] == json.loads(engine.record.to_json())
    for part in ("8.6, 12.0", "operators of the graph", f"{len(engine.plan) / 1e6:.1f} MB", "layers before fusion"):
        assert part in result.output
    assert engine.record.onnx_sha256 == hashlib.sha256(tiny_onnx.read_bytes()).hexdigest()


@needs_rtx
def test_the_engine_of_another_exporters_file_has_the_hash_of_that_file(foreign_onnx, tmp_path):
    foreign_onnx.write_bytes(foreign_onnx.read_bytes() + b"\x08\x08")  # the IR version again: another serialization
    result = y7("build", "--weights", foreign_onnx, "--target", "sm86", "--output", tmp_path / "new" / "x.engine")
    assert result.exception is None, result.output
    record = Engine.load(tmp_path / "new" / "x.engine").record
    assert record.onnx_sha256 == hashlib.sha256(foreign_onnx.read_bytes()).hexdigest()


@needs_rtx
def test_a_failed_build_keeps_the_existing_engine(tiny_onnx, tmp_path):
    older = tmp_path / "tiny.engine"
    older.write_bytes(b"vtrt older")
    result = y7("build", "--weights", tiny_onnx, "--target", "sm86", "--plugin", "off", "--workspace", "1e-9")
    assert isinstance(result.exception, EngineError)
    assert older.read_bytes() == b"vtrt older"
    assert files(tmp_path) == ["tiny.engine", "tiny.onnx"]


@pytest.mark.parametrize(
    "output,message",
    [("x.bin", "not named like an engine"), ("a-file/new/x.engine", "a-file is not a writable folder")],
)
def test_an_output_path_that_cannot_be_written_is_an_error_before_the_build(foreign_onnx, tmp_path, output, message):
    (tmp_path / "a-file").touch()
    started = time.perf_counter()
    error = y7("build", "--weights", foreign_onnx, "--output", tmp_path / output).exception
    assert isinstance(error, Y7Error) and message in error.message
    assert time.perf_counter() - started < 5


def test_a_missing_temporary_folder_is_a_usage_error(monkeypatch, foreign_onnx, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="No such file or directory") as caught:
        build_engine(
            open_onnx(foreign_onnx), installation=Installation(product="tensorrt_rtx", version="1.7", targets=("8.6",))
        )
    assert "TMPDIR" in caught.value.fix


@needs_rtx
def test_export_builds_the_engine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = fill_model(new_model("yolov7-tiny"))
    checkpoint = Checkpoint(
        tensors=model.state_dict(),
        variant="yolov7-tiny",
        training=False,
        class_names=metadata_of(model).class_names,
        anchors=model.anchors,
    )
    save_checkpoint(checkpoint, tmp_path / "tiny.safetensors")
    arguments = ("--img", IMAGE_SIZE, "--no-verify", "--plugin", "off", "--json", "r.json")
    result = y7("export", "--weights", "tiny.safetensors", "--fp16", "--engine", "--target", "8.9", *arguments)
    assert result.exception is None, result.output
    assert "tiny-fp16.engine: " in result.output
    record = Engine.load(tmp_path / "tiny-fp16.engine").record
    assert (record.targets, record.metadata.precision) == (("8.9",), "fp16")
    assert json.loads(Path("r.json").read_text())["engine"]["record"]["targets"] == ["8.9"]
