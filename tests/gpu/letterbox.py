"""The letterbox kernel on the GPU compared with OpenCV's arithmetic, and its speed for 1080p frames."""

from __future__ import annotations

import ctypes
import itertools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.fakes.emulated_kernels import FLOAT16, FLOAT32, OK, UINT8, Frame, LetterboxParams
from tests.gpu.environment import Array, CudaMemory, Environment, Stream, times_us

TYPES = {FLOAT32: np.float32, FLOAT16: np.float16, UINT8: np.uint8}
PAD = 114
CANVASES = ((640, 640), (384, 640), (96, 160), (1280, 1280))
CASES, EMULATED_CASES = 600, 6
CHECK_S = 28.0
FULL_HD = (1080, 1920)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The position of a resized frame on its canvas: resized size, and padding in pixels above and to the left."""

    resized_hw: tuple[int, int]
    top: int
    left: int


def fit(source_hw: tuple[int, int], canvas_hw: tuple[int, int]) -> Placement:
    """Return the same placement as `yolov7_deploy.image.fit_letterbox`, which needs OpenCV."""
    ratio = min(canvas_hw[0] / source_hw[0], canvas_hw[1] / source_hw[1])
    height, width = (max(1, round(side * ratio)) for side in source_hw)
    top, left = (round((canvas - side) / 2 - 0.1) for canvas, side in zip(canvas_hw, (height, width), strict=True))
    return Placement(resized_hw=(height, width), top=top, left=left)


def reference_letterbox(frame: Array, canvas_hw: tuple[int, int]) -> Array:
    """Letterbox a uint8 BGR frame [H, W, 3] with the integer arithmetic of OpenCV's bilinear resize.

    The tests compare this function with OpenCV; on machines without OpenCV, the kernel is compared with it.
    """
    placement = fit((frame.shape[0], frame.shape[1]), canvas_hw)
    height, width = placement.resized_hw
    left, right, left_weight, right_weight = _taps(width, frame.shape[1], is_column=True)
    upper, lower, upper_weight, lower_weight = _taps(height, frame.shape[0], is_column=False)
    wide = frame.astype(np.int64)
    across = (wide[:, left] * left_weight[:, None] + wide[:, right] * right_weight[:, None]) >> 4
    rows = ((upper, upper_weight), (lower, lower_weight))
    down = [(across[row] * weight[:, None, None]) >> 16 for row, weight in rows]
    resized = np.minimum((down[0] + down[1] + 2) >> 2, 255)
    canvas = np.full((*canvas_hw, 3), PAD, np.uint8)
    canvas[placement.top : placement.top + height, placement.left : placement.left + width] = resized
    return canvas


def _taps(resized: int, source: int, *, is_column: bool) -> tuple[Array, Array, Array, Array]:
    """Return for each resized position the two source positions and their 11-bit weights."""
    exact = ((np.arange(resized) + 0.5) * (1.0 / (resized / source)) - 0.5).astype(np.float32)
    before = np.floor(exact).astype(np.int64)
    fraction = exact - before.astype(np.float32)
    if is_column:
        fraction[(before < 0) | (before >= source - 1)] = 0
    weights = [np.rint(part * np.float32(2048)).astype(np.int64) for part in (np.float32(1) - fraction, fraction)]
    return np.clip(before, 0, source - 1), np.clip(before + 1, 0, source - 1), weights[0], weights[1]


def as_input(canvas: Array, kind: int) -> Array:
    """Return a canvas as the kernel writes it in this type."""
    if kind == UINT8:
        return canvas
    return (canvas[:, :, ::-1].transpose(2, 0, 1).astype(np.float32) / np.float32(255)).astype(TYPES[kind])


def needed_rows(height: int, resized: int) -> tuple[Array, Array]:
    """Return the source rows with a nonzero weight, and int32 [resized, 2]: the indices of the two rows of each row."""
    upper, lower, upper_weight, lower_weight = _taps(resized, height, is_column=False)
    taps = np.stack([np.where(upper_weight, upper, lower), np.where(lower_weight, lower, upper)], axis=1)
    rows, table = np.unique(taps, return_inverse=True)
    return rows, table.reshape(resized, 2).astype(np.int32)


class LetterboxCall:
    """A call of y7_letterbox with its frames on the GPU, which can be enqueued repeatedly.

    `gathered` uploads only the rows that the kernel reads, and their index table.
    """

    def __init__(
        self,
        kernels: Any,
        memory: CudaMemory,
        frames: list[Array],
        canvas_hw: tuple[int, int],
        kind: int,
        *,
        row_padding: int = 0,
        gathered: bool = False,
    ) -> None:
        self.kernels, self.stream, self.kind = kernels, memory.stream, kind
        self.pixels, self.tables, structs = [], [], []
        for frame in frames:
            (height, width), placement = frame.shape[:2], fit((frame.shape[0], frame.shape[1]), canvas_hw)
            rows = np.full((height, 3 * width + row_padding), 0xEE, np.uint8)
            rows[:, : 3 * width] = frame.reshape(height, -1)
            if gathered:
                needed, table = needed_rows(height, placement.resized_hw[0])
                rows = rows[needed]
                self.tables.append(memory.upload(table))
            self.pixels.append(memory.upload(rows))
            table_address = self.tables[-1].address if gathered else None
            numbers = (
                rows.shape[1],
                height,
                width,
                *placement.resized_hw,
                placement.top,
                placement.left,
                table_address,
            )
            structs.append(Frame(self.pixels[-1].address, *numbers))
        array = (Frame * len(structs))(*structs)
        self.frames = memory.upload(np.frombuffer(bytes(array), np.uint8))
        self.params = LetterboxParams(len(frames), *canvas_hw, kind, PAD)
        shape = (len(frames), *canvas_hw, 3) if kind == UINT8 else (len(frames), 3, *canvas_hw)
        self.canvas = memory.garbage(shape, TYPES[kind])

    def __call__(self) -> None:
        """Enqueue the call."""
        status = self.kernels.y7_letterbox(
            ctypes.byref(self.params), self.frames.address, self.canvas.address, self.stream.handle
        )
        assert status == OK, self.kernels.status_text(status)


def check(env: Environment) -> None:
    """Compare frames of many sizes: in batches, on several canvases, in all three types, complete or gathered rows."""
    cuda, kernels = env.open_cuda(), env.open_kernels()
    started, frames_done, equal, worst = time.monotonic(), 0, 0, 0.0
    with Stream(cuda) as stream:
        memory = CudaMemory(cuda, stream)
        for number in range(env.choose(CASES, EMULATED_CASES)):
            if time.monotonic() - started > CHECK_S:
                break
            rng = np.random.default_rng(number)
            canvas_hw, kind = CANVASES[number % 3 if number % 50 else 3], number // 3 % 3
            if env.emulated:
                canvas_hw = CANVASES[2]
            frames = [_frame(rng, env.choose(2500, 300)) for _ in range(1 + number % 4)]
            padding, gathered = int(rng.choice([0, 1, 61])), bool(rng.integers(2))
            work = LetterboxCall(kernels, memory, frames, canvas_hw, kind, row_padding=padding, gathered=gathered)
            work()
            for found, frame in zip(memory.download(work.canvas), frames, strict=True):
                expected = as_input(reference_letterbox(frame, canvas_hw), kind)
                same = bool((found == expected).all())
                scale = 255.0 if kind == UINT8 else 1.0
                worst = max(worst, float(np.abs(found.astype(np.float64) - expected).max()) / scale)
                frames_done, equal = frames_done + 1, equal + same
                assert worst <= 1 / 255 + 1e-3, f"case {number}: frame {frame.shape} differs by {worst}"
        env.record("against_opencv", {"frames": frames_done, "bit_equal": equal, "largest_difference": worst})
        _check_bad_frames(env, kernels, memory)


def _frame(rng: np.random.Generator, longest: int) -> Array:
    height, width = (int(side) for side in np.exp(rng.uniform(0, np.log(longest), 2)))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _check_bad_frames(env: Environment, kernels: Any, memory: CudaMemory) -> None:
    """Check that invalid frame descriptions give a grey canvas and no GPU error."""
    work = LetterboxCall(kernels, memory, [np.zeros((8, 8, 3), np.uint8)], (96, 160), UINT8)
    wrong = {"pitch": 1, "width": -4, "resized_height": 2**31 - 1, "top": -1, "pixels": None, "rows": 2}
    for field, value in wrong.items():
        frame = Frame(work.pixels[0].address, 24, 8, 8, 96, 96, 0, 32)
        setattr(frame, field, value)
        work.frames = memory.upload(np.frombuffer(bytes(frame), np.uint8))
        work()
        assert (memory.download(work.canvas) == PAD).all(), f"{field} = {value} was accepted"
    env.record("bad_frames_are_grey", True)


def measure(env: Environment) -> None:
    """Measure 1080p frames on a 640 canvas by batch and type; single frames also with only the rows that are read."""
    cuda, kernels = env.open_cuda(), env.open_kernels()
    rows: list[dict[str, object]] = []
    source, canvas_hw = ((36, 64), (64, 64)) if env.emulated else (FULL_HD, (640, 640))
    with Stream(cuda) as stream:
        memory = CudaMemory(cuda, stream, guard=0)
        frame = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
        for batch in (1, 8, 32)[: env.choose(3, 1)]:
            for kind, gathered in itertools.product(TYPES, (False, True) if batch == 1 else (False,)):
                work = LetterboxCall(kernels, memory, [frame] * batch, canvas_hw, kind, gathered=gathered)
                times = times_us(stream, work, rounds=env.choose(200, 3))
                sizes = {"frame": source, "canvas": canvas_hw, "batch": batch}
                rows.append({**sizes, "type": TYPES[kind].__name__, "gathered": gathered, **times})
                env.record("rows", rows)
