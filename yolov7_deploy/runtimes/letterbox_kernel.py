"""Python binding of the letterbox kernel (`plugins/kernels/kernels.h`), and the rows of a frame that it reads.

Every library that `y7 plugin` builds contains the kernels; TensorRT is not needed here. Work is queued on a stream of
the calling thread's GPU (`Cuda.set_device`), and no call waits for it. Calls from several threads are fine: ctypes
releases the GIL.
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
# Gathering a share of the rows takes that share of the time of copying all of them, and up to a fifth more on small
# frames (benchmarks/staging.py). Above this share, gathering may save nothing.
MAX_ROW_SHARE = 0.85
_WEIGHT_ONE = 2048  # weights have 11 bits, as in OpenCV's resize of uint8 images
_CACHED_PLANS = 256  # pairs of source and resized height
_OK = 0


class _LetterboxParams(ctypes.Structure):
    """The C struct Y7LetterboxParams."""

    _fields_: ClassVar = [(name, ctypes.c_int32) for name in ("batch", "height", "width", "type", "pad")]


class Kernels:
    """The kernels in a loaded library. It stays loaded until the process ends, because work may still be queued.

    Attributes:
        path: Path of the library.
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
        """Load a library file after inspecting it in a separate Python process.

        Raises:
            PluginError: The file is missing, damaged or of another project, or has kernels of another version.
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
        """Load a library that was already inspected."""
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
        """Queue the letterbox of a batch. A CUDA graph of it reads the frame records again at every launch.

        Args:
            batch: Number of frames, 1 to 65535.
            canvas_hw: Height and width of the network input.
            dtype: float32 or float16 for NCHW RGB 0..1, uint8 for NHWC BGR 0..255.
            frames: GPU address of `batch` records `FRAME`. An invalid record gives a grey canvas.
            canvas: GPU address of the network input, which is written completely.
            stream: Stream handle.

        Raises:
            DeviceError: An argument is out of range, null or misaligned, or CUDA cannot launch the kernel.
        """
        height, width = canvas_hw
        params = _LetterboxParams(batch, height, width, self.TYPES[np.dtype(dtype)], PAD_GREY)
        status = self._letterbox(params, frames, canvas, stream)
        if status != _OK:
            raise DeviceError(
                f"The letterbox of {batch} frames on {height}x{width} {np.dtype(dtype)} failed: "
                f"{self._status_text(status).decode()}.",
                fix="y7 doctor shows the GPU, its driver and the plugin.",
            )


def find_kernels(compute_capability: tuple[int, int]) -> Kernels | None:
    """Load the first library with code for such a GPU: `$Y7_PLUGIN`, else one that `y7 plugin` built.

    Returns:
        `None` if there is no library, or none with code for this GPU.

    Raises:
        PluginError: A library is damaged, of another project or of another version.
    """
    major, minor = compute_capability
    library = find_kernels_library(10 * major + minor)
    return Kernels._load(library.path) if library else None


def frame_of(letterbox: Letterbox, *, pixels: int, pitch: int, rows: int = 0) -> np.void:
    """Return a record `FRAME` for one image on the GPU.

    Args:
        letterbox: Its geometry; the kernel is bilinear and cannot shrink by area.
        pixels: Address of its uint8 BGR rows, all of them or those of a `RowPlan`.
        pitch: Bytes from one row to the next.
        rows: Address of the plan's table, aligned to 4 bytes; 0 if all rows are present. The kernel does not check
            the indices in the table.
    """
    if letterbox.averages_area:
        raise ValueError("the kernel cannot shrink by area")
    geometry = (*letterbox.source_hw, *letterbox.resized_hw, letterbox.top, letterbox.left)
    record: np.void = np.array([(pixels, pitch, *geometry, rows)], FRAME)[0]
    return record


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlan:
    """The rows of a frame that bilinear sampling reads; the others are not uploaded.

    `np.take(image, plan.rows, axis=0, out=staged, mode="clip")` gathers them; with mode="raise", the default, NumPy
    would gather into a temporary array first. Plans are shared, and their arrays are read-only.

    Attributes:
        rows: int32 [R], ascending: the rows to upload.
        table: int32 [resized height, 2]: for each resized row, the indices in `rows` of its upper and lower source row.
    """

    rows: Rows
    table: Rows


def row_plan(letterbox: Letterbox) -> RowPlan | None:
    """Return the rows to upload for an image, or `None` if uploading all of them is as fast.

    From 1080 to 360 rows every third one is read, because their centres coincide; from 2160 to 360 two of six, and from
    720 to 360 all of them.
    """
    if letterbox.averages_area:
        return None
    source = letterbox.source_hw[0]
    plan = plan_rows(source, letterbox.resized_hw[0])
    return plan if len(plan.rows) <= MAX_ROW_SHARE * source else None


@lru_cache(maxsize=_CACHED_PLANS)
def plan_rows(source: int, resized: int) -> RowPlan:
    """Return the rows that bilinear sampling reads when it scales `source` rows to `resized` rows.

    The arithmetic is that of the kernel (letterbox.cu). A row of weight 0 is replaced by the other row of its pair.
    """
    centres = (2 * np.arange(resized, dtype=np.int64) + 1) * source - resized
    # A double has over twice the digits of a float: rounding twice gives the result of the kernel's float division.
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
