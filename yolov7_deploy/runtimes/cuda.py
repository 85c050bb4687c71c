"""CUDA from Python without torch: memory, streams, events and graphs of one device.

The runtime API works in the device's primary context, which torch, cupy and TensorRT share. If another context of the
same device is current in a thread, such as one that pycuda created, `Cuda.set_device` keeps it, and `Cuda.working_on`
restores one of another device. The current device belongs to the thread, so every thread calls `set_device` before its
first work.

Objects with a handle are freed at the end of a `with` block, by `close()`, or when they are garbage collected. The
legacy default stream is never used: it waits for every other stream and cannot be captured.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
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
    CudaBinding,
    call_error,
    cuda_bindings,
    current_context,
    no_gpu_error,
    out_of_memory_error,
    restore_context,
    version,
)

Array = npt.NDArray[Any]

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_ON_GPU = (2, 3)  # cudaMemoryTypeDevice, cudaMemoryTypeManaged
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # cudaDeviceAttr
_INTEGRATED, _USES_HOST_PAGE_TABLES = 18, 100  # cudaDevAttrIntegrated, ...PageableMemoryAccessUsesHostPageTables
_NON_BLOCKING = 1  # a stream that does not wait for the legacy default stream
_NO_TIMING = 2  # an event without a time stamp
# Relaxed capture mode: other threads may allocate during a capture, and this one may free garbage.
_RELAXED = 2

_Self = TypeVar("_Self", bound="_Handle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Number, name, compute capability and memory of a GPU; `free_bytes` at the time of the query."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int


class Cuda:
    """The CUDA runtime through one binding.

    Attributes:
        binding: The binding.
        fault: The error that made everything created with this object unusable, else `None`.
    """

    def __init__(self, binding: CudaBinding) -> None:
        self.binding = binding
        self.fault: DeviceError | None = None
        self._pid = os.getpid()
        self._thread = threading.local()

    def __repr__(self) -> str:
        return f"Cuda({self.binding.name})"

    def call(self, function: str, *arguments: int) -> tuple[Any, ...]:
        """Call a function of the CUDA runtime and return its outputs.

        Raises:
            DeviceError: The call failed.
        """
        status, *results = self.binding.call(function, *arguments)
        if status:
            self.binding.call("cudaGetLastError")  # clears the error, which the next check would report again
            raise self._error(status, function)
        return tuple(results)

    def value(self, function: str, *arguments: int) -> int:
        """Call a function with one output and return it.

        Raises:
            DeviceError: The call failed.
        """
        (result,) = self.call(function, *arguments)
        return int(result)

    def _error(self, status: int, function: str) -> DeviceError:
        error = call_error(self.binding, status, function)
        if status in STICKY or status in CONTEXT_GONE:
            self.fault = DeviceError(error.message, fix=error.fix)  # without a traceback, which would keep memory alive
        return error

    def release(self, function: str, handle: int) -> None:
        """Free a handle. A child process of `os.fork` does nothing: its handles belong to the parent.

        The status is ignored: at the end of a process the driver may already be unloaded.
        """
        if os.getpid() == self._pid:
            self.binding.call(function, handle)

    def device_count(self) -> int:
        """Return the number of GPUs.

        Raises:
            DeviceError: There is no driver, the driver is too old for this runtime, or there is no GPU.
        """
        return self.value("cudaGetDeviceCount")

    def set_device(self, index: int) -> None:
        """Make a GPU the current device of this thread.

        Raises:
            DeviceError: There is no such GPU.
        """
        if current_context() is not None and self.value("cudaGetDevice") == index:
            return
        self.call("cudaSetDevice", index)

    @contextlib.contextmanager
    def working_on(self, index: int) -> Iterator[None]:
        """Make a GPU the current device of this thread until the end of the block, then restore the previous one.

        The previous context is restored too: it need not be the primary context that `cudaSetDevice` selects.
        """
        before = self.value("cudaGetDevice")
        context = current_context() if before != index else None
        if before != index or not getattr(self._thread, "is_set", False):
            self.set_device(index)
            self._thread.is_set = True
        try:
            yield
        finally:
            if context is not None:
                restore_context(context)
            elif before != index:
                self.binding.call("cudaSetDevice", before)

    def gpu_of(self, pointer: int) -> int | None:
        """Return the number of the GPU that an address belongs to; `None` for host memory."""
        status, kind, index = self.binding.pointer_device(pointer)
        if status:
            self.binding.call("cudaGetLastError")
        return index if status == 0 and kind in _ON_GPU else None

    def device(self) -> Device:
        """Return the current device of this thread."""
        index = self.value("cudaGetDevice")
        status, name = self.binding.device_name(index)
        if status:
            raise self._error(status, "cudaGetDeviceProperties")
        major = self.value("cudaDeviceGetAttribute", _CAPABILITY_MAJOR, index)
        minor = self.value("cudaDeviceGetAttribute", _CAPABILITY_MINOR, index)
        free, total = self.memory()
        return Device(index=index, name=name, compute_capability=(major, minor), memory_bytes=total, free_bytes=free)

    def reads_host_memory(self) -> bool:
        """Return whether the current device reads any host memory in place, at its own address and coherently.

        True for an integrated GPU that uses the page tables of the CPU. Other boards read page-locked memory in place,
        but without a cache, so a copy is faster there.
        """
        index = self.value("cudaGetDevice")
        return self._has(_INTEGRATED, index) and self._has(_USES_HOST_PAGE_TABLES, index)

    def _has(self, attribute: int, index: int) -> bool:
        """Return an attribute of a device that is 0 or 1; drivers that do not know it do not have it."""
        status, value = self.binding.call("cudaDeviceGetAttribute", attribute, index)
        if status:
            self.binding.call("cudaGetLastError")
        return status == 0 and bool(value)

    def memory(self) -> tuple[int, int]:
        """Return free and total memory of the current device in bytes."""
        free, total = self.call("cudaMemGetInfo")
        return int(free), int(total)

    def versions(self) -> tuple[str, str]:
        """Return the newest CUDA version that the driver supports, and that of this runtime: ("12.4", "12.2")."""
        return version(self.value("cudaDriverGetVersion")), version(self.value("cudaRuntimeGetVersion"))

    def allocate(self, function: str, nbytes: int, *flags: int) -> int:
        """Call an allocating function and return the pointer.

        Raises:
            DeviceError: Out of memory; the message states how much is needed and how much is free.
        """
        status, pointer = self.binding.call(function, max(nbytes, 1), *flags)
        if status == _OUT_OF_MEMORY:
            self.binding.call("cudaGetLastError")
            raise out_of_memory_error(self.binding, function, nbytes)
        if status:
            self.binding.call("cudaGetLastError")
            raise self._error(status, function)
        return int(pointer)


def open_cuda() -> Cuda:
    """Open the first binding that finds a GPU: cuda-python, then libcudart 13, 12 and 11.

    A runtime newer than the driver finds none. An old libcudart for an old driver is therefore tried after cuda-python.

    Raises:
        MissingLibraryError: There is no binding.
        DeviceError: There is no driver, it is too old for every runtime here, or there is no GPU.
    """
    refused: list[tuple[CudaBinding, int]] = []
    for binding in cuda_bindings():
        status, count = binding.call("cudaGetDeviceCount")
        if status == 0 and count > 0:
            return Cuda(binding)
        binding.call("cudaGetLastError")
        refused.append((binding, status or NO_DEVICE))
    if not refused:
        raise MissingLibraryError(
            "A CUDA runtime is needed; there is neither cuda-python nor libcudart.so.13, .12 or .11.0 (CUDA >= 11.4).",
            fix="pip install 'yolov7-deploy[tensorrt]'",
        )
    # A runtime that the driver accepts reports the cause more precisely than one it rejects.
    raise no_gpu_error(*min(refused, key=lambda pair: pair[1] == INSUFFICIENT_DRIVER))


class _Handle:
    """An object of the CUDA runtime with a handle that is freed once."""

    def __init__(self, cuda: Cuda, handle: int, release: str) -> None:
        self.cuda = cuda
        self.handle = handle
        self._finalizer = weakref.finalize(self, cuda.release, release, handle)

    def close(self) -> None:
        """Free it; calling it twice is fine."""
        self._finalizer()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DeviceBuffer(_Handle):
    """Uninitialized GPU memory with a shape and a type.

    `torch.as_tensor(buffer, device="cuda")`, cupy and numba use it without a copy. They do not keep it alive.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        super().__init__(cuda, cuda.allocate("cudaMalloc", self.nbytes), "cudaFree")

    @property
    def pointer(self) -> int:
        """The address on the GPU."""
        return self.handle

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """Version 3 without a stream: the reader must wait for the stream that writes the memory."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.handle, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


class PinnedBuffer:
    """Page-locked host memory as a NumPy array, for asynchronous copies to and from the GPU.

    The memory is freed with the last view of the array, also after `close()`.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        pointer = cuda.allocate("cudaHostAlloc", self.nbytes, 0)
        memory = (ctypes.c_uint8 * self.nbytes).from_address(pointer)
        # Tied to the object that every view references in the end, not to this one.
        weakref.finalize(memory, cuda.release, "cudaFreeHost", pointer)
        self._array: Array | None = np.ndarray(shape, self.dtype, buffer=memoryview(memory))

    @property
    def array(self) -> Array:
        """The memory, writable."""
        assert self._array is not None, "closed"
        return self._array

    def close(self) -> None:
        """Drop this object's reference to the memory."""
        self._array = None

    def __enter__(self) -> PinnedBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Event(_Handle):
    """A CUDA event; with `timing`, it records the time."""

    def __init__(self, cuda: Cuda, *, timing: bool = True) -> None:
        super().__init__(cuda, cuda.value("cudaEventCreateWithFlags", 0 if timing else _NO_TIMING), "cudaEventDestroy")

    def record(self, stream: Stream) -> None:
        """Record the event after the work queued so far."""
        self.cuda.call("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until the event has completed."""
        self.cuda.call("cudaEventSynchronize", self.handle)

    def seconds_since(self, start: Event) -> float:
        """Return the time between two completed events; the resolution is about 0.5 microseconds."""
        return float(self.cuda.call("cudaEventElapsedTime", start.handle, self.handle)[0]) / 1e3


class Stream(_Handle):
    """A CUDA stream. Copies are asynchronous: the caller keeps source and destination alive until `synchronize`."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__(cuda, cuda.value("cudaStreamCreateWithFlags", _NON_BLOCKING), "cudaStreamDestroy")

    def synchronize(self) -> None:
        """Wait until all queued work is done.

        Raises:
            DeviceError: Some of it failed.
        """
        self.cuda.call("cudaStreamSynchronize", self.handle)

    def wait(self, event: Event) -> None:
        """Make later work of this stream wait for an event of another stream; the host does not wait."""
        self.cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def follow(self, handle: int) -> None:
        """Make later work wait for the work queued so far on another library's stream; the host does not wait."""
        with Event(self.cuda, timing=False) as event:
            self.cuda.call("cudaEventRecord", event.handle, handle)
            self.wait(event)

    def upload(self, buffer: DeviceBuffer, array: Array, *, offset: int = 0) -> None:
        """Queue a copy of a contiguous array into a buffer at a byte offset; asynchronous from a `PinnedBuffer`."""
        self._copy(buffer.handle + offset, _address(array), _checked_nbytes(array, buffer, offset), _TO_DEVICE)

    def download(self, array: Array, buffer: DeviceBuffer) -> None:
        """Queue a copy of the beginning of a buffer into a contiguous array, which it fills."""
        if not array.flags.writeable:
            raise ValueError("the array is read-only")
        self._copy(_address(array), buffer.handle, _checked_nbytes(array, buffer), _TO_HOST)

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Queue a copy between two addresses on the GPU."""
        self._copy(destination, source, nbytes, _ON_DEVICE)

    def _copy(self, destination: int, source: int, nbytes: int, kind: int) -> None:
        self.cuda.call("cudaMemcpyAsync", destination, source, nbytes, kind, self.handle)

    def fill(self, buffer: DeviceBuffer, value: int) -> None:
        """Queue a memset of a buffer to one byte value."""
        self.cuda.call("cudaMemsetAsync", buffer.handle, value, buffer.nbytes, self.handle)


def _address(array: Array) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("the array is not contiguous")
    return array.ctypes.data


def _checked_nbytes(array: Array, buffer: DeviceBuffer, offset: int = 0) -> int:
    if offset + array.nbytes > buffer.nbytes:
        raise ValueError(f"the array has {array.nbytes} bytes, the buffer {buffer.nbytes - offset}")
    return array.nbytes


class Graph(_Handle):
    """A CUDA graph of the work that the function `work` queues on a stream; it is captured, not executed.

    Addresses and launch sizes are captured; the memory at these addresses is read at every launch. All memory that the
    work uses must outlive the graph.

    Raises:
        DeviceError: The work contains something that cannot be captured, such as a synchronisation.
    """

    def __init__(self, stream: Stream, work: Callable[[], object]) -> None:
        cuda = stream.cuda
        cuda.call("cudaStreamBeginCapture", stream.handle, _RELAXED)
        try:
            work()
        except BaseException:
            _, captured = cuda.binding.call("cudaStreamEndCapture", stream.handle)
            _release(cuda, "cudaGraphDestroy", [captured])
            raise
        captured = cuda.value("cudaStreamEndCapture", stream.handle)
        try:
            super().__init__(cuda, cuda.value("cudaGraphInstantiateWithFlags", captured, 0), "cudaGraphExecDestroy")
        finally:
            _release(cuda, "cudaGraphDestroy", [captured])

    def launch(self, stream: Stream) -> None:
        """Queue the graph on a stream."""
        self.cuda.call("cudaGraphLaunch", self.handle, stream.handle)


def _release(cuda: Cuda, function: str, handles: Iterable[int]) -> None:
    for handle in handles:
        if handle:
            cuda.binding.call(function, handle)
    cuda.binding.call("cudaGetLastError")
