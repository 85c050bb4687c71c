"""Calibration files: what was saved is loaded, and inconsistent files are refused."""

from __future__ import annotations

import json
import os
import resource
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.calibrations import NETWORK, SEEN, arrays, assert_equal, refused, rewritten, small_calibration
from tests.support.sample_images import IMAGES
from tests.support.small_models import exported_tiny
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_cache import (
    MAX_FILE_BYTES,
    MAX_TENSORS,
    check_calibration,
    default_cache_path,
    load_calibration,
    save_calibration,
)
from yolov7_deploy.precision.histogram import Histogram


@pytest.fixture(scope="module")
def measured():
    """Calibration of yolov7-tiny on three images."""
    return replace(calibrate(exported_tiny(), IMAGES[:3], count=3), notes=("Few images (3).", "Grün 🐈"))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved.npz"
    save_calibration(small_calibration(), path)
    return path


def header(change):
    """Return a function that applies a change to the JSON document in the header."""

    def changed(array):
        document = json.loads(array.tobytes())
        change(document)
        return np.frombuffer(json.dumps(document).encode(), np.uint8)

    return changed


def assign(index, value):
    def changed(array):
        array[index] = value
        return array

    return changed


# --- round trip -------------------------------------------------------------------------------------------------------


def test_a_calibration_is_restored_to_the_last_bit(measured, tmp_path):
    path = tmp_path / "new" / "folder" / "c.npz"
    save_calibration(measured, path)
    assert_equal(load_calibration(path), measured)
    assert [p.name for p in path.parent.iterdir()] == ["c.npz"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"histograms": {}, "input_means": {}, "output_amax": {}},
        {"notes": ("é\ud83d", "", "\n")},
        {"histograms": {"first": Histogram.of(np.zeros(0, np.float32)), "a/b:é": Histogram.of(np.ones(1, np.float32))}},
    ],
    ids=["all", "empty", "notes", "first-empty"],
)
def test_a_calibration_of_any_content_is_restored(tmp_path, changes):
    save_calibration(small_calibration(**changes), tmp_path / "c.npz")
    if "notes" in changes:  # a lone surrogate cannot be written or printed
        changes = {"notes": ("é?", "", "\n")}
    assert_equal(load_calibration(tmp_path / "c.npz"), small_calibration(**changes))


def test_a_loaded_calibration_may_be_modified(saved):
    found = load_calibration(saved)
    found.input_means["images"][0] = 7
    found.histograms["a"].counts[0] += 1


def test_the_same_calibration_gives_the_same_bytes(measured, tmp_path):
    for name in ("a.npz", "b.npz"):
        save_calibration(measured, tmp_path / name)
    save_calibration(load_calibration(tmp_path / "a.npz"), tmp_path / "c.npz")
    assert len({(tmp_path / name).read_bytes() for name in ("a.npz", "b.npz", "c.npz")}) == 1


def test_numpy_reads_the_file_and_writes_one_that_loads(saved):
    found = arrays(saved)
    assert found["bins"].dtype == np.uint16 and found["counts"].dtype == np.int64
    np.testing.assert_array_equal(found["counts"][: found["offsets"][1]].sum(), 1000)
    np.testing.assert_array_equal(found["input_means"], [0.1, 1e-300, -2.5, 1 / 3])
    assert_equal(load_calibration(rewritten(saved)), small_calibration())


def test_a_file_is_much_smaller_than_the_calibration_in_memory(measured, tmp_path):
    save_calibration(measured, tmp_path / "c.npz")
    in_memory = sum(histogram.counts.nbytes for histogram in measured.histograms.values())
    assert (tmp_path / "c.npz").stat().st_size < in_memory / 20


# --- path and identity ------------------------------------------------------------------------------------------------


def test_the_default_path_is_in_the_cache_folder_and_contains_both_digests(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "yolov7_deploy" / "calibration" / f"{'a' * 16}-{'b' * 16}.npz"
    assert default_cache_path(NETWORK, SEEN) == expected


def test_a_calibration_of_this_model_and_these_images_is_accepted():
    check_calibration(small_calibration(), Path("c.npz"), network_sha256=NETWORK, images_sha256=SEEN)


@pytest.mark.parametrize(
    ("network", "images", "message"),
    [
        ("c" * 64, SEEN, "of another model (SHA-256 of model aaaaaaaaaaaa instead of cccccccccccc)."),
        (NETWORK, "c" * 64, "of other images (SHA-256 of images bbbbbbbbbbbb instead of cccccccccccc)."),
        ("c" * 64, "d" * 64, "of another model and other images (SHA-256 of model aaaaaaaaaaaa instead of "),
    ],
)
def test_a_calibration_of_another_model_or_other_images_is_refused(network, images, message):
    with pytest.raises(UsageError) as caught:
        check_calibration(small_calibration(), Path("c.npz"), network_sha256=network, images_sha256=images)
    assert caught.value.message.startswith(f"c.npz is a calibration {message}")
    assert "--calib-cache FILE.npz" in caught.value.fix and "rm c.npz" in caught.value.fix


# --- write errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["file/c.npz", "folder", ".", "x" * 300, "a\0b.npz"])
def test_a_path_that_cannot_be_written_is_an_error_and_leaves_no_file(tmp_path, target):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="cannot be written") as caught:
        save_calibration(small_calibration(), Path() if target == "." else tmp_path / target)
    assert "--calib-cache" in caught.value.fix
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_full_disk_keeps_the_old_file_and_leaves_no_partial_one(measured, saved, tmp_path):
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the system refuses larger files
    try:
        with pytest.raises(ExportError, match=r"saved\.npz cannot be written: .*File too large"):
            save_calibration(measured, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved.npz"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mean_that_is_not_finite_is_not_saved(tmp_path, value):
    with pytest.raises(ExportError, match="cannot be saved: a mean is infinite or NaN"):
        save_calibration(small_calibration(input_means={"a": np.array([value])}), tmp_path / "c.npz")
    assert list(tmp_path.iterdir()) == []


def test_more_tensors_than_a_file_may_have_are_not_saved(tmp_path):
    largest = {str(number): 1.0 for number in range(MAX_TENSORS + 1)}
    with pytest.raises(ExportError, match=f"it has {MAX_TENSORS + 1} tensors, more than {MAX_TENSORS}"):
        save_calibration(small_calibration(output_amax=largest), tmp_path / "c.npz")
    save_calibration(small_calibration(output_amax=dict(list(largest.items())[1:])), tmp_path / "c.npz")
    assert len(load_calibration(tmp_path / "c.npz").output_amax) == MAX_TENSORS


# --- files that are not calibrations ----------------------------------------------------------------------------------


def test_the_error_for_a_missing_file_names_the_options_that_write_it(tmp_path):
    error = refused(tmp_path / "gone.npz", "does not exist")
    assert "--calib FOLDER" in error.fix


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling", "long"])
def test_a_path_that_is_not_a_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / ("x" * 300 if kind == "long" else "c.npz")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
        assert stat.S_ISFIFO(path.stat().st_mode)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "gone")
    refused(path, "is not a file|cannot be read|does not exist")


@pytest.mark.parametrize("data", [b"", b"PK\5\6", b"not an archive", b"\x08\x07onnx" * 100, b"PK\5\6" + bytes(18)])
def test_other_files_are_refused_without_unconditional_advice_to_delete_them(tmp_path, data):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    error = refused(path, "is not a calibration, or it is damaged")
    advice = "If it is a calibration, delete it, and the next run writes it again."
    assert error.fix == f"{advice} Name another file:  --calib-cache FILE.npz"


def test_a_file_larger_than_any_calibration_is_not_read(tmp_path):
    path = tmp_path / "c.npz"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    refused(path, "more than the 268435456 of any such file")


def test_another_npz_is_not_a_calibration(tmp_path):
    np.savez(tmp_path / "c.npz", weights=np.ones(3))
    refused(tmp_path / "c.npz", r"it contains \['weights.npy'\]")


def test_an_array_of_objects_is_not_unpickled(saved, tmp_path):
    class Boom:
        def __reduce__(self):
            return Path.touch, (tmp_path / "boom",)

    columns = {**arrays(saved), "input_means": np.array([Boom()], dtype=object)}
    np.savez_compressed(saved, **columns)
    refused(saved, "input_means has")
    assert not (tmp_path / "boom").exists()


def test_the_error_for_another_schema_names_it(saved):
    rewritten(saved, header=header(lambda document: document.update(schema=1)))
    refused(saved, "it has schema 1, and this version reads 2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(kind="something"), "header is not that of a calibration"),
        (lambda document: document.pop("images"), "images is missing"),
        (lambda document: document.update(images=0), "number of images is 0"),
        (lambda document: document.update(images=True), "images is True"),
        (lambda document: document.update(images=2.5), r"images is 2\.5"),
        (lambda document: document.update(tensors="abc"), "tensors is 'abc'"),
        (lambda document: document.update(tensors=["a", "a", "zeros", "tiny"]), "names a tensor twice"),
        (lambda document: document["tensors"].append("more"), "offsets has"),
        (lambda document: document["conv_inputs"].append("more"), "mean_offsets has"),
        (lambda document: document["conv_outputs"].pop(), "output_amax has"),
        (lambda document: document.update(notes=[1]), "notes"),
        (lambda document: document.update(network_sha256=None), "network_sha256 is None"),
        (lambda document: document.update(conv_outputs=[str(n) for n in range(MAX_TENSORS + 1)]), "more than 2048"),
    ],
)
def test_an_invalid_header_is_refused(saved, change, message):
    refused(rewritten(saved, header=header(change)), message)


@pytest.mark.parametrize(
    "text", [b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"kind":' * 50_000, b"9" * 10_000, b"NaN"]
)
def test_a_header_of_other_content_is_refused(saved, text):
    refused(rewritten(saved, header=np.frombuffer(text, np.uint8)), "is not a calibration")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("offsets", assign(0, 1), "offsets are out of range"),
        ("offsets", assign(1, -1), "offsets are out of range"),
        ("offsets", assign(-1, 2**62), "offsets are out of range"),
        ("offsets", assign(2, 10**6), "offsets decrease, or are too far apart"),
        ("offsets", assign(-1, 10), "offsets decrease, or are too far apart"),
        ("offsets", lambda array: array.astype(np.int32), "offsets has"),
        ("offsets", lambda array: array.astype(np.float64), "offsets is truncated, or of another type"),
        ("offsets", lambda array: array.astype(">i8"), "offsets is truncated, or of another type"),
        ("bins", assign(-1, 0x7F80), "not finite"),
        ("bins", assign(-1, 0xFFFF), "not finite"),
        ("bins", assign(-1, 0x7F00), "not in its last bin"),
        ("bins", lambda array: array[::-1].copy(), "out of order"),
        ("bins", lambda array: array[:-1], "bins has"),
        ("bins", lambda array: array.reshape(1, -1), "bins is truncated, or of another type or shape"),
        ("bins", lambda array: array.astype(np.int16), "bins is truncated, or of another type or shape"),
        ("counts", assign(0, 0), "a bin counts 0"),
        ("counts", assign(0, -5), "a bin counts -5"),
        ("counts", assign(0, 2**60), "a bin counts"),
        ("counts", lambda array: np.append(array, 1), "counts has"),
        ("amax", assign(0, np.nan), "not finite"),
        ("amax", assign(0, np.inf), "not finite"),
        ("amax", assign(0, 1e300), "not finite"),
        ("amax", assign(0, -1.0), "not finite, or negative"),
        ("amax", assign(0, 1000.0), "not in its last bin"),
        ("amax", assign(1, 1.0), "not in its last bin"),
        ("mean_offsets", assign(-1, 2**40), "offsets are out of range"),
        ("mean_offsets", assign(1, 10), "offsets decrease"),
        ("input_means", assign(0, np.nan), "a mean is infinite or NaN"),
        ("input_means", assign(0, -np.inf), "a mean is infinite or NaN"),
        ("input_means", lambda array: array[:0], "input_means has"),
        ("output_amax", assign(0, -1.0), "not finite, or negative"),
        ("output_amax", assign(0, np.nan), "not finite, or negative"),
        ("output_amax", assign(0, np.inf), "not finite, or negative"),
        ("output_amax", lambda array: np.array(3.0), "output_amax has|another type"),
    ],
)
def test_inconsistent_arrays_are_refused(saved, name, change, message):
    refused(rewritten(saved, **{name: change}), message)
