"""The plugin in the registries of TensorRT-RTX, 11.4, 8.6.1 and 8.6.0, which list it; RTX also parses and builds it.

Compiles one library per plugin interface, for one GPU architecture.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.support import python310
from tests.support.plugin_kit import headers_or_skip, tensorrt86_or_skip
from tests.support.tensorrt_wheels import downloaded_wheel, wheel_folder
from yolov7_deploy.errors import PluginError
from yolov7_deploy.metadata import THRESHOLD_INPUTS
from yolov7_deploy.onnx_export.nms import DOMAIN, OP
from yolov7_deploy.tensorrt.plugin_build import build_plugin, find_tools
from yolov7_deploy.tensorrt.plugin_library import KERNELS_ABI, PLUGIN_NAME, PLUGIN_VERSION, PluginLibrary

TIMEOUT_S = 300
C_ABI = {"y7_nms_workspace", "y7_nms", "y7_letterbox", "y7_status_text", "y7_kernels_abi", "y7_plugin_description"}
OUTPUTS = {
    "num_dets": ["INT32", 1],
    "det_boxes": ["FLOAT", 50, 4],
    "det_scores": ["FLOAT", 50],
    "det_classes": ["INT32", 50],
    "y7nms_overflow": ["INT32", 1],
}

# Loads argv[1], parses argv[2], builds for one GPU, prints one JSON object.
RTX = """
import json, sys
import tensorrt_rtx as trt

messages = []

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)

    def log(self, severity, text):
        if severity.value <= 1:
            messages.append(text)

builder = trt.Builder(logger := Logger())
registry = trt.get_plugin_registry()
registry.load_library(sys.argv[1])
record = {"creators": [[c.name, c.plugin_version, c.plugin_namespace] for c in registry.all_creators]}
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
record["parsed"] = parser.parse(open(sys.argv[2], "rb").read())
if record["parsed"]:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    record["layers"] = [layer.type.name for layer in layers]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    record["outputs"] = {tensor.name: [tensor.dtype.name, *tensor.shape] for tensor in outputs}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *((batch, *tensor.shape[1:]) for batch in (1, 2, int(sys.argv[3]))))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    record["plan"] = 0 if plan is None else plan.nbytes
    record["inside"] = plan is not None and b"Y7NMS" in bytes(plan)
print(json.dumps(record | {"messages": messages}))
"""

LEAN_VERSION = "11.4.0.106"

# Loads argv[1] into the registry of TensorRT 11 as the product does, uses the creator, prints one JSON object.
LEAN = """
import json, sys
import numpy as np
import tensorrt_lean as trt
from yolov7_deploy.tensorrt.capabilities import TrtCapabilities

capabilities = TrtCapabilities("tensorrt", trt)
before = capabilities.registered_plugins()
capabilities.load_plugin(sys.argv[1])
creator = trt.get_plugin_registry().get_creator("Y7NMS", "1", "")

def create(**values):
    kinds = {np.dtype("int32"): trt.PluginFieldType.INT32, np.dtype("float32"): trt.PluginFieldType.FLOAT32}
    held = {name: np.atleast_1d(np.asarray(value)) for name, value in values.items()}
    fields = [trt.PluginField(name, value, kinds[value.dtype]) for name, value in held.items()]
    try:
        return creator.create_plugin("nms", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD) is not None
    except (RuntimeError, TypeError):
        return False

int32, float32 = np.int32, np.float32
record = {
    "version": trt.__version__,
    "added": sorted(map(list, capabilities.registered_plugins() - before)),
    "fields": [field.name for field in creator.field_names],
    "created": create(classes=int32(3), strides=int32([8, 16]), anchors=np.arange(1, 13, dtype=float32)),
    "refused": [not create(classes=int32(0)), not create(max_dets=int32(5)), not create(anchors=float32([0] * 18))],
}
print(json.dumps(record))
"""

OLD_LEAN_VERSION = "8.6.0"  # the only TensorRT 8.6 on PyPI that is not a script that downloads it

# Loads argv[1] into the registry of TensorRT 8.6 (module argv[2]), uses the creator, prints one JSON object.
OLD = """
import ctypes, importlib, json, sys
import numpy as np

trt = importlib.import_module(sys.argv[2])
registry = trt.get_plugin_registry()
library = ctypes.CDLL("libnvinfer_lean.so.8" if sys.argv[2] == "tensorrt_lean" else "libnvinfer.so.8")
if trt.__version__ != "8.6.0" and library.getInferLibVersion() == 8600:
    # In the early-access release, loadLibrary has another position in the vtable than in the bindings of 8.6.1.
    library.getPluginRegistry.restype = ctypes.c_void_p
    this = library.getPluginRegistry()
    vtable = ctypes.cast(this, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p))).contents
    load = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(vtable[5])
    handle = load(this, sys.argv[1].encode())
else:
    handle = registry.load_library(sys.argv[1])
listed = [[c.name, c.plugin_version, c.plugin_namespace] for c in registry.plugin_creator_list if c.name == "Y7NMS"]
creator = registry.get_plugin_creator("Y7NMS", "1", "")

def create(**values):
    kinds = {np.dtype("int32"): trt.PluginFieldType.INT32, np.dtype("float32"): trt.PluginFieldType.FLOAT32,
             np.dtype("float64"): trt.PluginFieldType.FLOAT64}
    held = {name: np.atleast_1d(np.asarray(value)) for name, value in values.items()}
    fields = [trt.PluginField(name, value, kinds[value.dtype]) for name, value in held.items()]
    return creator.create_plugin("nms", trt.PluginFieldCollection(fields))

int32, float32 = np.int32, np.float32
two_levels = create(classes=int32(3), strides=int32([8, 16]), anchors=np.arange(1, 13, dtype=float32))
stored = bytes(two_levels.serialize())
refused = {
    "classes": create(classes=int32(0)),
    "max_dets": create(max_dets=int32(5)),
    "max_det": create(max_det=float32(5)),
    "strides": create(strides=int32([8, -1, 32])),
    "anchors": create(anchors=float32([0] * 18)),
    "max_candidates": create(max_candidates=np.float64([1.0])),
}
survived = 0
for cut in range(len(stored)):
    survived += creator.deserialize_plugin("nms", stored[:cut]) is not None
    for change in (1, 0x80, 0xFF):
        mutated = bytearray(stored)
        mutated[cut] ^= change
        survived += creator.deserialize_plugin("nms", bytes(mutated)) is not None
survived += creator.deserialize_plugin("nms", stored + b"x") is not None
record = {
    "handle": bool(handle),
    "listed": listed,
    "fields": [field.name for field in creator.field_names],
    "defaults": create().num_outputs,
    "named": [two_levels.plugin_type, two_levels.plugin_version, two_levels.plugin_namespace],
    "again": bytes(creator.deserialize_plugin("nms", stored).serialize()) == stored,
    "clone": bytes(two_levels.clone().serialize()) == stored,
    "refused": [name for name, plugin in refused.items() if plugin is None],
    "survived": survived,
}
sys.stdout.flush()
print(json.dumps(record))
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Return a function that builds the library for the given headers, once per headers."""
    libraries: dict[Path, PluginLibrary] = {}

    def build(headers: Path) -> PluginLibrary:
        if headers not in libraries:
            folder = tmp_path_factory.mktemp("plugin")
            try:
                find_tools(tensorrt_include=headers)
            except PluginError as error:
                pytest.skip(error.message)
            libraries[headers] = build_plugin(
                tensorrt_include=headers,
                architectures=["86"],
                output=folder,
                warnings_as_errors=True,
                log=lambda _: None,
            )
        return libraries[headers]

    return build


@pytest.fixture(scope="session")
def plugin(built):
    return built(headers_or_skip())


def read_elf(library: PluginLibrary, *options: str) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    return subprocess.run(["readelf", "-W", *options, library.path], capture_output=True, text=True, check=True).stdout


def exported(library: PluginLibrary) -> set[str]:
    """Return the names of the exported functions."""
    rows = [line.split() for line in read_elf(library, "--dyn-syms").splitlines()]
    return {row[7] for row in rows if len(row) > 7 and row[4] == "GLOBAL" and row[6].isdigit()}


def needed(library: PluginLibrary) -> set[str]:
    """Return the names of the libraries that it loads, without versions, such as `libc`."""
    lines = [line for line in read_elf(library, "--dynamic").splitlines() if "(NEEDED)" in line]
    return {line.partition("[")[2].partition(".")[0] for line in lines}


# --- TensorRT 10 and later -------------------------------------------------------------------------------------------


def test_the_library_describes_itself(plugin):
    assert (plugin.abi, plugin.version, plugin.kernels_abi) == ("v3", PLUGIN_VERSION, KERNELS_ABI)
    assert (plugin.compute_capabilities, plugin.ptx) == ((86,), (86,))


def test_the_library_exports_its_entry_points_and_links_neither_tensorrt_nor_cuda(plugin):
    assert exported(plugin) == {*C_ABI, "getCreators", "setLoggerFinder"}
    system = {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread"}
    assert {name for name in needed(plugin) if not name.startswith("ld-")} <= system


@pytest.fixture(scope="session")
def rtx(plugin, tmp_path_factory):
    """Return a function that parses and builds a model with TensorRT-RTX and the plugin in a separate process."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx (pip install 'yolov7-deploy[tensorrt-rtx]')")
    (folder,) = importlib.util.find_spec("tensorrt_rtx_libs").submodule_search_locations
    links = tmp_path_factory.mktemp("libraries")
    # The wheel's parser opens a library name that the wheel does not contain.
    (links / "libtensorrt_rtx.so").symlink_to(Path(folder) / "libtensorrt_rtx.so.1")
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{links}:{os.environ.get('LD_LIBRARY_PATH', '')}"}

    def run(model: onnx.ModelProto, largest: int = 4) -> dict:
        path = tmp_path_factory.mktemp("graph") / "model.onnx"
        onnx.save(model, path)
        done = subprocess.run(
            [sys.executable, "-c", RTX, plugin.path, path, str(largest)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"TensorRT-RTX ended with {done.returncode}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout.splitlines()[-1])

    return run


def heads_only(*, batch: int | str = 1, fp16: bool = False, strides=(8, 16, 32), **attributes) -> onnx.ModelProto:
    """Return a model of head maps and the NMS node only, 64x128 pixels, which builds in seconds."""
    kind = TensorProto.FLOAT16 if fp16 else TensorProto.FLOAT
    maps = [f"head_{level}" for level in range(len(strides))]
    inputs = [
        helper.make_tensor_value_info(name, kind, [batch, 24, max(1, 64 // stride), max(1, 128 // stride)])
        for name, stride in zip(maps, strides, strict=True)
    ]
    thresholds = [helper.make_tensor(name, TensorProto.FLOAT, [1], [0.25]) for name in THRESHOLD_INPUTS]
    values = {
        "anchors": [float(side) for side in range(1, 6 * len(strides) + 1)],
        "strides": list(strides),
        "classes": 3,
        "max_det": 50,
        "max_candidates": 200,
        "plugin_version": "1",
        "plugin_namespace": "",
    }
    # A node before it, as in a real network.
    relus = [helper.make_node("Relu", [name], [f"{name}_in"]) for name in maps]
    names = [*(f"{name}_in" for name in maps), *THRESHOLD_INPUTS]
    node = helper.make_node(OP, names, list(OUTPUTS), name="nms", domain=DOMAIN, **{**values, **attributes})
    outputs = [
        helper.make_tensor_value_info(name, getattr(TensorProto, dtype), [batch, *rest])
        for name, (dtype, *rest) in OUTPUTS.items()
    ]
    graph = helper.make_graph([*relus, node], "heads", inputs, outputs, thresholds)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 8
    return model


@pytest.mark.parametrize("fp16", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("batch", [1, 3, "batch"])
def test_rtx_builds_the_node_as_our_plugin(rtx, fp16, batch):
    record = rtx(heads_only(batch=batch, fp16=fp16))
    assert [PLUGIN_NAME, PLUGIN_VERSION, ""] in record["creators"]
    assert record["layers"].count("PLUGIN_V3") == 1
    size = -1 if batch == "batch" else batch
    assert record["outputs"] == {name: [kind, size, *rest] for name, (kind, *rest) in OUTPUTS.items()}
    assert record["plan"] > 0, record["messages"]
    assert record["inside"]


@pytest.mark.parametrize("levels", [1, 2, 4, 8])
def test_rtx_builds_any_number_of_levels(rtx, levels):
    # heads_only clips strides above the image size, so eight levels share one stride.
    strides = tuple(2**level for level in range(levels)) if levels < 8 else (8,) * 8
    assert rtx(heads_only(strides=strides))["plan"] > 0


def test_rtx_builds_up_to_the_maximum_batch_and_rejects_more(rtx):
    assert rtx(heads_only(batch="batch"), largest=1024)["plan"] > 0
    record = rtx(heads_only(batch="batch"), largest=1025)
    assert record["plan"] == 0
    assert any("the batch is up to 1025 images" in text for text in record["messages"])


@pytest.mark.parametrize("fp16", [False, True], ids=["float32", "float16"])
def test_rtx_uses_the_plugin_for_the_exported_file(rtx, fp16):
    from tests.support.small_models import exported_tiny

    model = onnx.ModelProto()
    model.CopyFrom(exported_tiny(nms="plugin", batch=None, max_det=50).proto)
    del model.functions[:]  # as y7 build does
    if fp16:
        (index,) = [i for i, node in enumerate(model.graph.node) if node.op_type == OP]
        node = model.graph.node[index]
        for i in range(len(node.input) - len(THRESHOLD_INPUTS)):
            cast = helper.make_node("Cast", [node.input[i]], [f"fp16_{i}"], to=TensorProto.FLOAT16)
            node.input[i] = f"fp16_{i}"
            model.graph.node.insert(index, cast)
    record = rtx(model)
    assert record["layers"].count("PLUGIN_V3") == 1
    assert record["layers"].count("CAST") == (3 if fp16 else 0)
    assert record["plan"] > 0, record["messages"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 0}, "attribute classes is 0; it must be from 1 to"),
        ({"classes": 4}, "attribute classes is 4, which requires 27"),
        ({"max_det": 0}, "attribute max_det is 0"),
        ({"max_candidates": -1}, "attribute max_candidates is -1"),
        ({"anchors": [1.0] * 12}, "attribute anchors has 12 values; 3 strides need 18"),
        ({"anchors": [1.0] * 17 + [float("nan")]}, "attribute anchors has the value nan"),
        ({"anchors": 1.0}, "attribute anchors has 1 values"),
        ({"anchors": [1] * 18}, "attribute anchors must have float32 values"),
        ({"classes": 3.0}, "attribute classes must have int32 values"),
        ({"classes": [3, 3]}, "attribute classes has 2 values; it must have 1"),
        ({"classes": "three"}, "attribute classes is of TensorRT's field type"),
        ({"strides": [8] * 9}, "attribute strides has 9 values; it must have from 1 to 8"),
    ],
)
def test_invalid_attributes_are_rejected_through_the_logger_of_tensorrt(rtx, changes, message):
    attributes = {name: value for name, value in changes.items() if name != "strides"}
    model = heads_only(**attributes)
    if "strides" in changes:
        (node,) = [node for node in model.graph.node if node.op_type == OP]
        (attribute,) = [attribute for attribute in node.attribute if attribute.name == "strides"]
        attribute.ints[:] = changes["strides"]
    record = rtx(model)
    assert not record["parsed"]
    assert any(text.startswith("Y7NMS plugin, ") and message in text for text in record["messages"]), record["messages"]


def test_a_node_of_another_plugin_version_is_not_parsed(rtx):
    record = rtx(heads_only(plugin_version="2"))
    assert not record["parsed"]


# --- the lean runtime of TensorRT 11 ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_registry_of_tensorrt_11_takes_the_plugin(plugin, tmp_path_factory):
    """The lean runtime is a real TensorRT of 42 MB, without a builder; its registry needs no GPU."""
    wheels, site = wheel_folder(tmp_path_factory), tmp_path_factory.mktemp("lean")
    for distribution in ("tensorrt_lean_cu13_libs", "tensorrt_lean_cu13_bindings"):
        with zipfile.ZipFile(downloaded_wheel(f"{distribution}=={LEAN_VERSION}", wheels)) as archive:
            archive.extractall(site)
    (site / "tensorrt_lean_bindings").rename(site / "tensorrt_lean")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(site / "tensorrt_lean_libs"),
        "PYTHONPATH": os.pathsep.join([str(site), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", LEAN, str(plugin.path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"TensorRT ended with {done.returncode}: {done.stdout}{done.stderr[-2000:]}"
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "version": LEAN_VERSION,
        "added": [[PLUGIN_NAME, PLUGIN_VERSION, ""]],
        "fields": ["anchors", "strides", "classes", "max_det", "max_candidates"],
        "created": True,
        "refused": [True, True, True],
    }


# --- TensorRT 8.6 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def old_plugin(built):
    return built(tensorrt86_or_skip() / "include")


def test_the_v2_library_exports_its_entry_points_and_does_not_link_tensorrt(old_plugin):
    assert old_plugin.abi == "v2"
    assert exported(old_plugin) == {*C_ABI, "getPluginCreators", "setLoggerFinder"}
    assert not any("nvinfer" in name for name in needed(old_plugin))


def test_the_registry_of_8_6_lists_the_plugin_and_damaged_bytes_are_rejected(old_plugin):
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the TensorRT 8.6 bindings are for Python 3.11")
    folder = tensorrt86_or_skip()
    packages = Path(importlib.util.find_spec("numpy").origin).parents[1]
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{folder / 'lib'}", "PYTHONPATH": f"{folder / 'site'}:{packages}"}
    done = subprocess.run(
        [sys.executable, "-c", OLD, old_plugin.path, "tensorrt"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    check_old_registry(done)


@pytest.mark.slow
def test_the_registry_of_the_lean_8_6_0_lists_the_plugin(old_plugin, tmp_path_factory, tmp_path):
    """Its Python bindings are for Python 3.10 at most, and differ from those of 8.6.1 in the registry."""
    wheel = downloaded_wheel(f"tensorrt_lean=={OLD_LEAN_VERSION}", wheel_folder(tmp_path_factory), minor=10)
    python = python310.create_environment(tmp_path, timeout_s=TIMEOUT_S)
    run = partial(python310.run, cwd=tmp_path, timeout_s=TIMEOUT_S)
    installed = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "numpy==1.26.*", wheel)
    assert installed.returncode == 0, installed.stderr
    (folder,) = tmp_path.glob("venv/lib/python3.10/site-packages/tensorrt_lean")
    check_old_registry(run(python, "-c", OLD, old_plugin.path, "tensorrt_lean", LD_LIBRARY_PATH=str(folder)))


def check_old_registry(done):
    """Check what the program OLD printed."""
    assert done.returncode == 0, f"TensorRT ended with {done.returncode}: {done.stdout}{done.stderr[-2000:]}"
    record = json.loads(done.stdout.splitlines()[-1])
    names = ["anchors", "strides", "classes", "max_det", "max_candidates"]
    assert record == {
        "handle": True,
        "listed": [[PLUGIN_NAME, PLUGIN_VERSION, ""]],
        "fields": names,
        "defaults": 5,
        "named": [PLUGIN_NAME, PLUGIN_VERSION, ""],
        "again": True,
        "clone": True,
        "refused": ["classes", "max_dets", "max_det", "strides", "anchors", "max_candidates"],
        "survived": 0,
    }  # fmt: skip
    for name in record["refused"]:
        assert f"attribute {name} " in done.stderr
