"""Data loader throughput with generated images: alone, and with a network that trains on them."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from train_loader import repeated

from tests.gpu.train_steps import Bench, Sizes, Stepper, images_per_s, new_stepper, precision, synchronize
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.datasets.synthetic import CLASS_NAMES, SPLITS, write_shapes
from yolov7_deploy.training.augment import Augmentation
from yolov7_deploy.training.dataloader import TrainLoader
from yolov7_deploy.training.dataset import ImageStore
from yolov7_deploy.training.hyperparameters import PRESETS, default_preset
from yolov7_deploy.training.sample import Batch

REPEATS = 8  # repetitions of the images per epoch, which would otherwise end before the workers are in a steady state
ALL_CACHED = 2**36
PREFETCHED = 2  # batches per worker that torch's loader prefetches


def make_shapes(bench: Bench) -> dict[str, Any]:
    """Write the images with one process per core, and one YAML for all of them."""
    sizes, started = bench.sizes, time.perf_counter()
    write = partial(write_set, folder=bench.folder, sizes=sizes)
    processes = min(sizes.sets, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        folders = list(pool.map(write, range(sizes.sets)))
    splits = {split: [str(folder / "images" / split) for folder in folders] for split in SPLITS}
    # JSON is valid YAML.
    bench.data.write_text(json.dumps({**splits, "names": list(CLASS_NAMES)}), encoding="utf-8")
    return {
        "train": sizes.sets * sizes.train,
        "val": sizes.sets * sizes.val,
        "img": sizes.img,
        "format": "PNG",
        "processes": processes,
        "seconds": round(time.perf_counter() - started, 1),
    }


def write_set(seed: int, *, folder: Path, sizes: Sizes) -> Path:
    """Write one of the sets, each with its own seed."""
    path = folder / f"shapes-{seed:02d}"
    write_shapes(path, train=sizes.train, val=sizes.val, size=sizes.img, seed=seed)
    return path


def loader_speed(bench: Bench, variant: str, *, cached: bool) -> dict[str, Any]:
    """Return images per second of the loader alone, of training alone on one of its batches, and of both together.

    Each image is repeated several times per epoch. With `cached`, all images are decoded before the measurement.
    """
    dataset, batch = repeated(open_dataset(bench.data, split="train"), REPEATS), bench.sizes.batches[-1]
    loader = new_loader(bench, dataset, variant, batch, cached=cached)
    stepper = new_stepper(
        bench.sizes, variant, batch, device=bench.device, half=True, small_steps=True, classes=CLASS_NAMES
    )
    try:
        found = measured(bench, loader, stepper, fill=loader.steps if cached else 1)
        bench.rates[variant] = found["images_per_s"]
        return {
            **found,
            "images_per_epoch": len(dataset),
            "batch": batch,
            "img": bench.sizes.img,
            "workers": bench.sizes.workers,
            "cores": os.cpu_count(),
            "precision": precision(stepper.train_step, tf32=True),
            "cached": cached,
        }
    finally:
        loader.close()


def new_loader(bench: Bench, dataset: Dataset, variant: str, batch: int, *, cached: bool) -> TrainLoader:
    """Return the loader of a training of the variant with its default hyperparameters."""
    img = bench.sizes.img
    store = ImageStore(dataset, size=img, cache_bytes=ALL_CACHED if cached else 0)
    augmentation = Augmentation(hyp=PRESETS[default_preset(variant, pretrained=False)], size=img)
    return TrainLoader(store, augmentation, batch=batch, workers=bench.sizes.workers, seed=0)


def measured(bench: Bench, loader: TrainLoader, stepper: Stepper, *, fill: int) -> dict[str, float]:
    """Return the rates of loader and training, alone and together, after the first `fill` batches."""
    sizes, batches = bench.sizes, stream(loader)
    kept = next(islice(batches, fill - 1, None))
    training = images_per_s(stepper, kept, seconds=sizes.seconds)
    for _ in range(PREFETCHED * sizes.workers):  # made during the measurement of training
        next(batches)
    alone, _ = throughput(batches, bench.device, seconds=sizes.seconds / 2)
    together, waited = throughput(batches, bench.device, seconds=sizes.seconds, work=stepper)
    return {
        "loader_images_per_s": round(alone, 1),
        "training_images_per_s": round(training, 1),
        "images_per_s": round(together, 1),
        "share_waiting_for_loader": round(max(0.0, 1 - together / training), 4),
        "share_host_waits": round(waited, 4),
    }


def stream(loader: TrainLoader) -> Iterator[Batch]:
    """Yield the batches of one epoch after the other, without end."""
    for epoch in count():
        yield from loader.epoch(epoch)


def throughput(
    batches: Iterator[Batch], device: torch.device, *, seconds: float, work: Callable[[Batch], object] | None = None
) -> tuple[float, float]:
    """Return images per second of taking batches and working on them, and the share of time spent waiting."""
    started, waited, images = time.perf_counter(), 0.0, 0
    while not images or time.perf_counter() - started < seconds:
        requested = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - requested
        images += len(batch.images)
        if work is not None:
            work(batch)
    synchronize(device)
    elapsed = time.perf_counter() - started
    return images / elapsed, waited / elapsed
