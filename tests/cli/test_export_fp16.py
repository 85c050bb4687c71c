"""`y7 export --fp16` and `y7 verify` of half files: what is typed, written, checked and refused."""

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

from tests.support.sample_images import CONF, noise
from tests.support.small_models import HW
from yolov7_deploy.cli.app import app
from yolov7_deploy.cli.export import parse_precision
from yolov7_deploy.errors import ParityError, UsageError
from yolov7_deploy.evaluation import parity
from yolov7_deploy.evaluation.parity import TOLERANCES, StageResult
from yolov7_deploy.evaluation.verification import verify_artifacts
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.export import export_weights

IMG = f"{HW[0]},{HW[1]}"


def export(weights, *arguments):
    common = ["export", "--weights", str(weights), "--img", IMG, "--conf", str(CONF)]
    return CliRunner().invoke(app, [*common, *arguments])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pair(files, tmp_path_factory):
    """A float32 file, and the same in half."""
    whole = files("plugin")
    half = tmp_path_factory.mktemp("half") / "m-fp16.onnx"
    to_fp16(OnnxModel.load(whole), [noise(*HW)]).save(half)
    return whole, half


# --- what is typed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision, quantize, flags, expected",
    [
        (None, None, [], "fp32"),
        ("fp32", None, [], "fp32"),
        ("fp16", None, [], "fp16"),
        ("FP16", None, [], "fp16"),
        (None, None, ["--fp16"], "fp16"),
        (None, None, ["--half"], "fp16"),
        (None, 16, [], "fp16"),
        (None, 32, [], "fp32"),
        (None, 8, [], "int8"),
        ("int8", 8, ["--int8"], "int8"),
        ("fp16", 16, ["--fp16", "--half"], "fp16"),
    ],
)
def test_every_spelling_means_one_precision(precision, quantize, flags, expected):
    assert parse_precision(precision, quantize, flags) == expected


@pytest.mark.parametrize(
    "typed",
    [
        ["--precision", "fp32", "--fp16"],
        ["--half", "--quantize", "32"],
        ["--precision", "fp16", "--quantize", "32"],
        ["--fp16", "--int8"],
    ],
    ids=" ".join,
)
def test_flags_that_contradict_each_other_are_refused(typed, files):
    result = export(files(), *typed)
    assert isinstance(result.exception, UsageError)
    assert "contradict" in result.exception.message
    assert all(part in result.exception.message for part in typed)


@pytest.mark.parametrize("typed", [["--precision", "fp64"], ["--quantize", "4"]], ids=" ".join)
def test_an_unknown_precision_is_refused_with_the_known_ones(typed, files):
    result = export(files(), *typed)
    assert isinstance(result.exception, UsageError)
    assert " ".join(typed) in result.exception.message
    assert "--precision fp16" in result.exception.fix


# --- what is written ----------------------------------------------------------------------------------------------


def test_fp16_writes_a_verified_file_of_its_own_name(files, here):
    write_image(here / "p.png", noise(*HW))
    result = export(files(), "--fp16", "--image", "p.png", "--json", "record.json")
    assert result.exception is None, result.output
    written = here / f"{files().stem}-fp16.onnx"
    metadata = OnnxModel.load(written).metadata
    assert metadata.precision == "fp16"
    assert metadata.notes[-1] in result.output
    assert f"{written.name}: " in result.output and ", fp16, opset 17" in result.output
    record = json.loads((here / "record.json").read_text())
    assert record["metadata"]["precision"] == "fp16"
    assert record["parity"]["ok"]
    head = record["parity"]["stages"][0]
    assert head["limits"] == {"raw / std": TOLERANCES["fp16"].head, "rms / std": TOLERANCES["fp16"].head_rms}
    assert TOLERANCES["fp32"].head < head["differences"]["raw / std"]


def test_fp32_keeps_the_plain_name(files, here):
    assert export(files(), "--precision", "fp32", "--no-verify").exception is None
    assert OnnxModel.load(here / f"{files().stem}.onnx").metadata.precision == "fp32"


def test_a_library_caller_gets_the_same(files, here):
    said = []
    report = export_weights(
        files(),
        Path("m.onnx"),
        options=ExportOptions(input_hw=HW, conf=CONF),
        precision="fp16",
        say=lambda what, _: said.append(what),
    )
    assert report.metadata.precision == "fp16" and report.parity is not None and report.parity.ok
    assert any("135 of 135 nodes" in line for line in said)


def test_a_library_caller_of_an_unknown_precision_is_refused(files, here):
    with pytest.raises(UsageError, match="'int4' is unknown"):
        export_weights(files(), Path("m.onnx"), options=ExportOptions(input_hw=HW), precision="int4")
    assert list(here.iterdir()) == []


# --- what is checked ----------------------------------------------------------------------------------------------


def test_verify_holds_a_half_file_to_the_tolerance_of_half_on_either_side(pair):
    for trusted, other in (pair, pair[::-1], (pair[1], pair[1])):
        result = CliRunner().invoke(app, ["verify", "--weights", str(trusted), "--against", str(other)])
        assert result.exception is None, result.output
        assert f"{TOLERANCES['fp16'].head:g}" in result.output


def drop_bias(weights):
    weights["model.28.conv.bias"][:] = 0


def overflow(weights):
    weights["model.28.conv.weight"] *= np.float16(60000)


def coarse(weights):
    """Four bits of mantissa in every layer: a file rounded to an 8-bit float."""
    for weight in weights.values():
        scale = np.exp2(np.floor(np.log2(np.maximum(np.abs(weight.astype(np.float32)), 1e-8))) - 3)
        weight[...] = np.rint(weight / scale) * scale


def swap_heads(weights):
    first, second = (weights[f"model.77.m.{level}.bias"] for level in (0, 1))
    first[:], second[:] = second.copy(), first.copy()


@pytest.mark.parametrize("breakage", [drop_bias, overflow, coarse, swap_heads])
def test_a_broken_half_file_is_lost_before_suppression(pair, tmp_path, breakage):
    whole, half = pair
    model = OnnxModel.load(half)
    proto = copy.deepcopy(model.proto)
    stored = [tensor for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT16]
    weights = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in stored}
    with np.errstate(over="ignore"):
        breakage(weights)
    for tensor in stored:
        tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    onnx.save(proto, tmp_path / "broken.onnx")
    result = verify_artifacts(whole, [tmp_path / "broken.onnx"])
    assert result.reports[0].first_failure.stage in ("head", "candidates")
    assert result.failures


def test_an_export_whose_half_file_is_broken_is_not_kept(files, here, monkeypatch):
    def broken(model, images):
        half = to_fp16(model, images)
        bias = next(t for t in half.proto.graph.initializer if t.name == "model.77.m.0.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float16(1), bias.name))
        return half

    monkeypatch.setattr("yolov7_deploy.workflows.export.to_fp16", broken)
    result = export(files(), "--fp16")
    assert isinstance(result.exception, ParityError)
    assert "'head'" in result.exception.message and "--precision fp32" in result.exception.fix
    assert list(here.iterdir()) == []


def test_a_map_that_is_no_number_is_over_every_limit_whichever_comes_first():
    good, bad = np.arange(4, dtype=np.float32), np.full(4, np.nan, np.float32)
    for maps in ([good, bad], [bad, good]):
        assert not parity._compare_heads([good, good], maps, TOLERANCES["fp16"]).ok


@pytest.mark.parametrize("values", [(0.0, float("nan")), (float("nan"), 0.0)])
def test_the_worst_image_is_the_one_without_a_number(values):
    old, new = (StageResult(stage="head", differences={"x": value}, limits={"x": 1.0}) for value in values)
    assert not parity._merge_worst(old, new).ok
