"""Atomic file writes: a file is complete or absent, whenever the program is stopped."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MAX_LINKS = 40  # symbolic links in a row, as in Linux
# Where files cannot be locked, a temporary file counts as left behind after a day.
ABANDONED_AFTER_S = 86_400.0
_TEMPORARY_NAME = re.compile(r"\..*\.[0-9a-f]{16}\.partial(?:\.[^.]*)?", re.DOTALL)
_MAX_STEM = 40  # characters of the file's stem in the temporary name, which must fit into 255 bytes

_own_files: set[Path] = set()  # temporary files that this process is writing
_cleaned_folders: set[Path] = set()  # folders from which this process has removed the files of killed ones


class PartialFile:
    """A temporary file that becomes `path` with `commit`, or disappears with `discard`.

    It is created in the folder of `path`, which is created if needed, under a random name that did not exist before,
    with the same suffix and with the permissions of the umask. If `path` is a symbolic link, the file that it refers
    to is replaced and the link stays. A device, a pipe or an open file such as /dev/stdout is written directly.

    The first file in a folder also removes temporary files that killed processes left there.

    Raises:
        OSError: The folder or the file cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self._target = _follow_links(path)
        self._descriptor = -1
        self.temporary = self._target
        if self._target in _own_files or _is_special(self._target):
            return
        self._target.parent.mkdir(parents=True, exist_ok=True)
        _clean_once(self._target.parent)
        self.temporary, self._descriptor = _create(self._target)
        _own_files.add(self.temporary)

    def commit(self) -> None:
        """Rename the file to its final name, where it replaces an existing file.

        Raises:
            OSError: It cannot be renamed; it is removed.
        """
        if self.temporary == self._target:
            return
        try:
            if sys.platform == "win32":  # an open file cannot be renamed
                self._close()
            self.temporary.replace(self._target)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the file if it was not committed. It can be called repeatedly."""
        if self.temporary == self._target:
            return
        if sys.platform == "win32":
            self._close()
        if self.temporary in _own_files:
            with contextlib.suppress(OSError):
                self.temporary.unlink(missing_ok=True)
            _own_files.discard(self.temporary)
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; it is renamed to `path` at the end, or removed if an exception is raised.

    See `PartialFile`. An existing file at `path` is replaced only by the final rename.

    Raises:
        OSError: The folder or file cannot be created, or the file cannot be renamed.
    """
    file = PartialFile(path)
    try:
        yield file.temporary
        file.commit()
    finally:
        file.discard()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; it is renamed to `path` at the end, or removed if an exception is raised.

    See `PartialFile`. A folder at `path` must be empty.

    Raises:
        OSError: The folder cannot be created or renamed.
    """
    target = _follow_links(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_once(target.parent)
    temporary, descriptor = _create(target, is_folder=True)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def private_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in an existing one, for this user only; it is removed at the end.

    As for other temporary files, the next process that creates one there removes those that killed processes left.

    Args:
        parent: The existing folder.
        name: First part of its name, after a dot.

    Raises:
        OSError: It cannot be created.
    """
    _clean_once(parent)
    folder, descriptor = _create(parent / name, is_folder=True, mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def is_partial_file(path: Path) -> bool:
    """Return whether a file is temporary, or in a temporary folder: it will have another name or be removed."""
    return any(_TEMPORARY_NAME.fullmatch(part) for part in path.parts)


def remove_partial_files(folder: Path) -> None:
    """Remove temporary files and folders that killed processes left; those that are being written stay."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY_NAME.fullmatch(entry.name) and not entry.is_symlink():
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(Path(entry.path))


def _clean_once(folder: Path) -> None:
    if folder not in _cleaned_folders:
        _cleaned_folders.add(folder)
        remove_partial_files(folder)


def _remove_if_abandoned(path: Path) -> None:
    descriptor = -1
    try:
        locked = None
        if sys.platform != "win32":
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            locked = _lock(descriptor)  # the lock of a process that ended is released
        is_old = time.time() - path.lstat().st_mtime > ABANDONED_AFTER_S
        if locked or (locked is None and is_old):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _create(target: Path, *, is_folder: bool = False, mode: int = 0o777) -> tuple[Path, int]:
    """Create a temporary file or folder of a target; return it and its descriptor, locked where locks exist, or -1."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    while True:
        name = f".{target.stem[:_MAX_STEM]}.{secrets.token_hex(8)}.partial{target.suffix}"
        temporary = target.with_name(name)
        try:
            if not is_folder:
                descriptor = os.open(temporary, flags, 0o666)
            else:
                temporary.mkdir(mode)
                if sys.platform == "win32":  # a folder cannot be opened
                    return temporary, -1
                descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        except FileExistsError:
            continue
        # Another process may have removed the file as abandoned before it was locked.
        if _lock(descriptor) is not False and _is_same_file(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed; return False if another process has locked it, `None` without locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _follow_links(path: Path) -> Path:
    """Return the file that a path refers to.

    Raises:
        OSError: Symbolic links refer to each other.
    """
    for _ in range(MAX_LINKS):
        path = Path(os.path.realpath(path.parent)) / path.name
        if not path.is_symlink() or _is_open_file(path):
            return path
        path = path.parent / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _is_open_file(path: Path) -> bool:
    """Return whether a path is an entry of /proc, to which /dev/stdout and /dev/fd/3 refer."""
    return path.parts[:2] == ("/", "proc")


def _is_special(path: Path) -> bool:
    """Return whether a path is a device, a pipe, a socket or an open file, which cannot be replaced."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return _is_open_file(path) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
