"""Images and labels of a dataset, resized for training, with an optional cache of decoded images in memory."""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yolov7_deploy._text import get_logger
from yolov7_deploy.datasets import Dataset
from yolov7_deploy.datasets.samples import IntArray, Labels
from yolov7_deploy.errors import DatasetError, DeviceError, ImageError
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.training.sample import NO_POLYGON, FlatObjects, Objects, unflatten


class ImageCache:
    """Shared memory for decoded images; which images it can hold is decided before any is decoded.

    The memory is an anonymous shared mapping, created before worker processes are forked, so that all workers see an
    image that one of them has decoded; it does not use /dev/shm. The system allocates pages when they are written.
    There is no lock: two workers that store the same image write the same bytes, and its flag is set after its pixels.
    """

    def __init__(self, sizes: IntArray, *, cache_bytes: int, seed: int) -> None:
        """Choose the images, at random if not all fit, and reserve the memory.

        Args:
            sizes: int64 [N], bytes of each image; 0 for an image that is never cached.
            cache_bytes: Upper limit of the memory for images; 0 disables the cache.
            seed: Random seed of the choice.

        Raises:
            DeviceError: The system cannot reserve this much memory.
        """
        order = np.random.default_rng(seed).permutation(len(sizes))
        fitting = order[np.cumsum(sizes[order]) <= cache_bytes]
        chosen = np.sort(fitting[sizes[fitting] > 0])
        ends = np.cumsum(sizes[chosen])
        self.reserved_bytes = int(ends[-1]) if len(ends) else 0
        self._offsets = np.full(len(sizes), -1, dtype=np.int64)
        self._offsets[chosen] = ends - sizes[chosen]
        self._memory = _reserve(self.reserved_bytes + len(sizes)) if len(chosen) else None

    def __len__(self) -> int:
        return int(np.count_nonzero(self._offsets >= 0))

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the memory, which only forked processes share; other processes decode every time."""
        return {**self.__dict__, "_memory": None}

    def is_reserved(self, index: int) -> bool:
        """Return whether memory is reserved for the image, filled or not."""
        return bool(self._offsets[index] >= 0)

    def get(self, index: int, hw: tuple[int, int]) -> Image | None:
        """Return the image as a view [h, w, 3] that must not be modified; `None` if it is not cached yet."""
        if self._memory is None or not self._memory[self.reserved_bytes + index]:
            return None
        return self._view(self._memory, index, hw)

    def put(self, index: int, image: Image) -> None:
        """Store the image."""
        if self._memory is not None:
            self._view(self._memory, index, image.shape[:2])[:] = image
            self._memory[self.reserved_bytes + index] = 1

    def _view(self, memory: mmap.mmap, index: int, hw: tuple[int, ...]) -> Image:
        height, width = hw
        offset, size = int(self._offsets[index]), height * width * 3
        return np.frombuffer(memory, dtype=np.uint8, count=size, offset=offset).reshape(height, width, 3)


def _reserve(size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size)
    except (OSError, OverflowError, ValueError) as error:
        raise DeviceError(
            f"{size / 1e9:.1f} GB for decoded images cannot be reserved: {error}.", fix="Use a smaller cache."
        ) from error


NO_LABELS = Labels(
    boxes=np.zeros((0, 4)), class_ids=np.zeros(0, dtype=np.int64), crowd=np.zeros(0, dtype=np.bool_), polygons=()
)
REDUCTION_FACTORS = (8, 4, 2)  # by which a JPEG decoder can reduce an image while decoding

logger = get_logger(__name__)


class ImageStore:
    """Images resized so that the longer side is `size`, and their objects in resized pixels, without crowd boxes.

    Sizes and objects are available without decoding. An image whose header cannot be read is listed as [size, size]
    without objects, and loading its pixels raises.

    Attributes:
        size: The longer side; smaller images are enlarged.
    """

    def __init__(self, dataset: Dataset, *, size: int, cache_bytes: int = 0, seed: int = 0) -> None:
        """Read image headers (unless the annotations have the sizes), and reserve the cache.

        Args:
            dataset: Images and labels.
            size: The longer side in pixels.
            cache_bytes: Memory for decoded, resized images; 0 disables the cache.
            seed: Random seed for the choice of cached images if not all fit.

        Raises:
            DatasetError: No image can be read.
            DeviceError: There is not enough memory for the cache.
        """
        started = time.perf_counter()
        self.size = size
        self._paths = [dataset.path(i) for i in range(len(dataset))]
        self._unreadable: dict[int, str] = {}
        self._collect_labels(dataset)
        if len(self._unreadable) == len(self):
            raise _no_readable_image(self._paths, self._unreadable)
        sizes = self._hw.prod(axis=1) * 3
        sizes[list(self._unreadable)] = 0
        self._cache = ImageCache(sizes, cache_bytes=cache_bytes, seed=seed)
        seconds = time.perf_counter() - started
        logger.info("%d images of %s, %d cached, %.1f s", len(self), dataset.source, len(self._cache), seconds)

    def _collect_labels(self, dataset: Dataset) -> None:
        """Collect sizes and labels in a few arrays: a million small ones would be copied into every worker process."""
        source_hw = np.array([self._header_hw(dataset, index) for index in range(len(self))], dtype=np.int64)
        ratios = self.size / source_hw.max(axis=1, keepdims=True)
        self._source_hw, self._hw = source_hw, np.maximum((source_hw * ratios).astype(np.int64), 1)
        parts = [
            _flat_labels(NO_LABELS if index in self._unreadable else dataset.record(index).labels)
            for index in range(len(self))
        ]
        counts = np.concatenate([part.counts for part in parts])
        lengths = [len(part) for part in parts]
        image_wh = np.repeat(self._hw[:, ::-1], lengths, axis=0).astype(np.float32)  # of each object
        boxes = np.concatenate([part.boxes for part in parts])
        points = np.concatenate([part.points for part in parts])
        self._flat = FlatObjects(
            boxes=np.clip(boxes, 0, 1, out=boxes) * np.tile(image_wh, 2),
            class_ids=np.concatenate([part.class_ids for part in parts]),
            points=np.clip(points, 0, 1, out=points) * np.repeat(image_wh, counts, axis=0),
            counts=counts,
        )
        self._object_offsets = np.concatenate([[0], np.cumsum(lengths)])
        self._point_offsets = np.concatenate([[0], np.cumsum(counts)])[self._object_offsets]

    def _header_hw(self, dataset: Dataset, index: int) -> tuple[int, int]:
        try:
            return dataset.image_hw(index)
        except ImageError as error:
            self._unreadable[index] = error.message
            return self.size, self.size

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> Path:
        """Return the image file."""
        return self._paths[index]

    def hw(self, index: int) -> tuple[int, int]:
        """Return height and width of the resized image."""
        height, width = self._hw[index].tolist()
        return height, width

    def flat_objects(self, index: int) -> FlatObjects:
        """Return the objects in resized pixels, as views that must not be modified."""
        first, last = self._object_offsets[index : index + 2]
        start, end = self._point_offsets[index : index + 2]
        return FlatObjects(
            boxes=self._flat.boxes[first:last],
            class_ids=self._flat.class_ids[first:last],
            points=self._flat.points[start:end],
            counts=self._flat.counts[first:last],
        )

    def objects(self, index: int) -> Objects:
        """Return the objects in resized pixels, as views that must not be modified."""
        return unflatten(self.flat_objects(index))

    def load_resized(self, index: int) -> Image:
        """Return the image, uint8 BGR with the size `hw(index)`, and cache it; it must not be modified.

        Raises:
            ImageError: The image cannot be read.
        """
        hw = self.hw(index)
        is_cached = self._cache.is_reserved(index)
        image = self._cache.get(index, hw) if is_cached else None
        if image is None:
            image = _resize_exactly(*self._decode(index, 1.0), hw)
            if is_cached:
                self._cache.put(index, image)
        return image

    def load_scaled(self, index: int, *, scale: float = 1.0) -> tuple[Image, tuple[float, float]]:
        """Return the image in a size that is cheap to load, for a caller that warps it anyway.

        If `scale` makes it much smaller, pixels are averaged first (by the decoder, if the image is not cached), which
        is faster and does not alias. The result depends on whether memory is reserved for the image, not on whether it
        is filled, so batches do not depend on which worker loads an image first.

        Args:
            index: Index of the image.
            scale: Scale at which the resized image will be shown.

        Returns:
            uint8 BGR [H, W, 3] that must not be modified, and its pixels per pixel of the resized image along x and y.
            The corners of both images coincide.

        Raises:
            ImageError: The image cannot be read.
        """
        if self._cache.is_reserved(index):
            image, step = self.load_resized(index), reduction_factor(scale)
            if step > 1:
                # With a scale instead of a size, pixels that are cut off at the far edges keep their size.
                image = cv2.resize(image, None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
            return image, (1 / step, 1 / step)
        return self._decode(index, scale)

    def _decode(self, index: int, scale: float) -> tuple[Image, tuple[float, float]]:
        """Decode the image without the cache; see `load_scaled`."""
        if index in self._unreadable:
            raise ImageError(self._unreadable[index])
        source, ratios = self._source_hw[index].tolist(), (self._source_hw[index] / self._hw[index]).tolist()
        step = reduction_factor(scale / max(ratios))
        image = read_image(self._paths[index], reduced=step)
        # If a side is not a multiple of `step`, decoders average the remaining pixels to one, or drop them.
        if any(
            short not in (max(1, long // step), -(-long // step))
            for short, long in zip(image.shape, source, strict=False)
        ):
            raise ImageError(
                f"{self._paths[index]} does not have the {source[0]}x{source[1]} pixels of its annotation.",
                fix="Use the annotation file of these images.",
            )
        factor_y, factor_x = (
            ratio * (1 / step if short == -(-long // step) else short / long)
            for ratio, short, long in zip(ratios, image.shape, source, strict=False)
        )
        return image, (factor_x, factor_y)

    def require_readable_image(self) -> None:
        """Check that at least one image can be read; tries them in order.

        Raises:
            DatasetError: No image can be read.
        """
        for index in range(len(self)):
            try:
                self.load_scaled(index, scale=1 / max(REDUCTION_FACTORS))
            except ImageError as error:
                self._unreadable.setdefault(index, error.message)
                continue
            return
        raise _no_readable_image(self._paths, self._unreadable)


def _resize_exactly(image: Image, factors_xy: tuple[float, float], hw: tuple[int, int]) -> Image:
    """Resize an image to `hw`; `factors_xy` are its pixels per pixel of the result."""
    height, width = hw
    if all(
        abs(f * side - n) < 1e-6 for f, side, n in zip(factors_xy, (width, height), image.shape[1::-1], strict=True)
    ):
        same = image.shape[:2] == hw
        return image if same else cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]
    # The last pixel is incomplete: `cv2.resize` would stretch it to a complete one.
    inverse = np.array([[f, 0, f / 2 - 0.5] for f in factors_xy])
    inverse[1] = inverse[1, [1, 0, 2]]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, inverse, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[return-value]


def _flat_labels(labels: Labels) -> FlatObjects:
    """Return the labels of one image without crowd boxes, in fractions of width and height."""
    labels = labels.without_crowd()
    polygons = [polygon if len(polygon) > 2 else NO_POLYGON for polygon in labels.polygons]
    return FlatObjects(
        boxes=labels.boxes.astype(np.float32),
        class_ids=labels.class_ids,
        points=np.concatenate([NO_POLYGON, *polygons]).astype(np.float32),
        counts=np.array([len(polygon) for polygon in polygons], dtype=np.int64),
    )


def reduction_factor(scale: float) -> int:
    """Return the factor by which an image can be reduced before it is shown at `scale`: 1, 2, 4 or 8."""
    return next((step for step in REDUCTION_FACTORS if scale * step <= 1), 1)


def _no_readable_image(paths: list[Path], reasons: dict[int, str]) -> DatasetError:
    first = f" The first: {reasons[0]}" if 0 in reasons else ""
    return DatasetError(
        f"None of the {len(paths)} training images can be read.{first}",
        fix="Check the images that `train` of the dataset YAML names.",
    )


class ImageReader:
    """Loads images from a store; an unreadable image is recorded and returned as `None`, so that training continues.

    Attributes:
        store: Images, their sizes and objects.
        problems: The reason for each unreadable image, by index.
        has_read: True once an image has been read.
    """

    def __init__(self, store: ImageStore) -> None:
        self.store = store
        self.problems: dict[int, str] = {}
        self.has_read = False

    def load_resized(self, index: int) -> Image | None:
        """Return `ImageStore.load_resized`, or `None`."""
        try:
            image = self.store.load_resized(index)
        except ImageError as error:
            self.problems[index] = error.message
            return None
        self.has_read = True
        return image

    def load_scaled(self, index: int, *, scale: float) -> tuple[Image, tuple[float, float]] | None:
        """Return `ImageStore.load_scaled`, or `None`."""
        try:
            scaled = self.store.load_scaled(index, scale=scale)
        except ImageError as error:
            self.problems[index] = error.message
            return None
        self.has_read = True
        return scaled
