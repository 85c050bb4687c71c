"""No checkpoint can run code, hang the reader or crash it."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.torch_archives import PROTO, counts, name, number, storage, tensor, text, write_archive
from yolov7_deploy.checkpoint.pickle_allowlist import Inert, Module, TensorEntry
from yolov7_deploy.checkpoint.safe_pickle import MAX_BYTES, read_pickle
from yolov7_deploy.checkpoint.torch_archive import TorchFile
from yolov7_deploy.errors import CheckpointError, UnsafeCheckpointError, Y7Error


def read(data: bytes) -> object:
    return read_pickle(data, source="file.pt", check_storage=lambda storage: None)


class Call:
    """An object that pickles as a function call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Stateful:
    """An object that pickles as an `OrderedDict` with a state."""

    def __init__(self, state: object) -> None:
        self.state = state

    def __reduce__(self):
        return (collections.OrderedDict, (), self.state)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Path of the file that hostile code would create."""
    return tmp_path / "code-ran"


def refused(tmp_path: Path, pickled: bytes, *, named: str, marker: Path) -> None:
    path = write_archive(tmp_path / "evil.pt", pickled)
    with pytest.raises(UnsafeCheckpointError) as caught:
        TorchFile(path)
    assert named in caught.value.message
    assert caught.value.fix
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_os_system_is_refused_by_name(tmp_path, marker, protocol):
    evil = pickle.dumps({"model": Call(os.system, f"touch {marker}")}, protocol)
    refused(tmp_path, evil, named=f"{os.system.__module__}.system", marker=marker)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "named"),
    [(eval, "eval"), (exec, "exec"), (__import__, "__import__"), (getattr, "getattr"), (open, "open")],
)
def test_every_builtin_function_is_refused_by_name(tmp_path, marker, protocol, function, named):
    evil = pickle.dumps(Call(function, f"open({str(marker)!r}, 'w')"), protocol)
    refused(tmp_path, evil, named=named, marker=marker)


def test_eval_reached_through_getattr_is_refused(tmp_path, marker):
    get = name("builtins", "getattr") + b"(" + name("builtins", "__import__") + b"(" + text("builtins") + b"tR"
    evil = PROTO + get + text("eval") + b"tR(" + text(f"open({str(marker)!r}, 'w')") + b"tR."
    refused(tmp_path, evil, named="getattr", marker=marker)


def test_the_getattr_of_a_fused_model_is_explained():
    with pytest.raises(UnsafeCheckpointError, match="before fuse"):
        read(PROTO + name("builtins", "getattr") + b".")


def test_torch_hub_is_refused_by_name(tmp_path, marker):
    evil = PROTO + name("torch.hub", "load") + b"(" + text("someone/repo") + b"tR."
    refused(tmp_path, evil, named="torch.hub.load", marker=marker)


def test_subprocess_in_the_state_of_an_allowed_class_is_refused(tmp_path, marker):
    evil = pickle.dumps(Stateful({"deep": [Stateful((Call(subprocess.call, ["touch", str(marker)]),))]}), 4)
    refused(tmp_path, evil, named="subprocess.call", marker=marker)


def test_a_setstate_payload_inside_a_module_is_refused(tmp_path, marker):
    call = name("posix", "system") + b"(" + text(f"touch {marker}") + b"tR"
    evil = PROTO + name("models.common", "Conv") + b")\x81}" + text("__setstate__") + call + b"sb."
    refused(tmp_path, evil, named="posix.system", marker=marker)


def test_a_setstate_attribute_of_a_module_is_only_data():
    module = read(PROTO + name("models.common", "Conv") + b")\x81}" + text("__setstate__") + text("x") + b"sb}b.")
    assert isinstance(module, Module)
    assert module.state == {}


@pytest.mark.parametrize("attribute", ["system", "path.join.__globals__", "a.b"])
def test_dotted_names_of_stack_global_are_refused(tmp_path, marker, attribute):
    refused(tmp_path, b"\x80\x04" + text("os") + text(attribute) + b"\x93.", named=f"os.{attribute}", marker=marker)


@pytest.mark.parametrize("attribute", ["OrderedDict.fromkeys", "OrderedDict.__init__.__globals__", "abc.sys"])
def test_attributes_of_allowed_names_are_refused(tmp_path, marker, attribute):
    evil = b"\x80\x04" + text("collections") + text(attribute) + b"\x93."
    refused(tmp_path, evil, named=f"collections.{attribute}", marker=marker)


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (b"(" + text("true") + b"iposix\nsystem\n.", "posix.system"),
        (b"(imodels.common\nConv\n.", "models.common.Conv"),
        (b"(" + name("posix", "system") + text("true") + b"o.", "posix.system"),
        (b"(" + name("models.common", "Conv") + b"o.", "OBJ"),
        (b"\x82\x01.", "entry 1 of the extension registry"),
        (b"\x83\x01\x02.", "entry 513 of the extension registry"),
        (b"\x84\x01\x00\x00\x00.", "entry 1 of the extension registry"),
        (name("models.common", "Conv") + b")}\x92.", "NEWOBJ_EX"),
        (b"Pposix.system\n.", "PERSID"),
    ],
)
def test_rare_opcodes_are_refused(tmp_path, marker, evil, named):
    refused(tmp_path, PROTO + evil, named=named, marker=marker)


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (name("models.common", "Conv") + b")R", "a call of models.common.Conv"),
        (name("torch", "FloatStorage") + b")\x81", "an instance of torch.FloatStorage"),
        (name("collections", "OrderedDict") + b")\x81", "an instance of collections.OrderedDict"),
        (name("models.common", "Conv") + b"K\x01\x85\x81", "with arguments"),
        (name("models.common", "Conv") + b"}b", "a change of state of models.common.Conv"),
        (name("collections", "OrderedDict") + b"}b", "a change of state of collections.OrderedDict"),
        (text("print") + b")R", "a call of a str"),
        (text("print") + b")\x81", "an instance of a str"),
    ],
)
def test_allowed_names_can_only_be_used_for_their_purpose(tmp_path, marker, evil, named):
    refused(tmp_path, PROTO + evil + b".", named=named, marker=marker)


@pytest.mark.parametrize(
    "identity",
    [
        text("0"),
        b"(" + text("module") + text("a") + text("b") + b"t",
        b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\x01t",
        b"(" + text("storage") + name("collections", "OrderedDict") + text("0") + text("cpu") + b"K\x01t",
        b"(" + text("storage") + name("torch", "FloatStorage") + b"K\x00" + text("cpu") + b"K\x01t",
        b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + number(-1) + b"t",
        b"N",
    ],
)
def test_invalid_persistent_ids_are_refused(identity):
    with pytest.raises(UnsafeCheckpointError, match="persistent id"):
        read(PROTO + identity + b"Q.")


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "a/b", "0\x00", "", "..", "é", "a\\b"])
def test_storage_keys_that_are_paths_are_refused(tmp_path, key):
    path = write_archive(tmp_path / "evil.pt", PROTO + storage(key) + b".", {"0": bytes(24)})
    with pytest.raises(UnsafeCheckpointError, match="storage"):
        TorchFile(path)


def test_names_that_would_break_a_terminal_are_shown_escaped():
    with pytest.raises(UnsafeCheckpointError) as caught:
        read(PROTO + name("os\x1b[2J", "x" * 10_000) + b".")
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "bad",
    [
        tensor(0, counts(7), counts(1)),
        tensor(1, counts(2, 3), counts(3, 1)),
        tensor(0, counts(2, 2), counts(5, 1)),
        tensor(-1, counts(2), counts(1)),
        tensor(0, counts(-2), counts(1)),
        tensor(0, counts(2), counts(-1)),
        tensor(0, counts(2, 3), counts(1)),
        tensor(0, counts(2**60, 2**60), counts(0, 0)),
        tensor(0, counts(0, 2**60), counts(0, 0)),
        tensor(0, counts(*[1] * 65), counts(*[1] * 65)),
        tensor(0, text("size"), counts(1)),
        tensor(0, counts(1), counts(1), where=text("storage")),
    ],
)
def test_tensors_outside_their_storage_are_refused(bad):
    with pytest.raises(CheckpointError, match="damaged"):
        read(PROTO + bad + b".")


@pytest.mark.parametrize(
    "bomb",
    [
        b"(" * 5_000_000 + b".",
        b"]" * 10 + b"r\xff\xff\xff\xff" + b"0" * 9,
        b"]q\x00" + b"h\x00\x86h\x00a" * 10,
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8d" + struct.pack("<Q", 2**62) + b".",
        b"\x8a\xff" + b"\xff" * 255 + b".",
        b"}" + b")" + b"\x85" * 200_000 + b"Ns.",
        b"N0" * 2_200_000 + b".",
        b"h\x00.",
        b"",
        b".",
        b"(",
        b"t.",
        b"\x00.",
        b"Xabc",
        b"}(K\x01u.",
        b"](K\x01u.",
        b"}]Ns.",
        b"X\x01\x00\x00\x00\xff.",
    ],
)
def test_bombs_and_garbage_raise_a_clear_error(bomb):
    with pytest.raises(CheckpointError) as caught:
        read(PROTO + bomb)
    assert caught.value.fix


def test_a_pickle_larger_than_any_checkpoint_is_refused():
    with pytest.raises(CheckpointError, match="has 33554433 bytes"):
        read(bytes(MAX_BYTES + 1))


@pytest.mark.parametrize("nest", [b"\x85", b"\x86", b"]q\x01h\x01a"])
def test_deep_or_cyclic_nesting_is_read_and_freed_safely(nest):
    start = b"))" if nest == b"\x86" else b")"
    value = read(PROTO + start + (b"N" + nest if nest == b"\x86" else nest) * 200_000 + b".")
    assert value is not None
    del value


def test_a_cyclic_list_is_read():
    value = read(PROTO + b"]q\x00h\x00a.")
    assert isinstance(value, list)
    assert value[0] is value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_equals_what_pickle_reads(protocol):
    value = {
        "epoch": -1,
        "ints": [0, 255, 256, 65_536, -(2**31), 2**63 - 1, 2**40],
        "floats": (0.1, -1e300),
        "nested": [[], {}, (), {"a": {"b": [None, True, False]}}],
        "text": "äöü\u2603",
        "set": {1, 2},
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        7: ("x", ("y", ("z",), 1, 2, 3)),
    }
    result = read(pickle.dumps(value, protocol))
    assert result == value
    assert isinstance(result, dict)
    assert list(result["ordered"]) == ["b", "a"]


def test_numpy_values_become_inert():
    result = read(pickle.dumps({"best_fitness": np.array([0.5]), "scalar": np.float64(0.5)}, 2))
    assert isinstance(result, dict)
    assert all(isinstance(value, Inert) for value in result.values())


@st.composite
def mutations(draw):
    return draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), min_size=1, max_size=6))


def mutated(data: bytes, changes: list[tuple[float, bytes]]) -> bytes:
    for where, piece in changes:
        at = int(where * len(data))
        data = data[:at] + piece + data[at + (len(piece) or 1) :]
    return data


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


VALID = saved({"model": {"a.weight": torch.arange(6.0).reshape(2, 3).t(), "n": torch.tensor(3)}, "names": ["x"] * 3})
with zipfile.ZipFile(io.BytesIO(VALID)) as _archive:
    VALID_PICKLE = _archive.read("archive/data.pkl")


def open_all(path: Path) -> None:
    """Read a file and the tensors of its model; only errors of this package may be raised."""
    try:
        with TorchFile(path) as file:
            model = file.root.get("model") if isinstance(file.root, dict) else None
            for entry in model.values() if isinstance(model, dict) else ():
                if isinstance(entry, TensorEntry):
                    assert file.array(entry).shape == entry.shape
    except Y7Error as error:
        assert error.message
        assert error.fix


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.binary(max_size=400))
def test_random_opcodes_give_a_value_or_our_error(data):
    try:
        read(PROTO + data)
    except Y7Error as error:
        assert error.fix


@FUZZ
@given(changes=mutations())
def test_mutated_pickles_give_a_value_or_our_error(tmp_path, changes):
    with zipfile.ZipFile(io.BytesIO(VALID)) as archive:
        members = {m.removeprefix("archive/data/"): archive.read(m) for m in archive.namelist() if "/data/" in m}
    open_all(write_archive(tmp_path / "mutated.pt", mutated(VALID_PICKLE, changes), members))


@FUZZ
@given(changes=mutations())
def test_mutated_files_give_a_value_or_our_error(tmp_path, changes):
    path = tmp_path / "mutated.pt"
    path.write_bytes(mutated(VALID, changes))
    open_all(path)


@FUZZ
@given(
    data=st.binary(max_size=200), head=st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x08\x07"])
)
def test_random_files_give_our_error(tmp_path, data, head):
    path = tmp_path / "random.pt"
    path.write_bytes(head + data)
    with pytest.raises(Y7Error) as caught:
        TorchFile(path)
    assert caught.value.fix
