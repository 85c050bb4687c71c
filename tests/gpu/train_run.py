"""A whole training by `yolov7_deploy.training.run.train` on generated images, as long as the part has time."""

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

from tests.gpu.environment import Setting
from tests.gpu.train_steps import Bench
from yolov7_deploy.options import Thresholds, TrainOptions
from yolov7_deploy.training.callbacks import NullCallback
from yolov7_deploy.training.config import TrainRequest
from yolov7_deploy.training.hyperparameters import PRESETS, preset_for
from yolov7_deploy.training.loggers import RESULTS_NAME, EpochRecord, read_results

METRIC = "faster_coco_eval"
SLOW_RATE = 300.0  # images per second, where the loader's piece gave none
EPOCH_S, VALIDATION_S = 0.7, 6.0  # of keeping weights and state, and of AP on a few hundred images
START_S = 10.0
VALIDATIONS = 3
LEAST_EPOCHS, MOST_EPOCHS = 2, 150
PATIENCE = 1.3  # of the time that was planned; then it ends after the epoch under way
SPARE_S = 15.0  # of the part, for the last epoch
CACHE_GIB = 8.0


class OutOfTime(Exception):  # noqa: N818 - no error: what was trained so far counts
    """The training was ended after an epoch."""


class Diary(NullCallback):
    """Records each epoch as soon as it is over, and ends the training when its time is."""

    def __init__(self, setting: Setting, ends: float) -> None:
        self._setting, self._ends = setting, ends

    def epoch_done(self, record: EpochRecord) -> None:
        """What an epoch came to."""
        self._setting.record("training so far", asdict(record))
        if time.monotonic() > self._ends:
            raise OutOfTime


def train_shapes(bench: Bench, variant: str) -> dict[str, Any]:
    """AP, losses and images per second of a training by the variant's own recipe, from `results.csv`."""
    left = bench.ends - time.monotonic() - SPARE_S
    planned = min(bench.sizes.training_s, left / PATIENCE)
    epochs = affordable_epochs(bench, variant, planned)
    started, folder, ended = time.monotonic(), bench.folder / "run", "whole"
    ends = started + (PATIENCE * planned if planned else left)
    with metric() as why:
        from yolov7_deploy.training.run import train

        try:
            train(request(bench, variant, folder, epochs=epochs), watch=Diary(bench.setting, ends))
        except OutOfTime:
            ended = f"ended early, after {time.monotonic() - started:.0f} s"
    return {
        **told(read_results(folder / RESULTS_NAME)),
        "variant": variant,
        "epochs_wanted": epochs,
        "ended": ended,
        "no_ap": why,
        "seconds": round(time.monotonic() - started, 1),
    }


def affordable_epochs(bench: Bench, variant: str, seconds: float) -> int:
    """How many fit into the time, by what loader and learner did together."""
    images = bench.sizes.sets * bench.sizes.train
    epoch_s = images / bench.rates.get(variant, SLOW_RATE) + EPOCH_S
    return int(min(max((seconds - START_S - VALIDATIONS * VALIDATION_S) / epoch_s, LEAST_EPOCHS), MOST_EPOCHS))


def request(bench: Bench, variant: str, folder: Path, *, epochs: int) -> TrainRequest:
    """What `y7 train` would ask for."""
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
        hyp=PRESETS[preset_for(variant, pretrained=False)],
        options=options,
    )


def told(records: list[EpochRecord]) -> dict[str, Any]:
    """What `results.csv` says: AP of the last validation, first and last losses, the median of the speeds."""
    validated = [record for record in records if record.ap is not None]
    last = validated[-1] if validated else None
    losses = ("box", "obj", "cls", "total", "positives")
    return {
        "epochs": len(records),
        "ap": last.ap if last else None,
        "ap50": last.ap50 if last else None,
        "ap_of_epochs": {str(record.epoch): record.ap for record in validated},
        "first_losses": {name: getattr(records[0], name) for name in losses},
        "last_losses": {name: getattr(records[-1], name) for name in losses},
        "images_per_s": statistics.median(record.images_per_s for record in records),
        "memory_bytes": records[-1].memory_bytes,
        "results_csv": [asdict(record) for record in records],
    }


@contextmanager
def metric() -> Iterator[str]:
    """Gives why AP cannot be judged here, empty if it can; then a training runs all the same, without AP."""
    try:
        __import__(METRIC)
    except ImportError as error:
        why = f"{METRIC} was brought for another Python: {error}"
    else:
        yield ""
        return
    absent = ModuleType(METRIC)
    absent.__dict__.update(COCO=None, COCOeval_faster=None)
    sys.modules[METRIC] = absent
    try:
        from yolov7_deploy.evaluation.accuracy import SUMMARY, AccuracyReport
        from yolov7_deploy.training import trainer

        words = dict.fromkeys(("weights", "backend", "precision", "protocol"), "")
        places: dict[str, Any] = {"thresholds": Thresholds(), "speed_ms": {}, "classes": (), "skipped": ()}
        nothing = AccuracyReport(**dict.fromkeys(SUMMARY), images=0, **words, **places)
        with patch.object(trainer, "evaluate", lambda detector, dataset, *, options, progress: nothing):
            yield why
    finally:
        del sys.modules[METRIC]
