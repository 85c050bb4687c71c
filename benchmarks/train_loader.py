"""Augmented images per second of the training data loader, against a plain one with the same libraries.

The plain one follows the published augmentation step by step: per image, read and decode every tile, fill the
canvas, warp it, sample each outline at 1000 points. Both create mosaics of the `p5` recipe without paste-in, with the
same number of workers, interleaved.

python benchmarks/train_loader.py --data coco.yaml --machine cpu-2-core --json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import cv2
import numpy as np
import torch
from recording import parser, record
from torch.utils.data import DataLoader

from yolov7_deploy.datasets import Dataset, Sample, open_dataset
from yolov7_deploy.training.augment import Augmentation
from yolov7_deploy.training.dataloader import TrainLoader
from yolov7_deploy.training.dataset import ImageStore
from yolov7_deploy.training.hyperparameters import PRESETS

HYP = replace(PRESETS["p5"], paste_in=0.0)
ALL_CACHED = 2**40
GREY = 114


class PlainMosaics(torch.utils.data.Dataset):
    """Training samples of the official augmentation, one at a time, step by step."""

    def __init__(self, samples: list[Sample], *, size: int, cached: bool) -> None:
        self.samples, self.size = samples, size
        self.cache = [self.read(i) for i in range(len(samples))] if cached else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng()
        image, labels = self.mosaic(index, rng)
        if rng.random() < HYP.mixup:
            other, more = self.mosaic(int(rng.integers(len(self))), rng)
            share = rng.beta(8.0, 8.0)
            image, labels = cv2.addWeighted(image, share, other, 1 - share, 0), np.concatenate([labels, more])
        image = jitter(image, rng)
        labels[:, 1:] = np.stack(
            [*((labels[:, 1:3] + labels[:, 3:]) / 2).T, *(labels[:, 3:] - labels[:, 1:3]).T], axis=1
        )
        labels[:, 1:] /= self.size
        if rng.random() < HYP.fliplr:
            image = np.fliplr(image)
            labels[:, 1] = 1 - labels[:, 1]
        image = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))
        return torch.from_numpy(image), torch.from_numpy(labels.astype(np.float32))

    def read(self, index: int) -> np.ndarray:
        """Return an image with its longer side resized to `size`."""
        image = cv2.imread(str(self.samples[index].path))
        ratio = self.size / max(image.shape[:2])
        if ratio != 1:
            size = int(image.shape[1] * ratio), int(image.shape[0] * ratio)
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        return image

    def mosaic(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return a warped mosaic of four or nine images, and its labels."""
        count = 4 if rng.random() < 0.8 else 9
        indices = [index, *rng.integers(len(self), size=count - 1).tolist()]
        images = [self.cache[i] if self.cache else self.read(i) for i in indices]
        corners = four_corners(images, self.size, rng) if count == 4 else nine_corners(images, self.size, rng)
        side = 2 * self.size
        canvas = np.full((side, side, 3), GREY, dtype=np.uint8)
        boxes, class_ids, outlines = [], [], []
        for image, (left, top), i in zip(images, corners, indices, strict=True):
            x1, y1 = max(left, 0), max(top, 0)
            x2, y2 = min(left + image.shape[1], side), min(top + image.shape[0], side)
            if x1 < x2 and y1 < y2:
                canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
            sample = self.samples[i]
            scale = image.shape[1] / sample.image_hw[1], image.shape[0] / sample.image_hw[0]
            for box, class_id, outline in zip(sample.boxes, sample.class_ids, sample.polygons, strict=True):
                boxes.append(np.clip(box * np.array(scale * 2) + np.array([left, top] * 2), 0, side))
                class_ids.append(class_id)
                outlines.append(np.clip(outline * np.array(scale) + np.array([left, top]), 0, side))
        return warp(canvas, np.array(boxes).reshape(-1, 4), np.array(class_ids), outlines, self.size, rng)


def four_corners(images: list[np.ndarray], size: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    x, y = (int(rng.uniform(size / 2, 3 * size / 2)) for _ in range(2))
    (h0, w0), (h1, _), (_, w2) = (image.shape[:2] for image in images[:3])
    return [(x - w0, y - h0), (x, y - h1), (x - w2, y), (x, y)]


def nine_corners(images: list[np.ndarray], size: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    offset_x, offset_y = (int(rng.uniform(0, size)) for _ in range(2))
    s, corners = size, []
    h0, w0 = images[0].shape[:2]
    hp, wp = h0, w0
    for i, image in enumerate(images):
        h, w = image.shape[:2]
        x, y = [
            (s, s),
            (s, s - h),
            (s + wp, s - h),
            (s + w0, s),
            (s + w0, s + hp),
            (s + w0 - w, s + h0),
            (s + w0 - wp - w, s + h0),
            (s - w, s + h0 - h),
            (s - w, s + h0 - hp - h),
        ][i]
        corners.append((x - offset_x, y - offset_y))
        hp, wp = h, w
    return corners


def warp(
    canvas: np.ndarray,
    boxes: np.ndarray,
    class_ids: np.ndarray,
    outlines: list[np.ndarray],
    size: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift the canvas; return it with the labels that are still visible enough: class, x1, y1, x2, y2."""
    scale = rng.uniform(1 - HYP.scale, 1.1 + HYP.scale)
    move = rng.uniform(0.5 - HYP.translate, 0.5 + HYP.translate, size=2) * size
    matrix = np.array([[scale, 0, move[0] - scale * size], [0, scale, move[1] - scale * size]])
    image = cv2.warpAffine(canvas, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=(GREY,) * 3)
    warped = np.zeros_like(boxes)
    for i, (box, outline) in enumerate(zip(boxes, outlines, strict=True)):
        points = resampled(outline) if len(outline) else box[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2)
        points = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ matrix.T
        if len(outline):
            points = points[((points >= 0) & (points <= size)).all(axis=1)]
        if len(points):
            warped[i] = np.clip(np.concatenate([points.min(axis=0), points.max(axis=0)]), 0, size)
    w, h = warped[:, 2] - warped[:, 0], warped[:, 3] - warped[:, 1]
    before = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * scale**2
    aspect = np.maximum(w / (h + 1e-16), h / (w + 1e-16))
    threshold = np.array([0.01 if len(outline) else 0.10 for outline in outlines])
    keep = (w > 2) & (h > 2) & (w * h / (before + 1e-16) > threshold) & (aspect < 20)
    return image, np.concatenate([class_ids[keep].reshape(-1, 1), warped[keep]], axis=1)


def resampled(outline: np.ndarray, count: int = 1000) -> np.ndarray:
    closed = np.concatenate([outline, outline[:1]])
    at, known = np.linspace(0, len(closed) - 1, count), np.arange(len(closed))
    return np.stack([np.interp(at, known, closed[:, axis]) for axis in range(2)], axis=1)


def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = rng.uniform(-1, 1, 3) * (HYP.hsv_h, HYP.hsv_s, HYP.hsv_v) + 1
    steps = np.arange(256)
    tables = (
        (steps * hue % 180).astype(np.uint8),
        np.clip(steps * saturation, 0, 255).astype(np.uint8),
        np.clip(steps * value, 0, 255).astype(np.uint8),
    )
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
    merged = cv2.merge([cv2.LUT(plane, table) for plane, table in zip(planes, tables, strict=True)])
    return cv2.cvtColor(merged, cv2.COLOR_HSV2BGR)


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch; each label starts with the index of its image."""
    labels = [
        torch.cat([torch.full((len(found), 1), float(number)), found], dim=1)
        for number, (_, found) in enumerate(samples)
    ]
    return torch.stack([image for image, _ in samples]), torch.cat(labels)


def repeated(dataset: Dataset, times: int) -> Dataset:
    """Repeat the samples: an epoch of a small dataset would end before the workers have settled."""
    records = [dataset.record(index) for index in range(len(dataset))]
    return Dataset(
        records * times, source=dataset.source, class_names=dataset.class_names, category_ids=dataset.category_ids
    )


def without_crowd(dataset: Dataset) -> Dataset:
    records = [dataset.record(index) for index in range(len(dataset))]
    return Dataset(
        [replace(record, areas=None, labels=record.labels.without_crowd()) for record in records],
        source=dataset.source,
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
    )


def one_thread(_: int) -> None:
    cv2.setNumThreads(0)


def plain_epochs(dataset: Dataset, *, cached: bool, size: int, batch: int, workers: int) -> Callable[[], Iterable]:
    samples = PlainMosaics(list(without_crowd(dataset)), size=size, cached=cached)
    loader = DataLoader(
        samples,
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=one_thread,
        collate_fn=collate,
    )
    return lambda: iter(loader)


def our_epochs(
    dataset: Dataset, *, cached: bool, size: int, batch: int, workers: int, paste_in: float = 0.0
) -> Callable[[], Iterable]:
    store = ImageStore(dataset, size=size, cache_bytes=ALL_CACHED if cached else 0)
    augmentation = Augmentation(hyp=replace(HYP, paste_in=paste_in), size=size)
    loader = TrainLoader(store, augmentation, batch=batch, workers=workers, seed=0)
    epochs = iter(range(10**6))
    return lambda: loader.epoch(next(epochs))


def images_per_s(epoch: Callable[[], Iterable], count: int) -> float:
    started = time.perf_counter()
    for _ in epoch():
        pass
    return count / (time.perf_counter() - started)


def compare(dataset: Dataset, *, cached: bool, rounds: int, size: int, batch: int, workers: int) -> dict[str, object]:
    """Return the images per second of both loaders, interleaved, after a warm-up epoch of each."""
    both = {
        "plain": plain_epochs(dataset, cached=cached, size=size, batch=batch, workers=workers),
        "ours": our_epochs(dataset, cached=cached, size=size, batch=batch, workers=workers),
        "ours with paste-in": our_epochs(
            dataset, cached=cached, size=size, batch=batch, workers=workers, paste_in=PRESETS["p5"].paste_in
        ),
    }
    runs: dict[str, list[float]] = {name: [] for name in both}
    for number in range(rounds + 1):
        for name, epoch in both.items():
            speed = images_per_s(epoch, len(dataset))
            if number:
                runs[name].append(round(speed, 1))
                print(f"{'cached' if cached else 'uncached':9} {name:20} {speed:7.1f} images/s", flush=True)
    ratios = [ours / plain for ours, plain in zip(runs["ours"], runs["plain"], strict=True)]
    medians = {name: float(np.median(found)) for name, found in runs.items()}
    return {"images_per_s": medians, "ratio": round(float(np.median(ratios)), 2), "runs": runs}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", required=True, help="a dataset YAML; its train images are used")
    arguments.add_argument("--img", type=int, default=640)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--samples", type=int, default=960, help="approximate number of samples per run")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--json", action="store_true", help="write the result")
    options = arguments.parse_args()
    dataset = open_dataset(options.data, split="train")
    dataset = repeated(dataset, max(1, round(options.samples / len(dataset))))
    settings = {"size": options.img, "batch": options.batch, "workers": options.workers}
    found = {
        name: compare(dataset, cached=cached, rounds=options.rounds, **settings)
        for name, cached in (("uncached", False), ("cached", True))
    }
    for name, row in found.items():
        print(f"{name:9} ratio {row['ratio']}  {row['images_per_s']}")
    if options.json:
        record("train_loader", options.machine, {**settings, "samples": len(dataset), "ratio_target": 1.5, **found})


if __name__ == "__main__":
    main()
