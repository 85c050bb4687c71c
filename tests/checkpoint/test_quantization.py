"""The header with the INT8 quantization of trained weights: impossible values are refused before they are used."""

from dataclasses import replace

import pytest

from yolov7_deploy import _serialization
from yolov7_deploy.checkpoint.quantization import TrainedQuantization, TrainedRange
from yolov7_deploy.errors import LoadError
from yolov7_deploy.metadata import ModelMetadata


@pytest.fixture
def good():
    return TrainedQuantization(
        target="cpu",
        reduce_range=True,
        ranges=(TrainedRange(tensor="images", scale=1 / 255, zero=0), TrainedRange(tensor="a", scale=0.5, zero=7)),
        amax=(("images", 1.0), ("a", 0.0)),
        method="mse",
        images=6,
        images_sha256="0" * 64,
    )


def test_what_was_written_is_read(good):
    assert TrainedQuantization.from_json(good.to_json()) == good


@pytest.mark.parametrize("scale", [1e-46, 1e-320, 3.5e38, 1e300])
def test_a_scale_that_is_no_normal_float32_number_is_refused(good, scale):
    with pytest.raises(ValueError, match=r"the scale of a is"):
        replace(good, ranges=(TrainedRange(tensor="a", scale=scale, zero=0),))


def test_tensorrt_has_symmetric_ranges_only(good):
    with pytest.raises(ValueError, match="its zero 7"):
        replace(good, target="tensorrt")
    assert replace(good, target="arm").ranges == good.ranges


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images": 0}, "its calibration has 0 images"),
        ({"amax": (("a", -1.0),)}, "largest magnitude of 'a' is -1"),
        ({"amax": (("a", 1e39),)}, "largest magnitude of 'a' is 1e"),
        ({"amax": (("a", 1.0), ("a", 2.0))}, "names a tensor twice"),
        ({"amax": tuple((str(i), 1.0) for i in range(10_000))}, "10000 measured tensors"),
    ],
)
def test_impossible_measurements_are_refused(good, changes, problem):
    with pytest.raises(ValueError, match=problem):
        replace(good, **changes)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused(good, number):
    text = good.to_json().replace("0.5", number)
    with pytest.raises(ValueError, match=r"scale is (nan|-?inf)"):
        TrainedQuantization.from_json(text)


def test_a_long_name_does_not_fill_the_message(good):
    with pytest.raises(ValueError) as caught:
        replace(good, ranges=(TrainedRange(tensor="x" * 2_000_000, scale=-1.0, zero=0),))
    assert len(str(caught.value)) < 200


def test_a_document_that_would_take_gigabytes_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(_serialization, "json", None)  # a parser would raise another error
    text = f'{{"schema": 1, "target": [{"[]," * 6_000_000}0]}}'
    with pytest.raises(ValueError, match="characters of JSON, more than"):
        TrainedQuantization.from_json(text)
    with pytest.raises(LoadError, match="characters of JSON, more than"):
        ModelMetadata.from_json(text)
