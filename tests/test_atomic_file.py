"""Files appear complete or not at all."""

import os

import pytest

from yolov7_deploy._atomic_file import remove_unfinished, unfinished_name, whole_file


def test_a_file_gets_its_name_at_the_end_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "model.onnx"
    with whole_file(path) as unfinished:
        unfinished.write_text("all of it")
        assert unfinished.parent == path.parent and unfinished.suffix == ".onnx" and not path.exists()
    assert path.read_text() == "all of it" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_is_interrupted_leaves_the_older_file_alone(tmp_path, error):
    path = tmp_path / "model.onnx"
    path.write_text("older")
    with pytest.raises(error), whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise error
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_says_so(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(FileExistsError), whole_file(tmp_path / "runs" / "model.onnx"):
        pass


def test_a_place_that_is_a_folder_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "model.onnx") as unfinished:
        unfinished.write_text("all of it")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    state, other = tmp_path / "state.safetensors", tmp_path / "state.best.safetensors"
    left = unfinished_name(state)
    killed = left.with_name(left.name.replace(str(os.getpid()), "123456"))
    kept = {state, other, unfinished_name(other), tmp_path / ".state.x.partial.safetensors", tmp_path / ".state.1.txt"}
    for path in (left, killed, *kept):
        path.write_text("")
    remove_unfinished(state)
    assert set(tmp_path.iterdir()) == kept
    remove_unfinished(tmp_path / "absent" / "state.safetensors")
