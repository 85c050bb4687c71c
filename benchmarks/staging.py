"""Host time saved by staging only those rows of a frame that a bilinear letterbox reads.

Frames are copied to a persistent buffer, whole and by their row plan, interleaved; the ratio is the median over pairs.
Every pass has its own buffers, because some placements in memory are slow. Frame sizes above the limit of the plan are
gathered as well, to show why there is a limit.

    python benchmarks/staging.py [--rounds 100]
"""

from __future__ import annotations

import itertools
import math
import mmap
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from recording import parser, record

from yolov7_deploy.image import Image, fit_letterbox
from yolov7_deploy.runtimes.letterbox_kernel import MAX_ROW_SHARE, RowPlan, plan_rows

CANVAS = (640, 640)
# Video from VGA to 4K, and frames around the limit.
FRAMES = ((1080, 1920), (2160, 3840), (1440, 2560), (1536, 2048), (720, 1280), (480, 640), (900, 1600), (1080, 1440))
PASSES = 5
FRAMES_BYTES = 128 * 2**20  # per frame size, so that frames come from main memory; a single one stays in a large cache


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=100)
    options = arguments.parse_args()
    result: dict[str, object] = {"canvas": CANVAS, "limit": MAX_ROW_SHARE, "passes": PASSES, "rounds": options.rounds}
    for hw in FRAMES:
        share = len(plan_of(hw).rows) / hw[0]
        result[f"{hw[1]}x{hw[0]}"] = {
            "share_of_rows": round(share, 3),
            "gathers": share <= MAX_ROW_SHARE,
            "from_memory": summary([times(hw, options.rounds, FRAMES_BYTES) for _ in range(PASSES)]),
            "from_cache": summary([times(hw, options.rounds, 1) for _ in range(PASSES)]),
        }
    record("staging", options.machine, result)


def times(hw: tuple[int, int], rounds: int, frames_bytes: int) -> list[tuple[float, float]]:
    """Return the seconds to stage a frame whole and by its rows, for each round, in new buffers."""
    height, width = hw
    plan = plan_of(hw)
    count = -(-frames_bytes // (3 * height * width))
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    whole, part = paged(frames[0].shape), paged((len(plan.rows), width, 3))
    pairs = []
    for number in range(rounds):
        copy = partial(np.copyto, whole, frames[2 * number % count])
        gather = partial(np.take, frames[(2 * number + 1) % count], plan.rows, axis=0, out=part, mode="clip")
        pairs.append((seconds(copy), seconds(gather)))
    return pairs


def paged(shape: tuple[int, ...]) -> Image:
    """Allocate an array that starts at a page boundary, as page-locked memory does."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)


def plan_of(hw: tuple[int, int]) -> RowPlan:
    return plan_rows(hw[0], fit_letterbox(hw, CANVAS).resized_hw[0])


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this thread: in wall time, other load would hit the longer work more often."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def summary(passes: list[list[tuple[float, float]]]) -> dict[str, object]:
    """Return medians over all passes; `ratios` has one per pass, `ratio` is their median."""
    whole_s, part_s = (statistics.median(found) for found in zip(*itertools.chain(*passes), strict=True))
    ratios = sorted(round(statistics.median(part / whole for whole, part in pairs), 3) for pairs in passes)
    return {
        "whole_us": round(whole_s * 1e6),
        "gathered_us": round(part_s * 1e6),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


if __name__ == "__main__":
    main()
