"""`y7 verify` says what to do next, which depends on what failed."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from yolov7_deploy import export
from yolov7_deploy.cli.app import app
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.errors import ParityError
from yolov7_deploy.hub import bundled_weights


@pytest.mark.slow
def test_a_loss_of_ap_alone_asks_for_more_images_and_names_no_stage(tmp_path):
    data = write_shapes(tmp_path / "shapes", train=1, val=2, size=96, seed=5)
    file = export("yolov7-tiny-shapes", tmp_path / "same.onnx", img=96, verify=False).path
    line = ["verify", "-w", bundled_weights(), "--against", file, "--data", data, "--max-drop", -1]
    done = CliRunner().invoke(app, [*map(str, line), "--runtime", "onnxruntime"])
    assert isinstance(done.exception, ParityError), done.output
    assert "more than --max-drop -1" in done.exception.message
    assert "--limit N" in done.exception.fix and "first stage" not in done.exception.fix
