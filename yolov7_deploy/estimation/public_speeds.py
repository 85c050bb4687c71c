"""Published speeds of YOLOv7 networks: the data that the estimator is fitted on and evaluated with.

All are as their sources report them; none was measured again. `scope` states what a time includes besides the network.
Rows that include work of the host are never used for fitting; rows with NMS inside the engine are.
"""

from __future__ import annotations

from dataclasses import dataclass

from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.paper import paper_row

# The seven variants whose speed is in the paper.
PAPER_VARIANTS = (
    "yolov7-tiny-silu",
    "yolov7",
    "yolov7x",
    "yolov7-w6",
    "yolov7-e6",
    "yolov7-d6",
    "yolov7-e6e",
)
NETWORK = "network only"


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicSpeed:
    """One published time.

    Attributes:
        variant: Official name.
        device: Name in `DEVICES`.
        runtime: `torch` or `tensorrt`.
        precision: `fp16` or `int8`.
        batch: Images per pass.
        input_hw: Height and width of the network's input in pixels.
        ms: Milliseconds of one pass.
        source: Where it was published.
        scope: What the time includes.
    """

    variant: str
    device: str
    runtime: str
    precision: str
    batch: int
    input_hw: tuple[int, int]
    ms: float
    source: str
    scope: str = NETWORK

    @property
    def fps(self) -> float:
        """Images per second."""
        return 1e3 * self.batch / self.ms


def paper_canvas(variant: str) -> tuple[int, int]:
    """Return the height and width that represent the images of the paper's speeds.

    The authors' speed task letterboxes every image to a rectangle: the longer side is the size in the table, the other
    side is rounded up to a multiple of the stride. Over 82 images of COCO val2017 the median canvas has three quarters
    of the square, as for an image of 640x480; the mean is 0.73.
    """
    size = find_variant(variant).size
    return size * 3 // 4, size


def paper_speeds() -> tuple[PublicSpeed, ...]:
    """Return the V100 rows of the paper and the official README: batch 1 and batch 32, PyTorch FP16."""
    rows = []
    for variant in PAPER_VARIANTS:
        row = paper_row(variant)
        assert row.fps is not None and row.batch32_ms is not None
        rows += [_paper_speed(variant, 1, 1e3 / row.fps), _paper_speed(variant, 32, 32 * row.batch32_ms)]
    return tuple(rows)


def _paper_speed(variant: str, batch: int, ms: float) -> PublicSpeed:
    return PublicSpeed(
        variant=variant,
        device="v100",
        runtime="torch",
        precision="fp16",
        batch=batch,
        input_hw=paper_canvas(variant),
        ms=ms,
        source="arXiv 2207.02696, Table 2" if batch == 1 else "README of github.com/WongKinYiu/yolov7",
    )


def _square(
    variant: str, device: str, precision: str, batch: int, ms: float, source: str, scope: str = NETWORK
) -> PublicSpeed:
    size = find_variant(variant).size
    return PublicSpeed(
        variant=variant,
        device=device,
        runtime="tensorrt",
        precision=precision,
        batch=batch,
        input_hw=(size, size),
        ms=ms,
        source=source,
        scope=scope,
    )


_DEEPSTREAM = "github.com/NVIDIA-AI-IOT/yolo_deepstream, README (trtexec)"
_QAT = "github.com/NVIDIA-AI-IOT/yolo_deepstream, yolov7_qat/README (trtexec, CUDA graph)"
_PADDLE = "github.com/PaddlePaddle/PaddleYOLO, MODEL_ZOO (TensorRT 8.0.3)"
_TRITON = "github.com/levipereira/triton-server-yolo (TensorRT 8.6.1)"
_PIPELINE = "whole DeepStream pipeline, decoding of video to NMS"

# Used for fitting and evaluation.
TENSORRT_SPEEDS = (
    _square("yolov7", "t4", "fp16", 1, 1e3 / 132, _DEEPSTREAM),
    _square("yolov7", "t4", "fp16", 16, 16e3 / 169, _DEEPSTREAM),
    _square("yolov7", "t4", "int8", 1, 1e3 / 208, _DEEPSTREAM),
    _square("yolov7", "t4", "int8", 16, 16e3 / 305, _DEEPSTREAM),
    _square("yolov7", "t4", "fp16", 1, 7.4, _PADDLE),
    _square("yolov7x", "t4", "fp16", 1, 12.2, _PADDLE),
    _square("yolov7-w6", "t4", "fp16", 1, 25.5, _PADDLE),
    _square("yolov7-e6", "t4", "fp16", 1, 31.1, _PADDLE),
    _square("yolov7-d6", "t4", "fp16", 1, 37.4, _PADDLE),
    _square("yolov7-e6e", "t4", "fp16", 1, 48.7, _PADDLE),
    _square("yolov7", "agx-orin", "fp16", 1, 1e3 / 140, _QAT),
    _square("yolov7", "agx-orin", "fp16", 16, 16e3 / 168, _QAT),
    _square("yolov7", "agx-orin", "int8", 1, 1e3 / 207, _QAT),
    _square("yolov7", "agx-orin", "int8", 16, 16e3 / 264, _QAT),
    _square("yolov7", "rtx-4090", "fp16", 1, 1.02, _TRITON),
    _square("yolov7x", "rtx-4090", "fp16", 1, 1.64, _TRITON),
    _square("yolov7", "rtx-3090", "fp16", 8, 13.5, "github.com/WongKinYiu/yolov7, deploy/triton-inference-server",
            "network and EfficientNMS"),
    _square("yolov7-tiny", "rtx-3090", "fp16", 16, 16e3 / 1900, "github.com/WongKinYiu/yolov7, PR 280",
            "network and NMS"),
    _square("yolov7-tiny", "orin-nx", "fp16", 1, 6.01, "github.com/ouyanghaodong/DEYO, issue 1 (jetson_clocks)"),
)  # fmt: skip

# Used for evaluation only: times that include more than the GPU's work, and PyTorch on another GPU than the paper's.
EVALUATION_ONLY = (
    _square("yolov7", "v100", "fp16", 1, 1e3 / 226, "github.com/marcoslucianops/DeepStream-Yolo", _PIPELINE),
    _square("yolov7x", "v100", "fp16", 1, 1e3 / 155.1, "github.com/marcoslucianops/DeepStream-Yolo", _PIPELINE),
    _square("yolov7-tiny", "xavier-nx", "fp16", 1, 1e3 / 65, "github.com/WongKinYiu/yolov7, issue 703",
            "a C++ program without NMS"),
    *(
        PublicSpeed(variant=variant, device="t4", runtime="torch", precision="fp16", batch=batch, input_hw=canvas,
                    ms=ms, source="github.com/WongKinYiu/yolov7, comparison notebooks (Colab)")
        # Midpoints of the printed ranges. The accuracy task pads half a stride, which makes its median canvas larger.
        for variant, batch, canvas, ms in (
            ("yolov7", 1, (512, 672), 13.2), ("yolov7", 32, (512, 672), 32 * 9.45), ("yolov7-e6", 1, (1024, 1344), 46.6)
        )
    ),
)  # fmt: skip
