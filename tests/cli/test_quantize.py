"""`y7 quantize` and `y7 export --int8`; `y7 info` and `y7 verify` on INT8 files; bad input of every kind."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from tests.support.sample_images import CONF, noise, without_metadata
from tests.support.small_models import HW, exported_tiny
from yolov7_deploy.cli.app import app
from yolov7_deploy.errors import DatasetError, ExportError, LoadError, ParityError, SourceError, UsageError
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import QuantizeOptions
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.export import Int8Request, export_weights

IMG = f"{HW[0]},{HW[1]}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for seed in range(3):
        write_image(tmp_path / "images" / f"{seed}.png", noise(*HW, seed=seed))
    return tmp_path


@pytest.fixture
def model(here):
    exported_tiny().save(here / "m.onnx")
    return here / "m.onnx"


def y7(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(kind, *arguments):
    """Return the error of a command that must fail and leave no file."""
    before = set(Path.cwd().rglob("*.onnx"))
    result = y7(*arguments)
    assert isinstance(result.exception, kind), result.exception
    assert set(Path.cwd().rglob("*.onnx")) == before
    assert result.exception.fix
    return result.exception


# --- output -------------------------------------------------------------------------------------------------------


def test_quantize_writes_a_file_and_a_summary(model, here):
    result = y7("quantize", "--weights", model, "--calib", "images", "--json", "record.json")
    assert result.exception is None, result.output
    metadata = OnnxModel.load(here / "m-int8.onnx").metadata
    assert metadata.precision == "int8" and metadata.int8.images == 3
    for text in ("55 of 58 convolutions", "Q/DQ pairs, one per tensor", "before upsampling", "Few images (3)"):
        assert text.lower() in result.output.lower(), text
    record = json.loads((here / "record.json").read_text())
    assert record["path"] == "m-int8.onnx"
    assert record["summary"]["int8_convolutions"] == 55
    assert record["summary"]["int8_share_of_macs"] == pytest.approx(metadata.int8.share)
    assert record["calibration"]["images"] == 3
    assert record["layers"] == [] and record["accuracy"] is None


@pytest.mark.slow
def test_weights_are_rounded_on_request(model, here):
    for name in ("a", "b"):
        result = y7("quantize", "-w", model, "--calib", "images", "--rounding", "gptq", "-o", f"{name}.onnx")
        assert result.exception is None, result.output
    assert "weights rounded by gptq" in result.output
    assert OnnxModel.load(here / "a.onnx").metadata.int8.rounding == "gptq"
    assert (here / "a.onnx").read_bytes() == (here / "b.onnx").read_bytes()


def test_export_int8_writes_a_verified_file(files, here):
    common = ("export", "--weights", files(), "--img", IMG, "--conf", CONF, "--int8", "--calib", "images")
    result = y7(*common, "--json", "record.json")
    assert result.exception is None, result.output
    written = here / f"{files().stem}-int8.onnx"
    assert OnnxModel.load(written).metadata.precision == "int8"
    assert "verified in onnxruntime against torch on 2 images" in result.output
    assert f"{written.name}: " in result.output and ", int8, opset 17" in result.output
    record = json.loads((here / "record.json").read_text())
    assert record["metadata"]["int8"]["method"] == "lp"  # the default for CPUs
    assert record["parity"]["ok"] and record["quantization"]["summary"]["int8_convolutions"] == 55
    assert [stage["stage"] for stage in record["parity"]["stages"]][-1] == "detections"


def test_export_weights_quantizes_from_python(files, here):
    request = Int8Request(images=open_calibration("images"), options=QuantizeOptions())
    from yolov7_deploy.options import ExportOptions

    report = export_weights(
        files(), Path("m.onnx"), options=ExportOptions(input_hw=HW, conf=CONF), precision="int8", int8=request
    )
    assert report.quantized is not None and report.quantized.summary.int8_convolutions == 55
    with pytest.raises(UsageError, match="INT8 requires calibration images"):
        export_weights(files(), Path("n.onnx"), options=ExportOptions(input_hw=HW), precision="int8")


def test_the_chart_and_the_calibration_cache_are_written(model, here):
    result = y7("quantize", "--weights", model, "--calib", "images", "--chart", "cost.png", "--trt-cache", "m.cache")
    assert result.exception is None, result.output
    drawn = cv2.imread(str(here / "cost.png"))
    assert drawn.shape[1] > 800 and drawn.std() > 10
    assert (here / "m.cache").read_text().startswith("TRT-8601-EntropyCalibration2\nimages: ")
    assert "INT8 sensitivity, each layer alone: the 20 most sensitive of 55" in result.output


def test_the_same_command_gives_the_same_bytes(model, here):
    for name in ("a", "b"):
        assert y7("quantize", "--weights", model, "--calib", "images", "--output", f"{name}.onnx").exception is None
    assert (here / "a.onnx").read_bytes() == (here / "b.onnx").read_bytes()


def test_info_counts_int8_layers(model, here):
    y7("quantize", "--weights", model, "--calib", "images", "--exclude", "model.7.conv")
    result = y7("info", "m-int8.onnx", "--json", "info.json")
    assert "54 of 58 convolutions" in result.output and "one per tensor" in result.output
    counted = json.loads((here / "info.json").read_text())["int8"]
    assert counted["int8_convolutions"] == 54 and counted["pairs_twice"] == []
    assert {row["layer"] for row in counted["convolutions"] if not row["int8"]} == {
        "model.7.conv",
        "model.77.m.0",
        "model.77.m.1",
        "model.77.m.2",
    }
    assert "int8" not in json.loads(y7("info", model, "--json", "-").stdout)


@pytest.mark.slow
def test_verify_applies_the_tolerance_of_int8(model, here):
    y7("quantize", "--weights", model, "--calib", "images")
    result = y7("verify", "--weights", model, "--against", "m-int8.onnx", "--images", "images")
    assert "rms / std" in result.output and "candidates" not in result.output
    assert re.search(r"\nall stages are within their limits in \d comparisons?\n$", result.output)


def test_a_broken_int8_file_fails_the_verification(files, here, monkeypatch):
    def broken(model, calibration, options, rounded):
        quantized = to_int8(model, calibration, options, rounded)
        scale = next(t for t in quantized.proto.graph.initializer if t.name == "model.7.act__scale")
        scale.CopyFrom(onnx.numpy_helper.from_array(np.array(1e-4, np.float32), scale.name))
        return quantized

    monkeypatch.setattr("yolov7_deploy.workflows.quantize.to_int8", broken)
    error = refused(
        ParityError, "export", "--weights", files(), "--img", IMG, "--conf", CONF, "--int8", "--calib", "images"
    )
    assert "'head'" in error.message and "--max-drop" in error.fix


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [["--int8"], ["--precision", "int8"], ["--quantize", "8"]], ids=" ".join)
def test_int8_without_images_explains_what_is_needed_and_why(flag, files, here):
    error = refused(UsageError, "export", "--weights", files(), *flag)
    assert "random numbers" in error.message and "--calib FOLDER" in error.fix


def test_quantize_without_images_explains_the_same(model):
    assert "--calib FOLDER" in refused(UsageError, "quantize", "--weights", model).fix


@pytest.mark.parametrize(
    "flag",
    [["--calib", "images"], ["--data", "d.yaml"], ["--max-drop", "0.3"], ["--rounding", "gptq"], ["--method", "lp"]],
    ids=" ".join,
)
def test_an_option_of_int8_without_int8_is_refused(flag, files, here):
    error = refused(UsageError, "export", "--weights", files(), *flag)
    assert flag[0] in error.message and "--int8" in error.fix


def test_weights_other_than_onnx_get_the_export_command(files, here):
    error = refused(UsageError, "quantize", "--weights", files(), "--calib", "images")
    assert f"y7 export --weights {files()} --int8 --calib" in error.fix
    error = refused(UsageError, "quantize", "--weights", "best.engine", "--calib", "images")
    assert "y7 export --weights WEIGHTS.pt --int8 --calib" in error.fix


@pytest.mark.parametrize(
    "typed, text",
    [
        (["--method", "mean"], "mean"),
        (["--rounding", "up"], "up"),
        (["--fallback", "int4"], "int4"),
        (["--max-drop", "-1", "--data", "d.yaml"], "max-drop"),
        (["--chart", "cost.svg"], "PNG"),
        (["--calib-limit", "0"], "at least 1"),
        (["--exclude", "model.700.conv"], "model.700.conv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_invalid_option_is_refused(typed, text, model):
    error = refused((UsageError, ExportError, SourceError), "quantize", "-w", model, "--calib", "images", *typed)
    assert text in error.message + error.fix


def test_max_drop_without_labels_is_refused_before_anything_is_measured(model):
    error = refused(UsageError, "quantize", "-w", model, "--calib", "images", "--max-drop", "0.3")
    assert "--data" in error.fix


@pytest.mark.parametrize("calib", ["nowhere", "empty", "nowhere.yaml"])
def test_missing_or_empty_calibration_sources_are_an_error(calib, model, here):
    (here / "empty").mkdir()
    assert calib in refused((SourceError, DatasetError), "quantize", "-w", model, "--calib", calib).message


def test_unreadable_images_among_good_ones_are_counted_and_named(model, here):
    (here / "images" / "broken.jpg").write_bytes(b"")
    write_image(here / "images" / "black.png", np.zeros((40, 40, 3), np.uint8))
    result = y7("quantize", "-w", model, "--calib", "images")
    assert result.exception is None
    assert "broken.jpg" in result.output and "black.png" in result.output
    assert OnnxModel.load(here / "m-int8.onnx").metadata.int8.images == 3


def test_only_black_images_are_an_error(model, here):
    (here / "black").mkdir()
    write_image(here / "black" / "0.png", np.zeros((40, 40, 3), np.uint8))
    assert "color" in refused(SourceError, "quantize", "-w", model, "--calib", "black").message


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_file_of_lower_precision_is_refused(kind, model, files, here):
    if kind == "int8":
        y7("quantize", "-w", model, "--calib", "images", "-o", "low.onnx")
    else:
        y7("export", "-w", files(), "--img", IMG, "--fp16", "--no-verify", "-o", "low.onnx")
    error = refused(ExportError, "quantize", "-w", "low.onnx", "--calib", "images")
    assert "already" in error.message and "float32 file" in error.fix


def test_the_cache_of_another_model_is_refused(model, here):
    y7("quantize", "-w", model, "--calib", "images", "--calib-cache", "ranges.npz")
    exported_tiny(classes=3).save(here / "other.onnx")
    error = refused(UsageError, "quantize", "-w", "other.onnx", "--calib", "images", "--calib-cache", "ranges.npz")
    assert "another model" in error.message


def test_weights_that_give_nan_are_an_error(here):
    proto = onnx.ModelProto()
    proto.CopyFrom(exported_tiny().proto)
    weight = next(t for t in proto.graph.initializer if t.name == "model.7.conv.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, here / "nan.onnx")
    assert "infinite values or NaN" in refused(ExportError, "quantize", "-w", "nan.onnx", "--calib", "images").message


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_file_that_is_not_a_model_is_an_error(content, here):
    if content is not None:
        (here / "bad.onnx").write_bytes(content)
    refused(LoadError, "quantize", "-w", "bad.onnx", "--calib", "images")


def test_a_file_without_metadata_is_quantized_with_a_note_on_what_was_assumed(model, here):
    without_metadata(model, here / "foreign.onnx")
    result = y7("quantize", "-w", "foreign.onnx", "--calib", "images")
    assert result.exception is None, result.output
    metadata = OnnxModel.load(here / "foreign-int8.onnx").metadata
    assert metadata.int8.fallback == "fp32" and metadata.int8.int8_convolutions == 55
    assert any("no metadata" in note for note in metadata.notes)


def test_an_output_that_cannot_be_written_is_an_error_before_the_calibration(model, here):
    (here / "file").write_text("in the way")
    error = refused(UsageError, "quantize", "-w", model, "--calib", "nowhere", "-o", "file/m.onnx")
    assert "file/m.onnx cannot be written" in error.message  # checked before the images
    for option, name in (("--chart", "file/cost.png"), ("--trt-cache", "file/m.cache")):
        error = refused(UsageError, "quantize", "-w", model, "--calib", "nowhere", option, name)
        assert f"{name} cannot be written" in error.message


def test_the_fp32_file_is_not_replaced_by_the_int8_file(model, here):
    before = model.read_bytes()
    (here / "link.onnx").symlink_to("m.onnx")
    for output in ("m.onnx", "link.onnx", "images/../m.onnx"):
        error = refused(UsageError, "quantize", "-w", model, "--calib", "images", "-o", output)
        assert f"{output} is the FP32 file" in error.message
    assert model.read_bytes() == before


@pytest.mark.parametrize("output", ["m.txt", "images"])
def test_an_output_with_another_suffix_is_refused(model, output):
    assert (
        "does not end in .onnx"
        in refused(UsageError, "quantize", "-w", model, "--calib", "images", "-o", output).message
    )
