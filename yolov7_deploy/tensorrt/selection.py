"""Which TensorRT builds, and whether our plugin takes the suppression."""

from __future__ import annotations

import logging
from pathlib import Path

from yolov7_deploy.errors import EngineError, missing_library
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.options import EngineOptions
from yolov7_deploy.tensorrt.build_messages import Installation
from yolov7_deploy.tensorrt.build_process import is_installed, probe
from yolov7_deploy.tensorrt.build_record import TITLES, Product
from yolov7_deploy.tensorrt.onnx_rewrite import has_own_nms
from yolov7_deploy.tensorrt.plugin_library import BUILD_COMMAND, PluginLibrary, find_plugin

logger = logging.getLogger(__name__)

AMPERE = 8.0  # TensorRT-RTX builds for this and later where no target is named (its documentation on CPU-only builds)
PRODUCTS: tuple[Product, ...] = ("tensorrt", "tensorrt_rtx")
# What stands in /dev where there is a driver, on a board too.
_GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/nvhost-gpu"), Path("/dev/nvgpu"))


def find_tensorrt(options: EngineOptions) -> Installation:
    """The TensorRT that builds here: `tensorrt` if it can, else TensorRT-RTX; targets want TensorRT-RTX.

    Takes a second, since each is imported in a process of its own.

    Raises:
        MissingLibraryError: None is installed.
        EngineError: What is installed cannot build here.
    """
    wanted = PRODUCTS[1:] if options.targets else PRODUCTS
    present = [product for product in wanted if is_installed(product)]
    if not present:
        has_gpu = any(device.exists() for device in _GPU_DEVICES)
        needed = "tensorrt" if has_gpu and not options.targets else "tensorrt_rtx"
        purpose = "to build an engine" + ("" if has_gpu else " on a machine without a GPU")
        raise missing_library(ModuleNotFoundError(name=needed), purpose)
    faults = []
    for product in present:
        found = probe(product)
        if not found.fault:
            return found
        faults.append(f"{title(found)} cannot build here: {found.fault}")
        logger.warning(faults[-1])
    fix = "See  y7 doctor"
    if "tensorrt_rtx" not in present:
        fix = "Without a GPU, TensorRT-RTX builds:  pip install 'yolov7-deploy[tensorrt-rtx]'"
    raise EngineError("\n".join(faults), fix=fix)


def title(found: Installation) -> str:
    """`TensorRT 10.3.0`."""
    return f"{TITLES[found.product]} {found.version}".strip()


def choose_plugin(
    model: OnnxModel, options: EngineOptions, found: Installation
) -> tuple[PluginLibrary | None, tuple[str, ...]]:
    """The library that takes our NMS node, and what to note where none does.

    Raises:
        EngineError: It is asked for and cannot be had.
        PluginError: The library is there and cannot be used.
    """
    if not has_own_nms(model.proto):
        if options.plugin == "on":
            kind = model.metadata.nms.kind if model.metadata.nms else "none"
            raise EngineError(
                f"--plugin on: the graph has no node for the plugin (it was exported with --nms {kind}).",
                fix="Export it with  --nms plugin",
            )
        return None, ()
    if options.plugin == "off":
        return None, ()
    library = find_plugin(found.abi)
    if library is None:
        why = f"there is no plugin library for {title(found)} ({found.abi})"
    else:
        wanted = options.targets or _unnamed_targets(found)
        missing = [text for text in wanted if not library.runs_on(int(text.replace(".", "")))]
        why = f"the plugin library {library.path} has no code for compute capability {', '.join(missing)}"
        if not missing:
            return library, ()
        if not options.targets and len(missing) < len(wanted):
            return library, (f"{why}, so the engine does not run there; {BUILD_COMMAND} builds it for all",)
    if options.plugin == "on":
        raise EngineError(f"--plugin on: {why}.", fix=f"Build it:  {BUILD_COMMAND}")
    return None, (f"{why}, so operators of the graph suppress; {BUILD_COMMAND} builds it",)


def _unnamed_targets(found: Installation) -> tuple[str, ...]:
    """What is built for where no target is named: this machine's GPU, or with TensorRT-RTX all from Ampere on."""
    if found.product == "tensorrt_rtx":
        return tuple(text for text in found.targets if float(text) >= AMPERE)
    return (found.compute_capability,) if found.compute_capability else ()
