"""Detection in chunks of images, in this process or in a worker of a cluster."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ImageError
from yolov7_deploy.image import Image, decode_image, read_image
from yolov7_deploy.scoring.input import Chunk, Item

OpenDetector = Callable[[], Detector]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredChunk:
    """The records of consecutive images.

    Attributes:
        first: Number of the first image in the input.
        records: One line of JSON per image, of `Detections.to_json`.
        worker: The process that made them, `HOST:PROCESS_ID`.
    """

    first: int
    records: tuple[str, ...]
    worker: str


class Scorer:
    """Detects the objects in chunks of images; opens its model at the first chunk.

    Args:
        open_detector: Function that opens the model; it is sent to other processes.
        batch: Number of images in each call of the detector.
    """

    def __init__(self, open_detector: OpenDetector, *, batch: int) -> None:
        self._open, self._batch = open_detector, batch
        self._detector: Detector | None = None
        self._worker = f"{platform.node()}:{os.getpid()}"

    def __call__(self, chunk: Chunk) -> ScoredChunk:
        """Return the records of a chunk; an image that cannot be read has the reason in its record.

        Raises:
            Y7Error: The model cannot be opened or run, or the input cannot be read.
        """
        if self._detector is None:
            self._detector = self._open()
        items, records = chunk.items(), list[str]()
        while part := list(islice(items, self._batch)):
            records += [found.to_json() for found in _detect(self._detector, part)]
        return ScoredChunk(first=chunk.first, records=tuple(records), worker=self._worker)

    def close(self) -> None:
        """Close the model, if it was opened."""
        if self._detector is not None:
            self._detector.close()


def _detect(detector: Detector, items: list[Item]) -> list[Detections]:
    images, found = dict[int, Image](), dict[int, Detections]()
    for index, item in enumerate(items):
        try:
            images[index] = _read(item)
        except ImageError as error:
            found[index] = _unreadable(item, error)
    for index, detections in zip(images, detector.batch(list(images.values())), strict=True):
        found[index] = replace(detections, path=items[index].name)
    return [found[index] for index in range(len(items))]


def _read(item: Item) -> Image:
    if isinstance(item.image, bytes):
        return decode_image(item.image, name=item.name)
    return read_image(item.image)


def _unreadable(item: Item, error: ImageError) -> Detections:
    return Detections(
        boxes=np.zeros((0, 4), dtype=np.float32),
        scores=np.zeros(0, dtype=np.float32),
        class_ids=np.zeros(0, dtype=np.int64),
        class_names=(),
        image_hw=(0, 0),
        path=item.name,
        error=error.message,
    )
