"""The CUDA runtime API by name, through whichever binding this machine has.

Two bindings answer the same calls: the `cuda.bindings` of cuda-python, and a libcudart opened with ctypes, which is in
every CUDA image, in JetPack and in the wheels that bring PyTorch or TensorRT. Both release the interpreter lock while
a call runs. `cuda.py` makes objects of them.
"""

from __future__ import annotations

import ctypes
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
# After these the context is lost, and with it every call of this process.
STICKY = frozenset({700, 702, 710, 714, 715, 716, 717, 718, 719})
# cudaErrorDeviceUninitialized, cudaErrorContextIsDestroyed: somebody took the context away.
CONTEXT_GONE = frozenset({201, 709})
CUDART_VERSIONS = ("13", "12", "11.0")  # sonames; 11.0 is that of every CUDA 11
# Where wheels put it, beside this package's own folder; the first is CUDA 13's place.
WHEEL_FOLDERS = ("nvidia/cu13/lib", "nvidia/cuda_runtime/lib")
TOOLKIT_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/aarch64-linux/lib", "targets/sbsa-linux/lib")
TOOLKIT = Path("/usr/local/cuda")

# What a call gives back behind its status, then what it takes. Pointers and handles are plain integers.
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
_OUTPUTS_LAST = {"cudaStreamEndCapture"}  # all others have them first
# Arguments that cuda-python wants as members of its enumerations.
_ENUMERATIONS = {
    "cudaDeviceGetAttribute": (0, "cudaDeviceAttr"),
    "cudaMemcpyAsync": (3, "cudaMemcpyKind"),
    "cudaStreamBeginCapture": (1, "cudaStreamCaptureMode"),
}
_PROPERTIES_BYTES = 8192  # cudaDeviceProp is about 1 KB in every version, and begins with the name
_POINTER_INTS = 64  # cudaPointerAttributes is at most 96 bytes, and begins with the kind of memory and the device


class Runtime(Protocol):
    """One way to reach the CUDA runtime."""

    name: str

    def call(self, function: str, *arguments: int) -> tuple[Any, ...]:
        """The status of a call to one of `SIGNATURES`, and behind it what it gives back; never raises for a status."""

    def device_name(self, device: int) -> tuple[int, str]:
        """Status and name."""

    def pointer_device(self, pointer: int) -> tuple[int, int, int]:
        """Status, kind of memory (0 unknown, 1 host, 2 device, 3 managed) and device of an address."""

    def error_text(self, status: int) -> str:
        """Name and sentence of a status."""


class BindingsRuntime:
    """The runtime of cuda-python."""

    name = "cuda-python"

    def call(self, function: str, *arguments: int) -> tuple[Any, ...]:
        """See `Runtime`."""
        values: list[Any] = list(arguments)
        if function in _ENUMERATIONS:
            place, enumeration = _ENUMERATIONS[function]
            values[place] = getattr(cuda_runtime, enumeration)(values[place])
        try:
            status, *results = getattr(cuda_runtime, function)(*values)
        except RuntimeError:  # releases before 12.9 raise where there is no driver library
            return (INSUFFICIENT_DRIVER, *(0 for _ in SIGNATURES[function][0]))
        if int(status):
            return (int(status), *(0 for _ in SIGNATURES[function][0]))
        # Handles come as objects of their own; their number is all that anybody needs.
        return (0, *(result if isinstance(result, float) else int(result) for result in results))

    def device_name(self, device: int) -> tuple[int, str]:
        """See `Runtime`."""
        try:
            status, properties = cuda_runtime.cudaGetDeviceProperties(device)
        except RuntimeError:
            return INSUFFICIENT_DRIVER, ""
        return (int(status), "") if int(status) else (0, _decoded(properties.name))

    def pointer_device(self, pointer: int) -> tuple[int, int, int]:
        """See `Runtime`."""
        try:
            status, found = cuda_runtime.cudaPointerGetAttributes(pointer)
        except RuntimeError:
            return INSUFFICIENT_DRIVER, 0, 0
        return (int(status), 0, 0) if int(status) else (0, int(found.type), int(found.device))

    def error_text(self, status: int) -> str:
        """See `Runtime`."""
        try:
            error = cuda_runtime.cudaError_t(status)
        except ValueError:  # newer than the binding
            return f"CUDA error {status}"
        try:
            parts = [cuda_runtime.cudaGetErrorName(error), cuda_runtime.cudaGetErrorString(error)]
        except RuntimeError:
            return str(error.name)
        return ": ".join(_decoded(text) for _, text in parts)


class LibraryRuntime:
    """A libcudart, opened by its path or its name.

    Raises:
        OSError: It cannot be opened.
        AttributeError: It lacks a function (CUDA before 11.4).
    """

    def __init__(self, path: str) -> None:
        self.name = path
        library = ctypes.CDLL(path)
        self._functions: dict[str, Any] = {}
        for function, (outputs, inputs) in SIGNATURES.items():
            found = getattr(library, function)
            pointers = [POINTER(kind) for kind in outputs]
            found.argtypes = [*inputs, *pointers] if function in _OUTPUTS_LAST else [*pointers, *inputs]
            found.restype = c_int
            self._functions[function] = found
        self._properties = library.cudaGetDeviceProperties
        self._properties.argtypes, self._properties.restype = [c_void_p, c_int], c_int
        self._attributes = library.cudaPointerGetAttributes
        self._attributes.argtypes, self._attributes.restype = [c_void_p, c_void_p], c_int
        self._texts = [library.cudaGetErrorName, library.cudaGetErrorString]
        for text in self._texts:
            text.argtypes, text.restype = [c_int], c_char_p

    def call(self, function: str, *arguments: int) -> tuple[Any, ...]:
        """See `Runtime`."""
        results = [kind() for kind in SIGNATURES[function][0]]
        pointers = map(byref, results)
        ordered = (*arguments, *pointers) if function in _OUTPUTS_LAST else (*pointers, *arguments)
        status = self._functions[function](*ordered)
        return (status, *(result.value or 0 for result in results))

    def device_name(self, device: int) -> tuple[int, str]:
        """See `Runtime`."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        return self._properties(properties, device), _decoded(properties.value)

    def pointer_device(self, pointer: int) -> tuple[int, int, int]:
        """See `Runtime`."""
        attributes = (c_int * _POINTER_INTS)()
        return self._attributes(attributes, pointer), attributes[0], attributes[1]

    def error_text(self, status: int) -> str:
        """See `Runtime`."""
        return ": ".join(_decoded(text(status)) for text in self._texts)


def _decoded(text: bytes | str | None) -> str:
    """Text of C, which some bindings give padded with zeros."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    return (text or "").split("\0")[0]


def runtimes() -> Iterator[Runtime]:
    """Every way that opens, the most convenient first, then the newest; each is opened when asked for."""
    if cuda_runtime is not None:
        yield BindingsRuntime()
    for path in cudart_paths():
        try:
            yield LibraryRuntime(path)
        except (OSError, AttributeError):
            continue


def cudart_paths() -> list[str]:
    """Where a libcudart may be: known to the loader, in a wheel, in the toolkit; newest version first."""
    folders = [Path(entry or ".") / wheel for entry in sys.path for wheel in WHEEL_FOLDERS]
    folders += [TOOLKIT / folder for folder in TOOLKIT_FOLDERS]
    paths: list[str] = []
    for version in CUDART_VERSIONS:
        name = f"libcudart.so.{version}"
        paths += [name, *(str(folder / name) for folder in folders if (folder / name).is_file())]
    return list(dict.fromkeys(paths))


def has_current_context() -> bool:
    """A context of the driver API is current in this thread, its own or that of another library (pycuda, torch)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        current = driver.cuCtxGetCurrent
    except (OSError, AttributeError):
        return False
    context = c_void_p()
    return current(byref(context)) == 0 and bool(context.value)


def absence(runtime: Runtime, status: int) -> DeviceError:
    """Why a runtime sees no GPU."""
    driver, own = (runtime.call(name)[1] for name in ("cudaDriverGetVersion", "cudaRuntimeGetVersion"))
    if status == INSUFFICIENT_DRIVER and driver == 0:
        return DeviceError(
            "There is no NVIDIA driver here (libcuda.so.1 is not found).",
            fix="Install the driver; in a container start it with: docker run --gpus all (Jetson: --runtime nvidia)",
        )
    if status == INSUFFICIENT_DRIVER:
        return DeviceError(
            f"The NVIDIA driver can run CUDA {version(driver)} at most; {runtime.name} is CUDA {version(own)}.",
            fix=f"Update the driver, or: pip install 'cuda-python<{driver // 1000 + 1}'",
        )
    if status == NO_DEVICE:
        return DeviceError(
            "The NVIDIA driver finds no GPU.",
            fix="Check nvidia-smi -L, CUDA_VISIBLE_DEVICES, and that the container was started with --gpus all.",
        )
    return DeviceError(
        f"The CUDA runtime {runtime.name} does not start ({runtime.error_text(status)}).",
        fix="Check nvidia-smi; a reboot helps where the driver was just updated.",
    )


def failure(runtime: Runtime, status: int, function: str) -> DeviceError:
    """What a status of a function other than success means, and what to do."""
    text = runtime.error_text(status)
    if status in (INSUFFICIENT_DRIVER, NO_DEVICE):
        return absence(runtime, status)
    if status == INVALID_DEVICE:
        return DeviceError(f"There is no such GPU ({function}: {text}).", fix="List them with: nvidia-smi -L")
    if status in CONTEXT_GONE:
        message = f"{function} failed ({text}): the CUDA context that this was opened in was destroyed."
        fix = "Keep the context (pycuda: do not detach it) as long as what was opened in it, then open that again."
        return DeviceError(message, fix=fix)
    if status in STICKY:
        message = f"{function} failed ({text}): the GPU gave up on this process, possibly because of earlier work."
        return DeviceError(message, fix="Start the program again; compute-sanitizer finds the cause.")
    return DeviceError(f"{function} failed ({text}).", fix="y7 doctor shows the GPU, its driver and its libraries.")


def out_of_memory(runtime: Runtime, function: str, nbytes: int) -> DeviceError:
    """Why an allocating function gave nothing: the need, and what is there."""
    if function == "cudaHostAlloc":
        return DeviceError(
            f"{_megabytes(nbytes)} of page-locked host memory are needed and were refused.",
            fix="Take a smaller --batch, or raise the limit of locked memory (ulimit -l).",
        )
    _, free, total = runtime.call("cudaMemGetInfo")
    return DeviceError(
        f"{_megabytes(nbytes)} of GPU memory are needed; {_megabytes(free)} of {_megabytes(total)} are free.",
        fix="Take a smaller --batch or --img, or end other programs on this GPU (nvidia-smi lists them).",
    )


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def version(number: int) -> str:
    """12040 as 12.4."""
    return f"{number // 1000}.{number % 1000 // 10}"
