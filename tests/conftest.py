"""Shared fixtures: files and detectors of a small model, the plugin library, and short training runs."""

import contextlib
import ctypes
import gc
import logging
import signal

import onnx
import pytest

from tests.support.engines import exported, foreign, plugin_library
from tests.support.sample_images import CONF, MAX_DET, NMS_OPTIONS
from tests.support.small_models import HW, exported_tiny, metadata_of, tiny
from tests.support.training_runs import disable_charts, single_thread, small_shapes, train_small
from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.detector import Detector
from yolov7_deploy.tensorrt.plugin_library import PLUGIN_VARIABLE


@pytest.fixture(scope="session", autouse=True)
def signals_are_not_ignored():
    """Background jobs of a shell ignore SIGINT, and `nohup` ignores SIGHUP; tests send both."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a function that writes a model file of a kind (`torch`, or an NMS of ONNX files), once per module."""
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
            inside = {} if kind == "none" else NMS_OPTIONS
            exported_tiny(nms=kind, **{**inside, **options}).save(path)
        return path

    return get


@pytest.fixture
def tiny_onnx(tmp_path):
    """Path of an exported yolov7-tiny, which builds in seconds."""
    path = tmp_path / "tiny.onnx"
    exported().save(path)
    return path


@pytest.fixture
def foreign_onnx(tmp_path):
    """Path of a small ONNX file of another exporter."""
    path = tmp_path / "foreign.onnx"
    onnx.save(foreign(), path)
    return path


@pytest.fixture(scope="session")
def built_plugin(tmp_path_factory):
    """Path of the plugin library (`None` if it cannot be built), and the reason."""
    return plugin_library(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="module")
def with_plugin(built_plugin):
    """Path of the plugin library, set in its environment variable; skips if it cannot be built."""
    path, reason = built_plugin
    if path is None:
        pytest.skip(f"the plugin cannot be built: {reason}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLUGIN_VARIABLE, path)
        yield path


@pytest.fixture(scope="module")
def detectors(files):
    """Return a function that opens detectors by kind, with the same thresholds."""
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
    """A detector whose file does not contain NMS, so it accepts all thresholds."""
    return detectors("torch")


@pytest.fixture
def plugin(detectors):
    """A detector whose file contains NMS as a plugin node."""
    return detectors("plugin")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep compiled networks and downloads out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


PACKAGE_LOGGER = logging.getLogger("yolov7_deploy")
LEVELS = PACKAGE_LOGGER.level, logging.lastResort.level


@pytest.fixture(autouse=True)
def _default_verbosity():
    """Undo what a command that ran in this process, in a test or in a fixture of a module, chose to log."""
    PACKAGE_LOGGER.setLevel(LEVELS[0])
    logging.lastResort.setLevel(LEVELS[1])
    yield
    PACKAGE_LOGGER.setLevel(LEVELS[0])
    logging.lastResort.setLevel(LEVELS[1])


@pytest.fixture(scope="module", autouse=True)
def _free_memory(request):
    """Free what a module cached, and return freed memory to the system: its networks are gigabytes."""
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear") and value.__module__ == request.module.__name__:
            value.cache_clear()
    _trim_memory()


@pytest.fixture(autouse=True)
def _free_memory_of_slow_tests(request):
    yield
    if request.node.get_closest_marker("slow"):
        _trim_memory()


def _trim_memory():
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="module")
def one_torch_thread():
    """Run torch with one thread; see `single_thread`."""
    with single_thread():
        yield


@pytest.fixture
def no_charts(monkeypatch):
    """Do not draw charts in training runs."""
    disable_charts(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """YAML of a dataset with a few images."""
    return small_shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted_run(data, one_torch_thread, tmp_path_factory):
    """Folder of a run of two epochs without interruption or error."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train_small(data, folder, epochs=2)
    return folder
