"""Bindings of the CUDA runtime API: functions by name, with plain integers as arguments and results.

There are two bindings with the same interface: `cuda.bindings` of cuda-python, and a libcudart loaded with ctypes,
which is part of every CUDA image, of JetPack and of the wheels that PyTorch and TensorRT depend on. Both release the
GIL during a call. `cuda.py` wraps them into objects.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any, Protocol

try:
    from cuda.bindings import runtime as cuda_runtime
except ImportError:
    try:
        from cuda import cudart as cuda_runtime  # cuda-python before 12.6
    except ImportError:
        cuda_runtime = None

from yolov7_deploy.errors import DeviceError

INSUFFICIENT_DRIVER, NO_DEVICE = 35, 100  # cudaErrorInsufficientDriver, cudaErrorNoDevice
INVALID_DEVICE = 101  # cudaErrorInvalidDevice
# After these errors the context is lost, and every later call of this process fails.
STICKY = frozenset({700, 702, 710, 714, 715, 716, 717, 718, 719})
# cudaErrorDeviceUninitialized, cudaErrorContextIsDestroyed: other code destroyed the context.
CONTEXT_GONE = frozenset({201, 709})
DRIVER = "libcuda.so.1"
CUDART_VERSIONS = ("13", "12", "11.0")  # sonames; every CUDA 11 has 11.0
# Folders of NVIDIA's wheels in site-packages; the first is that of CUDA 13.
WHEEL_FOLDERS = ("nvidia/cu13/lib", "nvidia/cuda_runtime/lib")
TOOLKIT_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/aarch64-linux/lib", "targets/sbsa-linux/lib")
TOOLKIT = Path("/usr/local/cuda")

# Output types after the status, then input types. Pointers and handles are plain integers.
_POINTER, _INT, _UINT, _SIZE = c_void_p, c_int, c_uint, c_size_t
SIGNATURES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "cudaDeviceGetAttribute": ((_INT,), (_INT, _INT)),
    "cudaDriverGetVersion": ((_INT,), ()),
    "cudaEventCreateWithFlags": ((_POINTER,), (_UINT,)),
    "cudaEventDestroy": ((), (_POINTER,)),
    "cudaEventElapsedTime": ((c_float,), (_POINTER, _POINTER)),
    "cudaEventRecord": ((), (_POINTER, _POINTER)),
    "cudaEventSynchronize": ((), (_POINTER,)),
    "cudaFree": ((), (_POINTER,)),
    "cudaFreeHost": ((), (_POINTER,)),
    "cudaGetDevice": ((_INT,), ()),
    "cudaGetDeviceCount": ((_INT,), ()),
    "cudaGetLastError": ((), ()),
    "cudaGraphDestroy": ((), (_POINTER,)),
    "cudaGraphExecDestroy": ((), (_POINTER,)),
    "cudaGraphInstantiateWithFlags": ((_POINTER,), (_POINTER, c_ulonglong)),
    "cudaGraphLaunch": ((), (_POINTER, _POINTER)),
    "cudaHostAlloc": ((_POINTER,), (_SIZE, _UINT)),
    "cudaMalloc": ((_POINTER,), (_SIZE,)),
    "cudaMemGetInfo": ((_SIZE, _SIZE), ()),
    "cudaMemcpyAsync": ((), (_POINTER, _POINTER, _SIZE, _INT, _POINTER)),
    "cudaMemsetAsync": ((), (_POINTER, _INT, _SIZE, _POINTER)),
    "cudaRuntimeGetVersion": ((_INT,), ()),
    "cudaSetDevice": ((), (_INT,)),
    "cudaStreamBeginCapture": ((), (_POINTER, _INT)),
    "cudaStreamCreateWithFlags": ((_POINTER,), (_UINT,)),
    "cudaStreamDestroy": ((), (_POINTER,)),
    "cudaStreamEndCapture": ((_POINTER,), (_POINTER,)),
    "cudaStreamSynchronize": ((), (_POINTER,)),
    "cudaStreamWaitEvent": ((), (_POINTER, _POINTER, _UINT)),
}
_OUTPUTS_LAST = {"cudaStreamEndCapture"}  # all other functions have their outputs first
# Position of the argument that cuda-python expects as a member of an enumeration.
_ENUMERATIONS = {
    "cudaDeviceGetAttribute": (0, "cudaDeviceAttr"),
    "cudaMemcpyAsync": (3, "cudaMemcpyKind"),
    "cudaStreamBeginCapture": (1, "cudaStreamCaptureMode"),
}
_PROPERTIES_BYTES = 8192  # cudaDeviceProp is about 1 KB in every version, and starts with the name
_POINTER_INTS = 64  # cudaPointerAttributes is at most 96 bytes, and starts with memory type and device


class CudaBinding(Protocol):
    """A binding of the CUDA runtime; it returns the status of a call and never raises for one."""

    name: str

    def call(self, function: str, *arguments: int) -> tuple[Any, ...]:
        """Call one of `SIGNATURES`; return its status, followed by its outputs."""

    def device_name(self, device: int) -> tuple[int, str]:
        """Return the status and the name of a GPU."""

    def pointer_device(self, pointer: int) -> tuple[int, int, int]:
        """Return status, memory type (0 unknown, 1 host, 2 device, 3 managed) and device of an address."""

    def error_text(self, status: int) -> str:
        """Return name and description of a status."""


class CudaPythonBinding:
    """The CUDA runtime of cuda-python."""

    name = "cuda-python"

    def call(self, function: str, *arguments: int) -> tuple[Any, ...]:
        """See `CudaBinding`."""
        values: list[Any] = list(arguments)
        if function in _ENUMERATIONS:
            position, enumeration = _ENUMERATIONS[function]
            values[position] = getattr(cuda_runtime, enumeration)(values[position])
        try:
            status, *results = getattr(cuda_runtime, function)(*values)
        except RuntimeError:  # versions before 12.9 raise if there is no driver library
            return (INSUFFICIENT_DRIVER, *(0 for _ in SIGNATURES[function][0]))
        if int(status):
            return (int(status), *(0 for _ in SIGNATURES[function][0]))
        # Handles are wrapper objects; only their number is needed.
        return (0, *(result if isinstance(result, float) else int(result) for result in results))

    def device_name(self, device: int) -> tuple[int, str]:
        """See `CudaBinding`."""
        try:
            status, properties = cuda_runtime.cudaGetDeviceProperties(device)
        except RuntimeError:
            return INSUFFICIENT_DRIVER, ""
        return (int(status), "") if int(status) else (0, _decoded(properties.name))

    def pointer_device(self, pointer: int) -> tuple[int, int, int]:
        """See `CudaBinding`."""
        try:
            status, attributes = cuda_runtime.cudaPointerGetAttributes(pointer)
        except RuntimeError:
            return INSUFFICIENT_DRIVER, 0, 0
        return (int(status), 0, 0) if int(status) else (0, int(attributes.type), int(attributes.device))

    def error_text(self, status: int) -> str:
        """See `CudaBinding`."""
        try:
            error = cuda_runtime.cudaError_t(status)
        except ValueError:  # newer than the binding
            return f"CUDA error {status}"
        try:
            parts = [cuda_runtime.cudaGetErrorName(error), cuda_runtime.cudaGetErrorString(error)]
        except RuntimeError:
            return str(error.name)
        return ": ".join(_decoded(text) for _, text in parts)


class LibcudartBinding:
    """A libcudart, loaded by path or name.

    Raises:
        OSError: It cannot be loaded.
        AttributeError: It lacks a function (CUDA before 11.4).
    """

    def __init__(self, path: str) -> None:
        self.name = path
        library = ctypes.CDLL(path)
        self._functions: dict[str, Any] = {}
        for name, (outputs, inputs) in SIGNATURES.items():
            function = getattr(library, name)
            pointers = [POINTER(kind) for kind in outputs]
            function.argtypes = [*inputs, *pointers] if name in _OUTPUTS_LAST else [*pointers, *inputs]
            function.restype = c_int
            self._functions[name] = function
        self._properties = library.cudaGetDeviceProperties
        self._properties.argtypes, self._properties.restype = [c_void_p, c_int], c_int
        self._attributes = library.cudaPointerGetAttributes
        self._attributes.argtypes, self._attributes.restype = [c_void_p, c_void_p], c_int
        self._texts = [library.cudaGetErrorName, library.cudaGetErrorString]
        for text in self._texts:
            text.argtypes, text.restype = [c_int], c_char_p

    def call(self, function: str, *arguments: int) -> tuple[Any, ...]:
        """See `CudaBinding`."""
        results = [kind() for kind in SIGNATURES[function][0]]
        pointers = map(byref, results)
        ordered = (*arguments, *pointers) if function in _OUTPUTS_LAST else (*pointers, *arguments)
        status = self._functions[function](*ordered)
        return (status, *(result.value or 0 for result in results))

    def device_name(self, device: int) -> tuple[int, str]:
        """See `CudaBinding`."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        return self._properties(properties, device), _decoded(properties.value)

    def pointer_device(self, pointer: int) -> tuple[int, int, int]:
        """See `CudaBinding`."""
        attributes = (c_int * _POINTER_INTS)()
        return self._attributes(attributes, pointer), attributes[0], attributes[1]

    def error_text(self, status: int) -> str:
        """See `CudaBinding`."""
        return ": ".join(_decoded(text(status)) for text in self._texts)


def _decoded(text: bytes | str | None) -> str:
    """Decode C text, which some bindings return padded with zeros."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    return (text or "").split("\0")[0]


def cuda_bindings() -> Iterator[CudaBinding]:
    """Yield every binding that loads, cuda-python first, then libcudart from the newest; each is loaded lazily."""
    if cuda_runtime is not None:
        yield CudaPythonBinding()
    for path in cudart_paths():
        try:
            yield LibcudartBinding(path)
        except (OSError, AttributeError):
            continue


def cudart_paths() -> list[str]:
    """Return where a libcudart may be: on the loader's path, in a wheel, in the toolkit; newest version first."""
    folders = [Path(entry or ".") / wheel for entry in sys.path for wheel in WHEEL_FOLDERS]
    folders += [TOOLKIT / folder for folder in TOOLKIT_FOLDERS]
    paths: list[str] = []
    for version in CUDART_VERSIONS:
        name = f"libcudart.so.{version}"
        paths += [name, *(str(folder / name) for folder in folders if (folder / name).is_file())]
    return list(dict.fromkeys(paths))


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """Return the driver library, if it is here with the functions that are called."""
    try:
        driver = ctypes.CDLL(DRIVER)
        driver.cuCtxGetCurrent.argtypes = [POINTER(c_void_p)]
        driver.cuCtxSetCurrent.argtypes = [c_void_p]
    except (OSError, AttributeError):
        return None
    return driver


def current_context() -> int | None:
    """Return the handle of the driver's context that is current in this thread, whichever library created it."""
    context, driver = c_void_p(), _driver()
    return context.value if driver is not None and driver.cuCtxGetCurrent(byref(context)) == 0 else None


def restore_context(context: int) -> None:
    """Make a context current in this thread; one that was destroyed in the meantime is left out."""
    driver = _driver()
    if driver is not None:
        driver.cuCtxSetCurrent(context)


def no_gpu_error(binding: CudaBinding, status: int) -> DeviceError:
    """Return the error that explains why a runtime finds no GPU."""
    driver, own = (binding.call(name)[1] for name in ("cudaDriverGetVersion", "cudaRuntimeGetVersion"))
    if status == INSUFFICIENT_DRIVER and driver == 0:
        return DeviceError(
            "There is no NVIDIA driver here (libcuda.so.1 is not found).",
            fix="Install the driver; in a container start it with: docker run --gpus all (Jetson: --runtime nvidia)",
        )
    if status == INSUFFICIENT_DRIVER:
        return DeviceError(
            f"The NVIDIA driver supports CUDA {version(driver)} at most; {binding.name} is CUDA {version(own)}.",
            fix=f"Update the driver, or: pip install 'cuda-python<{driver // 1000 + 1}'",
        )
    if status == NO_DEVICE:
        return DeviceError(
            "The NVIDIA driver finds no GPU.",
            fix="Check nvidia-smi -L, CUDA_VISIBLE_DEVICES, and that the container was started with --gpus all.",
        )
    return DeviceError(
        f"The CUDA runtime {binding.name} does not start ({binding.error_text(status)}).",
        fix="Check nvidia-smi; reboot if the driver was just updated.",
    )


def call_error(binding: CudaBinding, status: int, function: str) -> DeviceError:
    """Return the error for a status other than success."""
    text = binding.error_text(status)
    if status in (INSUFFICIENT_DRIVER, NO_DEVICE):
        return no_gpu_error(binding, status)
    if status == INVALID_DEVICE:
        return DeviceError(f"There is no such GPU ({function}: {text}).", fix="List them with: nvidia-smi -L")
    if status in CONTEXT_GONE:
        message = f"{function} failed ({text}): the CUDA context that this model was opened in was destroyed."
        fix = "Keep the context alive (pycuda: do not detach it), and open the model again."
        return DeviceError(message, fix=fix)
    if status in STICKY:
        message = f"{function} failed ({text}): the CUDA context is lost, possibly because of earlier work."
        return DeviceError(message, fix="Restart the program; compute-sanitizer finds the cause.")
    return DeviceError(f"{function} failed ({text}).", fix="y7 doctor shows the GPU, its driver and its libraries.")


def out_of_memory_error(binding: CudaBinding, function: str, nbytes: int) -> DeviceError:
    """Return the error of an allocating function: how much memory is needed, and how much is free."""
    if function == "cudaHostAlloc":
        return DeviceError(
            f"{_mib(nbytes)} of page-locked host memory are needed and cannot be allocated.",
            fix="Use a smaller --batch, or raise the limit of locked memory (ulimit -l).",
        )
    _, free, total = binding.call("cudaMemGetInfo")
    return DeviceError(
        f"{_mib(nbytes)} of GPU memory are needed; {_mib(free)} of {_mib(total)} are free.",
        fix="Use a smaller --batch or --img, or end other programs on this GPU (nvidia-smi lists them).",
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def version(number: int) -> str:
    """Format a CUDA version: 12.4 for 12040."""
    return f"{number // 1000}.{number % 1000 // 10}"
