"""Temporary folders are removed, whenever a signal arrives."""

import contextlib
import signal

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
