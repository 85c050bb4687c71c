"""Contents of a tree of pickled modules: tensors under official names, activations, class names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from yolov7_deploy.checkpoint.pickle_allowlist import Module, TensorEntry
from yolov7_deploy.errors import CheckpointError

# E6E has about 1,800 modules and 1,490 tensors; a tree beyond these bounds is shared or cyclic on purpose.
MAX_MEMBERS = 200_000  # modules, parameters and buffers, each counted as often as the walk reaches it
MAX_TENSORS = 20_000
MAX_DEPTH = 32
MAX_NAME = 100  # characters of the name of a member; the names of its parents come before it

BN_EPS = 1e-3
LEAKY_SLOPE = 0.1

_WRAPPERS = ("torch.nn.parallel.data_parallel.DataParallel", "torch.nn.parallel.distributed.DistributedDataParallel")
_ACTIVATIONS = "torch.nn.modules.activation."
_TABLES = ("_modules", "_parameters", "_buffers")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleContents:
    """Contents of a module tree.

    Attributes:
        tensors: Every parameter and persistent buffer by official name, in the order of `state_dict()`.
        activations: Class names of the activations used, such as `SiLU`.
        names: The network's `names` attribute as it was pickled.
    """

    tensors: dict[str, TensorEntry]
    activations: frozenset[str]
    names: object


def read_modules(network: Module, *, source: str) -> ModuleContents:
    """Walk the tree as `state_dict()` does: parameters, persistent buffers, then children.

    Raises:
        CheckpointError: The tree is malformed, or has hyperparameters that change the meaning of the
            tensors: a BatchNorm epsilon other than 1e-3, a LeakyReLU slope other than 0.1.
    """
    network = _unwrapped(network)
    tensors: dict[str, TensorEntry] = {}
    activations: set[str] = set()
    for prefix, module in _walk(network, source):
        _check_hyperparameters(prefix, module, source)
        if module.class_name.startswith(_ACTIVATIONS):
            activations.add(module.class_name.removeprefix(_ACTIVATIONS))
        for name, entry in _own_tensors(module, source):
            tensors[prefix + name] = entry
            if len(tensors) > MAX_TENSORS:
                raise _too_large(source)
    return ModuleContents(tensors=tensors, activations=frozenset(activations), names=network.state.get("names"))


def _unwrapped(network: Module) -> Module:
    for _ in range(MAX_DEPTH):
        children = network.state.get("_modules")
        inner = children.get("module") if isinstance(children, dict) else None
        if network.class_name not in _WRAPPERS or not isinstance(inner, Module):
            break
        network = inner
    return network


def _walk(root: Module, source: str) -> Iterator[tuple[str, Module]]:
    """Yield every module with its prefix (`model.0.conv.`), parents first, children in order."""
    waiting: list[tuple[str, Module, int]] = [("", root, 0)]
    visited = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        tables = [module.state.get(table) for table in _TABLES]
        visited += 1 + sum(len(table) for table in tables if isinstance(table, dict))
        if visited > MAX_MEMBERS or depth > MAX_DEPTH:
            raise _too_large(source)
        yield prefix, module
        children = [
            (f"{prefix}{name}.", child, depth + 1)
            for name, child in _members(module, "_modules", source)
            if isinstance(child, Module)
        ]
        waiting.extend(reversed(children))


def _own_tensors(module: Module, source: str) -> Iterator[tuple[str, TensorEntry]]:
    transient = module.state.get("_non_persistent_buffers_set")
    skipped = transient if isinstance(transient, (set, frozenset)) else set()
    for table in ("_parameters", "_buffers"):
        for name, entry in _members(module, table, source):
            if entry is None or (table == "_buffers" and name in skipped):
                continue
            if not isinstance(entry, TensorEntry):
                raise CheckpointError(
                    f"{name[:40]!a} of a {module.class_name} in {source} is a {type(entry).__name__}, not a tensor.",
                    fix="Save the checkpoint again with the program that created it.",
                )
            yield name, entry


def _members(module: Module, table: str, source: str) -> Iterator[tuple[str, object]]:
    members = module.state.get(table)
    if not isinstance(members, dict):
        raise CheckpointError(
            f"A {module.class_name} in {source} has no {table}: it is not a torch module.",
            fix="Save the checkpoint again with the program that created it.",
        )
    for name, value in members.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"A {module.class_name} in {source} has a member without a name.", fix="Do not use this file."
            )
        if len(name) > MAX_NAME:
            raise CheckpointError(
                f"A member of a {module.class_name} in {source} has a name of {len(name)} characters.",
                fix="Do not use this file.",
            )
        yield name, value


def _too_large(source: str) -> CheckpointError:
    return CheckpointError(
        f"The module tree of {source} is cyclic or larger than any network.", fix="Do not use this file."
    )


def _check_hyperparameters(prefix: str, module: Module, source: str) -> None:
    if module.class_name.startswith("torch.nn.modules.batchnorm."):
        _require(module, "eps", BN_EPS, prefix, source)
    if module.class_name == f"{_ACTIVATIONS}LeakyReLU":
        _require(module, "negative_slope", LEAKY_SLOPE, prefix, source)


def _require(module: Module, name: str, expected: float, prefix: str, source: str) -> None:
    value = module.state.get(name)
    if not isinstance(value, (int, float)) or abs(value - expected) > 1e-6 * expected:
        shown = f"{value:g}" if isinstance(value, (int, float)) else type(value).__name__
        raise CheckpointError(
            f"{prefix.removesuffix('.')[:80]} in {source} has {name} = {shown}; every YOLOv7 variant has {expected:g}.",
            fix="With other values the same weights are another network: train it with the official code.",
        )
