"""From images to what the network is trained on: the official augmentation, in its order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from yolov7_deploy.datasets.samples import DoubleArray
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import FloatArray, Image, fit_letterbox
from yolov7_deploy.training.copy_paste import paste_in
from yolov7_deploy.training.dataset import ImageReader
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.mosaic import draw_crops, mosaic_scene
from yolov7_deploy.training.objects import FlatObjects
from yolov7_deploy.training.random_affine import GREY, draw_warp, warp_objects, warp_pixels
from yolov7_deploy.training.sample import NO_OBJECTS, NO_POLYGON, Objects, Scene, joined

MIXUP_BETA = 8.0  # both parameters of the distribution of the share of the first image
HUES = 180  # of an 8-bit image in OpenCV
NO_JITTER = np.ones(3)
STRIP_BYTES = 100_000
MAX_TRIES = 20  # other images, where one cannot be read


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """How images are varied.

    Attributes:
        hyp: Probabilities and ranges.
        size: Side of a mosaic, longer side of an image.
        plain_from_epoch: From this epoch on neither mosaic nor mixup, paste-in and copy-paste; `None` is never.
    """

    hyp: Hyperparameters
    size: int
    plain_from_epoch: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"Images of {self.size} pixels cannot be trained on.", fix="For example: --img 640")

    def is_plain(self, epoch: int) -> bool:
        """Whether an epoch shows single images only."""
        return self.plain_from_epoch is not None and epoch >= self.plain_from_epoch


def make_scene(
    reader: ImageReader,
    augmentation: Augmentation,
    *,
    index: int,
    epoch: int,
    out: Image,
    mosaic: bool = True,
    rng: np.random.Generator,
) -> FloatArray:
    """Makes the scene that begins with image `index`, and gives its targets.

    Args:
        reader: Where images come from.
        augmentation: How it is varied.
        index: The image; others join it at random.
        epoch: Decides whether scenes are plain already.
        out: uint8 [H, W, 3]; gets the scene as RGB.
        mosaic: Whether mosaics are allowed; they are square.
        rng: Of every choice.

    Returns:
        float32 [N, 5]: class, centre x, centre y, width, height; the last four in fractions of the scene's sides.
    """
    hyp, is_plain = augmentation.hyp, augmentation.is_plain(epoch)
    height, width = out.shape[:2]
    if mosaic and not is_plain and rng.random() < hyp.mosaic:
        scene = mixed_scene(reader, index, hyp=hyp, rng=rng)
    else:
        scene = single_scene(reader, index, hyp=hyp, hw=(height, width), rng=rng)
    gains = 1 + rng.uniform(-1, 1, size=3) * (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v)
    pastes = not is_plain and rng.random() < hyp.paste_in
    flips = (rng.random(2) < (hyp.flipud, hyp.fliplr)).tolist()
    if pastes:
        recolour(scene.image, gains, out=scene.image, code=cv2.COLOR_HSV2BGR)
        scene = paste_in(scene, draw_crops(reader, rng=rng), rng=rng)
        gains = NO_JITTER
    recolour(scene.image, gains, out=out, code=cv2.COLOR_HSV2RGB, flips=flips)
    return targets_of(scene.objects, (height, width), flips)


def mixed_scene(reader: ImageReader, index: int, *, hyp: Hyperparameters, rng: np.random.Generator) -> Scene:
    """A mosaic, and with the probability of mixup a second one shining through it."""
    scene = mosaic_scene(reader, index, hyp=hyp, rng=rng)
    if rng.random() >= hyp.mixup:
        return scene
    other = mosaic_scene(reader, int(rng.integers(len(reader.store))), hyp=hyp, rng=rng)
    share = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
    cv2.addWeighted(scene.image, share, other.image, 1 - share, 0, dst=scene.image)
    return Scene(image=scene.image, objects=joined(scene.objects, other.objects))


def single_scene(
    reader: ImageReader, index: int, *, hyp: Hyperparameters, hw: tuple[int, int], rng: np.random.Generator
) -> Scene:
    """One image, letterboxed to `hw` and warped in a single step; boxes are those of the warped corners.

    Where the image cannot be read, a random other one; grey without objects where many cannot.
    """
    warp = draw_warp(hyp, canvas_hw=hw, out_hw=hw, rng=rng)
    for _ in range(MAX_TRIES):
        source_h, source_w = reader.store.hw(index)
        box = fit_letterbox((source_h, source_w), hw)
        stretch = box.resized_hw[1] / source_w, box.resized_hw[0] / source_h
        found = reader.image(index, scale=warp.scale * max(stretch))
        if found is not None:
            pixels, (factor_x, factor_y) = found
            corner = box.left, box.top
            image = warp_pixels(pixels, warp.after((stretch[0] / factor_x, stretch[1] / factor_y), corner))
            objects = boxed(reader.store.flat_objects(index), stretch, corner)
            return Scene(image=image, objects=warp_objects(objects, warp))
        index = int(rng.integers(len(reader.store)))
    return Scene(image=np.full((*hw, 3), GREY, dtype=np.uint8), objects=NO_OBJECTS)


def boxed(objects: FlatObjects, scale_xy: tuple[float, float], corner_xy: tuple[int, int]) -> FlatObjects:
    """The boxes alone, scaled and then moved."""
    scale, corner = np.array(scale_xy * 2, np.float32), np.array(corner_xy * 2, np.float32)
    return FlatObjects(
        boxes=objects.boxes * scale + corner,
        class_ids=objects.class_ids,
        points=NO_POLYGON,
        counts=np.zeros(len(objects), dtype=np.int64),
    )


def recolour(
    image: Image, gains: DoubleArray, *, out: Image, code: int, flips: Sequence[bool] = (False, False)
) -> None:
    """Writes the image with hue, saturation and value multiplied by `gains`.

    It goes strip by strip: what lies between the steps then stays in the processor's cache, and the system need not
    hand out and take back memory for four more images, which takes as long as the arithmetic.

    Args:
        image: uint8 BGR [H, W, 3].
        gains: float64 [3]; the hue goes round, the others stop at 255. `NO_JITTER` leaves every pixel as it is.
        out: uint8 [H, W, 3]; may be `image` where nothing is flipped.
        code: OpenCV's way back from HSV, to BGR or to RGB.
        flips: Whether to turn it upside down, and left to right.
    """
    (height, width), (upside_down, mirrored) = image.shape[:2], flips
    tables = jitter_tables(gains)
    rows = max(1, STRIP_BYTES // (width * 3))
    for first in range(0, height, rows):
        strip = image[first : first + rows]
        if upside_down or mirrored:
            strip = cv2.flip(strip, -1 if upside_down and mirrored else int(mirrored))  # type: ignore[assignment]
        end = height - first if upside_down else first + len(strip)
        target = out[end - len(strip) : end]
        if gains is NO_JITTER:
            cv2.cvtColor(strip, cv2.COLOR_BGR2RGB, dst=target)
            continue
        hsv = cv2.cvtColor(strip, cv2.COLOR_BGR2HSV)
        # Plane by plane takes less time than one look-up with a table of three channels.
        planes = [cv2.LUT(plane, table) for plane, table in zip(cv2.split(hsv), tables, strict=True)]
        cv2.cvtColor(cv2.merge(planes, dst=hsv), code, dst=target)


def jitter_tables(gains: DoubleArray) -> Image:
    """What becomes of each value of hue, saturation and value, uint8 [3, 256]."""
    tables = np.arange(256) * gains[:, None]
    tables[0] %= HUES
    return np.minimum(tables, 255).astype(np.uint8)


def targets_of(objects: Objects, hw: tuple[int, int], flips: Sequence[bool]) -> FloatArray:
    """Class, centre x, y, width, height in fractions of an image flipped as `flips` say, float32 [N, 5]."""
    boxes = objects.boxes / np.array([hw[1], hw[0]] * 2, dtype=np.float32)
    targets = np.empty((len(objects), 5), dtype=np.float32)
    targets[:, 0] = objects.class_ids
    targets[:, 1:3] = (boxes[:, :2] + boxes[:, 2:]) / 2
    targets[:, 3:] = boxes[:, 2:] - boxes[:, :2]
    for column, is_flipped in zip((2, 1), flips, strict=True):
        if is_flipped:
            targets[:, column] = 1 - targets[:, column]
    return targets
