"""The network: builds the layers of a variant's table and runs them."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.errors import CheckpointError
from yolov7_deploy.model.blocks import SPPCSPC, Concat, Conv, DownC, MaxPool, ReOrg, RepConv, Shortcut, Upsample
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.model.heads import AuxiliaryDetect, Detect, ImplicitDetect
from yolov7_deploy.model.layer_table import IMAGE, Anchors, Layer, Variant

_HEADS = {"Detect": Detect, "IDetect": ImplicitDetect, "IAuxDetect": AuxiliaryDetect}
_SHOWN = 6  # names listed in an error before "and N more"


class Yolov7(nn.Module):
    """A YOLOv7 network of any variant; module names are the official checkpoint keys (`model.N.…`).

    Args:
        variant: The architecture.
        classes: Number of classes.
        training_form: With implicit knowledge and auxiliary branches, as the official training writes it.
        fused: BatchNorm, RepConv branches and implicit knowledge folded; only in deploy form.
        anchors: Per level three (width, height) in input pixels; the variant's own by default.
        auxiliary: Auxiliary heads computed in training mode: `partial` (official), `full` (see `Variant.layers`)
            or `none` (they are not computed).

    Example:
        >>> import torch
        >>> network = build_model(load_checkpoint("best.safetensors"))
        >>> decoded = network.predict(torch.zeros(1, 3, 96, 96))
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
        self._computes_auxiliary = auxiliary != "none"
        self.model = nn.ModuleList(_block(layer, variant, fused) for layer in self.layers[:-1])
        head = self.layers[-1]
        self.model.append(_HEADS[head.kind](head.c_in, classes, anchors or variant.anchors, variant.strides))
        self._last_consumer = {source: layer.index for layer in self.layers for source in layer.sources}

    @property
    def head(self) -> Detect:
        """The last layer."""
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    @property
    def anchors(self) -> Anchors:
        """Anchors of the weights: per level three (width, height) in input pixels."""
        grid = self.head.anchor_grid.reshape(-1, 3, 2).tolist()
        return tuple(tuple((w, h) for w, h in level) for level in grid)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the inputs of the head for RGB images [B, 3, H, W] in 0..1, H and W multiples of the stride.

        The output of a layer is freed as soon as its last consumer has run.
        """
        outputs: dict[int, Tensor] = {IMAGE: images}
        wanted = self.layers[-1].sources
        if not (self.training and self._computes_auxiliary):
            wanted = wanted[: self.head.levels]
        last = max(wanted)
        for layer, block in zip(self.layers, self.model, strict=True):
            if layer.index > last:
                break
            outputs[layer.index] = block(*(outputs[i] for i in layer.sources))
            for i in layer.sources:
                if self._last_consumer[i] == layer.index:
                    del outputs[i]
        return [outputs[i] for i in wanted]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return raw maps [B, 3, H, W, 5 + C], fine to coarse; in training mode lead maps, then auxiliary ones."""
        features = self.features(images)
        levels = self.head.levels
        raws = self.head(features[:levels])
        if len(features) > levels and isinstance(self.head, AuxiliaryDetect):
            raws += self.head.auxiliary(features[levels:])
        return list(raws)

    def head_maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps [B, 3 * (5 + C), H, W] of the lead heads, fine to coarse."""
        return self.head.maps(self.features(images)[: self.head.levels])

    def predict(self, images: Tensor) -> Tensor:
        """Return the decoded output [B, A, 5 + C]: cx, cy, w, h in input pixels, objectness, class probabilities."""
        return self.head.decode(self.forward(images)[: self.head.levels])


def _block(layer: Layer, variant: Variant, fused: bool) -> nn.Module:
    c_in, act = layer.c_in[0], variant.activation
    match layer.kind:
        case "Conv":
            return Conv(c_in, layer.c_out, layer.kernel, layer.stride, act, fused=fused)
        case "RepConv" | "RepConvN":
            return RepConv(c_in, layer.c_out, act, fused=fused, identity=layer.kind == "RepConv")
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
    """Return a network with randomly initialised weights, in training mode.

    Raises:
        UsageError: Unknown variant.

    Example:
        >>> new_model("yolov7-tiny", classes=3).variant.name
        'yolov7-tiny'
    """
    return Yolov7(
        find_variant(variant), classes=classes, training_form=training_form, anchors=anchors, auxiliary=auxiliary
    )


def build_model(checkpoint: Checkpoint) -> Yolov7:
    """Return the network of a checkpoint, in the checkpoint's form and in eval mode; every tensor is used.

    Weights that were trained for INT8 give a fused network, which computes in float.

    Raises:
        CheckpointError: Keys are missing or left over, or shapes differ from the variant's table.

    Example:
        >>> build_model(load_checkpoint("best.safetensors")).training
        False
    """
    # On the meta device, so that no random weights are generated and then overwritten.
    with torch.device("meta"):
        model = Yolov7(
            find_variant(checkpoint.variant),
            classes=len(checkpoint.class_names),
            training_form=checkpoint.training,
            fused=checkpoint.quantization is not None,
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
