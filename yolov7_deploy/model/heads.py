"""The detection heads and the decoding of their outputs.

A raw map is [B, 3, H, W, 5 + C]: per anchor and cell tx, ty, tw, th, objectness and C classes, all before the sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from yolov7_deploy.model.layer_table import Anchors

BOX_AND_OBJECTNESS = 5
OBJECTS_PER_IMAGE = 8.0  # prior of the objectness bias: 8 objects in a 640-pixel image


class Implicit(nn.Module):
    """A learned vector over channels (YOLOR): ImplicitA is added (mean 0), ImplicitM multiplies (mean 1)."""

    def __init__(self, channels: int, mean: float) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.normal(mean, 0.02, (1, channels, 1, 1)))


class Detect(nn.Module):
    """Plain detection head: one 1x1 convolution per level.

    Args:
        c_in: Channels of each lead feature, fine to coarse.
        classes: C.
        anchors: Per level three (width, height) in input pixels.
        strides: Pixels per cell of each level.
    """

    anchors: Tensor
    anchor_grid: Tensor

    def __init__(self, c_in: Sequence[int], classes: int, anchors: Anchors, strides: Sequence[int]) -> None:
        super().__init__()
        self.classes, self.strides, self.levels = classes, tuple(strides), len(strides)
        pixels = torch.tensor(anchors, dtype=torch.float32)  # [levels, 3, 2]
        # Divided as numbers: a division of tensors on the meta device imports torch._dynamo, which takes a second.
        cells = [[(w / stride, h / stride) for w, h in level] for level, stride in zip(anchors, strides, strict=True)]
        self.register_buffer("anchors", torch.tensor(cells, dtype=torch.float32))
        self.register_buffer("anchor_grid", pixels.view(self.levels, 1, 3, 1, 1, 2).clone())
        self.m = self._convolutions(c_in[: self.levels])

    @property
    def columns(self) -> int:
        """Number of channels per anchor, 5 + C."""
        return BOX_AND_OBJECTNESS + self.classes

    def _convolutions(self, c_in: Sequence[int]) -> nn.ModuleList:
        convolutions = nn.ModuleList(nn.Conv2d(c, 3 * self.columns, 1) for c in c_in)
        for convolution, stride in zip(convolutions, self.strides, strict=True):
            assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
            bias = convolution.bias.detach().view(3, -1)
            bias[:, 4] += math.log(OBJECTS_PER_IMAGE / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.classes - 0.99))
        return convolutions

    def maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features [B, c_i, H, W] to maps [B, 3 * (5 + C), H, W]."""
        return [m(x) for m, x in zip(self.m, features, strict=True)]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features [B, c_i, H, W] to raw maps [B, 3, H, W, 5 + C]."""
        return [self.as_raw(x) for x in self.maps(features)]

    def as_raw(self, x: Tensor) -> Tensor:
        """Reshape a map [B, 3 * (5 + C), H, W] to [B, 3, H, W, 5 + C]; channel index = anchor * (5 + C) + column."""
        batch, _, height, width = x.shape
        return x.view(batch, 3, self.columns, height, width).permute(0, 1, 3, 4, 2).contiguous()

    def decode(self, raws: Sequence[Tensor]) -> Tensor:
        """Decode raw maps to [B, A, 5 + C]: cx, cy, w, h in input pixels, objectness, class probabilities.

        With y the sigmoid of a raw value: centre = (2 y - 0.5 + cell) * stride, size = (2 y)^2 * anchor.
        Boxes are ordered by level, anchor, row, column.
        """
        decoded = []
        for raw, stride, anchor in zip(raws, self.strides, self.anchor_grid, strict=True):
            height, width = raw.shape[2:4]
            rows = torch.arange(height, device=raw.device, dtype=raw.dtype)
            columns = torch.arange(width, device=raw.device, dtype=raw.dtype)
            cell = torch.stack((columns.expand(height, width), rows[:, None].expand(height, width)), -1)
            y = raw.sigmoid()
            centre = (y[..., :2] * 2 - 0.5 + cell) * stride
            size = (y[..., 2:4] * 2) ** 2 * anchor
            decoded.append(torch.cat((centre, size, y[..., 4:]), -1).flatten(1, 3))
        return torch.cat(decoded, 1)


class ImplicitDetect(Detect):
    """IDetect, the training form: implicit knowledge is added before the convolution and multiplied after it."""

    def __init__(self, c_in: Sequence[int], classes: int, anchors: Anchors, strides: Sequence[int]) -> None:
        super().__init__(c_in, classes, anchors, strides)
        self._add_before_implicit(c_in)
        self.ia = nn.ModuleList(Implicit(c, 0.0) for c in c_in[: self.levels])
        self.im = nn.ModuleList(Implicit(3 * self.columns, 1.0) for _ in range(self.levels))

    def knowledge(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return per level the vectors that are added [1, c_i, 1, 1] and multiplied [1, 3 * (5 + C), 1, 1]."""
        added, factors = (
            [part.implicit for part in parts if isinstance(part, Implicit)] for parts in (self.ia, self.im)
        )
        return added, factors

    def _add_before_implicit(self, c_in: Sequence[int]) -> None:
        """Add modules whose official keys come before `ia` and `im`."""

    def maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features [B, c_i, H, W] to maps [B, 3 * (5 + C), H, W]."""
        added, factors = self.knowledge()
        parts = zip(features, added, self.m, factors, strict=True)
        return [m(x + a) * b for x, a, m, b in parts]


class AuxiliaryDetect(ImplicitDetect):
    """IAuxDetect: lead heads with implicit knowledge, and auxiliary heads `m2` that only training uses."""

    def _add_before_implicit(self, c_in: Sequence[int]) -> None:
        self.m2 = self._convolutions(c_in[self.levels :])

    def auxiliary(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Auxiliary features [B, c_i, H, W] to raw maps [B, 3, H, W, 5 + C]."""
        return [self.as_raw(m(x)) for m, x in zip(self.m2, features, strict=True)]
