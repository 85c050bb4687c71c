"""Cameras for tests: MJPEG servers on 127.0.0.1, one that never answers, and detectors of a chosen speed."""

import contextlib
import socket
import sys
import time
from functools import lru_cache
from pathlib import Path

from tests.support.sample_images import find_two

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mjpeg_server

FRAME_HW = (48, 64)
WAIT_S = 20  # generous, because threads on a busy machine are slow


@lru_cache
def camera_frames():
    """Return the frames of all cameras, which repeat."""
    return mjpeg_server.make_frames(FRAME_HW)


@contextlib.contextmanager
def cameras(number, *, fps=25.0):
    """Yield cameras that send frames."""
    opened = [mjpeg_server.Camera(camera_frames(), fps=fps) for _ in range(number)]
    try:
        yield opened
    finally:
        for camera in opened:
            camera.stop()


@contextlib.contextmanager
def silent_camera(scheme="http"):
    """Yield the address of a server that never answers, and its socket; connections end when that is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"{scheme}://127.0.0.1:{server.getsockname()[1]}/silent.mjpg", server


def detect_slowly(seconds_per_batch=0.0, seconds_per_frame=0.0):
    """Return a function that finds two objects in each frame of a batch, and the list of its batches."""
    batches = []

    def detect(frames):
        batches.append([(frame.stream, frame.number) for frame in frames])
        time.sleep(seconds_per_batch + seconds_per_frame * len(frames))
        return [find_two(frame.image) for frame in frames]

    return detect, batches
