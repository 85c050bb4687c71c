"""`y7 build`: an ONNX file to a TensorRT engine and the record of its build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy.cli.options import JsonPath
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import EngineOptions

if TYPE_CHECKING:
    from yolov7_deploy.tensorrt.builder import BuildCallbacks, EngineReport

DEFAULTS = EngineOptions()
_CHECKPOINTS = (".pt", ".pth", ".safetensors")

Weights = Annotated[str, typer.Option("--weights", "-w", help="An .onnx file.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Default: NAME.engine beside the ONNX file.")]
Target = Annotated[
    str | None,
    typer.Option("--target", help="GPUs to build for with TensorRT-RTX, here or elsewhere: sm86,sm89,sm120."),
]
Plugin = Annotated[str, typer.Option("--plugin", help="NMS by our plugin: auto (where it is built), on or off.")]
Batch = Annotated[
    int | None, typer.Option("--batch", "--batch-size", help="The one batch size of a file with an open batch.")
]
MinBatch = Annotated[int | None, typer.Option("--min-batch", help="Smallest batch of a file with an open batch.")]
OptBatch = Annotated[
    int | None, typer.Option("--opt-batch", help="Batch the engine is tuned for; default the largest.")
]
MaxBatch = Annotated[int | None, typer.Option("--max-batch", help="Largest batch of a file with an open batch.")]
Workspace = Annotated[float | None, typer.Option("--workspace", help="GiB of GPU memory a layer may use at work.")]
OptLevel = Annotated[int | None, typer.Option("--opt-level", help="0 builds fast, 5 searches long.")]
TimingCache = Annotated[
    Path | None, typer.Option("--timing-cache", help="Measured kernel times; default: one file a device in the cache.")
]
NoTimingCache = Annotated[bool, typer.Option("--no-timing-cache", help="Measure everything anew.")]
VersionCompatible = Annotated[bool, typer.Option("--version-compatible", help="Also run with later TensorRT versions.")]
HardwareCompatible = Annotated[
    str, typer.Option("--hardware-compatible", help="none, ampere+ or same-cc (same compute capability).")
]
Sparse = Annotated[bool, typer.Option("--sparse", help="Use sparse kernels for weights pruned 2:4.")]
Dla = Annotated[int | None, typer.Option("--dla", help="Core of a Jetson's deep learning accelerator.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show TensorRT's own log.")]


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
    workspace: Workspace = None,
    opt_level: OptLevel = None,
    timing_cache: TimingCache = None,
    no_timing_cache: NoTimingCache = False,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = DEFAULTS.hardware_compatible,
    sparse: Sparse = False,
    dla: Dla = None,
    verbose: Verbose = False,
    json_path: JsonPath = None,
) -> None:
    """Build a TensorRT engine from an ONNX file, with a record of how."""
    if batch is not None and (min_batch, opt_batch, max_batch) != (None, None, None):
        raise UsageError("--batch says all of --min-batch, --opt-batch and --max-batch.", fix="Leave one of them out.")
    options = EngineOptions(
        targets=parse_targets(target),
        plugin=plugin,
        min_batch=batch or min_batch,
        opt_batch=batch or opt_batch,
        max_batch=batch or max_batch,
        workspace_gib=workspace,
        opt_level=opt_level,
        timing_cache=timing_cache,
        use_timing_cache=not no_timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        sparse=sparse,
        dla=dla,
    )
    report = _run(weights, output, options, verbose=verbose, to_stderr=json_path == "-")
    typer.echo(describe(report), err=json_path == "-")
    if json_path is not None:
        from yolov7_deploy._console import write_json

        write_json(to_dict(report), json_path)


def parse_targets(text: str | None) -> tuple[str, ...]:
    """The parts of `sm86,sm89`."""
    parts = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not parts:
        raise UsageError("--target names no GPU.", fix="For example: --target sm86,sm89,sm120")
    return parts


def _run(weights: str, output: Path | None, options: EngineOptions, *, verbose: bool, to_stderr: bool) -> EngineReport:
    path = Path(weights)
    if path.suffix.lower() != ".onnx":
        what = "is a checkpoint" if path.suffix.lower() in _CHECKPOINTS else "is no .onnx file"
        raise UsageError(
            f"y7 build takes an ONNX file; {weights} {what}.",
            fix=f"Export and build in one go:  y7 export --weights {weights} --engine",
        )
    from yolov7_deploy.tensorrt.builder import build_file

    with shown_progress(verbose=verbose, to_stderr=to_stderr) as telling:
        return build_file(path, output or path.with_suffix(".engine"), options=options, telling=telling)


@contextmanager
def shown_progress(*, verbose: bool, to_stderr: bool) -> Iterator[BuildCallbacks]:
    """Steps as lines, the build as a bar or a line every ten seconds, TensorRT's log where asked for."""
    from yolov7_deploy._console import progress
    from yolov7_deploy.tensorrt.builder import BuildCallbacks

    with progress("building, in percent") as show:
        yield BuildCallbacks(
            say=lambda what, seconds: typer.echo(f"{seconds:6.1f} s  {what}", err=to_stderr),
            progress=show,
            log=(lambda line: typer.echo(f"TensorRT {line}", err=True)) if verbose else None,
        )


def describe(report: EngineReport) -> str:
    """What was built, for people."""
    from yolov7_deploy.tensorrt.build_record import TITLES

    record, lines = report.record, []
    nms_run_by = {
        "plugin": f"the plugin {record.plugin.path}" if record.plugin else "TensorRT's EfficientNMS_TRT",
        "operators": "operators of the graph",
        "none": "nobody: the output is the decoded head",
    }[record.nms_by]
    runs_on = ", ".join(record.targets) or (f"{record.gpu} ({record.compute_capability})" if record.gpu else "")
    lines.append(
        f"{report.path}: {record.plan_bytes / 1e6:.1f} MB, {record.metadata.variant} {record.metadata.precision}, "
        f"{TITLES[record.product]} {record.tensorrt}, {len(record.network_layers)} layers as parsed, "
        f"{record.build_s:.1f} s"
    )
    if runs_on:
        lines.append(f"For: {runs_on}")
    lines += [
        f"{shape.name}: batch {shape.min[0]} to {shape.max[0]}, fastest at {shape.opt[0]}"
        for shape in record.shapes
        if shape.min != shape.max
    ]
    changeable = "; conf and iou can be changed at run time" if record.runtime_thresholds else ""
    lines.append(f"NMS by {nms_run_by}{changeable}")
    if record.dla:
        lines.append(f"DLA core {record.dla.core}: {len(record.dla.fallback)} layers stay on the GPU")
    lines += [f"Note: {note}" for note in record.notes]
    lines.append(f"What is inside:  y7 info {report.path}")
    return "\n".join(lines)


def to_dict(report: EngineReport) -> dict[str, object]:
    """The record for machines."""
    import json

    return {"path": str(report.path), "record": json.loads(report.record.to_json())}
