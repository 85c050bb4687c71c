"""All variants against outputs of the official code on deterministic weights."""

import copy
import json
import zlib
from pathlib import Path

import pytest
import torch

from tests.support.deterministic import fill_model, make_image
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "models.json").read_text())

# Two float32 implementations add up the same products in another order. Some of these networks have raw
# values of several hundred, so raw maps are compared relative to their standard deviation.
RAW_TOLERANCE = 2e-4
# Decoded values are sigmoids times anchors of up to 925 pixels.
DECODED_TOLERANCE = 2e-3
# Pixels, in float64.
FUSION_TOLERANCE = 1e-6


# They have the blocks of smaller ones: W6, and E6E in deploy form.
SLOW = ("yolov7-d6/deploy", "yolov7-d6/training", "yolov7-e6/deploy", "yolov7-e6/training", "yolov7-e6e/training")


def _parameters():
    for name in sorted(GOLDEN):
        yield pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name


@pytest.fixture(scope="module", params=_parameters())
def case(request):
    variant, form = request.param.split("/")
    golden = GOLDEN[request.param]
    model = new_model(variant, classes=golden["nc"], training_form=form == "training")
    fill_model(model, golden["salt"])
    with torch.no_grad():
        image = make_image(golden["height"], golden["width"], golden["salt"])
        raws = model(image)
        decoded = model.head.decode(raws)
    return model, golden, raws, decoded, image


def test_state_dict_has_the_official_keys_and_shapes_in_order(case):
    model, golden, *_ = case
    state = model.state_dict()
    lines = "\n".join(f"{key}:{tuple(value.shape)}" for key, value in state.items())
    assert len(state) == golden["nkeys"]
    assert zlib.crc32(lines.encode()) == golden["keys_crc"]


def test_counts_and_strides_are_official(case):
    model, golden, *_ = case
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    assert len(model.layers) == golden["layers"]
    assert list(model.variant.strides) == golden["stride"]


def test_fused_parameter_count_is_the_official_one_without_fused_tensors(case):
    model, golden, *_ = case
    fused = sum(p.numel() for p in fuse(model).parameters())
    left_behind = sum(p.numel() for name, p in model.named_parameters() if ".ia." in name or ".im." in name)
    if model.training_form and model.variant.has_auxiliary:
        # Official fusion leaves the auxiliary branches in the model; ours equals the deploy graph's fused count.
        assert fused == GOLDEN[f"{model.variant.name}/deploy"]["fused_params"]
    else:
        assert fused == golden["fused_params"] - left_behind


def test_raw_maps_equal_the_official_ones(case):
    _, golden, raws, *_ = case
    assert len(raws) == len(golden["raw"])
    for raw, expected in zip(raws, golden["raw"], strict=True):
        assert_same(raw, expected, RAW_TOLERANCE * max(1.0, expected["std"]))


def test_decoded_output_equals_the_official_one(case):
    _, golden, _, decoded, _ = case
    assert_same(decoded, golden["decoded"], DECODED_TOLERANCE)


def test_fused_model_gives_the_same_output(case):
    model, _, _, _, image = case
    # In float64: large activations amplify the float32 rounding of the folded weights to several pixels.
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        difference = (fuse(exact).predict(image.double()) - exact.predict(image.double())).abs().max().item()
    assert difference <= FUSION_TOLERANCE


def assert_same(tensor, expected, tolerance):
    assert list(tensor.shape) == expected["shape"]
    flat = tensor.flatten()
    samples = torch.tensor(expected["value"])
    torch.testing.assert_close(flat[expected["index"]], samples, atol=tolerance, rtol=1e-4)
    torch.testing.assert_close(flat.mean().item(), expected["mean"], atol=tolerance, rtol=1e-4)
    torch.testing.assert_close(flat.std().item(), expected["std"], atol=tolerance, rtol=1e-3)
    torch.testing.assert_close(flat.abs().max().item(), expected["absmax"], atol=tolerance, rtol=1e-4)
