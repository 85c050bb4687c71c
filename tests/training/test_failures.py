"""What goes wrong in a training: numbers, memory, disks, images; each says what to do, and leaves the last state."""

import resource
import shutil
import signal
import sys
import weakref

import pytest
import torch

from tests.support.training_runs import (
    HYP,
    Notes,
    arguments,
    assert_same_weights,
    finished,
    losses,
    small_request,
    started,
)
from yolov7_deploy.cli.app import main
from yolov7_deploy.errors import CheckpointError, DatasetError, DeviceError, TrainingError
from yolov7_deploy.training import run as training
from yolov7_deploy.training.auto_batch import is_out_of_memory
from yolov7_deploy.training.resume_state import load_run_state
from yolov7_deploy.training.run import resume, train
from yolov7_deploy.training.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("one_torch_thread", "no_charts")

ADDRESS_SPACE_MIB = 600  # beyond what the program has when it begins; 16 images of 320 pixels need twice as much


@pytest.fixture
def learners(monkeypatch):
    """The learners of trainings from now on."""
    made = []

    class Known(TrainStep):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            made.append(self)

    monkeypatch.setattr(training, "Learner", Known)
    return made


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_training_and_the_last_state_is_good(data, whole, tmp_path, learners):
    folder = tmp_path / "run"

    def poison():
        with torch.no_grad():
            learners[0].model.get_submodule("model.0.conv").weight[0] = float("nan")

    with pytest.raises(TrainingError, match=r"no number any more in epoch 2, step 2 \(box nan") as caught:
        train(small_request(data, folder, epochs=2), watch=Notes({(2, 1): poison}))
    assert f"{folder / 'state.safetensors'} has the last good weights" in caught.value.message
    assert f"begin with {data.parent / 'images' / 'train'}" in caught.value.message
    assert "--set lr0=0.001" in caught.value.fix
    resume(folder, watch=Notes())
    assert losses(folder) == losses(whole)
    assert_same_weights(folder, whole)


def test_a_rate_that_is_much_too_high_is_exit_1_with_words(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["y7", *arguments(data, tmp_path / "run", "--set", "lr0=1e30", "--epochs", "3")])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err
    assert caught.value.code == 1 and "TrainingError: The " in said and "--set lr0=0.001" in said
    state = tmp_path / "run" / "state.safetensors"
    if state.exists():
        assert all(tensor.isfinite().all() for tensor in load_run_state(state)[1].values())


def test_weights_that_are_no_numbers_are_neither_kept_nor_validated(data, tmp_path, learners):
    folder = tmp_path / "run"

    def poison():
        learners[0].average.tensors["model.0.conv.weight"][0] = float("inf")

    with pytest.raises(TrainingError, match=r"no numbers in epoch 1, after step 3 \(first in model\.0\.conv\.weight"):
        train(small_request(data, folder), watch=Notes({(1, 3): poison}))
    assert load_run_state(folder / "state.safetensors")[0].step == 1
    assert losses(folder) == [] and not (folder / "last.safetensors").exists()


# --- memory -----------------------------------------------------------------------------------------------------------


class Blob:
    """Stands for memory of a device."""


@pytest.fixture
def memory(monkeypatch):
    """A device with room for so many images; counts what is held in each step, and its sizes."""
    alive, tried = weakref.WeakSet(), []
    real = TrainStep.losses

    def with_room_for(room):
        def limited(self, batch, *, size=None):
            held = Blob()
            alive.add(held)
            images = batch.images.shape[0]
            tried.append((images, size, len(alive)))
            if images > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")
            return real(self, batch, size=size)

        monkeypatch.setattr(TrainStep, "losses", limited)
        return tried

    return with_room_for


def test_out_of_memory_names_the_batch_that_fits(data, tmp_path, memory):
    tried = memory(2)
    with pytest.raises(DeviceError, match="A batch of 6 images of 64x64 does not fit into the memory of cpu") as caught:
        train(small_request(data, tmp_path / "run", batch=6), watch=Notes())
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.); one does." in caught.value.message
    assert caught.value.fix == "--batch 1"
    assert tried == [(6, None, 1), (3, None, 1), (1, None, 1)]  # nothing of a step before is held in the next
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_out_of_memory_in_multi_scale_is_about_the_largest_size(data, tmp_path, memory):
    tried = memory(3)
    with pytest.raises(DeviceError, match="A batch of 6 images of up to 96x96") as caught:
        train(small_request(data, tmp_path / "run", batch=6, multi_scale=True), watch=Notes())
    assert caught.value.fix == "--batch 3" and tried[1:] == [(3, 96, 1)]


@pytest.mark.parametrize(("batch", "words"), [(4, ", and neither does one image (CUDA"), (1, "cpu (CUDA")])
def test_no_room_for_one_image_asks_for_smaller_ones(data, tmp_path, memory, batch, words):
    memory(0)
    with pytest.raises(DeviceError) as caught:
        train(small_request(data, tmp_path / "run", batch=batch, img=128), watch=Notes())
    assert words in caught.value.message
    assert caught.value.fix == "A smaller size or variant:  --img 64"


def test_the_same_command_may_be_typed_again_with_the_batch_that_fits(data, tmp_path, memory):
    memory(2)
    with pytest.raises(DeviceError):
        train(small_request(data, tmp_path / "run", batch=4), watch=Notes())
    assert train(small_request(data, tmp_path / "run", batch=2), watch=Notes()).epochs == 1


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
def test_libraries_say_in_many_ways_that_memory_is_short(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


_LIMITED = """
import re, resource, sys
from yolov7_deploy.cli.app import main
from yolov7_deploy.train.trainer import Learner

learn = Learner.learn

def limited(*given, **named):
    held = int(re.search(r"VmSize:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (held + {mib} * 2**20,) * 2)
    return learn(*given, **named)

Learner.learn = limited
sys.argv[0] = "y7"
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_limit_of_the_system_is_out_of_memory(data, tmp_path):
    large = arguments(data, tmp_path / "run", "--batch", "16", "--img", "320")
    code, _, err = finished(started(["-c", _LIMITED.format(mib=ADDRESS_SPACE_MIB), *large]))
    assert code == 1 and "Traceback" not in err, err
    assert "DeviceError: A batch of 16 images of 320x320 does not fit into the memory of cpu" in err
    assert err.splitlines()[-1].startswith(("--batch ", "A smaller size or variant:"))


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def largest_file():
    """Sets how large a file may be; as for a full disk, writing more is an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda mb: resource.setrlimit(resource.RLIMIT_FSIZE, (int(mb * 10**6), before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_state_that_finds_no_room_ends_the_training_after_its_first_step(data, tmp_path, largest_file):
    folder, notes = tmp_path / "run", Notes()
    largest_file(50)
    with pytest.raises(CheckpointError, match=r"state\.safetensors cannot be written") as caught:
        train(small_request(data, folder), watch=notes)
    assert notes.steps == [(1, 1)] and not (folder / "state.safetensors").exists()
    assert f"y7 train --resume --save-dir {folder}" in caught.value.fix
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(("room_mb", "name"), [(50, "state.safetensors"), (10, "last.safetensors")])
def test_what_finds_no_room_leaves_the_older_files_and_the_training_goes_on(
    data, whole, tmp_path, largest_file, room_mb, name
):
    folder = tmp_path / "run"
    shown = Notes({(2, 3): lambda: largest_file(room_mb)})
    with pytest.raises((CheckpointError, TrainingError), match=f"{name} cannot be written"):
        train(small_request(data, folder, epochs=2), watch=shown)
    largest_file(10**6)
    assert load_run_state(folder / "state.safetensors")[0].epoch == 1
    assert not list(folder.glob(".*"))
    resume(folder, watch=Notes())
    assert losses(folder) == losses(whole)
    assert_same_weights(folder, whole)


# --- images ---------------------------------------------------------------------------------------------------------


def test_corrupt_images_are_named_once_and_training_goes_on(data, tmp_path):
    shutil.copytree(data.parent, tmp_path / "shapes")
    broken = [sorted((tmp_path / "shapes/images" / split).iterdir())[0] for split in ("train", "val")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-500])
    notes = Notes()
    report = train(small_request(tmp_path / "shapes" / data.name, tmp_path / "run", epochs=2), watch=notes)
    assert report.epochs == 2 and report.accuracy.images == 2
    assert len(report.unreadable) == 2
    for path in broken:
        assert sum(words.startswith(f"left out: {path} ") for words in notes.words) == 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_of_which_none_can_be_read_are_refused_at_once(data, tmp_path, split):
    shutil.copytree(data.parent, tmp_path / "shapes")
    for path in (tmp_path / "shapes/images" / split).iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"None of the \d images of .*shapes\.yaml can be read"):
        train(small_request(tmp_path / "shapes" / data.name, tmp_path / "run"), watch=Notes())


def test_a_dataset_without_boxes_is_refused(data, tmp_path):
    shutil.copytree(data.parent, tmp_path / "shapes")
    for path in (tmp_path / "shapes/labels/train").iterdir():
        path.write_text("")
    with pytest.raises(DatasetError, match="box"):
        train(small_request(tmp_path / "shapes" / data.name, tmp_path / "run"), watch=Notes())
    assert not (tmp_path / "run").exists()


def test_an_error_that_is_nobodys_fault_is_not_called_memory(data, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(TrainStep, "losses", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(small_request(data, tmp_path / "run", hyp=HYP), watch=Notes())
