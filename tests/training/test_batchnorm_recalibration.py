"""BatchNorm statistics are recalibrated on other images without changing the output."""

from pathlib import Path

import pytest
import torch

from tests.support.deterministic import fill_model
from tests.support.thin_variants import thin
from yolov7_deploy.model.yolov7 import Yolov7, new_model
from yolov7_deploy.training.batchnorm_recalibration import recalibrate_batchnorm
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.sample import Batch

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 2e-4  # of the output's standard deviation; every layer rounds to float32


def trained_model(variant="yolov7-tiny"):
    """Return a model with deterministic weights, whose running statistics are not those of any image."""
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


def test_recalibration_does_not_change_the_output():
    model = trained_model()
    before = output(model)
    report = recalibrate_batchnorm(model, batches(3), distributed=DistributedContext())
    assert (report.layers, report.images) == (55, 6)
    for old, new in zip(before, output(model), strict=True):
        assert (old - new).abs().max() < TOLERANCE * old.std()


@pytest.mark.parametrize("auxiliary", ["partial", "none"])
def test_auxiliary_heads_stay_finite_and_keep_their_outputs(auxiliary):
    model = fill_model(Yolov7(thin("yolov7-w6"), classes=3, training_form=True, auxiliary=auxiliary))

    def outputs():
        model.train()
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.eval()
        return output(model)

    before = outputs()
    assert len(before) == (8 if auxiliary == "partial" else 4)
    recalibrate_batchnorm(model, batches(2, size=128), distributed=DistributedContext())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    for old, new in zip(before, outputs(), strict=True):
        assert (old - new).abs().max() < TOLERANCE * old.std()


def test_train_mode_and_eval_mode_agree_after_recalibration():
    model = trained_model()
    in_eval_mode = output(model)
    distances = []
    for recalibrate in (False, True):
        if recalibrate:
            recalibrate_batchnorm(model, batches(1), distributed=DistributedContext())
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = 0.0
        model.train()
        in_train_mode = output(model)  # of the images used for recalibration
        model.eval()
        distances.append(
            max(float((a - b).abs().max() / a.std()) for a, b in zip(in_eval_mode, in_train_mode, strict=True))
        )
    assert distances[0] > 0.1
    assert distances[1] < 0.01


def test_running_statistics_become_those_of_the_images():
    model = trained_model()
    recalibrate_batchnorm(model, batches(2), distributed=DistributedContext())
    first = model.model[0]
    inputs = torch.cat([first.conv(b.images.permute(0, 3, 1, 2).float() / 255) for b in batches(2)])
    torch.testing.assert_close(first.bn.running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.bn.running_var, inputs.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-6)


def test_frozen_layers_do_not_change():
    model = trained_model()
    before = {name: tensor.clone() for name, tensor in model.model[3].state_dict().items()}
    other = model.model[4].bn.running_mean.clone()
    recalibrate_batchnorm(model, batches(1), frozen=(0, 1, 2, 3), distributed=DistributedContext())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.model[3].state_dict().items())
    assert not torch.equal(other, model.model[4].bn.running_mean)


def test_layers_with_very_different_statistics_are_reported():
    model = trained_model()
    recalibrate_batchnorm(model, batches(2), distributed=DistributedContext())
    norm = model.model[20 + 1].bn
    norm.running_var.mul_(30)
    norm.weight.data.mul_(30**0.5)
    report = recalibrate_batchnorm(model, batches(2), distributed=DistributedContext())
    assert report.outliers == ("model.21.bn",)
    assert "model.21.bn" in report.summary()


def test_without_images_nothing_changes():
    model = trained_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert recalibrate_batchnorm(model, [], distributed=DistributedContext()).outliers == ()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
