"""The tables of the YOLOv7 paper (arXiv 2207.02696) as data, with all rows.

Numbers are as printed: AP in percent, parameters in millions, GFLOPs (two operations per multiply-accumulate).
Speeds are PyTorch FP16 on the named GPU, the forward pass of the network only: no NMS, no TensorRT, batch 1.
Table 9 repeats Table 2 without the columns by object size and adds slower detectors, so it is built from Table 2.

Note before comparing: the parameters and FLOPs of YOLOv7-D6 are those of its training graph (deployed
it has 133.8M and 702.6G), and FLOPs are of square inputs while speeds are of letterboxed ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from yolov7_deploy._text import suggest
from yolov7_deploy.errors import UsageError

PAPER = "arXiv 2207.02696"
README = "github.com/WongKinYiu/yolov7, README"

# Official variant names, and the names in the paper.
VARIANTS = {
    "yolov7-tiny": "YOLOv7-tiny",
    "yolov7-tiny-silu": "YOLOv7-tiny-SiLU",
    "yolov7": "YOLOv7",
    "yolov7x": "YOLOv7-X",
    "yolov7-w6": "YOLOv7-W6",
    "yolov7-e6": "YOLOv7-E6",
    "yolov7-d6": "YOLOv7-D6",
    "yolov7-e6e": "YOLOv7-E6E",
}

# Networks of the ablations in tables 3 to 5 that are not official variants, and the names of their rows.
ABLATIONS = {
    "yolov7x-light": "base (v7-X light)",
    "yolov7x-width": "width only (1.25 w)",
    "yolov7x-depth": "depth only (2.0 d)",
    "yolov7-elan3": "base (3-S ELAN)",
    "yolov7-elan3-a": "Figure 6 (a)",
    "yolov7-elan3-b": "Figure 6 (b)",
    "yolov7-elan3-c": "Figure 6 (c)",
    "yolov7-elan3-d": "Figure 6 (d)",
    "yolov7-elan3-e": "Figure 6 (e)",
    "yolov7-elan3-n": "Figure 6 (a) with RepConvN",
    "yolor-csp": "YOLOR-CSP",
    "yolor-csp-reprcsp": "RepRCSP (YOLOR-CSP)",
    "yolor-w6": "YOLOR-W6",
    "yolor-w6-repcsp": "RepCSP (YOLOR-W6)",
    "yolor-w6-rcsp": "RCSP (YOLOR-W6)",
    "yolor-w6-reprcsp": "RepRCSP (YOLOR-W6)",
}

# Milliseconds per image at batch 32 on a V100: README for the table of six, section 8 of the paper for tiny,
# issue 77 of the official repository for tiny-silu.
BATCH32_MS = {
    "yolov7-tiny": 0.4,
    "yolov7-tiny-silu": 0.8,
    "yolov7": 2.8,
    "yolov7x": 4.3,
    "yolov7-w6": 7.6,
    "yolov7-e6": 12.3,
    "yolov7-d6": 15.0,
    "yolov7-e6e": 18.7,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """Average precision in percent; `None` where the paper prints a dash or has no such column."""

    ap: float
    ap50: float | None = None
    ap75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRow:
    """One detector in the paper.

    Attributes:
        model: Name as printed, without the citation.
        params_m: Millions of parameters.
        gflops: 10^9 operations at `size`.
        size: Longer side of the input in pixels; `None` where it is not printed.
        fps: Images per second at batch 1 on `device`.
        device: `V100` or `A100`; empty where no speed is given.
        batch32_ms: Milliseconds per image at batch 32 on a V100.
        val: AP on COCO val2017.
        test: AP on COCO test-dev.
        source: Tables and pages of the numbers.
    """

    model: str
    params_m: float | None
    gflops: float | None
    size: int | None
    fps: float | None = None
    device: str = ""
    batch32_ms: float | None = None
    val: Precision | None = None
    test: Precision | None = None
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingRow:
    """One row of Table 10: AP of YOLOv7-X on val2017 in percent, by precision and NMS threshold."""

    model: str
    precision: str
    iou: float
    ap_val: float
    source: str = f"{PAPER}, Table 10"


def _baseline(model: str, params_m: float, gflops: float, size: int, *val: float) -> PaperRow:
    """Return a row of Table 1; `val` is AP, AP50, AP75, small, medium, large."""
    ap, ap50, ap75, small, medium, large = val
    precision = Precision(ap=ap, ap50=ap50, ap75=ap75, ap_small=small, ap_medium=medium, ap_large=large)
    return PaperRow(model=model, params_m=params_m, gflops=gflops, size=size, val=precision, source=f"{PAPER}, Table 1")


def _detector(
    model: str,
    params_m: float | None,
    gflops: float | None,
    size: int | None,
    fps: float,
    ap_test: float | None,
    ap_val: float,
    *test: float,
    table: int = 2,
    device: str = "V100",
) -> PaperRow:
    """Return a row of Table 2 or 9; `test` is AP50, AP75 and, in Table 2, small, medium, large."""
    ap50, ap75, small, medium, large = (*test, None, None, None, None, None)[:5]
    return PaperRow(
        model=model,
        params_m=params_m,
        gflops=gflops,
        size=size,
        fps=fps,
        device=device,
        val=Precision(ap=ap_val),
        test=None
        if ap_test is None
        else Precision(ap=ap_test, ap50=ap50, ap75=ap75, ap_small=small, ap_medium=medium, ap_large=large),
        source=f"{PAPER}, Table {table}",
    )


TABLE_1 = (
    _baseline("YOLOv4", 64.4, 142.8, 640, 49.7, 68.2, 54.3, 32.9, 54.8, 63.7),
    _baseline("YOLOR-u5 (r6.1)", 46.5, 109.1, 640, 50.2, 68.7, 54.6, 33.2, 55.5, 63.7),
    _baseline("YOLOv4-CSP", 52.9, 120.4, 640, 50.3, 68.6, 54.9, 34.2, 55.6, 65.1),
    _baseline("YOLOR-CSP", 52.9, 120.4, 640, 50.8, 69.5, 55.3, 33.7, 56.0, 65.4),
    _baseline("YOLOv7", 36.9, 104.7, 640, 51.2, 69.7, 55.5, 35.2, 56.0, 66.7),
    _baseline("YOLOR-CSP-X", 96.9, 226.8, 640, 52.7, 71.3, 57.4, 36.3, 57.5, 68.3),
    _baseline("YOLOv7-X", 71.3, 189.9, 640, 52.9, 71.1, 57.5, 36.9, 57.7, 68.6),
    _baseline("YOLOv4-tiny", 6.1, 6.9, 416, 24.9, 42.1, 25.7, 8.7, 28.4, 39.2),
    _baseline("YOLOv7-tiny", 6.2, 5.8, 416, 35.2, 52.8, 37.3, 15.7, 38.0, 53.4),
    _baseline("YOLOv4-tiny-3l", 8.7, 5.2, 320, 30.8, 47.3, 32.2, 10.9, 31.9, 51.5),
    _baseline("YOLOv7-tiny", 6.2, 3.5, 320, 30.8, 47.3, 32.2, 10.0, 31.9, 52.2),
    _baseline("YOLOR-E6", 115.8, 683.2, 1280, 55.7, 73.2, 60.7, 40.1, 60.4, 69.2),
    _baseline("YOLOv7-E6", 97.2, 515.2, 1280, 55.9, 73.5, 61.1, 40.6, 60.3, 70.0),
    _baseline("YOLOR-D6", 151.7, 935.6, 1280, 56.1, 73.9, 61.2, 42.4, 60.5, 69.9),
    _baseline("YOLOv7-D6", 154.7, 806.8, 1280, 56.3, 73.8, 61.4, 41.3, 60.6, 70.1),
    _baseline("YOLOv7-E6E", 151.7, 843.2, 1280, 56.8, 74.4, 62.1, 40.8, 62.1, 70.6),
)

TABLE_2 = (
    _detector("YOLOX-S", 9.0, 26.8, 640, 102, 40.5, 40.5),
    _detector("YOLOX-M", 25.3, 73.8, 640, 81, 47.2, 46.9),
    _detector("YOLOX-L", 54.2, 155.6, 640, 69, 50.1, 49.7),
    _detector("YOLOX-X", 99.1, 281.9, 640, 58, 51.5, 51.1),
    _detector("PPYOLOE-S", 7.9, 17.4, 640, 208, 43.1, 42.7, 60.5, 46.6, 23.2, 46.4, 56.9),
    _detector("PPYOLOE-M", 23.4, 49.9, 640, 123, 48.9, 48.6, 66.5, 53.0, 28.6, 52.9, 63.8),
    _detector("PPYOLOE-L", 52.2, 110.1, 640, 78, 51.4, 50.9, 68.9, 55.6, 31.4, 55.3, 66.1),
    _detector("PPYOLOE-X", 98.4, 206.6, 640, 45, 52.2, 51.9, 69.9, 56.5, 33.3, 56.3, 66.4),
    _detector("YOLOv5-N (r6.1)", 1.9, 4.5, 640, 159, None, 28.0),
    _detector("YOLOv5-S (r6.1)", 7.2, 16.5, 640, 156, None, 37.4),
    _detector("YOLOv5-M (r6.1)", 21.2, 49.0, 640, 122, None, 45.4),
    _detector("YOLOv5-L (r6.1)", 46.5, 109.1, 640, 99, None, 49.0),
    _detector("YOLOv5-X (r6.1)", 86.7, 205.7, 640, 83, None, 50.7),
    _detector("YOLOR-CSP", 52.9, 120.4, 640, 106, 51.1, 50.8, 69.6, 55.7, 31.7, 55.3, 64.7),
    _detector("YOLOR-CSP-X", 96.9, 226.8, 640, 87, 53.0, 52.7, 71.4, 57.9, 33.7, 57.1, 66.8),
    _detector("YOLOv7-tiny-SiLU", 6.2, 13.8, 640, 286, 38.7, 38.7, 56.7, 41.7, 18.8, 42.4, 51.9),
    _detector("YOLOv7", 36.9, 104.7, 640, 161, 51.4, 51.2, 69.7, 55.9, 31.8, 55.5, 65.0),
    _detector("YOLOv7-X", 71.3, 189.9, 640, 114, 53.1, 52.9, 71.2, 57.8, 33.8, 57.1, 67.4),
    _detector("YOLOv5-N6 (r6.1)", 3.2, 18.4, 1280, 123, None, 36.0),
    _detector("YOLOv5-S6 (r6.1)", 12.6, 67.2, 1280, 122, None, 44.8),
    _detector("YOLOv5-M6 (r6.1)", 35.7, 200.0, 1280, 90, None, 51.3),
    _detector("YOLOv5-L6 (r6.1)", 76.8, 445.6, 1280, 63, None, 53.7),
    _detector("YOLOv5-X6 (r6.1)", 140.7, 839.2, 1280, 38, None, 55.0),
    _detector("YOLOR-P6", 37.2, 325.6, 1280, 76, 53.9, 53.5, 71.4, 58.9, 36.1, 57.7, 65.6),
    _detector("YOLOR-W6", 79.8, 453.2, 1280, 66, 55.2, 54.8, 72.7, 60.5, 37.7, 59.1, 67.1),
    _detector("YOLOR-E6", 115.8, 683.2, 1280, 45, 55.8, 55.7, 73.4, 61.1, 38.4, 59.7, 67.7),
    _detector("YOLOR-D6", 151.7, 935.6, 1280, 34, 56.5, 56.1, 74.1, 61.9, 38.9, 60.4, 68.7),
    _detector("YOLOv7-W6", 70.4, 360.0, 1280, 84, 54.9, 54.6, 72.6, 60.1, 37.3, 58.7, 67.1),
    _detector("YOLOv7-E6", 97.2, 515.2, 1280, 56, 56.0, 55.9, 73.5, 61.2, 38.0, 59.9, 68.4),
    _detector("YOLOv7-D6", 154.7, 806.8, 1280, 44, 56.6, 56.3, 74.0, 61.8, 38.8, 60.1, 69.5),
    _detector("YOLOv7-E6E", 151.7, 843.2, 1280, 36, 56.8, 56.8, 74.4, 62.1, 39.3, 60.5, 69.0),
)

_TABLE_9_ONLY = (
    _detector("F-RCNN-R101-FPN+", 60.0, 246.0, 1333, 20, None, 44.0, table=9),
    _detector("Deformable DETR", 40.0, 173.0, None, 19, None, 46.2, table=9),
    _detector("Swin-B (C-M-RCNN)", 145.0, 982.0, 1333, 11.6, None, 51.9, table=9),
    _detector("DETR DC5-R101", 60.0, 253.0, 1333, 10, None, 44.9, table=9),
    _detector("EfficientDet-D7x", 77.0, 410.0, 1536, 6.5, 55.1, 54.4, 72.4, 58.4, table=9),
    _detector("Dual-Swin-T (C-M-RCNN)", 113.8, 836.0, 1333, 6.5, None, 53.6, table=9),
    _detector("ViT-Adapter-B", 122.0, 997.0, None, 4.4, None, 50.8, table=9),
    _detector("Dual-Swin-B (HTC)", 235.0, None, 1600, 2.5, 58.7, 58.4, table=9),
    _detector("Dual-Swin-L (HTC)", 453.0, None, 1600, 1.5, 59.4, 59.1, table=9),
    _detector("DN-Deformable-DETR", 48.0, 265.0, 1333, 23.0, None, 48.6, table=9, device="A100"),
    _detector("DINO-5scale (R50)", 47.0, 860.0, 1333, 10.0, None, 51.0, table=9, device="A100"),
)


def _val_only(
    model: str, params_m: float | None, gflops: float, size: int, fps: float, ap: float, ap50: float, ap75: float
) -> PaperRow:
    """Return a row of Table 9 without a test AP: its AP50 and AP75 are in the test columns, but belong to val."""
    return PaperRow(
        model=model,
        params_m=params_m,
        gflops=gflops,
        size=size,
        fps=fps,
        device="A100",
        val=Precision(ap=ap, ap50=ap50, ap75=ap75),
        source=f"{PAPER}, Table 9",
    )


TABLE_9 = tuple(
    sorted(
        (
            *(replace(row, source=f"{PAPER}, Table 9") for row in TABLE_2),
            *_TABLE_9_ONLY,
            _val_only("ConvNeXt-B (C-M-RCNN)", None, 964.0, 1280, 11.5, 54.0, 73.1, 58.8),
            _val_only("Swin-B (C-M-RCNN)", None, 982.0, 1280, 10.7, 53.0, 71.8, 57.5),
            _val_only("ConvNeXt-L (C-M-RCNN)", None, 1354.0, 1280, 10.0, 54.8, 73.8, 59.8),
            _val_only("Swin-L (C-M-RCNN)", None, 1382.0, 1280, 9.2, 53.9, 72.4, 58.8),
            _val_only("ConvNeXt-XL (C-M-RCNN)", None, 1898.0, 1280, 8.6, 55.2, 74.2, 59.9),
        ),
        key=lambda row: (row.device != "V100", -(row.fps or 0)),
    )
)


def _ablation(
    table: int,
    model: str,
    ap: float,
    ap50: float,
    ap75: float,
    *sizes: float,
    params_m: float | None = None,
    gflops: float | None = None,
) -> PaperRow:
    """Return a row of Table 3, 4 or 5; `sizes` are AP of small, medium and large objects, which Table 3 has not.

    Only Table 3 prints an input size, parameters and GFLOPs.
    """
    small, medium, large = sizes or (None, None, None)
    precision = Precision(ap=ap, ap50=ap50, ap75=ap75, ap_small=small, ap_medium=medium, ap_large=large)
    size = 640 if table == 3 else None
    return PaperRow(
        model=model, params_m=params_m, gflops=gflops, size=size, val=precision, source=f"{PAPER}, Table {table}"
    )


TABLE_3 = (
    _ablation(3, "base (v7-X light)", 51.7, 70.1, 56.0, params_m=47.0, gflops=125.5),
    _ablation(3, "width only (1.25 w)", 52.4, 70.9, 57.1, params_m=73.4, gflops=195.5),
    _ablation(3, "depth only (2.0 d)", 52.7, 70.8, 57.3, params_m=69.3, gflops=187.6),
    _ablation(3, "compound (v7-X)", 52.9, 71.1, 57.5, params_m=71.3, gflops=189.9),
)

TABLE_4 = (
    _ablation(4, "base (3-S ELAN)", 52.26, 70.41, 56.77, 35.81, 57.00, 67.59),
    _ablation(4, "Figure 6 (a)", 52.18, 70.34, 56.90, 35.71, 56.83, 67.51),
    _ablation(4, "Figure 6 (b)", 52.30, 70.30, 56.92, 35.76, 56.95, 67.74),
    _ablation(4, "Figure 6 (c)", 52.33, 70.56, 56.91, 35.90, 57.06, 67.50),
    _ablation(4, "Figure 6 (d)", 52.17, 70.32, 56.82, 35.33, 57.06, 68.09),
    _ablation(4, "Figure 6 (e)", 52.23, 70.20, 56.81, 35.34, 56.97, 66.88),
)

TABLE_5 = (
    _ablation(5, "YOLOR-W6", 54.82, 72.39, 59.95, 39.68, 59.38, 68.30),
    _ablation(5, "RepCSP (YOLOR-W6)", 54.67, 72.50, 59.58, 40.22, 59.61, 67.87),
    _ablation(5, "RCSP (YOLOR-W6)", 54.36, 71.95, 59.54, 40.15, 59.02, 67.44),
    _ablation(5, "RepRCSP (YOLOR-W6)", 54.85, 72.51, 60.08, 40.53, 59.52, 68.06),
    _ablation(5, "YOLOR-CSP", 50.81, 69.47, 55.28, 33.74, 56.01, 65.38),
    _ablation(5, "RepRCSP (YOLOR-CSP)", 50.91, 69.54, 55.55, 34.44, 55.74, 65.46),
)


def _trained(table: int, model: str, ap: float, ap50: float, ap75: float) -> PaperRow:
    """Return a row of Table 6, 7 or 8: another training of E6 or E6E at 1280."""
    precision = Precision(ap=ap, ap50=ap50, ap75=ap75)
    return PaperRow(model=model, params_m=None, gflops=None, size=1280, val=precision, source=f"{PAPER}, Table {table}")


TABLE_6 = (
    _trained(6, "base (v7-E6)", 55.6, 73.2, 60.7),
    _trained(6, "independent", 55.8, 73.4, 60.9),
    _trained(6, "lead guided", 55.9, 73.5, 61.0),
    _trained(6, "coarse-to-fine lead guided", 55.9, 73.5, 61.1),
)

TABLE_7 = (
    _trained(7, "base (v7-E6)", 55.6, 73.2, 60.7),
    _trained(7, "aux without constraint", 55.9, 73.5, 61.0),
    _trained(7, "aux with constraint", 55.9, 73.5, 61.1),
)

TABLE_8 = (
    _trained(8, "base (v7-E6E)", 56.3, 74.0, 61.5),
    _trained(8, "aux", 56.5, 74.0, 61.6),
    _trained(8, "partial aux", 56.8, 74.4, 62.1),
)

TABLE_10 = (
    SettingRow(model="YOLOv7-X", precision="fp16", iou=0.65, ap_val=52.9),
    SettingRow(model="YOLOv7-X", precision="fp32", iou=0.65, ap_val=53.0),
    SettingRow(model="YOLOv7-X", precision="fp16", iou=0.70, ap_val=53.0),
    SettingRow(model="YOLOv7-X", precision="fp32", iou=0.70, ap_val=53.1),
)


def paper_row(variant: str, *, size: int | None = None) -> PaperRow:
    """Return the numbers of an official variant, or of a network of Tables 3 to 5, merged into one row.

    They are from the paper and the official README. Size-wise AP on val comes from Table 1 where it has the model,
    speed and AP on test-dev from Table 2.

    Args:
        variant: Official name, such as `yolov7-e6e`, or a name in `ABLATIONS`.
        size: 416 (default) or 320 for `yolov7-tiny`.

    Raises:
        UsageError: The paper does not have the variant, or not at this size.
    """
    model = VARIANTS.get(variant) or ABLATIONS.get(variant)
    if model is None:
        raise UsageError(f"The paper does not have {variant!r}.", fix=suggest(variant, VARIANTS))
    tables = (*TABLE_1, *TABLE_2, *TABLE_3, *TABLE_4, *TABLE_5)
    rows = [row for row in tables if row.model == model and size in (None, row.size)]
    if not rows:
        raise UsageError(
            f"The paper does not have {variant}{f' at {size}' if size else ''}.", fix="Leave the size out."
        )
    first, speed = rows[0], next((row for row in rows if row.fps), None)
    merged = replace(first, fps=speed.fps, device=speed.device, test=speed.test) if speed else first
    # The paper's batch-32 time of tiny goes with the AP at 416.
    batch32_ms = None if merged.size == 320 else BATCH32_MS.get(variant)
    sources = dict.fromkeys([first.source, *([speed.source] if speed else []), *([README] if batch32_ms else [])])
    return replace(merged, batch32_ms=batch32_ms, source="; ".join(sources))
