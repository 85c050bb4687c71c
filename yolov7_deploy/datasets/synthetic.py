"""A generated dataset: textured shapes on textured images, told apart by their form alone.

For tests, for the demo and for a first training run: labels are exact, any size and number of images is a matter of
seconds, and the same seed gives the same pixels on every machine.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from yolov7_deploy.datasets.samples import DoubleArray, Labels
from yolov7_deploy.datasets.synthetic_render import FORMS, ShapeCanvas
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.image import Image
from yolov7_deploy.visualize import write_image

CLASS_NAMES = tuple(FORMS)
SPLITS = ("train", "val")
VERSION = 1  # of the pixels that a seed gives
MAX_OBJECTS = 8
EMPTY = 0.05  # probability of an image without objects
SMALLEST, LARGEST = 0.06, 0.45  # longer side of a box, in those of the image
MIN_OBJECT_PX = 10.0  # below this a star is a circle
SIZES = range(32, 4097)

Progress = Callable[[int, int], None]


def shape_image(k: int, *, split: str, size: int, seed: int) -> tuple[Image, Labels]:
    """Image `k` of a split: uint8 BGR [size, size, 3], and its objects with outlines (a ring's is the outer one).

    It depends on these four alone. Up to 8 objects, none in one of 20 images; at most 30 % of an object are hidden
    by later ones.

    Raises:
        DatasetError: A size or number that cannot be meant.
    """
    if size not in SIZES or split not in SPLITS or min(k, seed) < 0:
        raise DatasetError(
            f"No shapes for image {k} of {split} with {size} pixels and seed {seed}.",
            fix=f"Splits are {' and '.join(SPLITS)}, sizes {SIZES[0]} to {SIZES[-1]}, seeds from 0: --img 320 --seed 0",
        )
    rng = np.random.default_rng([seed, SPLITS.index(split), k, size])
    canvas = ShapeCanvas(size, rng=rng)
    count = 0 if rng.random() < EMPTY else int(rng.integers(1, MAX_OBJECTS, endpoint=True))
    found: list[tuple[int, DoubleArray]] = []
    for _ in range(count):
        class_id = int(rng.integers(len(CLASS_NAMES)))
        share = SMALLEST + (LARGEST - SMALLEST) * rng.random() ** 2  # as in most datasets small ones are more frequent
        outline = canvas.add(FORMS[CLASS_NAMES[class_id]], side=max(MIN_OBJECT_PX, share * size))
        if outline is not None:
            found.append((class_id, outline / size))
    boxes = [np.concatenate([points.min(axis=0), points.max(axis=0)]) for _, points in found]
    return canvas.render(), Labels(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        class_ids=np.array([class_id for class_id, _ in found], dtype=np.int64),
        crowd=np.zeros(len(found), dtype=np.bool_),
        polygons=tuple(points for _, points in found),
    )


def write_shapes(folder: Path, *, train: int, val: int, size: int, seed: int, progress: Progress | None = None) -> Path:
    """Writes images (PNG), labels (polygon lines) and `shapes.yaml`; gives the path of the YAML.

    The folder appears when all of it is there. One of the same numbers is kept as it is. A larger dataset of the same
    size and seed begins with the images of the smaller one.

    Args:
        folder: A new or empty folder.
        train: Number of images for training.
        val: Number of images for validation.
        size: Their height and width in pixels.
        seed: Another one gives other images.
        progress: Called with (done, total).

    Raises:
        DatasetError: Something else is in the folder, it cannot be written, or a number cannot be meant.
    """
    if train < 1 or val < 1:
        raise DatasetError(f"{train} images for training and {val} for validation.", fix="Give at least 1 for each.")
    shape_image(0, split="train", size=size, seed=seed)  # refuses wrong numbers before a folder is made
    numbers = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed}
    if _is_there(folder, numbers):
        return folder / "shapes.yaml"
    partial = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write_all(partial, numbers, progress)
        partial.replace(folder)  # an empty folder gives way
    except OSError as error:
        raise DatasetError(
            f"{folder} cannot be written: {error.strerror or error}.", fix="Choose another place:  --output DIR"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / "shapes.yaml"


def _is_there(folder: Path, numbers: dict[str, int]) -> bool:
    """Whether the folder holds just this dataset; an absent or empty folder does not.

    Raises:
        DatasetError: It holds anything else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
        counts = {split: sum(1 for _ in (folder / "images" / split).iterdir()) for split in SPLITS}
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{folder} is there already and is no complete shapes dataset.", fix="Choose another --output."
        ) from error
    if found != numbers or counts != {split: numbers[split] for split in SPLITS}:
        raise DatasetError(
            f"{folder} holds other shapes: {found}, {counts} images; wanted are {numbers}.",
            fix="Choose another --output, or delete the folder.",
        )
    return True


def _write_all(folder: Path, numbers: dict[str, int], progress: Progress | None) -> None:
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASS_NAMES))
    done, total = 0, numbers["train"] + numbers["val"]
    for split in SPLITS:
        (folder / "labels" / split).mkdir(parents=True)
        for k in range(1, numbers[split] + 1):
            image, labels = shape_image(k, split=split, size=numbers["size"], seed=numbers["seed"])
            write_image(folder / "images" / split / f"{k:06d}.png", image)
            (folder / "labels" / split / f"{k:06d}.txt").write_text(_label_lines(labels), encoding="utf-8")
            done += 1
            if progress is not None:
                progress(done, total)
    (folder / "shapes.json").write_text(json.dumps(numbers, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "shapes.yaml").write_text(
        f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}", encoding="utf-8"
    )


def _label_lines(labels: Labels) -> str:
    return "".join(
        f"{class_id} {' '.join(f'{value:.6f}' for value in polygon.ravel())}\n"
        for class_id, polygon in zip(labels.class_ids, labels.polygons, strict=True)
    )
