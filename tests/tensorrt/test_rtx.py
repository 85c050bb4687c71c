"""TensorRT-RTX builds real engines without a GPU: what is asked for is what is in the plan and its record."""

import pytest

from tests.support.engines import HAS_RTX, NO_RTX, SIDE, THRESHOLDS, build, check, exported, ports
from yolov7_deploy.errors import EngineError
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.tensorrt.inspector import layers_of

pytestmark = pytest.mark.skipif(not HAS_RTX, reason=NO_RTX)

# Minutes with the largest.
QUICK = ("yolov7-tiny",)
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


def types(record):
    return {layer.type for layer in record.network_layers}


# The first varies fastest, so that each network is made once.
@pytest.mark.parametrize("by", ["operators", "plugin"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("variant", ALL)
def test_every_variant_builds_with_suppression_by(variant, half, by, request):
    library = request.getfixturevalue("with_plugin") if by == "plugin" else None
    model = exported(variant, half=half)
    engine = build(model, plugin="on" if library else "off")
    check(engine, model)
    assert engine.record.nms_by == by
    if library:
        assert engine.record.plugin.path == library
        assert [layer.name for layer in engine.record.network_layers if layer.type == "PLUGIN_V3"] == ["nms"]
        assert not types(engine.record) & {"TOPK", "TRIP_LIMIT", "NMS"}
    else:
        assert {"TOPK", "TRIP_LIMIT"} <= types(engine.record)
        assert not [kind for kind in types(engine.record) if "PLUGIN" in kind]


def test_an_fp16_file_computes_in_half():
    record = build(exported(half=True)).record
    convolutions = [layer.precision for layer in record.network_layers if layer.type == "CONVOLUTION"]
    assert len(convolutions) > 50
    assert set(convolutions) == {"float16"}
    compiled, _ = layers_of(record)
    assert (compiled.detail, compiled.convolutions) == ("compiled", {"fp16": len(convolutions)})


@pytest.mark.parametrize("target", ["7.5", "8.0", "8.9", "12.0"])
def test_the_file_builds_for_every_architecture_since_turing(target):
    record = build(exported(), targets=(target,)).record
    assert record.targets == (target,)


def test_several_targets_go_into_one_plan():
    assert build(exported(), targets=("sm120", "86", "8.6")).record.targets == ("8.6", "12.0")


def test_without_a_target_it_builds_for_all_from_ampere_on_and_says_so():
    record = build(exported(), targets=()).record
    if record.compute_capability == "7.5":
        pytest.skip("on a Turing GPU it builds for that")
    assert record.targets == ()
    assert any("8.0 or later" in note for note in record.notes)


@pytest.mark.parametrize("nms", ["standard", "efficient"])
def test_suppression_without_our_node_builds_as_operators(nms):
    record = build(exported(nms=nms), plugin="auto").record
    assert record.nms_by == "operators"
    thresholds = THRESHOLDS if nms == "standard" else {}
    assert ports(record.inputs) == {"images": ("float32", (1, 3, SIDE, SIDE)), **thresholds}


def test_a_file_without_suppression_builds():
    record = build(exported(nms="none")).record
    assert (record.nms_by, [tensor.name for tensor in record.outputs]) == ("none", ["output"])


@pytest.mark.parametrize("opset", [13, 21])
def test_the_first_and_the_last_opset_build(opset):
    assert build(exported(opset=opset)).record.nms_by == "operators"


def test_uint8_input_builds():
    record = build(exported(input_kind="uint8")).record
    assert ports(record.inputs)["images"] == ("uint8", (1, SIDE, SIDE, 3))


@pytest.mark.parametrize(
    "asked,batches",
    [
        ({}, (1, 8, 8)),
        ({"max_batch": 4}, (1, 4, 4)),
        ({"min_batch": 2, "opt_batch": 3, "max_batch": 5}, (2, 3, 5)),
        ({"min_batch": 16}, (16, 16, 16)),
    ],
)
def test_an_open_batch_has_the_profile_that_was_asked_for(asked, batches):
    record = build(exported(batch=None), **asked).record
    image = next(shape for shape in record.shapes if shape.name == "images")
    assert tuple(shape[0] for shape in (image.min, image.opt, image.max)) == batches
    assert ports(record.inputs)["images"] == ("float32", (-1, 3, SIDE, SIDE))
    assert ports(record.outputs)["overflow"] == ("int32", (-1, 1))


def test_an_open_batch_builds_with_our_plugin(with_plugin):
    record = build(exported(batch=None), plugin="on").record
    assert ports(record.outputs)["det_boxes"] == ("float32", (-1, 100, 4))


def test_the_same_graph_is_the_same_record_but_for_time():
    first, second = (build(exported()).record.to_json().splitlines() for _ in range(2))
    differing = {line.split('"')[1] for line, other in zip(first, second, strict=True) if line != other}
    assert differing <= {"build_s", "peak_memory_bytes", "plan_sha256"}


def test_a_plugin_without_code_for_a_target_is_not_used(with_plugin):
    record = build(exported(), plugin="auto", targets=("7.5",)).record
    assert record.nms_by == "operators"
    assert "no code for compute capability 7.5" in record.notes[0]
    with pytest.raises(EngineError, match=r"no code for compute capability 7\.5"):
        build(exported(), plugin="on", targets=("7.5",))
