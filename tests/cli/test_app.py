"""The process of `y7`: exit codes, signals, and a standard output that is closed or full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from yolov7_deploy.cli.app import app
from yolov7_deploy.cli.options import announce_replacement, check_json_path
from yolov7_deploy.errors import UsageError

SHORT = ["train", "--show-hyp"]  # prints a few lines and imports no heavy library
TIMEOUT_S = 120.0


def y7(*arguments: str, shell_redirection: str = "", encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """Run a command through a shell, which can close or redirect its standard output."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {shell_redirection}', "sh", sys.executable, "-m", "yolov7_deploy", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )


@pytest.mark.parametrize("arguments", [SHORT, ["--help"], ["info", "yolov7", "--json", "-"]], ids=" ".join)
def test_a_full_standard_output_is_an_error_without_traceback(arguments):
    done = y7(*arguments, shell_redirection=">/dev/full")
    assert done.returncode == 1, done.stderr
    assert "Standard output cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_closed_standard_output_is_an_error_without_traceback():
    done = y7(*SHORT, shell_redirection=">&-")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "Standard output is closed" in done.stderr


def test_a_closed_standard_output_is_not_taken_by_the_next_file(tmp_path):
    done = y7("info", "yolov7", "--json", str(tmp_path / "a.json"), shell_redirection=">&-")
    assert done.returncode == 1
    if (tmp_path / "a.json").exists():
        json.loads((tmp_path / "a.json").read_text())


def test_all_standard_streams_may_be_closed():
    assert y7(*SHORT, shell_redirection="<&- >&- 2>&-").returncode == 1
    assert y7(*SHORT, shell_redirection="<&- 2>&-").returncode == 0


def test_a_reader_that_ends_early_is_an_exit_code_without_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "yolov7_deploy", *SHORT]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_foreign_texts_in_an_error_are_printed_as_text_in_every_encoding():
    name = os.fsdecode(b"\x1b]0;title\x07-\xff-\xe2\x80\xae.pt")
    for encoding in ("utf-8", "ascii"):
        done = y7("info", name, encoding=encoding)
        assert done.returncode == 1 and r"\x1b]0;title\x07-\udcff-\u202e.pt" in done.stderr, done.stderr
        assert "\x1b" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_cleanly_with_its_exit_code(tmp_path, number, exit_code):
    command = [sys.executable, "-m", "yolov7_deploy", "shapes", "-o", str(tmp_path / "data"), "--train", "100000"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore SIGINT, and `nohup` ignores SIGHUP.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not any(tmp_path.glob(".data.*/images/train/*.png")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, "Traceback" in err) == (exit_code, False), err
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_file_is_announced(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    for _ in range(2):
        with announce_replacement(path, to_stderr=False):
            path.write_text("new")
    assert capsys.readouterr().out == f"{path} existed and was replaced.\n"


@pytest.mark.parametrize("option", ["--json", "--predictions"])
def test_a_json_result_replaces_no_file_of_another_kind(tmp_path, option):
    path = tmp_path / "shapes.yaml"
    path.write_text("names: [a]\n")
    result = CliRunner().invoke(app, ["val", "--data", str(path), option, str(path)])
    assert isinstance(result.exception, UsageError) and "exists and is not JSON" in result.exception.message
    assert path.read_text() == "names: [a]\n"


@pytest.mark.parametrize("content", ["", " \n[1]", '{"a": 1}'])
def test_an_existing_json_file_and_a_device_can_be_results(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content)
    assert [check_json_path(text) for text in (str(path), os.devnull, "-", None)] == [str(path), os.devnull, "-", None]


@pytest.mark.parametrize("path", [".", "file/result.json"])
def test_a_json_path_that_cannot_be_written_is_an_error_before_the_work(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["doctor", "--json", path])
    assert isinstance(result.exception, UsageError) and "cannot be written" in result.exception.message
    assert result.output == ""
