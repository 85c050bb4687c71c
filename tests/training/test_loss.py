"""The losses against official values, SimOTA against a simple loop, and the assignments of the paper's ablations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.deterministic import centred, uniform
from yolov7_deploy.errors import UsageError
from yolov7_deploy.training.assignment import COARSE, FINE, GroundTruth, Predictions, assign_simota, find_candidates
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.loss import (
    DetectionLoss,
    LossOptions,
    _scatter_last,
    complete_iou,
    decode_boxes,
    scale_gains,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "loss.json").read_text())
CASES = sorted(GOLDEN)
LOSS_TOLERANCE = 1e-4  # relative; float32 gives 1e-7
GRADIENT_TOLERANCE = 1e-3


def golden_targets(case):
    u = uniform("targets:" + case, (17, 6))
    sides = np.float32(0.02) + np.float32(0.5) * u[:, 4:6] ** 2
    centre = sides / 2 + u[:, 2:4] * (1 - sides)
    image, class_ids = np.sort((u[:, :1] * 3).astype(int), axis=0), (u[:, 1:2] * 80).astype(int)
    return torch.tensor(np.concatenate([image, class_ids, centre, sides], 1).astype(np.float32))


def golden_raw_outputs(case, facts, heads):
    raw_outputs = []
    for head in range(heads):
        for level, stride in enumerate(map(int, facts["stride"])):
            shape = (3, 3, facts["height"] // stride, facts["width"] // stride, 85)
            raw = 3 * centred(f"{case}:p{head}{level}", shape)
            raw[..., 4] -= 2
            raw_outputs.append(torch.tensor(raw, requires_grad=True))
    return raw_outputs


def new_loss(facts, **options):
    strides = [int(stride) for stride in facts["stride"]]
    anchors = torch.tensor(facts["anchors"], dtype=torch.float32).reshape(len(strides), 3, 2)
    hyp = {name: facts["hyp"][name] for name in ("box", "cls", "obj", "anchor_t")}
    return DetectionLoss(
        anchors / torch.tensor(strides).view(-1, 1, 1),
        strides=strides,
        classes=facts["nc"],
        gains=Hyperparameters(**hyp),
        options=LossOptions(**options),
        distributed=DistributedContext(),
    )


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_those_of_the_official_program(case):
    facts = GOLDEN[case]
    raw_outputs = golden_raw_outputs(case, facts, heads=len(facts["grads"]) // len(facts["stride"]))
    parts = new_loss(facts, ota=not case.startswith("plain"), official_height=True)(raw_outputs, golden_targets(case))
    parts.total.backward()
    assert parts.total.item() == pytest.approx(facts["loss"], rel=LOSS_TOLERANCE)
    losses = [parts.box.item(), parts.obj.item(), parts.cls.item()]
    assert losses == pytest.approx(facts["items"][:3], rel=LOSS_TOLERANCE)
    for raw, expected in zip(raw_outputs, facts["grads"], strict=True):
        gradient = raw.grad.flatten().double()
        assert list(raw.shape) == expected["shape"]
        assert int(gradient.count_nonzero()) == expected["nonzero"]
        assert gradient.sum().item() == pytest.approx(expected["sum"], rel=GRADIENT_TOLERANCE)
        assert gradient.abs().sum().item() == pytest.approx(expected["abssum"], rel=GRADIENT_TOLERANCE)
        samples = gradient[torch.tensor(expected["index"])].tolist()
        assert samples == pytest.approx(expected["value"], rel=GRADIENT_TOLERANCE, abs=1e-9)


def test_target_widths_are_in_units_of_the_image_width():
    """The official program scales all four coordinates by the height, which is wrong for images that are not square."""
    case = "ota_p5"
    facts = GOLDEN[case]
    raw_outputs = golden_raw_outputs(case, facts, heads=1)
    ours, official = (
        new_loss(facts, official_height=official)(raw_outputs, golden_targets(case)).total.item()
        for official in (False, True)
    )
    assert ours != pytest.approx(official, rel=1e-3)


# --- SimOTA against a simple loop -------------------------------------------------------------------------------------


def simple_simota(predictions, truth, top_k):
    """Compute SimOTA image by image and target by target, as the paper describes it."""
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
                labels = torch.zeros_like(y)
                labels[truth.class_ids[row]] = 1
                class_cost = torch.nn.functional.binary_cross_entropy(y, labels, reduction="sum")
                cost[i, j] = class_cost - 3 * math.log(overlap[i, j] + 1e-8)
        marks = torch.zeros_like(cost, dtype=torch.bool)
        for i in range(len(rows)):
            dynamic_k = max(1, int(overlap[i].sort(descending=True).values[:top_k].sum()))
            marks[i, cost[i].argsort()[:dynamic_k]] = True
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


def random_case(seed, *, images=4, targets=9, candidates=60, classes=5):
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
@pytest.mark.parametrize("top_k", [2, 10])
def test_simota_equals_the_simple_loop(seed, top_k):
    predictions, truth = random_case(seed)
    positives, targets = assign_simota(predictions, truth, top_k=top_k)
    assert (positives.tolist(), targets.tolist()) == simple_simota(predictions, truth, top_k)


def test_the_assignment_does_not_depend_on_the_chunk_size(monkeypatch):
    predictions, truth = random_case(3, targets=20, candidates=200)
    expected = assign_simota(predictions, truth, top_k=10)
    monkeypatch.setattr("yolov7_deploy.training.assignment.MAX_PAIRS", 100)
    chunked = assign_simota(predictions, truth, top_k=10)
    assert all(torch.equal(a, b) for a, b in zip(expected, chunked, strict=True))


def test_certain_predictions_have_finite_costs():
    predictions, truth = random_case(0, images=1)
    certain = Predictions(
        boxes=predictions.boxes,
        objectness=torch.full_like(predictions.objectness, 200.0),
        classes=torch.full_like(predictions.classes, 200.0),
        image=torch.zeros_like(predictions.image),
    )
    positives, _ = assign_simota(certain, truth, top_k=10)
    assert len(positives)


# --- candidates -------------------------------------------------------------------------------------------------------


def candidate_cells(offset, x, y, grid=(10, 10)):
    """Return the candidate cells (column, row) of a target at (x, y) in cells."""
    target = torch.tensor([[0, 0, x / grid[1], y / grid[0], 0.2, 0.2]])
    candidates = find_candidates(target, [grid], torch.full((1, 3, 2), 2.0), anchor_t=4.0, offset=offset)[0]
    first = candidates.anchor == 0
    return set(zip(candidates.column[first].tolist(), candidates.row[first].tolist(), strict=True))


def test_fine_candidates_are_the_own_cell_and_the_nearer_neighbours():
    assert candidate_cells(FINE, 5.2, 5.8) == {(5, 5), (4, 5), (5, 6)}


def test_coarse_candidates_are_the_own_cell_and_its_four_neighbours():
    assert candidate_cells(COARSE, 5.2, 5.8) == {(5, 5), (4, 5), (6, 5), (5, 4), (5, 6)}


@pytest.mark.parametrize("offset", [FINE, COARSE])
def test_candidates_are_inside_the_grid(offset):
    for x, y in ((0.1, 0.1), (9.9, 9.9), (0.1, 9.9), (9.99, 5.5)):
        assert all(0 <= column < 10 and 0 <= row < 10 for column, row in candidate_cells(offset, x, y))


def test_anchors_of_a_too_different_size_are_not_candidates():
    target = torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2]])  # 2 cells
    anchors = torch.tensor([[[2.0, 2.0], [7.9, 2.0], [8.1, 2.0]]])
    candidates = find_candidates(target, [(10, 10)], anchors, anchor_t=4.0, offset=FINE)[0]
    assert set(candidates.anchor.tolist()) == {0, 1}


# --- the ablations of tables 6, 7 and 8 -------------------------------------------------------------------------------


def assigned_indices(**options):
    case = "aux_p6"
    facts = GOLDEN[case]
    raw_outputs = golden_raw_outputs(case, facts, heads=2)
    lead, auxiliary = raw_outputs[:4], raw_outputs[4:]
    loss = new_loss(facts, **options)
    with torch.no_grad():
        fine, coarse = loss.assign(lead, auxiliary, golden_targets(case))
    return [level.flat_index.tolist() for level in fine], [level.flat_index.tolist() for level in coarse]


def test_lead_guided_auxiliary_heads_have_the_positives_of_the_lead_head():
    fine, coarse = assigned_indices(assigner="lead-guided")
    assert fine == coarse


def test_independent_auxiliary_heads_have_other_positives():
    fine, own = assigned_indices(assigner="independent")
    assert fine == assigned_indices(assigner="lead-guided")[0]
    assert own != fine


def test_coarse_positives_come_from_more_cells():
    fine, coarse = assigned_indices(assigner="coarse-to-fine")
    assert fine == assigned_indices(assigner="lead-guided")[0]
    assert coarse != fine
    facts = GOLDEN["aux_p6"]
    grids = [(facts["height"] // int(stride), facts["width"] // int(stride)) for stride in facts["stride"]]
    anchors = new_loss(facts).anchors
    candidates = [
        find_candidates(golden_targets("aux_p6"), grids, anchors, anchor_t=4.0, offset=offset)
        for offset in (FINE, COARSE)
    ]
    for level, indices in enumerate(coarse):
        near, far = (set(levels[level].flat_index.tolist()) for levels in candidates)
        assert set(indices) <= far and near < far
    assert any(set(a) - set(b) for a, b in zip(coarse, fine, strict=True))


def test_the_constraint_limits_predicted_centres():
    """A target's centre is -1 to 2 cells from a coarse cell; with the constraint a prediction cannot reach that far."""
    extremes = torch.tensor([[-20.0, 20.0, 0.0, 0.0, 0.0], [20.0, -20.0, 0.0, 0.0, 0.0]])
    anchors = torch.ones(2, 2)
    near, far = (decode_boxes(extremes, anchors, offset=offset)[0] for offset in (FINE, COARSE))
    assert near.flatten().tolist() == pytest.approx([-0.5, 1.5, 1.5, -0.5])
    assert far.flatten().tolist() == pytest.approx([-1, 2, 2, -1])


def test_the_constraint_affects_auxiliary_heads_only():
    case = "aux_p6"
    raw_outputs = golden_raw_outputs(case, GOLDEN[case], heads=2)
    gradients = []
    for constraint in (True, False):
        new_loss(GOLDEN[case], constraint=constraint)(raw_outputs, golden_targets(case)).total.backward()
        gradients.append([raw.grad.clone() for raw in raw_outputs])
        for raw in raw_outputs:
            raw.grad = None
    same = [torch.equal(a, b) for a, b in zip(*gradients, strict=True)]
    assert same == [True] * 4 + [False] * 3 + [True]  # none of these targets is assigned to the coarsest level


def test_an_unknown_assigner_is_refused():
    with pytest.raises(UsageError, match="middle"):
        LossOptions(assigner="middle")


# --- single terms -----------------------------------------------------------------------------------------------------


def test_a_batch_without_targets_has_an_objectness_loss_only():
    facts = GOLDEN["ota_p5"]
    raw_outputs = golden_raw_outputs("ota_p5", facts, heads=1)
    parts = new_loss(facts)(raw_outputs, torch.zeros(0, 6))
    parts.total.backward()
    assert (parts.box.item(), parts.cls.item(), parts.positives) == (0, 0, 0)
    assert all(raw.grad[..., 4].abs().min() > 0 and not raw.grad[..., :4].any() for raw in raw_outputs)


def test_complete_iou_is_one_for_equal_boxes_and_falls_with_distance():
    centre, sides = torch.zeros(4, 2), torch.ones(4, 2)
    others = torch.tensor([[0.0, 0.0], [0.2, 0.0], [1.0, 1.0], [9.0, 0.0]])
    values = complete_iou(centre, sides, others, sides)
    assert values[0].item() == pytest.approx(1, abs=1e-5)
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    assert -1.5 <= values.min().item() < 0


def test_gains_are_scaled_to_levels_classes_and_image_size():
    """Compare with the official gains of a P6 model at 1280 pixels."""
    scaled = scale_gains(Hyperparameters(), levels=4, classes=80, image_size=1280)
    assert (scaled.box, scaled.cls, scaled.obj) == pytest.approx((0.0375, 0.225, 2.1))


def test_the_last_target_of_a_cell_sets_its_objectness():
    objectness = _scatter_last(torch.zeros(6), torch.tensor([4, 1, 4, 2, 4]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert objectness.tolist() == pytest.approx([0, 0.2, 0.4, 0, 0.5, 0])
