"""Files that are there complete or not at all, whenever a program is stopped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name, to be written under; it becomes `path` at the end, or is removed if anything is raised.

    The name is in the same folder, which is made, and has the same suffix. What was called `path` before stays until
    then.

    Raises:
        OSError: The folder cannot be made, or the file cannot get its name.
    """
    unfinished = unfinished_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError, ValueError):  # what is called a folder may be a file
            unfinished.unlink(missing_ok=True)


def unfinished_name(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


def remove_unfinished(path: Path) -> None:
    """Removes what killed processes have left of `path`; nobody else may be writing it now."""
    before, after = f".{path.stem}.", f".partial{path.suffix}"
    with contextlib.suppress(OSError):
        for found in path.parent.iterdir():
            number = found.name.removeprefix(before).removesuffix(after)
            if found.name == f"{before}{number}{after}" and number.isdecimal():
                found.unlink(missing_ok=True)
