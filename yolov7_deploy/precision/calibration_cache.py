"""Store a `Calibration` in a file, so that another calibration method needs seconds and no images.

The file is a compressed .npz, which `numpy.load` opens, too. Of each histogram it stores the bins that are not empty;
all tensors are concatenated. Files are not trusted: nothing in them is executed, and the size of every array follows
from earlier ones and is compared with the size in the file before anything is decompressed.
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
import onnx

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._bounded_read import read_bytes
from yolov7_deploy._serialization import from_dict, short_repr
from yolov7_deploy._text import printable_line, shorten
from yolov7_deploy.errors import ExportError, LoadError, UsageError
from yolov7_deploy.hub import cache_dir
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import Calibration
from yolov7_deploy.precision.histogram import BINS, LEVELS, Histogram, choose_range
from yolov7_deploy.precision.int8 import tensor_ranges
from yolov7_deploy.precision.qdq_placement import is_pass_through, pass_through_inputs, place_qdq
from yolov7_deploy.precision.subgraph import Network

Array = npt.NDArray[Any]

KIND, SCHEMA = "yolov7_deploy calibration", 2
MAX_TENSORS = 2048  # YOLOv7-E6E has 252; each takes 0.25 MB in memory
MAX_CHANNELS = 2**22  # input channels of all convolutions; YOLOv7-E6E has 120 700
MAX_HEADER_BYTES = 2**22
MAX_FILE_BYTES = 2**28
MAX_COUNT = 2**53  # float64 represents all integers up to this
# Arrays in the order in which they are written; the lengths of later ones follow from earlier ones.
_TYPES = {
    "header": "|u1",
    "offsets": "<i8",
    "bins": "<u2",
    "counts": "<i8",
    "amax": "<f8",
    "negative_amax": "<f8",
    "mean_offsets": "<i8",
    "input_means": "<f8",
    "output_amax": "<f8",
}
_NPY_HEADER_BYTES = 128
_DATE = (1980, 1, 1, 0, 0, 0)  # a constant, so that the same calibration has the same bytes
_COLUMNS = tuple(name for name in _TYPES if name != "header")
_END_BYTES = 22  # end-of-central-directory record of a zip archive
_MAX_DIRECTORY_BYTES = 2**12
_OTHER_FILE = "Name another file:  --calib-cache FILE.npz"
_DAMAGE = (zipfile.BadZipFile, zlib.error, ArithmeticError, EOFError, OSError, RuntimeError, ValueError, struct.error)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    """Everything that is not an array, and the names of the tensors in the arrays."""

    tensors: tuple[str, ...]
    conv_inputs: tuple[str, ...]
    conv_outputs: tuple[str, ...]
    images: int
    network_sha256: str
    images_sha256: str
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        for names in (self.tensors, self.conv_inputs, self.conv_outputs):
            if len(names) > MAX_TENSORS:
                raise ValueError(f"it has {len(names)} tensors, more than {MAX_TENSORS}")
            if len(set(names)) != len(names):
                raise ValueError("it names a tensor twice")
        if self.images < 1:
            raise ValueError(f"its number of images is {self.images}")


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file atomically; missing folders are created.

    Raises:
        ExportError: The disk is full, the folder is not writable, a value is infinite or NaN, or there are more than
            `MAX_TENSORS` tensors.
    """
    try:
        header, columns = _to_columns(calibration)
        _check(columns)
        data = _zip_arrays({"header": _header_array(header), **columns})
    except ValueError as error:
        raise ExportError(
            f"The calibration cannot be saved: {error}.", fix="Check the weights (y7 verify), or do not save it."
        ) from error
    try:
        with atomic_write(path) as unfinished:
            unfinished.write_bytes(data)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be written: {error}.", fix=_OTHER_FILE) from error


def load_calibration(path: Path) -> Calibration:
    """Return the calibration that `save_calibration` wrote, equal to the last bit.

    Raises:
        LoadError: The file is missing, damaged, truncated, or not a calibration.
    """
    try:
        if not os.path.lexists(path):
            raise LoadError(
                f"{path} does not exist.", fix=f"A calibration writes it:  --calib FOLDER --calib-cache {path}"
            )
        data = read_bytes(path, max_bytes=MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoadError(f"{path} cannot be read: {reason}.", fix=_OTHER_FILE) from error
    try:
        return _parse(data)
    except _DAMAGE as error:
        # "Delete it" alone would be dangerous advice: the path may name a file that is not a calibration at all.
        raise LoadError(
            f"{path} is not a calibration, or it is damaged: {printable_line(shorten(error) or type(error).__name__)}.",
            fix=f"If it is a calibration, delete it, and the next run writes it again. {_OTHER_FILE}",
        ) from error


def check_calibration(calibration: Calibration, path: Path, *, network_sha256: str, images_sha256: str) -> None:
    """Check that a calibration belongs to this network and these images.

    Args:
        calibration: Loaded from `path`.
        path: For the message.
        network_sha256: See `network_digest`.
        images_sha256: See `Calibration`.

    Raises:
        UsageError: It belongs to others; the message states whether the network or the images differ.
    """
    pairs = {
        "model": (calibration.network_sha256, network_sha256),
        "images": (calibration.images_sha256, images_sha256),
    }
    wrong = {what: digests for what, digests in pairs.items() if digests[0] != digests[1]}
    if wrong:
        which = " and ".join({"model": "another model", "images": "other images"}[what] for what in wrong)
        details = ", ".join(f"{what} {has[:12]} instead of {expected[:12]}" for what, (has, expected) in wrong.items())
        raise UsageError(
            f"{path} is a calibration of {which} (SHA-256 of {details}).",
            fix=f"{_OTHER_FILE}   or delete this one, and it is written again:  rm {path}",
        )


def default_cache_path(network_sha256: str, images_sha256: str) -> Path:
    """Return the default path of the calibration of a network on some images."""
    return cache_dir() / "calibration" / f"{network_sha256[:16]}-{images_sha256[:16]}.npz"


# --- a calibration as arrays ------------------------------------------------------------------------------------------


def _to_columns(calibration: Calibration) -> tuple[_Header, dict[str, Array]]:
    bins = [np.flatnonzero(histogram.counts) for histogram in calibration.histograms.values()]
    counts = [h.counts[filled] for h, filled in zip(calibration.histograms.values(), bins, strict=True)]
    means = list(calibration.input_means.values())
    header = _Header(
        tensors=tuple(calibration.histograms),
        conv_inputs=tuple(calibration.input_means),
        conv_outputs=tuple(calibration.output_amax),
        images=calibration.images,
        network_sha256=calibration.network_sha256,
        images_sha256=calibration.images_sha256,
        notes=tuple(calibration.notes),
    )
    return header, {
        "offsets": _offsets(bins),
        "bins": _concatenate(bins, "bins"),
        "counts": _concatenate(counts, "counts"),
        "amax": np.array([h.amax for h in calibration.histograms.values()], dtype=_TYPES["amax"]),
        "negative_amax": np.array([h.negative_amax for h in calibration.histograms.values()], dtype=_TYPES["amax"]),
        "mean_offsets": _offsets(means),
        "input_means": _concatenate(means, "input_means"),
        "output_amax": np.array(list(calibration.output_amax.values()), dtype=_TYPES["output_amax"]),
    }


def _offsets(parts: Sequence[Array]) -> Array:
    return np.cumsum([0, *map(len, parts)], dtype=_TYPES["offsets"])


def _concatenate(parts: Sequence[Array], name: str) -> Array:
    return np.concatenate([np.zeros(0, dtype=_TYPES[name]), *parts]).astype(_TYPES[name])


def _from_columns(header: _Header, columns: Mapping[str, Array]) -> Calibration:
    histograms = {}
    slices = pairwise(columns["offsets"])
    largest = zip(columns["amax"].tolist(), columns["negative_amax"].tolist(), strict=True)
    for name, (start, stop), (amax, negative_amax) in zip(header.tensors, slices, largest, strict=True):
        counts = np.zeros(BINS, dtype=np.int64)
        counts[columns["bins"][start:stop]] = columns["counts"][start:stop]
        histograms[name] = Histogram(counts, amax, negative_amax)
    slices = pairwise(columns["mean_offsets"])
    return Calibration(
        histograms=histograms,
        input_means={
            name: columns["input_means"][start:stop].astype(np.float64)
            for name, (start, stop) in zip(header.conv_inputs, slices, strict=True)
        },
        output_amax=dict(zip(header.conv_outputs, columns["output_amax"].tolist(), strict=True)),
        images=header.images,
        network_sha256=header.network_sha256,
        images_sha256=header.images_sha256,
        notes=header.notes,
    )


def _check(columns: Mapping[str, Array]) -> None:
    """Check the values on which users of a calibration rely; lengths are checked where the arrays are read.

    Raises:
        ValueError: A value is invalid; the message says which.
    """
    offsets, bins, counts, amax = (columns[name] for name in ("offsets", "bins", "counts", "amax"))
    if counts.size and not 0 < counts.min() <= counts.max() <= MAX_COUNT:
        raise ValueError(f"a bin counts {short_repr(int(counts.min()))} to {short_repr(int(counts.max()))} values")
    ascending = np.diff(bins.astype(np.int64)) > 0
    first = offsets[1:-1]
    ascending[first[(first > 0) & (first < bins.size)] - 1] = True  # where the next tensor begins
    if not ascending.all() or (bins >= _bins_of(np.array([np.inf]))).any():
        raise ValueError("bins are out of order, or count values that are not finite")
    largest_float32 = float(np.finfo(np.float32).max)
    if not ((amax >= 0) & (amax <= largest_float32)).all():
        raise ValueError("the largest magnitude of a tensor is not finite, or negative")
    if not ((columns["negative_amax"] >= 0) & (columns["negative_amax"] <= amax)).all():
        raise ValueError("the largest negative value of a tensor is larger than its largest magnitude")
    filled = offsets[1:] > offsets[:-1]
    if (_bins_of(amax[filled]) != bins[offsets[1:][filled] - 1]).any() or amax[~filled].any():
        raise ValueError("the largest magnitude of a tensor is not in its last bin")
    if not np.isfinite(columns["input_means"]).all():
        raise ValueError("a mean is infinite or NaN")
    if not ((columns["output_amax"] >= 0) & np.isfinite(columns["output_amax"])).all():
        raise ValueError("the largest magnitude of an output is not finite, or negative")


def _bins_of(magnitudes: Array) -> Array:
    """Return the bin of each magnitude; see `Histogram`."""
    return np.ascontiguousarray(magnitudes, dtype=np.float32).view(np.uint32) >> 16


# --- arrays as bytes --------------------------------------------------------------------------------------------------


def _header_array(header: _Header) -> Array:
    data = json.dumps({"kind": KIND, "schema": SCHEMA, **asdict(header)}).encode()
    if len(data) > MAX_HEADER_BYTES:
        raise ValueError(f"its names and notes have {len(data)} bytes, more than {MAX_HEADER_BYTES}")
    return np.frombuffer(data, dtype=np.uint8)


def _zip_arrays(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, kind in _TYPES.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=_DATE)
            entry.create_system = 3  # Unix on every platform, so that the bytes are the same
            data = _npy_header(kind, arrays[name].size) + arrays[name].astype(kind).tobytes()
            archive.writestr(entry, data, compress_type=zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _npy_header(kind: str, count: int) -> bytes:
    """Return the header of an .npy file of version 1.0 for a one-dimensional array, as NumPy writes it."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({count},), }}"
    length = _NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + f"{text:<{length - 1}}\n".encode()


def _parse(data: bytes) -> Calibration:
    """Return the calibration in the bytes of a file.

    Raises:
        Exception: One of `_DAMAGE`.
    """
    _check_directory(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = [entry.filename for entry in archive.infolist()]
        if found != [f"{name}.npy" for name in _TYPES]:
            raise ValueError(f"it contains {short_repr(found)}")
        length = archive.getinfo("header.npy").file_size - _NPY_HEADER_BYTES
        if not 0 < length <= MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes")
        header = _parse_header(_read_array(archive, "header", length).tobytes())
        columns = dict(_read_columns(archive, header))
    _check(columns)
    return _from_columns(header, columns)


def _check_directory(data: bytes) -> None:
    """Raise an error for archives with millions of members, before `zipfile` creates an object for each."""
    signature, *_, size, _, _ = struct.unpack("<4s4H2LH", data[-_END_BYTES:].rjust(_END_BYTES, b"\0"))
    is_zip64 = data[-42:-38] == b"PK\6\7"  # a ZIP64 locator would override the directory size
    if signature != b"PK\5\6" or size > _MAX_DIRECTORY_BYTES or is_zip64:
        raise ValueError("it is not a zip archive, or one of many files")


def _parse_header(data: bytes) -> _Header:
    raw = json.loads(data)
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise ValueError("its header is not that of a calibration")
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"it has schema {short_repr(raw.get('schema'))}, and this version reads {SCHEMA}")
    return from_dict(_Header, raw)


def _read_columns(archive: zipfile.ZipFile, header: _Header) -> Iterator[tuple[str, Array]]:
    """Yield name and array of each column; its length is known before it is read."""
    lengths = {
        "offsets": len(header.tensors) + 1,
        "amax": len(header.tensors),
        "negative_amax": len(header.tensors),
        "mean_offsets": len(header.conv_inputs) + 1,
        "output_amax": len(header.conv_outputs),
    }
    for name in _COLUMNS:
        array = _read_array(archive, name, lengths[name])
        if name == "offsets":
            lengths["bins"] = lengths["counts"] = _total(array, max_step=BINS, max_total=MAX_TENSORS * BINS)
        elif name == "mean_offsets":
            lengths["input_means"] = _total(array, max_step=MAX_CHANNELS, max_total=MAX_CHANNELS)
        yield name, array


def _total(offsets: Array, *, max_step: int, max_total: int) -> int:
    """Return the last offset; check that offsets begin with 0 and never decrease."""
    if offsets[0] != 0 or not ((offsets >= 0) & (offsets <= max_total)).all():
        raise ValueError("offsets are out of range")
    steps = np.diff(offsets)
    if not ((steps >= 0) & (steps <= max_step)).all():
        raise ValueError("offsets decrease, or are too far apart")
    return int(offsets[-1])


def _read_array(archive: zipfile.ZipFile, name: str, count: int) -> Array:
    """Return a member of exactly `count` numbers; its size is checked before it is decompressed."""
    entry = archive.getinfo(f"{name}.npy")
    head, size = _npy_header(_TYPES[name], count), count * np.dtype(_TYPES[name]).itemsize
    if entry.file_size != len(head) + size or entry.compress_type != zipfile.ZIP_DEFLATED:
        raise ValueError(f"{name} has {entry.file_size} bytes instead of {len(head) + size}, or another compression")
    with archive.open(entry) as file:
        data = file.read(entry.file_size)  # without a size, everything would be decompressed at once
    if len(data) != entry.file_size or data[: len(head)] != head:
        raise ValueError(f"{name} is truncated, or of another type or shape")
    return np.frombuffer(data, dtype=_TYPES[name], offset=len(head))


# As TensorRT 8.6.1 writes it. When TensorRT reads a cache, it ignores the version but compares the type of the
# calibrator; this is the only type that DLA supports.
HEADER = "TRT-8601-EntropyCalibration2"
_SIGMOID_SCALE = 1 / LEVELS  # a sigmoid is at most 1


def trt_calibration_cache(model: OnnxModel, calibration: Calibration, method: str) -> str:
    """Return the text of the cache: one line with the scale of each tensor before decoding.

    Implicit quantization needs a scale for every tensor, including those inside activations. The output of a
    convolution gets the scale of its activation's output: larger positive values are clipped anyway, and on negative
    ones the activation is almost 0. Sigmoids end at 1. Tensors that share a scale in the INT8 file share it here.

    Args:
        model: The float32 graph that TensorRT will parse.
        calibration: Calibration of this graph.
        method: Calibration method; see `Int8Options`.

    Raises:
        ExportError: There are infinite values or NaN.
    """
    network = Network(model)
    placement = place_qdq(network, {})
    ranges = tensor_ranges(network, placement, calibration, Int8Options(method=method))
    scales = {name: float(values.scale) for name, values in ranges.items()}
    known = scales | {source: scales[name] for name, group in placement.scale_groups.items() for source in group}
    for name, histogram in calibration.histograms.items():
        if name not in known:  # read by heads only
            known[name] = choose_range(histogram, method) / LEVELS
    lines = [f"{name}: {_hex_float(scale)}" for name, scale in _all_scales(network, known, calibration)]
    return "\n".join([HEADER, *lines, ""])


def _all_scales(network: Network, known: Mapping[str, float], calibration: Calibration) -> Iterator[tuple[str, float]]:
    """Yield name and scale of the input and of each tensor, in execution order."""
    scales = dict(known)
    for node in reversed(network.nodes):
        scale = _scale_from_consumers(network, node, scales)
        for name in node.output:
            if name in network.floats and name not in scales and scale is not None:
                scales[name] = scale
    for name, amax in calibration.output_amax.items():
        scales.setdefault(name, max(amax, 1e-6) / LEVELS)  # heads: nothing is clipped
    for node in network.nodes:
        if is_pass_through(node) and all(name in scales for name in pass_through_inputs(node)):
            for name in node.output:
                scales.setdefault(name, max(scales[source] for source in pass_through_inputs(node)))
    order = [entry.name for entry in network.proto.graph.input] + list(network.producers)
    yield from ((name, scales[name]) for name in order if name in scales)


def _scale_from_consumers(network: Network, node: onnx.NodeProto, scales: Mapping[str, float]) -> float | None:
    if node.op_type == "Sigmoid":
        return _SIGMOID_SCALE
    for name in node.output:
        for consumer in network.consumers.get(name, []):
            keeps_scale = consumer.op_type in ("Gather", "LeakyRelu", "Mul", "Relu") or is_pass_through(consumer)
            if keeps_scale and consumer.output[0] in scales:
                return scales[consumer.output[0]]
            is_scaling = consumer.op_type == "Div" and consumer.input[1] in network.weights  # bytes to 0..1
            if is_scaling and consumer.output[0] in scales:
                return scales[consumer.output[0]] * float(abs(network.weights[consumer.input[1]]).max())
    return None


def _hex_float(scale: float) -> str:
    """Return the bits of a float32 as TensorRT writes them."""
    return struct.pack(">f", scale).hex()
