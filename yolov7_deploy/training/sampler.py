"""Which images an epoch shows, in which order, and to which process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from yolov7_deploy.datasets.samples import DoubleArray, IntArray
from yolov7_deploy.errors import UsageError


def image_weights(class_ids: Sequence[IntArray], aps: DoubleArray) -> DoubleArray | None:
    """A weight per image, adding up to 1: the sum over its boxes of w_c (1 - AP_c)^2 / C, with w_c ~ 1 / boxes of c.

    `None` where no image has a box.

    Args:
        class_ids: Of the boxes of each image.
        aps: AP of each class, [C].
    """
    classes = len(aps)
    counts = np.stack([np.bincount(ids, minlength=classes) for ids in class_ids])
    rarity = 1 / np.maximum(counts.sum(0), 1)
    of_class = rarity / rarity.sum() * classes * (1 - aps) ** 2 / classes
    weights: DoubleArray = counts @ of_class
    total = float(weights.sum())
    return weights / total if total > 0 else None


_ORDER = 1  # tells the generator of an epoch's order from those of its scenes


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One batch to make.

    Attributes:
        epoch: Of the run.
        positions: Of its scenes in the epoch; with seed and epoch each decides every choice in its scene.
        indices: The first image of each scene.
        hw: Height and width of the scenes.
        mosaic: Whether they may be mosaics.
    """

    epoch: int
    positions: tuple[int, ...]
    indices: tuple[int, ...]
    hw: tuple[int, int]
    mosaic: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one of `world` processes takes of a step; together they see what one with all their images sees."""

    batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 <= self.rank < self.world:
            raise UsageError(
                f"A batch of {self.batch} for process {self.rank} of {self.world} cannot be made.",
                fix="For example: --batch 16",
            )

    @property
    def whole(self) -> int:
        """The images of a step, of all processes."""
        return self.batch * self.world

    def of(self, step: int) -> range:
        """The positions that this process takes."""
        start = step * self.whole + self.rank * self.batch
        return range(start, start + self.batch)


def mixed_order(count: int, *, seed: int, epoch: int, weights: DoubleArray | None = None) -> IntArray:
    """The images of an epoch, int64 [count]: each once, or drawn with replacement by their weights.

    Raises:
        UsageError: The weights are not one for each image, or are not all from 0.
    """
    rng = np.random.default_rng((seed, epoch, 0, _ORDER))
    if weights is None:
        return rng.permutation(count)
    total = float(weights.sum())
    if weights.shape != (count,) or not 0 < total < np.inf or weights.min() < 0:
        raise UsageError(f"{len(weights)} weights for {count} images.", fix="Give a number from 0 for each image.")
    return rng.choice(count, size=count, p=weights / total)


def mixed_requests(order: IntArray, share: Share, *, epoch: int, size: int, start: int) -> Iterator[Request]:
    """The batches of an epoch from step `start` on; the first images come again where the last batch is not full."""
    for step in range(start, -(-len(order) // share.whole)):
        positions = share.of(step)
        indices = order[np.array(positions) % len(order)].tolist()
        yield Request(epoch=epoch, positions=tuple(positions), indices=tuple(indices), hw=(size, size), mosaic=True)


def rect_requests(
    sides: IntArray, share: Share, *, seed: int, epoch: int, size: int, stride: int, start: int
) -> Iterator[Request]:
    """Batches of images of similar shape, each as small as they allow; only the order of the batches is random.

    The last batch takes images of the one before where it would not be full.

    Args:
        sides: int64 [N, 2], height and width of each image.
        share: Of this process; all of them have one shape in a step.
        seed: Of the order.
        epoch: Of the order.
        size: The longer side.
        stride: Sides are multiples of this.
        start: The first step.
    """
    shapes = sides[:, 0] / sides[:, 1]
    order = np.argsort(shapes, kind="stable")
    steps = -(-len(order) // share.whole)
    groups = np.random.default_rng((seed, epoch, 0, _ORDER)).permutation(steps)
    for step in range(start, steps):
        first = min(int(groups[step]) * share.whole, max(0, len(order) - share.whole))
        group = order[(first + np.arange(share.whole)) % len(order)]
        chosen = slice(share.rank * share.batch, (share.rank + 1) * share.batch)
        yield Request(
            epoch=epoch,
            positions=tuple(share.of(step)),
            indices=tuple(group[chosen].tolist()),
            hw=rect_hw(shapes[group], size=size, stride=stride),
            mosaic=False,
        )


ROUNDING = 1e-9  # of a quotient: a side that is a whole number of strides stays so


def rect_hw(shapes: DoubleArray, *, size: int, stride: int) -> tuple[int, int]:
    """Height and width of a batch of images with these ratios of height to width, as in the official program."""
    low, high = float(shapes.min()), float(shapes.max())
    height, width = (high, 1.0) if high < 1 else (1.0, 1 / low) if low > 1 else (1.0, 1.0)
    tall, wide = (int(np.ceil(side * size / stride - ROUNDING)) * stride for side in (height, width))
    return tall, wide
