"""`y7 build` and `y7 export --engine`: what people type, what they see, and what lies on the disk afterwards."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from tests.support.deterministic import fill_model
from tests.support.engines import HAS_RTX, NO_RTX, SIDE, exported, files, foreign
from tests.support.small_models import metadata_of
from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.cli.app import app
from yolov7_deploy.cli.build import parse_targets
from yolov7_deploy.errors import EngineError, LoadError, MissingLibraryError, UsageError, Y7Error
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.options import EngineOptions, compute_capability
from yolov7_deploy.tensorrt import selection as choose
from yolov7_deploy.tensorrt.build_messages import Installation
from yolov7_deploy.tensorrt.builder import build_engine
from yolov7_deploy.tensorrt.engine import Engine
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx, prepare_graph

needs_rtx = pytest.mark.skipif(not HAS_RTX, reason=NO_RTX)
MIB = 2**20
TIMEOUT_S = 120


def y7(*arguments):
    """Runs a command in this process; gives its result. Our errors are in `exception`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- what is typed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,capability", [("sm86", "8.6"), ("SM_120", "12.0"), ("8.6", "8.6"), ("75", "7.5"), (" sm121 ", "12.1")]
)
def test_targets_are_read_as_people_type_them(text, capability):
    assert compute_capability(text) == capability


@pytest.mark.parametrize("text", ["", "ampere", "8", "sm", "8.6.1", "-86", "sm1200"])
def test_what_is_no_compute_capability_is_wrong_usage(text):
    with pytest.raises(UsageError, match="no compute capability"):
        compute_capability(text)


def test_targets_come_in_order_and_once():
    assert EngineOptions(targets=parse_targets("sm120, 8.6,sm86")).targets == ("8.6", "12.0")


def test_an_empty_list_of_targets_is_wrong_usage():
    with pytest.raises(UsageError, match="names no GPU"):
        parse_targets(" , ")


@pytest.mark.parametrize(
    "fields,says",
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
def test_options_that_mean_nothing_are_wrong_usage(fields, says):
    with pytest.raises(UsageError, match=says):
        EngineOptions(**fields)


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["build", "--weights", "yolov7"], "y7 export --weights yolov7 --engine"),
        (["build", "--weights", "best.pt"], "y7 export --weights best.pt --engine"),
        (["build", "--weights", "x.onnx", "--batch", "2", "--max-batch", "4"], "Leave one of them out"),
        (["export", "--target", "sm86"], "Add  --engine"),
        (["export", "--workspace", "2"], "Add  --engine"),
    ],
)
def test_commands_that_cannot_be_meant_say_what_to_type(arguments, says):
    error = y7(*arguments).exception
    assert isinstance(error, UsageError)
    assert says in error.fix


# --- files that are no model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"hello world\n" * 50, b"\x08\x08" * 1000, b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_onnx_is_our_error(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert isinstance(y7("build", "--weights", path).exception, LoadError)
    assert files(tmp_path) == ["x.onnx"]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_an_onnx_file_that_is_cut_off_is_our_error(tiny, share):
    data = tiny.read_bytes()
    tiny.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(LoadError, match=r"cut off|no nodes"):
        open_onnx(tiny)


def test_a_damaged_graph_is_our_error_or_prepared(tmp_path):
    """Bytes where names and functions are, since a name may be read long after the file."""
    light = onnx.ModelProto()
    light.CopyFrom(exported().proto)
    for weight in light.graph.initializer:
        weight.ClearField("raw_data")
    data, path = light.SerializeToString(), tmp_path / "x.onnx"
    names = [found.start() for found in re.finditer(rb"num_dets|y7nms|Y7NMS|conf_threshold|batch|images", data)]
    generator = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in generator.choice(names, 3) + generator.integers(-4, 12, 3):
            damaged[place % len(data)] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            prepare_graph(open_onnx(path), own_plugin=False)
        except Y7Error:
            refused += 1
    assert 0 < refused < 300


def test_an_absent_file_is_our_error(tmp_path):
    with pytest.raises(LoadError, match="No such file"):
        open_onnx(tmp_path / "nothing.onnx")


def test_a_foreign_file_has_a_metadata_that_says_what_it_assumes(small, caplog):
    metadata = open_onnx(small).metadata
    assert (metadata.variant, metadata.input_hw, metadata.batch, metadata.precision) == ("custom", (8, 8), 1, "fp32")
    assert metadata.notes[0] in caplog.text


def test_an_operator_set_of_the_future_is_named(tmp_path):
    path = tmp_path / "x.onnx"
    onnx.save(foreign(opset=99), path)
    with pytest.raises(EngineError, match=r"operator set 99.*knows sets up to \d+"):
        build_engine(open_onnx(path), on=Installation(product="tensorrt_rtx", version="1.7"))


# --- what is not installed --------------------------------------------------------------------------------------------


def nothing(module):
    return False


def test_without_tensorrt_and_without_a_gpu_the_one_that_builds_without_is_named(monkeypatch):
    monkeypatch.setattr(choose, "is_installed", nothing)
    monkeypatch.setattr(choose, "_GPU_DEVICES", ())
    with pytest.raises(MissingLibraryError, match=r"tensorrt_rtx is needed.*without a GPU") as caught:
        choose.find_tensorrt(EngineOptions())
    assert caught.value.fix == "pip install 'yolov7-deploy[tensorrt-rtx]'"


def test_without_tensorrt_on_a_gpu_tensorrt_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(choose, "is_installed", nothing)
    monkeypatch.setattr(choose, "_GPU_DEVICES", (tmp_path,))
    with pytest.raises(MissingLibraryError, match="tensorrt is needed") as caught:
        choose.find_tensorrt(EngineOptions())
    assert caught.value.fix == "pip install 'yolov7-deploy[tensorrt]'"


def test_targets_need_tensorrt_rtx_whatever_else_is_there(monkeypatch):
    monkeypatch.setattr(choose, "is_installed", lambda module: module == "tensorrt")
    with pytest.raises(MissingLibraryError, match="tensorrt_rtx is needed"):
        choose.find_tensorrt(EngineOptions(targets=("8.6",)))


def test_an_export_for_an_engine_asks_for_tensorrt_before_the_weights(monkeypatch):
    monkeypatch.setattr(choose, "is_installed", nothing)
    assert isinstance(y7("export", "--weights", "nowhere.pt", "--engine").exception, MissingLibraryError)


def test_a_tensorrt_that_cannot_build_here_is_named_with_its_words(monkeypatch):
    broken = Installation(product="tensorrt", version="8.6.1", fault="CUDA initialization failure with error: 35")
    monkeypatch.setattr(choose, "is_installed", lambda module: module == "tensorrt")
    monkeypatch.setattr(choose, "probe", lambda product: broken)
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 cannot build here: CUDA init") as caught:
        choose.find_tensorrt(EngineOptions())
    assert "tensorrt-rtx" in caught.value.fix


@needs_rtx
def test_tensorrt_rtx_builds_where_tensorrt_cannot(monkeypatch):
    monkeypatch.setattr(choose, "is_installed", lambda module: True)
    found = choose.find_tensorrt(EngineOptions())
    if found.product == "tensorrt":
        pytest.skip("a TensorRT that builds is installed")
    assert (found.product, found.fault, found.abi) == ("tensorrt_rtx", "", "v3")


# --- what lies there afterwards ---------------------------------------------------------------------------------------


@needs_rtx
def test_a_build_says_what_it_did_and_writes_both_files(tiny, tmp_path):
    result = y7("build", "--weights", tiny, "--target", "sm86,sm120", "--plugin", "off", "--json", tmp_path / "r.json")
    assert result.exception is None, result.output
    assert files(tmp_path) == ["r.json", "tiny.engine", "tiny.engine.json", "tiny.onnx"]
    engine = Engine.load(tmp_path / "tiny.engine")
    assert json.loads((tmp_path / "r.json").read_text())["record"] == json.loads(engine.record.to_json())
    for words in ("8.6, 12.0", "operators of the graph", f"{len(engine.plan) / 1e6:.1f} MB", "layers as parsed"):
        assert words in result.output
    assert engine.record.onnx_sha256 == hashlib.sha256(tiny.read_bytes()).hexdigest()


@needs_rtx
def test_a_build_that_fails_leaves_the_older_engine(tiny, tmp_path):
    older = tmp_path / "tiny.engine"
    older.write_bytes(b"vtrt older")
    result = y7("build", "--weights", tiny, "--target", "sm86", "--plugin", "off", "--workspace", "1e-9")
    assert isinstance(result.exception, EngineError)
    assert older.read_bytes() == b"vtrt older"
    assert files(tmp_path) == ["tiny.engine", "tiny.onnx"]


@pytest.mark.parametrize("output,says", [("x.bin", "not named like an engine"), ("no/where.engine", "no folder")])
def test_a_place_that_cannot_be_written_is_known_before_the_build(small, tmp_path, output, says):
    started = time.perf_counter()
    error = y7("build", "--weights", small, "--output", tmp_path / output).exception
    assert isinstance(error, Y7Error) and says in error.message
    assert time.perf_counter() - started < 5


def test_a_temporary_folder_without_room_is_our_error(monkeypatch, small):
    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(EngineError, match="No space left on device") as caught:
        build_engine(open_onnx(small), on=Installation(product="tensorrt_rtx", version="1.7", targets=("8.6",)))
    assert "TMPDIR" in caught.value.fix


@needs_rtx
def test_an_export_goes_on_to_the_engine(tmp_path, monkeypatch):
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
    arguments = ("--img", SIDE, "--no-verify", "--plugin", "off", "--json", "r.json")
    result = y7("export", "--weights", "tiny.safetensors", "--fp16", "--engine", "--target", "8.9", *arguments)
    assert result.exception is None, result.output
    assert "tiny-fp16.engine: " in result.output
    record = Engine.load(tmp_path / "tiny-fp16.engine").record
    assert (record.targets, record.metadata.precision) == (("8.9",), "fp16")
    assert json.loads(Path("r.json").read_text())["engine"]["record"]["targets"] == ["8.9"]
