"""YOLO label text files: one object a line, as a box or as a polygon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yolov7_deploy.dataset.samples import DoubleArray, Labels
from yolov7_deploy.dataset.words import MAX_SHOWN, reason, short
from yolov7_deploy.errors import DatasetError

BOX_COLUMNS = 5
MIN_POLYGON_COLUMNS = 7  # class and three points
SLACK = 1e-4  # labelling tools round to 4..6 digits: this far outside 0..1 is clipped, not an error


def label_path(picture: Path) -> Path:
    """The label file of a picture: `/images/` becomes `/labels/`, the suffix `.txt`.

    The official program replaces the first `/images/` of the path; where that folder does not exist the last one is
    taken, so that a dataset may itself lie under a folder called images. Without any the label is beside the picture.
    """
    text = picture.with_suffix(".txt").as_posix()
    first = Path(text.replace("/images/", "/labels/", 1))
    last = Path("/labels/".join(text.rsplit("/images/", 1)))
    return first if first.parent.is_dir() else last


def read_label_files(pictures: Sequence[Path], *, classes: int) -> tuple[list[Labels], list[str]]:
    """The labels of each picture, and what was repaired (duplicates and empty boxes dropped), one line each.

    A missing or empty file is a picture with nothing in it.

    Raises:
        DatasetError: Lines that cannot be understood; all files are read first and the message lists the first ten.
    """
    labels, repaired, wrong, missing = [], [], [], 0
    for picture in pictures:
        path = label_path(picture)
        lines = _lines(path)
        missing += lines is None
        found, repairs, errors = _parse(lines or [], classes)
        labels.append(found)
        repaired += [f"{path}: {repair}" for repair in repairs]
        wrong += [f"{path}: {error}" for error in errors]
    if wrong:
        more = f"\n  and {len(wrong) - MAX_SHOWN} more" if len(wrong) > MAX_SHOWN else ""
        raise DatasetError(
            f"{len(wrong)} label lines are wrong:\n  " + "\n  ".join(wrong[:MAX_SHOWN]) + more,
            fix="A line is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, coordinates as fractions 0..1.",
        )
    if missing and missing == len(pictures):
        repaired.insert(0, f"no label file was found; the first looked for is {label_path(pictures[0])}")
    return labels, repaired


def _lines(path: Path) -> list[str] | None:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as text: {reason(error)}.", fix="Copy it again.") from error


def _parse(lines: Sequence[str], classes: int) -> tuple[Labels, list[str], list[str]]:
    """Labels, repairs and errors of one file's lines."""
    rows: dict[tuple[float, ...], DoubleArray] = {}
    repairs, errors = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            class_id, points = _parse_line(line.split(), classes)
        except ValueError as error:
            errors.append(f"line {number}: {reason(error)}")
            continue
        box = (*points.min(axis=0), *points.max(axis=0))
        row = (class_id, *points.ravel())
        if row in rows:
            repairs.append(f"line {number} repeats another one; dropped")
        elif box[2] <= box[0] or box[3] <= box[1]:
            repairs.append(f"line {number} has a box without area; dropped")
        else:
            rows[row] = points
    outlines = list(rows.values())
    boxes = [np.concatenate([points.min(axis=0), points.max(axis=0)]) for points in outlines]
    labels = Labels(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        class_ids=np.array([row[0] for row in rows], dtype=np.int64),
        crowd=np.zeros(len(rows), dtype=np.bool_),
        polygons=tuple(points if len(points) > 2 else np.zeros((0, 2)) for points in outlines),
    )
    return labels, repairs, errors


def _parse_line(columns: Sequence[str], classes: int) -> tuple[int, DoubleArray]:
    """Class and points [K, 2]: the two corners of a box line, or the outline of a polygon line."""
    count = len(columns)
    if count != BOX_COLUMNS and (count < MIN_POLYGON_COLUMNS or count % 2 == 0):
        raise ValueError(
            f"{count} columns; a box has {BOX_COLUMNS}, a polygon an odd number from {MIN_POLYGON_COLUMNS}"
        )
    values = np.array([float(column) for column in columns], dtype=np.float64)
    if values[0] not in range(classes):
        raise ValueError(f"class {short(columns[0])} is not one of 0..{classes - 1}")
    fractions = values[1:]
    if not np.all((fractions >= -SLACK) & (fractions <= 1 + SLACK)):
        raise ValueError(f"coordinates outside 0..1: {' '.join(columns[1:])[:80]}")
    points = np.clip(fractions, 0, 1).reshape(-1, 2)
    if count == BOX_COLUMNS:
        centre, half = points[0], points[1] / 2
        points = np.stack([centre - half, centre + half])
    return int(values[0]), points
