"""Number of detections that two COCO results files have in common.

    y7 val --weights yolov7 --data D.yaml --no-rect --predictions ours.json
    python benchmarks/official_boxes.py --ours ours.json --official official_square640_predictions.json

Two detections are the same if image and class agree, no side of the box differs by more than 0.01 pixels and the
score by at most 0.0001: a few units of the rounding in the files. The remaining ones, on both sides, come from the
official NMS: it separates classes by offsetting boxes by 4096 pixels per class in float32, which rounds coordinates
to hundredths of a pixel, so overlaps close to the threshold may change sides.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from recording import parser, record

BOX_PX, SCORE = 0.01, 1e-4


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--ours", type=Path, required=True)
    arguments.add_argument("--official", type=Path, required=True)
    arguments.add_argument("--name", default="official_boxes")
    options = arguments.parse_args()
    ours, official = (json.loads(path.read_text()) for path in (options.ours, options.official))
    record(
        options.name,
        options.machine,
        {"ours": len(ours), "official": len(official), "same": same(ours, official), "box_px": BOX_PX, "score": SCORE},
    )


def same(ours: list[dict[str, Any]], official: list[dict[str, Any]]) -> int:
    """Return how many detections both files contain, each counted once."""
    unmatched = defaultdict(list)
    for row in ours:
        unmatched[row["image_id"], row["category_id"]].append(row)
    count = 0
    for row in official:
        others = unmatched[row["image_id"], row["category_id"]]
        for other in others:
            box = max(abs(a - b) for a, b in zip(row["bbox"], other["bbox"], strict=True))
            if box <= BOX_PX and abs(row["score"] - other["score"]) <= SCORE:
                others.remove(other)
                count += 1
                break
    return count


if __name__ == "__main__":
    main()
