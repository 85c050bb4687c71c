"""Videos are written completely, or the error says how many frames there are."""

import os
import subprocess
import sys

import numpy as np
import pytest

from yolov7_deploy.errors import SourceError
from yolov7_deploy.sources import open_source
from yolov7_deploy.sources.video import VideoFile, VideoWriter

HW = (96, 128)
RATE = 10.0

# The limit of the file size acts as a full disk; it must not apply to the process that tests run in.
_WRITE_ON_A_FULL_DISK = """
import resource, sys
import numpy as np
from pathlib import Path
from yolov7_deploy.errors import SourceError
from yolov7_deploy.sources.video import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
noise = np.random.default_rng(0)
try:
    writer = VideoWriter(Path(sys.argv[1]), fps=10, hw=(96, 128))
    for _ in range(40):
        writer.write(noise.integers(0, 256, (96, 128, 3), dtype=np.uint8))
    print("saved", writer.finish())
except SourceError as error:
    print("refused", error)
"""


def grey(value):
    return np.full((*HW, 3), value, dtype=np.uint8)


def read(path):
    with VideoFile(str(path)) as video:
        return [int(image.mean()) for image, _ in video.read()], video.info.fps


@pytest.mark.parametrize("limit", [0, 30_000, 100_000])
def test_a_video_on_a_full_disk_is_an_error_and_never_a_file_without_frames(tmp_path, limit):
    path = tmp_path / "clip.mp4"
    command = [sys.executable, "-c", _WRITE_ON_A_FULL_DISK, str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused"), done.stdout + done.stderr
    assert not path.exists() or len(read(path)[0]) > 0
    assert [found for found in tmp_path.iterdir() if found != path] == []


def test_frames_are_repeated_until_the_next_one_starts(tmp_path):
    writer = VideoWriter(tmp_path / "live.mp4", fps=RATE, hw=HW)
    for value, seconds in ((20, 100.0), (120, 100.3), (130, 100.31), (220, 100.5)):  # 130 has no period of its own
        writer.write_at(grey(value), seconds)
    assert writer.end_s == pytest.approx(100.6)
    values, fps = read(writer.finish())
    assert fps == RATE
    assert np.allclose(values, [20, 20, 20, 120, 130, 220], atol=6)  # the codec is lossy


def test_times_that_go_backwards_do_not_stop_the_video(tmp_path):
    writer = VideoWriter(tmp_path / "live.mp4", fps=RATE, hw=HW)
    for seconds in (10.0, 9.0, 10.2):
        writer.write_at(grey(50), seconds)
    assert len(read(writer.finish())[0]) == 3


@pytest.mark.parametrize(("fps", "written"), [(0.5, 0.5), (29.97, 29.97), (480, 480), (0, 25), (90_000, 25)])
def test_unusual_frame_rates_of_files_are_kept_and_implausible_ones_replaced(tmp_path, fps, written):
    writer = VideoWriter(tmp_path / "clip.mp4", fps=fps, hw=HW)
    for _ in range(3):
        writer.write(grey(50))
    assert read(writer.finish())[1] == pytest.approx(written)


def test_a_file_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="cannot be created"):
        VideoWriter(tmp_path / "file" / "clip.mp4", fps=RATE, hw=HW)


def test_names_that_are_not_unicode_can_be_written_and_read(tmp_path):
    path = tmp_path / os.fsdecode(b"clip-\xff.mp4")
    writer = VideoWriter(path, fps=RATE, hw=HW)
    writer.write(grey(50))
    assert writer.finish() == path and [entry.name for entry in tmp_path.iterdir()] == [path.name]
    frames = list(open_source(tmp_path))
    assert len(frames) == 1 and frames[0].path == str(path)
    unknown = path.rename(path.with_suffix(os.fsdecode(b".\xfe")))
    with pytest.raises(SourceError, match=r"clip-\\udcff.\\udcfe is neither an image nor a video"):
        open_source(unknown)


def test_an_address_that_is_not_unicode_is_an_error():
    with pytest.raises(SourceError, match=r"rtsp://\*\*\*@cam/.* is not a valid URL"):
        open_source("rtsp://user:pass@cam/\udcff")
