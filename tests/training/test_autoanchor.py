"""Anchors: how their fit is measured, and that new anchors are better and deterministic."""

from pathlib import Path

import numpy as np
import pytest

from yolov7_deploy.datasets.samples import Dataset, Labels, Record
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.training import autoanchor as anchors_module
from yolov7_deploy.training.autoanchor import (
    anchor_fitness,
    evaluate_anchors,
    evolve_anchors,
    fit_anchors,
    kmeans_sizes,
    worst_side_ratios,
)

FLOAT32 = 1e-5
ANCHORS = (((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)), ((62.0, 45.0), (116.0, 90.0), (373.0, 326.0)))


def dataset_of(images):
    """Return a dataset of images (image_hw, boxes as fractions of width and height [N, 2])."""
    records = []
    for index, (image_hw, sizes) in enumerate(images):
        sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
        labels = Labels(
            boxes=np.concatenate([0.5 - sizes / 2, 0.5 + sizes / 2], axis=1),
            class_ids=np.zeros(len(sizes), np.int64),
            crowd=np.zeros(len(sizes), bool),
            polygons=(np.zeros((0, 2)),) * len(sizes),
        )
        records.append(Record(path=Path(f"{index}.png"), image_id=index, image_hw=image_hw, labels=labels))
    return Dataset(records, source="data.yaml", class_names=("thing",), category_ids=(0,))


def random_dataset(count, seed=0):
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.normal([-2.0, -2.3], [0.7, 0.5], (count, 2))).clip(0.01, 1)
    return dataset_of([((480, 640), sides[i : i + 5]) for i in range(0, count, 5)])


def slow_fit(images, anchors, size, anchor_t):
    """Measure the fit box by box and anchor by anchor."""
    found = matched = labels = 0
    for (height, width), sizes in images:
        for w, h in np.asarray(sizes) * [width, height] * size / max(height, width):
            hits = sum(max(w / aw, aw / w, h / ah, ah / h) < anchor_t for level in anchors for aw, ah in level)
            found, matched, labels = found + (hits > 0), matched + hits, labels + 1
    return found / labels, matched / labels, labels


def test_a_fit_compares_every_box_with_every_anchor():
    rng = np.random.default_rng(1)
    images = [((300, 400), rng.uniform(0.005, 1, (7, 2))), ((500, 200), rng.uniform(0.005, 0.2, (9, 2)))]
    fit = evaluate_anchors(dataset_of(images), ANCHORS, image_size=640, anchor_t=4.0)
    recall, mean, labels = slow_fit(images, ANCHORS, 640, 4.0)
    assert (fit.best_possible_recall, fit.boxes) == (recall, labels)
    assert fit.anchors_per_box == pytest.approx(mean) and 0 < recall < 1
    assert f"{recall:.2%} of 16 boxes" in fit.summary() and "16,30" in fit.summary()


def test_a_ratio_of_exactly_the_limit_does_not_match():
    boxes = [((100, 100), [[0.4, 0.4]])]
    for side, matches in ((10.0, False), (10.01, True)):
        fit = evaluate_anchors(dataset_of(boxes), (((side, 40.0),),), image_size=100, anchor_t=4.0)
        assert (fit.best_possible_recall == 1) == matches


def test_the_worst_side_ratio_is_the_smallest_of_four():
    sizes, anchors = np.array([[10.0, 20.0], [0.0, 5.0], [30.0, 30.0]]), np.array([[20.0, 20.0], [30.0, 30.0]])
    np.testing.assert_allclose(worst_side_ratios(sizes, anchors), [[0.5, 0, 2 / 3], [1 / 3, 0, 1]])


def test_fitness_is_the_mean_worst_ratio_of_the_boxes_that_match():
    rng = np.random.default_rng(2)
    sizes, anchors = rng.uniform(2, 600, (500, 2)), np.array(ANCHORS).reshape(-1, 2)
    best = worst_side_ratios(sizes, anchors).max(axis=0)
    expected = np.mean(best * (best > 1 / 4))
    found = anchor_fitness(np.log(sizes.T).astype(np.float32), anchors, anchor_t=4.0)
    assert found == pytest.approx(expected, abs=FLOAT32)


def test_means_are_the_centres_of_separate_clusters():
    rng = np.random.default_rng(3)
    centres = np.array([[20.0, 200.0], [100.0, 100.0], [300.0, 30.0]])
    sizes = (centres[:, None] + rng.normal(0, 1, (3, 50, 2))).reshape(-1, 2)
    found = kmeans_sizes(sizes, 3, rng=rng)
    expected = sizes.reshape(3, 50, 2).mean(axis=1)
    np.testing.assert_allclose(found[np.argsort(found[:, 0])], expected, rtol=FLOAT32)


def test_means_are_the_means_of_their_own_points():
    sizes = np.random.default_rng(4).uniform(5, 100, (300, 2))
    found = kmeans_sizes(sizes, 5, rng=np.random.default_rng(0))
    deviations = sizes.std(axis=0)
    owner = np.linalg.norm((sizes[:, None] - found) / deviations, axis=2).argmin(axis=1)
    np.testing.assert_allclose(found, [sizes[owner == i].mean(axis=0) for i in range(5)], rtol=1e-4)


def test_equal_sizes_give_equal_means():
    found = kmeans_sizes(np.full((12, 2), 30.0), 3, rng=np.random.default_rng(0))
    np.testing.assert_allclose(found, 30, rtol=FLOAT32)


def test_mutations_only_improve_the_fitness():
    sizes, rng = np.random.default_rng(5).uniform(5, 300, (200, 2)), np.random.default_rng(0)
    before = np.array(ANCHORS).reshape(-1, 2)
    after = evolve_anchors(sizes, before, anchor_t=4.0, rng=rng)
    log_sizes = np.log(sizes.T).astype(np.float32)
    fitness = [anchor_fitness(log_sizes, anchors, anchor_t=4.0) for anchors in (before, after)]
    assert fitness[1] > fitness[0] + 0.05
    assert after.min() >= 2


def test_fitted_anchors_match_more_boxes_than_anchors_of_another_dataset():
    thin = dataset_of([((640, 640), np.random.default_rng(6).uniform([0.2, 0.005], [0.9, 0.02], (300, 2)))])
    official = VARIANTS["yolov7-tiny"].anchors
    fitted = fit_anchors(thin, levels=3, image_size=640, anchor_t=4.0, seed=0)
    before, after = (evaluate_anchors(thin, anchors, image_size=640, anchor_t=4.0) for anchors in (official, fitted))
    assert before.best_possible_recall < 0.1 and after.best_possible_recall > 0.99


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_there_are_three_anchors_per_level_from_small_to_large(levels):
    fitted = fit_anchors(random_dataset(200), levels=levels, image_size=640, anchor_t=4.0, seed=0)
    assert [len(level) for level in fitted] == [3] * levels
    areas = [width * height for level in fitted for width, height in level]
    assert areas == sorted(areas)


def test_the_same_seed_gives_the_same_anchors(monkeypatch):
    monkeypatch.setattr(anchors_module, "MAX_BOXES", 100)  # of 200: the choice is random, too
    dataset = random_dataset(200)
    one, same, other = (fit_anchors(dataset, levels=3, image_size=640, anchor_t=4.0, seed=seed) for seed in (3, 3, 4))
    assert one == same != other


def test_fewer_boxes_than_anchors_are_refused():
    small = [[0.001, 0.001]] * 20  # less than two pixels
    dataset = dataset_of([((640, 640), [[0.1, 0.1]] * 8 + small)])
    with pytest.raises(DatasetError, match="8 boxes of at least 2 pixels at image size 640, too few for 9 anchors"):
        fit_anchors(dataset, levels=3, image_size=640, anchor_t=4.0, seed=0)
    with pytest.raises(DatasetError, match="no box"):
        evaluate_anchors(dataset_of([((640, 640), [])]), ANCHORS, image_size=640, anchor_t=4.0)
