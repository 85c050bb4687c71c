"""Training on a GPU: its losses beside a CPU's, images per second and where the time goes, loader, a whole run."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.gpu.environment import Setting
from tests.gpu.targets import Goals
from tests.gpu.train_loading import feed, make_shapes
from tests.gpu.train_run import train_shapes
from tests.gpu.train_steps import Bench, Sizes, compare_devices, step_speed
from yolov7_deploy.errors import Y7Error

PART_S = 505.0  # of all pieces; the whole training takes what is left of it
PIECE_S = 45.0  # what any other piece may take: with less left it is not begun
REAL = Sizes(
    img=640,
    variants=("yolov7-tiny", "yolov7"),
    batches=(32, 64),
    nominal=64,
    seconds=6.0,
    workers=16,
    sets=16,
    train=128,
    val=16,
    training_s=180.0,
)
EMULATED = Sizes(
    img=64,
    variants=("yolov7-tiny",),
    batches=(2,),
    nominal=4,
    seconds=0.0,
    workers=1,
    sets=2,
    train=2,
    val=1,
    training_s=0.0,
)
FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, Y7Error),
)

Piece = Callable[[], dict[str, Any]]


def measure(setting: Setting) -> None:
    """Piece by piece; what failed or was missed is raised at the end, when all was tried.

    Raises:
        AssertionError: A piece failed, or losses on the GPU are not those of the CPU.
    """
    sizes = EMULATED if setting.emulated else REAL
    device = torch.device("cpu") if setting.emulated else torch.device("cuda", 0)
    folder = setting.result.parent / "train"
    folder.mkdir()
    ends = time.monotonic() + PART_S
    bench = Bench(setting=setting, goals=Goals(setting), sizes=sizes, device=device, folder=folder, ends=ends)
    setting.record("torch", {"version": torch.__version__, "device": described(device)})
    failed = [name for name, piece in pieces(bench) if not succeeded(bench, name, piece)]
    assert not failed and not bench.goals.missed, f"failed: {failed}, missed: {bench.goals.missed}"


def pieces(bench: Bench) -> list[tuple[str, Piece]]:
    """All of them by the names of their results, in order of worth; the last one takes the time that is left."""
    sizes = bench.sizes
    small, large = sizes.variants[0], sizes.variants[-1]
    first = sizes.batches[0]
    found: list[tuple[str, Piece]] = [("shapes", partial(make_shapes, bench))]
    found += [(f"{name} losses as on a CPU", partial(compare_devices, bench, name)) for name in sizes.variants]
    found += [
        (f"{name} batch {batch} float16", partial(step_speed, bench, name, batch, half=True))
        for name in sizes.variants
        for batch in sizes.batches
    ]
    found += [
        (f"{large} batch {first} {words}", partial(step_speed, bench, large, first, half=False, tf32=tf32))
        for words, tf32 in (("TF32", True), ("float32", False))
    ]
    found += [
        (f"{small} with its loader", partial(feed, bench, small, cached=False)),
        (f"{small} with its loader, images cached", partial(feed, bench, small, cached=True)),
    ]
    if large != small:
        found.append((f"{large} with its loader", partial(feed, bench, large, cached=False)))
    return [*found, ("training", partial(train_shapes, bench, small))]


def succeeded(bench: Bench, name: str, piece: Piece) -> bool:
    """Runs a piece and records what it found, or why it did not; the others go on with the memory it had."""
    setting, left = bench.setting, bench.ends - time.monotonic()
    if left < PIECE_S:
        setting.record(name, {"skipped": f"only {left:.0f} s were left"})
        return True
    started = time.monotonic()
    try:
        found = piece()
    except FAULTS as error:
        said = "".join(traceback.format_exception(error))
        setting.record(name, {"failed": f"{type(error).__name__}: {error}"[:1000], "traceback": said[-3000:]})
        return False
    finally:
        free(bench.device)
    setting.record(name, {**found, "piece_s": round(time.monotonic() - started, 1)})
    return True


def free(device: torch.device) -> None:
    """Gives the memory of networks back that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def described(device: torch.device) -> str:
    """Name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
