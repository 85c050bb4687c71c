"""The images of an epoch: their order, their batches, and the part of each process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from yolov7_deploy.datasets.samples import DoubleArray, IntArray
from yolov7_deploy.errors import UsageError


def compute_image_weights(class_ids: Sequence[IntArray], aps: DoubleArray) -> DoubleArray | None:
    """Return sampling weights of images, float64 [N], sum 1, so that rare classes with low AP are sampled more often.

    The weight of an image is the sum over its boxes of w_c (1 - AP_c)^2 / C, with w_c ~ 1 / number of boxes of class c.

    Args:
        class_ids: Classes of the boxes of each image.
        aps: AP of each class, [C].

    Returns:
        `None` if there is no box.
    """
    classes = len(aps)
    counts = np.stack([np.bincount(ids, minlength=classes) for ids in class_ids])
    rarity = 1 / np.maximum(counts.sum(0), 1)
    class_weights = rarity / rarity.sum() * classes * (1 - aps) ** 2 / classes
    weights: DoubleArray = counts @ class_weights
    total = float(weights.sum())
    return weights / total if total > 0 else None


_ORDER = 1  # separates the random numbers of an epoch's order from those of its samples


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRequest:
    """A request for one batch.

    Attributes:
        epoch: Number of the epoch.
        positions: Positions of the samples in the epoch; seed, epoch and position determine all choices in a sample.
        indices: The first image of each sample.
        hw: Height and width of the samples.
        mosaic: Allow mosaics.
    """

    epoch: int
    positions: tuple[int, ...]
    indices: tuple[int, ...]
    hw: tuple[int, int]
    mosaic: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShard:
    """The part of a step's images that one process takes; all parts together are the batch of a single process.

    Attributes:
        batch: Images per step and process.
        rank: Number of this process.
        world_size: Number of processes.
    """

    batch: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"A batch of {self.batch} for process {self.rank} of {self.world_size} is not possible.",
                fix="For example:  --batch 16",
            )

    @property
    def total_batch(self) -> int:
        """Images per step of all processes."""
        return self.batch * self.world_size

    def positions(self, step: int) -> range:
        """Return the positions in the epoch that this process takes in a step."""
        start = step * self.total_batch + self.rank * self.batch
        return range(start, start + self.batch)


def epoch_order(count: int, *, seed: int, epoch: int, weights: DoubleArray | None = None) -> IntArray:
    """Return the images of an epoch, int64 [count]: a permutation, or a sample with replacement if there are weights.

    Raises:
        UsageError: There is not one non-negative weight per image, or all are 0.
    """
    rng = np.random.default_rng((seed, epoch, 0, _ORDER))
    if weights is None:
        return rng.permutation(count)
    total = float(weights.sum())
    if weights.shape != (count,) or not 0 < total < np.inf or weights.min() < 0:
        raise UsageError(f"{len(weights)} weights for {count} images.", fix="Give one number, 0 or larger, per image.")
    return rng.choice(count, size=count, p=weights / total)


def square_requests(order: IntArray, shard: BatchShard, *, epoch: int, size: int, start: int) -> Iterator[BatchRequest]:
    """Yield the square batches of an epoch from step `start`; the first images are repeated to fill the last batch."""
    for step in range(start, -(-len(order) // shard.total_batch)):
        positions = shard.positions(step)
        indices = order[np.array(positions) % len(order)].tolist()
        yield BatchRequest(
            epoch=epoch, positions=tuple(positions), indices=tuple(indices), hw=(size, size), mosaic=True
        )


def rect_requests(
    image_hw: IntArray, shard: BatchShard, *, seed: int, epoch: int, size: int, stride: int, start: int
) -> Iterator[BatchRequest]:
    """Yield batches of images with similar aspect ratios, as small as possible; only the batch order is random.

    An incomplete batch is filled with images of the batch before it.

    Args:
        image_hw: int64 [N, 2], height and width of each image.
        shard: The part of this process; all processes have the same batch shape in a step.
        seed: Random seed of the order.
        epoch: Number of the epoch, which also determines the order.
        size: The longer side.
        stride: Height and width are multiples of this.
        start: The first step.
    """
    aspect_ratios = image_hw[:, 0] / image_hw[:, 1]
    order = np.argsort(aspect_ratios, kind="stable")
    steps = -(-len(order) // shard.total_batch)
    groups = np.random.default_rng((seed, epoch, 0, _ORDER)).permutation(steps)
    for step in range(start, steps):
        first = min(int(groups[step]) * shard.total_batch, max(0, len(order) - shard.total_batch))
        group = order[(first + np.arange(shard.total_batch)) % len(order)]
        chosen = slice(shard.rank * shard.batch, (shard.rank + 1) * shard.batch)
        yield BatchRequest(
            epoch=epoch,
            positions=tuple(shard.positions(step)),
            indices=tuple(group[chosen].tolist()),
            hw=rect_hw(aspect_ratios[group], size=size, stride=stride),
            mosaic=False,
        )


ROUNDING = 1e-9  # of a quotient, so that a side that is a multiple of the stride is not rounded up


def rect_hw(aspect_ratios: DoubleArray, *, size: int, stride: int) -> tuple[int, int]:
    """Return height and width of a batch of images with these ratios height / width, as in the official program."""
    low, high = float(aspect_ratios.min()), float(aspect_ratios.max())
    height, width = (high, 1.0) if high < 1 else (1.0, 1 / low) if low > 1 else (1.0, 1.0)
    tall, wide = (int(np.ceil(side * size / stride - ROUNDING)) * stride for side in (height, width))
    return tall, wide
