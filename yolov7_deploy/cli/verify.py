"""`y7 verify`: run several artifacts of one model on the same images and find the first stage that differs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo
from yolov7_deploy.cli.options import Device, JsonPath, RuntimeName, locate_weights
from yolov7_deploy.errors import ParityError

if TYPE_CHECKING:
    from yolov7_deploy.evaluation.parity import ParityReport
    from yolov7_deploy.evaluation.verification import ArtifactAccuracy, Verification


DIFFERENCE = "See the first stage over its limit: the difference begins there."
LESS_LOSS = "No stage differs too much. For INT8:  y7 quantize --data DATA.yaml --max-drop 0.3  keeps layers in float."
MORE_IMAGES = "No stage differs too much. Measure on more images (--limit N), or allow a larger loss (--max-drop 1)."
OTHER_IMAGES = "Compare on images with objects of the model's classes:  --images DIR  or  --data DATA.yaml"


def verify(
    against: Annotated[
        list[str], typer.Option("--against", metavar="FILE", help="Model file to check; repeat for several.")
    ],
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="Reference: a model file or an official name.")
    ] = "yolov7",
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", "--source", help="Images to compare on (default: those of --data, or a synthetic image)."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Also measure AP on this dataset YAML or COCO annotations JSON.")
    ] = None,
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="Largest allowed loss in AP points (of 100); above it, exit code 1.")
    ] = 0.3,
    limit: Annotated[int, typer.Option("--limit", help="Use at most N images.")] = 16,
    device: Device = "cpu",
    runtime: RuntimeName = "auto",
    json_path: JsonPath = None,
) -> None:
    """Compare model files with a reference, stage by stage.

    An ONNX file runs in every installed runtime. The exit code is 1 if a difference exceeds its limit, or if there was
    no detection to compare.

    Example:  y7 verify --weights yolov7.pt --against yolov7-fp16.onnx
    """
    from yolov7_deploy._console import progress, write_json
    from yolov7_deploy.evaluation.verification import verify_artifacts

    reference, artifacts = locate_weights(weights), [locate_weights(path) for path in against]
    with progress("verify") as show_progress:
        result = verify_artifacts(
            reference,
            artifacts,
            images=images,
            data=data,
            limit=limit,
            max_drop=max_drop,
            device=device,
            runtime=runtime,
            progress=show_progress,
        )
    echo(describe(result), err=json_path == "-")
    if json_path is not None:
        write_json(result.to_dict(), json_path)
    if result.failures:
        differs = any(report.first_failure for report in result.reports)
        is_undecided = len(result.failures) == len(result.undecided)
        decided = DIFFERENCE if differs else LESS_LOSS if result.verified else OTHER_IMAGES
        fix = MORE_IMAGES if is_undecided else decided
        raise ParityError("\n".join(result.failures), fix=fix)


def describe(result: Verification) -> str:
    """Return the comparison as tables, and a last line if everything is within its limits."""
    from yolov7_deploy._console import plural, table

    parts = [stage_table(report) for report in result.reports]
    if result.accuracy:
        rows = [
            [row.weights, row.precision, f"{row.ap:.4f}", f"{row.ap50:.4f}", *_loss(row)] for row in result.accuracy
        ]
        header = ["artifact", "precision", "AP", "AP50", "points lost", "95 % interval"]
        parts.append(table(rows, header, f"AP on {plural(result.images, 'image')}"))
    parts += [*result.notes, *result.unsure]
    if not result.failures:
        ap = ", and so is the AP" * bool(result.accuracy)
        parts.append(f"all stages are within their limits in {plural(len(result.reports), 'comparison')}{ap}")
    return "\n".join(parts)


def _loss(row: ArtifactAccuracy) -> tuple[str | None, str | None]:
    """Return the points lost, and their interval."""
    drop = row.drop
    if drop is None:
        return None, None
    known = drop.low is not None and drop.high is not None
    return f"{drop.points:.2f}", f"{drop.low:.2f} to {drop.high:.2f}" if known else None


def stage_table(report: ParityReport) -> str:
    """Return a table with one row per stage and quantity: largest difference, limit, and whether it is within it."""
    from yolov7_deploy._console import plural, table

    rows: list[list[str | None]] = []
    for stage in report.stages:
        for number, (name, difference) in enumerate(stage.differences.items()):
            limit = stage.limits.get(name)
            result = "" if limit is None else "ok" if difference <= limit else "FAIL"
            limit_text = None if limit is None else f"{limit:g}"
            stage_name, note = (stage.stage, stage.note) if number == 0 else ("", "")
            rows.append([stage_name, name, f"{difference:.2g}", limit_text, result, note])
    title = f"{report.against} against {report.reference}, {plural(report.images, 'image')}, conf {report.conf:g}"
    text = table(rows, ["stage", "quantity", "difference", "limit", "result", "note"], title)
    return text if report.verified else f"{text}\n{report.not_verified_reason}"
