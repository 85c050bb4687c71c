"""Parameter groups, schedule and optimizer against the official program, and the moving average against its formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.training.hyperparameters import PRESETS, Hyperparameters
from yolov7_deploy.training.optimizer import (
    BIASES,
    NORMS,
    WEIGHTS,
    ModelEma,
    Schedule,
    apply_schedule,
    build_optimizer,
    parameter_groups,
)

# Number of parameters per group: those of yolov7 and yolov7-tiny are from official logs, the others were counted.
GROUPS = {
    "yolov7": (98, 95, 95),
    "yolov7-tiny": (61, 58, 58),
    "yolov7-tiny-silu": (61, 58, 58),
    "yolov7x": (111, 108, 108),
    "yolov7-w6": (115, 115, 115),
    "yolov7-e6": (153, 153, 153),
    "yolov7-d6": (175, 175, 175),
    "yolov7-e6e": (252, 252, 252),
}
EMA_TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}  # float32 against float64


def new_schedule(*, hyp=PRESETS["p5"], epochs=300, steps_per_epoch=1000, batch=16, nominal_batch=64, linear=False):
    return Schedule(
        hyp=hyp,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        batch=batch,
        nominal_batch=nominal_batch,
        linear=linear,
    )


def meta_model(variant, **options):
    with torch.device("meta"):
        return new_model(variant, training_form=True, **options)


# --- parameter groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_groups_have_the_official_sizes(variant):
    model = meta_model(variant)
    groups = parameter_groups(model)
    assert tuple(groups) == (NORMS, WEIGHTS, BIASES)
    assert tuple(map(len, groups.values())) == GROUPS[variant]
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in model.parameters()}


def test_weight_decay_applies_to_convolution_weights_only():
    model = meta_model("yolov7-tiny")
    optimizer = build_optimizer(model, new_schedule(), adam=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        assert (group["weight_decay"] > 0) == (group["name"] == WEIGHTS)
        for parameter in group["params"]:
            name = names[id(parameter)]
            kind = BIASES if name.endswith("bias") else NORMS if ".bn." in name or "implicit" in name else WEIGHTS
            assert kind == group["name"], name


def test_frozen_parameters_are_in_no_group():
    model = meta_model("yolov7-tiny")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 4 and parameter.shape[0] > 1)
    groups = {
        group["name"]: group["params"] for group in build_optimizer(model, new_schedule(), adam=False).param_groups
    }
    assert set(groups) == {WEIGHTS} and all(parameter.requires_grad for parameter in groups[WEIGHTS])


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("linear", [False, True])
def test_the_learning_rate_falls_from_lr0_to_lr0_times_lrf(preset, linear):
    hyp = PRESETS[preset]
    schedule = new_schedule(hyp=hyp, epochs=50, linear=linear)
    factors = [schedule.lr_factor(epoch) for epoch in range(50)]
    assert factors[0] == 1 and factors == sorted(factors, reverse=True)
    assert schedule.lr_factor(49 if linear else 50) == pytest.approx(hyp.lrf)
    step = 49 * 1000
    assert schedule.learning_rates(step, 49)[WEIGHTS] == pytest.approx(hyp.lr0 * factors[49])


def test_the_cosine_has_its_middle_after_half_of_the_epochs():
    assert new_schedule(epochs=10).lr_factor(5) == pytest.approx((1 + 0.1) / 2)
    assert new_schedule(epochs=4).lr_factor(1) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert new_schedule(epochs=5, linear=True).lr_factor(1) == pytest.approx(0.75 * 0.9 + 0.1)
    assert new_schedule(epochs=1, linear=True).lr_factor(0) == 1


def test_warm_up_takes_three_epochs_or_a_thousand_steps_but_at_most_a_tenth_of_training():
    assert new_schedule().warmup_steps == 3000
    assert new_schedule(steps_per_epoch=100).warmup_steps == 1000
    assert new_schedule(steps_per_epoch=100, epochs=9).warmup_steps == 90
    assert new_schedule(steps_per_epoch=10, epochs=1).warmup_steps == 1
    assert new_schedule(steps_per_epoch=3, epochs=1).warmup_steps == 0
    assert new_schedule(hyp=Hyperparameters(warmup_epochs=0.0)).warmup_steps == 0


@given(st.integers(1, 400), st.integers(1, 5000), st.floats(0, 10))
def test_warm_up_is_at_most_a_tenth_of_training(epochs, steps, warmup_epochs):
    schedule = new_schedule(hyp=Hyperparameters(warmup_epochs=warmup_epochs), epochs=epochs, steps_per_epoch=steps)
    assert 0 <= 10 * schedule.warmup_steps <= epochs * steps


def test_learning_rates_and_momentum_rise_linearly_in_the_warm_up():
    schedule = new_schedule(steps_per_epoch=1000)
    full = schedule.hyp.lr0 * schedule.lr_factor(1)
    for step, part in ((0, 0.0), (1500, 0.5), (3000, 1.0)):
        rates = schedule.learning_rates(step, 1)
        assert rates[NORMS] == rates[WEIGHTS] == pytest.approx(full * part)
        assert rates[BIASES] == pytest.approx(0.1 + (full - 0.1) * part)
        assert schedule.momentum(step) == pytest.approx(0.8 + 0.137 * part)
    assert schedule.learning_rates(3001, 3) == {
        name: schedule.hyp.lr0 * schedule.lr_factor(3) for name in (NORMS, WEIGHTS, BIASES)
    }


def test_without_warm_up_the_first_step_has_the_full_learning_rate():
    schedule = new_schedule(hyp=Hyperparameters(warmup_epochs=0.0))
    assert schedule.learning_rates(0, 0) == dict.fromkeys((NORMS, WEIGHTS, BIASES), 0.01)
    assert (schedule.momentum(0), schedule.accumulation_steps(0)) == (0.937, 4)


# --- gradient accumulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "steps", "decay"),
    [(16, 4, 1.0), (64, 1, 1.0), (128, 1, 2.0), (24, 3, 72 / 64), (48, 1, 48 / 64), (1, 64, 1.0), (40, 2, 80 / 64)],
)
def test_an_update_has_about_the_nominal_batch_and_weight_decay_is_scaled_to_it(batch, steps, decay):
    schedule = new_schedule(batch=batch)
    assert schedule.final_accumulation_steps == steps == schedule.accumulation_steps(10**6)
    assert schedule.weight_decay == pytest.approx(0.0005 * decay)


def test_accumulation_rises_as_in_the_official_program():
    schedule = new_schedule(batch=16)
    official = [max(1, np.interp(step, [0, 3000], [1, 64 / 16]).round()) for step in range(3001)]
    assert [schedule.accumulation_steps(step) for step in range(3001)] == official
    assert (schedule.accumulation_steps(0), schedule.accumulation_steps(3000)) == (1, 4)


# --- optimizer --------------------------------------------------------------------------------------------------------


def test_sgd_gets_the_learning_rates_and_momentum_of_a_step():
    schedule = new_schedule(steps_per_epoch=1000)
    optimizer = build_optimizer(meta_model("yolov7-tiny"), schedule, adam=False)
    assert isinstance(optimizer, torch.optim.SGD) and all(group["nesterov"] for group in optimizer.param_groups)
    apply_schedule(optimizer, schedule, 750, 0)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == dict(schedule.learning_rates(750, 0))
    assert {group["momentum"] for group in optimizer.param_groups} == {schedule.momentum(750)}


def test_adam_has_decoupled_weight_decay_and_the_momentum_as_its_first_beta():
    schedule = new_schedule(steps_per_epoch=1000)
    optimizer = build_optimizer(meta_model("yolov7-tiny"), schedule, adam=True)
    assert isinstance(optimizer, torch.optim.AdamW)
    apply_schedule(optimizer, schedule, 10**5, 0)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.937, 0.999)}
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        NORMS: 0.0,
        WEIGHTS: 0.0005,
        BIASES: 0.0,
    }
    apply_schedule(optimizer, schedule, 0, 0)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.999)}


# --- moving average ---------------------------------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def change_weights(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape) if tensor.is_floating_point() else 1)


def test_the_average_follows_its_formula():
    model = small_model()
    ema = ModelEma(model)
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for n in range(1, 6):
        change_weights(model, n)
        ema.update(model)
        d = 0.9999 * (1 - math.exp(-n / 2000))
        for name, tensor in model.state_dict().items():
            expected[name] = d * expected[name] + (1 - d) * tensor.double()
    assert ema.updates == 5
    for name, tensor in ema.tensors.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], **EMA_TOLERANCE)


def test_the_average_changes_slowly_after_many_updates():
    model = small_model()
    ema = ModelEma(model)
    ema.updates = 10**6
    before = {name: tensor.clone() for name, tensor in ema.tensors.items()}
    change_weights(model, 1)
    ema.update(model)
    moved = (ema.tensors["0.weight"] - before["0.weight"]) / (model[0].weight.detach() - before["0.weight"])
    assert moved.mean().item() == pytest.approx(1e-4, rel=1e-2)


def test_counters_are_copied_and_statistics_are_averaged():
    model = small_model()
    ema = ModelEma(model)
    model(torch.randn(2, 3, 8, 8))
    ema.update(model)
    assert ema.tensors["1.num_batches_tracked"].item() == 1
    assert ema.tensors["1.running_mean"].abs().sum() > 0
    assert not torch.equal(ema.tensors["1.running_var"], torch.ones(4))


def test_the_average_of_constant_weights_is_bit_identical():
    model = small_model()
    ema = ModelEma(model)
    for _ in range(20):
        ema.update(model)
    assert all(torch.equal(ema.tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_the_average_does_not_share_memory_with_the_model():
    model = small_model()
    ema = ModelEma(model)
    before = ema.tensors["0.weight"].clone()
    change_weights(model, 1)
    assert torch.equal(ema.tensors["0.weight"], before)


def test_a_restored_average_continues_as_if_never_interrupted():
    model, other = small_model(), small_model()
    ema = ModelEma(model)
    change_weights(model, 1)
    ema.update(model)
    resumed = ModelEma(other)
    resumed.load({name: tensor.clone() for name, tensor in ema.tensors.items()}, updates=ema.updates)
    change_weights(model, 2)
    for one in (ema, resumed):
        one.update(model)
    assert resumed.updates == 2
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in ema.tensors.items())
