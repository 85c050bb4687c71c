"""Synthetic images for measurements and comparisons without any image file."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from yolov7_deploy.image import Image

FloatArray = npt.NDArray[np.float32]

IMAGE_HW = (480, 640)
SKY, HORIZON_HAZE = (235, 200, 150), (175, 180, 190)  # blue, green, red
GRASS, ROAD, PAINT, STEEL, RED, WHITE = (
    (60, 120, 80),
    (95, 92, 90),
    (210, 215, 220),
    (150, 150, 150),
    (40, 30, 185),
    (240, 240, 240),
)
STOP = (
    "01110 11111 01110 11110",
    "10001 00100 10001 10001",
    "10000 00100 10001 10001",
    "01110 00100 10001 11110",
    "00001 00100 10001 10000",
    "10001 00100 10001 10000",
    "01110 00100 01110 10000",
)


def street_scene() -> Image:
    """Return a synthetic street scene with a stop sign, which the official weights detect; always the same pixels."""
    height, width = IMAGE_HW
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    image = np.empty((height, width, 3), dtype=np.float32)
    image[:] = SKY + (y / height)[..., None] * (np.array(HORIZON_HAZE, dtype=np.float32) - SKY)
    _draw_ground(image, y, x)
    _draw_sign(image, y, x, centre=(0.36 * height, 0.3 * width), radius=0.15 * height)
    grain = np.random.default_rng(3).normal(0, 6, (height, width, 1))
    return (image + grain).clip(0, 255).astype(np.uint8)


def _draw_ground(image: FloatArray, y: FloatArray, x: FloatArray) -> None:
    """Draw grass, and a road with a dashed line to the horizon."""
    height, width = IMAGE_HW
    horizon = 0.62 * height
    near = (y - horizon) / (height - horizon)  # 0 at the horizon, 1 at the lower edge
    off_centre = np.abs(x - 0.62 * width) / width
    below = near > 0
    image[below] = GRASS
    image[below & (off_centre < 0.04 + 0.55 * near)] = ROAD
    image[below & (off_centre < 0.003 + 0.015 * near) & ((12 * near).astype(int) % 2 == 0)] = PAINT


def _draw_sign(image: FloatArray, y: FloatArray, x: FloatArray, *, centre: tuple[float, float], radius: float) -> None:
    """Draw a red octagon with a white rim and four letters, on a post."""
    dy, dx = np.abs(y - centre[0]), np.abs(x - centre[1])
    image[(dx < 0.08 * radius) & (y > centre[0]) & (y < centre[0] + 3.8 * radius)] = STEEL
    for size, colour in ((radius, WHITE), (0.93 * radius, RED)):
        image[(np.maximum(dx, dy) < size) & (dx + dy < size * math.sqrt(2))] = colour
    dots = np.array([[int(dot) for dot in row.replace(" ", "0")] for row in STOP])
    dot = int(1.5 * radius / dots.shape[1])
    letters = np.kron(dots, np.ones((round(1.3 * dot), dot))) > 0
    top, left = int(centre[0] - letters.shape[0] / 2), int(centre[1] - letters.shape[1] / 2)
    image[top : top + letters.shape[0], left : left + letters.shape[1]][letters] = WHITE


def synthetic_image(input_hw: tuple[int, int], *, seed: int = 7) -> Image:
    """Return an image of shaded rectangles and discs; its height is 3/4 of the input, so that it is padded."""
    height, width = max(8, input_hw[0] * 3 // 4), input_hw[1]
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    image = np.stack([rows / height, columns / width, (rows + columns) / (height + width)], -1) * 200
    for number in range(24):
        y, x = rng.uniform(0, (height, width))
        half_h, half_w = rng.uniform(0.02, 0.25, 2) * (height, width)
        inside = (np.abs(rows - y) < half_h) & (np.abs(columns - x) < half_w)
        if number % 2:
            inside = ((rows - y) / half_h) ** 2 + ((columns - x) / half_w) ** 2 < 1
        image[inside] = rng.uniform(0, 255, 3) * (0.7 + 0.3 * np.sin(columns[inside] / 3))[:, None]
    return image.clip(0, 255).astype(np.uint8)
