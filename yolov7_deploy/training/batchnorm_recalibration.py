"""BatchNorm recalibration: set the running statistics to those of the training images, without changing the output.

In eval mode a network uses its running statistics, in train mode those of the batch. If they differ, training starts
from another function than that of the given network: the published `yolov7_training.pt` has variances in its RepConv
branches that are 20 to 50 times those of its own layers, and a short fine-tuning from it loses more than ten points of
AP. With mean m and variance v of real images and s = sqrt(v + eps), the equivalent layer is

    gamma' = gamma s / s_running,   beta' = beta + gamma (m - m_running) / s_running,   running mean m, variance v.

With it, eval mode and train mode agree from the first step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.sample import Batch

IMAGES = 64  # sufficient: at 640 pixels each layer has at least 400 values per image and channel
MAX_RATIO = 2.0  # of running and real standard deviation; layers beyond it are reported


@dataclass(frozen=True, kw_only=True, slots=True)
class RecalibrationReport:
    """Number of recalibrated layers and images, and the layers whose statistics differed by more than `MAX_RATIO`."""

    layers: int
    images: int
    outliers: tuple[str, ...]

    def summary(self) -> str:
        """Return the report as one line of text."""
        text = (
            f"recalibrated the statistics of {self.layers} BatchNorm layers on {self.images} images, "
            "with unchanged output"
        )
        if self.outliers:
            text += f"; {len(self.outliers)} differed more than {MAX_RATIO:g} times (first {self.outliers[0]})"
        return text


@torch.no_grad()
def recalibrate_batchnorm(
    model: Yolov7, batches: Iterable[Batch], *, frozen: tuple[int, ...] = (), distributed: DistributedContext
) -> RecalibrationReport:
    """Set the statistics of all BatchNorm layers to those of these images; the output in eval mode stays the same.

    Args:
        model: Model on the device of `distributed`; it is changed in place.
        batches: Images of this process.
        frozen: Indices of layers that do not change.
        distributed: The processes, whose images are used together.
    """
    was_training = model.training
    moments = {
        name: _InputMoments(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and int(name.split(".")[1]) not in frozen
    }
    images = 0
    model.train()  # computes auxiliary heads, too
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    try:
        for batch in batches:
            model(batch.images.to(distributed.device).permute(0, 3, 1, 2).float() / 255)
            images += len(batch.images) * distributed.world_size
    finally:
        for layer in moments.values():
            layer.remove_hook()
        model.train(was_training)
    outliers = tuple(name for name, layer in moments.items() if images and layer.apply(distributed) > MAX_RATIO)
    return RecalibrationReport(layers=len(moments), images=images, outliers=outliers)


class _InputMoments:
    """Moments of the input of a BatchNorm layer around its running mean, summed in float64."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self._norm = norm
        channels, device = norm.num_features, norm.weight.device
        self._sums = torch.zeros(3, channels, dtype=torch.float64, device=device)  # of 1, x - mean, (x - mean)^2
        self._hook = norm.register_forward_pre_hook(self._accumulate)

    def _accumulate(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert self._norm.running_mean is not None
        difference = inputs[0] - self._norm.running_mean.view(1, -1, 1, 1)
        self._sums[0] += difference.numel() // difference.shape[1]
        self._sums[1] += difference.sum((0, 2, 3), dtype=torch.float64)
        self._sums[2] += difference.square().sum((0, 2, 3), dtype=torch.float64)

    def remove_hook(self) -> None:
        """Stop observing the layer."""
        self._hook.remove()

    def apply(self, distributed: DistributedContext) -> float:
        """Rewrite the layer, and return the median ratio (>= 1) of its running and real standard deviations."""
        norm = self._norm
        assert norm.running_mean is not None and norm.running_var is not None
        count, first, second = distributed.all_reduce_sum(self._sums)
        if not count.all():  # auxiliary heads that are not trained are not computed
            return 1.0
        shift = first / count
        variance = (second / count - shift.square()).clamp(min=0)
        running, real = (torch.sqrt(v + norm.eps) for v in (norm.running_var.double(), variance))
        gamma = norm.weight.double()
        norm.bias.copy_(norm.bias.double() + gamma * shift / running)
        norm.weight.copy_(gamma * real / running)
        norm.running_mean.add_(shift)
        norm.running_var.copy_(variance)
        return float(torch.maximum(real / running, running / real).median())
