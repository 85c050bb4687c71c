"""Paints one generated picture: a background that distracts, and objects that stand out from it.

As in `shape_forms` only arithmetic that every processor rounds the same way, and sums of whole numbers.
"""

from __future__ import annotations

import math

import numpy as np

from yolov7_deploy.dataset.samples import BoolArray, DoubleArray, IntArray
from yolov7_deploy.dataset.shape_forms import Field, Form, turned
from yolov7_deploy.dataset.shape_textures import TEXTURES, direction, smooth_noise
from yolov7_deploy.image import Image

MAX_HIDDEN = 0.3  # of the pixels of an earlier object
TRIES = 12  # places for an object before it is left out
MARGIN_PX = 1.0  # between an object and the border
MAX_BLOBS, MAX_LINES = 5, 5
MAX_NOISE = 3
COLOURS = 48  # random ones to choose from
# Sums of three differences of 0..255: from what is behind, of the two colours of an object, of the background's own.
CONTRAST, WEAK_CONTRAST, WEAK = 190, 110, 0.15
TWO_COLOURS = (60, 300)
BACKGROUND_COLOURS = (20, 160)

Window = tuple[slice, slice]
Colour = IntArray  # [3], blue, green, red


class ShapeCanvas:
    """A square picture in the making; every choice comes from `rng`, in the order of the calls."""

    def __init__(self, size: int, *, rng: np.random.Generator) -> None:
        """A background: soft colours, irregular blobs of texture and lines."""
        self._size, self._rng = size, rng
        self._owner = np.zeros((size, size), dtype=np.int64)  # the object that a pixel belongs to, from 1
        self._areas: list[int] = [0]
        first = rng.integers(30, 226, size=3)
        second = self._colour(near=first, between=BACKGROUND_COLOURS)
        self._pixels = np.empty((3, size, size), dtype=np.float32)  # planes: steps over three values are slow
        clouds = smooth_noise((size, size), cell_px=size / int(rng.integers(1, 5)), rng=rng)
        self._pixels[:] = _mixed(first, second, clouds)
        for _ in range(int(rng.integers(MAX_BLOBS, endpoint=True))):
            self._add_blob()
        for _ in range(int(rng.integers(MAX_LINES, endpoint=True))):
            self._add_line()

    def add(self, form: Form, *, side: float) -> DoubleArray | None:
        """Paints a form whose box has this longer side, turned at random; gives its outline in pixels, [K, 2] xy.

        `None`, and nothing painted, where every place tried would hide too much of another object.
        """
        cosine, sine = direction(self._rng)
        outline = turned(form.outline, cosine, sine)
        scale = min(side, self._size - 2 * MARGIN_PX) / float(np.ptp(outline, axis=0).max())
        outline *= scale
        low, high = MARGIN_PX - outline.min(axis=0), self._size - MARGIN_PX - outline.max(axis=0)
        for _ in range(TRIES):
            centre = low + (high - low) * self._rng.random(2)
            window, x, y = self._around(centre, math.ceil(scale) + 2)
            distance = form.distance((cosine * x + sine * y) * (1 / scale), (cosine * y - sine * x) * (1 / scale))
            covered = distance < 0
            if self._is_fair(window, covered):
                self._paint_object(window, x, y, distance * scale, side)
                placed: DoubleArray = outline + centre
                return placed
        return None

    def picture(self) -> Image:
        """What a camera makes of it: a little blurred and noisy, uint8 BGR [size, size, 3]."""
        pixels = _blurred(self._pixels, 0.25 * self._rng.random())
        strength = int(self._rng.integers(MAX_NOISE, endpoint=True))
        pixels += self._rng.integers(-strength, strength, endpoint=True, size=pixels.shape[1:], dtype=np.int8)
        np.rint(np.clip(pixels, 0, 255, out=pixels), out=pixels)
        image: Image = np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0))
        return image

    def _around(self, centre: DoubleArray, reach: int) -> tuple[Window, Field, Field]:
        """The part of the picture up to `reach` pixels from the centre, and its x [1, w] and y [h, 1] from there."""
        low = np.maximum(np.floor(centre).astype(int) - reach, 0)
        high = np.minimum(np.floor(centre).astype(int) + reach + 1, self._size)
        x, y = (np.arange(low[i], high[i]) + 0.5 - centre[i] for i in range(2))
        window = slice(low[1], high[1]), slice(low[0], high[0])
        return window, x.astype(np.float32)[None, :], y.astype(np.float32)[:, None]

    def _is_fair(self, window: Window, covered: BoolArray) -> bool:
        """Whether enough stays visible of every earlier object."""
        hidden = np.bincount(self._owner[window][covered], minlength=len(self._areas))
        visible = np.bincount(self._owner.ravel(), minlength=len(self._areas)) if hidden[1:].any() else hidden
        return all(visible[i] - hidden[i] >= (1 - MAX_HIDDEN) * self._areas[i] for i in np.flatnonzero(hidden[1:]) + 1)

    def _paint_object(self, window: Window, x: Field, y: Field, distance: Field, side: float) -> None:
        covered = distance < 0
        behind = self._mean(window, covered)
        wanted = WEAK_CONTRAST if self._rng.random() < WEAK else CONTRAST
        first = self._colour(near=behind, between=(wanted, 765))
        second = self._colour(near=first, between=TWO_COLOURS, away_from=behind, least=wanted)
        softness = 0.8 + 0.8 * self._rng.random()
        self._paint(window, np.clip(0.5 - distance / softness, 0, 1), _mixed(first, second, self._texture(x, y, side)))
        self._owner[window][covered] = len(self._areas)
        self._areas.append(int(np.count_nonzero(covered)))

    def _add_blob(self) -> None:
        """A patch without any form, in colours that are not far from what is behind it."""
        reach = self._size * (0.08 + 0.22 * self._rng.random())
        window, x, y = self._around(self._rng.random(2) * self._size, math.ceil(1.3 * reach))
        rough = smooth_noise((len(y), x.shape[1]), cell_px=reach * (0.3 + 0.4 * self._rng.random()), rng=self._rng)
        inside = 1 - (x * x + y * y) / (reach * reach)
        share = np.clip((inside + 1.5 * (rough - 0.6)) * (1 + 5 * self._rng.random()), 0, 1)
        behind = self._mean(window, share > 0)
        first, second = (self._colour(near=behind, between=BACKGROUND_COLOURS) for _ in range(2))
        self._paint(window, share, _mixed(first, second, self._texture(x, y, reach)))

    def _add_line(self) -> None:
        """A straight line of one to three pixels between any two points."""
        start, end = self._rng.random((2, 2)) * self._size
        middle, half = (start + end) / 2, (end - start) / 2
        window, x, y = self._around(middle, math.ceil(float(np.abs(half).max())) + 3)
        length = max(1e-3, float(half[0] * half[0] + half[1] * half[1]))
        along = np.clip((x * float(half[0]) + y * float(half[1])) * (1 / length), -1, 1)
        across_x, across_y = x - along * float(half[0]), y - along * float(half[1])
        distance = np.sqrt(across_x * across_x + across_y * across_y) - (0.5 + self._rng.random())
        colour = self._colour(near=self._mean(window, distance < 1), between=(60, 400))
        self._paint(window, np.clip(0.5 - distance, 0, 1), _mixed(colour, colour, np.zeros_like(distance)))

    def _texture(self, x: Field, y: Field, extent: float) -> Field:
        return TEXTURES[int(self._rng.integers(len(TEXTURES)))](x, y, extent, self._rng)

    def _paint(self, window: Window, share: Field, colours: Field) -> None:
        pixels = self._pixels[:, window[0], window[1]]
        change = colours - pixels
        change *= share
        pixels += change

    def _mean(self, window: Window, chosen: BoolArray) -> Colour:
        """The mean colour of a quarter of the chosen pixels; a sum of whole numbers is the same in any order."""
        pixels = self._pixels[:, window[0], window[1]][:, ::2, ::2][:, chosen[::2, ::2]].astype(np.int64)
        mean: Colour = pixels.sum(axis=1) // max(1, pixels.shape[1])
        return mean

    def _colour(
        self, *, near: Colour, between: tuple[int, int], away_from: Colour | None = None, least: int = 0
    ) -> Colour:
        """A random colour whose difference from `near` is between two numbers, or comes next to that."""
        colours = self._rng.integers(0, 256, size=(COLOURS, 3))
        away = np.abs(colours - near).sum(axis=1)
        missing = np.maximum(between[0] - away, 0) + np.maximum(away - between[1], 0)
        if away_from is not None:
            missing += 3 * np.maximum(least - np.abs(colours - away_from).sum(axis=1), 0)
        best: Colour = colours[int(np.argmin(missing))]
        return best


def _mixed(first: Colour, second: Colour, share: Field) -> Field:
    """From the first colour where the share is 0 to the second where it is 1, [3, H, W]."""
    start, end = (colour.astype(np.float32)[:, None, None] for colour in (first, second))
    mixed: Field = (end - start) * share
    mixed += start
    return mixed


def _blurred(pixels: Field, share: float) -> Field:
    """Each value of [3, H, W] with this share of both its neighbours, first in y and then in x; the border repeats."""
    for axis in (1, 2):
        planes = pixels.swapaxes(1, axis)
        part = planes * share
        planes = planes * (1 - 2 * share)
        planes[:, 1:] += part[:, :-1]
        planes[:, :-1] += part[:, 1:]
        planes[:, [0, -1]] += part[:, [0, -1]]
        pixels = planes.swapaxes(1, axis)
    return pixels
