"""`y7 plugin`: build the TensorRT NMS plugin for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yolov7_deploy._output import echo, note

if TYPE_CHECKING:
    from yolov7_deploy.tensorrt.plugin_library import PluginLibrary


def plugin(
    tensorrt_include: Annotated[
        Path | None, typer.Option("--tensorrt-include", help="Folder of NvInfer.h (default: searched).")
    ] = None,
    cuda: Annotated[
        Path | None, typer.Option("--cuda", help="Folder of a CUDA toolkit, or its nvcc (default: searched).")
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "--arch",
            metavar="CAPABILITIES",
            help="Compute capabilities, separated by commas: 86, 8.6 or native (default: all that this CUDA supports).",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="FILE.so, or a folder (default: the path that y7 build searches)."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Number of parallel compilers (default: one per core).")
    ] = None,
    kernels_only: Annotated[
        bool, typer.Option("--kernels-only", help="Build only the CUDA kernels, which need no TensorRT headers.")
    ] = False,
) -> None:
    """Build the TensorRT NMS plugin with the local CUDA toolkit.

    The plugin is installed where y7 build searches for it, unless --output is given.

    Example:  y7 plugin --arch native
    """
    from yolov7_deploy.tensorrt.plugin_build import build_plugin

    library = build_plugin(
        tensorrt_include=tensorrt_include,
        cuda=cuda,
        architectures=arch or (),
        output=output,
        jobs=jobs,
        kernels_only=kernels_only,
        log=note,
    )
    echo(describe(library, is_installed=output is None))


def describe(library: PluginLibrary, *, is_installed: bool) -> str:
    """Return a description of the library; with the command to use it if it is not installed for y7 build."""
    from yolov7_deploy.tensorrt.plugin_library import ABI_TITLES, PLUGIN_VARIABLE

    gpus = ", ".join(f"{number // 10}.{number % 10}" for number in library.compute_capabilities) or "as given"
    lines = [
        f"built:    {library.path}",
        f"for:      {ABI_TITLES[library.abi]}",
        f"GPUs:     compute capability {gpus}"
        + (f"; later ones through PTX of {max(library.ptx) / 10:.1f}" if library.ptx else ""),
        f"CUDA:     {library.cuda}",
    ]
    if not is_installed:
        lines.append(f"To use it:  export {PLUGIN_VARIABLE}={library.path}")
    return "\n".join(lines)
