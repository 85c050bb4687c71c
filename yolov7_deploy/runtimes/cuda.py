"""CUDA from Python: one device's memory, streams, events and graphs, without torch.

The runtime API works in the device's primary context, which torch, cupy and TensorRT share. A thread in which another
context is current already, such as one that pycuda made, keeps it: `Cuda.set_device` leaves it alone where it is of the
wanted device. The choice of device belongs to the thread, so every thread calls `set_device` before its first work.

Everything with a handle closes itself at the end of a `with`, by `close()`, or when nobody refers to it any more.
Nothing here uses the legacy default stream: it would wait for every other stream and cannot be captured.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import DeviceError, MissingLibraryError
from yolov7_deploy.runtimes.cudart import (
    CONTEXT_GONE,
    INSUFFICIENT_DRIVER,
    NO_DEVICE,
    STICKY,
    Runtime,
    absence,
    failure,
    has_current_context,
    out_of_memory,
    runtimes,
    version,
)

Array = npt.NDArray[Any]

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_ON_GPU = (2, 3)  # cudaMemoryTypeDevice, cudaMemoryTypeManaged
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # cudaDeviceAttr
_NON_BLOCKING = 1  # a stream that does not wait for the legacy default stream
_NO_TIMING = 2  # an event that only orders
# Other threads may allocate during a capture, and this one may free what it forgets meanwhile.
_RELAXED = 2

_Self = TypeVar("_Self", bound="_Owned")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU: its number, name, compute capability, and bytes of memory, `free` when it was asked."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int


class Cuda:
    """The CUDA runtime through one binding.

    Attributes:
        runtime: The binding.
        fault: The failure after which nothing made with it works any more, `None` as long as it does.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.fault: DeviceError | None = None
        self._thread = threading.local()

    def __repr__(self) -> str:
        return f"Cuda({self.runtime.name})"

    def call(self, function: str, *arguments: int) -> tuple[Any, ...]:
        """All that a function of the runtime gives back.

        Raises:
            DeviceError: It failed.
        """
        status, *results = self.runtime.call(function, *arguments)
        if status:
            self.runtime.call("cudaGetLastError")  # or the next check of anybody would find this failure
            raise self._error(status, function)
        return tuple(results)

    def value(self, function: str, *arguments: int) -> int:
        """The one number that a function of the runtime gives back.

        Raises:
            DeviceError: It failed.
        """
        (result,) = self.call(function, *arguments)
        return int(result)

    def _error(self, status: int, function: str) -> DeviceError:
        error = failure(self.runtime, status, function)
        if status in STICKY or status in CONTEXT_GONE:
            self.fault = DeviceError(error.message, fix=error.fix)  # without the frames of that call, and their memory
        return error

    def device_count(self) -> int:
        """Number of GPUs.

        Raises:
            DeviceError: There is no driver, or one too old for this runtime, or no GPU.
        """
        return self.value("cudaGetDeviceCount")

    def set_device(self, index: int) -> None:
        """Makes a GPU the one that this thread works on; once per thread.

        Raises:
            DeviceError: There is no such GPU.
        """
        if has_current_context() and self.value("cudaGetDevice") == index:
            return
        self.call("cudaSetDevice", index)

    @contextlib.contextmanager
    def working_on(self, index: int) -> Iterator[None]:
        """This thread works on that GPU until the end of the block, then on the one it worked on before."""
        before = self.value("cudaGetDevice")
        if before != index or not getattr(self._thread, "is_set", False):
            self.set_device(index)
            self._thread.is_set = True
        try:
            yield
        finally:
            if before != index:
                self.runtime.call("cudaSetDevice", before)

    def gpu_of(self, pointer: int) -> int | None:
        """Number of the GPU that an address lies on; `None` for host memory."""
        status, kind, index = self.runtime.pointer_device(pointer)
        if status:
            self.runtime.call("cudaGetLastError")
        return index if status == 0 and kind in _ON_GPU else None

    def device(self) -> Device:
        """The GPU that this thread works on."""
        index = self.value("cudaGetDevice")
        status, name = self.runtime.device_name(index)
        if status:
            raise self._error(status, "cudaGetDeviceProperties")
        major = self.value("cudaDeviceGetAttribute", _CAPABILITY_MAJOR, index)
        minor = self.value("cudaDeviceGetAttribute", _CAPABILITY_MINOR, index)
        free, total = self.memory()
        return Device(index=index, name=name, compute_capability=(major, minor), memory_bytes=total, free_bytes=free)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of this thread's GPU."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def versions(self) -> tuple[str, str]:
        """The newest CUDA that the driver can run, and the CUDA of this runtime: ("12.4", "12.2")."""
        return version(self.value("cudaDriverGetVersion")), version(self.value("cudaRuntimeGetVersion"))

    def allocate(self, function: str, nbytes: int, *flags: int) -> int:
        """A pointer from an allocating function.

        Raises:
            DeviceError: Out of memory, with the need and what is there.
        """
        status, pointer = self.runtime.call(function, max(nbytes, 1), *flags)
        if status == _OUT_OF_MEMORY:
            self.runtime.call("cudaGetLastError")
            raise out_of_memory(self.runtime, function, nbytes)
        if status:
            self.runtime.call("cudaGetLastError")
            raise self._error(status, function)
        return int(pointer)


def open_cuda() -> Cuda:
    """The first binding that sees a GPU: cuda-python, then libcudart 13, 12 and 11.

    A runtime newer than the driver sees none, so an old libcudart on an old driver is found behind a new cuda-python.

    Raises:
        MissingLibraryError: There is no binding at all.
        DeviceError: No driver, a driver too old for every runtime here, or no GPU.
    """
    refused: list[tuple[Runtime, int]] = []
    for runtime in runtimes():
        status, count = runtime.call("cudaGetDeviceCount")
        if status == 0 and count > 0:
            return Cuda(runtime)
        runtime.call("cudaGetLastError")
        refused.append((runtime, status or NO_DEVICE))
    if not refused:
        raise MissingLibraryError(
            "A CUDA runtime is needed; there is neither cuda-python nor libcudart.so.13, .12 or .11.0 (CUDA >= 11.4).",
            fix="pip install 'yolov7-deploy[tensorrt]'",
        )
    # A runtime that a driver accepts knows more about what is missing than one it refuses.
    raise absence(*min(refused, key=lambda pair: pair[1] == INSUFFICIENT_DRIVER))


class _Owned:
    """Something of the runtime with a handle, given back once."""

    def __init__(self, cuda: Cuda, handle: int, release: str) -> None:
        self.cuda = cuda
        self.handle = handle
        # The status is left aside: at the end of a process the driver may be gone before us.
        self._finalizer = weakref.finalize(self, cuda.runtime.call, release, handle)

    def close(self) -> None:
        """Gives it back; a second time does nothing."""
        self._finalizer()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DeviceBuffer(_Owned):
    """Memory of the GPU with a shape and a type, contents undefined.

    `torch.as_tensor(buffer, device="cuda")`, cupy and numba take it without a copy. They do not keep it alive.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        super().__init__(cuda, cuda.allocate("cudaMalloc", self.nbytes), "cudaFree")

    @property
    def pointer(self) -> int:
        """Its address on the GPU."""
        return self.handle

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """Version 3, without a stream: whoever reads it waits for the stream that fills it."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.handle, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


class PinnedBuffer:
    """Page-locked host memory as a NumPy array; the GPU copies to and from it while Python goes on.

    The memory lives as long as the array or any view of it, also after `close()`.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        pointer = cuda.allocate("cudaHostAlloc", self.nbytes, 0)
        memory = (ctypes.c_uint8 * self.nbytes).from_address(pointer)
        # Tied to what every view refers to in the end, not to this object.
        weakref.finalize(memory, cuda.runtime.call, "cudaFreeHost", pointer)
        self._array: Array | None = np.ndarray(shape, self.dtype, buffer=memoryview(memory))

    @property
    def array(self) -> Array:
        """The memory, writable."""
        assert self._array is not None, "closed"
        return self._array

    def close(self) -> None:
        """Lets go of the memory."""
        self._array = None

    def __enter__(self) -> PinnedBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Event(_Owned):
    """A mark in a stream; with `timing`, one that takes the time."""

    def __init__(self, cuda: Cuda, *, timing: bool = True) -> None:
        super().__init__(cuda, cuda.value("cudaEventCreateWithFlags", 0 if timing else _NO_TIMING), "cudaEventDestroy")

    def record(self, stream: Stream) -> None:
        """Sets the mark behind what the stream has to do so far."""
        self.cuda.call("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Waits until the mark is passed."""
        self.cuda.call("cudaEventSynchronize", self.handle)

    def seconds_since(self, start: Event) -> float:
        """Time between two marks that were passed; the clock ticks about every half microsecond."""
        return float(self.cuda.call("cudaEventElapsedTime", start.handle, self.handle)[0]) / 1e3


class Stream(_Owned):
    """A queue of GPU work. Copies return at once: the caller keeps both ends alive until `synchronize`."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__(cuda, cuda.value("cudaStreamCreateWithFlags", _NON_BLOCKING), "cudaStreamDestroy")

    def synchronize(self) -> None:
        """Waits until everything queued is done.

        Raises:
            DeviceError: Some of it failed.
        """
        self.cuda.call("cudaStreamSynchronize", self.handle)

    def wait(self, event: Event) -> None:
        """Lets later work of this stream wait for an event of another one; the caller does not wait."""
        self.cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def follow(self, handle: int) -> None:
        """Lets later work wait for what another library's stream has to do so far; nobody else waits."""
        with Event(self.cuda, timing=False) as event:
            self.cuda.call("cudaEventRecord", event.handle, handle)
            self.wait(event)

    def upload(self, buffer: DeviceBuffer, array: Array, *, offset: int = 0) -> None:
        """Queues a copy of a contiguous array into a buffer, from a byte on; asynchronous from a `PinnedBuffer`."""
        self._copy(buffer.handle + offset, _address(array), _fitting(array, buffer, offset), _TO_DEVICE)

    def download(self, array: Array, buffer: DeviceBuffer) -> None:
        """Queues a copy of the beginning of a buffer that fills a contiguous array."""
        if not array.flags.writeable:
            raise ValueError("the array is read-only")
        self._copy(_address(array), buffer.handle, _fitting(array, buffer), _TO_HOST)

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Queues a copy between two addresses on the GPU."""
        self._copy(destination, source, nbytes, _ON_DEVICE)

    def _copy(self, destination: int, source: int, nbytes: int, kind: int) -> None:
        self.cuda.call("cudaMemcpyAsync", destination, source, nbytes, kind, self.handle)

    def fill(self, buffer: DeviceBuffer, value: int) -> None:
        """Queues the filling of a buffer with one byte value."""
        self.cuda.call("cudaMemsetAsync", buffer.handle, value, buffer.nbytes, self.handle)


def _address(array: Array) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("the array is not contiguous")
    return array.ctypes.data


def _fitting(array: Array, buffer: DeviceBuffer, offset: int = 0) -> int:
    if offset + array.nbytes > buffer.nbytes:
        raise ValueError(f"the array has {array.nbytes} bytes, the buffer {buffer.nbytes - offset}")
    return array.nbytes


class Graph(_Owned):
    """Work recorded once, launched as one: `work` queues it on the stream, where it is recorded instead of done.

    Addresses and launch sizes are recorded; what the addresses hold is read at every launch. Everything that the work
    touches must outlive the graph.

    Raises:
        DeviceError: The work did something that cannot be recorded, such as waiting for the stream.
    """

    def __init__(self, stream: Stream, work: Callable[[], object]) -> None:
        cuda = stream.cuda
        cuda.call("cudaStreamBeginCapture", stream.handle, _RELAXED)
        try:
            work()
        except BaseException:
            _, recorded = cuda.runtime.call("cudaStreamEndCapture", stream.handle)
            _release(cuda, "cudaGraphDestroy", [recorded])
            raise
        recorded = cuda.value("cudaStreamEndCapture", stream.handle)
        try:
            super().__init__(cuda, cuda.value("cudaGraphInstantiateWithFlags", recorded, 0), "cudaGraphExecDestroy")
        finally:
            _release(cuda, "cudaGraphDestroy", [recorded])

    def launch(self, stream: Stream) -> None:
        """Queues all of it on a stream."""
        self.cuda.call("cudaGraphLaunch", self.handle, stream.handle)


def _release(cuda: Cuda, function: str, handles: Iterable[int]) -> None:
    for handle in handles:
        if handle:
            cuda.runtime.call(function, handle)
    cuda.runtime.call("cudaGetLastError")
