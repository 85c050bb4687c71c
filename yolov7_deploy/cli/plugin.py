"""`y7 plugin`: build our TensorRT plugin for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from yolov7_deploy.tensorrt.plugin_library import PluginLibrary


def plugin(
    tensorrt_include: Annotated[
        Path | None, typer.Option("--tensorrt-include", help="Folder of NvInfer.h; searched for without it.")
    ] = None,
    cuda: Annotated[
        Path | None, typer.Option("--cuda", help="Folder of a CUDA toolkit, or its nvcc; searched for without it.")
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", help="GPUs as 86, 8.6 or native, several with commas; default: all CUDA knows."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File or folder; default: where y7 build finds it.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Compilers at once; default: all cores.")
    ] = None,
    kernels_only: Annotated[
        bool, typer.Option("--kernels-only", help="Only the CUDA kernels; needs no TensorRT headers.")
    ] = False,
) -> None:
    """Build our TensorRT plugin with this machine's CUDA, where y7 build finds it."""
    from yolov7_deploy.tensorrt.plugin_build import build_plugin

    library = build_plugin(
        tensorrt_include=tensorrt_include,
        cuda=cuda,
        architectures=arch or (),
        output=output,
        jobs=jobs,
        kernels_only=kernels_only,
        say=typer.echo,
    )
    typer.echo(describe(library, found_by_itself=output is None))


def describe(library: PluginLibrary, *, found_by_itself: bool) -> str:
    """The library for people."""
    from yolov7_deploy.tensorrt.plugin_library import ABI_TITLES, PLUGIN_VARIABLE

    gpus = ", ".join(f"{number // 10}.{number % 10}" for number in library.compute_capabilities) or "as asked for"
    lines = [
        f"built:    {library.path}",
        f"for:      {ABI_TITLES[library.abi]}",
        f"GPUs:     compute capability {gpus}"
        + (f"; later ones through PTX of {max(library.ptx) / 10:.1f}" if library.ptx else ""),
        f"CUDA:     {library.cuda}",
    ]
    if not found_by_itself:
        lines.append(f"To use it:  export {PLUGIN_VARIABLE}={library.path}")
    return "\n".join(lines)
