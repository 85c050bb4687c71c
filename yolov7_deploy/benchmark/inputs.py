"""Images to measure speed with: one's own, or a drawn one of a usual size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from yolov7_deploy.errors import SourceError
from yolov7_deploy.evaluation.synthetic_image import drawn_image
from yolov7_deploy.image import Image
from yolov7_deploy.sources import SourceLike, open_source

DRAWN_HW = (1080, 1920)
MAX_FRAMES = 64  # 400 MB of Full HD
PADDED = 3 / 4  # of the height asked for is what `drawn_image` gives


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frames:
    """Images in memory, uint8 BGR [H, W, 3], and where they came from in words."""

    images: tuple[Image, ...]
    words: str

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the first."""
        height, width = self.images[0].shape[:2]
        return height, width

    def batches(self, size: int) -> list[list[Image]]:
        """Lists of `size` images that hold every image, in order; the last is filled up from the start.

        An image that is needed twice in a list is copied: images of a real batch do not share their memory.
        """
        count = -(-len(self.images) // size)
        return [self._batch(range(number * size, (number + 1) * size)) for number in range(count)]

    def _batch(self, numbers: Sequence[int]) -> list[Image]:
        total = len(self.images)
        return [
            self.images[number % total] if number - numbers[0] < total else self.images[number % total].copy()
            for number in numbers
        ]


def drawn_frames(hw: tuple[int, int] = DRAWN_HW) -> Frames:
    """One drawn image of this height and width, the same every time."""
    height, width = hw
    image = drawn_image((int(height / PADDED) + 1, width))[:height]
    return Frames(images=(image,), words=f"one drawn image, {width}x{height}")


def read_frames(source: SourceLike) -> Frames:
    """The first images of anything that `open_source` reads.

    Raises:
        SourceError: There is nothing to read.
        ImageError: An image cannot be read.
    """
    with open_source(source) as opened:
        images = tuple(frame.image for frame in islice(opened, MAX_FRAMES))
        if not images:
            raise SourceError(f"{source} gave no image.", fix="Check --source.")
        whole = opened.total == len(images)
    count = f"{len(images)} image{'s' * (len(images) > 1)}"
    return Frames(images=images, words=f"{count} of {source}" if whole else f"the first {count} of {source}")
