"""The environment of a part: the GPU or its emulation, the kernels, the result file, and time measurement."""

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
from yolov7_deploy.runtimes.cudart import LibcudartBinding

Array = npt.NDArray[Any]
GUARD = 512  # guard bytes before and after a buffer; a multiple of every vector load
GUARD_BYTE, GARBAGE_BYTE = 0x5C, 0xAB
KERNELS, PLUGIN = "liby7_kernels.so", "liby7_plugin_v2.so"
NMS_FILE = "{}-nms.onnx"  # a network with synthetic weights and NMS inside


@dataclass(kw_only=True, slots=True)
class Environment:
    """The environment in which a part runs.

    Attributes:
        folder: The files that `prepare` wrote.
        result: JSON file of this part, rewritten at every `record`.
        emulated: True if kernels run on the emulated GPU with a fake CUDA runtime, on few small cases.
        results: Everything recorded so far.
    """

    folder: Path
    result: Path
    emulated: bool = False
    results: dict[str, object] = field(default_factory=dict)

    def record(self, name: str, value: object) -> None:
        """Record a result, and write it to the file at once: a later crash does not lose it."""
        self.results[name] = value
        temporary = self.result.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1, sort_keys=True, default=str), encoding="utf-8")
        temporary.replace(self.result)
        print(f"{name}: {value}", flush=True)

    def choose(self, real: int, emulated: int) -> int:
        """Return the number for a real GPU, or the smaller one for the emulated GPU, which runs threads on the CPU."""
        return emulated if self.emulated else real

    def open_cuda(self) -> Cuda:
        """Return the CUDA runtime with device 0 selected for this thread."""
        if self.emulated:
            from tests.fakes.faked_cuda import fake_cudart

            cuda = Cuda(LibcudartBinding(str(fake_cudart())))
        else:
            cuda = open_cuda()
        cuda.set_device(0)
        return cuda

    def open_kernels(self) -> Any:
        """Return the kernels library, called through its C ABI."""
        from tests.fakes.emulated_kernels import Kernels, emulated

        if self.emulated:
            return emulated("nms.cu", "letterbox.cu")
        return Kernels(os.environ.get("Y7_KERNELS") or self.folder / KERNELS)


class GuardedDevice:
    """A device buffer between two guard zones."""

    def __init__(self, memory: CudaMemory, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self.buffer = DeviceBuffer(memory.cuda, (self.nbytes + 2 * memory.guard,), np.uint8)
        self.address = self.buffer.pointer + memory.guard


class CudaMemory:
    """The memory interface of tests/fakes/emulated_kernels.py, implemented with a CUDA runtime.

    Without guard zones, buffers have their exact size and `garbage` leaves them uninitialized, so that
    compute-sanitizer detects reads beyond the end and reads of uninitialized memory.
    """

    def __init__(self, cuda: Cuda, stream: Stream, *, guard: int = GUARD) -> None:
        self.cuda, self.stream, self.guard = cuda, stream, guard

    def upload(self, array: Array) -> GuardedDevice:
        """Return a buffer with the content of an array."""
        made = GuardedDevice(self, array.shape, array.dtype)
        self._fill(made, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return made

    def garbage(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> GuardedDevice:
        """Return a buffer whose content is arbitrary, but not zero."""
        made = GuardedDevice(self, shape, dtype)
        if self.guard:
            self._fill(made, np.full(made.nbytes, GARBAGE_BYTE, np.uint8))
        return made

    def _fill(self, made: GuardedDevice, content: Array) -> None:
        guarded = np.full(made.buffer.nbytes, GUARD_BYTE, np.uint8)
        guarded[self.guard : self.guard + made.nbytes] = content
        self.stream.upload(made.buffer, guarded)
        self.stream.synchronize()

    def download(self, made: GuardedDevice) -> Array:
        """Return the content after all work is done; fail if something was written to the guard zones."""
        self.cuda.call("cudaStreamSynchronize", 0)  # the tests' own cases run on the default stream
        guarded = np.empty(made.buffer.nbytes, np.uint8)
        self.stream.download(guarded, made.buffer)
        self.stream.synchronize()
        assert (guarded[: self.guard] == GUARD_BYTE).all(), "written before the start of a buffer"
        assert (guarded[self.guard + made.nbytes :] == GUARD_BYTE).all(), "written beyond the end of a buffer"
        return guarded[self.guard : self.guard + made.nbytes].view(made.dtype).reshape(made.shape)


REPEATS = 20  # repetitions of the work in one graph
BLOCK = 5  # measurements queued after one delay
DELAY_BYTES, DELAY_FILLS = 512 * 2**20, 4  # about half a millisecond on a large GPU
WARM_S = 0.1  # until the clocks have risen


def times_us(stream: Stream, work: Callable[[], object], *, rounds: int) -> dict[str, float]:
    """Return median microseconds of the work, by CUDA events: as plain calls, as a graph, and repeated in a graph.

    The GPU is kept busy while measurements are queued, so that it never waits for Python in between.
    `repeated_us` is the time of one of `REPEATS` repetitions in a single graph, so it excludes the launch overhead.
    """

    def repeated() -> None:
        for _ in range(REPEATS):
            work()

    timer = _EventTimer(stream)
    work()
    stream.synchronize()
    with Graph(stream, work) as one, Graph(stream, repeated) as many:
        timer.warm_up(lambda: one.launch(stream))
        times = {
            "plain_us": timer.median_us(work, rounds),
            "graph_us": timer.median_us(lambda: one.launch(stream), rounds),
            "repeated_us": timer.median_us(lambda: many.launch(stream), max(rounds // REPEATS, 3)) / REPEATS,
        }
    return {name: round(value, 2) for name, value in times.items()}


class _EventTimer:
    """Measures work on a stream with CUDA events."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        free, _ = stream.cuda.memory()
        self.delay = DeviceBuffer(stream.cuda, (min(DELAY_BYTES, free // 64),), np.uint8)

    def _wait(self) -> None:
        for _ in range(DELAY_FILLS):
            self.stream.fill(self.delay, 0)

    def warm_up(self, work: Callable[[], object]) -> None:
        """Keep the GPU busy until its clocks have risen."""
        started = time.monotonic()
        while time.monotonic() - started < WARM_S:
            self._wait()
            work()
            self.stream.synchronize()

    def median_us(self, work: Callable[[], object], rounds: int) -> float:
        """Return the median microseconds of one call."""
        cuda, stream = self.stream.cuda, self.stream
        events = [(Event(cuda), Event(cuda)) for _ in range(rounds)]
        for number, (start, end) in enumerate(events):
            if number % BLOCK == 0:
                stream.synchronize()
                self._wait()
            start.record(stream)
            work()
            end.record(stream)
        stream.synchronize()
        return statistics.median(end.seconds_since(start) for start, end in events) * 1e6
