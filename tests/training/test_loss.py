"""The losses: the official figures, a slow obvious matching, and what the paper's ablations change in the labels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.deterministic import centred, uniform
from yolov7_deploy.errors import UsageError
from yolov7_deploy.training.assignment import COARSE, FINE, GroundTruth, Predictions, find_candidates, match
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.loss import DetectionLoss, LossOptions, _last_written, complete_iou, decoded, scaled_gains

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "loss.json").read_text())
CASES = sorted(GOLDEN)
RELATIVE_LOSS = 1e-4  # promised; float32 gives 1e-7
RELATIVE_GRADIENT = 1e-3


def golden_targets(case):
    u = uniform("targets:" + case, (17, 6))
    sides = np.float32(0.02) + np.float32(0.5) * u[:, 4:6] ** 2
    centre = sides / 2 + u[:, 2:4] * (1 - sides)
    image, class_ids = np.sort((u[:, :1] * 3).astype(int), axis=0), (u[:, 1:2] * 80).astype(int)
    return torch.tensor(np.concatenate([image, class_ids, centre, sides], 1).astype(np.float32))


def golden_raws(case, facts, heads):
    raws = []
    for head in range(heads):
        for level, stride in enumerate(map(int, facts["stride"])):
            shape = (3, 3, facts["height"] // stride, facts["width"] // stride, 85)
            raw = 3 * centred(f"{case}:p{head}{level}", shape)
            raw[..., 4] -= 2
            raws.append(torch.tensor(raw, requires_grad=True))
    return raws


def loss_of(facts, **options):
    strides = [int(stride) for stride in facts["stride"]]
    anchors = torch.tensor(facts["anchors"], dtype=torch.float32).reshape(len(strides), 3, 2)
    hyp = {name: facts["hyp"][name] for name in ("box", "cls", "obj", "anchor_t")}
    return DetectionLoss(
        anchors / torch.tensor(strides).view(-1, 1, 1),
        strides=strides,
        classes=facts["nc"],
        gains=Hyperparameters(**hyp),
        options=LossOptions(**options),
        world=DistributedContext(),
    )


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_official_ones(case):
    facts = GOLDEN[case]
    raws = golden_raws(case, facts, heads=len(facts["grads"]) // len(facts["stride"]))
    parts = loss_of(facts, ota=not case.startswith("plain"), official_height=True)(raws, golden_targets(case))
    parts.total.backward()
    assert parts.total.item() == pytest.approx(facts["loss"], rel=RELATIVE_LOSS)
    found = [parts.box.item(), parts.objectness.item(), parts.classes.item()]
    assert found == pytest.approx(facts["items"][:3], rel=RELATIVE_LOSS)
    for raw, wanted in zip(raws, facts["grads"], strict=True):
        gradient = raw.grad.flatten().double()
        assert list(raw.shape) == wanted["shape"]
        assert int(gradient.count_nonzero()) == wanted["nonzero"]
        assert gradient.sum().item() == pytest.approx(wanted["sum"], rel=RELATIVE_GRADIENT)
        assert gradient.abs().sum().item() == pytest.approx(wanted["abssum"], rel=RELATIVE_GRADIENT)
        samples = gradient[torch.tensor(wanted["index"])].tolist()
        assert samples == pytest.approx(wanted["value"], rel=RELATIVE_GRADIENT, abs=1e-9)


def test_widths_are_matched_in_units_of_the_width():
    """The official program scales all four coordinates by the height, which is wrong unless images are square."""
    case = "ota_p5"
    facts = GOLDEN[case]
    raws = golden_raws(case, facts, heads=1)
    right, official = (
        loss_of(facts, official_height=official)(raws, golden_targets(case)).total.item() for official in (False, True)
    )
    assert right != pytest.approx(official, rel=1e-3)


# --- matching against the obvious loop ------------------------------------------------------------------------------


def obvious_match(predictions, truth, most):
    """Image by image, target by target, as the paper's text has it."""
    positives = {}
    for image in truth.image.unique().tolist():
        rows = (truth.image == image).nonzero().flatten().tolist()
        columns = (predictions.image == image).nonzero().flatten().tolist()
        if not columns:
            continue
        cost, overlap = torch.zeros(len(rows), len(columns)), torch.zeros(len(rows), len(columns))
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                overlap[i, j] = plain_iou(truth.boxes[row], predictions.boxes[column])
                probability = predictions.classes[column].double().sigmoid()
                y = (probability * predictions.objectness[column].double().sigmoid()).sqrt()
                wanted = torch.zeros_like(y)
                wanted[truth.class_ids[row]] = 1
                class_cost = torch.nn.functional.binary_cross_entropy(y, wanted, reduction="sum")
                cost[i, j] = class_cost - 3 * math.log(overlap[i, j] + 1e-8)
        marks = torch.zeros_like(cost, dtype=torch.bool)
        for i in range(len(rows)):
            wanted = max(1, int(overlap[i].sort(descending=True).values[:most].sum()))
            marks[i, cost[i].argsort()[:wanted]] = True
        for j, column in enumerate(columns):
            if marks[:, j].sum() > 1:
                positives[column] = rows[int(cost[:, j].argmin())]
            elif marks[:, j].any():
                positives[column] = rows[int(marks[:, j].nonzero())]
    order = sorted(positives)
    return order, [positives[column] for column in order]


def plain_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, float(width)) * max(0.0, float(height))
    areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (a, b)]
    return shared / (sum(areas) - shared)


def random_scene(seed, *, images=4, targets=9, candidates=60, classes=5):
    random = np.random.default_rng(seed)

    def boxes(count):
        centre, sides = random.uniform(20, 80, (count, 2)), random.uniform(10, 40, (count, 2))
        return torch.tensor(np.concatenate([centre - sides / 2, centre + sides / 2], 1), dtype=torch.float32)

    predictions = Predictions(
        boxes=boxes(candidates),
        objectness=torch.tensor(random.normal(0, 2, candidates), dtype=torch.float32),
        classes=torch.tensor(random.normal(0, 2, (candidates, classes)), dtype=torch.float32),
        image=torch.tensor(random.integers(0, images, candidates)),
    )
    truth = GroundTruth(
        boxes=boxes(targets),
        class_ids=torch.tensor(random.integers(0, classes, targets)),
        image=torch.tensor(random.integers(0, images + 1, targets)),  # the last image has no candidates
    )
    return predictions, truth


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("most", [2, 10])
def test_matching_is_that_of_the_obvious_loop(seed, most):
    predictions, truth = random_scene(seed)
    positives, targets = match(predictions, truth, most=most)
    assert (positives.tolist(), targets.tolist()) == obvious_match(predictions, truth, most)


def test_matching_in_small_parts_is_the_same(monkeypatch):
    predictions, truth = random_scene(3, targets=20, candidates=200)
    whole = match(predictions, truth, most=10)
    monkeypatch.setattr("yolov7_deploy.training.assignment.PAIRS_AT_ONCE", 100)
    parts = match(predictions, truth, most=10)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_certain_predictions_cost_nothing_infinite():
    predictions, truth = random_scene(0, images=1)
    sure = Predictions(
        boxes=predictions.boxes,
        objectness=torch.full_like(predictions.objectness, 200.0),
        classes=torch.full_like(predictions.classes, 200.0),
        image=torch.zeros_like(predictions.image),
    )
    positives, _ = match(sure, truth, most=10)
    assert len(positives)


# --- candidates -----------------------------------------------------------------------------------------------------


def cells_of(reach, x, y, grid=(10, 10)):
    """Cells proposed for one target at (x, y) in cells, as (column, row)."""
    target = torch.tensor([[0, 0, x / grid[1], y / grid[0], 0.2, 0.2]])
    found = find_candidates(target, [grid], torch.full((1, 3, 2), 2.0), anchor_t=4.0, reach=reach)[0]
    first = found.anchor == 0
    return set(zip(found.column[first].tolist(), found.row[first].tolist(), strict=True))


def test_a_fine_target_has_its_cell_and_the_nearer_neighbours():
    assert cells_of(FINE, 5.2, 5.8) == {(5, 5), (4, 5), (5, 6)}


def test_a_coarse_target_has_all_four_neighbours():
    assert cells_of(COARSE, 5.2, 5.8) == {(5, 5), (4, 5), (6, 5), (5, 4), (5, 6)}


@pytest.mark.parametrize("reach", [FINE, COARSE])
def test_no_cell_is_outside_of_the_grid(reach):
    for x, y in ((0.1, 0.1), (9.9, 9.9), (0.1, 9.9), (9.99, 5.5)):
        assert all(0 <= column < 10 and 0 <= row < 10 for column, row in cells_of(reach, x, y))


def test_anchors_of_another_size_are_no_candidates():
    target = torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2]])  # 2 cells
    anchors = torch.tensor([[[2.0, 2.0], [7.9, 2.0], [8.1, 2.0]]])
    found = find_candidates(target, [(10, 10)], anchors, anchor_t=4.0, reach=FINE)[0]
    assert set(found.anchor.tolist()) == {0, 1}


# --- the ablations of tables 6, 7 and 8 -----------------------------------------------------------------------------


def labels_of(**options):
    case = "aux_p6"
    facts = GOLDEN[case]
    raws = golden_raws(case, facts, heads=2)
    lead, auxiliary = raws[:4], raws[4:]
    loss = loss_of(facts, **options)
    with torch.no_grad():
        fine, coarse = loss.positives(lead, auxiliary, golden_targets(case))
    return [level.cell.tolist() for level in fine], [level.cell.tolist() for level in coarse]


def test_lead_guided_heads_share_their_positives():
    fine, coarse = labels_of(assigner="lead-guided")
    assert fine == coarse


def test_independent_heads_have_positives_of_their_own():
    fine, own = labels_of(assigner="independent")
    assert fine == labels_of(assigner="lead-guided")[0]
    assert own != fine


def test_coarse_positives_are_taken_from_more_cells():
    fine, coarse = labels_of(assigner="coarse-to-fine")
    assert fine == labels_of(assigner="lead-guided")[0]
    assert coarse != fine
    facts = GOLDEN["aux_p6"]
    grids = [(facts["height"] // int(stride), facts["width"] // int(stride)) for stride in facts["stride"]]
    anchors = loss_of(facts).anchors
    found = [
        find_candidates(golden_targets("aux_p6"), grids, anchors, anchor_t=4.0, reach=reach) for reach in (FINE, COARSE)
    ]
    for level, reached in enumerate(coarse):
        near, far = (set(levels[level].cell.tolist()) for levels in found)
        assert set(reached) <= far and near < far
    assert any(set(a) - set(b) for a, b in zip(coarse, fine, strict=True))


def test_the_constraint_keeps_far_cells_from_fitting():
    """A target's centre is -1 to 2 cells from a coarse cell: with the constraint a prediction cannot get there."""
    extremes = torch.tensor([[-20.0, 20.0, 0.0, 0.0, 0.0], [20.0, -20.0, 0.0, 0.0, 0.0]])
    anchors = torch.ones(2, 2)
    near, far = (decoded(extremes, anchors, reach=reach)[0] for reach in (FINE, COARSE))
    assert near.flatten().tolist() == pytest.approx([-0.5, 1.5, 1.5, -0.5])
    assert far.flatten().tolist() == pytest.approx([-1, 2, 2, -1])


def test_without_the_constraint_only_auxiliary_heads_change():
    case = "aux_p6"
    raws = golden_raws(case, GOLDEN[case], heads=2)
    gradients = []
    for constraint in (True, False):
        loss_of(GOLDEN[case], constraint=constraint)(raws, golden_targets(case)).total.backward()
        gradients.append([raw.grad.clone() for raw in raws])
        for raw in raws:
            raw.grad = None
    same = [torch.equal(a, b) for a, b in zip(*gradients, strict=True)]
    assert same == [True] * 4 + [False] * 3 + [True]  # no target of these reaches the coarsest level


def test_an_unknown_assigner_is_named():
    with pytest.raises(UsageError, match="middle"):
        LossOptions(assigner="middle")


# --- single terms ---------------------------------------------------------------------------------------------------


def test_an_empty_batch_has_a_loss_of_objectness_only():
    facts = GOLDEN["ota_p5"]
    raws = golden_raws("ota_p5", facts, heads=1)
    parts = loss_of(facts)(raws, torch.zeros(0, 6))
    parts.total.backward()
    assert (parts.box.item(), parts.classes.item(), parts.positives) == (0, 0, 0)
    assert all(raw.grad[..., 4].abs().min() > 0 and not raw.grad[..., :4].any() for raw in raws)


def test_complete_iou_of_equal_boxes_is_one_and_falls_with_distance():
    centre, sides = torch.zeros(4, 2), torch.ones(4, 2)
    others = torch.tensor([[0.0, 0.0], [0.2, 0.0], [1.0, 1.0], [9.0, 0.0]])
    values = complete_iou(centre, sides, others, sides)
    assert values[0].item() == pytest.approx(1, abs=1e-5)
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    assert -1.5 <= values.min().item() < 0


def test_gains_are_scaled_to_levels_classes_and_size():
    """Spec: P6 at 1280 pixels."""
    scaled = scaled_gains(Hyperparameters(), levels=4, classes=80, size=1280)
    assert (scaled.box, scaled.cls, scaled.obj) == pytest.approx((0.0375, 0.225, 2.1))


def test_of_several_targets_in_one_cell_the_last_gives_the_objectness():
    wanted = _last_written(torch.zeros(6), torch.tensor([4, 1, 4, 2, 4]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert wanted.tolist() == pytest.approx([0, 0.2, 0.4, 0, 0.5, 0])
