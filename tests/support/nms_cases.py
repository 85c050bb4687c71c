"""Random and simple head maps, and the bit-exact comparison of the NMS kernels with the NumPy reference.

The reference uses the kernels' own sigmoid (`sigmoid_of`): two correct exponentials may differ by an ulp, which would
change the order of scores. A test compares that sigmoid with NumPy's. All other arithmetic must be identical.
With a `memory` of a real GPU, all of this also works with the real library.
"""

import os
from functools import cache, partial

import numpy as np

from tests.fakes.emulated_kernels import (
    FLOAT32,
    Guarded,
    Heads,
    HostMemory,
    NmsOutputs,
    NmsParams,
    NmsThresholds,
    decoded,
    emulated,
    run_nms,
    sigmoid_of,
)
from tests.support.reference_nms import postprocess
from yolov7_deploy.options import Thresholds

# The shipped sizes, and small ones with which images of a few hundred anchors need several tiles, lists and digits.
BUILDS = {
    "shipped": (),
    "64 threads": ("Y7_NMS_THREADS=64", "Y7_NMS_SELECT_THREADS=64", "Y7_NMS_CAPACITY=97", "Y7_NMS_STAGED=5"),
    "512 threads": ("Y7_NMS_THREADS=512", "Y7_NMS_SELECT_THREADS=128", "Y7_NMS_CAPACITY=700", "Y7_NMS_STAGED=1"),
}


CASES = int(os.environ.get("Y7_NMS_CASES", "150"))  # random heads, over all builds


@cache
def kernels_of(build):
    return emulated("nms.cu", defines=BUILDS[build])


def expected_of(heads, sigmoid, *, conf, iou, max_det, max_candidates, multi_label, class_agnostic):
    """Yield the boxes, scores and classes of each image, and whether max_candidates pairs passed the threshold."""
    thresholds = Thresholds(conf=conf, iou=iou, max_det=max_det, multi_label=multi_label, class_agnostic=class_agnostic)
    for image in decoded(heads, sigmoid):
        scores = image[:, 4:5] * (image[:, 5:] if heads.classes > 1 else 1)
        passes = (scores if multi_label else scores.max(1)) > np.float32(conf)
        yield *postprocess(image, thresholds, max_candidates=max_candidates), passes.sum() >= max_candidates


def assert_equals_the_reference(kernels, heads, *, memory=None, **options):
    """Assert that the kernels equal the reference; return the number of detections."""
    result = run_nms(kernels, heads, memory=memory, **options)
    expected = expected_of(heads, partial(sigmoid_of, kernels, memory=memory), **options)
    for number, (boxes, scores, classes, overflow) in enumerate(expected):
        found = len(scores)
        assert result.num_dets[number] == found
        np.testing.assert_array_equal(result.scores[number, :found], scores)
        np.testing.assert_array_equal(result.classes[number, :found], classes)
        np.testing.assert_array_equal(result.boxes[number, :found], boxes)
        for rest in (result.boxes, result.scores, result.classes):
            assert not rest[number, found:].view(np.int32).any()
        assert result.overflow[number] == overflow
    return int(result.num_dets.sum())


def random_heads(rng, *, classes=None, pairs=4000):
    """Return heads of random shape, dtype and layout with about `pairs` pairs; half of them with many equal logits."""
    classes = classes or int(rng.choice([1, 2, 3, 20, 33, 80, 150]))
    levels = int(rng.integers(1, 5))
    batch = int(rng.choice([1, 1, 3, 8]))
    cells = max(2, pairs // (classes * 3 * levels * batch))
    step = rng.choice([1 / 64, 1 / 4, 1.0, 3.0])
    maps, strides, anchors = [], [], []
    for level in range(levels):
        height = int(rng.integers(1, max(2, int(cells**0.5) * 2)))
        width = max(1, cells // height)
        raw = rng.normal(0, rng.choice([0.5, 2, 8]), (batch, 3, 5 + classes, height, width))
        raw[:, :, 4] += rng.choice([-4, 0, 4])
        raw[:, :, 5:] += rng.choice([-4, 0, 4])
        maps.append((np.round(raw / step) * step).reshape(batch, -1, height, width))
        strides.append(float(rng.choice([8 * 2**level, 8 * 2**level, 6.7])))
        anchors.append(tuple((float(w), float(h)) for w, h in rng.uniform(2, 120, (3, 2))))
    if rng.random() < 0.2:
        for array in maps:
            special = rng.random(array.shape) < 0.05
            array[special] = rng.choice([np.nan, np.inf, -np.inf, 100, -100, 60000], special.sum())
    kind = rng.choice([np.float32, np.float16])
    padding = [None, None, 0, 3][rng.integers(4)]
    return Heads(
        maps=tuple(array.astype(kind) for array in maps),
        strides=tuple(strides),
        anchors=tuple(anchors),
        padding=padding,
    )


def random_options(rng):
    """Return random keyword arguments of run_nms."""
    return {
        "conf": float(rng.choice([0, 0.001, 0.05, 0.25, 0.25, 0.5, 0.9, 1])),
        "iou": float(rng.choice([0, 0.2, 0.45, 0.65, 1])),
        "max_det": int(rng.choice([1, 5, 40, 100, 2000])),
        "max_candidates": int(rng.choice([1, 7, 60, 300, 1500, 30_000])),
        "multi_label": bool(rng.integers(2)),
        "class_agnostic": bool(rng.integers(2)),
    }


def one_random_case(kernels, seed, **settings):
    """Run the random case of a seed (a list of integers); return the number of detections."""
    rng = np.random.default_rng(seed)
    heads, options = random_heads(rng), random_options(rng)
    kernels.seed(seed[-1])
    try:
        return assert_equals_the_reference(kernels, heads, **options, **settings)
    except AssertionError as error:
        raise AssertionError(f"case {seed}, {options}: {error}") from error


def grid(classes, height, width, fill, *, kind=np.float32, stride=8.0, batch=1):
    """Return one level with equal logits: identical boxes within a cell, no overlap between cells."""
    maps = np.full((batch, 3 * (5 + classes), height, width), fill, kind)
    return Heads(maps=(maps,), strides=(stride,), anchors=(((1.0, 1.0), (1.0, 1.0), (1.0, 1.0)),))


DEFAULTS = {"iou": 0.45, "max_det": 100, "max_candidates": 30_000, "multi_label": True, "class_agnostic": False}


class Call:
    """A valid call of y7_nms; tests make one argument invalid."""

    def __init__(self, batch=2, classes=3, max_det=4):
        self.kernels = kernels_of("64 threads")
        self.heads, self.buffers = grid(classes, 2, 2, -9, batch=batch).structs(HostMemory())
        self.params = NmsParams(batch, 1, classes, max_det, 100, FLOAT32)
        shapes = {"num_dets": (batch,), "boxes": (batch, max_det, 4), "scores": (batch, max_det)}
        shapes |= {"classes": (batch, max_det), "overflow": (batch,)}
        self.outputs = {name: Guarded(shape, np.float32) for name, shape in shapes.items()}
        self.structs = NmsOutputs(**{name: buffer.address for name, buffer in self.outputs.items()})
        self.values = Guarded.of(np.array([0.25, 0.45, 1, 0], np.float32))
        self.thresholds = NmsThresholds(*(self.values.address + 4 * index for index in range(4)))
        self.size = self.kernels.y7_nms_workspace(self.params)
        self.workspace = Guarded((self.size,), np.uint8)
        self.arguments = {
            "params": self.params,
            "heads": self.heads,
            "thresholds": self.thresholds,
            "outputs": self.structs,
            "workspace": self.workspace.address,
            "workspace_bytes": self.size,
            "stream": None,
        }

    def status(self, **arguments):
        return self.kernels.y7_nms(*{**self.arguments, **arguments}.values())

    def is_untouched(self):
        return all((buffer.array.view(np.uint8) == 0xAB).all() for buffer in self.outputs.values())
