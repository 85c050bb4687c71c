"""Training on a GPU: losses compared with a CPU, images per second, time per stage, data loader, a complete run."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tests.gpu.environment import Environment
from tests.gpu.targets import Targets
from tests.gpu.train_loading import loader_speed, make_shapes
from tests.gpu.train_run import train_shapes
from tests.gpu.train_steps import Bench, Sizes, compare_devices, step_speed
from yolov7_deploy.errors import Y7Error

PART_S = 505.0  # time limit of all measurements; the complete training uses the rest
MEASUREMENT_S = 45.0  # time limit of any other measurement: with less left, it is not started
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

Measurement = Callable[[], dict[str, Any]]


def measure(env: Environment) -> None:
    """Run all measurements; failures and missed targets are raised at the end, after all were tried.

    Raises:
        AssertionError: A measurement failed, or losses on the GPU differ from those on the CPU.
    """
    sizes = EMULATED if env.emulated else REAL
    device = torch.device("cpu") if env.emulated else torch.device("cuda", 0)
    folder = env.result.parent / "train"
    folder.mkdir()
    ends = time.monotonic() + PART_S
    bench = Bench(env=env, targets=Targets(env), sizes=sizes, device=device, folder=folder, ends=ends)
    env.record("torch", {"version": torch.__version__, "device": device_name(device)})
    failed = [name for name, measurement in measurements(bench) if not run_measurement(bench, name, measurement)]
    assert not failed and not bench.targets.missed, f"failed: {failed}, missed: {bench.targets.missed}"


def measurements(bench: Bench) -> list[tuple[str, Measurement]]:
    """Return all measurements by the names of their results, most important first; the last uses the remaining time."""
    sizes = bench.sizes
    small, large = sizes.variants[0], sizes.variants[-1]
    first = sizes.batches[0]
    found: list[tuple[str, Measurement]] = [("shapes", partial(make_shapes, bench))]
    found += [(f"{name} losses as on a CPU", partial(compare_devices, bench, name)) for name in sizes.variants]
    found += [
        (f"{name} batch {batch} float16", partial(step_speed, bench, name, batch, half=True))
        for name in sizes.variants
        for batch in sizes.batches
    ]
    found += [
        (f"{large} batch {first} {name}", partial(step_speed, bench, large, first, half=False, tf32=tf32))
        for name, tf32 in (("TF32", True), ("float32", False))
    ]
    found += [
        (f"{small} with its loader", partial(loader_speed, bench, small, cached=False)),
        (f"{small} with its loader, images cached", partial(loader_speed, bench, small, cached=True)),
    ]
    if large != small:
        found.append((f"{large} with its loader", partial(loader_speed, bench, large, cached=False)))
    return [*found, ("training", partial(train_shapes, bench, small))]


def run_measurement(bench: Bench, name: str, measurement: Measurement) -> bool:
    """Run a measurement and record its result or its error; free its memory for the next one."""
    env, left = bench.env, bench.ends - time.monotonic()
    if left < MEASUREMENT_S:
        env.record(name, {"skipped": f"only {left:.0f} s were left"})
        return True
    started = time.monotonic()
    try:
        found = measurement()
    except FAULTS as error:
        trace = "".join(traceback.format_exception(error))
        env.record(name, {"failed": f"{type(error).__name__}: {error}"[:1000], "traceback": trace[-3000:]})
        return False
    finally:
        free(bench.device)
    env.record(name, {**found, "measurement_s": round(time.monotonic() - started, 1)})
    return True


def free(device: torch.device) -> None:
    """Free the memory of networks that are no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """Return the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
