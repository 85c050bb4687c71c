"""The moving average of the weights: what is validated, and what training gives."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

LONGEST = 0.9999
RAMP = 2000.0  # updates after which the average is about as slow as it gets


class ModelEma:
    """v <- d v + (1 - d) w after update n, with d = 0.9999 (1 - exp(-n / 2000)), over everything a model holds.

    Attributes:
        tensors: The average by official name, float32 (counters as they are), on the model's device.
        updates: How many there were.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights as they are now."""
        self.updates += 1
        keep = LONGEST * (1 - math.exp(-self.updates / RAMP))
        now = model.state_dict()
        floats = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[name] for name in floats], [now[name] for name in floats], 1 - keep)
        for name in self.tensors.keys() - set(floats):
            self.tensors[name].copy_(now[name])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], *, updates: int) -> None:
        """Goes on from an average that was kept."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        self.updates = updates
