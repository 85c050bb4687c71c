"""Small datasets of images with outlined objects, in memory or as files."""

from pathlib import Path

import cv2
import numpy as np

from yolov7_deploy.datasets import Dataset
from yolov7_deploy.datasets.samples import Labels, Record
from yolov7_deploy.training.dataset import ImageReader, ImageStore

CLASSES = ("a", "b", "c")
NO_OUTLINE = np.zeros((0, 2))


def smooth(hw, seed):
    """Return an image without sharp edges: positions can be told from pixel values, and rounding changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return cv2.resize(coarse, hw[::-1], interpolation=cv2.INTER_CUBIC)


def star(rng, corners=7):
    """Return a random outline in fractions of an image."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    reach = rng.uniform(0.05, 0.3, corners)
    return np.clip(rng.uniform(0.1, 0.9, 2) + np.stack([np.cos(angles), np.sin(angles)], axis=1) * reach[:, None], 0, 1)


def labels_of(outlines, *, boxes=(), class_ids=None, crowd=None):
    """Return labels: first the outlines, then objects with a box only."""
    all_boxes = [np.concatenate([outline.min(axis=0), outline.max(axis=0)]) for outline in outlines]
    all_boxes += [np.array(box, dtype=float) for box in boxes]
    count = len(all_boxes)
    return Labels(
        boxes=np.array(all_boxes, dtype=np.float64).reshape(-1, 4),
        class_ids=np.arange(count) % len(CLASSES) if class_ids is None else np.array(class_ids, dtype=np.int64),
        crowd=np.zeros(count, dtype=np.bool_) if crowd is None else np.array(crowd, dtype=np.bool_),
        polygons=(*outlines, *(NO_OUTLINE for _ in boxes)),
    )


def random_labels(rng, *, outlines=3, boxes=1):
    corners = rng.uniform(0, 0.6, (boxes, 2))
    sides = rng.uniform(0.1, 0.4, (boxes, 2))
    return labels_of([star(rng) for _ in range(outlines)], boxes=np.concatenate([corners, corners + sides], axis=1))


def written(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
    return path


def record(path, image_hw, labels=None, image_id=0):
    return Record(path=Path(path), image_id=image_id, image_hw=image_hw, labels=labels or labels_of([]))


def dataset_of(records):
    return Dataset(list(records), source="test.yaml", class_names=CLASSES, category_ids=(0, 1, 2))


def random_dataset(folder, hws, *, seed=0, suffix=".png"):
    """Return a dataset with one image per size, each with three outlines and a box."""
    rng = np.random.default_rng(seed)
    return dataset_of(
        record(written(folder / f"{number:03}{suffix}", smooth(hw, seed + number)), hw, random_labels(rng), number)
        for number, hw in enumerate(hws)
    )


def reader_of(dataset, *, size, cache_bytes=0):
    return ImageReader(ImageStore(dataset, size=size, cache_bytes=cache_bytes))
