"""Room for the labels of a chart: near their points, on no other label or marker, over as few lines as possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

Xy = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top

DIRECTIONS = 32
# From a point to the nearest part of its label, in pixels: close ones first.
RADII = (14, 18, 24, 32, 42, 54, 68, 84, 104, 128, 160, 200, 250)
DOT = 6  # pixels from one dot along a line to the next
DOT_COST = 12.0  # in pixels of distance


@dataclass(kw_only=True, slots=True)
class LabelGround:
    """What is drawn already, in pixels; it grows with every label that finds a place.

    Attributes:
        frame: All labels lie inside.
        boxes: No label touches one.
        dots: Along lines, which a label covers only where the way round is longer.
    """

    frame: Box
    boxes: list[Box] = field(default_factory=list)
    dots: list[Xy] = field(default_factory=list)

    def add_line(self, points: Sequence[Xy], *, marker: float = 0.0) -> None:
        """A line from each point to the next, and markers of this width on the points, none where it is 0."""
        for (x1, y1), (x2, y2) in pairwise(points):
            steps = max(1, round(math.hypot(x2 - x1, y2 - y1) / DOT))
            self.dots += [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(steps + 1)]
        half = marker / 2
        if marker:
            self.boxes += [(x - half, y - half, x + half, y + half) for x, y in points]

    def place(self, xy: Xy, size: tuple[float, float]) -> Xy | None:
        """The middle of the best free place for a label of this (width, height) near a point, which it then takes.

        `None` where none is free.
        """
        left, bottom, right, top = self._candidates(xy, size).T
        frame = self.frame
        free = (left >= frame[0]) & (bottom >= frame[1]) & (right <= frame[2]) & (top <= frame[3])
        for box in self.boxes:
            free &= (left >= box[2]) | (right <= box[0]) | (bottom >= box[3]) | (top <= box[1])
        if not free.any():
            return None
        x, y = np.array(self.dots, dtype=np.float64).reshape(-1, 2).T[:, :, None]
        covered = ((x >= left) & (x <= right) & (y >= bottom) & (y <= top)).sum(axis=0)
        cost = np.repeat(RADII, DIRECTIONS) + DOT_COST * covered
        best = int(np.where(free, cost, np.inf).argmin())
        self.boxes.append((float(left[best]), float(bottom[best]), float(right[best]), float(top[best])))
        return float(left[best] + right[best]) / 2, float(bottom[best] + top[best]) / 2

    @staticmethod
    def _candidates(xy: Xy, size: tuple[float, float]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """Boxes [RADII x DIRECTIONS, 4] around the point, the nearest first."""
        angle = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
        radius = np.array(RADII, dtype=np.float64)[:, None]
        x = (xy[0] + np.cos(angle) * (radius + size[0] / 2)).ravel()
        y = (xy[1] + np.sin(angle) * (radius + size[1] / 2)).ravel()
        return np.stack([x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2], axis=1)
