"""YOLO label files: text with one object per line, as a box or as a polygon."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from yolov7_deploy._console import plural
from yolov7_deploy.datasets.samples import MAX_LISTED, DoubleArray, Labels, short_reason, short_text
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.sources.files import LABEL_SUFFIX, read_text

BOX_COLUMNS = 5
MIN_POLYGON_COLUMNS = 7  # class and three points
MAX_LABEL_BYTES = 2**24  # of a label file: several hundred thousand boxes
IMAGES_FOLDER, LABELS_FOLDER = "images", "labels"
NOT_LABELS = ("classes.txt",)  # labelImg writes the class names beside the labels
LINE_FORMAT = "A line is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, coordinates as fractions 0..1."
NO_SUCH_CLASS = "is not one of "
MORE_NAMES = "Classes are counted from 0: add the missing ones to `names` in the dataset YAML, or correct the labels."
TOLERANCE = 1e-4  # labelling tools round to 4..6 digits: up to this far outside 0..1 is clipped, not an error


class LabelFinder:
    """Finds the label file of each image: the stem of the image with the suffix `.txt`.

    The folders tried are, in this order: the folder of the image with one part `images` of its absolute path replaced
    by `labels`, from the first part (as in the official program) to the last; the folder of the image; and both for
    the file that a symbolic link of the path leads to. Every folder is listed once.
    """

    def __init__(self) -> None:
        # Keys are strings, because hashing a Path takes ten times as long, and there are hundreds of thousands.
        self._label_folders: dict[str, tuple[str, ...]] = {}
        self._real_folders: dict[str, str] = {}
        self._names: dict[str, dict[str, str]] = {}
        self._found: dict[str, set[str]] = {}

    def find(self, image: Path) -> Path:
        """Return the label file of an image, or the first path that was tried if there is none."""
        for folder, stem in self._places(os.path.dirname(image), image):  # noqa: PTH120
            name = self._list(folder).get(_label_key(stem))
            if name is not None:
                self._found.setdefault(folder, set()).add(name)
                return Path(folder, name)
        return Path(self._folders_for(os.path.dirname(image))[0], f"{image.stem}{LABEL_SUFFIX}")  # noqa: PTH120

    def without_image(self) -> list[Path]:
        """Return the other label files in the folders of those that were found; none of the images has them.

        Folders that also have images are left out, since a text file there may be anything.
        """
        folders = {folder: found for folder, found in self._found.items() if folder not in self._label_folders}
        return [
            Path(folder, name)
            for folder, found in folders.items()
            for name in sorted(self._list(folder).values())
            if name not in found and name not in NOT_LABELS
        ]

    def _places(self, image_folder: str, image: Path) -> Iterator[tuple[str, str]]:
        """Yield the folders to look in, and the stem to look for."""
        for folder in self._folders_for(image_folder):
            yield folder, image.stem
        if os.path.islink(image):  # noqa: PTH114 - unlike Path.is_symlink, it accepts every name
            image = Path(os.path.realpath(image))
            image_folder = str(image.parent)
        for folder in self._folders_for(self._real_folder(image_folder)):
            yield folder, image.stem

    def _folders_for(self, image_folder: str) -> tuple[str, ...]:
        if image_folder not in self._label_folders:
            parts = Path(image_folder).absolute().parts
            positions = [i for i, part in enumerate(parts) if part == IMAGES_FOLDER]
            replaced = (str(Path(*parts[:i], LABELS_FOLDER, *parts[i + 1 :])) for i in positions)
            self._label_folders[image_folder] = (*replaced, image_folder)
        return self._label_folders[image_folder]

    def _real_folder(self, folder: str) -> str:
        if folder not in self._real_folders:
            try:
                self._real_folders[folder] = os.path.realpath(folder)
            except (OSError, ValueError):  # a name that no folder can have
                self._real_folders[folder] = folder
        return self._real_folders[folder]

    def _list(self, folder: str) -> dict[str, str]:
        """Return the names of the label files in a folder."""
        if folder not in self._names:
            try:
                names = os.listdir(folder or os.curdir)  # noqa: PTH208 - names are enough, and ten times as fast
            except (OSError, ValueError):
                names = []
            pairs = (os.path.splitext(name) for name in sorted(names, reverse=True))  # noqa: PTH122
            self._names[folder] = {
                _label_key(stem): stem + suffix for stem, suffix in pairs if suffix.lower() == LABEL_SUFFIX
            }
        return self._names[folder]


def _label_key(stem: str) -> str:
    """Return the name under which a label file is looked up: `.TXT` is accepted, and on Windows any case."""
    return os.path.normcase(stem + LABEL_SUFFIX)


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelSet:
    """The labels of a list of images.

    Attributes:
        labels: One entry per image.
        missing: Number of images without a label file.
        problems: The first image without a label file, and all repairs, one message each.
    """

    labels: tuple[Labels, ...]
    missing: int
    problems: tuple[str, ...]

    def coverage(self) -> str:
        """Return how many images have no label file."""
        return f"{self.missing} of {len(self.labels)} images have no label file"


def read_label_files(images: Sequence[Path], *, classes: int, are_complete: bool = False) -> LabelSet:
    """Return the labels of each image, and what was missing or repaired (duplicates and empty boxes are dropped).

    A missing or empty label file means an image without objects.

    Args:
        images: The image files.
        classes: Number of classes.
        are_complete: These are all images of their folders, so label files without an image are reported.

    Raises:
        DatasetError: Lines are invalid; all files are read first, and the message lists the first ten lines.
    """
    finder = LabelFinder()
    paths = [finder.find(image) for image in images]
    unused = finder.without_image() if are_complete else []
    return collect_labels([read_label_file(path, classes=classes) for path in paths], paths, images, unused)


def read_label_file(path: Path, *, classes: int) -> LabelFile:
    """Return the content of one label file, including its errors.

    Raises:
        DatasetError: The file exists but cannot be read as text.
    """
    try:
        lines = read_text(path, max_bytes=MAX_LABEL_BYTES).splitlines()
    except FileNotFoundError:
        return LabelFile(labels=_parse([], classes)[0], is_missing=True)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as text: {short_reason(error)}.", fix="Copy it again.") from error
    labels, repairs, errors = _parse(lines, classes)
    return LabelFile(labels=labels, repairs=tuple(repairs), errors=tuple(errors))


def collect_labels(
    files: Sequence[LabelFile], paths: Sequence[Path], images: Sequence[Path], unused: Sequence[Path]
) -> LabelSet:
    """Return the labels of all images from their label files, which are at `paths`; those at `unused` have no image.

    Raises:
        DatasetError: See `read_label_files`.
    """
    wrong = [f"{path}: {error}" for file, path in zip(files, paths, strict=True) for error in file.errors]
    if wrong:
        more = f"\n  and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
        raise DatasetError(
            f"Invalid label lines ({len(wrong)}):\n  " + "\n  ".join(wrong[:MAX_LISTED]) + more,
            fix=MORE_NAMES if all(NO_SUCH_CLASS in line for line in wrong) else LINE_FORMAT,
        )
    problems = [f"{path}: {repair}" for file, path in zip(files, paths, strict=True) for repair in file.repairs]
    missing = [i for i, file in enumerate(files) if file.is_missing]
    first_image: dict[Path, int] = {}
    shared = [i for i, file in enumerate(files) if not file.is_missing and first_image.setdefault(paths[i], i) != i]
    if shared:
        example = (
            f"{short_text(images[shared[0]])} and {short_text(images[first_image[paths[shared[0]]]].name)} share one"
        )
        problems.insert(0, f"{len(shared)} images have the label file of another image; {example}")
    if unused:
        problems.insert(0, f"{len(unused)} label files have no image; the first is {short_text(unused[0])}")
    found = LabelSet(labels=tuple(file.labels for file in files), missing=len(missing), problems=tuple(problems))
    if not missing:
        return found
    image, path = short_text(images[missing[0]]), short_text(paths[missing[0]])
    first = f"the first is {image}, whose label file would be {path}"
    return replace(found, problems=(f"{found.coverage()}; {first}", *problems))


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
        expected = f"a box has {BOX_COLUMNS}, a polygon an odd number of at least {MIN_POLYGON_COLUMNS}"
        raise ValueError(f"{plural(count, 'column')}; {expected}")
    values = np.array(list(map(float, columns)), dtype=np.float64)
    if values[0] not in range(classes):
        raise ValueError(f"class {short_text(columns[0])} {NO_SUCH_CLASS}0..{classes - 1}")
    fractions = values[1:]
    if not np.all((fractions >= -TOLERANCE) & (fractions <= 1 + TOLERANCE)):
        raise ValueError(f"coordinates outside 0..1: {' '.join(columns[1:])[:80]}")
    points = (np.clip(fractions, 0, 1) + 0.0).reshape(-1, 2)  # + 0.0: -0 and 0 have different bytes
    if count == BOX_COLUMNS:
        centre, half = points[0], points[1] / 2
        points = np.stack([centre - half, centre + half])
    return int(values[0]), points
