"""The Engine type: saving and loading of plan and record, and mismatches with another machine."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.small_models import fused_tiny, metadata_of
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.errors import EngineError, LoadError
from yolov7_deploy.tensorrt.build_record import (
    DlaUse,
    EngineEnvironment,
    EngineRecord,
    EngineTensor,
    InputShape,
    NetworkLayer,
    PluginUse,
)
from yolov7_deploy.tensorrt.engine import Engine, plan_version, record_path

# First bytes of plans: magic, version of the layout, length, and from byte 24 the version of TensorRT.
RTX_HEADER = bytes.fromhex("76747274 00000000 02000000 00000000 8c120400 00000000 01070174 76747274 7e000000")
TRT_HEADER = bytes.fromhex("66747274 00000000 02000000 00000000 8c120400 00000000 0a03001a 66747274 00000000")
PLAN = TRT_HEADER + bytes(range(200))
PLUGIN = PluginUse(path="/cache/liby7_plugin.so", version="1", abi="v3")


def record_of(plan=PLAN, **fields):
    record = EngineRecord(
        metadata=metadata_of(fused_tiny()),
        plan_bytes=len(plan),
        plan_sha256=sha256_hex(plan),
        product="tensorrt",
        tensorrt="10.3.0",
        cuda="12.6",
        driver="560.35",
        gpu="NVIDIA A10",
        compute_capability="8.6",
        platform="linux-x86_64",
        plugin=PLUGIN,
        nms_by="plugin",
        runtime_thresholds=True,
        flags=("FP16",),
        shapes=(InputShape(name="images", min=(1, 3, 64, 64), opt=(4, 3, 64, 64), max=(8, 3, 64, 64)),),
        inputs=(EngineTensor(name="images", dtype="float32", shape=(-1, 3, 64, 64)),),
        outputs=(EngineTensor(name="num_dets", dtype="int32", shape=(-1, 1)),),
        network_layers=(NetworkLayer(name="nms", type="PLUGIN_V3", precision="int32"),),
        dla=DlaUse(core=0, fallback=("nms",)),
        workspace_bytes=2**30,
        optimization_level=3,
        build_s=12.5,
        notes=("a note",),
    )
    return replace(record, **fields)


def machine(**fields):
    known = {
        "product": "tensorrt",
        "tensorrt": "10.3.0",
        "compute_capability": "8.6",
        "platform": "linux-x86_64",
        "plugin": PLUGIN,
    }
    return EngineEnvironment(**{**known, **fields})


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny.engine"
    Engine(plan=PLAN, record=record_of()).save(path)
    return path


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_engine_loads_as_it_was(saved):
    assert Engine.load(saved) == Engine(plan=PLAN, record=record_of())


def test_the_plan_is_a_plain_file_and_the_record_is_next_to_it(saved):
    assert saved.read_bytes() == PLAN
    assert record_path(saved).name == "tiny.engine.json"
    assert sorted(path.name for path in saved.parent.iterdir()) == ["tiny.engine", "tiny.engine.json"]


def test_the_same_record_is_the_same_bytes_with_sorted_keys():
    text = record_of().to_json()
    assert text == record_of().to_json()
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_a_failed_write_keeps_the_existing_engine(saved, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match="No space left on device"):
        Engine(plan=PLAN * 2, record=record_of(PLAN * 2)).save(saved)
    monkeypatch.undo()
    assert Engine.load(saved).plan == PLAN
    assert len(list(saved.parent.iterdir())) == 2


def test_a_plan_without_a_record_replaces_both_files(saved):
    Engine(plan=PLAN * 2, record=None).save(saved)
    assert Engine.load(saved).plan == PLAN * 2
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_folder_is_created(tmp_path):
    Engine(plan=PLAN, record=None).save(tmp_path / "new" / "x.engine")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.engine"]


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "nowhere").write_text("")
    with pytest.raises(EngineError, match="nowhere"):
        Engine(plan=PLAN, record=None).save(tmp_path / "nowhere" / "x.engine")


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda plan: plan[:-7], r"truncated: it has \d+ bytes, plan_bytes in tiny\.engine\.json is \d+"),
        (lambda plan: plan + b"x", "replaced: it has"),
        (lambda plan: plan[:-1] + b"\0", "plan_sha256"),
        (lambda plan: b"", "truncated: it has 0 bytes"),
    ],
)
def test_a_plan_that_does_not_match_its_record_is_an_error_with_the_command_to_rebuild(saved, damage, message):
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(LoadError, match=message) as caught:
        Engine.load(saved)
    assert caught.value.fix == f"Build it again:  y7 build --weights tiny.onnx --output {saved}"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda raw: raw | {"schema": 2}, "schema is 2, this version reads 1"),
        (lambda raw: {k: v for k, v in raw.items() if k != "plan_bytes"}, "plan_bytes is missing"),
        (lambda raw: raw | {"plan_bytes": "many"}, "plan_bytes is 'many'"),
        (lambda raw: raw | {"peak_memory_bytes": 10**400}, "peak_memory_bytes is 1000"),
        (lambda raw: raw | {"product": "openvino"}, "product is 'openvino'"),
        (lambda raw: raw | {"targets": 86}, "targets is 86"),
        (lambda raw: raw | {"shapes": [{"name": "images"}]}, "min is missing"),
        (lambda raw: raw | {"plugin": []}, r"plugin is \[\]"),
        (lambda raw: raw | {"build_s": True}, "build_s is True"),
        (lambda raw: raw | {"metadata": None}, "metadata"),
        (lambda raw: [raw], "a JSON list instead of an object"),
    ],
)
def test_an_invalid_record_is_an_error_that_names_the_field(saved, change, message):
    path = record_path(saved)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(LoadError, match=message) as caught:
        Engine.load(saved)
    assert "y7 build" in caught.value.fix


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_record_that_is_not_json_is_a_load_error(saved, content):
    record_path(saved).write_bytes(content)
    with pytest.raises(LoadError, match=r"tiny\.engine\.json"):
        Engine.load(saved)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_load_error(data):
    try:
        EngineRecord.from_json(data.decode(errors="replace"))
    except LoadError:
        return
    raise AssertionError("these bytes are not a record")


def test_unknown_fields_are_ignored():
    raw = json.loads(record_of().to_json()) | {"invented_later": 1}
    assert EngineRecord.from_json(json.dumps(raw)) == record_of()


def test_an_engine_without_a_record_loads_with_a_warning(tmp_path, caplog):
    path = tmp_path / "foreign.engine"
    path.write_bytes(PLAN)
    engine = Engine.load(path)
    assert (engine.plan, engine.record) == (PLAN, None)
    assert "written by tensorrt 10.3.0.26" in engine.notes[0]
    assert engine.notes[0] in caplog.text


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04 a zip file", b"\0" * 100])
def test_a_file_that_is_not_a_plan_is_an_error(tmp_path, content):
    path = tmp_path / "x.engine"
    path.write_bytes(content)
    with pytest.raises(LoadError, match="is not a TensorRT engine"):
        Engine.load(path)


def test_a_missing_engine_is_an_error_with_the_build_command(tmp_path):
    with pytest.raises(LoadError, match="does not exist") as caught:
        Engine.load(tmp_path / "x.engine")
    assert "y7 build" in caught.value.fix


def test_a_folder_is_an_error(tmp_path):
    with pytest.raises(LoadError, match="cannot be read"):
        Engine.load(tmp_path)


@pytest.mark.parametrize(
    "plan,expected",
    [
        (RTX_HEADER, ("tensorrt_rtx", "1.7.1.116")),
        (TRT_HEADER, ("tensorrt", "10.3.0.26")),
        (TRT_HEADER[:27], None),
        (TRT_HEADER[:4] + b"\1" + TRT_HEADER[5:], None),  # another layout
        (b"ptrt" + TRT_HEADER[4:], None),
        (b"", None),
    ],
)
def test_the_tensorrt_version_is_read_from_a_plan(plan, expected):
    assert plan_version(plan) == expected


# --- another machine --------------------------------------------------------------------------------------------------


def fields_of(record, **changes):
    return [mismatch.field for mismatch in record.mismatches(machine(**changes), engine="tiny.engine")]


def test_an_engine_matches_the_machine_that_built_it():
    assert fields_of(record_of()) == []


@pytest.mark.parametrize(
    "changes,field,message",
    [
        ({"product": "tensorrt_rtx", "tensorrt": "1.7.1"}, "product", "10.3.0; this machine has TensorRT-RTX"),
        ({"tensorrt": "10.4.0"}, "tensorrt", "by TensorRT 10.3.0; this machine has TensorRT 10.4.0"),
        ({"tensorrt": "11.1"}, "tensorrt", "TensorRT 11.1"),
        ({"compute_capability": "9.0"}, "compute_capability", "8.6; this machine has compute capability 9.0"),
        ({"platform": "linux-aarch64"}, "platform", "on linux-x86_64; this machine has linux-aarch64"),
        ({"plugin": None}, "plugin", "with the plugin 1 (v3); this machine has none"),
        ({"plugin": replace(PLUGIN, version="2")}, "plugin", "this machine has version 2 (v3)"),
        ({"plugin": replace(PLUGIN, abi="v2")}, "plugin", "this machine has version 1 (v2)"),
    ],
)  # fmt: skip
def test_a_mismatch_has_the_field_both_values_and_the_command(changes, field, message):
    (mismatch,) = record_of().mismatches(machine(**changes), engine="tiny.engine")
    assert mismatch.field == field
    assert message in str(mismatch)
    assert "y7 build --weights tiny.onnx" in mismatch.fix


def test_a_missing_plugin_can_be_built_or_avoided():
    (mismatch,) = record_of().mismatches(machine(plugin=None))
    assert mismatch.fix == (
        "Build the plugin here:  y7 plugin   or without it:  y7 build --weights NAME.onnx --plugin off"
    )


@pytest.mark.parametrize("here", ["10.3.0.26", "10.3", "10.3.0"])
def test_versions_are_compared_up_to_the_shorter_one(here):
    assert fields_of(record_of(), tensorrt=here) == []


@pytest.mark.parametrize(
    "built,here,matches",
    [
        ("8.6.1", "8.6.3", True),
        ("8.6.1", "10.0.1", True),
        ("8.6.1", "11.1.0", False),
        ("10.3.0", "10.13.0", True),
        ("10.3.0", "11.1.0", True),
        ("10.3.0", "10.2.0", False),  # only later versions
        ("11.1.0", "10.16.0", False),
    ],
)
def test_a_version_compatible_engine_runs_with_later_versions(built, here, matches):
    record = record_of(tensorrt=built, version_compatible=True)
    assert fields_of(record, tensorrt=here) == ([] if matches else ["tensorrt"])


@pytest.mark.parametrize(
    "level,here,matches",
    [
        ("none", "8.9", False),
        ("ampere_plus", "8.9", True),
        ("ampere_plus", "12.0", True),
        ("ampere_plus", "7.5", False),
        ("same_compute_capability", "8.6", True),
        ("same_compute_capability", "8.9", False),
    ],
)
def test_a_hardware_compatible_engine_runs_on_the_gpus_of_its_level(level, here, matches):
    record = record_of(hardware_compatible=level)
    assert fields_of(record, compute_capability=here) == ([] if matches else ["compute_capability"])


@pytest.mark.parametrize(
    "targets,here,matches",
    [
        (("8.6", "12.0"), "12.0", True),
        (("8.6", "12.0"), "8.9", False),
        ((), "8.9", True),
        ((), "12.0", True),
        ((), "7.5", False),
    ],
)
def test_an_engine_of_tensorrt_rtx_runs_on_its_targets(targets, here, matches):
    record = record_of(product="tensorrt_rtx", tensorrt="1.7.1", targets=targets, compute_capability="")
    found = record.mismatches(machine(product="tensorrt_rtx", tensorrt="1.7.1", compute_capability=here))
    assert [mismatch.field for mismatch in found] == ([] if matches else ["targets"])
    if targets and not matches:
        assert found[0].fix.endswith("--target sm86,sm120,sm89")


def test_an_unknown_gpu_is_not_a_mismatch():
    assert fields_of(record_of(), compute_capability="") == []
