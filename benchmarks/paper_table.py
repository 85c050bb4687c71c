"""The rows of YOLOv7 in the paper next to measured speeds: the table in docs/benchmarks.md.

python benchmarks/paper_table.py                             print the table
python benchmarks/paper_table.py --write docs/benchmarks.md  replace the text between the two marks

Measured columns come from results/MACHINE/bench_*.json, which are documents of `y7 bench --json`: one pair of columns
for each machine, runtime and precision. Reports of experiments need other names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from yolov7_deploy.benchmarking.report import SpeedReport
from yolov7_deploy.errors import UsageError, Y7Error
from yolov7_deploy.paper import VARIANTS, PaperRow, paper_row

RESULTS = Path(__file__).parent / "results"
START, END = "<!-- paper table -->", "<!-- end of paper table -->"
PAPER_COLUMNS = ("model", "size", "params (M)", "GFLOPs", "AP val", "AP test", "FPS, V100", "batch 32 (ms), V100")
NOTE = """\
Paper: arXiv 2207.02696, Tables 1, 2 and 9; batch-32 times are from its section 8, the official README and issue 77
of the official repository. Its speeds are of PyTorch FP16 and the network only, its parameters and GFLOPs of D6
those of the training graph. Measured: images per second at batch 1, from medians. The engine stage is the network,
and NMS where the file has it; end to end is from an image in memory to its boxes. A cell is empty where
nothing was measured, and names the input size where that is not the paper's."""

Series = tuple[str, str, str]  # folder of the machine, runtime, precision


def paper_table(results: Path = RESULTS) -> str:
    """Return the table in Markdown and the note below it.

    Raises:
        UsageError: A report cannot be read, or two reports belong to the same cell.
    """
    reports = read_reports(results)
    series = sorted({where for where, _ in reports})
    stages = ("engine", "end to end")
    head = [f"{machine}, {runtime} {precision}: {stage}" for machine, runtime, precision in series for stage in stages]
    rows = [[*PAPER_COLUMNS, *head]]
    for variant in VARIANTS:
        row = paper_row(variant)
        cells = [cell for where in series for cell in measured_cells(reports.get((where, variant)), row)]
        rows.append([*paper_cells(row), *cells])
    machines = sorted({f"`{where[0]}` is {report.machine}." for (where, _), report in reports.items()})
    return "\n".join([*markdown(rows), "", NOTE, *machines])


def read_reports(results: Path) -> dict[tuple[Series, str], SpeedReport]:
    """Return the reports of official models by series and variant.

    Raises:
        UsageError: A file is not a report, or two reports belong to the same cell.
    """
    found: dict[tuple[Series, str], SpeedReport] = {}
    files: dict[tuple[Series, str], Path] = {}
    for path in sorted(results.glob("*/bench_*.json")):
        report = SpeedReport.load(path)
        if report.variant not in VARIANTS:
            continue
        key = ((path.parent.name, report.runtime, report.precision), report.variant)
        if key in found:
            raise UsageError(
                f"{files[key]} and {path} are both about {report.variant} through {report.runtime} {report.precision}.",
                fix="Give one a name that does not begin with bench_",
            )
        found[key], files[key] = report, path
    return found


def paper_cells(row: PaperRow) -> list[str]:
    """Return the paper's figures of a model, as printed there."""
    precisions = [row.val.ap if row.val else None, row.test.ap if row.test else None]
    numbers = [row.size, row.params_m, row.gflops, *precisions, row.fps, row.batch32_ms]
    return [row.model, *("" if number is None else str(number) for number in numbers)]


def measured_cells(report: SpeedReport | None, row: PaperRow) -> list[str]:
    """Return the images per second of the engine and end to end at batch 1."""
    measured = next((one for one in report.rows if one.batch == 1), None) if report else None
    if report is None or measured is None:
        return ["", ""]
    size = max(report.input_hw)
    remark = "" if size == row.size else f" at {size}"
    return [f"{rounded(1000 / measured.stage(name).p50)}{remark}" for name in ("engine", "end_to_end")]


def rounded(fps: float) -> str:
    """Format a figure with three digits, or more if there are more before the point."""
    return f"{fps:.{0 if fps >= 100 else 1 if fps >= 10 else 2}f}"


def markdown(rows: Iterable[list[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is its header, numbers are right-aligned."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|---" + "|--:" * (head.count(" | ")) + "|", *body]


def write_between_marks(path: Path, text: str) -> None:
    """Replace the text between the two marks of a file.

    Raises:
        UsageError: The file does not have each mark once, in this order.
    """
    old = path.read_text(encoding="utf-8")
    before, *rest = old.split(START)
    parts = rest[0].split(END) if len(rest) == 1 else []
    if len(parts) != 2:
        raise UsageError(
            f"{path} does not have {START} and then {END}, each once.", fix="Add them on lines of their own."
        )
    path.write_text(f"{before}{START}\n{text}\n{END}{parts[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file with the two marks")
    options = parser.parse_args()
    try:
        text = paper_table()
        if options.write:
            write_between_marks(options.write, text)
        else:
            print(text)
    except (Y7Error, OSError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
