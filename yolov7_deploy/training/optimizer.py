"""The optimizer and its three parameter groups, the learning rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolov7_deploy.training.hyperparameters import Hyperparameters

NORMS, WEIGHTS, BIASES = "norms", "weights", "biases"  # parameter groups, in the official order
MIN_WARMUP_STEPS = 1000
EMA_DECAY = 0.9999
EMA_RAMP_UPDATES = 2000.0  # time constant of the decay's rise from 0 to EMA_DECAY


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters: BatchNorm scales and implicit knowledge, convolution weights, biases.

    Scales of fake quantizers belong to the first group.

    Weight decay applies to the second group only.
    """
    groups: dict[str, list[nn.Parameter]] = {NORMS: [], WEIGHTS: [], BIASES: []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) or name in ("implicit", "scale")
            groups[BIASES if name == "bias" else NORMS if is_norm else WEIGHTS].append(parameter)
    return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning rates, momentum and gradient accumulation of each training step.

    Attributes:
        hyp: Hyperparameters.
        epochs: Epochs of the whole training.
        steps_per_epoch: Training steps per epoch.
        batch: Images per step, over all processes.
        nominal_batch: Images per weight update, with gradient accumulation.
        linear: Linear decay of the learning rate instead of cosine decay.
    """

    hyp: Hyperparameters
    epochs: int
    steps_per_epoch: int
    batch: int
    nominal_batch: int
    linear: bool

    @property
    def warmup_steps(self) -> int:
        """Warm-up steps: `warmup_epochs`, at least 1000 steps as in the official program, at most 10 % of all steps."""
        steps = round(self.hyp.warmup_epochs * self.steps_per_epoch)
        return min(max(steps, MIN_WARMUP_STEPS), self.epochs * self.steps_per_epoch // 10) if steps else 0

    @property
    def final_accumulation_steps(self) -> int:
        """Steps per weight update after the warm-up."""
        return max(round(self.nominal_batch / self.batch), 1)

    @property
    def weight_decay(self) -> float:
        """Weight decay of the recipe, scaled to the number of images that a weight update really has."""
        return self.hyp.weight_decay * self.batch * self.final_accumulation_steps / self.nominal_batch

    def lr_factor(self, epoch: int) -> float:
        """Return the learning rate of an epoch as a fraction of `lr0`: a cosine (or a line) from 1 to `lrf`."""
        if self.linear:
            return (1 - epoch / max(1, self.epochs - 1)) * (1 - self.hyp.lrf) + self.hyp.lrf
        return self.hyp.lrf + (1 - self.hyp.lrf) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def accumulation_steps(self, step: int) -> int:
        """Return the steps per weight update at a step, counted from the start of training."""
        return max(1, round(self._warm_up(step, 1, self.nominal_batch / self.batch)))

    def learning_rates(self, step: int, epoch: int) -> Mapping[str, float]:
        """Return the learning rate of each parameter group."""
        full = self.hyp.lr0 * self.lr_factor(epoch)
        rising = self._warm_up(step, 0, full)
        return {NORMS: rising, WEIGHTS: rising, BIASES: self._warm_up(step, self.hyp.warmup_bias_lr, full)}

    def momentum(self, step: int) -> float:
        """Return the momentum of SGD, which is the first beta of AdamW."""
        return self._warm_up(step, self.hyp.warmup_momentum, self.hyp.momentum)

    def _warm_up(self, step: int, start: float, end: float) -> float:
        if step > self.warmup_steps or not self.warmup_steps:
            return end
        return start + (end - start) * step / self.warmup_steps


def build_optimizer(model: nn.Module, schedule: Schedule, *, adam: bool) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, or AdamW, over the parameter groups; each group has its `name`."""
    groups = [
        {"params": parameters, "name": name, "weight_decay": schedule.weight_decay if name == WEIGHTS else 0.0}
        for name, parameters in parameter_groups(model).items()
        if parameters
    ]
    if adam:
        return torch.optim.AdamW(groups, lr=schedule.hyp.lr0, betas=(schedule.hyp.momentum, 0.999))
    return torch.optim.SGD(groups, lr=schedule.hyp.lr0, momentum=schedule.hyp.momentum, nesterov=True)


def apply_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, epoch: int) -> None:
    """Set the learning rates and the momentum of a step."""
    rates, momentum = schedule.learning_rates(step, epoch), schedule.momentum(step)
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


class ModelEma:
    """Exponential moving average of a model's weights and BatchNorm statistics, which is validated and saved.

    After update n: v <- d v + (1 - d) w, with d = 0.9999 (1 - exp(-n / 2000)).

    Attributes:
        tensors: The average by parameter or buffer name, float32 (counters unchanged), on the model's device.
        updates: Number of updates so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the current weights."""
        self.updates += 1
        decay = EMA_DECAY * (1 - math.exp(-self.updates / EMA_RAMP_UPDATES))
        current = model.state_dict()
        floats = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[name] for name in floats], [current[name] for name in floats], 1 - decay)
        for name in self.tensors.keys() - set(floats):
            self.tensors[name].copy_(current[name])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], *, updates: int) -> None:
        """Restore a saved average."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        self.updates = updates
