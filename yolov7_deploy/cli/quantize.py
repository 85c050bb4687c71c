"""`y7 quantize`: a float32 ONNX file to INT8, with what each layer costs and what AP says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy.cli.options import JsonPath
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.options import Int8Options, QuantizeOptions

if TYPE_CHECKING:
    from yolov7_deploy.datasets import Dataset
    from yolov7_deploy.export.onnx_model import OnnxModel
    from yolov7_deploy.workflows.quantize import Quantized

DEFAULTS = Int8Options()

Calib = Annotated[
    Path | None,
    typer.Option("--calib", help="Images to find ranges on: folder, list, pattern, dataset YAML, COCO JSON, video."),
]
CALIB_LIMIT = 512
CalibLimit = Annotated[int, typer.Option("--calib-limit", help="At most so many of them, evenly spaced.")]
CalibCache = Annotated[
    Path | None, typer.Option("--calib-cache", help="Keep what was measured in this file, not in the cache folder.")
]
Method = Annotated[
    str, typer.Option("--method", help="How ranges are chosen from histograms: mse, percentile, entropy or max.")
]
Data = Annotated[
    Path | None, typer.Option("--data", help="Other images, with labels, for AP: dataset YAML or COCO JSON.")
]
MaxDrop = Annotated[
    float | None,
    typer.Option("--max-drop", help="AP points (of 100) INT8 may lose; layers stay float until it loses no more."),
]
Spare = Annotated[list[str] | None, typer.Option("--exclude", help="A layer that stays float; may be given often.")]

NO_IMAGES = UsageError(
    "INT8 needs sample images: the range of each tensor is measured on them, and ranges of random numbers or of no "
    "images clip what real ones show.",
    fix="Add  --calib FOLDER  with 100 to 500 images like those to come; not those AP is measured on.",
)


def quantize(
    weights: Annotated[str, typer.Option("--weights", "-w", help="A float32 .onnx file.")],
    calib: Calib = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: NAME-int8.onnx here.")] = None,
    method: Method = DEFAULTS.method,
    data: Data = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Measure AP on the first so many images.")] = None,
    max_drop: MaxDrop = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Find what INT8 costs in each layer; takes minutes.")
    ] = False,
    exclude: Spare = None,
    fallback: Annotated[
        str, typer.Option("--fallback", help="Type of what is not INT8: fp16 or fp32.")
    ] = DEFAULTS.fallback,
    calib_limit: CalibLimit = CALIB_LIMIT,
    calib_cache: CalibCache = None,
    trt_cache: Annotated[
        Path | None, typer.Option("--trt-cache", help="Also write the ranges as a TensorRT calibration cache, for DLA.")
    ] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="Draw what INT8 costs in each layer (.png).")] = None,
    json_path: JsonPath = None,
) -> None:
    """Make an INT8 file of a float32 ONNX file, and say what it costs."""
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
    place = output or Path(f"{path.stem}-int8.onnx")
    _check_place(place)
    if chart is not None:
        from yolov7_deploy._charts import check_chart_path

        check_chart_path(chart)
    from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx

    model = open_onnx(path)
    result = run(model, calib, options, data=open_data(data, limit), limit=calib_limit, to_stderr=json_path == "-")
    result.model.save(place)
    typer.echo(_described(result, place), err=json_path == "-")
    if trt_cache is not None:
        _write_trt_cache(model, result, options, trt_cache)
    if chart is not None:
        from yolov7_deploy.workflows.quantize import write_sensitivity_chart

        write_sensitivity_chart(result, chart, title=place.stem)
    if json_path is not None:
        from yolov7_deploy._console import write_json
        from yolov7_deploy.workflows.quantize import to_dict

        write_json({"path": str(place), **to_dict(result)}, json_path)


def _float_file(weights: str) -> Path:
    path = Path(weights)
    if path.suffix.lower() != ".onnx":
        raise UsageError(
            f"{weights} is no .onnx file: y7 quantize starts from a float32 one.",
            fix=f"From weights in one go:  y7 export --weights {weights} --int8 --calib FOLDER",
        )
    return path


def _check_place(place: Path) -> None:
    """Refuses a place that cannot be written before minutes are spent."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(place.parent, os.W_OK) else "the folder is read-only"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ExportError(f"{place} cannot be written: {reason}.", fix="Choose another place:  --output F")


def open_data(data: Path | None, limit: int | None) -> Dataset | None:
    """The images AP is measured on, if any."""
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
    """Quantises and tells each step."""
    from yolov7_deploy._console import progress
    from yolov7_deploy.precision.calibration_images import open_calibration
    from yolov7_deploy.workflows.quantize import Quantizer

    images = open_calibration(calib, limit=limit)
    return Quantizer(
        model,
        images,
        options,
        data=data,
        say=lambda words: typer.echo(words, err=to_stderr),
        show=progress,
    ).run()


def _described(result: Quantized, place: Path) -> str:
    from yolov7_deploy.workflows.quantize import describe

    return "\n\n".join(
        [
            describe(result),
            f"{place}: {place.stat().st_size / 1e6:.1f} MB\nBuild it:  y7 build --weights {place}",
        ]
    )


def _write_trt_cache(model: OnnxModel, result: Quantized, options: QuantizeOptions, place: Path) -> None:
    from yolov7_deploy.precision.trt_cache import trt_calibration_cache

    text = trt_calibration_cache(model, result.calibration, options.int8.method)
    try:
        place.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{place} cannot be written: {reason}.", fix="Choose another path.") from error
