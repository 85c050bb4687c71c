"""Which candidates become positives: as many per target as its predictions overlap it, the cheapest ones (paper 4.2).

This is the simplified optimal transport of YOLOX that YOLOv7 takes, for all images of a batch at once: a row for
each target, in it the candidates of its image. No loop over images, no table over classes: with y the square root
of class probability times objectness, the class cost of target g and candidate m,

    sum over c of BCE(y[m, c], c is the class of g)  =  S[m] + ln(1 - y[m, g]) - ln y[m, g],

with S[m] = -sum over c of ln(1 - y[m, c]), needs two numbers per pair instead of one per class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Which cells and anchors may be responsible for a target, before any prediction is looked at.
#
# The rule is that of YOLOv5 and YOLOv7: anchors whose sides are within a factor of the target's, in the target's own
# cell and in the neighbours whose side of the cell its centre is on.

FINE = 0.5  # own cell and the nearer neighbour of each axis: up to three cells
COARSE = 1.0  # own cell and all four neighbours: up to five cells


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidates:
    """Places of one level, int64 [N] each: `cell` counts (image, anchor, row, column) places in that order.

    `target` says for which row of the targets the place stands; one place may stand for several.
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    cell: Tensor

    def __getitem__(self, chosen: Tensor) -> Candidates:
        """Those at `chosen` (indices or bool [N])."""
        return Candidates(
            image=self.image[chosen],
            anchor=self.anchor[chosen],
            row=self.row[chosen],
            column=self.column[chosen],
            target=self.target[chosen],
            cell=self.cell[chosen],
        )

    def for_targets(self, target: Tensor) -> Candidates:
        """The same places, standing for other targets."""
        return Candidates(
            image=self.image, anchor=self.anchor, row=self.row, column=self.column, target=target, cell=self.cell
        )


def find_candidates(
    targets: Tensor, grids: Sequence[tuple[int, int]], anchors: Tensor, *, anchor_t: float, reach: float
) -> list[Candidates]:
    """The candidates of each level, in order of neighbour (own, left, above, right, below), anchor, target.

    Args:
        targets: [T, 6]: image, class, cx, cy, w, h; the last four in fractions of the image.
        grids: Height and width in cells of each level.
        anchors: [levels, 3, 2] width and height in cells of their level.
        anchor_t: Largest factor between a side of the target and of the anchor.
        reach: `FINE` or `COARSE`: how far into a cell its centre may be for the neighbour on that side to count.
    """
    return [
        _on_level(targets, grid, level_anchors, anchor_t, reach)
        for grid, level_anchors in zip(grids, anchors, strict=True)
    ]


def _on_level(targets: Tensor, grid: tuple[int, int], anchors: Tensor, anchor_t: float, reach: float) -> Candidates:
    height, width = grid
    size = targets.new_tensor([width, height])
    centre, sides = targets[:, 2:4] * size, targets[:, 4:6] * size  # [T, 2] in cells
    ratio = sides / anchors[:, None]  # [A, T, 2]
    fits = torch.maximum(ratio, 1 / ratio).amax(2) < anchor_t
    near = (centre % 1 < reach) & (centre > 1)  # left, above
    from_end = size - centre
    far = (from_end % 1 < reach) & (from_end > 1)  # right, below
    own = torch.ones_like(near[:, :1])
    neighbour = torch.cat((own, near, far), 1).T  # [5, T]
    offsets = targets.new_tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]) * reach
    which, anchor, target = (neighbour[:, None] & fits).nonzero(as_tuple=True)
    place = (centre[target] - offsets[which]).long()
    column, row = place[:, 0].clamp(0, width - 1), place[:, 1].clamp(0, height - 1)
    image = targets[target, 0].long()
    cell = ((image * len(anchors) + anchor) * height + row) * width + column
    return Candidates(image=image, anchor=anchor, row=row, column=column, target=target, cell=cell)


IOU_COST = 3.0
LARGEST_PROBABILITY = 1 - 1e-6  # the logarithm of 1 - y stays finite
PAIRS_AT_ONCE = 2**22  # rows times columns that are looked at together: 16 MB a table


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """What the network says at the candidates of a batch.

    Attributes:
        boxes: [M, 4] xyxy in pixels.
        objectness: [M] before the sigmoid.
        classes: [M, C] before the sigmoid.
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


def match(predictions: Predictions, truth: GroundTruth, *, most: int) -> tuple[Tensor, Tensor]:
    """The candidates that become positives, in rising order, and the target of each, int64 [P] both.

    A target takes as many as the sum of its `most` largest overlaps says, at least one. A candidate that several take
    goes to the one it costs least, be it one of them or not.

    Args:
        predictions: At the candidates; without gradients.
        truth: What is to be found.
        most: Overlaps that are summed: 10 in the official loss of P5 models, 20 in that of P6 models.
    """
    if not len(predictions.image) or not len(truth.image):
        nothing = truth.image.new_zeros(0)
        return nothing, nothing
    table = _Table(predictions, truth)
    parts = [table.chosen(rows, most) for rows in table.row_parts()]
    taken, by = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    counts = torch.bincount(taken, minlength=len(predictions.image))
    owner = taken.new_full((len(predictions.image),), -1)
    owner[taken] = by
    disputed = (counts > 1).nonzero().flatten()
    if len(disputed):
        owner[disputed] = table.cheapest_target(disputed)
    positives = (counts > 0).nonzero().flatten()
    return positives, owner[positives]


class _Table:
    """Costs of (target, candidate) pairs of one image, computed for the rows that are asked for."""

    def __init__(self, predictions: Predictions, truth: GroundTruth) -> None:
        self.predictions, self.truth = predictions, truth
        images = int(torch.maximum(predictions.image.max(), truth.image.max())) + 1
        # Candidates of one image side by side: `order` sorts them, keeping their order in the image.
        self.order = torch.sort(predictions.image, stable=True).indices
        self.counts = torch.bincount(predictions.image, minlength=images)
        self.starts = self.counts.cumsum(0) - self.counts
        self.target_order = torch.sort(truth.image, stable=True).indices
        self.target_counts = torch.bincount(truth.image, minlength=images)
        self.target_starts = self.target_counts.cumsum(0) - self.target_counts
        self.no_class_cost, self.class_gain = _class_costs(predictions)

    def row_parts(self) -> Iterator[Tensor]:
        """Targets whose image has candidates, so many at a time as fit `PAIRS_AT_ONCE`."""
        rows = (self.counts[self.truth.image] > 0).nonzero().flatten()
        at_once = max(1, PAIRS_AT_ONCE // max(1, int(self.counts.max())))
        yield from torch.split(rows, at_once)

    def chosen(self, rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The candidates that these targets take, and who takes them."""
        count = self.counts[self.truth.image[rows]]
        place = torch.arange(int(count.max()), device=rows.device)
        real = place < count[:, None]
        candidate = self.order[(self.starts[self.truth.image[rows]][:, None] + place).clamp(max=len(self.order) - 1)]
        overlap = self._overlap(rows[:, None], candidate) * real
        cost = self._cost(rows[:, None], candidate, overlap).masked_fill(~real, torch.inf)
        few = min(most, len(place))
        wanted = overlap.topk(few, 1).values.sum(1).int().clamp(min=1)
        cheapest = cost.topk(few, 1, largest=False).indices
        takes = (torch.arange(few, device=rows.device) < wanted[:, None]) & real.gather(1, cheapest)
        return candidate.gather(1, cheapest)[takes], rows[:, None].expand_as(takes)[takes]

    def cheapest_target(self, candidates: Tensor) -> Tensor:
        """Of all targets of a candidate's image the one it costs least."""
        image = self.predictions.image[candidates]
        count = self.target_counts[image]
        place = torch.arange(int(count.max()), device=candidates.device)
        real = place < count[:, None]
        rows = self.target_order[(self.target_starts[image][:, None] + place).clamp(max=len(self.target_order) - 1)]
        overlap = self._overlap(rows, candidates[:, None])
        cost = self._cost(rows, candidates[:, None], overlap).masked_fill(~real, torch.inf)
        return rows.gather(1, cost.argmin(1, keepdim=True)).flatten()

    def _overlap(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """IoU of each pair; `rows` and `candidates` broadcast."""
        ax1, ay1, ax2, ay2 = self.truth.boxes[rows].unbind(-1)
        bx1, by1, bx2, by2 = self.predictions.boxes[candidates].unbind(-1)
        width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
        height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
        shared = width * height
        return shared / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared)

    def _cost(self, rows: Tensor, candidates: Tensor, overlap: Tensor) -> Tensor:
        pairs = candidates * self.class_gain.shape[1] + self.truth.class_ids[rows]
        class_cost = self.no_class_cost[candidates] + self.class_gain.flatten()[pairs]
        return class_cost - IOU_COST * torch.log(overlap + 1e-8)


def _class_costs(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """S [M], and what is added for the target's class [M, C] (see the head of this file)."""
    log_y = (F.logsigmoid(predictions.classes) + F.logsigmoid(predictions.objectness)[:, None]) / 2
    log_not_y = torch.log1p(-log_y.exp().clamp(max=LARGEST_PROBABILITY))
    return -log_not_y.sum(1), log_not_y - log_y
