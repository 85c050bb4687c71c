"""The weights that a training writes, and the rule that none of them hold what is no number."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from yolov7_deploy._atomic_file import remove_unfinished, whole_file
from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.checkpoint.loader import save_checkpoint
from yolov7_deploy.errors import TrainingError
from yolov7_deploy.training.resume_state import RunState, save_run_state

LAST, BEST, STATE = "last.safetensors", "best.safetensors", "state.safetensors"


def keep_last(folder: Path, state: RunState, average: Mapping[str, Tensor]) -> None:
    """Writes the moving average as weights that every command opens.

    Raises:
        TrainingError: They hold values that are no numbers.
        CheckpointError: They cannot be written.
    """
    tensors = {name: tensor.cpu() for name, tensor in average.items()}
    _refuse_broken(folder, state, tensors)
    checkpoint = Checkpoint(
        tensors=tensors,
        variant=state.request.variant,
        training=True,
        class_names=state.class_names,
        anchors=state.anchors,
        source=LAST,
    )
    save_checkpoint(checkpoint, folder / LAST)


def keep_best(folder: Path) -> None:
    """Makes the last weights the best ones, too.

    Raises:
        TrainingError: They cannot be written.
    """
    target = folder / BEST
    try:
        with whole_file(target) as unfinished:
            shutil.copyfile(folder / LAST, unfinished)
    except OSError as error:
        raise TrainingError(f"{target} cannot be written ({error.strerror}).", fix="Make room on that disk.") from error


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed training was just writing; it must not run any more."""
    for name in (LAST, BEST, STATE):
        remove_unfinished(folder / name)


def keep_state(folder: Path, state: RunState, tensors: dict[str, Tensor]) -> None:
    """Writes what is needed to go on.

    Raises:
        TrainingError: The weights hold values that are no numbers.
        CheckpointError: It cannot be written.
    """
    # Pending gradients may overflow in mixed precision: the update is then left out.
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("gradient.")}
    _refuse_broken(folder, state, kept)
    save_run_state(folder / STATE, state, tensors)


def _refuse_broken(folder: Path, state: RunState, tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        kept = f"{folder / STATE} has the last good ones." if (folder / STATE).exists() else "None were kept before."
        raise TrainingError(
            f"The weights hold values that are no numbers in epoch {state.epoch + 1}, after step {state.step} "
            f"(first in {broken[0]}). {kept}",
            fix="Try a lower rate (--set lr0=0.001) or --no-half.",
        )
