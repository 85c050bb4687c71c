"""Generated parts of the documentation: the command reference, the tables of figures and the charts.

    python docs/generate.py            write docs/commands.md, the tables between marks, and docs/images/*.png
    python docs/generate.py --check    write nothing; exit code 1 and a list if a text is not current

Every figure comes from a JSON file in benchmarks/results/.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from yolov7_deploy._charts import GREY, write_chart
from yolov7_deploy.cli.app import COMMANDS, app
from yolov7_deploy.cli.command import OTHER, PANELS

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
BLUE, ORANGE, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"  # Wong's palette
DPI = 160

# Rows of the CPU tables: keys of cpu_runtimes_*.json, and what they are called.
CPU_ROWS = {
    "fp32, onnxruntime": ("FP32", "ONNX Runtime"),
    "fp32, openvino": ("FP32", "OpenVINO"),
    "fp32, openvino-bf16": ("FP32", "OpenVINO, bfloat16"),
    "int8, onnxruntime": ("INT8", "ONNX Runtime"),
    "int8, openvino": ("INT8", "OpenVINO"),
    "int8, openvino-bf16": ("INT8", "OpenVINO, bfloat16 for the rest"),
}
CPU_NETWORKS = {
    "yolov7": "cpu_runtimes_yolov7_training.json",
    "yolov7-tiny-shapes": "cpu_runtimes_yolov7-tiny-shapes.json",
}
# Methods of int8_methods.json that docs/int8.md calls otherwise.
INT8_LABELS = {"mse": "mse (default for TensorRT)", "lp": "lp (default for CPUs)"}
FAMILIES = {"YOLO26": ("o", ORANGE), "RF-DETR": ("s", GREEN), "D-FINE": ("^", PURPLE), "YOLOv7": ("D", BLUE)}
# Defaults that depend on the machine.
MACHINE_DEFAULTS = {("train", "workers"): "`4`, at most the cores"}  # by command and parameter
REFERENCE_HEAD = """\
# Command reference

All commands and options of `y7`, as `y7 COMMAND --help` prints them. Every command also has `-q` (print results,
warnings and errors only) and `-v` (print the log, too). `y7 --version` prints the version, `y7 help COMMAND` the help,
and `y7 --install-completion` lets the shell complete commands and options with the Tab key.
[Command lines of the official program](migrating.md) are accepted, too.
"""


def read_result(name: str) -> dict[str, Any]:
    """Return a JSON document of benchmarks/results/."""
    document: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return document


# --- command reference ------------------------------------------------------------------------------------------------


def command_reference() -> str:
    """Return the page of all commands, in Markdown."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    sections = [command_section(commands[function.__name__], aliases) for function, aliases in COMMANDS]
    index = " · ".join(f"[{function.__name__}](#y7-{function.__name__})" for function, _ in COMMANDS)
    return "\n".join([REFERENCE_HEAD, index, "", *sections])


def command_section(command: Any, aliases: Sequence[str]) -> str:  # noqa: ANN401 - typer may have a click of its own
    """Return the section of one command: what it does, an example, and a table of each panel of options."""
    text, _, example = (command.help or "").partition("Example:")
    lines = [f"## y7 {command.name}", "", "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")).strip()]
    if example:
        lines += ["", f"Example: `{' '.join(example.split())}`"]
    if aliases:
        lines += ["", f"Also called {' and '.join(f'`y7 {alias}`' for alias in aliases)}."]
    for panel, parameters in panels(command).items():
        rows = [option_row(parameter, command.name) for parameter in parameters]
        title = [f"**{panel}**", ""] if len(panels(command)) > 1 else []
        lines += ["", *title, *markdown_table(["option", "what it does"], rows)]
    return "\n".join([*lines, ""])


def panels(command: Any) -> dict[str, list[Any]]:  # noqa: ANN401
    """Return the parameters by panel, in the order of the help."""
    known = PANELS.get(command.name, {})
    found: dict[str, list[Any]] = {name: [] for name in ("Arguments", *known, OTHER)}
    for parameter in command.params:
        if parameter.name not in ("quiet", "verbose", "help"):
            found[command._panel(parameter)].append(parameter)
    return {name: parameters for name, parameters in found.items() if parameters}


def option_row(parameter: Any, command: str) -> list[str]:  # noqa: ANN401
    """Return the cells of an option: its spellings and values, and its help with the default."""
    names = [parameter.metavar] if parameter.param_type_name == "argument" else list(parameter.opts)
    spelling = ", ".join(f"`{name}`" for name in [*names, *parameter.secondary_opts])
    if parameter.param_type_name != "argument" and not parameter.is_flag and parameter.metavar:
        spelling += f" {parameter.metavar}".replace("|", "\\|")
    text = (parameter.help or "").replace("|", "\\|").replace("\\[", "[")
    default = default_text(parameter, command)
    return [spelling, " ".join(filter(None, (text, default)))]


def default_text(parameter: Any, command: str) -> str:  # noqa: ANN401
    """Return the default of an option as a sentence; empty where the help names it or there is none."""
    value = parameter.default
    if parameter.required:
        return "**Required.**"
    if parameter.param_type_name == "argument" or value is None or value is False or callable(value) or value == ():
        return ""
    if value is True:
        return "On by default."
    return f"Default: {MACHINE_DEFAULTS.get((command, parameter.name), f'`{value}`')}."


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table; `numbers` are the columns that are aligned to the right."""
    rule = ["--:" if index in numbers else "---" for index in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def cpu_table(network: str) -> str:
    """Return time and AP of a network in each precision and CPU runtime."""
    result = read_result(f"cpu-2-core-vnni/{CPU_NETWORKS[network]}")["result"]
    accuracies = result["accuracy"]
    rows = []
    for key, (precision, runtime) in CPU_ROWS.items():
        accuracy = accuracies[key]
        interval = "" if key == "fp32, onnxruntime" else f"{accuracy['low']:.2f} to {accuracy['high']:.2f}"
        rows.append(
            [
                precision,
                runtime,
                f"{result['median_ms'][key]:.0f}",
                f"{result['ratio_to_fp32_onnxruntime'][key]:.2f}",
                f"{100 * accuracy['ap']:.2f}",
                f"{accuracy['points_lost']:.2f}",
                interval,
            ]
        )
    head = ["file", "runtime", "ms", "time / FP32", "AP", "points lost", "95 % interval"]
    return "\n".join(markdown_table(head, rows, numbers=(2, 3, 4, 5, 6)))


def detectors_table() -> str:
    """Return published AP and T4 time of today's detectors, fastest first."""
    document = read_result("published/detectors_t4.json")
    rows = [
        [
            f"**{row['model']}**" if row["family"] == "YOLOv7" else row["model"],
            row["precision"],
            str(row["size"]),
            f"{row['ap']:.1f}",
            f"{row['ms']:.1f}",
            row["licence"],
        ]
        for row in sorted(document["rows"], key=lambda row: row["ms"])
    ]
    return "\n".join(
        markdown_table(["model", "precision", "size", "AP val", "ms on a T4", "licence"], rows, numbers=(2, 3, 4))
    )


def int8_drop_table() -> str:
    """Return published AP losses of INT8."""
    drops = read_result("published/detectors_t4.json")["int8_drop"]
    rows = [[name, ", ".join(f"{value:.1f}" for value in values)] for name, values in drops.items() if name != "source"]
    return "\n".join(markdown_table(["INT8 in TensorRT", "AP points lost"], rows, numbers=(1,)))


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "choosing.md": {f"cpu {name}": lambda name=name: cpu_table(name) for name in CPU_NETWORKS},  # type: ignore[misc]
    "models.md": {"detectors": detectors_table, "int8 drops": int8_drop_table},
}


def with_tables(page: str) -> str:
    """Return a page with its generated tables made again."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, make in TABLES[page].items():
        marks = f"<!-- generated: {name} -->\n", "<!-- end of generated -->"
        pattern = re.compile(rf"({re.escape(marks[0])}).*?({re.escape(marks[1])})", re.DOTALL)
        parts = pattern.split(text)
        if len(parts) != 4:
            raise SystemExit(f"{page} needs exactly one table called {name}.")
        text = f"{parts[0]}{parts[1]}{make()}\n{parts[2]}{parts[3]}"
    return text


# --- charts -----------------------------------------------------------------------------------------------------------


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of a size in inches, and its axes."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself to the figure
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def cpu_chart() -> Figure:
    """Return the chart of the time of an image on a CPU, by precision and runtime."""
    figure, axes = new_axes(8.0, 3.2)
    labels = [f"{precision}, {runtime}" for precision, runtime in CPU_ROWS.values()]
    for offset, (network, colour) in zip((-0.19, 0.19), zip(CPU_NETWORKS, (BLUE, ORANGE), strict=True), strict=True):
        ratios = read_result(f"cpu-2-core-vnni/{CPU_NETWORKS[network]}")["result"]["ratio_to_fp32_onnxruntime"]
        values = [ratios[key] for key in CPU_ROWS]
        bars = axes.barh([index + offset for index in range(len(values))], values, 0.36, color=colour, label=network)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.09)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("time of an image / time in FP32 with ONNX Runtime (less is faster)")
    axes.legend(loc="center right", borderaxespad=1)
    return figure


def int8_chart() -> Figure:
    """Return the chart of the AP lost by each calibration method, with 95 % intervals."""
    figure, axes = new_axes(8.0, 2.6)
    methods = read_result("cpu-2-core-amx/int8_methods.json")["result"]["methods"]
    drops = {name: entry["drop"] for name, entry in methods.items() if "drop" in entry}
    names = sorted(drops, key=lambda name: drops[name]["points"])
    for index, name in enumerate(names):
        drop = drops[name]
        axes.plot([drop["low"], drop["high"]], [index, index], color=GREY, linewidth=1.5)
        axes.plot(drop["points"], index, "o", color=BLUE if name == "mse" else ORANGE)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_yticks(range(len(names)), [INT8_LABELS.get(name, name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("AP points lost against FP32, with the 95 % interval of 82 images (less is better)")
    return figure


def detectors_chart() -> Figure:
    """Return the chart of published AP against published T4 time."""
    figure, axes = new_axes(8.0, 4.2)
    rows = read_result("published/detectors_t4.json")["rows"]
    for family, (marker, colour) in FAMILIES.items():
        own = [row for row in rows if row["family"] == family]
        line = "none" if family == "YOLOv7" else "-"
        axes.plot(
            [row["ms"] for row in own], [row["ap"] for row in own], marker, color=colour, linestyle=line, label=family
        )
        for row in own:
            text = f"{row['model']} {row['precision']}" if family == "YOLOv7" else row["model"].removeprefix(family)
            axes.annotate(text.lstrip("-"), (row["ms"], row["ap"]), (5, -11), textcoords="offset points", color=colour)
    axes.set_xlabel("ms per image on an NVIDIA T4, TensorRT, batch 1 (published)")
    axes.set_ylabel("AP on COCO val2017")
    axes.legend(loc="lower right", borderaxespad=1)
    return figure


def training_chart() -> Figure:
    """Return the chart of AP by epoch of the training of the included weights, in its four parts."""
    figure, axes = new_axes(8.0, 3.0)
    parts = read_result("cpu-2-core/demo_weights.json")["result"]["epochs"]
    start = 0
    for name, colour in {"first": BLUE, "second": ORANGE, "third": GREEN, "fourth": PURPLE}.items():
        epochs = parts[name]
        points = [(start + index, float(row["ap"])) for index, row in enumerate(epochs, 1) if row["ap"]]
        label = f"{name} part, {epochs[0]['size']} pixels"
        axes.plot([x for x, _ in points], [ap for _, ap in points], "o-", color=colour, label=label)
        start += len(epochs)
    axes.set_xlabel("epoch")
    axes.set_ylabel("AP on the validation images")
    axes.legend(loc="lower right", borderaxespad=1)
    return figure


CHARTS: dict[str, Callable[[], Figure]] = {
    "cpu_time.png": cpu_chart,
    "int8_methods.png": int8_chart,
    "detectors_t4.png": detectors_chart,
    "training_ap.png": training_chart,
}


# --- writing ----------------------------------------------------------------------------------------------------------


def generated_texts() -> Iterator[tuple[Path, str]]:
    """Yield the path and the current text of every page that is generated, or has generated tables."""
    yield DOCS / "commands.md", command_reference()
    for page in TABLES:
        yield DOCS / page, with_tables(page)


def outdated() -> list[str]:
    """Return the names of pages that are not current."""
    return [
        path.name for path, text in generated_texts() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main() -> None:
    """Write everything, or check the texts."""
    if "--check" in sys.argv[1:]:
        names = outdated()
        sys.exit(f"Not current: {', '.join(names)}. Run: python docs/generate.py" if names else 0)
    for path, text in generated_texts():
        path.write_text(text, encoding="utf-8")
    for name, draw in CHARTS.items():
        write_chart(draw, DOCS / "images" / name, dpi=DPI)


if __name__ == "__main__":
    main()
