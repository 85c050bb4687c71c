"""Messages between the calling process and the build process, in which TensorRT runs, as JSON files."""

from __future__ import annotations

from dataclasses import dataclass

from yolov7_deploy.tensorrt.build_record import (
    TITLES,
    DlaUse,
    EngineTensor,
    HardwareCompatibility,
    InputShape,
    NetworkLayer,
    Product,
)

# Files in the folder that both processes use.
REQUEST_FILE, MODEL_FILE, PLAN_FILE = "request.json", "model.onnx", "engine.plan"
REPORT_FILE, LOG_FILE = "report.json", "log.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """An installed TensorRT and the GPU that it would build for.

    Attributes:
        product, version: Product and version of TensorRT.
        abi: Plugin interface, `v2` or `v3`.
        error: Reason why it cannot create a builder; empty if it can.
        gpu, compute_capability, driver, cuda: The GPU and its driver; empty without a GPU.
        targets: Compute capabilities it can build for without such a GPU.
        dla_cores: Number of deep learning accelerators.
        plugins: Names of its built-in plugins.
    """

    product: Product
    version: str
    abi: str = "v3"
    error: str = ""
    gpu: str = ""
    compute_capability: str = ""
    driver: str = ""
    cuda: str = ""
    targets: tuple[str, ...] = ()
    dla_cores: int = 0
    plugins: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and version, such as `TensorRT 10.3.0`."""
        return f"{TITLES[self.product]} {self.version}".strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRequest:
    """Options of the build of `MODEL_FILE`; see `EngineOptions` for fields that are not listed here.

    Attributes:
        precision: Precision of the graph: `fp32`, `fp16` or `int8`.
        plugin: Plugin library to load before parsing; empty for none.
        shapes: Shapes of the inputs.
        opt_level: Builder optimization level; -1 for TensorRT's default.
        timing_cache: A file, or a folder (ends with a slash) with one file per device; empty for no cache.
        timing_cache_required: The user set the file, so it is an error if this TensorRT has no timing cache.
    """

    product: Product
    precision: str
    plugin: str = ""
    targets: tuple[str, ...] = ()
    shapes: tuple[InputShape, ...] = ()
    workspace_bytes: int = 0
    opt_level: int = -1
    timing_cache: str = ""
    timing_cache_required: bool = False
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility = "none"
    sparse: bool = False
    dla: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ParserError:
    """An error of the ONNX parser; `name` and `op` are empty if it only reports the index of the node."""

    node: int
    name: str
    op: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Reason for a failed build: message and fix of the error to raise, and the errors of the ONNX parser."""

    message: str
    fix: str = ""
    parser_errors: tuple[ParserError, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """The result of a build; `failure` is `None` if `PLAN_FILE` was written. For other fields see `EngineRecord`."""

    failure: Failure | None = None
    installation: Installation | None = None
    strongly_typed: bool = False
    flags: tuple[str, ...] = ()
    dla: DlaUse | None = None
    inputs: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    network_layers: tuple[NetworkLayer, ...] = ()
    workspace_bytes: int = 0
    optimization_level: int = -1
    timing_cache: str = ""
    listing: str = ""
    inspector: str = ""
    device_memory_bytes: int = 0
    peak_memory_bytes: int = 0
    notes: tuple[str, ...] = ()
