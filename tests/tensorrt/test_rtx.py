"""TensorRT-RTX builds real engines without a GPU; the plan and its record match the options."""

import pytest

from tests.support.engines import HAS_RTX, IMAGE_SIZE, NO_RTX, OUTPUTS, THRESHOLDS, build, check, exported, ports
from tests.support.slow_cases import some_fast
from yolov7_deploy.errors import EngineError
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.tensorrt.inspector import engine_layers

pytestmark = pytest.mark.skipif(not HAS_RTX, reason=NO_RTX)

# The largest take minutes.
QUICK = ("yolov7-tiny",)
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


def types(record):
    return {layer.type for layer in record.network_layers}


# The first parameter varies fastest, so each network is created once.
@pytest.mark.parametrize("nms_by", ["operators", "plugin"])
@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("variant", ALL)
def test_every_variant_builds_with_nms_by(variant, fp16, nms_by, request):
    library = request.getfixturevalue("with_plugin") if nms_by == "plugin" else None
    model = exported(variant, fp16=fp16)
    engine = build(model, plugin="on" if library else "off")
    check(engine, model)
    assert engine.record.nms_by == nms_by
    if library:
        assert engine.record.plugin.path == library
        assert [layer.name for layer in engine.record.network_layers if layer.type == "PLUGIN_V3"] == ["nms"]
        assert not types(engine.record) & {"TOPK", "TRIP_LIMIT", "NMS"}
    else:
        assert {"TOPK", "TRIP_LIMIT"} <= types(engine.record)
        assert not [kind for kind in types(engine.record) if "PLUGIN" in kind]


@pytest.mark.slow
@pytest.mark.parametrize("nms_by", ["operators", "plugin"])
def test_fixed_thresholds_leave_images_as_the_only_input(nms_by, request):
    library = request.getfixturevalue("with_plugin") if nms_by == "plugin" else None
    record = build(exported(), plugin="on" if library else "off", fixed_thresholds=True).record
    assert ports(record.inputs) == {"images": ("float32", (1, 3, IMAGE_SIZE, IMAGE_SIZE))}
    assert ports(record.outputs) == OUTPUTS
    assert (record.runtime_thresholds, record.nms_by) == (False, nms_by)


def test_an_fp16_file_computes_in_fp16():
    record = build(exported(fp16=True)).record
    convolutions = [layer.precision for layer in record.network_layers if layer.type == "CONVOLUTION"]
    assert len(convolutions) > 50
    assert set(convolutions) == {"float16"}
    compiled, _ = engine_layers(record)
    assert (compiled.detail, compiled.convolutions) == ("compiled", {"fp16": len(convolutions)})


@pytest.mark.parametrize("target", some_fast(["7.5", "8.0", "12.0", "8.9"], every=2))
def test_the_file_builds_for_every_architecture_since_turing(target):
    record = build(exported(), targets=(target,)).record
    assert record.targets == (target,)


def test_one_plan_has_several_targets():
    assert build(exported(), targets=("sm120", "86", "8.6")).record.targets == ("8.6", "12.0")


def test_without_a_target_it_builds_for_all_from_ampere_on_with_a_note():
    record = build(exported(), targets=()).record
    if record.compute_capability == "7.5":
        pytest.skip("on a Turing GPU it builds for that GPU")
    assert record.targets == ()
    assert any("8.0 or later" in note for note in record.notes)


@pytest.mark.parametrize("nms", ["standard", "efficient"])
def test_nms_without_our_node_builds_as_operators(nms):
    record = build(exported(nms=nms), plugin="auto").record
    assert record.nms_by == "operators"
    thresholds = THRESHOLDS if nms == "standard" else {}
    assert ports(record.inputs) == {"images": ("float32", (1, 3, IMAGE_SIZE, IMAGE_SIZE)), **thresholds}


def test_a_file_without_nms_builds():
    record = build(exported(nms="none")).record
    assert (record.nms_by, [tensor.name for tensor in record.outputs]) == ("none", ["output"])


@pytest.mark.parametrize("opset", [13, 21])
def test_the_first_and_the_last_opset_build(opset):
    assert build(exported(opset=opset)).record.nms_by == "operators"


def test_uint8_input_builds():
    record = build(exported(input_kind="uint8")).record
    assert ports(record.inputs)["images"] == ("uint8", (1, IMAGE_SIZE, IMAGE_SIZE, 3))


@pytest.mark.parametrize(
    "options,batches",
    [
        ({}, (1, 8, 8)),
        ({"max_batch": 4}, (1, 4, 4)),
        ({"min_batch": 2, "opt_batch": 3, "max_batch": 5}, (2, 3, 5)),
        ({"min_batch": 16}, (16, 16, 16)),
    ],
)
def test_a_dynamic_batch_has_the_requested_profile(options, batches):
    record = build(exported(batch=None), **options).record
    image = next(shape for shape in record.shapes if shape.name == "images")
    assert tuple(shape[0] for shape in (image.min, image.opt, image.max)) == batches
    assert ports(record.inputs)["images"] == ("float32", (-1, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert ports(record.outputs)["overflow"] == ("int32", (-1, 1))


def test_a_dynamic_batch_builds_with_our_plugin(with_plugin):
    record = build(exported(batch=None), plugin="on").record
    assert ports(record.outputs)["det_boxes"] == ("float32", (-1, 300, 4))


def test_the_same_graph_has_the_same_record_except_for_times():
    first, second = (build(exported()).record.to_json().splitlines() for _ in range(2))
    differing = {line.split('"')[1] for line, other in zip(first, second, strict=True) if line != other}
    assert differing <= {"build_s", "peak_memory_bytes", "plan_sha256"}


def test_a_plugin_without_code_for_a_target_is_not_used(with_plugin):
    record = build(exported(), plugin="auto", targets=("7.5",)).record
    assert record.nms_by == "operators"
    assert "no code for compute capability 7.5" in record.notes[0]
    with pytest.raises(EngineError, match=r"no code for compute capability 7\.5"):
        build(exported(), plugin="on", targets=("7.5",))
