"""The networks of tables 3 to 5: counts against the paper, training, fusion, export, and the identity branch."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.support.small_models import metadata_of, session
from tests.support.thin_variants import SIDE, thin
from yolov7_deploy import paper
from yolov7_deploy.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from yolov7_deploy.errors import CheckpointError, UsageError
from yolov7_deploy.inspection.complexity import complexity, gflops, inspect_variant, parameter_count
from yolov7_deploy.model.ablations import ABLATIONS, FIGURE_6
from yolov7_deploy.model.blocks import RepConv
from yolov7_deploy.model.configs import VARIANTS, find_variant
from yolov7_deploy.model.fusion import fold_branches, fuse
from yolov7_deploy.model.yolov7 import Yolov7, build_model, new_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions, TrainOptions
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.hyperparameters import Hyperparameters, default_preset
from yolov7_deploy.training.optimizer import Schedule
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.training.train_step import TrainStep
from yolov7_deploy.workflows.functions import initial_weights

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EVERY_ABLATION = pytest.mark.parametrize("name", ABLATIONS)
CLASSES = 3
FUSION_TOLERANCE = 1e-9  # float64, relative to the largest output; up to 200 layers
MAX_LOSS_RATIO = 0.9  # of the mean of three losses and the first one
ONNX_TOLERANCE = 1e-4  # float32, relative to the largest output
# Networks of tables 1, 3, 4 and 5 whose counts the paper prints, there or in table 2, and the row.
COUNTED = {
    "yolov7x-light": paper.TABLE_3,
    "yolov7x-width": paper.TABLE_3,
    "yolov7x-depth": paper.TABLE_3,
    "yolov7x": paper.TABLE_3,
    "yolor-csp": paper.TABLE_1,
    "yolor-w6": paper.TABLE_2,
    **dict.fromkeys(("yolov7-tiny", "yolov7", "yolov7-e6", "yolov7-e6e"), paper.TABLE_1),
}
PRINTED = {**paper.VARIANTS, **paper.ABLATIONS, "yolov7x": "compound (v7-X)"}
# In deploy form RepConv is a convolution, and RepConv with and without identity cost the same.
DEPLOYED = {"RepConv": "Conv", "RepConvN": "Conv"}


def cost_of(name, size):
    """Return the parameters in millions and the GFLOPs of the fused network."""
    with torch.device("meta"):
        model = Yolov7(find_variant(name), fused=True)
    return parameter_count(model) / 1e6, gflops(model, size=size)


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in VARIANTS)) for n in COUNTED])
def test_parameters_and_gflops_agree_with_the_paper_within_one_percent(name):
    row = next(row for row in COUNTED[name] if row.model == PRINTED[name])
    parameters_m, flops = cost_of(name, row.size)
    assert parameters_m == pytest.approx(row.params_m, rel=0.005)
    assert flops == pytest.approx(row.gflops, rel=0.01)


@pytest.mark.slow
def test_d6_agrees_in_training_form():
    """The paper counts the training form of D6 alone; see `test_complexity`."""
    row = next(row for row in paper.TABLE_1 if row.model == "YOLOv7-D6")
    cost = complexity("yolov7-d6")
    assert cost.gflops_training == pytest.approx(row.gflops, rel=0.005)
    assert cost.parameters_training / 1e6 == pytest.approx(row.params_m, rel=0.005)


def test_every_row_of_tables_3_to_5_is_a_network():
    rows = {row.model for table in (paper.TABLE_3, paper.TABLE_4, paper.TABLE_5) for row in table}
    assert rows == {*paper.ABLATIONS.values(), "compound (v7-X)"} - {"Figure 6 (a) with RepConvN"}
    assert list(ABLATIONS) == list(paper.ABLATIONS)


OF_BASE = {
    **{f"yolov7-elan3-{name}": "yolov7-elan3" for name in (*FIGURE_6, "n")},
    "yolor-csp-reprcsp": "yolor-csp",
    **{f"yolor-w6-{name}": "yolor-w6" for name in ("repcsp", "rcsp", "reprcsp")},
}


@pytest.mark.parametrize("name", OF_BASE)
def test_deployed_models_of_tables_4_and_5_have_the_layers_of_their_base(name):
    """The fair comparison of section 5.4.2: RepConv and the reversed dark block are free in deploy form."""

    def costly(variant):
        layers = find_variant(variant).layers(training=False)
        return Counter((DEPLOYED.get(x.kind, x.kind), x.kernel, x.stride, sum(x.c_in) * x.c_out) for x in layers)

    assert costly(name) == costly(OF_BASE[name])
    ours, base = (find_variant(x).layers(training=False) for x in (name, OF_BASE[name]))
    assert [layer.kind for layer in ours] != [layer.kind for layer in base] or "rcsp" in name


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_BASE)
def test_deployed_models_of_tables_4_and_5_cost_exactly_as_much_as_their_base(name):
    assert cost_of(name, 640) == cost_of(OF_BASE[name], 640)


@pytest.mark.parametrize("name", FIGURE_6)
def test_a_repconv_is_at_the_positions_of_figure_6(name):
    layers = find_variant(f"yolov7-elan3-{name}").layers(training=True)
    chains = [
        layer.kind for layer in layers if layer.kernel == 3 and layer.stride == 1 and layer.c_in == (layer.c_out,)
    ]
    assert chains.pop(0) == "Conv"  # of the stem
    assert chains == ["RepConv" if i % 3 in FIGURE_6[name] else "Conv" for i in range(8 * 6)]  # eight blocks


@pytest.mark.parametrize(
    "name", ["yolov7x-light", *(pytest.param(f"yolov7-elan3-{x}", marks=pytest.mark.slow) for x in "cn")]
)
def test_the_record_compares_with_the_paper_where_it_can(name):
    record = inspect_variant(name)
    assert bool(record.paper) == (name != "yolov7-elan3-n")
    (note,) = record.notes
    expected = {
        "yolov7x-light": "differ from the paper's by +0.10%, GFLOPs by -0.04%",
        "yolov7-elan3-c": "Table 4 prints AP only",
        "yolov7-elan3-n": "not in the paper",
    }
    assert expected[name] in note


@EVERY_ABLATION
def test_an_ablation_has_the_official_preset_of_its_levels(name):
    assert default_preset(name, pretrained=False) == {3: "p5", 4: "p6"}[len(find_variant(name).strides)]


# --- training, fusion, export -----------------------------------------------------------------------------------------


def small_batch(count, side):
    """Return images of dark rectangles on noise, and their boxes."""
    rng = np.random.default_rng(0)
    images = rng.integers(128, 256, (count, side, side, 3), np.uint8)
    targets = []
    for image in range(count):
        w, h, x, y = (int(v) for v in rng.integers(side // 4, side // 2, 4))
        images[image, y : y + h, x : x + w] = 16
        targets.append((image, image % CLASSES, (x + w / 2) / side, (y + h / 2) / side, w / side, h / side))
    return Batch(images=torch.from_numpy(images), targets=torch.tensor(targets), paths=())


def train_on_one_batch(model, *, side, lr, steps=24):
    """Return the loss of each step, until the mean of three steps is low, at most `steps`.

    The first ones rise, because assigned cells and BatchNorm statistics change.
    """
    hyp = Hyperparameters(warmup_epochs=0.0, lr0=lr)
    options = TrainOptions(batch=4, nominal_batch=4, img=side, epochs=10, adam=True)
    schedule = Schedule(hyp=hyp, epochs=10, steps_per_epoch=10, batch=4, nominal_batch=4, linear=False)
    step = TrainStep(model, hyp=hyp, options=options, schedule=schedule, distributed=DistributedContext())
    step.train()
    batch, losses = small_batch(4, side), []
    for index in range(steps):
        metrics = step.run(batch, epoch=0, step=index, epoch_step=index)
        losses.append(metrics.box + metrics.obj + metrics.cls)
        if index > 3 and np.mean(losses[-3:]) < MAX_LOSS_RATIO * losses[0]:
            break
    return losses


def check_the_whole_way(variant, *, side, lr):
    """Train some steps, fuse, export, and run in ONNX Runtime."""
    torch.manual_seed(0)
    model = Yolov7(variant, classes=CLASSES, training_form=True)
    losses = train_on_one_batch(model, side=side, lr=lr)
    assert np.mean(losses[-3:]) < MAX_LOSS_RATIO * losses[0], losses
    model.eval()
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.double().predict(image.double())
        exact = fuse(model).predict(image.double())
        assert (exact - expected).abs().max() <= FUSION_TOLERANCE * expected.abs().max()
    fused = fuse(model.float())
    onnx = export_onnx(fused, metadata_of(fused), ExportOptions(input_hw=(side, side), nms="none"))
    (output,) = session(onnx.proto).run(None, {"images": image.numpy()})
    assert np.abs(output - expected.numpy()).max() <= ONNX_TOLERANCE * np.abs(expected.numpy()).max()


SLOW_THIN = [pytest.param(name, marks=pytest.mark.slow) for name in ("yolov7x-light", "yolor-w6-repcsp")]


@pytest.mark.parametrize("name", ["yolov7-elan3-a", "yolor-csp-reprcsp", *SLOW_THIN])
def test_a_thin_ablation_trains_fuses_exports_and_runs(name):
    check_the_whole_way(thin(name), side=SIDE, lr=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ABLATIONS, *VARIANTS])
def test_every_network_trains_fuses_exports_and_runs_at_full_width(name):
    variant = find_variant(name)
    check_the_whole_way(variant, side=2 * max(variant.strides), lr=0.001)


def test_weights_of_an_ablation_are_recognized_by_their_metadata(tmp_path, monkeypatch):
    monkeypatch.setitem(ABLATIONS, "yolor-csp", thin("yolor-csp"))
    model = new_model("yolor-csp", classes=2, training_form=True)
    path = tmp_path / "best.safetensors"
    fields = {"training": True, "class_names": ("a", "b"), "anchors": model.anchors}
    save_checkpoint(Checkpoint(tensors=dict(model.state_dict()), variant="yolor-csp", **fields), path)
    loaded = load_checkpoint(path)
    assert (loaded.variant, loaded.training, len(loaded.strides)) == ("yolor-csp", True, 3)
    assert len(build_model(loaded).layers) == len(model.layers)
    save_checkpoint(Checkpoint(tensors=dict(model.state_dict()), variant="yolov7-elan3", **fields), path)
    with pytest.raises(CheckpointError, match="looks like yolov7-elan3"):
        build_model(load_checkpoint(path))


def test_an_ablation_can_be_trained_by_name():
    assert initial_weights(None, "yolor-csp") == (None, "yolor-csp")
    with pytest.raises(UsageError, match='"yolor-cps" is unknown') as caught:
        initial_weights(None, "yolor-cps")
    assert "Did you mean yolor-csp?" in caught.value.fix


# --- the identity branch (section 4.1) --------------------------------------------------------------------------------
# Random inputs, fresh weights, BatchNorm in train mode: every branch has unit variance, so the shares are exact.

CHANNELS, PIXELS = 32, 64


def rep_conv(*, identity):
    torch.manual_seed(0)
    return RepConv(CHANNELS, CHANNELS, "silu", fused=False, identity=identity).train()


def before_activation(block, x):
    total = block.rbr_dense(x) + block.rbr_1x1(x)
    return total if block.rbr_identity is None else total + block.rbr_identity(x)


def random_maps():
    return torch.randn(8, CHANNELS, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1))


def correlation(a, b):
    """Return the mean over channels of the correlation of a channel with the same channel of the other map."""
    rows = [x.transpose(0, 1).flatten(1) for x in (a, b)]
    centred = [F.normalize(row - row.mean(1, keepdim=True), dim=1) for row in rows]
    return (centred[0] * centred[1]).sum(1).mean().item()


@torch.no_grad()
def test_in_a_concatenation_the_identity_branch_repeats_the_map_beside_it():
    """Maps that ELAN concatenates: the input of a RepConv and its output. One of three branches is that input."""
    x = random_maps()
    assert correlation(x, before_activation(rep_conv(identity=True), x)) == pytest.approx(3**-0.5, abs=0.06)
    assert correlation(x, before_activation(rep_conv(identity=False), x)) == pytest.approx(0, abs=0.06)


@torch.no_grad()
def test_in_a_residual_layer_the_identity_branch_only_rescales_the_shortcut():
    """x + RepConv(x) is, before the activation, the sum of RepConvN(x) and (1 + s) x + t, channel by channel."""
    block = rep_conv(identity=True).double().eval()
    x = random_maps()[:1].double()
    bn = block.rbr_identity
    torch.nn.init.uniform_(bn.weight, 0.5, 2)
    torch.nn.init.uniform_(bn.running_var, 0.5, 2)
    total = x + before_activation(block, x)
    scale = (bn.weight / (bn.running_var + bn.eps).sqrt()).view(1, -1, 1, 1)
    block.rbr_identity = None
    without = before_activation(block, x) + x * (1 + scale)
    torch.testing.assert_close(total, without, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_identity_branch_is_parallel_to_that_of_the_shortcut():
    """Section 4.1: the identity takes the diversity of the gradients; it adds none that the shortcut has not."""
    x = random_maps()[:1].double().requires_grad_()
    block = rep_conv(identity=True).double().eval()
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def cosine(branch):
        (gradient,) = torch.autograd.grad(branch(x), x, direction)
        return F.cosine_similarity(gradient.flatten(), direction.flatten(), dim=0).item()

    assert cosine(block.rbr_identity) == pytest.approx(1, abs=1e-9)
    assert abs(cosine(block.rbr_dense)) < 0.2 > abs(cosine(block.rbr_1x1))


@torch.no_grad()
def test_the_reversed_dark_block_has_no_identity_beside_its_shortcut():
    """Figure 7: after the 1x1 convolution that follows, even a RepConv with identity is unlike the shortcut."""
    x = random_maps()
    inner = before_activation(rep_conv(identity=True), x)
    mixed = F.conv2d(inner, torch.randn(CHANNELS, CHANNELS, 1, 1, generator=torch.Generator().manual_seed(3)))
    assert abs(correlation(x, mixed)) < 0.1 < correlation(x, inner)


@pytest.mark.parametrize("identity", [True, False])
def test_both_kinds_of_repconv_fold_exactly(identity):
    block = rep_conv(identity=identity).double()
    x = random_maps()[:1].double()
    block(x)  # statistics of the running kind
    block.eval()
    with torch.no_grad():
        weight, bias = fold_branches(block)
        torch.testing.assert_close(block.act(F.conv2d(x, weight, bias, 1, 1)), block(x), rtol=1e-10, atol=1e-10)
