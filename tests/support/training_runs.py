"""Small trainings: generated images, requests of the smallest size, a watch that remembers and acts, processes."""

from __future__ import annotations

import os
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
from yolov7_deploy.training.config import TrainRequest
from yolov7_deploy.training.hyperparameters import PRESETS
from yolov7_deploy.training.loggers import RESULTS_NAME, read_results

SIZE = 64
TRAIN, VAL = 6, 3
BATCH, NOMINAL = 2, 6  # gradients of three steps make an update; trainings of less than ten steps have no warm-up
STEPS = TRAIN // BATCH
LOSSES = ("box", "obj", "cls", "total", "positives")
WAIT_S = 240.0  # for a process that takes some seconds on a quiet machine
HYP = PRESETS["p5"]
OPTIONS = {field.name for field in fields(TrainOptions)}


def small_shapes(folder: Path) -> Path:
    """The YAML of six images to train on and three to validate; written once."""
    return write_shapes(folder / "shapes", train=TRAIN, val=VAL, size=SIZE, seed=1)


def small_request(data: Path, folder: Path, **changes) -> TrainRequest:
    """A training of some seconds; `changes` are of the request, of its options or `hyp`."""
    options = TrainOptions(epochs=1, batch=BATCH, nominal_batch=NOMINAL, img=SIZE, workers=0, cache_gib=0.0)
    options = replace(options, **{name: value for name, value in changes.items() if name in OPTIONS})
    others = {name: value for name, value in changes.items() if name not in OPTIONS}
    plain = {"variant": "yolov7-tiny", "device": "cpu", "tensorboard": False, "hyp": HYP}
    return TrainRequest(data=str(data), folder=str(folder), options=options, **{**plain, **others})


class Notes:
    """A watch that remembers everything, and calls `at[epoch, step]` (both from 1) when that step is done."""

    def __init__(self, at=None) -> None:
        self.words, self.records, self.steps = [], [], []
        self._at = at or {}

    def say(self, words):
        self.words.append(words)

    @contextmanager
    def epoch(self, epoch, epochs):
        def show(done, total, note):
            self.steps.append((epoch + 1, done))
            self._at.get((epoch + 1, done), lambda: None)()

        yield show

    @contextmanager
    def counting(self, what):
        yield lambda done, total: None

    def epoch_done(self, record):
        self.records.append(record)

    @property
    def said(self) -> str:
        return "\n".join(self.words)


def weights(folder: Path, name: str = "last.safetensors") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / name)


def losses(folder: Path) -> list[tuple[float, ...]]:
    """What each line of the table says of its epoch but time and memory."""
    return [tuple(getattr(record, name) for name in LOSSES) for record in read_results(folder / RESULTS_NAME)]


def assert_same_weights(folder: Path, other: Path, *, name: str = "last.safetensors") -> None:
    """Bit for bit."""
    ours, theirs = weights(folder, name), weights(other, name)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@contextmanager
def one_thread():
    """Sums in one order, that of the processes below; and two threads would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def leave_out_charts(monkeypatch) -> None:
    """A second less for each training that is not about its images."""
    for name in ("draw_labels", "draw_results", "draw_precision_recall"):
        monkeypatch.setattr(training, name, lambda *_: None)


def arguments(data: Path, folder: Path, *more: str) -> list[str]:
    """`small_request` as it is typed."""
    small = f"--batch {BATCH} --nominal-batch {NOMINAL} --img {SIZE} --workers 0 --cache 0 --no-tensorboard"
    named = ["--data", str(data), "--save-dir", str(folder), "--variant", "yolov7-tiny", "--device", "cpu"]
    return ["train", *named, *small.split(), "--hyp", "p5", *more]


def started(command: list[str], *, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process of one thread, with pipes for what it says."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})},
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error, when it has ended."""
    try:
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    return process.returncode, out, err


def y7(*command: str) -> tuple[int, str, str]:
    """The command, run to its end."""
    return finished(started(["-m", "yolov7_deploy", *command]))
