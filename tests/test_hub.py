"""Official names are found in the documented order, then downloaded; a path is never downloaded."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from yolov7_deploy import hub
from yolov7_deploy.errors import LoadError
from yolov7_deploy.hub import OFFICIAL_NAMES, find_weights

BODY = bytes(range(256)) * 4096
NOWHERE = "http://127.0.0.1:9/none"


class Release(BaseHTTPRequestHandler):
    """Serve BODY, half of it, nothing, or BODY without a length, depending on the requested path."""

    def do_GET(self):
        _, kind, file = self.path.split("/")
        self.server.requested.append(file)
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
        running.requested = []
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def release(server) -> str:
    server.requested.clear()
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """Three empty local folders: working directory, weights folder and cache."""
    found = {"cwd": tmp_path / "cwd", "weights": tmp_path / "weights", "cache": tmp_path / "xdg" / "yolov7_deploy"}
    for folder in found.values():
        folder.mkdir(parents=True)
    monkeypatch.chdir(found["cwd"])
    monkeypatch.setenv("Y7_WEIGHTS_DIR", str(found["weights"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return found


def find_at(release_url: str, name: str | Path, **options) -> Path:
    """Return `find_weights` of a name, with another address of the release."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "RELEASE_URL", release_url)
        return find_weights(name, **options)


def touch(path: Path) -> Path:
    path.write_bytes(b"x")
    return path


@pytest.mark.parametrize("requested", ["yolov7", "yolov7.pt"])
def test_folders_and_file_names_are_tried_in_order(folders, requested):
    expected = [
        folder / name
        for folder in folders.values()
        for name in ("yolov7.pt", "yolov7.safetensors", "yolov7_training.pt")
    ]
    for path in reversed(expected):
        touch(path)
    for path in expected:
        assert find_at(NOWHERE, requested).resolve() == path
        path.unlink()


def test_an_existing_path_is_returned(folders):
    path = touch(folders["cwd"] / "mine.onnx")
    assert find_at(NOWHERE, path) == path
    assert find_at(NOWHERE, "mine.onnx") == Path("mine.onnx")


@pytest.mark.parametrize("absent", ["mine.pt", "sub/yolov7.pt", "./sub/yolov7", "yolov7.onnx", "yolov7.safetensors"])
def test_a_path_is_never_downloaded(release, server, absent):
    with pytest.raises(LoadError, match="does not exist") as caught:
        find_at(f"{release}/complete", absent)
    assert caught.value.fix
    assert server.requested == []


def test_an_unknown_name_lists_the_official_ones():
    with pytest.raises(LoadError, match="neither a file nor an official name") as caught:
        find_weights("yolov9")
    assert "yolov7-e6e" in caught.value.fix


def test_a_folder_is_reported_as_a_folder(folders):
    with pytest.raises(LoadError, match="folder"):
        find_weights(folders["weights"])


def test_a_folder_named_like_the_model_is_not_used_as_weights(folders):
    (folders["cwd"] / "yolov7").mkdir()
    path = touch(folders["cache"] / "yolov7.pt")
    assert find_at(NOWHERE, "yolov7") == path


@pytest.mark.parametrize("kind", ["complete", "nolength"])
def test_a_download_is_saved_in_the_cache_and_reports_progress(folders, release, server, kind):
    seen: list[tuple[int, int]] = []
    path = find_at(f"{release}/{kind}", "yolov7-tiny", progress=lambda done, total: seen.append((done, total)))
    assert path == folders["cache"] / "yolov7-tiny.pt"
    assert path.read_bytes() == BODY
    assert seen == sorted(seen)
    assert seen[-1] == (len(BODY), len(BODY) if kind == "complete" else 0)
    assert [p.name for p in folders["cache"].iterdir()] == ["yolov7-tiny.pt"]
    find_at(f"{release}/{kind}", "yolov7-tiny")
    assert server.requested == ["yolov7-tiny.pt"]


@pytest.mark.parametrize("kind", ["truncated", "empty"])
def test_an_incomplete_download_leaves_no_file(folders, release, kind):
    with pytest.raises(LoadError, match=r"is incomplete: (the connection stopped after|no bytes)") as caught:
        find_at(f"{release}/{kind}", "yolov7-tiny")
    assert caught.value.fix == "Run the same command again."
    assert list(folders["cache"].iterdir()) == []


def test_an_interrupted_download_leaves_no_file(folders, release):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_at(f"{release}/complete", "yolov7-tiny", progress=interrupt)
    assert list(folders["cache"].iterdir()) == []


def test_a_download_with_the_wrong_digest_is_rejected(folders, release):
    with pytest.raises(LoadError, match="SHA-256"):
        find_at(f"{release}/complete", "yolov7")
    assert list(folders["cache"].iterdir()) == []


def test_a_download_with_the_known_digest_is_accepted(monkeypatch, release):
    monkeypatch.setitem(hub.SHA256, "yolov7", hashlib.sha256(BODY).hexdigest())
    assert find_at(f"{release}/complete", "yolov7").read_bytes() == BODY


def test_without_a_connection_the_error_lists_all_four_locations(folders):
    with pytest.raises(LoadError) as caught:
        find_at(NOWHERE, "yolov7-w6")
    for folder in folders.values():
        assert str(folder) in caught.value.message
    assert f"{NOWHERE}/yolov7-w6.pt" in caught.value.message
    assert "no connection" in caught.value.message
    assert caught.value.fix


def test_an_unset_weights_folder_is_listed_as_such(monkeypatch):
    monkeypatch.delenv("Y7_WEIGHTS_DIR")
    with pytest.raises(LoadError, match=r"\$Y7_WEIGHTS_DIR: not set"):
        find_at(NOWHERE, "yolov7")


def test_http_status_404_is_reported(release):
    with pytest.raises(LoadError, match="answered 404"):
        find_at(f"{release}/absent", "yolov7x")


def test_a_server_that_does_not_answer_times_out(monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(LoadError, match="timed out"):
        find_at(f"http://127.0.0.1:{silent.getsockname()[1]}", "yolov7")


def test_a_cache_that_cannot_be_written_is_reported(folders, release):
    folders["cache"].rmdir()
    folders["cache"].write_bytes(b"a file where the folder should be")
    with pytest.raises(LoadError, match="cache"):
        find_at(f"{release}/complete", "yolov7-tiny")


def test_a_user_without_a_home_folder_needs_none(monkeypatch):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)  # without an entry in the list of users
    assert hub.cache_dir() == hub.NO_HOME / "yolov7_deploy"


def test_the_deploy_weights_of_every_variant_are_official_names():
    named = {"yolov7", "yolov7-tiny", "yolov7x", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e"}
    assert named <= set(OFFICIAL_NAMES)
