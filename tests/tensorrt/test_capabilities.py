"""What is asked of each TensorRT. Versions that need a GPU are stood for by what their bindings are known to have."""

import json
import os
import re
import subprocess
import sys
import sysconfig

import pytest

from tests.fakes import fake_tensorrt
from tests.fakes.fake_tensorrt import FakeTensorrt
from tests.support.plugin_kit import old_or_skip
from yolov7_deploy.errors import EngineError
from yolov7_deploy.tensorrt.build_messages import MODEL, PLAN, BuildJob
from yolov7_deploy.tensorrt.build_record import InputShape
from yolov7_deploy.tensorrt.build_worker import build
from yolov7_deploy.tensorrt.capabilities import Dialect
from yolov7_deploy.tensorrt.progress import PARTS, Phases
from yolov7_deploy.tensorrt.timing_cache import TimingCache

GIB = 2**30
OPEN_BATCH = InputShape(name="images", min=(1, 3, 64, 64), opt=(4, 3, 64, 64), max=(8, 3, 64, 64))


def job(**fields):
    return BuildJob(**{"product": "tensorrt", "precision": "fp32", **fields})


@pytest.fixture
def run(tmp_path):
    """Builds with a fake; gives the fake and the report."""
    (tmp_path / MODEL).write_bytes(b"a graph")

    def go(version, *, told=None, fake=None, **fields):
        trt = fake or FakeTensorrt(version)
        events = told if told is not None else []
        report = build(
            Dialect("tensorrt", trt), job(**fields), tmp_path, lambda kind, value: events.append((kind, value))
        )
        return trt, report

    return go


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
        ("10.3", "fp16", False, ["FP16"]),  # has STRONGLY_TYPED, but not yet for everything
        ("10.13", "fp32", False, []),
        ("10.13", "fp16", True, []),
        ("10.13", "int8", True, []),
        ("11.1", "fp32", True, []),
        ("11.1", "fp16", True, []),
    ],
)
def test_half_precision_is_a_flag_where_types_are_permissions_and_the_graphs_types_elsewhere(
    run, version, precision, typed, flags
):
    trt, report = run(version, precision=precision)
    assert report.strongly_typed is typed
    assert set_flags(trt) == list(report.flags) == flags


@pytest.mark.parametrize(
    "version,precision,names",
    [
        ("8.6", "fp16", ["EXPLICIT_BATCH"]),
        ("10.3", "fp16", ["EXPLICIT_BATCH"]),
        ("10.13", "fp16", ["EXPLICIT_BATCH", "STRONGLY_TYPED"]),
        ("11.1", "fp32", ["STRONGLY_TYPED"]),
    ],
)
def test_a_network_is_made_with_the_flags_that_exist(run, version, precision, names):
    trt, _ = run(version, precision=precision)
    known = trt.NetworkDefinitionCreationFlag
    assert trt.network.flags == sum(1 << getattr(known, name) for name in names)


def test_a_configuration_gets_everything_in_one_order(run):
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
def test_tactic_sources_are_left_alone_where_none_of_them_is_a_library(run, version):
    trt, _ = run(version)
    asked = "set_tactic_sources" in [verb for verb, *_ in trt.config.done]
    assert asked == (version != "11.1")


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_progress_is_watched_where_tensorrt_tells_it(run, version):
    trt, _ = run(version)
    watched = "progress_monitor" in [verb for verb, *_ in trt.config.done]
    assert watched == version.startswith("1")  # from 10 on


@pytest.mark.parametrize(
    "version,fields,says",
    [
        ("8.5", {"opt_level": 3}, "--opt-level.*8.6"),
        ("8.5", {"version_compatible": True}, "--version-compatible.*8.6"),
        ("8.5", {"hardware_compatible": "ampere_plus"}, r"--hardware-compatible ampere\+.*8.6"),
        ("10.3", {"hardware_compatible": "same_compute_capability"}, "--hardware-compatible same-cc.*10.9"),
        ("10.3", {"dla": 0, "precision": "fp16"}, "--dla 0.*Xavier and Orin"),
    ],
)
def test_an_option_that_this_tensorrt_lacks_is_named_with_the_version_that_has_it(run, version, fields, says):
    with pytest.raises(EngineError) as caught:
        run(version, **fields)
    assert re.search(says, str(caught.value), re.DOTALL)


def test_compatibility_with_later_gpus_is_refused_on_those_before():
    dialect = Dialect("tensorrt", FakeTensorrt("10.3"))
    with pytest.raises(EngineError, match=r"8\.0 or later; this one has 7\.0"):
        dialect.check(job(hardware_compatible="ampere_plus"), compute_capability="7.0", dla_cores=0)


def test_a_dla_core_takes_what_it_can_and_the_rest_is_named(run):
    trt, report = run("8.6", fake=FakeTensorrt("8.6", dla_cores=2), precision="fp16", dla=1)
    assert set_flags(trt) == ["FP16", "GPU_FALLBACK"]
    assert ("default_device_type", "DLA") in trt.config.done and ("DLA_core", 1) in trt.config.done
    assert (report.dla.core, report.dla.fallback) == (1, ("nms",))


@pytest.mark.parametrize(
    "fields,says",
    [
        ({"dla": 2, "precision": "fp16"}, "counts 2"),
        ({"dla": 0}, "float16 or int8"),
        ({"dla": 0, "precision": "fp16", "shapes": (OPEN_BATCH,)}, "fixed shapes"),
        ({"dla": 0, "precision": "int8"}, "an int8 file is made of Q/DQ pairs.* takes none"),
    ],
)
def test_what_a_dla_cannot_do_is_said_before_the_build(run, fields, says):
    with pytest.raises(EngineError, match=says):
        run("8.6", fake=FakeTensorrt("8.6", dla_cores=2), **fields)


@pytest.mark.parametrize("version", ["8.5", "8.6", "10.3"])
def test_an_int8_file_for_a_dla_is_refused_with_the_way_to_its_int8(run, version):
    with pytest.raises(EngineError) as caught:
        run(version, fake=FakeTensorrt(version, dla_cores=2), precision="int8", dla=1)
    for words in ("fp16 file", "y7 quantize", "--trt-cache F", "trtexec", "--calib=F", "--useDLACore=1"):
        assert words in caught.value.fix


def test_an_int8_file_goes_to_a_dla_where_types_are_the_graphs(run):
    trt, report = run("11.1", fake=FakeTensorrt("11.1", dla_cores=2), precision="int8", dla=0)
    assert (report.strongly_typed, set_flags(trt)) == (True, ["GPU_FALLBACK"])


def test_an_open_batch_gets_one_profile_and_a_fixed_one_none(run):
    trt, _ = run("10.3", fake=FakeTensorrt("10.3", batch=-1), shapes=(OPEN_BATCH,))
    assert trt.profile.done == [("set_shape", "images", OPEN_BATCH.min, OPEN_BATCH.opt, OPEN_BATCH.max)]
    assert "add_optimization_profile" in [verb for verb, *_ in trt.config.done]
    trt, _ = run("10.3", shapes=(OPEN_BATCH,))
    assert trt.profile is None


@pytest.mark.parametrize(("version", "batch", "shares"), [("8.6", -1, True), ("8.6", 1, False), ("10.3", -1, False)])
def test_contexts_share_the_profile_of_an_open_batch_where_they_do_not_anyway(run, version, batch, shares):
    trt, _ = run(version, fake=FakeTensorrt(version, batch=batch), shapes=(OPEN_BATCH,))
    assert (("set_preview_feature", "PROFILE_SHARING_0806", True) in trt.config.done) == shares


@pytest.mark.parametrize("version", ["8.6", "10.3"])
def test_the_plugin_library_is_loaded_before_the_graph_is_parsed(run, version):
    trt, report = run(version, plugin="/somewhere/liby7_plugin.so")
    assert "Y7NMS" in [creator.name for creator in trt.creators]
    assert report.failure is None


def test_a_library_without_our_plugin_is_refused(run):
    with pytest.raises(EngineError, match=r"does not take the plugin library /other\.so"):
        run("10.3", plugin="/other.so")


@pytest.mark.parametrize("version,name,op", [("8.6", "", ""), ("10.3", "thenode", "Frobnicate")])
def test_the_parsers_complaint_is_told_as_far_as_it_knows(run, version, name, op):
    fake = FakeTensorrt(version, faults=[(7, "thenode", "Frobnicate", "no importer")])
    _, report = run(version, fake=fake)
    (fault,) = report.failure.parser
    assert (fault.node, fault.name, fault.op, fault.words) == (7, name, op, "no importer")


def test_a_build_without_a_plan_is_a_failure(run, tmp_path):
    _, report = run("10.3", fake=FakeTensorrt("10.3", plan=None))
    assert "cannot build" in report.failure.message
    assert not (tmp_path / PLAN).exists()


def test_the_plan_and_the_parsed_layers_come_back(run, tmp_path):
    told = []
    _, report = run("10.3", told=told)
    assert (tmp_path / PLAN).read_bytes() == b"ftrt plan"
    assert [layer.type for layer in report.network_layers] == ["CONVOLUTION", "LOOP"]
    assert told == [("parsed", 2), ("progress", [PARTS, PARTS])]


def test_of_the_chatter_the_last_list_of_layers_comes_back_and_nothing_else(run):
    told = []
    chatter = ("Layers:\nName: first", *["Registering layer: x"] * 100, "Layers:\nName: last\n", "After Layers:\n")
    _, report = run("10.3", told=told, fake=FakeTensorrt("10.3", chatter=chatter))
    assert report.listing == "Layers:\nName: last\n"
    assert "log" not in [kind for kind, _ in told]


# --- timing cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(run, tmp_path):
    """Builds with a timing cache file of this content; gives the report and the file."""

    def go(content, *, place=None):
        path = place or tmp_path / "kernels.timing"
        if content is not None:
            path.write_bytes(content)
        _, report = run("10.3", timing_cache=str(path))
        return report, path

    return go


def test_what_was_measured_is_written(cached):
    report, path = cached(None)
    assert path.read_bytes() == b"measured and more"
    assert (report.timing_cache, report.notes) == (str(path), ())


def test_what_was_measured_before_is_used(cached):
    report, path = cached(b"measured")
    assert path.read_bytes() == b"measured and more"
    assert report.notes == ()


@pytest.mark.parametrize("content", [b"of another GPU", b"\0" * 100])
def test_a_cache_of_another_device_or_a_damaged_one_is_a_note_and_is_rewritten(cached, content):
    report, path = cached(content)
    assert path.read_bytes() == b"measured and more"
    assert "measured anew" in report.notes[0]


def test_a_cache_that_cannot_be_written_is_a_note_and_no_failure(cached, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    report, _ = cached(None, place=tmp_path / "file" / "below" / "kernels.timing")
    assert report.failure is None
    assert "cannot be" in report.notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([MODEL, PLAN, "file"])


def test_each_device_and_version_has_its_own_file_in_a_folder(tmp_path):
    caches = [TimingCache(f"{tmp_path}/", device=f"tensorrt-{v}-NVIDIA A10 (x)/y-8.6") for v in ("10.3", "10.4")]
    assert [cache.used for cache in caches] == [
        f"{tmp_path}/tensorrt-10.3-NVIDIA-A10-x-y-8.6.timing",
        f"{tmp_path}/tensorrt-10.4-NVIDIA-A10-x-y-8.6.timing",
    ]


# --- progress ---------------------------------------------------------------------------------------------------------


def test_nested_phases_rise_to_the_whole_and_never_fall():
    told = []
    phases = Phases(lambda done, total: told.append((done, total)))
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
    assert [done for done, _ in told] == [0, 12, 25, 37, 50, 75]
    assert {total for _, total in told} == {PARTS}


# --- a real TensorRT 8.6, without a GPU -------------------------------------------------------------------------------

# Prints what the module has of the fake's names, and what a probe of it says.
REAL = """
import json, sys
from dataclasses import asdict
import tensorrt
from yolov7_deploy.engine.worker import probe
names = [[kind, name] for kind, name in json.loads(sys.argv[1]) if hasattr(getattr(tensorrt, kind, None), name)]
classes = [kind for kind in json.loads(sys.argv[2]) if hasattr(tensorrt, kind)]
print(json.dumps([tensorrt.__version__, names, classes, asdict(probe("tensorrt"))]))
"""


def test_the_fake_is_like_the_real_8_6_and_a_probe_says_why_it_does_not_build():
    folder = old_or_skip()
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
    expected = [[kind, name] for kind, name, *span in fake_tensorrt.NAMES if fake_tensorrt.has("8.6", *span)]
    assert real_names == expected
    assert real_classes == [kind for kind, first in fake_tensorrt.CLASSES if fake_tensorrt.has("8.6", first)]
    assert (found["abi"], found["version"]) == ("v2", version)
    if not found["gpu"]:
        assert "CUDA" in found["fault"]
