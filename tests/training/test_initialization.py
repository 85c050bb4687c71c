"""Where a training starts: fresh weights by their seed, and what is taken from a checkpoint."""

import pytest
import torch

from tests.support.thin_variants import thin
from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.errors import UsageError
from yolov7_deploy.model import configs as variants
from yolov7_deploy.model.yolov7 import Yolov7, new_model
from yolov7_deploy.training.initialization import starting_model

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TINY, P6 = "yolov7-tiny", "yolov7-w6"
NAMES = ("cat", "dog", "cow")
OTHER_NAMES = ("horse", "cow", "cat", "sheep")
ANCHORS = tuple(tuple((8.0 * level + i, 9.0 * level + i) for i in (1, 2, 3)) for level in (1, 2, 3))
SIDE = 64


@pytest.fixture
def thin_p6(monkeypatch):
    """A P6 model of an eighth of its channels, under its name."""
    monkeypatch.setitem(variants.VARIANTS, P6, thin(P6))
    return P6


def given(variant, names, *, training=True, seed=5, anchors=None):
    """A checkpoint of random weights, statistics included."""
    torch.manual_seed(seed)
    model = new_model(variant, classes=len(names), training_form=training, anchors=anchors)
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and "anchor" not in name:
            tensor.add_(0.01 * torch.randn(tensor.shape))
    return Checkpoint(
        tensors=tensors,
        variant=variant,
        training=training,
        class_names=names,
        anchors=model.anchors,
        source="given.pt",
    )


def rows(tensor, names):
    """[3, 5 + C, ...]: per anchor what stands for x, y, w, h, objectness and each class."""
    flat = tensor.flatten() if tensor.shape[0] == 1 else tensor  # `im` has its channels in the second place
    return flat.reshape(3, 5 + len(names), *flat.shape[1:])


# --- from scratch -----------------------------------------------------------------------------------------------------


def test_fresh_weights_are_a_function_of_the_seed():
    one, same, other = (starting_model(TINY, NAMES, seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.0.conv.weight"], other["model.0.conv.weight"])


def test_the_generator_of_the_process_is_left_alone():
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    start = starting_model(TINY, NAMES, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert start.words == "random weights of seed 3"
    assert start.model.training_form and start.model.classes == 3


def test_fresh_weights_have_the_anchors_of_their_variant_or_others():
    assert starting_model(TINY, NAMES).model.anchors == variants.VARIANTS[TINY].anchors
    assert starting_model(TINY, NAMES, anchors=ANCHORS).model.anchors == ANCHORS


# --- the same classes -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_same_classes_gives_every_tensor():
    checkpoint = given(TINY, NAMES, anchors=ANCHORS)
    start = starting_model(TINY, NAMES, checkpoint=checkpoint)
    own = start.model.state_dict()
    assert own.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in checkpoint.tensors.items())
    assert start.words == f"given.pt: {len(own) - 2} of {len(own) - 2} tensors"  # two hold anchors
    assert start.model.anchors == ANCHORS


def test_anchors_of_the_training_come_before_those_of_the_checkpoint():
    checkpoint = given(TINY, NAMES)
    start = starting_model(TINY, NAMES, checkpoint=checkpoint, anchors=ANCHORS)
    assert start.model.anchors == ANCHORS
    strides = torch.tensor([8, 16, 32]).view(-1, 1, 1)
    assert torch.equal(start.model.head.anchors * strides, torch.tensor(ANCHORS))


def test_the_checkpoint_keeps_its_memory():
    checkpoint = given(TINY, NAMES)
    model = starting_model(TINY, NAMES, checkpoint=checkpoint).model
    with torch.no_grad():
        model.model[0].conv.weight.zero_()
    assert checkpoint.tensors["model.0.conv.weight"].abs().sum() > 0


# --- other classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [OTHER_NAMES, ("horse", "cow", "cat"), ("dog", "cat", "cow"), ("cow",)])
def test_other_classes_keep_boxes_objectness_and_the_classes_of_the_same_names(thin_p6, names):
    checkpoint = given(thin_p6, NAMES)
    fresh = starting_model(thin_p6, names, seed=2).model.state_dict()
    start = starting_model(thin_p6, names, checkpoint=checkpoint, seed=2)
    own, head = start.model.state_dict(), len(start.model.layers) - 1
    for name, tensor in own.items():
        part = name.split(".")[2] if name.startswith(f"model.{head}.") else ""
        if part not in ("m", "m2", "im"):
            assert torch.equal(tensor, checkpoint.tensors[name]), name
            continue
        mine, theirs, begun = rows(tensor, names), rows(checkpoint.tensors[name], NAMES), rows(fresh[name], names)
        assert torch.equal(mine[:, :5], theirs[:, :5]), name
        for index, class_name in enumerate(names):
            wanted = theirs[:, 5 + NAMES.index(class_name)] if class_name in NAMES else begun[:, 5 + index]
            assert torch.equal(mine[:, 5 + index], wanted), (name, class_name)
    known = len(set(names) & set(NAMES))
    assert f"the head's boxes and {known} of its {len(names)} classes" in start.words
    assert "random" not in start.words


def test_a_known_class_is_found_as_before_wherever_it_stands_now(thin_p6):
    checkpoint = given(thin_p6, NAMES)
    same, other = (
        starting_model(thin_p6, names, checkpoint=checkpoint).model.eval() for names in (NAMES, ("cow", "horse", "cat"))
    )
    images = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = same.predict(images), other.predict(images)
    torch.testing.assert_close(after[..., [0, 1, 2, 3, 4, 5, 7]], before[..., [0, 1, 2, 3, 4, 7, 5]])


# --- the deploy form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [TINY, P6])
def test_a_deploy_form_gives_the_same_output_as_before(monkeypatch, variant):
    if variant == P6:
        monkeypatch.setitem(variants.VARIANTS, P6, thin(P6))
    checkpoint = given(variant, NAMES, training=False)
    deployed = Yolov7(variants.find_variant(variant), classes=3)
    deployed.load_state_dict(checkpoint.tensors)
    start = starting_model(variant, NAMES, checkpoint=checkpoint)
    images = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = deployed.eval()(images), start.model.eval()(images)
    assert len(before) == len(after) == len(start.model.variant.strides)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_auxiliary_branches_of_a_deploy_form_begin_at_random(thin_p6):
    checkpoint = given(thin_p6, NAMES, training=False)
    start = starting_model(thin_p6, NAMES, checkpoint=checkpoint, seed=2)
    own, fresh = start.model.state_dict(), starting_model(thin_p6, NAMES, seed=2).model.state_dict()
    head = len(start.model.layers) - 1
    assert max(int(name.split(".")[1]) for name in checkpoint.tensors) == head - 4
    auxiliary = [
        name
        for name in own
        if name.startswith(f"model.{head}.m2.") or head - 4 <= int(name.split(".")[1]) < head  # four convolutions
    ]
    assert len(auxiliary) == 4 * 2 + 4 * 6
    assert all(torch.equal(own[name], fresh[name]) for name in auxiliary)
    assert start.words.endswith(f"; {len(auxiliary)} begin as random numbers")


def test_a_deploy_form_of_other_classes_keeps_boxes_and_known_classes(thin_p6):
    checkpoint = given(thin_p6, NAMES, training=False)
    model = starting_model(thin_p6, ("cow",), checkpoint=checkpoint).model
    old = max(int(name.split(".")[1]) for name in checkpoint.tensors)
    for level in range(4):
        mine = rows(model.head.m[level].weight, ("cow",))
        theirs = rows(checkpoint.tensors[f"model.{old}.m.{level}.weight"], NAMES)
        assert torch.equal(mine, theirs[:, [0, 1, 2, 3, 4, 7]])
        assert torch.equal(model.head.im[level].implicit, torch.ones(1, 18, 1, 1))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_weights_of_another_variant_are_refused():
    with pytest.raises(UsageError, match=r"given\.pt is yolov7-tiny, not yolov7x") as caught:
        starting_model("yolov7x", NAMES, checkpoint=given(TINY, NAMES))
    assert "--variant yolov7-tiny" in caught.value.fix


def test_an_unknown_variant_is_refused():
    with pytest.raises(UsageError, match="no YOLOv7 variant"):
        starting_model("yolov8", NAMES)
