"""Downloads end: in time, within their size, and only from HTTP servers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from yolov7_deploy import hub
from yolov7_deploy._download import download
from yolov7_deploy.errors import ImageError, LoadError
from yolov7_deploy.sources import video

BODY = b"x" * 100_000
PAUSE_S = 0.05  # between single bytes
TIMEOUT_S = 0.5
REDIRECTS = {
    "ftp": "ftp://127.0.0.1:9/a.jpg",
    "file": "file:///etc/hostname",
    "data": "data:text/plain,x",
    "loop": "/redirect/loop",
}


class Server(BaseHTTPRequestHandler):
    """Serve BODY, or misbehave as the path says."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        with contextlib.suppress(ConnectionError):
            getattr(self, f"send_{kind}")()

    def start(self, length=None, status=200, **headers):
        self.send_response(status)
        for name, value in {**({} if length is None else {"Content-Length": str(length)}), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_complete(self):
        self.start(len(BODY))
        self.wfile.write(BODY)

    def send_endless(self):
        self.start()
        while True:
            self.wfile.write(BODY)

    def send_announced(self):
        self.start(10**12)
        self.send_endless()

    def send_truncated(self):
        self.start(2 * len(BODY))
        self.wfile.write(BODY)

    def send_dripping(self):
        self.start()
        self.drip()

    def send_headers(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Name: ")
        self.drip()

    def send_chunks(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.drip(b"1\r\nx\r\n")

    def send_redirect(self):
        self.start(0, 302, Location=REDIRECTS[self.path.split("/")[2]])

    def send_error500(self):
        self.send_error(500)

    def drip(self, piece=b"x"):
        while True:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(PAUSE_S)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.daemon_threads = True
        running.block_on_close = False
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def read(address: str, *, max_bytes: int = 10**6, **limits: float) -> bytes:
    blocks = download(address, max_bytes=max_bytes, timeout_s=TIMEOUT_S, **limits)
    return b"".join(block for block, _ in blocks)


def test_a_download_is_complete(address):
    assert read(f"{address}/complete") == BODY


@pytest.mark.parametrize("kind", ["endless", "announced"])
def test_a_body_larger_than_the_limit_is_refused(address, kind):
    with pytest.raises(OSError, match="more than 1000000"):
        read(f"{address}/{kind}")


@pytest.mark.parametrize("kind", ["dripping", "headers", "chunks"])
def test_a_server_that_sends_single_bytes_times_out(address, kind):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="timed out"):
        read(f"{address}/{kind}")
    assert TIMEOUT_S <= time.monotonic() - start < 4 * TIMEOUT_S


def test_a_minimum_speed_extends_the_time(address):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="timed out"):
        read(f"{address}/dripping", min_bytes_per_s=2 / PAUSE_S)
    assert time.monotonic() - start > 1.5 * TIMEOUT_S


def test_a_truncated_body_is_an_error(address):
    with pytest.raises(OSError, match="stopped after 100000 of 200000 bytes"):
        read(f"{address}/truncated")


@pytest.mark.parametrize("kind", REDIRECTS)
def test_a_redirect_to_anything_but_http_is_refused(address, kind):
    with pytest.raises(OSError, match=r"unknown url type|not allowed|infinite loop"):
        read(f"{address}/redirect/{kind}")


@pytest.mark.parametrize("text", ["file:///etc/hostname", "data:text/plain,x", "ftp://127.0.0.1/x"])
def test_an_address_that_is_not_http_is_refused(text):
    with pytest.raises(OSError, match="unknown url type"):
        read(text)


def test_the_error_of_a_server_is_raised(address):
    with pytest.raises(OSError, match="500"):
        read(f"{address}/error500")


@pytest.mark.parametrize("kind", ["dripping", "headers", "endless", "redirect/ftp", "redirect/file", "truncated"])
def test_an_image_that_cannot_be_downloaded_is_an_image_error(address, monkeypatch, kind):
    monkeypatch.setattr(video, "DOWNLOAD_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(video, "MAX_DOWNLOAD_BYTES", 10**6)
    with pytest.raises(ImageError, match="cannot be downloaded") as caught:
        video.download_image(f"{address}/{kind}")
    assert caught.value.fix


@pytest.mark.parametrize("kind", ["dripping", "headers", "endless", "redirect/ftp", "redirect/file", "truncated"])
def test_weights_that_cannot_be_downloaded_leave_no_file(address, monkeypatch, tmp_path, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("Y7_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_MAX_BYTES", 10**6)
    monkeypatch.setattr(hub, "RELEASE_URL", f"{address}/{kind}")
    monkeypatch.setattr(hub, "TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setitem(REDIRECTS, "ftp", "ftp://127.0.0.1:9/a.pt")
    with pytest.raises(LoadError) as caught:
        hub.find_weights("yolov7-tiny")
    assert caught.value.fix
    assert not list(tmp_path.rglob("*.pt"))
