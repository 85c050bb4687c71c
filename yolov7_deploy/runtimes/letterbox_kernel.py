"""The letterbox of `plugins/kernels/kernels.h` from Python, and which rows of a frame it reads.

Every library that `y7 plugin` builds holds them, whatever TensorRT it is for; none of it is needed here. Work is queued
on a stream of the GPU that the calling thread has chosen (`Cuda.set_device`), and nothing waits. Any thread may call:
ctypes gives the GIL away meanwhile.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import DeviceError, PluginError
from yolov7_deploy.image import PAD_GREY, Letterbox
from yolov7_deploy.tensorrt.plugin_library import BUILD_COMMAND, KERNELS_ABI, describe_plugin, find_kernels_library

Rows = npt.NDArray[np.int32]

# struct Y7Frame, byte for byte.
FRAME = np.dtype(
    [
        ("pixels", np.uint64),
        ("pitch", np.int64),
        *((name, np.int32) for name in ("height", "width", "resized_height", "resized_width", "top", "left")),
        ("rows", np.uint64),
    ]
)
# The host gathers rows in their share of the time that copying all takes, and in up to a fifth more than that on small
# frames (benchmarks/staging.py): with more rows than these nothing is sure to be saved.
MOST_ROWS = 0.85
_WEIGHT_ONE = 2048  # weights have 11 bits, as in OpenCV's resize of bytes
_PLANS = 256  # pairs of heights that are remembered
_OK = 0


class _LetterboxParams(ctypes.Structure):
    """struct Y7LetterboxParams."""

    _fields_: ClassVar = [(name, ctypes.c_int32) for name in ("batch", "height", "width", "type", "pad")]


class Kernels:
    """An opened library. It stays open until the process ends: work may still be queued.

    Attributes:
        path: Where it lies.
    """

    TYPES: ClassVar = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint8): 2}

    def __init__(self, path: Path, library: ctypes.CDLL) -> None:
        self.path = path
        self._letterbox = library.y7_letterbox
        self._letterbox.restype = ctypes.c_int32
        self._letterbox.argtypes = [ctypes.POINTER(_LetterboxParams), *[ctypes.c_void_p] * 3]
        self._status_text = library.y7_status_text
        self._status_text.restype = ctypes.c_char_p
        self._status_text.argtypes = [ctypes.c_int32]

    def __repr__(self) -> str:
        return f"Kernels({self.path})"

    @classmethod
    def open(cls, path: Path) -> Kernels:
        """The kernels in a library file, which is looked at in a second Python first.

        Raises:
            PluginError: There is no such file, it is damaged or not ours, or has kernels of another version.
        """
        described = describe_plugin(path)
        if described.kernels_abi != KERNELS_ABI:
            raise PluginError(
                f"{described.path} has kernels {described.kernels_abi}; this yolov7-deploy needs kernels "
                f"{KERNELS_ABI}.",
                fix=f"Build it again:  {BUILD_COMMAND}",
            )
        return cls._load(described.path)

    @classmethod
    def _load(cls, path: Path) -> Kernels:
        """What is known to be ours and to open."""
        try:
            return cls(path, ctypes.CDLL(str(path)))
        except (OSError, AttributeError) as error:
            raise PluginError(f"{path} cannot be used: {error}.", fix=f"Build it again:  {BUILD_COMMAND}") from error

    def letterbox(
        self,
        *,
        batch: int,
        canvas_hw: tuple[int, int],
        dtype: npt.DTypeLike,
        frames: int,
        canvas: int,
        stream: int,
    ) -> None:
        """Queues the letterbox of a batch; a graph that records it follows what the frames hold at each launch.

        Args:
            batch: Number of frames, 1 to 65535.
            canvas_hw: Height and width of the network input.
            dtype: float32 or float16 for NCHW RGB 0..1, uint8 for NHWC BGR 0..255.
            frames: Address on the GPU of `batch` records `FRAME`. One that means nothing gives a grey canvas.
            canvas: Address on the GPU of the network input, written whole.
            stream: Handle of the stream.

        Raises:
            DeviceError: An argument is out of range, null or misaligned, or CUDA could not launch it.
        """
        height, width = canvas_hw
        params = _LetterboxParams(batch, height, width, self.TYPES[np.dtype(dtype)], PAD_GREY)
        status = self._letterbox(params, frames, canvas, stream)
        if status != _OK:
            raise DeviceError(
                f"The letterbox of {batch} frames on {height}x{width} {np.dtype(dtype)} failed: "
                f"{self._status_text(status).decode()}.",
                fix="y7 doctor shows the GPU, its driver and our plugin.",
            )


def find_kernels(compute_capability: tuple[int, int]) -> Kernels | None:
    """The kernels of the first library of ours that runs on such a GPU: `$Y7_PLUGIN`, else what `y7 plugin` built.

    Returns:
        `None` where there is no library, or none with code for this GPU.

    Raises:
        PluginError: A library is there and is damaged, not ours or of another version.
    """
    major, minor = compute_capability
    library = find_kernels_library(10 * major + minor)
    return Kernels._load(library.path) if library else None


def frame_of(letterbox: Letterbox, *, pixels: int, pitch: int, rows: int = 0) -> np.void:
    """A record `FRAME` for one image on the GPU.

    Args:
        letterbox: Where it lands; the kernel is bilinear and cannot shrink by area.
        pixels: Address of its uint8 BGR rows, all of them or those of a `RowPlan`.
        pitch: Bytes from one row to the next.
        rows: Address of the plan's table, aligned to 4 bytes; 0 where all rows are there. Its positions must lie
            among the rows that are: the kernel follows them unseen.
    """
    if _averages(letterbox):
        raise ValueError("a letterbox that shrinks by area is not the kernel's")
    placed = (*letterbox.source_hw, *letterbox.resized_hw, letterbox.top, letterbox.left)
    record: np.void = np.array([(pixels, pitch, *placed, rows)], FRAME)[0]
    return record


def _averages(letterbox: Letterbox) -> bool:
    return letterbox.shrink_by_area and letterbox.resized_hw != letterbox.source_hw


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlan:
    """The rows of a frame that bilinear sampling reads; the others need not reach the GPU.

    `np.take(image, plan.rows, axis=0, out=staged, mode="clip")` stages them; with the mode "raise", its default, NumPy
    would gather into an array of its own first. Plans are shared, and their arrays read-only.

    Attributes:
        rows: int32 [R], ascending: the rows to stage, one behind the other.
        table: int32 [resized height, 2]: where among them a resized row finds its upper and its lower source row.
    """

    rows: Rows
    table: Rows


def row_plan(letterbox: Letterbox) -> RowPlan | None:
    """Which rows to stage for an image, or `None` where staging all of them is as good.

    1080 rows on 360 need every third, whose centres meet; 2160 on 360 need two of six, 720 on 360 need all.
    """
    if _averages(letterbox):
        return None
    source = letterbox.source_hw[0]
    plan = plan_rows(source, letterbox.resized_hw[0])
    return plan if len(plan.rows) <= MOST_ROWS * source else None


@lru_cache(maxsize=_PLANS)
def plan_rows(source: int, resized: int) -> RowPlan:
    """The rows that bilinear sampling reads of `source` rows to make `resized` of them.

    In the kernel's own arithmetic (letterbox.cu). A row that it weighs with nothing may be any, so it is the other one.
    """
    centres = (2 * np.arange(resized, dtype=np.int64) + 1) * source - resized
    # Doubles hold more than twice the digits of floats: rounding twice gives what the kernel's float division gives.
    exact = (centres / (2 * resized)).astype(np.float32)
    before = np.floor(exact).astype(np.int64)
    fraction = exact - before.astype(np.float32)
    weights = np.rint(np.stack([np.float32(1) - fraction, fraction], axis=1) * np.float32(_WEIGHT_ONE))
    taps = np.clip(np.stack([before, before + 1], axis=1), 0, source - 1)
    taps = np.where(weights == 0, taps[:, ::-1], taps)
    rows, table = np.unique(taps, return_inverse=True)
    plan = RowPlan(rows=rows.astype(np.int32), table=table.reshape(resized, 2).astype(np.int32))
    plan.rows.flags.writeable = plan.table.flags.writeable = False
    return plan
