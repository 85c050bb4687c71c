"""An official name is found in the order promised; only then is the network asked, and never for a path."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from yolov7_deploy import hub as weights
from yolov7_deploy.errors import LoadError
from yolov7_deploy.hub import OFFICIAL_NAMES, find_weights

BODY = bytes(range(256)) * 4096
NOWHERE = "http://127.0.0.1:9/none"


class Release(BaseHTTPRequestHandler):
    """Answers with BODY; half of it, nothing, or without a length where the path says so."""

    def do_GET(self):
        _, kind, file = self.path.split("/")
        self.server.asked.append(file)
        if kind == "absent":
            self.send_error(404)
            return
        self.send_response(200)
        if kind != "nolength":
            self.send_header("Content-Length", "0" if kind == "empty" else str(len(BODY)))
        self.end_headers()
        self.wfile.write({"truncated": BODY[: len(BODY) // 2], "empty": b""}.get(kind, BODY))

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Release) as running:
        running.asked = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def release(server) -> str:
    server.asked.clear()
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    """Three empty local places."""
    found = {"here": tmp_path / "here", "weights": tmp_path / "weights", "cache": tmp_path / "xdg" / "yolov7_deploy"}
    for folder in found.values():
        folder.mkdir(parents=True)
    monkeypatch.chdir(found["here"])
    monkeypatch.setenv("Y7_WEIGHTS_DIR", str(found["weights"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return found


def touch(path: Path) -> Path:
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize("asked", ["yolov7", "yolov7.pt"])
def test_places_and_names_are_tried_in_order(places, asked):
    wanted = [
        folder / name
        for folder in places.values()
        for name in ("yolov7.pt", "yolov7.safetensors", "yolov7_training.pt")
    ]
    for path in reversed(wanted):
        touch(path)
    for path in wanted:
        assert find_weights(asked, base_url=NOWHERE).resolve() == path
        path.unlink()


def test_a_path_is_given_back(places):
    path = touch(places["here"] / "mine.onnx")
    assert find_weights(path, base_url=NOWHERE) == path
    assert find_weights("mine.onnx", base_url=NOWHERE) == Path("mine.onnx")


@pytest.mark.parametrize("absent", ["mine.pt", "sub/yolov7.pt", "./sub/yolov7", "yolov7.onnx", "yolov7.safetensors"])
def test_a_path_never_reaches_the_network(release, server, absent):
    with pytest.raises(LoadError, match="does not exist") as caught:
        find_weights(absent, base_url=f"{release}/whole")
    assert caught.value.fix
    assert server.asked == []


def test_an_unknown_name_lists_the_official_ones():
    with pytest.raises(LoadError, match="neither a file nor an official name") as caught:
        find_weights("yolov9")
    assert "yolov7-e6e" in caught.value.fix


def test_a_folder_says_so(places):
    with pytest.raises(LoadError, match="folder"):
        find_weights(places["weights"])


def test_a_folder_named_like_the_model_is_not_taken_for_it(places):
    (places["here"] / "yolov7").mkdir()
    path = touch(places["cache"] / "yolov7.pt")
    assert find_weights("yolov7", base_url=NOWHERE) == path


@pytest.mark.parametrize("kind", ["whole", "nolength"])
def test_a_download_lands_in_the_cache_with_progress(places, release, server, kind):
    seen: list[tuple[int, int]] = []
    path = find_weights(
        "yolov7-tiny", progress=lambda done, total: seen.append((done, total)), base_url=f"{release}/{kind}"
    )
    assert path == places["cache"] / "yolov7-tiny.pt"
    assert path.read_bytes() == BODY
    assert seen == sorted(seen)
    assert seen[-1] == (len(BODY), len(BODY) if kind == "whole" else 0)
    assert [p.name for p in places["cache"].iterdir()] == ["yolov7-tiny.pt"]
    find_weights("yolov7-tiny", base_url=f"{release}/{kind}")
    assert server.asked == ["yolov7-tiny.pt"]


@pytest.mark.parametrize("kind", ["truncated", "empty"])
def test_a_download_that_breaks_off_leaves_nothing(places, release, kind):
    with pytest.raises(LoadError, match=r"broke off|IncompleteRead") as caught:
        find_weights("yolov7-tiny", base_url=f"{release}/{kind}")
    assert caught.value.fix
    assert list(places["cache"].iterdir()) == []


def test_an_interrupted_download_leaves_nothing(places, release):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_weights("yolov7-tiny", progress=interrupt, base_url=f"{release}/whole")
    assert list(places["cache"].iterdir()) == []


def test_a_file_of_another_digest_is_refused(places, release):
    with pytest.raises(LoadError, match="SHA-256"):
        find_weights("yolov7", base_url=f"{release}/whole")
    assert list(places["cache"].iterdir()) == []


def test_a_file_of_the_known_digest_is_kept(monkeypatch, release):
    monkeypatch.setitem(weights.SHA256, "yolov7", hashlib.sha256(BODY).hexdigest())
    assert find_weights("yolov7", base_url=f"{release}/whole").read_bytes() == BODY


def test_offline_the_error_lists_all_four_places(places):
    with pytest.raises(LoadError) as caught:
        find_weights("yolov7-w6", base_url=NOWHERE)
    for folder in places.values():
        assert str(folder) in caught.value.message
    assert f"{NOWHERE}/yolov7-w6.pt" in caught.value.message
    assert "no connection" in caught.value.message
    assert caught.value.fix


def test_an_unset_weights_folder_is_listed_as_such(monkeypatch):
    monkeypatch.delenv("Y7_WEIGHTS_DIR")
    with pytest.raises(LoadError, match=r"\$Y7_WEIGHTS_DIR: not set"):
        find_weights("yolov7", base_url=NOWHERE)


def test_an_answer_404_is_told(release):
    with pytest.raises(LoadError, match="answered 404"):
        find_weights("yolov7x", base_url=f"{release}/absent")


def test_a_server_that_stays_silent_times_out(release):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(LoadError, match="timed out"):
        find_weights("yolov7", base_url=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)


def test_a_cache_that_cannot_be_written_is_told(places, release):
    places["cache"].rmdir()
    places["cache"].write_bytes(b"a file where the folder should be")
    with pytest.raises(LoadError, match="cache"):
        find_weights("yolov7-tiny", base_url=f"{release}/whole")


def test_every_name_of_the_command_line_is_known():
    named = {"yolov7", "yolov7-tiny", "yolov7x", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e"}
    assert named <= set(OFFICIAL_NAMES)
