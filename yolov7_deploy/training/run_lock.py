"""The lock of a run folder: two processes that train in one folder would overwrite each other's weights."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from yolov7_deploy.errors import TrainingError, UsageError

LOCK_NAME = "run.lock"
_MAX_LOCK_BYTES = 32


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created if needed, until the block ends.

    The lock file has the process id. The system releases the lock of a process that ended, however it ended, so the
    file of a killed run is ignored. Data loading processes do not inherit the lock.

    Raises:
        UsageError: Another process trains in this folder.
        TrainingError: The folder cannot be written.
    """
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
    except OSError as error:
        reason = error.strerror or error
        raise TrainingError(f"{folder} cannot be written: {reason}.", fix="--save-dir ANOTHER") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        owner = _read_owner(descriptor)
        if not _lock(descriptor, owner):
            os.close(descriptor)
            process = f"process {owner}" if owner else "another process"
            raise UsageError(
                f"{path.parent} is being trained by {process}. A second one would overwrite its weights.",
                fix=f"Wait for it, or stop it first:  kill {owner}" if owner else "Wait for it, or stop it first.",
            )
        # The process that held the lock before may have removed the file that is open here.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)


def _read_owner(descriptor: int) -> int:
    """Return the process id in a lock file, 0 if there is none."""
    text = os.pread(descriptor, _MAX_LOCK_BYTES, 0)
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
