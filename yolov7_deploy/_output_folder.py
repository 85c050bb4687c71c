"""Output folders: numbered, marked as ours, locked against a second process, and complete or absent."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from yolov7_deploy._atomic_file import atomic_folder
from yolov7_deploy.errors import TrainingError, UsageError

# Marks a folder whose files y7 detect has written and may replace: an attribute of the folder, or a file in it where
# the file system or the platform does not have attributes.
ATTRIBUTE, MARKER = "user.y7-detect", ".y7-detect"
_NEW_FOLDER_FIX = "Choose another folder:  --output FOLDER"
_MARKER_TEXT = "The results in this folder were written by y7 detect. Without this file it would not replace them.\n"


def create_run_folder(folder: Path) -> Path:
    """Create and return a new folder: `exp`, or the next of `exp2`, `exp3`, ... after the highest that exists.

    Runs that start at the same time get different folders.

    Args:
        folder: The folder without a number, such as `runs/detect/exp`.

    Raises:
        UsageError: It cannot be created.
    """
    parent, name = folder.parent, folder.name
    numbered = re.compile(rf"{re.escape(name)}(\d*)", re.IGNORECASE)  # `Exp` is `exp` on Windows and macOS
    while True:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            taken = [numbered.fullmatch(path.name) for path in parent.iterdir()]
            number = max((int(match[1] or 1) for match in taken if match), default=0) + 1
            created = parent / (name if number == 1 else f"{name}{number}")
            created.mkdir()
        except FileExistsError as error:
            if parent.is_dir():
                continue  # another run was faster
            raise UsageError(f"{parent} is not a folder.", fix="Choose another one:  --save-dir FOLDER") from error
        except OSError as error:
            raise _not_created(f"A folder in {parent}", error) from error
        return created


def _create_named_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_created(str(folder), error) from error
    return folder


def _not_created(what: str, error: OSError) -> UsageError:
    return UsageError(
        f"{what} cannot be created: {error.strerror or error}.", fix="Choose another one:  --save-dir FOLDER"
    )


@contextlib.contextmanager
def new_run_folder(folder: Path, *, exist_ok: bool = False) -> Iterator[Path]:
    """Yield a new folder of `create_run_folder`; it is removed afterwards if nothing was written.

    Args:
        folder: The folder without a number.
        exist_ok: Yield the folder without a number, even if it exists.

    Raises:
        UsageError: It cannot be created.
    """
    if exist_ok and folder.is_dir():
        yield folder
        return
    missing = [path for path in folder.parents if not path.exists()]
    created = _create_named_folder(folder) if exist_ok else create_run_folder(folder)
    try:
        yield created
    finally:
        with contextlib.suppress(OSError):  # a folder that is not empty cannot be removed
            for path in (created, *missing):
                path.rmdir()


class ResultFolder:
    """A folder for results; files in it that y7 detect did not write are never replaced.

    The folder is marked with the first result, if it did not have such files before.

    Args:
        path: The folder; it is created with the first result.
        suffixes: Suffixes of the results, in lower case.

    Raises:
        UsageError: The path is a file.
    """

    def __init__(self, path: Path, suffixes: Collection[str]) -> None:
        if path.is_file():
            raise UsageError(f"{path} is a file, not a folder.", fix="Choose another folder:  --save-dir results")
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


LOCK_NAME = "run.lock"
_MAX_LOCK_BYTES = 32


@contextlib.contextmanager
def lock_run_folder(
    folder: Path, *, activity: str = "being trained by", harm: str = "overwrite its weights"
) -> Iterator[None]:
    """Hold the lock of a run folder, which is created if needed, until the block ends.

    The lock file has the process id. The system releases the lock of a process that ended, however it ended, so the
    file of a killed run is ignored. Data loading processes do not inherit the lock.

    Args:
        folder: The folder.
        activity: Completes the message "runs/exp is ... process 7".
        harm: Completes the message "A second one would ...".

    Raises:
        UsageError: Another process works in this folder.
        TrainingError: The folder cannot be written.
    """
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path, activity, harm)
    except OSError as error:
        reason = error.strerror or error
        raise TrainingError(f"{folder} cannot be written: {reason}.", fix="--save-dir ANOTHER") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path, activity: str, harm: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        owner = _read_owner(descriptor)
        if not _lock(descriptor, owner):
            os.close(descriptor)
            process = f"process {owner}" if owner else "another process"
            raise UsageError(
                f"{path.parent} is {activity} {process}. A second one would {harm}.",
                fix=f"Wait for it, or stop it first:  kill {owner}" if owner else "Wait for it, or stop it first.",
            )
        # The process that held the lock before may have removed the file that is open here.
        if _is_open_file(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)


def _is_open_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_owner(descriptor: int) -> int:
    """Return the process id in a lock file that was just opened, 0 if there is none."""
    text = os.read(descriptor, _MAX_LOCK_BYTES)
    return int(text) if text.isdigit() else 0


def _lock(descriptor: int, owner: int) -> bool:
    """Lock the file for this process; where files cannot be locked, the process id decides."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike `flock`, not inherited by child processes
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return owner in (0, os.getpid()) or not _is_running(owner)
    return True


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --- folders that appear complete or not at all -----------------------------------------------------------------------


def check_new_folder(path: Path) -> None:
    """Check before the work begins that a folder can be written; creates nothing.

    Raises:
        UsageError: It is a file, or a folder that is not empty, or it cannot be created.
    """
    try:
        if path.is_dir() and any(path.iterdir()):
            raise UsageError(f"{path} is not empty. Nothing in it is replaced.", fix=_NEW_FOLDER_FIX)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is not a folder.", fix=_NEW_FOLDER_FIX)
        existing = next(parent for parent in path.absolute().parents if parent.exists())
    except (OSError, ValueError) as error:
        raise _not_written(path, error) from error
    if not existing.is_dir():
        raise UsageError(f"{path} cannot be written: {existing} is not a folder.", fix=_NEW_FOLDER_FIX)
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{path} cannot be written: {existing} is read-only.", fix=_NEW_FOLDER_FIX)


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
    return UsageError(f"{path} cannot be written: {reason}.", fix=_NEW_FOLDER_FIX)
