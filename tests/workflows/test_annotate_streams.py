"""Results of streams: one video for each source, at its true speed, the event log, and the metrics."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import socket
import time
import urllib.request
from pathlib import Path

import pytest

from tests.support.cameras import WAIT_S, cameras, detect_slowly
from tests.support.sample_images import grey
from yolov7_deploy._output_folder import MARKER
from yolov7_deploy._process import raise_interrupted
from yolov7_deploy.errors import SourceError, UsageError
from yolov7_deploy.sources.streams import StreamOptions, resolve_streams
from yolov7_deploy.sources.video import VideoFile, VideoWriter
from yolov7_deploy.streams import Streams
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.event_log import EventLog, append_lines
from yolov7_deploy.workflows.predict import AnnotateOptions, PredictionReport, annotate_streams


def make_video(path, frames=5, *, fps=10.0):
    writer = VideoWriter(path, fps=fps, hw=(48, 64))
    for number in range(frames):
        writer.write(grey(number * 5))
    return str(writer.finish())


def open_streams(sources, *, batch_s=0.0, **options):
    return Streams(
        resolve_streams(sources, on_error="skip"),
        detect_slowly(batch_s)[0],
        options=StreamOptions(**{"reconnect_wait_s": 0.05, **options}),
        max_batch=8,
        max_age_s=5.0,
    )


def files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return sorted(str(path.relative_to(folder)) for path in paths)


def video_info(path):
    with VideoFile(str(path)) as video:
        return video.info


def stop_after(seconds, number=signal.SIGTERM):
    """Return a function for `on_frame` that sends a signal to this process after some seconds of frames."""
    begin = []

    def on_frame(frame, detections):
        begin.append(time.monotonic())
        if begin[-1] - begin[0] > seconds:
            os.kill(os.getpid(), number)

    return on_frame


def test_each_camera_has_a_video_that_plays_at_its_true_speed(tmp_path):
    lines: list[str] = []
    with cameras(2, fps=25) as (first, second), raise_interrupted():
        streams = open_streams([first.address, second.address], batch_s=0.15)  # about 7 frames per second
        report = annotate_streams(
            streams,
            options=AnnotateOptions(save_dir=tmp_path / "out", save_txt=True),
            event_log=EventLog(lines.append),
            on_frame=stop_after(0.6),
        )
    assert (report.stopped, report.stopped_by) == (True, signal.SIGTERM)
    ports = [camera.address.rpartition(":")[2].partition("/")[0] for camera in (first, second)]
    records = [json.loads(line) for line in lines]
    for stream, port in enumerate(ports):
        times = [one["timestamp_s"] for one in records if one["event"] == "frame" and one["stream"] == stream]
        info = video_info(tmp_path / "out" / f"127.0.0.1_{port}_camera.mp4")
        assert info.frames / info.fps == pytest.approx(times[-1] - times[0] + 1 / info.fps, abs=0.6 / info.fps)
        assert len(times) == report.streams[stream].frames < 12
    assert len([name for name in files(tmp_path / "out") if name.endswith(".mp4")]) == 2
    assert report.dropped > 0
    assert json.loads(json.dumps(report.to_dict()))["streams"][1]["state"] == "running"


def test_names_follow_the_order_of_the_sources_whatever_is_read_first(tmp_path):
    sources = []
    for folder in ("x", "y", "z"):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / folder / "a.png", grey())
        sources += [
            make_video(tmp_path / folder / "clip.mp4", frames=2 + len(sources)),
            str(tmp_path / folder / "a.png"),
        ]
    report = annotate_streams(open_streams(sources), options=AnnotateOptions(save_dir=tmp_path / "out"))
    assert files(tmp_path / "out") == ["a.png", "a_2.png", "a_3.png", "clip.mp4", "clip_2.mp4", "clip_3.mp4"]
    lengths = [video_info(tmp_path / "out" / name).frames for name in ("clip.mp4", "clip_2.mp4", "clip_3.mp4")]
    assert lengths == [2, 4, 6]
    assert report.frames == 15 and not report.stopped


def test_the_video_of_a_file_is_complete_when_its_stream_ends_and_cameras_are_lost(tmp_path):
    path = make_video(tmp_path / "clip.mp4")
    report = PredictionReport()
    with pytest.raises(SourceError, match="could not be opened"):
        annotate_streams(
            open_streams([path, "http://127.0.0.1:9/none.mjpg"], reconnects=0),
            options=AnnotateOptions(save_dir=tmp_path / "out"),
            report=report,
        )
    assert video_info(tmp_path / "out" / "clip.mp4").frames == report.frames == 5
    assert [one.state for one in report.streams] == ["ended", "lost"]


def test_a_signal_ends_a_run_of_files_as_an_interruption(tmp_path):
    path = make_video(tmp_path / "clip.mp4", frames=50)
    report = PredictionReport()
    with raise_interrupted(), pytest.raises(KeyboardInterrupt):
        annotate_streams(
            open_streams([path], batch_s=0.02),
            options=AnnotateOptions(save_dir=tmp_path / "out"),
            report=report,
            on_frame=stop_after(0.1),
        )
    assert report.stopped_by == signal.SIGTERM
    assert video_info(tmp_path / "out" / "clip.mp4").frames == report.frames < 50


# --- the event log ------------------------------------------------------------------------------------------------


def test_the_event_log_has_a_line_for_each_frame_and_each_change(tmp_path):
    sources = [make_video(tmp_path / "a.mp4", frames=3), make_video(tmp_path / "b.mp4", frames=2)]
    log = tmp_path / "new" / "events.jsonl"
    streams = open_streams(sources)
    with append_lines(log) as write:
        event_log = EventLog(write)
        event_log.write_run({"weights": "w"}, sources=sources)
        annotate_streams(streams, options=AnnotateOptions(), event_log=event_log)
        event_log.write_end(streams.counters, reason="")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[0]["event"] == "run" and records[0]["streams"][1] == {"stream": 1, "source": sources[1]}
    frames = [one for one in records if one["event"] == "frame"]
    assert sorted((one["stream"], one["frame"]) for one in frames) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [one["index"] for one in frames] == [0, 1, 2, 3, 4]
    assert all(len(one["detections"]) == 2 and one["queue_age_ms"] <= one["latency_ms"] for one in frames)
    for stream in (0, 1):
        events = [one["event"] for one in records if one.get("stream") == stream]
        assert events == ["running", *["frame"] * (3 - stream), "ended"]
    assert [one["frames"] for one in records[-1]["streams"]] == [3, 2]
    assert all(abs(one["timestamp_s"] - time.time()) < WAIT_S for one in records)


def test_an_existing_log_is_continued_after_an_incomplete_line(tmp_path):
    log = tmp_path / "events.jsonl"
    log.write_text('{"event": "frame"}\n{"event": "fra')
    with append_lines(log) as write:
        write('{"event": "run"}\n')
    assert log.read_text().splitlines()[2] == '{"event": "run"}'


def test_nothing_is_appended_to_another_kind_of_file_or_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n")
    for path, message in ((tmp_path / "notes.txt", "does not have JSON lines"), (tmp_path, "cannot be written")):
        with pytest.raises(UsageError, match=message), append_lines(path):
            pass
    assert (tmp_path / "notes.txt").read_text() == "mine\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file():
    message = f"/dev/full cannot be written: {os.strerror(errno.ENOSPC)}"
    with pytest.raises(UsageError, match=message), append_lines(Path("/dev/full")) as write:
        write("{}\n")


# --- metrics ------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve_metrics():
    pytest.importorskip("prometheus_client", reason="pip install 'yolov7-deploy[metrics]' to serve metrics")
    from yolov7_deploy.workflows.metrics import serve_metrics

    return serve_metrics


def read_metrics(address):
    """Return the value of each sample by its name and labels, except `source`: `y7_stream_up{stream=0}`."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(address, timeout=WAIT_S) as response:
        text = response.read().decode()
    return {
        sample.name + "{" + ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "source") + "}": (
            sample.value,
            sample.labels.get("source"),
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_are_the_counters_of_each_stream(tmp_path, serve_metrics):
    sources = [make_video(tmp_path / "a.mp4", frames=4), "rtsp://me:secret@127.0.0.1:9/live"]
    with open_streams(sources) as streams, serve_metrics(streams, port=0) as address:
        assert address.startswith("http://127.0.0.1:")
        frames = [frame for frame, _ in itertools.islice(streams, 4)]
        found = read_metrics(address)
    values = {name: value for name, (value, _) in found.items()}
    assert found["y7_stream_up{stream=0}"][1] == sources[0]
    assert found["y7_stream_up{stream=1}"] == (0, "rtsp://***@127.0.0.1:9/live")
    assert values["y7_frames_processed_total{stream=0}"] == values["y7_frames_received_total{stream=0}"] == 4
    assert values["y7_frames_dropped_total{stream=0}"] == values["y7_frames_expired_total{stream=0}"] == 0
    assert values["y7_detections_total{stream=0}"] == 8
    assert values["y7_connections_total{stream=1}"] == 0
    assert values["y7_latency_seconds_count{stream=0}"] == 4
    assert values["y7_latency_seconds_sum{stream=0}"] == pytest.approx(sum(frame.latency_s for frame in frames))
    assert values["y7_queue_age_seconds_bucket{le=+Inf,stream=0}"] == 4
    assert values["y7_batch_seconds_count{}"] == streams.batch_times.count
    assert values["process_resident_memory_bytes{}"] > 1e7


def test_a_port_in_use_and_a_foreign_address_are_errors_that_name_the_fix(tmp_path, serve_metrics):
    streams = open_streams([make_video(tmp_path / "a.mp4")])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UsageError, match=f"1:{port}: Address already in use") as used:
            serve_metrics(streams, port=port).__enter__()
    assert "--metrics-port 0" in used.value.fix
    with pytest.raises(UsageError, match=r"cannot be served on 192\.0\.2\.1"):
        serve_metrics(streams, port=0, host="192.0.2.1").__enter__()
    with pytest.raises(UsageError, match="not a port"):
        serve_metrics(streams, port=70000).__enter__()
