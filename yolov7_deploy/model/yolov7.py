"""Lays the bricks by the table and runs them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.errors import CheckpointError
from yolov7_deploy.model.blocks import SPPCSPC, Concat, Conv, DownC, MaxPool, ReOrg, RepConv, Shortcut, Upsample
from yolov7_deploy.model.configs import IMAGE, Anchors, Layer, Variant, find_variant
from yolov7_deploy.model.heads import AuxiliaryDetect, Detect, ImplicitDetect

_HEADS = {"Detect": Detect, "IDetect": ImplicitDetect, "IAuxDetect": AuxiliaryDetect}
_SHOWN = 6  # names listed in an error before "and N more"


class Yolov7(nn.Module):
    """A YOLOv7 network of any variant; module names are the official checkpoint keys (`model.N.…`).

    Args:
        variant: Which architecture.
        classes: Number of classes.
        training_form: With implicit knowledge and auxiliary branches, as the official training writes it.
        fused: BatchNorm, RepConv branches and implicit knowledge folded; only in deploy form.
        anchors: Per level three (width, height) in input pixels; the variant's own where absent.
        auxiliary: What training asks of auxiliary heads: `partial` (the official ones), `full` (see `Variant.layers`)
            or `none` (they are not computed).
    """

    def __init__(
        self,
        variant: Variant,
        *,
        classes: int = 80,
        training_form: bool = False,
        fused: bool = False,
        anchors: Anchors | None = None,
        auxiliary: str = "partial",
    ) -> None:
        super().__init__()
        assert not (training_form and fused), "a fused model has no training form"
        self.variant, self.classes, self.training_form, self.fused = variant, classes, training_form, fused
        self.layers = variant.layers(training=training_form, full_auxiliary=auxiliary == "full")
        self._asks_auxiliary = auxiliary != "none"
        self.model = nn.ModuleList(_block(layer, variant, fused) for layer in self.layers[:-1])
        head = self.layers[-1]
        self.model.append(_HEADS[head.kind](head.c_in, classes, anchors or variant.anchors, variant.strides))
        self._dies_at = {source: layer.index for layer in self.layers for source in layer.sources}

    @property
    def head(self) -> Detect:
        """The last layer."""
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    @property
    def anchors(self) -> Anchors:
        """Per level three (width, height) in input pixels, as the weights have them."""
        grid = self.head.anchor_grid.reshape(-1, 3, 2).tolist()
        return tuple(tuple((w, h) for w, h in level) for level in grid)

    def features(self, images: Tensor) -> list[Tensor]:
        """What the head reads, for images [B, 3, H, W] RGB 0..1 with sides that are multiples of the largest stride.

        A layer's output is dropped as soon as its last reader has run.
        """
        alive: dict[int, Tensor] = {IMAGE: images}
        wanted = self.layers[-1].sources
        if not (self.training and self._asks_auxiliary):
            wanted = wanted[: self.head.levels]
        last = max(wanted)
        for layer, block in zip(self.layers, self.model, strict=True):
            if layer.index > last:
                break
            alive[layer.index] = block(*(alive[i] for i in layer.sources))
            for i in layer.sources:
                if self._dies_at[i] == layer.index:
                    del alive[i]
        return [alive[i] for i in wanted]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raw maps [B, 3, H, W, 5 + C], fine to coarse; in training mode the auxiliary ones follow the lead ones."""
        features = self.features(images)
        levels = self.head.levels
        raws = self.head(features[:levels])
        if len(features) > levels and isinstance(self.head, AuxiliaryDetect):
            raws += self.head.auxiliary(features[levels:])
        return list(raws)

    def predict(self, images: Tensor) -> Tensor:
        """Decoded output [B, A, 5 + C]: cx, cy, w, h in input pixels, objectness, class probabilities."""
        return self.head.decode(self.forward(images)[: self.head.levels])


def _block(layer: Layer, variant: Variant, fused: bool) -> nn.Module:
    c_in, act = layer.c_in[0], variant.activation
    match layer.kind:
        case "Conv":
            return Conv(c_in, layer.c_out, layer.kernel, layer.stride, act, fused=fused)
        case "RepConv":
            return RepConv(c_in, layer.c_out, act, fused=fused)
        case "SPPCSPC":
            return SPPCSPC(c_in, layer.c_out, act, fused=fused)
        case "DownC":
            return DownC(c_in, layer.c_out, act, fused=fused)
        case "MP" | "SP":
            return MaxPool(layer.kernel, layer.stride)
        case "Concat":
            return Concat()
        case "Shortcut":
            return Shortcut()
        case "Upsample":
            return Upsample()
        case _:
            assert layer.kind == "ReOrg", layer.kind
            return ReOrg()


def new_model(
    variant: str,
    *,
    classes: int = 80,
    training_form: bool = False,
    anchors: Anchors | None = None,
    auxiliary: str = "partial",
) -> Yolov7:
    """A network of this variant with fresh random weights, in training mode.

    Raises:
        UsageError: Unknown variant.
    """
    return Yolov7(
        find_variant(variant), classes=classes, training_form=training_form, anchors=anchors, auxiliary=auxiliary
    )


def build_model(checkpoint: Checkpoint) -> Yolov7:
    """The network of a checkpoint, in the checkpoint's form and in eval mode; every tensor is used, none left over.

    Raises:
        CheckpointError: Keys are missing or left over, or shapes differ from the variant's table.
    """
    # Built without storage, so that no random weights are drawn only to be overwritten.
    with torch.device("meta"):
        model = Yolov7(
            find_variant(checkpoint.variant), classes=len(checkpoint.class_names), training_form=checkpoint.training
        )
    _check_keys(checkpoint, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    model.load_state_dict(OrderedDict(checkpoint.tensors), strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def _check_keys(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    found = {key: tuple(value.shape) for key, value in checkpoint.tensors.items()}
    form = "training" if checkpoint.training else "deploy"
    what = f"{checkpoint.source} looks like {checkpoint.variant} ({form} form, {len(checkpoint.class_names)} classes)"
    problems = {
        "lacks": [key for key in expected if key not in found],
        "has left over": [key for key in found if key not in expected],
        "has another shape for": [
            f"{key} {found[key]} (expected {shape})"
            for key, shape in expected.items()
            if found.get(key, shape) != shape
        ],
    }
    for verb, names in problems.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise CheckpointError(
                f"{what}, but {verb} {', '.join(names[:_SHOWN])}{more}.",
                fix="The file is not an official architecture; see the layers it should have:  "
                f"y7 info {checkpoint.variant} --layers",
            )
