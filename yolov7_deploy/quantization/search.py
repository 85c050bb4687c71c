"""Which layers to spare: as few as a measure allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Below this many, each spared layer is tried without the others; a trial is an AP measurement, which takes minutes.
PRUNED = 8


def fewest_spared(dearest: Sequence[str], fits: Callable[[frozenset[str]], bool]) -> frozenset[str] | None:
    """A small set of layers to spare with which the model fits; `None` if it does not fit with all of them spared.

    The dearest one, two, four, ... are spared until it fits, then the number is halved in between. A rank is no proof
    that each of them is needed, so each of a few is tried in INT8 once more, the cheapest first.

    Args:
        dearest: All layers, the one that INT8 costs most first.
        fits: Measures with these spared; called with each set once.
    """
    least, most = 0, 1
    while not fits(frozenset(dearest[:most])):
        if most >= len(dearest):
            return None
        least, most = most, min(2 * most, len(dearest))
    while most - least > 1:
        middle = (least + most) // 2
        if fits(frozenset(dearest[:middle])):
            most = middle
        else:
            least = middle
    spared = frozenset(dearest[:most])
    if most <= PRUNED:
        for layer in reversed(dearest[: most - 1]):  # without the last it was tried already
            if len(spared) > 1 and fits(spared - {layer}):
                spared -= {layer}
    return spared
