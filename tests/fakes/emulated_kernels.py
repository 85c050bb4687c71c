"""Python bindings of the C ABI of plugins/kernels, and its kernels compiled by g++ for the CUDA emulation.

`Kernels` binds any library with that ABI. Addresses are integers: host memory for the emulated library, device memory
for the real one. `emulated` compiles the unchanged .cu files. `Guarded` is host memory that detects writes beyond its
ends. `run_nms` works with both libraries; its `memory` argument allocates and copies (see `HostMemory`).
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.fakes.faked_cuda import OWN_SYMBOLS

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "plugins" / "kernels"
EMULATION = Path(__file__).parents[1] / "fakes" / "cuda_on_cpu"

OK, BAD_ARGUMENT, WORKSPACE_TOO_SMALL, CUDA_ERROR = range(4)
FLOAT32, FLOAT16, UINT8 = range(3)
MAX_LEVELS = 8

_int, _long, _float, _address = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class HeadMap(ctypes.Structure):
    _fields_ = (
        ("data", _address),
        *((name, _long) for name in ("batch_stride", "channel_stride", "cell_stride")),
        ("height", _int),
        ("width", _int),
        ("stride", _float),
        ("anchors", _float * 2 * 3),
        ("reserved", _int),
    )


class NmsParams(ctypes.Structure):
    _fields_ = tuple((name, _int) for name in (*("batch", "levels", "classes", "max_det", "max_candidates", "type"),))


class NmsThresholds(ctypes.Structure):
    _fields_ = tuple((name, _address) for name in ("conf", "iou", "multi_label", "class_agnostic"))


class NmsOutputs(ctypes.Structure):
    _fields_ = tuple((name, _address) for name in ("num_dets", "boxes", "scores", "classes", "overflow"))


class Frame(ctypes.Structure):
    _fields_ = (
        ("pixels", _address),
        ("pitch", _long),
        *((name, _int) for name in ("height", "width", "resized_height", "resized_width", "top", "left")),
        ("rows", _address),
    )


class LetterboxParams(ctypes.Structure):
    _fields_ = tuple((name, _int) for name in ("batch", "height", "width", "type", "pad"))


class Work(ctypes.Structure):
    """A launch or a memset; see block.h."""

    _fields_ = tuple(
        (name, _long) for name in ("blocks", "threads", "barriers", "bytes_read", "bytes_written", "atomics")
    )


MAX_WORK = 1024


class Kernels:
    """Bindings of a loaded library. Functions that it does not export cannot be called."""

    SIGNATURES: ClassVar = {
        "y7_nms_workspace": (ctypes.c_size_t, [ctypes.POINTER(NmsParams)]),
        "y7_nms": (
            _int,
            [
                ctypes.POINTER(NmsParams),
                ctypes.POINTER(HeadMap),
                ctypes.POINTER(NmsThresholds),
                ctypes.POINTER(NmsOutputs),
                _address,
                ctypes.c_size_t,
                _address,
            ],
        ),
        "y7_letterbox": (_int, [ctypes.POINTER(LetterboxParams), _address, _address, _address]),
        "y7_status_text": (ctypes.c_char_p, [_int]),
        "y7_kernels_abi": (_int, []),
        "cuda_on_cpu_seed": (None, [ctypes.c_uint64]),
        "cuda_on_cpu_work": (ctypes.c_int, [ctypes.POINTER(Work), ctypes.c_int]),
    }

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        for name, (result, arguments) in self.SIGNATURES.items():
            if hasattr(self.library, name):
                function = getattr(self.library, name)
                function.restype, function.argtypes = result, arguments

    def __getattr__(self, name):
        return getattr(self.library, name)

    def status_text(self, status):
        return self.library.y7_status_text(status).decode()

    def seed(self, number):
        """Set the order of threads in the emulation; a real GPU ignores it."""
        if hasattr(self.library, "cuda_on_cpu_seed"):
            self.library.cuda_on_cpu_seed(number)

    def work(self):
        """Return what was queued in the emulation since the last call."""
        queued = (Work * MAX_WORK)()
        return list(queued[: self.library.cuda_on_cpu_work(queued, MAX_WORK)])


def emulated(*sources, defines=(), flags=(), observed=False, folder=None):
    """Return the `Kernels` of source files, compiled for the emulation once per content; skip the test without g++.

    Args:
        sources: Names in plugins/kernels such as "nms.cu", or paths; status.cu is always included.
        defines: Macros such as "Y7_NMS_THREADS=64".
        flags: Additional flags for g++, such as -fsanitize=undefined.
        observed: Find races and count bytes; see accesses.cpp. Much slower.
        folder: Where the library is kept; by default where it is found by the next process.
    """
    return Kernels(compile_emulated(*sources, defines=defines, flags=flags, observed=observed, folder=folder))


def compile_emulated(*sources, defines=(), flags=(), observed=False, folder=None):
    """Return the path of the shared library that `emulated` loads."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed: the kernels cannot be compiled for the CUDA emulation")
    files = [SOURCES / name for name in (*sources, "status.cu")]
    command = [compiler, "-std=c++17", "-O2", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas"]  # unroll
    command += ["-ffp-contract=off"]  # no fused multiply-add, as on the GPU (-fmad=false)
    command += [f"-I{EMULATION}", f"-I{SOURCES}"]
    options = [*(f"-D{define}" for define in defines), *flags]
    if not observed:
        arguments = [*command, *options, "-shared", OWN_SYMBOLS, "-x", "c++", *files, EMULATION / "block.cpp"]
        return _compiled(arguments, [*files, *_headers()], suffix=".so", folder=folder)
    # The compiler inserts calls at every access of the kernels. accesses.cpp answers them, not the sanitizer's library.
    partly = [*command, "-O1", "-r", "-nostdlib"]
    parts = [EMULATION / "block.cpp", EMULATION / "accesses.cpp"]
    emulation = _compiled([*partly, "-DCUDA_ON_CPU_OBSERVED", *parts], _headers(), suffix=".o")
    arguments = [*partly, *options, "-fsanitize=thread", "-x", "c++", *files]
    kernels = _compiled(arguments, [*files, *_headers()], suffix=".o", folder=folder)
    return _compiled(
        [compiler, "-shared", OWN_SYMBOLS, kernels, emulation], [kernels, emulation], suffix=".so", folder=folder
    )


def _headers():
    return [*SOURCES.glob("*.h"), *SOURCES.glob("*.cuh"), *EMULATION.iterdir()]


def _compiled(command, read, *, suffix, folder=None):
    """Return the output of a compiler command that reads these files, from an earlier process if it is the same."""
    command = [str(part) for part in command]
    contents = b"\0".join(path.read_bytes() for path in sorted(read))
    name = hashlib.sha256("\0".join(command).encode() + b"\0" + contents).hexdigest()[:24] + suffix
    folder = folder or Path(tempfile.gettempdir()) / f"y7-emulated-{os.getuid()}"
    output = folder / name
    if not output.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = folder / f"{name}.{os.getpid()}"
        result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        unfinished.replace(output)
    return output


def compile_described(*sources, capability=86):
    """Return the path of such a library with the description of one that `y7 plugin` builds for a GPU architecture."""
    defines = [f'Y7_{name}="{capability}"' for name in ("COMPUTE_CAPABILITIES", "PTX")] + ['Y7_EXACT=""']
    return compile_emulated(*sources, SOURCES.parent / "tensorrt" / "description.cpp", defines=defines)


class Guarded:
    """An array in host memory between two guard zones, 64-byte aligned and initially filled with garbage."""

    ZONE = 256

    def __init__(self, shape, dtype, garbage=0xAB):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        self.memory = np.full(2 * self.ZONE + size + 64, garbage, np.uint8)
        start = self.ZONE + -(self.memory.ctypes.data + self.ZONE) % 64
        self.array = self.memory[start : start + size].view(dtype).reshape(shape)
        self.before, self.after = self.memory[:start], self.memory[start + size :]
        self.before[:] = self.after[:] = 0x5C
        self.address = self.memory.ctypes.data + start

    @classmethod
    def of(cls, array):
        guarded = cls(array.shape, array.dtype)
        guarded.array[...] = array
        return guarded

    def check(self):
        """Assert that the guard zones are unchanged."""
        assert (self.before == 0x5C).all(), "written before the start of a buffer"
        assert (self.after == 0x5C).all(), "written beyond the end of a buffer"


class HostMemory:
    """Memory for the emulated kernels. For a GPU, implement the same methods with cudaMalloc and cudaMemcpy."""

    def upload(self, array):
        """Return a buffer with this content; `.address` is the pointer for the kernels."""
        return Guarded.of(array)

    def garbage(self, shape, dtype):
        """Return a buffer with arbitrary content other than zeros."""
        return Guarded(shape, dtype)

    def download(self, buffer):
        """Return the content as an array, after all work on the GPU has finished."""
        buffer.check()
        return buffer.array.copy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Raw head maps, float32 or float16 [B, 3 * (5 + C), H, W] per level, from the smallest stride to the largest.

    Attributes:
        maps: One array per level.
        strides: Pixels per cell of each level.
        anchors: Three (width, height) in pixels per level.
        padding: `None` for NCHW; else NHWC with this number of padding channels.
    """

    maps: tuple
    strides: tuple
    anchors: tuple
    padding: int | None = None

    @property
    def classes(self):
        return self.maps[0].shape[1] // 3 - 5

    def structs(self, memory):
        """Return the HeadMap array, and the buffers that must exist while it is used."""
        structs, buffers = (HeadMap * len(self.maps))(), []
        for struct, array, stride, anchors in zip(structs, self.maps, self.strides, self.anchors, strict=True):
            _, channels, height, width = array.shape
            if self.padding is None:
                stored, steps = array, (channels * height * width, height * width, 1)
            else:
                wide = channels + self.padding
                stored = np.full((len(array), height, width, wide), np.nan, array.dtype)
                stored[..., :channels] = array.transpose(0, 2, 3, 1)
                steps = (height * width * wide, 1, wide)
            buffers.append(memory.upload(np.ascontiguousarray(stored)))
            struct.data = buffers[-1].address
            struct.batch_stride, struct.channel_stride, struct.cell_stride = steps
            struct.height, struct.width, struct.stride = height, width, stride
            for k, (anchor_width, anchor_height) in enumerate(anchors):
                struct.anchors[k][0], struct.anchors[k][1] = anchor_width, anchor_height
        return structs, buffers


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsResult:
    """The five outputs of y7_nms: int32 [B, 1], float32 [B, K, 4], float32 [B, K], int32 [B, K], int32 [B, 1]."""

    num_dets: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    overflow: np.ndarray

    def bytes(self):
        arrays = (self.num_dets, self.boxes, self.scores, self.classes, self.overflow)
        return b"".join(array.tobytes() for array in arrays)


def run_nms(
    kernels,
    heads,
    *,
    conf=0.25,
    iou=0.45,
    max_det=100,
    max_candidates=30_000,
    multi_label=True,
    class_agnostic=False,
    memory=None,
    stream=None,
):
    """Call y7_nms with arrays. Outputs and workspace contain garbage before; asserts the status Y7_OK."""
    memory = memory or HostMemory()
    structs, kept_alive = heads.structs(memory)
    batch = len(heads.maps[0])
    kind = {"float32": FLOAT32, "float16": FLOAT16}[heads.maps[0].dtype.name]
    params = NmsParams(batch, len(structs), heads.classes, max_det, max_candidates, kind)
    buffers = {
        "num_dets": memory.garbage((batch, 1), np.int32),
        "boxes": memory.garbage((batch, max_det, 4), np.float32),
        "scores": memory.garbage((batch, max_det), np.float32),
        "classes": memory.garbage((batch, max_det), np.int32),
        "overflow": memory.garbage((batch, 1), np.int32),
    }
    outputs = NmsOutputs(**{name: buffer.address for name, buffer in buffers.items()})
    size = kernels.y7_nms_workspace(params)
    workspace = memory.garbage((size,), np.uint8)
    thresholds = [memory.upload(np.array([value], np.float32)) for value in (conf, iou, multi_label, class_agnostic)]
    pointers = NmsThresholds(*(threshold.address for threshold in thresholds))
    status = kernels.y7_nms(params, structs, pointers, outputs, workspace.address, size, stream)
    assert status == OK, kernels.status_text(status)
    memory.download(workspace)
    for buffer in (*kept_alive, *thresholds):
        memory.download(buffer)
    return NmsResult(**{name: memory.download(buffer) for name, buffer in buffers.items()})


SIGMOIDS_PER_ROW = 128


def sigmoid_of(kernels, logits, *, memory=None):
    """Return the kernels' float32 sigmoid of an array, so that a reference can be bit-equal.

    Two implementations of expf may differ in the last bit, which changes comparisons with thresholds and the order of
    scores. Here one-class maps have the logits as objectness and no boxes overlap, so the scores are the sigmoids.
    The x coordinate of each box identifies its logit.
    """
    values, index = np.unique(np.asarray(logits, np.float32), return_inverse=True)
    rows = -(-len(values) // SIGMOIDS_PER_ROW)
    maps = np.zeros((rows, 18, 1, SIGMOIDS_PER_ROW), np.float32)
    maps[:, 4::6] = -np.inf
    maps[:, 4, 0] = np.pad(values, (0, rows * SIGMOIDS_PER_ROW - len(values))).reshape(rows, -1)
    sigmoids = np.zeros((rows, SIGMOIDS_PER_ROW), np.float32)
    for first in range(0, rows, 1024):
        heads = Heads(maps=(maps[first : first + 1024],), strides=(1,), anchors=(((1, 1),) * 3,))
        result = run_nms(kernels, heads, conf=0, iou=1, max_det=SIGMOIDS_PER_ROW, memory=memory)
        for row in range(len(result.num_dets)):
            found = int(result.num_dets[row, 0])
            column = result.boxes[row, :found, 0].astype(np.int64)  # the left edge is the index of the cell
            sigmoids[first + row, column] = result.scores[row, :found]
    sigmoids = sigmoids.reshape(-1)[: len(values)]
    sigmoids[np.isnan(values)] = np.nan
    return sigmoids[index].reshape(np.shape(logits))


def decoded(heads, sigmoid):
    """Return the decoded heads, float32 [B, A, 5 + C]: cx, cy, w, h in pixels, objectness, class probabilities."""
    levels = []
    for array, stride, anchors in zip(heads.maps, heads.strides, heads.anchors, strict=True):
        batch, _, height, width = array.shape
        y = sigmoid(array.astype(np.float32)).reshape(batch, 3, 5 + heads.classes, height, width)
        y = y.transpose(0, 1, 3, 4, 2)
        row, column = np.mgrid[:height, :width]
        cell = np.stack([column, row], -1).astype(np.float32)
        centre = (y[..., :2] * np.float32(2) - np.float32(0.5) + cell) * np.float32(stride)
        size = (y[..., 2:4] * np.float32(2)) ** 2 * np.array(anchors, np.float32)[:, None, None]
        levels.append(np.concatenate([centre, size, y[..., 4:]], -1).reshape(batch, -1, 5 + heads.classes))
    return np.concatenate(levels, 1)
