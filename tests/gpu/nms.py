"""The NMS kernels on the GPU: equal to the reference bit by bit, every time the same, and how fast."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np

from tests.fakes.emulated_kernels import FLOAT16, FLOAT32, OK, Heads, NmsOutputs, NmsParams, run_nms
from tests.gpu.environment import Array, CudaMemory, Setting, Stream, times_us
from tests.support.nms_cases import assert_equals_the_reference, random_heads, random_options

CASES, EMULATED_CASES = 3000, 6
CHECK_S = 60.0  # of the part's budget, for random cases
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
ENTRY = {"conf": CONF, "iou": IOU, "max_candidates": MAX_CANDIDATES}
GOAL_US = 40.0
# The same work as small ONNX files, for TensorRT: `prepare` writes them.
END_FILE, END_BATCHES = "nms_end_{kind}_{type}_b{batch}.onnx", (1, 8, 32)


def check(setting: Setting) -> None:
    """Random cases of every mode, whole images of YOLOv7, large batches, and repetition."""
    cuda, kernels = setting.open_cuda(), setting.open_kernels()
    with Stream(cuda) as stream:
        memory = CudaMemory(cuda, stream)
        check_random(setting, kernels, memory)
        check_whole_images(setting, kernels, memory)
        check_large_batches(setting, kernels, memory)
        check_repetition(setting, kernels, memory)


def check_random(setting: Setting, kernels: Any, memory: CudaMemory) -> None:
    """Heads of every shape, type and layout, with ties, NaN and infinities, under every option."""
    started, done, found, overflows = time.monotonic(), 0, 0, 0
    for seed in range(setting.some(CASES, EMULATED_CASES)):
        if time.monotonic() - started > CHECK_S:
            break
        rng = np.random.default_rng([77, seed])
        heads, options = random_heads(rng, pairs=setting.some(4000, 600)), random_options(rng)
        try:
            found += assert_equals_the_reference(kernels, heads, memory=memory, **options)
        except AssertionError as error:
            raise AssertionError(f"random case {seed}, {options}: {error}") from error
        done, overflows = done + 1, overflows + (options["max_candidates"] < 100)
        if done % 200 == 0:
            setting.record("random_cases_so_far", done)
    setting.record("random_cases", {"equal": done, "detections": found, "with_few_candidates": overflows})
    assert found, "not one detection in all cases: nothing was tested"


def check_whole_images(setting: Setting, kernels: Any, memory: CudaMemory) -> None:
    """YOLOv7 at 640 in every mode, type and layout, from empty images to more candidates than enter."""
    modes = list(itertools.product((False, True), (False, True), (np.float32, np.float16), (None, 1)))
    counts = (0, 100, 1000, 20_000)
    results: dict[str, int] = {}
    for number, (multi_label, agnostic, kind, padding) in enumerate(modes[: setting.some(len(modes), 2)]):
        count = counts[number % len(counts)] if not setting.emulated else 100
        heads = yolov7_heads(np.random.default_rng(number), 1, count, kind, padding, scale=setting.some(1, 8))
        options = {"multi_label": multi_label, "class_agnostic": agnostic, "max_det": 300, **ENTRY}
        found = assert_equals_the_reference(kernels, heads, memory=memory, **options)
        mode = f"multi {multi_label}, agnostic {agnostic}, {kind.__name__}, padding {padding}"
        results[f"{number}: {count} pairs, {mode}"] = found
    setting.record("whole_images", results)


def check_large_batches(setting: Setting, kernels: Any, memory: CudaMemory) -> None:
    """Batches of 8 and 64 images of different content."""
    for batch in (3,) if setting.emulated else (8, 64):
        rng = np.random.default_rng(batch)
        heads = yolov7_heads(rng, batch, 200, np.float16, None, scale=setting.some(4, 8))
        options = {"multi_label": True, "class_agnostic": False, "max_det": MAX_DET, **ENTRY}
        found = assert_equals_the_reference(kernels, heads, memory=memory, **options)
        setting.record(f"batch_{batch}_detections", found)


def check_repetition(setting: Setting, kernels: Any, memory: CudaMemory) -> None:
    """The same bytes every time, on an image full of ties."""
    heads = yolov7_heads(np.random.default_rng(3), 4, 3000, np.float16, None, scale=setting.some(1, 8), step=0.5)
    times = setting.some(REPETITIONS, 4)
    outputs = {
        run_nms(kernels, heads, memory=memory, stream=memory.stream.handle, conf=0.1, iou=0.65).bytes()
        for _ in range(times)
    }
    setting.record("repetition", {"runs": times, "different_results": len(outputs)})
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
) -> Heads:
    """Head maps of YOLOv7 at 640 / scale with about `count` (anchor, class) pairs above 0.25 an image, in clusters.

    Args:
        rng: Source of the values.
        batch: Images.
        count: Wanted pairs.
        kind: float32 or float16.
        padding: As `Heads` takes it.
        scale: Divides the image's sides.
        step: Grid that all logits are rounded to, so that scores tie; 0 for none.
    """
    maps: list[Array] = []
    shares = (0.6, 0.3, 0.1)
    for side, share in zip((side // scale for side in SIDES), shares, strict=True):
        raw = rng.normal(-8, 1, (batch, 3, 5 + CLASSES, side, side)).astype(np.float32)
        raw[:, :, :4] = rng.normal(0, 1, (batch, 3, 4, side, side))
        for image in range(batch):
            _place(rng, raw[image], round(count * share))
        if step:
            raw = np.round(raw / step) * step
        maps.append(raw.reshape(batch, -1, side, side).astype(kind))
    return Heads(maps=tuple(maps), strides=STRIDES, anchors=ANCHORS, padding=padding)


def _place(rng: np.random.Generator, raw: Array, count: int) -> None:
    """Objects in raw [3, 5 + C, side, side]: all anchors of 2 x 2 cells see one, as in a trained head."""
    side = raw.shape[-1]
    for first in range(0, count, 12):
        row, column = rng.integers(0, side - 1, 2)
        number = min(12, count - first)
        spots = rng.permutation(12)[:number]
        anchor, y, x = spots // 4, row + spots // 2 % 2, column + spots % 2
        raw[anchor, 4, y, x] = rng.normal(2.5, 0.7, number)
        raw[anchor, 5 + int(rng.integers(CLASSES)), y, x] = rng.normal(3, 0.7, number)


class Resident:
    """A call of y7_nms with everything on the GPU, to be queued again and again."""

    def __init__(self, kernels: Any, memory: CudaMemory, heads: Heads, batch: int) -> None:
        self.kernels, self.stream = kernels, memory.stream
        few = len(heads.maps[0])
        self.structs, self.kept_alive = heads.structs(memory)
        self.heads = [self._repeated(memory, buffer, batch // few) for buffer in self.kept_alive]
        for struct, buffer in zip(self.structs, self.heads, strict=True):
            struct.data = buffer.address
        kind = {"float32": FLOAT32, "float16": FLOAT16}[heads.maps[0].dtype.name]
        self.params = NmsParams(batch, len(self.structs), heads.classes, MAX_DET, MAX_CANDIDATES, 1, 0, kind)
        shapes = {"num_dets": (batch, 1), "boxes": (batch, MAX_DET, 4), "scores": (batch, MAX_DET)}
        shapes |= {"classes": (batch, MAX_DET), "overflow": (batch, 1)}
        self.buffers = {name: memory.garbage(shape, np.float32) for name, shape in shapes.items()}
        self.outputs = NmsOutputs(**{name: buffer.address for name, buffer in self.buffers.items()})
        self.thresholds = [memory.upload(np.array([value], np.float32)) for value in (CONF, IOU)]
        self.workspace_bytes = kernels.y7_nms_workspace(self.params)
        self.workspace = memory.garbage((self.workspace_bytes,), np.uint8)

    @staticmethod
    def _repeated(memory: CudaMemory, buffer: Any, times: int) -> Any:
        """The images of a buffer again and again, copied on the device."""
        made = memory.garbage((buffer.nbytes * times,), np.uint8) if times > 1 else buffer
        for number in range(times if times > 1 else 0):
            memory.stream.copy(made.address + number * buffer.nbytes, buffer.address, buffer.nbytes)
        memory.stream.synchronize()
        return made

    def __call__(self) -> None:
        """Queues it."""
        conf, iou = (threshold.address for threshold in self.thresholds)
        status = self.kernels.y7_nms(
            self.params,
            self.structs,
            conf,
            iou,
            self.outputs,
            self.workspace.address,
            self.workspace_bytes,
            self.stream.handle,
        )
        assert status == OK, self.kernels.status_text(status)


def measure(setting: Setting) -> None:
    """Times by number of candidates, batch, type and layout."""
    cuda, kernels = setting.open_cuda(), setting.open_kernels()
    rows: list[dict[str, object]] = []
    combinations = itertools.product((300, 100, 1000, 4000), (np.float16, np.float32), (None, 1))
    for count, kind, padding in itertools.islice(combinations, setting.some(1000, 2)):
        heads = yolov7_heads(np.random.default_rng(count), 4, count, kind, padding, scale=setting.some(1, 8))
        for batch in (1, 8, 32, 64)[: setting.some(4, 1)]:
            some = replace(heads, maps=tuple(level[:batch] for level in heads.maps))
            with Stream(cuda) as stream:
                memory = CudaMemory(cuda, stream, guard=0)
                work = Resident(kernels, memory, some, batch)
                times = times_us(stream, work, rounds=setting.some(200, 3))
                found = memory.download(work.buffers["num_dets"]).view(np.int32)
            row = {"type": kind.__name__, "layout": "linear" if padding is None else "channels-last", "pairs": count}
            rows.append({**row, "batch": batch, "detections": int(found[0, 0]), **times})
            setting.record("rows", rows)
    best = [row for row in rows if row["batch"] == 1 and row["pairs"] == 300]
    slowest = max(float(str(row["graph_us"])) for row in best)
    setting.record("batch_1_300_pairs", {"slowest_graph_us": slowest, "goal_us": GOAL_US, "met": slowest <= GOAL_US})
