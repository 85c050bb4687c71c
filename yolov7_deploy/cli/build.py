"""`y7 build`: builds a TensorRT engine and its build record from an ONNX file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo, is_verbose, note
from yolov7_deploy.cli.options import JsonPath, announce_replacement, checkpoint_or_placeholder, one_of
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import HARDWARE_COMPATIBILITIES, PLUGIN_USES, EngineOptions

if TYPE_CHECKING:
    from yolov7_deploy.tensorrt.builder import BuildCallbacks, EngineReport

DEFAULTS = EngineOptions()

Weights = Annotated[str, typer.Option("--weights", "-w", metavar="FILE", help="ONNX file to build from.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Output file (default: NAME.engine next to the ONNX file).")
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="GPUS",
        help="GPUs for TensorRT-RTX to build for, on this or other machines: sm86,sm89,sm120.",
    ),
]
Plugin = Annotated[
    str, one_of(PLUGIN_USES, "--plugin", text="Run NMS in our plugin; auto does so if the plugin is built.")
]
Batch = Annotated[
    int | None, typer.Option("--batch", "--batch-size", help="Fixed batch size for a file with a dynamic batch.")
]
MinBatch = Annotated[
    int | None, typer.Option("--min-batch", help="Minimum batch size for a file with a dynamic batch.")
]
OptBatch = Annotated[
    int | None, typer.Option("--opt-batch", help="Batch size for which the engine is optimized (default: the maximum).")
]
MaxBatch = Annotated[
    int | None, typer.Option("--max-batch", help="Maximum batch size for a file with a dynamic batch.")
]
Workspace = Annotated[
    float | None, typer.Option("--workspace", help="Maximum workspace of a layer, in GiB of GPU memory.")
]
OptLevel = Annotated[
    int | None, typer.Option("--opt-level", help="Builder optimization level, 0 (fast build) to 5 (long search).")
]
TimingCache = Annotated[
    Path | None,
    typer.Option(
        "--timing-cache", help="File of measured kernel times (default: one file per device in the cache folder)."
    ),
]
NoTimingCache = Annotated[
    bool, typer.Option("--no-timing-cache", help="Measure all kernels, and write no timing cache.")
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="The engine also runs with later TensorRT versions.")
]
HardwareCompatible = Annotated[
    str,
    one_of(
        HARDWARE_COMPATIBILITIES,
        "--hardware-compatible",
        text="Other GPUs that can run the engine: Ampere and later, or those of the same compute capability.",
    ),
]
Sparse = Annotated[bool, typer.Option("--sparse", help="Use sparse kernels for weights pruned 2:4.")]
Dla = Annotated[int | None, typer.Option("--dla", help="DLA core of a Jetson to build for.")]
FixedThresholds = Annotated[
    bool,
    typer.Option("--fixed-thresholds", help="Compile the file's thresholds into the engine (Triton, DeepStream)."),
]


def build(
    *,
    weights: Weights,
    output: Output = None,
    target: Target = None,
    plugin: Plugin = DEFAULTS.plugin,
    batch: Batch = None,
    min_batch: MinBatch = None,
    opt_batch: OptBatch = None,
    max_batch: MaxBatch = None,
    fixed_thresholds: FixedThresholds = False,
    workspace: Workspace = None,
    opt_level: OptLevel = None,
    timing_cache: TimingCache = None,
    no_timing_cache: NoTimingCache = False,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = DEFAULTS.hardware_compatible,
    sparse: Sparse = False,
    dla: Dla = None,
    json_path: JsonPath = None,
) -> None:
    """Build a TensorRT engine and its build record from an ONNX file.

    Example:  y7 build --weights yolov7.onnx
    """
    if batch is not None and (min_batch, opt_batch, max_batch) != (None, None, None):
        raise UsageError("--batch already sets --min-batch, --opt-batch and --max-batch.", fix="Leave one of them out.")
    options = EngineOptions(
        targets=parse_targets(target),
        plugin=plugin,
        min_batch=min_batch if batch is None else batch,
        opt_batch=opt_batch if batch is None else batch,
        max_batch=max_batch if batch is None else batch,
        workspace_gib=workspace,
        opt_level=opt_level,
        timing_cache=timing_cache,
        use_timing_cache=not no_timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        sparse=sparse,
        dla=dla,
        fixed_thresholds=fixed_thresholds,
    )
    report = _run(weights, output, options, to_stderr=json_path == "-")
    echo(describe(report), err=json_path == "-")
    if json_path is not None:
        from yolov7_deploy._console import write_json

        write_json(to_dict(report), json_path)


def parse_targets(text: str | None) -> tuple[str, ...]:
    """Return the targets of a list such as `sm86,sm89`; empty for `None`.

    Raises:
        UsageError: The list is empty.
    """
    parts = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not parts:
        raise UsageError("--target does not contain a GPU.", fix="For example: --target sm86,sm89,sm120")
    return parts


def _run(weights: str, output: Path | None, options: EngineOptions, *, to_stderr: bool) -> EngineReport:
    path = Path(weights)
    if path.suffix.lower() != ".onnx":
        checkpoint = checkpoint_or_placeholder(weights)
        what = "is a checkpoint" if checkpoint == weights else "is not an .onnx file"
        raise UsageError(
            f"y7 build needs an ONNX file; {weights} {what}.",
            fix=f"Export and build with one command:  y7 export --weights {checkpoint} --engine",
        )
    from yolov7_deploy.tensorrt.builder import build_file

    engine = output or path.with_suffix(".engine")
    with (
        announce_replacement(engine, to_stderr=to_stderr),
        shown_progress(to_stderr=to_stderr) as callbacks,
    ):
        return build_file(path, engine, options=options, callbacks=callbacks)


@contextmanager
def shown_progress(*, to_stderr: bool) -> Iterator[BuildCallbacks]:
    """Yield callbacks that print steps as lines, the build's progress, and with `-v` TensorRT's log."""
    from yolov7_deploy._console import progress
    from yolov7_deploy.tensorrt.builder import BuildCallbacks

    with progress("build", unit="%") as show:
        yield BuildCallbacks(
            on_step=lambda description, seconds: note(f"{seconds:6.1f} s  {description}", err=to_stderr),
            on_progress=show,
            on_log=(lambda message: echo(f"TensorRT {message}", err=True)) if is_verbose() else None,
        )


def describe(report: EngineReport) -> str:
    """Return a description of the engine for the terminal."""
    from yolov7_deploy.tensorrt.build_record import TITLES

    record, lines = report.record, []
    nms_run_by = {
        "plugin": f"the plugin {record.plugin.path}" if record.plugin else "TensorRT's EfficientNMS_TRT",
        "operators": "operators of the graph",
        "none": "none, the output is the decoded head",
    }[record.nms_by]
    runs_on = ", ".join(record.targets) or (f"{record.gpu} ({record.compute_capability})" if record.gpu else "")
    lines.append(
        f"{report.path}: {record.plan_bytes / 1e6:.1f} MB, {record.metadata.variant} {record.metadata.precision}, "
        f"{TITLES[record.product]} {record.tensorrt}, {len(record.network_layers)} layers before fusion, "
        f"{record.build_s:.1f} s"
    )
    if runs_on:
        lines.append(f"For: {runs_on}")
    lines += [
        f"{shape.name}: batch {shape.min[0]} to {shape.max[0]}, fastest at {shape.opt[0]}"
        for shape in record.shapes
        if shape.min != shape.max
    ]
    changeable = "; the thresholds of NMS can be changed at run time" if record.runtime_thresholds else ""
    lines.append(f"NMS: {nms_run_by}{changeable}")
    if record.dla:
        lines.append(f"DLA core {record.dla.core}: {len(record.dla.fallback)} layers run on the GPU")
    lines += [f"Note: {note}" for note in record.notes]
    lines.append(f"For its layers and metadata:  y7 info {report.path}")
    return "\n".join(lines)


def to_dict(report: EngineReport) -> dict[str, object]:
    """Return the report as plain data for JSON."""
    import json

    return {"path": str(report.path), "record": json.loads(report.record.to_json())}
