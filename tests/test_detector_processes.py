"""Detectors in other processes: children of `os.fork` do not hang, and a pickled Detector opens its file again."""

import copy
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.support.child_processes import in_forked_child
from tests.support.sample_images import BOX_TOLERANCE, CONF, IMAGES, MAX_DET, assert_identical, assert_same
from tests.support.small_models import HW
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, LoadError, UsageError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork processes")
# Python 3.12 warns about forks of processes with threads, which is what these tests are about.
ignore_fork_warning = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
KINDS = ["torch", "plugin"]


@pytest.fixture
def opened(files):
    """Return a function that opens a Detector of a kind; it is closed at the end of the test."""
    detectors = []

    def get(kind):
        detectors.append(Detector(files(kind), img=HW, conf=CONF, max_det=MAX_DET, device="cpu"))
        return detectors[-1]

    yield get
    for detector in detectors:
        detector.close()


# --- os.fork --------------------------------------------------------------------------------------------------------


@needs_fork
@ignore_fork_warning
@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_child_detects_submits_opens_and_closes(opened, files, kind):
    detector = opened(kind)
    expected = detector.submit(IMAGES[2]).result(timeout=60)

    def work():
        found = [detector(IMAGES[2]), detector.submit(IMAGES[2]).result(timeout=60)]
        with Detector(files(kind), img=HW, conf=CONF, max_det=MAX_DET, device="cpu") as other:
            found.append(other(IMAGES[2]))
        detector.close()
        with pytest.raises(UsageError, match="closed"):
            detector(IMAGES[2])
        return found

    for found in in_forked_child(work):
        assert_same(found, expected)
    assert_same(detector.submit(IMAGES[2]).result(timeout=60), expected)


@needs_fork
@ignore_fork_warning
@pytest.mark.parametrize("kind", KINDS)
def test_a_child_that_is_forked_during_calls_of_other_threads_detects(opened, kind):
    detector, stop = opened(kind), threading.Event()
    expected = detector(IMAGES[0])

    def work():
        while not stop.is_set():
            detector(IMAGES[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert_same(in_forked_child(lambda: detector(IMAGES[0])), expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@needs_fork
@ignore_fork_warning
def test_a_child_of_a_child_and_a_child_in_another_folder_detect(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files("plugin").parent)
    with Detector(files("plugin").name, conf=CONF, max_det=MAX_DET, device="cpu") as detector:
        expected = detector(IMAGES[0])

        def work():
            os.chdir(tmp_path)
            return detector(IMAGES[0]), in_forked_child(lambda: detector(IMAGES[0]))

        for found in in_forked_child(work):
            assert_identical(found, expected)


@needs_fork
@ignore_fork_warning
def test_a_child_does_not_open_a_file_that_has_changed(files, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(files("plugin").read_bytes())
    with Detector(path, device="cpu") as detector:
        os.utime(path, (0, 0))
        with pytest.raises(LoadError, match="has changed"):
            in_forked_child(lambda: detector(IMAGES[0]))
        path.unlink()
        with pytest.raises(LoadError, match="removed"):
            in_forked_child(lambda: detector(IMAGES[0]))
        detector(IMAGES[0])


@needs_fork
@ignore_fork_warning
def test_a_child_with_one_torch_thread_says_so_once(opened, monkeypatch):
    detector = opened("torch")
    detector._runtime._threads = 8  # as on a machine with more cores

    def work():
        records = []
        logging.getLogger("yolov7_deploy").addHandler(handler := logging.Handler())
        handler.emit = lambda record: records.append(record.getMessage())
        detector.batch([IMAGES[0]])
        detector.batch([IMAGES[0]])
        return records

    (message,) = in_forked_child(work)
    assert "one thread" in message and "spawn" in message


@needs_fork
@ignore_fork_warning
def test_a_child_is_refused_a_gpu_of_its_parent(opened, monkeypatch):
    detector = opened("torch")
    monkeypatch.setattr(detector._runtime, "_on_gpu", True)
    session = opened("plugin")
    monkeypatch.setattr(session._runtime._session, "device", "cuda:0")

    def work():
        for one in (detector, session):
            with pytest.raises(DeviceError, match="cannot be used in a child process") as caught:
                one(IMAGES[0])
            assert "spawn" in caught.value.fix
            one.close()
        return True

    assert in_forked_child(work)


EXIT = """
import os, signal, sys
import numpy as np
from yolov7_deploy.detector import Detector

detector = Detector(sys.argv[1], device="cpu")
image = np.full((64, 64, 3), 90, np.uint8)
detector.submit(image).result()
for work in (lambda: None, lambda: detector(image), lambda: detector.submit(image).result()):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a child that hangs is killed
        work()
        print("child", flush=False)
        sys.exit(7)
    print(os.waitpid(pid, 0)[1])
"""


@needs_fork
def test_a_forked_child_ends_with_its_own_status_and_output(files):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXIT, files("plugin")], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.split() == ["child", "1792"] * 3, result.stderr  # 7 * 256
    assert result.returncode == 0


# --- pickle ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clone", [lambda detector: pickle.loads(pickle.dumps(detector)), copy.copy, copy.deepcopy])
def test_a_copy_has_the_file_and_the_options(files, kind, clone):
    options = {"conf": CONF, "iou": 0.3, "max_det": 17, "classes": ["thing 1", 2], "multi_label": True}
    with Detector(files(kind), img=HW, device="cpu", **options) as detector, clone(detector) as other:
        assert (other.thresholds, other.input_hw, other.device) == (detector.thresholds, HW, "cpu")
        assert_identical(other(IMAGES[0]), detector(IMAGES[0]))


def test_a_pickle_is_small_and_works_in_another_folder(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files("plugin").parent)
    with Detector(files("plugin").name, device="cpu") as detector:
        monkeypatch.chdir(tmp_path)
        data = pickle.dumps(detector)
        assert len(data) < 2000
        with pickle.loads(data) as other:
            assert other.path == files("plugin")


def test_a_closed_detector_cannot_be_pickled(files):
    detector = Detector(files("plugin"), device="cpu")
    detector.close()
    with pytest.raises(UsageError, match="closed"):
        pickle.dumps(detector)


def test_errors_keep_their_fix_on_the_way_to_another_process():
    error = pickle.loads(pickle.dumps(UsageError("wrong", fix="right")))
    assert (error.message, error.fix, str(error)) == ("wrong", "right", "wrong\nright")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
@ignore_fork_warning
def test_a_process_pool_calls_a_detector(opened, method):
    detector = opened("plugin")
    expected = [detector(image) for image in IMAGES]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        for found, wanted in zip(pool.map(detector, IMAGES), expected, strict=True):
            assert found.boxes == pytest.approx(wanted.boxes, abs=BOX_TOLERANCE)
