"""Failures of a training run: losses, memory, disks, images. Each error names its fix and keeps the last state."""

import resource
import signal
import sys
import weakref

import pytest
import torch

from tests.support.training_runs import (
    RecordingCallback,
    assert_same_run,
    copy_dataset,
    read_losses,
    resume_run,
    start_process,
    train_arguments,
    train_small,
    wait_for,
)
from yolov7_deploy.cli.app import main
from yolov7_deploy.errors import CheckpointError, DatasetError, DeviceError, TrainingError, is_out_of_memory
from yolov7_deploy.training import run as training
from yolov7_deploy.training.checkpoints import load_run_state
from yolov7_deploy.training.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_charts")

ADDRESS_SPACE_MIB = 600  # more than the process has at the start; 16 images of 320 pixels need twice as much


@pytest.fixture
def train_steps(monkeypatch):
    """The `TrainStep` objects that are created during the test."""
    created = []

    class Recorded(TrainStep):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            created.append(self)

    monkeypatch.setattr(training, "TrainStep", Recorded)
    return created


# --- losses and weights that are not finite ---------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_training_and_the_last_state_can_be_resumed(
    data, uninterrupted_run, tmp_path, train_steps
):
    folder = tmp_path / "run"

    def poison():
        with torch.no_grad():
            train_steps[0].model.get_submodule("model.0.conv").weight[0] = float("nan")

    with pytest.raises(TrainingError, match=r"loss is not finite in epoch 2, step 2 \(box nan") as caught:
        train_small(data, folder, RecordingCallback({(2, 1): poison}), epochs=2)
    assert f"{folder / 'state.safetensors'} has the last finite weights" in caught.value.message
    assert f"images of that step: {data.parent / 'images' / 'train'}" in caught.value.message
    assert "--set lr0=0.001" in caught.value.fix
    resume_run(folder)
    assert_same_run(folder, uninterrupted_run)


def test_a_learning_rate_that_is_much_too_high_is_an_error_without_traceback(data, tmp_path, monkeypatch, capsys):
    arguments = train_arguments(data, tmp_path / "run", "--set", "lr0=1e30", "--epochs", "3")
    monkeypatch.setattr(sys, "argv", ["y7", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    stderr = capsys.readouterr().err
    assert caught.value.code == 1 and "TrainingError: The " in stderr and "--set lr0=0.001" in stderr
    if (tmp_path / "run" / "state.safetensors").exists():
        assert all(tensor.isfinite().all() for tensor in load_run_state(tmp_path / "run")[1].values())


def test_weights_that_are_not_finite_are_neither_saved_nor_validated(data, tmp_path, train_steps):
    folder = tmp_path / "run"

    def poison():
        train_steps[0].ema.tensors["model.0.conv.weight"][0] = float("inf")

    message = r"NaN or infinite in epoch 1, after step 3 \(first in model\.0\.conv\.weight"
    with pytest.raises(TrainingError, match=message):
        train_small(data, folder, RecordingCallback({(1, 3): poison}))
    assert load_run_state(folder)[0].step == 1
    assert read_losses(folder) == [] and not (folder / "last.safetensors").exists()


# --- out of memory ----------------------------------------------------------------------------------------------------


class Activations:
    """A fake of the activations that a step holds in memory."""


@pytest.fixture
def limit_memory(monkeypatch):
    """Return a function that limits the images per step; it returns (images, size, steps alive) of each attempt."""
    alive, attempts = weakref.WeakSet(), []
    compute_loss = TrainStep.compute_loss

    def limit(max_images):
        def limited(self, batch, *, image_size=None):
            activations = Activations()
            alive.add(activations)
            images = batch.images.shape[0]
            attempts.append((images, image_size, len(alive)))
            if images > max_images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text.")
            return compute_loss(self, batch, image_size=image_size)

        monkeypatch.setattr(TrainStep, "compute_loss", limited)
        return attempts

    return limit


def test_out_of_memory_names_the_batch_size_that_fits(data, tmp_path, limit_memory):
    attempts = limit_memory(2)
    with pytest.raises(DeviceError, match="A batch of 6 images of 64x64 does not fit into the memory of cpu") as caught:
        train_small(data, tmp_path / "run", batch=6)
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.); a batch of 1 fits." in caught.value.message
    assert caught.value.fix == "--batch 1"
    assert attempts == [(6, None, 1), (3, None, 1), (1, None, 1)]  # a step's activations are freed before the next
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_out_of_memory_in_multi_scale_training_is_tried_at_the_largest_size(data, tmp_path, limit_memory):
    attempts = limit_memory(3)
    with pytest.raises(DeviceError, match="A batch of 6 images of up to 96x96") as caught:
        train_small(data, tmp_path / "run", batch=6, multi_scale=True)
    assert caught.value.fix == "--batch 3" and attempts[1:] == [(3, 96, 1)]


@pytest.mark.parametrize(("batch", "message"), [(4, ", and neither does a batch of 1 (CUDA"), (1, "cpu (CUDA")])
def test_without_memory_for_one_image_a_smaller_size_is_recommended(data, tmp_path, limit_memory, batch, message):
    limit_memory(0)
    with pytest.raises(DeviceError) as caught:
        train_small(data, tmp_path / "run", batch=batch, img=128)
    assert message in caught.value.message
    assert caught.value.fix == "A smaller size or variant:  --img 64"


def test_after_out_of_memory_the_command_can_be_repeated_with_the_batch_size_that_fits(data, tmp_path, limit_memory):
    limit_memory(2)
    with pytest.raises(DeviceError):
        train_small(data, tmp_path / "run", batch=4)
    assert train_small(data, tmp_path / "run", batch=2).epochs == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("could not create a primitive"),
    ],
)
def test_out_of_memory_is_recognized_in_the_messages_of_all_libraries(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_another_runtime_error_is_not_reported_as_out_of_memory(data, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(TrainStep, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train_small(data, tmp_path / "run")


_LIMITED = """
import re, resource, sys
from yolov7_deploy.cli.app import main
from yolov7_deploy.training.train_step import TrainStep

run = TrainStep.run

def limited(*args, **kwargs):
    used = int(re.search(r"VmSize:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + {mib} * 2**20,) * 2)
    return run(*args, **kwargs)

TrainStep.run = limited
sys.argv[0] = "y7"
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_memory_limit_of_the_system_is_reported_as_out_of_memory(data, tmp_path):
    large = train_arguments(data, tmp_path / "run", "--batch", "16", "--img", "320")
    code, _, err = wait_for(start_process(["-c", _LIMITED.format(mib=ADDRESS_SPACE_MIB), *large]))
    assert code == 1 and "Traceback" not in err, err
    assert "DeviceError: A batch of 16 images of 320x320 does not fit into the memory of cpu" in err
    assert err.splitlines()[-1].startswith(("--batch ", "A smaller size or variant:"))


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def limit_file_size():
    """Return a function that limits the size of files in MB: as on a full disk, writing more raises an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda mb: resource.setrlimit(resource.RLIMIT_FSIZE, (int(mb * 10**6), before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_too_small_for_the_state_ends_training_after_the_first_step(data, tmp_path, limit_file_size):
    folder, callback = tmp_path / "run", RecordingCallback()
    limit_file_size(50)
    with pytest.raises(TrainingError, match=r"state\.safetensors cannot be written") as caught:
        train_small(data, folder, callback)
    assert callback.steps == [(1, 1)] and not (folder / "state.safetensors").exists()
    assert f"y7 train --resume --save-dir {folder}" in caught.value.fix
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(("limit_mb", "name"), [(50, "state.safetensors"), (10, "last.safetensors")])
def test_a_disk_that_fills_up_keeps_the_previous_files_and_the_run_can_be_resumed(
    data, uninterrupted_run, tmp_path, limit_file_size, limit_mb, name
):
    folder = tmp_path / "run"
    callback = RecordingCallback({(2, 3): lambda: limit_file_size(limit_mb)})
    with pytest.raises((CheckpointError, TrainingError), match=f"{name} cannot be written"):
        train_small(data, folder, callback, epochs=2)
    limit_file_size(10**6)
    assert load_run_state(folder)[0].epoch == 1
    assert not list(folder.glob(".*"))
    resume_run(folder)
    assert_same_run(folder, uninterrupted_run)


# --- images and labels ------------------------------------------------------------------------------------------------


def test_corrupt_images_are_reported_once_and_skipped(data, tmp_path):
    copied = copy_dataset(data, tmp_path)
    corrupt = [sorted((copied.parent / "images" / split).iterdir())[0] for split in ("train", "val")]
    for path in corrupt:
        path.write_bytes(path.read_bytes()[:-500])
    callback = RecordingCallback()
    report = train_small(copied, tmp_path / "run", callback, epochs=2)
    assert report.epochs == 2 and report.accuracy.images == 2
    assert len(report.unreadable) == 2
    for path in corrupt:
        assert sum(message.startswith(f"skipped: {path} ") for message in callback.messages) == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_dataset_without_readable_images_is_refused_at_once(data, tmp_path, split):
    copied = copy_dataset(data, tmp_path)
    for path in (copied.parent / "images" / split).iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=r"None of the \d images of .*shapes\.yaml can be read"):
        train_small(copied, tmp_path / "run")


def test_a_dataset_without_boxes_is_refused(data, tmp_path):
    copied = copy_dataset(data, tmp_path)
    for path in (copied.parent / "labels/train").iterdir():
        path.write_text("")
    with pytest.raises(DatasetError, match="box"):
        train_small(copied, tmp_path / "run")
    assert not (tmp_path / "run").exists()
