"""Calls of the TensorRT API per version. Versions that need a GPU are fakes with the names of their Python bindings."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import pytest

from tests.fakes import fake_tensorrt
from tests.fakes.fake_tensorrt import FakeTensorrt, chain
from tests.support.plugin_kit import tensorrt86_or_skip
from yolov7_deploy.errors import EngineError
from yolov7_deploy.tensorrt.build_main import PROGRESS_STEPS, ProgressPhases, TimingCache, build
from yolov7_deploy.tensorrt.build_messages import MODEL_FILE, PLAN_FILE, BuildRequest
from yolov7_deploy.tensorrt.build_record import InputShape
from yolov7_deploy.tensorrt.capabilities import TrtCapabilities

GIB = 2**30
DYNAMIC_BATCH = InputShape(name="images", min=(1, 3, 64, 64), opt=(4, 3, 64, 64), max=(8, 3, 64, 64))


def build_request(**fields):
    return BuildRequest(**{"product": "tensorrt", "precision": "fp32", **fields})


@pytest.fixture
def run(tmp_path):
    """Return a function that builds with a fake TensorRT and returns the fake and the report."""
    (tmp_path / MODEL_FILE).write_bytes(b"a graph")

    def run_build(version, *, events=None, fake=None, **fields):
        trt = fake or FakeTensorrt(version)
        received = events if events is not None else []
        report = build(
            TrtCapabilities("tensorrt", trt),
            build_request(**fields),
            tmp_path,
            lambda kind, value: received.append((kind, value)),
        )
        return trt, report

    return run_build


def set_flags(trt):
    return [entry[1] for entry in trt.config.done if entry[0] == "set_flag"]


@pytest.mark.parametrize(
    "version,precision,typed,flags",
    [
        ("8.5", "fp16", False, ["FP16"]),
        ("8.6", "fp32", False, []),
        ("8.6", "fp16", False, ["FP16"]),
        ("8.6", "int8", False, ["INT8", "FP16"]),
        ("10.3", "fp32", False, []),
        ("10.3", "fp16", False, ["FP16"]),  # has STRONGLY_TYPED, but not complete
        ("10.13", "fp32", False, []),
        ("10.13", "fp16", True, []),
        ("10.13", "int8", True, []),
        ("11.1", "fp32", True, []),
        ("11.1", "fp16", True, []),
    ],
)
def test_precisions_are_builder_flags_unless_the_network_is_strongly_typed(run, version, precision, typed, flags):
    trt, report = run(version, precision=precision)
    assert report.strongly_typed is typed
    assert set_flags(trt) == list(report.flags) == flags


# The end of an FP16 file: head convolutions in FP16, decoding in float32, NMS.
HALF, FLOAT = ["HALF"] * 2, ["FLOAT"] * 5
FP16_END = ("CAST", "CONVOLUTION", "CAST", "SHUFFLE", "ACTIVATION", "ELEMENTWISE", "PLUGIN_V2")


def pinned(trt):
    return [layer.name for layer in trt.network.layers if layer.precision is not None]


@pytest.mark.parametrize(
    ("version", "precision", "expected"),
    [
        ("8.6", "fp16", ["shuffle3", "activation4", "elementwise5"]),
        ("10.3", "fp16", ["shuffle3", "activation4", "elementwise5"]),
        ("10.3", "int8", ["shuffle3", "activation4", "elementwise5"]),
        ("10.3", "fp32", []),
        ("10.13", "fp16", []),  # strongly typed: the graph determines every precision
        ("11.1", "fp16", []),
    ],
)
def test_boxes_are_decoded_in_float32_if_the_network_is_not_strongly_typed(run, version, precision, expected):
    trt, report = run(
        version, fake=FakeTensorrt(version, layers=chain(*FP16_END, dtypes=HALF + FLOAT)), precision=precision
    )
    assert pinned(trt) == expected
    assert {layer.precision.name for layer in trt.network.layers if layer.precision is not None} <= {"FLOAT"}
    assert all(layer.output_types == {0: "FLOAT"} for layer in trt.network.layers if layer.precision is not None)
    assert ("PREFER_PRECISION_CONSTRAINTS" in report.flags) == bool(expected)


def test_float32_layers_between_fp16_layers_are_pinned_and_those_before_the_first_cast_are_not(run):
    kinds = ("ELEMENTWISE", "CAST", "CONVOLUTION", "CAST", "CONVOLUTION", "ACTIVATION", "CAST", "CONVOLUTION")
    dtypes = ["FLOAT", "HALF", "HALF", "FLOAT", "FLOAT", "FLOAT", "HALF", "HALF"]
    trt, _ = run("8.6", fake=FakeTensorrt("8.6", layers=chain(*kinds, dtypes=dtypes)), precision="fp16")
    assert pinned(trt) == ["convolution4", "activation5"]


def test_int8_convolutions_after_the_cast_of_a_uint8_input_are_not_pinned(run):
    kinds = (
        "CAST",
        "ELEMENTWISE",
        "QUANTIZE",
        "DEQUANTIZE",
        "CONVOLUTION",
        "ACTIVATION",
        "CONVOLUTION",
        "SHUFFLE",
        "UNARY",
    )
    dtypes = ["FLOAT", "FLOAT", "INT8", *["FLOAT"] * 6]
    trt, _ = run("8.6", fake=FakeTensorrt("8.6", layers=chain(*kinds, dtypes=dtypes)), precision="int8")
    assert pinned(trt) == []
    dtypes[2] = "FLOAT"
    trt, _ = run("8.6", fake=FakeTensorrt("8.6", layers=chain(*kinds, dtypes=dtypes)), precision="int8")
    assert pinned(trt) == ["shuffle7", "unary8"]


@pytest.mark.parametrize(
    "version,precision,names",
    [
        ("8.6", "fp16", ["EXPLICIT_BATCH"]),
        ("10.3", "fp16", ["EXPLICIT_BATCH"]),
        ("10.13", "fp16", ["EXPLICIT_BATCH", "STRONGLY_TYPED"]),
        ("11.1", "fp32", ["STRONGLY_TYPED"]),
    ],
)
def test_a_network_is_created_with_the_flags_that_exist(run, version, precision, names):
    trt, _ = run(version, precision=precision)
    known = trt.NetworkDefinitionCreationFlag
    assert trt.network.flags == sum(1 << getattr(known, name) for name in names)


def test_a_configuration_is_set_in_a_fixed_order(run):
    trt, report = run(
        "10.3",
        precision="fp16",
        workspace_bytes=2 * GIB,
        opt_level=5,
        sparse=True,
        version_compatible=True,
        hardware_compatible="ampere_plus",
    )
    assert trt.config.done[:9] == [
        ("profiling_verbosity", "DETAILED"),
        ("set_memory_pool_limit", "WORKSPACE", 2 * GIB),
        ("builder_optimization_level", 5),
        ("set_flag", "FP16"),
        ("set_flag", "SPARSE_WEIGHTS"),
        ("set_flag", "VERSION_COMPATIBLE"),
        ("hardware_compatibility_level", "AMPERE_PLUS"),
        ("get_tactic_sources",),
        ("set_tactic_sources", 0b11000),  # without the first three: CUBLAS, CUBLAS_LT, CUDNN
    ]
    assert report.optimization_level == 5


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_tactic_sources_are_unchanged_without_library_sources(run, version):
    trt, _ = run(version)
    is_set = "set_tactic_sources" in [verb for verb, *_ in trt.config.done]
    assert is_set == (version != "11.1")


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_progress_is_monitored_where_tensorrt_reports_it(run, version):
    trt, _ = run(version)
    monitored = "progress_monitor" in [verb for verb, *_ in trt.config.done]
    assert monitored == version.startswith("1")  # from 10 on


@pytest.mark.parametrize(
    "version,fields,message",
    [
        ("8.5", {"opt_level": 3}, "--opt-level.*8.6"),
        ("8.5", {"version_compatible": True}, "--version-compatible.*8.6"),
        ("8.5", {"hardware_compatible": "ampere_plus"}, r"--hardware-compatible ampere\+.*8.6"),
        ("10.3", {"hardware_compatible": "same_compute_capability"}, "--hardware-compatible same-cc.*10.9"),
        ("10.3", {"dla": 0, "precision": "fp16"}, "--dla 0.*Xavier and Orin"),
    ],
)
def test_an_unsupported_option_is_an_error_with_the_version_that_supports_it(run, version, fields, message):
    with pytest.raises(EngineError) as caught:
        run(version, **fields)
    assert re.search(message, f"{caught.value.message}\n{caught.value.fix}", re.DOTALL)


def test_hardware_compatibility_requires_a_supported_gpu():
    capabilities = TrtCapabilities("tensorrt", FakeTensorrt("10.3"))
    with pytest.raises(EngineError, match=r"8\.0 or later; this one has 7\.0"):
        capabilities.check_request_supported(
            build_request(hardware_compatible="ampere_plus"), compute_capability="7.0", dla_cores=0
        )


def test_layers_that_a_dla_cannot_run_are_listed_as_fallback(run):
    trt, report = run("8.6", fake=FakeTensorrt("8.6", dla_cores=2), precision="fp16", dla=1)
    assert set_flags(trt) == ["FP16", "GPU_FALLBACK"]
    assert ("default_device_type", "DLA") in trt.config.done and ("DLA_core", 1) in trt.config.done
    assert (report.dla.core, report.dla.fallback) == (1, ("nms",))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"dla": 2, "precision": "fp16"}, "finds 2"),
        ({"dla": 0}, "FP16 and INT8"),
        ({"dla": 0, "precision": "fp16", "shapes": (DYNAMIC_BATCH,)}, "fixed shapes"),
        ({"dla": 0, "precision": "int8"}, "an INT8 file consists of Q/DQ pairs.* does not support"),
    ],
)
def test_limits_of_a_dla_are_checked_before_the_build(run, fields, message):
    with pytest.raises(EngineError, match=message):
        run("8.6", fake=FakeTensorrt("8.6", dla_cores=2), **fields)


@pytest.mark.parametrize("version", ["8.5", "8.6", "10.3"])
def test_an_int8_file_for_a_dla_is_an_error_that_explains_int8_on_dla(run, version):
    with pytest.raises(EngineError) as caught:
        run(version, fake=FakeTensorrt(version, dla_cores=2), precision="int8", dla=1)
    for part in ("fp16 file", "y7 quantize", "--trt-cache F", "trtexec", "--calib=F", "--useDLACore=1"):
        assert part in caught.value.fix


def test_an_int8_file_builds_for_a_dla_if_the_network_is_strongly_typed(run):
    trt, report = run("11.1", fake=FakeTensorrt("11.1", dla_cores=2), precision="int8", dla=0)
    assert (report.strongly_typed, set_flags(trt)) == (True, ["GPU_FALLBACK"])


def test_a_dynamic_batch_has_one_profile_and_a_fixed_batch_none(run):
    trt, _ = run("10.3", fake=FakeTensorrt("10.3", batch=-1), shapes=(DYNAMIC_BATCH,))
    assert trt.profile.done == [("set_shape", "images", DYNAMIC_BATCH.min, DYNAMIC_BATCH.opt, DYNAMIC_BATCH.max)]
    assert "add_optimization_profile" in [verb for verb, *_ in trt.config.done]
    trt, _ = run("10.3", shapes=(DYNAMIC_BATCH,))
    assert trt.profile is None


@pytest.mark.parametrize(("version", "batch", "shares"), [("8.6", -1, True), ("8.6", 1, False), ("10.3", -1, False)])
def test_profile_sharing_is_enabled_for_a_dynamic_batch_where_it_is_optional(run, version, batch, shares):
    trt, _ = run(version, fake=FakeTensorrt(version, batch=batch), shapes=(DYNAMIC_BATCH,))
    assert (("set_preview_feature", "PROFILE_SHARING_0806", True) in trt.config.done) == shares


@pytest.mark.parametrize("version", ["8.6", "10.3"])
def test_the_plugin_library_is_loaded_before_the_graph_is_parsed(run, version):
    trt, report = run(version, plugin="/somewhere/liby7_plugin.so")
    assert "Y7NMS" in [creator.name for creator in trt.creators]
    assert report.failure is None


def test_a_library_without_our_plugin_is_an_error(run):
    with pytest.raises(EngineError, match=r"cannot use the plugin library /other\.so"):
        run("10.3", plugin="/other.so")


@pytest.mark.parametrize("version,name,op", [("8.6", "", ""), ("10.3", "thenode", "Frobnicate")])
def test_parser_errors_have_the_fields_that_the_version_reports(run, version, name, op):
    fake = FakeTensorrt(version, parser_errors=[(7, "thenode", "Frobnicate", "no importer")])
    _, report = run(version, fake=fake)
    (error,) = report.failure.parser_errors
    assert (error.node, error.name, error.op, error.message) == (7, name, op, "no importer")


def test_a_build_without_a_plan_is_a_failure(run, tmp_path):
    _, report = run("10.3", fake=FakeTensorrt("10.3", plan=None))
    assert "cannot build" in report.failure.message
    assert not (tmp_path / PLAN_FILE).exists()


def test_the_plan_the_layers_and_events_are_returned(run, tmp_path):
    events = []
    _, report = run("10.3", events=events)
    assert (tmp_path / PLAN_FILE).read_bytes() == b"ftrt plan"
    assert [layer.type for layer in report.network_layers] == ["CONVOLUTION", "LOOP"]
    assert events == [("parsed", 2), ("progress", [PROGRESS_STEPS, PROGRESS_STEPS])]


def test_only_the_last_list_of_layers_is_kept_from_verbose_messages(run):
    events = []
    verbose = ("Layers:\nName: first", *["Registering layer: x"] * 100, "Layers:\nName: last\n", "After Layers:\n")
    _, report = run("10.3", events=events, fake=FakeTensorrt("10.3", verbose=verbose))
    assert report.listing == "Layers:\nName: last\n"
    assert "log" not in [kind for kind, _ in events]


# --- timing cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(run, tmp_path):
    """Return a function that builds with a timing cache of this content and returns the report and the file."""

    def run_build(content, *, path=None):
        path = path or tmp_path / "kernels.timing"
        if content is not None:
            path.write_bytes(content)
        _, report = run("10.3", timing_cache=str(path))
        return report, path

    return run_build


def test_a_new_timing_cache_is_written(cached):
    report, path = cached(None)
    assert path.read_bytes() == b"measured and more"
    assert (report.timing_cache, report.notes) == (str(path), ())


def test_an_existing_timing_cache_is_used(cached):
    report, path = cached(b"measured")
    assert path.read_bytes() == b"measured and more"
    assert report.notes == ()


@pytest.mark.parametrize("content", [b"of another GPU", b"\0" * 100])
def test_a_timing_cache_of_another_device_or_a_damaged_one_is_replaced_with_a_note(cached, content):
    report, path = cached(content)
    assert path.read_bytes() == b"measured and more"
    assert "a new one is measured" in report.notes[0]


def test_a_timing_cache_that_cannot_be_written_is_a_note_and_not_a_failure(cached, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    report, _ = cached(None, path=tmp_path / "file" / "below" / "kernels.timing")
    assert report.failure is None
    assert "cannot be" in report.notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([MODEL_FILE, PLAN_FILE, "file"])


def test_each_device_and_version_has_its_own_file_in_a_folder(tmp_path):
    caches = [TimingCache(f"{tmp_path}/", device=f"tensorrt-{v}-NVIDIA A10 (x)/y-8.6") for v in ("10.3", "10.4")]
    assert [cache.path for cache in caches] == [
        f"{tmp_path}/tensorrt-10.3-NVIDIA-A10-x-y-8.6.timing",
        f"{tmp_path}/tensorrt-10.4-NVIDIA-A10-x-y-8.6.timing",
    ]


# --- progress ---------------------------------------------------------------------------------------------------------


def test_nested_phases_add_up_and_never_decrease():
    reported = []
    phases = ProgressPhases(lambda done, total: reported.append((done, total)))
    phases.start("build", None, 2)
    phases.start("first half", "build", 4)
    for step in range(4):
        phases.step("first half", step)
    phases.finish("first half")
    phases.step("build", 0)
    phases.start("second half", "build", 1)
    phases.start("inside", "second half", 10)
    phases.step("inside", 4)
    phases.step("unknown", 3)
    phases.finish("unknown")
    assert [done for done, _ in reported] == [0, 12, 25, 37, 50, 75]
    assert {total for _, total in reported} == {PROGRESS_STEPS}


# --- failures before the build ----------------------------------------------------------------------------------------


def test_a_builder_that_cannot_be_created_is_an_error_with_the_last_message(run):
    def refuse(logger):
        logger.log(SimpleNamespace(name="ERROR"), "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    fake, events = FakeTensorrt("10.3"), []
    fake.Builder = refuse
    with pytest.raises(EngineError, match=r"TensorRT 10\.3 cannot build here: ERROR: CUDA init.* error: 35") as caught:
        run("10.3", fake=fake, events=events)
    assert caught.value.fix == "See  y7 doctor"
    assert events == [("log", "ERROR: CUDA initialization failure with error: 35")]


def test_a_plugin_library_that_cannot_be_opened_is_an_error_with_the_reason(run, tmp_path):
    (tmp_path / "it.so").write_bytes(b"not ELF")
    with pytest.raises(EngineError, match=r"cannot use the plugin library .*it\.so: .*(file too short|invalid ELF)"):
        run("8.5", plugin=str(tmp_path / "it.so"))


# --- a real TensorRT 8.6, without a GPU -------------------------------------------------------------------------------

# Prints which names of the fake the module has, and the result of a probe.
REAL = """
import json, sys
from dataclasses import asdict
import tensorrt
from yolov7_deploy.tensorrt.build_main import probe
names = [[kind, name] for kind, name in json.loads(sys.argv[1]) if hasattr(getattr(tensorrt, kind, None), name)]
classes = [kind for kind in json.loads(sys.argv[2]) if hasattr(tensorrt, kind)]
print(json.dumps([tensorrt.__version__, names, classes, asdict(probe("tensorrt"))]))
"""


def test_the_fake_has_the_names_of_the_real_8_6_and_a_probe_reports_why_it_cannot_build():
    folder = tensorrt86_or_skip()
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{folder / 'lib'}:{sysconfig.get_config_var('LIBDIR')}",
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), *sys.path]),
    }
    names = [(kind, name) for kind, name, *_ in fake_tensorrt.NAMES]
    classes = [kind for kind, _ in fake_tensorrt.CLASSES]
    command = [sys.executable, "-c", REAL, json.dumps(names), json.dumps(classes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    version, real_names, real_classes, found = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith("8.6")
    expected = [[kind, name] for kind, name, *versions in fake_tensorrt.NAMES if fake_tensorrt.has("8.6", *versions)]
    assert real_names == expected
    assert real_classes == [kind for kind, first in fake_tensorrt.CLASSES if fake_tensorrt.has("8.6", first)]
    assert (found["abi"], found["version"]) == ("v2", version)
    if not found["gpu"]:
        assert "CUDA" in found["error"]
