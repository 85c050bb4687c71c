"""Every reader refuses what is not a regular file, and files larger than any of their kind, without waiting."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import fuzz_seeds
from yolov7_deploy._bounded_read import check_file, open_file, read_bytes, read_text
from yolov7_deploy.benchmarking.report import SpeedReport, read_ap
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.label_cache import _load as load_label_cache
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import Y7Error
from yolov7_deploy.hub import find_weights
from yolov7_deploy.image import read_image, read_image_hw
from yolov7_deploy.inspection.complexity import inspect_weights
from yolov7_deploy.inspection.engine_file import read_engine_file
from yolov7_deploy.inspection.onnx_file import read_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.precision.calibration_cache import load_calibration
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.sources import open_source, video
from yolov7_deploy.tensorrt.build_main import TimingCache
from yolov7_deploy.tensorrt.engine import Engine
from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx
from yolov7_deploy.tensorrt.plugin_library import describe_plugin
from yolov7_deploy.training.checkpoints import STATE, load_run_state
from yolov7_deploy.training.hyperparameters import read_hyperparameters
from yolov7_deploy.training.loggers import read_results

LIMIT_S = 20
HUGE_BYTES = 200 * 10**9


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """Fail a test that waits for a pipe."""

    def fail(number: int, frame: object) -> None:
        raise AssertionError(f"the reader waits for more than {LIMIT_S} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_socket(path: Path) -> None:
    folder = Path.cwd()
    os.chdir(path.parent)  # addresses of sockets have at most 107 characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(folder)


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE_BYTES)


KINDS: dict[str, Callable[[Path], None]] = {
    "named pipe": make_pipe,
    "device": make_device,
    "folder": make_folder,
    "socket": make_socket,
    "huge": make_huge,
}


def read_labels(path: Path) -> object:
    """Open a dataset in which `path` is the label file of the only image."""
    image = path.with_suffix(".png")
    image.write_bytes(fuzz_seeds.encoded(".png", fuzz_seeds.make_image()))
    (path.parent / "data.yaml").write_text("val: .\nnames: [cat]\n")
    return open_dataset(path.parent / "data.yaml")


def read_yaml_list(path: Path) -> object:
    """Open a dataset whose images are listed in `path`."""
    (path.parent / "data.yaml").write_text(f"val: {path.name}\nnames: [cat]\n")
    return open_dataset(path.parent / "data.yaml")


def read_record(path: Path) -> object:
    """Load an engine whose build record is `path`."""
    plan = path.with_suffix("")
    plan.write_bytes(fuzz_seeds.plans()[0])
    return Engine.load(plan)


def read_external_weights(path: Path) -> object:
    """Open a graph whose weights are in `path`."""
    import onnx

    proto = onnx.load_model_from_string(fuzz_seeds.graphs()[0])
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=path.name)
    (path.parent / "graph.onnx").write_bytes(proto.SerializeToString())
    return open_onnx(path.parent / "graph.onnx")


def read_state(path: Path) -> object:
    return load_run_state(path.parent)


def open_first(path: Path) -> object:
    return next(iter(open_source(path)))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "checkpoint": ("x.pt", load_checkpoint),
    "safetensors": ("x.safetensors", load_checkpoint),
    "weights by name": ("x.pt", lambda path: load_checkpoint(find_weights(path))),
    "weights for info": ("x.pt", inspect_weights),
    "ONNX model": ("x.onnx", OnnxModel.load),
    "ONNX file for TensorRT": ("x.onnx", open_onnx),
    "ONNX file for info": ("x.onnx", read_onnx),
    "external weights": ("x.data", read_external_weights),
    "detector of weights": ("x.pt", Detector),
    "detector of an ONNX file": ("x.onnx", Detector),
    "detector of an engine": ("x.engine", Detector),
    "engine": ("x.engine", Engine.load),
    "engine for info": ("x.engine", read_engine_file),
    "build record": ("x.engine.json", read_record),
    "plugin library": ("x.so", describe_plugin),
    "dataset YAML": ("x.yaml", open_dataset),
    "COCO file": ("x.json", open_dataset),
    "image list of a dataset": ("x.txt", read_yaml_list),
    "label file": ("x.txt", read_labels),
    "hyperparameters": ("x.yaml", lambda path: read_hyperparameters(str(path))),
    "calibration": ("x.npz", load_calibration),
    "calibration image": ("x.jpg", lambda path: list(open_calibration(path))),
    "image": ("x.jpg", read_image),
    "image header": ("x.jpg", read_image_hw),
    "image source": ("x.jpg", open_first),
    "image of another format": ("x.sr", open_first),
    "source list": ("x.txt", open_first),
    "training state": (STATE, read_state),
    "results": ("results.csv", read_results),
    "speed report": ("x.json", SpeedReport.load),
    "accuracy report": ("x.json", lambda path: read_ap(path, Path("weights"), sha256="0")),
}
# A folder of images is a source, and that of a dataset may have any name.
FOLDERS_ARE_READ = {"image list of a dataset", "image source", "image of another format", "calibration image"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_refuses_at_once(tmp_path, reader, kind):
    name, read = READERS[reader]
    path = tmp_path / name
    KINDS[kind](path)
    with pytest.raises(Y7Error) as caught:
        read(path)
    assert caught.value.fix
    assert not isinstance(caught.value.__cause__, MemoryError)
    if not (kind == "folder" and reader in FOLDERS_ARE_READ):
        assert name.partition(".")[0] in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "huge"])
def test_a_video_source_refuses_what_is_not_a_file(tmp_path, kind):
    path = tmp_path / "x.mp4"
    KINDS[kind](path)
    with pytest.raises(Y7Error):
        open_first(path)


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".ts", ".gif", ".mjpeg"])
def test_a_video_without_frames_is_not_searched_to_its_end(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(video, "FILE_TIMEOUT_MS", 500)
    path = tmp_path / f"x{suffix}"
    make_huge(path)
    with pytest.raises(Y7Error) as caught:
        open_first(path)
    assert caught.value.fix


@pytest.mark.parametrize("kind", KINDS)
def test_caches_that_cannot_be_read_are_missing_ones(tmp_path, kind):
    path = tmp_path / "cache"
    KINDS[kind](path)
    assert load_label_cache(path, count=1, classes=1) is None
    cache = TimingCache(str(path), device="gpu")
    assert cache._read() == b""
    assert "cannot be read" in cache.notes[0]


def test_a_label_cache_that_expands_is_a_missing_one(tmp_path):
    np.savez_compressed(tmp_path / "cache.npz", stamps=np.zeros(2**20, np.int64))
    assert load_label_cache(tmp_path / "cache.npz", count=1, classes=1) is None


# --- the functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("named pipe", "it is a named pipe, not a file"),
        ("device", "it is a device, not a file"),
        ("folder", "it is a folder, not a file"),
        ("socket", "it is a socket, not a file"),
        ("huge", f"it has {HUGE_BYTES} bytes, more than the 10 of any such file"),
    ],
)
@pytest.mark.parametrize("function", [check_file, open_file, read_bytes, read_text])
def test_the_reason_is_the_strerror_of_the_error(tmp_path, function, kind, reason):
    path = tmp_path / "x"
    KINDS[kind](path)
    with pytest.raises(OSError) as caught:
        function(path, max_bytes=10)
    assert caught.value.strerror == reason
    assert caught.value.filename == str(path)


def test_a_file_of_exactly_the_limit_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    assert read_bytes(tmp_path / "x", max_bytes=10) == b"0123456789"
    assert check_file(tmp_path / "x", max_bytes=10) == 10


def test_a_file_that_is_longer_than_its_size_is_read_up_to_the_limit():
    """Files of the kernel have a size of zero."""
    assert read_text("/proc/self/status").startswith("Name:")
    with pytest.raises(OSError, match="more than the 10 of any such file"):
        read_bytes("/proc/self/status", max_bytes=10)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000])
def test_a_name_that_no_file_can_have_is_an_os_error(name):
    with pytest.raises(OSError):
        read_bytes(name, max_bytes=10)


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "x", max_bytes=10)
