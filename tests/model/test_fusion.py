"""Fusion is exact, also for statistics and implicit knowledge far from their initial values, and keeps its input."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from yolov7_deploy.errors import FusionError
from yolov7_deploy.model.blocks import BATCH_NORM_EPS, Conv, RepConv, batch_norm
from yolov7_deploy.model.configs import VARIANTS, find_variant
from yolov7_deploy.model.fusion import fold_batch_norm, fold_branches, fold_implicit, fuse
from yolov7_deploy.model.heads import AuxiliaryDetect, ImplicitDetect
from yolov7_deploy.model.yolov7 import Yolov7, new_model

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Both sides add the same float64 products, in another order; relative to the largest value compared.
FLOAT64_TOLERANCE = 1e-12
# The same for a complete network: up to 200 layers, each of which may amplify the difference.
DEEP_FLOAT64_TOLERANCE = 1e-9
# Folding in float64 and rounding once leaves half a unit in the last place of float32.
FLOAT32_ROUNDING = 2**-24

ODD_ANCHORS = tuple(tuple((7.0 + 3 * i + level, 11.0 + 5 * i + level) for i in range(3)) for level in range(4))


def randomize_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set statistics and implicit knowledge to unusual values: variances 1e-3 to 50, negative scales, large means."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.copy_(uniform(part.weight, -3, 3))
                part.bias.copy_(uniform(part.bias, -5, 5))
                part.running_mean.copy_(uniform(part.running_mean, -20, 20))
                part.running_var.copy_(10 ** uniform(part.running_var, -3, 1.7))
        for name, parameter in module.named_parameters():
            if name.endswith("implicit"):
                parameter.copy_(uniform(parameter, -4, 4))
    return module.eval()


def assert_equal(ours, expected, tolerance=FLOAT64_TOLERANCE):
    assert ours.shape == expected.shape
    scale = expected.abs().max().item()
    assert scale > 0
    assert (ours - expected).abs().max().item() <= tolerance * scale


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def narrow_channels(channels: int) -> int:
    """Return an eighth of the channels; 3 is the image and 12 its space-to-depth."""
    return channels if channels in (3, 12) else channels // 8


@pytest.fixture
def narrow(monkeypatch):
    """Builder of networks with a variant's layer table, an eighth as wide, in float64 with unusual statistics."""

    def build(name: str, *, training: bool, **options) -> Yolov7:
        original = find_variant(name)
        table, leads, auxiliary = original.build_table()
        rows = [
            replace(row, c_in=tuple(map(narrow_channels, row.c_in)), c_out=narrow_channels(row.c_out))
            for row in table.rows
        ]
        table.rows[:] = rows
        build_table = lambda: (copy.deepcopy(table), leads, auxiliary)  # noqa: E731
        variant = replace(original, name=f"narrow {name}", build_table=build_table)
        monkeypatch.setitem(VARIANTS, variant.name, variant)
        torch.manual_seed(0)
        return randomize_statistics(Yolov7(variant, training_form=training, **options)).double()

    return build


# --- one block at a time ------------------------------------------------------------------------------------------


def test_the_test_statistics_are_far_from_initial_values():
    bn = randomize_statistics(batch_norm(500))
    assert bn.running_var.min() < 2e-3 and bn.running_var.max() > 40
    assert bn.weight.min() < -2 and bn.running_mean.abs().max() > 15


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2)])
def test_a_folded_batch_norm_gives_the_same_map(kernel, stride):
    block = randomize_statistics(Conv(5, 7, kernel, stride, "silu", fused=False)).double()
    x = noise(2, 5, 9, 8)
    weight, bias = fold_batch_norm(block.conv, block.bn)
    folded = nn.functional.conv2d(x, weight, bias, stride, kernel // 2)
    assert_equal(folded, block.bn(block.conv(x)))


def test_a_batch_norm_after_a_convolution_with_bias_folds_the_bias_too():
    conv, bn = nn.Conv2d(3, 4, 1).double(), randomize_statistics(batch_norm(4)).double()
    weight, bias = fold_batch_norm(conv, bn)
    x = noise(1, 3, 4, 4)
    assert_equal(nn.functional.conv2d(x, weight, bias), bn(conv(x)))


def test_folding_uses_the_official_epsilon():
    conv, bn = nn.Conv2d(1, 1, 1, bias=False).double(), batch_norm(1).double().eval()
    with torch.no_grad():
        conv.weight.fill_(1)
        bn.running_var.fill_(1e-3)
    weight, _ = fold_batch_norm(conv, bn)
    assert weight.item() == pytest.approx((1e-3 + BATCH_NORM_EPS) ** -0.5, rel=1e-6)


@pytest.mark.parametrize("c_in, c_out", [(6, 6), (4, 6)])
def test_folded_branches_give_the_same_map(c_in, c_out):
    block = randomize_statistics(RepConv(c_in, c_out, "silu", fused=False)).double()
    assert (block.rbr_identity is not None) == (c_in == c_out)
    x = noise(2, c_in, 7, 9)
    weight, bias = fold_branches(block)
    assert weight.shape == (c_out, c_in, 3, 3)
    assert_equal(block.act(nn.functional.conv2d(x, weight, bias, 1, 1)), block(x))


@pytest.mark.parametrize("head_type", [ImplicitDetect, AuxiliaryDetect])
def test_folded_implicit_knowledge_gives_the_same_map(head_type):
    channels = [5, 6, 7]
    head = head_type(channels * 2, 4, ODD_ANCHORS[:3], (8, 16, 32))
    head = randomize_statistics(head).double()
    features = [noise(2, c, 4, 3, seed=c) for c in channels]
    for level, (x, expected) in enumerate(zip(features, head.maps(features), strict=True)):
        assert_equal(nn.functional.conv2d(x, *fold_implicit(head, level)), expected)


# --- complete networks -----------------------------------------------------------------------------------------------

BOTH_FORMS = pytest.mark.parametrize("training", [False, True])
EVERY_VARIANT = pytest.mark.parametrize("variant", sorted(VARIANTS))


@BOTH_FORMS
@EVERY_VARIANT
def test_every_block_of_every_variant_is_folded_exactly(narrow, variant, training):
    """Compared layer by layer on random inputs, because unusual statistics overflow within ten layers."""
    model = narrow(variant, training=training, classes=3)
    fused = fuse(model)
    with torch.no_grad():
        for layer, block, folded in zip(model.layers, model.model, fused.model[:-1], strict=False):
            xs = [noise(1, c, 6, 6, seed=layer.index) for c in layer.c_in]
            assert type(folded) is type(block)
            assert_equal(folded(*xs), block(*xs))
        features = [noise(1, c, 2, 2, seed=c) for c in fused.layers[-1].c_in]
        for ours, expected in zip(fused.head.maps(features), model.head.maps(features), strict=True):
            assert_equal(ours, expected)


@BOTH_FORMS
@EVERY_VARIANT
def test_no_batch_norm_branch_or_implicit_tensor_remains(narrow, variant, training):
    fused = fuse(narrow(variant, training=training, classes=3))
    assert fused.fused and not fused.training and not fused.training_form
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d | ImplicitDetect)]
    names = [name.split(".") for name in fused.state_dict()]
    assert not [n for n in names if {"bn", "ia", "im", "m2", "rbr_dense", "rbr_1x1", "rbr_identity"} & set(n)]
    assert all(conv.bias is not None for conv in fused.modules() if isinstance(conv, nn.Conv2d))
    assert not [p for p in fused.parameters() if p.requires_grad]
    assert len(fused.model) == len(find_variant(variant).layers(training=False))


@pytest.mark.parametrize("variant", ["yolov7", "yolov7-w6", "yolov7-e6e"])
def test_the_complete_network_gives_the_same_output(narrow, variant):
    model = narrow(variant, training=True, classes=3)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.reset_running_stats()  # unusual statistics would overflow within ten layers
        nn.init.uniform_(bn.weight, -1.5, 1.5)
    image = torch.rand(1, 3, 128, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        raws = model(image)
        for ours, expected in zip(fuse(model)(image), raws, strict=True):
            assert ours.std() > 0
            assert_equal(ours, expected, DEEP_FLOAT64_TOLERANCE)


@pytest.mark.parametrize("training", [False, True])
def test_the_input_is_left_untouched(narrow, training):
    model = narrow("yolov7-w6", training=training, classes=3).train()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.requires_grad for p in model.parameters()]
    fused = fuse(model)
    with torch.no_grad():
        for tensor in fused.state_dict().values():
            tensor.add_(1)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.training and not model.fused
    assert [p.requires_grad for p in model.parameters()] == gradients


def test_fusing_twice_raises():
    fused = fuse(new_model("yolov7-tiny", classes=2))
    with pytest.raises(FusionError, match="yolov7-tiny is already fused") as caught:
        fuse(fused)
    assert caught.value.fix


def test_a_block_without_a_rule_is_named(narrow):
    model = narrow("yolov7-tiny", training=False, classes=2)
    model.model[4] = nn.ConvTranspose2d(4, 4, 1)
    with pytest.raises(FusionError, match=r"model\.4 \(ConvTranspose2d\)"):
        fuse(model)


@pytest.mark.parametrize("training", [False, True])
def test_custom_anchors_of_a_p6_model_are_preserved(narrow, training):
    model = narrow("yolov7-w6", training=training, classes=3, anchors=ODD_ANCHORS)
    fused = fuse(model)
    assert fused.anchors == ODD_ANCHORS != fused.variant.anchors
    assert torch.equal(fused.head.anchors, model.head.anchors)
    assert torch.equal(fused.head.anchor_grid, model.head.anchor_grid)
    model.head.anchor_grid.zero_()
    assert fused.anchors == ODD_ANCHORS
    raws = [noise(1, 3, 2, 2, 8, seed=level) for level in range(4)]
    sizes = fused.head.decode(raws)[0, :, 2:4].reshape(4, 3, 4, 2)
    widest = torch.stack([raw[0, ..., 2:4].sigmoid() * 2 for raw in raws]).pow(2).reshape(4, 3, 4, 2)
    torch.testing.assert_close(sizes / widest, torch.tensor(ODD_ANCHORS).double()[:, :, None].expand(4, 3, 4, 2))


def test_the_dtype_of_the_model_is_preserved():
    for dtype in (torch.float32, torch.float64, torch.float16):
        fused = fuse(new_model("yolov7-tiny", classes=2).to(dtype))
        assert {tensor.dtype for tensor in fused.state_dict().values()} == {dtype}


def test_float32_weights_are_rounded_only_once(narrow):
    model = narrow("yolov7", training=True, classes=3).float()
    exact = fuse(copy.deepcopy(model).double()).state_dict()
    for key, value in fuse(model).state_dict().items():
        difference = (value.double() - exact[key]).abs()
        assert (difference <= FLOAT32_ROUNDING * exact[key].abs()).all(), key
