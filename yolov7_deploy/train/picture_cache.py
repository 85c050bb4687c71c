"""Decoded pictures in memory that all worker processes share."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from yolov7_deploy.dataset.samples import IntArray
from yolov7_deploy.errors import DeviceError
from yolov7_deploy.image import Image


class PictureCache:
    """A place for each picture that fits, known before any is decoded.

    The memory is anonymous and shared, made before worker processes are forked, so that a picture decoded by one is
    there for all; it does not count as /dev/shm. Pages are taken as they are filled. There is no lock: two workers
    that fill one place write the same bytes, and the flag of a place is set after its pixels.
    """

    def __init__(self, sizes: IntArray, *, cache_bytes: int, seed: int) -> None:
        """Chooses the pictures, at random where not all fit, and reserves the memory.

        Args:
            sizes: int64 [N], bytes of each picture; 0 for one that needs no place.
            cache_bytes: Not more than this; 0 is no cache.
            seed: Of the choice.

        Raises:
            DeviceError: The system does not give so much memory.
        """
        order = np.random.default_rng(seed).permutation(len(sizes))
        fitting = order[np.cumsum(sizes[order]) <= cache_bytes]
        chosen = np.sort(fitting[sizes[fitting] > 0])
        ends = np.cumsum(sizes[chosen])
        self.filled_bytes = int(ends[-1]) if len(ends) else 0
        self._places = np.full(len(sizes), -1, dtype=np.int64)
        self._places[chosen] = ends - sizes[chosen]
        self._memory = _reserve(self.filled_bytes + len(sizes)) if len(chosen) else None

    def __len__(self) -> int:
        return int(np.count_nonzero(self._places >= 0))

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory, which only forked processes share: another one decodes each time."""
        return {**self.__dict__, "_memory": None}

    def holds(self, index: int) -> bool:
        """Whether the picture has a place, filled or not."""
        return bool(self._places[index] >= 0)

    def get(self, index: int, hw: tuple[int, int]) -> Image | None:
        """The picture, a view [h, w, 3] that nobody may write; `None` where it is not there yet."""
        if self._memory is None or not self._memory[self.filled_bytes + index]:
            return None
        return self._view(self._memory, index, hw)

    def put(self, index: int, image: Image) -> None:
        """Fills the place of the picture."""
        if self._memory is not None:
            self._view(self._memory, index, image.shape[:2])[:] = image
            self._memory[self.filled_bytes + index] = 1

    def _view(self, memory: mmap.mmap, index: int, hw: tuple[int, ...]) -> Image:
        height, width = hw
        place, size = int(self._places[index]), height * width * 3
        return np.frombuffer(memory, dtype=np.uint8, count=size, offset=place).reshape(height, width, 3)


def _reserve(size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size)
    except (OSError, OverflowError, ValueError) as error:
        raise DeviceError(
            f"{size / 1e9:.1f} GB for decoded pictures cannot be reserved: {error}.", fix="Give the cache less memory."
        ) from error
