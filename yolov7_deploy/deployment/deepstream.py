"""A DeepStream application: nvinfer's configuration, the parser of its outputs, labels, tracker and pipeline.

    OUTPUT/config_infer.txt      configuration of Gst-nvinfer
    OUTPUT/model.onnx            the model (`model.engine` for an engine)
    OUTPUT/labels.txt            one class name a line
    OUTPUT/yolov7_parser.cpp     the custom parser; `make` compiles it
    OUTPUT/config_tracker.yml    configuration of Gst-nvtracker
    OUTPUT/run.sh                the pipeline for one or several streams

Keys and values of the configuration are those of "Gst-nvinfer" in the DeepStream developer guide, and of
gstnvinfer_property_parser.h in github.com/NVIDIA/DeepStream (9.1).
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._output_folder import check_new_folder, new_folder
from yolov7_deploy.deployment.served_model import ServedModel, check_batch, label_lines, read_served_model
from yolov7_deploy.errors import LoadError
from yolov7_deploy.metadata import NMS_OUTPUTS
from yolov7_deploy.options import DeepStreamOptions
from yolov7_deploy.tensorrt.plugin_library import PLUGIN_VARIABLE

ASSETS = Path(__file__).parent.parent / "assets" / "deepstream"
CONFIG, LABELS, PARSER, TRACKER, SCRIPT = (
    "config_infer.txt",
    "labels.txt",
    "yolov7_parser.cpp",
    "config_tracker.yml",
    "run.sh",
)
# nvinfer's network-mode, and how it names the precision in the names of engines.
_NETWORK_MODES = {"fp32": 0, "int8": 1, "fp16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepStreamApplication:
    """An application that was written.

    Attributes:
        path: Its folder.
        streams: Maximum number of streams.
        commands: What to type on the machine with DeepStream.
        notes: What differs from this package, and what the machine needs besides.
    """

    path: Path
    streams: int
    commands: tuple[str, ...]
    notes: tuple[str, ...]


def write_deepstream(weights: Path, output: Path, options: DeepStreamOptions | None = None) -> DeepStreamApplication:
    """Write an application for DeepStream 7.1 to 9.x; the model is copied.

    Args:
        weights: An `.onnx` file in float32, from which nvinfer builds an engine, or an engine.
        output: A new or empty folder.
        options: See `DeepStreamOptions`.

    Raises:
        LoadError: nvinfer cannot run the file; the fix is the command that creates one that it runs.
        UsageError: The folder has other files or cannot be written, or the file takes fewer streams.
    """
    options = options or DeepStreamOptions()
    check_new_folder(output)
    model = read_served_model(weights)
    _check_input(model)
    check_batch(model, options.streams, "--streams")
    conf = model.nms.conf if options.conf is None else options.conf
    batch = options.streams if model.has_dynamic_batch else model.batch_limits[0]
    values = {"CONF": f"{conf:g}", "MAX_DET": str(model.nms.max_det), "STREAMS": str(options.streams)}
    with new_folder(output) as folder:
        (folder / CONFIG).write_text(_config(model, batch=batch, conf=conf), encoding="utf-8")
        (folder / LABELS).write_text(label_lines(model.metadata.class_names), encoding="utf-8")
        shutil.copyfile(weights, folder / _file_name(model))
        for name in (PARSER, "Makefile", TRACKER, SCRIPT):
            (folder / name).write_text(_filled(name, values), encoding="utf-8")
    return DeepStreamApplication(
        path=output, streams=options.streams, commands=_commands(output, options.streams), notes=_notes(model)
    )


def _check_input(model: ServedModel) -> None:
    """Check that nvinfer can prepare the input: float32 NCHW (its preprocessing writes nothing else).

    Raises:
        LoadError: The fix is the command that creates such a file.
    """
    source = model.metadata.source or "WEIGHTS.pt"
    if model.metadata.input_kind != "float32":
        raise LoadError(
            f"{model.path} takes uint8 images, and DeepStream passes float32.",
            fix=f"y7 export --weights {source} --input float32 --dynamic-batch",
        )
    if model.record is None and model.metadata.precision != "fp32":
        raise LoadError(
            f"{model.path} is {model.metadata.precision}: nvinfer would build an engine that also computes boxes "
            "and NMS in low precision.",
            fix=f"Build the engine on the machine with DeepStream:  y7 build --weights {model.path} --fixed-thresholds",
        )


def _file_name(model: ServedModel) -> str:
    return "model.onnx" if model.record is None else "model.engine"


def _config(model: ServedModel, *, batch: int, conf: float) -> str:
    """Return nvinfer's configuration; paths are relative to its folder."""
    metadata, height_width = model.metadata, model.metadata.default_hw
    precision = metadata.precision if metadata.precision in _NETWORK_MODES else "fp32"
    # nvinfer writes the engine that it builds under this name, next to the ONNX file.
    engine = f"model.onnx_b{batch}_gpu0_{precision}.engine"
    files = {"onnx-file": "model.onnx", "model-engine-file": engine}
    properties: dict[str, object] = {
        "gpu-id": 0,
        "gie-unique-id": 1,
        "process-mode": 1,  # whole frames
        "network-type": 0,  # detector
        "network-mode": _NETWORK_MODES[precision],
        "batch-size": batch,
        **(files if model.record is None else {"model-engine-file": _file_name(model)}),
        "infer-dims": f"3;{height_width[0]};{height_width[1]}",
        "net-scale-factor": 1 / 255,
        "model-color-format": 0,  # RGB
        "maintain-aspect-ratio": 1,
        "symmetric-padding": 1,
        "scaling-filter": 1,  # bilinear
        "num-detected-classes": len(metadata.class_names),
        "labelfile-path": LABELS,
        "output-blob-names": ";".join(NMS_OUTPUTS),
        "custom-lib-path": "libyolov7_parser.so",
        "parse-bbox-func-name": "NvDsInferParseYolov7",
        "cluster-mode": 4,  # none: NMS is in the model
    }
    lines = [f"{key}={value}" for key, value in properties.items()]
    return "\n".join(["[property]", *lines, "", "[class-attrs-all]", f"pre-cluster-threshold={conf:g}", ""])


def _filled(name: str, values: dict[str, str]) -> str:
    text = (ASSETS / name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _commands(output: Path, streams: int) -> tuple[str, ...]:
    folder, script = shlex.quote(str(output)), shlex.quote(str(output / SCRIPT))
    several = (f"sh {script} " + " ".join(f"rtsp://CAMERA{number}" for number in range(1, min(streams, 4) + 1)),)
    return (f"make -C {folder}", f"sh {script} rtsp://CAMERA", *(several if streams > 1 else ()))


def _notes(model: ServedModel) -> tuple[str, ...]:
    notes = ["DeepStream pads frames with black, this package with grey, so scores near the border may differ"]
    record = model.record
    if record is None:
        notes.append("nvinfer builds the engine at the first start, which takes minutes")
        return tuple(notes)
    notes.append(f"the engine needs the TensorRT that built it, {record.tensorrt}, and the same kind of GPU")
    if record.plugin is not None:
        notes.append(f"NMS runs in our plugin: export {PLUGIN_VARIABLE}=/PATH/liby7_plugin.so   before run.sh")
    return tuple(notes)
