"""The NMS kernels on the GPU: bit-equal to the reference, deterministic, and their speed."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np

from tests.fakes.emulated_kernels import FLOAT16, FLOAT32, OK, Heads, NmsOutputs, NmsParams, NmsThresholds, run_nms
from tests.gpu.environment import Array, CudaMemory, Environment, Stream, times_us
from tests.support.nms_cases import assert_equals_the_reference, random_heads, random_options

CASES, EMULATED_CASES = 3000, 6
CHECK_S = 60.0  # time for random cases
REPETITIONS = 100
# YOLOv7's head at 640 x 640.
SIDES, STRIDES = (80, 40, 20), (8.0, 16.0, 32.0)
ANCHORS = (
    ((12.0, 16.0), (19.0, 36.0), (40.0, 28.0)),
    ((36.0, 75.0), (76.0, 55.0), (72.0, 146.0)),
    ((142.0, 110.0), (192.0, 243.0), (459.0, 401.0)),
)
CLASSES = 80
CONF, IOU, MAX_DET, MAX_CANDIDATES = 0.25, 0.45, 100, 3840
NMS_OPTIONS = {"conf": CONF, "iou": IOU, "max_candidates": MAX_CANDIDATES}
TARGET_US = 40.0
# Pairs, whether those of a group overlap, and the threshold: photographs at the default threshold, then as in `y7 val`,
# and images without any overlap, in which NMS has nothing to remove.
MEASURED = (
    (300, True, CONF),
    (300, False, CONF),
    (4000, True, 0.001),
    (100, False, CONF),
    (1000, False, CONF),
    (4000, False, CONF),
)
# The same work as small ONNX files for TensorRT, written by `prepare`.
END_FILE, END_BATCHES = "nms_end_{kind}_{type}_b{batch}.onnx", (1, 8, 32)


def check(env: Environment) -> None:
    """Check random cases in every mode, complete YOLOv7 heads, large batches, and determinism."""
    cuda, kernels = env.open_cuda(), env.open_kernels()
    with Stream(cuda) as stream:
        memory = CudaMemory(cuda, stream)
        check_random(env, kernels, memory)
        check_complete_heads(env, kernels, memory)
        check_large_batches(env, kernels, memory)
        check_repetition(env, kernels, memory)


def check_random(env: Environment, kernels: Any, memory: CudaMemory) -> None:
    """Compare heads of every shape, type and layout, with ties, NaN and infinities, for all options."""
    started, done, found, overflows = time.monotonic(), 0, 0, 0
    for seed in range(env.choose(CASES, EMULATED_CASES)):
        if time.monotonic() - started > CHECK_S:
            break
        rng = np.random.default_rng([77, seed])
        heads, options = random_heads(rng, pairs=env.choose(4000, 600)), random_options(rng)
        try:
            found += assert_equals_the_reference(kernels, heads, memory=memory, **options)
        except AssertionError as error:
            raise AssertionError(f"random case {seed}, {options}: {error}") from error
        done, overflows = done + 1, overflows + (options["max_candidates"] < 100)
        if done % 200 == 0:
            env.record("random_cases_so_far", done)
    env.record("random_cases", {"equal": done, "detections": found, "with_few_candidates": overflows})
    assert found, "no detection in any case: nothing was tested"


def check_complete_heads(env: Environment, kernels: Any, memory: CudaMemory) -> None:
    """Compare heads of YOLOv7 at 640 in every mode, type and layout, from no candidates to more than the maximum."""
    modes = list(itertools.product((False, True), (False, True), (np.float32, np.float16), (None, 1)))
    counts = (0, 100, 1000, 20_000)
    results: dict[str, int] = {}
    for number, (multi_label, agnostic, kind, padding) in enumerate(modes[: env.choose(len(modes), 2)]):
        count = counts[number % len(counts)] if not env.emulated else 100
        heads = yolov7_heads(np.random.default_rng(number), 1, count, kind, padding, scale=env.choose(1, 8))
        options = {"multi_label": multi_label, "class_agnostic": agnostic, "max_det": 300, **NMS_OPTIONS}
        found = assert_equals_the_reference(kernels, heads, memory=memory, **options)
        mode = f"multi {multi_label}, agnostic {agnostic}, {kind.__name__}, padding {padding}"
        results[f"{number}: {count} pairs, {mode}"] = found
    env.record("complete_heads", results)


def check_large_batches(env: Environment, kernels: Any, memory: CudaMemory) -> None:
    """Compare batches of 8 and 64 different images."""
    for batch in (3,) if env.emulated else (8, 64):
        rng = np.random.default_rng(batch)
        heads = yolov7_heads(rng, batch, 200, np.float16, None, scale=env.choose(4, 8))
        options = {"multi_label": True, "class_agnostic": False, "max_det": MAX_DET, **NMS_OPTIONS}
        found = assert_equals_the_reference(kernels, heads, memory=memory, **options)
        env.record(f"batch_{batch}_detections", found)


def check_repetition(env: Environment, kernels: Any, memory: CudaMemory) -> None:
    """Check that repeated calls return the same bytes, on images with many equal scores."""
    heads = yolov7_heads(np.random.default_rng(3), 4, 3000, np.float16, None, scale=env.choose(1, 8), step=0.5)
    times = env.choose(REPETITIONS, 4)
    outputs = {
        run_nms(kernels, heads, memory=memory, stream=memory.stream.handle, conf=0.1, iou=0.65).bytes()
        for _ in range(times)
    }
    env.record("repetition", {"runs": times, "different_results": len(outputs)})
    assert len(outputs) == 1, "the same input gave different bytes"


def yolov7_heads(
    rng: np.random.Generator,
    batch: int,
    count: int,
    kind: type,
    padding: int | None,
    *,
    scale: int = 1,
    step: float = 0.0,
    overlap: bool = False,
) -> Heads:
    """Return head maps of YOLOv7 at 640 / scale with about `count` (anchor, class) pairs above 0.25 per image.

    The pairs form groups of neighbouring cells, as those of a trained network do.

    Args:
        rng: Random generator of the values.
        batch: Number of images.
        count: Number of pairs per image.
        kind: float32 or float16.
        padding: Argument of `Heads`.
        scale: Divisor of the image size.
        step: Grid to which all logits are rounded, so that scores are equal; 0 for none.
        overlap: The pairs of a group have nearly the same box, so NMS keeps one of each; otherwise random boxes.
    """
    maps: list[Array] = []
    shares = (0.6, 0.3, 0.1)
    for level, share in enumerate(shares):
        side = SIDES[level] // scale
        anchors = np.array(ANCHORS[level]) if overlap else None
        raw = rng.normal(-8, 1, (batch, 3, 5 + CLASSES, side, side)).astype(np.float32)
        raw[:, :, :4] = rng.normal(0, 1, (batch, 3, 4, side, side))
        for image in range(batch):
            _add_objects(rng, raw[image], round(count * share), anchors)
        if step:
            raw = np.round(raw / step) * step
        maps.append(raw.reshape(batch, -1, side, side).astype(kind))
    return Heads(maps=tuple(maps), strides=STRIDES, anchors=ANCHORS, padding=padding)


def _add_objects(rng: np.random.Generator, raw: Array, count: int, anchors: Array | None) -> None:
    """Add objects to raw [3, 5 + C, side, side]: all anchors of 2 x 2 cells detect each, as in a trained head.

    With `anchors` [3, 2] their boxes nearly agree: their centre is the corner between the cells, and their size is the
    geometric mean of the anchors. The logits follow from the decoding, x = 2 sigmoid(t) - 0.5 + cell and
    w = (2 sigmoid(t))^2 anchor.
    """
    side = raw.shape[-1]
    for first in range(0, count, 12):
        row, column = rng.integers(0, side - 1, 2)
        number = min(12, count - first)
        positions = rng.permutation(12)[:number]
        anchor, y, x = positions // 4, row + positions // 2 % 2, column + positions % 2
        raw[anchor, 4, y, x] = rng.normal(2.5, 0.7, number)
        raw[anchor, 5 + int(rng.integers(CLASSES)), y, x] = rng.normal(3, 0.7, number)
        if anchors is not None:
            offsets = np.stack([column + 1 - x, row + 1 - y], axis=1)  # of the centre from each cell
            sizes = np.sqrt(np.exp(np.log(anchors).mean(axis=0)) / anchors[anchor])
            shares = np.concatenate([(offsets + 0.5) / 2, sizes / 2], axis=1)
            raw[anchor, :4, y, x] = np.log(shares / (1 - shares)) + rng.normal(0, 0.05, (number, 4))


class NmsCall:
    """A call of y7_nms with all arguments on the GPU, which can be enqueued repeatedly."""

    def __init__(self, kernels: Any, memory: CudaMemory, heads: Heads, batch: int, *, conf: float = CONF) -> None:
        self.kernels, self.stream = kernels, memory.stream
        images = len(heads.maps[0])
        self.structs, self.kept_alive = heads.structs(memory)
        self.heads = [self._repeated(memory, buffer, batch // images) for buffer in self.kept_alive]
        for struct, buffer in zip(self.structs, self.heads, strict=True):
            struct.data = buffer.address
        kind = {"float32": FLOAT32, "float16": FLOAT16}[heads.maps[0].dtype.name]
        self.params = NmsParams(batch, len(self.structs), heads.classes, MAX_DET, MAX_CANDIDATES, kind)
        shapes = {"num_dets": (batch, 1), "boxes": (batch, MAX_DET, 4), "scores": (batch, MAX_DET)}
        shapes |= {"classes": (batch, MAX_DET), "overflow": (batch, 1)}
        self.buffers = {name: memory.garbage(shape, np.float32) for name, shape in shapes.items()}
        self.outputs = NmsOutputs(**{name: buffer.address for name, buffer in self.buffers.items()})
        self.thresholds = [memory.upload(np.array([value], np.float32)) for value in (conf, IOU, 1, 0)]
        self.workspace_bytes = kernels.y7_nms_workspace(self.params)
        self.workspace = memory.garbage((self.workspace_bytes,), np.uint8)

    @staticmethod
    def _repeated(memory: CudaMemory, buffer: Any, times: int) -> Any:
        """Return a buffer with the images of another repeated, copied on the device."""
        made = memory.garbage((buffer.nbytes * times,), np.uint8) if times > 1 else buffer
        for number in range(times if times > 1 else 0):
            memory.stream.copy(made.address + number * buffer.nbytes, buffer.address, buffer.nbytes)
        memory.stream.synchronize()
        return made

    def __call__(self) -> None:
        """Enqueue the call."""
        thresholds = NmsThresholds(*(threshold.address for threshold in self.thresholds))
        status = self.kernels.y7_nms(
            self.params,
            self.structs,
            thresholds,
            self.outputs,
            self.workspace.address,
            self.workspace_bytes,
            self.stream.handle,
        )
        assert status == OK, self.kernels.status_text(status)


def measure(env: Environment) -> None:
    """Measure the time by number and overlap of the candidates, threshold, batch size, type and layout."""
    cuda, kernels = env.open_cuda(), env.open_kernels()
    rows: list[dict[str, object]] = []
    combinations = itertools.product(MEASURED, (np.float16, np.float32), (None, 1))
    for (count, overlap, conf), kind, padding in itertools.islice(combinations, env.choose(1000, 6)):
        rng, scale = np.random.default_rng(count), env.choose(1, 8)
        heads = yolov7_heads(rng, 4, count, kind, padding, scale=scale, overlap=overlap)
        for batch in (1, 8, 32, 64)[: env.choose(4, 1)]:
            subset = replace(heads, maps=tuple(level[:batch] for level in heads.maps))
            with Stream(cuda) as stream:
                memory = CudaMemory(cuda, stream, guard=0)
                work = NmsCall(kernels, memory, subset, batch, conf=conf)
                times = times_us(stream, work, rounds=env.choose(200, 3))
                found = memory.download(work.buffers["num_dets"]).view(np.int32)
            row = {"type": kind.__name__, "layout": "linear" if padding is None else "channels-last", "pairs": count}
            row |= {"overlap": overlap, "conf": conf}
            rows.append({**row, "batch": batch, "detections": int(found[0, 0]), **times})
            env.record("rows", rows)
    best = [row for row in rows if row["batch"] == 1 and row["pairs"] == 300]
    slowest = max(float(str(row["graph_us"])) for row in best)
    env.record("batch_1_300_pairs", {"slowest_graph_us": slowest, "target_us": TARGET_US, "met": slowest <= TARGET_US})
