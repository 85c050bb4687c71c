"""The training loop: epochs of steps, validation of the moving average, checkpoints, early stopping, resuming."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from yolov7_deploy._console import duration
from yolov7_deploy._process import Interrupted, handle_signals
from yolov7_deploy.datasets import Dataset
from yolov7_deploy.datasets.samples import DoubleArray
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, LoadError, TrainingError, is_out_of_memory
from yolov7_deploy.evaluation.accuracy import MAX_LISTED_CLASSES, AccuracyReport, class_table, evaluate
from yolov7_deploy.hardware.machine import host_peak_bytes
from yolov7_deploy.options import ValOptions
from yolov7_deploy.training.checkpoints import (
    BEST,
    LAST,
    STATE,
    LossSums,
    RunState,
    load_run_state,
    save_best,
    save_last,
    save_run_state,
)
from yolov7_deploy.training.dataloader import TrainLoader, compute_image_weights
from yolov7_deploy.training.distributed import launch_command
from yolov7_deploy.training.loggers import COCO_COLUMNS, EpochRecord, RunLog, TrainCallback
from yolov7_deploy.training.optimizer import BIASES, NORMS, WEIGHTS, apply_schedule
from yolov7_deploy.training.plots import draw_batch
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.training.train_step import StepMetrics, TrainStep, multi_scale_sizes

SAVE_BEFORE_VALIDATION_S = 60.0  # seconds of training since the last saved state
AP50_WEIGHT, AP_WEIGHT = 0.1, 0.9  # of the fitness that selects the best epoch, as in the official program


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainReport:
    """Result of a training run.

    Attributes:
        folder: Folder of the run.
        weights: The best weights; the last ones if the file of the best ones was removed.
        epochs: Number of completed epochs.
        best_epoch: The best epoch, from 1.
        accuracy: Accuracy of the best weights; `None` in all processes but the main process.
        unreadable: Images that could not be read, with reasons.
        seconds: Training time, including validation.
        for_int8: The weights were trained for INT8.
    """

    folder: Path
    weights: Path
    epochs: int
    best_epoch: int
    accuracy: AccuracyReport | None
    unreadable: tuple[str, ...]
    seconds: float
    for_int8: bool = False

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain data for JSON."""
        return {
            "folder": str(self.folder),
            "weights": str(self.weights),
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "accuracy": self.accuracy.to_dict() if self.accuracy else None,
            "unreadable": list(self.unreadable),
            "seconds": self.seconds,
        }

    def summary(self) -> str:
        """Return the report as a few lines of text."""
        lines = []
        if self.accuracy is not None and len(self.accuracy.classes) <= MAX_LISTED_CLASSES:
            lines.append(class_table(self.accuracy))
        if self.accuracy is not None and self.accuracy.confusion is not None:
            lines.append(self.accuracy.confusion.summary())
        if self.accuracy is not None and self.accuracy.ap is not None:
            lines.append(
                f"best epoch {self.best_epoch} of {self.epochs}: AP {self.accuracy.ap:.4f}, "
                f"AP50 {self.accuracy.ap50 or 0:.4f} on {self.accuracy.images} images"
            )
        lines.append(f"{self.seconds / 60:.1f} minutes; weights in {self.weights}, charts in the same folder")
        lines.append(f"Next:  y7 export --weights {self.weights}{' --int8' * self.for_int8}")
        return "\n".join(lines)


class Trainer:
    """Trains a model and writes checkpoints, tables and images to the folder of the run.

    Args:
        train_step: Model, loss and optimizer.
        loader: Training images.
        val: Validation dataset.
        state: Progress of the run.
        log: Table of the epochs; `None` in all processes but the main process.
        callback: Receives messages, progress and metrics.
    """

    def __init__(
        self,
        train_step: TrainStep,
        loader: TrainLoader,
        val: Dataset,
        *,
        state: RunState,
        log: RunLog | None,
        callback: TrainCallback,
    ) -> None:
        self._train_step, self._loader, self._val = train_step, loader, val
        self._state, self._log, self._callback = state, log, callback
        self._options, self._distributed = state.request.options, train_step.distributed
        self._folder = Path(state.request.folder)
        self._unreadable: dict[str, None] = {}  # used as an ordered set
        self._accuracy: AccuracyReport | None = None  # of the best weights, if they are from this process
        # Save after the first step, too: a full disk is noticed at once, and the first epoch can be long.
        self._saved_at = time.monotonic() if state.epoch or state.step else -math.inf
        self._started_at = time.monotonic() - state.seconds
        self._began_at, self._began_step = time.monotonic(), self._total_steps
        self._signal = 0  # number of the signal that asks the training to end

    @property
    def _total_steps(self) -> int:
        """Completed steps of the whole run."""
        return self._state.epoch * self._loader.steps + self._state.step

    def resume(self) -> None:
        """Load weights, moving average, optimizer state and accumulated gradients from the folder.

        Raises:
            LoadError: The state is from another network.
        """
        state = self._state
        _, tensors = load_run_state(self._folder)
        try:
            self._train_step.load_state(tensors, ema_updates=state.ema_updates, grad_scale=state.grad_scale)
        except (KeyError, RuntimeError) as error:
            raise LoadError(
                f"{self._folder / STATE} does not have the weights of {state.request.variant} "
                f"({str(error).strip()[:200]}).",
                fix=f"Start a new training from its weights:  y7 train --data D.yaml --weights {self._folder / LAST}",
            ) from error
        done = state.epoch * self._loader.steps + state.step
        apply_schedule(self._train_step.optimizer, self._train_step.schedule, max(0, done - 1), state.epoch)

    def validate_start(self) -> None:
        """Save and validate the model before the first step, as epoch 0: the best one if no epoch is better."""
        if not self._distributed.is_main_process:
            return
        self._save_last()
        report = self._validate(LAST)
        self._update_best(0, report)
        self._callback.on_message(f"before the first epoch: AP {report.ap or 0:.4f}, AP50 {report.ap50 or 0:.4f}")

    def run(self) -> TrainReport:
        """Train all remaining epochs.

        Raises:
            Interrupted: Ctrl-C, SIGTERM or SIGHUP, after the state was saved.
            TrainingError: The loss is not finite, or the disk is full.
            DeviceError: Out of memory; the message names the batch size that fits.
        """
        with handle_signals(self._handle_signal):
            while not self._is_finished():
                self._train_epoch()
                self._end_epoch()
        has_best = (self._folder / BEST).is_file()
        if has_best and self._accuracy is None and self._distributed.is_main_process:  # resumed after the best epoch
            self._accuracy = self._validate(BEST)
        return TrainReport(
            folder=self._folder,
            weights=self._folder / (BEST if has_best else LAST),
            epochs=self._state.epoch,
            best_epoch=self._state.best_epoch,
            accuracy=self._accuracy,
            unreadable=tuple(self._unreadable),
            seconds=self._state.seconds,
            for_int8=self._state.quantization is not None,
        )

    def _is_finished(self) -> bool:
        state = self._state
        if state.is_finished and state.epoch < self._options.epochs:
            self._callback.on_message(f"early stopping: no improvement since epoch {state.best_epoch}")
        return state.is_finished

    # --- steps --------------------------------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        state = self._state
        self._train_step.train()
        self._loader.image_weights = self._image_weights()
        self._epoch_started_at, self._first_step = time.monotonic(), state.step
        with self._callback.epoch_progress(state.epoch, self._options.epochs) as show:
            for batch in self._loader.epoch(state.epoch, start=state.step):
                self._report_unreadable(batch.problems)
                self._draw_first_batch(batch)
                metrics = self._run_step(batch)
                self._check_finite(metrics, batch)
                self._update_state(metrics)
                show(self._state.step, self._loader.steps, self._progress_note())
                if metrics.stop:
                    self._stop()
                if time.monotonic() - self._saved_at > self._options.save_minutes * 60:
                    self._save_state()

    def _run_step(self, batch: Batch) -> StepMetrics:
        state = self._state
        step = state.epoch * self._loader.steps + state.step
        stop = self._signal != 0
        try:
            return self._train_step.run(batch, epoch=state.epoch, step=step, epoch_step=state.step, stop=stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise batch_size_error(self._train_step, batch, error) from error

    def _update_state(self, metrics: StepMetrics) -> None:
        state = self._state
        sums = state.sums.add(box=metrics.box, obj=metrics.obj, cls=metrics.cls, positives=metrics.positives)
        self._state = replace(state, step=state.step + 1, sums=sums, ema_updates=self._train_step.ema.updates)

    def _stop(self) -> None:
        """Save the state, and end the training in all processes."""
        self._save_state()
        self._distributed.barrier()  # torchrun terminates the other processes as soon as one has ended
        state = self._state
        self._callback.on_message(
            f"stopped after step {state.step} of epoch {state.epoch + 1}; resume with:  "
            f"{launch_command(self._distributed.world_size)} train --resume --save-dir {self._folder}"
        )
        raise Interrupted(self._signal or signal.SIGINT)  # another process may have received the signal

    def _draw_first_batch(self, batch: Batch) -> None:
        if self._distributed.is_main_process and self._state.epoch == 0 and self._state.step == 0:
            draw_batch(batch, self._state.class_names, self._folder / "first_batch.jpg")

    def _report_unreadable(self, problems: Iterable[str]) -> None:
        for problem in problems:
            if problem not in self._unreadable:
                self._unreadable[problem] = None
                self._callback.on_message(f"skipped: {problem}")

    def _check_finite(self, metrics: StepMetrics, batch: Batch) -> None:
        if metrics.is_finite:
            return
        state, path = self._state, self._folder / STATE
        losses = f"box {metrics.box:g}, obj {metrics.obj:g}, cls {metrics.cls:g}"
        images = ", ".join(map(str, batch.paths[:4]))
        saved = f"{path} has the last finite weights. " if path.exists() else ""
        raise TrainingError(
            f"The loss is not finite in epoch {state.epoch + 1}, step {state.step + 1} ({losses}). {saved}"
            f"The first images of that step: {images}.",
            fix="Try a lower learning rate (--set lr0=0.001), --no-half, or check the labels of these images.",
        )

    def _progress_note(self) -> str:
        means = self._state.sums.mean()
        memory_gb = self._peak_memory_bytes() / 1e9
        return (
            f"box {means.box:.4f}  obj {means.obj:.4f}  cls {means.cls:.4f}  "
            f"{self._images_per_s():.1f} img/s  {memory_gb:.1f} GB  {duration(self._left_s())} left"
        )

    def _left_s(self) -> float:
        """Return the seconds until the last epoch ends, at the mean speed since this process started or resumed."""
        steps = self._options.epochs * self._loader.steps
        done = max(self._total_steps - self._began_step, 1)
        return (time.monotonic() - self._began_at) / done * (steps - self._total_steps)

    def _images_per_s(self) -> float:
        seconds = time.monotonic() - self._epoch_started_at
        return (self._state.step - self._first_step) * self._options.batch / max(seconds, 1e-9)

    def _peak_memory_bytes(self) -> int:
        if self._distributed.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._distributed.device)
        return host_peak_bytes()

    # --- end of an epoch ----------------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        """Save, validate and log."""
        options, state, images_per_s = self._options, self._state, self._images_per_s()
        epoch = state.epoch + 1
        is_due = epoch == options.epochs or (options.val_every > 0 and epoch % options.val_every == 0)
        report = None
        for problems in self._distributed.all_gather(tuple(self._unreadable)):
            self._report_unreadable(problems)
        if is_due and time.monotonic() - self._saved_at > SAVE_BEFORE_VALIDATION_S:
            self._save_state()  # a process that is asked to end during the validation may be killed before its end
            state = self._state
        if self._distributed.is_main_process:
            self._save_last()
            if is_due:
                report = self._validate(LAST)
                self._update_best(epoch, report)
        best_fitness, best_epoch, class_aps = self._distributed.broadcast(
            (self._state.best_fitness, self._state.best_epoch, self._state.class_aps)
        )
        self._state = replace(
            state,
            best_fitness=best_fitness,
            best_epoch=best_epoch,
            class_aps=class_aps,
            epoch=epoch,
            step=0,
            sums=LossSums(),
        )
        record = None
        if self._distributed.is_main_process:
            record = self._record(epoch, state.sums.mean(), report, images_per_s=images_per_s)
            assert self._log is not None, "the main process has the log"
            self._log.write(record)
        self._save_state()
        if record is not None:
            self._callback.on_epoch_end(record)  # after saving, because standard output may be closed

    def _save_last(self) -> None:
        ema = self._train_step.ema.tensors
        if self._state.quantization is None:
            save_last(self._folder, self._state, ema)
            return
        from yolov7_deploy.training.qat import trained_checkpoint  # imports onnxruntime

        save_last(self._folder, self._state, *trained_checkpoint(self._train_step.model, self._state, ema))

    def _validate(self, name: str) -> AccuracyReport:
        """Return the accuracy of a weights file of the run, with the options of `y7 val`.

        In rect mode, the canvas of an image depends on the batch size, too.
        """
        path, img = self._folder / name, self._options.img
        with (
            Detector(path, device=str(self._distributed.device), img=img) as detector,
            self._callback.progress("validate") as show,
        ):
            report = evaluate(detector, self._val, options=ValOptions(), progress=show)
        self._report_unreadable(image.reason for image in report.skipped)
        return report

    def _update_best(self, epoch: int, report: AccuracyReport) -> None:
        fitness = AP_WEIGHT * (report.ap or 0.0) + AP50_WEIGHT * (report.ap50 or 0.0)
        self._state = replace(self._state, class_aps=tuple(row.ap or 0.0 for row in report.classes))
        if fitness > self._state.best_fitness:
            self._accuracy = report
            self._state = replace(self._state, best_fitness=fitness, best_epoch=epoch)
            save_best(self._folder)

    def _record(
        self, epoch: int, means: LossSums, report: AccuracyReport | None, *, images_per_s: float
    ) -> EpochRecord:
        groups = self._train_step.optimizer.param_groups
        rates = {group["name"]: float(group["lr"]) for group in groups}
        coco = {name: getattr(report, name) if report else None for name in COCO_COLUMNS}
        best = report.best if report else None
        return EpochRecord(
            **coco,
            precision=best.precision if best else None,
            recall=best.recall if best else None,
            epoch=epoch,
            box=means.box,
            obj=means.obj,
            cls=means.cls,
            total=means.box + means.obj + means.cls,
            positives=means.positives,
            size=self._options.img,
            lr_norm=rates.get(NORMS, 0.0),
            lr_weight=rates.get(WEIGHTS, 0.0),
            lr_bias=rates.get(BIASES, 0.0),
            momentum=float(groups[0]["momentum"] if "momentum" in groups[0] else groups[0]["betas"][0]),
            images_per_s=images_per_s,
            memory_bytes=self._peak_memory_bytes(),
            seconds=time.monotonic() - self._epoch_started_at,
        )

    def _image_weights(self) -> DoubleArray | None:
        """Return the sampling weight of each image, which is higher for classes with low AP."""
        if not self._options.image_weights:
            return None
        classes = len(self._state.class_names)
        aps = np.array(self._state.class_aps or (0.0,) * classes)
        store = self._loader.store
        return compute_image_weights([store.flat_objects(index).class_ids for index in range(len(store))], aps)

    # --- saving and stopping ------------------------------------------------------------------------------------------

    def _save_state(self) -> None:
        """Write everything that is needed to resume from here."""
        self._saved_at = now = time.monotonic()
        self._state = replace(self._state, seconds=now - self._started_at)
        if self._distributed.is_main_process:
            self._state = replace(self._state, grad_scale=self._train_step.grad_scale)
            save_run_state(self._folder, self._state, self._train_step.state_tensors())

    def _handle_signal(self, number: int, _: FrameType | None) -> None:
        """End the training after the current step, and at once at a second Ctrl-C."""
        if self._signal:
            # Not for SIGTERM: torchrun sends it to all processes when the first one has ended.
            if number == signal.SIGINT:
                raise Interrupted(number)
            return
        self._signal = number
        with contextlib.suppress(RuntimeError):  # the signal interrupted a write to the same stream
            self._callback.on_message("stopping after the next step; press Ctrl-C again to stop at once")


def batch_size_error(train_step: TrainStep, batch: Batch, error: BaseException) -> DeviceError:
    """Return an error that names the batch size that fits, found by halving the one that did not.

    With several processes only this one may be out of memory, and the others do not take part in trials: the error
    then names half the batch without trying it.

    Args:
        train_step: Its gradients are dropped.
        batch: The batch that did not fit.
        error: The exception. Its frames, which hold the activations of the step, are cleared.
    """
    world_size, images = train_step.distributed.world_size, batch.images.shape[0]
    fitting = images // 2
    traceback.clear_frames(error.__traceback__)
    while world_size == 1 and fitting and not _fits(train_step, batch, fitting):
        fitting //= 2
    what = f"A batch of {images * world_size} images of {_size_text(train_step, batch)}"
    if world_size > 1:
        what += f", split over {world_size} processes,"
    what += f" does not fit into the memory of {train_step.distributed.device}"
    reason = str(error).partition("\n")[0][:200]
    if not fitting:
        smaller = max(train_step.stride, train_step.options.img // 2 // train_step.stride * train_step.stride)
        neither = ", and neither does a batch of 1" if images > 1 else ""
        return DeviceError(f"{what}{neither} ({reason}).", fix=f"A smaller size or variant:  --img {smaller}")
    tried = f"; a batch of {fitting} fits" if world_size == 1 else ""
    return DeviceError(
        f"{what} ({reason}){tried}. Gradient accumulation keeps the nominal batch.",
        fix=f"--batch {fitting * world_size}",
    )


def _largest_size(train_step: TrainStep) -> int | None:
    """Return the largest image size of multi-scale training; `None` for a fixed size."""
    options = train_step.options
    return multi_scale_sizes(options.img, train_step.stride)[-1] if options.multi_scale else None


def _size_text(train_step: TrainStep, batch: Batch) -> str:
    largest = _largest_size(train_step)
    return f"up to {largest}x{largest}" if largest else f"{batch.images.shape[1]}x{batch.images.shape[2]}"


def _fits(train_step: TrainStep, batch: Batch, images: int) -> bool:
    """Return whether forward and backward of the first images of a batch succeed; weights do not change."""
    targets = batch.targets[batch.targets[:, 0] < images]
    part = Batch(images=batch.images[:images], targets=targets, paths=batch.paths[:images])
    _free_memory(train_step)
    size = _largest_size(train_step)
    try:
        train_step.compute_loss(part, image_size=size).total.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    finally:
        _free_memory(train_step)
    return True


def _free_memory(train_step: TrainStep) -> None:
    train_step.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if train_step.distributed.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
