"""EngineRecord: the build options, the build machine and the supported machines of an engine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from yolov7_deploy._serialization import field_values, parse_json, short_repr
from yolov7_deploy.errors import LoadError
from yolov7_deploy.hardware.jetson import version_numbers
from yolov7_deploy.metadata import ModelMetadata

SCHEMA = 1

Product = Literal["tensorrt", "tensorrt_rtx"]
NmsBy = Literal["plugin", "operators", "none"]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
# Oldest compute capability that TensorRT-RTX builds for without targets (its documentation on builds without a GPU).
AMPERE = (8, 0)
# Version-compatible plans also run with these later major versions (support matrix of TensorRT 11.4).
_LATER_MAJORS = {8: (10,), 10: (11,)}


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginUse:
    """The plugin library of an engine: path at the time of the build, plugin version and interface (`v2` or `v3`)."""

    path: str
    version: str
    abi: str


@dataclass(frozen=True, kw_only=True, slots=True)
class InputShape:
    """The minimum, optimum and maximum shape of an input; equal if the shape is fixed."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTensor:
    """An input or output of an engine: `dtype` is a NumPy name, -1 in `shape` is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkLayer:
    """A layer of the parsed network, before TensorRT fuses layers; `precision` is that of its first output."""

    name: str
    type: str
    precision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DlaUse:
    """The DLA core that an engine was built for, and the layers that fall back to the GPU."""

    core: int
    fallback: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineEnvironment:
    """The properties of a machine that an engine depends on.

    Attributes:
        product, tensorrt: The installed TensorRT and its version.
        compute_capability: Compute capability of the GPU, such as `8.6`.
        platform: Operating system and architecture, such as `linux-x86_64`.
        plugin: The installed plugin library, if any.
    """

    product: Product
    tensorrt: str
    compute_capability: str
    platform: str
    plugin: PluginUse | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """A field of the record that does not match this machine.

    Attributes:
        field: Name of the field.
        built, here: The values of the engine and of this machine, for a message.
        fix: What to type.
    """

    field: str
    built: str
    here: str
    fix: str

    def __str__(self) -> str:
        return f"{self.field}: the engine was built {self.built}; this machine has {self.here}."


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """Build options, build machine and supported machines of an engine.

    Attributes:
        metadata: Metadata of the model.
        plan_bytes, plan_sha256: Size and SHA-256 of the plan.
        product, tensorrt: The TensorRT that built it, and its version.
        cuda, driver: Versions of the CUDA runtime and of the driver; empty without a GPU.
        gpu, compute_capability: The GPU of the build machine; empty without one.
        targets: Compute capabilities it was built for (TensorRT-RTX only); empty for 8.0 and later.
        platform: Operating system and architecture, such as `linux-x86_64`.
        plugin: The plugin library that the engine uses, if any.
        nms_by: Implementation of NMS: `plugin`, `operators` (of ONNX) or `none`.
        runtime_thresholds: `conf_threshold` and `iou_threshold` are inputs of the engine.
        strongly_typed: The graph determines the precisions; otherwise `flags` permit them.
        flags: Builder flags.
        version_compatible, hardware_compatible: Compatibility levels of the plan.
        dla: The DLA core, if any.
        shapes: Minimum, optimum and maximum shape of each input.
        inputs, outputs: Tensors of the engine.
        workspace_bytes: Workspace limit of the build.
        optimization_level: Builder optimization level; -1 if this TensorRT has none.
        timing_cache: Timing cache file; empty for none.
        network_layers: Layers of the parsed network.
        listing: The builder's list of fused layers from its log; empty if it has none or `inspector` is set.
        inspector: JSON of the EngineInspector; empty if the engine was not opened (no GPU).
        device_memory_bytes: GPU memory of an execution context; 0 if unknown.
        peak_memory_bytes: Peak main memory of the build process.
        build_s: Duration of the build in seconds, including parsing.
        onnx_sha256: SHA-256 of the ONNX file (`build_file`), or of the serialized graph (`build_engine`).
        notes: Warnings and decisions of the build.
        y7_version: Version of this package.
    """

    metadata: ModelMetadata
    plan_bytes: int
    plan_sha256: str
    product: Product
    tensorrt: str
    cuda: str = ""
    driver: str = ""
    gpu: str = ""
    compute_capability: str = ""
    targets: tuple[str, ...] = ()
    platform: str = ""
    plugin: PluginUse | None = None
    nms_by: NmsBy = "none"
    runtime_thresholds: bool = False
    strongly_typed: bool = False
    flags: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility = "none"
    dla: DlaUse | None = None
    shapes: tuple[InputShape, ...] = ()
    inputs: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    workspace_bytes: int = 0
    optimization_level: int = -1
    timing_cache: str = ""
    network_layers: tuple[NetworkLayer, ...] = field(default=(), repr=False)
    listing: str = field(default="", repr=False)
    inspector: str = field(default="", repr=False)
    device_memory_bytes: int = 0
    peak_memory_bytes: int = 0
    build_s: float = 0.0
    onnx_sha256: str = ""
    notes: tuple[str, ...] = ()
    y7_version: str = ""

    def to_json(self) -> str:
        """Return JSON with sorted keys: the same bytes for the same record."""
        record = asdict(self) | {"schema": SCHEMA, "metadata": json.loads(self.metadata.to_json())}
        return json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, name: str = "the build record") -> EngineRecord:
        """Return the record from the output of `to_json`; unknown fields are ignored.

        Args:
            text: JSON.
            name: Name of the file, for messages.

        Raises:
            LoadError: It is not a record of this schema; the message names the field.
        """
        try:
            raw = parse_json(text)
            if not isinstance(raw, dict):
                raise ValueError(f"it is a JSON {type(raw).__name__} instead of an object")
            if raw.get("schema") != SCHEMA:
                raise ValueError(f"schema is {short_repr(raw.get('schema'))}, this version reads {SCHEMA}")
            metadata = ModelMetadata.from_json(json.dumps(raw.pop("metadata", None)))
            return cls(metadata=metadata, **field_values(cls, raw, exclude="metadata"))
        except (ValueError, LoadError) as error:
            reason = error.message if isinstance(error, LoadError) else error
            raise LoadError(
                f"{name} cannot be used: {reason}.", fix="Build the engine again:  y7 build --weights NAME.onnx"
            ) from error

    def mismatches(self, machine: EngineEnvironment, *, engine: str = "NAME.engine") -> list[Mismatch]:
        """Return the reasons why this engine cannot run on a machine, the most fundamental one first.

        The list is empty if no reason is known.

        Args:
            machine: The machine that loads the engine.
            engine: Name of the engine file, for the fixes.
        """
        build = f"Build it here:  y7 build --weights {engine.rpartition('.')[0] or engine}.onnx"
        found = [
            self._product(machine, build),
            self._version(machine, build),
            self._capability(machine, build),
            self._platform(machine, build),
            self._plugin(machine, build),
        ]
        return [mismatch for mismatch in found if mismatch is not None]

    def _product(self, machine: EngineEnvironment, build: str) -> Mismatch | None:
        if machine.product == self.product:
            return None
        here = f"{TITLES[machine.product]} {machine.tensorrt}"
        return Mismatch(field="product", built=f"by {TITLES[self.product]} {self.tensorrt}", here=here, fix=build)

    def _version(self, machine: EngineEnvironment, build: str) -> Mismatch | None:
        if machine.product != self.product:
            return None
        built, here = version_numbers(self.tensorrt), version_numbers(machine.tensorrt)
        common = min(len(built), len(here))
        if built[:common] == here[:common]:
            return None
        if self.version_compatible and common:
            same_line = built[0] == here[0] and here[:common] > built[:common]
            if same_line or here[0] in _LATER_MAJORS.get(built[0], ()):
                return None
        hint = "" if self.version_compatible else "   (with --version-compatible, engines also run with later versions)"
        title = TITLES[self.product]
        return Mismatch(
            field="tensorrt",
            built=f"by {title} {self.tensorrt}",
            here=f"{title} {machine.tensorrt}",
            fix=build + hint,
        )

    def _capability(self, machine: EngineEnvironment, build: str) -> Mismatch | None:
        here = machine.compute_capability
        supported = self.targets or ((self.compute_capability,) if self.compute_capability else ())
        if self.product == "tensorrt_rtx" and not self.targets:
            supported = () if version_numbers(here) >= AMPERE else ("8.0 and later",)
        if not here or not supported or here in supported:
            return None
        if self.hardware_compatible == "ampere_plus" and version_numbers(here) >= AMPERE:
            return None
        if self.product == "tensorrt_rtx":
            targets = ",".join(f"sm{text.replace('.', '')}" for text in (*self.targets, here))
            build += f" --target {targets}"
        return Mismatch(
            field="targets" if self.product == "tensorrt_rtx" else "compute_capability",
            built=f"for compute capability {', '.join(supported)}",
            here=f"compute capability {here}",
            fix=build,
        )

    def _platform(self, machine: EngineEnvironment, build: str) -> Mismatch | None:
        if not self.platform or not machine.platform or self.platform == machine.platform:
            return None
        return Mismatch(field="platform", built=f"on {self.platform}", here=machine.platform, fix=build)

    def _plugin(self, machine: EngineEnvironment, build: str) -> Mismatch | None:
        built, here = self.plugin, machine.plugin
        if built is None or (here and (here.version, here.abi) == (built.version, built.abi)):
            return None
        return Mismatch(
            field="plugin",
            built=f"with the plugin {built.version} ({built.abi})",
            here=f"version {here.version} ({here.abi})" if here else "none",
            fix=f"Build the plugin here:  y7 plugin   or without it:  {build.partition('  ')[2]} --plugin off",
        )
