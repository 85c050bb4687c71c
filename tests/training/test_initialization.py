"""Initial weights: random ones by seed, and those loaded from a checkpoint."""

import pytest
import torch

from tests.support.thin_variants import thin
from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.errors import UsageError
from yolov7_deploy.model import configs as variants
from yolov7_deploy.model.yolov7 import Yolov7, new_model
from yolov7_deploy.training.initialization import initialize_model

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TINY, P6 = "yolov7-tiny", "yolov7-w6"
NAMES = ("cat", "dog", "cow")
OTHER_NAMES = ("horse", "cow", "cat", "sheep")
ANCHORS = tuple(tuple((8.0 * level + i, 9.0 * level + i) for i in (1, 2, 3)) for level in (1, 2, 3))
IMAGE_SIZE = 64


@pytest.fixture
def thin_p6(monkeypatch):
    """Replace yolov7-w6 by a variant with an eighth of its channels."""
    monkeypatch.setitem(variants.VARIANTS, P6, thin(P6))
    return P6


def checkpoint_of(variant, names, *, training=True, seed=5, anchors=None):
    """Return a checkpoint with random weights and BatchNorm statistics."""
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
    """Return [3, 5 + C, ...]: the rows of x, y, w, h, objectness and each class per anchor."""
    flat = tensor.flatten() if tensor.shape[0] == 1 else tensor  # `im` has its channels in axis 1
    return flat.reshape(3, 5 + len(names), *flat.shape[1:])


# --- random weights ---------------------------------------------------------------------------------------------------


def test_random_weights_are_a_function_of_the_seed():
    one, same, other = (initialize_model(TINY, NAMES, seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.0.conv.weight"], other["model.0.conv.weight"])


def test_the_global_random_generator_is_not_changed():
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    initialized = initialize_model(TINY, NAMES, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert initialized.summary == "random weights of seed 3"
    assert initialized.model.training_form and initialized.model.classes == 3


def test_random_weights_have_the_anchors_of_the_variant_or_given_ones():
    assert initialize_model(TINY, NAMES).model.anchors == variants.VARIANTS[TINY].anchors
    assert initialize_model(TINY, NAMES, anchors=ANCHORS).model.anchors == ANCHORS


# --- the same classes -------------------------------------------------------------------------------------------------


def test_with_the_same_classes_every_tensor_is_loaded():
    checkpoint = checkpoint_of(TINY, NAMES, anchors=ANCHORS)
    initialized = initialize_model(TINY, NAMES, checkpoint=checkpoint)
    own = initialized.model.state_dict()
    assert own.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in checkpoint.tensors.items())
    assert initialized.summary == f"given.pt: {len(own) - 2} of {len(own) - 2} tensors"  # two hold anchors
    assert initialized.model.anchors == ANCHORS


def test_given_anchors_take_precedence_over_those_of_the_checkpoint():
    checkpoint = checkpoint_of(TINY, NAMES)
    initialized = initialize_model(TINY, NAMES, checkpoint=checkpoint, anchors=ANCHORS)
    assert initialized.model.anchors == ANCHORS
    strides = torch.tensor([8, 16, 32]).view(-1, 1, 1)
    assert torch.equal(initialized.model.head.anchors * strides, torch.tensor(ANCHORS))


def test_the_checkpoint_does_not_share_memory_with_the_model():
    checkpoint = checkpoint_of(TINY, NAMES)
    model = initialize_model(TINY, NAMES, checkpoint=checkpoint).model
    with torch.no_grad():
        model.model[0].conv.weight.zero_()
    assert checkpoint.tensors["model.0.conv.weight"].abs().sum() > 0


# --- other classes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [OTHER_NAMES, ("horse", "cow", "cat"), ("dog", "cat", "cow"), ("cow",)])
def test_with_other_classes_boxes_objectness_and_classes_of_the_same_name_are_loaded(thin_p6, names):
    checkpoint = checkpoint_of(thin_p6, NAMES)
    random_state = initialize_model(thin_p6, names, seed=2).model.state_dict()
    initialized = initialize_model(thin_p6, names, checkpoint=checkpoint, seed=2)
    own, head = initialized.model.state_dict(), len(initialized.model.layers) - 1
    for name, tensor in own.items():
        part = name.split(".")[2] if name.startswith(f"model.{head}.") else ""
        if part not in ("m", "m2", "im"):
            assert torch.equal(tensor, checkpoint.tensors[name]), name
            continue
        mine, theirs, random_rows = (
            rows(tensor, names),
            rows(checkpoint.tensors[name], NAMES),
            rows(random_state[name], names),
        )
        assert torch.equal(mine[:, :5], theirs[:, :5]), name
        for index, class_name in enumerate(names):
            wanted = theirs[:, 5 + NAMES.index(class_name)] if class_name in NAMES else random_rows[:, 5 + index]
            assert torch.equal(mine[:, 5 + index], wanted), (name, class_name)
    known = len(set(names) & set(NAMES))
    assert f"the head's boxes and {known} of its {len(names)} classes" in initialized.summary
    assert "random" not in initialized.summary


def test_a_class_of_the_same_name_has_the_same_scores_at_its_new_index(thin_p6):
    checkpoint = checkpoint_of(thin_p6, NAMES)
    same, other = (
        initialize_model(thin_p6, names, checkpoint=checkpoint).model.eval()
        for names in (NAMES, ("cow", "horse", "cat"))
    )
    images = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = same.predict(images), other.predict(images)
    torch.testing.assert_close(after[..., [0, 1, 2, 3, 4, 5, 7]], before[..., [0, 1, 2, 3, 4, 7, 5]])


# --- checkpoints in deploy form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [TINY, P6])
def test_a_model_from_a_deploy_form_gives_the_same_output(monkeypatch, variant):
    if variant == P6:
        monkeypatch.setitem(variants.VARIANTS, P6, thin(P6))
    checkpoint = checkpoint_of(variant, NAMES, training=False)
    deployed = Yolov7(variants.find_variant(variant), classes=3)
    deployed.load_state_dict(checkpoint.tensors)
    initialized = initialize_model(variant, NAMES, checkpoint=checkpoint)
    images = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = deployed.eval()(images), initialized.model.eval()(images)
    assert len(before) == len(after) == len(initialized.model.variant.strides)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_auxiliary_branches_are_random_after_a_deploy_form(thin_p6):
    checkpoint = checkpoint_of(thin_p6, NAMES, training=False)
    initialized = initialize_model(thin_p6, NAMES, checkpoint=checkpoint, seed=2)
    own, random_state = initialized.model.state_dict(), initialize_model(thin_p6, NAMES, seed=2).model.state_dict()
    head = len(initialized.model.layers) - 1
    assert max(int(name.split(".")[1]) for name in checkpoint.tensors) == head - 4
    auxiliary = [
        name
        for name in own
        if name.startswith(f"model.{head}.m2.") or head - 4 <= int(name.split(".")[1]) < head  # four convolutions
    ]
    assert len(auxiliary) == 4 * 2 + 4 * 6
    assert all(torch.equal(own[name], random_state[name]) for name in auxiliary)
    assert initialized.summary.endswith(f"; {len(auxiliary)} are random")


def test_a_deploy_form_with_other_classes_keeps_boxes_and_common_classes(thin_p6):
    checkpoint = checkpoint_of(thin_p6, NAMES, training=False)
    model = initialize_model(thin_p6, ("cow",), checkpoint=checkpoint).model
    old = max(int(name.split(".")[1]) for name in checkpoint.tensors)
    for level in range(4):
        mine = rows(model.head.m[level].weight, ("cow",))
        theirs = rows(checkpoint.tensors[f"model.{old}.m.{level}.weight"], NAMES)
        assert torch.equal(mine, theirs[:, [0, 1, 2, 3, 4, 7]])
        assert torch.equal(model.head.im[level].implicit, torch.ones(1, 18, 1, 1))


# --- refused checkpoints ----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_variant_is_refused():
    with pytest.raises(UsageError, match=r"given\.pt is yolov7-tiny, not yolov7x") as caught:
        initialize_model("yolov7x", NAMES, checkpoint=checkpoint_of(TINY, NAMES))
    assert "--variant yolov7-tiny" in caught.value.fix


def test_an_unknown_variant_is_refused():
    with pytest.raises(UsageError, match="YOLOv7 variant"):
        initialize_model("yolov8", NAMES)
