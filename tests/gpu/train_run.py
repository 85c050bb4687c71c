"""A complete training with `yolov7_deploy.training.run.train` on generated images, for as long as time is left."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from tests.gpu.environment import Environment
from tests.gpu.train_steps import Bench
from yolov7_deploy.options import Thresholds, TrainOptions
from yolov7_deploy.training.checkpoints import TrainRequest
from yolov7_deploy.training.hyperparameters import PRESETS, default_preset
from yolov7_deploy.training.loggers import RESULTS_NAME, EpochRecord, NullCallback, read_results

METRIC = "faster_coco_eval"
SLOW_RATE = 300.0  # images per second, if the loader was not measured
EPOCH_S, VALIDATION_S = 0.7, 6.0  # to save weights and state, and to measure AP on a few hundred images
START_S = 10.0
VALIDATIONS = 3
MIN_EPOCHS, MAX_EPOCHS = 2, 150
TIME_FACTOR = 1.3  # times the planned time, after which training ends with the current epoch
RESERVE_S = 15.0  # time of the part reserved for the last epoch
CACHE_GIB = 8.0


class TimeLimitReached(Exception):  # noqa: N818 - not an error: the result so far is used
    """Training was stopped after an epoch because its time was over."""


class TrainingLog(NullCallback):
    """Records each epoch when it ends, and stops training at the time limit."""

    def __init__(self, env: Environment, ends: float) -> None:
        self._env, self._ends = env, ends

    def on_epoch_end(self, record: EpochRecord) -> None:
        """Record an epoch, and raise `TimeLimitReached` if the time is over."""
        self._env.record("training so far", asdict(record))
        if time.monotonic() > self._ends:
            raise TimeLimitReached


def train_shapes(bench: Bench, variant: str) -> dict[str, Any]:
    """Train with the variant's default hyperparameters; return AP, losses and images per second from `results.csv`."""
    left = bench.ends - time.monotonic() - RESERVE_S
    planned = min(bench.sizes.training_s, left / TIME_FACTOR)
    epochs = affordable_epochs(bench, variant, planned)
    started, folder, ended = time.monotonic(), bench.folder / "run", "complete"
    ends = started + (TIME_FACTOR * planned if planned else left)
    with metric() as why:
        from yolov7_deploy.training.run import train

        try:
            train(request(bench, variant, folder, epochs=epochs), callback=TrainingLog(bench.env, ends))
        except TimeLimitReached:
            ended = f"stopped early, after {time.monotonic() - started:.0f} s"
    return {
        **summarize_epochs(read_results(folder / RESULTS_NAME)),
        "variant": variant,
        "epochs_planned": epochs,
        "ended": ended,
        "no_ap": why,
        "seconds": round(time.monotonic() - started, 1),
    }


def affordable_epochs(bench: Bench, variant: str, seconds: float) -> int:
    """Return how many epochs fit into the time, from the measured rate of loader and training together."""
    images = bench.sizes.sets * bench.sizes.train
    epoch_s = images / bench.rates.get(variant, SLOW_RATE) + EPOCH_S
    return int(min(max((seconds - START_S - VALIDATIONS * VALIDATION_S) / epoch_s, MIN_EPOCHS), MAX_EPOCHS))


def request(bench: Bench, variant: str, folder: Path, *, epochs: int) -> TrainRequest:
    """Return the request that `y7 train` would make."""
    sizes = bench.sizes
    options = TrainOptions(
        epochs=epochs,
        batch=sizes.batches[-1],
        nominal_batch=sizes.nominal,
        img=sizes.img,
        workers=sizes.workers,
        cache_gib=CACHE_GIB,
        val_every=max(1, epochs // VALIDATIONS),
    )
    return TrainRequest(
        data=str(bench.data),
        folder=str(folder),
        variant=variant,
        device=str(bench.device),
        tensorboard=False,
        hyp=PRESETS[default_preset(variant, pretrained=False)],
        options=options,
    )


def summarize_epochs(records: list[EpochRecord]) -> dict[str, Any]:
    """Summarize `results.csv`: AP of the last validation, first and last losses, median speed."""
    validated = [record for record in records if record.ap is not None]
    last = validated[-1] if validated else None
    losses = ("box", "obj", "cls", "total", "positives")
    return {
        "epochs": len(records),
        "ap": last.ap if last else None,
        "ap50": last.ap50 if last else None,
        "ap_by_epoch": {str(record.epoch): record.ap for record in validated},
        "first_losses": {name: getattr(records[0], name) for name in losses},
        "last_losses": {name: getattr(records[-1], name) for name in losses},
        "images_per_s": statistics.median(record.images_per_s for record in records),
        "memory_bytes": records[-1].memory_bytes,
        "results_csv": [asdict(record) for record in records],
    }


@contextmanager
def metric() -> Iterator[str]:
    """Yield the reason why AP cannot be measured, or an empty string; without the metric, training runs without AP."""
    try:
        __import__(METRIC)
    except ImportError as error:
        why = f"{METRIC} is for another Python version: {error}"
    else:
        yield ""
        return
    absent = ModuleType(METRIC)
    absent.__dict__.update(COCO=None, COCOeval_faster=None)
    sys.modules[METRIC] = absent
    try:
        from yolov7_deploy.evaluation.accuracy import METRICS, AccuracyReport
        from yolov7_deploy.training import run, trainer

        texts = dict.fromkeys(("weights", "runtime", "precision", "protocol"), "")
        others: dict[str, Any] = {"thresholds": Thresholds(), "speed_ms": {}, "classes": (), "skipped": ()}
        nothing = AccuracyReport(**dict.fromkeys(METRICS), images=0, **texts, **others)
        with (
            patch.object(trainer, "evaluate", lambda detector, dataset, *, options, progress: nothing),
            patch.object(run, "draw_evaluation", lambda report, dataset, folder: ()),
        ):
            yield why
    finally:
        del sys.modules[METRIC]
