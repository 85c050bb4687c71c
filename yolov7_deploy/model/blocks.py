"""Building blocks of the network, in training form or with BatchNorm folded (`fused`).

Attribute names are the official ones, because they are the keys of the checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_NORM_EPS = 1e-3  # official value; PyTorch's default 1e-5 breaks checkpoint parity
BATCH_NORM_MOMENTUM = 0.03
LEAKY_SLOPE = 0.1


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a BatchNorm with the official epsilon and momentum."""
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)


def activation(name: str) -> nn.Module:
    """Return the activation named `silu` or `leaky` (slope 0.1)."""
    return nn.SiLU(inplace=True) if name == "silu" else nn.LeakyReLU(LEAKY_SLOPE, inplace=True)


class Conv(nn.Module):
    """Convolution without bias, BatchNorm and activation; if fused, convolution with bias and activation."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, act: str, *, fused: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=fused)
        self.bn = None if fused else batch_norm(c_out)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] to [B, c_out, H/stride, W/stride]."""
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        y: Tensor = self.act(x)
        return y


class RepConv(nn.Module):
    """Planned re-parameterised convolution (paper section 4.1): 3x3 + 1x1 + identity branches, summed, activated.

    The identity branch exists if input and output have the same number of channels; in v7 they never do. Without it,
    with `identity=False`, the block is the paper's RepConvN. If fused, one 3x3 convolution remains.
    """

    def __init__(self, c_in: int, c_out: int, act: str, *, fused: bool, identity: bool = True) -> None:
        super().__init__()
        self.act = activation(act)
        self.fused = fused
        if fused:
            self.rbr_reparam = nn.Conv2d(c_in, c_out, 3, 1, 1)
            return
        self.rbr_identity = batch_norm(c_in) if identity and c_in == c_out else None
        self.rbr_dense = nn.Sequential(nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False), batch_norm(c_out))
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), batch_norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] to [B, c_out, H, W]."""
        if self.fused:
            total = self.rbr_reparam(x)
        else:
            total = self.rbr_dense(x) + self.rbr_1x1(x)
            if self.rbr_identity is not None:
                total = total + self.rbr_identity(x)
        y: Tensor = self.act(total)
        return y


class SPPCSPC(nn.Module):
    """Spatial pyramid pooling in a cross-stage-partial block.

    Max-pools of 5, 9 and 13 at stride 1 equal one, two and three consecutive max-pools of 5, and are computed so.
    """

    def __init__(self, c_in: int, c_out: int, act: str, *, fused: bool) -> None:
        super().__init__()

        def conv(c_in: int, kernel: int) -> Conv:
            return Conv(c_in, c_out, kernel, 1, act, fused=fused)

        self.cv1 = conv(c_in, 1)
        self.cv2 = conv(c_in, 1)
        self.cv3 = conv(c_out, 3)
        self.cv4 = conv(c_out, 1)
        self.cv5 = conv(4 * c_out, 1)
        self.cv6 = conv(c_out, 3)
        self.cv7 = conv(2 * c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] to [B, c_out, H, W]."""
        pools = [self.cv4(self.cv3(self.cv1(x)))]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        pyramid = self.cv6(self.cv5(torch.cat(pools, 1)))
        y: Tensor = self.cv7(torch.cat((pyramid, self.cv2(x)), 1))
        return y


class DownC(nn.Module):
    """Downsampling of E6, D6 and E6E: a strided convolution and a max-pool in parallel."""

    def __init__(self, c_in: int, c_out: int, act: str, *, fused: bool) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, c_in, 1, 1, act, fused=fused)
        self.cv2 = Conv(c_in, c_out // 2, 3, 2, act, fused=fused)
        self.cv3 = Conv(c_in, c_out // 2, 1, 1, act, fused=fused)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] to [B, c_out, H/2, W/2]."""
        return torch.cat((self.cv2(self.cv1(x)), self.cv3(F.max_pool2d(x, 2, 2))), 1)


class MaxPool(nn.Module):
    """Max-pooling: MP (2x2, stride 2) and SP (k x k, stride 1, same size)."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H/stride, W/stride]."""
        return F.max_pool2d(x, self.kernel, self.stride, self.kernel // 2 if self.stride == 1 else 0)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2H, 2W]."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ReOrg(nn.Module):
    """Space-to-depth with channel blocks by (row, column) parity: (0,0) (1,0) (0,1) (1,1); not as PixelUnshuffle."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, 4C, H/2, W/2]."""
        return torch.cat([x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)], 1)


class Concat(nn.Module):
    """Concatenation of feature maps along the channels."""

    def forward(self, *x: Tensor) -> Tensor:
        """[B, C_i, H, W] to [B, sum of C_i, H, W]."""
        return torch.cat(x, 1)


class Shortcut(nn.Module):
    """Sum of two feature maps."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two maps [B, C, H, W] to one."""
        return a + b
