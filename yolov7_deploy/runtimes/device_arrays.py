"""Images that are already on a GPU: arrays of torch, cupy, pycuda, numba or any other library, used without a copy.

Two protocols provide their address: DLPack and `__cuda_array_interface__`. DLPack is preferred because the producer can
order its pending work before ours on the GPU; `__cuda_array_interface__` only names a stream. The host never waits.
This module does not import CUDA, so the Detector may call it for any object.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from yolov7_deploy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from yolov7_deploy.image import Image
    from yolov7_deploy.runtimes.cuda import Stream

_CUDA, _CUDA_MANAGED = 2, 13  # DLDeviceType
_UNSIGNED = 1  # DLDataTypeCode
_LEGACY_STREAM = 1  # the legacy default stream, in CUDA and in __cuda_array_interface__
_MAX_DLPACK_VERSION = (1, 0)
_FIX = "Use a contiguous array [H, W, 3] of uint8 BGR on the GPU (torch: image.permute(1, 2, 0).contiguous())."


class DlpackArray(Protocol):
    """An array with the DLPack protocol (torch, cupy, jax, ...)."""

    def __dlpack_device__(self) -> tuple[Any, Any]: ...


class CudaArray(Protocol):
    """An array with `__cuda_array_interface__` (pycuda, numba, cupy, ...)."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


GpuArray = DlpackArray | CudaArray


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuImage:
    """A uint8 BGR image [H, W, 3] on a GPU, or in host memory that the GPU reads in place.

    Attributes:
        pointer: Address of its first pixel.
        pitch: Bytes from one row to the next.
        hw: Height and width.
        device: Number of the GPU.
        owner: Keeps the memory alive; hold it until the work on the image is done.
    """

    pointer: int
    pitch: int
    hw: tuple[int, int]
    device: int
    owner: object


def is_gpu_array(x: object) -> bool:
    """Return whether an object is an array on a GPU; arrays in host memory, paths and anything else are not."""
    if hasattr(x, "__dlpack_device__"):
        try:
            return int(x.__dlpack_device__()[0]) in (_CUDA, _CUDA_MANAGED)
        except (BufferError, RuntimeError, TypeError, ValueError):  # on a device that DLPack does not know
            return False
    return hasattr(x, "__cuda_array_interface__")


def gpu_hw(x: Any) -> tuple[int, int]:  # noqa: ANN401 - any library's array
    """Return height and width of an image on a GPU.

    Raises:
        ImageError: Its shape is not [H, W, 3], or it is empty.
    """
    shape = tuple(int(side) for side in (x.shape if hasattr(x, "shape") else x.__cuda_array_interface__["shape"]))
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ImageError(f"An image on the GPU must be an array [H, W, 3] (BGR); this one is {shape}.", fix=_FIX)
    return shape[0], shape[1]


def gpu_image(x: Any, stream: Stream, *, device: int) -> GpuImage:  # noqa: ANN401
    """Return the address of an image; later work of `stream` waits for the pending work of its producer.

    Args:
        x: An array for which `is_gpu_array` is true. Rows may have a pitch, pixels must be contiguous.
        stream: The stream that will read it.
        device: Number of the GPU of that stream.

    Raises:
        ImageError: It is not a uint8 image [H, W, 3], or its pixels are not contiguous.
        UsageError: It is not on this GPU, or its library does not export it.
    """
    by_protocol = _by_dlpack if hasattr(x, "__dlpack__") else _by_interface
    return by_protocol(x, gpu_hw(x), stream, device)


def host_image(image: Image, *, device: int) -> GpuImage | None:
    """Return the address of an image in host memory that the GPU reads in place; `None` if its pixels are not dense."""
    height, width, _ = image.shape
    pitch, pixel, channel = image.strides
    if (pixel, channel) != (3, 1) or pitch < 3 * width:
        return None
    return GpuImage(pointer=image.ctypes.data, pitch=pitch, hw=(height, width), device=device, owner=image)


def _wrong_gpu(actual: int, required: int) -> UsageError:
    return UsageError(
        f"The image is on cuda:{actual}, the detector on cuda:{required}.",
        fix=f"Move it (torch: image.to('cuda:{required}')), or open a Detector with device='cuda:{actual}'.",
    )


def _row_pitch(hw: tuple[int, int], *, dtype: str, strides: Sequence[int] | None) -> int:
    """Return the pitch of an image with these strides in bytes.

    Raises:
        ImageError: It is not uint8, or its pixels are not contiguous.
    """
    if dtype != "uint8":
        raise ImageError(f"An image on the GPU must be uint8; this one is {dtype}.", fix=_FIX)
    row = 3 * hw[1]
    if strides is None:
        return row
    pitch, pixel, channel = strides
    # The stride of an axis of length 1 has no meaning.
    is_dense = channel == 1 and (pixel == 3 or hw[1] == 1) and (pitch >= row or hw[0] == 1)
    if not is_dense:
        raise ImageError(f"The pixels of this image on the GPU are {tuple(strides)} bytes apart.", fix=_FIX)
    return max(pitch, row)


# --- __cuda_array_interface__ ---------------------------------------------------------------------------------------


def _by_interface(x: Any, hw: tuple[int, int], stream: Stream, device: int) -> GpuImage:  # noqa: ANN401
    interface = x.__cuda_array_interface__
    dtype = "uint8" if interface["typestr"][1:] == "u1" else interface["typestr"]
    pitch = _row_pitch(hw, dtype=dtype, strides=interface.get("strides"))
    pointer = int(interface["data"][0])
    index = stream.cuda.gpu_of(pointer)
    if index is None:
        raise UsageError(
            f"The image's address {pointer:#x} is not on a GPU.", fix="Pass an array whose memory is not freed yet."
        )
    if index != device:
        raise _wrong_gpu(index, device)
    # Versions before 3 do not name a stream; most such libraries work on the default stream.
    produced_on = interface.get("stream", _LEGACY_STREAM)
    if produced_on is not None:
        stream.follow(int(produced_on))
    return GpuImage(pointer=pointer, pitch=pitch, hw=hw, device=index, owner=x)


# --- DLPack ---------------------------------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    """The C struct DLTensor."""

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
    """The first fields of the C struct DLManagedTensorVersioned."""

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
    if index != device:  # its library might otherwise copy it to our GPU
        raise _wrong_gpu(index, device)
    try:
        try:
            capsule = x.__dlpack__(stream=stream.handle, max_version=_MAX_DLPACK_VERSION)
        except TypeError:  # older than DLPack 1.0
            capsule = x.__dlpack__(stream=stream.handle)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise UsageError(
            f"This {type(x).__name__} cannot be exported by DLPack: {error}", fix="torch: image.detach()"
        ) from error
    tensor = _dlpack_tensor(capsule)
    dtype = "uint8" if (tensor.code, tensor.bits, tensor.lanes) == (_UNSIGNED, 8, 1) else _type_name(tensor)
    strides = tensor.strides[:3] if tensor.strides else None  # in elements, which are bytes
    pitch = _row_pitch(hw, dtype=dtype, strides=strides)
    # The capsule is not consumed: its destructor frees the memory after the last reference is gone.
    pointer = int(tensor.data or 0) + int(tensor.byte_offset)
    return GpuImage(pointer=pointer, pitch=pitch, hw=hw, device=index, owner=(capsule, x))


def _dlpack_tensor(capsule: object) -> _Tensor:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    if name(capsule) == b"dltensor_versioned":
        versioned = _Versioned.from_address(get(capsule, b"dltensor_versioned"))
        return cast(_Tensor, versioned.tensor)
    return _Tensor.from_address(get(capsule, b"dltensor"))


def _type_name(tensor: _Tensor) -> str:
    kinds = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
    if tensor.code not in kinds:
        return f"type {tensor.code} of DLPack with {tensor.bits} bits"
    return f"{kinds[tensor.code]}{tensor.bits}" + (f"x{tensor.lanes}" if tensor.lanes != 1 else "")
