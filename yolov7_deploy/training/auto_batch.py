"""Out of memory: which batch would fit."""

from __future__ import annotations

import contextlib
import gc
import traceback

import torch

from yolov7_deploy.errors import DeviceError
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.training.train_step import TrainStep, training_sizes

# The last is what the convolutions of torch on a processor say.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """The error says that memory is not enough, on a GPU or on the host."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
    )


def batch_that_fits(learner: TrainStep, batch: Batch, error: BaseException) -> DeviceError:
    """An error that says which batch fits, found by trying halves of the one that did not.

    Of several processes only this one may be short of memory, and the others do not take part in trials: then half the
    batch is named untried.

    Args:
        learner: Its gradients are dropped.
        batch: What did not fit.
        error: What was raised; its frames, which hold the activations of the step, are cleared.
    """
    world, images = learner.world, batch.images.shape[0]
    fitting = images // 2
    traceback.clear_frames(error.__traceback__)
    while world.size == 1 and fitting and not _fits(learner, batch, fitting):
        fitting //= 2
    what = f"A batch of {images * world.size} images of {_size(learner, batch)}"
    if world.size > 1:
        what += f", shared by {world.size} processes,"
    reason = str(error).partition("\n")[0][:200]
    if not fitting:
        smaller = max(learner.stride, learner.options.img // 2 // learner.stride * learner.stride)
        neither = ", and neither does one image" if images > 1 else ""
        return DeviceError(
            f"{what} does not fit into the memory of {world.device}{neither} ({reason}).",
            fix=f"A smaller size or variant:  --img {smaller}",
        )
    tried = "" if world.size > 1 else "; one does" if fitting == 1 else f"; {fitting} do"
    return DeviceError(
        f"{what} does not fit into the memory of {world.device} ({reason}){tried}. "
        "Gradients are added up to the same nominal batch all the same.",
        fix=f"--batch {fitting * world.size}",
    )


def _largest(learner: TrainStep) -> int | None:
    """The largest size that a step may have in multi-scale training."""
    return training_sizes(learner.options.img, learner.stride)[-1] if learner.options.multi_scale else None


def _size(learner: TrainStep, batch: Batch) -> str:
    largest = _largest(learner)
    return f"up to {largest}x{largest}" if largest else f"{batch.images.shape[2]}x{batch.images.shape[1]}"


def _fits(learner: TrainStep, batch: Batch, images: int) -> bool:
    """Whether forward and backward of the first images of a batch succeed; weights stay as they are."""
    targets = batch.targets[batch.targets[:, 0] < images]
    part = Batch(images=batch.images[:images], targets=targets, paths=batch.paths[:images])
    _free(learner)
    try:
        learner.losses(part, size=_largest(learner)).total.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    finally:
        _free(learner)
    return True


def _free(learner: TrainStep) -> None:
    learner.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if learner.world.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
