"""Groups of parameters, and how rates, momentum and accumulation run, against the numbers of the official program."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.training.hyperparameters import PRESETS, Hyperparameters
from yolov7_deploy.training.optimizer import (
    BIASES,
    NORMS,
    WEIGHTS,
    Schedule,
    grouped_parameters,
    make_optimizer,
    set_rates,
)

# Parameters of each group, in section 5.4 of the reference: those of v7 and tiny are from logs, the others counted.
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


def schedule(*, hyp=PRESETS["p5"], epochs=300, steps=1000, batch=16, nominal_batch=64, linear=False):
    return Schedule(hyp=hyp, epochs=epochs, steps=steps, batch=batch, nominal_batch=nominal_batch, linear=linear)


def without_storage(variant, **options):
    with torch.device("meta"):
        return new_model(variant, training_form=True, **options)


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_are_as_large_as_the_official_ones(variant):
    model = without_storage(variant)
    groups = grouped_parameters(model)
    assert tuple(groups) == (NORMS, WEIGHTS, BIASES)
    assert tuple(map(len, groups.values())) == GROUPS[variant]
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in model.parameters()}


def test_only_convolution_weights_decay():
    model = without_storage("yolov7-tiny")
    optimizer = make_optimizer(model, schedule(), adam=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        assert (group["weight_decay"] > 0) == (group["name"] == WEIGHTS)
        for parameter in group["params"]:
            name = names[id(parameter)]
            kind = BIASES if name.endswith("bias") else NORMS if ".bn." in name or "implicit" in name else WEIGHTS
            assert kind == group["name"], name


def test_frozen_parameters_are_in_no_group():
    model = without_storage("yolov7-tiny")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 4 and parameter.shape[0] > 1)
    groups = {group["name"]: group["params"] for group in make_optimizer(model, schedule(), adam=False).param_groups}
    assert set(groups) == {WEIGHTS} and all(parameter.requires_grad for parameter in groups[WEIGHTS])


# --- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("linear", [False, True])
def test_the_rate_falls_from_lr0_to_lr0_times_lrf(preset, linear):
    hyp = PRESETS[preset]
    one = schedule(hyp=hyp, epochs=50, linear=linear)
    factors = [one.factor(epoch) for epoch in range(50)]
    assert factors[0] == 1 and factors == sorted(factors, reverse=True)
    assert one.factor(49 if linear else 50) == pytest.approx(hyp.lrf)
    step = 49 * 1000
    assert one.rates(step, 49)[WEIGHTS] == pytest.approx(hyp.lr0 * factors[49])


def test_the_cosine_is_at_its_middle_after_half_of_the_epochs():
    assert schedule(epochs=10).factor(5) == pytest.approx((1 + 0.1) / 2)
    assert schedule(epochs=4).factor(1) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule(epochs=5, linear=True).factor(1) == pytest.approx(0.75 * 0.9 + 0.1)
    assert schedule(epochs=1, linear=True).factor(0) == 1


def test_warm_up_lasts_three_epochs_or_a_thousand_steps_but_never_more_than_a_tenth():
    assert schedule().warmup_steps == 3000
    assert schedule(steps=100).warmup_steps == 1000
    assert schedule(steps=100, epochs=9).warmup_steps == 90
    assert schedule(steps=10, epochs=1).warmup_steps == 1
    assert schedule(steps=3, epochs=1).warmup_steps == 0
    assert schedule(hyp=Hyperparameters(warmup_epochs=0.0)).warmup_steps == 0


@given(st.integers(1, 400), st.integers(1, 5000), st.floats(0, 10))
def test_warm_up_is_never_more_than_a_tenth(epochs, steps, warmup_epochs):
    one = schedule(hyp=Hyperparameters(warmup_epochs=warmup_epochs), epochs=epochs, steps=steps)
    assert 0 <= 10 * one.warmup_steps <= epochs * steps


def test_rates_and_momentum_rise_in_a_straight_line():
    one = schedule(steps=1000)
    full = one.hyp.lr0 * one.factor(1)
    for step, part in ((0, 0.0), (1500, 0.5), (3000, 1.0)):
        rates = one.rates(step, 1)
        assert rates[NORMS] == rates[WEIGHTS] == pytest.approx(full * part)
        assert rates[BIASES] == pytest.approx(0.1 + (full - 0.1) * part)
        assert one.momentum(step) == pytest.approx(0.8 + 0.137 * part)
    assert one.rates(3001, 3) == {name: one.hyp.lr0 * one.factor(3) for name in (NORMS, WEIGHTS, BIASES)}


def test_without_a_warm_up_the_first_step_is_full():
    one = schedule(hyp=Hyperparameters(warmup_epochs=0.0))
    assert one.rates(0, 0) == dict.fromkeys((NORMS, WEIGHTS, BIASES), 0.01)
    assert (one.momentum(0), one.accumulate(0)) == (0.937, 4)


# --- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "steps", "decay"),
    [(16, 4, 1.0), (64, 1, 1.0), (128, 1, 2.0), (24, 3, 72 / 64), (48, 1, 48 / 64), (1, 64, 1.0), (40, 2, 80 / 64)],
)
def test_an_update_has_about_the_nominal_batch_and_decay_is_for_what_it_has(batch, steps, decay):
    one = schedule(batch=batch)
    assert one.full_accumulation == steps == one.accumulate(10**6)
    assert one.weight_decay == pytest.approx(0.0005 * decay)


def test_accumulation_rises_as_the_official_program_has_it():
    one = schedule(batch=16)
    official = [max(1, np.interp(step, [0, 3000], [1, 64 / 16]).round()) for step in range(3001)]
    assert [one.accumulate(step) for step in range(3001)] == official
    assert (one.accumulate(0), one.accumulate(3000)) == (1, 4)


# --- the optimiser ----------------------------------------------------------------------------------------------------


def test_a_step_is_made_with_its_rates_and_momentum():
    one = schedule(steps=1000)
    optimizer = make_optimizer(without_storage("yolov7-tiny"), one, adam=False)
    assert isinstance(optimizer, torch.optim.SGD) and all(group["nesterov"] for group in optimizer.param_groups)
    set_rates(optimizer, one, 750, 0)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == dict(one.rates(750, 0))
    assert {group["momentum"] for group in optimizer.param_groups} == {one.momentum(750)}


def test_adam_decays_apart_from_the_rate_and_has_the_momentum_as_its_first_beta():
    one = schedule(steps=1000)
    optimizer = make_optimizer(without_storage("yolov7-tiny"), one, adam=True)
    assert isinstance(optimizer, torch.optim.AdamW)
    set_rates(optimizer, one, 10**5, 0)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.937, 0.999)}
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        NORMS: 0.0,
        WEIGHTS: 0.0005,
        BIASES: 0.0,
    }
    set_rates(optimizer, one, 0, 0)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.999)}
