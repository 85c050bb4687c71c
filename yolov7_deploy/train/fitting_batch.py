"""Out of memory: which batch would fit."""

from __future__ import annotations

import contextlib
import gc

import torch

from yolov7_deploy.errors import DeviceError
from yolov7_deploy.train.learner import Learner
from yolov7_deploy.train.scene import Batch

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """The error says that memory is not enough, on a GPU or on the host."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
    )


def batch_that_fits(learner: Learner, batch: Batch, error: BaseException) -> DeviceError:
    """An error that says which batch fits, found by trying halves of the one that did not."""
    world, pictures = learner.world, batch.images.shape[0]
    fitting = pictures // 2
    while fitting and not _fits(learner, batch, fitting):
        fitting //= 2
    what = f"A batch of {pictures * world.size} pictures of {batch.images.shape[1]}x{batch.images.shape[2]}"
    on = f" on {world.size} devices" if world.size > 1 else ""
    reason = str(error).partition("\n")[0][:200]
    if not fitting:
        return DeviceError(
            f"{what} does not fit into the memory of {world.device}{on}, and neither does one picture ({reason}).",
            fix=f"A smaller size or variant:  --img {max(learner.stride, learner.options.img // 2)}",
        )
    return DeviceError(
        f"{what} does not fit into the memory of {world.device}{on} ({reason}); {fitting * world.size} do. "
        "Gradients are added up to the same nominal batch all the same.",
        fix=f"--batch {fitting * world.size}",
    )


def _fits(learner: Learner, batch: Batch, pictures: int) -> bool:
    """Whether forward and backward of the first pictures of a batch succeed; weights stay as they are."""
    targets = batch.targets[batch.targets[:, 0] < pictures]
    part = Batch(images=batch.images[:pictures], targets=targets, paths=batch.paths[:pictures])
    _free(learner)
    try:
        if learner.world.size > 1:
            return False  # the other processes do not take part in a trial
        learner.losses(part, epoch=0, in_epoch=0).total.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        _free(learner)
    return True


def _free(learner: Learner) -> None:
    learner.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if learner.world.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
