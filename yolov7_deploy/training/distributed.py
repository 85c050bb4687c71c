"""Distributed training: the processes that `torchrun` starts, their collectives, and synchronized BatchNorm."""

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
from yolov7_deploy.hardware.gpu import parse_device

CPU = torch.device("cpu")
TIMEOUT = timedelta(hours=3)  # of a collective: the other processes wait while the main process validates
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun, besides WORLD_SIZE

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedContext:
    """The rank, world size and device of this process, and its collectives; a single process by default.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        device: Device on which this process trains.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @property
    def is_main_process(self) -> bool:
        """True for the process that validates and writes files."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place and without gradients, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Return the value of the main process in all processes; the value must be picklable."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order of their ranks; the values must be picklable."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return cast("list[T]", values)

    def barrier(self) -> None:
        """Wait until all processes have called this method."""
        if self.world_size > 1:
            dist.barrier()


def launch_command(world_size: int) -> str:
    """Return the command that starts `y7` in as many processes."""
    return "y7" if world_size == 1 else f"torchrun --nproc-per-node {world_size} -m yolov7_deploy"


@contextlib.contextmanager
def init_distributed(device: str) -> Iterator[DistributedContext]:
    """Join the process group that the environment variables of `torchrun` describe; without them, a single process.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `N`. Under `torchrun` each process uses the GPU of its local rank.

    Raises:
        DeviceError: The device does not exist.
        UsageError: The variables of `torchrun` are incomplete, or one GPU is named for several processes.
        TrainingError: The processes cannot connect, or another one ended while this one waited for it.
    """
    world_size = _integer_variable("WORLD_SIZE", 1)
    if world_size == 1:
        yield DistributedContext(device=_select_device(device, None))
        return
    rank, local_rank = _integer_variable("RANK", 0), _integer_variable("LOCAL_RANK", 0)
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {world_size} but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
            fix=f"Start several processes with:  {launch_command(2)} train ...",
        )
    own_device = _select_device(device, local_rank)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    _init_process_group("nccl" if own_device.type == "cuda" else "gloo")
    try:
        yield DistributedContext(rank=rank, world_size=world_size, device=own_device)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise TrainingError(
            f"Process {rank} of {world_size} waits for another process, which has ended ({str(error).strip()[:200]}).",
            fix="See the error message of the other process, then continue with --resume.",
        ) from error
    finally:
        dist.destroy_process_group()


def _init_process_group(backend: str) -> None:
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainingError(
            f"This process cannot connect to the others at {address} ({str(error).strip()[:200]}).",
            fix=f"Start all processes with:  {launch_command(2)} train ...",
        ) from error


def _integer_variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(
            f"The environment variable {name} is {text!r}, not a number.", fix=f"unset {name}, or start with torchrun"
        )
    return int(text)


def _select_device(text: str, local_rank: int | None) -> torch.device:
    gpus = torch.cuda.device_count()
    if text == "auto":
        text = "cuda" if gpus else "cpu"
    device = parse_device(text)
    if text == "cpu":
        return CPU
    if device.kind != "cuda":
        raise UsageError(f"--device {text} is unknown.", fix="One of: auto, cpu, cuda, cuda:0")
    if local_rank is not None and device.index is not None:
        raise UsageError(f"--device {text} names one GPU for several processes.", fix="--device cuda, or auto")
    index = local_rank if local_rank is not None else device.index or 0
    if index >= gpus:
        raise DeviceError(
            f"{device}: GPU {index} is needed, but torch sees {gpus or 'no'} GPU{'s' * (gpus != 1)}.",
            fix=f"Use  --device cpu{', or fewer processes' * (local_rank is not None)}. y7 doctor lists the GPUs.",
        )
    return torch.device("cuda", index)


def convert_sync_batchnorm(model: nn.Module, distributed: DistributedContext) -> nn.Module:
    """Return the model with BatchNorm over the images of all processes; layers are replaced in place if possible."""
    if distributed.world_size == 1:
        return model
    if distributed.device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return converted
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, CpuSyncBatchNorm.from_batchnorm(child, distributed))
        else:
            convert_sync_batchnorm(child, distributed)
    return model


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all processes, on a CPU; `torch.nn.SyncBatchNorm` supports GPUs only."""

    distributed: DistributedContext

    @classmethod
    def from_batchnorm(cls, norm: nn.BatchNorm2d, distributed: DistributedContext) -> CpuSyncBatchNorm:
        """Return a layer with the same parameters (shared) and the same statistics (copied)."""
        converted = cls(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        converted.load_state_dict(norm.state_dict())
        converted.weight, converted.bias, converted.distributed = norm.weight, norm.bias, distributed
        return converted.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [B, C, H, W], of any floating point type; in eval mode like `nn.BatchNorm2d`."""
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.float()  # sums in bfloat16 would be wrong by percents
        count = x.numel() // x.shape[1] * self.distributed.world_size  # all processes have the same batch size
        mean = _all_reduce_sum(x.sum((0, 2, 3))) / count
        centred = x - mean.view(1, -1, 1, 1)
        variance = _all_reduce_sum(centred.square().sum((0, 2, 3))) / count
        self._update_running_stats(mean.detach(), variance.detach() * count / max(1, count - 1))
        scale = self.weight / torch.sqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(dtype)

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes; the gradient is summed over all processes, too."""

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


def _all_reduce_sum(tensor: Tensor) -> Tensor:
    total: Tensor = _AllReduceSum.apply(tensor)  # type: ignore[no-untyped-call]
    return total
