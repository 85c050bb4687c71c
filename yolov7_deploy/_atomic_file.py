"""Atomic file writes: a file is complete or absent, whenever the program is stopped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; it is renamed to `path` at the end, or removed if an exception is raised.

    The temporary file is in the same folder, which is created, and has the same suffix. An existing file at `path`
    is replaced only by the final rename.

    Raises:
        OSError: The folder cannot be created, or the file cannot be renamed.
    """
    temporary = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError, ValueError):  # a parent may be a file instead of a folder
            temporary.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Return the temporary path under which this process writes `path`."""
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


def remove_partial_files(path: Path) -> None:
    """Remove temporary files of `path` that killed processes left; no other process may be writing it."""
    before, after = f".{path.stem}.", f".partial{path.suffix}"
    with contextlib.suppress(OSError):
        for found in path.parent.iterdir():
            number = found.name.removeprefix(before).removesuffix(after)
            if found.name == f"{before}{number}{after}" and number.isdecimal():
                found.unlink(missing_ok=True)
