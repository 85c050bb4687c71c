"""What every part is given: the GPU or its stand-in, the kernels, a place for results, and a clock."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolov7_deploy.runtimes.cuda import Cuda, DeviceBuffer, Event, Graph, Stream, open_cuda
from yolov7_deploy.runtimes.cudart import LibraryRuntime

Array = npt.NDArray[Any]
GUARD = 512  # bytes before and behind a buffer that nobody may write, a multiple of every vector load
GUARD_BYTE, GARBAGE_BYTE = 0x5C, 0xAB
KERNELS, PLUGIN = "liby7_kernels.so", "liby7_plugin_v2.so"
SUPPRESSED = "{}-nms.onnx"  # a network with made-up weights and NMS inside


@dataclass(kw_only=True, slots=True)
class Setting:
    """Where a part runs.

    Attributes:
        folder: What `prepare` wrote.
        result: JSON file of this part, rewritten at every `record`.
        emulated: Kernels run on the emulated GPU and the CUDA runtime is a fake one, with few small cases.
    """

    folder: Path
    result: Path
    emulated: bool = False
    results: dict[str, object] = field(default_factory=dict)

    def record(self, name: str, value: object) -> None:
        """Keeps a figure, at once in the file as well: a crash later loses nothing."""
        self.results[name] = value
        temporary = self.result.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1, sort_keys=True, default=str), encoding="utf-8")
        temporary.replace(self.result)
        print(f"{name}: {value}", flush=True)

    def some(self, real: int, emulated: int) -> int:
        """How many: thousands on a GPU, a few where every thread of it is emulated."""
        return emulated if self.emulated else real

    def open_cuda(self) -> Cuda:
        """The CUDA runtime, ready for this thread."""
        if self.emulated:
            from tests.fakes.faked_cuda import fake_cudart

            cuda = Cuda(LibraryRuntime(str(fake_cudart())))
        else:
            cuda = open_cuda()
        cuda.set_device(0)
        return cuda

    def open_kernels(self) -> Any:
        """The library of the C ABI."""
        from tests.fakes.emulated_kernels import Kernels, emulated

        if self.emulated:
            return emulated("nms.cu", "letterbox.cu")
        return Kernels(os.environ.get("Y7_KERNELS") or self.folder / KERNELS)


class GuardedDevice:
    """A device buffer between two zones that nobody may write."""

    def __init__(self, memory: CudaMemory, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self.buffer = DeviceBuffer(memory.cuda, (self.nbytes + 2 * memory.guard,), np.uint8)
        self.address = self.buffer.pointer + memory.guard


class CudaMemory:
    """The memory interface of tests/fakes/emulated_kernels.py over a CUDA runtime.

    Without guard zones buffers have their exact size and garbage is what was there, so that compute-sanitizer sees
    reads beyond an end and reads of what was never written.
    """

    def __init__(self, cuda: Cuda, stream: Stream, *, guard: int = GUARD) -> None:
        self.cuda, self.stream, self.guard = cuda, stream, guard

    def upload(self, array: Array) -> GuardedDevice:
        """A buffer with this content."""
        made = GuardedDevice(self, array.shape, array.dtype)
        self._fill(made, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return made

    def garbage(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> GuardedDevice:
        """A buffer with any content but zeros."""
        made = GuardedDevice(self, shape, dtype)
        if self.guard:
            self._fill(made, np.full(made.nbytes, GARBAGE_BYTE, np.uint8))
        return made

    def _fill(self, made: GuardedDevice, content: Array) -> None:
        whole = np.full(made.buffer.nbytes, GUARD_BYTE, np.uint8)
        whole[self.guard : self.guard + made.nbytes] = content
        self.stream.upload(made.buffer, whole)
        self.stream.synchronize()

    def download(self, made: GuardedDevice) -> Array:
        """The content, after all work is done; fails if something was written outside."""
        self.cuda.call("cudaStreamSynchronize", 0)  # the tests' own cases run on the default stream
        whole = np.empty(made.buffer.nbytes, np.uint8)
        self.stream.download(whole, made.buffer)
        self.stream.synchronize()
        assert (whole[: self.guard] == GUARD_BYTE).all(), "written before the begin of a buffer"
        assert (whole[self.guard + made.nbytes :] == GUARD_BYTE).all(), "written beyond the end of a buffer"
        return whole[self.guard : self.guard + made.nbytes].view(made.dtype).reshape(made.shape)


REPEATS = 20  # of the work in one graph
BLOCK = 5  # measurements queued behind one delay
DELAY_BYTES, DELAY_FILLS = 512 * 2**20, 4  # about half a millisecond of a large GPU
WARM_S = 0.1  # until the clocks are up


def times_us(stream: Stream, work: Callable[[], object], *, rounds: int) -> dict[str, float]:
    """Microseconds of the work by events of its stream, medians: call by call, as a graph, and in a row.

    The GPU is kept busy while measurements are queued, so that it never waits for Python in between.
    `repeated_us` is one of REPEATS in a single graph, so without what a launch costs.
    """

    def repeated() -> None:
        for _ in range(REPEATS):
            work()

    clock = _Clock(stream)
    work()
    stream.synchronize()
    with Graph(stream, work) as one, Graph(stream, repeated) as many:
        clock.warm(lambda: one.launch(stream))
        times = {
            "plain_us": clock.median_us(work, rounds),
            "graph_us": clock.median_us(lambda: one.launch(stream), rounds),
            "repeated_us": clock.median_us(lambda: many.launch(stream), max(rounds // REPEATS, 3)) / REPEATS,
        }
    return {name: round(value, 2) for name, value in times.items()}


class _Clock:
    """Times work on a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        free, _ = stream.cuda.memory()
        self.delay = DeviceBuffer(stream.cuda, (min(DELAY_BYTES, free // 64),), np.uint8)

    def _wait(self) -> None:
        for _ in range(DELAY_FILLS):
            self.stream.fill(self.delay, 0)

    def warm(self, work: Callable[[], object]) -> None:
        """Keeps the GPU busy for a moment."""
        started = time.monotonic()
        while time.monotonic() - started < WARM_S:
            self._wait()
            work()
            self.stream.synchronize()

    def median_us(self, work: Callable[[], object], rounds: int) -> float:
        """Median microseconds of one call."""
        cuda, stream = self.stream.cuda, self.stream
        marks = [(Event(cuda), Event(cuda)) for _ in range(rounds)]
        for number, (start, end) in enumerate(marks):
            if number % BLOCK == 0:
                stream.synchronize()
                self._wait()
            start.record(stream)
            work()
            end.record(stream)
        stream.synchronize()
        return statistics.median(end.seconds_since(start) for start, end in marks) * 1e6
