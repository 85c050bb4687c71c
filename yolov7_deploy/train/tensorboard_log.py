"""Scalars for TensorBoard; apart from the other logs, because its library may be absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from yolov7_deploy.errors import UsageError


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
