"""Label assignment of the paper's section 4.2: candidate cells and anchors of each target, and SimOTA among them.

SimOTA is the simplified optimal transport of YOLOX that YOLOv7 uses. Here it runs for all images of a batch together: a
row per target, with the candidates of its image. There is no loop over images and no table over classes. With y the
square root of class probability times objectness, the class cost of target g and candidate m,

    sum over c of BCE(y[m, c], c is the class of g)  =  S[m] + ln(1 - y[m, g]) - ln y[m, g],

with S[m] = -sum over c of ln(1 - y[m, c]), needs two numbers per pair instead of one per class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

FINE = 0.5  # offset: the target's own cell and the nearer neighbour on each axis, up to three cells
COARSE = 1.0  # offset: the target's own cell and its four neighbours, up to five cells
IOU_COST = 3.0
MAX_PROBABILITY = 1 - 1e-6  # keeps the logarithm of 1 - y finite
MAX_PAIRS = 2**22  # (target, candidate) pairs computed at once: 16 MB per float32 table


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidates:
    """Candidates of one level, or the positives among them.

    Attributes:
        image, anchor, row, column: Location of each candidate, int64 [N] each.
        target: Row of the targets that the candidate belongs to, int64 [N]; a location may be there several times.
        flat_index: Location as an index into the flattened axes (image, anchor, row, column), int64 [N].
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    flat_index: Tensor

    def __getitem__(self, indices: Tensor) -> Candidates:
        """Return the candidates at `indices` (int64, or bool [N])."""
        return Candidates(
            image=self.image[indices],
            anchor=self.anchor[indices],
            row=self.row[indices],
            column=self.column[indices],
            target=self.target[indices],
            flat_index=self.flat_index[indices],
        )

    def with_targets(self, target: Tensor) -> Candidates:
        """Return the same locations with other targets."""
        return Candidates(
            image=self.image,
            anchor=self.anchor,
            row=self.row,
            column=self.column,
            target=target,
            flat_index=self.flat_index,
        )


def find_candidates(
    targets: Tensor, grids: Sequence[tuple[int, int]], anchors: Tensor, *, anchor_t: float, offset: float
) -> list[Candidates]:
    """Return the candidates of each level, ordered by neighbour (own, left, above, right, below), anchor and target.

    The rule is that of YOLOv5 and YOLOv7 and does not depend on predictions: anchors whose sides differ from those of
    the target by less than a factor, in the target's own cell and in the neighbours that its centre is close to.

    Args:
        targets: [T, 6]: image, class, cx, cy, w, h; the last four in fractions of the image.
        grids: Height and width of each level in cells.
        anchors: [levels, 3, 2] width and height in cells of their level.
        anchor_t: Maximum ratio between a side of the target and of the anchor.
        offset: `FINE` or `COARSE`: distance in cells from an edge within which the neighbour beyond it is a candidate.
    """
    return [
        _level_candidates(targets, grid, level_anchors, anchor_t, offset)
        for grid, level_anchors in zip(grids, anchors, strict=True)
    ]


def _level_candidates(
    targets: Tensor, grid: tuple[int, int], anchors: Tensor, anchor_t: float, offset: float
) -> Candidates:
    height, width = grid
    size = targets.new_tensor([width, height])
    centres, sides = targets[:, 2:4] * size, targets[:, 4:6] * size  # [T, 2] in cells
    ratio = sides / anchors[:, None]  # [A, T, 2]
    fits = torch.maximum(ratio, 1 / ratio).amax(2) < anchor_t
    near = (centres % 1 < offset) & (centres > 1)  # left, above
    from_end = size - centres
    far = (from_end % 1 < offset) & (from_end > 1)  # right, below
    own = torch.ones_like(near[:, :1])
    neighbours = torch.cat((own, near, far), 1).T  # [5, T]
    offsets = targets.new_tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]) * offset
    neighbour, anchor, target = (neighbours[:, None] & fits).nonzero(as_tuple=True)
    cell = (centres[target] - offsets[neighbour]).long()
    column, row = cell[:, 0].clamp(0, width - 1), cell[:, 1].clamp(0, height - 1)
    image = targets[target, 0].long()
    flat_index = ((image * len(anchors) + anchor) * height + row) * width + column
    return Candidates(image=image, anchor=anchor, row=row, column=column, target=target, flat_index=flat_index)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """Predictions of the network at the candidates of a batch.

    Attributes:
        boxes: [M, 4] xyxy in pixels.
        objectness: [M] logits.
        classes: [M, C] logits.
        image: int64 [M].
    """

    boxes: Tensor
    objectness: Tensor
    classes: Tensor
    image: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroundTruth:
    """The targets of a batch: boxes [T, 4] xyxy in pixels, class_ids and image int64 [T]."""

    boxes: Tensor
    class_ids: Tensor
    image: Tensor


def assign_simota(predictions: Predictions, truth: GroundTruth, *, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the candidates that become positives, in ascending order, and the target of each, both int64 [P].

    A target takes its k candidates of lowest cost, where k is the sum of its `top_k` largest IoUs, rounded down, at
    least 1. A candidate that several targets take goes to the target of its image with the lowest cost, which need not
    be one of them.

    Args:
        predictions: Predictions at the candidates, without gradients.
        truth: The targets.
        top_k: Number of summed IoUs: 10 in the official loss of P5 models, 20 in that of P6 models.
    """
    if not len(predictions.image) or not len(truth.image):
        empty = truth.image.new_zeros(0)
        return empty, empty
    costs = _PairCosts(predictions, truth)
    parts = [costs.cheapest_candidates(rows, top_k) for rows in costs.target_chunks()]
    candidates, targets = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    counts = torch.bincount(candidates, minlength=len(predictions.image))
    owner = candidates.new_full((len(predictions.image),), -1)
    owner[candidates] = targets
    ambiguous = (counts > 1).nonzero().flatten()
    if len(ambiguous):
        owner[ambiguous] = costs.cheapest_target(ambiguous)
    positives = (counts > 0).nonzero().flatten()
    return positives, owner[positives]


class _PairCosts:
    """Costs of (target, candidate) pairs of the same image, computed in chunks."""

    def __init__(self, predictions: Predictions, truth: GroundTruth) -> None:
        self.predictions, self.truth = predictions, truth
        images = int(torch.maximum(predictions.image.max(), truth.image.max())) + 1
        # Stable sort: candidates of one image are contiguous in `order`, in their original order.
        self.order = torch.sort(predictions.image, stable=True).indices
        self.counts = torch.bincount(predictions.image, minlength=images)
        self.starts = self.counts.cumsum(0) - self.counts
        self.target_order = torch.sort(truth.image, stable=True).indices
        self.target_counts = torch.bincount(truth.image, minlength=images)
        self.target_starts = self.target_counts.cumsum(0) - self.target_counts
        self.no_class_cost, self.class_gain = _class_costs(predictions)

    def target_chunks(self) -> Iterator[Tensor]:
        """Yield the targets whose image has candidates, in chunks of at most `MAX_PAIRS` pairs."""
        rows = (self.counts[self.truth.image] > 0).nonzero().flatten()
        yield from torch.split(rows, max(1, MAX_PAIRS // max(1, int(self.counts.max()))))

    def cheapest_candidates(self, rows: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Return the candidates that these targets take, and the target of each."""
        count = self.counts[self.truth.image[rows]]
        position = torch.arange(int(count.max()), device=rows.device)
        valid = position < count[:, None]
        indices = self.starts[self.truth.image[rows]][:, None] + position
        candidate = self.order[indices.clamp(max=len(self.order) - 1)]
        iou = self._iou(rows[:, None], candidate) * valid
        cost = self._cost(rows[:, None], candidate, iou).masked_fill(~valid, torch.inf)
        top_k = min(top_k, len(position))
        dynamic_k = iou.topk(top_k, 1).values.sum(1).int().clamp(min=1)
        cheapest = cost.topk(top_k, 1, largest=False).indices
        taken = (torch.arange(top_k, device=rows.device) < dynamic_k[:, None]) & valid.gather(1, cheapest)
        return candidate.gather(1, cheapest)[taken], rows[:, None].expand_as(taken)[taken]

    def cheapest_target(self, candidates: Tensor) -> Tensor:
        """Return, for each candidate, the target of its image with the lowest cost."""
        image = self.predictions.image[candidates]
        count = self.target_counts[image]
        position = torch.arange(int(count.max()), device=candidates.device)
        valid = position < count[:, None]
        indices = self.target_starts[image][:, None] + position
        rows = self.target_order[indices.clamp(max=len(self.target_order) - 1)]
        iou = self._iou(rows, candidates[:, None])
        cost = self._cost(rows, candidates[:, None], iou).masked_fill(~valid, torch.inf)
        return rows.gather(1, cost.argmin(1, keepdim=True)).flatten()

    def _iou(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Return the IoU of each pair; `rows` and `candidates` broadcast."""
        ax1, ay1, ax2, ay2 = self.truth.boxes[rows].unbind(-1)
        bx1, by1, bx2, by2 = self.predictions.boxes[candidates].unbind(-1)
        width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
        height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
        intersection = width * height
        return intersection / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection)

    def _cost(self, rows: Tensor, candidates: Tensor, iou: Tensor) -> Tensor:
        pairs = candidates * self.class_gain.shape[1] + self.truth.class_ids[rows]
        class_cost = self.no_class_cost[candidates] + self.class_gain.flatten()[pairs]
        return class_cost - IOU_COST * torch.log(iou + 1e-8)


def _class_costs(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """Return S [M], and the term of the target's class [M, C]; see the top of this file."""
    log_y = (F.logsigmoid(predictions.classes) + F.logsigmoid(predictions.objectness)[:, None]) / 2
    log_not_y = torch.log1p(-log_y.exp().clamp(max=MAX_PROBABILITY))
    return -log_not_y.sum(1), log_not_y - log_y
