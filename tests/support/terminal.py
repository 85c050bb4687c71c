"""A real pseudo-terminal, and what a user sees in it after all escape sequences."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

COLUMNS = 100
TIMEOUT_S = 120.0


def run_in_terminal(
    command: Sequence[str], *, cwd: Path | None = None, stdout: int | None = None, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Return exit code and output of a program whose streams are a terminal, except `stdout` if it is given."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment = {**inherited, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), **(env or {})}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave if stdout is None else stdout, stderr=slave, cwd=cwd, env=environment
    )
    os.close(slave)
    parts = []
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the program has closed the terminal
            break
        if not data:
            break
        parts.append(data)
    os.close(master)
    return process.wait(timeout=TIMEOUT_S), b"".join(parts).decode().replace("\r\n", "\n")


def visible(output: str) -> list[str]:
    """Return the lines that remain on the screen: text before `erase line` is gone, colours have no width."""
    lines = [re.split(r"\r\x1b\[2K", line)[-1] for line in output.split("\n")]
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
