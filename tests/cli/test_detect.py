"""`y7 detect`: options, terminal output, and written files."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tests.support.sample_images import find_two, grey
from yolov7_deploy._output_folder import MARKER
from yolov7_deploy._process import Interrupted
from yolov7_deploy.cli.detect import detect
from yolov7_deploy.cli.options import parse_img
from yolov7_deploy.errors import SourceError, UsageError
from yolov7_deploy.options import Thresholds
from yolov7_deploy.visualize import write_image

NAMES = ("person", "dog")


@pytest.fixture
def inputs(tmp_path) -> Path:
    folder = tmp_path / "in"
    for name in ("a.png", "b.jpg"):
        write_image(folder / name, grey())
    return folder


def files(folder: Path) -> list[str]:
    """Return the results in a folder, without the files that mark it as a folder of results."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return sorted(str(path.relative_to(folder)) for path in paths)


@pytest.mark.parametrize(
    "text,size",
    [(None, None), ("640", 640), ("384x640", (384, 640)), ("384,640", (384, 640)), ("384 640", (384, 640))],
)
def test_image_sizes_are_parsed_in_all_spellings(text, size):
    assert parse_img(text) == size


@pytest.mark.parametrize("text", ["", "x", "640x", "0", "-1", "640x640x3", "640 384,", "6.4", "big"])
def test_invalid_image_sizes_are_refused(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_img(text)


class FakeDetector:
    """`Detector` without a network."""

    def __init__(self, weights, **options):
        FakeDetector.options = options
        self.path = weights
        given = {name: options[name] for name in ("conf", "iou", "max_det") if options[name] is not None}
        self.thresholds = Thresholds(**given)
        self.metadata = SimpleNamespace(class_names=NAMES, precision="fp32")
        self.device = "cpu"
        self.input_hw = (640, 640)
        self.rect = options["rect"]

    def __call__(self, image, *, classes=None):
        return find_two(image).filter(classes=classes)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def run(monkeypatch, tmp_path):
    detector, weights = ModuleType("yolov7_deploy.detector"), ModuleType("yolov7_deploy.hub")
    detector.Detector = FakeDetector  # type: ignore[attr-defined]
    weights.find_weights = lambda name, **_: Path(name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yolov7_deploy.detector", detector)
    monkeypatch.setitem(sys.modules, "yolov7_deploy.hub", weights)
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(detect)

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


def test_detect_prints_one_line_per_image_and_numbers_its_runs(run, inputs):
    for name in ("exp", "exp2"):
        result = run("--source", inputs, "--conf-thres", 0.3, "--iou-thres", 0.5, "--topk-all", 10)
        assert result.exception is None
        lines = result.stdout.splitlines()
        assert "conf 0.3, iou 0.5, max-det 10" in lines[0]
        assert lines[1] == "1/2 a.png 48x64: person: 1, dog: 1, 6.0ms"
        assert lines[2] == "2/2 b.jpg 48x64: person: 1, dog: 1, 6.0ms"
        assert lines[3] == "Speed: 1.0ms preprocess, 2.0ms inference, 3.0ms postprocess per image"
        assert lines[4] == f"Results saved to runs/detect/{name}"
    assert files(Path("runs")) == [f"detect/{run}/{name}" for run in ("exp", "exp2") for name in ("a.png", "b.jpg")]
    assert FakeDetector.options["conf"] == 0.3
    assert FakeDetector.options["max_det"] == 10


def test_rect_is_passed_to_the_detector_and_reported(run, inputs):
    for arguments, rect in (([], False), (["--rect"], True)):
        result = run("--source", inputs, "--json", "found.json", *arguments)
        assert result.exception is None
        assert FakeDetector.options["rect"] is rect
        assert ("rect up to 640x640" in result.stdout.splitlines()[0]) is rect
        assert json.loads(Path("found.json").read_text())["rect"] is rect


def test_nosave_writes_nothing_and_stdout_contains_only_the_json(run, inputs, tmp_path):
    before = files(tmp_path)
    result = run("--source", inputs, "--nosave", "--json", "-", "--classes", "dog", "--device", "0", "--img", "384x640")
    assert result.exception is None
    record = json.loads(result.stdout)
    assert list(record) == sorted(record)
    assert record["thresholds"]["classes"] == [1]
    assert [item["class_name"] for image in record["images"] for item in image["detections"]] == ["dog", "dog"]
    assert "1/2 a.png" in result.stderr
    assert files(tmp_path) == before
    assert FakeDetector.options["device"] == "0"
    assert FakeDetector.options["img"] == (384, 640)
    assert "saved" not in run("--source", inputs, "--nosave", "--save-dir", tmp_path).output


def test_unreadable_images_are_skipped_and_reported(run, inputs, tmp_path):
    (inputs / "a.png").write_bytes(b"")
    result = run("--source", inputs, "--save-dir", tmp_path / "out", "--json", tmp_path / "new" / "r.json")
    assert result.exception is None
    assert "0 bytes" in result.stderr
    assert files(tmp_path / "out") == ["b.jpg"]
    assert len(json.loads((tmp_path / "new" / "r.json").read_text())["skipped"]) == 1


def test_what_is_left_out_of_a_folder_is_printed(run, inputs):
    assert "Left out" not in run("--source", inputs, "--nosave").stderr
    (inputs / "._a.png").write_bytes(b"x")
    (inputs / "deep").mkdir()
    result = run("--source", inputs, "--nosave")
    assert result.stderr.splitlines()[0] == f"Left out: 1 x hidden ({inputs}/._a.png), 1 x subfolder ({inputs}/deep)"


def test_no_run_folder_is_created_if_detect_fails(run, tmp_path):
    assert isinstance(run("--source", "absent.jpg").exception, SourceError)
    assert isinstance(run("--source", tmp_path, "--classes", "dgo").exception, SourceError)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("wrong", [("--conf", 25), ("--iou", -1), ("--max-det", 0), ("--img", "big")])
def test_wrong_thresholds_are_refused_before_the_weights_are_searched(run, inputs, monkeypatch, wrong):
    monkeypatch.setattr(sys.modules["yolov7_deploy.hub"], "find_weights", None)
    assert isinstance(run("--source", inputs, *wrong).exception, UsageError)


def test_default_thresholds_are_those_of_the_model(run, inputs):
    assert run("--source", inputs, "--nosave").exception is None
    assert {FakeDetector.options[name] for name in ("conf", "iou", "max_det", "multi_label", "class_agnostic")} == {
        None
    }


@pytest.mark.parametrize("option,half", [([], None), (["--half"], True), (["--no-half"], False)])
def test_half_is_passed_to_the_detector(run, inputs, option, half):
    assert run("--source", inputs, "--nosave", *option).exception is None
    assert FakeDetector.options["half"] is half


def test_an_unknown_class_is_refused_with_a_suggestion(run, inputs):
    error = run("--source", inputs, "--classes", "dgo").exception
    assert isinstance(error, UsageError)
    assert "dog" in error.fix


def nan_detections(image):
    return replace(find_two(image), boxes=np.full((2, 4), np.nan))


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Interrupted(signal.SIGTERM), Interrupted),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (nan_detections, UsageError),
        (BrokenPipeError(), BrokenPipeError),
    ],
    ids=["SIGTERM", "Ctrl-C", "NaN", "closed pipe"],
)
def test_a_run_that_ends_early_keeps_the_results_until_then(run, inputs, tmp_path, monkeypatch, failure, error):
    seen = []

    def second_image_fails(self, image, *, classes=None):
        seen.append(1)
        if len(seen) == 1:
            return find_two(image)
        if callable(failure):
            return failure(image)
        raise failure

    monkeypatch.setattr(FakeDetector, "__call__", second_image_fails)
    with pytest.raises(error):  # called without typer, which would turn an interruption into its exit code
        detect(source=[str(inputs)], save_dir=tmp_path / "out", json_path=str(tmp_path / "r.json"))
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["frames"], len(record["images"])) == (1, 1)
    assert record["stopped"] is (error is KeyboardInterrupt or error is Interrupted)
    assert files(tmp_path / "out") == ["a.png"]


def test_a_name_that_is_not_unicode_is_detected_printed_and_written_as_json(run, tmp_path):
    folder = tmp_path / "in"
    write_image(folder / "photo.png", grey())
    name = os.fsdecode(b"photo-\xff\x1b[2J.png")
    (folder / "photo.png").rename(folder / name)
    for target in ("-", tmp_path / "r.json"):
        result = run("--source", folder, "--save-dir", tmp_path / "out", "--save-txt", "--json", target)
        assert result.exception is None
        assert "\x1b" not in result.stdout + result.stderr
        assert r"photo-\udcff\x1b[2J.png 48x64: person: 1, dog: 1" in result.stdout + result.stderr
        text = result.stdout if target == "-" else target.read_text(encoding="utf-8")
        assert Path(json.loads(text)["images"][0]["path"]).name == name
    assert files(tmp_path / "out") == ["labels/" + name.replace(".png", ".txt"), name]
