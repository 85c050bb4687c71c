"""What augmentation works on: pixels and the objects in them; and what it hands over: a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from yolov7_deploy.datasets.samples import IntArray
from yolov7_deploy.image import FloatArray, Image

NO_POLYGON = np.zeros((0, 2), dtype=np.float32)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objects:
    """The objects of one image or canvas, in its pixels.

    Attributes:
        boxes: float32 [N, 4] xyxy.
        class_ids: int64 [N].
        polygons: Per box its outline, float32 [K, 2] xy; [0, 2] where only a box is known.
    """

    boxes: FloatArray
    class_ids: IntArray
    polygons: tuple[FloatArray, ...]

    def __len__(self) -> int:
        return len(self.class_ids)


NO_OBJECTS = Objects(boxes=np.zeros((0, 4), np.float32), class_ids=np.zeros(0, np.int64), polygons=())


def joined(*parts: Objects) -> Objects:
    """All objects of several, in their order."""
    if len(parts) == 1:
        return parts[0]
    return Objects(
        boxes=np.concatenate([part.boxes for part in parts]),
        class_ids=np.concatenate([part.class_ids for part in parts]),
        polygons=tuple(polygon for part in parts for polygon in part.polygons),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scene:
    """An image, uint8 BGR [H, W, 3], and the objects in it."""

    image: Image
    objects: Objects


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What one training step looks at.

    Attributes:
        images: uint8 RGB [B, H, W, 3]; channels last, so that a device makes floats of it in one pass.
        targets: float32 [N, 6]: image in the batch, class, centre x, centre y, width, height; the last four in
            fractions of width and height.
        paths: The first image of each scene, for messages.
        problems: The images that could not be read for this batch, and why.
    """

    images: Tensor
    targets: Tensor
    paths: tuple[Path, ...]
    problems: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (the name that torch's loader looks for)."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())
