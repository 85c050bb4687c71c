"""`y7 export --fp16` and `y7 verify` of FP16 files: options, output, verification and errors."""

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

from tests.support.sample_images import CONF, noise
from tests.support.slow_cases import some_fast
from tests.support.small_models import HW
from yolov7_deploy.cli.app import app
from yolov7_deploy.cli.export import parse_precision
from yolov7_deploy.errors import ParityError, UsageError
from yolov7_deploy.evaluation.parity_stages import TOLERANCES, StageResult, compare_heads, merge_worst
from yolov7_deploy.evaluation.verification import verify_artifacts
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
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
    """An FP32 file, and the same model in FP16."""
    fp32 = files("plugin")
    fp16 = tmp_path_factory.mktemp("fp16") / "m-fp16.onnx"
    to_fp16(OnnxModel.load(fp32), [noise(*HW)]).save(fp16)
    return fp32, fp16


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision, flags, expected",
    [
        (None, {}, "fp32"),
        ("fp32", {}, "fp32"),
        ("fp16", {}, "fp16"),
        ("FP16", {}, "fp16"),
        ("32", {}, "fp32"),
        ("16", {}, "fp16"),
        ("8", {}, "int8"),
        (None, {"fp16": True}, "fp16"),
        (None, {"int8": True}, "int8"),
        ("int8", {"int8": True}, "int8"),
    ],
)
def test_every_spelling_means_one_precision(precision, flags, expected):
    assert parse_precision(precision, **{"fp16": False, "int8": False, **flags}) == expected


@pytest.mark.parametrize(
    "typed",
    [
        ["--precision", "fp32", "--fp16"],
        ["--precision", "32", "--fp16"],
        ["--fp16", "--int8"],
    ],
    ids=" ".join,
)
def test_flags_that_contradict_each_other_are_refused(typed, files):
    result = export(files(), *typed)
    assert isinstance(result.exception, UsageError)
    assert "contradict" in result.exception.message
    assert all(part in result.exception.message for part in typed)


@pytest.mark.parametrize("typed", [["--precision", "fp64"], ["--precision", "4"]], ids=" ".join)
def test_an_unknown_precision_is_refused_with_the_known_ones(typed, files):
    result = export(files(), *typed)
    assert isinstance(result.exception, UsageError)
    assert " ".join(typed) in result.exception.message
    assert "--precision fp16" in result.exception.fix


# --- output -------------------------------------------------------------------------------------------------------


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


def test_export_weights_converts_to_fp16_from_python(files, here):
    steps = []
    report = export_weights(
        files(),
        Path("m.onnx"),
        options=ExportOptions(input_hw=HW, conf=CONF),
        precision="fp16",
        log=lambda step, _: steps.append(step),
    )
    assert report.metadata.precision == "fp16" and report.parity is not None and report.parity.ok
    assert any("135 of 135 nodes" in line for line in steps)


def test_export_weights_refuses_an_unknown_precision(files, here):
    with pytest.raises(UsageError, match="'int4' is unknown"):
        export_weights(files(), Path("m.onnx"), options=ExportOptions(input_hw=HW), precision="int4")
    assert list(here.iterdir()) == []


# --- verification -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_verify_applies_the_tolerance_of_fp16_if_either_file_is_fp16(pair):
    for reference, other in (pair, pair[::-1], (pair[1], pair[1])):
        result = CliRunner().invoke(app, ["verify", "--weights", str(reference), "--against", str(other)])
        assert result.exception is None, result.output
        assert f"{TOLERANCES['fp16'].head:g}" in result.output


def drop_bias(weights):
    weights["model.28.conv.bias"][:] = 0


def overflow(weights):
    weights["model.28.conv.weight"] *= np.float16(60000)


def coarse(weights):
    """Round every weight to four bits of mantissa, as an 8-bit float has."""
    for weight in weights.values():
        scale = np.exp2(np.floor(np.log2(np.maximum(np.abs(weight.astype(np.float32)), 1e-8))) - 3)
        weight[...] = np.rint(weight / scale) * scale


def swap_heads(weights):
    first, second = (weights[f"model.77.m.{level}.bias"] for level in (0, 1))
    first[:], second[:] = second.copy(), first.copy()


@pytest.mark.parametrize("breakage", some_fast([drop_bias, overflow, coarse, swap_heads], every=2))
def test_a_broken_fp16_file_fails_before_nms(pair, tmp_path, breakage):
    fp32, fp16 = pair
    model = OnnxModel.load(fp16)
    proto = copy.deepcopy(model.proto)
    stored = [tensor for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT16]
    weights = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in stored}
    with np.errstate(over="ignore"):
        breakage(weights)
    for tensor in stored:
        tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    onnx.save(proto, tmp_path / "broken.onnx")
    result = verify_artifacts(fp32, [tmp_path / "broken.onnx"])
    assert result.reports[0].first_failure.stage == "head"
    assert result.failures


def test_an_export_of_a_broken_fp16_file_leaves_no_file(files, here, monkeypatch):
    def broken(model, images):
        fp16 = to_fp16(model, images)
        bias = next(t for t in fp16.proto.graph.initializer if t.name == "model.77.m.0.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float16(1), bias.name))
        return fp16

    monkeypatch.setattr("yolov7_deploy.workflows.export.to_fp16", broken)
    result = export(files(), "--fp16")
    assert isinstance(result.exception, ParityError)
    assert "'head'" in result.exception.message and "--precision fp32" in result.exception.fix
    assert list(here.iterdir()) == []


def test_a_head_map_with_nan_exceeds_every_limit_in_any_order():
    good, bad = np.arange(4, dtype=np.float32), np.full(4, np.nan, np.float32)
    for maps in ([good, bad], [bad, good]):
        assert not compare_heads([good, good], maps, TOLERANCES["fp16"]).ok


@pytest.mark.parametrize("values", [(0.0, float("nan")), (float("nan"), 0.0)])
def test_the_worst_image_is_the_one_with_nan(values):
    old, new = (StageResult(stage="head", differences={"x": value}, limits={"x": 1.0}) for value in values)
    assert not merge_worst(old, new).ok
