"""Standard output and standard error: printable texts above a status line, and closed or full streams."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from yolov7_deploy._text import get_logger, printable
from yolov7_deploy.errors import UsageError, Y7Error

OTHER_OUTPUT = "Redirect it to a file on a disk with free space, or write the result with --json FILE."
_FAILURES = {errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT}
_STREAMS = 3  # standard input, output and error
_ERASE_LINE = "\r\x1b[2K"
_quiet, _verbose = False, 0


def echo(text: str = "", *, err: bool = False) -> None:
    """Print a text and a line break; control characters and other unprintable ones are shown as escapes.

    Args:
        text: One or more lines.
        err: Print to standard error. If the reader is gone, as after the terminal was closed, the text is lost.

    Raises:
        UsageError: Standard output is closed, or the disk it is redirected to is full.
        BrokenPipeError: The program that reads standard output has ended.
    """
    line = printable(text) + "\n"
    if not err:
        write_stdout(line)
    else:
        _write_stderr(line)


def note(text: str = "", *, err: bool = False) -> None:
    """Print a text as `echo` does, unless only results, warnings and errors are wanted (`-q`)."""
    if not _quiet:
        echo(text, err=err)


def set_verbosity(*, quiet: bool = False, verbose: int = 0) -> None:
    """Choose what a program prints.

    Args:
        quiet: Print only results, warnings and errors: no messages, no progress.
        verbose: 1 prints the log of this package and the traceback of errors, 2 also its debug messages.
    """
    global _quiet, _verbose
    _quiet, _verbose = quiet, verbose
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    get_logger("yolov7_deploy").setLevel(level)
    if logging.lastResort is not None:
        logging.lastResort.setLevel(level)


def is_quiet() -> bool:
    """Return whether messages and progress are left out."""
    return _quiet


def is_verbose() -> bool:
    """Return whether the log is printed."""
    return _verbose > 0


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal that understands escape sequences."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def print_error(kind: str, error: Y7Error) -> None:
    """Print an error and its fix to standard error, in colours on a terminal unless `NO_COLOR` is set."""
    is_coloured = is_terminal(sys.stderr) and not os.environ.get("NO_COLOR")
    red, cyan, end = ("\x1b[1;31m", "\x1b[36m", "\x1b[0m") if is_coloured else ("", "", "")
    fix = f"\n{cyan}{error.fix}{end}" if error.fix else ""
    _write_stderr(f"{red}{kind}:{end} {error.message}{fix}\n")


def write_stdout(text: str) -> None:
    """Write a text to standard output and flush it.

    Raises:
        UsageError: Standard output is closed, or the disk it is redirected to is full.
        BrokenPipeError: The program that reads standard output has ended.
    """
    if sys.stdout is None:
        raise UsageError("Standard output is closed, so the result cannot be printed.", fix=OTHER_OUTPUT)
    try:
        with _above_status_line():
            sys.stdout.write(text)
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"Standard output cannot be written: {error.strerror or error}.", fix=OTHER_OUTPUT) from error


def _write_stderr(text: str) -> None:
    if sys.stderr is not None:
        with _above_status_line(), contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


class StatusLine:
    """The last line of a terminal, for progress; everything that `echo` prints appears above it.

    Use it as a context manager. Of nested ones, the innermost is shown.

    Args:
        stream: The terminal; it is never an error if it cannot be written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text = stream, ""

    def __enter__(self) -> StatusLine:
        with _above_status_line():
            _status_lines.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        with _above_status_line():
            _status_lines.remove(self)

    def show(self, text: str) -> None:
        """Replace the text of the line, which is cut at the width of the terminal."""
        with _above_status_line():
            self._text = text[: shutil.get_terminal_size().columns - 1]

    def write(self, text: str) -> None:
        """Write to the terminal."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()

    def draw(self) -> None:
        """Write the line."""
        self.write(self._text)


_status_lines: list[StatusLine] = []
_lock = threading.RLock()


@contextlib.contextmanager
def _above_status_line() -> Iterator[None]:
    """Erase the status line, if there is one, and draw it again after the block."""
    with _lock:
        if _status_lines:
            _status_lines[-1].write(_ERASE_LINE)
        try:
            yield
        finally:
            if _status_lines:
                _status_lines[-1].draw()


def _forget_status_lines() -> None:
    """Leave the terminal to the parent process."""
    global _lock
    _lock = threading.RLock()
    _status_lines.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_status_lines)


def prepare_streams() -> None:
    """Prepare the standard streams of a program, before anything opens a file.

    A closed stream is occupied by the null device: the next file would take its number, and would get what libraries
    print. Characters that the encoding of a stream lacks become escapes. Warnings in the log are printable.
    """
    for descriptor in range(_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.lastResort = _EchoHandler(logging.WARNING)  # is used if the user has not set up logging


def finish_output(exit_code: int) -> int:
    """Flush standard output at the end of a program and return the exit code, 1 if the output could not be written.

    What cannot be written is dropped, because Python would otherwise try again at exit and report it.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        return exit_code
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and exit_code == 0:
            echo(f"Standard output cannot be written: {error.strerror or error}.", err=True)
        null = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return exit_code or 1


def is_output_failure(error: OSError) -> bool:
    """Return whether an error of the system is about a standard stream rather than about a file with a name."""
    return error.filename is None and error.errno in _FAILURES


class _EchoHandler(logging.Handler):
    """Prints log messages to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message."""
        echo(self.format(record), err=True)
