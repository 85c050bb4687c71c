"""`y7 quantize`: convert an FP32 ONNX file to INT8, and report the sensitivity of each layer and the AP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo, note
from yolov7_deploy.cli.options import JsonPath, announce_replacement, check_writable, one_of
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import INT8_FALLBACKS, INT8_METHODS, Int8Options, QuantizeOptions

if TYPE_CHECKING:
    from yolov7_deploy.datasets import Dataset
    from yolov7_deploy.onnx_export.onnx_model import OnnxModel
    from yolov7_deploy.workflows.quantize import Quantized

DEFAULTS = Int8Options()

Calib = Annotated[
    Path | None,
    typer.Option("--calib", help="Calibration images: folder, list, pattern, dataset YAML, COCO JSON, video."),
]
CALIB_LIMIT = 512
CalibLimit = Annotated[int, typer.Option("--calib-limit", help="Maximum number of calibration images, evenly spaced.")]
CalibCache = Annotated[
    Path | None, typer.Option("--calib-cache", help="Calibration file to read or write (default: in the cache folder).")
]
Method = Annotated[str, one_of(INT8_METHODS, "--method", text="How activation ranges are chosen from histograms.")]
Data = Annotated[Path | None, typer.Option("--data", help="Dataset on which to measure AP: YAML or COCO JSON.")]
MaxDrop = Annotated[
    float | None,
    typer.Option("--max-drop", help="Exclude layers until INT8 loses at most this many AP points (of 100)."),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="LAYER", help="Layer to keep in float; repeatable.")
]

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Output file (default: NAME-int8.onnx here).")]
Fallback = Annotated[str, one_of(INT8_FALLBACKS, "--fallback", text="Precision of the other layers.")]
Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="Measure the INT8 sensitivity of each layer (minutes).")
]
TrtCache = Annotated[Path | None, typer.Option("--trt-cache", help="Also write a TensorRT calibration cache, for DLA.")]
Chart = Annotated[Path | None, typer.Option("--chart", help="Write a chart of the sensitivities (.png).")]

NO_IMAGES = UsageError(
    "INT8 requires calibration images: activation ranges are measured on them; ranges from random numbers clip the "
    "values of real images.",
    fix="Add  --calib FOLDER  with 100 to 500 representative images, other than those used to measure AP.",
)


def quantize(
    weights: Annotated[str, typer.Option("--weights", "-w", metavar="FILE", help="An FP32 .onnx file.")],
    calib: Calib = None,
    output: Output = None,
    method: Method = DEFAULTS.method,
    data: Data = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Measure AP on the first LIMIT images.")] = None,
    max_drop: MaxDrop = None,
    sensitivity: Sensitivity = False,
    exclude: Exclude = None,
    fallback: Fallback = DEFAULTS.fallback,
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
    options = QuantizeOptions(
        int8=Int8Options(
            method=method, fallback=fallback, exclude=dict.fromkeys(exclude or (), "excluded with --exclude")
        ),
        max_drop=max_drop,
        sensitivity=sensitivity or chart is not None,
        cache=calib_cache,
    )
    path = _float_file(weights)
    target = output or Path(f"{path.stem}-int8.onnx")
    _check_output(target, path)
    if chart is not None:
        from yolov7_deploy._charts import check_chart_path

        check_chart_path(chart)
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
        from yolov7_deploy.workflows.quantize import to_dict

        write_json({"path": str(target), **to_dict(result)}, json_path)


def _float_file(weights: str) -> Path:
    path = Path(weights)
    if path.suffix.lower() != ".onnx":
        raise UsageError(
            f"{weights} is not an .onnx file; y7 quantize starts from an FP32 ONNX file.",
            fix=f"Export and quantize in one step:  y7 export --weights {weights} --int8 --calib FOLDER",
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
            f"{path}: {path.stat().st_size / 1e6:.1f} MB\nBuild it:  y7 build --weights {path}",
        ]
    )


def _write_trt_cache(model: OnnxModel, result: Quantized, options: QuantizeOptions, path: Path) -> None:
    from yolov7_deploy._console import write_text
    from yolov7_deploy.precision.calibration_cache import trt_calibration_cache

    write_text(path, trt_calibration_cache(model, result.calibration, options.int8.method))
