"""The training loop: epochs of steps, validation of the moving average, checkpoints, early stop, going on."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.checkpoint.checkpoint import save_checkpoint
from yolov7_deploy.dataset import Dataset
from yolov7_deploy.dataset.samples import DoubleArray
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import TrainingError
from yolov7_deploy.machine.memory_use import host_peak_bytes
from yolov7_deploy.measure.accuracy import AccuracyReport, evaluate
from yolov7_deploy.options import ValOptions
from yolov7_deploy.train.fitting_batch import batch_that_fits, is_out_of_memory
from yolov7_deploy.train.image_weights import picture_weights
from yolov7_deploy.train.learner import Learner, StepNumbers
from yolov7_deploy.train.loader import TrainLoader
from yolov7_deploy.train.logs import EpochRecord, RunLog
from yolov7_deploy.train.optimizer import BIASES, NORMS, WEIGHTS
from yolov7_deploy.train.plots import draw_batch
from yolov7_deploy.train.run_state import RunState, Sums, load_run_state, save_run_state
from yolov7_deploy.train.scene import Batch
from yolov7_deploy.train.watch import Watch

logger = logging.getLogger(__name__)

LAST, BEST, STATE = "last.safetensors", "best.safetensors", "state.safetensors"
MEASURED = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")
VAL_BATCH = 16
AP50_PART, AP_PART = 0.1, 0.9  # of the fitness that decides which epoch is best


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainReport:
    """What came of a training.

    Attributes:
        folder: Where everything is.
        weights: The best weights; the last ones if nothing was validated.
        epochs: How many were done.
        best_epoch: Which is the best, from 1; 0 if none was validated.
        accuracy: Of the best weights.
        unreadable: Pictures that could not be used, and why.
        seconds: In all.
    """

    folder: Path
    weights: Path
    epochs: int
    best_epoch: int
    accuracy: AccuracyReport | None
    unreadable: tuple[str, ...]
    seconds: float


class Trainer:
    """Trains a network and keeps everything in a folder.

    Args:
        learner: The network that learns.
        loader: Its pictures.
        val: What it is validated on.
        state: Where the training is.
        log: Losses and AP of each epoch, in the first of several processes.
        watch: Who looks on.
    """

    def __init__(
        self, learner: Learner, loader: TrainLoader, val: Dataset, *, state: RunState, log: RunLog | None, watch: Watch
    ) -> None:
        self._learner, self._loader, self._val = learner, loader, val
        self._state, self._log, self._watch = state, log, watch
        self._options, self._world = state.request.options, learner.world
        self._folder = Path(state.request.folder)
        self._unreadable: dict[str, None] = {}
        self._accuracy: AccuracyReport | None = None
        self._saved_at = time.monotonic()
        self._interrupted = threading.Event()

    @property
    def state(self) -> RunState:
        """Where the training is."""
        return self._state

    def resume(self) -> None:
        """Takes weights, moving average, momentum and pending gradients from the folder."""
        _, tensors = load_run_state(self._folder / STATE)
        self._learner.load(tensors, updates=self._state.updates, scale=self._state.scale)

    def run(self) -> TrainReport:
        """Trains to the end.

        Raises:
            KeyboardInterrupt: Ctrl-C, after what is needed to go on was written.
            TrainingError: The loss is no number any more, or the disk is full.
            DeviceError: Out of memory; the message says which batch fits.
        """
        started, before = time.monotonic(), self._state.seconds
        with self._listening():
            done = self._state.epoch >= self._options.epochs
            while not done:
                self._learn_epoch()
                self._state = replace(self._state, seconds=before + time.monotonic() - started)
                done = self._end_epoch()
        best = self._folder / BEST
        return TrainReport(
            folder=self._folder,
            weights=best if best.exists() else self._folder / LAST,
            epochs=self._state.epoch,
            best_epoch=self._state.best_epoch,
            accuracy=self._accuracy,
            unreadable=tuple(self._unreadable),
            seconds=self._state.seconds,
        )

    # --- an epoch -----------------------------------------------------------------------------------------------------

    def _learn_epoch(self) -> None:
        state, steps = self._state, self._loader.steps
        self._learner.train_mode()
        self._loader.order_weights = self._picture_weights()
        self._epoch_started, self._first_step = time.monotonic(), state.step
        with self._watch.epoch(state.epoch, self._options.epochs) as show:
            for batch in self._loader.epoch(state.epoch, start=state.step):
                self._look_at(batch)
                numbers = self._learn(batch)
                self._refuse_nan(numbers, batch)
                now = self._state
                sums = now.sums.plus(numbers.box, numbers.objectness, numbers.classes, numbers.positives)
                self._state = replace(now, step=now.step + 1, sums=sums, updates=self._learner.average.updates)
                show(self._state.step, steps, self._note())
                if numbers.stop:
                    self._keep()
                    raise KeyboardInterrupt
                if time.monotonic() - self._saved_at > self._options.save_minutes * 60:
                    self._keep()

    def _learn(self, batch: Batch) -> StepNumbers:
        state = self._state
        step = state.epoch * self._loader.steps + state.step
        stop = self._interrupted.is_set()
        try:
            return self._learner.learn(batch, epoch=state.epoch, step=step, in_epoch=state.step, stop=stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise batch_that_fits(self._learner, batch, error) from error

    def _look_at(self, batch: Batch) -> None:
        """Names new unreadable pictures, and draws the first batch of a training."""
        for problem in batch.problems:
            if problem not in self._unreadable:
                self._unreadable[problem] = None
                self._watch.say(f"left out: {problem}")
        if self._world.is_first and self._state.epoch == 0 and self._state.step == 0:
            draw_batch(batch, self._state.class_names, self._folder / "first_batch.jpg")

    def _refuse_nan(self, numbers: StepNumbers, batch: Batch) -> None:
        if numbers.is_finite:
            return
        state = self._state
        where = f"box {numbers.box:g}, objectness {numbers.objectness:g}, classes {numbers.classes:g}"
        paths = ", ".join(str(path) for path in batch.paths[:4])
        kept = f"{self._folder / STATE} has the last good weights. " if (self._folder / STATE).exists() else ""
        raise TrainingError(
            f"The loss is no number any more in epoch {state.epoch + 1}, step {state.step + 1} ({where}). {kept}"
            f"The pictures of that step begin with {paths}.",
            fix="Try a lower rate (--set lr0=0.001), --no-half, or look at the labels of these pictures.",
        )

    def _note(self) -> str:
        """What the progress line says besides steps."""
        sums, seconds = self._state.sums.mean(), time.monotonic() - self._epoch_started
        rate = (self._state.step - self._first_step) * self._options.batch / max(seconds, 1e-9)
        return (
            f"box {sums.box:.4f}  obj {sums.objectness:.4f}  cls {sums.classes:.4f}  "
            f"{rate:.1f} img/s  {self._memory() / 1e9:.1f} GB"
        )

    def _memory(self) -> int:
        if self._world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._world.device)
        return host_peak_bytes()

    # --- its end ------------------------------------------------------------------------------------------------------

    def _end_epoch(self) -> bool:
        """Keeps, validates and logs; whether training is over."""
        options, state = self._options, self._state
        epoch, sums, seconds = state.epoch + 1, state.sums.mean(), time.monotonic() - self._epoch_started
        rate = (state.step - self._first_step) * options.batch / max(seconds, 1e-9)
        last = epoch == options.epochs
        due = last or (options.val_every > 0 and epoch % options.val_every == 0)
        if self._world.is_first:
            self._save_last()
            report = self._validated() if due else None
            self._judge(epoch, report)
        state = self._share_verdict()
        late = options.patience > 0 and state.best_epoch > 0 and epoch - state.best_epoch >= options.patience
        self._state = replace(state, epoch=epoch, step=0, sums=Sums())
        if self._world.is_first:
            record = self._record(epoch, sums, report, rate=rate, seconds=seconds)
            assert self._log is not None, "the first process keeps the log"
            self._log.write(record)
            self._watch.epoch_done(record)
            self._keep()
        if late and not last:
            self._watch.say(f"no progress since epoch {state.best_epoch}: training ends")
        return last or late

    def _save_last(self) -> None:
        state = self._state
        tensors = {name: tensor.cpu() for name, tensor in self._learner.average.tensors.items()}
        broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if broken:
            raise TrainingError(
                f"The weights hold values that are no numbers after epoch {state.epoch + 1} (first in {broken[0]}). "
                f"{self._folder} keeps the last good ones.",
                fix="Try a lower rate:  --set lr0=0.001",
            )
        checkpoint = Checkpoint(
            tensors=tensors,
            variant=state.request.variant,
            training=True,
            class_names=state.class_names,
            anchors=state.anchors,
            source=LAST,
        )
        save_checkpoint(checkpoint, self._folder / LAST)

    def _validated(self) -> AccuracyReport:
        """AP of the file just written, as `y7 val` measures it."""
        path, img = self._folder / LAST, self._options.img
        options = ValOptions(batch=min(2 * self._options.batch // self._world.size, VAL_BATCH))
        with (
            Detector(path, device=str(self._world.device), img=img) as detector,
            self._watch.counting("validate") as show,
        ):
            return evaluate(detector, self._val, options=options, progress=show)

    def _judge(self, epoch: int, report: AccuracyReport | None) -> None:
        if report is None:
            return
        self._accuracy = report if self._accuracy is None else self._accuracy
        fitness = AP_PART * (report.ap or 0.0) + AP50_PART * (report.ap50 or 0.0)
        aps = tuple(row.ap or 0.0 for row in report.classes)
        self._state = replace(self._state, class_aps=aps)
        if fitness > self._state.best:
            self._accuracy = report
            self._state = replace(self._state, best=fitness, best_epoch=epoch)
            _copy_whole(self._folder / LAST, self._folder / BEST)

    def _share_verdict(self) -> RunState:
        """What the first process found, known to all."""
        state = self._state
        classes = len(state.class_names)
        values = torch.zeros(2 + classes, dtype=torch.float64, device=self._world.device)
        if self._world.is_first:
            known = [state.best, state.best_epoch, *(state.class_aps or (0.0,) * classes)]
            values += torch.tensor(known, dtype=torch.float64, device=values.device)
        best, best_epoch, *aps = self._world.add(values).tolist()
        return replace(state, best=best, best_epoch=int(best_epoch), class_aps=tuple(aps))

    def _record(
        self, epoch: int, sums: Sums, report: AccuracyReport | None, *, rate: float, seconds: float
    ) -> EpochRecord:
        rates = {group["name"]: float(group["lr"]) for group in self._learner.optimizer.param_groups}
        first = self._learner.optimizer.param_groups[0]
        measured = {name: getattr(report, name) if report else None for name in MEASURED}
        return EpochRecord(
            **measured,
            epoch=epoch,
            box=sums.box,
            obj=sums.objectness,
            cls=sums.classes,
            total=sums.box + sums.objectness + sums.classes,
            positives=sums.positives,
            size=self._options.img,
            lr_norm=rates.get(NORMS, 0.0),
            lr_weight=rates.get(WEIGHTS, 0.0),
            lr_bias=rates.get(BIASES, 0.0),
            momentum=float(first["momentum"] if "momentum" in first else first["betas"][0]),
            images_per_s=rate,
            memory_bytes=self._memory(),
            seconds=seconds,
        )

    def _picture_weights(self) -> DoubleArray | None:
        """How often each picture comes, where pictures of badly found classes come more often."""
        if not self._options.image_weights:
            return None
        classes = len(self._state.class_names)
        aps = np.array(self._state.class_aps or (0.0,) * classes)
        store = self._loader.store
        return picture_weights([store.objects(index).class_ids for index in range(len(store))], aps)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Writes everything that is needed to go on from here."""
        self._saved_at = time.monotonic()
        if self._world.is_first:
            self._state = replace(self._state, scale=self._learner.scale)
            save_run_state(self._folder / STATE, self._state, self._learner.tensors())

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the training after the step under way; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, _: FrameType | None) -> None:
            if self._interrupted.is_set():
                raise KeyboardInterrupt
            self._interrupted.set()
            self._watch.say("stopping after this step; once more ends at once")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _copy_whole(source: Path, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, unfinished)
        unfinished.replace(target)
    except OSError as error:
        raise TrainingError(f"{target} cannot be written ({error.strerror}).", fix="Make room on that disk.") from error
    finally:
        unfinished.unlink(missing_ok=True)
