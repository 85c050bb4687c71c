"""The images and labels of a dataset at the size of training."""

from __future__ import annotations

import logging
import mmap
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yolov7_deploy.datasets import Dataset
from yolov7_deploy.datasets.samples import IntArray, Labels
from yolov7_deploy.errors import DatasetError, DeviceError, ImageError
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.training.objects import FlatObjects, unflattened
from yolov7_deploy.training.sample import NO_POLYGON, Objects


class ImageCache:
    """A place for each image that fits, known before any is decoded.

    The memory is anonymous and shared, made before worker processes are forked, so that an image decoded by one is
    there for all; it does not count as /dev/shm. Pages are taken as they are filled. There is no lock: two workers
    that fill one place write the same bytes, and the flag of a place is set after its pixels.
    """

    def __init__(self, sizes: IntArray, *, cache_bytes: int, seed: int) -> None:
        """Chooses the images, at random where not all fit, and reserves the memory.

        Args:
            sizes: int64 [N], bytes of each image; 0 for one that needs no place.
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
        """Whether the image has a place, filled or not."""
        return bool(self._places[index] >= 0)

    def get(self, index: int, hw: tuple[int, int]) -> Image | None:
        """The image, a view [h, w, 3] that nobody may write; `None` where it is not there yet."""
        if self._memory is None or not self._memory[self.filled_bytes + index]:
            return None
        return self._view(self._memory, index, hw)

    def put(self, index: int, image: Image) -> None:
        """Fills the place of the image."""
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
            f"{size / 1e9:.1f} GB for decoded images cannot be reserved: {error}.", fix="Give the cache less memory."
        ) from error


NO_LABELS = Labels(
    boxes=np.zeros((0, 4)), class_ids=np.zeros(0, dtype=np.int64), crowd=np.zeros(0, dtype=np.bool_), polygons=()
)
REDUCTIONS = (8, 4, 2)  # what a JPEG decoder can do while it decodes

_log = logging.getLogger(__name__)


class ImageStore:
    """Images resized so that the longer side is `size`, and their objects in resized pixels without crowd boxes.

    Sizes and objects are known without decoding. An image whose header cannot be read counts as an empty one of
    [size, size], and asking for its pixels raises.

    Attributes:
        size: The longer side, also of images that were smaller.
    """

    def __init__(self, dataset: Dataset, *, size: int, cache_bytes: int = 0, seed: int = 0) -> None:
        """Reads the headers of the images (where the annotations do not say their sizes), and reserves the cache.

        Args:
            dataset: Images and labels.
            size: The longer side in pixels.
            cache_bytes: For decoded, resized images; 0 is off.
            seed: Chooses the images of the cache where not all fit.

        Raises:
            DatasetError: No image can be read.
            DeviceError: There is not so much memory for the cache.
        """
        started = time.perf_counter()
        self.size = size
        self._paths = [dataset.path(i) for i in range(len(dataset))]
        self._wrong: dict[int, str] = {}
        self._collect(dataset)
        if len(self._wrong) == len(self):
            raise _no_images(self._paths, self._wrong)
        sizes = self._hw.prod(axis=1) * 3
        sizes[list(self._wrong)] = 0
        self._cache = ImageCache(sizes, cache_bytes=cache_bytes, seed=seed)
        seconds = time.perf_counter() - started
        _log.info("%d images of %s, %d cached, %.1f s", len(self), dataset.source, len(self._cache), seconds)

    def _collect(self, dataset: Dataset) -> None:
        """Sizes, and all labels in a few arrays: a million small ones would be copied into every worker process."""
        sides = np.array([self._header_hw(dataset, index) for index in range(len(self))], dtype=np.int64)
        ratios = self.size / sides.max(axis=1, keepdims=True)
        self._source_hw, self._hw = sides, np.maximum((sides * ratios).astype(np.int64), 1)
        unseen = _in_fractions(NO_LABELS)
        parts = [
            unseen if index in self._wrong else _in_fractions(dataset.record(index).labels)
            for index in range(len(self))
        ]
        counts = np.concatenate([part.counts for part in parts])
        lengths = [len(part) for part in parts]
        size_of_object = np.repeat(self._hw[:, ::-1], lengths, axis=0).astype(np.float32)
        boxes, points = (np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes", "points"))
        self._flat = FlatObjects(
            boxes=np.clip(boxes, 0, 1, out=boxes) * np.tile(size_of_object, 2),
            class_ids=np.concatenate([part.class_ids for part in parts]),
            points=np.clip(points, 0, 1, out=points) * np.repeat(size_of_object, counts, axis=0),
            counts=counts,
        )
        self._object_at = np.concatenate([[0], np.cumsum(lengths)])
        self._point_at = np.concatenate([[0], np.cumsum(counts)])[self._object_at]

    def _header_hw(self, dataset: Dataset, index: int) -> tuple[int, int]:
        try:
            return dataset.image_hw(index)
        except ImageError as error:
            self._wrong[index] = error.message
            return self.size, self.size

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> Path:
        """The image file."""
        return self._paths[index]

    def hw(self, index: int) -> tuple[int, int]:
        """Height and width of the resized image."""
        height, width = self._hw[index].tolist()
        return height, width

    def flat_objects(self, index: int) -> FlatObjects:
        """The objects in resized pixels; views that nobody may write."""
        first, last = self._object_at[index : index + 2]
        start, end = self._point_at[index : index + 2]
        return FlatObjects(
            boxes=self._flat.boxes[first:last],
            class_ids=self._flat.class_ids[first:last],
            points=self._flat.points[start:end],
            counts=self._flat.counts[first:last],
        )

    def objects(self, index: int) -> Objects:
        """The objects in resized pixels; views that nobody may write."""
        return unflattened(self.flat_objects(index))

    def resized(self, index: int) -> Image:
        """The image as uint8 BGR of `hw(index)`, from the cache or into it; nobody may write into it.

        Raises:
            ImageError: It cannot be read.
        """
        hw = self.hw(index)
        held = self._cache.holds(index)
        image = self._cache.get(index, hw) if held else None
        if image is None:
            image = _of_size(*self._decoded(index, 1.0), hw)
            if held:
                self._cache.put(index, image)
        return image

    def image(self, index: int, *, scale: float = 1.0) -> tuple[Image, tuple[float, float]]:
        """The image as large as it is cheap to have, for one who warps it anyway.

        Where `scale` makes it much smaller, whole pixels are averaged first (by the decoder, where the image has no
        place in the cache), which takes less time and does not alias. What comes depends on whether an image has a
        place, never on whether the place is filled: batches do not depend on which worker was first.

        Args:
            index: Which image.
            scale: How much larger than the resized image it will be shown.

        Returns:
            uint8 BGR [H, W, 3] that nobody may write, and how many of its pixels, along x and along y, are one pixel
            of the resized image. Corner lies on corner.

        Raises:
            ImageError: It cannot be read.
        """
        if self._cache.holds(index):
            image, step = self.resized(index), reduction(scale)
            if step > 1:
                # With these scales instead of a size, pixels cut off at the far edges keep their size.
                image = cv2.resize(image, None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
            return image, (1 / step, 1 / step)
        return self._decoded(index, scale)

    def _decoded(self, index: int, scale: float) -> tuple[Image, tuple[float, float]]:
        """See `image`; whatever is cached."""
        if index in self._wrong:
            raise ImageError(self._wrong[index])
        source, ratios = self._source_hw[index].tolist(), (self._source_hw[index] / self._hw[index]).tolist()
        step = reduction(scale / max(ratios))
        image = read_image(self._paths[index], reduced=step)
        # Of a side that is no multiple of `step`, decoders make the last pixel of what is left, or leave that out.
        if any(
            short not in (max(1, long // step), -(-long // step))
            for short, long in zip(image.shape, source, strict=False)
        ):
            raise ImageError(
                f"{self._paths[index]} has not the {source[1]}x{source[0]} pixels that the annotations say.",
                fix="Use the annotations of these images.",
            )
        factor_y, factor_x = (
            ratio * (1 / step if short == -(-long // step) else short / long)
            for ratio, short, long in zip(ratios, image.shape, source, strict=False)
        )
        return image, (factor_x, factor_y)

    def require_a_image(self) -> None:
        """Returns when any image can be read, after trying them in their order.

        Raises:
            DatasetError: None can.
        """
        for index in range(len(self)):
            try:
                self.image(index, scale=1 / max(REDUCTIONS))
            except ImageError as error:
                self._wrong.setdefault(index, error.message)
                continue
            return
        raise _no_images(self._paths, self._wrong)


def _of_size(image: Image, factors_xy: tuple[float, float], hw: tuple[int, int]) -> Image:
    """The image resized, where `factors_xy` of its pixels are one of the result."""
    height, width = hw
    if all(
        abs(f * side - n) < 1e-6 for f, side, n in zip(factors_xy, (width, height), image.shape[1::-1], strict=True)
    ):
        same = image.shape[:2] == hw
        return image if same else cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]
    # The last pixel is not whole: OpenCV's resize would squeeze it in.
    back = np.array([[f, 0, f / 2 - 0.5] for f in factors_xy])
    back[1] = back[1, [1, 0, 2]]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, back, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[return-value]


def _in_fractions(labels: Labels) -> FlatObjects:
    """The labels of one image without crowd boxes, in fractions of its sides."""
    kept = ~labels.crowd
    polygons = [
        polygon if len(polygon) > 2 else NO_POLYGON
        for polygon, keep in zip(labels.polygons, kept.tolist(), strict=True)
        if keep
    ]
    return FlatObjects(
        boxes=labels.boxes[kept].astype(np.float32),
        class_ids=labels.class_ids[kept],
        points=np.concatenate([NO_POLYGON, *polygons]).astype(np.float32),
        counts=np.array([len(polygon) for polygon in polygons], dtype=np.int64),
    )


def reduction(scale: float) -> int:
    """By how much an image may be smaller before it is shown `scale` times as large: 1, 2, 4 or 8."""
    return next((step for step in REDUCTIONS if scale * step <= 1), 1)


def _no_images(paths: list[Path], wrong: dict[int, str]) -> DatasetError:
    first = f" The first: {wrong[0]}" if 0 in wrong else ""
    return DatasetError(
        f"None of the {len(paths)} images for training can be read.{first}",
        fix="Check the images that `train` of the dataset YAML names.",
    )


class ImageReader:
    """Reads from a store; an image that cannot be read is `None` and remembered, and training goes on.

    Attributes:
        store: Where sizes and objects are.
        problems: What could not be read and why, by index.
        has_read: An image could be read.
    """

    def __init__(self, store: ImageStore) -> None:
        self.store = store
        self.problems: dict[int, str] = {}
        self.has_read = False

    def resized(self, index: int) -> Image | None:
        """See `ImageStore.resized`."""
        try:
            image = self.store.resized(index)
        except ImageError as error:
            self.problems[index] = error.message
            return None
        self.has_read = True
        return image

    def image(self, index: int, *, scale: float) -> tuple[Image, tuple[float, float]] | None:
        """See `ImageStore.image`."""
        try:
            found = self.store.image(index, scale=scale)
        except ImageError as error:
            self.problems[index] = error.message
            return None
        self.has_read = True
        return found
