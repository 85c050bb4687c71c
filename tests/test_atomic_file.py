"""Files are written completely or not at all, and temporary files neither collide nor stay."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from yolov7_deploy._atomic_file import PartialFile, atomic_folder, atomic_write, remove_partial_files
from yolov7_deploy._process import temporary_folder

_WRITE_AND_WAIT = """
import sys
from pathlib import Path
from yolov7_deploy._atomic_file import atomic_write
with atomic_write(Path(sys.argv[1])) as temporary:
    temporary.write_text("half of it")
    print("writing", flush=True)
    sys.stdin.read()
"""


_USE_FOLDER_AND_WAIT = """
import sys, tempfile
from yolov7_deploy._process import temporary_folder
tempfile.tempdir = sys.argv[1]
with temporary_folder("y7-work") as folder:
    (folder / "inside").mkdir()
    print("writing", flush=True)
    sys.stdin.read()
"""


def start_writer(path, code=_WRITE_AND_WAIT):
    """Start a process that is writing a file until its standard input is closed."""
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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
    assert names(tmp_path) == ["model.onnx"]


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path):
    path, texts, errors = tmp_path / "a.json", [str(number) * 1000 for number in range(8)], []

    def write(text):
        try:
            for _ in range(20):
                with atomic_write(path) as temporary:
                    temporary.write_text(text)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and path.read_text() in texts and names(tmp_path) == ["a.json"]


def test_temporary_names_cannot_be_predicted(tmp_path):
    with atomic_write(tmp_path / "a.json") as first, atomic_write(tmp_path / "a.json") as second:
        assert first != second and str(os.getpid()) not in (first.name.split("."), second.name.split("."))


def test_a_planted_link_is_never_written_through(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    tokens = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    (tmp_path / f".a.{'0' * 16}.partial.json").symlink_to(victim)
    with atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("ours")
    assert victim.read_text() == "precious" and (tmp_path / "a.json").read_text() == "ours"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.json") as temporary:
            temporary.write_text("{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode


def test_the_longest_possible_name_can_be_written(tmp_path):
    path = tmp_path / ("ä" * 125 + ".json")
    with atomic_write(path) as temporary:
        temporary.write_text("{}")
    assert path.read_text() == "{}"


# --- links and special files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_is_followed_and_stays(tmp_path, relative):
    target, link = tmp_path / "disk" / "real.onnx", tmp_path / "model.onnx"
    target.parent.mkdir()
    target.write_text("older")
    link.symlink_to("disk/real.onnx" if relative else target)
    with atomic_write(link) as temporary:
        assert temporary.parent == target.parent
        temporary.write_text("newer")
    assert link.is_symlink() and target.read_text() == "newer" and names(target.parent) == ["real.onnx"]


def test_a_link_to_a_file_that_does_not_exist_yet_creates_it(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("new/c")
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("c")
    assert (tmp_path / "new/c").read_text() == "c" and (tmp_path / "a").is_symlink()


def test_links_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"), atomic_write(tmp_path / "a"):
        pass


def test_a_device_and_an_open_file_are_written_directly(tmp_path):
    with atomic_write(Path("/dev/null")) as temporary:
        temporary.write_text("x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    script = _WRITE_AND_WAIT.replace('print("writing", flush=True)', "").replace("sys.stdin.read()", "")
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", script, "/dev/stdout"], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "half of it" and Path("/dev/stdout").is_symlink()


def test_a_write_inside_a_write_of_the_same_file_needs_no_second_temporary_file(tmp_path):
    with atomic_write(tmp_path / "a") as outer, atomic_write(outer) as inner:
        assert inner == outer
        inner.write_text("a")
    assert (tmp_path / "a").read_text() == "a" and names(tmp_path) == ["a"]


def test_a_folder_is_complete_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a" / "data") as temporary:
        (temporary / "half").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path / "a") == []
    with atomic_folder(tmp_path / "a" / "data") as temporary:
        (temporary / "all").write_text("")
        remove_partial_files(tmp_path / "a")  # another run may start
    assert names(tmp_path / "a" / "data") == ["all"] and names(tmp_path / "a") == ["data"]


# --- what killed processes leave --------------------------------------------------------------------------------------


def test_the_next_process_removes_what_a_killed_one_left(tmp_path):
    kill(start_writer(tmp_path / "model.onnx"))
    assert [name.endswith(".partial.onnx") for name in names(tmp_path)] == [True]
    with atomic_write(tmp_path / "other.json") as temporary:
        temporary.write_text("{}")
    assert names(tmp_path) == ["other.json"]


def test_a_file_that_another_process_is_writing_stays(tmp_path):
    process = start_writer(tmp_path / "model.onnx")
    before = names(tmp_path)
    remove_partial_files(tmp_path)
    assert names(tmp_path) == before
    process.communicate("")
    assert process.returncode == 0 and names(tmp_path) == ["model.onnx"]


def test_a_temporary_folder_is_private_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), temporary_folder("y7-work") as folder:
        assert folder.parent == tmp_path and stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "inside").mkdir()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_the_next_process_removes_the_temporary_folder_of_a_killed_one_and_no_other(tmp_path):
    killed, running = (start_writer(tmp_path, _USE_FOLDER_AND_WAIT) for _ in range(2))
    kill(killed)
    assert len(names(tmp_path)) == 2
    start_writer(tmp_path, _USE_FOLDER_AND_WAIT).communicate("")
    assert len(names(tmp_path)) == 1
    running.communicate("")
    assert running.returncode == 0 and names(tmp_path) == []


def test_only_files_with_names_of_this_package_are_removed(tmp_path):
    token = "0123456789abcdef"
    ours = f".a.{token}.partial.json"
    others = [f"a.{token}.partial.json", ".a.1234.partial.json", f".a.{token}.part.json", ".a.partial.json", "a.json"]
    for name in (ours, *others):
        (tmp_path / name).write_text("")
    (tmp_path / f".b.{token}.partial" / "inside").mkdir(parents=True)
    (tmp_path / f".b.{token}").mkdir()
    (tmp_path / f".c.{token}.partial").symlink_to("a.json")
    remove_partial_files(tmp_path)
    assert names(tmp_path) == sorted([*others, f".b.{token}", f".c.{token}.partial"])
    remove_partial_files(tmp_path / "absent")


def test_a_discarded_file_leaves_nothing_and_a_second_discard_is_harmless(tmp_path):
    file = PartialFile(tmp_path / "a.mp4")
    file.temporary.write_text("half")
    file.discard()
    file.discard()
    assert names(tmp_path) == []
