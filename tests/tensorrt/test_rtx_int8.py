"""TensorRT-RTX builds INT8 files of every variant; the engine computes in INT8 where the file does."""

from collections import Counter

import pytest

from tests.support.engines import HAS_RTX, IMAGE_SIZE, NO_RTX, THRESHOLDS, build, check, ports, quantized, rtx
from tests.support.slow_cases import some_fast
from yolov7_deploy.inspection.engine_file import read_engine_file
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.precision.int8_summary import summarize_int8
from yolov7_deploy.tensorrt.inspector import engine_layers

pytestmark = pytest.mark.skipif(not HAS_RTX, reason=NO_RTX)

# The others take minutes.
QUICK = ("yolov7-tiny", "yolov7-tiny-silu")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


def convolutions(record):
    """Count the fused convolutions by the types of their input and of their weights."""
    table, notes = engine_layers(record)
    assert (table.detail, notes) == ("compiled", ())
    return Counter((layer.inputs[0].dtype, layer.precision) for layer in table.layers if layer.is_convolution)


def expected(model):
    """Return the same counts for a file with FP16 as the fallback precision."""
    int8 = model.metadata.int8
    return {("int8", "int8"): int8.int8_convolutions, ("fp16", "fp16"): int8.convolutions - int8.int8_convolutions}


# The first parameter varies fastest, so each network is created once.
@pytest.mark.parametrize("nms_by", ["operators", "plugin"])
@pytest.mark.parametrize("variant", ALL)
def test_convolutions_that_are_int8_in_the_file_are_int8_in_the_engine_with_nms_by(variant, nms_by, request):
    library = request.getfixturevalue("with_plugin") if nms_by == "plugin" else None
    model = quantized(variant)
    engine = build(model, plugin="on" if library else "off")
    check(engine, model)
    assert engine.record.nms_by == nms_by
    assert convolutions(engine.record) == expected(model)
    assert model.metadata.int8.int8_convolutions > 0.9 * model.metadata.int8.convolutions
    table, _ = engine_layers(engine.record)
    assert table.plugins == (("nms",) if library else ())
    assert not [note for note in engine.record.notes if "INT8" in note]


def test_tensorrt_rtx_parses_int8_constants():
    model = quantized()
    counts = summarize_int8(model.proto)
    types = Counter(layer.type for layer in build(model).record.network_layers)
    assert rtx().abi == "v3"
    assert types["QUANTIZE"] == sum(counts.pairs.values())
    assert types["DEQUANTIZE"] == types["QUANTIZE"] + counts.weights


@pytest.mark.parametrize("target", some_fast(["8.9", "8.0", "12.0"], every=3))
def test_every_architecture_from_ampere_on_computes_in_int8(target):
    model = quantized()
    assert convolutions(build(model, targets=(target,)).record) == expected(model)


@pytest.mark.parametrize("targets", [("7.5",), ("7.5", "8.6")])
def test_with_a_turing_target_the_whole_plan_computes_in_float_with_a_note(targets, caplog):
    """In TensorRT-RTX 1.7, all targets of a plan share one list of layers."""
    model = quantized()
    record = build(model, targets=targets).record
    count = model.metadata.int8.int8_convolutions
    assert convolutions(record)["int8", "int8"] == 0
    note = next(note for note in record.notes if note.startswith(f"{count} of the {count} INT8 convolutions"))
    assert "compute capability 7.5" in note and note in caplog.text


@pytest.mark.parametrize("nms", some_fast(["standard", "none", "efficient"], every=3))
def test_int8_builds_with_every_nms(nms):
    model = quantized(nms=nms)
    record = build(model, plugin="auto").record
    assert record.nms_by == ("none" if nms == "none" else "operators")
    assert set(ports(record.inputs)) == {"images", *(THRESHOLDS if nms == "standard" else ())}
    assert convolutions(record) == expected(model)


def test_int8_builds_with_uint8_input():
    model = quantized(input_kind="uint8")
    record = build(model).record
    assert ports(record.inputs)["images"] == ("uint8", (1, IMAGE_SIZE, IMAGE_SIZE, 3))
    assert convolutions(record) == expected(model)


def test_int8_builds_with_a_dynamic_batch():
    model = quantized(batch=None)
    record = build(model).record
    assert ports(record.inputs)["images"] == ("float32", (-1, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert convolutions(record) == expected(model)


@pytest.mark.parametrize("opset", [13, 21])
def test_int8_builds_in_the_first_and_the_last_opset(opset):
    model = quantized(opset=opset)
    assert convolutions(build(model).record) == expected(model)


def test_the_summary_of_an_engine_that_was_not_inspected_has_its_int8_convolutions(tmp_path):
    model = quantized()
    build(model).save(tmp_path / "tiny.engine")
    summary = read_engine_file(tmp_path / "tiny.engine").summary
    assert summary.detail == "compiled"
    assert summary.convolutions == {"int8": model.metadata.int8.int8_convolutions, "fp16": 3}
