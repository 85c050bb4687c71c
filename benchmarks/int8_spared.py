"""A hard case for INT8: one channel of a tensor is made huge, so that INT8 rounds the others away; who is spared?

The layer that reads the tensor gets zero weights for that channel, so float32 loses next to nothing by it.

python benchmarks/int8_spared.py --weights yolov7 --calib IMAGES --data D.yaml
"""

from __future__ import annotations

from pathlib import Path

import torch
from recording import parser, record

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.export.onnx_exporter import export_onnx
from yolov7_deploy.hub import find_weights
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.options import ExportOptions, QuantizeOptions
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.workflows.quantize import Quantizer, describe

MADE, READER = "model.27.conv", "model.28.conv"  # of yolov7; nothing else reads what the first makes
CHANNEL, FACTOR = 0, 1000.0
MAX_DET = 300


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", default="yolov7")
    arguments.add_argument("--calib", required=True)
    arguments.add_argument("--data", required=True, type=Path)
    arguments.add_argument("--max-drop", type=float, default=1.0)
    options = arguments.parse_args()
    checkpoint = load_checkpoint(find_weights(options.weights))
    net = fuse(build_model(checkpoint))
    spoil(net)
    result = Quantizer(
        export_onnx(net, checkpoint.metadata, ExportOptions(max_det=MAX_DET)),
        open_calibration(options.calib),
        QuantizeOptions(max_drop=options.max_drop),
        data=open_dataset(options.data),
        say=lambda words: print(words, flush=True),
    ).run()
    print(describe(result))
    int8 = result.model.metadata.int8
    assert int8 is not None and result.drop is not None
    record(
        "int8_spared",
        options.machine,
        {
            "weights": Path(options.weights).name,
            "spoiled": f"channel {CHANNEL} of {MADE}, times {FACTOR:g}; {READER} reads it",
            "max_drop": options.max_drop,
            "float32_ap": result.drop.reference_ap,
            "trials": [{"spared": trial.spared, "ap": trial.ap, "points": trial.points} for trial in result.trials],
            "dearest": [{"layer": cost.layer, "head_error": cost.error} for cost in result.costs[:3]],
            "spared": [layer for layer, _ in int8.kept if layer not in result.model.metadata.heads],
        },
    )


def spoil(net: Yolov7) -> None:
    """Makes one channel huge, and its reader deaf to it."""
    modules = dict(net.named_modules())
    made, reader = modules[MADE], modules[READER]
    assert isinstance(made, torch.nn.Conv2d) and isinstance(reader, torch.nn.Conv2d) and made.bias is not None
    with torch.no_grad():
        made.weight[CHANNEL] *= FACTOR
        made.bias[CHANNEL] *= FACTOR
        reader.weight[:, CHANNEL] = 0


if __name__ == "__main__":
    main()
