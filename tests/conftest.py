"""What several modules share: a small model in every kind of file and Detectors of it; small trainings."""

import contextlib
import ctypes
import gc

import onnx
import pytest

from tests.support.engines import exported, foreign, plugin_library

# Two runtimes add up in another order; boxes are up to 1500 pixels wide, and small images come back enlarged.
from tests.support.sample_images import CONF, MAX_DET, SUPPRESSION
from tests.support.small_models import HW, exported_tiny, metadata_of, tiny
from tests.support.training_runs import Notes, leave_out_charts, one_thread, small_request, small_shapes
from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.detector import Detector
from yolov7_deploy.tensorrt.plugin_library import PLUGIN_VARIABLE
from yolov7_deploy.training import run as training


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights files by kind, each written once."""
    folder = tmp_path_factory.mktemp("files")

    def get(kind="torch", **options):
        name = "_".join([kind, *(f"{key}-{value}" for key, value in sorted(options.items()))])
        path = folder / f"{name}.{'safetensors' if kind == 'torch' else 'onnx'}"
        if not path.exists() and kind == "torch":
            model = tiny()
            checkpoint = Checkpoint(
                tensors=model.state_dict(),
                variant="yolov7-tiny",
                training=False,
                class_names=metadata_of(model).class_names,
                anchors=model.anchors,
            )
            save_checkpoint(checkpoint, path)
        elif not path.exists():
            inside = {} if kind == "none" else SUPPRESSION
            exported_tiny(nms=kind, **{**inside, "multi_label": False, **options}).save(path)
        return path

    return get


@pytest.fixture(name="tiny")
def tiny_file(tmp_path):
    """A file of ours that builds in seconds."""
    path = tmp_path / "tiny.onnx"
    exported().save(path)
    return path


@pytest.fixture(name="small")
def small_file(tmp_path):
    """A file of somebody else's with one node."""
    path = tmp_path / "small.onnx"
    onnx.save(foreign(), path)
    return path


@pytest.fixture(scope="session")
def built_plugin(tmp_path_factory):
    """Path of our plugin library, or `None`, and why there is none."""
    return plugin_library(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="module")
def with_plugin(built_plugin):
    """Our plugin library is found; skips where it cannot be built."""
    path, why = built_plugin
    if path is None:
        pytest.skip(f"the plugin cannot be built here: {why}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLUGIN_VARIABLE, path)
        yield path


@pytest.fixture(scope="module")
def detectors(files):
    """Open Detectors by kind, with the same thresholds."""
    opened = {}

    def get(kind, **options):
        key = (kind, *sorted(options.items()))
        if key not in opened:
            opened[key] = Detector(files(kind, **options), img=HW, conf=CONF, max_det=MAX_DET, device="cpu")
        return opened[key]

    yield get
    for detector in opened.values():
        detector.close()


@pytest.fixture
def detector(detectors):
    """One whose NMS is outside, so that everything may be asked of it."""
    return detectors("torch")


@pytest.fixture
def plugin(detectors):
    """One whose NMS is inside the file."""
    return detectors("plugin")


@pytest.fixture(autouse=True)
def _memory_comes_back(request):
    """The largest networks leave gigabytes with the C library, which keeps them unless asked: a suite has many."""
    yield
    if request.node.get_closest_marker("slow"):
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="module")
def one_torch_thread():
    """Sums in one order; and two threads of tiny operations only wait for each other."""
    with one_thread():
        yield


@pytest.fixture
def no_charts(monkeypatch):
    """For trainings that are not about their images."""
    leave_out_charts(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The YAML of a few images to train on."""
    return small_shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, one_torch_thread, tmp_path_factory):
    """The folder of a training of two epochs in which nothing went wrong."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    training.train(small_request(data, folder, epochs=2), watch=Notes())
    return folder
