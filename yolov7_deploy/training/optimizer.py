"""The optimiser with its three groups, and how rates, momentum and accumulation run over a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from yolov7_deploy.training.hyperparameters import Hyperparameters

NORMS, WEIGHTS, BIASES = "norms", "weights", "biases"  # the groups, in the official order
LEAST_WARMUP_STEPS = 1000


def grouped_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters: BatchNorm scales and implicit knowledge, convolution weights, biases.

    Only the second group decays.
    """
    groups: dict[str, list[nn.Parameter]] = {NORMS: [], WEIGHTS: [], BIASES: []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) or name == "implicit"
            groups[BIASES if name == "bias" else NORMS if is_norm else WEIGHTS].append(parameter)
    return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Rates, momentum and accumulation of each step.

    Attributes:
        hyp: The recipe.
        epochs: In all.
        steps: Of one epoch.
        batch: Images of a step, of all processes.
        nominal_batch: Images of an update.
        linear: The rate falls linearly instead of as a cosine.
    """

    hyp: Hyperparameters
    epochs: int
    steps: int
    batch: int
    nominal_batch: int
    linear: bool

    @property
    def warmup_steps(self) -> int:
        """Official: `warmup_epochs`, at least 1000 steps; here never more than a tenth of the training."""
        wanted = round(self.hyp.warmup_epochs * self.steps)
        return min(max(wanted, LEAST_WARMUP_STEPS), self.epochs * self.steps // 10) if wanted else 0

    @property
    def full_accumulation(self) -> int:
        """Steps of an update after the warm-up."""
        return max(round(self.nominal_batch / self.batch), 1)

    @property
    def weight_decay(self) -> float:
        """The recipe's, for the images of an update as they really are."""
        return self.hyp.weight_decay * self.batch * self.full_accumulation / self.nominal_batch

    def factor(self, epoch: int) -> float:
        """Part of the first rate that is left in an epoch: a cosine from 1 to `lrf`."""
        if self.linear:
            return (1 - epoch / max(1, self.epochs - 1)) * (1 - self.hyp.lrf) + self.hyp.lrf
        return self.hyp.lrf + (1 - self.hyp.lrf) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def accumulate(self, step: int) -> int:
        """Steps of an update at a step of the whole training."""
        return max(1, round(self._risen(step, 1, self.nominal_batch / self.batch)))

    def rates(self, step: int, epoch: int) -> Mapping[str, float]:
        """Learning rate of each group."""
        full = self.hyp.lr0 * self.factor(epoch)
        rising = self._risen(step, 0, full)
        return {NORMS: rising, WEIGHTS: rising, BIASES: self._risen(step, self.hyp.warmup_bias_lr, full)}

    def momentum(self, step: int) -> float:
        """Momentum of SGD, or the first beta of Adam."""
        return self._risen(step, self.hyp.warmup_momentum, self.hyp.momentum)

    def _risen(self, step: int, low: float, high: float) -> float:
        if step > self.warmup_steps or not self.warmup_steps:
            return high
        return low + (high - low) * step / self.warmup_steps


def make_optimizer(model: nn.Module, schedule: Schedule, *, adam: bool) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, or AdamW, over the three groups; each group carries its `name`."""
    groups = [
        {"params": parameters, "name": name, "weight_decay": schedule.weight_decay if name == WEIGHTS else 0.0}
        for name, parameters in grouped_parameters(model).items()
        if parameters
    ]
    if adam:
        return torch.optim.AdamW(groups, lr=schedule.hyp.lr0, betas=(schedule.hyp.momentum, 0.999))
    return torch.optim.SGD(groups, lr=schedule.hyp.lr0, momentum=schedule.hyp.momentum, nesterov=True)


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, epoch: int) -> None:
    """Makes an optimiser ready for a step."""
    rates, momentum = schedule.rates(step, epoch), schedule.momentum(step)
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum
