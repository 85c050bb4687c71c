"""The training loop: epochs of steps, validation of the moving average, checkpoints, early stop, going on."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from yolov7_deploy.datasets import Dataset
from yolov7_deploy.datasets.samples import DoubleArray
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import LoadError, TrainingError
from yolov7_deploy.evaluation.accuracy import AccuracyReport, evaluate
from yolov7_deploy.hardware.memory import host_peak_bytes
from yolov7_deploy.options import ValOptions
from yolov7_deploy.training.auto_batch import batch_that_fits, is_out_of_memory
from yolov7_deploy.training.callbacks import TrainCallback
from yolov7_deploy.training.checkpoints import BEST, LAST, STATE, keep_best, keep_last, keep_state
from yolov7_deploy.training.dataloader import TrainLoader
from yolov7_deploy.training.loggers import EpochRecord, RunLog
from yolov7_deploy.training.optimizer import BIASES, NORMS, WEIGHTS, set_rates
from yolov7_deploy.training.plots import draw_batch
from yolov7_deploy.training.resume_state import RunState, Sums, load_run_state
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.training.sampler import image_weights
from yolov7_deploy.training.train_step import StepMetrics, TrainStep

logger = logging.getLogger(__name__)

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
        accuracy: Of the best weights; known to the first of several processes.
        unreadable: Images that could not be used, and why.
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
        loader: Its images.
        val: What it is validated on.
        state: Where the training is.
        log: Losses and AP of each epoch, in the first of several processes.
        watch: Who looks on.
    """

    def __init__(
        self,
        learner: TrainStep,
        loader: TrainLoader,
        val: Dataset,
        *,
        state: RunState,
        log: RunLog | None,
        watch: TrainCallback,
    ) -> None:
        self._learner, self._loader, self._val = learner, loader, val
        self._state, self._log, self._watch = state, log, watch
        self._options, self._world = state.request.options, learner.world
        self._folder = Path(state.request.folder)
        self._unreadable: dict[str, None] = {}
        self._accuracy: AccuracyReport | None = None  # of the best weights, once they were seen to be the best
        # After the first step too: a full disk is seen at once, and a first epoch may be long.
        self._saved_at = time.monotonic() if state.epoch or state.step else -math.inf
        self._began = time.monotonic() - state.seconds
        self._interrupted = threading.Event()

    @property
    def state(self) -> RunState:
        """Where the training is."""
        return self._state

    def resume(self) -> None:
        """Takes weights, moving average, momentum and pending gradients from the folder.

        Raises:
            LoadError: They are not of this network.
        """
        state, path = self._state, self._folder / STATE
        _, tensors = load_run_state(path)
        try:
            self._learner.load(tensors, updates=state.updates, scale=state.scale)
        except (KeyError, RuntimeError) as error:
            raise LoadError(
                f"{path} does not hold the weights of {state.request.variant} ({str(error).strip()[:200]}).",
                fix=f"Begin anew from its weights:  y7 train --data D.yaml --weights {self._folder / LAST}",
            ) from error
        done = state.epoch * self._loader.steps + state.step
        set_rates(self._learner.optimizer, self._learner.schedule, max(0, done - 1), state.epoch)

    def run(self) -> TrainReport:
        """Trains to the end.

        Raises:
            KeyboardInterrupt: Ctrl-C, after what is needed to go on was written.
            TrainingError: The loss is no number any more, or the disk is full.
            DeviceError: Out of memory; the message says which batch fits.
        """
        with self._listening():
            while not self._is_over():
                self._learn_epoch()
                self._end_epoch()
        has_best = self._state.best_epoch > 0 and (self._folder / BEST).is_file()
        if has_best and self._accuracy is None and self._world.is_first:  # they are from before an interruption
            self._accuracy = self._validated(BEST)
        return TrainReport(
            folder=self._folder,
            weights=self._folder / (BEST if has_best else LAST),
            epochs=self._state.epoch,
            best_epoch=self._state.best_epoch,
            accuracy=self._accuracy,
            unreadable=tuple(self._unreadable),
            seconds=self._state.seconds,
        )

    def _is_over(self) -> bool:
        state, options = self._state, self._options
        if state.epoch >= options.epochs:
            return True
        if not options.patience or not state.best_epoch or state.epoch - state.best_epoch < options.patience:
            return False
        self._watch.say(f"no progress since epoch {state.best_epoch}: training ends")
        return True

    # --- an epoch -----------------------------------------------------------------------------------------------------

    def _learn_epoch(self) -> None:
        state, steps = self._state, self._loader.steps
        self._learner.train_mode()
        self._loader.order_weights = self._image_weights()
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
                    self._stop()
                if time.monotonic() - self._saved_at > self._options.save_minutes * 60:
                    self._keep()

    def _stop(self) -> None:
        """Keeps everything, and ends the training in all processes."""
        self._keep()
        self._world.wait()  # torchrun ends the others as soon as one has ended
        state = self._state
        self._watch.say(
            f"stopped after step {state.step} of epoch {state.epoch + 1}; go on with:  "
            f"{self._world.command} train --resume --save-dir {self._folder}"
        )
        raise KeyboardInterrupt

    def _learn(self, batch: Batch) -> StepMetrics:
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
        """Names new unreadable images, and draws the first batch of a training."""
        self._leave_out(batch.problems)
        if self._world.is_first and self._state.epoch == 0 and self._state.step == 0:
            draw_batch(batch, self._state.class_names, self._folder / "first_batch.jpg")

    def _leave_out(self, problems: Iterable[str]) -> None:
        for problem in problems:
            if problem not in self._unreadable:
                self._unreadable[problem] = None
                self._watch.say(f"left out: {problem}")

    def _refuse_nan(self, numbers: StepMetrics, batch: Batch) -> None:
        if numbers.is_finite:
            return
        state = self._state
        where = f"box {numbers.box:g}, objectness {numbers.objectness:g}, classes {numbers.classes:g}"
        paths = ", ".join(str(path) for path in batch.paths[:4])
        kept = f"{self._folder / STATE} has the last good weights. " if (self._folder / STATE).exists() else ""
        raise TrainingError(
            f"The loss is no number any more in epoch {state.epoch + 1}, step {state.step + 1} ({where}). {kept}"
            f"The images of that step begin with {paths}.",
            fix="Try a lower rate (--set lr0=0.001), --no-half, or look at the labels of these images.",
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

    def _end_epoch(self) -> None:
        """Keeps, validates and logs."""
        options, state = self._options, self._state
        epoch, seconds = state.epoch + 1, time.monotonic() - self._epoch_started
        rate = (state.step - self._first_step) * options.batch / max(seconds, 1e-9)
        due = epoch == options.epochs or (options.val_every > 0 and epoch % options.val_every == 0)
        report = None
        for problems in self._world.gathered(tuple(self._unreadable)):
            self._leave_out(problems)
        if self._world.is_first:
            keep_last(self._folder, state, self._learner.average.tensors)
            if due:
                report = self._validated(LAST)
                self._judge(epoch, report)
        best, best_epoch, aps = self._world.agreed((self._state.best, self._state.best_epoch, self._state.class_aps))
        self._state = replace(state, best=best, best_epoch=best_epoch, class_aps=aps, epoch=epoch, step=0, sums=Sums())
        if self._world.is_first:
            record = self._record(epoch, state.sums.mean(), report, rate=rate)
            assert self._log is not None, "the first process keeps the log"
            self._log.write(record)
            self._watch.epoch_done(record)
        self._keep()

    def _validated(self, name: str) -> AccuracyReport:
        """AP of a file of the run, as `y7 val` measures it."""
        path, img = self._folder / name, self._options.img
        options = ValOptions(batch=min(2 * self._options.batch // self._world.size, VAL_BATCH))
        with (
            Detector(path, device=str(self._world.device), img=img) as detector,
            self._watch.counting("validate") as show,
        ):
            report = evaluate(detector, self._val, options=options, progress=show)
        self._leave_out(image.reason for image in report.skipped)
        return report

    def _judge(self, epoch: int, report: AccuracyReport) -> None:
        fitness = AP_PART * (report.ap or 0.0) + AP50_PART * (report.ap50 or 0.0)
        self._state = replace(self._state, class_aps=tuple(row.ap or 0.0 for row in report.classes))
        if fitness > self._state.best:
            self._accuracy = report
            self._state = replace(self._state, best=fitness, best_epoch=epoch)
            keep_best(self._folder)

    def _record(self, epoch: int, sums: Sums, report: AccuracyReport | None, *, rate: float) -> EpochRecord:
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
            seconds=time.monotonic() - self._epoch_started,
        )

    def _image_weights(self) -> DoubleArray | None:
        """How often each image comes, where images of badly found classes come more often."""
        if not self._options.image_weights:
            return None
        classes = len(self._state.class_names)
        aps = np.array(self._state.class_aps or (0.0,) * classes)
        store = self._loader.store
        return image_weights([store.objects(index).class_ids for index in range(len(store))], aps)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Writes everything that is needed to go on from here."""
        self._saved_at = now = time.monotonic()
        self._state = replace(self._state, seconds=now - self._began)
        if self._world.is_first:
            self._state = replace(self._state, scale=self._learner.scale)
            keep_state(self._folder, self._state, self._learner.tensors())

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the training after the step under way; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, _: FrameType | None) -> None:
            if self._interrupted.is_set():
                # Not SIGTERM: torchrun sends it to all when the first of them has ended.
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                return
            self._interrupted.set()
            with contextlib.suppress(RuntimeError):  # it came while something was being written there
                self._watch.say("stopping after this step; Ctrl-C once more ends at once")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
