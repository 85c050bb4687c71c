"""`y7 score`: options, terminal output and exit codes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.support.sample_images import grey
from yolov7_deploy.cli.app import app
from yolov7_deploy.errors import SourceError, UsageError
from yolov7_deploy.visualize import write_image


@pytest.fixture
def images(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "images" / name, grey())
    (tmp_path / "images" / "broken.png").write_bytes(b"")
    (tmp_path / "images" / "notes.pdf").write_bytes(b"")
    return tmp_path / "images"


def y7(*arguments):
    return CliRunner().invoke(app, ["score", *map(str, arguments)])


def test_the_command_prints_counts_and_names_what_it_could_not_read(images, tmp_path, files):
    output = tmp_path / "out"
    line = ["--input", images, "--output", output, "--weights", files("plugin"), "--device", "cpu", "--json", "-"]
    done = y7(*line)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["images"] == 3
    assert "Left out: 1 x .pdf" in done.stderr
    assert "Unreadable: " in done.stderr and "broken.png is empty (0 bytes)." in done.stderr
    assert "1 unreadable; 1 file in" in done.stderr
    again = y7(*line[:-2])
    assert "1 file (1 file existed) in" in again.stdout


@pytest.mark.parametrize(
    "options,kind,says",
    [
        (["--conf", "2"], UsageError, "conf must be between 0 and 1"),
        (["--shard-size", "0"], UsageError, "--shard-size must be at least 1"),
        (["--address", "auto"], UsageError, "--address has no effect without workers of Ray"),
        (["--column", "image"], UsageError, "--column names a column of a Parquet file"),
        (["--input", "gone"], SourceError, "gone does not exist"),
    ],
)
def test_mistakes_are_errors_before_the_work(images, tmp_path, options, kind, says):
    done = y7("--input", images, "--output", tmp_path / "out", "--weights", "w.onnx", *options)
    assert isinstance(done.exception, kind) and says in done.exception.message
    assert not (tmp_path / "out").exists()
