"""Device names: `auto`, `cpu`, `cuda`, `cuda:N` or `N`, as in PyTorch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceName:
    """A parsed device name.

    Attributes:
        kind: `auto`, `cpu`, `cuda`, or any other text unchanged, which a runtime accepts (`mps`) or rejects.
        index: Number of the GPU in CUDA's order; `None` for other kinds and where the name does not have a number.
    """

    kind: str
    index: int | None = None

    @property
    def cuda_index(self) -> int | None:
        """Number of the GPU, 0 for plain `cuda`; `None` if this is not a CUDA device."""
        return (self.index or 0) if self.kind == "cuda" else None

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


def parse_device(text: str) -> DeviceName:
    """Return the parsed device name; a text of any other form becomes a kind of its own."""
    match = re.fullmatch(r"cuda|(?:cuda:)?([0-9]{1,3})", text)
    if match is None:
        return DeviceName(text)
    return DeviceName("cuda", None if match[1] is None else int(match[1]))
