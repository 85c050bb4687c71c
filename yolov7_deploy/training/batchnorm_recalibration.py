"""BatchNorm statistics brought to the images that will be trained on, without any change of the output.

A trained network computes with the statistics it has kept; while it trains, with those of the batch. Where both differ,
the network that begins to train is another one than the network that was given: the published `yolov7_training.pt`
keeps variances in its RepConv branches that are 20 to 50 times what its own layers give, and a short fine-tuning from
it loses more than ten points of AP. With mean m and variance v of real images and s = sqrt(v + eps), the same is

    gamma' = gamma s / s_kept,   beta' = beta + gamma (m - m_kept) / s_kept,   kept mean m, kept variance v:

then both ways of computing agree from the first step on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.sample import Batch

IMAGES = 64  # enough: a layer sees at least 400 places of each at 640 pixels
FAR = 2.0  # a factor between kept and real deviation that is worth telling


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebased:
    """What was done: how many layers, on how many images, and which were far from what real images give."""

    layers: int
    images: int
    far: tuple[str, ...]

    def words(self) -> str:
        """One line for people."""
        found = f"; {len(self.far)} had others by more than {FAR:g} times (first {self.far[0]})" if self.far else ""
        return (
            f"statistics of {self.layers} BatchNorm layers are those of {self.images} images now, "
            f"with the same output{found}"
        )


@torch.no_grad()
def rebase_norms(
    model: Yolov7, batches: Iterable[Batch], *, frozen: tuple[int, ...] = (), world: DistributedContext
) -> Rebased:
    """Gives every BatchNorm that will learn the statistics of these images; the output in eval mode stays.

    Args:
        model: Changed in place; on the device of `world`.
        batches: Of this process.
        frozen: Layers that stay as they are.
        world: The processes, whose images count together.
    """
    was_training = model.training
    moments = {
        name: _Moments(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and int(name.split(".")[1]) not in frozen
    }
    images = 0
    model.eval()
    try:
        for batch in batches:
            model(batch.images.to(world.device).permute(0, 3, 1, 2).float() / 255)
            images += len(batch.images) * world.size
    finally:
        for one in moments.values():
            one.close()
        model.train(was_training)
    far = tuple(name for name, one in moments.items() if images and one.apply(world) > FAR)
    return Rebased(layers=len(moments), images=images, far=far)


class _Moments:
    """Sums over what enters a BatchNorm, around the mean it has kept; float64."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self._norm = norm
        channels, device = norm.num_features, norm.weight.device
        self._sums = torch.zeros(3, channels, dtype=torch.float64, device=device)  # count, of x - m, of (x - m)^2
        self._hook = norm.register_forward_pre_hook(self._look)

    def _look(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert self._norm.running_mean is not None
        away = inputs[0] - self._norm.running_mean.view(1, -1, 1, 1)
        self._sums[0] += away.numel() // away.shape[1]
        self._sums[1] += away.sum((0, 2, 3), dtype=torch.float64)
        self._sums[2] += away.square().sum((0, 2, 3), dtype=torch.float64)

    def close(self) -> None:
        """Looks no longer."""
        self._hook.remove()

    def apply(self, world: DistributedContext) -> float:
        """Rewrites the layer; the median factor between its kept and its real deviation, whichever way."""
        norm = self._norm
        assert norm.running_mean is not None and norm.running_var is not None
        count, first, second = world.add(self._sums)
        shift = first / count
        variance = (second / count - shift.square()).clamp(min=0)
        kept, real = (torch.sqrt(v + norm.eps) for v in (norm.running_var.double(), variance))
        gamma = norm.weight.double()
        norm.bias.copy_(norm.bias.double() + gamma * shift / kept)
        norm.weight.copy_(gamma * real / kept)
        norm.running_mean.add_(shift)
        norm.running_var.copy_(variance)
        return float(torch.maximum(real / kept, kept / real).median())
