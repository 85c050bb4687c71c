"""Reading images, and the letterbox from image to network input and back.

Images are uint8 BGR arrays [H, W, 3] everywhere, as in OpenCV.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeGuard

import cv2
import numpy as np
import numpy.typing as npt

from yolov7_deploy._bounded_read import MAX_IMAGE_BYTES, open_file, read_bytes
from yolov7_deploy._text import get_logger, similar_file
from yolov7_deploy.errors import ImageError, UsageError

logger = get_logger(__name__)

Image = npt.NDArray[np.uint8]
ImageBytes = bytes | bytearray | memoryview
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

PAD_GREY = 114  # the official letterbox colour
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)

# Decoding needs up to 6 bytes per pixel: 1 GB for the largest image. Medium-format cameras have up to 151 megapixels.
MAX_PIXELS = 180_000_000
# One byte of Huffman codes encodes at most 8 flat blocks of 8 x 8 pixels, one of LZW codes at most 2730 pixels. A file
# with more pixels per byte is truncated, and decoding it to a grey image would take minutes and gigabytes.
_PIXELS_PER_BYTE = {"JPEG": 1024, "GIF": 4096}
_HEAD_BYTES = 2**16
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PNG_CHUNKS = 100_000  # 800 MB of pixels in the chunks of 8 KiB that libpng writes
MAX_MISSING_BYTES = 2**26  # of a PNG chunk; OpenCV allocates the length that a chunk states
JPEG_TABLES = (0xC4, 0xC8, 0xCC)  # markers between SOF0 and SOF15 that do not start a frame
_TIFF_WIDTH, _TIFF_HEIGHT, _MAX_TIFF_ENTRIES = 256, 257, 4096
_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_DECODING = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_CHANNELS = (1, 3, 4)
_REAL_TYPES = re.compile(r"bool|u?int\d+|b?float\d+")
_STRAIGHT_ALPHA = {"La": "LA", "RGBa": "RGBA"}  # PIL's modes of premultiplied alpha
_EXIF_ORIENTATION = 0x0112
# How an image of each EXIF orientation is turned upright; 1 is upright.
_ROTATIONS: dict[int, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[::-1],
}


def read_image(path: str | os.PathLike[str], *, reduced: int = 1) -> Image:
    """Read an image file as uint8 BGR [H, W, 3]; grey, RGBA and 16-bit files are converted.

    Args:
        path: The file.
        reduced: 2, 4 or 8 divides height and width by this, rounded up or down. A JPEG is then decoded faster, and each
            pixel is the average of those it replaces.

    Raises:
        ImageError: The file is missing, empty, larger than `MAX_PIXELS`, or not an image that OpenCV can decode.
        UsageError: `reduced` is not 1, 2, 4 or 8.
    """
    path = Path(path)
    try:
        data = read_bytes(path, max_bytes=MAX_IMAGE_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    return decode_image(data, name=str(path), reduced=reduced)


def _unreadable(path: Path, error: OSError) -> ImageError:
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a name is too long
        fix = f"Pass the path of an image; a Detector reads all files of a folder with  detector.stream({str(path)!r})"
        return ImageError(f"{path} is a folder, not an image.", fix=fix)
    similar = similar_file(path, suffixes=IMAGE_SUFFIXES) if isinstance(error, FileNotFoundError) else None
    return ImageError(
        f"{path} cannot be read: {error.strerror or error}.",
        fix="Check the path." if similar is None else f"Did you mean {similar}?",
    )


def decode_image(
    data: bytes | bytearray | memoryview | npt.NDArray[np.uint8], *, name: str = "The image", reduced: int = 1
) -> Image:
    """Decode the content of an image file to uint8 BGR [H, W, 3], as `cv2.imread` reads the file.

    A JPEG without its last bytes is decoded with a warning; its missing pixels are grey.

    Args:
        data: The bytes, such as those of an upload; also as an array uint8 [N].
        name: What messages call the image.
        reduced: See `read_image`.

    Raises:
        ImageError: See `read_image`.
        UsageError: `reduced` is not 1, 2, 4 or 8.

    Example:
        >>> from pathlib import Path
        >>> image = decode_image(Path("street.jpg").read_bytes())
        >>> image.dtype, image.shape[2]
        (dtype('uint8'), 3)
    """
    if reduced not in _DECODING:
        raise UsageError(f"reduced must be 1, 2, 4 or 8, not {reduced!r}.", fix="For example: reduced=2")
    array = data if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)
    if array.size == 0:
        raise ImageError(f"{name} is empty (0 bytes).", fix="Copy or download the image again.")
    _refuse_huge(array, name)
    image = _decode(array, reduced)
    if image is None and array[:2].tobytes() == _JPEG_START:
        # Decoding from memory stops at a missing end; reading a file, OpenCV adds it.
        image = _decode(np.append(array, np.frombuffer(_JPEG_END, dtype=np.uint8)), reduced)
        if image is not None:
            logger.warning("%s is a JPEG without its last bytes; missing pixels are grey.", name)
    if image is None:
        raise ImageError(
            f"{name} is not an image OpenCV can decode ({array.size} bytes).",
            fix=f"Convert it to one of: {' '.join(IMAGE_SUFFIXES)}",
        )
    return as_bgr(image)


def _decode(data: npt.NDArray[np.uint8], reduced: int) -> npt.NDArray[Any] | None:
    try:
        image = cv2.imdecode(data, _DECODING[reduced])
    except cv2.error:
        return None
    return None if image is None or image.size == 0 else image.astype(np.uint8, copy=False)


def _refuse_huge(data: npt.NDArray[np.uint8], name: str) -> None:
    """Check the size in the header before OpenCV allocates and fills an image of that size."""
    try:
        kind, sizes = _sizes(np.ascontiguousarray(data).data)
    except (struct.error, OverflowError):  # an offset of 64 bits
        return  # truncated inside its header: OpenCV reports it
    if kind == "PNG" and (missing := _missing_png_bytes(np.ascontiguousarray(data).data)) > MAX_MISSING_BYTES:
        raise ImageError(
            f"{name} is truncated: {missing} bytes of a chunk are missing.", fix="Copy or download the image again."
        )
    for height, width in sizes:
        if height * width > MAX_PIXELS:
            raise ImageError(
                f"{name} has {height}x{width} pixels (height x width), more than {MAX_PIXELS // 10**6} million.",
                fix="Cut it into tiles, or scale it down.",
            )
        if height * width > _PIXELS_PER_BYTE.get(kind, MAX_PIXELS) * data.size:
            raise ImageError(
                f"{name} is truncated: {data.size} bytes cannot contain the {height}x{width} pixels of its header.",
                fix="Copy or download the image again.",
            )


def _sizes(data: memoryview) -> tuple[str, list[tuple[int, int]]]:
    """Return the format and every (height, width) in the header; none for formats with little or no compression."""
    head = bytes(data[:_HEAD_BYTES])
    if head.startswith(_JPEG_START):
        return "JPEG", _jpeg_sizes(data)
    if head.startswith(PNG_SIGNATURE[:4]):
        return "PNG", [_two(head, ">II", 16)[::-1]]
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF", [_two(head, "<HH", 6)[::-1]]
    if head.startswith(b"BM"):
        width, height = _two(head, "<ii", 18)
        return "BMP", [(abs(height), abs(width))]
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF", _tiff_sizes(data, "<" if head[:1] == b"I" else ">", is_big=b"+" in head[:4])
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP", _webp_sizes(head)
    if head[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1"):
        return "AVIF", [size[::-1] for size in _sizes_after(head, b"ispe", skip=4)]
    # The codestream of JPEG 2000 begins with SOC and SIZ; its box repeats the size, height first.
    sizes = [size[::-1] for size in _sizes_after(head, b"\xff\x4f\xff\x51", skip=4)]
    return "JPEG 2000", sizes + (_sizes_after(head, b"ihdr", skip=0) if head[4:8] == b"jP  " else [])


def _missing_png_bytes(data: memoryview) -> int:
    """Return by how many bytes the last chunk is longer than the rest of the file."""
    at = len(PNG_SIGNATURE)
    for _ in range(MAX_PNG_CHUNKS):
        if at + 8 > len(data):
            break
        (length,) = struct.unpack_from(">I", data, at)
        at += 12 + length  # length, kind and checksum have 4 bytes each
    return max(0, at - len(data))


def _two(data: bytes | memoryview, layout: str, at: int) -> tuple[int, int]:
    first, second = struct.unpack_from(layout, data, at)
    return first, second


def _sizes_after(head: bytes, mark: bytes, *, skip: int) -> list[tuple[int, int]]:
    """Return the two 32-bit numbers `skip` bytes after every occurrence of `mark`."""
    found, at = [], head.find(mark)
    while at >= 0:
        found.append(_two(head, ">II", at + len(mark) + skip))
        at = head.find(mark, at + 1)
    return found


def _webp_sizes(head: bytes) -> list[tuple[int, int]]:
    """Return the size of lossy and lossless images (14 bits a side) or the canvas of the extended format (24 bits)."""
    kind = head[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
        return [(height, width)]
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return [((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)]
    width, height = _two(head, "<HH", 26)
    return [(height & 0x3FFF, width & 0x3FFF)]


def _tiff_sizes(data: memoryview, order: str, *, is_big: bool) -> list[tuple[int, int]]:
    """Return the size in the first directory, which may be anywhere; BigTIFF has 64-bit offsets and counts."""
    (directory,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", data, 8 if is_big else 4)
    (count,) = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", data, directory)
    start, step, value = (directory + 8, 20, 12) if is_big else (directory + 2, 12, 8)
    sides = {_TIFF_WIDTH: 0, _TIFF_HEIGHT: 0}
    for entry in range(min(count, _MAX_TIFF_ENTRIES)):
        at = start + step * entry
        tag, kind = _two(data, f"{order}HH", at)
        if tag in sides and kind in _TIFF_NUMBERS:
            (sides[tag],) = struct.unpack_from(order + _TIFF_NUMBERS[kind], data, at + value)
    return [(sides[_TIFF_HEIGHT], sides[_TIFF_WIDTH])]


def _jpeg_sizes(data: memoryview) -> list[tuple[int, int]]:
    """Return the size of a JPEG's frame. Like decoders, skip bytes between segments that are not a marker."""
    at = 2
    while at + 9 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0xFF):
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in JPEG_TABLES:
            return [_two(data, ">HH", at + 5)]
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
        elif marker in (0xD9, 0xDA):  # the end, or pixels without a frame
            break
        else:
            at += 2 + _two(data, ">HH", at + 2)[0]
    return []


class PilImage(Protocol):
    """An image of PIL, which is recognised by the name of its class; PIL is never imported here."""

    @property
    def mode(self) -> str:
        """PIL's name of the pixel format."""
        ...


def is_pil_image(image: object) -> TypeGuard[PilImage]:
    """Return whether an object is a PIL image, also one of a file that PIL has not decoded yet."""
    return _is_instance(image, "PIL.Image.Image")


def as_bgr(image: object) -> Image:
    """Convert an array, a PIL image or the bytes of a file to contiguous uint8 BGR [H, W, 3]; BGR without a copy.

    Arrays are BGR, as in OpenCV. Grey [H, W] or [H, W, 1] is repeated, the alpha channel of BGRA [H, W, 4] is dropped,
    uint16 is scaled by 1/257. PIL images are converted from their mode and rotated by their EXIF orientation, as
    `read_image` does with files.

    Raises:
        ImageError: The shape or type is ambiguous (floats could be 0..1 or 0..255), or the object is not an image. The
            fix for floats, channels first and torch tensors is the expression that converts them.
    """
    if isinstance(image, ImageBytes):
        return decode_image(image)
    if is_pil_image(image):
        array = _pil_to_array(image)
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise _not_an_array(image)
    shape, dtype = array.shape, array.dtype
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in _CHANNELS or 0 in shape:
        raise ImageError(
            f"An image must be an array [H, W, 3] (BGR), [H, W] or [H, W, 4]; this one is {shape}.",
            fix=_conversion(array) or "Pass one image as [H, W, 3]; several with detector.batch([image, ...]).",
        )
    if dtype.kind == "u" and dtype.itemsize == 2:  # of any byte order
        array = (array // 257).astype(np.uint8)
    elif dtype != np.uint8:
        raise ImageError(
            f"An image must be uint8 or uint16; this one is {dtype}.",
            fix=_conversion(array) or "Scale it to 0..255 and convert it with astype('uint8').",
        )
    array = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]
    return np.ascontiguousarray(array)


def _is_instance(thing: object, class_name: str) -> bool:
    """Return whether an object belongs to a class, or a subclass of it, of a library that is not imported here."""
    return any(f"{kind.__module__}.{kind.__name__}" == class_name for kind in type(thing).__mro__)


# --- PIL images -----------------------------------------------------------------------------------------------------


def _pil_to_array(image: Any) -> npt.NDArray[Any]:  # noqa: ANN401 - a PIL image
    """Return BGR uint8 [H, W, 3], or grey uint16 [H, W], rotated by the orientation.

    Raises:
        ImageError: PIL cannot decode or convert it, or its mode has values without a fixed range.
    """
    try:
        image.load()  # PIL rotates TIFF files here, and removes their orientation
    except Exception as error:  # each decoder of PIL has errors of its own
        raise ImageError(f"PIL cannot read this image: {error}", fix="Open it again, or pass its path.") from error
    if image.mode in ("I", "F"):
        raise ImageError(
            f"A PIL image of mode {image.mode} has 32-bit values without a fixed range.",
            fix="Scale numpy.asarray(image) to 0..255 as uint8, or to 0..65535 as uint16, and pass the array.",
        )
    if 0 in image.size:
        array: npt.NDArray[Any] = np.empty((*image.size[::-1], 3), dtype=np.uint8)
    elif image.mode.startswith("I;16"):  # PIL would clip it at 255
        array = np.asarray(image)
    else:
        array = _pil_colours(image)
    rotate = _ROTATIONS.get(_orientation(image))
    return array if rotate is None else rotate(array)


def _pil_colours(image: Any) -> npt.NDArray[Any]:  # noqa: ANN401
    """Return BGR uint8 [H, W, 3]; alpha is dropped, as OpenCV does with files."""
    mode = _STRAIGHT_ALPHA.get(image.mode)
    straight = image.convert(mode) if mode else image
    # PIL converts transparency to an alpha channel without changing colours.
    has_alpha = straight.mode in ("P", "PA") or "transparency" in straight.info
    try:
        pixels = np.asarray(straight.convert("RGBA" if has_alpha else "RGB"))
    except ValueError as error:
        raise ImageError(
            f"PIL cannot convert an image of mode {image.mode} to RGB: {error}.", fix="Convert it with PIL.ImageCms."
        ) from error
    return cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGR if has_alpha else cv2.COLOR_RGB2BGR)


def _orientation(image: Any) -> int:  # noqa: ANN401
    """Return the EXIF orientation; 1, upright, without one and for damaged EXIF data, which OpenCV ignores as well."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - PIL's parser raises errors of many types
        return 1
    return orientation if isinstance(orientation, int) else 1


# --- refused objects ------------------------------------------------------------------------------------------------


def _not_an_array(image: object) -> ImageError:
    """Return the error for an object that is neither a NumPy array nor a PIL image."""
    message = f"An image must be an array [H, W, 3] (BGR) or a PIL image; this one is a {type(image).__name__}"
    if _is_instance(image, "torch.Tensor"):
        tensor: Any = image
        return ImageError(
            f"{message} {tuple(tensor.shape)} of {_type_name(tensor)}.",
            fix=_conversion(tensor) or "Convert it to a NumPy array, uint8 BGR [H, W, 3].",
        )
    if image is None:
        fix = "cv2.imread returns None for a file that it cannot read. Pass the path instead, to see the reason."
    elif hasattr(image, "read"):
        fix = "Pass the content of the file:  image.read()"
    elif hasattr(image, "__array__") or hasattr(image, "__array_interface__"):
        # Most libraries use RGB. A silent guess would swap red and blue.
        fix = "Use  numpy.asarray(image)  if it is BGR, or  numpy.asarray(image)[..., ::-1]  if it is RGB."
    else:
        fix = "For several images call detector.batch([image, ...]); for a file pass its path."
    return ImageError(f"{message}.", fix=fix)


def _conversion(image: Any) -> str:  # noqa: ANN401 - an array of NumPy or a tensor of torch
    """Return the expression that converts an array to uint8 BGR [H, W, 3]; empty if its layout or type is unknown."""
    shape, type_name = tuple(image.shape[-3:]), _type_name(image)
    channels_first = len(shape) == 3 and shape[2] not in _CHANNELS and shape[0] in _CHANNELS
    limits = _value_limits(image)
    if not 2 <= image.ndim <= 4 or limits is None:
        return ""
    channels = 1 if len(shape) == 2 else shape[0 if channels_first else 2]
    if channels not in _CHANNELS:
        return ""
    is_torch = not isinstance(image, np.ndarray)
    text = "image"
    if is_torch:
        text += (".detach()" if image.requires_grad else "") + ("" if image.device.type == "cpu" else ".cpu()")
    if channels_first:
        text += ".permute(1, 2, 0)" if is_torch else ".transpose(1, 2, 0)"
    if type_name == "bool":
        text = f"({text} * 255)"
    elif "float" in type_name:
        text = f"({text} * 255).round()" if limits[1] <= 1 else f"{text}.round()"
    if type_name not in ("uint8", "uint16"):
        text += ".byte()" if is_torch else ".astype('uint8')"
    text += ".numpy()" if is_torch else ""
    is_rgb = channels > 1 and (is_torch or channels_first)  # the order that networks read
    if is_rgb:
        text += "[..., ::-1].copy()" if channels == 3 else "[..., 2::-1].copy()"
    if image.ndim == 4:
        text = "detector.batch(images)" if text == "image" else f"detector.batch([{text} for image in images])"
    text = f"Use  {text}" + ("  for RGB; for BGR leave out the [...] part." if is_rgb else "")
    if limits[0] < 0 or (limits[1] > 255 and type_name != "uint16"):
        text = f"Scale its values from {limits[0]:g}..{limits[1]:g} to 0..255 first. {text}"
    return text


def _value_limits(image: Any) -> tuple[float, float] | None:  # noqa: ANN401
    """Return the smallest and the largest value; `None` without values, and for types that are not real numbers."""
    if 0 in image.shape or not _REAL_TYPES.fullmatch(_type_name(image)):
        return None
    values = image if isinstance(image, np.ndarray) else image.detach()
    try:
        low, high = float(values.min()), float(values.max())
    except RuntimeError:  # torch: this kind of tensor has no values, or cannot compare them
        return None
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _type_name(image: Any) -> str:  # noqa: ANN401
    return image.dtype.name if isinstance(image, np.ndarray) else str(image.dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Letterbox:
    """Geometry of one letterboxed image: how it is scaled onto the canvas, and how boxes are scaled back.

    Attributes:
        source_hw: Height and width of the image.
        resized_hw: Height and width it is scaled to.
        canvas_hw: Height and width of the network input.
        top, left: Pixels of grey above and to the left.
        gain: Canvas pixels per source pixel, for scaling boxes back.
        offset_xy: Canvas position of the image's top left corner, for scaling boxes back; not rounded, as officially.
        shrink_by_area: Resize with pixel-area averaging (the official evaluation loader) instead of bilinear.
    """

    source_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    canvas_hw: tuple[int, int]
    top: int
    left: int
    gain: float
    offset_xy: tuple[float, float]
    shrink_by_area: bool = False

    @property
    def averages_area(self) -> bool:
        """True if the image is resized by pixel-area averaging, which only OpenCV does (not the CUDA kernel)."""
        return self.shrink_by_area and self.resized_hw != self.source_hw

    def apply(self, image_bgr: Image) -> Image:
        """Return the letterboxed image, uint8 BGR [canvas_h, canvas_w, 3]; always a new array."""
        height, width = self.resized_hw
        if (height, width) != self.source_hw:
            method = cv2.INTER_AREA if self.shrink_by_area else cv2.INTER_LINEAR
            image_bgr = cv2.resize(image_bgr, (width, height), interpolation=method)  # type: ignore[assignment]
        canvas = np.full((*self.canvas_hw, 3), PAD_GREY, dtype=np.uint8)
        canvas[self.top : self.top + height, self.left : self.left + width] = image_bgr
        return canvas

    def undo(self, boxes_xyxy: FloatArray) -> FloatArray:
        """Scale boxes [N, 4] from canvas pixels to source pixels and clip them to the image; returns a new array."""
        offset = np.array(self.offset_xy * 2, dtype=np.float32)
        height, width = self.source_hw
        boxes = (boxes_xyxy - offset) / np.float32(self.gain)
        limit = np.array([width, height, width, height], dtype=np.float32)
        clipped: FloatArray = np.clip(boxes, 0, limit, dtype=np.float32)
        return clipped


def fit_letterbox(source_hw: tuple[int, int], canvas_hw: tuple[int, int]) -> Letterbox:
    """Return the official inference letterbox: scale to fit (up or down), centre, pad with grey 114.

    The resized sides are round(side * r); an odd pixel of padding goes below and to the right. Boxes are scaled back by
    r and the unrounded half padding, as officially.
    """
    height, width = source_hw
    ratio = min(canvas_hw[0] / height, canvas_hw[1] / width)
    resized_hw = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    return _centred(source_hw, resized_hw, canvas_hw, gain=ratio, shrink_by_area=False)


def fit_rect_letterbox(source_hw: tuple[int, int], size_hw: tuple[int, int], *, stride: int) -> Letterbox:
    """Return the rectangular letterbox of the official detection program (`auto`): `fit_letterbox` with less padding.

    The image has the same pixels as in a letterbox of `size_hw`; the canvas is the smallest multiple of the stride that
    holds it. As officially, boxes are scaled back by the smaller ratio of canvas side to image side, which may be a
    little less than the scale of the image if rounding made its resized side smaller.
    """
    ratio = min(size_hw[0] / source_hw[0], size_hw[1] / source_hw[1])
    resized_hw = (max(1, round(source_hw[0] * ratio)), max(1, round(source_hw[1] * ratio)))
    height, width = canvas_hw = (-(-resized_hw[0] // stride) * stride, -(-resized_hw[1] // stride) * stride)
    gain = min(height / source_hw[0], width / source_hw[1])
    offset_xy = ((width - source_hw[1] * gain) / 2, (height - source_hw[0] * gain) / 2)
    return replace(
        _centred(source_hw, resized_hw, canvas_hw, gain=gain, shrink_by_area=False),
        offset_xy=offset_xy,
    )


def fit_evaluation_letterbox(source_hw: tuple[int, int], canvas_hw: tuple[int, int], *, size: int) -> Letterbox:
    """Return the letterbox of the official evaluation loader (`--rect`): longer side to `size`, then centred.

    The resized sides are truncated, and shrinking averages by area. Boxes are scaled back by the height ratio and the
    unrounded half padding on both axes, as in the official test program that computed the published AP.
    """
    height, width = source_hw
    ratio = size / max(height, width)
    resized_hw = source_hw if ratio == 1 else (max(1, int(height * ratio)), max(1, int(width * ratio)))
    return _centred(source_hw, resized_hw, canvas_hw, gain=resized_hw[0] / height, shrink_by_area=ratio < 1)


def _centred(
    source_hw: tuple[int, int],
    resized_hw: tuple[int, int],
    canvas_hw: tuple[int, int],
    *,
    gain: float,
    shrink_by_area: bool,
) -> Letterbox:
    half_h, half_w = (canvas_hw[0] - resized_hw[0]) / 2, (canvas_hw[1] - resized_hw[1]) / 2
    return Letterbox(
        source_hw=source_hw,
        resized_hw=resized_hw,
        canvas_hw=canvas_hw,
        top=round(half_h - 0.1),
        left=round(half_w - 0.1),
        gain=gain,
        offset_xy=(half_w, half_h),
        shrink_by_area=shrink_by_area,
    )


def to_network_input(canvases: Sequence[Image], *, out: FloatArray | None = None) -> FloatArray:
    """Convert canvases uint8 BGR [H, W, 3] of one size to float32 [B, 3, H, W], RGB, 0..1; in `out`, if given."""
    height, width = canvases[0].shape[:2]
    tensor = np.empty((len(canvases), 3, height, width), dtype=np.float32) if out is None else out
    for planes, canvas in zip(tensor, canvases, strict=True):
        # Split into contiguous channels first: dividing every third byte takes 1.4 times as long as both steps.
        for plane, channel in zip(planes[::-1], cv2.split(canvas), strict=True):
            np.divide(channel, np.float32(255), out=plane)
    return tensor


ORIENTATION_TAG = 0x0112
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def read_image_hw(path: Path) -> tuple[int, int]:
    """Return height and width as decoded by `read_image`; reads only the headers of JPEG and PNG, decodes others.

    Raises:
        ImageError: The file is missing or not an image.
    """
    try:
        with open_file(path, max_bytes=MAX_IMAGE_BYTES) as file:
            image_hw = _header_hw(file)
    except (OSError, struct.error, IndexError):
        image_hw = None
    if image_hw and min(image_hw) > 0:
        return image_hw
    height, width = read_image(path).shape[:2]
    return height, width


def _header_hw(file: BinaryIO) -> tuple[int, int] | None:
    start = file.read(8)
    if start[:2] == _JPEG_START:
        file.seek(2)
        return _jpeg_hw(file)
    return _png_hw(file) if start == PNG_SIGNATURE else None


def _png_hw(file: BinaryIO) -> tuple[int, int] | None:
    """Return the size in the header of a PNG; `None` if it has an orientation, or no end within `MAX_PNG_CHUNKS`.

    The file can state its orientation before or after the pixels.
    """
    image_hw = None
    for _ in range(MAX_PNG_CHUNKS):
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IHDR":
            width, height = struct.unpack(">II", file.read(8))
            image_hw, length = (height, width), length - 8
        elif kind == b"IEND":
            return image_hw
        elif kind == b"eXIf":
            return None
        file.seek(length + 4, os.SEEK_CUR)  # and the checksum
    return None


def _jpeg_hw(file: BinaryIO) -> tuple[int, int] | None:
    is_transposed = False
    while file.read(1) == b"\xff":
        marker = 0xFF
        while marker == 0xFF:  # any number of fill bytes can precede a marker
            marker = file.read(1)[0]
        (length,) = struct.unpack(">H", file.read(2))
        payload = file.read(max(0, length - 2))
        if marker == 0xE1 and payload.startswith(b"Exif\0\0"):
            is_transposed = _exif_orientation(payload[6:]) in TRANSPOSED
        elif 0xC0 <= marker <= 0xCF and marker not in JPEG_TABLES:
            height, width = struct.unpack_from(">HH", payload, 1)
            return (width, height) if is_transposed else (height, width)
    return None


def _exif_orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    (offset,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, offset)
    for entry in range(count):
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, offset + 2 + 12 * entry)
        if tag == ORIENTATION_TAG:
            return int(value)
    return 1
