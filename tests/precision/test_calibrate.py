"""Calibration against NumPy on the tensors themselves, and what its digests depend on."""

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
from tests.support.small_models import HW, exported_tiny, session
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.image import fit_letterbox
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.precision.calibrate import Calibration, calibrate, network_digest
from yolov7_deploy.precision.histogram import Histogram
from yolov7_deploy.precision.subgraph import Network

IMAGES = (noise(*HW, 1), noise(60, 250, 2), noise(*HW, 3), noise(300, 400, 4))
# Means are added up in float32 inside the graph, in another order than NumPy does; relative to the mean magnitude.
MEAN_REL = 1e-5
# Doubles added up in another order.
ORDER_REL = 1e-14
# Thirty images need what three need, and a few digests more.
GROWTH = 1.05

MATRIX = [("float32", 1), ("float32", 3), ("uint8", 1), ("uint8", 3)]


def calibrated(model, images=IMAGES):
    return calibrate(model, images, count=len(images))


@lru_cache
def calibration_of(input_kind="float32", batch=1) -> Calibration:
    """Of yolov7-tiny on IMAGES; shared, so not to be changed."""
    return calibrated(exported_tiny(nms="plugin", input_kind=input_kind, batch=batch))


def fed(image, input_kind, batch):
    """The image as the network takes it, slowly."""
    placed = fit_letterbox(image.shape[:2], HW).apply(image)
    if input_kind == "float32":
        placed = np.stack([placed[..., channel] / np.float32(255) for channel in (2, 1, 0)])
    return np.stack([placed] * batch)


@lru_cache
def tensors_of(input_kind, batch):
    """For each image all float tensors in front of decoding and the input, as outputs of a graph of ONNX Runtime."""
    model = exported_tiny(nms="plugin", input_kind=input_kind, batch=batch)
    proto = copy.deepcopy(model.proto)
    nodes = [node for node in proto.graph.node if not node.domain and not node.name.startswith("end__")]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    names = [name for node in nodes for name in node.output]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    opened = session(proto)
    arrays = [fed(image, input_kind, batch) for image in IMAGES]
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
        assert histogram.largest == np.abs(values).max(), name


@pytest.mark.parametrize("input_kind, batch", MATRIX)
def test_means_are_those_of_each_channel_that_a_convolution_reads(input_kind, batch):
    found, tensors = calibration_of(input_kind, batch), tensors_of(input_kind, batch)
    read = {node.input[0] for node in convolutions(exported_tiny(nms="plugin", input_kind=input_kind, batch=batch))}
    assert found.means.keys() == read
    for name, means in found.means.items():
        values = np.concatenate([of_image[name] for of_image in tensors]).astype(np.float64)
        assert means.dtype == np.float64 and means.shape == (values.shape[1],)
        reach = np.abs(values).mean()
        np.testing.assert_allclose(means, values.mean(axis=(0, 2, 3)), rtol=0, atol=MEAN_REL * reach, err_msg=name)


@pytest.mark.parametrize("input_kind, batch", MATRIX)
def test_the_largest_results_are_those_of_each_convolution_before_its_activation(input_kind, batch):
    found, tensors = calibration_of(input_kind, batch), tensors_of(input_kind, batch)
    made = [node.output[0] for node in convolutions(exported_tiny(nms="plugin", input_kind=input_kind, batch=batch))]
    assert list(found.largest) == made
    for name, largest in found.largest.items():
        assert largest == max(float(np.abs(of_image[name]).max()) for of_image in tensors), name


@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
def test_what_every_convolution_reads_is_counted_or_is_joined_of_what_is_counted(input_kind):
    model = exported_tiny(nms="plugin", input_kind=input_kind)
    counted = set(calibration_of(input_kind).histograms)
    makers = {name: node for node in model.proto.graph.node for name in node.output}
    waiting, ends = [node.input[0] for node in convolutions(model)], set()
    while waiting:
        name = waiting.pop()
        if name in makers and makers[name].op_type in ("Concat", "MaxPool", "Resize"):
            waiting += makers[name].input[: None if makers[name].op_type == "Concat" else 1]
        else:
            ends.add(name)
    assert counted == ends
    assert ("images" in counted) == (input_kind == "float32")


def test_a_fixed_batch_counts_each_image_as_often_as_it_runs():
    one, three = calibration_of(batch=1), calibration_of(batch=3)
    for name, histogram in one.histograms.items():
        assert three.histograms[name].counts.sum() == 3 * histogram.counts.sum()
    np.testing.assert_array_equal(three.histograms["images"].counts, 3 * one.histograms["images"].counts)


# --- images and their order -----------------------------------------------------------------------------------------


def test_the_order_of_images_does_not_matter():
    model = exported_tiny(nms="plugin")
    found, other = calibration_of(), calibrated(model, (IMAGES[2], IMAGES[0], IMAGES[3], IMAGES[1]))
    assert found.histograms.keys() == other.histograms.keys()
    for name, histogram in found.histograms.items():
        np.testing.assert_array_equal(histogram.counts, other.histograms[name].counts)
        assert histogram.largest == other.histograms[name].largest
    for name, means in found.means.items():
        np.testing.assert_allclose(means, other.means[name], rtol=ORDER_REL, atol=ORDER_REL)
    rest = {field.name for field in fields(Calibration)} - {"histograms", "means"}
    assert {name: getattr(found, name) for name in rest} == {name: getattr(other, name) for name in rest}


def test_the_digest_of_images_is_of_the_images():
    model = exported_tiny(nms="plugin")
    digests = {
        calibrated(model, images).images_sha256 for images in (IMAGES[:1], IMAGES[1:2], IMAGES[:2], IMAGES[:1] * 2)
    }
    assert len(digests) == 4


def test_images_may_come_one_by_one():
    found = calibrate(exported_tiny(nms="plugin"), iter(IMAGES), count=len(IMAGES))
    assert found.images_sha256 == calibration_of().images_sha256


def test_progress_is_told_after_each_image():
    told = []
    calibrate(exported_tiny(nms="plugin"), IMAGES, count=9, progress=lambda done, count: told.append((done, count)))
    assert told == [(1, 9), (2, 9), (3, 9), (4, 9)]


def test_without_a_image_nothing_is_calibrated():
    with pytest.raises(UsageError, match="no image"):
        calibrate(exported_tiny(nms="plugin"), [], count=0)


def test_the_model_is_left_as_it_was():
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
    assert few > 10e6  # the tensors of an image are among what is traced
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
    [
        {"nms": "none"},
        {"nms": "standard"},
        {"nms": "efficient"},
        {"conf": 0.7, "iou": 0.2, "max_det": 7},
        {"class_agnostic": True},
        *({"opset": opset} for opset in (13, 18, 21)),
        {"batch": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
def test_suppression_opset_and_batch_do_not_change_the_digest(options, input_kind):
    usual = {"nms": "plugin", "input_kind": input_kind}
    assert digest(exported_tiny(**{**usual, **options})) == digest(exported_tiny(**usual))


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
def test_everything_in_front_of_decoding_changes_the_digest(change):
    model = exported_tiny(nms="plugin")
    assert digest(changed(change)) != digest(model)
    assert digest(changed(lambda graph: None)) == digest(model)


def test_bytes_as_input_are_another_network():
    assert digest(exported_tiny(nms="plugin")) != digest(exported_tiny(nms="plugin", input_kind="uint8"))


def test_the_calibration_has_the_digest_of_its_network():
    assert calibration_of().network_sha256 == digest(exported_tiny(nms="none"))


# --- what is no number ------------------------------------------------------------------------------------------------


def scaled(graph, name, factor):
    stored = next(tensor for tensor in graph.initializer if tensor.name == name)
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) * np.float32(factor), name))


def overflowing(graph):
    """Infinite on what is not black: two layers of 1e25 each, and nothing added to them."""
    for layer in (0, 1):
        scaled(graph, f"model.{layer}.conv.weight", 1e25)
        scaled(graph, f"model.{layer}.conv.bias", 0)


def test_infinite_values_are_refused_with_tensor_and_image():
    black = np.zeros((*HW, 3), np.uint8)
    with pytest.raises(ExportError, match=r"On image 3, model\.1\.act holds values that are infinite") as caught:
        calibrated(changed(overflowing), (black, black, noise(*HW), black))
    assert caught.value.fix
    calibrated(changed(overflowing), (black, black))


@pytest.mark.parametrize("layer", ["model.0.conv", "model.40.conv"])
def test_weights_that_are_no_numbers_are_refused(layer):
    with pytest.raises(ExportError, match=r"On image 1, .* infinite or no numbers"):
        calibrated(changed(lambda graph: scaled(graph, f"{layer}.weight", np.nan)), IMAGES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_head_map_that_is_no_number_is_refused(bad):
    """No convolution reads it, and so no histogram counts it."""
    head = exported_tiny(nms="plugin").metadata.heads[1]

    def spoil(graph):
        bias = next(node for node in graph.node if node.output[0] == head).input[2]
        stored = next(tensor for tensor in graph.initializer if tensor.name == bias)
        values = numpy_helper.to_array(stored).copy()
        values[3] = bad
        stored.CopyFrom(numpy_helper.from_array(values, bias))

    with pytest.raises(ExportError, match=f"On image 1, {head} holds values that are infinite or no numbers"):
        calibrated(changed(spoil), IMAGES)


# --- graphs of others -------------------------------------------------------------------------------------------------


def test_a_constant_that_is_joined_to_what_a_convolution_reads_is_counted_with_every_image():
    """As where a network is given the place of each cell (CoordConv)."""
    places = np.linspace(-7, 7, 2 * 8 * 8, dtype=np.float32).reshape(1, 2, 8, 8)
    weights = {
        "first": np.ones((4, 3, 1, 1), np.float32),
        "places": places,
        "second": np.ones((4, 6, 1, 1), np.float32),
        "last": np.ones((2, 4, 1, 1), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["images", "first"], ["a"]),
        helper.make_node("Concat", ["a", "places"], ["joined"], axis=1),
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
    np.testing.assert_array_equal(found.histograms["places"].counts, 3 * Histogram.of(places).counts)
    assert found.histograms["places"].largest == 7
    assert found.means["joined"].shape == (6,)
