"""Options that several commands share, and the functions that parse their values."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from yolov7_deploy._bounded_read import open_file
from yolov7_deploy._output import note
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import ONNX_RUNTIMES, Thresholds

DEFAULTS = Thresholds()
MAX_METAVAR = 45  # characters of the values of an option in help; longer lists are in its text
DEFAULT_FROM_MODEL = "(default: the value in the model file, else {})"
_JSON_START_BYTES = 64  # spaces and line breaks may come first


def one_of(values: Sequence[str], *names: str, text: str) -> Any:  # noqa: ANN401 - typer's options are of any type
    """Return an option that takes one of some values, which its help and the completion of the shell show."""
    joined = "|".join(values)
    if len(joined) > MAX_METAVAR:
        joined, text = names[0].strip("-").upper(), f"{text} One of: {', '.join(values)}."
    return typer.Option(
        *names,
        metavar=joined,
        autocompletion=lambda incomplete: [value for value in values if value.startswith(incomplete)],
        help=text,
    )


def complete_weights(incomplete: str) -> list[str]:
    """Return official names and model files that begin like this, for the completion of the shell."""
    from yolov7_deploy.hub import MODEL_SUFFIXES, OFFICIAL_NAMES

    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete or "x").parent
    with contextlib.suppress(OSError):
        prefix = "" if str(folder) == "." and not incomplete.startswith("./") else f"{str(folder).rstrip('/')}/"
        found = [
            f"{prefix}{path.name}{'/' * path.is_dir()}"
            for path in folder.iterdir()
            if path.is_dir() or path.suffix.lower() in MODEL_SUFFIXES
        ]
        return sorted(name for name in (*found, *OFFICIAL_NAMES) if name.startswith(incomplete))
    return []


Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        "-w",
        metavar="FILE",
        autocompletion=complete_weights,
        help="A .pt, .safetensors, .onnx or .engine file, or an official name.",
    ),
]
CheckpointWeights = Annotated[
    str,
    typer.Option(
        "--weights",
        "-w",
        metavar="FILE",
        autocompletion=complete_weights,
        help="A .pt or .safetensors file, or an official name.",
    ),
]
Conf = Annotated[
    float | None,
    typer.Option(
        "--conf", "--conf-thres", help=f"Confidence threshold, 0 to 1 {DEFAULT_FROM_MODEL.format(DEFAULTS.conf)}."
    ),
]
Iou = Annotated[
    float | None,
    typer.Option(
        "--iou", "--iou-thres", help=f"IoU threshold of NMS, 0 to 1 {DEFAULT_FROM_MODEL.format(DEFAULTS.iou)}."
    ),
]
MaxDet = Annotated[
    int | None,
    typer.Option(
        "--max-det",
        "--topk-all",
        help=f"Maximum number of detections per image {DEFAULT_FROM_MODEL.format(DEFAULTS.max_det)}.",
    ),
]
Img = Annotated[
    str | None,
    typer.Option(
        "--img",
        "--img-size",
        "--imgsz",
        metavar="SIZE",
        help="Network input size: 640, or height and width such as 384x640 "
        "(default: the size in the file, else the training size, else the paper's).",
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, or a GPU: cuda:0 or 0.")]
RuntimeName = Annotated[str, one_of(ONNX_RUNTIMES, "--runtime", text="What runs an ONNX file; openvino: in float32.")]
Half = Annotated[
    bool | None,
    typer.Option("--half/--no-half", help="Run a checkpoint in FP16 (default: on a GPU only)."),
]


def check_json_path(path: str | None) -> str | None:
    """Check before the work begins that a JSON result can be written after it, and replaces no file of another kind.

    Raises:
        UsageError: It cannot be written, or there is a file that is not JSON.
    """
    if path is not None and path != "-":
        check_writable(Path(path))
        if _has_other_content(Path(path)):
            raise UsageError(
                f"{path} exists and is not JSON. It is not replaced.", fix="Choose another path, such as result.json"
            )
    return path


def check_writable(path: Path) -> None:
    """Check that a file can be written later; creates nothing.

    Raises:
        UsageError: Its folder cannot be created or written to.
    """
    # `os.path` does not raise for folders that must not be searched.
    is_folder, is_file = os.path.isdir(path), os.path.isfile(path)  # noqa: PTH112, PTH113
    if os.path.exists(path) and not is_folder and not is_file:  # noqa: PTH110
        return  # a device such as /dev/stdout
    existing = next(parent for parent in path.absolute().parents if os.path.exists(parent))  # noqa: PTH110
    if is_folder:
        reason = "it is a folder"
    elif not os.path.isdir(existing):  # noqa: PTH112
        reason = f"{existing} is not a folder"
    elif not os.access(existing, os.W_OK):
        reason = f"{existing} is read-only"
    else:
        return
    raise UsageError(f"{path} cannot be written: {reason}.", fix="Choose another path.")


def _has_other_content(path: Path) -> bool:
    """Return whether a path is a file whose text does not begin as JSON does."""
    try:
        with open_file(path, max_bytes=sys.maxsize) as file:
            start = file.read(_JSON_START_BYTES).lstrip()
    except OSError:  # it does not exist, or is not a regular file
        return False
    return start[:1] not in (b"", b"{", b"[")


JsonPath = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=check_json_path,
        help="Write the full result as JSON; - is standard output.",
    ),
]
SaveDir = Annotated[
    Path | None, typer.Option("--save-dir", help="Folder of the results, instead of --project and --name.")
]
Name = Annotated[
    str, typer.Option("--name", metavar="NAME", help="New folder in --project; a number is added if it exists.")
]
ExistOk = Annotated[bool, typer.Option("--exist-ok", help="Use the folder --name even if it exists.")]


def was_given(name: str) -> bool:
    """Return whether the user set a parameter of the running command, as an option or an environment variable.

    Args:
        name: The parameter's name in the command's function, such as `max_det`.

    Raises:
        LookupError: The command does not have this parameter.
    """
    # Newer versions of typer contain a copy of click; the base of its context class shows which one is used.
    click = import_module(typer.Context.__mro__[1].__module__.rpartition(".")[0] + ".globals")
    source = click.get_current_context().get_parameter_source(name)
    if source is None:
        raise LookupError(f"The command does not have a parameter {name}.")
    return source.name in ("COMMANDLINE", "ENVIRONMENT")


def check_thresholds(*, conf: float | None, iou: float | None, max_det: int | None) -> None:
    """Check thresholds before a model is downloaded or loaded; `None` stands for the value in the model file.

    Raises:
        UsageError: A value is outside its range.
    """
    given: dict[str, Any] = {"conf": conf, "iou": iou, "max_det": max_det}
    replace(Thresholds(), **{name: value for name, value in given.items() if value is not None})


def parse_img(text: str | None) -> int | tuple[int, int] | None:
    """Parse `640`, or height and width as `384x640`, `384,640` or `384 640`.

    Raises:
        UsageError: The text is not a size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*([1-9][0-9]*)(?:[xX, ]\s*([1-9][0-9]*))?\s*", text)
    if match is None:
        raise UsageError(f"--img {text} is not a size.", fix="For example: --img 640, or height x width: --img 384x640")
    return (int(match[1]), int(match[2])) if match[2] else int(match[1])


def parse_classes(texts: list[str] | None) -> list[str] | None:
    """Return the texts that name classes, such as `person,dog` or `0 16`; `split_classes` divides them."""
    return [text for text in texts or () if text.strip()] or None


def label_rule(multi_label: bool) -> str:
    """Return a short description of which classes of a box can become detections."""
    return "multi-label NMS" if multi_label else "best class per box"


def checkpoint_or_placeholder(weights: str) -> str:
    """Return the weights that a suggested `y7 export` takes: these if they are a checkpoint, else a placeholder."""
    from yolov7_deploy.hub import CHECKPOINT_SUFFIXES, OFFICIAL_NAMES

    is_checkpoint = Path(weights).suffix.lower() in CHECKPOINT_SUFFIXES or weights in OFFICIAL_NAMES
    return weights if is_checkpoint else "WEIGHTS.pt"


def locate_weights(weights: str) -> Path:
    """Return the file of a path or an official name, downloaded with a progress bar if it is not on this machine."""
    from yolov7_deploy._console import progress
    from yolov7_deploy.hub import find_weights

    with contextlib.ExitStack() as stack:

        @functools.cache
        def bar() -> Callable[[int, int], None]:  # appears with the first bytes
            return stack.enter_context(progress("download", unit="MB"))

        return find_weights(weights, progress=lambda done, total: bar()(done, total))


@contextlib.contextmanager
def announce_replacement(path: Path, *, to_stderr: bool) -> Iterator[None]:
    """Print that a file was replaced, if the block writes to a path where one existed."""
    existed = path.is_file()
    yield
    if existed:
        note(f"{path} existed and was replaced.", err=to_stderr)
