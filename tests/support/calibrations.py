"""A small calibration, a comparison of calibrations, and changes to their files."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from yolov7_deploy.errors import LoadError
from yolov7_deploy.precision.calibrate import Calibration
from yolov7_deploy.precision.calibration_cache import load_calibration
from yolov7_deploy.precision.histogram import Histogram

NETWORK, SEEN = "a" * 64, "b" * 64


def small_calibration(**changes):
    """Return a calibration of two convolutions and four tensors: random, empty, zeros, and extreme values."""
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    fields_by_name = {
        "histograms": {
            "a": Histogram.of(values),
            "none": Histogram.of(values[:0]),
            "zeros": Histogram.of(np.zeros(7, np.float32)),
            "tiny": Histogram.of(np.array([1e-45, 3e38, -0.0], np.float32)),
        },
        "input_means": {"images": np.array([0.1, 1e-300, -2.5]), "a": np.array([1 / 3])},
        "output_amax": {"x": 3.25, "y": 0.0},
        "images": 3,
        "network_sha256": NETWORK,
        "images_sha256": SEEN,
    }
    return Calibration(**{**fields_by_name, **changes})


def assert_equal(found, expected):
    """Assert that two calibrations are equal to the last bit, in the same order."""
    assert list(found.histograms) == list(expected.histograms)
    for name, histogram in expected.histograms.items():
        assert found.histograms[name].counts.dtype == np.int64
        np.testing.assert_array_equal(found.histograms[name].counts, histogram.counts)
        assert found.histograms[name].amax == histogram.amax
    assert list(found.input_means) == list(expected.input_means)
    for name, means in expected.input_means.items():
        assert found.input_means[name].dtype == np.float64
        assert found.input_means[name].tobytes() == means.tobytes()
    np.testing.assert_equal(dict(found.output_amax), dict(expected.output_amax))  # treats NaN as equal
    assert list(found.output_amax) == list(expected.output_amax)
    for field in fields(Calibration):
        if field.name not in ("histograms", "input_means", "output_amax"):
            assert getattr(found, field.name) == getattr(expected, field.name)


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def rewritten(path, **changes):
    """Rewrite the file with NumPy; each change is a new array, or a function of the old one."""
    columns = arrays(path)
    for name, change in changes.items():
        columns[name] = change(columns[name].copy()) if callable(change) else change
    np.savez_compressed(path, **columns)
    return path


def refused(path, match):
    with pytest.raises(LoadError, match=match) as caught:
        load_calibration(path)
    assert str(path) in caught.value.message
    assert caught.value.fix
    return caught.value
