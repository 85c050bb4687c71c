"""A picture to measure with where none is at hand."""

from __future__ import annotations

import numpy as np

from yolov7_deploy.image import Image


def drawn_picture(input_hw: tuple[int, int], *, seed: int = 7) -> Image:
    """A deterministic picture of shaded rectangles and discs; lower than the input, so that it is padded."""
    height, width = max(8, input_hw[0] * 3 // 4), input_hw[1]
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    picture = np.stack([rows / height, columns / width, (rows + columns) / (height + width)], -1) * 200
    for number in range(24):
        y, x = rng.uniform(0, (height, width))
        half_h, half_w = rng.uniform(0.02, 0.25, 2) * (height, width)
        inside = (np.abs(rows - y) < half_h) & (np.abs(columns - x) < half_w)
        if number % 2:
            inside = ((rows - y) / half_h) ** 2 + ((columns - x) / half_w) ** 2 < 1
        picture[inside] = rng.uniform(0, 255, 3) * (0.7 + 0.3 * np.sin(columns[inside] / 3))[:, None]
    return picture.clip(0, 255).astype(np.uint8)
