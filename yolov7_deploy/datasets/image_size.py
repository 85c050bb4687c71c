"""Read the size of an image from its header, because decoding thousands of images takes minutes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from yolov7_deploy._bounded_read import MAX_IMAGE_BYTES, open_file
from yolov7_deploy.image import JPEG_TABLES, read_image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEAD_BYTES = 4096
ORIENTATION_TAG = 0x0112
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def read_image_hw(path: Path) -> tuple[int, int]:
    """Return height and width as decoded by `read_image`; reads only the header of JPEG and PNG, decodes others.

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
    if start[:2] == b"\xff\xd8":
        file.seek(2)
        return _jpeg_hw(file)
    head = file.read(PNG_HEAD_BYTES)
    if start == PNG_SIGNATURE and head[4:8] == b"IHDR" and b"eXIf" not in head:
        width, height = struct.unpack_from(">II", head, 8)
        return height, width
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
