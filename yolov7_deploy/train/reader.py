"""Pictures for one batch, with an account of those that could not be read."""

from __future__ import annotations

from yolov7_deploy.errors import ImageError
from yolov7_deploy.image import Image
from yolov7_deploy.train.pictures import PictureStore


class PictureReader:
    """Reads from a store; a picture that cannot be read is `None` and remembered, and training goes on.

    Attributes:
        store: Where sizes and objects are.
        problems: What could not be read and why, by index.
        has_read: A picture could be read.
    """

    def __init__(self, store: PictureStore) -> None:
        self.store = store
        self.problems: dict[int, str] = {}
        self.has_read = False

    def resized(self, index: int) -> Image | None:
        """See `PictureStore.resized`."""
        try:
            image = self.store.resized(index)
        except ImageError as error:
            self.problems[index] = error.message
            return None
        self.has_read = True
        return image

    def image(self, index: int, *, scale: float) -> tuple[Image, tuple[float, float]] | None:
        """See `PictureStore.image`."""
        try:
            found = self.store.image(index, scale=scale)
        except ImageError as error:
            self.problems[index] = error.message
            return None
        self.has_read = True
        return found
