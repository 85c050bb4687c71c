"""Output for people and for programs: tables, progress lines, counts with their nouns, JSON documents."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._output import StatusLine, is_quiet, is_terminal, write_stdout
from yolov7_deploy._text import json_escape, printable_line
from yolov7_deploy.errors import UsageError

PLAIN_INTERVAL_S = 10.0  # between progress lines in a pipe
BAR_INTERVAL_S = 0.1  # between updates of a bar
BAR_WIDTH = 24


def table(rows: Sequence[Sequence[object]], columns: Sequence[str], title: str = "") -> str:
    """Return a table as text: with lines for a terminal, as plain aligned columns for a pipe.

    Columns of numbers are aligned to the right. Format floats before; `None` becomes a dash. Unprintable characters
    become escapes, and the text itself has no escape sequences, so that it can be passed to `echo`.

    Args:
        rows: One sequence of cells per row, as long as `columns`.
        columns: Headings.
        title: A line above the table; left out when empty.
    """
    cells = [["-" if cell is None else printable_line(cell) for cell in row] for row in rows]
    columns, title = [printable_line(name) for name in columns], printable_line(title)
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    if sys.stdout is not None and sys.stdout.isatty():
        return _pretty_table(cells, columns, numeric, title)
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in [list(columns), *cells]
    ]
    return "\n".join([title, *lines] if title else lines)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: `1 image`, `2 images`, `2 boxes`, `2 GPUs`.

    For nouns of this package only. Do not use it for class names, which come from anywhere: write `bus: 2`.
    """
    if count == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return f"{count:,} {noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """Return a duration as `4:05` (minutes and seconds) or `1:02:03`."""
    hours, rest = divmod(round(max(seconds, 0)), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _pretty_table(cells: Sequence[Sequence[str]], columns: Sequence[str], numeric: Sequence[bool], title: str) -> str:
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, right in zip(columns, numeric, strict=True):
        drawn.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*map(Text, row))
    stream = io.StringIO()
    Console(file=stream, color_system=None, width=Console().width).print(drawn)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "\n".join([*([title] if title else []), *filter(None, lines)])


def _is_number(text: str) -> bool:
    return text == "-" or text.lstrip("+-").rstrip("%x").replace(".", "", 1).isdigit()


def write_json(document: object, path: str | Path) -> None:
    """Write one JSON document with sorted keys; the same document gives the same bytes. `-` is standard output.

    The file is written atomically, and missing folders are created. Dataclasses, paths and NumPy values become plain
    data. NaN and infinity, which JSON does not have, become `null`. Control characters and names that are not valid
    Unicode become escapes that parse to the same text.

    Raises:
        UsageError: The path cannot be written.
        ValueError: The document has a type that is not plain data.
    """
    text = json_text(document, indent=1) + "\n"
    if str(path) != "-":
        write_text(Path(path), text)
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    write_stdout(text if encoding.lower().startswith("utf") else json.dumps(json.loads(text), indent=1) + "\n")


def json_text(document: object, *, indent: int | None = None) -> str:
    """Return a document as JSON, as `write_json` writes it."""

    def dump(value: object) -> str:
        return json.dumps(value, sort_keys=True, indent=indent, ensure_ascii=False, allow_nan=False, default=_plain)

    try:
        return json_escape(dump(document))
    except ValueError:  # is raised for NaN, infinity and types that are not plain data
        return json_escape(dump(_without_nan(document)))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; missing folders are created.

    Raises:
        UsageError: The path cannot be written.
    """
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.", fix="Choose another path.") from error


def _without_nan(value: object) -> object:
    """Return plain data with `None` for every float that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return _without_nan(_plain(value))


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(f"{type(value).__name__} is not plain data")


@contextlib.contextmanager
def progress(what: str, *, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that shows progress: a bar on a terminal, a line every ten seconds in a pipe.

    Progress is written to standard error; standard output is for results. A total of 0 is unknown and not shown.

    Args:
        what: The work, as `validate`.
        unit: `MB` for bytes, `%` where only the fraction has a meaning; otherwise items are counted.
    """
    with progress_with_note(what, unit=unit) as show:
        yield lambda done, total: show(done, total, "")


@contextlib.contextmanager
def progress_with_note(what: str, *, unit: str = "") -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function of (done, total, note), as `progress` does; the note is shown after the numbers."""
    output = sys.stderr
    if output is None or is_quiet():
        yield lambda done, total, note: None
    elif is_terminal(output):
        with StatusLine(output) as line:
            line.show(printable_line(what))
            show_bar = functools.partial(_bar, what, unit, unicode="utf" in (output.encoding or "utf").lower())
            yield _limited(lambda *state: line.show(show_bar(*state)), interval_s=BAR_INTERVAL_S)
    else:
        yield _limited(lambda *state: _write_line(output, _plain_line(what, unit, *state)), interval_s=PLAIN_INTERVAL_S)


def _limited(show: Callable[[int, int, str, float], None], *, interval_s: float) -> Callable[[int, int, str], None]:
    """Return a function that shows the last update, and others if the last one shown is this many seconds old."""
    start = time.monotonic()
    last = start if interval_s >= 1 else -math.inf

    def update(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if 0 < total <= done or now - last >= interval_s:
            last = now
            show(done, total, note, now - start)

    return update


def _bar(what: str, unit: str, done: int, total: int, note: str, seconds: float, *, unicode: bool) -> str:
    filled = round(BAR_WIDTH * min(1.0, done / total)) if total else 0
    full, empty = "━─" if unicode else "#-"
    left = f"{duration(seconds * (total - done) / done)} left" if 0 < done < total else ""
    numbers = [_amount(done, total, unit), _rate(done, unit, seconds), left, note]
    return printable_line("  ".join([f"{what} {full * filled}{empty * (BAR_WIDTH - filled)}", *filter(None, numbers)]))


def _plain_line(what: str, unit: str, done: int, total: int, note: str, seconds: float) -> str:
    rate = _rate(done, unit, seconds)
    return printable_line(f"{what}: {_amount(done, total, unit)}{', ' * bool(rate)}{rate}  {note}".rstrip())


def _amount(done: int, total: int, unit: str) -> str:
    if unit == "%":
        return f"{100 * done // max(total, 1)} %"
    if unit == "MB":
        return f"{done / 1e6:.1f}{f'/{total / 1e6:.1f}' if total else ''} MB"
    return f"{done}/{total}" if total else str(done)


def _rate(done: int, unit: str, seconds: float) -> str:
    if not done or unit == "%":
        return ""
    rate = done / max(seconds, 1e-9) / (1e6 if unit == "MB" else 1)
    return f"{rate:.1f}{unit}/s" if rate >= 1 or unit else f"{1 / rate:.1f} s each"


def _write_line(stream: TextIO, line: str) -> None:
    with contextlib.suppress(OSError):
        stream.write(line + "\n")
        stream.flush()
