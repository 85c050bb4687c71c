"""Table 10 of the paper on real weights: AP in FP32 and FP16, with the NMS IoU threshold 0.65 and 0.70.

python benchmarks/table10.py --data coco-mini.yaml [--weights yolov7]

Every combination is `evaluate` on an exported ONNX file (640 pixels, decoded output) in ONNX Runtime, which computes
FP16 layers of a CPU in float32 and rounds their outputs to FP16. The network runs once per image and precision: its
outputs are kept for the second threshold. The paper's rows are of YOLOv7-X on the 5,000 images of val2017.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recording import parser, record

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.evaluation.accuracy import AccuracyReport, evaluate
from yolov7_deploy.evaluation.accuracy_drop import accuracy_drop
from yolov7_deploy.hub import find_weights
from yolov7_deploy.image import read_image
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import ExportOptions, ValOptions
from yolov7_deploy.paper import TABLE_10
from yolov7_deploy.precision.fp16 import to_fp16

IOUS = (0.65, 0.70)
FP16_IMAGES = 4  # on which `to_fp16` looks for values that FP16 cannot hold


def remember_outputs(session: Any) -> None:  # noqa: ANN401 - the session of a runtime
    """Let a session answer an input that it has seen before from memory."""
    run, known = session.run, dict[bytes, list[Any]]()

    def run_once(model: object, outputs: list[str] | None, feeds: dict[str, Any]) -> list[Any]:
        key = hashlib.sha256(b"".join(array.tobytes() for array in feeds.values())).digest()
        if key not in known:
            known[key] = run(model, outputs, feeds)
        return [array.copy() for array in known[key]]

    session.run = run_once


def measure(model: OnnxModel, data: Dataset, folder: Path) -> dict[float, AccuracyReport]:
    """Return the accuracy of a model by NMS threshold."""
    path = folder / f"{model.metadata.precision}.onnx"
    model.save(path)
    reports = {}
    with Detector(path, device="cpu", runtime="onnxruntime") as detector:
        remember_outputs(detector._runtime._session)  # type: ignore[attr-defined]
        for iou in IOUS:
            reports[iou] = evaluate(detector, data, options=ValOptions(rect=False, batch=1, iou=iou))
            print(f"{model.metadata.precision}, IoU {iou:.2f}: AP {reports[iou].ap:.4f}", flush=True)
    return reports


def rows_beside_the_paper(reports: dict[str, dict[float, AccuracyReport]], data: Dataset) -> list[dict[str, object]]:
    """Return the rows of table 10 with ours, and the drop in AP from FP32 at the first threshold."""
    reference = reports["fp32"][IOUS[0]]
    rows: list[dict[str, object]] = []
    for row in TABLE_10:
        report = reports[row.precision][row.iou]
        drop = accuracy_drop(data, range(len(data)), reference.predictions, report.predictions)
        rows.append(
            {
                "precision": row.precision,
                "nms_iou": row.iou,
                "paper_ap": row.ap_val,
                "ap": round(100 * report.ap, 2),
                "ap50": round(100 * report.ap50, 2),
                "ap75": round(100 * report.ap75, 2),
                "below_fp32_at_0.65": asdict(drop),
            }
        )
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", default="yolov7")
    arguments.add_argument("--data", required=True, type=Path)
    options = arguments.parse_args()
    checkpoint, data = load_checkpoint(find_weights(options.weights)), open_dataset(options.data)
    fp32 = export_onnx(fuse(build_model(checkpoint)), checkpoint.metadata, ExportOptions(nms="none"))
    fp16 = to_fp16(fp32, [read_image(data.path(i)) for i in range(min(FP16_IMAGES, len(data)))])
    with tempfile.TemporaryDirectory() as folder:
        reports = {name: measure(model, data, Path(folder)) for name, model in (("fp16", fp16), ("fp32", fp32))}
    reference = reports["fp32"][IOUS[0]]
    record(
        "table10",
        options.machine,
        {
            "weights": checkpoint.source,
            "variant": checkpoint.variant,
            "paper_variant": "YOLOv7-X",
            "images": reference.images,
            "protocol": reference.protocol,
            "rows": rows_beside_the_paper(reports, data),
        },
    )


if __name__ == "__main__":
    main()
