"""Whether anchors fit the boxes of a dataset, and new ones that do."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np

from yolov7_deploy.datasets import Dataset
from yolov7_deploy.datasets.samples import DoubleArray
from yolov7_deploy.datasets.statistics import label_sizes
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.image import FloatArray
from yolov7_deploy.model.configs import Anchors

PER_LEVEL = 3
# The numbers of the official search.
MIN_SIDE_PX = 2.0  # of boxes that are searched for, and of anchors
JITTER = 0.1  # sizes are searched for this much smaller or larger
RESTARTS = 30
GENERATIONS = 1000
CHANGED, CHANGE, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.1, 0.3, 3.0
MAX_ROUNDS = 100  # of one k-means, which ends long before
MAX_LABELS = 30_000  # random ones where there are more: recall is then known to 0.1 %

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorFit:
    """How anchors and boxes go together: they match where neither side differs by more than the factor `anchor_t`.

    Attributes:
        anchors: Width and height in pixels, per level.
        labels: Number of boxes looked at.
        best_possible_recall: Fraction of the boxes that match an anchor; no training can find the others.
        anchors_per_label: Mean number of anchors that a box matches.
        anchor_t: Largest factor between the sides of a match.
        size: Longer side of the images that boxes are measured in.
    """

    anchors: Anchors
    labels: int
    best_possible_recall: float
    anchors_per_label: float
    anchor_t: float
    size: int

    def words(self) -> str:
        """The fit for people, one line."""
        levels = "  ".join(" ".join(f"{width:g},{height:g}" for width, height in level) for level in self.anchors)
        return (
            f"anchors {levels}: {self.best_possible_recall:.2%} of {self.labels} boxes can be found at {self.size}, "
            f"each by {self.anchors_per_label:.2f} anchors"
        )


def anchor_fit(dataset: Dataset, anchors: Anchors, *, size: int, anchor_t: float) -> AnchorFit:
    """How many boxes of a dataset these anchors reach; all boxes are looked at, without any jitter.

    Raises:
        DatasetError: There is no box.
    """
    sizes, _ = label_sizes(dataset, size=size)
    if not len(sizes):
        raise DatasetError(f"{dataset.source} has no box to fit anchors to.", fix="Check its labels.")
    flat = np.array([anchor for level in anchors for anchor in level], dtype=np.float64)
    nearness = anchor_nearness(sizes, flat)
    matches = nearness > 1 / anchor_t
    return AnchorFit(
        anchors=anchors,
        labels=len(sizes),
        best_possible_recall=float(matches.any(axis=0).mean()),
        anchors_per_label=float(matches.sum(axis=0).mean()),
        anchor_t=anchor_t,
        size=size,
    )


def fitted_anchors(dataset: Dataset, *, levels: int, size: int, anchor_t: float, seed: int) -> Anchors:
    """Three anchors for each level that fit a dataset, smallest first; the same for the same seed.

    K-means over the sizes (each divided by its deviation, best of 30 starts), then 1000 random changes, of which those
    are kept that raise the mean of each box's nearness to its best anchor, where it matches.

    Raises:
        DatasetError: There are fewer boxes than anchors.
    """
    assert levels > 0
    start, rng = time.perf_counter(), np.random.default_rng(seed)
    sizes, _ = label_sizes(dataset, size=size)
    sizes = sizes[np.any(sizes >= MIN_SIDE_PX, axis=1)]
    if len(sizes) < PER_LEVEL * levels:
        raise DatasetError(
            f"{dataset.source} has {len(sizes)} boxes of at least {MIN_SIDE_PX:g} pixels at {size}, too few for "
            f"{PER_LEVEL * levels} anchors.",
            fix="Train with the anchors of the variant, without --autoanchor.",
        )
    sizes = rng.permutation(sizes)[:MAX_LABELS]
    sizes = np.maximum(sizes * rng.uniform(1 - JITTER, 1 + JITTER, (len(sizes), 1)), 1e-9)
    anchors = improved_anchors(sizes, size_means(sizes, PER_LEVEL * levels, rng=rng), anchor_t=anchor_t, rng=rng)
    anchors = anchors[np.argsort(anchors.prod(axis=1), kind="stable")].round(2)
    logger.info("%d anchors from %d boxes in %.1f s", len(anchors), len(sizes), time.perf_counter() - start)
    pairs = [(float(width), float(height)) for width, height in anchors]
    return tuple(tuple(pairs[i : i + PER_LEVEL]) for i in range(0, len(pairs), PER_LEVEL))


def anchor_nearness(sizes: DoubleArray, anchors: DoubleArray) -> DoubleArray:
    """The smallest of w / aw, aw / w, h / ah and ah / h of each box [N, 2] and anchor [A, 2].

    Returns:
        float64 [A, N], 1 where both are the same, 0 for a box without a width or height.
    """
    nearness = np.empty((len(anchors), len(sizes)), dtype=np.float64)
    for row, anchor in zip(nearness, anchors, strict=True):  # all at once would take gigabytes
        ratios = sizes / anchor
        np.minimum(ratios.min(axis=1), 1 / np.maximum(ratios.max(axis=1), np.finfo(np.float64).tiny), out=row)
    return nearness


def size_means(sizes: DoubleArray, count: int, *, rng: np.random.Generator) -> DoubleArray:
    """K-means of sizes [N, 2]: the means [count, 2] with the smallest sum of distances of `RESTARTS` random starts."""
    deviations = sizes.std(axis=0)
    deviations[deviations == 0] = 1
    points = (sizes / deviations).astype(np.float32)
    best, smallest = points[:count], float("inf")
    for _ in range(RESTARTS):
        means, distance = _one_k_means(points, points[rng.choice(len(points), count, replace=False)])
        if distance < smallest:
            best, smallest = means, distance
    means_px: DoubleArray = best.astype(np.float64) * deviations
    return means_px


def improved_anchors(
    sizes: DoubleArray, anchors: DoubleArray, *, anchor_t: float, rng: np.random.Generator
) -> DoubleArray:
    """Anchors [A, 2] after `GENERATIONS` random changes, of which each was kept that made `anchor_fitness` larger."""
    log_sizes = np.log(sizes.T).astype(np.float32)
    anchors = np.maximum(anchors, MIN_SIDE_PX)
    fitness = anchor_fitness(log_sizes, anchors, anchor_t=anchor_t)
    for _ in range(GENERATIONS):
        changes = (rng.random(anchors.shape) < CHANGED) * rng.standard_normal(anchors.shape) * CHANGE
        changed = np.maximum(anchors * np.clip(1 + changes, SMALLEST_FACTOR, LARGEST_FACTOR), MIN_SIDE_PX)
        found = anchor_fitness(log_sizes, changed, anchor_t=anchor_t)
        if found > fitness:
            anchors, fitness = changed, found
    return anchors


def anchor_fitness(log_sizes: FloatArray, anchors: DoubleArray, *, anchor_t: float) -> float:
    """The mean nearness of each box to its best anchor, 0 where it matches none; the boxes as logarithms, [2, N].

    Of logarithms a nearness is exp(-max(|ln w - ln aw|, |ln h - ln ah|)): a single exponential for all anchors.
    """
    log_anchors = np.log(anchors).astype(np.float32)
    widths, heights = (np.abs(log_sizes[i] - log_anchors[:, i, None]) for i in range(2))
    nearest = np.maximum(widths, heights, out=widths).min(axis=0)
    return float(np.where(nearest < np.log(anchor_t), np.exp(-nearest), 0).mean())


def _one_k_means(points: FloatArray, means: FloatArray) -> tuple[FloatArray, float]:
    """Means that their own points no longer move, and the mean distance to them; a mean without points stays."""
    owner = np.full(len(points), -1)
    for _ in range(MAX_ROUNDS):
        squares = np.square(points[None, :, 0] - means[:, None, 0]) + np.square(points[None, :, 1] - means[:, None, 1])
        nearest = squares.argmin(axis=0)
        if np.array_equal(nearest, owner):
            break
        owner = nearest
        counts = np.bincount(owner, minlength=len(means))
        sums = np.stack([np.bincount(owner, weights=points[:, i], minlength=len(means)) for i in range(2)], axis=1)
        means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], means).astype(np.float32)
    return means, float(np.sqrt(squares.min(axis=0)).mean())
