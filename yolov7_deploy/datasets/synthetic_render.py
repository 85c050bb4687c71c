"""Renders one synthetic image: a cluttered background, and shapes that stand out from it.

Pixels are computed with arithmetic and square roots only, which every processor rounds in the same way, and with sums
of integers: the same seed gives the same pixels on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from yolov7_deploy.datasets.samples import BoolArray, DoubleArray, IntArray
from yolov7_deploy.image import Image

# --- shapes: an outline for the label and a signed distance for the pixels --------------------------------------------

CIRCLE_POINTS = 48  # a multiple of 4, so that the outline includes the four extreme points
STAR_INNER = 0.45  # inner radius
RING_INNER = 0.55  # inner radius
CROSS_ARM = 0.32  # half the width of an arm
TIP_DEGREES = 36  # half the angle between two tips of a star

Field = npt.NDArray[np.floating[Any]]  # float32 [H, W]
Distance = Callable[[Field, Field], Field]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shape:
    """A shape centred at (0, 0) that touches the unit circle from inside.

    Attributes:
        outline: float64 [K, 2] xy.
        distance: Returns the signed distance of points (x, y) to the edge, negative inside; float32 of their shape.
    """

    outline: DoubleArray
    distance: Distance


def _radial_points(radii: tuple[float, ...], count: int) -> DoubleArray:
    """Return `count` points at equal angles, the first at the top, which cycle through `radii`."""
    angles = [2 * math.pi * i / count for i in range(count)]
    cycled = [radii[i % len(radii)] for i in range(count)]
    return np.array([(r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, cycled, strict=True)])


def _circle(x: Field, y: Field) -> Field:
    return np.sqrt(x * x + y * y) - 1


def _square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - math.sqrt(0.5)


def _triangle(x: Field, y: Field) -> Field:
    return np.maximum(y, math.sqrt(0.75) * np.abs(x) - 0.5 * y) - 0.5


def _star(x: Field, y: Field) -> Field:
    """Return the signed distance; along the nearest of the five axes, the edge is one straight line."""
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
    """Return the signed distance to the union of two bars: the smaller of both distances."""
    x, y = np.abs(x), np.abs(y)
    distance: Field = np.minimum(np.maximum(x - _REACH, y - CROSS_ARM), np.maximum(x - CROSS_ARM, y - _REACH))
    return distance


_SIN, _COS = ([f(math.radians(TIP_DEGREES * i)) for i in range(5)] for f in (math.sin, math.cos))
_REACH = math.sqrt(1 - CROSS_ARM * CROSS_ARM)  # so that the corners of the arms are on the unit circle
_CROSS_QUARTER = np.array([(CROSS_ARM, -_REACH), (CROSS_ARM, -CROSS_ARM), (_REACH, -CROSS_ARM)])
_ROTATIONS = [np.array(m) for m in ([[1, 0], [0, 1]], [[0, 1], [-1, 0]], [[-1, 0], [0, -1]], [[0, -1], [1, 0]])]

SHAPES: Mapping[str, Shape] = {
    "circle": Shape(outline=_radial_points((1,), CIRCLE_POINTS), distance=_circle),
    "square": Shape(outline=np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * math.sqrt(0.5), distance=_square),
    "triangle": Shape(outline=_radial_points((1,), 3), distance=_triangle),
    "star": Shape(outline=_radial_points((1, STAR_INNER), 10), distance=_star),
    "ring": Shape(outline=_radial_points((1,), CIRCLE_POINTS), distance=_ring),
    "cross": Shape(outline=np.concatenate([_CROSS_QUARTER @ rotation for rotation in _ROTATIONS]), distance=_cross),
}


def rotate(points: DoubleArray, cosine: float, sine: float) -> DoubleArray:
    """Return points [K, 2] rotated about (0, 0)."""
    x, y = points.T
    return np.stack([cosine * x - sine * y, sine * x + cosine * y], axis=1)


# --- textures: fields from 0 to 1 that blend the two colours of an object or background -------------------------------

MIN_PERIOD_PX = 5.0

Texture = Callable[[Field, Field, float, np.random.Generator], Field]


def random_direction(rng: np.random.Generator) -> tuple[float, float]:
    """Return cosine and sine of a random angle, by the tangent half-angle formula: sin() differs between machines."""
    tangent, quarter = rng.random(), int(rng.integers(4))
    norm = 1 + tangent * tangent
    x, y = (1 - tangent * tangent) / norm, 2 * tangent / norm
    return ((x, y), (-y, x), (-x, -y), (y, -x))[quarter]


def stripes(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """Stripes of random width and direction."""
    cosine, sine = random_direction(rng)
    return _sharpen(_wave(cosine * x + sine * y, _period(extent, rng)))


def checks(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """A rotated chessboard."""
    (cosine, sine), period = random_direction(rng), _period(extent, rng)
    along, across = _wave(cosine * x + sine * y, period), _wave(cosine * y - sine * x, period)
    return _sharpen(0.5 + 2 * (along - 0.5) * (across - 0.5) * math.sqrt(period))


def dots(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """Soft dots on a rotated grid."""
    (cosine, sine), period = random_direction(rng), _period(extent, rng)
    u, v = _phase(cosine * x + sine * y, period), _phase(cosine * y - sine * x, period)
    field: Field = np.clip((0.12 - u * u - v * v) * period * 2 + 0.5, 0, 1)
    return field


def gradient(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """A linear gradient in a random direction."""
    cosine, sine = random_direction(rng)
    return np.clip((cosine * x + sine * y) / extent + 0.5, 0, 1)


def grain(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """Smooth noise with cells of a few pixels."""
    return smooth_noise((y.shape[0], x.shape[1]), cell_px=_period(extent, rng) / 2, rng=rng)


def plain(x: Field, y: Field, extent: float, rng: np.random.Generator) -> Field:
    """A single colour."""
    return np.zeros((y.shape[0], x.shape[1]), dtype=np.float32)


TEXTURES: tuple[Texture, ...] = (stripes, checks, dots, gradient, grain, plain)


def smooth_noise(hw: tuple[int, int], *, cell_px: float, rng: np.random.Generator) -> Field:
    """Return random values every `cell_px` pixels with smooth steps between them, float32 [H, W], 0..1."""
    cells = [max(1, math.ceil(side / cell_px)) for side in hw]
    grid: Field = rng.random((cells[0] + 1, cells[1] + 1), dtype=np.float32)
    rows, part = _smooth_steps(hw[0], cells[0])
    grid = grid[rows] + (grid[rows + 1] - grid[rows]) * part[:, None]
    columns, part = _smooth_steps(hw[1], cells[1])
    left = grid[:, columns]
    return left + (grid[:, columns + 1] - left) * part


def _smooth_steps(pixels: int, cells: int) -> tuple[IntArray, Field]:
    """Return the cell of each pixel, and the weight of the next cell (smoothstep), 0..1."""
    position = (np.arange(pixels) + 0.5) * (cells / pixels)
    cell = position.astype(np.int64)
    part = (position - cell).astype(np.float32)
    return cell, part * part * (3 - 2 * part)


def _period(extent: float, rng: np.random.Generator) -> float:
    """Return a random period in pixels: from the smallest visible one to a third of the object."""
    return MIN_PERIOD_PX + rng.random() * max(0.0, extent / 3 - MIN_PERIOD_PX)


def _phase(along: Field, period: float) -> Field:
    """Return the offset from the middle of the period, in periods: -0.5..0.5."""
    part = along * (1 / period)
    middle: Field = part - np.floor(part) - 0.5
    return middle


def _wave(along: Field, period: float) -> Field:
    """Return a triangle wave, 0..1."""
    return np.abs(_phase(along, period)) * 2


def _sharpen(field: Field) -> Field:
    sharp: Field = np.clip((field - 0.5) * 4 + 0.5, 0, 1)
    return sharp


# --- painting ---------------------------------------------------------------------------------------------------------


MAX_HIDDEN = 0.3  # fraction of the pixels of an earlier object
MAX_TRIES = 12  # positions tried for an object before it is skipped
MARGIN_PX = 1.0  # between an object and the image border
MAX_BLOBS, MAX_LINES = 5, 5
MAX_NOISE = 3
COLOURS = 48  # random candidates for a colour
# Colour differences are sums over three channels of 0..255: between an object and its background, between the two
# colours of an object, and between the colours of the background.
CONTRAST, WEAK_CONTRAST, WEAK_PROBABILITY = 190, 110, 0.15
OBJECT_COLOURS = (60, 300)
BACKGROUND_COLOURS = (20, 160)

Window = tuple[slice, slice]
Colour = IntArray  # [3], blue, green, red


class ShapeCanvas:
    """A square image that objects are painted on; all random numbers come from `rng`, in the order of the calls."""

    def __init__(self, size: int, *, rng: np.random.Generator) -> None:
        """Paint the background: soft colours, irregular blobs of texture, and lines."""
        self._size, self._rng = size, rng
        self._owner = np.zeros((size, size), dtype=np.int64)  # number of the object of each pixel, from 1
        self._areas: list[int] = [0]
        first = rng.integers(30, 226, size=3)
        second = self._colour(near=first, between=BACKGROUND_COLOURS)
        self._pixels = np.empty((3, size, size), dtype=np.float32)  # planar: interleaved is slower
        clouds = smooth_noise((size, size), cell_px=size / int(rng.integers(1, 5)), rng=rng)
        self._pixels[:] = _blend(first, second, clouds)
        for _ in range(int(rng.integers(MAX_BLOBS, endpoint=True))):
            self._add_blob()
        for _ in range(int(rng.integers(MAX_LINES, endpoint=True))):
            self._add_line()

    def add(self, shape: Shape, *, side_px: float) -> DoubleArray | None:
        """Paint a randomly rotated shape whose box has this longer side; returns its outline in pixels, [K, 2] xy.

        Paints nothing and returns `None` if it would hide too much of another object at every position tried.
        """
        cosine, sine = random_direction(self._rng)
        outline = rotate(shape.outline, cosine, sine)
        scale = min(side_px, self._size - 2 * MARGIN_PX) / float(np.ptp(outline, axis=0).max())
        outline *= scale
        low, high = MARGIN_PX - outline.min(axis=0), self._size - MARGIN_PX - outline.max(axis=0)
        for _ in range(MAX_TRIES):
            centre = low + (high - low) * self._rng.random(2)
            window, x, y = self._window_around(centre, math.ceil(scale) + 2)
            distance = shape.distance((cosine * x + sine * y) * (1 / scale), (cosine * y - sine * x) * (1 / scale))
            covered = distance < 0
            if self._leaves_others_visible(window, covered):
                self._paint_object(window, x, y, distance * scale, side_px)
                outline_px: DoubleArray = outline + centre
                return outline_px
        return None

    def render(self) -> Image:
        """Return the image with some blur and noise, as from a camera; uint8 BGR [size, size, 3]."""
        pixels = _blur(self._pixels, 0.25 * self._rng.random())
        strength = int(self._rng.integers(MAX_NOISE, endpoint=True))
        pixels += self._rng.integers(-strength, strength, endpoint=True, size=pixels.shape[1:], dtype=np.int8)
        np.rint(np.clip(pixels, 0, 255, out=pixels), out=pixels)
        image: Image = np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0))
        return image

    def _window_around(self, centre: DoubleArray, reach: int) -> tuple[Window, Field, Field]:
        """Return the window up to `reach` pixels from the centre, and its x [1, w] and y [h, 1] relative to it."""
        low = np.maximum(np.floor(centre).astype(int) - reach, 0)
        high = np.minimum(np.floor(centre).astype(int) + reach + 1, self._size)
        x, y = (np.arange(low[i], high[i]) + 0.5 - centre[i] for i in range(2))
        window = slice(low[1], high[1]), slice(low[0], high[0])
        return window, x.astype(np.float32)[None, :], y.astype(np.float32)[:, None]

    def _leaves_others_visible(self, window: Window, covered: BoolArray) -> bool:
        """Return whether enough of every earlier object remains visible."""
        hidden = np.bincount(self._owner[window][covered], minlength=len(self._areas))
        visible = np.bincount(self._owner.ravel(), minlength=len(self._areas)) if hidden[1:].any() else hidden
        return all(visible[i] - hidden[i] >= (1 - MAX_HIDDEN) * self._areas[i] for i in np.flatnonzero(hidden[1:]) + 1)

    def _paint_object(self, window: Window, x: Field, y: Field, distance: Field, side: float) -> None:
        covered = distance < 0
        background = self._mean(window, covered)
        contrast = WEAK_CONTRAST if self._rng.random() < WEAK_PROBABILITY else CONTRAST
        first = self._colour(near=background, between=(contrast, 765))
        second = self._colour(near=first, between=OBJECT_COLOURS, away_from=background, min_difference=contrast)
        softness = 0.8 + 0.8 * self._rng.random()
        self._paint(window, np.clip(0.5 - distance / softness, 0, 1), _blend(first, second, self._texture(x, y, side)))
        self._owner[window][covered] = len(self._areas)
        self._areas.append(int(np.count_nonzero(covered)))

    def _add_blob(self) -> None:
        """Paint an irregular patch in colours similar to its background."""
        reach = self._size * (0.08 + 0.22 * self._rng.random())
        window, x, y = self._window_around(self._rng.random(2) * self._size, math.ceil(1.3 * reach))
        rough = smooth_noise((len(y), x.shape[1]), cell_px=reach * (0.3 + 0.4 * self._rng.random()), rng=self._rng)
        inside = 1 - (x * x + y * y) / (reach * reach)
        share = np.clip((inside + 1.5 * (rough - 0.6)) * (1 + 5 * self._rng.random()), 0, 1)
        background = self._mean(window, share > 0)
        first, second = (self._colour(near=background, between=BACKGROUND_COLOURS) for _ in range(2))
        self._paint(window, share, _blend(first, second, self._texture(x, y, reach)))

    def _add_line(self) -> None:
        """Paint a straight line, one to three pixels wide, between two random points."""
        start, end = self._rng.random((2, 2)) * self._size
        middle, half = (start + end) / 2, (end - start) / 2
        window, x, y = self._window_around(middle, math.ceil(float(np.abs(half).max())) + 3)
        length = max(1e-3, float(half[0] * half[0] + half[1] * half[1]))
        along = np.clip((x * float(half[0]) + y * float(half[1])) * (1 / length), -1, 1)
        across_x, across_y = x - along * float(half[0]), y - along * float(half[1])
        distance = np.sqrt(across_x * across_x + across_y * across_y) - (0.5 + self._rng.random())
        colour = self._colour(near=self._mean(window, distance < 1), between=(60, 400))
        self._paint(window, np.clip(0.5 - distance, 0, 1), _blend(colour, colour, np.zeros_like(distance)))

    def _texture(self, x: Field, y: Field, extent: float) -> Field:
        return TEXTURES[int(self._rng.integers(len(TEXTURES)))](x, y, extent, self._rng)

    def _paint(self, window: Window, share: Field, colours: Field) -> None:
        pixels = self._pixels[:, window[0], window[1]]
        change = colours - pixels
        change *= share
        pixels += change

    def _mean(self, window: Window, chosen: BoolArray) -> Colour:
        """Return the mean colour of a quarter of the chosen pixels; a sum of integers is the same in any order."""
        pixels = self._pixels[:, window[0], window[1]][:, ::2, ::2][:, chosen[::2, ::2]].astype(np.int64)
        mean: Colour = pixels.sum(axis=1) // max(1, pixels.shape[1])
        return mean

    def _colour(
        self, *, near: Colour, between: tuple[int, int], away_from: Colour | None = None, min_difference: int = 0
    ) -> Colour:
        """Return the random colour whose difference from `near` is in the range `between`, or closest to it."""
        colours = self._rng.integers(0, 256, size=(COLOURS, 3))
        difference = np.abs(colours - near).sum(axis=1)
        penalty = np.maximum(between[0] - difference, 0) + np.maximum(difference - between[1], 0)
        if away_from is not None:
            penalty += 3 * np.maximum(min_difference - np.abs(colours - away_from).sum(axis=1), 0)
        best: Colour = colours[int(np.argmin(penalty))]
        return best


def _blend(first: Colour, second: Colour, share: Field) -> Field:
    """Return the first colour where the share is 0, the second where it is 1, and mixtures between; [3, H, W]."""
    start, end = (colour.astype(np.float32)[:, None, None] for colour in (first, second))
    blended: Field = (end - start) * share
    blended += start
    return blended


def _blur(pixels: Field, share: float) -> Field:
    """Blur [3, H, W] with the kernel (share, 1 - 2 share, share), first in y and then in x; the border is repeated."""
    for axis in (1, 2):
        planes = pixels.swapaxes(1, axis)
        part = planes * share
        planes = planes * (1 - 2 * share)
        planes[:, 1:] += part[:, :-1]
        planes[:, :-1] += part[:, 1:]
        planes[:, [0, -1]] += part[:, [0, -1]]
        pixels = planes.swapaxes(1, axis)
    return pixels
