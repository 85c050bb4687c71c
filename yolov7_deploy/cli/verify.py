"""`y7 verify`: the same images through several forms of a model, and where they part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy.cli.options import JsonPath
from yolov7_deploy.errors import ParityError

if TYPE_CHECKING:
    from yolov7_deploy.evaluation.parity import ParityReport
    from yolov7_deploy.evaluation.verification import Verification


def verify(
    against: Annotated[list[str], typer.Option("--against", help="A form to check; may be given several times.")],
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="The form to trust: a file or an official name.")
    ] = "yolov7",
    images: Annotated[
        Path | None, typer.Option("--images", "--source", help="Images to compare on; a drawn one without it.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Also measure AP of each form: dataset YAML or instances JSON.")
    ] = None,
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="AP points (of 100) a form may lose; more is exit code 1.")
    ] = 0.3,
    limit: Annotated[int, typer.Option("--limit", help="At most so many images.")] = 16,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda:0, or 0.")] = "cpu",
    json_path: JsonPath = None,
) -> None:
    """Check that forms of one model agree, stage by stage; exit 1 where something is lost."""
    from yolov7_deploy._console import progress, write_json
    from yolov7_deploy.evaluation.verification import verify_forms
    from yolov7_deploy.hub import find_weights

    with progress("verify") as show:
        result = verify_forms(
            find_weights(weights),
            [find_weights(path) for path in against],
            images=images,
            data=data,
            limit=limit,
            max_drop=max_drop,
            device=f"cuda:{device}" if device.isdigit() else device,
            progress=show,
        )
    typer.echo(describe(result), err=json_path == "-")
    if json_path is not None:
        write_json(result.to_dict(), json_path)
    if result.losses:
        raise ParityError("\n".join(result.losses), fix="See the first stage over its limit: the loss begins there.")


def describe(result: Verification) -> str:
    """The comparison for people."""
    from yolov7_deploy._console import table

    parts = [stage_table(report) for report in result.reports]
    if result.accuracy:
        reference = result.accuracy[0].ap
        rows = [
            [row.weights, row.precision, f"{row.ap:.4f}", f"{row.ap50:.4f}", f"{(row.ap - reference) * 100:+.2f}"]
            for row in result.accuracy
        ]
        parts.append(table(rows, ["form", "precision", "AP", "AP50", "points"], f"AP on {result.images} images"))
    return "\n".join(parts)


def stage_table(report: ParityReport) -> str:
    """One row a stage and quantity: the worst difference, the limit, and whether it holds."""
    from yolov7_deploy._console import table

    rows: list[list[str | None]] = []
    for stage in report.stages:
        for number, (name, difference) in enumerate(stage.differences.items()):
            limit = stage.limits.get(name)
            holds = "" if limit is None else "ok" if difference <= limit else "LOST"
            shown = None if limit is None else f"{limit:g}"
            note = stage.note if number == 0 else ""
            rows.append([stage.stage if number == 0 else "", name, f"{difference:.2g}", shown, holds, note])
    title = f"{report.against} against {report.reference}, {report.images} image{'s' * (report.images > 1)}"
    return table(rows, ["stage", "worst", "difference", "limit", "", "on"], title)
