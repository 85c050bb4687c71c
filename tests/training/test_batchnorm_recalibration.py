"""BatchNorm statistics are brought to other images without a change of the output."""

from pathlib import Path

import pytest
import torch

from tests.support.deterministic import fill_model
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.training.batchnorm_recalibration import rebase_norms
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.sample import Batch

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SAME = 2e-4  # of the output's standard deviation: every layer is rounded anew to float32


def trained(variant="yolov7-tiny"):
    """Fixed weights whose kept statistics are not those of any image."""
    return fill_model(new_model(variant, classes=3, training_form=True))


def batches(count, batch=2, size=64):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
        yield Batch(images=images, targets=torch.zeros(0, 6), paths=(Path("noise"),))


def output(model):
    images = next(batches(1)).images.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return [raw.clone() for raw in model(images)]


def test_the_output_stays():
    model = trained()
    before = output(model)
    found = rebase_norms(model, batches(3), world=DistributedContext())
    assert (found.layers, found.images) == (55, 6)
    for old, new in zip(before, output(model), strict=True):
        assert (old - new).abs().max() < SAME * old.std()


def test_training_then_computes_what_evaluation_does():
    model = trained()
    evaluated = output(model)
    distances = []
    for rebased in (False, True):
        if rebased:
            rebase_norms(model, batches(1), world=DistributedContext())
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = 0.0
        model.train()
        learned = output(model)  # of the very images that it was rebased on
        model.eval()
        distances.append(max(float((a - b).abs().max() / a.std()) for a, b in zip(evaluated, learned, strict=True)))
    assert distances[0] > 0.1
    assert distances[1] < 0.01


def test_statistics_are_those_of_the_images():
    model = trained()
    rebase_norms(model, batches(2), world=DistributedContext())
    first = model.model[0]
    entering = torch.cat([first.conv(b.images.permute(0, 3, 1, 2).float() / 255) for b in batches(2)])
    torch.testing.assert_close(first.bn.running_mean, entering.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.bn.running_var, entering.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-6)


def test_frozen_layers_stay_bit_for_bit():
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.model[3].state_dict().items()}
    other = model.model[4].bn.running_mean.clone()
    rebase_norms(model, batches(1), frozen=(0, 1, 2, 3), world=DistributedContext())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.model[3].state_dict().items())
    assert not torch.equal(other, model.model[4].bn.running_mean)


def test_layers_with_foreign_statistics_are_named():
    model = trained()
    rebase_norms(model, batches(2), world=DistributedContext())
    norm = model.model[20 + 1].bn
    norm.running_var.mul_(30)
    norm.weight.data.mul_(30**0.5)
    found = rebase_norms(model, batches(2), world=DistributedContext())
    assert found.far == ("model.21.bn",)
    assert "model.21.bn" in found.words()


def test_without_images_nothing_happens():
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert rebase_norms(model, [], world=DistributedContext()).far == ()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
