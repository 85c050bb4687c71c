"""Command lines of the official program: what each option of its five scripts is here.

One table per command. `translate` rewrites a command line before it is parsed, prints the line that it became, and
answers what does not exist here with the line to use instead. Options that have the same name and meaning here are not
in the tables, except those with several values, which the parser does not know.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yolov7_deploy._output import note
from yolov7_deploy.errors import UsageError
from yolov7_deploy.paper import VARIANTS

Arguments = list[str]
Count = Literal["0", "1", "?", "+"]  # of values; `?` is one or none, `+` one or more


@dataclass(frozen=True, slots=True)
class Rule:
    """The meaning of an option of the official program.

    Attributes:
        values: Number of its values.
        action: Receives the values and returns the arguments that replace the option.
        remark: A difference from the official program, printed when the option is used.
    """

    values: Count
    action: Callable[[Arguments], Arguments]
    remark: str = ""


class _RefusedError(Exception):
    """An option does not exist here.

    Args:
        message: What it is, and why it does not exist.
        instead: Arguments that replace it in the line to use.
        command: Another command of the line to use.
        keep: Options that the other command has, too; all by default.
    """

    def __init__(self, message: str, *instead: str, command: str = "", keep: tuple[str, ...] | None = None) -> None:
        super().__init__(message)
        self.instead, self.command, self.keep = instead, command, keep


# --- actions ----------------------------------------------------------------------------------------------------------


def _becomes(*arguments: str, values: Count = "0") -> Rule:
    """Return a rule for fixed arguments, in which {} is the first value."""
    return Rule(values, lambda given: [argument.format(*given) for argument in arguments])


def _ignored(remark: str = "", *, values: Count = "0") -> Rule:
    return Rule(values, lambda _: [], remark)


def _refused(message: str, *instead: str, command: str = "", keep: tuple[str, ...] | None = None) -> Rule:
    def refuse(_: Arguments) -> Arguments:
        raise _RefusedError(message, *instead, command=command, keep=keep)

    return Rule("0", refuse)


def _joined(name: str, separator: str) -> Rule:
    return Rule("+", lambda values: [name, separator.join(values)])


def _weights(values: Arguments) -> Arguments:
    """Return one weights file; in `train`, the official program writes '' for random weights."""
    names = [value for value in values if value]
    if len(names) > 1:
        raise _RefusedError(f"--weights: {len(names)} models as an ensemble cannot run.", "--weights", names[0])
    return ["--weights", *names] if names else []


def _variant(values: Arguments) -> Arguments:
    """Return the variant that a configuration file is named after: `yolov7-w6` for `yolov7-w6-custom.yaml`."""
    if not values[0]:
        return []
    stem = Path(values[0]).stem.replace("_", "-")
    named = [name for name in VARIANTS if f"{stem}-".startswith(f"{name}-")]
    if not named:
        message = f"--cfg {values[0]}: the name of the file is not that of an official network."
        raise _RefusedError(message, "--variant", "yolov7")
    return ["--variant", max(named, key=len)]


def _hyperparameters(values: Arguments) -> Arguments:
    """Return a file that exists, or the preset with the values of an official file."""
    path = Path(values[0])
    is_preset = path.name.startswith("hyp.scratch.") and path.suffix == ".yaml" and not path.is_file()
    return ["--hyp", path.stem.removeprefix("hyp.scratch.") if is_preset else values[0]]


def _run(values: Arguments) -> Arguments:
    """Return the folder of a run; the official program names one of its weights files."""
    path = Path(*values)
    if path.suffix in (".pt", ".pth"):
        message = f"--resume {path}: a run of the official program cannot be resumed, but its weights can be trained."
        raise _RefusedError(message, "--weights", str(path))
    return ["--resume", "--save-dir", str(path.parent if path.suffix else path)] if values else ["--resume"]


def _device(values: Arguments) -> Arguments:
    gpus = values[0].split(",")
    if len(gpus) > 1:
        raise _RefusedError(f"--device {values[0]}: this command runs on one GPU.", "--device", gpus[0])
    return ["--device", values[0] or "auto"]


def _training_devices(values: Arguments) -> Arguments:
    """Return the device; several GPUs need one process each, which `torchrun` starts."""
    count = len(values[0].split(","))
    if count > 1 and "RANK" not in os.environ:
        torchrun = f"CUDA_VISIBLE_DEVICES={values[0]} torchrun --nproc-per-node {count} -m yolov7_deploy train"
        raise _RefusedError(f"--device {values[0]}: every GPU needs a process of its own.", command=torchrun)
    return [] if count > 1 else ["--device", values[0] or "auto"]


def _task(values: Arguments) -> Arguments:
    if values[0] == "speed":
        raise _RefusedError("--task speed: y7 bench measures speed.", command="y7 bench", keep=_BENCH_OPTIONS)
    if values[0] == "study":
        raise _RefusedError("--task study: run y7 val once for each size.", "--img", "640")
    return ["--split", values[0]]


def _nms(used: Mapping[str, Arguments]) -> Arguments:
    """Return the kind of NMS in the graph that the options of the official export select together."""
    if "--end2end" in used and "--max-wh" in used:
        agnostic = ["--agnostic-nms"] if used["--max-wh"] == ["0"] else []
        return ["--nms", "standard", *agnostic]
    if "--end2end" in used or "--include-nms" in used:
        return ["--nms", "efficient"]
    return ["--nms", "none"] if "--grid" in used else []


# --- tables -----------------------------------------------------------------------------------------------------------

_BENCH_OPTIONS = ("--weights", "--img", "--device", "--conf", "--iou", "--conf-thres", "--iou-thres")
_COMMON: Mapping[str, Rule] = {
    "--weights": Rule("+", _weights),
    **dict.fromkeys(("--img", "--img-size", "--imgsz"), _joined("--img", " ")),
    "--classes": Rule("+", lambda values: [part for value in values for part in ("--classes", value)]),
    "--device": Rule("1", _device),
    "--augment": _refused("--augment: there is no test-time augmentation."),
    "--no-trace": _ignored(),
    "--v5-metric": _ignored("AP is always that of COCO"),
}
_WANDB = _ignored("results are logged to the folder of the run and to TensorBoard only", values="1")
_LABELS = _refused(
    "y7 val does not write label files; y7 detect does.",
    *("--source", "FOLDER", "--save-txt"),
    command="y7 detect",
    keep=(*_BENCH_OPTIONS, "--source", "--save-txt"),
)

TABLES: Mapping[str, Mapping[str, Rule]] = {
    "train": {
        **_COMMON,
        "--cfg": Rule("1", _variant, "the file is not read; its name is the network, and --data has the classes"),
        "--hyp": Rule("1", _hyperparameters),
        "--resume": Rule("?", _run),
        "--device": Rule("1", _training_devices),
        "--freeze": _joined("--freeze", ","),
        "--label-smoothing": _becomes("--set", "label_smoothing={}", values="1"),
        "--notest": _becomes("--val-every", "0"),
        "--nosave": _ignored("the best and the last weights are always written"),
        "--save-period": _ignored("weights are written after every epoch", values="1"),
        "--cache-images": _ignored("images are cached in a quarter of the free memory, or in  --cache GIB"),
        "--local-rank": _ignored(values="1"),
        "--evolve": _refused("--evolve: there is no search of hyperparameters; --set lr0=0.001 sets one."),
        "--quad": _refused("--quad: there is no quad data loader."),
        "--upload-dataset": _ignored(_WANDB.remark),
        **dict.fromkeys(("--entity", "--bbox-interval", "--artifact-alias", "--bucket"), _WANDB),
    },
    "val": {
        **_COMMON,
        "--task": Rule("1", _task),
        "--save-json": Rule("?", lambda values: ["--predictions", *(values or ["predictions.json"])]),
        **dict.fromkeys(("--save-txt", "--save-conf", "--save-hybrid"), _LABELS),
    },
    "detect": {**_COMMON, "--update": _ignored("weights are used as they are")},
    "export": {
        **_COMMON,
        "--device": _ignored(values="1"),
        "--grid": _ignored(),
        "--end2end": _ignored(),
        "--include-nms": _ignored(),
        "--max-wh": _ignored(values="1"),
    },
    "bench": {**_COMMON, "--batch": _joined("--batch", ","), "--batch-size": _joined("--batch", ",")},
}


def translate(command: str, arguments: Sequence[str], *, known: Collection[str]) -> Arguments:
    """Return the arguments of a command with those of the official program replaced.

    Args:
        command: Name of the command.
        arguments: As they were typed.
        known: The options of the command.

    Raises:
        UsageError: An option does not exist here; its fix is the line to use.
    """
    table, result = TABLES.get(command, {}), Arguments()
    used: dict[str, Arguments] = {}
    refused: _RefusedError | None = None
    for name, values in _split(arguments, table):
        if name not in table:
            result += values
            continue
        used[name] = values
        try:
            result += table[name].action(values)
        except _RefusedError as error:
            refused = error
            result += error.instead
    if command == "export" and not any(argument.partition("=")[0] == "--nms" for argument in arguments):
        result += _nms(used)
    if refused is not None:
        raise UsageError(str(refused), fix=_line(refused.command or f"y7 {command}", result, refused.keep))
    foreign = [name for name in used if name not in known]
    if foreign and os.environ.get("RANK", "0") == "0":  # of the processes of torchrun, the first one prints
        note(f"With the options of y7:  {_line(f'y7 {command}', result)}", err=True)
        for name in foreign:
            if table[name].remark:
                note(f"{name}: {table[name].remark}", err=True)
    return result


def _split(arguments: Sequence[str], table: Mapping[str, Rule]) -> Iterator[tuple[str, Arguments]]:
    """Yield every option of the table with its values, and everything else as values of an empty name."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        rule = table.get(name)
        if rule is None:
            yield "", [argument, *rest] if name == "--" else [name + equals + value]
            rest = [] if name == "--" else rest
            continue
        values = [value] if equals else []
        most = {"0": 0, "1": 1, "?": 1, "+": len(rest)}[rule.values]
        while rest and len(values) < most and (not rest[0].startswith("-") or rest[0][1:].isdecimal()):
            values.append(rest.pop(0))
        if rule.values in "1+" and not values:
            raise UsageError(f"{name} has no value.", fix=f"Write it after the option:  {name} VALUE")
        yield name, values


def _line(command: str, arguments: Sequence[str], keep: Collection[str] | None = None) -> str:
    """Return a command line; of its options only those in `keep`, if that is given."""
    parts = list(arguments)
    if keep is not None:
        parts = [part for name, *values in _options(arguments) if name in keep for part in (name, *values)]
    return f"{command} {shlex.join(parts)}".rstrip()


def _options(arguments: Sequence[str]) -> Iterator[Arguments]:
    """Yield every option with its values."""
    group: Arguments = []
    for argument in arguments:
        if argument.startswith("-") and group:
            yield group
            group = []
        group.append(argument)
    if group:
        yield group
