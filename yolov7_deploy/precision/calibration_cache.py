"""A `Calibration` in a file, so that another way of choosing ranges costs seconds and needs no image.

The file is a compressed .npz that `numpy.load` opens too. Histograms are kept as their bins that are not empty, one
tensor behind the other. It is read without trusting it: nothing in it is executed, and every size follows from an
earlier one and is compared with the file's own before anything is decompressed.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolov7_deploy._atomic_file import whole_file
from yolov7_deploy._serialization import from_plain, shown
from yolov7_deploy.errors import ExportError, LoadError, UsageError
from yolov7_deploy.hub import cache_dir
from yolov7_deploy.precision.calibrate import Calibration
from yolov7_deploy.precision.histogram import BINS, Histogram

Array = npt.NDArray[Any]

KIND, SCHEMA = "yolov7_deploy calibration", 1
MAX_TENSORS = 2048  # YOLOv7-E6E has 252; each is 0.25 MB in memory
MAX_CHANNELS = 2**22  # of what all convolutions read; YOLOv7-E6E has 120 700
MAX_HEADER_BYTES = 2**22
MAX_FILE_BYTES = 2**28
MAX_COUNT = 2**53  # what float64 counts without a gap
# In the order they are written; lengths of the later ones follow from the earlier ones.
_TYPES = {
    "header": "|u1",
    "offsets": "<i8",
    "codes": "<u2",
    "counts": "<i8",
    "reaches": "<f8",
    "mean_offsets": "<i8",
    "means": "<f8",
    "largest": "<f8",
}
_NPY_HEADER_BYTES = 128
_DATE = (1980, 1, 1, 0, 0, 0)  # the same calibration gives the same bytes
_COLUMNS = tuple(name for name in _TYPES if name != "header")
_END_BYTES, _MAX_DIRECTORY_BYTES = 22, 2**12  # of the record that ends a zip archive; of its list of members
_OTHER_FILE = "Name another file:  --calib-cache FILE.npz"
_DAMAGE = (zipfile.BadZipFile, zlib.error, ArithmeticError, EOFError, OSError, RuntimeError, ValueError, struct.error)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    """What is no array, and the names to which the arrays belong."""

    tensors: tuple[str, ...]
    read: tuple[str, ...]
    made: tuple[str, ...]
    images: int
    network_sha256: str
    images_sha256: str
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        for names in (self.tensors, self.read, self.made):
            if len(names) > MAX_TENSORS:
                raise ValueError(f"it has {len(names)} tensors, more than {MAX_TENSORS}")
            if len(set(names)) != len(names):
                raise ValueError("it names a tensor twice")
        if self.images < 1:
            raise ValueError(f"it is of {self.images} images")


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Writes the file under a temporary name and renames it, so a killed run leaves no half file; folders are made.

    Raises:
        ExportError: The disk is full, the folder cannot be written, a mean is infinite or no number, or there are more
            than `MAX_TENSORS` tensors.
    """
    try:
        header, columns = _taken_apart(calibration)
        _check(columns)
        data = _zipped({"header": _as_bytes(header), **columns})
    except ValueError as error:
        raise ExportError(
            f"The calibration cannot be kept in a file: {error}.",
            fix="Check the weights (y7 verify), or go without a file.",
        ) from error
    try:
        with whole_file(path) as unfinished:
            unfinished.write_bytes(data)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be written: {error}.", fix=_OTHER_FILE) from error


def load_calibration(path: Path) -> Calibration:
    """The calibration in a file written by `save_calibration`, equal to the last bit.

    Raises:
        LoadError: The file is absent, damaged, cut off, or something else.
    """
    try:
        if not os.path.lexists(path):
            raise LoadError(
                f"{path} does not exist.", fix=f"It is made by a calibration:  --calib FOLDER --calib-cache {path}"
            )
        if not path.is_file():  # a pipe or device would be read for ever
            raise LoadError(f"{path} is no file.", fix=_OTHER_FILE)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise LoadError(f"{path} is no calibration: it is larger than {MAX_FILE_BYTES >> 20} MB.", fix=_OTHER_FILE)
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoadError(f"{path} cannot be read: {reason}.", fix="Check the path.") from error
    try:
        return _parsed(data)
    except _DAMAGE as error:
        # Not simply "delete it": somebody may have named a file that is dear to them.
        raise LoadError(
            f"{path} is no calibration, or a damaged one: {_printable(error)}.",
            fix=f"If it is a calibration of yours, delete it, and it is made again. {_OTHER_FILE}",
        ) from error


def check_calibration(calibration: Calibration, path: Path, *, network_sha256: str, images_sha256: str) -> None:
    """Refuses a calibration that is not of this network and these images.

    Args:
        calibration: Loaded from `path`.
        path: For the message.
        network_sha256: See `network_digest`.
        images_sha256: See `Calibration`.

    Raises:
        UsageError: It says which of the two differs.
    """
    pairs = {
        "model": (calibration.network_sha256, network_sha256),
        "images": (calibration.images_sha256, images_sha256),
    }
    wrong = {what: digests for what, digests in pairs.items() if digests[0] != digests[1]}
    if wrong:
        which = " and ".join({"model": "another model", "images": "other images"}[what] for what in wrong)
        details = ", ".join(f"{what} {of[:12]} instead of {wanted[:12]}" for what, (of, wanted) in wrong.items())
        raise UsageError(
            f"{path} is a calibration of {which} (SHA-256 of {details}).",
            fix=f"{_OTHER_FILE}   or delete this one, and it is made again:  rm {path}",
        )


def default_place(network_sha256: str, images_sha256: str) -> Path:
    """Where the calibration of a network on some images is kept unless said otherwise."""
    return cache_dir() / "calibration" / f"{network_sha256[:16]}-{images_sha256[:16]}.npz"


# --- a calibration and its columns ------------------------------------------------------------------------------------


def _taken_apart(calibration: Calibration) -> tuple[_Header, dict[str, Array]]:
    filled = [np.flatnonzero(histogram.counts) for histogram in calibration.histograms.values()]
    counts = [h.counts[bins] for h, bins in zip(calibration.histograms.values(), filled, strict=True)]
    means = list(calibration.means.values())
    header = _Header(
        tensors=tuple(calibration.histograms),
        read=tuple(calibration.means),
        made=tuple(calibration.largest),
        images=calibration.images,
        network_sha256=calibration.network_sha256,
        images_sha256=calibration.images_sha256,
        notes=tuple(calibration.notes),
    )
    return header, {
        "offsets": _offsets(filled),
        "codes": _joined(filled, "codes"),
        "counts": _joined(counts, "counts"),
        "reaches": np.array([h.largest for h in calibration.histograms.values()], dtype=_TYPES["reaches"]),
        "mean_offsets": _offsets(means),
        "means": _joined(means, "means"),
        "largest": np.array(list(calibration.largest.values()), dtype=_TYPES["largest"]),
    }


def _offsets(parts: Sequence[Array]) -> Array:
    return np.cumsum([0, *map(len, parts)], dtype=_TYPES["offsets"])


def _joined(parts: Sequence[Array], name: str) -> Array:
    return np.concatenate([np.zeros(0, dtype=_TYPES[name]), *parts]).astype(_TYPES[name])


def _put_together(header: _Header, columns: Mapping[str, Array]) -> Calibration:
    histograms = {}
    reaches, largest = columns["reaches"].tolist(), columns["largest"].tolist()
    for name, (start, stop), reach in zip(header.tensors, pairwise(columns["offsets"]), reaches, strict=True):
        counts = np.zeros(BINS, dtype=np.int64)
        counts[columns["codes"][start:stop]] = columns["counts"][start:stop]
        histograms[name] = Histogram(counts, reach)
    spans = pairwise(columns["mean_offsets"])
    return Calibration(
        histograms=histograms,
        means={
            name: columns["means"][start:stop].astype(np.float64)
            for name, (start, stop) in zip(header.read, spans, strict=True)
        },
        largest=dict(zip(header.made, largest, strict=True)),
        images=header.images,
        network_sha256=header.network_sha256,
        images_sha256=header.images_sha256,
        notes=header.notes,
    )


def _check(columns: Mapping[str, Array]) -> None:
    """Everything about the values that a reader of a calibration relies on; lengths are checked where they are read.

    What convolutions make may be infinite or no number, as in the calibration itself.

    Raises:
        ValueError: It says what is wrong.
    """
    offsets, codes, counts, reaches = (columns[name] for name in ("offsets", "codes", "counts", "reaches"))
    if counts.size and not 0 < counts.min() <= counts.max() <= MAX_COUNT:
        raise ValueError(f"a bin counts {shown(int(counts.min()))} to {shown(int(counts.max()))} values")
    rising = np.diff(codes.astype(np.int64)) > 0
    first = offsets[1:-1]
    rising[first[(first > 0) & (first < codes.size)] - 1] = True  # where the next tensor begins
    if not rising.all() or (codes >= _bins_of(np.array([np.inf]))).any():
        raise ValueError("bins are out of order, or count what is no finite number")
    top = float(np.finfo(np.float32).max)
    if not ((reaches >= 0) & (reaches <= top)).all():
        raise ValueError("the largest value of a tensor is no finite number, or below 0")
    filled = offsets[1:] > offsets[:-1]
    if (_bins_of(reaches[filled]) != codes[offsets[1:][filled] - 1]).any() or reaches[~filled].any():
        raise ValueError("the largest value of a tensor is not in its last bin")
    if not np.isfinite(columns["means"]).all():
        raise ValueError("a mean is infinite or no number")
    if (columns["largest"] < 0).any():
        raise ValueError("a largest magnitude is below 0")


def _bins_of(magnitudes: Array) -> Array:
    """The bin of each, see `Histogram`."""
    return np.ascontiguousarray(magnitudes, dtype=np.float32).view(np.uint32) >> 16


# --- bytes ------------------------------------------------------------------------------------------------------------


def _as_bytes(header: _Header) -> Array:
    data = json.dumps({"kind": KIND, "schema": SCHEMA, **asdict(header)}).encode()
    if len(data) > MAX_HEADER_BYTES:
        raise ValueError(f"its names and notes have {len(data)} bytes, more than {MAX_HEADER_BYTES}")
    return np.frombuffer(data, dtype=np.uint8)


def _zipped(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, kind in _TYPES.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=_DATE)
            entry.create_system = 3  # Unix everywhere, so that the bytes are the same
            data = _npy_header(kind, arrays[name].size) + arrays[name].astype(kind).tobytes()
            archive.writestr(entry, data, compress_type=zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _npy_header(kind: str, count: int) -> bytes:
    """What stands in front of an array's bytes in an .npy file of version 1.0, as NumPy writes it for one dimension."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({count},), }}"
    room = _NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", room) + f"{text:<{room - 1}}\n".encode()


def _parsed(data: bytes) -> Calibration:
    """The calibration in the bytes of a file.

    Raises:
        Exception: One of `_DAMAGE`.
    """
    _check_directory(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = [entry.filename for entry in archive.infolist()]
        if found != [f"{name}.npy" for name in _TYPES]:
            raise ValueError(f"it holds {shown(found)}")
        room = archive.getinfo("header.npy").file_size - _NPY_HEADER_BYTES
        if not 0 < room <= MAX_HEADER_BYTES:
            raise ValueError(f"its header has {room} bytes")
        header = _header_in(_array(archive, "header", room).tobytes())
        columns = dict(_columns(archive, header))
    _check(columns)
    return _put_together(header, columns)


def _check_directory(data: bytes) -> None:
    """Refuses archives of millions of members before `zipfile` makes an object of each."""
    signature, *_, size, _, _ = struct.unpack("<4s4H2LH", data[-_END_BYTES:].rjust(_END_BYTES, b"\0"))
    has_larger_one = data[-42:-38] == b"PK\6\7"  # the locator of ZIP64, which would count instead
    if signature != b"PK\5\6" or size > _MAX_DIRECTORY_BYTES or has_larger_one:
        raise ValueError("it is no zip archive, or one of many files")


def _header_in(data: bytes) -> _Header:
    raw = json.loads(data)
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise ValueError("its header says something else")
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"it has schema {shown(raw.get('schema'))}, and this version reads {SCHEMA}")
    return from_plain(_Header, raw)


def _columns(archive: zipfile.ZipFile, header: _Header) -> Iterator[tuple[str, Array]]:
    """Name and array of each, whose length is known before it is read."""
    lengths = {
        "offsets": len(header.tensors) + 1,
        "reaches": len(header.tensors),
        "mean_offsets": len(header.read) + 1,
        "largest": len(header.made),
    }
    for name in _COLUMNS:
        array = _array(archive, name, lengths[name])
        if name == "offsets":
            lengths["codes"] = lengths["counts"] = _total(array, each=BINS, most=MAX_TENSORS * BINS)
        elif name == "mean_offsets":
            lengths["means"] = _total(array, each=MAX_CHANNELS, most=MAX_CHANNELS)
        yield name, array


def _total(offsets: Array, *, each: int, most: int) -> int:
    """The last of the offsets, which begin with 0 and never fall."""
    if offsets[0] != 0 or not ((offsets >= 0) & (offsets <= most)).all():
        raise ValueError("offsets are out of range")
    steps = np.diff(offsets)
    if not ((steps >= 0) & (steps <= each)).all():
        raise ValueError("offsets fall, or are too far apart")
    return int(offsets[-1])


def _array(archive: zipfile.ZipFile, name: str, count: int) -> Array:
    """A member of exactly this many numbers; nothing is decompressed before its size was seen."""
    entry = archive.getinfo(f"{name}.npy")
    head, size = _npy_header(_TYPES[name], count), count * np.dtype(_TYPES[name]).itemsize
    if entry.file_size != len(head) + size or entry.compress_type != zipfile.ZIP_DEFLATED:
        raise ValueError(f"{name} has {entry.file_size} bytes instead of {len(head) + size}, or is packed otherwise")
    with archive.open(entry) as file:
        data = file.read(entry.file_size)  # without a size, all that the packed bytes hold would be unpacked at once
    if len(data) != entry.file_size or data[: len(head)] != head:
        raise ValueError(f"{name} is cut off, or of another type or shape")
    return np.frombuffer(data, dtype=_TYPES[name], offset=len(head))


def _printable(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if text.isprintable() else ascii(text)
