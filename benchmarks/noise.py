"""A batch of random pixels and boxes for timing training steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from yolov7_deploy.datasets.coco import COCO_NAMES
from yolov7_deploy.training.sample import Batch

OBJECTS = 12  # per image, about as many as a mosaic of COCO images has


def noise_batch(images: int, img: int) -> Batch:
    """Return random images [img, img] with boxes of 80 classes; always the same ones."""
    random, count = np.random.default_rng(0), OBJECTS * images
    sides = random.uniform(0.05, 0.4, (count, 2))
    centres = random.uniform(sides / 2, 1 - sides / 2)
    numbers = [np.repeat(np.arange(images), OBJECTS), random.integers(0, len(COCO_NAMES), count)]
    return Batch(
        images=torch.from_numpy(random.integers(0, 256, (images, img, img, 3), dtype=np.uint8)),
        targets=torch.tensor(np.concatenate([np.stack(numbers, 1), centres, sides], 1), dtype=torch.float32),
        paths=(Path("noise"),),
    )
