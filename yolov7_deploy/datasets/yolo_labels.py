"""YOLO label files: text with one object per line, as a box or as a polygon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from yolov7_deploy.datasets.samples import MAX_LISTED, DoubleArray, Labels, short_text
from yolov7_deploy.errors import DatasetError

BOX_COLUMNS = 5
MIN_POLYGON_COLUMNS = 7  # class and three points
TOLERANCE = 1e-4  # labelling tools round to 4..6 digits: up to this far outside 0..1 is clipped, not an error


def label_path(image: Path) -> Path:
    """Return the label file of an image: `/images/` is replaced by `/labels/`, and the suffix is `.txt`.

    The official program replaces the first `/images/` of the path. If that folder does not exist, the last one is
    replaced, so that a dataset can be inside a folder called images. Without `/images/` the label file is next to the
    image.
    """
    text = image.with_suffix(".txt").as_posix()
    first = Path(text.replace("/images/", "/labels/", 1))
    last = Path("/labels/".join(text.rsplit("/images/", 1)))
    return first if first.parent.is_dir() else last


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelFile:
    """Content of one label file.

    Attributes:
        labels: Objects of the valid lines.
        repairs: Lines that were dropped (duplicates and empty boxes), one message each.
        errors: Invalid lines and the reason, one message each.
        is_missing: The file does not exist, so the image has no objects.
    """

    labels: Labels
    repairs: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    is_missing: bool = False


def read_label_files(images: Sequence[Path], *, classes: int) -> tuple[list[Labels], list[str]]:
    """Return the labels of each image, and the repairs (duplicates and empty boxes dropped), one message each.

    A missing or empty label file means an image without objects.

    Raises:
        DatasetError: Lines are invalid; all files are read first, and the message lists the first ten lines.
    """
    paths = [label_path(image) for image in images]
    return collect_labels([read_label_file(path, classes=classes) for path in paths], paths)


def read_label_file(path: Path, *, classes: int) -> LabelFile:
    """Return the content of one label file, including its errors.

    Raises:
        DatasetError: The file exists but cannot be read as text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return LabelFile(labels=_parse([], classes)[0], is_missing=True)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as text: {short_text(error)}.", fix="Copy it again.") from error
    labels, repairs, errors = _parse(lines, classes)
    return LabelFile(labels=labels, repairs=tuple(repairs), errors=tuple(errors))


def collect_labels(files: Sequence[LabelFile], paths: Sequence[Path]) -> tuple[list[Labels], list[str]]:
    """Return the labels of files without errors, and all repairs.

    Raises:
        DatasetError: See `read_label_files`.
    """
    wrong = [f"{path}: {error}" for file, path in zip(files, paths, strict=True) for error in file.errors]
    if wrong:
        more = f"\n  and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
        raise DatasetError(
            f"Invalid label lines ({len(wrong)}):\n  " + "\n  ".join(wrong[:MAX_LISTED]) + more,
            fix="A line is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, coordinates as fractions 0..1.",
        )
    repairs = [f"{path}: {repair}" for file, path in zip(files, paths, strict=True) for repair in file.repairs]
    if files and all(file.is_missing for file in files):
        repairs.insert(0, f"no label file was found; the first one tried is {paths[0]}")
    return [file.labels for file in files], repairs


def _parse(lines: Sequence[str], classes: int) -> tuple[Labels, list[str], list[str]]:
    """Return the labels, repairs and errors of the lines of one file."""
    rows: dict[tuple[int, bytes], tuple[DoubleArray, DoubleArray]] = {}
    repairs, errors = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            class_id, points = _parse_line(line.split(), classes)
        except ValueError as error:
            errors.append(f"line {number}: {short_text(error)}")
            continue
        box = np.concatenate([points.min(axis=0), points.max(axis=0)])
        row = (class_id, points.tobytes())
        if row in rows:
            repairs.append(f"line {number} repeats an earlier line; dropped")
        elif box[2] <= box[0] or box[3] <= box[1]:
            repairs.append(f"line {number} has a box without area; dropped")
        else:
            rows[row] = points, box
    labels = Labels(
        boxes=np.array([box for _, box in rows.values()], dtype=np.float64).reshape(-1, 4),
        class_ids=np.array([class_id for class_id, _ in rows], dtype=np.int64),
        crowd=np.zeros(len(rows), dtype=np.bool_),
        polygons=tuple(points if len(points) > 2 else np.zeros((0, 2)) for points, _ in rows.values()),
    )
    return labels, repairs, errors


def _parse_line(columns: Sequence[str], classes: int) -> tuple[int, DoubleArray]:
    """Return class and points [K, 2]: the two corners of a box line, or the outline of a polygon line."""
    count = len(columns)
    if count != BOX_COLUMNS and (count < MIN_POLYGON_COLUMNS or count % 2 == 0):
        raise ValueError(
            f"{count} columns; a box has {BOX_COLUMNS}, a polygon an odd number of at least {MIN_POLYGON_COLUMNS}"
        )
    values = np.array(list(map(float, columns)), dtype=np.float64)
    if values[0] not in range(classes):
        raise ValueError(f"class {short_text(columns[0])} is not one of 0..{classes - 1}")
    fractions = values[1:]
    if not np.all((fractions >= -TOLERANCE) & (fractions <= 1 + TOLERANCE)):
        raise ValueError(f"coordinates outside 0..1: {' '.join(columns[1:])[:80]}")
    points = (np.clip(fractions, 0, 1) + 0.0).reshape(-1, 2)  # + 0.0: -0 and 0 have different bytes
    if count == BOX_COLUMNS:
        centre, half = points[0], points[1] / 2
        points = np.stack([centre - half, centre + half])
    return int(values[0]), points
