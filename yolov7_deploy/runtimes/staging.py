"""Staging memory for the upload before each run: thresholds, a table of the frames, and their pixels.

All of it is in one block of page-locked memory with a copy on the GPU. A run therefore needs one upload, and thresholds
and geometry change without a new CUDA graph. Writing a 1080p frame into page-locked memory takes the host about as long
as the copy to the GPU, so large uploads are split: the GPU copies one piece while the host writes the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from yolov7_deploy.image import Image, Letterbox
from yolov7_deploy.metadata import THRESHOLD_INPUTS
from yolov7_deploy.options import Thresholds, threshold_values
from yolov7_deploy.runtimes.cuda import Array, Cuda, DeviceBuffer, PinnedBuffer
from yolov7_deploy.runtimes.device_arrays import GpuImage
from yolov7_deploy.runtimes.letterbox_kernel import FRAME, RowPlan, frame_of, row_plan

Bytes = npt.NDArray[np.uint8]

PIECE_BYTES = 2**20  # 0.1 ms on the host and on the GPU; queueing a copy takes a few microseconds
_ALIGNMENT = 256  # bytes, which TensorRT requires for every tensor
# Each threshold has its own aligned address, because each is an input of the engine.
_FRAMES_START = len(THRESHOLD_INPUTS) * _ALIGNMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class _StagedImage:
    """Place of the rows and of the row table of a host image in the staging memory, in bytes.

    Attributes:
        index: Number of the image in its call.
        row_count, pitch: Number of rows to upload, and bytes of a row.
    """

    index: int
    plan: RowPlan | None
    table_start: int
    rows_start: int
    row_count: int
    pitch: int

    @property
    def end(self) -> int:
        return self.rows_start + self.row_count * self.pitch


class Staging:
    """Page-locked memory and its copy on the GPU; both grow with the images.

    Args:
        cuda: CUDA on the thread's GPU.
        batch: Largest batch size.

    Attributes:
        host: The page-locked memory, uint8; a new array after it has grown.
        device: The memory on the GPU; a new object after it has grown.
        used: Bytes that the next run uploads.
    """

    def __init__(self, cuda: Cuda, batch: int) -> None:
        self._cuda = cuda
        self._head = align(_FRAMES_START + batch * FRAME.itemsize)
        self._staged: list[_StagedImage] = []
        self._images: Sequence[Image | GpuImage] = ()
        self.used = self._head
        self._allocate(self._head)

    def _allocate(self, nbytes: int) -> None:
        self._placed: tuple[Sequence[Letterbox], int] | None = None
        self.device = DeviceBuffer(self._cuda, (nbytes,), np.uint8)
        self._pinned = PinnedBuffer(self._cuda, (nbytes,), np.uint8)
        self.host: Bytes = self._pinned.array

    @property
    def threshold_addresses(self) -> tuple[int, ...]:
        """GPU addresses of the `THRESHOLD_INPUTS`, float32 [1] each."""
        return tuple(self.device.pointer + index * _ALIGNMENT for index in range(len(THRESHOLD_INPUTS)))

    @property
    def frames_address(self) -> int:
        """GPU address of the table of `FRAME` records."""
        return self.device.pointer + _FRAMES_START

    def set_thresholds(self, thresholds: Thresholds) -> None:
        """Write the thresholds of the next run."""
        for index, value in enumerate(threshold_values(thresholds)):
            start = index * _ALIGNMENT
            self.host[start : start + 4].view(np.float32)[0] = value

    def layout(self, images: Sequence[Image | GpuImage], letterboxes: Sequence[Letterbox], *, batch: int) -> bool:
        """Assign memory to images and write the table of frames; its last entry is repeated to fill the batch.

        Tables come before pixels, so that the first piece of the upload contains all of them. Nothing changes for host
        images of the same sizes as those of the run before, as in a video.

        Returns:
            True if the addresses on the GPU have changed.

        Raises:
            DeviceError: Out of memory.
        """
        self._images = images
        placed = (letterboxes, batch)
        if placed == self._placed and len(self._staged) == len(images) and not _any_on_gpu(images):
            return False
        on_host = [
            (index, letterbox, row_plan(letterbox))
            for index, (image, letterbox) in enumerate(zip(images, letterboxes, strict=True))
            if not isinstance(image, GpuImage)
        ]
        sizes = [align(plan.table.nbytes) if plan else 0 for _, _, plan in on_host]
        tables = np.cumsum([self._head, *sizes]).tolist()
        self._staged, rows_start = [], tables[-1]
        for (index, letterbox, plan), table_start in zip(on_host, tables[:-1], strict=True):
            height, width = letterbox.source_hw
            staged = _StagedImage(
                index=index,
                plan=plan,
                table_start=table_start,
                rows_start=rows_start,
                row_count=len(plan.rows) if plan else height,
                pitch=3 * width,
            )
            self._staged.append(staged)
            rows_start = align(staged.end)
        self.used = self._staged[-1].end if self._staged else self._head
        moved = self.reserve(self.used)
        self._write_tables(images, letterboxes, batch)
        self._placed = placed
        return moved

    def _write_tables(self, images: Sequence[Image | GpuImage], letterboxes: Sequence[Letterbox], batch: int) -> None:
        base, remaining = self.device.pointer, iter(self._staged)
        frames = self.host[_FRAMES_START : _FRAMES_START + batch * FRAME.itemsize].view(FRAME)
        for number, (image, letterbox) in enumerate(zip(images, letterboxes, strict=True)):
            if isinstance(image, GpuImage):
                frames[number] = frame_of(letterbox, pixels=image.pointer, pitch=image.pitch)
                continue
            staged = next(remaining)
            table = 0
            if staged.plan is not None:
                table = base + staged.table_start
                row_table = staged.plan.table.reshape(-1)
                self._part(staged.table_start, row_table.nbytes).view(np.int32)[:] = row_table
            frames[number] = frame_of(letterbox, pixels=base + staged.rows_start, pitch=staged.pitch, rows=table)
        frames[len(images) :] = frames[len(images) - 1]

    def write(self) -> Iterator[int]:
        """Write the pixels; yield the number of bytes ready for upload after every piece, and finally `used`."""
        sent = 0
        for staged in self._staged:
            source = cast(Image, self._images[staged.index])
            source = source.reshape(source.shape[0], staged.pitch)
            rows = self._part(staged.rows_start, staged.row_count * staged.pitch)
            rows = rows.reshape(staged.row_count, staged.pitch)
            step = -(-PIECE_BYTES // staged.pitch)
            for start in range(0, staged.row_count, step):
                piece = slice(start, min(start + step, staged.row_count))
                if staged.plan is None:
                    rows[piece] = source[piece]
                else:
                    # With mode="raise", the default, NumPy copies through a temporary array.
                    np.take(source, staged.plan.rows[piece], axis=0, out=rows[piece], mode="clip")
                ready = staged.rows_start + piece.stop * staged.pitch
                if sent + PIECE_BYTES <= ready < self.used:
                    yield ready
                    sent = ready
        self._images = ()
        yield self.used

    def canvases(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[Array, bool]:
        """Return memory for network inputs created on the host, and whether the addresses on the GPU have changed."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._staged, self._placed, self.used = [], None, self._head
        moved = self.reserve(self._head + nbytes)
        return self._part(self._head, nbytes).view(dtype).reshape(shape), moved

    def reserve(self, nbytes: int) -> bool:
        """Grow to at least this many bytes, by at least half, and keep the thresholds; return whether it has grown."""
        if nbytes <= self.device.nbytes:
            return False
        head = self.host[: self._head].copy()
        larger = max(nbytes, self.device.nbytes * 3 // 2)
        self.close()
        self._allocate(align(larger))
        self.host[: self._head] = head
        return True

    def _part(self, start: int, nbytes: int) -> Bytes:
        return self.host[start : start + nbytes]

    def close(self) -> None:
        """Free both; the GPU must not read them any more."""
        self.host = np.empty(0, np.uint8)
        self._pinned.close()
        self.device.close()


def _any_on_gpu(images: Sequence[Image | GpuImage]) -> bool:
    return any(isinstance(image, GpuImage) for image in images)


def align(nbytes: int) -> int:
    """Round a number of bytes up to the alignment of tensors."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
