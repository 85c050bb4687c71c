"""The class of all commands: official options, help with options in panels, `-q` and `-v`."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from yolov7_deploy._output import set_verbosity
from yolov7_deploy.cli.official import translate

OTHER = "Other"
PATTERN_OPTIONS = ("--source", "-s", "--images", "--calib")
# Options of a command by panel, as names of parameters; commands with few options have one panel.
PANELS: dict[str, dict[str, str]] = {
    "train": {
        "Model and data": "data weights variant classes single_class img seed",
        "Schedule": "epochs batch nominal_batch patience val_every resume",
        "Hyperparameters": "hyp set_values show_hyp adam linear_lr freeze",
        "Images": "multi_scale rect close_mosaic image_weights cache",
        "Model details": "autoanchor recalibrate_bn sync_bn ota assigner constraint auxiliary",
        "Quantization-aware training": "qat calib int8_target reduce_range",
        "Hardware": "device workers half",
        "Output": "project name exist_ok save_dir save_minutes tensorboard json_path",
    },
    "export": {
        "Model": "weights img batch dynamic_batch dynamic input_kind output",
        "NMS": "nms conf iou max_det multi_label agnostic_nms max_candidates",
        "Precision": "precision fp16 int8 calib data max_drop method rounding int8_target reduce_range",
        "Graph": "opset simplify verify image",
        "Engine": "engine target plugin workspace opt_level max_batch",
    },
    "quantize": {
        "Model": "weights output",
        "Calibration": "calib calib_limit calib_cache method rounding int8_target reduce_range",
        "Accuracy": "data limit max_drop sensitivity exclude fallback chart trt_cache",
    },
    "optimize": {
        "Model and data": "weights data limit calib calib_limit candidate device",
        "Search": "max_drop batch concurrency duration",
        "Output": "save_dir json_path",
    },
    "build": {
        "Model": "weights output batch min_batch opt_batch max_batch fixed_thresholds",
        "Target": "target version_compatible hardware_compatible dla",
        "Builder": "plugin workspace opt_level timing_cache no_timing_cache sparse",
    },
    "detect": {
        "Model and images": "source weights img rect device runtime half",
        "Detections": "conf iou max_det classes multi_label agnostic_nms",
        "Several sources": "batch max_age realtime reconnects",
        "Output": "project name exist_ok save_dir save_txt save_conf json_path jsonl view nosave",
        "Metrics": "metrics_port metrics_host",
    },
    "score": {
        "Model and images": "source column weights img device runtime half",
        "Detections": "conf iou max_det classes multi_label agnostic_nms",
        "Workers": "workers batch cpus gpus address",
        "Output": "output output_format shard_size coco json_path",
    },
    "val": {
        "Model and data": "data weights images split limit single_class",
        "Protocol": "img batch rect conf iou max_det device runtime half",
        "Output": "per_class predictions project name exist_ok save_dir nosave json_path",
    },
    "report": {
        "Model and data": "weights against data limit stage_limit device runtime",
        "Contents": "max_drop duration bench sensitivity",
        "Output": "output json_path",
    },
    "triton": {
        "Model": "weights output name backend container",
        "Serving": "max_batch preferred_batch queue_delay instances device",
    },
    "bench": {
        "Model": "weights img device runtime half",
        "Measurement": "batch concurrency duration warmup source frame conf iou max_det",
        "Comparison": "paper val_report compare estimate",
        "Output": "save_dir chart no_chart json_path",
    },
}

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors only.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Print the log, too; -vv for more.")
]


def with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that also has the options `-q` and `-v`."""
    extra = {"quiet": Quiet, "verbose": Verbose}

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool = False, verbose: int = 0, **options: Any) -> None:  # noqa: ANN401
        if quiet or verbose:
            set_verbosity(quiet=quiet, verbose=verbose)
        command(*arguments, **options)

    signature = inspect.signature(command, eval_str=True)
    own = inspect.signature(run, follow_wrapped=False).parameters
    parameters = [*signature.parameters.values(), *(own[name].replace(annotation=extra[name]) for name in extra)]
    run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()} | extra
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _option_of(value: str) -> str:
    """Return the option that a file is probably meant for."""
    from yolov7_deploy.hub import MODEL_SUFFIXES, OFFICIAL_NAMES

    path = Path(value)
    if path.suffix.lower() in MODEL_SUFFIXES or value in OFFICIAL_NAMES:
        return "--weights"
    return "--data" if path.suffix.lower() in (".yaml", ".yml", ".json") else "--source"


def _refuse_expanded_pattern(args: Sequence[str]) -> None:
    """Refuse several files after one option: the shell wrote them in place of a pattern without quotes."""
    for start, option in enumerate(args, start=1):
        if option in PATTERN_OPTIONS:
            files = list(itertools.takewhile(lambda word: not word.startswith("-"), args[start:]))
            if len(files) > 1 and all(map(os.path.exists, files)):
                suffixes = {Path(file).suffix for file in files}
                start_of_all = os.path.commonprefix(files)  # noqa: RUF071 - by characters, as in a pattern
                pattern = f"{start_of_all}*{suffixes.pop() if len(suffixes) == 1 else ''}"
                raise typer.BadParameter(
                    f"{option} takes one value, not {len(files)} files; a shell replaces a pattern without quotes by "
                    f"its files. For example:  {option} '{pattern}'"
                )


class Y7Command(TyperCommand):
    """A command whose help has panels, and which reads the options of the official program."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer may have a click of its own
        """Parse arguments of this or of the official program."""
        if not ctx.resilient_parsing:  # the shell asks for completions of a line that is not complete
            known = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
            args = translate(self._function, args, known=known)
            if args and not args[0].startswith("-") and not any(p.param_type_name == "argument" for p in self.params):
                raise typer.BadParameter(self._with_options(args, known))
            _refuse_expanded_pattern(args)
        return super().parse_args(ctx, args)

    def _with_options(self, args: list[str], known: set[str]) -> str:
        """Return the message for values without options, such as `y7 detect best.onnx a.jpg` or `source=a.jpg`."""
        words = list(itertools.takewhile(lambda word: not word.startswith("-"), args))
        options = []
        for word in words:
            name, separator, value = word.partition("=")
            option = {"model": "--weights", "imgsz": "--img"}.get(name, f"--{name}") if separator else _option_of(word)
            options.append(f"{option} {value if separator else word}" if option in known else word)
        line = " ".join([f"y7 {self._function}", *options, *args[len(words) :]])
        return f"{words[0]} is given without an option. For example:  {line}"

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the options, one panel after the other."""
        panels = {name: list[tuple[str, str]]() for name in ("Arguments", *PANELS.get(self._function, {}), OTHER)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                name, text = record
                if parameter.param_type_name == "argument":
                    name = name.partition(" <")[0]  # without the type, which new versions of typer add
                panels[self._panel(parameter)].append((name, text.replace("\\[", "[")))  # typer 0.16 writes for rich
        for name, records in panels.items():
            if records:
                with formatter.section("Options" if name == OTHER and len(panels) == 2 else name):
                    formatter.write_dl(records)

    @property
    def _function(self) -> str:
        return getattr(self.callback, "__name__", "")

    def _panel(self, parameter: Any) -> str:  # noqa: ANN401
        if parameter.param_type_name == "argument":
            return "Arguments"
        panels = PANELS.get(self._function, {})
        return next((panel for panel, names in panels.items() if parameter.name in names.split()), OTHER)


class Y7Group(TyperGroup):
    """The group of all commands; `y7 train_aux.py` is `y7 train-aux`."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401
        """Return the command of a name, also in the spelling of the official scripts."""
        return super().get_command(ctx, cmd_name.removesuffix(".py").replace("_", "-"))

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the first sentence of each command in full, on two lines if it is long."""
        commands = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(c.name, c.get_short_help_str(limit=200)) for c in commands if not c.hidden])
