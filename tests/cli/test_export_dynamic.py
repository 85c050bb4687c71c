"""`y7 export --dynamic`: files that take any height and width."""

import json

import pytest
from typer.testing import CliRunner

from tests.support.small_models import HW
from yolov7_deploy.cli.app import app
from yolov7_deploy.errors import UsageError
from yolov7_deploy.onnx_export.onnx_model import OnnxModel

IMG = f"{HW[0]},{HW[1]}"


def export(weights, *arguments):
    return CliRunner().invoke(app, ["export", "--weights", str(weights), *arguments])


def test_dynamic_writes_a_file_of_open_size_verified_at_two_sizes(files, tmp_path):
    output, record = tmp_path / "open.onnx", tmp_path / "record.json"
    result = export(files(), "--dynamic", "--img", IMG, "-o", str(output), "--json", str(record))
    assert result.exception is None, result.output
    metadata = OnnxModel.load(output).metadata
    assert (metadata.input_hw, metadata.batch, metadata.nominal_hw) == (None, None, HW)
    assert json.loads(record.read_text())["metadata"]["nominal_hw"] == list(HW)
    assert f"any multiples of 32 (by default {HW[0]}x{HW[1]}), batch dynamic" in result.output
    assert "--source IMAGE --rect" in result.output
    for size in (f"at {HW[0]}x{HW[1]}", f"at {HW[0] * 3 // 4}x{HW[1]}"):
        assert f"verified in onnxruntime against torch on 1 image {size}" in result.output


def test_a_wrong_file_of_open_size_is_found_at_the_second_size(files, tmp_path, monkeypatch):
    """Cells of the default size, as a careless export would write them, fail only at the other size."""
    from yolov7_deploy.onnx_export import nms_subgraph

    monkeypatch.setattr(nms_subgraph, "add_cells", lambda writer, heads, plan: writer.constant(plan.cells, "cells"))
    output = tmp_path / "wrong.onnx"
    result = export(files(), "--dynamic", "--img", IMG, "-o", str(output))
    assert "differs from the model" in str(result.exception)
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--engine"], "an engine has a fixed height and width"),
        (["--batch", "4"], "--dynamic and --batch 4 contradict each other"),
    ],
    ids=["engine", "batch"],
)
def test_what_contradicts_an_open_size_is_refused(files, tmp_path, arguments, message):
    result = export(files(), "--dynamic", "-o", str(tmp_path / "no.onnx"), *arguments)
    assert isinstance(result.exception, UsageError)
    assert message in result.exception.message
