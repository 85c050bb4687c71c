"""Calibration against NumPy on the tensors themselves, and the inputs on which its digests depend."""

from __future__ import annotations

import copy
import tracemalloc
from dataclasses import fields
from functools import lru_cache

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.sample_images import noise
from tests.support.slow_cases import some_fast
from tests.support.small_models import HW, exported_tiny, session
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.image import fit_letterbox
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.precision.calibrate import Calibration, calibrate, network_digest
from yolov7_deploy.precision.histogram import Histogram
from yolov7_deploy.precision.subgraph import Network

IMAGES = (noise(*HW, 1), noise(60, 250, 2), noise(*HW, 3), noise(300, 400, 4))
# Means are summed in float32 inside the graph, in another order than in NumPy; relative to the mean magnitude.
MEAN_REL = 1e-5
# float64 sums in another order.
ORDER_REL = 1e-14
# Thirty images need the memory of three, and a few more digests.
GROWTH = 1.05

MATRIX = [("float32", 1), ("float32", 3), ("uint8", 1), ("uint8", 3)]


def calibrated(model, images=IMAGES):
    return calibrate(model, images, count=len(images))


@lru_cache
def calibration_of(input_kind="float32", batch=1) -> Calibration:
    """Calibration of yolov7-tiny on IMAGES; it is shared, so do not modify it."""
    return calibrated(exported_tiny(nms="plugin", input_kind=input_kind, batch=batch))


def network_array(image, input_kind, batch):
    """The image as network input, computed slowly."""
    letterboxed = fit_letterbox(image.shape[:2], HW).apply(image)
    if input_kind == "float32":
        letterboxed = np.stack([letterboxed[..., channel] / np.float32(255) for channel in (2, 1, 0)])
    return np.stack([letterboxed] * batch)


@lru_cache
def tensors_of(input_kind, batch):
    """For each image the input and all float tensors before decoding, as graph outputs in ONNX Runtime."""
    model = exported_tiny(nms="plugin", input_kind=input_kind, batch=batch)
    proto = copy.deepcopy(model.proto)
    nodes = [node for node in proto.graph.node if not node.domain and not node.name.startswith("end__")]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    names = [name for node in nodes for name in node.output]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    opened = session(proto)
    arrays = [network_array(image, input_kind, batch) for image in IMAGES]
    return [
        {"images": array, **dict(zip(names, opened.run(names, {"images": array}), strict=True))} for array in arrays
    ]


def convolutions(model):
    return [node for node in model.proto.graph.node if node.op_type == "Conv"]


# --- against NumPy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_kind, batch", MATRIX)
def test_histograms_are_those_of_the_tensors_themselves(input_kind, batch):
    found, tensors = calibration_of(input_kind, batch), tensors_of(input_kind, batch)
    assert found.images == len(IMAGES)
    for name, histogram in found.histograms.items():
        values = np.concatenate([of_image[name].reshape(-1) for of_image in tensors])
        np.testing.assert_array_equal(histogram.counts, Histogram.of(values).counts, err_msg=name)
        assert histogram.amax == np.abs(values).max(), name


@pytest.mark.parametrize("input_kind, batch", MATRIX)
def test_input_means_are_those_of_each_input_channel_of_a_convolution(input_kind, batch):
    found, tensors = calibration_of(input_kind, batch), tensors_of(input_kind, batch)
    read = {node.input[0] for node in convolutions(exported_tiny(nms="plugin", input_kind=input_kind, batch=batch))}
    assert found.input_means.keys() == read
    for name, means in found.input_means.items():
        values = np.concatenate([of_image[name] for of_image in tensors]).astype(np.float64)
        assert means.dtype == np.float64 and means.shape == (values.shape[1],)
        reach = np.abs(values).mean()
        np.testing.assert_allclose(means, values.mean(axis=(0, 2, 3)), rtol=0, atol=MEAN_REL * reach, err_msg=name)


@pytest.mark.parametrize("input_kind, batch", MATRIX)
def test_output_amax_is_the_largest_output_of_each_convolution_before_its_activation(input_kind, batch):
    found, tensors = calibration_of(input_kind, batch), tensors_of(input_kind, batch)
    outputs = [node.output[0] for node in convolutions(exported_tiny(nms="plugin", input_kind=input_kind, batch=batch))]
    assert list(found.output_amax) == outputs
    for name, amax in found.output_amax.items():
        assert amax == max(float(np.abs(of_image[name]).max()) for of_image in tensors), name


@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
def test_every_input_of_a_convolution_is_counted_or_consists_of_counted_tensors(input_kind):
    model = exported_tiny(nms="plugin", input_kind=input_kind)
    counted = set(calibration_of(input_kind).histograms)
    producers = {name: node for node in model.proto.graph.node for name in node.output}
    waiting, ends = [node.input[0] for node in convolutions(model)], set()
    while waiting:
        name = waiting.pop()
        if name in producers and producers[name].op_type in ("Concat", "MaxPool", "Resize"):
            waiting += producers[name].input[: None if producers[name].op_type == "Concat" else 1]
        else:
            ends.add(name)
    assert counted == ends
    assert ("images" in counted) == (input_kind == "float32")


def test_a_fixed_batch_counts_each_image_once_per_batch_element():
    one, three = calibration_of(batch=1), calibration_of(batch=3)
    for name, histogram in one.histograms.items():
        assert three.histograms[name].counts.sum() == 3 * histogram.counts.sum()
    np.testing.assert_array_equal(three.histograms["images"].counts, 3 * one.histograms["images"].counts)


# --- images and their order -------------------------------------------------------------------------------------------


def test_the_order_of_images_does_not_matter():
    model = exported_tiny(nms="plugin")
    found, other = calibration_of(), calibrated(model, (IMAGES[2], IMAGES[0], IMAGES[3], IMAGES[1]))
    assert found.histograms.keys() == other.histograms.keys()
    for name, histogram in found.histograms.items():
        np.testing.assert_array_equal(histogram.counts, other.histograms[name].counts)
        assert histogram.amax == other.histograms[name].amax
    for name, means in found.input_means.items():
        np.testing.assert_allclose(means, other.input_means[name], rtol=ORDER_REL, atol=ORDER_REL)
    rest = {field.name for field in fields(Calibration)} - {"histograms", "input_means"}
    assert {name: getattr(found, name) for name in rest} == {name: getattr(other, name) for name in rest}


def test_other_images_have_another_digest():
    model = exported_tiny(nms="plugin")
    digests = {
        calibrated(model, images).images_sha256 for images in (IMAGES[:1], IMAGES[1:2], IMAGES[:2], IMAGES[:1] * 2)
    }
    assert len(digests) == 4


def test_images_may_come_from_an_iterator():
    found = calibrate(exported_tiny(nms="plugin"), iter(IMAGES), count=len(IMAGES))
    assert found.images_sha256 == calibration_of().images_sha256


def test_progress_is_reported_after_each_image():
    reported = []
    calibrate(exported_tiny(nms="plugin"), IMAGES, count=9, progress=lambda done, count: reported.append((done, count)))
    assert reported == [(1, 9), (2, 9), (3, 9), (4, 9)]


def test_calibration_without_images_is_an_error():
    with pytest.raises(UsageError, match="no image"):
        calibrate(exported_tiny(nms="plugin"), [], count=0)


def test_the_model_is_not_modified():
    model = exported_tiny(nms="plugin")
    before = model.proto.SerializeToString(deterministic=True)
    calibrated(model, IMAGES[:1])
    assert model.proto.SerializeToString(deterministic=True) == before


def test_memory_does_not_grow_with_the_number_of_images():
    def peak(count):
        tracemalloc.reset_peak()
        calibrate(exported_tiny(nms="plugin"), (noise(*HW, seed) for seed in range(count)), count=count)
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        few, many = peak(3), peak(30)
    finally:
        tracemalloc.stop()
    assert few > 10e6  # the tensors of an image are traced, too
    assert many < GROWTH * few


# --- the digest of the network ----------------------------------------------------------------------------------------


def digest(model):
    return network_digest(Network(model))


def changed(change, **options):
    """yolov7-tiny with its graph changed."""
    model = exported_tiny(**{"nms": "plugin", **options})
    proto = copy.deepcopy(model.proto)
    change(proto.graph)
    return OnnxModel(proto, model.metadata)


@pytest.mark.parametrize(
    "options",
    some_fast(
        [
            {"nms": "none"},
            {"nms": "standard"},
            {"nms": "efficient"},
            {"conf": 0.7, "iou": 0.2, "max_det": 7},
            {"class_agnostic": True},
            *({"opset": opset} for opset in (13, 18, 21)),
            {"batch": 3},
        ],
        every=2,
    ),
    ids=str,
)
@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
def test_nms_opset_and_batch_do_not_change_the_digest(options, input_kind):
    base = {"nms": "plugin", "input_kind": input_kind}
    assert digest(exported_tiny(**{**base, **options})) == digest(exported_tiny(**base))


def nudge(graph, name):
    stored = next(tensor for tensor in graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(stored).copy()
    values.reshape(-1)[-1] = np.nextafter(values.reshape(-1)[-1], np.float32(9))
    stored.CopyFrom(numpy_helper.from_array(values, name))


def slope(graph):
    next(node for node in graph.node if node.op_type == "LeakyRelu").attribute[0].f = 0.2


@pytest.mark.parametrize(
    "change",
    [
        lambda graph: nudge(graph, "model.0.conv.weight"),
        lambda graph: nudge(graph, "model.76.conv.bias"),
        slope,
        lambda graph: graph.node.pop(0),
    ],
    ids=["the last bit of a weight", "the last bit of a bias", "an attribute", "a node"],
)
def test_every_change_before_decoding_changes_the_digest(change):
    model = exported_tiny(nms="plugin")
    assert digest(changed(change)) != digest(model)
    assert digest(changed(lambda graph: None)) == digest(model)


def test_uint8_input_has_another_digest():
    assert digest(exported_tiny(nms="plugin")) != digest(exported_tiny(nms="plugin", input_kind="uint8"))


def test_the_calibration_has_the_digest_of_its_network():
    assert calibration_of().network_sha256 == digest(exported_tiny(nms="none"))


# --- values that are not finite ---------------------------------------------------------------------------------------


def scaled(graph, name, factor):
    stored = next(tensor for tensor in graph.initializer if tensor.name == name)
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) * np.float32(factor), name))


def overflowing(graph):
    """Infinite on all images but black ones: two layers with weights of 1e25 and biases of 0."""
    for layer in (0, 1):
        scaled(graph, f"model.{layer}.conv.weight", 1e25)
        scaled(graph, f"model.{layer}.conv.bias", 0)


def test_the_error_for_infinite_values_names_tensor_and_image():
    black = np.zeros((*HW, 3), np.uint8)
    with pytest.raises(ExportError, match=r"On image 3, model\.1\.act holds infinite values") as caught:
        calibrated(changed(overflowing), (black, black, noise(*HW), black))
    assert caught.value.fix
    calibrated(changed(overflowing), (black, black))


@pytest.mark.parametrize("layer", ["model.0.conv", "model.40.conv"])
def test_nan_weights_are_refused(layer):
    with pytest.raises(ExportError, match=r"On image 1, .* infinite values or NaN"):
        calibrated(changed(lambda graph: scaled(graph, f"{layer}.weight", np.nan)), IMAGES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_head_map_that_is_not_finite_is_refused(bad):
    """No convolution reads head maps, so no histogram counts them."""
    head = exported_tiny(nms="plugin").metadata.heads[1]

    def spoil(graph):
        bias = next(node for node in graph.node if node.output[0] == head).input[2]
        stored = next(tensor for tensor in graph.initializer if tensor.name == bias)
        values = numpy_helper.to_array(stored).copy()
        values[3] = bad
        stored.CopyFrom(numpy_helper.from_array(values, bias))

    with pytest.raises(ExportError, match=f"On image 1, {head} holds infinite values or NaN"):
        calibrated(changed(spoil), IMAGES)


# --- third-party graphs -----------------------------------------------------------------------------------------------


def test_a_constant_input_of_a_concat_is_counted_with_every_image():
    """CoordConv networks have such an input: the coordinates of each cell."""
    coordinates = np.linspace(-7, 7, 2 * 8 * 8, dtype=np.float32).reshape(1, 2, 8, 8)
    weights = {
        "first": np.ones((4, 3, 1, 1), np.float32),
        "coordinates": coordinates,
        "second": np.ones((4, 6, 1, 1), np.float32),
        "last": np.ones((2, 4, 1, 1), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["images", "first"], ["a"]),
        helper.make_node("Concat", ["a", "coordinates"], ["joined"], axis=1),
        helper.make_node("Conv", ["joined", "second"], ["b"]),
        helper.make_node("Conv", ["b", "last"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 2, 8, 8])],
        initializer=[numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = OnnxModel(proto, ModelMetadata(variant="custom", class_names=(), strides=(), anchors=(), input_hw=(8, 8)))
    found = calibrated(model, [noise(8, 8, seed) for seed in range(3)])
    np.testing.assert_array_equal(found.histograms["coordinates"].counts, 3 * Histogram.of(coordinates).counts)
    assert found.histograms["coordinates"].amax == 7
    assert found.input_means["joined"].shape == (6,)
