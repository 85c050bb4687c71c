"""A run that is resumed after any interruption has the same weights and losses as one without interruption."""

import os
import shutil
import signal
import sys
import threading
from dataclasses import replace

import pytest
import torch

from tests.support.training_runs import (
    RecordingCallback,
    assert_same_run,
    assert_same_weights,
    copy_dataset,
    resume_run,
    start_process,
    train_arguments,
    train_small,
    wait_for,
    y7,
)
from yolov7_deploy._process import Interrupted
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.errors import LoadError, TrainingError, UsageError
from yolov7_deploy.training import checkpoints, trainer
from yolov7_deploy.training.checkpoints import load_run_state, save_run_state
from yolov7_deploy.training.loggers import read_results

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_charts")

EPOCHS = 2
STOPPING = "stopping after the next step; press Ctrl-C again to stop at once"


def send(number=signal.SIGINT):
    """Return a function that sends a signal to this process."""
    return lambda: os.kill(os.getpid(), number)


def train_until(data, folder, *, at, number=signal.SIGINT, **changes):
    """Train until a signal that arrives in the step before `at` stops it, and return the callback."""
    callback = RecordingCallback({(at[0], at[1] - 1): send(number)})
    with pytest.raises(KeyboardInterrupt):
        train_small(data, folder, callback, epochs=EPOCHS, **changes)
    assert callback.steps[-1] == at
    return callback


def assert_as_if_never_interrupted(folder, uninterrupted_run):
    assert_same_run(folder, uninterrupted_run)
    assert_same_weights(folder, uninterrupted_run, name="best.safetensors")
    records, others = (read_results(path / "results.csv") for path in (folder, uninterrupted_run))
    for record, other in zip(records, others, strict=True):
        assert (record.ap, record.lr_weight, record.momentum) == (other.ap, other.lr_weight, other.momentum)


# --- signals ----------------------------------------------------------------------------------------------------------


# Within an epoch, and after its last step.
@pytest.mark.parametrize("at", [pytest.param((2, 2), marks=pytest.mark.slow), (1, 3)], ids=str)
def test_a_run_resumed_after_ctrl_c_equals_an_uninterrupted_one(data, uninterrupted_run, tmp_path, at):
    folder = tmp_path / "run"
    callback = train_until(data, folder, at=at)
    assert callback.messages[-2:] == [
        STOPPING,
        f"stopped after step {at[1]} of epoch {at[0]}; resume with:  y7 train --resume --save-dir {folder}",
    ]
    state, tensors = load_run_state(folder)
    assert (state.epoch + 1, state.step) == at
    assert any(name.startswith("gradient.") for name in tensors)  # an update is after the first step of an epoch
    assert len(read_results(folder / "results.csv")) == at[0] - 1
    callback = RecordingCallback()
    report = resume_run(folder, callback)
    assert report.epochs == EPOCHS
    assert f"resuming in epoch {at[0]} of {EPOCHS}, after {at[1]} of its steps" in callback.text
    assert_as_if_never_interrupted(folder, uninterrupted_run)


def test_resuming_a_finished_run_says_so_and_takes_no_step(uninterrupted_run, tmp_path):
    folder = shutil.copytree(uninterrupted_run, tmp_path / "run")
    callback = RecordingCallback()
    assert resume_run(folder, callback).epochs == EPOCHS
    assert "this run is finished (epoch 2 of 2)" in callback.text and not callback.steps
    assert f"start a new one with --weights {folder / 'last.safetensors'}" in callback.text
    assert_as_if_never_interrupted(folder, uninterrupted_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_stop_training_like_ctrl_c(data, tmp_path, number):
    callback = RecordingCallback({(1, 1): send(number)})
    with pytest.raises(Interrupted) as caught:
        train_small(data, tmp_path / "run", callback, epochs=EPOCHS)
    assert (caught.value.number, caught.value.exit_code) == (number, 128 + number)
    assert STOPPING in callback.messages and "stopped after step 2 of epoch 1" in callback.messages[-1]
    state, _ = load_run_state(tmp_path / "run")
    assert (state.epoch, state.step) == (0, 2)


def test_sighup_that_is_ignored_does_not_stop_training(data, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        report = train_small(data, tmp_path / "run", RecordingCallback({(1, 1): send(signal.SIGHUP)}))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert report.epochs == 1


@pytest.mark.slow
def test_a_run_can_be_interrupted_and_resumed_several_times(data, uninterrupted_run, tmp_path):
    folder = tmp_path / "run"
    train_until(data, folder, at=(1, 2))
    for step in ((1, 3), (2, 2)):  # the signal takes effect in the step that follows
        with pytest.raises(KeyboardInterrupt):
            resume_run(folder, RecordingCallback({step: send()}))
    resume_run(folder)
    assert_as_if_never_interrupted(folder, uninterrupted_run)


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_previous_state(data, tmp_path):
    folder = tmp_path / "run"

    def send_twice():
        send()()
        send()()

    callback = RecordingCallback({(1, 2): send_twice})
    with pytest.raises(KeyboardInterrupt):
        train_small(data, folder, callback, epochs=EPOCHS)
    assert callback.messages[-1] == STOPPING and callback.steps[-1] == (1, 2)
    state, _ = load_run_state(folder)
    assert (state.epoch, state.step) == (0, 1)
    assert not list(folder.glob(".*"))


def test_a_second_sigterm_does_not_prevent_saving_the_state(data, tmp_path):
    folder = tmp_path / "run"

    def send_several():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            send(number)()

    with pytest.raises(KeyboardInterrupt):
        train_small(data, folder, RecordingCallback({(1, 1): send_several}), epochs=EPOCHS)
    state, _ = load_run_state(folder)
    assert (state.epoch, state.step) == (0, 2)


def test_signal_handlers_are_restored_after_training(data, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train_until(data, tmp_path / "run", at=(1, 2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_in_a_thread_does_not_touch_signal_handlers(data, tmp_path):
    reports = []
    thread = threading.Thread(target=lambda: reports.append(train_small(data, tmp_path / "run", batch=6)))
    thread.start()
    thread.join()
    assert reports[0].epochs == 1


# --- processes --------------------------------------------------------------------------------------------------------

_SIGNAL_AT_STEP = """
import contextlib, os, signal, sys
from yolov7_deploy import _console
from yolov7_deploy.cli.app import main

progress = _console.progress_with_note

@contextlib.contextmanager
def signalling_progress(what, **options):
    def show_and_signal(done, total, note):
        show(done, total, note)
        if what == "epoch 2/2" and done == {step}:
            os.kill(os.getpid(), signal.{name})
    with progress(what, **options) as show:
        yield show_and_signal

_console.progress_with_note = signalling_progress
sys.argv[0] = "y7"
main()
"""


def run_signalled(name, data, folder, *more, step):
    """Run the command in a process that gets a signal when a step of its second epoch is shown, before it is saved."""
    script = _SIGNAL_AT_STEP.format(name=name, step=step)
    return wait_for(start_process(["-c", script, *train_arguments(data, folder, "--epochs", str(EPOCHS), *more)]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exit_code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_other_signals_end_the_command_with_their_exit_code(data, tmp_path, name, exit_code):
    code, _, err = run_signalled(name, data, tmp_path / "run", step=1)
    assert (code, "Traceback" in err) == (exit_code, False), err
    assert "resume with:  y7 train --resume" in err
    state, _ = load_run_state(tmp_path / "run")
    assert (state.epoch, state.step) == (1, 2)


@pytest.mark.slow
def test_ctrl_c_in_the_command_is_exit_code_130_and_the_run_can_be_resumed(data, uninterrupted_run, tmp_path):
    folder = tmp_path / "run"
    code, out, err = run_signalled("SIGINT", data, folder, step=1)
    assert (code, "Traceback" in err) == (130, False), err
    lines = [line for line in err.splitlines() if line][-2:]
    assert lines[0] == STOPPING and "stopped after step 2 of epoch 2; resume with:  y7 train --resume" in lines[1]
    assert len(out.splitlines()) == 2  # heading and first epoch
    resume_run(folder)
    assert_as_if_never_interrupted(folder, uninterrupted_run)


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_saved_step(data, uninterrupted_run, tmp_path):
    folder = tmp_path / "run"
    code, _, err = run_signalled("SIGKILL", data, folder, "--save-minutes", "0", step=2)
    assert code == -signal.SIGKILL, err
    assert len(list(folder.glob(".*"))) == 0
    state, _ = load_run_state(folder)
    assert (state.epoch, state.step, len(read_results(folder / "results.csv"))) == (1, 1, 1)
    (folder / f".state.{'0' * 16}.partial.safetensors").write_bytes(b"half of it")  # as if killed during a write
    code, out, err = y7("train", "--resume", "--save-dir", str(folder))
    assert code == 0 and "best epoch" in out, err
    assert "resuming in epoch 2 of 2, after 1 of its steps" in err
    assert not list(folder.glob(".*"))
    assert_as_if_never_interrupted(folder, uninterrupted_run)


class Crash(BaseException):
    """An exception that no code expects."""


def crash():
    raise Crash


@pytest.mark.parametrize(
    ("at", "state_at"), [((1, 2), (0, 1)), pytest.param((2, 3), (1, 0), marks=pytest.mark.slow)], ids=str
)
def test_steps_that_were_not_saved_are_repeated(data, uninterrupted_run, tmp_path, at, state_at):
    folder = tmp_path / "run"
    with pytest.raises(Crash):
        train_small(data, folder, RecordingCallback({at: crash}), epochs=EPOCHS)
    state, _ = load_run_state(folder)
    assert (state.epoch, state.step) == state_at  # saved after the first step, then after each epoch
    resume_run(folder)
    assert_as_if_never_interrupted(folder, uninterrupted_run)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["save_last", "save_best", "_validate", "_save_state"])
def test_an_interrupted_end_of_an_epoch_is_repeated(data, uninterrupted_run, tmp_path, monkeypatch, function):
    folder, owner = tmp_path / "run", trainer.Trainer if function.startswith("_") else trainer
    original, calls, crash_at = getattr(owner, function), [], 1 if function == "save_best" else 2

    def crash_once(*args, **kwargs):
        calls.append(function)
        if len(calls) == crash_at:
            raise Crash
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, crash_once)
        with pytest.raises(Crash):
            train_small(data, folder, epochs=EPOCHS)
    resume_run(folder)
    assert_as_if_never_interrupted(folder, uninterrupted_run)


# --- what may change, and what may not --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """Folder of a run that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    train_until(data, folder, at=(2, 2))
    return folder


@pytest.fixture
def interrupted_copy(interrupted, tmp_path):
    """A copy of that folder, which a test may change."""
    return shutil.copytree(interrupted, tmp_path / "interrupted")


def change_state(folder, **changes):
    """Rewrite the state of a run with other values."""
    state, tensors = load_run_state(folder)
    save_run_state(folder, replace(state, **changes), tensors)


def test_the_time_of_all_parts_is_summed(interrupted_copy):
    assert 0 < load_run_state(interrupted_copy)[0].seconds < 60
    change_state(interrupted_copy, seconds=1000.0)
    assert 1000 < resume_run(interrupted_copy).seconds < 1060


def test_folder_and_dataset_can_be_moved(data, uninterrupted_run, interrupted_copy, tmp_path):
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(interrupted_copy, moved)
    copied = copy_dataset(data, tmp_path)
    request = load_run_state(moved)[0].request
    change_state(moved, request=replace(request, data=str(tmp_path / "absent.yaml")))
    report = resume_run(moved, data=str(copied))
    assert report.folder == moved and not interrupted_copy.exists()
    assert_as_if_never_interrupted(moved, uninterrupted_run)


def test_another_dataset_is_refused(interrupted_copy, tmp_path):
    other = write_shapes(tmp_path / "other", train=6, val=3, size=64, seed=2)
    with pytest.raises(UsageError, match="is not the dataset that this run was started with") as caught:
        resume_run(interrupted_copy, data=str(other))
    assert f"--weights {interrupted_copy / 'last.safetensors'}" in caught.value.fix


@pytest.mark.parametrize("split", ["train", "val"])
def test_changed_labels_are_refused(interrupted_copy, data, tmp_path, split):
    copied = copy_dataset(data, tmp_path)
    labels = sorted((copied.parent / "labels" / split).iterdir())
    label = next(path for path in labels if path.stat().st_size)
    lines = label.read_text().splitlines()
    label.write_text("\n".join(["0 0.5 0.5 0.2 0.2", *lines[1:]]) + "\n")
    with pytest.raises(UsageError, match="images or labels differ"):
        resume_run(interrupted_copy, data=str(copied))


def test_changed_outlines_are_refused(interrupted_copy, data, tmp_path):
    copied = copy_dataset(data, tmp_path)
    label = next(path for path in sorted((copied.parent / "labels/train").iterdir()) if path.stat().st_size)
    first, *others = label.read_text().splitlines()
    class_id, x1, y1, x2, y2, *more = first.split()
    label.write_text("\n".join([" ".join((class_id, x2, y2, x1, y1, *more)), *others]) + "\n")  # the same box
    with pytest.raises(UsageError, match="images or labels differ"):
        resume_run(interrupted_copy, data=str(copied))


def test_another_number_of_processes_is_refused_before_the_dataset_is_read(interrupted_copy, tmp_path):
    change_state(interrupted_copy, world_size=2)
    with pytest.raises(UsageError, match="was started with 2 processes, not with 1") as caught:
        resume_run(interrupted_copy, data=str(tmp_path / "absent.yaml"))
    assert caught.value.fix.startswith("torchrun --nproc-per-node 2 -m yolov7_deploy train --resume")


def test_a_folder_without_state_cannot_be_resumed(tmp_path):
    with pytest.raises(LoadError, match="there is no training to resume"):
        resume_run(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Names are Unicode there.")
def test_a_state_in_a_folder_whose_name_is_not_unicode_is_read(interrupted_copy):
    folder = interrupted_copy.rename(os.fsdecode(os.fsencode(interrupted_copy) + b"\xff"))
    assert load_run_state(folder)[0].epoch == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "pickle", "schema", "field"])
def test_a_damaged_state_is_refused(interrupted_copy, damage):
    path = interrupted_copy / "state.safetensors"
    data = path.read_bytes()
    damaged = {
        "truncated": data[:-1000],
        "flipped": b"\xff" * 64 + data[64:],
        "empty": b"",
        "pickle": b"\x80\x04cposix\nsystem\n.",
        "schema": data.replace(b'\\"schema\\": 1', b'\\"schema\\": 2', 1),
        "field": data.replace(b'\\"world_size\\"', b'\\"wurld_size\\"', 1),
    }[damage]
    assert damaged != data
    path.write_bytes(damaged)
    with pytest.raises(LoadError, match="is damaged, or not a training state of this version") as caught:
        resume_run(interrupted_copy)
    assert f"y7 train --data D.yaml --weights {interrupted_copy / 'last.safetensors'}" in caught.value.fix


@pytest.mark.parametrize("missing", ["model.model.0.conv.weight", "ema.model.0.conv.weight"])
def test_a_state_without_all_tensors_is_refused(interrupted_copy, missing):
    state, tensors = load_run_state(interrupted_copy)
    del tensors[missing]
    save_run_state(interrupted_copy, state, tensors)
    with pytest.raises(LoadError, match="does not have the weights of yolov7-tiny"):
        resume_run(interrupted_copy)


# --- saving the state -------------------------------------------------------------------------------------------------


def test_a_state_is_written_completely_or_not_at_all(interrupted_copy, monkeypatch):
    state, tensors = load_run_state(interrupted_copy)
    before = (interrupted_copy / "state.safetensors").read_bytes()

    def fail_halfway(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write_tensors", fail_halfway)
    reason = r"cannot be written .*No space left.* The previous file is unchanged"
    with pytest.raises(TrainingError, match=reason) as caught:
        save_run_state(interrupted_copy, replace(state, world_size=2), tensors)
    assert "torchrun --nproc-per-node 2 -m yolov7_deploy train --resume" in caught.value.fix
    assert (interrupted_copy / "state.safetensors").read_bytes() == before
    assert not list(interrupted_copy.glob(".*"))


def test_a_state_with_weights_that_are_not_finite_is_not_saved(interrupted_copy):
    state, tensors = load_run_state(interrupted_copy)
    before = (interrupted_copy / "state.safetensors").read_bytes()
    tensors["model.model.0.conv.weight"][0, 0, 0, 0] = float("inf")
    with pytest.raises(TrainingError, match=r"infinite in epoch 2, after step 2 \(first in model\.model\.0\.conv"):
        save_run_state(interrupted_copy, state, tensors)
    assert (interrupted_copy / "state.safetensors").read_bytes() == before


def test_accumulated_gradients_may_overflow(interrupted_copy):
    state, tensors = load_run_state(interrupted_copy)
    tensors["gradient.model.0.conv.weight"] = torch.full((32, 3, 3, 3), float("inf"))
    save_run_state(interrupted_copy, state, tensors)
    assert load_run_state(interrupted_copy)[1]["gradient.model.0.conv.weight"].isinf().all()
