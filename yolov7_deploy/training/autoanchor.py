"""Check how well anchors fit the boxes of a dataset, and compute new anchors (k-means and random mutations)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from yolov7_deploy._text import get_logger
from yolov7_deploy.datasets import Dataset
from yolov7_deploy.datasets.samples import DoubleArray
from yolov7_deploy.datasets.statistics import box_sizes
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.image import FloatArray
from yolov7_deploy.model.layer_table import Anchors

PER_LEVEL = 3
# Values of the official search.
MIN_SIDE_PX = 2.0  # of an anchor, and of the longer side of a box that is used
JITTER = 0.1  # box sizes are scaled by a random factor up to this much below or above 1
RESTARTS = 30  # of k-means
GENERATIONS = 1000
MUTATION_PROBABILITY, MUTATION_SIGMA = 0.9, 0.1
MIN_MUTATION, MAX_MUTATION = 0.3, 3.0  # factors
MAX_ITERATIONS = 100  # of one k-means, which converges much earlier
MAX_BOXES = 30_000  # random sample of larger datasets; recall is then accurate to 0.1 %

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorFit:
    """Fit of anchors to boxes; they match if width and height each differ by less than the factor `anchor_t`.

    Attributes:
        anchors: Width and height in pixels, per level.
        boxes: Number of boxes.
        best_possible_recall: Fraction of the boxes that match an anchor; training cannot find the others.
        anchors_per_box: Mean number of anchors that match a box.
        image_size: Longer side of the images in which boxes are measured.
    """

    anchors: Anchors
    boxes: int
    best_possible_recall: float
    anchors_per_box: float
    image_size: int

    def summary(self) -> str:
        """Return the fit as one line of text."""
        levels = "  ".join(" ".join(f"{width:g},{height:g}" for width, height in level) for level in self.anchors)
        return (
            f"anchors {levels}: best possible recall {self.best_possible_recall:.2%} of {self.boxes} boxes "
            f"at image size {self.image_size}, {self.anchors_per_box:.2f} anchors per box"
        )


def evaluate_anchors(dataset: Dataset, anchors: Anchors, *, image_size: int, anchor_t: float) -> AnchorFit:
    """Count the boxes of a dataset that match the anchors, with all boxes and without jitter.

    Raises:
        DatasetError: The dataset does not have a box.
    """
    sizes, _ = box_sizes(dataset, image_size=image_size)
    if not len(sizes):
        raise DatasetError(f"{dataset.source} has no box to fit anchors to.", fix="Check its labels.")
    flat = np.array([anchor for level in anchors for anchor in level], dtype=np.float64)
    matches = worst_side_ratios(sizes, flat) > 1 / anchor_t
    return AnchorFit(
        anchors=anchors,
        boxes=len(sizes),
        best_possible_recall=float(matches.any(axis=0).mean()),
        anchors_per_box=float(matches.sum(axis=0).mean()),
        image_size=image_size,
    )


def fit_anchors(dataset: Dataset, *, levels: int, image_size: int, anchor_t: float, seed: int) -> Anchors:
    """Compute three anchors per level for a dataset, smallest first; deterministic for a given seed.

    K-means over box sizes (divided by their standard deviations, best of 30 starts), then 1000 random mutations. A
    mutation is kept if it raises `anchor_fitness`.

    Raises:
        DatasetError: The dataset has fewer boxes than anchors.
    """
    assert levels > 0
    start, rng = time.perf_counter(), np.random.default_rng(seed)
    sizes, _ = box_sizes(dataset, image_size=image_size)
    sizes = sizes[np.any(sizes >= MIN_SIDE_PX, axis=1)]
    if len(sizes) < PER_LEVEL * levels:
        raise DatasetError(
            f"{dataset.source} has {len(sizes)} boxes of at least {MIN_SIDE_PX:g} pixels at image size {image_size}, "
            f"too few for {PER_LEVEL * levels} anchors.",
            fix="Train with the anchors of the variant, without --autoanchor.",
        )
    sizes = rng.permutation(sizes)[:MAX_BOXES]
    sizes = np.maximum(sizes * rng.uniform(1 - JITTER, 1 + JITTER, (len(sizes), 1)), 1e-9)
    anchors = kmeans_sizes(sizes, PER_LEVEL * levels, rng=rng)
    anchors = evolve_anchors(sizes, anchors, anchor_t=anchor_t, rng=rng)
    anchors = anchors[np.argsort(anchors.prod(axis=1), kind="stable")].round(2)
    logger.info("%d anchors from %d boxes in %.1f s", len(anchors), len(sizes), time.perf_counter() - start)
    pairs = [(float(width), float(height)) for width, height in anchors]
    return tuple(tuple(pairs[i : i + PER_LEVEL]) for i in range(0, len(pairs), PER_LEVEL))


def worst_side_ratios(sizes: DoubleArray, anchors: DoubleArray) -> DoubleArray:
    """Return the smallest of w / aw, aw / w, h / ah and ah / h for each box [N, 2] and anchor [A, 2].

    Returns:
        float64 [A, N]; 1 for equal sizes, 0 for a box without width or height.
    """
    worst = np.empty((len(anchors), len(sizes)), dtype=np.float64)
    for row, anchor in zip(worst, anchors, strict=True):  # all anchors at once would take gigabytes
        ratios = sizes / anchor
        np.minimum(ratios.min(axis=1), 1 / np.maximum(ratios.max(axis=1), np.finfo(np.float64).tiny), out=row)
    return worst


def kmeans_sizes(sizes: DoubleArray, count: int, *, rng: np.random.Generator) -> DoubleArray:
    """Cluster sizes [N, 2] by k-means; returns the means [count, 2] of the best of `RESTARTS` random starts."""
    deviations = sizes.std(axis=0)
    deviations[deviations == 0] = 1
    points = (sizes / deviations).astype(np.float32)
    best, smallest = points[:count], float("inf")
    for _ in range(RESTARTS):
        means, distance = _kmeans(points, points[rng.choice(len(points), count, replace=False)])
        if distance < smallest:
            best, smallest = means, distance
    means_px: DoubleArray = best.astype(np.float64) * deviations
    return means_px


def evolve_anchors(
    sizes: DoubleArray, anchors: DoubleArray, *, anchor_t: float, rng: np.random.Generator
) -> DoubleArray:
    """Apply `GENERATIONS` random mutations to anchors [A, 2]; each is kept if it raises `anchor_fitness`."""
    log_sizes = np.log(sizes.T).astype(np.float32)
    anchors = np.maximum(anchors, MIN_SIDE_PX)
    fitness = anchor_fitness(log_sizes, anchors, anchor_t=anchor_t)
    for _ in range(GENERATIONS):
        is_mutated = rng.random(anchors.shape) < MUTATION_PROBABILITY
        changes = is_mutated * rng.standard_normal(anchors.shape) * MUTATION_SIGMA
        mutated = np.maximum(anchors * np.clip(1 + changes, MIN_MUTATION, MAX_MUTATION), MIN_SIDE_PX)
        mutated_fitness = anchor_fitness(log_sizes, mutated, anchor_t=anchor_t)
        if mutated_fitness > fitness:
            anchors, fitness = mutated, mutated_fitness
    return anchors


def anchor_fitness(log_sizes: FloatArray, anchors: DoubleArray, *, anchor_t: float) -> float:
    """Return the mean over boxes of `worst_side_ratios` for the best anchor, 0 for a box that does not match any.

    `log_sizes` are logarithms of the box sizes, float32 [2, N]. With them the worst ratio is
    exp(-max(|ln w - ln aw|, |ln h - ln ah|)), which needs a single exponential per box.
    """
    log_anchors = np.log(anchors).astype(np.float32)
    widths, heights = (np.abs(log_sizes[i] - log_anchors[:, i, None]) for i in range(2))
    nearest = np.maximum(widths, heights, out=widths).min(axis=0)
    return float(np.where(nearest < np.log(anchor_t), np.exp(-nearest), 0).mean())


def _kmeans(points: FloatArray, means: FloatArray) -> tuple[FloatArray, float]:
    """Run k-means from the given means; returns means and mean distance. An empty cluster keeps its mean."""
    owner = np.full(len(points), -1)
    for _ in range(MAX_ITERATIONS):
        squares = np.square(points[None, :, 0] - means[:, None, 0]) + np.square(points[None, :, 1] - means[:, None, 1])
        nearest = squares.argmin(axis=0)
        if np.array_equal(nearest, owner):
            break
        owner = nearest
        counts = np.bincount(owner, minlength=len(means))
        sums = np.stack([np.bincount(owner, weights=points[:, i], minlength=len(means)) for i in range(2)], axis=1)
        means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], means).astype(np.float32)
    return means, float(np.sqrt(squares.min(axis=0)).mean())
