"""`y7 report`: one HTML page about artifacts of a model: parity, accuracy, speed, and where they differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo
from yolov7_deploy.cli.options import Device, JsonPath, RuntimeName, announce_replacement, locate_weights
from yolov7_deploy.errors import ParityError
from yolov7_deploy.options import ReportOptions

if TYPE_CHECKING:
    from yolov7_deploy.workflows.report import DeploymentReport

DEFAULTS = ReportOptions()
MORE_IMAGES = "No stage differs too much. Measure on a dataset with more images, or allow a larger loss (--max-drop 1)."

Against = Annotated[
    list[str] | None,
    typer.Option("--against", metavar="FILE", help="Model file to compare; repeat for several, or list them after it."),
]
More = Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="More model files to compare.")]
Data = Annotated[Path, typer.Option("--data", help="Dataset YAML, or COCO annotations (instances JSON).")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write, .html.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Measure AP on the first N images (default: on all).")]
StageLimit = Annotated[int, typer.Option("--stage-limit", help="Compare the stages on at most N images.")]
MaxDrop = Annotated[
    float, typer.Option("--max-drop", help="Largest allowed loss in AP points (of 100); above it, exit code 1.")
]
Duration = Annotated[
    float,
    typer.Option("--duration", help="Seconds to measure latency of each file, and again throughput; 0: no speed."),
]
Bench = Annotated[
    list[Path] | None,
    typer.Option(
        "--bench", metavar="FILE", help="Speed of a file from y7 bench --json, not measured again; repeatable."
    ),
]
Sensitivity = Annotated[
    list[Path] | None,
    typer.Option("--sensitivity", metavar="FILE", help="Output of y7 quantize --sensitivity --json; repeatable."),
]


def report(
    *,
    more: More = None,
    data: Data,
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="Reference: a model file or an official name.")
    ] = "yolov7",
    against: Against = None,
    output: Output = Path("report.html"),
    limit: Limit = DEFAULTS.limit,
    stage_limit: StageLimit = DEFAULTS.stage_limit,
    max_drop: MaxDrop = DEFAULTS.max_drop,
    duration: Duration = DEFAULTS.duration_s,
    bench: Bench = None,
    sensitivity: Sensitivity = None,
    device: Device = DEFAULTS.device,
    runtime: RuntimeName = DEFAULTS.runtime,
    json_path: JsonPath = None,
) -> None:
    """Write one HTML page that shows whether exported files equal their weights.

    It has the parity of every stage, AP with confidence intervals, speed, and the images on which files differ most.
    An ONNX file runs in every installed runtime. The exit code is 1 if a file is wrong, or if it loses more than
    --max-drop on these images, even if that may be chance; the page is written anyway.

    Example:  y7 report --weights yolov7.pt --against yolov7-int8.onnx --data coco.yaml
    """
    options = ReportOptions(
        limit=limit, stage_limit=stage_limit, max_drop=max_drop, duration_s=duration, device=device, runtime=runtime
    )
    files = [*(against or ()), *(more or ())]
    from yolov7_deploy._console import progress, write_json
    from yolov7_deploy.workflows.report_page import write_report

    with announce_replacement(output, to_stderr=json_path == "-"):
        result = write_report(
            locate_weights(weights),
            [locate_weights(file) for file in files],
            data=data,
            output=output,
            options=options,
            bench=bench or (),
            sensitivity=sensitivity or (),
            show=progress,
        )
    echo(describe(result), err=json_path == "-")
    if json_path is not None:
        write_json(result.to_dict(), json_path)
    if not result.ok:
        fix = MORE_IMAGES if result.undecided else f"Open {output}: its first section names what is wrong."
        raise ParityError("\n".join(result.failures), fix=fix)


def describe(result: DeploymentReport) -> str:
    """Return the summary table, the warnings and the path of the page."""
    from yolov7_deploy._console import table

    rows = []
    for one in result.artifacts:
        speed, drop = one.speed, one.drop
        rows.append(
            [
                one.name,
                one.accuracy.precision,
                one.verdict(result.options.max_drop),
                None if one.accuracy.ap is None else f"{one.accuracy.ap:.4f}",
                None if drop is None else f"{drop.points:.2f}",
                None if speed is None else f"{speed.rows[0].stage('end_to_end').p50:.1f}",
            ]
        )
    parts = [table(rows, ["artifact", "precision", "verdict", "AP", "points lost", "ms"])]
    parts += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join([*parts, f"Report: {result.path}"])
