"""Output folders: numbered folders that no two runs share, and folders with files that must not be replaced."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from yolov7_deploy.errors import UsageError

# Marks a folder whose files y7 detect has written and may replace: an attribute of the folder, or a file in it where
# the file system or the platform does not have attributes.
ATTRIBUTE, MARKER = "user.y7-detect", ".y7-detect"
_MARKER_TEXT = "The results in this folder were written by y7 detect. Without this file it would not replace them.\n"


def create_run_folder(parent: Path) -> Path:
    """Create and return the next of `exp`, `exp2`, `exp3`, ... after the highest that exists.

    Runs that start at the same time get different folders.

    Raises:
        UsageError: It cannot be created.
    """
    while True:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            taken = [re.fullmatch(r"exp(\d*)", path.name) for path in parent.iterdir()]
            number = max((int(match[1] or 1) for match in taken if match), default=0) + 1
            folder = parent / ("exp" if number == 1 else f"exp{number}")
            folder.mkdir()
        except FileExistsError as error:
            if parent.is_dir():
                continue  # another run was faster
            raise UsageError(f"{parent} is not a folder.", fix="Choose another one:  --save-dir FOLDER") from error
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(
                f"A folder in {parent} cannot be created: {reason}.", fix="Choose another one:  --save-dir FOLDER"
            ) from error
        return folder


@contextlib.contextmanager
def new_run_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder of `create_run_folder`; it is removed afterwards if nothing was written."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    folder = create_run_folder(parent)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # a folder that is not empty cannot be removed
            for path in (folder, *missing):
                path.rmdir()


class ResultFolder:
    """A folder for results; files in it that y7 detect did not write are never replaced.

    The folder is marked with the first result, if it did not have such files before.

    Args:
        path: The folder; it is created with the first result.
        suffixes: Suffixes of the results, in lower case.
    """

    def __init__(self, path: Path, suffixes: Collection[str]) -> None:
        self._path, self._suffixes = path, suffixes
        self._replaces: bool | None = None

    @property
    def has_foreign_files(self) -> bool:
        """True if the folder has files with these suffixes that y7 detect did not write."""
        if not self._path.is_dir() or _is_marked(self._path):
            return False
        visible = [path for path in self._path.iterdir() if not path.name.startswith(".")]
        return any(path.suffix.lower() in self._suffixes for path in visible)

    def result(self, name: str) -> Path:
        """Return the path of a result that is to be written.

        Raises:
            UsageError: There is a file that y7 detect did not write, or the folder cannot be created.
        """
        if self._replaces is None:
            self._replaces = not self.has_foreign_files
            if self._replaces:
                self._create()
        path = self._path / name
        if not self._replaces and path.exists():
            raise UsageError(
                f"{path} exists, and y7 detect did not write it. It is not replaced.",
                fix="Choose another folder:  --save-dir results",
            )
        return path

    def _create(self) -> None:
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            if not _is_marked(self._path):
                _mark(self._path)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(
                f"{self._path} cannot be written: {reason}.", fix="Choose another folder:  --save-dir results"
            ) from error


def _is_marked(folder: Path) -> bool:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return bool(os.getxattr(folder, ATTRIBUTE))
    return (folder / MARKER).exists()


def _mark(folder: Path) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setxattr(folder, ATTRIBUTE, b"1")
            return
    (folder / MARKER).write_text(_MARKER_TEXT, encoding="utf-8")
