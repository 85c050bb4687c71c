"""A new folder for a server: complete or absent, and never mixed with other files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from yolov7_deploy._atomic_file import atomic_folder
from yolov7_deploy.errors import UsageError

_FIX = "Choose another folder:  --output FOLDER"


def check_new_folder(path: Path) -> None:
    """Check before the work begins that a folder can be written; creates nothing.

    Raises:
        UsageError: It is a file, or a folder that is not empty, or it cannot be created.
    """
    try:
        if path.is_dir() and any(path.iterdir()):
            raise UsageError(f"{path} is not empty. Nothing in it is replaced.", fix=_FIX)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is not a folder.", fix=_FIX)
        existing = next(parent for parent in path.absolute().parents if parent.exists())
    except (OSError, ValueError) as error:
        raise _not_written(path, error) from error
    if not existing.is_dir():
        raise UsageError(f"{path} cannot be written: {existing} is not a folder.", fix=_FIX)
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{path} cannot be written: {existing} is read-only.", fix=_FIX)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; at the end it becomes `path`, or it is removed if an exception is raised.

    Raises:
        UsageError: See `check_new_folder`; also if the disk is full.
    """
    check_new_folder(path)
    try:
        with atomic_folder(path) as folder:
            yield folder
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError | ValueError) -> UsageError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UsageError(f"{path} cannot be written: {reason}.", fix=_FIX)
