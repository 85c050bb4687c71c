"""Bounded reading of files: the kind and the size are checked first, so that no file blocks or fills the memory.

Opening a named pipe waits for its writer, a device may never end, and a sparse file can be larger than any memory.
Every function raises `OSError` with the reason as `strerror`, so callers report it like a missing file.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

MAX_MODEL_BYTES = 2**31  # protobuf cannot be larger; the largest network has 0.8 GB in float32
MAX_CHECKPOINT_BYTES = 2**33  # E6E in float32 with moving average and optimizer state has 2.5 GB
MAX_IMAGE_BYTES = 2**30
MAX_DOCUMENT_BYTES = 2**26  # JSON, YAML and text, except annotation files

_BLOCK_BYTES = 2**20
# Without waiting: a path may become a named pipe between the check and the opening. Windows has neither flag.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(path: str | Path, *, max_bytes: int) -> int:
    """Return the size of a regular file in bytes, without opening it.

    Raises:
        OSError: It does not exist, is not a regular file (a folder, named pipe, socket or device), or is larger than
            `max_bytes`.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - `path` may be a string
    except ValueError as error:  # a null byte or a lone surrogate
        raise OSError(errno.EINVAL, "no file can have this name", ascii(path)) from error
    return _checked_size(path, status, max_bytes)


def open_file(path: str | Path, *, max_bytes: int) -> io.BufferedReader:
    """Open a regular file for reading; see `check_file` for the errors."""
    check_file(path, max_bytes=max_bytes)
    file: io.BufferedReader = io.BufferedReader(io.FileIO(os.open(path, _OPEN_FLAGS)))
    try:
        _checked_size(path, os.fstat(file.fileno()), max_bytes)
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: str | Path, *, max_bytes: int) -> bytes:
    """Return the content of a regular file; see `check_file` for the errors. Too little memory is an `OSError`, too."""
    blocks: list[bytes] = []
    total = 0
    try:
        with open_file(path, max_bytes=max_bytes) as file:
            step = os.fstat(file.fileno()).st_size + 1  # one block, unless the file grows or the size is unknown
            while block := file.read(step):
                blocks.append(block)
                total += len(block)
                if total > max_bytes:
                    raise _too_large(path, total, max_bytes)
                step = _BLOCK_BYTES
        return b"".join(blocks)
    except MemoryError as error:
        raise OSError(errno.ENOMEM, "there is too little memory to read it", str(path)) from error


def read_text(path: str | Path, *, max_bytes: int = MAX_DOCUMENT_BYTES, encoding: str = "utf-8") -> str:
    """Return the text of a regular file; see `read_bytes` for the errors.

    Raises:
        UnicodeDecodeError: It is not text in this encoding.
    """
    return read_bytes(path, max_bytes=max_bytes).decode(encoding)


def _checked_size(path: str | Path, status: os.stat_result, max_bytes: int) -> int:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for matches, name in _KINDS if matches(status.st_mode)), "of another kind")
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, f"it is {kind}, not a file", str(path))
    if status.st_size > max_bytes:
        raise _too_large(path, status.st_size, max_bytes)
    return status.st_size


def _too_large(path: str | Path, size: int, max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"it has {size} bytes, more than the {max_bytes} of any such file", str(path))
