"""The CUDA NMS kernels on the CUDA emulation, against the NumPy reference.

The environment variable Y7_NMS_CASES=5000 sets the number of random cases.
"""

from dataclasses import replace

import numpy as np
import pytest

from tests.fakes.emulated_kernels import Heads, compile_emulated, emulated, run_nms, sigmoid_of
from tests.support.nms_cases import (
    BUILDS,
    CASES,
    DEFAULTS,
    assert_equals_the_reference,
    grid,
    kernels_of,
    one_random_case,
    random_heads,
)
from tests.support.slow_cases import some_fast

SIGMOID_ULPS = 2  # 2 for expf (CUDA C++ Programming Guide), and half an ulp for the division

CASES_OF_A_SIZE = 30

every_build = pytest.mark.parametrize("build", BUILDS)


@every_build
@pytest.mark.parametrize("part", some_fast(range(4), every=2))
def test_random_heads_equal_the_reference(build, part):
    number = list(BUILDS).index(build)
    seeds = range(part, CASES // len(BUILDS), 4)
    assert sum(one_random_case(kernels_of(build), [number, seed]) for seed in seeds)


# --- order and repetition -------------------------------------------------------------------------------------------


@every_build
@pytest.mark.parametrize("multi_label", [False, True])
def test_every_order_of_threads_gives_the_same_bytes(build, multi_label):
    """Crowded images with many ties, which need several tiles and, except with the shipped build, several lists."""
    heads = random_heads(np.random.default_rng(5), classes=20, pairs=6000)
    outputs = set()
    for seed in range(3 if build == "shipped" else 8):
        kernels_of(build).seed(seed)
        outputs.add(run_nms(kernels_of(build), heads, conf=0.01, multi_label=multi_label).bytes())
    assert len(outputs) == 1


def test_every_build_gives_the_same_bytes():
    heads = random_heads(np.random.default_rng(6), classes=3, pairs=6000)
    assert len({run_nms(kernels_of(build), heads, conf=0.01, iou=0.65).bytes() for build in BUILDS}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("threads", [128, 256, 1024])
def test_every_size_of_the_block_equals_the_reference(threads):
    """Sizes that no build above has, with lists that are too small for many of the images."""
    kernels = emulated("nms.cu", defines=(f"Y7_NMS_THREADS={threads}", "Y7_NMS_CAPACITY=1500"))
    assert sum(one_random_case(kernels, [threads, seed]) for seed in range(CASES_OF_A_SIZE))


@pytest.mark.parametrize("threads", [32, 96, 2048])
def test_other_sizes_of_the_block_do_not_compile(tmp_path, threads):
    with pytest.raises(AssertionError, match="is a power of two from 64 to 1024"):
        compile_emulated("nms.cu", defines=(f"Y7_NMS_THREADS={threads}",), flags=("-fsyntax-only",), folder=tmp_path)


def test_the_memory_layout_does_not_change_the_result():
    heads = random_heads(np.random.default_rng(7), classes=20)
    layouts = (None, 0, 1, 5)
    assert len({run_nms(kernels_of("64 threads"), replace(heads, padding=p), conf=0.01).bytes() for p in layouts}) == 1


def test_float16_maps_give_the_same_result_as_their_float32_values():
    heads = random_heads(np.random.default_rng(8), classes=2)
    float16_maps = tuple(array.astype(np.float16) for array in heads.maps)
    floats = tuple(array.astype(np.float32) for array in float16_maps)
    kernels = kernels_of("64 threads")
    ours, theirs = (run_nms(kernels, replace(heads, maps=maps), conf=0.01) for maps in (float16_maps, floats))
    assert ours.bytes() == theirs.bytes()


# --- particular images --------------------------------------------------------------------------------------------


@every_build
def test_the_sigmoid_equals_numpys_within_two_ulp(build):
    logits = np.concatenate([np.linspace(-104, 104, 1000), np.linspace(-8, 8, 1000), [0, -0.0, np.inf, -np.inf]])
    logits = logits.astype(np.float32)
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-logits.astype(np.float64)))
    ours = sigmoid_of(kernels_of(build), logits)
    normal = exact > np.finfo(np.float32).tiny
    np.testing.assert_array_max_ulp(ours[normal], exact[normal].astype(np.float32), SIGMOID_ULPS)
    np.testing.assert_allclose(ours[~normal], exact[~normal], atol=1e-38)
    assert np.isnan(sigmoid_of(kernels_of(build), np.array([np.nan])))


@every_build
def test_without_a_score_above_the_threshold_there_are_no_detections(build):
    for fill, conf in [(-9, 0.25), (np.nan, 0), (-np.inf, 0), (30, 1)]:
        heads = grid(4, 9, 9, fill, batch=3)
        assert assert_equals_the_reference(kernels_of(build), heads, conf=conf, **DEFAULTS) == 0


@every_build
@pytest.mark.parametrize("classes", [1, 7])
@pytest.mark.parametrize("multi_label", [False, True])
def test_equal_scores_everywhere_keep_the_order_of_anchors_and_classes(build, classes, multi_label):
    """More ties than any tile or list can hold; no digit of the scores differs."""
    heads = grid(classes, 11, 13, 1.5)
    options = {**DEFAULTS, "multi_label": multi_label, "iou": 1.0}
    assert assert_equals_the_reference(kernels_of(build), heads, conf=0.25, **options) == 100
    options["max_det"] = 5000
    found = assert_equals_the_reference(kernels_of(build), heads, conf=0.25, **options)
    assert found == 3 * 11 * 13 * (classes if multi_label else 1)


@every_build
def test_scores_that_differ_in_their_last_bits_are_ordered(build):
    heads = grid(1, 20, 20, 0)
    heads.maps[0][:, 4::6] = 2 + np.arange(1200).reshape(1, 3, 20, 20) * np.float32(2.0**-20)
    assert assert_equals_the_reference(kernels_of(build), heads, conf=0.25, **DEFAULTS) == 100


@every_build
@pytest.mark.parametrize("max_candidates", [1, 2, 299, 300, 301])
def test_overflow_is_set_when_the_candidate_limit_is_reached(build, max_candidates):
    heads = grid(1, 10, 10, 1)
    result = run_nms(kernels_of(build), heads, iou=1, max_candidates=max_candidates, max_det=500)
    assert result.num_dets == min(300, max_candidates)
    assert result.overflow == (max_candidates <= 300)


def test_a_score_equal_to_the_threshold_is_not_detected():
    heads = grid(1, 2, 2, 0)
    kernels = kernels_of("64 threads")
    assert run_nms(kernels, heads, conf=0.5, iou=1).num_dets == 0
    assert run_nms(kernels, heads, conf=np.nextafter(np.float32(0.5), np.float32(0)), iou=1).num_dets == 12


@every_build
def test_a_chain_through_all_groups_and_tiles_keeps_every_other_box(build):
    """Each box overlaps its two neighbors in a row of descending scores, so every other box survives."""
    count = 1500 if build == "shipped" else 400
    maps = np.full((1, 18, 1, count), -30, np.float32)
    maps[0, :4] = 0
    maps[0, 4] = np.linspace(4, -2, count)
    heads = Heads(maps=(maps,), strides=(8.0,), anchors=(((14.0, 8.0), (1.0, 1.0), (1.0, 1.0)),))
    options = {**DEFAULTS, "iou": 0.2, "max_det": 1000}
    assert assert_equals_the_reference(kernels_of(build), heads, conf=0.05, **options) == count // 2


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_nan_class_score_removes_its_anchor_only_without_multi_label(multi_label):
    """NumPy does the same: its argmax of a row with NaN is the NaN."""
    heads = grid(3, 1, 2, 2)
    heads.maps[0][0, 6, 0, 0] = np.nan
    options = {**DEFAULTS, "iou": 1.0, "multi_label": multi_label}
    found = assert_equals_the_reference(kernels_of("64 threads"), heads, conf=0.25, **options)
    assert found == (17 if multi_label else 5)


def test_a_nan_box_neither_suppresses_nor_is_suppressed():
    heads = grid(1, 1, 3, 2)
    heads.maps[0][0, 3, 0, 1] = np.nan
    assert assert_equals_the_reference(kernels_of("64 threads"), heads, conf=0.25, **{**DEFAULTS, "iou": 0.0}) == 4


def test_thresholds_may_have_any_value_at_run_time():
    """They are read from the device without validation: below zero, everything except NaN passes; with NaN, nothing."""
    heads = grid(2, 9, 9, -np.inf)
    heads.maps[0][0, 4, 0, 0] = np.nan
    kernels = kernels_of("64 threads")
    assert run_nms(kernels, heads, conf=-1, iou=1, max_det=1000).num_dets == 2 * (3 * 9 * 9 - 1)
    assert run_nms(kernels, heads, conf=np.nan).num_dets == 0
    assert run_nms(kernels, heads, conf=np.inf).num_dets == 0
    crowd = grid(1, 3, 3, 2)
    assert run_nms(kernels, crowd, iou=np.nan).num_dets == 27
    assert run_nms(kernels, crowd, iou=-1).num_dets == 1


def test_images_of_a_full_batch_are_independent():
    heads = grid(1, 1, 2, -30, batch=1024)
    heads.maps[0][::3, 4, 0, 0] = 1
    heads.maps[0][1::3, 10, 0, 1] = 2
    result = run_nms(kernels_of("64 threads"), heads, max_det=2)
    assert result.num_dets[:, 0].tolist() == [1, 1, 0] * 341 + [1]
    assert set(result.boxes[::3, 0, 0]) == {-4.0} and set(result.boxes[1::3, 0, 0]) == {4.0}
