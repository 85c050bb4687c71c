"""Run folders are numbered and never shared."""

import threading
from pathlib import Path

import pytest

from yolov7_deploy._output_folder import create_run_folder, new_run_folder
from yolov7_deploy.errors import UsageError


def test_run_folders_are_numbered_after_the_highest(tmp_path):
    assert create_run_folder(tmp_path / "runs" / "exp").name == "exp"
    for name in ("exp", "exp2", "exp9", "export", "exp_old", "yolov7-w6"):
        (tmp_path / name).mkdir()
    assert create_run_folder(tmp_path / "exp") == tmp_path / "exp10" and (tmp_path / "exp10").is_dir()
    assert [create_run_folder(tmp_path / "yolov7").name for _ in range(2)] == ["yolov7", "yolov72"]


def test_an_existing_folder_is_used_only_on_request(tmp_path):
    for folder in ("exp", "exp"):
        with new_run_folder(tmp_path / folder, exist_ok=True) as used:
            (used / "a.txt").touch()
        assert used == tmp_path / "exp"
    with new_run_folder(tmp_path / "exp") as other:
        assert other == tmp_path / "exp2"


def test_a_named_folder_that_does_not_exist_is_created_even_if_numbered_ones_exist(tmp_path):
    (tmp_path / "exp2").mkdir()
    with new_run_folder(tmp_path / "exp", exist_ok=True) as used:
        assert used == tmp_path / "exp" and used.is_dir()
    assert not used.exists()  # nothing was written
    used.touch()
    with pytest.raises(UsageError, match="exp cannot be created"), new_run_folder(used, exist_ok=True):
        pass


def test_names_that_some_file_systems_do_not_distinguish_get_another_number(tmp_path):
    (tmp_path / "Exp").mkdir()
    assert create_run_folder(tmp_path / "exp").name == "exp2"


def test_runs_that_start_together_get_different_folders(tmp_path):
    folders, barrier = [], threading.Barrier(8)

    def start():
        barrier.wait()
        folders.extend(create_run_folder(tmp_path / "runs" / "exp") for _ in range(10))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 80 and all(folder.is_dir() for folder in folders)


def test_a_folder_without_results_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError), new_run_folder(Path("runs/detect/exp")):
        raise KeyError
    assert not (tmp_path / "runs").exists()
    with new_run_folder(Path("runs/detect/exp")) as folder:
        (folder / "a.txt").write_text("")
    assert (tmp_path / "runs/detect/exp/a.txt").exists()


def test_a_parent_that_is_a_file_is_a_usage_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        create_run_folder(tmp_path / "runs" / "exp")
