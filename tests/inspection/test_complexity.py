"""Layers, parameters and GFLOPs, compared with the paper and the logs of the official program."""

import pytest
import torch

from yolov7_deploy.errors import UsageError
from yolov7_deploy.inspection.complexity import complexity, gflops, layer_costs, parameter_count
from yolov7_deploy.model.configs import VARIANTS, find_variant
from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.paper import paper_row

# variant: rows (deploy, training), parameters (training, deploy, fused). The official program logs 6219709, 36905341
# and 97202940 for fused models, and 37620125 for yolov7 as published.
COUNTS = {
    "yolov7-tiny": (78, 78, 6_228_762, 6_227_101, 6_219_709),
    "yolov7-tiny-silu": (78, 78, 6_228_762, 6_227_101, 6_219_709),
    "yolov7": (106, 106, 37_622_682, 37_620_125, 36_905_341),
    "yolov7x": (122, 122, 71_347_394, 71_344_389, 71_311_741),
    "yolov7-w6": (119, 123, 82_312_436, 70_426_236, 70_394_300),
    "yolov7-e6": (141, 145, 111_898_292, 97_246_652, 97_202_940),
    "yolov7-d6": (163, 167, 154_709_364, 133_810_044, 133_757_052),
    "yolov7-e6e": (262, 266, 166_408_884, 151_757_244, 151_687_420),
}
GFLOPS = {
    ("yolov7-tiny", 640): "13.74",
    ("yolov7-tiny", 416): "5.81",
    ("yolov7-tiny", 320): "3.44",
    ("yolov7-tiny-silu", 640): "13.74",
    ("yolov7", 640): "104.68",
    ("yolov7x", 640): "189.90",
    ("yolov7-w6", 1280): "360.14",
    ("yolov7-e6", 1280): "515.11",
    ("yolov7-d6", 1280): "702.56",
    ("yolov7-e6e", 1280): "843.22",
}
TRAINING_GFLOPS = {"yolov7-w6": "420.6", "yolov7-e6": "588.8", "yolov7-d6": "806.9", "yolov7-e6e": "916.9"}

PAPER_GFLOPS_REL = 0.005  # the paper's numbers are rounded, and were counted by a profiler on a smaller image
TINY_GFLOPS_REL = 0.02  # printed with two digits: 3.5 for 3.44

# Rows of the official models: index, type, channels, kernel and stride, input pixels per cell, parameters, inputs.
OFFICIAL_ROWS = {
    "yolov7": [
        (0, "Conv", 32, "3/1", 1, 928, (-1,)),
        (10, "Concat", 256, "", 4, 0, (9, 7, 5, 4)),
        (12, "MP", 256, "2/2", 8, 0, (11,)),
        (51, "SPPCSPC", 512, "", 32, 7_609_344, (50,)),
        (53, "Upsample", 256, "x2", 16, 0, (52,)),
        (104, "RepConv", 1024, "3/1", 32, 5_246_976, (101,)),
        (105, "IDetect", 255, "", None, 460_282, (102, 103, 104)),
        (105, "Detect", 255, "", None, 457_725, (102, 103, 104)),
    ],
    "yolov7-tiny": [(33, "SP", 256, "13/1", 32, 0, (30,)), (58, "Conv", 128, "3/2", 16, 73_984, (57,))],
    "yolov7-e6": [
        (2, "DownC", 160, "/2", 4, 70_880, (1,)),
        (144, "IAuxDetect", 255, "", None, 1_638_260, (136, 137, 138, 139, 140, 141, 142, 143)),
        (140, "Detect", 255, "", None, 817_020, (136, 137, 138, 139)),
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_and_parameters_equal_the_official_ones(variant):
    cost = complexity(variant)
    assert COUNTS[variant] == (
        cost.layers,
        cost.layers_training,
        cost.parameters_training,
        cost.parameters_deploy,
        cost.parameters_fused,
    )


@pytest.mark.parametrize(("variant", "size"), GFLOPS)
def test_gflops_of_the_fused_network_equal_the_reference(variant, size):
    cost = complexity(variant, size=size)
    assert f"{cost.gflops:.2f}" == GFLOPS[variant, size]
    assert cost.size == size


@pytest.mark.parametrize("variant", TRAINING_GFLOPS)
def test_gflops_of_the_training_form_include_auxiliary_branches(variant):
    assert f"{complexity(variant).gflops_training:.1f}" == TRAINING_GFLOPS[variant]


@pytest.mark.parametrize(("variant", "size"), GFLOPS)
def test_the_cost_agrees_with_the_paper_except_for_d6(variant, size):
    cost = complexity(variant, size=size)
    row = paper_row(variant, size=size if size < 640 else None)
    if variant == "yolov7-d6":
        assert row.gflops == pytest.approx(cost.gflops_training, rel=PAPER_GFLOPS_REL)
        assert row.gflops > 1.1 * cost.gflops
        assert row.params_m == pytest.approx(cost.parameters_training / 1e6, abs=0.05)
        return
    if row.size == size:
        rel = TINY_GFLOPS_REL if size < 640 else PAPER_GFLOPS_REL
        assert row.gflops == pytest.approx(cost.gflops, rel=rel)
    assert row.params_m == pytest.approx(cost.parameters_fused / 1e6, abs=0.05)


def test_the_default_size_is_that_of_the_paper():
    cost = complexity("yolov7-w6")
    assert (cost.size, cost.paper_size, cost.gflops) == (1280, 1280, cost.gflops_paper)


def test_four_times_the_pixels_cost_four_times_as_much():
    small, large = complexity("yolov7-e6", size=64), complexity("yolov7-e6", size=128)
    assert large.gflops == pytest.approx(4 * small.gflops, rel=1e-12)
    assert small.gflops_paper == large.gflops_paper


def test_classes_change_the_head_only():
    coco, one = complexity("yolov7"), complexity("yolov7", classes=1)
    per_class = 3 * (256 + 512 + 1024 + 3)  # a filter and its bias, for three anchors on each level
    assert coco.parameters_fused - one.parameters_fused == 79 * per_class


def test_the_gflops_equal_a_slow_count_on_real_tensors():
    """Multiply-accumulates are counted by definition, for each convolution of a network with real weights."""
    model = Yolov7(find_variant("yolov7-tiny"), fused=True)
    head = set(model.head.modules())
    total = 0

    def add(conv, _, output):
        nonlocal total
        for _cell in range(output.shape[2] * output.shape[3]):
            macs = conv.out_channels * conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
            total += 2 * (macs + (0 if conv in head else conv.out_channels))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    assert complexity("yolov7-tiny", size=64).gflops == pytest.approx(total / 1e9, rel=1e-12)


@pytest.mark.parametrize("size", [0, -640, 100, 1281])
def test_a_size_that_is_not_a_multiple_of_the_stride_is_a_usage_error(size):
    with pytest.raises(UsageError, match="must be a multiple of 64"):
        complexity("yolov7-w6", size=size)


def test_an_unknown_variant_and_zero_classes_are_usage_errors():
    with pytest.raises(UsageError, match="yolov8"):
        complexity("yolov8")
    with pytest.raises(UsageError, match="at least one class"):
        complexity("yolov7", classes=0)


@pytest.mark.parametrize("variant", OFFICIAL_ROWS)
def test_layer_costs_include_the_official_layers(variant):
    rows = {
        (row.index, row.kind, row.c_out, row.kernel_stride, row.reduction, row.parameters, row.sources)
        for row in layer_costs(variant)
    }
    assert rows.issuperset(OFFICIAL_ROWS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_costs_add_up_in_every_form(variant):
    rows, cost = layer_costs(variant), complexity(variant)
    training = [row for row in rows if row.form != "deploy"]
    deploy = [row for row in rows if row.form != "training"]
    assert sum(row.parameters for row in training) == cost.parameters_training
    assert sum(row.parameters for row in deploy) == cost.parameters_deploy
    assert sum(row.parameters_fused for row in deploy) == cost.parameters_fused
    assert [row.index for row in training] == list(range(cost.layers_training))
    assert [row.index for row in deploy] == list(range(cost.layers))


def test_counting_removes_its_hooks():
    model = Yolov7(find_variant("yolov7-tiny"), fused=True).to("meta")
    first = gflops(model, size=64)
    assert gflops(model, size=64) == first
    assert not any(module._forward_hooks for module in model.modules())
    assert parameter_count(model) == COUNTS["yolov7-tiny"][-1]
