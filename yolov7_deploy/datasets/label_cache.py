"""Disk cache of parsed label files and image sizes; an entry is used only while its files are unchanged.

Reading the labels of a large dataset takes a minute; checking whether its files have changed takes a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._bounded_read import open_file
from yolov7_deploy._text import get_logger
from yolov7_deploy.datasets.samples import BoolArray, IntArray, Labels
from yolov7_deploy.datasets.yolo_labels import LabelFile, LabelFinder, LabelSet, collect_labels, read_label_file
from yolov7_deploy.errors import ImageError
from yolov7_deploy.hub import cache_dir
from yolov7_deploy.image import read_image_hw

VERSION = 1  # of the arrays, and of the parser of label lines
# A file that changed less than this before it was read can change again within the same tick of the file system clock
# (two seconds on FAT, the coarsest one) and would look unchanged. Such entries are not cached.
SETTLED_NS = 2_000_000_000
MAX_CACHE_BYTES = 2**30  # the labels of a million images with eight boxes each take 0.4 GB
STAMPS = 6  # size, mtime and ctime of the label file, then of the image
ABSENT = -1  # stamp of a file that does not exist
CHANGED = -2  # stamp that no file has: the entry is read again
DTYPES: Mapping[str, type[np.generic]] = {
    "stamps": np.int64,
    "hw": np.int64,
    "box_counts": np.int64,
    "boxes": np.float64,
    "class_ids": np.int64,
    "point_counts": np.int64,
    "points": np.float64,
    "repairs": np.uint8,
}

# Raised by numpy, zipfile and json for a truncated file, or one of another format.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, MemoryError, RuntimeError)
_DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, struct.error)

logger = get_logger(__name__)

Arrays = dict[str, npt.NDArray[Any]]
Hw = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Entry:
    """One image: its label file, and its height and width (`None` if its header cannot be read)."""

    file: LabelFile
    image_hw: Hw | None


def read_labels_cached(
    images: Sequence[Path], *, classes: int, are_complete: bool = False
) -> tuple[LabelSet, list[Hw | None]]:
    """Return what `read_label_files` returns, and the size of each image; unchanged files are not read again.

    The cache files are in `$XDG_CACHE_HOME/yolov7_deploy/labels`. A damaged one is rebuilt; one that cannot be written
    is a logged warning.

    Args:
        images: The image files.
        classes: Number of classes.
        are_complete: See `read_label_files`.

    Raises:
        DatasetError: See `read_label_files`.
    """
    start, now_ns = time.perf_counter(), time.time_ns()
    finder = LabelFinder()
    paths = [finder.find(image) for image in images]
    cache_path = cache_dir() / "labels" / f"{_digest(images, paths, classes)}.npz"
    stamps = np.array(
        [(*_stamp(path), *_stamp(image)) for path, image in zip(paths, images, strict=True)], dtype=np.int64
    ).reshape(-1, STAMPS)
    arrays = _load(cache_path, count=len(paths), classes=classes)
    fresh = np.all(arrays["stamps"] == stamps, axis=1) if arrays else np.zeros(len(paths), dtype=np.bool_)
    cached: list[Entry | None] = _unpack(arrays, fresh) if arrays else [None] * len(paths)
    entries = [
        entry or Entry(file=read_label_file(path, classes=classes), image_hw=_image_hw(image))
        for entry, path, image in zip(cached, paths, images, strict=True)
    ]
    if not fresh.all():
        _write(cache_path, _pack(entries, _settled_stamps(stamps, entries, now_ns)))
    unused = finder.without_image() if are_complete else []
    found = collect_labels([entry.file for entry in entries], paths, images, unused)
    seconds = time.perf_counter() - start
    logger.info("%d label files, %d of them from %s, in %.1f s", len(paths), fresh.sum(), cache_path, seconds)
    return found, [entry.image_hw for entry in entries]


def _digest(images: Sequence[Path], paths: Sequence[Path], classes: int) -> str:
    """Return the SHA-256 of everything that identifies a dataset; the name of its cache file."""
    digest = hashlib.sha256(f"{VERSION} {classes} {Path.cwd()}".encode("utf-8", "surrogateescape"))
    for files in (images, paths):
        digest.update("\0".join(map(str, files)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return size, mtime and ctime of a file; ctime also changes when a program sets mtime back."""
    try:
        status = os.stat(path)  # noqa: PTH116 - Path.stat takes twice as long, and there are hundreds of thousands
    except (OSError, ValueError):
        return ABSENT, ABSENT, ABSENT
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _image_hw(image: Path) -> Hw | None:
    try:
        return read_image_hw(image)
    except ImageError:
        return None


def _settled_stamps(stamps: IntArray, entries: Sequence[Entry], now_ns: int) -> IntArray:
    """Return the stamps, with `CHANGED` for recently changed files, unreadable images and labels with errors."""
    times = stamps[:, [1, 2, 4, 5]].max(axis=1)
    valid = np.array([entry.image_hw is not None and not entry.file.errors for entry in entries], dtype=np.bool_)
    return np.where((valid & (times < now_ns - SETTLED_NS))[:, None], stamps, CHANGED)


def _pack(entries: Sequence[Entry], stamps: IntArray) -> Arrays:
    """Concatenate all entries to a few long arrays."""
    files = [entry.file.labels for entry in entries]
    polygons = [polygon for labels in files for polygon in labels.polygons]
    repairs = {str(i): entry.file.repairs for i, entry in enumerate(entries) if entry.file.repairs}
    return {
        "stamps": stamps,
        "hw": np.array([entry.image_hw or (0, 0) for entry in entries], dtype=np.int64).reshape(-1, 2),
        "box_counts": np.array([len(labels.boxes) for labels in files], dtype=np.int64),
        "boxes": np.concatenate([np.zeros((0, 4)), *(labels.boxes for labels in files)]),
        "class_ids": np.concatenate([np.zeros(0, np.int64), *(labels.class_ids for labels in files)]),
        "point_counts": np.array([len(polygon) for polygon in polygons], dtype=np.int64),
        "points": np.concatenate([np.zeros((0, 2)), *polygons]),
        "repairs": np.frombuffer(json.dumps(repairs, sort_keys=True).encode(), dtype=np.uint8),
    }


def _unpack(arrays: Arrays, fresh: BoolArray) -> list[Entry | None]:
    """Return the entries where `fresh` is true, `None` for the others; their arrays are views of the long ones."""
    last = np.cumsum(arrays["box_counts"]).tolist()
    bounds = np.concatenate([[0], np.cumsum(arrays["point_counts"])]).tolist()
    repairs = json.loads(arrays["repairs"].tobytes())
    boxes, class_ids, points = (arrays[name] for name in ("boxes", "class_ids", "points"))
    crowd = np.zeros(len(boxes), dtype=np.bool_)
    entries: list[Entry | None] = []
    for i, (stop, count, hw) in enumerate(zip(last, arrays["box_counts"].tolist(), arrays["hw"].tolist(), strict=True)):
        if not fresh[i]:
            entries.append(None)
            continue
        first = stop - count
        labels = Labels(
            boxes=boxes[first:stop],
            class_ids=class_ids[first:stop],
            crowd=crowd[first:stop],
            polygons=tuple(points[a:b] for a, b in pairwise(bounds[first : stop + 1])),
        )
        file = LabelFile(
            labels=labels, repairs=tuple(repairs.get(str(i), ())), is_missing=bool(arrays["stamps"][i, 0] == ABSENT)
        )
        entries.append(Entry(file=file, image_hw=(hw[0], hw[1])))
    return entries


def _load(path: Path, *, count: int, classes: int) -> Arrays | None:
    """Return the arrays of a complete and valid cache file, or `None`."""
    try:
        with open_file(path, max_bytes=MAX_CACHE_BYTES) as raw, _open_npz(raw) as file:
            arrays = {name: np.asarray(file[name]) for name in DTYPES}
        return arrays if _is_consistent(arrays, count, classes) else None
    except FileNotFoundError:
        return None
    except (*_DAMAGED, *_DAMAGED_ZIP) as error:
        logger.info("%s is damaged and will be rebuilt: %s", path, error)
        return None


def _open_npz(file: BinaryIO) -> np.lib.npyio.NpzFile:
    """Open an archive as `_write` creates it: without compression, so its arrays cannot be larger than the file."""
    with zipfile.ZipFile(file) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed")
    file.seek(0)
    opened: np.lib.npyio.NpzFile = np.load(file, allow_pickle=False)
    return opened


def _is_consistent(arrays: Arrays, count: int, classes: int) -> bool:
    """Return whether shapes, dtypes and values of the arrays fit together; a cache file is not trusted."""
    boxes, points = len(arrays["boxes"]), len(arrays["points"])
    shapes = {
        "stamps": (count, STAMPS),
        "hw": (count, 2),
        "box_counts": (count,),
        "boxes": (boxes, 4),
        "class_ids": (boxes,),
        "point_counts": (boxes,),
        "points": (points, 2),
        "repairs": (len(arrays["repairs"]),),
    }
    if any(arrays[name].dtype != DTYPES[name] or arrays[name].shape != shape for name, shape in shapes.items()):
        return False
    repairs = json.loads(arrays["repairs"].tobytes())
    return bool(
        isinstance(repairs, dict)
        and all(isinstance(lines, list) and all(isinstance(line, str) for line in lines) for lines in repairs.values())
        and all(np.all(arrays[name] >= 0) for name in ("hw", "box_counts", "point_counts"))
        and (arrays["box_counts"].sum(), arrays["point_counts"].sum()) == (boxes, points)
        and np.all((arrays["class_ids"] >= 0) & (arrays["class_ids"] < classes))
        and all(np.all((arrays[name] >= -1) & (arrays[name] <= 2)) for name in ("boxes", "points"))
    )


def _write(path: Path, arrays: Arrays) -> None:
    """Write the cache file under a temporary name first; a failure costs only the time that the cache would save."""
    try:
        with atomic_write(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        logger.warning("%s cannot be written (%s); labels will be read again next time.", path, error.strerror or error)
