"""Tables, progress lines, plurals and JSON documents."""

import contextlib
import errno
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.support.child_processes import in_forked_child
from tests.support.terminal import run_in_terminal, visible
from yolov7_deploy import _output
from yolov7_deploy._console import plural, progress, table, write_json, write_text
from yolov7_deploy._output import echo, note, set_verbosity
from yolov7_deploy.errors import UsageError


@dataclass(frozen=True)
class Point:
    x: float


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_tables_align_numbers_to_the_right(capsys):
    text = table([["cat", 5], ["tiger", 12]], ["class", "n"], "Animals")
    assert text == "Animals\nclass   n\ncat     5\ntiger  12"


def test_missing_values_are_dashes_and_do_not_turn_a_column_into_text(capsys):
    assert table([["a", None], ["b", "0.5"]], ["k", "v"]) == "k    v\na    -\nb  0.5"


def test_a_table_without_rows_still_has_a_heading(capsys):
    assert table([], ["a", "b"]) == "a  b"


def test_pretty_tables_do_not_interpret_markup():
    with contextlib.redirect_stdout(Terminal()):
        assert "[bold]" in table([["[bold]"]], ["name"], "T")


def test_a_pipe_gets_the_plain_table(capsys):
    assert "\x1b" not in table([["a"]], ["k"])


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (2, "GPU", "2 GPUs"),
        (2, "box", "2 boxes"),
        (2, "class", "2 classes"),
        (1, "class", "1 class"),
        (2, "entry", "2 entries"),
        (2, "key", "2 keys"),
        (1234, "file", "1,234 files"),
    ],
)
def test_a_count_is_followed_by_the_singular_or_plural_noun(count, noun, text):
    assert plural(count, noun) == text


def test_json_keys_are_sorted_and_the_bytes_reproducible(tmp_path):
    path = tmp_path / "deep/er/a.json"
    document = {"b": np.float32(0.5), "a": [np.int64(2), Path("x"), Point(1)], "c": np.zeros(2)}
    write_json(document, path)
    first = path.read_bytes()
    write_json(dict(reversed(document.items())), path)
    assert path.read_bytes() == first
    assert json.loads(first) == {"a": [2, "x", {"x": 1}], "b": 0.5, "c": [0, 0]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_dash_is_standard_output(capsys):
    write_json({"a": 1}, "-")
    assert json.loads(capsys.readouterr().out) == {"a": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf, np.float32("nan")])
def test_numbers_that_json_does_not_have_are_null(tmp_path, value):
    document = {"a": value, "b": [1.5, {"c": (value, "text")}], "d": np.array([value, 1]), "e": Point(value)}
    write_json(document, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result == {"a": None, "b": [1.5, {"c": [None, "text"]}], "d": [None, 1.0], "e": {"x": None}}


@pytest.mark.parametrize("name", ["photo\udcff.jpg", "\x1b]0;title\x07", "\u202egpj.exe", "\x9b31m", "\x7f"])
def test_names_that_cannot_be_printed_are_escaped_in_json_without_loss(tmp_path, capsys, name):
    for path in (tmp_path / "a.json", "-"):
        write_json({name: [name]}, path)
    for text in ((tmp_path / "a.json").read_text(encoding="utf-8"), capsys.readouterr().out):
        assert name not in text and json.loads(text) == {name: [name]}


def test_json_on_a_standard_output_without_unicode_is_still_json(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", stream)
    write_json({"name": "猫 ü"}, "-")
    assert json.loads(stream.buffer.getvalue()) == {"name": "猫 ü"}


def test_a_document_that_is_not_plain_data_keeps_the_existing_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="plain data"):
        write_json({"a": object()}, path)
    assert path.read_text() == "old"


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json({}, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_writing_json_to_a_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        write_json({}, tmp_path)


def test_a_text_file_below_a_file_is_a_usage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write_text(tmp_path / "file" / "a.txt", "text")


def test_progress_in_a_pipe_is_a_plain_last_line():
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), progress("val") as show:
        show(1, 4)
        show(4, 4)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1 and lines[0].startswith("val: 4/4, ")


def test_progress_on_a_terminal_is_a_bar_that_disappears():
    stream = Terminal()
    with contextlib.redirect_stderr(stream), progress("val") as show:
        show(1, 4)
    assert "━━━━━━──────────────────  1/4" in stream.getvalue()
    assert visible(stream.getvalue()) == [""]


@pytest.mark.parametrize(
    ("unit", "done", "total", "text"), [("%", 3, 8, "37 %"), ("MB", 2_500_000, 10**7, "2.5/10.0 MB"), ("", 3, 8, "3/8")]
)
def test_progress_has_the_unit_of_the_work(unit, done, total, text):
    stream = Terminal()
    with contextlib.redirect_stderr(stream), progress("work", unit=unit) as show:
        show(done, total)
    assert f"  {text}" in stream.getvalue()


@pytest.mark.parametrize(("done", "seconds", "text"), [(4, 2.0, "2.0/s"), (2, 2.0, "1.0/s"), (1, 25.0, "25.0 s each")])
def test_progress_says_how_many_are_done_in_a_second_or_how_long_each_takes(monkeypatch, done, seconds, text):
    clock = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr("yolov7_deploy._console.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), progress("work") as show:
        show(done, done)
    assert stream.getvalue() == f"work: {done}/{done}, {text}\n"


def test_an_unknown_total_is_not_shown():
    stream = Terminal()
    with contextlib.redirect_stderr(stream), progress("download", unit="MB") as show:
        show(10**6, 0)
    assert "  1.0 MB  " in stream.getvalue()
    with contextlib.redirect_stderr(stream), progress("detect") as show:
        show(12, 0)
    assert "  12  " in stream.getvalue()


def test_a_bar_is_cut_at_the_width_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    with contextlib.redirect_stderr(stream), progress("x" * 50) as show:
        show(1, 2)
    assert max(map(len, re.split(r"\r\x1b\[2K", stream.getvalue()))) == 29


MESSAGES = """
import sys, time
from yolov7_deploy._console import progress
from yolov7_deploy._output import echo, prepare_streams
prepare_streams()
with progress("outer") as outer:
    outer(1, 4)
    with progress("inner") as inner:
        inner(1, 2)
        echo("a result")
        echo("a message", err=True)
    outer(2, 4)
    echo("another result")
"""


def test_messages_are_whole_lines_above_the_bars():
    code, output = run_in_terminal([sys.executable, "-c", MESSAGES])
    assert code == 0
    assert visible(output) == ["a result", "a message", "another result", ""]
    assert "inner ━" in output and "outer ━" in output


def test_results_in_a_file_do_not_go_to_the_terminal_while_a_bar_is_shown(tmp_path):
    with (tmp_path / "out.txt").open("wb") as file:
        code, output = run_in_terminal([sys.executable, "-c", MESSAGES], stdout=file.fileno())
    assert code == 0
    assert (tmp_path / "out.txt").read_text() == "a result\nanother result\n"
    assert visible(output) == ["a message", ""]


def test_a_quiet_program_prints_results_only(capsys):
    set_verbosity(quiet=True)
    try:
        note("message")
        note("message", err=True)
        echo("result")
        stream = Terminal()
        with contextlib.redirect_stderr(stream), progress("val") as show:
            show(1, 4)
    finally:
        set_verbosity()
    assert capsys.readouterr() == ("result\n", "") and stream.getvalue() == ""


@pytest.mark.parametrize(("verbose", "levels"), [(0, [30]), (1, [20, 30]), (2, [10, 20, 30])])
def test_the_log_is_printed_on_request(verbose, levels):
    script = (
        "from yolov7_deploy._output import prepare_streams, set_verbosity; prepare_streams();"
        f"set_verbosity(verbose={verbose}); import logging; log = logging.getLogger('yolov7_deploy.x');"
        "[log.log(level, str(level)) for level in (10, 20, 30)]"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stderr.splitlines()] == levels


def test_a_forked_child_leaves_the_bar_to_its_parent():
    stream = Terminal()
    with contextlib.redirect_stderr(stream), progress("val"):
        assert in_forked_child(lambda: len(_output._status_lines)) == 0
    assert len(_output._status_lines) == 0


@pytest.mark.parametrize("output", [Terminal(), io.StringIO()])
def test_tables_have_no_escape_sequences_whatever_their_cells(output):
    with contextlib.redirect_stdout(output):
        text = table([["\x1b[31mred\x1b[0m", "a\nb"], ["\u202eevil", "\udcff"]], ["\x1b]0;t", "b"], "\x1b[2J")
    assert "\x1b" not in text and "\u202e" not in text and "\udcff" not in text
    assert r"\x1b[31mred\x1b[0m" in text and r"a\nb" in text


def test_printed_texts_show_escape_sequences_instead_of_sending_them(capsys):
    for err in (False, True):
        echo("name \x1b]0;title\x07 \u202e \udcff\nnext line", err=err)
    for text in capsys.readouterr():
        assert text == "name \\x1b]0;title\\x07 \\u202e \\udcff\nnext line\n"


class FullDisk(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_standard_output_is_a_usage_error_and_a_full_standard_error_is_ignored(monkeypatch):
    monkeypatch.setattr("sys.stdout", FullDisk())
    monkeypatch.setattr("sys.stderr", FullDisk())
    echo("lost", err=True)
    for function in (echo, lambda text: write_json(text, "-")):
        with pytest.raises(UsageError, match="Standard output cannot be written: No space left"):
            function("result")


def test_a_closed_standard_output_is_a_usage_error_and_a_closed_standard_error_is_ignored(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    echo("lost", err=True)
    with progress("val") as show:
        show(4, 4)
    assert table([["a"]], ["k"]) == "k\na"
    for function in (echo, lambda text: write_json(text, "-")):
        with pytest.raises(UsageError, match="closed"):
            function("result")


class DeadTerminal(Terminal):
    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("stream", [DeadTerminal(), FullDisk()])
def test_progress_on_a_terminal_that_was_closed_does_not_stop_the_work(stream):
    with contextlib.redirect_stderr(stream), progress("\x1bval") as show:
        show(1, 4)
        show(4, 4)
