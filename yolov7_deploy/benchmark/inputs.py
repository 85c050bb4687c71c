"""Pictures to measure speed with: one's own, or a drawn one of a usual size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from yolov7_deploy.errors import SourceError
from yolov7_deploy.evaluation.synthetic_image import drawn_picture
from yolov7_deploy.image import Image
from yolov7_deploy.sources import SourceLike, open_source

DRAWN_HW = (1080, 1920)
MAX_FRAMES = 64  # 400 MB of Full HD
PADDED = 3 / 4  # of the height asked for is what `drawn_picture` gives


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frames:
    """Pictures in memory, uint8 BGR [H, W, 3], and where they came from in words."""

    pictures: tuple[Image, ...]
    words: str

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the first."""
        height, width = self.pictures[0].shape[:2]
        return height, width

    def batches(self, size: int) -> list[list[Image]]:
        """Lists of `size` pictures that hold every picture, in order; the last is filled up from the start.

        A picture that is needed twice in a list is copied: pictures of a real batch do not share their memory.
        """
        count = -(-len(self.pictures) // size)
        return [self._batch(range(number * size, (number + 1) * size)) for number in range(count)]

    def _batch(self, numbers: Sequence[int]) -> list[Image]:
        total = len(self.pictures)
        return [
            self.pictures[number % total] if number - numbers[0] < total else self.pictures[number % total].copy()
            for number in numbers
        ]


def drawn_frames(hw: tuple[int, int] = DRAWN_HW) -> Frames:
    """One drawn picture of this height and width, the same every time."""
    height, width = hw
    picture = drawn_picture((int(height / PADDED) + 1, width))[:height]
    return Frames(pictures=(picture,), words=f"one drawn picture, {width}x{height}")


def read_frames(source: SourceLike) -> Frames:
    """The first pictures of anything that `open_source` reads.

    Raises:
        SourceError: There is nothing to read.
        ImageError: A picture cannot be read.
    """
    with open_source(source) as opened:
        pictures = tuple(frame.image for frame in islice(opened, MAX_FRAMES))
        if not pictures:
            raise SourceError(f"{source} gave no picture.", fix="Check --source.")
        whole = opened.total == len(pictures)
    count = f"{len(pictures)} picture{'s' * (len(pictures) > 1)}"
    return Frames(pictures=pictures, words=f"{count} of {source}" if whole else f"the first {count} of {source}")
