"""Which cells and anchors may be responsible for a target, before any prediction is looked at.

The rule is that of YOLOv5 and YOLOv7: anchors whose sides are within a factor of the target's, in the target's own cell
and in the neighbours whose side of the cell its centre is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        targets: [T, 6]: image, class, cx, cy, w, h; the last four in fractions of the picture.
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
