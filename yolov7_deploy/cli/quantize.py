"""`y7 quantize`: convert an FP32 ONNX file to INT8, and report the sensitivity of each layer and the AP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy.cli.options import JsonPath, announce_replacement, check_writable, checkpoint_or_placeholder, one_of
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import (
    INT8_FALLBACKS,
    INT8_METHODS,
    INT8_ROUNDINGS,
    INT8_TARGETS,
    Int8Options,
    QuantizeOptions,
)

if TYPE_CHECKING:
    from yolov7_deploy.datasets import Dataset
    from yolov7_deploy.metadata import ModelMetadata
    from yolov7_deploy.onnx_export.onnx_model import OnnxModel
    from yolov7_deploy.workflows.quantize import Quantized

DEFAULTS = Int8Options()
_TARGETS = {"cpu": "x86 CPUs", "arm": "ARM CPUs", "tensorrt": "TensorRT"}

Calib = Annotated[
    Path | None,
    typer.Option("--calib", help="Calibration images: folder, list, pattern, dataset YAML, COCO JSON, video."),
]
CALIB_LIMIT = 512
CalibLimit = Annotated[int, typer.Option("--calib-limit", help="Maximum number of calibration images, evenly spaced.")]
CalibCache = Annotated[
    Path | None, typer.Option("--calib-cache", help="Calibration file to read or write (default: in the cache folder).")
]
Method = Annotated[
    str | None,
    one_of(
        INT8_METHODS,
        "--method",
        text="How activation ranges are chosen from histograms (default: lp for CPUs, else mse).",
    ),
]
Rounding = Annotated[
    str,
    one_of(
        INT8_ROUNDINGS,
        "--rounding",
        text="How weights are rounded: each to the nearest step, or for the smallest error of outputs (minutes).",
    ),
]
Data = Annotated[Path | None, typer.Option("--data", help="Dataset on which to measure AP: YAML or COCO JSON.")]
MaxDrop = Annotated[
    float | None,
    typer.Option("--max-drop", help="Exclude layers until INT8 loses at most this many AP points (of 100)."),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="LAYER", help="Layer to keep in float; repeatable.")
]

Int8Target = Annotated[
    str, one_of(("auto", *INT8_TARGETS), "--int8-target", text="What will run an INT8 file; auto: this machine.")
]
ReduceRange = Annotated[
    bool | None,
    typer.Option(
        "--reduce-range/--full-range",
        help="Weights of 7 bits, correct on every x86 CPU, or of 8, for those with VNNI (default: 7 for cpu).",
    ),
]

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Output file (default: NAME-int8.onnx here).")]
Fallback = Annotated[
    str | None,
    one_of(INT8_FALLBACKS, "--fallback", text="Precision of the other layers (default: fp32 for CPUs, else fp16)."),
]
Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="Measure the INT8 sensitivity of each layer (minutes).")
]
TrtCache = Annotated[Path | None, typer.Option("--trt-cache", help="Also write a TensorRT calibration cache, for DLA.")]
Chart = Annotated[
    Path | None,
    typer.Option("--chart", help="Write a chart of the sensitivities, and of the trials of --max-drop (.png)."),
]

NO_IMAGES = UsageError(
    "INT8 requires calibration images: activation ranges are measured on them; ranges from random numbers clip the "
    "values of real images.",
    fix="Add  --calib FOLDER  with 100 to 500 representative images, other than those used to measure AP.",
)


def quantize(
    weights: Annotated[str, typer.Option("--weights", "-w", metavar="FILE", help="An FP32 .onnx file.")],
    calib: Calib = None,
    output: Output = None,
    method: Method = None,
    rounding: Rounding = DEFAULTS.rounding,
    data: Data = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Measure AP on the first LIMIT images.")] = None,
    max_drop: MaxDrop = None,
    sensitivity: Sensitivity = False,
    exclude: Exclude = None,
    int8_target: Int8Target = "auto",
    reduce_range: ReduceRange = None,
    fallback: Fallback = None,
    calib_limit: CalibLimit = CALIB_LIMIT,
    calib_cache: CalibCache = None,
    trt_cache: TrtCache = None,
    chart: Chart = None,
    json_path: JsonPath = None,
) -> None:
    """Convert an FP32 ONNX file to INT8 with calibration images.

    Example:  y7 quantize --weights yolov7.onnx --calib images/
    """
    if calib is None:
        raise NO_IMAGES
    int8 = replace(
        int8_options(int8_target, reduce_range, method=method, rounding=rounding, to_stderr=json_path == "-"),
        fallback=fallback or "",
        exclude=dict.fromkeys(exclude or (), "excluded with --exclude"),
    )
    sensitivity = sensitivity or chart is not None
    options = QuantizeOptions(int8=int8, max_drop=max_drop, sensitivity=sensitivity, cache=calib_cache)
    path = _float_file(weights)
    target = output or Path(f"{path.stem}-int8.onnx")
    _check_output(target, path)
    if chart is not None:
        from yolov7_deploy._charts import check_chart_path

        check_chart_path(chart)
    for file in (chart, trt_cache):
        if file is not None:
            check_writable(file)
    from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx

    model = open_onnx(path)
    result = run(model, calib, options, data=open_data(data, limit), limit=calib_limit, to_stderr=json_path == "-")
    with announce_replacement(target, to_stderr=json_path == "-"):
        result.model.save(target)
    echo(_summary(result, target), err=json_path == "-")
    if trt_cache is not None:
        _write_trt_cache(model, result, options, trt_cache)
    if chart is not None:
        from yolov7_deploy.workflows.sensitivity_chart import write_sensitivity_chart

        write_sensitivity_chart(result, chart, title=target.stem)
    if json_path is not None:
        from yolov7_deploy._console import write_json
        from yolov7_deploy._serialization import sha256_hex
        from yolov7_deploy.workflows.quantize import to_dict

        write_json({"path": str(target), "sha256": sha256_hex(target), **to_dict(result)}, json_path)


def int8_options(
    target: str,
    reduce_range: bool | None,
    *,
    method: str | None = None,
    rounding: str = DEFAULTS.rounding,
    for_engine: bool = False,
    to_stderr: bool = False,
) -> Int8Options:
    """Return the options of an INT8 file; the target is by default this machine, which is printed.

    Args:
        target: Value of `--int8-target`.
        reduce_range: Value of `--reduce-range/--full-range`.
        method: Value of `--method`.
        rounding: Value of `--rounding`.
        for_engine: A TensorRT engine will be built from the file.
        to_stderr: Print to standard error.
    """
    from yolov7_deploy.workflows.quantize import choose_int8_options

    options = choose_int8_options(target, reduce_range, method=method, rounding=rounding, for_engine=for_engine)
    if target != "auto":
        return options
    others = ", ".join(name for name in INT8_TARGETS if name != options.target)
    echo(f"INT8 for {_TARGETS[options.target]}; others: --int8-target {others}", err=to_stderr)
    return options


def _float_file(weights: str) -> Path:
    path = Path(weights)
    if path.suffix.lower() != ".onnx":
        checkpoint = checkpoint_or_placeholder(weights)
        raise UsageError(
            f"{weights} is not an .onnx file; y7 quantize starts from an FP32 ONNX file.",
            fix=f"Export and quantize in one step:  y7 export --weights {checkpoint} --int8 --calib FOLDER",
        )
    return path


def _check_output(output: Path, weights: Path) -> None:
    """Check that the output can be written, and is not the input, before minutes are spent on it."""
    if output.suffix.lower() != ".onnx":
        raise UsageError(f"{output} does not end in .onnx.", fix=f"--output {output.with_suffix('.onnx')}")
    check_writable(output)
    if output.exists() and weights.exists() and output.samefile(weights):
        raise UsageError(
            f"{output} is the FP32 file, which the INT8 file would replace.", fix="Choose another path:  --output FILE"
        )


def open_data(data: Path | None, limit: int | None) -> Dataset | None:
    """Return the dataset on which AP is measured, if any."""
    if data is None:
        return None
    from yolov7_deploy.datasets import open_dataset

    return open_dataset(data, limit=limit)


def run(
    model: OnnxModel,
    calib: Path,
    options: QuantizeOptions,
    *,
    data: Dataset | None,
    limit: int,
    to_stderr: bool,
) -> Quantized:
    """Quantize, and print each step."""
    from yolov7_deploy._console import progress
    from yolov7_deploy.precision.calibration_images import open_calibration
    from yolov7_deploy.workflows.quantize import Quantizer

    images = open_calibration(calib, limit=limit)
    return Quantizer(
        model,
        images,
        options,
        data=data,
        log=lambda text: note(text, err=to_stderr),
        show=progress,
    ).run()


def _summary(result: Quantized, path: Path) -> str:
    from yolov7_deploy.workflows.quantize import describe

    return "\n\n".join(
        [
            describe(result),
            f"{path}: {path.stat().st_size / 1e6:.1f} MB\n{next_step(result.model.metadata, path)}",
        ]
    )


def next_step(metadata: ModelMetadata, path: Path) -> str:
    """Return the command that uses an INT8 file."""
    is_tensorrt = metadata.int8 is not None and metadata.int8.target == "tensorrt"
    return (
        f"Build it:  y7 build --weights {path}"
        if is_tensorrt
        else f"Try it:  y7 detect --weights {path} --source IMAGE"
    )


def _write_trt_cache(model: OnnxModel, result: Quantized, options: QuantizeOptions, path: Path) -> None:
    from yolov7_deploy._console import write_text
    from yolov7_deploy.precision.calibration_cache import trt_calibration_cache

    write_text(path, trt_calibration_cache(model, result.calibration, options.int8.method))
