"""Going on after an interruption, of whatever kind: the same weights and losses as if there had been none."""

import os
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from tests.support.training_runs import (
    Notes,
    arguments,
    assert_same_weights,
    finished,
    losses,
    small_request,
    started,
    y7,
)
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.errors import LoadError, TrainingError, UsageError
from yolov7_deploy.training import checkpoints as keeping
from yolov7_deploy.training import trainer
from yolov7_deploy.training.loggers import read_results
from yolov7_deploy.training.resume_state import load_run_state, save_run_state
from yolov7_deploy.training.run import resume, train

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_charts")

EPOCHS = 2
MESSAGE = "stopping after this step; Ctrl-C once more ends at once"


def interrupt(number=signal.SIGINT):
    return lambda: os.kill(os.getpid(), number)


def stopped(data, folder, *, at, number=signal.SIGINT, **changes):
    """Trains until a signal comes in the step before `at`, and gives who looked on."""
    notes = Notes({(at[0], at[1] - 1): interrupt(number)})
    with pytest.raises(KeyboardInterrupt):
        train(small_request(data, folder, epochs=EPOCHS, **changes), watch=notes)
    assert notes.steps[-1] == at
    return notes


def assert_as_if_never_interrupted(folder, whole):
    assert losses(folder) == losses(whole)
    for name in ("last.safetensors", "best.safetensors"):
        assert_same_weights(folder, whole, name=name)
    lines, others = (read_results(path / "results.csv") for path in (folder, whole))
    for line, other in zip(lines, others, strict=True):
        assert (line.ap, line.lr_weight, line.momentum) == (other.ap, other.lr_weight, other.momentum)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [(2, 2), (1, 3)], ids=str)  # in an epoch, and after the last step of one
def test_a_training_goes_on_after_ctrl_c_as_if_it_had_never_stopped(data, whole, tmp_path, at):
    folder = tmp_path / "run"
    notes = stopped(data, folder, at=at)
    assert notes.words[-2:] == [
        MESSAGE,
        f"stopped after step {at[1]} of epoch {at[0]}; go on with:  y7 train --resume --save-dir {folder}",
    ]
    state, tensors = load_run_state(folder / "state.safetensors")
    assert (state.epoch + 1, state.step) == at
    assert any(name.startswith("gradient.") for name in tensors)  # an update is after the first step of an epoch
    assert len(read_results(folder / "results.csv")) == at[0] - 1
    later = Notes()
    report = resume(folder, watch=later)
    assert report.epochs == EPOCHS and f"goes on in epoch {at[0]} of {EPOCHS}, after {at[1]} steps of it" in later.said
    assert_as_if_never_interrupted(folder, whole)


def test_sigterm_ends_a_training_like_ctrl_c(data, tmp_path):
    notes = stopped(data, tmp_path / "run", at=(1, 2), number=signal.SIGTERM)
    assert MESSAGE in notes.words and "stopped after step 2 of epoch 1" in notes.words[-1]
    state, _ = load_run_state(tmp_path / "run" / "state.safetensors")
    assert (state.epoch, state.step) == (0, 2)


@pytest.mark.slow
def test_a_training_may_be_interrupted_again_and_again(data, whole, tmp_path):
    folder = tmp_path / "run"
    stopped(data, folder, at=(1, 2))
    for place in ((1, 3), (2, 2)):  # each is noticed in the step that follows
        with pytest.raises(KeyboardInterrupt):
            resume(folder, watch=Notes({place: interrupt()}))
    resume(folder, watch=Notes())
    assert_as_if_never_interrupted(folder, whole)


def test_a_second_ctrl_c_ends_at_once_and_leaves_the_older_state(data, tmp_path):
    folder = tmp_path / "run"

    def twice():
        interrupt()()
        interrupt()()

    notes = Notes({(1, 2): twice})
    with pytest.raises(KeyboardInterrupt):
        train(small_request(data, folder, epochs=EPOCHS), watch=notes)
    assert notes.words[-1] == MESSAGE and notes.steps[-1] == (1, 2)
    state, _ = load_run_state(folder / "state.safetensors")
    assert (state.epoch, state.step) == (0, 1)
    assert not list(folder.glob(".*"))


def test_a_second_sigterm_lets_the_state_be_written(data, tmp_path):
    folder = tmp_path / "run"

    def several():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            interrupt(number)()

    with pytest.raises(KeyboardInterrupt):
        train(small_request(data, folder, epochs=EPOCHS), watch=Notes({(1, 1): several}))
    state, _ = load_run_state(folder / "state.safetensors")
    assert (state.epoch, state.step) == (0, 2)


def test_handlers_of_signals_are_put_back(data, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopped(data, tmp_path / "run", at=(1, 2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_training_in_a_thread_leaves_signals_alone(data, tmp_path):
    found = []
    request = small_request(data, tmp_path / "run", batch=6)
    thread = threading.Thread(target=lambda: found.append(train(request, watch=Notes())))
    thread.start()
    thread.join()
    assert found[0].epochs == 1


# --- processes --------------------------------------------------------------------------------------------------------

_AT_STEP = """
import os, signal, sys
from yolov7_deploy.measure import report
from yolov7_deploy.cli.app import main

step = report._plain_progress

def plain(what, stream):
    show = step(what, stream)
    def shown(done, total, note):
        show(done, total, note)
        if what == "epoch 2/2" and done == {step}:
            os.kill(os.getpid(), signal.{name})
    return shown

report._plain_progress = plain
sys.argv[0] = "y7"
main()
"""


def signalled(name, data, folder, *more, step):
    """The command as a process that gets a signal when a step of its second epoch is shown, before that is kept."""
    script = _AT_STEP.format(name=name, step=step)
    return finished(started(["-c", script, *arguments(data, folder, "--epochs", str(EPOCHS), *more)]))


def test_ctrl_c_is_exit_130_and_resume_gives_the_same_bytes(data, whole, tmp_path):
    folder = tmp_path / "run"
    code, out, err = signalled("SIGINT", data, folder, step=1)
    assert (code, "Traceback" in err) == (130, False), err
    said = [line for line in err.splitlines() if line][-2:]
    assert said[0] == MESSAGE and "stopped after step 2 of epoch 2; go on with:  y7 train --resume" in said[1]
    assert len(out.splitlines()) == 2  # heading and first epoch
    resume(folder, watch=Notes())
    assert_as_if_never_interrupted(folder, whole)


@pytest.mark.slow
def test_after_kill_a_training_goes_on_from_its_last_step(data, whole, tmp_path):
    folder = tmp_path / "run"
    code, _, err = signalled("SIGKILL", data, folder, "--save-minutes", "0", step=2)
    assert code == -signal.SIGKILL, err
    assert len(list(folder.glob(".*"))) == 0
    state, _ = load_run_state(folder / "state.safetensors")
    assert (state.epoch, state.step, len(read_results(folder / "results.csv"))) == (1, 1, 1)
    (folder / ".state.123456.partial.safetensors").write_bytes(b"half of it")  # as if it had been killed a moment later
    code, out, err = y7("train", "--resume", "--save-dir", str(folder))
    assert code == 0 and "best epoch" in out, err
    assert "goes on in epoch 2 of 2, after 1 steps of it" in err
    assert not list(folder.glob(".*"))
    assert_as_if_never_interrupted(folder, whole)


class Gone(BaseException):
    """Ends a training where nobody expects it."""


def gone():
    raise Gone


@pytest.mark.parametrize(
    ("at", "state_at"), [((1, 2), (0, 1)), pytest.param((2, 3), (1, 0), marks=pytest.mark.slow)], ids=str
)
def test_what_was_not_kept_is_done_again(data, whole, tmp_path, at, state_at):
    folder = tmp_path / "run"
    with pytest.raises(Gone):
        train(small_request(data, folder, epochs=EPOCHS), watch=Notes({at: gone}))
    state, _ = load_run_state(folder / "state.safetensors")
    assert (state.epoch, state.step) == state_at  # the first step is kept, then ends of epochs
    resume(folder, watch=Notes())
    assert_as_if_never_interrupted(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["keep_last", "keep_best", "_validated", "_keep"])
def test_an_end_of_an_epoch_that_was_cut_off_is_done_again(data, whole, tmp_path, monkeypatch, place):
    folder, owner = tmp_path / "run", trainer.Trainer if place.startswith("_") else trainer
    real, calls, fatal = getattr(owner, place), [], 1 if place == "keep_best" else 2

    def sometimes(*given, **named):
        calls.append(place)
        if len(calls) == fatal:
            raise Gone
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, sometimes)
        with pytest.raises(Gone):
            train(small_request(data, folder, epochs=EPOCHS), watch=Notes())
    resume(folder, watch=Notes())
    assert_as_if_never_interrupted(folder, whole)


# --- what may and what may not be different ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """The folder of a training that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    stopped(data, folder, at=(2, 2))
    return folder


@pytest.fixture
def halfway(interrupted, tmp_path):
    """A copy of it."""
    return shutil.copytree(interrupted, tmp_path / "halfway")


def test_the_seconds_of_all_parts_are_added_up(halfway):
    state, tensors = load_run_state(halfway / "state.safetensors")
    assert 0 < state.seconds < 60
    save_run_state(halfway / "state.safetensors", replace(state, seconds=1000.0), tensors)
    assert 1000 < resume(halfway, watch=Notes()).seconds < 1060


def test_folder_and_dataset_may_have_been_moved(data, whole, halfway, tmp_path):
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(halfway, moved)
    shutil.copytree(data.parent, tmp_path / "shapes")
    state, tensors = load_run_state(moved / "state.safetensors")
    gone_request = replace(state.request, data=str(tmp_path / "absent.yaml"))
    save_run_state(moved / "state.safetensors", replace(state, request=gone_request), tensors)
    report = resume(moved, watch=Notes(), data=str(tmp_path / "shapes" / data.name))
    assert report.folder == moved and not halfway.exists()
    assert_as_if_never_interrupted(moved, whole)


def test_another_dataset_is_refused(halfway, tmp_path):
    other = write_shapes(tmp_path / "other", train=6, val=3, size=64, seed=2)
    with pytest.raises(UsageError, match="is not the dataset this training began with") as caught:
        resume(halfway, watch=Notes(), data=str(other))
    assert f"--weights {halfway / 'last.safetensors'}" in caught.value.fix


@pytest.mark.parametrize("split", ["train", "val"])
def test_changed_labels_are_another_dataset(halfway, data, tmp_path, split):
    shutil.copytree(data.parent, tmp_path / "shapes")
    labels = sorted((tmp_path / "shapes/labels" / split).iterdir())
    label = next(path for path in labels if path.stat().st_size)
    lines = label.read_text().splitlines()
    label.write_text("\n".join(["0 0.5 0.5 0.2 0.2", *lines[1:]]) + "\n")
    with pytest.raises(UsageError, match="images or labels differ"):
        resume(halfway, watch=Notes(), data=str(tmp_path / "shapes" / data.name))


def test_another_number_of_processes_is_refused(halfway):
    state, tensors = load_run_state(halfway / "state.safetensors")
    save_run_state(halfway / "state.safetensors", replace(state, world=2), tensors)
    with pytest.raises(UsageError, match="ran in 2 processes, not in 1") as caught:
        resume(halfway, watch=Notes())
    assert caught.value.fix.startswith("torchrun --nproc-per-node 2 -m yolov7_deploy train --resume")


def test_no_state_is_no_training(tmp_path):
    with pytest.raises(LoadError, match="there is no training to go on with"):
        resume(tmp_path, watch=Notes())


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pickle", "schema", "field"])
def test_a_damaged_state_is_refused(halfway, damage):
    path = halfway / "state.safetensors"
    data = path.read_bytes()
    damaged = {
        "cut": data[:-1000],
        "flipped": b"\xff" * 64 + data[64:],
        "empty": b"",
        "pickle": b"\x80\x04cposix\nsystem\n.",
        "schema": data.replace(b'\\"schema\\": 1', b'\\"schema\\": 2', 1),
        "field": data.replace(b'\\"updates\\"', b'\\"updotes\\"', 1).replace(b'\\"world\\"', b'\\"wurld\\"', 1),
    }[damage]
    assert damaged != data
    path.write_bytes(damaged)
    with pytest.raises(LoadError, match="no training state of this version, or damaged") as caught:
        resume(halfway, watch=Notes())
    assert f"y7 train --weights {halfway / 'last.safetensors'}" in caught.value.fix


@pytest.mark.parametrize("lost", ["model.model.0.conv.weight", "average.model.0.conv.weight"])
def test_a_state_without_all_tensors_is_refused(halfway, lost):
    state, tensors = load_run_state(halfway / "state.safetensors")
    del tensors[lost]
    save_run_state(halfway / "state.safetensors", state, tensors)
    with pytest.raises(LoadError, match="does not hold the weights of yolov7-tiny"):
        resume(halfway, watch=Notes())


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_state_is_written_whole_or_not_at_all(halfway, monkeypatch):
    state, tensors = load_run_state(halfway / "state.safetensors")
    before = (halfway / "state.safetensors").read_bytes()

    def half_written(_, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    with pytest.raises(LoadError, match=r"cannot be written .*No space left.* The older one is as it was"):
        save_run_state(halfway / "state.safetensors", state, tensors)
    assert (halfway / "state.safetensors").read_bytes() == before
    assert not list(halfway.glob(".*"))


def test_weights_that_are_no_numbers_are_not_kept(halfway):
    state, tensors = load_run_state(halfway / "state.safetensors")
    before = (halfway / "state.safetensors").read_bytes()
    tensors["model.model.0.conv.weight"][0, 0, 0, 0] = float("inf")
    with pytest.raises(TrainingError, match=r"no numbers in epoch 2, after step 2 \(first in model\.model\.0\.conv"):
        keeping.keep_state(halfway, state, tensors)
    assert (halfway / "state.safetensors").read_bytes() == before


def test_pending_gradients_may_overflow(halfway):
    state, tensors = load_run_state(halfway / "state.safetensors")
    tensors["gradient.model.0.conv.weight"] = torch.full((32, 3, 3, 3), float("inf"))
    keeping.keep_state(halfway, state, tensors)
    assert load_run_state(halfway / "state.safetensors")[1]["gradient.model.0.conv.weight"].isinf().all()
