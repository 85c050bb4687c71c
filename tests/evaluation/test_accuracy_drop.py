"""The drop in AP between two detectors: compared with the slow computation and with simulations, and its summary."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.datasets.samples import Dataset, Labels, Record
from yolov7_deploy.errors import DatasetError, UsageError
from yolov7_deploy.evaluation.accuracy import compute_coco_metrics
from yolov7_deploy.evaluation.accuracy_drop import AccuracyDrop, accuracy_drop, summarize_drop

SIDE = 200  # width and height of an image, in pixels
SAME_SUMS = 1e-12  # the same float64 numbers, possibly added in another order
SETS = 60
SPREAD_TOLERANCE = 3 / math.sqrt(2 * SETS)  # three standard errors of a standard deviation from SETS samples
MAX_OVERESTIMATE = 0.1  # a jackknife overestimates (Efron and Stein 1981); here by 5 to 20 %
MIN_COVERAGE = 0.95 - 3 * math.sqrt(0.95 * 0.05 / SETS)
T_DIGITS = 3e-4  # printed tables of Student's t have four decimals; the formula is right to 2e-4


def make_image(image_id, boxes_xyxy, class_ids, *, crowd=False):
    boxes = np.array(boxes_xyxy, np.float64).reshape(-1, 4)
    labels = Labels(
        boxes=boxes / SIDE,
        class_ids=np.array(class_ids, np.int64),
        crowd=np.full(len(boxes), crowd),
        polygons=tuple(np.zeros((0, 2)) for _ in boxes),
    )
    return Record(path=Path(f"{image_id}.png"), image_id=image_id, image_hw=(SIDE, SIDE), labels=labels)


def images(records, classes=2):
    names, ids = tuple(f"class {i}" for i in range(classes)), tuple(range(1, classes + 1))
    return Dataset(records, source="drawn", class_names=names, category_ids=ids)


def result(image_id, box_xyxy, score, class_id):
    x1, y1, x2, y2 = (float(side) for side in box_xyxy)
    return {"image_id": image_id, "category_id": int(class_id) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


def drawn(rng, count, *, classes=2, noise=0.6):
    """Return images with boxes, results of a detector with hits and false positives, and the same with noisy scores.

    Every fifth image is hard, and class 0 is more frequent than the last.
    """
    records, reference, other = [], [], []
    for image_id in range(1, count + 1):
        objects, false = rng.poisson(4), rng.poisson(3)
        corners = rng.uniform(0, SIDE / 2, (objects + false, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, SIDE / 2, corners.shape)], axis=1)
        class_ids = (rng.uniform(0, 1, len(boxes)) ** 2 * classes).astype(np.int64)
        records.append(make_image(image_id, boxes[:objects], class_ids[:objects]))
        found = boxes + rng.normal(0, 4, boxes.shape)
        confidence = rng.normal(np.where(np.arange(len(boxes)) < objects, 1.5 - 2 * (image_id % 5 == 0), -0.5), 1)
        for results, logits in ((reference, confidence), (other, confidence + rng.normal(0, noise, len(confidence)))):
            scores = 1 / (1 + np.exp(-logits))
            results += [result(image_id, *row) for row in zip(found, scores.tolist(), class_ids, strict=True)]
    return images(records, classes), reference, other


@pytest.fixture(scope="module")
def compared():
    return drawn(np.random.default_rng(0), 30, classes=6)


def test_ids_of_many_digits_are_different_images(two_cats):
    dataset, reference, other = two_cats
    records = [replace(dataset.record(i), image_id=10**17 + i) for i in range(2)]
    renamed = [[row | {"image_id": 10**17 - 1 + row["image_id"]} for row in rows] for rows in (reference, other)]
    drop = accuracy_drop(images(records), [0, 1], *renamed, groups=2)
    assert drop == accuracy_drop(dataset, [0, 1], reference, other, groups=2) and drop.points > 0


@pytest.fixture
def two_cats():
    """Two images with one box each, found by the first detector and in the first image only by the second."""
    box = (10, 10, 60, 60)
    dataset = images([make_image(1, [box], [0]), make_image(2, [box], [0])])
    reference = [result(1, box, 0.9, 0), result(2, box, 0.8, 0)]
    return dataset, reference, reference[:1]


def of(dataset, indices, predictions):
    ids = {dataset.image_id(i) for i in indices}
    return [row for row in predictions if row["image_id"] in ids]


def evaluated(dataset, indices, predictions):
    return compute_coco_metrics(dataset, indices, of(dataset, indices, predictions))[0]["ap"]


def with_all(compared):
    dataset, reference, other = compared
    return dataset, range(len(dataset)), reference, other


def a_drop(points=0.4, error=0.2, *, margin=None, images=100, reference_ap=0.5):
    margin = 2 * error if margin is None else margin
    return AccuracyDrop(
        reference_ap=reference_ap,
        ap=reference_ap - points / 100,
        points=points,
        standard_error=error,
        low=points - margin,
        high=points + margin,
        images=images,
    )


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 7, 20, 30])
def test_the_drop_and_its_error_equal_those_of_evaluating_without_each_group(compared, groups):
    dataset, *detectors = compared
    order = np.random.default_rng(1).permutation(len(dataset)).tolist()
    before, after = (evaluated(dataset, order, predictions) for predictions in detectors)
    drops = []
    for group in range(groups):
        kept = [index for i, index in enumerate(order) if i % groups != group]
        drops.append(100 * (evaluated(dataset, kept, detectors[0]) - evaluated(dataset, kept, detectors[1])))
    mean = sum(drops) / groups
    error = math.sqrt((groups - 1) / groups * sum((drop - mean) ** 2 for drop in drops))
    drop = accuracy_drop(dataset, order, *detectors, groups=groups)
    assert (drop.reference_ap, drop.ap) == pytest.approx((before, after), abs=SAME_SUMS)
    assert drop.points == pytest.approx(100 * (before - after), abs=100 * SAME_SUMS) and drop.points != 0
    assert drop.standard_error == pytest.approx(error, rel=1e-9) and error > 0.1
    assert drop.images == 30


@pytest.mark.parametrize(("groups", "quantile"), [(2, 12.7062), (3, 4.3027), (10, 2.2622), (11, 2.2281), (20, 2.0930)])
def test_the_interval_is_student_t_times_the_error_on_both_sides(compared, groups, quantile):
    drop = accuracy_drop(*with_all(compared), groups=groups)
    assert (drop.high - drop.points) / drop.standard_error == pytest.approx(quantile, abs=T_DIGITS)
    assert (drop.points - drop.low) / drop.standard_error == pytest.approx(quantile, abs=T_DIGITS)


def test_a_class_in_one_group_only_drops_out_of_the_mean_with_it(two_cats):
    dataset, reference, _ = two_cats
    dog = (100, 100, 160, 160)
    dataset = images([*(dataset._records), make_image(3, [dog], [1])])
    reference = [*reference, result(3, dog, 0.9, 1)]
    drop = accuracy_drop(dataset, range(3), reference, reference[:2])
    # without image 1 or 2 the dog is half of the lost AP, without image 3 no AP is lost
    assert drop.points == pytest.approx(50)
    assert drop.standard_error == pytest.approx(math.sqrt(2 / 3 * (2 * (50 - 100 / 3) ** 2 + (100 / 3) ** 2)))


def test_the_same_predictions_have_no_drop_and_no_error(compared):
    dataset, reference, _ = compared
    drop = accuracy_drop(dataset, range(len(dataset)), reference, copy.deepcopy(reference))
    assert (drop.points, drop.standard_error, drop.low, drop.high) == (0, 0, 0, 0)
    assert drop.verdict(0) == "within"


def test_swapped_detectors_have_the_negative_drop_and_the_same_error(compared):
    dataset, indices, reference, other = with_all(compared)
    drop, gain = accuracy_drop(dataset, indices, reference, other), accuracy_drop(dataset, indices, other, reference)
    assert (gain.points, gain.low, gain.high) == pytest.approx((-drop.points, -drop.high, -drop.low), abs=1e-10)
    assert gain.standard_error == pytest.approx(drop.standard_error)


def test_predictions_of_other_images_are_ignored(compared):
    dataset, _, reference, other = with_all(compared)
    some = range(3, 20)
    assert accuracy_drop(dataset, some, reference, other) == accuracy_drop(
        dataset, some, of(dataset, some, reference), of(dataset, some, other)
    )


def test_a_detector_without_detections_loses_all_ap(compared):
    dataset, indices, reference, _ = with_all(compared)
    drop = accuracy_drop(dataset, indices, reference, [])
    assert drop.ap == 0 and drop.points == 100 * drop.reference_ap
    assert drop.verdict(0.3) == "above"


def test_fewer_images_than_groups_are_a_group_each(compared):
    arguments = with_all(compared)
    assert accuracy_drop(*arguments, groups=1000) == accuracy_drop(*arguments, groups=30)
    assert accuracy_drop(*arguments, groups=30) != accuracy_drop(*arguments)


def test_the_predictions_are_not_modified(compared):
    before = copy.deepcopy(compared[1:])
    accuracy_drop(*with_all(compared))
    assert compared[1:] == before


# --- simulations ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_error_is_the_spread_over_other_images_and_19_of_20_intervals_contain_the_drop():
    rng = np.random.default_rng(2)
    drops = []
    for _ in range(SETS):
        dataset, reference, other = drawn(rng, 60)
        drops.append(accuracy_drop(dataset, range(len(dataset)), reference, other))
    points = np.array([drop.points for drop in drops])
    spread = points.std(ddof=1)
    error = math.sqrt(np.mean([drop.standard_error**2 for drop in drops]))
    coverage = np.mean([drop.low <= points.mean() <= drop.high for drop in drops])
    separate = 100 * np.std([(drop.reference_ap, drop.ap) for drop in drops], axis=0, ddof=1)
    assert spread * (1 - SPREAD_TOLERANCE) < error < spread * (1 + SPREAD_TOLERANCE + MAX_OVERESTIMATE)
    assert coverage >= MIN_COVERAGE
    assert error < 0.5 * math.hypot(*separate), "on the same images, so their difficulty cancels"


# --- without an interval ----------------------------------------------------------------------------------------------


def test_one_image_has_a_drop_but_no_error(two_cats):
    dataset, reference, other = two_cats
    drop = accuracy_drop(dataset, [1], reference, other)
    assert (drop.points, drop.images) == (pytest.approx(100), 1)
    assert (drop.standard_error, drop.low, drop.high) == (None, None, None)
    assert drop.verdict(0.3) == "inconclusive" and drop.verdict(200) == "inconclusive"


def test_one_group_has_a_drop_but_no_error(compared):
    assert accuracy_drop(*with_all(compared), groups=1).standard_error is None


def test_boxes_in_one_group_only_have_a_drop_but_no_error(two_cats):
    dataset, reference, _ = two_cats
    dataset = images([dataset._records[0], make_image(2, [], []), make_image(3, [], [])])
    drop = accuracy_drop(dataset, range(3), reference[:1], [])
    assert drop.points == pytest.approx(100) and drop.standard_error is None


def test_false_positives_in_images_without_boxes_count(two_cats):
    dataset, reference, _ = two_cats
    dataset = images([*dataset._records, make_image(3, [], [])])
    drop = accuracy_drop(dataset, range(3), reference, [*reference, result(3, (0, 0, 9, 9), 0.95, 0)])
    assert drop.points > 30 and drop.standard_error > 0


@pytest.mark.parametrize("indices", [[], [0], [0, 1]])
def test_images_without_ground_truth_are_an_error(indices):
    dataset = images([make_image(1, [], []), make_image(2, [(0, 0, 9, 9)], [0], crowd=True)])
    with pytest.raises(DatasetError, match=f"drawn has no ground truth boxes in the {len(indices)} images") as caught:
        accuracy_drop(dataset, indices, [], [])
    assert "Measure on more images" in caught.value.fix


def test_zero_groups_are_a_usage_error(two_cats):
    dataset, reference, other = two_cats
    with pytest.raises(UsageError, match="at least 1, not 0") as caught:
        accuracy_drop(dataset, range(2), reference, other, groups=0)
    assert caught.value.fix == "For example: groups=20"


# --- summary ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_drop", "verdict"),
    [(0.75, "within"), (0.74, "inconclusive"), (0.5, "inconclusive"), (0.25, "inconclusive"), (0.24, "above")],
)
def test_the_verdict_needs_the_whole_interval_on_one_side(max_drop, verdict):
    assert a_drop(0.5, 0.125).verdict(max_drop) == verdict  # 0.25 to 0.75


@pytest.mark.parametrize("indices", [range(2), [0]])
def test_a_drop_is_one_json_document(two_cats, indices):
    dataset, reference, other = two_cats
    drop = accuracy_drop(dataset, indices, reference, other)
    document = json.loads(json.dumps(drop.to_dict(), allow_nan=False))
    assert AccuracyDrop(**document) == drop
    assert set(document) == {"reference_ap", "ap", "points", "standard_error", "low", "high", "images"}


@pytest.mark.parametrize(
    ("drop", "text"),
    [
        (
            a_drop(0.1, 0.05, images=5000),
            "AP falls by 0.10 points (0.5000 to 0.4990) on 5,000 images; the 95 % interval of the drop is 0.00 to "
            "0.20. The whole interval is within the allowed 0.3 points.",
        ),
        (
            a_drop(-0.5, 0.2, margin=0.496),
            "AP rises by 0.50 points (0.5000 to 0.5050) on 100 images; the 95 % interval of the drop is -1.00 to "
            "0.00. The whole interval is within the allowed 0.3 points.",
        ),
        (
            a_drop(2, 0.5),
            "AP falls by 2.00 points (0.5000 to 0.4800) on 100 images; the 95 % interval of the drop is 1.00 to "
            "3.00. The whole interval is above the allowed 0.3 points.",
        ),
        (
            a_drop(0.1, 0.5, images=82),
            "AP falls by 0.10 points (0.5000 to 0.4990) on 82 images; the 95 % interval of the drop is -0.90 to "
            "1.10. 82 images cannot show whether more than 0.3 points are lost; about 2,500 could if the drop "
            "stayed the same.",  # 82 * (1.0 / 0.2)^2 = 2050
        ),
        (
            a_drop(0.3, 0.5),
            "AP falls by 0.30 points (0.5000 to 0.4970) on 100 images; the 95 % interval of the drop is -0.70 to "
            "1.30. The drop is so close to 0.3 that not even 100,000 images would show whether more than 0.3 points "
            "are lost.",
        ),
        (
            a_drop(0.29, 0.25),  # 100 * (0.5 / 0.01)^2 = 250,000
            "AP falls by 0.29 points (0.5000 to 0.4971) on 100 images; the 95 % interval of the drop is -0.21 to "
            "0.79. The drop is so close to 0.3 that not even 100,000 images would show whether more than 0.3 points "
            "are lost.",
        ),
    ],
)
def test_the_summary_has_the_drop_its_interval_and_the_verdict(drop, text):
    assert summarize_drop(drop, 0.3) == text


def test_the_summary_of_a_drop_without_an_interval_states_that(two_cats):
    dataset, reference, other = two_cats
    assert summarize_drop(accuracy_drop(dataset, [0], reference, other), 0.3) == (
        "AP falls by 0.00 points (1.0000 to 1.0000) on 1 image. With boxes in so few images there is no interval, "
        "so it is unknown whether more than 0.3 points are lost."
    )


@given(st.floats(-3, 3), st.floats(0.001, 3), st.integers(1, 50_000))
def test_the_number_of_images_in_the_summary_would_be_enough(points, margin, images):
    drop = a_drop(points, margin / 2, images=images)
    text = summarize_drop(drop, 0.3)
    if drop.verdict(0.3) != "inconclusive":
        assert "cannot" not in text and "not even" not in text
        return
    if "not even 100,000" in text:
        enough, expected = 100_000, "inconclusive"
    else:
        enough, expected = int(text.partition("about ")[2].split(" ")[0].replace(",", "")), None
        assert enough >= images
    # slightly less: the interval of just enough images ends exactly at the limit
    verdict = a_drop(points, margin / 2, margin=margin * math.sqrt(images / enough) * (1 - 1e-9)).verdict(0.3)
    assert verdict == expected if expected else verdict != "inconclusive"
