"""Standard output and standard error: printable texts, and defined behaviour if they are closed or full."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys

from yolov7_deploy._text import printable
from yolov7_deploy.errors import UsageError

OTHER_OUTPUT = "Redirect it to a file on a disk with free space, or write the result with --json FILE."
_FAILURES = {errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT}
_STREAMS = 3  # standard input, output and error


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
    elif sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(line)
            sys.stderr.flush()


def write_stdout(text: str) -> None:
    """Write a text to standard output and flush it.

    Raises:
        UsageError: Standard output is closed, or the disk it is redirected to is full.
        BrokenPipeError: The program that reads standard output has ended.
    """
    if sys.stdout is None:
        raise UsageError("Standard output is closed, so the result cannot be printed.", fix=OTHER_OUTPUT)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"Standard output cannot be written: {error.strerror or error}.", fix=OTHER_OUTPUT) from error


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
