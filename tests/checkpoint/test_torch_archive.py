"""Torch files are read exactly, and errors name the kind of any other file."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.torch_archives import PROTO, counts, storage, tensor, text, write_archive
from yolov7_deploy.checkpoint.pickle_allowlist import TensorEntry
from yolov7_deploy.checkpoint.torch_archive import TorchFile
from yolov7_deploy.errors import CheckpointError, LoadError

BASE = torch.arange(60).reshape(3, 4, 5)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with TorchFile(path) as file:
        assert isinstance(file.root, dict)
        return {key: file.array(entry) for key, entry in file.root.items() if isinstance(entry, TensorEntry)}


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
def test_every_dtype_is_read_exactly(tmp_path, dtype):
    value = (BASE % 7).to(dtype)
    torch.save({"x": value}, tmp_path / "x.pt")
    found = arrays(tmp_path / "x.pt")["x"]
    expected = value.float() if dtype == torch.bfloat16 else value
    assert found.dtype == expected.numpy().dtype
    assert np.array_equal(found, expected.numpy())


@pytest.mark.parametrize(
    "view",
    [
        BASE[1],
        BASE.permute(2, 0, 1),
        BASE[:, ::2, 1:4],
        BASE[0, 0, 3],
        BASE[:0],
        BASE[:, 1:2].expand(3, 6, 5),
        BASE[2:, 3:, 4:],
    ],
)
def test_views_keep_their_offset_and_stride(tmp_path, view):
    torch.save({"x": view}, tmp_path / "x.pt")
    found = arrays(tmp_path / "x.pt")["x"]
    assert np.array_equal(found, view.numpy())
    assert found.flags.c_contiguous


def test_parameters_are_tensors(tmp_path):
    torch.save({"x": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    assert np.array_equal(arrays(tmp_path / "x.pt")["x"], np.ones(2, np.float32))


def test_big_endian_files_are_read(tmp_path):
    path = write_archive(
        tmp_path / "x.pt",
        PROTO + b"}" + text("x") + tensor(0, counts(6), counts(1)) + b"s.",
        {"0": np.arange(6, dtype=">f4").tobytes()},
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", b"big")
    assert np.array_equal(arrays(path)["x"], np.arange(6, dtype=np.float32))


def message(path: Path) -> str:
    with pytest.raises(LoadError) as caught:
        TorchFile(path)
    assert caught.value.fix
    return str(caught.value)


def test_a_missing_file_is_reported(tmp_path):
    assert "does not exist" in message(tmp_path / "missing.pt")


def test_a_folder_is_reported_as_a_folder(tmp_path):
    assert "folder" in message(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html>\n<html>Not found", "text file"),
        ("größe: 3\n".encode(), "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.4.0:\xff\x01", ".onnx"),
        (b"ftrt" + bytes(40), ".engine"),
        (pickle.dumps({"a": 1}, 2), "bare pickle"),
        (b"\x00\x01\x02\x03" * 20, "not a torch file"),
        (b"PK\x03\x04" + bytes(60), "truncated"),
    ],
)
def test_the_error_names_the_kind_of_the_file(tmp_path, content, expected):
    path = tmp_path / "yolov7.pt"
    path.write_bytes(content)
    assert expected in message(path)


def test_the_legacy_format_is_refused_with_the_code_that_converts_it(tmp_path):
    torch.save({"x": BASE}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = message(tmp_path / "old.pt")
    assert "before 1.6" in found
    assert "torch.save(torch.load(" in found


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_torchscript_archive_is_reported_as_torchscript(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.ones(1)), tmp_path / "x.torchscript.pt")
    assert "TorchScript" in message(tmp_path / "x.torchscript.pt")


def test_the_error_for_a_foreign_zip_lists_its_contents(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("holiday.jpg", b"")
    assert "holiday.jpg" in message(tmp_path / "x.pt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_reported_as_truncated(tmp_path, share):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated" in message(path)


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_the_error_for_a_member_with_another_name_in_its_header_is_short(tmp_path, name):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(50_000)}, path)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(f"x/{name}").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 26 : offset + 28] = struct.pack("<H", 60_000)  # length of the name in the header
    data[offset + 7] = 0  # the name is not UTF-8
    path.write_bytes(data)
    with pytest.raises(LoadError, match=f"damaged.*{name}|{name}.*damaged") as caught:
        arrays(path)
    assert len(str(caught.value)) < 1000


def test_a_flipped_bit_in_the_weights_is_detected(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<f", 1.0) * 10) + 80] ^= 1
    path.write_bytes(data)
    with pytest.raises(LoadError, match="damaged"):
        arrays(path)


def test_compressed_members_are_refused(tmp_path):
    path = write_archive(
        tmp_path / "bomb.pt", PROTO + storage(count=2**20) + b".", {"0": bytes(2**22)}, compression=zipfile.ZIP_DEFLATED
    )
    assert path.stat().st_size < 2**16
    assert "compressed" in message(path)


def test_overlapping_members_are_refused(tmp_path):
    path = write_archive(tmp_path / "bomb.pt", PROTO + b"N.", {"0": bytes(10_000)})
    with zipfile.ZipFile(path, "a") as archive:
        entry = archive.getinfo("archive/data/0")
        for i in range(1, 5):
            duplicate = zipfile.ZipInfo(f"archive/data/{i}")
            duplicate.header_offset, duplicate.CRC = entry.header_offset, entry.CRC
            duplicate.file_size = duplicate.compress_size = entry.file_size
            archive.filelist.append(duplicate)
        archive._didModify = True
    assert "declares" in message(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_occurs_twice_is_refused(tmp_path):
    path = write_archive(tmp_path / "x.pt", PROTO + b"N.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/version", b"4\n")
    assert "twice" in message(path)


@pytest.mark.parametrize("size", [0, 23, 25])
def test_a_storage_of_another_size_is_refused(tmp_path, size):
    path = write_archive(tmp_path / "x.pt", PROTO + storage() + b".", {"0": bytes(size)})
    with pytest.raises(CheckpointError, match=f"{size} bytes"):
        TorchFile(path)


def test_a_missing_storage_is_reported(tmp_path):
    assert "lacks" in message(write_archive(tmp_path / "x.pt", PROTO + storage() + b"."))


def test_tensors_that_repeat_a_few_values_too_often_are_refused(tmp_path):
    path = write_archive(
        tmp_path / "x.pt", PROTO + tensor(0, counts(2**20, 2**19), counts(0, 0)) + b".", {"0": bytes(24)}
    )
    with TorchFile(path) as file, pytest.raises(LoadError, match="repeat"):
        assert isinstance(file.root, TensorEntry)
        file.array(file.root)
