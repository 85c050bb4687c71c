"""Live streams: the newest frame is read, lost streams are reopened, and closing stops all threads."""

from __future__ import annotations

import itertools
import threading
import time

import cv2
import numpy as np
import pytest

from yolov7_deploy.errors import SourceError
from yolov7_deploy.sources import open_source
from yolov7_deploy.sources.live import LiveReader

WAIT_S = 10  # generous, because threads on a busy machine are slow


def make_image(value: int) -> np.ndarray:
    return np.full((20, 30, 3), value, dtype=np.uint8)


class FakeCamera:
    """Opens fake captures: each list of frames is one connection, None is a connection that fails."""

    def __init__(self, connections, *, pace_s=0.0):
        self.connections = list(connections)
        self.opened = 0
        self.released = 0
        self.pace_s = pace_s

    def __call__(self, address):
        script = self.connections[self.opened] if self.opened < len(self.connections) else None
        self.opened += 1
        return FakeCapture(self, script)


class FakeCapture:
    def __init__(self, camera, script):
        self.camera = camera
        self.script = script
        self.frames = iter(script or ())

    def isOpened(self):  # noqa: N802
        return self.script is not None

    def read(self):
        if self.camera.pace_s:
            time.sleep(self.camera.pace_s)
        value = next(self.frames, None)
        if isinstance(value, Exception):
            raise value
        return (False, None) if value is None else (True, make_image(value % 256))

    def get(self, what):
        return 30.0 if what == cv2.CAP_PROP_FPS else 0.0

    def release(self):
        self.camera.released += 1


def wait_until(condition) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def test_a_slow_consumer_gets_the_newest_frame_and_the_number_of_dropped_ones():
    camera = FakeCamera([range(100)])
    reader = LiveReader(0, open_capture=camera, reconnects=0)
    wait_until(lambda: camera.released == 1)
    fresh = reader.take()
    assert fresh is not None
    assert fresh.number == 99
    assert reader.dropped == 99
    assert abs(time.time() - fresh.captured_s) < WAIT_S
    with pytest.raises(SourceError, match="lost after 100 frames"):
        reader.take()
    reader.close()


def test_a_live_source_numbers_frames_and_counts_dropped_ones():
    camera = FakeCamera([iter(range(10_000))], pace_s=0.001)
    with open_source("0", opener=camera) as source:
        assert source.is_live
        assert source.total is None
        frames = []
        for frame in source:
            frames.append(frame)
            time.sleep(0.01)
            if len(frames) == 5:
                break
    assert [frame.index for frame in frames] == [0, 1, 2, 3, 4]
    assert all(a.number < b.number for a, b in itertools.pairwise(frames))
    assert frames[-1].dropped > 0
    assert frames[-1].number >= 4
    assert frames[0].path == "camera 0"
    assert frames[0].is_live
    assert frames[0].fps == 30
    wait_until(lambda: camera.released == 1)
    assert not any(thread.name.startswith("y7-live") for thread in threading.enumerate())


def test_a_lost_stream_is_reopened():
    camera = FakeCamera([[1, 2], [3], None, [4]])
    seen = []
    with pytest.raises(SourceError, match="could not be reopened in 2 attempts"):
        for frame in open_source("rtsp://cam/live", opener=camera, reconnects=2, reconnect_wait_s=0):
            seen.append(int(frame.image[0, 0, 0]))
    assert seen[-1] == 4
    assert camera.opened == camera.released == 6


def test_a_stream_that_never_opened_is_not_retried():
    camera = FakeCamera([])
    with pytest.raises(SourceError, match=r"rtsp://\*\*\*@cam/live could not be opened") as caught:
        list(open_source("rtsp://user:secret@cam/live", opener=camera))
    assert camera.opened == 1
    assert "secret" not in str(caught.value)


def test_an_opencv_error_counts_as_a_lost_connection():
    camera = FakeCamera([[1, cv2.error("decoder")], [2]])
    with pytest.raises(SourceError, match="lost after 2 frames"):
        list(open_source(0, opener=camera, reconnects=1, reconnect_wait_s=0))


def test_an_opencv_error_while_opening_counts_as_a_stream_that_never_opened():
    def opener(address):
        raise cv2.error("no backend")

    with pytest.raises(SourceError, match="could not be opened"):
        list(open_source(0, opener=opener))


def test_closing_from_another_thread_ends_the_iteration():
    class Silent(FakeCapture):
        def read(self):
            time.sleep(0.01)
            return (True, make_image(1)) if self.camera.opened == 1 and not self.camera.released else (False, None)

    camera = FakeCamera([[1]])
    source = open_source(3, opener=lambda address: Silent(camera, camera(address).script))
    threading.Timer(0.2, source.close).start()
    started = time.monotonic()
    assert len(list(source)) > 0
    assert time.monotonic() - started < WAIT_S


def test_several_streams_of_a_list_are_read_in_turn(tmp_path):
    (tmp_path / "streams.txt").write_text("rtsp://one/a\nrtsp://two/b\n")

    def opener(address):
        return FakeCapture(FakeCamera([], pace_s=0.002), iter(range(10_000)))

    seen = set()
    with open_source(tmp_path / "streams.txt", opener=opener) as source:
        for frame in source:
            seen.add(frame.path)
            if frame.index > 20:
                break
    assert seen == {"rtsp://one/a", "rtsp://two/b"}


def test_with_skip_one_of_several_streams_may_fail(tmp_path):
    (tmp_path / "streams.txt").write_text("rtsp://one/a\nrtsp://two/b\n")

    def opener(address):
        script = None if "one" in address else iter(range(10_000))
        return FakeCapture(FakeCamera([], pace_s=0.002), script)

    with open_source(tmp_path / "streams.txt", opener=opener, on_error="skip") as source:
        for frame in source:
            assert frame.path == "rtsp://two/b"
            if frame.index > 20:
                break
        assert [item.path for item in source.skipped] == ["rtsp://one/a"]
