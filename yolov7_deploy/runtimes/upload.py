"""What goes up to the GPU before each run: thresholds, a table of the frames, and their pixels.

All of it lies in one piece of page-locked memory with a twin on the GPU, so a run needs one copy, and thresholds and
geometry change without a new CUDA graph. Writing a 1080p frame into page-locked memory takes the host about as long as
the GPU needs to fetch it, so large uploads go in pieces: the GPU fetches one while the host writes the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yolov7_deploy.image import Image, Letterbox
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.cuda import Array, Cuda, DeviceBuffer, PinnedBuffer
from yolov7_deploy.runtimes.device_arrays import GpuImage
from yolov7_deploy.runtimes.letterbox_kernel import FRAME, RowPlan, frame_of, row_plan

Bytes = npt.NDArray[np.uint8]

PIECE_BYTES = 2**20  # a tenth of a millisecond on either side, where queueing a copy takes a few microseconds
_ALIGNMENT = 256  # of every tensor, as TensorRT wants it
_CONF_AT, _IOU_AT, _FRAMES_AT = 0, _ALIGNMENT, 2 * _ALIGNMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where the rows and the row table of a host image begin, counted from the start of the staging memory."""

    image: Image
    plan: RowPlan | None
    table_at: int
    rows_at: int

    @property
    def end(self) -> int:
        return self.rows_at + self.row_count * self.pitch

    @property
    def row_count(self) -> int:
        return len(self.plan.rows) if self.plan else self.image.shape[0]

    @property
    def pitch(self) -> int:
        return 3 * int(self.image.shape[1])


class Staging:
    """Page-locked memory and its twin on the GPU; both grow with the images.

    Args:
        cuda: Of the thread's GPU.
        batch: Most frames at once.

    Attributes:
        device: The twin; another object after growth.
        used: Bytes that the next run needs up there.
    """

    def __init__(self, cuda: Cuda, batch: int) -> None:
        self._cuda = cuda
        self._head = _aligned(_FRAMES_AT + batch * FRAME.itemsize)
        self._places: list[_Place] = []
        self.used = self._head
        self._allocate(self._head)

    def _allocate(self, nbytes: int) -> None:
        self.device = DeviceBuffer(self._cuda, (nbytes,), np.uint8)
        self._pinned = PinnedBuffer(self._cuda, (nbytes,), np.uint8)
        self.host: Bytes = self._pinned.array

    @property
    def addresses(self) -> tuple[int, int, int]:
        """On the GPU: thresholds for scores and for overlap, float32 [1] each, and the table of `FRAME` records."""
        base = self.device.pointer
        return base + _CONF_AT, base + _IOU_AT, base + _FRAMES_AT

    def set_thresholds(self, thresholds: Thresholds) -> None:
        """Writes the thresholds of the next run."""
        for at, value in ((_CONF_AT, thresholds.conf), (_IOU_AT, thresholds.iou)):
            self.host[at : at + 4].view(np.float32)[0] = value

    def place(self, images: Sequence[Image | GpuImage], letterboxes: Sequence[Letterbox], *, batch: int) -> bool:
        """Finds room for images and writes the table of frames, whose last one fills the batch up.

        Tables come before pixels, so that the first piece that goes up holds all of them.

        Returns:
            Whether the addresses on the GPU are others now.

        Raises:
            DeviceError: There is no memory for them.
        """
        on_host = [
            (image, row_plan(letterbox))
            for image, letterbox in zip(images, letterboxes, strict=True)
            if not isinstance(image, GpuImage)
        ]
        plans = [plan for _, plan in on_host]
        tables = np.cumsum([self._head, *(_aligned(plan.table.nbytes) if plan else 0 for plan in plans)]).tolist()
        self._places, at = [], tables[-1]
        for (pixels, plan), table_at in zip(on_host, tables[:-1], strict=True):
            place = _Place(image=pixels, plan=plan, table_at=table_at, rows_at=at)
            self._places.append(place)
            at = _aligned(place.end)
        self.used = self._places[-1].end if self._places else self._head
        moved = self.reserve(self.used)
        self._write_tables(images, letterboxes, batch)
        return moved

    def _write_tables(self, images: Sequence[Image | GpuImage], letterboxes: Sequence[Letterbox], batch: int) -> None:
        base, places = self.device.pointer, iter(self._places)
        frames = self.host[_FRAMES_AT : _FRAMES_AT + batch * FRAME.itemsize].view(FRAME)
        for number, (image, letterbox) in enumerate(zip(images, letterboxes, strict=True)):
            if isinstance(image, GpuImage):
                frames[number] = frame_of(letterbox, pixels=image.pointer, pitch=image.pitch)
                continue
            place = next(places)
            table_at = 0
            if place.plan is not None:
                table_at = base + place.table_at
                self._part(place.table_at, place.plan.table.nbytes).view(np.int32)[:] = place.plan.table.reshape(-1)
            frames[number] = frame_of(letterbox, pixels=base + place.rows_at, pitch=place.pitch, rows=table_at)
        frames[len(images) :] = frames[len(images) - 1]

    def write(self) -> Iterator[int]:
        """Writes the pixels that were placed; yields how far, whenever a piece is ready, and at the end `used`."""
        sent = 0
        for place in self._places:
            wide = place.image.reshape(place.image.shape[0], place.pitch)
            rows = self._part(place.rows_at, place.row_count * place.pitch).reshape(place.row_count, place.pitch)
            step = -(-PIECE_BYTES // place.pitch)
            for start in range(0, place.row_count, step):
                some = slice(start, min(start + step, place.row_count))
                if place.plan is None:
                    rows[some] = wide[some]
                else:
                    # With a mode other than "raise" NumPy copies at once instead of by way of a buffer.
                    np.take(wide, place.plan.rows[some], axis=0, out=rows[some], mode="clip")
                ready = place.rows_at + some.stop * place.pitch
                if sent + PIECE_BYTES <= ready < self.used:
                    yield ready
                    sent = ready
        yield self.used

    def canvases(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[Array, bool]:
        """Room for whole network inputs made on the host, and whether the addresses on the GPU are others now."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._places, self.used = [], self._head
        moved = self.reserve(self._head + nbytes)
        return self._part(self._head, nbytes).view(dtype).reshape(shape), moved

    def reserve(self, nbytes: int) -> bool:
        """Grows to at least so many bytes, by half at least; the thresholds move along."""
        if nbytes <= self.device.nbytes:
            return False
        head = self.host[: self._head].copy()
        larger = max(nbytes, self.device.nbytes * 3 // 2)
        self.close()
        self._allocate(_aligned(larger))
        self.host[: self._head] = head
        return True

    def _part(self, start: int, nbytes: int) -> Bytes:
        return self.host[start : start + nbytes]

    def close(self) -> None:
        """Gives both back; nothing on the GPU may still read them."""
        self.host = np.empty(0, np.uint8)
        self._pinned.close()
        self.device.close()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
