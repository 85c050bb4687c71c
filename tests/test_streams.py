"""Several cameras and files with one model: shared batches, ages, fairness, lost cameras, and the end."""

from __future__ import annotations

import functools
import http.server
import itertools
import threading
import time

import cv2
import numpy as np
import pytest

from tests.support.cameras import FRAME_HW, WAIT_S, cameras, detect_slowly, silent_camera
from tests.support.sample_images import CONF, MAX_DET, assert_same, find_two, grey, noise
from tests.support.small_models import HW
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ImageError, SourceError, UsageError
from yolov7_deploy.sources.streams import StreamOptions, resolve_streams
from yolov7_deploy.sources.video import VideoWriter
from yolov7_deploy.streams import BOUNDS_S, Streams
from yolov7_deploy.visualize import write_image


def make_video(path, frames=5, *, fps=10.0):
    writer = VideoWriter(path, fps=fps, hw=(128, 192))
    for number in range(frames):
        writer.write(noise(128, 192, number))
    return str(writer.finish())


def open_streams(sources, detect, *, on_error="raise", max_batch=8, max_age_s=5.0, on_event=None, **options):
    found = resolve_streams(sources, on_error=on_error)
    return Streams(
        found,
        detect,
        options=StreamOptions(**{"reconnect_wait_s": 0.05, **options}),
        max_batch=max_batch,
        max_age_s=max_age_s,
        on_event=on_event,
    )


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("y7-")]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    deadline = time.monotonic() + WAIT_S
    while threads():
        assert time.monotonic() < deadline, threads()
        time.sleep(0.01)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(files):
    """A detector of dynamic batch size."""
    with Detector(files("plugin", batch=None), img=HW, conf=CONF, max_det=MAX_DET, device="cpu") as opened:
        yield opened


def test_every_frame_of_videos_and_folders_is_detected_as_in_a_single_call(detector, tmp_path):
    sources = [make_video(tmp_path / "a.mp4"), make_video(tmp_path / "b.mp4", frames=3), str(tmp_path / "images")]
    for number in range(2):
        write_image(tmp_path / "images" / f"{number}.png", noise(90, 60, number))
    seen = {0: [], 1: [], 2: []}
    with detector.streams(sources) as streams:
        for position, (frame, found) in enumerate(streams):
            assert frame.index == position
            assert found.path == frame.path
            assert_same(found, detector(frame.image))
            seen[frame.stream].append(frame.number)
    assert seen == {0: [0, 1, 2, 3, 4], 1: [0, 1, 2], 2: [None, None]}
    assert [one.frames for one in streams.counters] == [one.received for one in streams.counters] == [5, 3, 2]
    assert {one.state for one in streams.counters} == {"ended"}
    assert not streams.is_live


def test_an_unreadable_image_is_an_error_or_is_skipped(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "in" / name, grey())
    (tmp_path / "in" / "a.png").write_bytes(b"no image")
    detect, _ = detect_slowly()
    with pytest.raises(ImageError, match=r"a\.png"):
        list(open_streams([str(tmp_path / "in")], detect))
    streams = open_streams([str(tmp_path / "in")], detect, on_error="skip")
    assert [frame.path for frame, _ in streams] == [str(tmp_path / "in" / "b.png")]
    assert len(streams.counters[0].skipped) == 1


def test_if_nothing_at_all_can_be_read_it_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match="Nothing could be read"):
        list(open_streams([str(tmp_path / "a.png")], detect_slowly()[0], on_error="skip"))


def test_a_video_in_real_time_takes_its_duration_and_drops_what_is_too_fast(tmp_path):
    path = make_video(tmp_path / "a.mp4", frames=12, fps=20)
    started = time.monotonic()
    streams = open_streams([path], detect_slowly(0.12)[0], realtime=True)
    frames = [frame for frame, _ in streams]
    assert time.monotonic() - started >= 11 / 20
    (counters,) = streams.counters
    assert counters.received == 12 == counters.frames + counters.dropped
    assert counters.frames == len(frames) < 8
    assert frames[-1].number == 11  # the last frame is not dropped
    assert all(frame.is_live and abs(frame.timestamp_s - time.time()) < WAIT_S for frame in frames)


def test_an_address_without_a_suffix_is_read_as_what_the_server_sends(tmp_path):
    write_image(tmp_path / "image.png", grey())
    (tmp_path / "image.png").rename(tmp_path / "image")
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        streams = open_streams([f"{address}/image"], detect_slowly()[0])
        assert [(frame.number, frame.image.shape) for frame, _ in streams] == [(None, grey().shape)]
        assert streams.counters[0].state == "ended"
        (tmp_path / "index.html").write_text("<html>")
        with pytest.raises(SourceError, match="web page"):
            list(open_streams([f"{address}/index"], detect_slowly()[0]))
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.path = {"/index": "/index.html"}.get(self.path, self.path)
        super().do_GET()

    def guess_type(self, path):
        return "text/html" if str(path).endswith("html") else "image/png"

    def log_message(self, *arguments):
        pass


# --- cameras ------------------------------------------------------------------------------------------------------


def take(streams, number):
    return [frame for frame, _ in itertools.islice(streams, number)]


def test_a_batch_has_the_newest_frame_of_each_camera():
    detect, batches = detect_slowly(0.1)
    with cameras(3, fps=50) as sending, open_streams([one.address for one in sending], detect) as streams:
        frames = take(streams, 18)
    assert all(len({stream for stream, _ in batch}) == len(batch) for batch in batches)
    assert max(map(len, batches)) == 3
    for stream in range(3):
        numbers = [frame.number for frame in frames if frame.stream == stream]
        assert numbers == sorted(set(numbers))
    for one in streams.counters:
        assert one.dropped > 3
        assert one.frames + one.dropped + one.expired <= one.received <= one.frames + one.dropped + one.expired + 3
    assert max(frame.queue_age_s for frame in frames[6:]) < 0.1  # frames arrive every 20 ms
    assert all(frame.latency_s > frame.queue_age_s + 0.09 for frame in frames)


def test_a_file_beside_cameras_plays_every_frame(tmp_path):
    path = make_video(tmp_path / "a.mp4", frames=12)
    with cameras(1, fps=50) as (camera,):
        streams = open_streams([path, camera.address], detect_slowly(0.02)[0])
        with streams:
            frames = list(itertools.takewhile(lambda frame: streams.counters[0].frames < 12, (f for f, _ in streams)))
    assert [frame.number for frame in frames if frame.stream == 0] == list(range(11))
    assert streams.counters[0].frames == 12 and streams.counters[0].dropped == 0
    assert streams.counters[1].frames >= 5


def test_with_more_cameras_than_frames_in_a_batch_all_get_the_same_share():
    detect, batches = detect_slowly(0.02)
    with cameras(5, fps=100) as sending, open_streams([one.address for one in sending], detect, max_batch=2) as streams:
        while min(one.frames for one in streams.counters) < 1:
            next(streams)
        before = [one.frames for one in streams.counters]
        take(streams, 50)
        got = [one.frames - first for one, first in zip(streams.counters, before, strict=True)]
    assert max(map(len, batches)) == 2
    assert max(got) - min(got) <= 2


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_a_camera_that_never_answers_does_not_delay_the_others(scheme):
    started = time.monotonic()
    with silent_camera(scheme) as (silent, server), cameras(1) as (camera,):
        streams = open_streams([silent, camera.address], detect_slowly()[0])
        assert {frame.stream for frame in take(streams, 10)} == {1}
        assert time.monotonic() - started < 5  # FFmpeg waits for the other one for ten seconds
        assert streams.counters[0].state == "connecting"
        server.close()
        streams.close()


def test_a_camera_that_dies_comes_back_and_the_others_continue():
    events = []
    with cameras(2) as (first, second):
        streams = open_streams([first.address, second.address], detect_slowly()[0], on_event=events.append)
        with streams:
            while min(one.frames for one in streams.counters) < 3:
                next(streams)
            second.stop()
            while streams.counters[1].state != "lost":
                next(streams)
            assert {frame.stream for frame in take(streams, 10)[2:]} == {0}
            second.start()
            while streams.counters[1].connections < 2 or streams.counters[1].state != "running":
                next(streams)
            assert {frame.stream for frame in take(streams, 10)} == {0, 1}
    assert [event.state for event in events if event.stream == 1] == ["running", "lost", "running"]
    assert "was lost after" in next(event.reason for event in events if event.state == "lost")


def test_when_no_camera_is_left_the_iteration_ends_with_an_error_that_names_them():
    with cameras(2) as (first, second):
        addresses = [first.address, second.address]
        streams = open_streams(addresses, detect_slowly()[0], reconnects=1)
        take(streams, 4)
        first.stop()
        second.stop()
        with pytest.raises(SourceError) as caught:
            list(streams)
    assert all(address in caught.value.message for address in addresses)
    assert [one.state for one in streams.counters] == ["lost", "lost"]


def test_files_are_read_to_their_end_before_lost_cameras_end_the_iteration(tmp_path):
    path = make_video(tmp_path / "a.mp4", frames=6)
    streams = open_streams(["http://127.0.0.1:9/none.mjpg", path], detect_slowly(0.05)[0], reconnects=0)
    with pytest.raises(SourceError, match="could not be opened"):
        list(streams)
    assert streams.counters[1].frames == 6


class Capture:
    """A capture that sends frames at given times after it was opened, and ends at the last of them."""

    def __init__(self, times_s):
        self.times, self.begin = list(times_s), time.monotonic()

    def isOpened(self):  # noqa: N802
        return bool(self.times)

    def read(self):
        if not self.times:
            return False, None
        time.sleep(max(0.0, self.begin + self.times.pop(0) - time.monotonic()))
        return (True, grey()) if self.times else (False, None)

    def get(self, what):
        return 30.0 if what == cv2.CAP_PROP_FPS else 0.0

    def release(self):
        pass


def test_a_frame_that_became_too_old_while_the_network_ran_is_not_used():
    """One camera sends its last frame while the first batch runs, which takes longer than the age limit."""
    calls = []

    def detect(frames):
        calls.append([frame.number for frame in frames])
        time.sleep(0.5 if len(calls) == 1 else 0.0)
        return [find_two(frame.image) for frame in frames]

    opened = iter([Capture([0.0, 0.05, 0.6])])
    opener = lambda address: next(opened, Capture([]))  # noqa: E731
    streams = open_streams(["rtsp://a/1"], detect, max_age_s=0.2, opener=opener, reconnects=0)
    with pytest.raises(SourceError):
        list(streams)
    assert calls == [[0]]
    assert streams.counters[0].expired == 1


def test_a_batch_is_limited_to_what_is_done_in_half_of_the_age_limit():
    detect, batches = detect_slowly(seconds_per_frame=0.06)
    opener = lambda address: Capture([number / 100 for number in range(90)])  # noqa: E731
    addresses = [f"rtsp://camera/{number}" for number in range(8)]
    with open_streams(addresses, detect, max_age_s=0.3, opener=opener) as streams:
        frames = take(streams, 8)
    assert max(map(len, batches)) == 2
    assert max(frame.queue_age_s for frame in frames) <= 0.3


# --- the end, errors, and arguments -------------------------------------------------------------------------------


def test_closing_from_another_thread_ends_the_iteration():
    with cameras(1) as (camera,):
        streams = open_streams([camera.address], detect_slowly()[0])
        threading.Timer(0.3, streams.close).start()
        assert len(list(streams)) > 0
        assert list(streams) == []


def test_leaving_the_loop_stops_all_threads():
    with cameras(1) as (camera,):
        for _ in open_streams([camera.address], detect_slowly()[0]):
            break
        deadline = time.monotonic() + WAIT_S
        while threads():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_closed_streams_that_never_began_are_empty(tmp_path):
    streams = open_streams([make_video(tmp_path / "a.mp4")], detect_slowly()[0])
    streams.close()
    assert list(streams) == []


def test_an_error_of_the_network_is_raised_to_the_caller(tmp_path):
    def broken(frames):
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        list(open_streams([make_video(tmp_path / "a.mp4")], broken))


def test_a_detector_that_is_closed_while_it_is_used_ends_the_iteration(files, tmp_path):
    opened = Detector(files("plugin", batch=None), img=HW, device="cpu")
    streams = opened.streams([make_video(tmp_path / "a.mp4", frames=50)])
    next(streams)
    opened.close()
    with pytest.raises(UsageError, match="closed"):
        list(streams)


def test_a_fixed_batch_size_of_one_is_said_once_and_a_larger_batch_is_refused(files, tmp_path, caplog):
    paths = [make_video(tmp_path / name, frames=3) for name in ("a.mp4", "b.mp4")]
    with Detector(files("plugin", batch=1), img=HW, conf=CONF, device="cpu") as opened:
        with pytest.raises(UsageError, match="fixed batch size of 1") as caught:
            opened.streams(paths, batch=2)
        assert "dynamic-batch" in caught.value.fix
        assert len(list(opened.streams(paths))) == 6
    assert len([record for record in caplog.records if "one after the other" in record.getMessage()]) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": True}, "batch"),
        ({"max_age_s": 0}, "max_age_s"),
        ({"max_age_s": float("nan")}, "max_age_s"),
        ({"reconnects": -1}, "reconnects"),
        ({"conf": 25}, "conf"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_opened(detector, wrong, message):
    with pytest.raises(UsageError) as caught:
        detector.streams(["rtsp://a/1"], **wrong)
    assert message in str(caught.value)


@pytest.mark.parametrize("single", ["a.mp4", 0, grey(), b"bytes"])
def test_a_single_source_is_refused(detector, single):
    with pytest.raises(UsageError, match="Several sources"):
        detector.streams(single)


def test_a_missing_file_is_an_error_at_once(detector):
    with pytest.raises(SourceError, match=r"absent\.mp4"):
        detector.streams(["rtsp://a/1", "absent.mp4"])
    with pytest.raises(SourceError, match="no sources"):
        detector.streams([])


def test_a_text_list_has_a_stream_for_each_camera_and_one_for_its_files(tmp_path):
    write_image(tmp_path / "a.png", grey())
    write_image(tmp_path / "b.png", grey())
    (tmp_path / "list.txt").write_text("rtsp://me:secret@gate/1\na.png\nb.png\n0\nmissing.png\n")
    found = resolve_streams([str(tmp_path / "list.txt"), np.zeros((4, 4, 3), np.uint8)], on_error="skip")
    labels = [(stream.label, stream.is_live, len(stream.items)) for stream in found.streams]
    assert labels == [
        ("rtsp://***@gate/1", True, 1),
        ("camera 0", True, 1),
        (str(tmp_path / "list.txt"), False, 2),
        ("an array", False, 1),
    ]
    assert len(found.skipped) == 1


def test_the_histogram_of_ages_counts_every_frame(tmp_path):
    streams = open_streams([make_video(tmp_path / "a.mp4")], detect_slowly(0.03)[0])
    latencies = [frame.latency_s for frame, _ in streams]
    histogram = streams.counters[0].latency
    assert histogram.count == 5
    assert histogram.max_s == max(latencies)
    assert histogram.mean_s == pytest.approx(sum(latencies) / 5)
    assert histogram.counts[-1] == 0 and len(histogram.counts) == len(BOUNDS_S) + 1


def test_the_frame_hw_of_the_test_cameras_has_room_for_their_numbers():
    assert FRAME_HW[1] >= 64
