"""Calibrations in files: what comes back is what was kept, and files that contradict themselves are refused."""

from __future__ import annotations

import json
import os
import resource
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.calibrations import NETWORK, SEEN, arrays, assert_equal, made, refused, rewritten
from tests.support.sample_images import IMAGES
from tests.support.small_models import exported_tiny
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_cache import (
    MAX_FILE_BYTES,
    MAX_TENSORS,
    check_calibration,
    default_place,
    load_calibration,
    save_calibration,
)
from yolov7_deploy.precision.histogram import Histogram


@pytest.fixture(scope="module")
def measured():
    """Of yolov7-tiny on three images."""
    return replace(calibrate(exported_tiny(), IMAGES[:3], count=3), notes=("Few images (3).", "Grün 🐈"))


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "kept.npz"
    save_calibration(made(), path)
    return path


def header(change):
    """A change of the file's header as plain data."""

    def changed(array):
        document = json.loads(array.tobytes())
        change(document)
        return np.frombuffer(json.dumps(document).encode(), np.uint8)

    return changed


def put(index, value):
    def changed(array):
        array[index] = value
        return array

    return changed


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_measured_calibration_comes_back_to_the_last_bit(measured, tmp_path):
    path = tmp_path / "new" / "folder" / "c.npz"
    save_calibration(measured, path)
    assert_equal(load_calibration(path), measured)
    assert [p.name for p in path.parent.iterdir()] == ["c.npz"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"histograms": {}, "means": {}, "largest": {}},
        {"largest": {"x": float("nan"), "y": float("inf")}},  # which a calibration may hold
        {"notes": ("é\ud83d", "", "\n")},
        {"histograms": {"first": Histogram.of(np.zeros(0, np.float32)), "a/b:é": Histogram.of(np.ones(1, np.float32))}},
    ],
    ids=["whole", "nothing", "no-number", "notes", "empty-first"],
)
def test_a_calibration_of_any_content_comes_back(tmp_path, changes):
    save_calibration(made(**changes), tmp_path / "c.npz")
    if "notes" in changes:  # half a character cannot be written or printed
        changes = {"notes": ("é?", "", "\n")}
    assert_equal(load_calibration(tmp_path / "c.npz"), made(**changes))


def test_what_comes_back_may_be_changed(kept):
    found = load_calibration(kept)
    found.means["images"][0] = 7
    found.histograms["a"].counts[0] += 1


def test_the_same_calibration_gives_the_same_bytes(measured, tmp_path):
    for name in ("a.npz", "b.npz"):
        save_calibration(measured, tmp_path / name)
    save_calibration(load_calibration(tmp_path / "a.npz"), tmp_path / "c.npz")
    assert len({(tmp_path / name).read_bytes() for name in ("a.npz", "b.npz", "c.npz")}) == 1


def test_numpy_reads_the_file_and_writes_one_that_loads(kept):
    found = arrays(kept)
    assert found["codes"].dtype == np.uint16 and found["counts"].dtype == np.int64
    np.testing.assert_array_equal(found["counts"][: found["offsets"][1]].sum(), 1000)
    np.testing.assert_array_equal(found["means"], [0.1, 1e-300, -2.5, 1 / 3])
    assert_equal(load_calibration(rewritten(kept)), made())


def test_a_file_is_much_smaller_than_what_is_in_memory(measured, tmp_path):
    save_calibration(measured, tmp_path / "c.npz")
    in_memory = sum(histogram.counts.nbytes for histogram in measured.histograms.values())
    assert (tmp_path / "c.npz").stat().st_size < in_memory / 20


# --- places and partners ----------------------------------------------------------------------------------------------


def test_the_default_place_is_in_the_cache_and_names_both_digests(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "yolov7_deploy" / "calibration" / f"{'a' * 16}-{'b' * 16}.npz"
    assert default_place(NETWORK, SEEN) == expected


def test_a_calibration_of_this_model_and_these_images_is_accepted():
    check_calibration(made(), Path("c.npz"), network_sha256=NETWORK, images_sha256=SEEN)


@pytest.mark.parametrize(
    ("network", "images", "said"),
    [
        ("c" * 64, SEEN, "of another model (SHA-256 of model aaaaaaaaaaaa instead of cccccccccccc)."),
        (NETWORK, "c" * 64, "of other images (SHA-256 of images bbbbbbbbbbbb instead of cccccccccccc)."),
        ("c" * 64, "d" * 64, "of another model and other images (SHA-256 of model aaaaaaaaaaaa instead of "),
    ],
)
def test_a_calibration_of_something_else_says_of_what_and_what_to_do(network, images, said):
    with pytest.raises(UsageError) as caught:
        check_calibration(made(), Path("c.npz"), network_sha256=network, images_sha256=images)
    assert caught.value.message.startswith(f"c.npz is a calibration {said}")
    assert "--calib-cache FILE.npz" in caught.value.fix and "rm c.npz" in caught.value.fix


# --- writing fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file/c.npz", "folder", ".", "x" * 300, "a\0b.npz"])
def test_a_place_that_cannot_be_written_says_so_and_nothing_is_left(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="cannot be written") as caught:
        save_calibration(made(), Path() if place == "." else tmp_path / place)
    assert "--calib-cache" in caught.value.fix
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_full_disk_keeps_the_old_file_and_leaves_no_half_one(measured, kept, tmp_path):
    before = kept.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the system refuses what is longer
    try:
        with pytest.raises(ExportError, match=r"kept\.npz cannot be written: .*File too large"):
            save_calibration(measured, kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept.npz"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mean_that_is_no_number_is_not_kept(tmp_path, value):
    with pytest.raises(ExportError, match="cannot be kept in a file: a mean is infinite or no number"):
        save_calibration(made(means={"a": np.array([value])}), tmp_path / "c.npz")
    assert list(tmp_path.iterdir()) == []


def test_more_tensors_than_a_reader_takes_are_not_kept(tmp_path):
    largest = {str(number): 1.0 for number in range(MAX_TENSORS + 1)}
    with pytest.raises(ExportError, match=f"it has {MAX_TENSORS + 1} tensors, more than {MAX_TENSORS}"):
        save_calibration(made(largest=largest), tmp_path / "c.npz")
    save_calibration(made(largest=dict(list(largest.items())[1:])), tmp_path / "c.npz")
    assert len(load_calibration(tmp_path / "c.npz").largest) == MAX_TENSORS


# --- what is no calibration -------------------------------------------------------------------------------------------


def test_an_absent_file_says_how_it_is_made(tmp_path):
    error = refused(tmp_path / "gone.npz", "does not exist")
    assert "--calib FOLDER" in error.fix


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling", "long"])
def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path, kind):
    path = tmp_path / ("x" * 300 if kind == "long" else "c.npz")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
        assert stat.S_ISFIFO(path.stat().st_mode)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "gone")
    refused(path, "is no file|cannot be read|does not exist")


@pytest.mark.parametrize("data", [b"", b"PK\5\6", b"no archive at all", b"\x08\x07onnx" * 100, b"PK\5\6" + bytes(18)])
def test_other_files_are_no_calibrations_and_nobody_is_told_to_delete_them(tmp_path, data):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    error = refused(path, "is no calibration, or a damaged one")
    assert error.fix == (
        "If it is a calibration of yours, delete it, and it is made again. Name another file:  --calib-cache FILE.npz"
    )


def test_a_larger_file_than_any_calibration_is_not_even_read(tmp_path):
    path = tmp_path / "c.npz"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    refused(path, "is no calibration: it is larger than 256 MB")


def test_another_npz_is_no_calibration(tmp_path):
    np.savez(tmp_path / "c.npz", weights=np.ones(3))
    refused(tmp_path / "c.npz", r"it holds \['weights.npy'\]")


def test_an_array_of_objects_is_not_unpickled(kept, tmp_path):
    class Boom:
        def __reduce__(self):
            return Path.touch, (tmp_path / "boom",)

    columns = {**arrays(kept), "means": np.array([Boom()], dtype=object)}
    np.savez_compressed(kept, **columns)
    refused(kept, "means has")
    assert not (tmp_path / "boom").exists()


def test_a_file_of_another_schema_says_which(kept):
    rewritten(kept, header=header(lambda plain: plain.update(schema=2)))
    refused(kept, "it has schema 2, and this version reads 1")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plain: plain.update(kind="something"), "says something else"),
        (lambda plain: plain.pop("images"), "images is missing"),
        (lambda plain: plain.update(images=0), "of 0 images"),
        (lambda plain: plain.update(images=True), "images is True"),
        (lambda plain: plain.update(images=2.5), r"images is 2\.5"),
        (lambda plain: plain.update(tensors="abc"), "tensors is 'abc'"),
        (lambda plain: plain.update(tensors=["a", "a", "zeros", "tiny"]), "names a tensor twice"),
        (lambda plain: plain["tensors"].append("more"), "offsets has"),
        (lambda plain: plain["read"].append("more"), "mean_offsets has"),
        (lambda plain: plain["made"].pop(), "largest has"),
        (lambda plain: plain.update(notes=[1]), "notes"),
        (lambda plain: plain.update(network_sha256=None), "network_sha256 is None"),
        (lambda plain: plain.update(made=[str(n) for n in range(MAX_TENSORS + 1)]), "more than 2048"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(kept, change, said):
    refused(rewritten(kept, header=header(change)), said)


@pytest.mark.parametrize(
    "text", [b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"kind":' * 50_000, b"9" * 10_000, b"NaN"]
)
def test_a_header_that_is_no_header_is_refused(kept, text):
    refused(rewritten(kept, header=np.frombuffer(text, np.uint8)), "is no calibration")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("offsets", put(0, 1), "offsets are out of range"),
        ("offsets", put(1, -1), "offsets are out of range"),
        ("offsets", put(-1, 2**62), "offsets are out of range"),
        ("offsets", put(2, 10**6), "offsets fall, or are too far apart"),
        ("offsets", put(-1, 10), "offsets fall, or are too far apart"),
        ("offsets", lambda array: array.astype(np.int32), "offsets has"),
        ("offsets", lambda array: array.astype(np.float64), "offsets is cut off, or of another type"),
        ("offsets", lambda array: array.astype(">i8"), "offsets is cut off, or of another type"),
        ("codes", put(-1, 0x7F80), "no finite number"),
        ("codes", put(-1, 0xFFFF), "no finite number"),
        ("codes", put(-1, 0x7F00), "not in its last bin"),
        ("codes", lambda array: array[::-1].copy(), "out of order"),
        ("codes", lambda array: array[:-1], "codes has"),
        ("codes", lambda array: array.reshape(1, -1), "codes is cut off, or of another type or shape"),
        ("codes", lambda array: array.astype(np.int16), "codes is cut off, or of another type or shape"),
        ("counts", put(0, 0), "a bin counts 0"),
        ("counts", put(0, -5), "a bin counts -5"),
        ("counts", put(0, 2**60), "a bin counts"),
        ("counts", lambda array: np.append(array, 1), "counts has"),
        ("reaches", put(0, np.nan), "no finite number"),
        ("reaches", put(0, np.inf), "no finite number"),
        ("reaches", put(0, 1e300), "no finite number"),
        ("reaches", put(0, -1.0), "no finite number, or below 0"),
        ("reaches", put(0, 1000.0), "not in its last bin"),
        ("reaches", put(1, 1.0), "not in its last bin"),
        ("mean_offsets", put(-1, 2**40), "offsets are out of range"),
        ("mean_offsets", put(1, 10), "offsets fall"),
        ("means", put(0, np.nan), "a mean is infinite or no number"),
        ("means", put(0, -np.inf), "a mean is infinite or no number"),
        ("means", lambda array: array[:0], "means has"),
        ("largest", put(0, -1.0), "below 0"),
        ("largest", lambda array: np.array(3.0), "largest has|another type"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(kept, name, change, said):
    refused(rewritten(kept, **{name: change}), said)
