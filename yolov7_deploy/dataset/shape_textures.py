"""What the generated pictures are painted with: fields from 0 to 1, between the two colours of a thing.

As in `shape_forms` only arithmetic that every processor rounds the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from yolov7_deploy.dataset.samples import IntArray
from yolov7_deploy.dataset.shape_forms import Field

MIN_PERIOD_PX = 5.0

Texture = Callable[[Field, Field, float, np.random.Generator], Field]


def direction(rng: np.random.Generator) -> tuple[float, float]:
    """Cosine and sine of a random angle: by the tangent of half of it, as sine and cosine differ between machines."""
    tangent, quarter = rng.random(), int(rng.integers(4))
    norm = 1 + tangent * tangent
    x, y = (1 - tangent * tangent) / norm, 2 * tangent / norm
    return ((x, y), (-y, x), (-x, -y), (y, -x))[quarter]


def stripes(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """Of random width and direction."""
    cosine, sine = direction(rng)
    return _steep(_wave(cosine * x + sine * y, _period(extent, rng)))


def checks(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """A turned chessboard."""
    (cosine, sine), period = direction(rng), _period(extent, rng)
    along, across = _wave(cosine * x + sine * y, period), _wave(cosine * y - sine * x, period)
    return _steep(0.5 + 2 * (along - 0.5) * (across - 0.5) * math.sqrt(period))


def dots(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """Soft dots on a turned grid."""
    (cosine, sine), period = direction(rng), _period(extent, rng)
    u, v = _from_middle(cosine * x + sine * y, period), _from_middle(cosine * y - sine * x, period)
    field: Field = np.clip((0.12 - u * u - v * v) * period * 2 + 0.5, 0, 1)
    return field


def gradient(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """From one side to the other."""
    cosine, sine = direction(rng)
    return np.clip((cosine * x + sine * y) / extent + 0.5, 0, 1)


def grain(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """Clouds of a few pixels."""
    return smooth_noise((y.shape[0], x.shape[1]), cell_px=_period(extent, rng) / 2, rng=rng)


def plain(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """One colour."""
    return np.zeros((y.shape[0], x.shape[1]), dtype=np.float32)


TEXTURES: tuple[Texture, ...] = (stripes, checks, dots, gradient, grain, plain)


def smooth_noise(hw: tuple[int, int], *, cell_px: float, rng: np.random.Generator) -> Field:
    """Random values every `cell_px` pixels and smooth steps between them, float32 [H, W], 0..1."""
    cells = [max(1, math.ceil(side / cell_px)) for side in hw]
    grid: Field = rng.random((cells[0] + 1, cells[1] + 1), dtype=np.float32)
    rows, part = _steps(hw[0], cells[0])
    grid = grid[rows] + (grid[rows + 1] - grid[rows]) * part[:, None]
    columns, part = _steps(hw[1], cells[1])
    left = grid[:, columns]
    return left + (grid[:, columns + 1] - left) * part


def _steps(pixels: int, cells: int) -> tuple[IntArray, Field]:
    """The cell that each pixel is in, and how far of the step to the next one it has gone."""
    place = (np.arange(pixels) + 0.5) * (cells / pixels)
    cell = place.astype(np.int64)
    part = (place - cell).astype(np.float32)
    return cell, part * part * (3 - 2 * part)


def _period(extent: float, rng: np.random.Generator) -> float:
    """From what can still be seen to a third of the thing."""
    return MIN_PERIOD_PX + rng.random() * max(0.0, extent / 3 - MIN_PERIOD_PX)


def _from_middle(along: Field, period: float) -> Field:
    """Distance from the middle of the period, in periods: -0.5..0.5."""
    part = along * (1 / period)
    middle: Field = part - np.floor(part) - 0.5
    return middle


def _wave(along: Field, period: float) -> Field:
    """0 and 1 once in a period, straight between them."""
    return np.abs(_from_middle(along, period)) * 2


def _steep(field: Field) -> Field:
    steep: Field = np.clip((field - 0.5) * 4 + 0.5, 0, 1)
    return steep
