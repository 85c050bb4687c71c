"""Reports of a training run: callbacks, a CSV table with one line per epoch, TensorBoard events, and `run.json`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._bounded_read import MAX_DOCUMENT_BYTES, read_bytes
from yolov7_deploy._console import write_json
from yolov7_deploy._text import get_logger
from yolov7_deploy._version import __version__
from yolov7_deploy.errors import UsageError, missing_library

if TYPE_CHECKING:
    from types import TracebackType

    from yolov7_deploy.training.tensorboard import TensorboardLog

RESULTS_NAME, RUN_NAME = "results.csv", "run.json"
INTEGER_COLUMNS = {"epoch", "size", "memory_bytes"}

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRecord:
    """Metrics of one epoch; a loss that is not finite is recorded as such, so the table shows where training diverged.

    Attributes:
        epoch: Epoch, from 1 in `y7 train`.
        box, obj, cls, total: Mean losses over the steps of the epoch, multiplied by their gains.
        positives: Mean number of positives of the lead heads per step.
        size: Image size in pixels.
        precision, recall: Of the validation, at the confidence with the best F1 and IoU 0.50; `None` if this epoch was
            not validated, or nothing was found.
        ap, ap50, ap75, ap_small, ap_medium, ap_large, ar100: COCO metrics (0..1) of the validation; `None` if this
            epoch was not validated, or if there are no objects of that kind.
        lr_norm, lr_weight, lr_bias: Learning rates at the end of the epoch: of BatchNorm and implicit knowledge, of
            weights, and of biases.
        momentum: Momentum at the end of the epoch.
        images_per_s: Training speed, without validation.
        memory_bytes: Peak memory of the device; `None` if unknown.
        seconds: Duration of the epoch, including validation.
    """

    epoch: int
    box: float
    obj: float
    cls: float
    total: float
    positives: float
    size: int
    precision: float | None = None
    recall: float | None = None
    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    ar100: float | None = None
    lr_norm: float
    lr_weight: float
    lr_bias: float
    momentum: float
    images_per_s: float
    memory_bytes: int | None = None
    seconds: float

    def __post_init__(self) -> None:
        if self.epoch < 0 or self.size < 1:
            raise UsageError(
                f"An epoch must be at least 0 and a size at least 1, not {self.epoch} and {self.size}.",
                fix="Count epochs from 0 or 1, and give the image size in pixels.",
            )


COLUMNS = tuple(field.name for field in fields(EpochRecord))
OPTIONAL_COLUMNS = {field.name for field in fields(EpochRecord) if field.default is None}
HEADER = ",".join(COLUMNS)
COCO_COLUMNS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")
# TensorBoard tag of each column; the part before the slash is a section of its page.
TAGS = {
    **{name: f"train/{name}" for name in ("box", "obj", "cls", "total", "positives", "size")},
    **{name: f"val/{name}" for name in ("precision", "recall", *COCO_COLUMNS)},
    **{name: name.replace("_", "/") for name in ("lr_norm", "lr_weight", "lr_bias")},
    "momentum": "lr/momentum",
    **{name: f"speed/{name}" for name in ("images_per_s", "memory_bytes", "seconds")},
}

ShowStep = Callable[[int, int, str], None]
ShowProgress = Callable[[int, int], None]


class TrainCallback(Protocol):
    """The interface through which a training run reports its progress."""

    def on_message(self, text: str) -> None:
        """Handle a message for the user."""

    def on_epoch_end(self, record: EpochRecord) -> None:
        """Handle the metrics of an epoch."""

    def epoch_progress(self, epoch: int, epochs: int) -> AbstractContextManager[ShowStep]:
        """Return the context of an epoch (from 0); it yields a function of (steps done, steps in total, note)."""

    def progress(self, description: str) -> AbstractContextManager[ShowProgress]:
        """Return the context of another long operation; it yields a function of (done, total)."""


class NullCallback:
    """A callback that ignores everything."""

    def on_message(self, text: str) -> None:
        """Ignore the message."""

    def on_epoch_end(self, record: EpochRecord) -> None:
        """Ignore the metrics."""

    @contextmanager
    def epoch_progress(self, epoch: int, epochs: int) -> Iterator[ShowStep]:
        """Yield a function that does nothing."""
        yield lambda done, total, note: None

    @contextmanager
    def progress(self, description: str) -> Iterator[ShowProgress]:
        """Yield a function that does nothing."""
        yield lambda done, total: None


class LogCallback(NullCallback):
    """A callback that logs messages and the metrics of each epoch."""

    def on_message(self, text: str) -> None:
        """Log the message."""
        logger.info("%s", text)

    def on_epoch_end(self, record: EpochRecord) -> None:
        """Log the losses and the AP."""
        losses = f"box {record.box:.4f}, obj {record.obj:.4f}, cls {record.cls:.4f}"
        logger.info("epoch %d: %s, AP %s, %.1f s", record.epoch, losses, record.ap, record.seconds)


class RunLog:
    """Writer of `results.csv` and of TensorBoard events in the folder of a run; a context manager that closes them.

    Every line is on the disk when `write` returns, so a run that is killed loses none.
    """

    def __init__(self, folder: Path, *, tensorboard: bool | None = None, first_epoch: int = 0) -> None:
        """Open the logs of a run that starts or resumes.

        Args:
            folder: Folder of the run; it is created if needed.
            tensorboard: Write TensorBoard events; `None` does so if TensorBoard is installed.
            first_epoch: The first epoch that will be written. Lines of this and later epochs are from a run that was
                killed after its last checkpoint, and are removed; so is an incomplete last line.

        Raises:
            MissingLibraryError: TensorBoard is requested but not installed.
            UsageError: The folder cannot be written, or its `results.csv` is not a table of this version.
        """
        self.path = folder / RESULTS_NAME
        self._last_epoch = first_epoch - 1
        lines = _read(self.path) if self.path.exists() else {}
        kept = [line for line, record in lines.items() if record.epoch < first_epoch]
        try:
            with atomic_write(self.path) as temporary:
                text = "".join(f"{line}\n" for line in (HEADER, *kept))
                temporary.write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise _write_error(self.path, error) from error
        self._tensorboard = _open_tensorboard(folder, requested=tensorboard, first_step=first_epoch)

    def write(self, record: EpochRecord) -> None:
        """Append an epoch.

        Raises:
            UsageError: The epoch does not follow the last one, or cannot be written; the table is then unchanged.
        """
        if record.epoch <= self._last_epoch:
            raise UsageError(
                f"Epoch {record.epoch} comes after epoch {self._last_epoch} in {self.path}.",
                fix="Write each epoch once and in order; open the log with first_epoch= to write epochs again.",
            )
        try:
            _append(self.path, _line(record))
        except OSError as error:
            raise _write_error(self.path, error) from error
        self._last_epoch = record.epoch
        if self._tensorboard:
            values = {tag: getattr(record, name) for name, tag in TAGS.items()}
            self._tensorboard.add({tag: value for tag, value in values.items() if value is not None}, step=record.epoch)

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._tensorboard:
            self._tensorboard.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_results(path: Path) -> list[EpochRecord]:
    """Return the epochs of a `results.csv`, with its six significant digits; an incomplete last line is ignored.

    Raises:
        UsageError: The file does not exist, or is not a table of this version.
    """
    return list(_read(path).values())


def write_run(folder: Path, document: Mapping[str, Any]) -> None:
    """Write `run.json`, with all that is needed to repeat a run and the version of this package, atomically.

    Args:
        folder: Folder of the run; it is created if needed.
        document: Plain data, dataclasses and paths: command, options, hyperparameters, digest of the dataset.

    Raises:
        UsageError: The file cannot be written.
        ValueError: The document contains a type that is not plain data. NaN and infinity become null.
    """
    write_json({"version": __version__, **document}, folder / RUN_NAME)


def _line(record: EpochRecord) -> str:
    return ",".join(
        "" if value is None else str(int(value)) if name in INTEGER_COLUMNS else f"{value:.6g}"
        for name, value in zip(COLUMNS, astuple(record), strict=True)
    )


def _read(path: Path) -> dict[str, EpochRecord]:
    """Return the records of a table by their lines."""
    try:
        *lines, rest = read_bytes(path, max_bytes=MAX_DOCUMENT_BYTES).decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}.", fix=f"Name the {RESULTS_NAME} of a training run."
        ) from error
    if not lines and HEADER.startswith(rest):
        return {}
    lines = [line.rstrip("\r") for line in lines]
    if not lines or lines[0] != HEADER:
        raise UsageError(
            f"{path} does not begin with the columns of a training table of this version: {HEADER[:40]}...",
            fix="Move it away, or choose another folder for the run.",
        )
    if rest:
        logger.warning("%s: its last line is incomplete and is ignored", path)
    records = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            records[line] = _parse(line)
        except (ValueError, UsageError) as error:
            reason = error.message if isinstance(error, UsageError) else str(error)
            raise UsageError(f"{path}, line {number}: {reason[:200]}", fix="Correct or delete that line.") from error
    return records


def _parse(line: str) -> EpochRecord:
    cells = line.split(",")
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} values where {len(COLUMNS)} are expected.")
    values: dict[str, Any] = {}
    for name, cell in zip(COLUMNS, cells, strict=True):
        is_none = cell == "" and name in OPTIONAL_COLUMNS
        values[name] = None if is_none else int(cell) if name in INTEGER_COLUMNS else float(cell)
    return EpochRecord(**values)


def _append(path: Path, line: str) -> None:
    """Append a line and sync it to the disk, or leave the file unchanged; unbuffered, so that close does not retry."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        data = f"{line}\n".encode() if size else f"{HEADER}\n{line}\n".encode()
        try:
            written = file.write(data)
            if written < len(data):
                file.write(data[written:])  # raises the error that stopped the first write
                raise OSError("only a part could be written")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _write_error(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{path} cannot be written: {error.strerror or error}.", fix="Free some space, or choose another folder."
    )


def _open_tensorboard(folder: Path, *, requested: bool | None, first_step: int) -> TensorboardLog | None:
    if requested is False:
        return None
    try:
        from yolov7_deploy.training.tensorboard import TensorboardLog
    except ModuleNotFoundError as error:
        missing = missing_library(error, "to write TensorBoard events")
        if requested:
            raise missing from error
        logger.info("TensorBoard is not installed, so no events are written: %s", missing.fix)
        return None
    return TensorboardLog(folder, first_step=first_step)
