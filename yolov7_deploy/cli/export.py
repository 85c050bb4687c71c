"""`y7 export`: write a checkpoint as one verified ONNX file, and optionally build a TensorRT engine from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy.cli.build import MaxBatch, OptLevel, Plugin, Target, Workspace, parse_targets, shown_progress
from yolov7_deploy.cli.build import describe as describe_engine
from yolov7_deploy.cli.build import to_dict as engine_to_dict
from yolov7_deploy.cli.options import (
    CheckpointWeights,
    Img,
    JsonPath,
    announce_replacement,
    label_rule,
    locate_weights,
    one_of,
    parse_img,
    was_given,
)
from yolov7_deploy.cli.quantize import DEFAULTS as INT8_DEFAULTS
from yolov7_deploy.cli.quantize import (
    NO_IMAGES,
    Calib,
    Data,
    Int8Target,
    MaxDrop,
    Method,
    ReduceRange,
    Rounding,
    int8_options,
    open_data,
)
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import (
    INPUT_KINDS,
    NMS_KINDS,
    PRECISIONS,
    EngineOptions,
    ExportOptions,
    Int8Options,
    QuantizeOptions,
)

if TYPE_CHECKING:
    from yolov7_deploy.tensorrt.build_messages import Installation
    from yolov7_deploy.tensorrt.builder import EngineReport
    from yolov7_deploy.workflows.export import ExportReport, Int8Request

DEFAULTS = ExportOptions()
_PRECISION_BY_BITS = {"8": "int8", "16": "fp16", "32": "fp32"}
# Options that need another option, by their parameter names.
_DEPENDENT_OPTIONS = {
    "--int8": {
        "calib": "--calib",
        "data": "--data",
        "max_drop": "--max-drop",
        "method": "--method",
        "rounding": "--rounding",
        "int8_target": "--int8-target",
        "reduce_range": "--reduce-range",
    },
    "--engine": {
        "target": "--target",
        "plugin": "--plugin",
        "workspace": "--workspace",
        "opt_level": "--opt-level",
        "max_batch": "--max-batch",
    },
}

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Output file (default: NAME.onnx or NAME-PRECISION.onnx here).")
]
Batch = Annotated[int, typer.Option("--batch", "--batch-size", help="Fixed batch size.")]
DynamicBatch = Annotated[bool, typer.Option("--dynamic-batch", help="Accept any batch size at run time.")]
Dynamic = Annotated[
    bool,
    typer.Option("--dynamic", help="Accept any batch size, height and width at run time; --img is then the default."),
]
Nms = Annotated[
    str,
    one_of(
        NMS_KINDS,
        "--nms",
        text="NMS in the graph: plugin runs in every runtime, standard is ONNX operators, efficient is "
        "EfficientNMS_TRT.",
    ),
]
Conf = Annotated[float, typer.Option("--conf", "--conf-thres", help="Confidence threshold, 0 to 1.")]
Iou = Annotated[float, typer.Option("--iou", "--iou-thres", help="IoU threshold of NMS, 0 to 1.")]
MaxDet = Annotated[int, typer.Option("--max-det", "--topk-all", help="Maximum number of detections per image.")]
MaxCandidates = Annotated[int, typer.Option("--max-candidates", help="Maximum number of boxes that enter NMS.")]
MultiLabel = Annotated[
    bool,
    typer.Option(
        "--multi-label/--best-class", help="All classes of a box above --conf, or only its best (the default)."
    ),
]
AgnosticNms = Annotated[
    bool,
    typer.Option("--agnostic-nms", "--class-agnostic", help="Class-agnostic NMS: boxes of different classes compete."),
]
InputKind = Annotated[
    str,
    one_of(
        INPUT_KINDS, "--input", text="float32 is NCHW RGB from 0 to 1; uint8 is NHWC BGR, converted inside the graph."
    ),
]
Precision = Annotated[
    str | None,
    one_of(
        PRECISIONS,
        "--precision",
        "--quantize",
        text="32, 16 and 8 mean the same. Input, outputs, decoding and NMS stay in float32.",
    ),
]
Fp16 = Annotated[bool, typer.Option("--fp16", "--half", help="Same as --precision fp16.")]
Int8 = Annotated[
    bool, typer.Option("--int8", help="Same as --precision int8; needs --calib, except for weights trained with --qat.")
]
Opset = Annotated[int, typer.Option("--opset", help="ONNX opset version, 13 to 21.")]
Simplify = Annotated[bool, typer.Option("--simplify/--no-simplify", help="Run onnx-simplifier.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare ONNX Runtime with PyTorch before the file is kept.")
]
Image = Annotated[
    Path | None, typer.Option("--image", help="Image for --verify and for the FP16 range check (default: synthetic).")
]
MakeEngine = Annotated[
    bool, typer.Option("--engine", help="Also build a TensorRT engine; y7 build has all options for that.")
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportJob:
    """Everything one `y7 export` writes, checked before the work starts.

    Attributes:
        weights: File or official name.
        output: ONNX file; `None` derives it from the weights and the precision.
        options: Options of the graph.
        precision: One of `PRECISIONS`.
        int8: Calibration images and options; `None` unless `precision` is `int8`.
        engine: How to build an engine; `None` builds none.
    """

    weights: str
    output: Path | None
    options: ExportOptions
    precision: str
    int8: Int8Request | None
    engine: EngineOptions | None


def export(
    *,
    weights: CheckpointWeights = "yolov7",
    output: Output = None,
    img: Img = None,
    batch: Batch = 1,
    dynamic_batch: DynamicBatch = False,
    dynamic: Dynamic = False,
    nms: Nms = DEFAULTS.nms,
    conf: Conf = DEFAULTS.conf,
    iou: Iou = DEFAULTS.iou,
    max_det: MaxDet = DEFAULTS.max_det,
    max_candidates: MaxCandidates = DEFAULTS.max_candidates,
    multi_label: MultiLabel = DEFAULTS.multi_label,
    agnostic_nms: AgnosticNms = DEFAULTS.class_agnostic,
    input_kind: InputKind = DEFAULTS.input_kind,
    precision: Precision = None,
    fp16: Fp16 = False,
    int8: Int8 = False,
    calib: Calib = None,
    data: Data = None,
    max_drop: MaxDrop = None,
    method: Method = None,
    rounding: Rounding = INT8_DEFAULTS.rounding,
    int8_target: Int8Target = "auto",
    reduce_range: ReduceRange = None,
    opset: Opset = DEFAULTS.opset,
    simplify: Simplify = DEFAULTS.simplify,
    verify: Verify = True,
    image: Image = None,
    engine: MakeEngine = False,
    target: Target = None,
    plugin: Plugin = "auto",
    workspace: Workspace = None,
    opt_level: OptLevel = None,
    max_batch: MaxBatch = None,
    json_path: JsonPath = None,
) -> None:
    """Export a checkpoint to one verified ONNX file for every runtime.

    Example:  y7 export --weights yolov7.pt --fp16
    """
    number_type = parse_precision(precision, fp16=fp16, int8=int8)
    _check_needed({"--int8": number_type == "int8", "--engine": engine})
    limits: dict[str, Any] = {"conf": conf, "iou": iou, "max_det": max_det, "max_candidates": max_candidates}
    limits |= {"multi_label": multi_label, "class_agnostic": agnostic_nms}
    options = ExportOptions(
        input_hw=_input_hw(img),
        batch=_fixed_batch(batch, dynamic=dynamic, dynamic_batch=dynamic_batch),
        dynamic_size=_dynamic_size(dynamic, engine=engine),
        nms=nms,
        **limits,
        input_kind=input_kind,  # type: ignore[arg-type]
        opset=opset,
        simplify=simplify,
    )
    choose = partial(int8_options, int8_target, reduce_range, for_engine=engine, to_stderr=json_path == "-")
    choose = partial(choose, method=method, rounding=rounding)
    inputs = {"calib": calib, "data": data, "max_drop": max_drop, "method": method, "rounding": rounding}
    trained = number_type == "int8" and _is_trained(weights, inputs, int8_target, reduce_range, engine)
    request = _int8_request(calib, data, max_drop, choose) if number_type == "int8" and not trained else None
    build = _engine_options(target, plugin, workspace, opt_level, max_batch) if engine else None
    job = ExportJob(weights=weights, output=output, options=options, precision=number_type, int8=request, engine=build)
    _run(job, verify=verify, image=image, json_path=json_path)


def parse_precision(precision: str | None, *, fp16: bool, int8: bool) -> str:
    """Return the one of `PRECISIONS` that the options request; `fp32` without any.

    Args:
        precision: Value of `--precision`: a name, or a number of bits.
        fp16: Whether `--fp16` was given.
        int8: Whether `--int8` was given.

    Raises:
        UsageError: The precision is unknown, or two options contradict each other.
    """
    requested = {"--fp16": "fp16"} if fp16 else {}
    if int8:
        requested["--int8"] = "int8"
    if precision is not None:
        requested[f"--precision {precision}"] = _PRECISION_BY_BITS.get(precision, precision.lower())
    for option, name in requested.items():
        if name not in PRECISIONS:
            raise UsageError(f"{option} is unknown.", fix=f"One of: --precision {', --precision '.join(PRECISIONS)}")
    if len(set(requested.values())) > 1:
        raise UsageError(f"{' and '.join(requested)} contradict each other.", fix="Leave one of them out.")
    return next(iter(requested.values()), "fp32")


def _check_needed(given: dict[str, bool]) -> None:
    """Check that no option was typed that has an effect only together with another one.

    Raises:
        UsageError: An option of `_DEPENDENT_OPTIONS` was typed without the one it needs.
    """
    for option, is_given in given.items():
        typed = [spelling for parameter, spelling in _DEPENDENT_OPTIONS[option].items() if was_given(parameter)]
        if typed and not is_given:
            raise UsageError(f"{typed[0]} has no effect without {option}.", fix=f"Add  {option}")


def _input_hw(img: str | None) -> tuple[int, int] | None:
    size = parse_img(img)
    return (size, size) if isinstance(size, int) else size


def _fixed_batch(batch: int, *, dynamic: bool, dynamic_batch: bool) -> int | None:
    """Return the batch size, or `None` if it stays open."""
    option = "--dynamic" if dynamic else "--dynamic-batch" if dynamic_batch else ""
    if option and batch != 1:
        raise UsageError(f"{option} and --batch {batch} contradict each other.", fix="Leave one of them out.")
    return None if option else batch


def _dynamic_size(dynamic: bool, *, engine: bool) -> bool:
    if dynamic and engine:
        raise UsageError("--dynamic: an engine has a fixed height and width.", fix="--dynamic-batch --engine")
    return dynamic


def _int8_request(
    calib: Path | None, data: Path | None, max_drop: float | None, choose: Callable[[], Int8Options]
) -> Int8Request:
    """Open the images before the export, which takes long; `choose` returns the target."""
    if max_drop is not None and data is None:
        raise UsageError("--max-drop limits the loss of AP, which requires a dataset.", fix="Add  --data D.yaml")
    if calib is None:
        raise NO_IMAGES
    from yolov7_deploy._console import progress
    from yolov7_deploy.precision.calibration_images import open_calibration
    from yolov7_deploy.workflows.export import Int8Request

    return Int8Request(
        images=open_calibration(calib),
        options=QuantizeOptions(int8=choose(), max_drop=max_drop),
        data=open_data(data, None),
        show=progress,
    )


def _is_trained(
    weights: str, inputs: Mapping[str, object], int8_target: str, reduce_range: bool | None, engine: bool
) -> bool:
    """Return whether weights were trained for INT8, after checking that the options suit them."""
    path = Path(weights)
    if not path.is_file():  # an official name
        return False
    from yolov7_deploy.workflows.export import trained_for_int8

    target = {"int8_target": int8_target, "reduce_range": reduce_range, "for_engine": engine}
    return trained_for_int8(path, **inputs, **target) is not None  # type: ignore[arg-type]


def _engine_options(
    target: str | None, plugin: str, workspace: float | None, opt_level: int | None, max_batch: int | None
) -> EngineOptions:
    return EngineOptions(
        targets=parse_targets(target), plugin=plugin, workspace_gib=workspace, opt_level=opt_level, max_batch=max_batch
    )


def _run(job: ExportJob, *, verify: bool, image: Path | None, json_path: str | None) -> None:
    """Export, build the engine if requested, and write the JSON result."""
    to_stderr = json_path == "-"  # keeps messages apart from the JSON result on standard output
    # Before the export, which takes long: an error must not come after it.
    installation = None if job.engine is None else _find_tensorrt(job.engine)
    report = _export(job, verify=verify, image=image, to_stderr=to_stderr)
    result = to_dict(report)
    if job.engine is not None:
        engine = _build(report.path, job.engine, installation, to_stderr=to_stderr)
        result["engine"] = engine_to_dict(engine)
    if json_path is not None:
        from yolov7_deploy._console import write_json

        write_json(result, json_path)


def _find_tensorrt(options: EngineOptions) -> Installation:
    from yolov7_deploy.tensorrt.builder import find_tensorrt

    return find_tensorrt(options)


def _export(job: ExportJob, *, verify: bool, image: Path | None, to_stderr: bool) -> ExportReport:
    from yolov7_deploy.image import read_image
    from yolov7_deploy.workflows.export import default_output, export_weights

    images = [read_image(image)] if image else []
    path = locate_weights(job.weights)
    output = job.output or default_output(job.weights, path, job.precision)
    with announce_replacement(output, to_stderr=to_stderr):
        report = export_weights(
            path,
            output,
            options=job.options,
            precision=job.precision,
            int8=job.int8,
            verify=verify,
            images=images,
            log=lambda step, seconds: note(f"{seconds:6.1f} s  {step}", err=to_stderr),
        )
    echo(describe(report), err=to_stderr)
    return report


def _build(path: Path, options: EngineOptions, installation: Installation | None, *, to_stderr: bool) -> EngineReport:
    from yolov7_deploy.tensorrt.builder import build_file

    engine = path.with_suffix(".engine")
    with (
        announce_replacement(engine, to_stderr=to_stderr),
        shown_progress(to_stderr=to_stderr) as callbacks,
    ):
        report = build_file(path, engine, options=options, installation=installation, callbacks=callbacks)
    echo(describe_engine(report), err=to_stderr)
    return report


def describe(report: ExportReport) -> str:
    """Return the verification and a description of the file as text."""
    from yolov7_deploy.cli.verify import stage_table

    metadata, parts = report.metadata, []
    if report.parity:
        parts.append(stage_table(report.parity))
        if not report.parity.verified:
            parts.append("Export it again with an image that has objects of the model's classes:  --image FILE")
    size = "x".join(map(str, metadata.default_hw))
    if metadata.input_hw is None:
        size = f"any multiples of {metadata.stride} (by default {size})"
    batch = "dynamic" if metadata.batch is None else str(metadata.batch)
    parts.append(
        f"{report.path}: {report.bytes / 1e6:.1f} MB, {metadata.variant} {size}, batch {batch}, input "
        f"{metadata.input_kind}, {metadata.precision}, opset {metadata.opset}"
    )
    if metadata.nms:
        nms = metadata.nms
        parts.append(
            f"NMS in the graph ({nms.kind}): conf {nms.conf:g}, iou {nms.iou:g}, max-det {nms.max_det}, "
            + label_rule(nms.multi_label)
            + ("; all but max-det can be changed at run time" if nms.runtime_thresholds else "")
        )
    rect = " --rect" if metadata.input_hw is None else ""
    parts.append(f"Try it:  y7 detect --weights {report.path} --source IMAGE{rect}")
    return "\n".join(parts)


def to_dict(report: ExportReport) -> dict[str, object]:
    """Return the report as plain data for JSON."""
    import json

    from yolov7_deploy._serialization import sha256_hex

    result: dict[str, object] = {
        "path": str(report.path),
        "sha256": sha256_hex(report.path),
        "bytes": report.bytes,
        "metadata": json.loads(report.metadata.to_json()),
        "parity": report.parity.to_dict() if report.parity else None,
    }
    if report.quantized is not None:
        from yolov7_deploy.workflows.quantize import to_dict as quantized_to_dict

        result["quantization"] = quantized_to_dict(report.quantized)
    return result
