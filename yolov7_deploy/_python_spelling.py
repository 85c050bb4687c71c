"""Messages for Python callers: `--conf 0.25` becomes `conf=0.25`, and `y7 export --batch 8` a call of `export`.

Errors are written with the options of the command line, which prints them as they are; `str(error)`, which Python
shows, is the result of `in_python`. Commands without a function stay commands (`y7 doctor`, `pip install`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Options without a value that are not `name=True`, or `name=False` for `--no-name`.
_FLAGS = {
    "--agnostic-nms": "class_agnostic=True",
    "--best-class": "multi_label=False",
    "--dynamic": "batch=None, dynamic_size=True",
    "--dynamic-batch": "batch=None",
    "--fp16": 'precision="fp16"',
    "--full-range": "reduce_range=False",
    "--int8": 'precision="int8"',
    "--noautoanchor": "autoanchor=False",
    "--single-cls": "single_class=True",
}
_PLAIN_FLAGS = _words(
    "adam autoanchor engine exist-ok half image-weights linear-lr multi-label multi-scale paper qat realtime rect "
    "reduce-range resume sensitivity sparse version-compatible"
)
# Options whose argument has another name.
_NAMES = {
    "cache": "cache_gib",
    "duration": "duration_s",
    "input": "input_kind",
    "max-age": "max_age_s",
    "set": "hyp",
    "target": "targets",
    "warmup": "warmup_s",
    "workspace": "workspace_gib",
}
# Options whose value may be any word.
_WORDS = _words(
    "assigner auxiliary constraint device fallback hardware-compatible hyp input int8-target method nms plugin "
    "precision rounding runtime save-dir split variant weights"
)
_NO_VALUES = _words("a already and are as can cannot does has have is must needs no not or out shows to with without")

# The function of a command, and the options that it has as arguments; with any other, a command stays a command.
_EXPORT = "weights output precision img batch nms conf iou max-det max-candidates input opset calib data max-drop " \
    "method rounding int8-target image dynamic-batch fp16 int8 no-simplify no-verify engine"  # fmt: skip
_TRAIN = "data weights variant hyp epochs batch img device workers save-dir project name resume patience freeze " \
    "no-half qat calib int8-target reduce-range full-range"  # fmt: skip
_VALIDATE = "weights data images split limit img batch conf iou max-det device runtime"
_BENCHMARK = "weights batch device runtime img half no-half concurrency source conf iou max-det duration warmup paper"
_BUILD = "weights output target plugin min-batch opt-batch max-batch workspace opt-level dla"
_FUNCTIONS: Mapping[str, frozenset[str]] = {
    name: _words(options)
    for name, options in {
        "export": _EXPORT,
        "train": _TRAIN,
        "val": _VALIDATE,
        "bench": _BENCHMARK,
        "build": _BUILD,
        "detect": "weights source",
    }.items()
}

# Lines for other programs.
_OTHER_PROGRAMS = re.compile(
    r"(?<![\w./-])(?:docker\s[^\n;]*|"
    r"(?:pip|git|torchrun|trtexec|cmake|nvcc|nvidia-smi|apt|sudo|python3?|y7)\s(?:(?! {2,}(?:or|and)\b)[^\n;()])*)"
)
_COMMAND = re.compile(r"(?<![\w./-])y7 (\w+)((?: {1,2}--[a-z][a-z0-9-]*(?: (?!-\D|\()[^\s;]*[^\s;,.:])?)+)")
_OPTION = re.compile(r"(?<![\w./-])(--[a-z][a-z0-9-]*)(?: (?!-\D)([^\s;()]*[^\s;,.:()]))?")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?|nan|inf")
_LIST = re.compile(r"(?:\d+|[A-Z]+)(?:[x,](?:\d+|[A-Z]+))+")
_NEIGHBOURS = re.compile(
    r"(\w=(?:\"[^\"]*\"|[^\s\",]*[^\s\",;:.])) (?=[a-z_]+=)"
)  # arguments without a comma between them
_GPUS = re.compile(r"sm\d+(?:,sm\d+)*")


def in_python(text: str) -> str:
    """Return a message in which options are arguments, and commands are calls of functions where there is one.

    Args:
        text: A message, or a fix, with the options of the command line.
    """
    text = _COMMAND.sub(_call_or_command, text)
    parts, end = [], 0
    for found in _OTHER_PROGRAMS.finditer(text):
        parts += [_arguments(text[end : found.start()]), found[0]]
        end = found.end()
    return "".join([*parts, _arguments(text[end:])])


def _arguments(text: str) -> str:
    return _NEIGHBOURS.sub(r"\1, ", _OPTION.sub(_argument, text))


def _call_or_command(found: re.Match[str]) -> str:
    command, rest = found[1], found[2]
    options = [(name, value or "") for name, value in _OPTION.findall(rest)]
    if any(name.removeprefix("--") not in _FUNCTIONS.get(command, ()) for name, _ in options):
        return found[0]
    arguments = dict(filter(None, (_pair(name, value) for name, value in options)))
    return _CALLS[command](arguments)


def _pair(option: str, value: str) -> tuple[str, str]:
    name, _, spelled = _spelled(option, value).partition("=")
    return name, spelled


def _argument(found: re.Match[str]) -> str:
    """Return an option in running text as an argument; what follows it may be its value, or the next word."""
    option, value = found[1], found[2] or ""
    name = option.removeprefix("--")
    is_flag = option in _FLAGS or name in _PLAIN_FLAGS or name.startswith("no-")
    is_value = value and not is_flag and value not in _NO_VALUES and (name in _WORDS or _is_value(value))
    spelled = _spelled(option, value if is_value else "")
    return spelled + found[0][len(option) :] if not is_value else spelled


def _is_value(text: str) -> bool:
    """Return whether a word is a number, a size, a GPU, a file or a placeholder such as FOLDER."""
    is_known = any(pattern.fullmatch(text) for pattern in (_NUMBER, _LIST, _GPUS))
    return is_known or text.isupper() or re.search(r"[./\\=]", text) is not None


def _spelled(option: str, value: str) -> str:
    name = option.removeprefix("--")
    if option in _FLAGS:
        return _FLAGS[option]
    if name.startswith("no-"):
        return f"{_identifier(name[3:])}=False"
    if not value:
        return f"{_identifier(name)}=True" if name in _PLAIN_FLAGS else _NAMES.get(name, _identifier(name))
    if name == "set" and "=" in value:
        key, _, number = value.partition("=")
        return f'hyp={{"{key}": {number}}}'
    return f"{_NAMES.get(name, _identifier(name))}={_literal(name, value)}"


def _literal(name: str, value: str) -> str:
    if name == "target":
        return f"[{', '.join(_quoted(item) for item in value.split(','))}]"
    if _LIST.fullmatch(value):
        return f"({', '.join(re.split('[x,]', value))})"
    is_number = _NUMBER.fullmatch(value) is not None and value not in ("nan", "inf")
    return value if is_number or value == "N" else f'float("{value}")' if value in ("nan", "inf") else _quoted(value)


def _quoted(value: str) -> str:
    return value if value[0] in "'\"" else f'"{value}"'


def _identifier(name: str) -> str:
    return name.replace("-", "_")


def _call(function: str, **first: str) -> Callable[[Mapping[str, str]], str]:
    """Return a function that writes a call; the arguments in `first` come without names, by default with its values."""

    def write(arguments: Mapping[str, str]) -> str:
        positional = [] if "resume" in arguments else [arguments.get(name, value) for name, value in first.items()]
        named = [f"{name}={value}" for name, value in arguments.items() if name not in first]
        return f"{function}({', '.join([*positional, *named])})"

    return write


def _build_call(arguments: Mapping[str, str]) -> str:
    file = arguments.get("weights", '"FILE.onnx"')
    options = ", ".join(f"{name}={value}" for name, value in arguments.items() if name not in ("weights", "output"))
    model = f"OnnxModel.load({file})" + (f", EngineOptions({options})" if options else "")
    output = arguments.get("output", file.replace(".onnx", ".engine"))
    return f"build_engine({model}).save({output})"


def _detect_call(arguments: Mapping[str, str]) -> str:
    return f"Detector({arguments.get('weights', '')})({arguments.get('source', 'image')})"


_CALLS: Mapping[str, Callable[[Mapping[str, str]], str]] = {
    "export": _call("export", weights='"WEIGHTS.pt"'),
    "train": _call("train", data='"data.yaml"'),
    "val": _call("validate", weights='"WEIGHTS"', data='"data.yaml"'),
    "bench": _call("benchmark", weights='"WEIGHTS"'),
    "build": _build_call,
    "detect": _detect_call,
}
