"""The official augmentation pipeline: mosaic, affine warp, mixup, HSV jitter, paste-in and flips, in this order."""

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
from yolov7_deploy.training.mosaic import make_mosaic, random_crops
from yolov7_deploy.training.random_affine import GREY, random_warp, warp_objects, warp_pixels
from yolov7_deploy.training.sample import NO_OBJECTS, NO_POLYGON, FlatObjects, Objects, TrainSample, concatenate

MIXUP_BETA = 8.0  # both parameters of the beta distribution of the weight of the first image
HUES = 180  # hue values of an 8-bit image in OpenCV
NO_JITTER = np.ones(3)
STRIP_BYTES = 100_000
MAX_TRIES = 20  # other images to try if one cannot be read


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Settings of the augmentation.

    Attributes:
        hyp: Probabilities and ranges.
        size: Side of a mosaic, and longer side of a single image.
        close_mosaic_epoch: First epoch without mosaic, mixup, paste-in and copy-paste; `None` uses them in all epochs.
    """

    hyp: Hyperparameters
    size: int
    close_mosaic_epoch: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"Images of {self.size} pixels cannot be trained on.", fix="For example:  --img 640")

    def is_mosaic_closed(self, epoch: int) -> bool:
        """Return whether an epoch uses single images only."""
        return self.close_mosaic_epoch is not None and epoch >= self.close_mosaic_epoch


def make_sample(
    reader: ImageReader,
    augmentation: Augmentation,
    *,
    index: int,
    epoch: int,
    out: Image,
    mosaic: bool = True,
    rng: np.random.Generator,
) -> FloatArray:
    """Write a training sample into `out`, and return its targets.

    Args:
        reader: Source of the images.
        augmentation: Settings of the augmentation.
        index: The first image; others are added at random.
        epoch: Determines whether mosaics are still used.
        out: uint8 [H, W, 3]; receives the sample as RGB.
        mosaic: Allow mosaics, which are square.
        rng: Random number generator for all choices.

    Returns:
        float32 [N, 5]: class, centre x, centre y, width, height; the last four as fractions of the width and height of
        the sample.
    """
    hyp, mosaic_closed = augmentation.hyp, augmentation.is_mosaic_closed(epoch)
    height, width = out.shape[:2]
    if mosaic and not mosaic_closed and rng.random() < hyp.mosaic:
        sample = make_mosaic_mixup(reader, index, hyp=hyp, rng=rng)
    else:
        sample = make_single_image(reader, index, hyp=hyp, hw=(height, width), rng=rng)
    gains = 1 + rng.uniform(-1, 1, size=3) * (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v)
    use_paste_in = not mosaic_closed and rng.random() < hyp.paste_in
    flips = (rng.random(2) < (hyp.flipud, hyp.fliplr)).tolist()
    if use_paste_in:
        jitter_hsv(sample.image, gains, out=sample.image, code=cv2.COLOR_HSV2BGR)
        sample = paste_in(sample, random_crops(reader, rng=rng), rng=rng)
        gains = NO_JITTER
    jitter_hsv(sample.image, gains, out=out, code=cv2.COLOR_HSV2RGB, flips=flips)
    return to_targets(sample.objects, (height, width), flips)


def make_mosaic_mixup(
    reader: ImageReader, index: int, *, hyp: Hyperparameters, rng: np.random.Generator
) -> TrainSample:
    """Return a mosaic, blended with a second one with the probability `hyp.mixup`."""
    sample = make_mosaic(reader, index, hyp=hyp, rng=rng)
    if rng.random() >= hyp.mixup:
        return sample
    other = make_mosaic(reader, int(rng.integers(len(reader.store))), hyp=hyp, rng=rng)
    weight = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
    cv2.addWeighted(sample.image, weight, other.image, 1 - weight, 0, dst=sample.image)
    return TrainSample(image=sample.image, objects=concatenate(sample.objects, other.objects))


def make_single_image(
    reader: ImageReader, index: int, *, hyp: Hyperparameters, hw: tuple[int, int], rng: np.random.Generator
) -> TrainSample:
    """Return one image, letterboxed to `hw` and warped in a single step; boxes enclose their warped corners.

    If the image cannot be read, a random other one is used; after `MAX_TRIES` unreadable images the sample is grey and
    has no objects.
    """
    warp = random_warp(hyp, canvas_hw=hw, out_hw=hw, rng=rng)
    for _ in range(MAX_TRIES):
        source_h, source_w = reader.store.hw(index)
        box = fit_letterbox((source_h, source_w), hw)
        stretch = box.resized_hw[1] / source_w, box.resized_hw[0] / source_h
        scaled = reader.load_scaled(index, scale=warp.scale * max(stretch))
        if scaled is not None:
            pixels, (factor_x, factor_y) = scaled
            corner = box.left, box.top
            image = warp_pixels(pixels, warp.after((stretch[0] / factor_x, stretch[1] / factor_y), corner))
            objects = scale_boxes(reader.store.flat_objects(index), stretch, corner)
            return TrainSample(image=image, objects=warp_objects(objects, warp))
        index = int(rng.integers(len(reader.store)))
    return TrainSample(image=np.full((*hw, 3), GREY, dtype=np.uint8), objects=NO_OBJECTS)


def scale_boxes(objects: FlatObjects, scale_xy: tuple[float, float], corner_xy: tuple[int, int]) -> FlatObjects:
    """Return the boxes, scaled and then shifted, without outlines."""
    scale, corner = np.array(scale_xy * 2, np.float32), np.array(corner_xy * 2, np.float32)
    return FlatObjects(
        boxes=objects.boxes * scale + corner,
        class_ids=objects.class_ids,
        points=NO_POLYGON,
        counts=np.zeros(len(objects), dtype=np.int64),
    )


def jitter_hsv(
    image: Image, gains: DoubleArray, *, out: Image, code: int, flips: Sequence[bool] = (False, False)
) -> None:
    """Multiply hue, saturation and value by `gains`, and flip the image.

    The image is processed in strips: intermediate results then remain in the CPU cache, and the system does not have to
    allocate and free memory for four more images, which takes as long as the arithmetic.

    Args:
        image: uint8 BGR [H, W, 3].
        gains: float64 [3]; hue wraps around, saturation and value are clipped to 255. `NO_JITTER` keeps all values.
        out: uint8 [H, W, 3]; can be `image` if nothing is flipped.
        code: OpenCV conversion from HSV back to BGR or to RGB.
        flips: Flip vertically, flip horizontally.
    """
    (height, width), (vertical, horizontal) = image.shape[:2], flips
    tables = hsv_tables(gains)
    rows = max(1, STRIP_BYTES // (width * 3))
    for first in range(0, height, rows):
        strip = image[first : first + rows]
        if vertical or horizontal:
            strip = cv2.flip(strip, -1 if vertical and horizontal else int(horizontal))  # type: ignore[assignment]
        end = height - first if vertical else first + len(strip)
        target = out[end - len(strip) : end]
        if gains is NO_JITTER:
            cv2.cvtColor(strip, cv2.COLOR_BGR2RGB, dst=target)
            continue
        hsv = cv2.cvtColor(strip, cv2.COLOR_BGR2HSV)
        # One lookup per plane is faster than one lookup with a table of three channels.
        planes = [cv2.LUT(plane, table) for plane, table in zip(cv2.split(hsv), tables, strict=True)]
        cv2.cvtColor(cv2.merge(planes, dst=hsv), code, dst=target)


def hsv_tables(gains: DoubleArray) -> Image:
    """Return lookup tables for hue, saturation and value, uint8 [3, 256]."""
    tables = np.arange(256) * gains[:, None]
    tables[0] %= HUES
    return np.minimum(tables, 255).astype(np.uint8)


def to_targets(objects: Objects, hw: tuple[int, int], flips: Sequence[bool]) -> FloatArray:
    """Return class, centre x, y, width, height as fractions of the flipped image, float32 [N, 5]."""
    boxes = objects.boxes / np.array([hw[1], hw[0]] * 2, dtype=np.float32)
    targets = np.empty((len(objects), 5), dtype=np.float32)
    targets[:, 0] = objects.class_ids
    targets[:, 1:3] = (boxes[:, :2] + boxes[:, 2:]) / 2
    targets[:, 3:] = boxes[:, 2:] - boxes[:, :2]
    for column, is_flipped in zip((2, 1), flips, strict=True):
        if is_flipped:
            targets[:, column] = 1 - targets[:, column]
    return targets
