"""Two processes never train in one folder; the lock of a process that ended is ignored."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support.training_runs import RecordingCallback, resume_run, train_small
from yolov7_deploy import _output_folder
from yolov7_deploy._output_folder import LOCK_NAME, lock_run_folder
from yolov7_deploy.errors import TrainingError, UsageError

_HOLD = """
import os, sys, time
from pathlib import Path
from yolov7_deploy._output_folder import lock_run_folder
with lock_run_folder(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "with child" else 1
    if child == 0:
        sys.stdin.close()
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
"""


def hold(folder, option=""):
    """Start a process that holds the lock until its standard input is closed; return it and its child's id."""
    command = [sys.executable, "-c", _HOLD, str(folder), option]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_a_running_training_is_neither_resumed_nor_started_again(data, tmp_path):
    folder, tried = tmp_path / "run", []

    def try_again():
        for start in (lambda: resume_run(folder), lambda: train_small(data, folder)):
            with pytest.raises(UsageError) as caught:
                start_elsewhere(start)
            tried.append(caught.value.message)

    def start_elsewhere(start):
        """Start in a child process, and raise the error that it has."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                start()
                os.write(writer, b"started")
            except UsageError as error:
                os.write(writer, error.message.encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader) as file:
            raise UsageError(file.read())

    train_small(data, folder, RecordingCallback({(1, 2): try_again}))
    assert f"is being trained by process {os.getpid()}" in tried[0]
    assert "already has a training run" in tried[1]
    assert not (folder / LOCK_NAME).exists()


def test_the_lock_names_the_process_that_holds_it_and_ends_with_it(tmp_path):
    process, _ = hold(tmp_path / "run")
    with pytest.raises(UsageError) as caught, lock_run_folder(tmp_path / "run"):
        pass
    assert f"process {process.pid}" in caught.value.message and f"kill {process.pid}" in caught.value.fix
    process.communicate("")
    with lock_run_folder(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_NAME).read_text() == str(os.getpid())
    assert list((tmp_path / "run").iterdir()) == []


def test_the_lock_of_a_killed_process_is_ignored_even_if_its_child_lives(tmp_path):
    process, child = hold(tmp_path, "with child")
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        assert (tmp_path / LOCK_NAME).exists()
        with lock_run_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()


def test_a_lock_file_that_was_removed_after_it_was_opened_is_created_again(tmp_path, monkeypatch):
    lock = _output_folder._lock

    def lock_and_remove(descriptor, owner):
        (tmp_path / LOCK_NAME).unlink()
        monkeypatch.undo()
        return lock(descriptor, owner)

    monkeypatch.setattr(_output_folder, "_lock", lock_and_remove)
    with lock_run_folder(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text() == str(os.getpid())


@pytest.mark.parametrize("content", ["", "999999999", "not a number", "own process"])
def test_a_lock_file_that_is_not_locked_is_ignored(tmp_path, content):
    (tmp_path / LOCK_NAME).write_text(str(os.getpid()) if content == "own process" else content)
    with lock_run_folder(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text() == str(os.getpid())


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be written"), lock_run_folder(tmp_path / "file" / "run"):
        pass
