"""Speed of the NMS kernels compared with PyTorch: decode, filter, and `torchvision.ops.nms` with class offsets."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from tests.gpu.environment import CudaMemory, Environment, Stream, times_us
from tests.gpu.nms import ANCHORS, CLASSES, CONF, IOU, MAX_CANDIDATES, MAX_DET, STRIDES, NmsCall, yolov7_heads

try:
    from torchvision.ops import nms as torch_nms
except ImportError:  # PyTorch is then measured without NMS
    torch_nms = None

CASES = ((np.float16, 300, 1), (np.float32, 300, 1), (np.float16, 1000, 1), (np.float16, 300, 32))
CLASS_OFFSET = 4096.0  # pixels between classes, so that boxes of two classes never overlap


class TorchPath:
    """Decoding and NMS of raw head maps in PyTorch; the grids are made in advance."""

    def __init__(self, maps: list[Any]) -> None:
        self.maps = maps
        self.cells = []
        for level, stride, anchors in zip(maps, STRIDES, ANCHORS, strict=True):
            height, width = level.shape[-2:]
            row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            grid = torch.stack([column, row], -1).to(level)
            sizes = torch.tensor(anchors).to(level).view(1, 3, 1, 1, 2)
            self.cells.append((grid, stride, sizes))

    def decode(self) -> Any:
        """Return the decoded output [B, A, 5 + C] in pixels and probabilities."""
        levels = []
        for level, (grid, stride, sizes) in zip(self.maps, self.cells, strict=True):
            batch, _, height, width = level.shape
            y = level.view(batch, 3, 5 + CLASSES, height, width).permute(0, 1, 3, 4, 2).sigmoid()
            centre = (y[..., :2] * 2 - 0.5 + grid) * stride
            size = (y[..., 2:4] * 2) ** 2 * sizes
            levels.append(torch.cat([centre, size, y[..., 4:]], -1).reshape(batch, -1, 5 + CLASSES))
        return torch.cat(levels, 1)

    def __call__(self) -> list[Any]:
        """Return boxes, scores and classes of every image."""
        results = []
        for image in self.decode():
            image = image[image[:, 4] > CONF]
            scores = image[:, 5:] * image[:, 4:5]
            row, class_id = (scores > CONF).nonzero(as_tuple=True)
            score, order = scores[row, class_id].sort(descending=True, stable=True)
            order, score = order[:MAX_CANDIDATES], score[:MAX_CANDIDATES]
            row, class_id = row[order], class_id[order]
            half = image[row, 2:4] / 2
            boxes = torch.cat([image[row, :2] - half, image[row, :2] + half], -1)
            if torch_nms is not None:
                kept = torch_nms(boxes.float() + class_id[:, None] * CLASS_OFFSET, score.float(), IOU)[:MAX_DET]
                boxes, score, class_id = boxes[kept], score[kept], class_id[kept]
            results.append((boxes, score, class_id))
        return results


def measure(env: Environment) -> None:
    """Measure both in one process on the same maps.

    PyTorch is measured by events around calls, because it synchronizes within a call.
    """
    cuda, kernels = env.open_cuda(), env.open_kernels()
    device = "cpu" if env.emulated else "cuda"
    env.record("torch", {"version": torch.__version__, "device": device, "has_nms": torch_nms is not None})
    rows: list[dict[str, object]] = []
    for kind, count, batch in CASES[: env.choose(len(CASES), 1)]:
        heads = yolov7_heads(np.random.default_rng(count), min(batch, 4), count, kind, None, scale=env.choose(1, 8))
        maps = [torch.from_numpy(level).to(device).repeat(batch // len(level), 1, 1, 1) for level in heads.maps]
        path = TorchPath(maps)
        with Stream(cuda) as stream, torch.no_grad():
            memory = CudaMemory(cuda, stream, guard=0)
            work = NmsCall(kernels, memory, heads, batch)
            ours = times_us(stream, work, rounds=env.choose(200, 3))
            found = memory.download(work.buffers["num_dets"]).view(np.int32)
            theirs = torch_us(path, rounds=env.choose(40 if batch == 1 else 10, 2), on_gpu=not env.emulated)
            kept = [len(scores) for _, scores, _ in path()]
        row: dict[str, object] = {"type": kind.__name__, "pairs": count, "batch": batch, "ours": ours}
        row |= {"torch_us": theirs, "detections": int(found.sum()), "torch_detections": sum(kept)}
        row["times_faster"] = round(theirs / ours["graph_us"], 1)
        rows.append(row)
        env.record("rows", rows)


def torch_us(path: TorchPath, *, rounds: int, on_gpu: bool) -> float:
    """Return the median microseconds of a call, measured by events on a GPU."""
    for _ in range(min(rounds, 5)):
        path()
    times = []
    for _ in range(rounds):
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            path()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        else:
            started = time.perf_counter()
            path()
            times.append((time.perf_counter() - started) * 1e6)
    return round(float(np.median(times)), 1)
