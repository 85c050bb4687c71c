"""What two processes that train together find out, written to a file by each: `python two_processes.py FOLDER`."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from yolov7_deploy.errors import TrainingError
from yolov7_deploy.training.distributed import DistributedContext, SyncedBatchNorm, open_world, synced

SHAPE = (6, 5, 4, 3)  # of all images; each process has half of them


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """An input far from zero mean, and what its output is weighed with."""
    generator = torch.Generator().manual_seed(0)
    return 3 + 2 * torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


def new_norm() -> nn.BatchNorm2d:
    """A BatchNorm whose parameters and statistics are not those of the beginning."""
    generator = torch.Generator().manual_seed(1)
    norm = nn.BatchNorm2d(SHAPE[1], eps=1e-3, momentum=0.03)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(SHAPE[1], generator=generator) + 0.5)
    return norm


def normed(norm: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and statistics of two steps with one update of gradients each."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = norm(x)
        (y.square() * weight).sum().backward()
    state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    gradients = {"x": x.grad, **{f"{name}.grad": p.grad for name, p in norm.named_parameters()}}
    return {"y": y.detach(), **gradients, **state, "eval": norm.eval()(x).detach()}


def found(world: DistributedContext) -> dict[str, object]:
    """Everything but the end of a process."""
    x, weight = (tensor.chunk(world.size)[world.rank] for tensor in images())
    model = synced(nn.Sequential(nn.Sequential(new_norm()), nn.ReLU()), world)
    norm = model.get_submodule("0.0")
    assert isinstance(norm, SyncedBatchNorm)
    found: dict[str, object] = {f"norm.{name}": tensor for name, tensor in normed(norm, x, weight).items()}
    half = SyncedBatchNorm.of(new_norm(), world)(x.bfloat16())
    return {
        **found,
        "half": half.detach(),
        "sum": world.add(torch.tensor([1.0 + world.rank, 10.0])),
        "agreed": world.agreed({"rank": world.rank, "words": ("a", None)}),
        "gathered": world.gathered(("of", world.rank)),
        "command": world.command,
    }


def main(folder: Path) -> None:
    """Writes what was found, and then ends one process while the other waits for it."""
    torch.set_num_threads(1)
    result: dict[str, object] = {}
    try:
        with open_world("cpu") as world:
            result = found(world)
            world.wait()
            if world.rank == 1:
                torch.save(result, folder / "1.pt")
                return
            started = time.monotonic()
            world.add(torch.zeros(1))
    except TrainingError as error:
        result |= {"lost": str(error), "seconds": time.monotonic() - started}
    torch.save(result, folder / "0.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
