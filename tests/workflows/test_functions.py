"""`export`, `train`, `validate` and `benchmark`: the commands as functions, with the same defaults and results."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields

import cv2
import pytest
from typer.testing import CliRunner

from yolov7_deploy import Detector, benchmark, export, report, train, validate
from yolov7_deploy.cli.app import app
from yolov7_deploy.cli.bench import bench as bench_command
from yolov7_deploy.cli.export import export as export_command
from yolov7_deploy.cli.report import report as report_command
from yolov7_deploy.cli.train import train as train_command
from yolov7_deploy.cli.val import val as val_command
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.errors import LoadError, UsageError
from yolov7_deploy.image import read_image
from yolov7_deploy.options import TrainOptions
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.functions import TrainKeywords

WEIGHTS = "yolov7-tiny-shapes"
SIZE = 96


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """YAML of a shapes dataset: eight training images and four validation images."""
    return write_shapes(tmp_path_factory.mktemp("functions") / "shapes", train=8, val=4, size=SIZE, seed=3)


def defaults(function) -> dict[str, object]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize(
    "function,command",
    [
        (export, export_command),
        (train, train_command),
        (validate, val_command),
        (benchmark, bench_command),
        (report, report_command),
    ],
)
def test_a_function_has_the_defaults_of_its_command(function, command):
    # Texts of the shell and values of Python; and the commands' default weights, which functions require.
    other = {"weights", "data", "img", "concurrency", "classes", "save_dir", "batch", "against", "bench", "sensitivity"}
    of_function, of_command = defaults(function), defaults(command)
    shared = (set(of_function) & set(of_command)) - other - {"precision"}
    assert len(shared) >= 5
    assert {name: of_function[name] for name in shared} == {name: of_command[name] for name in shared}


def test_train_has_every_field_of_its_options():
    own = set(inspect.signature(train).parameters)
    assert {field.name for field in fields(TrainOptions)} == set(TrainKeywords.__annotations__) | (
        own & {field.name for field in fields(TrainOptions)}
    )
    assert own.isdisjoint(TrainKeywords.__annotations__)


def test_export_gives_the_file_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = export(WEIGHTS, "a.onnx", img=SIZE)
    done = CliRunner().invoke(app, ["export", "--weights", WEIGHTS, "-o", "b.onnx", "--img", str(SIZE)])
    assert done.exit_code == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert report.parity is not None and report.parity.verified
    assert report.engine is None


def test_export_names_the_file_after_weights_and_precision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(WEIGHTS, precision="fp16", img=SIZE, verify=False).path.name == f"{WEIGHTS}-fp16.onnx"


def test_export_to_int8_calibrates_and_measures(tmp_path, data):
    steps: list[str] = []
    report = export(
        WEIGHTS,
        tmp_path / "int8.onnx",
        precision="int8",
        calib=data.parent / "images" / "train",
        data=data,
        img=SIZE,
        log=lambda step, seconds: steps.append(step),
    )
    assert report.metadata.precision == "int8"
    assert report.quantized is not None and report.quantized.drop is not None
    assert any(step.startswith("verified") for step in steps)
    assert len(repr(report)) < 3000


@pytest.mark.parametrize(
    "options,message,fix",
    [
        ({"precision": "int8"}, "INT8 requires calibration images", 'calib="FOLDER"'),
        ({"calib": "images"}, 'calib has no effect without precision="int8"', 'Add  precision="int8"'),
        ({"method": "lp"}, 'method has no effect without precision="int8"', 'Add  precision="int8"'),
        ({"precision": "fp8"}, "precision 'fp8' is unknown", "fp32, fp16, int8"),
        ({"nms": "soft"}, 'nms="soft" is unknown', "plugin, standard"),
        ({"batch": 0}, "batch=0 must be at least 1", "batch=None"),
        ({"img": 100}, "stride 32", "img=128"),
        ({"output": "a.pt"}, "does not end in .onnx", 'output="a.onnx"'),
        ({"img": "640"}, "img must be", "img=640"),
        ({"dynamic_size": True, "engine": True}, "An engine has a fixed height and width", "dynamic_size"),
    ],
)
def test_export_explains_wrong_options_in_python(options, message, fix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as raised:
        export(WEIGHTS, **options)
    text = str(raised.value)
    assert message in text and fix in text
    assert "--" not in text and "y7 " not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "function,argument,meant",
    [
        (benchmark, "duration", "duration_s"),
        (export, "imgsz", "img"),
        (train, "epoch", "epochs"),
        (validate, "iou_thres", "iou"),
        (report, "weight", "weights"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_one_that_was_meant(function, argument, meant):
    with pytest.raises(UsageError, match=f"^{function.__name__} does not have an argument {argument}.\nDid you mean "):
        function(**{argument: 2})
    with pytest.raises(UsageError) as raised:
        function(**{argument: 2})
    assert raised.value.fix.startswith(f"Did you mean {meant}? One of: ")


def test_train_returns_the_best_weights_and_their_ap(tmp_path, data, caplog):
    caplog.set_level("INFO")
    report = train(
        data, WEIGHTS, epochs=1, img=64, batch=4, workers=0, save_dir=tmp_path / "run", seed=1, classes=[0, 1]
    )
    assert report.weights == tmp_path / "run" / "best.safetensors"
    assert report.accuracy is not None and report.accuracy.ap is not None
    assert "8 training images, 4 validation images" in caplog.text
    assert "epoch 1: box " in caplog.text
    with Detector(report.weights) as detector:
        assert len(detector.class_names) == 2
        assert detector.input_hw == (64, 64)
    with pytest.raises(UsageError, match=r"already has a training run.\nResume it:  train\(resume=True, save_dir="):
        train(data, WEIGHTS, epochs=1, img=64, save_dir=tmp_path / "run")


def test_the_ap_of_a_training_is_that_of_a_validation(tmp_path):
    """Also for images of several shapes, whose canvas depends on the others of their batch."""
    data = write_shapes(tmp_path / "shapes", train=4, val=10, size=SIZE, seed=6)
    for number, path in enumerate(sorted((data.parent / "images" / "val").iterdir())):
        write_image(path, cv2.resize(read_image(path), (SIZE, 40 + 5 * number)))
    report = train(data, WEIGHTS, epochs=1, img=64, batch=2, workers=0, save_dir=tmp_path / "run")
    assert report.accuracy is not None
    assert validate(report.weights, data).predictions == report.accuracy.predictions


@pytest.mark.parametrize(
    "arguments,options,message",
    [
        ((), {}, "train needs a dataset.\nFor example: train('data.yaml'"),
        (("d.yaml",), {"epoch": 3}, "train does not have an argument epoch.\nDid you mean"),
        (("d.yaml",), {"variant": "yolov7-tinny"}, "Did you mean yolov7-tiny?"),
        (("d.yaml", "no.pt"), {}, "no.pt does not exist"),
        (("d.yaml",), {"patience": -1}, "patience=-1 must be at least 0"),
    ],
)
def test_train_explains_wrong_arguments(arguments, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, LoadError)) as raised:
        train(*arguments, **options)
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_validate_measures_as_the_command_does(tmp_path, data):
    report = validate(WEIGHTS, data, img=SIZE, save_dir=tmp_path / "charts")
    document = tmp_path / "val.json"
    command = ["val", "--weights", WEIGHTS, "--data", str(data), "--img", str(SIZE), "--nosave", "--json"]
    done = CliRunner().invoke(app, [*command, str(document)])
    assert done.exit_code == 0, done.output
    assert json.loads(document.read_text())["ap"] == report.ap
    assert report.images == 4
    assert {path.name for path in (tmp_path / "charts").iterdir()} == {
        "confusion_matrix.png",
        "precision_recall.png",
        "val_examples.jpg",
    }


def test_validate_merges_classes_only_for_a_model_of_one(data):
    with pytest.raises(UsageError, match=r"single_class=True is for a model of one class"):
        validate(WEIGHTS, data, single_class=True)


@pytest.mark.slow
def test_benchmark_returns_a_row_for_each_batch():
    rows: list[object] = []
    report = benchmark(
        WEIGHTS,
        batch=(1, 2),
        img=64,
        frame=(48, 64),
        duration_s=0.05,
        warmup_s=0.05,
        on_row=rows.append,
    )
    assert [row.batch for row in report.rows] == [1, 2]
    assert len(rows) == 2


def test_benchmark_explains_wrong_arguments_in_python():
    with pytest.raises(UsageError, match=r"^concurrency=\(?1000\)? is above 256.\nFor example: concurrency=\(1, 2"):
        benchmark(WEIGHTS, concurrency=1000)
    with pytest.raises(UsageError, match="frame is the size of the synthetic image, which source replaces"):
        benchmark(WEIGHTS, source="x.jpg", frame=(480, 640))


@pytest.mark.parametrize("changed", [{"epochs": 3}, {"weights": "x.pt"}, {"patience": 2}, {"exist_ok": True}])
def test_a_run_that_is_resumed_keeps_its_options(changed):
    (name,) = changed
    with pytest.raises(UsageError, match=f"{name} cannot be changed with resume=True"):
        train(resume=True, **changed)


def test_a_run_to_resume_is_found_by_its_name(tmp_path):
    with pytest.raises(LoadError, match="mine"):
        train(resume=True, project=tmp_path, name="mine")


def test_a_limit_of_the_drop_needs_a_dataset_before_the_weights_are_read(tmp_path):
    with pytest.raises(UsageError, match="requires a dataset"):
        export(tmp_path / "absent.pt", precision="int8", calib=tmp_path, max_drop=0.3)
