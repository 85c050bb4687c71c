"""`y7 verify` says what to do next, which depends on what failed, and tells a loss of AP from chance."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from yolov7_deploy import export
from yolov7_deploy.cli.app import app
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.errors import ParityError, UsageError
from yolov7_deploy.evaluation.accuracy_drop import AccuracyDrop
from yolov7_deploy.evaluation.verification import (
    ArtifactAccuracy,
    Verification,
    accuracy_failures,
    undecided_losses,
    unsure_losses,
)
from yolov7_deploy.hub import bundled_weights


def losing(points: float, low: float | None, high: float | None) -> list[ArtifactAccuracy]:
    """Return a reference, and a file that loses so many AP points on 82 images."""
    drop = AccuracyDrop(
        reference_ap=0.5, ap=0.5 - points / 100, points=points, standard_error=0.1, low=low, high=high, images=82
    )
    first = ArtifactAccuracy(weights="best.pt", precision="fp32", ap=0.5, ap50=0.7)
    return [first, ArtifactAccuracy(weights="int8.onnx", precision="int8", ap=drop.ap, ap50=0.7, drop=drop)]


@pytest.mark.parametrize(
    ("points", "low", "high", "failures", "undecided"),
    [
        (2.0, 1.5, 2.5, 1, 0),
        (0.3001, 0.3001, 0.3001, 1, 0),  # as certain as a loss can be
        (0.31, -0.9, 1.6, 0, 1),
        (20.0, 0.2, 39.8, 0, 1),
        (20.0, None, None, 0, 1),  # one image
        (0.3, -0.9, 1.6, 0, 0),
        (-2.0, -2.5, -1.5, 0, 0),
    ],
)
def test_a_loss_is_a_failure_only_if_chance_cannot_explain_it(points, low, high, failures, undecided):
    rows = losing(points, low, high)
    assert len(accuracy_failures(rows, 0.3)) == failures
    assert len(undecided_losses(rows, 0.3)) == undecided


def test_without_a_dataset_the_libraries_that_measure_ap_are_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "yolov7_deploy.evaluation.accuracy_drop", None)
    assert accuracy_failures([], 0.3) == undecided_losses([], 0.3) == []


def test_an_undecided_loss_is_refused_with_its_interval_and_the_number_of_images_that_decide(monkeypatch):
    rows = losing(0.5, -0.9, 1.9)
    undecided = tuple(undecided_losses(rows, 0.3))
    result = Verification(reports=(), accuracy=tuple(rows), images=82, failures=undecided, undecided=undecided)
    monkeypatch.setattr("yolov7_deploy.evaluation.verification.verify_artifacts", lambda *_, **__: result)
    done = CliRunner().invoke(app, ["verify", "-w", str(bundled_weights()), "--against", str(bundled_weights())])
    assert isinstance(done.exception, ParityError) and done.exit_code == 1
    assert "UNDECIDED: int8.onnx may lose more than --max-drop 0.3" in done.exception.message
    assert "-0.90 to 1.90" in done.exception.message and "about 4,500 could" in done.exception.message
    assert "more images (--limit N)" in done.exception.fix
    assert "0.50  -0.90 to 1.90" in done.output and "within their limits" not in done.output


def test_a_certain_loss_of_ap_alone_names_no_stage(tmp_path):
    data = write_shapes(tmp_path / "shapes", train=1, val=16, size=96, seed=5)
    file = export("yolov7-tiny-shapes", tmp_path / "one.onnx", img=96, max_det=1, verify=False).path
    line = ["verify", "-w", bundled_weights(), "--against", file, "--data", data, "--runtime", "onnxruntime"]
    done = CliRunner().invoke(app, list(map(str, line)))
    assert isinstance(done.exception, ParityError), done.output
    assert "more than --max-drop 0.3" in done.exception.message and "UNDECIDED" not in done.exception.message
    assert "No stage differs" in done.exception.fix and "first stage" not in done.exception.fix


def test_losses_that_so_few_images_cannot_exclude_are_printed(monkeypatch):
    rows = losing(-0.4, -2.0, 1.2)
    result = Verification(
        reports=(), accuracy=tuple(rows), images=82, failures=(), unsure=tuple(unsure_losses(rows, 0.3))
    )
    monkeypatch.setattr("yolov7_deploy.evaluation.verification.verify_artifacts", lambda *_, **__: result)
    done = CliRunner().invoke(app, ["verify", "-w", str(bundled_weights()), "--against", str(bundled_weights())])
    assert done.exit_code == 0 and "82 images cannot show whether more than 0.3 points are lost" in done.output
    assert unsure_losses(losing(-0.4, -0.6, 0.1), 0.3) == []


@pytest.mark.parametrize("max_drop", ["-1", "nan", "101"])
def test_a_maximum_loss_that_is_no_number_of_ap_points_is_refused(max_drop):
    line = ["verify", "-w", str(bundled_weights()), "--against", str(bundled_weights()), "--max-drop", max_drop]
    done = CliRunner().invoke(app, line)
    assert isinstance(done.exception, UsageError) and "is not a number of AP points" in done.exception.message
