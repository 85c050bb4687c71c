"""The largest batch that fits, for the error message after a training step has run out of memory."""

from __future__ import annotations

import contextlib
import gc
import traceback

import torch

from yolov7_deploy.errors import DeviceError, is_out_of_memory
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.training.train_step import TrainStep, multi_scale_sizes


def batch_size_error(train_step: TrainStep, batch: Batch, error: BaseException) -> DeviceError:
    """Return an error that names the batch size that fits, found by halving the one that did not.

    With several processes only this one may be out of memory, and the others do not take part in trials: the error
    then names half the batch without trying it.

    Args:
        train_step: Its gradients are dropped.
        batch: The batch that did not fit.
        error: The exception. Its frames, which hold the activations of the step, are cleared.
    """
    world_size, images = train_step.distributed.world_size, batch.images.shape[0]
    fitting = images // 2
    traceback.clear_frames(error.__traceback__)
    while world_size == 1 and fitting and not _fits(train_step, batch, fitting):
        fitting //= 2
    what = f"A batch of {images * world_size} images of {_size_text(train_step, batch)}"
    if world_size > 1:
        what += f", split over {world_size} processes,"
    what += f" does not fit into the memory of {train_step.distributed.device}"
    reason = str(error).partition("\n")[0][:200]
    if not fitting:
        smaller = max(train_step.stride, train_step.options.img // 2 // train_step.stride * train_step.stride)
        neither = ", and neither does a batch of 1" if images > 1 else ""
        return DeviceError(f"{what}{neither} ({reason}).", fix=f"A smaller size or variant:  --img {smaller}")
    tried = f"; a batch of {fitting} fits" if world_size == 1 else ""
    return DeviceError(
        f"{what} ({reason}){tried}. Gradient accumulation keeps the nominal batch.",
        fix=f"--batch {fitting * world_size}",
    )


def _largest_size(train_step: TrainStep) -> int | None:
    """Return the largest image size of multi-scale training; `None` for a fixed size."""
    options = train_step.options
    return multi_scale_sizes(options.img, train_step.stride)[-1] if options.multi_scale else None


def _size_text(train_step: TrainStep, batch: Batch) -> str:
    largest = _largest_size(train_step)
    return f"up to {largest}x{largest}" if largest else f"{batch.images.shape[1]}x{batch.images.shape[2]}"


def _fits(train_step: TrainStep, batch: Batch, images: int) -> bool:
    """Return whether forward and backward of the first images of a batch succeed; weights do not change."""
    targets = batch.targets[batch.targets[:, 0] < images]
    part = Batch(images=batch.images[:images], targets=targets, paths=batch.paths[:images])
    _free_memory(train_step)
    size = _largest_size(train_step)
    try:
        train_step.compute_loss(part, image_size=size).total.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    finally:
        _free_memory(train_step)
    return True


def _free_memory(train_step: TrainStep) -> None:
    train_step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if train_step.distributed.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
