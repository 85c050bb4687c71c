"""Temporary folders are removed, whenever a signal arrives."""

import contextlib
import signal
import subprocess
import sys

import pytest

from yolov7_deploy import _process
from yolov7_deploy._process import Interrupted, raise_interrupted, temporary_folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_temporary_folder_exists_until_the_block_ends(temporary):
    with temporary_folder("y7-test") as folder:
        (folder / "file").touch()
        assert folder.parent == temporary
    assert list(temporary.iterdir()) == []


def test_a_signal_while_the_folder_is_created_leaves_no_folder(temporary, monkeypatch):
    private_folder = _process.private_folder

    @contextlib.contextmanager
    def interrupted_folder(*arguments):
        with private_folder(*arguments) as folder:
            signal.raise_signal(signal.SIGTERM)
            yield folder

    monkeypatch.setattr(_process, "private_folder", interrupted_folder)
    with pytest.raises(Interrupted) as caught, raise_interrupted(), temporary_folder("y7-test"):
        pass
    assert caught.value.number == signal.SIGTERM
    assert list(temporary.iterdir()) == []


def test_freed_memory_is_kept_for_the_next_allocation():
    """In a process of its own, because the setting stays: a second array of 64 MiB causes hardly any page faults."""
    code = (
        "import resource, numpy as np\nfrom yolov7_deploy._process import keep_freed_memory\n"
        "def faults():\n    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n    np.ones(1 << 23)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults()\ndefault = faults()\nkeeps = keep_freed_memory()\nfaults()\nprint(keeps, default, faults())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    keeps, default, kept = child.stdout.split()
    if keeps == "False":
        pytest.skip("this C library has no mallopt")
    assert int(kept) < int(default) / 10


def test_a_system_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not _process.keep_freed_memory()
