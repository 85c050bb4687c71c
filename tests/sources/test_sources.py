"""Every kind of source yields its frames in order, and every empty or broken one reports what is wrong."""

from __future__ import annotations

import base64
import http.server
import os
import shutil
import threading
import time
import urllib.parse
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest

from yolov7_deploy.errors import ImageError, SourceError, UsageError
from yolov7_deploy.sources import open_source, resolve
from yolov7_deploy.sources.video import VideoFile, VideoWriter
from yolov7_deploy.visualize import write_image

VIDEO_HW = (48, 64)
VIDEO_FPS = 10.0
CODEC_ERROR = 12  # maximum error of lossy video in a flat frame, in grey levels


def make_image(value: int = 50) -> np.ndarray:
    return np.full((20, 30, 3), value, dtype=np.uint8)


def make_video(path: Path, frames: int = 6) -> Path:
    writer = VideoWriter(path, fps=VIDEO_FPS, hw=VIDEO_HW)
    for number in range(frames):
        writer.write(np.full((*VIDEO_HW, 3), number * 30, dtype=np.uint8))
    return writer.finish()


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, name in enumerate(["b.png", "a.png", "C.PNG"]):
        write_image(tmp_path / name, make_image(10 * number))
    write_image(tmp_path / "deep" / "er" / "d.png", make_image(99))
    (tmp_path / "notes.md").write_text("not an image")
    (tmp_path / "._a.png").write_bytes(b"macOS resource fork")
    return tmp_path


def names(source) -> list[str]:
    return [Path(frame.path).name for frame in source]


def test_a_folder_yields_its_own_images_sorted(folder):
    source = open_source(folder)
    assert names(source) == ["C.PNG", "a.png", "b.png"]
    assert source.total == 3
    assert not source.is_live
    assert [frame.index for frame in source] == [0, 1, 2]


@pytest.mark.parametrize("pattern,count", [("*.png", 2), ("**/*.png", 3), ("**", 4), ("[ab].png", 2), ("**/*", 4)])
def test_patterns_find_images(folder, pattern, count):
    assert len(names(open_source(f"{folder}/{pattern}"))) == count


def test_what_is_left_out_of_a_folder_is_listed_with_its_reason(folder):
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "list.txt").write_text("a.png")
    reasons = {Path(item.path).name: item.reason for item in open_source(folder).left_out}
    assert reasons == {"._a.png": "hidden", "deep": "subfolder", "gone.jpg": "broken link", "notes.md": ".md"}
    assert open_source(folder / "a.png").left_out == ()


def test_hidden_folders_match_only_a_pattern_that_names_them(folder):
    write_image(folder / ".cache" / "er" / "x.png", make_image())
    write_image(folder / ".cache" / "x.png", make_image())
    assert "x.png" not in names(open_source(f"{folder}/**/*.png"))
    source = open_source(f"{folder}/*/*/*")
    assert names(source) == ["d.png"]
    assert [(Path(item.path).name, item.reason) for item in source.left_out] == [(".cache", "hidden")]
    assert names(open_source(f"{folder}/.cache/*.png")) == names(open_source(f"{folder}/.c*/*.png")) == ["x.png"]


def test_patterns_follow_links_and_end_at_loops(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "link").symlink_to(folder)
    (folder / "deep" / "loop").symlink_to(folder)
    assert sorted(names(open_source(f"{other}/**/*.png"))) == ["a.png", "b.png", "d.png"]


def test_patterns_list_what_they_match_and_cannot_use(folder):
    assert [item.reason for item in open_source(f"{folder}/*").left_out] == ["hidden", ".md"]
    assert open_source(f"{folder}/*.png").left_out[0].reason == "hidden"


def test_patterns_are_relative_to_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names(open_source("*.png")) == ["a.png", "b.png"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    write_image(tmp_path / "a[1].png", make_image())
    assert names(open_source(tmp_path / "a[1].png")) == ["a[1].png"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("cam[1]/*.png", ["1.png", "2.png"]),
        ("cam[1]/**/*.png", ["1.png", "2.png"]),
        ("cam[2]/*.png", ["x.png"]),
        ("cam[[]1]/1.png", ["1.png"]),
        ("cam*/[12].png", ["1.png", "2.png"]),
        ("cam[0-9]/*.png", ["x.png"]),
        ("shot[a]*.png", ["shot[a]1.png", "shot[a]2.png"]),
    ],
)
def test_folders_of_a_pattern_may_have_brackets_in_their_names(tmp_path, monkeypatch, pattern, found):
    for name in ("cam[1]/1.png", "cam[1]/2.png", "cam2/x.png", "shot[a]1.png", "shot[a]2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_image(tmp_path / name, make_image())
    monkeypatch.chdir(tmp_path)
    assert names(open_source(pattern)) == found
    (tmp_path / "list.txt").write_text(pattern)
    assert names(open_source("list.txt")) == found


def test_an_empty_folder_is_an_error_that_lists_the_suffixes(tmp_path):
    with pytest.raises(SourceError, match=r"no image and no video") as caught:
        open_source(tmp_path)
    assert ".jpg" in caught.value.fix


def test_the_search_for_images_in_subfolders_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(resolve, "MAX_SUBFOLDERS", 20)
    for number in range(50):
        (tmp_path / f"{number:02d}").mkdir()
    write_image(tmp_path / "49" / "a.png", make_image())
    with pytest.raises(SourceError, match="no image and no video") as caught:
        open_source(tmp_path)
    assert "To include subfolders" not in caught.value.fix
    write_image(tmp_path / "10" / "a.png", make_image())
    with pytest.raises(SourceError, match="no image and no video") as caught:
        open_source(tmp_path)
    assert "To include subfolders" in caught.value.fix


def test_a_line_that_is_too_long_for_a_path_or_url_is_skipped_at_once(tmp_path):
    write_image(tmp_path / "a.png", make_image())
    (tmp_path / "list.txt").write_text('{"a":' * 200_000 + "\na.png\n")
    started = time.process_time()
    source = open_source(tmp_path / "list.txt", on_error="skip")
    assert names(source) == ["a.png"] and time.process_time() - started < 1
    assert source.skipped[0].path == f"{tmp_path}/list.txt, line 1" and "1000000 characters" in source.skipped[0].reason


def test_a_folder_with_images_only_in_subfolders_is_an_error_with_the_pattern(folder):
    with pytest.raises(SourceError) as caught:
        open_source(folder / "deep")
    assert "**" in caught.value.fix


@pytest.mark.parametrize("pattern", ["*.tif", "absent/*.png", "*.md"])
def test_a_pattern_without_match_is_an_error_that_names_the_folder(folder, pattern):
    with pytest.raises(SourceError, match="found nothing to read") as caught:
        open_source(f"{folder}/{pattern}")
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("path", ["absent.jpg", "absent", "nowhere/absent.mp4"])
def test_a_missing_file_is_an_error(path):
    with pytest.raises(SourceError, match="does not exist"):
        open_source(path)


def test_a_file_that_is_neither_image_nor_video_is_an_error(folder):
    with pytest.raises(SourceError, match="neither an image nor a video"):
        open_source(folder / "notes.md")


def test_an_image_with_an_unknown_suffix_is_recognised_by_its_content(tmp_path):
    write_image(tmp_path / "a.jpg", make_image())
    (tmp_path / "a.jpg").rename(tmp_path / "a.jpg_original")
    assert next(iter(open_source(tmp_path / "a.jpg_original"))).image.shape == (20, 30, 3)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((20, 30), np.uint8),
        np.zeros((20, 30, 4), np.uint8),
        np.zeros((20, 30), np.uint16),
        np.zeros((20, 30, 3), np.uint8)[::-1, ::2],
    ],
)
def test_arrays_become_bgr(array):
    frames = list(open_source(array))
    assert len(frames) == 1
    assert frames[0].image.dtype == np.uint8
    assert frames[0].image.shape == (*array.shape[:2], 3)
    assert frames[0].path == ""


def test_several_arrays_are_several_frames():
    assert open_source([make_image(), make_image()]).total == 2
    assert len(list(open_source(np.zeros((4, 20, 30, 3), np.uint8)))) == 4


def test_a_float_array_is_refused():
    with pytest.raises(ImageError, match="float"):
        list(open_source(np.zeros((20, 30, 3))))


@pytest.mark.parametrize("source", [None, 1.5, {"a": 1}, True])
def test_an_unsupported_type_is_a_usage_error(source):
    with pytest.raises(UsageError, match="cannot be of type"):
        open_source(source)


@pytest.mark.parametrize("source", [[], "", " ", ["", "a.jpg"], "gopher://x/y.jpg"])
def test_an_empty_source_or_unknown_scheme_is_an_error(source):
    with pytest.raises(SourceError):
        open_source(source)


@pytest.mark.parametrize("kind", ["grey", "grey16", "bgra", "colour16"])
def test_all_depths_of_png_are_read_as_bgr(tmp_path, kind):
    shape = {"grey": (9, 9), "grey16": (9, 9), "bgra": (9, 9, 4), "colour16": (9, 9, 3)}[kind]
    value, depth = (128 * 257, np.uint16) if kind.endswith("16") else (128, np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), np.full(shape, value, dtype=depth))
    image = next(iter(open_source(tmp_path / "x.png"))).image
    assert image.shape == (9, 9, 3)
    assert image.dtype == np.uint8
    assert (image == 128).all()


def damage(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"")
    (folder / "b.png").write_bytes(b"this is not an image")


def test_an_unreadable_image_is_an_error_by_default(folder):
    damage(folder)
    with pytest.raises(ImageError, match="0 bytes"):
        list(open_source(folder))


def test_with_skip_unreadable_images_are_skipped_and_listed(folder):
    damage(folder)
    source = open_source(folder, on_error="skip")
    frames = list(source)
    assert [Path(frame.path).name for frame in frames] == ["C.PNG"]
    assert [Path(item.path).name for item in source.skipped] == ["a.png", "b.png"]
    assert "0 bytes" in source.skipped[0].reason
    list(source)
    assert len(source.skipped) == 2, "a second pass starts a new list"


def test_skipping_everything_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(SourceError, match="0 bytes"):
        list(open_source(tmp_path, on_error="skip"))


def test_a_truncated_image_is_read_or_an_error_but_never_a_crash(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in (".jpg", ".png", ".bmp", ".webp", ".tif"):
        path = tmp_path / f"x{suffix}"
        write_image(path, noise)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        try:
            assert next(iter(open_source(path))).image.shape == (64, 64, 3)
        except ImageError as error:
            assert path.name in error.message


def test_paths_in_a_list_are_relative_to_the_list_or_the_working_directory(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_image(elsewhere / "here.png", make_image())
    monkeypatch.chdir(elsewhere)
    (folder / "list.txt").write_text("\ufeff# comment\n\n./a.png\nhere.png\ndeep/er\n" + f"{folder}/b.png\r\n", "utf-8")
    assert names(open_source(folder / "list.txt")) == ["a.png", "here.png", "d.png", "b.png"]


def test_a_line_that_is_longer_than_any_path_is_refused_at_once(folder):
    (folder / "list.txt").write_text("- " * 20_000)
    with pytest.raises(SourceError, match="line 1: A path or URL of 39999 characters does not exist"):
        open_source(folder / "list.txt")


def test_a_missing_file_in_a_list_is_reported_with_its_line(folder):
    (folder / "list.txt").write_text("a.png\nmissing.png\n")
    with pytest.raises(SourceError, match=r"line 2: missing\.png does not exist"):
        open_source(folder / "list.txt")
    source = open_source(folder / "list.txt", on_error="skip")
    assert names(source) == ["a.png"]
    assert [item.path for item in source.skipped] == ["missing.png"]


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe\x00broken\xff", b"~\x00.jpg", b"~/a\x00.jpg\n"])
def test_an_empty_or_binary_list_is_an_error(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(SourceError):
        open_source(tmp_path / "list.txt")


@pytest.mark.parametrize("suffix,codec", [(".mp4", "mp4v"), (".avi", "MJPG")])
def test_a_video_yields_every_frame_with_its_time(tmp_path, suffix, codec):
    path = tmp_path / f"clip{suffix}"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), VIDEO_FPS, VIDEO_HW[::-1])
    if not writer.isOpened():
        pytest.skip(f"this OpenCV has no {codec} encoder")
    for number in range(6):
        writer.write(np.full((*VIDEO_HW, 3), number * 30, dtype=np.uint8))
    writer.release()
    source = open_source(path)
    frames = list(source)
    assert source.total == 6
    assert [frame.number for frame in frames] == list(range(6))
    assert [round(frame.timestamp_s, 3) for frame in frames] == [round(n / VIDEO_FPS, 3) for n in range(6)]
    assert all(abs(float(frame.image.mean()) - frame.number * 30) < CODEC_ERROR for frame in frames)
    assert not frames[0].is_live
    with VideoFile(str(path)) as video:
        assert (video.info.fps, video.info.frames, video.info.hw) == (VIDEO_FPS, 6, VIDEO_HW)


def test_frames_of_images_and_videos_are_numbered_consecutively(tmp_path):
    make_video(tmp_path / "b.mp4", frames=3)
    write_image(tmp_path / "a.png", make_image())
    write_image(tmp_path / "c.png", make_image())
    source = open_source(tmp_path)
    assert [frame.index for frame in source] == [0, 1, 2, 3, 4]
    assert [frame.number for frame in source] == [None, 0, 1, 2, None]
    assert source.total == 5


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 100])
def test_a_broken_video_is_an_error_that_can_be_skipped(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    write_image(tmp_path / "b.png", make_image())
    with pytest.raises(SourceError, match=r"a\.mp4 is not a video"):
        list(open_source(tmp_path))
    source = open_source(tmp_path, on_error="skip")
    assert names(source) == ["b.png"]
    assert source.total is None
    assert len(source.skipped) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_playlist_that_names_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile pipe.mp4\n")
    with pytest.raises(SourceError, match=r"a\.mp4 is not a video but a playlist"):
        list(open_source(tmp_path / "a.mp4"))


@pytest.mark.parametrize("suffix", [".h264", ".h265"])
def test_raw_streams_are_videos(tmp_path, suffix):
    if "FFMPEG:                      YES" not in cv2.getBuildInformation():
        pytest.skip("this OpenCV was built without FFmpeg")
    path = Path(__file__).parent.parent / "fixtures" / f"stream{suffix}"
    with open_source(path) as source:
        assert source.total is None  # these files do not have a header with the number
        frames = list(source)
    assert [frame.number for frame in frames] == [0, 1, 2, 3, 4]
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)}
    shutil.copy(path, tmp_path / f"a{suffix.upper()}")
    assert len(list(open_source(tmp_path))) == 5


def test_a_truncated_video_yields_its_frames_and_warns(tmp_path, caplog):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), VIDEO_FPS, VIDEO_HW[::-1])
    noise = np.random.default_rng(0).integers(0, 255, (20, *VIDEO_HW, 3), dtype=np.uint8)
    for image in noise:
        writer.write(image)
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    count = len(list(open_source(path)))
    assert 0 < count < 20
    assert any("declares" in record.message for record in caplog.records)


class Handler(http.server.BaseHTTPRequestHandler):
    """A camera server; most paths are an image, with a media type that the query may replace."""

    requests: ClassVar[list[tuple[str, str | None]]] = []  # paths with their logins
    video = Path()

    def do_GET(self):
        self.requests.append((self.path, self.headers.get("Authorization")))
        path, _, media_type = urllib.parse.unquote(self.path).partition("?type=")
        data = cv2.imencode(".jpg", np.full((*VIDEO_HW, 3), 77, dtype=np.uint8))[1].tobytes()
        if path == "/live":
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            try:
                for _ in range(400):
                    self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data))
                    self.wfile.write(data + b"\r\n")
                    time.sleep(0.01)
            except OSError:
                pass  # the reader has closed the connection
        elif path == "/moved":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/snapshot")
            self.end_headers()
        elif path.startswith("/absent"):
            self.send_error(404)
        elif path == "/clip":
            self.send_file("video/mp4", self.video.read_bytes())
        else:
            self.send_file(media_type, data)

    def send_file(self, media_type, data):
        self.send_response(200)
        if media_type:
            self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Handler.requests = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "path",
    [
        *("snapshot", "shot.cgi?user=1", "ISAPI/channels/101/image", "?type=image/png", "?type=image/jpeg; q=1"),
        *("?type=application/octet-stream", "moved"),
    ],
)
def test_an_address_without_a_known_suffix_is_an_image_if_the_server_sends_one(server, path):
    with open_source(f"{server}/{path}") as source:
        assert not source.is_live and source.total == 1
        (frame,) = source
    assert frame.image.shape == (*VIDEO_HW, 3) and frame.number is None


def test_an_address_without_a_suffix_is_a_video_if_the_server_sends_one_with_its_size(server, tmp_path, monkeypatch):
    if "FFMPEG:                      YES" not in cv2.getBuildInformation():
        pytest.skip("this OpenCV was built without FFmpeg")
    monkeypatch.setattr(Handler, "video", make_video(tmp_path / "a.mp4", 5))
    with open_source(f"{server}/clip") as source:
        assert not source.is_live
        assert [frame.number for frame in source] == [0, 1, 2, 3, 4]


def test_a_web_page_is_refused(server):
    with pytest.raises(SourceError, match="is a web page"):
        open_source(f"{server}/camera?type=text/html")


@pytest.mark.parametrize("path", ["bücher/straße.jpg", "猫 1.jpg", "a b.jpg", "ä", "b%20c.jpg"])
def test_addresses_may_have_spaces_and_other_letters(server, path):
    (frame,) = open_source(f"{server}/{path}")
    assert frame.image.shape == (*VIDEO_HW, 3)
    assert frame.path == f"{server}/{path}"
    assert {urllib.parse.unquote(asked) for asked, _ in Handler.requests} == {f"/{urllib.parse.unquote(path)}"}


@pytest.mark.parametrize("path", ["shot.jpg", "snapshot", "moved"])
def test_a_login_in_an_address_is_sent_to_its_own_host_only(server, path):
    list(open_source(server.replace("http://", "http://me:p%40ss@") + f"/{path}"))
    by_path = dict(Handler.requests)
    assert base64.b64decode(by_path.pop(f"/{path}").removeprefix("Basic ")) == b"me:p@ss"
    assert set(by_path.values()) <= {None}


def test_an_image_url_is_downloaded(server):
    frames = list(open_source(f"{server}/shot.jpg?size=full"))
    assert frames[0].image.shape == (*VIDEO_HW, 3)
    assert frames[0].number is None


def test_a_url_without_an_image_is_an_error(server):
    with pytest.raises(ImageError, match="404"):
        list(open_source(f"{server}/absent.jpg"))


def test_a_real_motion_jpeg_stream_is_read_live(server):
    if "FFMPEG:                      YES" not in cv2.getBuildInformation():
        pytest.skip("this OpenCV was built without FFmpeg")
    with open_source(f"{server}/live") as source:
        for frame in source:
            assert frame.is_live
            assert abs(float(frame.image.mean()) - 77) < CODEC_ERROR
            if frame.index == 3:
                break
