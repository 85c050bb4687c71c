"""Everything a training needs to go on as if it had never stopped, in one file: safetensors and JSON, no pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from yolov7_deploy._atomic_file import whole_file
from yolov7_deploy._serialization import from_plain
from yolov7_deploy.errors import CheckpointError, LoadError
from yolov7_deploy.training.config import TrainRequest

_KEY = "yolov7_training"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """Losses of an epoch so far, added up over its steps."""

    box: float = 0.0
    objectness: float = 0.0
    classes: float = 0.0
    positives: float = 0.0
    steps: int = 0

    def plus(self, box: float, objectness: float, classes: float, positives: float) -> Sums:
        """With one step more."""
        return Sums(
            box=self.box + box,
            objectness=self.objectness + objectness,
            classes=self.classes + classes,
            positives=self.positives + positives,
            steps=self.steps + 1,
        )

    def mean(self) -> Sums:
        """Per step."""
        n = max(1, self.steps)
        return Sums(
            box=self.box / n,
            objectness=self.objectness / n,
            classes=self.classes / n,
            positives=self.positives / n,
            steps=self.steps,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """Where a training is.

    Attributes:
        request: What was asked for; going on needs nothing else.
        data_sha256: Of all images' names and labels.
        class_names: What it learns to find.
        anchors: Per level three (width, height) in input pixels.
        world: Processes.
        epoch: Complete epochs.
        step: Steps of the epoch under way.
        sums: Losses of that epoch.
        updates: Of the moving average.
        scale: Of the loss in mixed precision, and the steps since it last grew.
        best: Best fitness so far, -1 before the first.
        best_epoch: When that was.
        class_aps: AP of each class at the last validation, where images are chosen by it.
        seconds: Spent so far.
    """

    request: TrainRequest
    data_sha256: str
    class_names: tuple[str, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    world: int
    epoch: int = 0
    step: int = 0
    sums: Sums = Sums()
    updates: int = 0
    scale: tuple[float, float] = (0.0, 0.0)
    best: float = -1.0
    best_epoch: int = 0
    class_aps: tuple[float, ...] = ()
    seconds: float = 0.0


def save_run_state(path: Path, state: RunState, tensors: dict[str, Tensor]) -> None:
    """Writes both; the file appears complete or not at all, and an older one stays until then.

    Raises:
        CheckpointError: It cannot be written.
    """
    text = json.dumps({"schema": SCHEMA, **asdict(state)}, sort_keys=True)
    try:
        with whole_file(path) as unfinished:
            safetensors.torch.save_file(tensors, unfinished, {_KEY: text})
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written ({str(error)[:200]}). The older one is as it was.",
            fix="Make room on that disk, then go on:  y7 train --resume --save-dir " + str(path.parent),
        ) from error


def load_run_state(path: Path) -> tuple[RunState, dict[str, Tensor]]:
    """What `save_run_state` wrote.

    Raises:
        LoadError: There is none, or it is damaged.
    """
    if not path.is_file():
        raise LoadError(
            f"{path} does not exist: there is no training to go on with.",
            fix="Name its folder:  y7 train --resume --save-dir runs/train/exp",
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        raw = json.loads(metadata[_KEY])
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise ValueError("it is of another version")
        return from_plain(RunState, raw), tensors
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(
            f"{path} is no training state of this version, or damaged ({str(error)[:200]!a}).",
            fix="Begin anew from its weights:  y7 train --weights " + str(path.parent / "last.safetensors"),
        ) from error
