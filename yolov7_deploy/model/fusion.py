"""Fusion of BatchNorm, RepConv branches and implicit knowledge into plain convolutions.

The folds are exact up to rounding, and computed in float64 so that values are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yolov7_deploy.errors import FusionError
from yolov7_deploy.model.blocks import SPPCSPC, Conv, DownC, RepConv
from yolov7_deploy.model.heads import Detect, ImplicitDetect
from yolov7_deploy.model.yolov7 import Yolov7

Kernel = tuple[Tensor, Tensor]  # weight [c_out, c_in, k, k] and bias [c_out], float64


def fuse(model: Yolov7) -> Yolov7:
    """Return the deploy form of a model: convolutions with bias only, and the same outputs; `model` is unchanged.

    Auxiliary branches are dropped and custom anchors kept. The result is in eval mode, without gradients, and in the
    dtype of `model`.

    Raises:
        FusionError: The model is already fused.

    Example:
        >>> fused = fuse(build_model(load_checkpoint("best.safetensors")))
        >>> fused.fused
        True
    """
    if model.fused:
        raise FusionError(f"This {model.variant.name} is already fused.", fix="Use it without calling fuse().")
    with torch.device("meta"):
        fused = Yolov7(model.variant, classes=model.classes, fused=True)
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for index, block in enumerate(fused.model[:-1]):
            _fuse_block(model.model[index], block, f"model.{index}", state)
        _fuse_head(model.head, f"model.{len(fused.model) - 1}", state)
    dtype = next(model.parameters()).dtype
    fused.load_state_dict(
        {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}, strict=True, assign=True
    )
    return fused.eval().requires_grad_(False)


def _fuse_block(source: nn.Module, target: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    match source:
        case Conv():
            _store(f"{name}.conv", fold_batch_norm(source.conv, source.bn), state)
        case RepConv():
            _store(f"{name}.rbr_reparam", fold_branches(source), state)
        case SPPCSPC() | DownC():
            for child, module in source.named_children():
                _fuse_block(module, getattr(target, child), f"{name}.{child}", state)
        case _ if list(source.parameters()):
            raise FusionError(f"No rule folds {name} ({type(source).__name__}).", fix="Add one to fusion.py.")


def _fuse_head(head: Detect, name: str, state: dict[str, Tensor]) -> None:
    state[f"{name}.anchors"] = head.anchors
    state[f"{name}.anchor_grid"] = head.anchor_grid
    for level in range(head.levels):
        _store(f"{name}.m.{level}", fold_implicit(head, level), state)


def _store(name: str, kernel: Kernel, state: dict[str, Tensor]) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = kernel


def fold_batch_norm(conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> Kernel:
    """Fold a BatchNorm into the convolution before it.

    W' = k W and b' = beta + k (b - mean), with k = gamma / sqrt(var + eps).
    """
    weight = conv.weight.double()
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.double()
    if bn is None:
        return weight, bias
    scale, shift = _affine(bn)
    return weight * scale.view(-1, 1, 1, 1), shift + scale * bias


def fold_branches(block: RepConv) -> Kernel:
    """Fold all branches of a RepConv into one 3x3 kernel: the 1x1 and the identity are its centre."""
    weight, bias = fold_batch_norm(block.rbr_dense[0], block.rbr_dense[1])  # type: ignore[arg-type]
    weight_1x1, bias_1x1 = fold_batch_norm(block.rbr_1x1[0], block.rbr_1x1[1])  # type: ignore[arg-type]
    weight, bias = weight + F.pad(weight_1x1, (1, 1, 1, 1)), bias + bias_1x1
    if block.rbr_identity is not None:
        scale, shift = _affine(block.rbr_identity)
        weight, bias = weight + F.pad(torch.diag(scale)[:, :, None, None], (1, 1, 1, 1)), bias + shift
    return weight, bias


def fold_implicit(head: Detect, level: int) -> Kernel:
    """Fold implicit knowledge into the 1x1 convolution: W' = diag(m) W, b' = m (b + W a), with the unscaled W."""
    conv = head.m[level]
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    weight, bias = conv.weight.double(), conv.bias.double()
    if not isinstance(head, ImplicitDetect):
        return weight, bias
    added, factor = (vectors[level].double().flatten() for vectors in head.knowledge())
    return weight * factor.view(-1, 1, 1, 1), factor * (bias + weight.flatten(1) @ added)


def _affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm in eval mode."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    return scale, bn.bias.double() - bn.running_mean.double() * scale
