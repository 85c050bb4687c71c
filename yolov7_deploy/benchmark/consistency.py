"""Whether a detector gives the same results to the same images from the first call to the last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from yolov7_deploy.detections import Detections
from yolov7_deploy.errors import DeviceError

# Two calls with one image differ by no more, even where a GPU adds in another order.
SAME_SCORE = 0.02
SAME_PLACE = 0.01  # of the image's longer side


class ConsistencyChecker:
    """The first and the latest results of calls with the same images, by a number that the caller chooses.

    Args:
        conf: The threshold; what scores nearly this may come and go.
    """

    def __init__(self, conf: float) -> None:
        self._conf = conf
        self._first: dict[int, Sequence[Detections]] = {}
        self._latest: dict[tuple[int, int], Sequence[Detections]] = {}

    def keep(self, number: int, found: Sequence[Detections], *, caller: int = 0) -> None:
        """Takes the results of a call; several callers may do so at once."""
        self._first.setdefault(number, found)
        self._latest[number, caller] = found

    def check(self) -> None:
        """Compares the latest with the first of each.

        Raises:
            DeviceError: They are not the same: however fast, the detector is broken.
        """
        for (number, caller), latest in self._latest.items():
            for place, (now, before) in enumerate(zip(latest, self._first[number], strict=True)):
                if not same_detections(now, before, conf=self._conf):
                    raise _unsteady(before, now, f"image {place + 1} of batch {number + 1}, caller {caller + 1}")

    def mean_count(self) -> float:
        """Detections an image, of the first results."""
        return float(np.mean([len(one) for found in self._first.values() for one in found]))


def same_detections(a: Detections, b: Detections, *, conf: float) -> bool:
    """Every object of one is in the other, nearly the same; those that score close to `conf` may be in one only."""
    alike = (
        (a.class_ids[:, None] == b.class_ids[None])
        & (np.abs(a.scores[:, None] - b.scores[None]) <= SAME_SCORE)
        & (np.abs(a.boxes[:, None] - b.boxes[None]) <= SAME_PLACE * max(a.image_hw)).all(-1)
    )
    alone = (a.scores[~alike.any(1)], b.scores[~alike.any(0)])
    return all((scores <= conf + SAME_SCORE).all() for scores in alone)


def _unsteady(before: Detections, now: Detections, which: str) -> DeviceError:
    moved = ", in other places" if len(before) == len(now) else ""
    return DeviceError(
        f"The same image gave {len(before)} detections first ({before.describe()}) and {len(now)} later "
        f"({now.describe()}{moved}): {which}. The times of such a detector mean nothing.",
        fix="Look for the difference:  y7 verify --weights WEIGHTS.pt --against FILE",
    )
