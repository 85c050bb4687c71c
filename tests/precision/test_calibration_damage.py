"""Damaged or hostile calibration files: they load the calibration that was saved, or are refused in little memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from tests.fuzz.mutations import mutate_bytes
from tests.support.calibrations import assert_equal, refused, rewritten, small_calibration
from tests.support.sample_images import IMAGES
from tests.support.small_models import exported_tiny
from yolov7_deploy.errors import LoadError
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_cache import load_calibration, save_calibration
from yolov7_deploy.precision.histogram import BINS, Histogram

FLIPS, CUTS, MUTATIONS = 300, 100, 300
LITTLE_MEMORY = 8 * 2**20  # bytes; hostile files claim many times as much


@pytest.fixture(scope="module")
def measured():
    """Calibration of yolov7-tiny on two images."""
    return calibrate(exported_tiny(), IMAGES[:2], count=2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.npz"


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved.npz"
    save_calibration(small_calibration(), path)
    return path


def bytes_of(calibration, path):
    """The bytes of the file of a calibration."""
    save_calibration(calibration, path)
    return path.read_bytes()


def loaded_or_refused(path, data, *expected):
    """Return True if the file loads as one of the expected calibrations, False if it is refused with a LoadError."""
    path.write_bytes(data)
    try:
        found = load_calibration(path)
    except LoadError as error:
        assert error.fix
        return False
    assert_equal(found, next((one for one in expected if one.images == found.images), expected[0]))
    return True


def test_a_file_with_flipped_bits_gives_the_same_calibration_or_is_refused(measured, path):
    intact, rng = bytes_of(measured, path), random.Random(0)
    directory = intact.index(b"PK\1\2")
    for case in range(FLIPS):
        data = bytearray(intact)
        first = directory if case % 2 else 0  # every second one in the directory, which is short and contains the sizes
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            data[rng.randrange(first, len(data))] ^= 1 << rng.randrange(8)
        loaded_or_refused(path, bytes(data), measured)


def test_a_truncated_file_is_refused(measured, path):
    intact, rng = bytes_of(measured, path), random.Random(0)
    for length in [0, 1, 22, len(intact) - 1, len(intact) - 22, *(rng.randrange(len(intact)) for _ in range(CUTS))]:
        assert not loaded_or_refused(path, intact[:length], measured), length


def test_a_file_with_any_other_damage_gives_the_same_calibration_or_is_refused(path, tmp_path):
    one, other = small_calibration(), small_calibration(images=4, input_means={})
    intact, parts = bytes_of(one, path), bytes_of(other, tmp_path / "other.npz")
    for seed in range(MUTATIONS):  # some of them replace the file by the other one
        loaded_or_refused(path, mutate_bytes(random.Random(seed), intact, (parts,)), one, other)


def test_damage_of_any_single_byte_of_a_small_file_is_handled(path):
    small = small_calibration(histograms={"a": Histogram.of(np.arange(9, dtype=np.float32))})
    intact, loaded = bytes_of(small, path), 0
    for at in range(len(intact)):
        data = bytearray(intact)
        data[at] ^= 0xFF
        loaded += loaded_or_refused(path, bytes(data), small)
    assert loaded < len(intact) / 4  # bytes of dates, attributes and the like, which do not affect the content


# --- files that claim huge sizes --------------------------------------------------------------------------------------


def repacked(path, name, change, *, claim=None):
    """Replace the bytes of one member; `claim` is the length that the directory declares."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, change(data) if member == f"{name}.npy" else data)
        entry = archive.getinfo(f"{name}.npy")  # the directory is written at the end
        if claim is not None:
            entry.file_size, entry.CRC = claim, zlib.crc32(change(members[entry.filename])[:claim])


def test_a_huge_shape_in_a_small_file_takes_no_memory(saved):
    claims = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({2**40},), }}"
    repacked(saved, "counts", lambda data: data[:10] + f"{claims:<117}\n".encode() + data[128:])
    refused_in_little_memory(saved, "counts is truncated, or of another type or shape")


def test_a_member_is_not_decompressed_beyond_its_declared_size(saved):
    with zipfile.ZipFile(saved) as archive:
        size = archive.getinfo("counts.npy").file_size
    repacked(saved, "counts", lambda data: data + bytes(2**26), claim=size)
    tracemalloc.start()
    assert_equal(load_calibration(saved), small_calibration())
    assert tracemalloc.get_traced_memory()[1] < LITTLE_MEMORY
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["offsets", "bins", "counts", "amax", "mean_offsets", "input_means", "output_amax"])
@pytest.mark.parametrize("size", [0, 128, 136])
def test_a_member_that_is_shorter_than_declared_is_truncated(saved, name, size):
    with zipfile.ZipFile(saved) as archive:
        claim = archive.getinfo(f"{name}.npy").file_size
    repacked(saved, name, lambda data: data[:size], claim=claim)
    refused(saved, f"{name} is truncated")


def test_a_zip_bomb_is_refused_before_it_is_decompressed(saved):
    rewritten(saved, counts=np.zeros(2**23, np.int64))
    assert saved.stat().st_size < 2**20
    refused_in_little_memory(saved, "counts has 67108992 bytes instead of")


def test_offsets_that_claim_all_bins_of_all_tensors_need_them_in_the_file(saved):
    rewritten(saved, offsets=lambda array: np.arange(len(array)) * BINS)
    refused_in_little_memory(saved, "bins has")


def test_an_archive_of_very_many_names_is_refused_before_they_are_read(saved):
    data = bytearray(saved.read_bytes())
    at = data.index(b"PK\1\2")
    directory = data[at : data.index(b"PK\1\2", at + 1)] * 200_000
    end = bytearray(data[-22:])
    end[8:20] = struct.pack("<HHII", 65535, 65535, len(directory), at)
    saved.write_bytes(bytes(data[:at] + directory + end))
    refused_in_little_memory(saved, "one of many files", allowed=2 * len(directory))


def refused_in_little_memory(path, match, allowed=LITTLE_MEMORY):
    tracemalloc.start()
    try:
        refused(path, match)
        assert tracemalloc.get_traced_memory()[1] < allowed
    finally:
        tracemalloc.stop()
