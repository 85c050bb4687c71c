"""Short training runs: a generated dataset, small requests, a callback that records and acts, and processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import safetensors.torch
import torch

from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.options import TrainOptions
from yolov7_deploy.training import run as training
from yolov7_deploy.training.checkpoints import TrainRequest
from yolov7_deploy.training.hyperparameters import PRESETS
from yolov7_deploy.training.loggers import RESULTS_NAME, read_results
from yolov7_deploy.training.trainer import TrainReport

IMAGE_SIZE = 64
TRAIN_IMAGES, VAL_IMAGES = 6, 3
BATCH, NOMINAL_BATCH = 2, 6  # an update every three steps; trainings of less than ten steps have no warm-up
STEPS = TRAIN_IMAGES // BATCH
LOSSES = ("box", "obj", "cls", "total", "positives")
TIMEOUT_S = 240.0  # of a process that takes some seconds on an idle machine
HYP = PRESETS["p5"]
OPTION_NAMES = {field.name for field in fields(TrainOptions)}


def small_shapes(folder: Path) -> Path:
    """Write six training images and three validation images, and return the dataset YAML."""
    return write_shapes(folder / "shapes", train=TRAIN_IMAGES, val=VAL_IMAGES, size=IMAGE_SIZE, seed=1)


def copy_dataset(data: Path, folder: Path) -> Path:
    """Copy the dataset to `folder / "shapes"`, where a test may change it, and return its YAML."""
    return shutil.copytree(data.parent, folder / "shapes") / data.name


def small_request(data: Path, folder: Path, **changes) -> TrainRequest:
    """Return a request that trains for seconds; `changes` are fields of the request or of its options."""
    options = TrainOptions(epochs=1, batch=BATCH, nominal_batch=NOMINAL_BATCH, img=IMAGE_SIZE, workers=0, cache_gib=0.0)
    options = replace(options, **{name: value for name, value in changes.items() if name in OPTION_NAMES})
    request = TrainRequest(
        data=str(data),
        folder=str(folder),
        variant="yolov7-tiny",
        device="cpu",
        tensorboard=False,
        hyp=HYP,
        options=options,
    )
    return replace(request, **{name: value for name, value in changes.items() if name not in OPTION_NAMES})


class RecordingCallback:
    """A callback that records everything, and calls `actions[epoch, step]` (both from 1) after that step."""

    def __init__(self, actions=None) -> None:
        self.messages, self.records, self.steps = [], [], []
        self._actions = actions or {}

    def on_message(self, text):
        self.messages.append(text)

    def on_epoch_end(self, record):
        self.records.append(record)

    @contextmanager
    def epoch_progress(self, epoch, epochs):
        def show(done, total, note):
            self.steps.append((epoch + 1, done))
            self._actions.get((epoch + 1, done), lambda: None)()

        yield show

    @contextmanager
    def progress(self, description):
        yield lambda done, total: None

    @property
    def text(self) -> str:
        return "\n".join(self.messages)


def train_small(data: Path, folder: Path, callback: RecordingCallback | None = None, **changes) -> TrainReport:
    """Train as `small_request` describes."""
    return training.train(small_request(data, folder, **changes), callback=callback or RecordingCallback())


def resume_run(folder: Path, callback: RecordingCallback | None = None, **options) -> TrainReport:
    """Resume a run."""
    return training.resume(folder, callback=callback or RecordingCallback(), **options)


def load_weights(folder: Path, name: str = "last.safetensors") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / name)


def read_losses(folder: Path) -> list[tuple[float, ...]]:
    """Return the losses and positives of each epoch in `results.csv`."""
    return [tuple(getattr(record, name) for name in LOSSES) for record in read_results(folder / RESULTS_NAME)]


def assert_same_weights(folder: Path, other: Path, *, name: str = "last.safetensors") -> None:
    """Assert that the weights of two runs are bit-identical."""
    ours, theirs = load_weights(folder, name), load_weights(other, name)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def assert_same_run(folder: Path, other: Path) -> None:
    """Assert that the losses and the last weights of two runs are identical."""
    assert read_losses(folder) == read_losses(other)
    assert_same_weights(folder, other)


@contextmanager
def single_thread():
    """Run torch with one thread: sums have one order, and two threads would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def disable_charts(monkeypatch) -> None:
    """Do not draw charts, which saves a second per run."""
    for name in ("draw_labels", "draw_results", "draw_evaluation"):
        monkeypatch.setattr(training, name, lambda *_: None)


def train_arguments(data: Path, folder: Path, *more: str) -> list[str]:
    """Return the command line arguments that correspond to `small_request`."""
    small = f"--batch {BATCH} --nominal-batch {NOMINAL_BATCH} --img {IMAGE_SIZE} --workers 0 --cache 0 --no-tensorboard"
    paths = ["--data", str(data), "--save-dir", str(folder), "--variant", "yolov7-tiny", "--device", "cpu"]
    return ["train", *paths, *small.split(), "--hyp", "p5", *more]


def start_process(command: list[str], *, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start Python with one thread and with pipes for its output."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})},
    )


def wait_for(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process, and return its exit code, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, out, err


def y7(*command: str) -> tuple[int, str, str]:
    """Run the command line, and return its exit code, standard output and standard error."""
    return wait_for(start_process(["-m", "yolov7_deploy", *command]))
