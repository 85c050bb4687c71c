"""Engines of a small graph or of a real network, for the fake TensorRT and the fake GPU."""

import ctypes
import gc
import platform
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest

from tests.fakes.emulated_kernels import compile_described
from tests.fakes.fake_trt_runtime import RTX, FakeTrt, plan_of
from tests.fakes.faked_cuda import fake_cudart
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.image import fit_letterbox, to_network_input
from yolov7_deploy.metadata import ModelMetadata, NmsMetadata
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes import cuda, cudart
from yolov7_deploy.runtimes.base import open_runtime
from yolov7_deploy.runtimes.cudart import LibcudartBinding
from yolov7_deploy.runtimes.letterbox_kernel import Kernels
from yolov7_deploy.tensorrt.build_record import EngineRecord
from yolov7_deploy.tensorrt.engine import Engine
from yolov7_deploy.tensorrt.plugin_library import PLUGIN_VARIABLE

HW = (64, 96)
SCORES = np.array([0.9, 0.6, 0.3], np.float32)  # scores of the three boxes in every image
FACTORS = np.array([[40], [50], [60]], np.float32)
CAPABILITY = 90  # compute capability of the fake GPU, 9.0
NMS = NmsMetadata(
    kind="plugin",
    conf=0.25,
    iou=0.45,
    max_det=3,
    max_candidates=100,
    multi_label=True,
    class_agnostic=False,
    runtime_thresholds=True,
)
INFO = ModelMetadata(
    variant="custom", class_names=("a", "b", "c"), strides=(8,), anchors=(((1, 1),),), input_hw=HW, nms=NMS
)

_MEANS = """
    as_float = Cast <to = 1> (images)
    means = ReduceMean <keepdims = 0> (as_float, axes)
    rgb = Gather <axis = 1> (means, order)
    unit = Div (rgb, range)
    red_green = Gather <axis = 1> (unit, pair)
    one_row = Unsqueeze (red_green, one)
    rows = Mul (one_row, factors)
    boxes = Add (rows, size)
    none = ReduceSum (unit, one)
    nought = Mul (none, zero)
    scored = Add (scores, nought)
"""
_CONSTANTS = """
    float[1] range = {%s}, int64[3] order = {%s}, int64[2] axes = {%s}, int64[4] pair = {0, 1, 0, 1},
    int64[1] one = {1}, float[1,3,1] factors = {40, 50, 60}, float[1,1,4] size = {0, 0, 9, 9}, float[1] zero = {0},
    float[1,3] scores = {0.9, 0.6, 0.3}
"""
_WITH_NMS = """
<ir_version: 8, opset_import: ["": 18]>
toy (%s images, float[1] conf_threshold, float[1] iou_threshold, float[1] multi_label, float[1] class_agnostic)
 => (float[%s,3] unread, int32[%s,1] num_dets, float[%s,3,4] det_boxes, float[%s,3] det_scores,
     int32[%s,3] det_classes, int32[%s,1] overflow)
<%s, int32[1,3] classes = {0, 1, 2}, int32[1,1] overflowed = {%s}>
{ %s
    is_above = Greater (scored, conf_threshold)
    above = Cast <to = 1> (is_above)
    count = ReduceSum (above, one)
    num_dets = Cast <to = 6> (count)
    det_boxes = Identity (boxes)
    flags = Add (multi_label, class_agnostic)
    unused = Add (iou_threshold, flags)
    no_iou = Mul (unused, zero)
    det_scores = Add (scored, no_iou)
    nought_i = Cast <to = 6> (nought)
    det_classes = Add (classes, nought_i)
    overflow = Add (overflowed, nought_i)
    unread = Identity (unit)
}
"""
_DECODED = """
<ir_version: 8, opset_import: ["": 18]>
toy (%s images) => (float[%s,3,8] output)
<%s, float[1,3,3] each = {1, 0, 0, 0, 1, 0, 0, 0, 1}, int64[1] last = {-1}>
{ %s
    objectness = Unsqueeze (scored, last)
    column = Mul (objectness, zero)
    classes = Add (each, column)
    output = Concat <axis = 2> (boxes, objectness, classes)
}
"""


def toy(batch=1, *, kind="float", decoded=False, overflow=0):
    """Return a graph that finds three boxes with scores SCORES and classes 0, 1, 2; mean colours are coordinates.

    Args:
        batch: Batch size, `None` for a dynamic one.
        kind: Type of `images`: float, float16 or uint8.
        decoded: Return the decoded output, without NMS.
        overflow: Value of the output `overflow`.
    """
    side = "B" if batch is None else str(batch)
    uint8 = kind == "uint8"
    shape = [side, *map(str, HW), "3"] if uint8 else [side, "3", *map(str, HW)]
    images = f"{kind}[{','.join(shape)}]"
    constants = _CONSTANTS % (("255", "2, 1, 0", "1, 2") if uint8 else ("1", "0, 1, 2", "2, 3"))
    if decoded:
        return onnx.parser.parse_model(_DECODED % (images, side, constants, _MEANS))
    return onnx.parser.parse_model(_WITH_NMS % (images, *[side] * 6, constants, overflow, _MEANS))


def expected_boxes(image, letterbox=None):
    """Return the boxes that `toy` detects, xyxy float32 [3, 4] in canvas pixels."""
    letterbox = letterbox or fit_letterbox(image.shape[:2], HW)
    red, green, _ = to_network_input([letterbox.apply(image)])[0].mean((1, 2), dtype=np.float64).astype(np.float32)
    return np.array([[red, green, red, green]]) * FACTORS + np.array([[0, 0, 9, 9]], np.float32)


def make_image(seed, height=48, width=80):
    """Return an image of a random colour with some noise, so that every image has other boxes."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(30, 225, 3)
    return (colour + rng.integers(-30, 30, (height, width, 3))).astype(np.uint8)


def assert_detected(found, image, *, rows=3):
    """Check that these are the first rows of what `toy` detects in this image."""
    np.testing.assert_allclose(found.boxes, expected_boxes(image)[:rows], atol=BOX_TOLERANCE)
    np.testing.assert_allclose(found.scores, SCORES[:rows], rtol=1e-6)
    assert found.class_ids.tolist() == list(range(rows))


BOX_TOLERANCE = 2e-3  # means of 6144 float32 values, times 60; boxes of different images differ by at least a pixel


class TrtEnvironment:
    """A machine with a fake TensorRT and a fake GPU, and engines for it.

    Attributes:
        trt: The module, importable as TensorRT is.
        library: The fake CUDA runtime.
        cuda: A Cuda on it, separate from those of the runtimes.
    """

    def __init__(self, folder, monkeypatch, version="10.3.0"):
        self.folder, self.monkeypatch, self.installed, self.opened = folder, monkeypatch, [], []
        self.library = ctypes.CDLL(str(fake_cudart()))
        self.cuda = cuda.Cuda(LibcudartBinding(str(fake_cudart())))
        self.use(version)
        monkeypatch.setattr(cuda, "cuda_bindings", lambda: iter([LibcudartBinding(str(fake_cudart()))]))
        monkeypatch.setattr(cudart, "_driver", lambda: self.library)
        self.build_kernels()

    def use(self, version):
        """Install another TensorRT version."""
        self.trt = FakeTrt(version, self.library)
        self.installed.append(self.trt)
        self.product = "tensorrt_rtx" if version == RTX else "tensorrt"
        self.monkeypatch.setitem(sys.modules, self.product, self.trt)

    def build_kernels(self):
        """Build the kernels; they are queued on the stream, which the emulated ones do not know."""
        emulated = compile_described("letterbox.cu", capability=CAPABILITY)
        self.monkeypatch.setenv(PLUGIN_VARIABLE, str(emulated))
        launch = Kernels.letterbox

        def letterbox(kernels, *, stream, **what):
            self.trt.queue(stream, lambda: launch(kernels, stream=0, **what))

        self.monkeypatch.setattr(Kernels, "letterbox", letterbox)

    def without_kernels(self):
        """Remove the kernels and the plugin."""
        self.monkeypatch.delenv(PLUGIN_VARIABLE)
        self.monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder))
        self.monkeypatch.setattr("yolov7_deploy.tensorrt.plugin_library.SYSTEM_FOLDERS", ())

    def engine(self, graph=None, *, metadata=INFO, batches=(1, 4), recorded=True, name="toy.engine", **fields):
        """Write an engine that fits this machine, except for the given fields of its record; return its path."""
        plan = plan_of(graph or toy(), self.trt.__version__, batches)
        record = EngineRecord(
            metadata=metadata,
            plan_bytes=len(plan),
            plan_sha256=sha256_hex(plan),
            product=self.product,
            tensorrt=self.trt.__version__,
            compute_capability="" if self.product == "tensorrt_rtx" else "9.0",
            platform=f"{platform.system().lower()}-{platform.machine()}",
        )
        record = replace(record, **fields)
        path = self.folder / name
        Engine(plan=plan, record=record if recorded else None).save(path)
        return path

    def open(self, graph=None, *, device="auto", **options):
        """Open an engine; it is closed at the end of the test."""
        self.opened.append(open_runtime(self.engine(graph, **options), device=device, input_hw=None))
        return self.opened[-1]

    def calls(self):
        """Log the CUDA calls from now on; the returned function returns the names since its last call."""
        log = self.folder / "calls"
        log.touch()
        self.monkeypatch.setenv("FAKE_CUDA_LOG", str(log))
        read = 0

        def new():
            nonlocal read
            lines = log.read_text().split()
            read, since = len(lines), lines[read:]
            return since

        return new


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A machine with TensorRT 10.3 and a GPU; checks that a test frees everything and makes no invalid call."""
    created = TrtEnvironment(tmp_path, monkeypatch)
    before = created.library.fake_cuda_live()
    yield created
    for runtime in created.opened:
        runtime.close()
    assert [trt.violations for trt in created.installed] == [[]] * len(created.installed)
    if created.library.fake_cuda_live() != before:
        gc.collect()  # slow; exceptions keep objects alive by their traceback
    assert created.library.fake_cuda_live() == before


def infer(runtime, images, *, timed=False, hw=HW, **thresholds):
    """Run a list of images."""
    letterboxes = [fit_letterbox(image.shape[:2], hw) for image in images]
    chosen = replace(Thresholds(conf=0.25, max_det=100, multi_label=True), **thresholds)
    return runtime.infer(images, letterboxes, chosen, timed=timed)
