"""Count the launches, barriers and bytes of one frame in our NMS kernels, beside those of EfficientNMS_TRT.

    python benchmarks/nms_work.py --machine counted

Nothing is timed, and no GPU is needed. Ours are counted on the CPU emulation of CUDA: launches and memsets, the
barriers of the block with the most in each launch, and the global memory that each launch touches, in sectors of 32
bytes that count once per launch. Those of EfficientNMS_TRT follow from its public source
(plugin/efficientNMSPlugin/efficientNMSInference.cu of github.com/NVIDIA/TensorRT, branch release/10.16) and are lower
bounds: the sort of CUB counts as one launch for every 8 bits of the scores that reads and writes each pair once, its
barriers as none, and every byte as touched once per launch. Both read float16 at 640 x 640 with 80 classes.

EfficientNMS_TRT reads decoded boxes and scores. What the layers before it write for that is a line of its own; our
kernels read the head maps.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from recording import parser, record

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.fakes.emulated_kernels import Heads, NmsResult, Work, emulated, run_nms

Array = npt.NDArray[np.float16]

SIDES, STRIDES, CLASSES, MAX_DET = (80, 40, 20), (8.0, 16.0, 32.0), 80, 300
ANCHORS = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
PAIRS = sum(3 * side * side for side in SIDES) * CLASSES
# Of EfficientNMS_TRT: bytes of a float16, of an integer, candidates of its NMS, bits of a pass of a radix sort, and the
# threshold below which it sorts all pairs.
HALF, INT, MOST_CANDIDATES, PASS_BITS, DENSE_BELOW = 2, 4, 4096, 8, 0.007


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An image: its number of objects, the logits of their anchors and of the others, and the thresholds."""

    objects: int
    anchors_per_object: int
    background: float
    conf: float
    multi_label: bool


CASES = {
    "conf 0.25": Case(objects=32, anchors_per_object=10, background=-8, conf=0.25, multi_label=False),
    "conf 0.001, multi-label": Case(objects=10, anchors_per_object=4, background=-5.6, conf=0.001, multi_label=True),
}


def main() -> None:
    options = parser(__doc__).parse_args()
    record("nms_work", options.machine, count_cases())


def count_cases() -> dict[str, object]:
    """Return the counts of each case."""
    kernels = emulated("nms.cu", observed=True)
    result: dict[str, object] = {}
    for name, case in CASES.items():
        kernels.work()
        found = run_nms(
            kernels, head_maps(case), conf=case.conf, iou=0.65, max_det=MAX_DET, multi_label=case.multi_label
        )
        pairs = count_pairs(case)
        result[name] = {"pairs": pairs, "detections": int(found.num_dets[0, 0])} | {
            "ours": ours(kernels.work()),
            "EfficientNMS_TRT, at least": efficient_nms(case, pairs, found),
        }
    return result


def head_maps(case: Case) -> Heads:
    """Return the head maps of an image, float16; several neighboring anchors detect one box of each object."""
    rng = np.random.default_rng(0)
    mean = np.where(np.arange(5 + CLASSES) > 3, case.background, 0)[:, None, None]
    maps = [mean + rng.normal(0, 1, (1, 3, 5 + CLASSES, side, side)) for side in SIDES]
    for _ in range(case.objects):
        level = rng.integers(len(SIDES))
        y, x = rng.integers(1, SIDES[level] - 2, 2)
        of_class = 5 + rng.integers(CLASSES)
        for number in range(case.anchors_per_object):
            anchor, dy, dx = number % 3, number // 3 % 2, number // 6
            # The corner between the cells, and the size of the second anchor.
            size = np.sqrt(np.divide(ANCHORS[level][1], ANCHORS[level][anchor]))
            box = np.array([1.5 - dx, 1.5 - dy, *size]) / 2
            maps[level][0, anchor, :4, y + dy, x + dx] = np.log(box / (1 - box))
            maps[level][0, anchor, (4, of_class), y + dy, x + dx] = 3
    arrays = tuple(array.reshape(1, -1, *array.shape[-2:]).astype(np.float16) for array in maps)
    return Heads(maps=arrays, strides=STRIDES, anchors=ANCHORS)


def count_pairs(case: Case) -> int:
    """Return the number of (anchor, class) pairs above the threshold."""
    count = 0
    for array in head_maps(case).maps:
        logits = array.astype(np.float32).reshape(3, 5 + CLASSES, -1)
        probabilities = 1 / (1 + np.exp(-logits[:, 4:]))
        scores = probabilities[:, :1] * probabilities[:, 1:]
        count += int(((scores if case.multi_label else scores.max(1)) > case.conf).sum())
    return count


def ours(work: list[Work]) -> dict[str, object]:
    """Return the totals of what was queued."""
    kernels = [one for one in work if one.blocks]
    return {
        "memsets": len(work) - len(kernels),
        "kernels": len(kernels),
        "barriers": sum(one.barriers for one in kernels),
        "kilobytes": kilobytes(sum(one.bytes_read + one.bytes_written for one in kernels)),
        "kilobytes that layers before it write": 0,
    }


def efficient_nms(case: Case, pairs: int, found: NmsResult) -> dict[str, object]:
    """Return lower bounds for EfficientNMS_TRT on the same image."""
    dense = case.conf < DENSE_BELOW
    entries = PAIRS if dense else pairs
    entry = HALF + INT  # a score and an index, which are sorted
    passes = 8 * HALF // PASS_BITS
    selected = min(entries if dense else pairs, MOST_CANDIDATES)
    # Copy of the scores and their indices, or the filter: reads all scores, writes index, anchor, class and score.
    scan = 2 * PAIRS * HALF + PAIRS * (HALF + 3 * INT) if dense else PAIRS * HALF + entries * (HALF + 3 * INT)
    nms = selected * (HALF + 3 * INT + 4 * HALF)
    outputs = INT + MAX_DET * (HALF + 4 * HALF + INT)
    detections = int(found.num_dets[0, 0])
    return {
        "memsets": 6 if dense else 5,  # with the copy of the scores
        "kernels": (1 if dense else 2) + passes + 1,
        # One for each candidate, until `max_det` detections are kept.
        "barriers": selected if detections < MAX_DET else MAX_DET,
        "kilobytes": kilobytes(scan + 2 * passes * entries * entry + nms + outputs),
        "kilobytes that layers before it write": kilobytes(PAIRS // CLASSES * (CLASSES + 4) * HALF),
    }


def kilobytes(count: int) -> int:
    return round(count / 1000)


if __name__ == "__main__":
    main()
