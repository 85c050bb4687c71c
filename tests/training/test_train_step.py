"""One training step: what learns and what stays, sums of gradients, sizes, half precision, auxiliary heads."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.thin_variants import thin
from yolov7_deploy.errors import UsageError
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.options import TrainOptions
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.optimizer import Schedule
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.training.train_step import TrainStep, frozen_layers, training_sizes

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TINY, P6, EXTENDED = "yolov7-tiny", "yolov7-w6", "yolov7-e6e"
CLASSES = 3
AT_ONCE = Hyperparameters(warmup_epochs=0.0)  # full rates and accumulation from the first step on
LEARNING = Hyperparameters(warmup_epochs=0.0, lr0=0.003)  # of Adam
FALLEN = 0.8  # of the first loss, the mean of the last three; 24 steps reach 0.3 to 0.75
SUM = {"rtol": 1e-5, "atol": 1e-6}  # float32 gradients added in another order
BFLOAT16 = 0.05  # relative difference of a loss; the type has eight bits


def learner_of(variant=TINY, *, hyp=AT_ONCE, whole=False, **options):
    """A learner of an eighth of the channels, unless the whole network is asked for."""
    torch.manual_seed(0)
    asked = TrainOptions(**{"batch": 2, "nominal_batch": 2, "img": 128, "epochs": 10, **options})
    table = find_variant(variant) if whole else thin(variant)
    model = Yolov7(table, classes=CLASSES, training_form=True, auxiliary=asked.auxiliary)
    schedule = Schedule(
        hyp=hyp, epochs=10, steps=10, batch=asked.batch, nominal_batch=asked.nominal_batch, linear=False
    )
    learner = TrainStep(model, hyp=hyp, options=asked, schedule=schedule, world=DistributedContext())
    learner.train_mode()
    return learner


def batch_of(seed=0, *, count=2, hw=(128, 128), objects=4):
    rng = np.random.default_rng(seed)
    targets = np.concatenate(
        [
            np.sort(rng.integers(0, count, (objects, 1)), axis=0),
            rng.integers(0, CLASSES, (objects, 1)),
            rng.uniform(0.3, 0.7, (objects, 2)),
            rng.uniform(0.1, 0.5, (objects, 2)),
        ],
        axis=1,
    )
    images = torch.from_numpy(rng.integers(0, 256, (count, *hw, 3), np.uint8))
    return Batch(images=images, targets=torch.from_numpy(targets).float(), paths=())


def taught(learner, steps, *, first=0):
    """Loss of each step on the same batch."""
    batch, found = batch_of(), []
    for step in range(first, first + steps):
        numbers = learner.learn(batch, epoch=0, step=step, in_epoch=step)
        found.append(numbers.box + numbers.objectness + numbers.classes)
    return found


def kept(learner):
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


def changed(before, learner):
    return {name for name, tensor in learner.model.state_dict().items() if not torch.equal(tensor, before[name])}


def layer(name):
    return int(name.split(".")[1])


# --- freezing ---------------------------------------------------------------------------------------------------------


def test_one_number_is_the_first_layers_and_several_are_just_these():
    model = learner_of().model
    assert frozen_layers((), model) == frozen_layers((0,), model) == ()
    assert frozen_layers((3,), model) == (0, 1, 2)
    assert frozen_layers((5, 0, 9), model) == (5, 0, 9)


@pytest.mark.parametrize("freeze", [(78,), (500,), (0, 78), tuple(range(78))])
def test_layers_that_are_not_there_and_all_of_them_are_refused(freeze):
    model = learner_of().model
    assert len(model.layers) == 78
    with pytest.raises(UsageError, match=r"has layers 0\.\.77, and one must learn") as caught:
        frozen_layers(freeze, model)
    assert caught.value.fix == "For example: --freeze 38"


def test_layers_without_weights_are_not_enough_to_learn():
    model = learner_of().model
    weighty = tuple(i for i, block in enumerate(model.model) if list(block.parameters()))
    with pytest.raises(UsageError, match="have nothing to learn"):
        learner_of(freeze=weighty)


@pytest.mark.parametrize("freeze", [(10,), (0, 7, 77)])
def test_frozen_layers_stay_bit_for_bit_with_their_statistics(freeze):
    learner = learner_of(freeze=freeze)
    frozen = set(range(10)) if freeze == (10,) else set(freeze)
    before = kept(learner)
    taught(learner, 3)
    moved = changed(before, learner)
    assert {layer(name) for name in moved}.isdisjoint(frozen)
    free = {name for name in before if layer(name) not in frozen and "anchor" not in name}
    assert moved == free
    of_average = {name for name, tensor in learner.average.tensors.items() if not torch.equal(tensor, before[name])}
    assert of_average == free


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [32, 64])
@pytest.mark.parametrize("img", [64, 128, 192, 320, 640, 1280])
def test_sizes_are_all_multiples_of_the_stride_from_half_to_one_and_a_half(img, stride):
    expected = [size for size in range(stride, 2 * img + 1, stride) if img / 2 <= size <= img * 1.5]
    assert list(training_sizes(img, stride)) == expected
    assert img in expected


def test_a_size_is_a_function_of_seed_epoch_and_step():
    learner = learner_of(multi_scale=True, img=256)
    sizes = [learner.size(epoch, step) for epoch in range(4) for step in range(20)]
    assert set(sizes) == {128, 160, 192, 224, 256, 288, 320, 352, 384}
    same = learner_of(multi_scale=True, img=256)
    assert sizes == [same.size(epoch, step) for epoch in range(4) for step in range(20)]
    other = learner_of(multi_scale=True, img=256, seed=1)
    assert sizes != [other.size(epoch, step) for epoch in range(4) for step in range(20)]
    assert learner_of().size(0, 0) is None


def test_the_network_sees_images_of_the_size_and_rgb_from_0_to_1():
    learner = learner_of(multi_scale=True)
    seen = []
    learner.model.model[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = batch_of(hw=(96, 160))
    learner.losses(batch)
    learner.losses(batch, size=64)
    plain, resized = seen
    assert torch.equal(plain, batch.images.permute(0, 3, 1, 2).float() / 255)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    assert resized.shape == (2, 3, 64, 64)
    learner.learn(batch, epoch=2, step=25, in_epoch=5)
    assert seen[2].shape[2:] == (learner.size(2, 5),) * 2


# --- accumulation -----------------------------------------------------------------------------------------------------


def test_gradients_of_several_steps_are_added_up():
    learner = learner_of(nominal_batch=6)
    before = kept(learner)
    expected = {name: torch.zeros_like(parameter) for name, parameter in learner.model.named_parameters()}
    for seed in (1, 2):
        alone = copy.deepcopy(learner)
        alone.losses(batch_of(seed)).total.backward()
        for name, parameter in alone.model.named_parameters():
            expected[name] += parameter.grad
    for step in (1, 2):
        learner.learn(batch_of(step), epoch=0, step=step, in_epoch=step)
    for name, parameter in learner.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **SUM)
        assert torch.equal(parameter, before[name])
    assert learner.average.updates == 0
    learner.learn(batch_of(3), epoch=0, step=3, in_epoch=3)
    assert learner.average.updates == 1
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    assert changed(before, learner) == {name for name in before if "anchor" not in name}


def test_the_first_step_of_a_training_is_an_update_with_the_rates_of_the_warm_up():
    learner = learner_of(hyp=Hyperparameters(warmup_epochs=1.0))
    before = kept(learner)
    learner.learn(batch_of(), epoch=0, step=0, in_epoch=0)
    moved = {name for name in changed(before, learner) if "running" not in name and "num_batches" not in name}
    assert moved and all(name.endswith("bias") for name in moved)  # the others begin at a rate of 0


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_leaves_everything_as_it_was():
    learner = learner_of(nominal_batch=6)
    learner.learn(batch_of(1), epoch=0, step=1, in_epoch=1)
    with torch.no_grad():
        learner.model.model[0].conv.weight[0, 0, 0, 0] = float("nan")
    parameters = {name: parameter.clone() for name, parameter in learner.model.named_parameters()}
    gradients = {name: parameter.grad.clone() for name, parameter in learner.model.named_parameters()}
    average = {name: tensor.clone() for name, tensor in learner.average.tensors.items()}
    numbers = learner.learn(batch_of(2), epoch=0, step=3, in_epoch=3)
    assert not numbers.is_finite
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), parameters[name].nan_to_num())
        assert torch.equal(parameter.grad, gradients[name])
    assert all(torch.equal(tensor, average[name]) for name, tensor in learner.average.tensors.items())
    assert (learner.average.updates, dict(learner.optimizer.state)) == (0, {})


def test_the_numbers_are_those_of_the_loss_and_say_whether_to_stop():
    learner = learner_of()
    parts = copy.deepcopy(learner).losses(batch_of())
    numbers = learner.learn(batch_of(), epoch=0, step=0, in_epoch=0, stop=True)
    assert (numbers.box, numbers.objectness, numbers.classes) == tuple(
        value.item() for value in (parts.box, parts.objectness, parts.classes)
    )
    assert numbers.positives == parts.positives > 0
    assert numbers.stop and not learner.learn(batch_of(), epoch=0, step=1, in_epoch=1).stop
    assert parts.total.item() == pytest.approx(2 * (numbers.box + numbers.objectness + numbers.classes), rel=1e-6)


def test_bfloat16_on_the_cpu_computes_in_it_and_learns():
    learner, single = (learner_of(half=half, hyp=LEARNING, adam=True) for half in (True, False))
    seen = []
    learner.model.model[5].conv.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    half, whole = taught(learner, 24), taught(single, 1)
    assert set(seen) == {torch.bfloat16}
    assert half[0] == pytest.approx(whole[0], rel=BFLOAT16)
    assert np.mean(half[-3:]) < FALLEN * half[0]
    assert {parameter.dtype for parameter in learner.model.parameters()} == {torch.float32}
    assert learner.scale == (0.0, 0.0)
    assert not learner_of().half


# --- auxiliary heads --------------------------------------------------------------------------------------------------


def of_auxiliary(learner, name):
    """The parameter belongs to an auxiliary branch."""
    head = len(learner.model.layers) - 1
    return name.startswith(f"model.{head}.m2.") or layer(name) in range(head - 4, head)


@pytest.mark.parametrize("variant", [P6, EXTENDED])
@pytest.mark.parametrize("auxiliary", ["partial", "full", "none"])
def test_who_gets_gradients(variant, auxiliary):
    learner = learner_of(variant, auxiliary=auxiliary)
    before = kept(learner)
    learner.losses(batch_of()).total.backward()
    with_gradient = {name for name, parameter in learner.model.named_parameters() if parameter.grad is not None}
    everyone = {name for name, _ in learner.model.named_parameters()}
    branches = {name for name in everyone if of_auxiliary(learner, name)}
    assert len(branches) == 4 * 2 + 4 * 3
    assert with_gradient == (everyone - branches if auxiliary == "none" else everyone)
    taught(learner, 2)
    moved = changed(before, learner)
    if auxiliary == "none":
        assert not any(of_auxiliary(learner, name) for name in moved)
    else:  # weights may be larger than what a step adds to them
        assert {name for name in before if name.endswith(("bias", "running_mean"))} <= moved


@pytest.mark.parametrize(("auxiliary", "maps"), [("partial", 8), ("full", 8), ("none", 4)])
def test_auxiliary_maps_come_in_training_only(auxiliary, maps):
    model = learner_of(P6, auxiliary=auxiliary).model
    images = torch.rand(2, 3, 128, 128)
    assert len(model(images)) == maps
    assert len(model.eval()(images)) == 4


def test_a_full_auxiliary_head_of_e6e_reads_the_sums():
    partial, full = (learner_of(EXTENDED, auxiliary=auxiliary).model for auxiliary in ("partial", "full"))
    head = len(full.layers) - 1
    assert partial.layers[: head - 4] == full.layers[: head - 4] and partial.layers[head] == full.layers[head]
    kinds = [[model.layers[row.sources[0]].kind for row in model.layers[head - 4 : head]] for model in (partial, full)]
    assert kinds == [["Conv", "Conv", "Conv", "SPPCSPC"], ["Shortcut", "Shortcut", "Shortcut", "SPPCSPC"]]
    for row, sum_row in zip(partial.layers[head - 4 : head - 1], full.layers[head - 4 : head - 1], strict=True):
        assert full.layers[sum_row.sources[0]].sources[0] == row.sources[0]  # the sum is of this branch and another
    sums, read = {}, {}
    for row in full.layers[head - 4 : head - 1]:
        full.model[row.sources[0]].register_forward_hook(lambda *a, i=row.index: sums.update({i: a[1][0] + a[1][1]}))
        full.model[row.index].register_forward_pre_hook(lambda *a, i=row.index: read.update({i: a[1][0]}))
    full(torch.rand(2, 3, 128, 128))
    assert len(read) == 3 and all(torch.equal(read[i], sums[i]) for i in read)


def test_a_full_head_is_no_other_where_there_is_no_sum():
    assert learner_of(P6, auxiliary="full").model.layers == learner_of(P6).model.layers


@pytest.mark.parametrize("variant", [TINY, P6])
def test_the_loss_falls(variant):
    found = taught(learner_of(variant, hyp=LEARNING, adam=True), 24)
    assert np.mean(found[-3:]) < FALLEN * found[0]


@pytest.mark.slow
def test_the_loss_of_a_whole_p6_model_falls():
    found = taught(learner_of(P6, whole=True, hyp=replace(LEARNING, lr0=0.001), adam=True), 10)
    assert np.mean(found[-3:]) < FALLEN * found[0]


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"adam": True}, {"nominal_batch": 6}, {"freeze": (10,), "half": True}])
def test_a_learner_goes_on_from_its_tensors_bit_for_bit(options):
    learner = learner_of(**options)
    taught(learner, 5)
    tensors = learner.tensors()
    later = learner_of(seed=1, **options)
    later.load(tensors, updates=learner.average.updates, scale=learner.scale)
    assert any(name.startswith("gradient.") for name in tensors) == ("nominal_batch" in options)
    assert taught(later, 4, first=5) == taught(learner, 4, first=5)
    ours, theirs = later.tensors(), learner.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kept_tensors_do_not_change_afterwards():
    learner = learner_of()
    taught(learner, 1)
    tensors = learner.tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    taught(learner, 2, first=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_tensors_of_another_network_are_refused():
    tensors = learner_of(P6).tensors()
    with pytest.raises((KeyError, RuntimeError)):
        learner_of().load(tensors, updates=0, scale=(0.0, 0.0))
