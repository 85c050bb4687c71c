"""How often a picture comes where classes that are found badly shall come more often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from yolov7_deploy.dataset.samples import DoubleArray, IntArray


def picture_weights(class_ids: Sequence[IntArray], aps: DoubleArray) -> DoubleArray | None:
    """A weight per picture, adding up to 1: the sum over its boxes of w_c (1 - AP_c)^2 / C, with w_c ~ 1 / boxes of c.

    `None` where no picture has a box.

    Args:
        class_ids: Of the boxes of each picture.
        aps: AP of each class, [C].
    """
    classes = len(aps)
    counts = np.stack([np.bincount(ids, minlength=classes) for ids in class_ids])
    rarity = 1 / np.maximum(counts.sum(0), 1)
    of_class = rarity / rarity.sum() * classes * (1 - aps) ** 2 / classes
    weights: DoubleArray = counts @ of_class
    total = float(weights.sum())
    return weights / total if total > 0 else None
