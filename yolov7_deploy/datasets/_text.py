"""Words of other people's files: in our messages printable and short, however long or deep they are; as paths."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from pathlib import Path

MAX_SHOWN = 10
MAX_CHARACTERS = 200

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def shown(value: object) -> str:
    """A value as Python writes it, the middle left out where it is long."""
    return _REPR.repr(value)[:MAX_CHARACTERS]


def short(text: str) -> str:
    """A text without quotes, cut off where it is long."""
    cut = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."
    return printable(cut)


def reason(error: Exception) -> str:
    """Why something was refused; parsers quote all that they read."""
    return short(str(error))


def some(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(map(shown, names[:MAX_SHOWN])) + more


def printable(text: str) -> str:
    """The text without lone surrogates, which could not be printed or written."""
    return text.encode("utf-8", "replace").decode()


def exists(path: Path) -> bool:
    """Whether there is a file or folder; `Path.exists` raises where a name is too long for any."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Whether there is a file; `Path.is_file` raises where a name is too long for any."""
    return os.path.isfile(path)  # noqa: PTH113
