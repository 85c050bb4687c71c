"""`y7 train`: the request that its options make, and its output, with a fake for the training itself."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.cli import train as command
from yolov7_deploy.errors import LoadError, UsageError
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.options import TrainOptions
from yolov7_deploy.training import run as training
from yolov7_deploy.training.checkpoints import RunState, TrainRequest, save_run_state
from yolov7_deploy.training.hyperparameters import PRESETS, format_hyperparameters, read_hyperparameters
from yolov7_deploy.training.loggers import EpochRecord
from yolov7_deploy.training.trainer import TrainReport

RECORD = EpochRecord(
    epoch=1, box=0.05, obj=0.01, cls=0.02, total=0.08, positives=30.0, size=64, ap=0.1234, ap50=0.2, precision=0.3,
    lr_norm=0.01, lr_weight=0.01, lr_bias=0.01, momentum=0.9, images_per_s=12.3, memory_bytes=10**9, seconds=65.0,
)  # fmt: skip


class FakeTraining:
    """A fake of `train` and `resume` that records its arguments and reports as if it had trained."""

    def __init__(self) -> None:
        self.request, self.resume_arguments = None, None

    def train(self, request, *, callback):
        self.request = request
        return self._report(Path(request.folder), callback)

    def resume(self, folder, *, callback, device, data):
        self.resume_arguments = {"folder": folder, "device": device, "data": data}
        return self._report(folder, callback)

    def _report(self, folder, callback):
        callback.on_message("text about the data")
        with callback.epoch_progress(0, 2) as show:
            show(1, 1, "box 0.05")
        with callback.progress("validate") as show:
            show(3, 3)
        callback.on_epoch_end(RECORD)
        callback.on_epoch_end(RECORD)
        return TrainReport(
            folder=folder,
            weights=folder / "best.safetensors",
            epochs=2,
            best_epoch=0,
            accuracy=None,
            unreadable=(),
            seconds=90.0,
        )


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = FakeTraining()
    monkeypatch.setattr(training, "train", fake.train)
    monkeypatch.setattr(training, "resume", fake.resume)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "D.yaml").touch()  # the fake does not read it
    return fake


@pytest.fixture
def run(fake):
    app = typer.Typer()
    app.command()(command.train)
    return lambda *arguments: CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture
def weights(tmp_path):
    """Path of a weights file of yolov7-tiny."""
    model = new_model("yolov7-tiny", classes=2, training_form=True)
    checkpoint = Checkpoint(
        tensors=model.state_dict(),
        variant="yolov7-tiny",
        training=True,
        class_names=("a", "b"),
        anchors=model.anchors,
    )
    save_checkpoint(checkpoint, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


# --- options ----------------------------------------------------------------------------------------------------------


def test_without_options_the_request_has_the_defaults_of_the_library(run, fake):
    assert run("--data", "D.yaml").exit_code == 0
    request = fake.request
    assert request.options == TrainOptions(workers=min(4, os.cpu_count() or 1))
    assert (request.data, request.variant, request.weights, request.device) == ("D.yaml", "yolov7", "", "auto")
    assert (request.folder, request.hyp, request.classes) == ("runs/train/exp", PRESETS["p5"], ())


def test_every_option_reaches_the_request(run, fake):
    options = (
        "--epochs 7 --batch 8 --nominal-batch 32 --img 96 --seed 3 --workers 0 --cache 1.5 --half --adam --linear-lr "
        "--no-sync-bn --no-recalibrate-bn --freeze 0,1,2 --multi-scale --close-mosaic 2 --image-weights --autoanchor "
        "--patience 5 --val-every 3 --save-minutes 0.5 --no-ota --assigner lead-guided --no-constraint "
        "--auxiliary full --variant yolov7-w6 --device 0 --single-cls --no-tensorboard --save-dir out"
    )
    assert run("--data", "D.yaml", *options.split()).exit_code == 0
    assert fake.request.options == TrainOptions(
        epochs=7, batch=8, nominal_batch=32, img=96, seed=3, workers=0, cache_gib=1.5, half=True, adam=True,
        linear_lr=True, sync_bn=False, recalibrate_bn=False, freeze=(0, 1, 2), multi_scale=True, close_mosaic=2,
        image_weights=True, autoanchor=True, patience=5, val_every=3, save_minutes=0.5, ota=False,
        assigner="lead-guided", constraint=False, auxiliary="full",
    )  # fmt: skip
    same = [field.name for field in fields(TrainOptions) if getattr(fake.request.options, field.name) == field.default]
    assert same == ["rect"]  # which contradicts some of the others
    request = fake.request
    assert (request.variant, request.device, request.folder) == ("yolov7-w6", "0", "out")
    assert (request.single_class, request.tensorboard, request.hyp) == (True, False, PRESETS["p6"])
    assert run("--data", "D.yaml", "--rect").exit_code == 0 and fake.request.options.rect


def test_the_official_spellings_are_accepted(run, fake):
    run("--data", "D.yaml", "--batch-size", "4", "--img-size", "320")
    assert (fake.request.options.batch, fake.request.options.img) == (4, 320)


@pytest.mark.parametrize("text", ["cat,dog", "0 16", "3", "traffic light,2", "cat, small"])
def test_classes_are_divided_by_the_dataset_which_knows_their_names(run, fake, text):
    run("--data", "D.yaml", "--classes", text)
    assert fake.request.classes == (text,)
    run("--data", "D.yaml", "--classes", text, "--classes", "dog")
    assert fake.request.classes == (text, "dog")


@pytest.mark.parametrize(("text", "freeze"), [("50", (50,)), ("0,1,2", (0, 1, 2)), ("4 9", (4, 9))])
def test_layers_to_freeze_are_numbers(run, fake, text, freeze):
    run("--data", "D.yaml", "--freeze", text)
    assert fake.request.options.freeze == freeze


def test_each_run_gets_a_new_folder(run, fake, tmp_path):
    for name in ("exp", "exp2", "exp3"):
        run("--data", "D.yaml")
        assert fake.request.folder == f"runs/train/{name}"
        (tmp_path / fake.request.folder).mkdir(parents=True)


def test_weights_select_their_variant_and_the_fine_tuning_recipe(run, fake, weights):
    run("--data", "D.yaml", "--weights", str(weights))
    request = fake.request
    assert (request.weights, request.variant, request.hyp) == (str(weights), "yolov7-tiny", PRESETS["custom"])
    run("--data", "D.yaml", "--weights", str(weights), "--variant", "yolov7", "--hyp", "p5")
    assert (fake.request.variant, fake.request.hyp) == ("yolov7", PRESETS["p5"])


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "preset"), [("yolov7-tiny", "tiny"), ("yolov7x", "p5"), ("yolov7-e6e", "p6")])
def test_the_variant_selects_the_recipe(run, fake, variant, preset):
    run("--data", "D.yaml", "--variant", variant)
    assert fake.request.hyp == PRESETS[preset]


def test_set_changes_single_values_of_a_preset_or_file(run, fake, tmp_path):
    (tmp_path / "h.yaml").write_text("lr0: 0.02\nmixup: 0\n")
    run("--data", "D.yaml", "--hyp", "h.yaml", "--set", "lr0=1e-3", "--set", "degrees = 5")
    expected = read_hyperparameters("p5", changes={"lr0": 0.001, "mixup": 0.0, "degrees": 5.0})
    assert fake.request.hyp == expected


def test_show_hyp_prints_a_file_that_can_be_read_again(run, fake, tmp_path):
    result = run("--hyp", "p6", "--set", "lr0=0.003", "--show-hyp")
    (tmp_path / "shown.yaml").write_text(result.stdout)
    expected = read_hyperparameters("p6", changes={"lr0": 0.003})
    assert result.stdout == format_hyperparameters(expected)
    assert read_hyperparameters("shown.yaml") == expected
    assert fake.request is None
    assert run("--show-hyp", "--variant", "yolov7-tiny").stdout == format_hyperparameters(PRESETS["tiny"])


# --- refused options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        ("", "y7 train needs --data.", "y7 shapes --output shapes"),
        ("--data D.yaml --set lr0", "--set lr0 is not name=number.", "--set lr0=0.001"),
        ("--data D.yaml --set lr0=fast", "--set lr0=fast is not name=number.", "--set lr0=0.001"),
        ("--data D.yaml --set lr=0.1", "'lr' is not a hyperparameter", "lr0"),
        ("--data D.yaml --set lr0=nan", "lr0: nan is not a number of at least 0", "--show-hyp"),
        ("--data D.yaml --set mosaic=2", "mosaic: 2 is above 1", "--show-hyp"),
        ("--data D.yaml --hyp absent.yaml", "is neither a preset nor a file", "tiny, p5, p6, custom"),
        ("--data D.yaml --freeze a,b", "--freeze a,b is not a list of layers", "--freeze 0,1,2"),
        ("--data D.yaml --freeze -1", "--freeze -1 is not a list of layers", "--freeze 50"),
        ("--data D.yaml --img 640x480", "--img 640x480: training images are square", "--img 640, and --rect"),
        ("--data D.yaml --img big", "big", "--img"),
        ("--data D.yaml --epochs 0", "--epochs 0 must be at least 1", "--epochs 2"),
        ("--data D.yaml --batch 0", "--batch 0 must be at least 1", "--batch 2"),
        ("--data D.yaml --save-minutes -1", "--save-minutes -1 must be at least 0", "--save-minutes 1"),
        ("--data D.yaml --cache -1", "--cache -1 must be at least 0", "--cache 1"),
        ("--data D.yaml --assigner best", "--assigner best is unknown", "coarse-to-fine"),
        ("--data D.yaml --auxiliary some", "--auxiliary some is unknown", "partial, full, none"),
        ("--data D.yaml --rect --multi-scale", "--rect and --multi-scale contradict each other", "Leave one"),
        ("--data D.yaml --rect --image-weights", "--rect and --image-weights contradict each other", "Leave one"),
        ("--data D.yaml --variant yolov7-tinny", "--variant yolov7-tinny is unknown", "Did you mean yolov7-tiny?"),
        ("--resume", "There is no training run in runs/train to resume", "--save-dir DIR"),
    ],
)
def test_invalid_options_are_refused_with_a_fix(run, fake, options, message, fix):
    with pytest.raises(UsageError) as caught:
        run(*options.split())
    assert message in caught.value.message and fix in caught.value.fix
    assert fake.request is None and fake.resume_arguments is None


def test_missing_weights_are_named(run):
    with pytest.raises(LoadError, match=r"absent\.pt"):
        run("--data", "D.yaml", "--weights", "absent.pt")


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resume_uses_the_given_folder(run, fake, tmp_path):
    assert run("--resume", "--save-dir", "some/run").exit_code == 0
    assert fake.resume_arguments == {"folder": Path("some/run"), "device": None, "data": None}
    run("--resume", "--save-dir", "some/run", "--device", "cpu", "--data", "elsewhere/D.yaml")
    assert fake.resume_arguments == {"folder": Path("some/run"), "device": "cpu", "data": "elsewhere/D.yaml"}


def save_runs(project, **completed_epochs):
    """Write states of runs of ten epochs, each one newer than the one before."""
    for age, (name, epoch) in enumerate(completed_epochs.items()):
        folder = project / name
        folder.mkdir(parents=True)
        request = TrainRequest(data="D.yaml", folder=str(folder), options=TrainOptions(epochs=10))
        state = RunState(request=request, data_sha256="", class_names=("a",), anchors=(), world_size=1, epoch=epoch)
        save_run_state(folder, state, {"model.w": torch.zeros(2)})
        os.utime(folder / "state.safetensors", (1000 + age, 1000 + age))


def test_resume_without_a_folder_uses_the_newest_run_that_is_not_finished(run, fake):
    save_runs(Path("runs/train"), exp=3, exp2=5, exp3=10)
    run("--resume")
    assert fake.resume_arguments["folder"] == Path("runs/train/exp2")
    run("--resume", "--name", "exp")
    assert fake.resume_arguments["folder"] == Path("runs/train/exp")


def test_resume_looks_for_runs_in_the_project(run, fake):
    save_runs(Path("elsewhere"), cars=3)
    run("--resume", "--project", "elsewhere")
    assert fake.resume_arguments["folder"] == Path("elsewhere/cars")


def test_resume_with_a_damaged_state_names_it(run, fake):
    save_runs(Path("runs/train"), exp=3, exp2=5)
    Path("runs/train/exp2/state.safetensors").write_bytes(b"x")
    os.utime("runs/train/exp2/state.safetensors", (2000, 2000))
    run("--resume")
    assert fake.resume_arguments["folder"] == Path("runs/train/exp2")  # resuming it raises the error


def test_resume_without_an_unfinished_run_names_the_weights_to_train_further(run, fake):
    save_runs(Path("runs/train"), exp=10, exp2=10)
    with pytest.raises(UsageError, match="Each of the 2 training runs in runs/train is finished") as caught:
        run("--resume")
    assert caught.value.fix.endswith("--weights runs/train/exp2/last.safetensors")


def test_resume_of_the_only_run_says_that_it_is_finished(run, fake):
    save_runs(Path("runs/train"), exp=10)
    with pytest.raises(UsageError, match="The only training run in runs/train is finished"):
        run("--resume")


def test_a_run_that_stopped_early_is_finished():
    request = TrainRequest(data="", folder="", options=TrainOptions(epochs=10, patience=3))
    state = RunState(request=request, data_sha256="", class_names=(), anchors=(), world_size=1, best_epoch=2)
    assert [replace(state, epoch=epoch).is_finished for epoch in (0, 4, 5, 10)] == [False, False, True, True]


def test_without_weights_and_variant_a_warning_says_what_is_trained(run):
    warning = "WARNING: neither --weights nor --variant is given, so yolov7 is trained from RANDOM weights."
    assert warning in run("--data", "D.yaml").stderr
    assert warning not in run("--data", "D.yaml", "--variant", "yolov7-tiny").stderr
    assert warning not in run("--show-hyp").stderr


def test_the_folder_of_a_run_has_the_given_name(run, fake):
    for expected in ("mine/cars", "mine/cars2"):
        run("--data", "D.yaml", "--project", "mine", "--name", "cars")
        assert fake.request.folder == expected
        Path(expected).mkdir(parents=True, exist_ok=True)
    run("--data", "D.yaml", "--project", "mine", "--name", "cars", "--exist-ok")
    assert fake.request.folder == "mine/cars"


@pytest.mark.parametrize("change", ["--epochs 500", "--batch 8", "--set lr0=1", "--adam", "--no-ota", "--img 320"])
def test_other_options_cannot_be_changed_with_resume(run, fake, change):
    with pytest.raises(UsageError) as caught:
        run("--resume", "--save-dir", "some/run", *change.split())
    assert caught.value.message.startswith(f"{change.split()[0].replace('no-', '')} cannot be changed with --resume")
    assert caught.value.fix.endswith("--weights some/run/last.safetensors")
    assert fake.resume_arguments is None


# --- output -----------------------------------------------------------------------------------------------------------


def test_results_go_to_standard_output_and_progress_to_standard_error(run):
    result = run("--data", "D.yaml", "--save-dir", "out")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["epoch", "box", "obj", "cls", "P", "R", "AP50", "AP", "img/s", "GB", "s", "left"]
    assert lines[1] == lines[2] and len(lines) == 5
    losses, metrics = ["0.0500", "0.0100", "0.0200"], ["0.3000", "-", "0.2000", "0.1234"]
    assert lines[1].split() == ["1", *losses, *metrics, "12.3", "1.00", "65.0", "1:05"]
    assert len(lines[0]) == len(lines[1])
    assert lines[3:] == [
        "1.5 minutes; weights in out/best.safetensors, charts in the same folder",
        "Next:  y7 export --weights out/best.safetensors",
    ]
    assert "text about the data" in result.stderr
    assert "epoch 1/2: 1/1" in result.stderr and "validate: 3/3" in result.stderr


def test_json_is_alone_on_standard_output(run):
    result = run("--data", "D.yaml", "--save-dir", "out", "--json", "-")
    document = json.loads(result.stdout)
    assert document["weights"] == "out/best.safetensors" and document["epochs"] == 2
    assert "weights in out" in result.stderr and "img/s" in result.stderr


def test_a_report_is_written_as_json(run, tmp_path):
    run("--data", "D.yaml", "--save-dir", "out", "--json", "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["seconds"] == 90.0


def test_only_the_main_process_prints(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = run("--data", "D.yaml", "--json", "-")
    assert "text about" not in result.stderr and "epoch 1/2" not in result.stderr
    assert "weights in" not in result.output and "minutes" not in result.output
