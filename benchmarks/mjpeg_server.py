"""Cameras of this machine: MJPEG over HTTP on 127.0.0.1, each with a port of its own, which can be stopped and started.

    python benchmarks/mjpeg_server.py --cameras 4 --fps 10

It prints one address per line, which `y7 detect --source` reads, and ends with Ctrl-C. With `--control`, lines on
standard input control it until they end: `stop 2` closes the port and all connections of the third camera, `start 2`
opens the same port again, `fps 12` changes the rate of all.

Frames show the shapes of the included weights, and their number in the first row as black and white squares, which
survive JPEG: a reader knows which frame it got.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Sequence

import cv2

from yolov7_deploy.datasets.synthetic import generate_image
from yolov7_deploy.image import Image

BOUNDARY = "frame"
BITS, SQUARE_PX = 8, 8  # of the frame number
NUMBERS = 2**BITS
IMAGES = 16  # different images, which repeat


def make_frames(hw: tuple[int, int]) -> list[bytes]:
    """Return `NUMBERS` JPEG files of shapes with the number of the frame."""
    images = [generate_image(k, split="val", size=min(hw), seed=0)[0] for k in range(IMAGES)]
    frames = []
    for number in range(NUMBERS):
        image = cv2.resize(images[number % IMAGES], (hw[1], hw[0]))
        write_number(image, number)
        frames.append(cv2.imencode(".jpg", image)[1].tobytes())
    return frames


def write_number(image: Image, number: int) -> None:
    """Draw a number as white squares for ones and black squares for zeros, lowest bit first."""
    for bit in range(BITS):
        value = 255 if number >> bit & 1 else 0
        image[:SQUARE_PX, bit * SQUARE_PX : (bit + 1) * SQUARE_PX] = value


def read_number(image: Image) -> int:
    """Return the number that `write_number` drew."""
    squares = image[:SQUARE_PX, : BITS * SQUARE_PX].reshape(SQUARE_PX, BITS, SQUARE_PX, 3).mean(axis=(0, 2, 3))
    return sum(1 << bit for bit, value in enumerate(squares) if value > 127)


class Camera:
    """One camera; frame `number` is sent at `number / fps` seconds after it was created, with any number of readers.

    Args:
        frames: JPEG files, which repeat.
        fps: Frames per second.
    """

    def __init__(self, frames: Sequence[bytes], *, fps: float) -> None:
        self.frames = frames
        self.sent: dict[int, float] = {}  # time of each frame on the clock of `time.monotonic`
        self._schedule = time.monotonic(), fps  # when frame 0 was sent, and frames per second; replaced together
        self._connections: set[socket.socket] = set()
        self._server: _Server | None = None
        self._port = 0
        self.start()

    @property
    def address(self) -> str:
        """The address that a reader opens."""
        return f"http://127.0.0.1:{self._port}/camera.mjpg"

    def set_fps(self, fps: float) -> None:
        """Change the rate; the next frame has the next number."""
        begin_s, old_fps = self._schedule
        now = time.monotonic()
        self._schedule = now - (now - begin_s) * old_fps / fps, fps

    def start(self) -> None:
        """Open the port."""
        self._server = _Server(("127.0.0.1", self._port), _Handler, bind_and_activate=True)
        self._server.camera = self
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and all connections."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def send(self, connection: socket.socket) -> None:
        """Send frames until the connection or the camera ends."""
        self._connections.add(connection)
        with contextlib.suppress(OSError):
            head = f"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary={BOUNDARY}\r\n\r\n"
            connection.sendall(head.encode())
            number = 0
            while self._server is not None:
                begin_s, fps = self._schedule
                number = max(number + 1, int((time.monotonic() - begin_s) * fps))
                time.sleep(max(0.0, begin_s + number / fps - time.monotonic()))
                data = self.frames[number % len(self.frames)]
                part = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.sent[number % NUMBERS] = time.monotonic()
                connection.sendall(part.encode() + data + b"\r\n")
        self._connections.discard(connection)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    camera: Camera


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.recv(4096)
            self.server.camera.send(self.request)


def main() -> None:
    arguments = argparse.ArgumentParser(description="MJPEG cameras on 127.0.0.1")
    arguments.add_argument("--cameras", type=int, default=4)
    arguments.add_argument("--fps", type=float, default=10)
    arguments.add_argument("--height", type=int, default=240)
    arguments.add_argument("--width", type=int, default=320)
    arguments.add_argument("--control", action="store_true", help="read commands from standard input")
    options = arguments.parse_args()
    frames = make_frames((options.height, options.width))
    cameras = [Camera(frames, fps=options.fps) for _ in range(options.cameras)]
    for camera in cameras:
        print(camera.address, flush=True)
    if options.control:
        _control(cameras)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def _control(cameras: Sequence[Camera]) -> None:
    for line in sys.stdin:
        command, _, value = line.strip().partition(" ")
        if command == "fps":
            for camera in cameras:
                camera.set_fps(float(value))
        elif command in ("start", "stop"):
            getattr(cameras[int(value)], command)()


if __name__ == "__main__":
    main()
