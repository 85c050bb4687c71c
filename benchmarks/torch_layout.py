"""Speed of the PyTorch network on a CPU in NHWC memory layout (the default here) against NCHW.

Forward passes with decoding at batch 1 and random weights, interleaved; the ratio of each pair is independent of other
load on the machine. The largest difference between the outputs is reported too.

    python benchmarks/torch_layout.py [--models yolov7-tiny yolov7] [--img 640] [--rounds 20]
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from recording import parser, record

from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.runtimes.pytorch_network import TorchNetwork


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", default=["yolov7-tiny", "yolov7"])
    arguments.add_argument("--img", type=int, default=640)
    arguments.add_argument("--rounds", type=int, default=20)
    options = arguments.parse_args()
    result: dict[str, object] = {"img": options.img, "rounds": options.rounds, "threads": torch.get_num_threads()}
    with torch.inference_mode():
        for name in options.models:
            result |= compare(name, options.img, options.rounds)
    record("torch_layout", options.machine, result)


def compare(name: str, side: int, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    nchw = fuse(new_model(name).eval())
    network = TorchNetwork(copy.deepcopy(nchw), torch.device("cpu"), half=False)
    images = torch.rand(1, 3, side, side)
    layouts: list[Callable[[], torch.Tensor]] = [lambda: nchw.predict(images), lambda: network.predict(images)]
    first, second = (run() for run in layouts)
    pairs = []
    for number in range(rounds):
        times_ms = [0.0, 0.0]
        for which in (number % 2, 1 - number % 2):
            started = time.perf_counter()
            layouts[which]()
            times_ms[which] = (time.perf_counter() - started) * 1e3
        pairs.append(times_ms)
    ratios = sorted(last / plain for plain, last in pairs)
    return {
        f"{name} nchw_ms": round(statistics.median(plain for plain, _ in pairs), 1),
        f"{name} nhwc_ms": round(statistics.median(last for _, last in pairs), 1),
        f"{name} ratio": round(statistics.median(ratios), 3),
        f"{name} ratio quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
        f"{name} largest difference": float((first - second).abs().max()),
    }


if __name__ == "__main__":
    main()
