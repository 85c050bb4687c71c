"""One training step: frozen layers, image sizes, gradient accumulation, mixed precision, auxiliary heads, resuming."""

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
from yolov7_deploy.training.train_step import TrainStep, frozen_layers, multi_scale_sizes

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TINY, P6, EXTENDED = "yolov7-tiny", "yolov7-w6", "yolov7-e6e"
CLASSES = 3
NO_WARMUP = Hyperparameters(warmup_epochs=0.0)
ADAM = Hyperparameters(warmup_epochs=0.0, lr0=0.003)
MAX_LOSS_RATIO = 0.8  # of the mean of the last three losses and the first one; 24 steps reach 0.3 to 0.75
SUM_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float32 gradients summed in another order
BFLOAT16_TOLERANCE = 0.05  # relative, of a loss; bfloat16 has eight bits


def new_train_step(variant=TINY, *, hyp=NO_WARMUP, thinned=True, **options):
    """Return a `TrainStep` of a model with an eighth of the channels, or with all of them."""
    torch.manual_seed(0)
    train_options = TrainOptions(**{"batch": 2, "nominal_batch": 2, "img": 128, "epochs": 10, **options})
    definition = thin(variant) if thinned else find_variant(variant)
    model = Yolov7(definition, classes=CLASSES, training_form=True, auxiliary=train_options.auxiliary)
    schedule = Schedule(
        hyp=hyp,
        epochs=10,
        steps_per_epoch=10,
        batch=train_options.batch,
        nominal_batch=train_options.nominal_batch,
        linear=False,
    )
    train_step = TrainStep(model, hyp=hyp, options=train_options, schedule=schedule, distributed=DistributedContext())
    train_step.train()
    return train_step


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


def train_on_one_batch(train_step, steps, *, first=0):
    """Train on the same batch, and return the loss of each step."""
    batch, losses = batch_of(), []
    for step in range(first, first + steps):
        metrics = train_step.run(batch, epoch=0, step=step, epoch_step=step)
        losses.append(metrics.box + metrics.obj + metrics.cls)
    return losses


def copy_state(train_step):
    return {name: tensor.clone() for name, tensor in train_step.model.state_dict().items()}


def changed_names(before, train_step):
    return {name for name, tensor in train_step.model.state_dict().items() if not torch.equal(tensor, before[name])}


def layer(name):
    return int(name.split(".")[1])


# --- frozen layers ----------------------------------------------------------------------------------------------------


def test_one_number_freezes_the_first_layers_and_several_numbers_those_layers():
    variant = new_train_step().model.variant
    assert frozen_layers((), variant) == frozen_layers((0,), variant) == ()
    assert frozen_layers((3,), variant) == (0, 1, 2)
    assert frozen_layers((5, 0, 9), variant) == (5, 0, 9)


@pytest.mark.parametrize("freeze", [(78,), (500,), (0, 78), tuple(range(78))])
def test_freezing_missing_layers_or_all_layers_is_refused(freeze):
    model = new_train_step().model
    assert len(model.layers) == 78
    with pytest.raises(UsageError, match=r"has layers 0\.\.77, and at least one must") as caught:
        frozen_layers(freeze, model.variant)
    assert caught.value.fix == "For example: --freeze 38"


def test_freezing_all_layers_with_weights_is_refused():
    model = new_train_step().model
    with_weights = tuple(i for i, block in enumerate(model.model) if list(block.parameters()))
    with pytest.raises(UsageError, match="do not have weights"):
        new_train_step(freeze=with_weights)


@pytest.mark.parametrize("freeze", [(10,), (0, 7, 77)])
def test_frozen_layers_and_their_statistics_do_not_change(freeze):
    train_step = new_train_step(freeze=freeze)
    frozen = set(range(10)) if freeze == (10,) else set(freeze)
    before = copy_state(train_step)
    train_on_one_batch(train_step, 3)
    moved = changed_names(before, train_step)
    assert {layer(name) for name in moved}.isdisjoint(frozen)
    free = {name for name in before if layer(name) not in frozen and "anchor" not in name}
    assert moved == free
    in_average = {name for name, tensor in train_step.ema.tensors.items() if not torch.equal(tensor, before[name])}
    assert in_average == free


# --- image sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [32, 64])
@pytest.mark.parametrize("img", [64, 128, 192, 320, 640, 1280])
def test_multi_scale_sizes_are_the_multiples_of_the_stride_from_half_to_one_and_a_half_image_sizes(img, stride):
    expected = [size for size in range(stride, 2 * img + 1, stride) if img / 2 <= size <= img * 1.5]
    assert list(multi_scale_sizes(img, stride)) == expected
    assert img in expected


def test_the_image_size_is_a_function_of_seed_epoch_and_step():
    train_step = new_train_step(multi_scale=True, img=256)
    sizes = [train_step.image_size(epoch, step) for epoch in range(4) for step in range(20)]
    assert set(sizes) == {128, 160, 192, 224, 256, 288, 320, 352, 384}
    same = new_train_step(multi_scale=True, img=256)
    assert sizes == [same.image_size(epoch, step) for epoch in range(4) for step in range(20)]
    other = new_train_step(multi_scale=True, img=256, seed=1)
    assert sizes != [other.image_size(epoch, step) for epoch in range(4) for step in range(20)]
    assert new_train_step().image_size(0, 0) is None


def test_image_sizes_do_not_repeat_the_random_numbers_of_the_samples():
    train_step, sizes = new_train_step(multi_scale=True, img=256), multi_scale_sizes(256, 32)
    of_samples = [int(np.random.default_rng((0, 0, position)).choice(sizes)) for position in range(20)]
    assert [train_step.image_size(0, step) for step in range(20)] != of_samples


def test_the_network_gets_rgb_from_0_to_1_at_the_image_size():
    train_step = new_train_step(multi_scale=True)
    inputs = []
    train_step.model.model[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    batch = batch_of(hw=(96, 160))
    train_step.compute_loss(batch)
    train_step.compute_loss(batch, image_size=64)
    plain, resized = inputs
    assert torch.equal(plain, batch.images.permute(0, 3, 1, 2).float() / 255)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    assert resized.shape == (2, 3, 64, 64)
    train_step.run(batch, epoch=2, step=25, epoch_step=5)
    assert inputs[2].shape[2:] == (train_step.image_size(2, 5),) * 2


# --- gradient accumulation --------------------------------------------------------------------------------------------


def test_gradients_of_several_steps_are_summed():
    train_step = new_train_step(nominal_batch=6)
    before = copy_state(train_step)
    expected = {name: torch.zeros_like(parameter) for name, parameter in train_step.model.named_parameters()}
    for seed in (1, 2):
        alone = copy.deepcopy(train_step)
        alone.compute_loss(batch_of(seed)).total.backward()
        for name, parameter in alone.model.named_parameters():
            expected[name] += parameter.grad
    for step in (1, 2):
        train_step.run(batch_of(step), epoch=0, step=step, epoch_step=step)
    for name, parameter in train_step.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **SUM_TOLERANCE)
        assert torch.equal(parameter, before[name])
    assert train_step.ema.updates == 0
    train_step.run(batch_of(3), epoch=0, step=3, epoch_step=3)
    assert train_step.ema.updates == 1
    assert all(parameter.grad is None for parameter in train_step.model.parameters())
    assert changed_names(before, train_step) == {name for name in before if "anchor" not in name}


def test_the_first_step_is_an_update_with_warm_up_learning_rates():
    train_step = new_train_step(hyp=Hyperparameters(warmup_epochs=1.0))
    before = copy_state(train_step)
    train_step.run(batch_of(), epoch=0, step=0, epoch_step=0)
    moved = {name for name in changed_names(before, train_step) if "running" not in name and "num_batches" not in name}
    assert moved and all(name.endswith("bias") for name in moved)  # the learning rate of the others is 0


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_changes_nothing():
    train_step = new_train_step(nominal_batch=6)
    train_step.run(batch_of(1), epoch=0, step=1, epoch_step=1)
    with torch.no_grad():
        train_step.model.model[0].conv.weight[0, 0, 0, 0] = float("nan")
    parameters = {name: parameter.clone() for name, parameter in train_step.model.named_parameters()}
    gradients = {name: parameter.grad.clone() for name, parameter in train_step.model.named_parameters()}
    average = {name: tensor.clone() for name, tensor in train_step.ema.tensors.items()}
    metrics = train_step.run(batch_of(2), epoch=0, step=3, epoch_step=3)
    assert not metrics.is_finite
    for name, parameter in train_step.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), parameters[name].nan_to_num())
        assert torch.equal(parameter.grad, gradients[name])
    assert all(torch.equal(tensor, average[name]) for name, tensor in train_step.ema.tensors.items())
    assert (train_step.ema.updates, dict(train_step.optimizer.state)) == (0, {})


def test_metrics_are_those_of_the_loss_with_the_stop_request():
    train_step = new_train_step()
    parts = copy.deepcopy(train_step).compute_loss(batch_of())
    metrics = train_step.run(batch_of(), epoch=0, step=0, epoch_step=0, stop=True)
    assert (metrics.box, metrics.obj, metrics.cls) == tuple(value.item() for value in (parts.box, parts.obj, parts.cls))
    assert metrics.positives == parts.positives > 0
    assert metrics.stop and not train_step.run(batch_of(), epoch=0, step=1, epoch_step=1).stop
    assert parts.total.item() == pytest.approx(2 * (metrics.box + metrics.obj + metrics.cls), rel=1e-6)


def test_mixed_precision_on_a_cpu_uses_bfloat16_and_the_loss_falls():
    train_step, float32 = (new_train_step(half=half, hyp=ADAM, adam=True) for half in (True, False))
    dtypes = []
    train_step.model.model[5].conv.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    losses, float32_losses = train_on_one_batch(train_step, 24), train_on_one_batch(float32, 1)
    assert set(dtypes) == {torch.bfloat16}
    assert losses[0] == pytest.approx(float32_losses[0], rel=BFLOAT16_TOLERANCE)
    assert np.mean(losses[-3:]) < MAX_LOSS_RATIO * losses[0]
    assert {parameter.dtype for parameter in train_step.model.parameters()} == {torch.float32}
    assert train_step.grad_scale == (0.0, 0.0)
    assert not new_train_step().half


# --- auxiliary heads --------------------------------------------------------------------------------------------------


def is_auxiliary(train_step, name):
    """Return whether the parameter belongs to an auxiliary branch."""
    head = len(train_step.model.layers) - 1
    return name.startswith(f"model.{head}.m2.") or layer(name) in range(head - 4, head)


@pytest.mark.parametrize("variant", [P6, EXTENDED])
@pytest.mark.parametrize("auxiliary", ["partial", "full", "none"])
def test_auxiliary_branches_have_gradients_unless_they_are_off(variant, auxiliary):
    train_step = new_train_step(variant, auxiliary=auxiliary)
    before = copy_state(train_step)
    train_step.compute_loss(batch_of()).total.backward()
    with_gradient = {name for name, parameter in train_step.model.named_parameters() if parameter.grad is not None}
    all_names = {name for name, _ in train_step.model.named_parameters()}
    branches = {name for name in all_names if is_auxiliary(train_step, name)}
    assert len(branches) == 4 * 2 + 4 * 3
    assert with_gradient == (all_names - branches if auxiliary == "none" else all_names)
    train_on_one_batch(train_step, 2)
    moved = changed_names(before, train_step)
    if auxiliary == "none":
        assert not any(is_auxiliary(train_step, name) for name in moved)
    else:  # weights can be too large for a step to change them
        assert {name for name in before if name.endswith(("bias", "running_mean"))} <= moved


@pytest.mark.parametrize(("auxiliary", "maps"), [("partial", 8), ("full", 8), ("none", 4)])
def test_auxiliary_outputs_exist_in_train_mode_only(auxiliary, maps):
    model = new_train_step(P6, auxiliary=auxiliary).model
    images = torch.rand(2, 3, 128, 128)
    assert len(model(images)) == maps
    assert len(model.eval()(images)) == 4


def test_a_full_auxiliary_head_of_e6e_reads_the_sums_of_both_branches():
    partial, full = (new_train_step(EXTENDED, auxiliary=auxiliary).model for auxiliary in ("partial", "full"))
    head = len(full.layers) - 1
    assert partial.layers[: head - 4] == full.layers[: head - 4] and partial.layers[head] == full.layers[head]
    kinds = [[model.layers[row.sources[0]].kind for row in model.layers[head - 4 : head]] for model in (partial, full)]
    assert kinds == [["Conv", "Conv", "Conv", "SPPCSPC"], ["Shortcut", "Shortcut", "Shortcut", "SPPCSPC"]]
    for row, sum_row in zip(partial.layers[head - 4 : head - 1], full.layers[head - 4 : head - 1], strict=True):
        assert full.layers[sum_row.sources[0]].sources[0] == row.sources[0]  # the sum of this branch and another
    sums, read = {}, {}
    for row in full.layers[head - 4 : head - 1]:
        full.model[row.sources[0]].register_forward_hook(lambda *a, i=row.index: sums.update({i: a[1][0] + a[1][1]}))
        full.model[row.index].register_forward_pre_hook(lambda *a, i=row.index: read.update({i: a[1][0]}))
    full(torch.rand(2, 3, 128, 128))
    assert len(read) == 3 and all(torch.equal(read[i], sums[i]) for i in read)


def test_a_full_auxiliary_head_is_the_partial_one_in_other_variants():
    assert new_train_step(P6, auxiliary="full").model.layers == new_train_step(P6).model.layers


@pytest.mark.parametrize("variant", [TINY, P6])
def test_the_loss_falls(variant):
    losses = train_on_one_batch(new_train_step(variant, hyp=ADAM, adam=True), 24)
    assert np.mean(losses[-3:]) < MAX_LOSS_RATIO * losses[0]


@pytest.mark.slow
def test_the_loss_of_a_complete_p6_model_falls():
    losses = train_on_one_batch(new_train_step(P6, thinned=False, hyp=replace(ADAM, lr0=0.001), adam=True), 10)
    assert np.mean(losses[-3:]) < MAX_LOSS_RATIO * losses[0]


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"adam": True}, {"nominal_batch": 6}, {"freeze": (10,), "half": True}])
def test_training_resumed_from_its_tensors_is_bit_identical(options):
    train_step = new_train_step(**options)
    train_on_one_batch(train_step, 5)
    tensors = train_step.state_tensors()
    resumed = new_train_step(seed=1, **options)
    resumed.load_state(tensors, ema_updates=train_step.ema.updates, grad_scale=train_step.grad_scale)
    assert any(name.startswith("gradient.") for name in tensors) == ("nominal_batch" in options)
    assert train_on_one_batch(resumed, 4, first=5) == train_on_one_batch(train_step, 4, first=5)
    ours, theirs = resumed.state_tensors(), train_step.state_tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_state_tensors_are_copies():
    train_step = new_train_step()
    train_on_one_batch(train_step, 1)
    tensors = train_step.state_tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    train_on_one_batch(train_step, 2, first=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_tensors_of_another_network_are_refused():
    tensors = new_train_step(P6).state_tensors()
    with pytest.raises((KeyError, RuntimeError)):
        new_train_step().load_state(tensors, ema_updates=0, grad_scale=(0.0, 0.0))
