"""A small checkpoint cannot expand: copies, names and members are counted, not only the opcodes that request them."""

from __future__ import annotations

import struct
import zipfile

import pytest
import torch

from tests.support.official_modules import Model, save_official
from tests.support.torch_archives import PROTO, name, storage, text, write_archive
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.checkpoint.module_tree import MAX_MEMBERS, MAX_NAME, MAX_TENSORS, read_modules
from yolov7_deploy.checkpoint.pickle_allowlist import MAX_STORAGE_KEY, Module
from yolov7_deploy.checkpoint.safe_pickle import MAX_STEPS, read_pickle
from yolov7_deploy.checkpoint.torch_archive import MAX_DIRECTORY_BYTES, TorchFile
from yolov7_deploy.errors import CheckpointError, LoadError

ENTRIES = 20_000
COPIES = 1_000
INTEGERS = b"](" + b"".join(b"J" + struct.pack("<i", i) for i in range(ENTRIES)) + b"eq\0"
SAME = b"](" + b"K\x01" * ENTRIES + b"eq\0"
PAIRS = b"](" + b"K\x01K\x02\x86" * ENTRIES + b"eq\0"
TUPLE = b"(" + b"K\x01" * ENTRIES + b"tq\0"


def read(data: bytes) -> object:
    return read_pickle(data, source="file.pt", check_storage=lambda storage: None)


def call(function: bytes, arguments: bytes = b"h\0\x85", *, after: bytes = b"") -> bytes:
    """Return opcodes that call a function with the first memo entry again and again."""
    return function + b"q\1" + arguments + b"q\2(" + (b"h\1h\2R" + after) * COPIES + b"t."


BOMBS = {
    "a size, kept": SAME + call(name("torch", "Size")),
    "a size, dropped": SAME + call(name("torch", "Size"), after=b"0"),
    "a size of a tuple": TUPLE + call(name("torch", "Size")),
    "a set": INTEGERS + call(name("builtins", "set")),
    "an old set": INTEGERS + call(name("__builtin__", "frozenset")),
    "an ordered dict": PAIRS + call(name("collections", "OrderedDict")),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_copies_of_a_long_list_are_counted(bomb):
    assert len(bomb) < 200_000 and ENTRIES * COPIES > MAX_STEPS
    with pytest.raises(CheckpointError, match=f"more than {MAX_STEPS} opcodes and elements") as caught:
        read(PROTO + bomb)
    assert caught.value.fix


def test_a_tensor_size_longer_than_any_is_refused_before_it_is_copied():
    arguments = storage() + b"K\0h\0h\0\x89Nt"
    bomb = TUPLE + name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"R."
    with pytest.raises(CheckpointError, match="size and stride do not match"):
        read(PROTO + bomb)


def test_a_list_may_be_named_again_and_again_because_that_copies_nothing():
    value = read(PROTO + SAME + b"(" + b"h\0" * ENTRIES + b"t.")
    assert isinstance(value, tuple)
    assert len({id(entry) for entry in value}) == 1


def test_many_storages_with_one_long_name_are_refused():
    key = text("1" * (MAX_STORAGE_KEY + 1)) + b"q\5"
    identity = b"(" + text("storage") + name("torch", "FloatStorage") + key + text("cpu") + b"K\1tq\6Q"
    with pytest.raises(CheckpointError, match=f"a storage whose name has {MAX_STORAGE_KEY + 1} characters"):
        read(PROTO + identity + b"h\6Q" * COPIES + b".")


# --- module trees -----------------------------------------------------------------------------------------------------


def module(children: dict[object, object] | None = None, **tables: object) -> Module:
    empty: dict[str, object] = {"_modules": children or {}, "_parameters": {}, "_buffers": {}}
    return Module("models.common.Conv", {**empty, **tables})


@pytest.mark.parametrize("table", ["_modules", "_parameters", "_buffers"])
def test_members_that_are_shared_by_many_modules_are_counted_every_time(table):
    shared = {str(i): None for i in range(1000)}
    child = module(**{table: shared})
    tree = module({str(i): child for i in range(MAX_MEMBERS // 1000 + 1)})
    with pytest.raises(CheckpointError, match="cyclic or larger than any network"):
        read_modules(tree, source="file.pt")


@pytest.mark.parametrize("table", ["_modules", "_parameters", "_buffers"])
def test_a_member_with_a_long_name_is_refused(table):
    tree = module(**{table: {"x" * (MAX_NAME + 1): module() if table == "_modules" else None}})
    with pytest.raises(CheckpointError, match=f"has a name of {MAX_NAME + 1} characters"):
        read_modules(tree, source="file.pt")


def test_a_class_name_longer_than_any_is_refused(tmp_path):
    path = save_official({"model": Model(names=["x" * 5000] * 2)}, tmp_path / "names.pt")
    with pytest.raises(CheckpointError, match="class name of 5000 characters"):
        load_checkpoint(path)


def test_a_state_dict_with_more_tensors_than_any_network_is_refused(tmp_path):
    one = torch.zeros(1)
    torch.save({f"model.{i}.weight": one for i in range(MAX_TENSORS + 1)}, tmp_path / "many.pt")
    with pytest.raises(CheckpointError, match=f"has {MAX_TENSORS + 1} tensors"):
        load_checkpoint(tmp_path / "many.pt")


# --- archives ---------------------------------------------------------------------------------------------------------


def test_an_archive_with_a_huge_table_of_contents_is_refused_before_it_is_read(tmp_path):
    path = write_archive(tmp_path / "members.pt", PROTO + b"N.")
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(100):
            archive.writestr(zipfile.ZipInfo(f"{i}-" + "x" * 50_000), b"")
    assert path.stat().st_size > MAX_DIRECTORY_BYTES
    with pytest.raises(LoadError, match="its table of contents has"):
        TorchFile(path)


def test_tensors_are_counted_with_the_storages_they_are_read_from(tmp_path):
    torch.save({"x": torch.ones(1000), "y": torch.ones(1000)}, tmp_path / "x.pt")
    with TorchFile(tmp_path / "x.pt") as file:
        assert isinstance(file.root, dict)
        assert sum(int(file.array(entry).sum()) for entry in file.root.values()) == 2000
