"""A hard case for INT8: does `--max-drop` find and exclude a layer that was spoiled on purpose?

One channel of a tensor is scaled by 1000, so that INT8 rounds the other channels away. The layer that consumes the
tensor gets zero weights for that channel, so float32 is nearly unaffected.

python benchmarks/int8_excluded.py --weights yolov7 --calib IMAGES --data D.yaml
"""

from __future__ import annotations

from pathlib import Path

import torch
from recording import parser, record

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.hub import find_weights
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions, QuantizeOptions
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.workflows.quantize import Quantizer, describe

PRODUCER, CONSUMER = "model.27.conv", "model.28.conv"  # of yolov7; the tensor has no other consumer
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
        log=lambda message: print(message, flush=True),
    ).run()
    print(describe(result))
    int8 = result.model.metadata.int8
    assert int8 is not None and result.drop is not None
    record(
        "int8_excluded",
        options.machine,
        {
            "weights": Path(options.weights).name,
            "spoiled": f"channel {CHANNEL} of {PRODUCER}, times {FACTOR:g}; {CONSUMER} consumes it",
            "max_drop": options.max_drop,
            "float32_ap": result.drop.reference_ap,
            "measurements": [
                {"excluded": one.excluded, "ap": one.ap, "points": one.points} for one in result.measurements
            ],
            "most_sensitive": [{"layer": entry.layer, "head_error": entry.error} for entry in result.sensitivities[:3]],
            "excluded": [layer for layer, _ in int8.float_layers if layer not in result.model.metadata.heads],
        },
    )


def spoil(net: Yolov7) -> None:
    """Scale one channel up and make its consumer ignore it."""
    modules = dict(net.named_modules())
    producer, consumer = modules[PRODUCER], modules[CONSUMER]
    assert isinstance(producer, torch.nn.Conv2d) and isinstance(consumer, torch.nn.Conv2d) and producer.bias is not None
    with torch.no_grad():
        producer.weight[CHANNEL] *= FACTOR
        producer.bias[CHANNEL] *= FACTOR
        consumer.weight[:, CHANNEL] = 0


if __name__ == "__main__":
    main()
