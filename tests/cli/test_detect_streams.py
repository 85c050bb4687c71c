"""`y7 detect` with several sources: what is printed and written, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.support.cameras import WAIT_S, cameras
from tests.support.sample_images import CONF, noise
from yolov7_deploy.cli.detect import detect
from yolov7_deploy.errors import MissingLibraryError, SourceError, UsageError
from yolov7_deploy.sources.video import VideoFile, VideoWriter
from yolov7_deploy.visualize import write_image

needs_prometheus = pytest.mark.skipif(
    importlib.util.find_spec("prometheus_client") is None, reason="pip install 'yolov7-deploy[metrics]'"
)


@pytest.fixture
def weights(files):
    return files("plugin", batch=None)


@pytest.fixture
def sources(tmp_path):
    """Two videos of 3 and 2 frames, and an image."""
    paths = []
    for name, frames in (("a.mp4", 3), ("b.mp4", 2)):
        writer = VideoWriter(tmp_path / "in" / name, fps=10, hw=(128, 192))
        for number in range(frames):
            writer.write(noise(128, 192, number))
        paths.append(writer.finish())
    write_image(tmp_path / "in" / "c.png", noise(90, 60))
    return [*paths, tmp_path / "in" / "c.png"]


@pytest.fixture
def run(weights, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(detect)

    def invoke(*arguments):
        return CliRunner().invoke(app, ["--weights", str(weights), "--conf", str(CONF), *map(str, arguments)])

    return invoke


def options_of(sources):
    return [part for source in sources for part in ("--source", source)]


def test_several_sources_have_a_result_each_and_a_table_at_the_end(run, sources, tmp_path):
    result = run(*options_of(sources), "--json", tmp_path / "r.json")
    assert result.exception is None, result.output
    found = sorted(path.name for path in Path("runs/detect/exp").iterdir() if not path.name.startswith("."))
    assert found == ["a.mp4", "b.mp4", "c.png"]
    lines = result.stdout.splitlines()
    table = lines.index(next(line for line in lines if line.startswith("stream")))
    assert [line.split()[:4] for line in lines[table + 1 : table + 4]] == [
        [str(number), str(path), "ended", str(frames)]
        for number, (path, frames) in enumerate(zip(sources, (3, 2, 1), strict=True))
    ]
    assert lines[-1] == "Results saved to runs/detect/exp"
    assert any(line.startswith(f"{sources[2]}: ") for line in lines)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["frames"] == len(record["images"]) == 6
    assert [one["frames"] for one in record["streams"]] == [3, 2, 1]


def test_a_text_list_of_several_cameras_is_like_several_sources(run, tmp_path):
    (tmp_path / "cameras.txt").write_text("http://127.0.0.1:9/one.mjpg\nhttp://127.0.0.1:9/two.mjpg\n")
    result = run("--source", "cameras.txt", "--reconnects", 0, "--nosave")
    assert isinstance(result.exception, SourceError)
    assert "one.mjpg" in result.exception.message and "two.mjpg" in result.exception.message
    assert not (tmp_path / "runs").exists()


def test_events_on_standard_output_are_nothing_but_json(run, sources):
    result = run(*options_of(sources[:2]), "--nosave", "--jsonl", "-")
    assert result.exception is None, result.output
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["event"] for one in records].count("frame") == 5
    assert (records[0]["event"], records[-1]["event"]) == ("run", "end")
    assert records[0]["thresholds"]["conf"] == pytest.approx(CONF)
    assert "stream" in result.stderr


def test_a_single_source_with_an_event_log_is_handled_like_several(run, sources, tmp_path):
    for _ in range(2):
        assert run("--source", sources[0], "--nosave", "--jsonl", "e.jsonl").exception is None
    events = [json.loads(line)["event"] for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert events == ["run", "running", *["frame"] * 3, "ended", "end"] * 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--json", "-", "--jsonl", "-"], "cannot both write"),
        (["--jsonl", "/proc/none/e.jsonl"], "cannot be written"),
        (["--batch", 0], "--batch"),
        (["--max-age", 0], "--max-age"),
        (["--reconnects", -1], "--reconnects"),
        pytest.param(["--metrics-port", 70000], "not a port", marks=needs_prometheus),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(run, sources, tmp_path, wrong, message):
    result = run(*options_of(sources), *wrong)
    assert isinstance(result.exception, UsageError)
    assert message in result.exception.message
    assert not (tmp_path / "runs").exists()


def test_metrics_without_their_library_name_the_extra(run, sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "yolov7_deploy.workflows.metrics", raising=False)
    result = run(*options_of(sources), "--metrics-port", 0)
    assert isinstance(result.exception, MissingLibraryError)
    assert result.exception.fix == "pip install 'yolov7-deploy[metrics]'"


@needs_prometheus
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_all_outputs_properly(weights, tmp_path, number):
    with cameras(2) as (first, second):
        command = [sys.executable, "-m", "yolov7_deploy", "detect", "--weights", str(weights), "--conf", str(CONF)]
        results = ["--save-dir", "out", "--jsonl", "e.jsonl", "--json", "r.json", "--metrics-port", "0"]
        process = subprocess.Popen(
            [*command, "--source", first.address, "--source", second.address, *results],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("Metrics: "))
        log = tmp_path / "e.jsonl"
        while not log.exists() or log.read_text().count('"frame"') < 10:
            assert process.poll() is None
        with urllib.request.urlopen(line.split()[1], timeout=WAIT_S) as response:
            assert b"y7_frames_processed_total" in response.read()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + number, stderr
    assert "Results saved to out" in stdout and "Traceback" not in stderr
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[-1]["event"] == "end" and records[-1]["reason"] == signal.Signals(number).name
    videos = sorted((tmp_path / "out").glob("*.mp4"))
    assert len(videos) == 2
    for path in videos:
        with VideoFile(str(path)) as video:
            assert len(list(video.read())) == video.info.frames > 0
    assert json.loads((tmp_path / "r.json").read_text())["stopped"] is True
