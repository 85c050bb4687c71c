"""TensorBoard event files; import this module only where they are written, because TensorBoard is optional."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from yolov7_deploy.errors import UsageError


class TensorboardLog:
    """An event file in a folder; TensorBoard shows all event files of a folder as one run."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Open the file. Values of `first_step` and later in older files of the folder are hidden.

        Raises:
            UsageError: The file cannot be written.
        """
        self._folder = folder
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first_step)
        except OSError as error:
            raise self._write_error(error.strerror or str(error)) from error
        except UnicodeEncodeError as error:
            raise self._write_error("TensorBoard refuses names that are not valid Unicode") from error

    def add(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Write values by tag, and flush the file.

        Raises:
            UsageError: The file cannot be written.
        """
        try:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()
        except OSError as error:
            raise self._write_error(error.strerror or str(error)) from error

    def close(self) -> None:
        """Close the file.

        Raises:
            UsageError: The file cannot be written.
        """
        try:
            self._writer.close()
        except OSError as error:
            raise self._write_error(error.strerror or str(error)) from error

    def _write_error(self, reason: str) -> UsageError:
        return UsageError(
            f"The TensorBoard file in {self._folder} cannot be written: {reason}.",
            fix="Free some space, choose another folder, or train with --no-tensorboard.",
        )
