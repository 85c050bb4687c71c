"""The processes that train together, as `torchrun` starts them; one process is a world of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from yolov7_deploy.errors import DeviceError, TrainingError, UsageError

CPU = torch.device("cpu")
PATIENCE = timedelta(hours=3)  # the others wait while the first one validates

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedContext:
    """One process's place among those that train together."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """This is the process that writes files and validates."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place and without gradients."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agreed(self, value: T) -> T:
        """The first process's value, for all; plain data."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, the first one's first; plain data."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast("list[T]", values)

    @property
    def command(self) -> str:
        """How `y7` is typed to run in as many processes."""
        return "y7" if self.size == 1 else f"torchrun --nproc-per-node {self.size} -m yolov7_deploy"

    def wait(self) -> None:
        """Returns when every process is here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def open_world(device: str) -> Iterator[DistributedContext]:
    """This process's place: by the variables of `torchrun`, alone without them.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `N`. Under `torchrun` each process takes a GPU of its own.

    Raises:
        DeviceError: There is no such device.
        UsageError: The variables of `torchrun` are incomplete, or a single GPU is asked for several processes.
        TrainingError: Another process has ended while this one waited for it.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield DistributedContext(device=_device(device, None))
        return
    rank, local = _number("RANK", -1), _number("LOCAL_RANK", -1)
    if rank < 0 or local < 0:
        raise UsageError(
            f"WORLD_SIZE is {size} but RANK or LOCAL_RANK is not set.",
            fix="Start several processes with:  torchrun --nproc-per-node 2 -m yolov7_deploy train ...",
        )
    place = _device(device, local)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield DistributedContext(rank=rank, size=size, device=place)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError(
            f"Process {rank} of {size} waits for another that has ended ({str(error).strip()[:200]}).",
            fix="See the message of the other one; then go on with --resume.",
        ) from error
    finally:
        dist.destroy_process_group()


def _number(name: str, absent: int) -> int:
    text = os.environ.get(name, str(absent))
    if not text.lstrip("-").isdecimal():
        raise UsageError(f"The variable {name} is {text!r}, not a number.", fix=f"unset {name}, or start with torchrun")
    return int(text)


def _device(text: str, local: int | None) -> torch.device:
    gpus = torch.cuda.device_count()
    if text == "auto":
        text = "cuda" if gpus else "cpu"
    if text.isdecimal():
        text = f"cuda:{text}"
    kind, _, number = text.partition(":")
    if kind == "cpu" and not number:
        return torch.device("cpu")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise UsageError(f"--device {text} is unknown.", fix="One of: auto, cpu, cuda, cuda:0")
    if local is not None and number:
        raise UsageError(f"--device {text} names one GPU for several processes.", fix="--device cuda, or auto")
    index = local if local is not None else int(number or 0)
    if index >= gpus:
        raise DeviceError(
            f"{text}: torch sees {gpus} GPUs here, and number {index} is needed.",
            fix="--device cpu, or fewer processes; y7 doctor shows what is here.",
        )
    return torch.device("cuda", index)


def synced(model: nn.Module, world: DistributedContext) -> nn.Module:
    """The model with BatchNorm over the images of all processes; changed in place where that is possible."""
    if world.size == 1:
        return model
    if world.device.type == "cuda":
        made: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return made
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, SyncedBatchNorm.of(child, world))
        else:
            synced(child, world)
    return model


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all processes on a CPU, which torch's own does not do."""

    world: DistributedContext

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, world: DistributedContext) -> SyncedBatchNorm:
        """The same layer, with the same parameters and statistics."""
        made = cls(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        made.load_state_dict(norm.state_dict())
        made.weight, made.bias, made.world = norm.weight, norm.bias, world
        return made.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape and type; in eval mode as any BatchNorm."""
        if not self.training:
            return super().forward(x)
        kind, x = x.dtype, x.float()  # sums of bfloat16 would be wrong by percents
        count = x.numel() // x.shape[1] * self.world.size  # every process has the same number of images
        mean = _added(x.sum((0, 2, 3))) / count
        centred = x - mean.view(1, -1, 1, 1)
        variance = _added(centred.square().sum((0, 2, 3))) / count
        self._follow(mean.detach(), variance.detach() * count / max(1, count - 1))
        scale = self.weight / torch.sqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(kind)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)


class _Added(torch.autograd.Function):
    """A sum over processes whose gradient is again a sum over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ANN401 - torch's context has no public type
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _added(tensor: Tensor) -> Tensor:
    total: Tensor = _Added.apply(tensor)  # type: ignore[no-untyped-call]
    return total
