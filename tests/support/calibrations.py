"""A small calibration made by hand, when two of them are equal, and what is done to their files."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from yolov7_deploy.errors import LoadError
from yolov7_deploy.precision.calibrate import Calibration
from yolov7_deploy.precision.calibration_cache import load_calibration
from yolov7_deploy.precision.histogram import Histogram

NETWORK, SEEN = "a" * 64, "b" * 64


def made(**changes):
    """Four tensors (one of no value at all, one of zeros, one of extremes) and two convolutions."""
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    whole = {
        "histograms": {
            "a": Histogram.of(values),
            "none": Histogram.of(values[:0]),
            "zeros": Histogram.of(np.zeros(7, np.float32)),
            "tiny": Histogram.of(np.array([1e-45, 3e38, -0.0], np.float32)),
        },
        "means": {"images": np.array([0.1, 1e-300, -2.5]), "a": np.array([1 / 3])},
        "largest": {"x": 3.25, "y": 0.0},
        "images": 3,
        "network_sha256": NETWORK,
        "images_sha256": SEEN,
    }
    return Calibration(**{**whole, **changes})


def assert_equal(found, expected):
    """To the last bit, and in the same order."""
    assert list(found.histograms) == list(expected.histograms)
    for name, histogram in expected.histograms.items():
        assert found.histograms[name].counts.dtype == np.int64
        np.testing.assert_array_equal(found.histograms[name].counts, histogram.counts)
        assert found.histograms[name].largest == histogram.largest
    assert list(found.means) == list(expected.means)
    for name, means in expected.means.items():
        assert found.means[name].dtype == np.float64
        assert found.means[name].tobytes() == means.tobytes()
    np.testing.assert_equal(dict(found.largest), dict(expected.largest))  # NaN is equal to NaN
    assert list(found.largest) == list(expected.largest)
    for field in fields(Calibration):
        if field.name not in ("histograms", "means", "largest"):
            assert getattr(found, field.name) == getattr(expected, field.name)


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def rewritten(path, **changes):
    """The file with other arrays, in the form NumPy writes; functions change what is there."""
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
