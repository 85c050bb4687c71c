"""Makes every TensorRT call of the product on the real Python bindings of one version, and prints what the version has.

    python -m tests.support.real_bindings           builds and runs engines; prints JSON
    python -m tests.support.real_bindings refuse    only lets TensorRT refuse an optimization profile; prints the effect

The real module `tensorrt` is on `$PYTHONPATH`, and `tests/fakes/nvinfer` on `$LD_LIBRARY_PATH` as its libraries.
"""

import json
import sys
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tensorrt

from tests.fakes.fake_tensorrt import NAMES, FakeTensorrt, chain
from tests.fakes.mirrored_tensorrt import Mirror, Refusals
from tests.support.trt_kit import INFO, TrtEnvironment, assert_detected, infer, make_image, toy
from yolov7_deploy.errors import EngineError
from yolov7_deploy.hardware.gpu import CudaGpu
from yolov7_deploy.tensorrt import build_main, plugin_library
from yolov7_deploy.tensorrt.build_messages import MODEL_FILE, BuildRequest
from yolov7_deploy.tensorrt.build_record import InputShape
from yolov7_deploy.tensorrt.capabilities import TrtCapabilities, create_logger

VERSION = ".".join(tensorrt.__version__.split(".")[:3])
RTX_ONLY = frozenset({"is_stream_capturable", "create_runtime_config", "CudaGraphStrategy"})
DYNAMIC = InputShape(name="images", min=(1, 3, 64, 64), opt=(4, 3, 64, 64), max=(8, 3, 64, 64))
GPU = CudaGpu(index=0, name="Imaginary GPU", pci_bus_id="0000:00:00.0", compute_capability="9.0")
THREADS = 3


class Environment(TrtEnvironment):
    """A machine without our kernels, with the real bindings beside the fake ones."""

    def __init__(self, folder, monkeypatch, used):
        self.used = used
        super().__init__(folder, monkeypatch)

    def use(self, version):
        super().use("10.3.0")
        self.trt.absent = RTX_ONLY  # the real bindings decide about all other names
        self.trt.__version__ = VERSION
        self.monkeypatch.setitem(sys.modules, "tensorrt", Mirror(self.trt, tensorrt, self.trt, self.used))

    def build_kernels(self):
        self.monkeypatch.delenv(plugin_library.PLUGIN_VARIABLE, raising=False)
        self.monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder))
        self.monkeypatch.setattr(plugin_library, "SYSTEM_FOLDERS", ())


# --- what the product does --------------------------------------------------------------------------------------------


def build(used, layers=None, **fields):
    """Build as `y7 build` does; return the report."""
    fake = FakeTensorrt("8.6", dla_cores=2, batch=-1 if fields.get("shapes") else 1, layers=layers)
    fake.__version__ = VERSION
    capabilities = TrtCapabilities("tensorrt", Mirror(fake, tensorrt, fake, used))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, MODEL_FILE).write_bytes(b"a graph")
        cache = str(Path(folder, "kernels.timing"))
        request = BuildRequest(**{"product": "tensorrt", "precision": "fp16", "timing_cache": cache, **fields})
        return build_main.build(capabilities, request, Path(folder), lambda *_: None)


def supported(used, **fields):
    """Return whether an option is supported, and build with it if it is."""
    try:
        report = build(used, **fields)
    except EngineError:
        return False
    assert report.failure is None and report.inspector, report
    return True


def builds(used):
    """Build with every option; return which ones are supported."""
    options = {
        "`--opt-level`": {"opt_level": 3},
        "`--sparse`": {"sparse": True},
        "`--version-compatible`": {"version_compatible": True},
        "`--hardware-compatible ampere+`": {"hardware_compatible": "ampere_plus"},
        "`--hardware-compatible same-cc`": {"hardware_compatible": "same_compute_capability"},
        "`--dla` with an FP16 file": {"dla": 1},
        "`--dla` with an INT8 file (Q/DQ)": {"dla": 1, "precision": "int8"},
    }
    found = {name: supported(used, **fields) for name, fields in options.items()}
    everything = {"workspace_bytes": 2**30, "shapes": (DYNAMIC,), "plugin": "/somewhere/liby7_plugin.so"}
    for precision in ("fp32", "fp16", "int8"):
        report = build(used, precision=precision, **everything)
        assert report.failure is None and report.inspector, report
        report = build(used, precision=precision, layers=chain("CAST", "ELEMENTWISE"))
        assert report.failure is None
    failed = FakeTensorrt("10.3", parser_errors=[(0, "node", "Op", "no importer")])
    parser = Mirror(failed, tensorrt, failed, used).OnnxParser(_network(), create_logger(tensorrt, print))
    TrtCapabilities("tensorrt", tensorrt).parser_errors(parser)
    return found


def _network():
    return tensorrt.Builder(create_logger(tensorrt, print)).create_network(0)


def runs(monkeypatch, used):
    """Open engines and run them: fixed, dynamic, several threads, timed, with and without shared profiles."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder), monkeypatch, used)
        graphs = {"fixed": toy(), "dynamic": toy(None), "decoded": toy(decoded=True)}
        for name, graph in graphs.items():
            for ours in (True,) if name == "decoded" else (True, False):
                environment.trt.shares_profiles, environment.trt.profiles = ours, 2
                options = {"metadata": replace(INFO, nms=None)} if name == "decoded" else {}
                runtime = environment.open(graph, name=f"{name}-{ours}.engine", recorded=ours, **options)
                run(runtime)
                runtime.close()
        environment.open(name="compatible.engine", version_compatible=True).close()
        assert not environment.trt.violations, environment.trt.violations


def run(runtime):
    def work(number):
        for seed in range(number, number + 3):
            images = [make_image(seed + shift) for shift in range(1 + seed % (runtime.max_batch_size or 1))]
            for found, image in zip(infer(runtime, images, timed=seed == 1).detections, images, strict=True):
                assert len(found.boxes)
                if runtime.metadata.nms is not None:
                    assert_detected(found, image)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


def contexts_can_be_tracked():
    """The engine keeps weak references to its contexts, which TensorRT's objects must support."""
    context = new_context()
    return weakref.ref(context)() is context and context in weakref.WeakSet([context])


def new_context():
    logger = create_logger(tensorrt, print)
    capabilities = TrtCapabilities("tensorrt", tensorrt)
    new_context.kept = engine = capabilities.deserialize_engine(b"a plan", logger, version_compatible=False)
    return capabilities.create_context(engine[1], capture_graphs=False)


# --- what the version has ---------------------------------------------------------------------------------------------


def members():
    """Return where the versions differ, by name: what TensorRT has and how the product uses it."""
    trt, capabilities = tensorrt, TrtCapabilities("tensorrt", tensorrt)
    request = {precision: BuildRequest(product="tensorrt", precision=precision) for precision in ("fp32", "fp16")}
    typed = {precision: capabilities.strongly_typed(value) for precision, value in request.items()}
    sharing = hasattr(getattr(trt, "PreviewFeature", None), "PROFILE_SHARING_0806") and capabilities.abi == "v2"
    sources = [name for name in ("CUBLAS", "CUBLAS_LT", "CUDNN") if hasattr(trt.TacticSource, name)]
    return {
        "Plugin interface": {"v2": "`IPluginV2DynamicExt`", "v3": "`IPluginV3`"}[capabilities.abi],
        "FP16 of an FP16 file": "strong typing" if typed["fp16"] else "builder flag `FP16`",
        "Decoding of an FP16 file stays float32": "by its types" if typed["fp16"] else "pinned layers",
        "FP32 file": "strong typing" if typed["fp32"] else "weak typing",
        "Contexts share a profile": "with a preview feature" if sharing else "yes",
        "Memory of a context": "`set_device_memory`"
        if hasattr(trt.IExecutionContext, "set_device_memory")
        else "`device_memory`",
        "Size of that memory": "`device_memory_size_v2`"
        if hasattr(trt.ICudaEngine, "device_memory_size_v2")
        else "`device_memory_size`",
        "Parser errors name the node": hasattr(trt.ParserError, "node_name"),
        "Progress of a build": hasattr(trt, "IProgressMonitor"),
        "cuBLAS and cuDNN as tactic sources": bool(sources),
    }


def names_of_fake():
    """Return which names of the fake builder TensorRT has."""
    return [[kind, name] for kind, name, *_ in NAMES if hasattr(getattr(tensorrt, kind, None), name)]


def refuse():
    """Let TensorRT refuse a profile, which ends this process with some versions; with others the product sees it."""
    context = new_context()
    with Refusals(VERSION.partition(".")[0]):
        try:
            return f"returns {context.set_optimization_profile_async(0, 16)}"
        except RuntimeError:
            capabilities = TrtCapabilities("tensorrt", tensorrt)
            assert not capabilities.select_profile(context, 0, 16), "the product takes a refusal for success"
            return "raises `RuntimeError`"


def main():
    if sys.argv[1:] == ["refuse"]:
        sys.stdout.write(json.dumps(refuse()) + "\n")
        return
    monkeypatch, used = pytest.MonkeyPatch(), set()
    monkeypatch.setattr(build_main, "list_cuda_gpus", lambda: (GPU,))
    try:
        options = builds(used)
        runs(monkeypatch, used)
        found = {"version": VERSION, "members": {**members(), **options}, "used": sorted(used)}
        found["fake names"] = names_of_fake()
        found["weak references"] = contexts_can_be_tracked()
        found["virtual calls"] = Refusals(VERSION.partition(".")[0]).calls
    finally:
        monkeypatch.undo()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
