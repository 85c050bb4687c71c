"""The moving average against its formula in a loop, over weights, statistics and counters."""

import math

import pytest
import torch
from torch import nn

from yolov7_deploy.training.ema import ModelEma

CLOSE = {"rtol": 1e-6, "atol": 1e-7}  # float32 against float64


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def changed(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape) if tensor.is_floating_point() else 1)


def test_an_average_follows_the_formula():
    model = small_model()
    average = ModelEma(model)
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for n in range(1, 6):
        changed(model, n)
        average.update(model)
        d = 0.9999 * (1 - math.exp(-n / 2000))
        for name, tensor in model.state_dict().items():
            expected[name] = d * expected[name] + (1 - d) * tensor.double()
    assert average.updates == 5
    for name, tensor in average.tensors.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], **CLOSE)


def test_the_average_is_slow_after_many_updates():
    model = small_model()
    average = ModelEma(model)
    average.updates = 10**6
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    changed(model, 1)
    average.update(model)
    moved = (average.tensors["0.weight"] - before["0.weight"]) / (model[0].weight.detach() - before["0.weight"])
    assert moved.mean().item() == pytest.approx(1e-4, rel=1e-2)


def test_counters_are_copied_and_statistics_are_averaged():
    model = small_model()
    average = ModelEma(model)
    model(torch.randn(2, 3, 8, 8))
    average.update(model)
    assert average.tensors["1.num_batches_tracked"].item() == 1
    assert average.tensors["1.running_mean"].abs().sum() > 0
    assert not torch.equal(average.tensors["1.running_var"], torch.ones(4))


def test_what_does_not_change_stays_bit_for_bit():
    model = small_model()
    average = ModelEma(model)
    for _ in range(20):
        average.update(model)
    assert all(torch.equal(average.tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_the_average_has_memory_of_its_own():
    model = small_model()
    average = ModelEma(model)
    before = average.tensors["0.weight"].clone()
    changed(model, 1)
    assert torch.equal(average.tensors["0.weight"], before)


def test_a_kept_average_goes_on_as_if_it_had_not_stopped():
    model, other = small_model(), small_model()
    average = ModelEma(model)
    changed(model, 1)
    average.update(model)
    resumed = ModelEma(other)
    resumed.load({name: tensor.clone() for name, tensor in average.tensors.items()}, updates=average.updates)
    changed(model, 2)
    for one in (average, resumed):
        one.update(model)
    assert resumed.updates == 2
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in average.tensors.items())
