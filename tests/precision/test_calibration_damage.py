"""A damaged or hostile calibration file gives the calibration that was kept, or is refused in little memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from tests.fuzz.mutations import mutate_bytes
from tests.support.calibrations import assert_equal, made, refused, rewritten
from tests.support.sample_images import IMAGES
from tests.support.small_models import exported_tiny
from yolov7_deploy.errors import LoadError
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_cache import load_calibration, save_calibration
from yolov7_deploy.precision.histogram import BINS, Histogram

FLIPS, CUTS, MUTATIONS = 300, 100, 300
LITTLE_MEMORY = 8 * 2**20  # bytes; what hostile files claim is many times as much


@pytest.fixture(scope="module")
def measured():
    """Of yolov7-tiny on two images."""
    return calibrate(exported_tiny(), IMAGES[:2], count=2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.npz"


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "kept.npz"
    save_calibration(made(), path)
    return path


def bytes_of(calibration, path):
    """The bytes of its file."""
    save_calibration(calibration, path)
    return path.read_bytes()


def loaded_or_refused(path, data, *expected):
    """Whether it loaded; nothing but LoadError, or a calibration equal to one of these, is let through."""
    path.write_bytes(data)
    try:
        found = load_calibration(path)
    except LoadError as error:
        assert error.fix
        return False
    assert_equal(found, next((one for one in expected if one.images == found.images), expected[0]))
    return True


def test_a_file_with_flipped_bits_gives_the_same_calibration_or_is_refused(measured, path):
    sound, rng = bytes_of(measured, path), random.Random(0)
    directory = sound.index(b"PK\1\2")
    for case in range(FLIPS):
        data = bytearray(sound)
        first = directory if case % 2 else 0  # half of them in the directory, which is short and where the sizes are
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            data[rng.randrange(first, len(data))] ^= 1 << rng.randrange(8)
        loaded_or_refused(path, bytes(data), measured)


def test_a_file_that_is_cut_off_is_refused(measured, path):
    sound, rng = bytes_of(measured, path), random.Random(0)
    for length in [0, 1, 22, len(sound) - 1, len(sound) - 22, *(rng.randrange(len(sound)) for _ in range(CUTS))]:
        assert not loaded_or_refused(path, sound[:length], measured), length


def test_a_file_with_any_other_damage_gives_the_same_calibration_or_is_refused(path, tmp_path):
    one, other = made(), made(images=4, means={})
    sound, parts = bytes_of(one, path), bytes_of(other, tmp_path / "other.npz")
    for seed in range(MUTATIONS):  # some of them put the other file, whole, in place of this one
        loaded_or_refused(path, mutate_bytes(random.Random(seed), sound, (parts,)), one, other)


def test_every_single_byte_of_a_small_file_may_be_damaged(path):
    small = made(histograms={"a": Histogram.of(np.arange(9, dtype=np.float32))})
    sound, loaded = bytes_of(small, path), 0
    for at in range(len(sound)):
        data = bytearray(sound)
        data[at] ^= 0xFF
        loaded += loaded_or_refused(path, bytes(data), small)
    assert loaded < len(sound) / 4  # dates, attributes and the like, which say nothing of the content


# --- files that would take all memory ---------------------------------------------------------------------------------


def repacked(path, name, change, *, claim=None):
    """The file with other bytes of one member, which its directory may say to be of another length."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, change(data) if member == f"{name}.npy" else data)
        entry = archive.getinfo(f"{name}.npy")  # the directory is written at the end
        if claim is not None:
            entry.file_size, entry.CRC = claim, zlib.crc32(change(members[entry.filename])[:claim])


def test_a_huge_shape_in_a_small_file_takes_no_memory(kept):
    claims = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({2**40},), }}"
    repacked(kept, "counts", lambda data: data[:10] + f"{claims:<117}\n".encode() + data[128:])
    refused_in_little_memory(kept, "counts is cut off, or of another type or shape")


def test_a_member_that_unpacks_to_more_than_it_claims_is_not_unpacked(kept):
    with zipfile.ZipFile(kept) as archive:
        size = archive.getinfo("counts.npy").file_size
    repacked(kept, "counts", lambda data: data + bytes(2**26), claim=size)
    tracemalloc.start()
    assert_equal(load_calibration(kept), made())
    assert tracemalloc.get_traced_memory()[1] < LITTLE_MEMORY
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["offsets", "codes", "counts", "reaches", "mean_offsets", "means", "largest"])
@pytest.mark.parametrize("size", [0, 128, 136])
def test_a_member_that_unpacks_to_less_than_it_claims_is_cut_off(kept, name, size):
    with zipfile.ZipFile(kept) as archive:
        claim = archive.getinfo(f"{name}.npy").file_size
    repacked(kept, name, lambda data: data[:size], claim=claim)
    refused(kept, f"{name} is cut off")


def test_a_bomb_is_refused_before_it_is_unpacked(kept):
    rewritten(kept, counts=np.zeros(2**23, np.int64))
    assert kept.stat().st_size < 2**20
    refused_in_little_memory(kept, "counts has 67108992 bytes instead of")


def test_offsets_that_claim_all_bins_of_all_tensors_need_them_in_the_file(kept):
    rewritten(kept, offsets=lambda array: np.arange(len(array)) * BINS)
    refused_in_little_memory(kept, "codes has")


def test_an_archive_of_very_many_names_is_refused_before_they_are_read(kept):
    data = bytearray(kept.read_bytes())
    at = data.index(b"PK\1\2")
    directory = data[at : data.index(b"PK\1\2", at + 1)] * 200_000
    end = bytearray(data[-22:])
    end[8:20] = struct.pack("<HHII", 65535, 65535, len(directory), at)
    kept.write_bytes(bytes(data[:at] + directory + end))
    refused_in_little_memory(kept, "one of many files", allowed=2 * len(directory))


def refused_in_little_memory(path, match, allowed=LITTLE_MEMORY):
    tracemalloc.start()
    try:
        refused(path, match)
        assert tracemalloc.get_traced_memory()[1] < allowed
    finally:
        tracemalloc.stop()
