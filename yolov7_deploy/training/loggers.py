"""What a training run writes while it runs: a table with a line per epoch, TensorBoard's file, and what it was."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

from yolov7_deploy._atomic_file import whole_file
from yolov7_deploy._console import write_json
from yolov7_deploy._version import __version__
from yolov7_deploy.errors import UsageError, missing_library

if TYPE_CHECKING:
    from types import TracebackType


class TensorboardLog:
    """An event file in a folder; several of one folder are shown as one run."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Opens the file. What earlier files of the folder say of `first_step` and later is not shown any more.

        Raises:
            UsageError: The file cannot be written.
        """
        self._folder = folder
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first_step)
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Writes values by tag, and waits until they are in the file.

        Raises:
            UsageError: The file cannot be written.
        """
        try:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Ends the file.

        Raises:
            UsageError: The file cannot be written.
        """
        try:
            self._writer.close()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(
            f"TensorBoard's file in {self._folder} cannot be written: {error.strerror or error}.",
            fix="Free some space, choose another folder, or train without TensorBoard.",
        )


RESULTS_NAME, RUN_NAME = "results.csv", "run.json"
WHOLE = {"epoch", "size", "memory_bytes"}  # columns with whole numbers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRecord:
    """One epoch in numbers; a loss that is no number stays NaN, so that the table shows where it went wrong.

    Attributes:
        epoch: Counted as the training loop counts.
        box, obj, cls, total: Means of the losses over the epoch's batches, gains included.
        positives: Places of the lead heads that a target was assigned to, in a step on average.
        size: Side of the images in pixels.
        ap, ap50, ap75, ap_small, ap_medium, ap_large, ar100: COCO's numbers (0..1) of the validation; `None` where
            there was none after this epoch, or nothing of that kind to find.
        lr_norm, lr_weight, lr_bias: Learning rates at the end of the epoch: of batch norms and implicit knowledge, of
            the other weights, and of biases.
        momentum: At the end of the epoch.
        images_per_s: Images trained on, without the validation.
        memory_bytes: Largest use of the device's memory; `None` where nobody counts it.
        seconds: Of the epoch, validation included.
    """

    epoch: int
    box: float
    obj: float
    cls: float
    total: float
    positives: float
    size: int
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
                fix="Count epochs from 0 or 1, and give the side of the images in pixels.",
            )


COLUMNS = tuple(field.name for field in fields(EpochRecord))
OPTIONAL = {field.name for field in fields(EpochRecord) if field.default is None}
HEADER = ",".join(COLUMNS)
# Where TensorBoard shows a column; the part before the slash is a section of its page.
TAGS = {
    **{name: f"train/{name}" for name in ("box", "obj", "cls", "total", "positives", "size")},
    **{name: f"val/{name}" for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")},
    **{name: name.replace("_", "/") for name in ("lr_norm", "lr_weight", "lr_bias")},
    "momentum": "lr/momentum",
    **{name: f"speed/{name}" for name in ("images_per_s", "memory_bytes", "seconds")},
}


class RunLog:
    """Writes `results.csv`, and TensorBoard's file, in the folder of a run; a context manager that closes them.

    Every line is on the disk when `write` returns, so a run that is cut off loses none.
    """

    def __init__(self, folder: Path, *, tensorboard: bool | None = None, first_epoch: int = 0) -> None:
        """Opens the logs of a run that starts or goes on.

        Args:
            folder: Is made where it is absent.
            tensorboard: Whether to write its file; `None` does where the library is installed.
            first_epoch: The epoch that comes next. What the folder has of it and of later ones is from a run that was
                cut off after its last checkpoint, and is dropped; so is a line that was cut off.

        Raises:
            MissingLibraryError: TensorBoard is wanted but not installed.
            UsageError: The folder cannot be written, or holds a `results.csv` that is not of this version.
        """
        self.path = folder / RESULTS_NAME
        self._last = first_epoch - 1
        lines = _read(self.path) if self.path.exists() else {}
        kept = [line for line, record in lines.items() if record.epoch < first_epoch]
        try:
            with whole_file(self.path) as unfinished:
                text = "".join(f"{line}\n" for line in (HEADER, *kept))
                unfinished.write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._board = _open_tensorboard(folder, wanted=tensorboard, first_step=first_epoch)

    def write(self, record: EpochRecord) -> None:
        """Adds an epoch.

        Raises:
            UsageError: It is not after the last one, or cannot be written; then the table is as it was.
        """
        if record.epoch <= self._last:
            raise UsageError(
                f"Epoch {record.epoch} comes after epoch {self._last} in {self.path}.",
                fix="Write epochs in order, each once; open the log with first_epoch= to write some again.",
            )
        try:
            _append(self.path, _line(record))
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._last = record.epoch
        if self._board:
            values = {tag: getattr(record, name) for name, tag in TAGS.items()}
            self._board.add({tag: value for tag, value in values.items() if value is not None}, step=record.epoch)

    def close(self) -> None:
        """Ends TensorBoard's file."""
        if self._board:
            self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_results(path: Path) -> list[EpochRecord]:
    """The epochs in a `results.csv`, to the six digits that it has; a last line that was cut off is left out.

    Raises:
        UsageError: The file is absent, or not of this version.
    """
    return list(_read(path).values())


def write_run(folder: Path, document: Mapping[str, Any]) -> None:
    """Writes `run.json`: what is needed to repeat a run, and the version of this package.

    The file appears complete or not at all.

    Args:
        folder: Is made where it is absent.
        document: Plain data, dataclasses and paths: command, options, hyper-parameters, digest of the dataset.

    Raises:
        UsageError: The file cannot be written.
        ValueError: A NaN, or a value that is not data.
    """
    write_json({"version": __version__, **document}, folder / RUN_NAME)


def _line(record: EpochRecord) -> str:
    return ",".join(
        "" if value is None else str(int(value)) if name in WHOLE else f"{value:.6g}"
        for name, value in zip(COLUMNS, astuple(record), strict=True)
    )


def _read(path: Path) -> dict[str, EpochRecord]:
    """The lines of a table, and what they say."""
    try:
        *lines, torn = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}.", fix=f"Name the {RESULTS_NAME} of a training run."
        ) from error
    if not lines and HEADER.startswith(torn):
        return {}
    lines = [line.rstrip("\r") for line in lines]
    if not lines or lines[0] != HEADER:
        raise UsageError(
            f"{path} does not begin with the columns of a training table of this version: {HEADER[:40]}...",
            fix="Move it away, or choose another folder for the run.",
        )
    if torn:
        logger.warning("%s: its last line was cut off and is left out", path)
    found = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            found[line] = _record(line)
        except (ValueError, UsageError) as error:
            reason = error.message if isinstance(error, UsageError) else str(error)
            raise UsageError(f"{path}, line {number}: {reason[:200]}", fix="Mend or delete that line.") from error
    return found


def _record(line: str) -> EpochRecord:
    cells = line.split(",")
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} values where {len(COLUMNS)} are expected.")
    values: dict[str, Any] = {}
    for name, cell in zip(COLUMNS, cells, strict=True):
        empty = cell == "" and name in OPTIONAL
        values[name] = None if empty else int(cell) if name in WHOLE else float(cell)
    return EpochRecord(**values)


def _append(path: Path, line: str) -> None:
    """Adds a line that is on the disk afterwards, or changes nothing: no buffer tries again when the file closes."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        data = f"{line}\n".encode() if size else f"{HEADER}\n{line}\n".encode()
        try:
            written = file.write(data)
            if written < len(data):
                file.write(data[written:])  # names what stopped the first try
                raise OSError("only a part could be written")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{path} cannot be written: {error.strerror or error}.", fix="Free some space, or choose another folder."
    )


def _open_tensorboard(folder: Path, *, wanted: bool | None, first_step: int) -> TensorboardLog | None:
    if wanted is False:
        return None
    try:
        from yolov7_deploy.training.loggers import TensorboardLog
    except ModuleNotFoundError as error:
        missing = missing_library(error, "to write TensorBoard's files")
        if wanted:
            raise missing from error
        logger.info("TensorBoard's files are not written, because it is not installed: %s", missing.fix)
        return None
    return TensorboardLog(folder, first_step=first_step)
