"""Compound scaling gives the official networks layer by layer, and refuses what it cannot scale."""

from dataclasses import replace

import pytest

from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.ablations import V7X_LIGHT
from yolov7_deploy.model.configs import CONFIGS, find_variant
from yolov7_deploy.model.scaling import scale

W6 = CONFIGS["yolov7-w6"]
BOTH_FORMS = pytest.mark.parametrize("training", [False, True])


def layers_of(config, *, training):
    return replace(find_variant("yolov7"), build_table=config.build_table).layers(training=training)


@BOTH_FORMS
@pytest.mark.parametrize(("name", "depth", "width"), [("yolov7-e6", 1.5, 1.25), ("yolov7-d6", 2.0, 1.5)])
def test_e6_and_d6_are_w6_scaled(name, depth, width, training):
    scaled = replace(scale(W6, depth=depth, width=width), down="DownC")
    assert layers_of(scaled, training=training) == find_variant(name).layers(training=training)


@BOTH_FORMS
def test_x_is_its_light_base_scaled(training):
    scaled = scale(V7X_LIGHT, depth=1.5, width=1.25)
    assert layers_of(scaled, training=training) == find_variant("yolov7x").layers(training=training)


def test_without_the_width_of_the_transitions_it_is_not_x():
    assert scale(V7X_LIGHT, depth=1.5) != CONFIGS["yolov7x"] != scale(V7X_LIGHT, width=1.25)


def test_the_factors_one_change_nothing():
    for config in CONFIGS.values():
        assert scale(config) == config


def test_scaling_up_and_down_again_gives_the_base():
    for config in (V7X_LIGHT, CONFIGS["yolov7"]):
        assert scale(scale(config, depth=1.5, width=1.25), depth=2 / 3, width=0.8) == config


@pytest.mark.parametrize(
    ("factors", "message", "fix"),
    [
        ({"depth": 1.25}, "A block of 4 convolutions times 1.25 is 5, not whole stacks of 2", "by 4/4 or 6/4"),
        ({"depth": 0.25}, "times 0.25 is 1, not whole stacks of 2", "by 2/4 or 4/4"),
        ({"width": 1.3}, "base: 64 channels times 1.3 is 83.2, not a whole, even number", "1.25"),
        ({"block_width": 0.01}, "blocks: 64 channels times 0.01", "0.5"),
        ({"depth": 0}, "depth 0 is not a positive factor", "depth 1.5, width 1.25"),
        ({"width": -1.0}, "width -1.0 is not a positive factor", "depth 1.5, width 1.25"),
        ({"width": float("nan")}, "width nan is not a positive factor", "depth 1.5, width 1.25"),
        ({"block_width": float("inf")}, "block_width inf is not", "depth 1.5, width 1.25"),
    ],
)
def test_factors_without_a_network_are_refused(factors, message, fix):
    with pytest.raises(UsageError) as caught:
        scale(W6, **factors)
    assert message in caught.value.message
    assert fix in caught.value.fix


@pytest.mark.parametrize("other", [find_variant("yolov7-tiny"), find_variant("yolor-csp"), None])
def test_a_network_that_is_not_concatenation_based_is_refused(other):
    with pytest.raises(UsageError, match="does not describe a concatenation-based network"):
        scale(other, depth=1.5)
