"""A synthetic dataset of textured shapes on textured backgrounds; classes differ only in their shape.

It is meant for tests, the demo and a first training run: labels are exact, thousands of images take seconds, and the
same seed gives the same pixels on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from yolov7_deploy._atomic_file import atomic_folder
from yolov7_deploy._bounded_read import read_text
from yolov7_deploy._serialization import parse_json
from yolov7_deploy.datasets.samples import DoubleArray, Labels
from yolov7_deploy.datasets.synthetic_render import SHAPES, ShapeCanvas
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.image import Image
from yolov7_deploy.visualize import write_image

CLASS_NAMES = tuple(SHAPES)
SPLITS = ("train", "val")
VERSION = 1  # increased when the same seed gives other pixels
MAX_OBJECTS = 8
EMPTY_PROBABILITY = 0.05  # of an image without objects
MIN_BOX, MAX_BOX = 0.06, 0.45  # longer side of a box, as a fraction of the image side
MIN_OBJECT_PX = 10.0  # a smaller star cannot be distinguished from a circle
SIZES = range(32, 4097)

Progress = Callable[[int, int], None]


def generate_image(k: int, *, split: str, size: int, seed: int) -> tuple[Image, Labels]:
    """Generate image `k` of a split, uint8 BGR [size, size, 3], and its labels with outlines (outer one for a ring).

    The result depends only on the four arguments. An image has up to 8 objects, one image in 20 has none. Later objects
    hide at most 30 % of an earlier one.

    Raises:
        DatasetError: `size` or `split` is not supported, or `k` or `seed` is negative.
    """
    if size not in SIZES or split not in SPLITS or min(k, seed) < 0:
        raise DatasetError(
            f"Cannot generate image {k} of {split} with {size} pixels and seed {seed}.",
            fix=f"Splits are {' and '.join(SPLITS)}, sizes {SIZES[0]} to {SIZES[-1]}, seeds from 0: --img 320 --seed 0",
        )
    rng = np.random.default_rng([seed, SPLITS.index(split), k, size])
    canvas = ShapeCanvas(size, rng=rng)
    count = 0 if rng.random() < EMPTY_PROBABILITY else int(rng.integers(1, MAX_OBJECTS, endpoint=True))
    objects: list[tuple[int, DoubleArray]] = []
    for _ in range(count):
        class_id = int(rng.integers(len(CLASS_NAMES)))
        side = MIN_BOX + (MAX_BOX - MIN_BOX) * rng.random() ** 2  # small objects are more frequent, as in most datasets
        outline = canvas.add(SHAPES[CLASS_NAMES[class_id]], side_px=max(MIN_OBJECT_PX, side * size))
        if outline is not None:
            objects.append((class_id, outline / size))
    boxes = [np.concatenate([points.min(axis=0), points.max(axis=0)]) for _, points in objects]
    return canvas.render(), Labels(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        class_ids=np.array([class_id for class_id, _ in objects], dtype=np.int64),
        crowd=np.zeros(len(objects), dtype=np.bool_),
        polygons=tuple(points for _, points in objects),
    )


def write_shapes(folder: Path, *, train: int, val: int, size: int, seed: int, progress: Progress | None = None) -> Path:
    """Write images (PNG), labels (polygon lines) and `shapes.yaml`; returns the path of the YAML.

    The folder is complete or does not exist. A folder with the same dataset is not written again. A larger dataset with
    the same size and seed starts with the images of the smaller one.

    Args:
        folder: A new or empty folder.
        train: Number of training images.
        val: Number of validation images.
        size: Height and width of the images in pixels.
        seed: Random seed of the images.
        progress: Called with (done, total).

    Raises:
        DatasetError: The folder contains something else or cannot be written, or an argument is out of range.
    """
    if train < 1 or val < 1:
        raise DatasetError(f"{train} images for training and {val} for validation.", fix="Give at least 1 for each.")
    generate_image(0, split="train", size=size, seed=seed)  # checks the arguments before a folder is created
    numbers = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed}
    if _is_complete(folder, numbers):
        return folder / "shapes.yaml"
    try:
        with atomic_folder(folder) as partial:
            _write_all(partial, numbers, progress)
    except OSError as error:
        raise DatasetError(
            f"{folder} cannot be written: {error.strerror or error}.", fix="Choose another folder:  --output DIR"
        ) from error
    return folder / "shapes.yaml"


def _is_complete(folder: Path, numbers: dict[str, int]) -> bool:
    """Return whether the folder contains exactly this dataset; False for a missing or empty folder.

    Raises:
        DatasetError: The folder contains anything else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        existing = parse_json(read_text(folder / "shapes.json"))
        counts = {split: sum(1 for _ in (folder / "images" / split).iterdir()) for split in SPLITS}
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{folder} already exists and is not a complete shapes dataset.",
            fix="Choose another folder:  --output DIR",
        ) from error
    if existing != numbers or counts != {split: numbers[split] for split in SPLITS}:
        raise DatasetError(
            f"{folder} contains another shapes dataset: {existing}, {counts} images; requested: {numbers}.",
            fix="Delete the folder, or choose another one:  --output DIR",
        )
    return True


def _write_all(folder: Path, numbers: dict[str, int], progress: Progress | None) -> None:
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASS_NAMES))
    done, total = 0, numbers["train"] + numbers["val"]
    for split in SPLITS:
        (folder / "labels" / split).mkdir(parents=True)
        for k in range(1, numbers[split] + 1):
            image, labels = generate_image(k, split=split, size=numbers["size"], seed=numbers["seed"])
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
