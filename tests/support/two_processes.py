"""One of two processes of distributed training; it writes its results to a file: `python two_processes.py FOLDER`."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from yolov7_deploy.errors import TrainingError
from yolov7_deploy.training.distributed import (
    CpuSyncBatchNorm,
    DistributedContext,
    convert_sync_batchnorm,
    init_distributed,
)

SHAPE = (6, 5, 4, 3)  # of the images of both processes; each has half of them


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Return an input whose mean is far from zero, and weights for its output."""
    generator = torch.Generator().manual_seed(0)
    return 3 + 2 * torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def new_norm() -> nn.BatchNorm2d:
    """Return a BatchNorm with random parameters and statistics."""
    generator = torch.Generator().manual_seed(1)
    norm = nn.BatchNorm2d(SHAPE[1], eps=1e-3, momentum=0.03)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(SHAPE[1], generator=generator) + 0.5)
    return norm


def run_norm(norm: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run forward and backward twice, and return output, gradients, statistics and the output in eval mode."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = norm(x)
        (y.square() * weight).sum().backward()
    state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    gradients = {"x": x.grad, **{f"{name}.grad": p.grad for name, p in norm.named_parameters()}}
    return {"y": y.detach(), **gradients, **state, "eval": norm.eval()(x).detach()}


def run_collectives(distributed: DistributedContext) -> dict[str, object]:
    """Return the results of BatchNorm and of all collectives."""
    x, weight = (tensor.chunk(distributed.world_size)[distributed.rank] for tensor in images())
    model = convert_sync_batchnorm(nn.Sequential(nn.Sequential(new_norm()), nn.ReLU()), distributed)
    norm = model.get_submodule("0.0")
    assert isinstance(norm, CpuSyncBatchNorm)
    results: dict[str, object] = {f"norm.{name}": tensor for name, tensor in run_norm(norm, x, weight).items()}
    bfloat16 = CpuSyncBatchNorm.from_batchnorm(new_norm(), distributed)(x.bfloat16())
    return {
        **results,
        "bfloat16": bfloat16.detach(),
        "sum": distributed.all_reduce_sum(torch.tensor([1.0 + distributed.rank, 10.0])),
        "broadcast": distributed.broadcast({"rank": distributed.rank, "values": ("a", None)}),
        "gathered": distributed.all_gather(("of", distributed.rank)),
    }


def main(folder: Path) -> None:
    """Write the results, and then end one process while the other waits for it."""
    torch.set_num_threads(1)
    result: dict[str, object] = {}
    try:
        with init_distributed("cpu") as distributed:
            result = run_collectives(distributed)
            distributed.barrier()
            if distributed.rank == 1:
                torch.save(result, folder / "1.pt")
                return
            started = time.monotonic()
            distributed.all_reduce_sum(torch.zeros(1))
    except TrainingError as error:
        result |= {"error": str(error), "seconds": time.monotonic() - started}
    torch.save(result, folder / "0.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
