"""Images that are on a GPU already: arrays of torch, cupy, pycuda, numba or any other library, taken without a copy.

Two protocols tell where they lie: DLPack and `__cuda_array_interface__`. DLPack is asked first, because it lets the
producer order its own work before ours on the GPU; `__cuda_array_interface__` names a stream at best. Nobody waits on
the host. Imports no CUDA, so the Detector may ask about any object.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from yolov7_deploy.errors import DeviceError, ImageError

if TYPE_CHECKING:
    from yolov7_deploy.runtimes.cuda import Stream

_CUDA, _CUDA_MANAGED = 2, 13  # DLDeviceType
_UNSIGNED = 1  # DLDataTypeCode
_LEGACY_STREAM = 1  # __cuda_array_interface__'s and CUDA's own number of the default stream
_MAX_VERSION = (1, 0)  # of DLPack
_FIX = "Use a contiguous array [H, W, 3] of uint8 BGR on the GPU (torch: image.permute(1, 2, 0).contiguous())."


class DlpackArray(Protocol):
    """An array of torch, cupy, jax, ..."""

    def __dlpack_device__(self) -> tuple[Any, Any]: ...


class CudaArray(Protocol):
    """An array of pycuda, numba, cupy, ..."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


GpuArray = DlpackArray | CudaArray


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuImage:
    """A uint8 BGR image [H, W, 3] on a GPU.

    Attributes:
        pointer: Address of its first pixel.
        pitch: Bytes from one row to the next.
        hw: Height and width.
        device: Number of the GPU.
        owner: Keeps the memory; held until the work on the image is done.
    """

    pointer: int
    pitch: int
    hw: tuple[int, int]
    device: int
    owner: object


def is_gpu_array(x: object) -> bool:
    """The pixels of this object lie on a GPU; arrays and tensors in main memory, paths and all else are none."""
    if hasattr(x, "__dlpack_device__"):
        return int(x.__dlpack_device__()[0]) in (_CUDA, _CUDA_MANAGED)
    return hasattr(x, "__cuda_array_interface__")


def gpu_hw(x: Any) -> tuple[int, int]:  # noqa: ANN401 - any library's array
    """Height and width of an image on a GPU.

    Raises:
        ImageError: Its shape is not [H, W, 3], or it has no pixels.
    """
    shape = tuple(int(side) for side in (x.shape if hasattr(x, "shape") else x.__cuda_array_interface__["shape"]))
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ImageError(f"An image on the GPU must be an array [H, W, 3] (BGR); this one is {shape}.", fix=_FIX)
    return shape[0], shape[1]


def gpu_image(x: Any, stream: Stream, *, device: int) -> GpuImage:  # noqa: ANN401
    """Where an image lies; what its producer still has to do for it comes before later work of `stream`.

    Args:
        x: An array for which `is_gpu_array` holds. Rows may be apart, pixels may not.
        stream: Where it will be read.
        device: Number of the GPU of that stream.

    Raises:
        ImageError: It is no uint8 image [H, W, 3], or its pixels do not lie side by side.
        DeviceError: It is on another GPU, or its library does not give it away.
    """
    hw = gpu_hw(x)
    image = _by_dlpack(x, hw, stream, device) if hasattr(x, "__dlpack__") else _by_interface(x, hw, stream)
    if image.device != device:
        raise _elsewhere(image.device, device)
    return image


def _elsewhere(found: int, wanted: int) -> DeviceError:
    return DeviceError(
        f"The image is on cuda:{found}, the detector on cuda:{wanted}.",
        fix=f"Move it (torch: image.to('cuda:{wanted}')), or open a Detector with device='cuda:{found}'.",
    )


def _placed(hw: tuple[int, int], *, dtype: str, strides: Sequence[int] | None) -> int:
    """The pitch of an image with these strides in bytes.

    Raises:
        ImageError: Another type, or pixels that do not lie side by side.
    """
    if dtype != "uint8":
        raise ImageError(f"An image on the GPU must be uint8; this one is {dtype}.", fix=_FIX)
    row = 3 * hw[1]
    if strides is None:
        return row
    pitch, pixel, channel = strides
    # A stride along an axis of length one means nothing.
    is_dense = channel == 1 and (pixel == 3 or hw[1] == 1) and (pitch >= row or hw[0] == 1)
    if not is_dense:
        raise ImageError(f"The pixels of this image on the GPU are {tuple(strides)} bytes apart.", fix=_FIX)
    return max(pitch, row)


# --- __cuda_array_interface__ ---------------------------------------------------------------------------------------


def _by_interface(x: Any, hw: tuple[int, int], stream: Stream) -> GpuImage:  # noqa: ANN401
    found = x.__cuda_array_interface__
    dtype = "uint8" if found["typestr"][1:] == "u1" else found["typestr"]
    pitch = _placed(hw, dtype=dtype, strides=found.get("strides"))
    pointer = int(found["data"][0])
    device = stream.cuda.gpu_of(pointer)
    if device is None:
        raise DeviceError(
            f"The image's address {pointer:#x} is not on a GPU.", fix="Pass the array of its library, still open."
        )
    # Before version 3 nothing is said; most such libraries work on the default stream.
    produced_on = found.get("stream", _LEGACY_STREAM)
    if produced_on is not None:
        stream.follow(int(produced_on))
    return GpuImage(pointer=pointer, pitch=pitch, hw=hw, device=device, owner=x)


# --- DLPack ---------------------------------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    """The head of DLManagedTensorVersioned."""

    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


def _by_dlpack(x: Any, hw: tuple[int, int], stream: Stream, device: int) -> GpuImage:  # noqa: ANN401
    index = int(x.__dlpack_device__()[1])
    if index != device:  # its library might copy it here by itself
        raise _elsewhere(index, device)
    try:
        try:
            capsule = x.__dlpack__(stream=stream.handle, max_version=_MAX_VERSION)
        except TypeError:  # from before DLPack 1.0
            capsule = x.__dlpack__(stream=stream.handle)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise DeviceError(
            f"A {type(x).__name__} does not give its pixels away: {error}", fix="torch: image.detach()"
        ) from error
    tensor = _tensor_in(capsule)
    dtype = "uint8" if (tensor.code, tensor.bits, tensor.lanes) == (_UNSIGNED, 8, 1) else _type_name(tensor)
    strides = tensor.strides[:3] if tensor.strides else None  # of bytes, since elements are bytes
    pitch = _placed(hw, dtype=dtype, strides=strides)
    # The capsule is not taken over: its own destructor gives the memory back when nobody holds it any more.
    pointer = int(tensor.data or 0) + int(tensor.byte_offset)
    return GpuImage(pointer=pointer, pitch=pitch, hw=hw, device=index, owner=(capsule, x))


def _tensor_in(capsule: object) -> _Tensor:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    if name(capsule) == b"dltensor_versioned":
        versioned = _Versioned.from_address(get(capsule, b"dltensor_versioned"))
        return cast(_Tensor, versioned.tensor)
    return _Tensor.from_address(get(capsule, b"dltensor"))


def _type_name(tensor: _Tensor) -> str:
    kinds = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
    return f"{kinds.get(tensor.code, 'type ')}{tensor.bits}"
