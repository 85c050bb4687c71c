"""A test of whether the server of a stream answers, before OpenCV opens the stream.

OpenCV opens one stream of FFmpeg after the other, under a lock of the whole process that it also needs to create a
video (github.com/opencv/opencv/issues/17057, pull request 9006). A camera that does not answer would hold it for the
timeout of ten seconds, at each attempt, and delay all others. So its server is asked first, without that lock.
"""

from __future__ import annotations

import http.client
import socket
import urllib.parse

import cv2

from yolov7_deploy._download import probe
from yolov7_deploy.sources.video import NETWORK_TIMEOUT_MS, Capture, open_capture

DEFAULT_PORTS = {"rtsp": 554, "rtsps": 322, "rtmp": 1935, "rtmps": 443}  # IANA; RTMP as in FFmpeg
TIMEOUT_S = NETWORK_TIMEOUT_MS / 1000


class AnsweredCapture:
    """Opens the stream of a camera after its server has answered; one object per camera.

    The request is a connection of its own. A camera that serves one client may still be busy with it when OpenCV
    connects; then the next attempt asks nothing.
    """

    def __init__(self) -> None:
        self._is_known = False

    def __call__(self, address: str | int) -> Capture:
        """Return the opened capture, or a closed one."""
        if not self._is_known and not server_answers(address):
            return cv2.VideoCapture()
        capture = open_capture(address)
        self._is_known = not self._is_known and not capture.isOpened()
        return capture


def server_answers(address: str | int, *, timeout_s: float = TIMEOUT_S) -> bool:
    """Return whether a server sends anything, even an error; True where this cannot be asked.

    HTTP servers are asked for the stream itself, RTSP servers for their options (RFC 2326, 10.1), which need no
    password. Of others, only the connection is tried. Cameras of this machine and addresses of UDP are not asked.
    """
    scheme = address.partition("://")[0].lower() if isinstance(address, str) else ""
    if isinstance(address, str) and scheme in ("http", "https"):
        return _http_answers(address, timeout_s)
    if isinstance(address, str) and scheme in (*DEFAULT_PORTS, "tcp"):
        return _tcp_answers(address, scheme, timeout_s)
    return True


def _http_answers(address: str, timeout_s: float) -> bool:
    try:
        probe(address, timeout_s=timeout_s)
    except (http.client.HTTPException, ValueError):
        return True  # FFmpeg may understand the answer
    except OSError as error:
        return hasattr(error, "code")  # an HTTP status
    return True


def _tcp_answers(address: str, scheme: str, timeout_s: float) -> bool:
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname or "", parts.port or DEFAULT_PORTS.get(scheme, 0)
        location = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    except ValueError:
        return True
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            if scheme == "rtsp":
                connection.sendall(f"OPTIONS {location} RTSP/1.0\r\nCSeq: 1\r\n\r\n".encode())
                connection.recv(64)  # the end of the connection is an answer, too
    except ConnectionResetError:
        return True
    except OSError:
        return False
    return True
