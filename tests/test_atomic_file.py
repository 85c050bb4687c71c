"""Files are written completely or not at all."""

import os

import pytest

from yolov7_deploy._atomic_file import atomic_write, partial_path, remove_partial_files


def test_a_file_gets_its_name_at_the_end_and_its_folder_is_created(tmp_path):
    path = tmp_path / "new" / "model.onnx"
    with atomic_write(path) as temporary:
        temporary.write_text("all of it")
        assert temporary.parent == path.parent and temporary.suffix == ".onnx" and not path.exists()
    assert path.read_text() == "all of it" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_keeps_the_existing_file(tmp_path, error):
    path = tmp_path / "model.onnx"
    path.write_text("older")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_a_parent_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "runs" / "model.onnx"):
        pass


def test_a_target_that_is_a_folder_leaves_no_temporary_file(tmp_path):
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "model.onnx") as temporary:
        temporary.write_text("all of it")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_only_temporary_files_of_killed_processes_are_removed(tmp_path):
    state, other = tmp_path / "state.safetensors", tmp_path / "state.best.safetensors"
    left = partial_path(state)
    killed = left.with_name(left.name.replace(str(os.getpid()), "123456"))
    kept = {state, other, partial_path(other), tmp_path / ".state.x.partial.safetensors", tmp_path / ".state.1.txt"}
    for path in (left, killed, *kept):
        path.write_text("")
    remove_partial_files(state)
    assert set(tmp_path.iterdir()) == kept
    remove_partial_files(tmp_path / "absent" / "state.safetensors")
