"""The forms of the generated dataset: an outline for the label and a signed distance for the pixels.

Pixels come from arithmetic and square roots only, which every processor rounds the same way: same seed, same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from yolov7_deploy.dataset.samples import DoubleArray

ROUND_POINTS = 48  # a multiple of 4, so that the four extreme points are among them
STAR_INNER = 0.45
RING_INNER = 0.55
CROSS_ARM = 0.32  # half of an arm's width
TIP_DEGREES = 36  # half of the angle between two tips of a star

Field = npt.NDArray[np.floating[Any]]  # float32 [H, W]
Distance = Callable[[Field, Field], Field]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Form:
    """A form about 0, 0 that just fits into the unit circle.

    Attributes:
        outline: float64 [K, 2] xy.
        distance: Of points x, y to the edge, negative inside; float32 of their shape.
    """

    outline: DoubleArray
    distance: Distance


def _around(radii: tuple[float, ...], count: int) -> DoubleArray:
    """`count` points at equal angles, the first at the top, with the radii in turn."""
    angles = [2 * math.pi * i / count for i in range(count)]
    turn = [radii[i % len(radii)] for i in range(count)]
    return np.array([(r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, turn, strict=True)])


def _circle(x: Field, y: Field) -> Field:
    return np.sqrt(x * x + y * y) - 1


def _square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - math.sqrt(0.5)


def _triangle(x: Field, y: Field) -> Field:
    return np.maximum(y, math.sqrt(0.75) * np.abs(x) - 0.5 * y) - 0.5


def _star(x: Field, y: Field) -> Field:
    """Along the nearest of five axes from centre to tip the edge is one straight line."""
    side = np.abs(x)
    along = np.maximum(-y, _SIN[2] * side - _COS[2] * y)
    along = np.maximum(along, _SIN[4] * side - _COS[4] * y)
    across = np.sqrt(np.maximum(x * x + y * y - along * along, 0))
    # From the tip (1, 0) to the corner between two tips.
    step_along, step_across = STAR_INNER * _COS[1] - 1, STAR_INNER * _SIN[1]
    length = math.sqrt(step_along * step_along + step_across * step_across)
    distance: Field = ((along - 1) * step_across - across * step_along) / length
    return distance


def _ring(x: Field, y: Field) -> Field:
    return np.abs(np.sqrt(x * x + y * y) - (1 + RING_INNER) / 2) - (1 - RING_INNER) / 2


def _cross(x: Field, y: Field) -> Field:
    """Two bars, the union of which has the smaller of both distances."""
    x, y = np.abs(x), np.abs(y)
    distance: Field = np.minimum(np.maximum(x - _REACH, y - CROSS_ARM), np.maximum(x - CROSS_ARM, y - _REACH))
    return distance


_SIN, _COS = ([f(math.radians(TIP_DEGREES * i)) for i in range(5)] for f in (math.sin, math.cos))
_REACH = math.sqrt(1 - CROSS_ARM * CROSS_ARM)  # so that the corners of the arms are on the unit circle
_QUARTER = np.array([(CROSS_ARM, -_REACH), (CROSS_ARM, -CROSS_ARM), (_REACH, -CROSS_ARM)])
_TURNS = [np.array(turn) for turn in ([[1, 0], [0, 1]], [[0, 1], [-1, 0]], [[-1, 0], [0, -1]], [[0, -1], [1, 0]])]

FORMS: Mapping[str, Form] = {
    "circle": Form(outline=_around((1,), ROUND_POINTS), distance=_circle),
    "square": Form(outline=np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * math.sqrt(0.5), distance=_square),
    "triangle": Form(outline=_around((1,), 3), distance=_triangle),
    "star": Form(outline=_around((1, STAR_INNER), 10), distance=_star),
    "ring": Form(outline=_around((1,), ROUND_POINTS), distance=_ring),
    "cross": Form(outline=np.concatenate([_QUARTER @ turn for turn in _TURNS]), distance=_cross),
}


def turned(points: DoubleArray, cosine: float, sine: float) -> DoubleArray:
    """Points [K, 2] turned about 0, 0."""
    x, y = points.T
    return np.stack([cosine * x - sine * y, sine * x + cosine * y], axis=1)
