"""The estimator: its kernels against the network, its roofline by hand, its fits repeated, and its text output."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolov7_deploy.benchmarking.report import SpeedReport
from yolov7_deploy.errors import UsageError
from yolov7_deploy.estimation import fitting
from yolov7_deploy.estimation.devices import DEVICES, find_device
from yolov7_deploy.estimation.estimate import describe_estimate, estimate
from yolov7_deploy.estimation.fitting import (
    CANDIDATES,
    FITTED_FIELDS,
    HeldOut,
    fit,
    leave_groups_out,
    leave_one_device_out,
    leave_one_row_out,
    score_held_out,
)
from yolov7_deploy.estimation.layer_work import Kernel, compiled_kernels, eager_kernels
from yolov7_deploy.estimation.public_speeds import EVALUATION_ONLY, TENSORRT_SPEEDS, paper_speeds
from yolov7_deploy.estimation.roofline import Constants, Demand, Structure, compute_demand, pass_ms, timeline
from yolov7_deploy.inspection.complexity import complexity
from yolov7_deploy.model.configs import VARIANTS

COMMITTED_REL = 2e-3  # constants are committed with four digits
ERROR_ABS = 2e-3  # errors with three
TARGET = 0.15  # median held-out error on the paper's V100 speeds
BIAS_REL = 0.004  # one addition per cell and filter, which complexity() counts and the kernels do not

SIMPLE = Structure(tiles=(), layout_copies=False, cached=False)
TILED = replace(SIMPLE, tiles=((128, 128),))
PERFECT = Constants(compute=1.0, compute_int8=1.0, memory=1.0, gap_us=0.0, launch_us=0.0)
# 100 x 10 cells, 128 filters over 256 channels: eight tiles of 128 rows.
CONVOLUTION = Kernel(
    layer=0, kind="Conv", operator="convolution", flops=2 * 1000 * 128 * 256, weights=128 * 257, read=256_000,
    written=128_000, pixels=1000, filters=128, depth=256,
)  # fmt: skip


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_have_the_operations_and_weights_of_the_network(variant):
    kernels = eager_kernels(variant, (640, 640))
    cost = complexity(variant, size=640)
    assert sum(kernel.flops for kernel in kernels) / 1e9 == pytest.approx(cost.gflops, rel=BIAS_REL)
    assert sum(kernel.weights for kernel in kernels) == cost.parameters_fused


def test_pytorch_launches_a_kernel_for_every_activation_and_an_engine_does_not():
    eager, compiled = eager_kernels("yolov7", (640, 640)), compiled_kernels("yolov7", (640, 640))
    operators = [kernel.operator for kernel in eager]
    assert operators.count("convolution") == 92 and operators.count("silu_") == 89
    assert {kernel.operator for kernel in compiled} == {
        "convolution", "max_pool2d_with_indices", "upsample_nearest2d", "decode",
    }  # fmt: skip
    assert sum(kernel.flops for kernel in eager) == sum(kernel.flops for kernel in compiled)


def test_space_to_depth_is_a_kernel_of_an_engine():
    assert compiled_kernels("yolov7-w6", (1280, 1280))[0].kind == "ReOrg"


def test_the_first_convolution_reads_the_image_and_writes_its_map():
    first = eager_kernels("yolov7", (480, 640))[0]
    assert (first.layer, first.kind, first.operator) == (0, "Conv", "convolution")
    assert (first.read, first.written, first.weights) == (3 * 480 * 640, 32 * 480 * 640, 32 * 27 + 32)
    assert (first.pixels, first.filters, first.depth) == (480 * 640, 32, 27)


# --- roofline ---------------------------------------------------------------------------------------------------------


def test_without_tiles_the_model_is_the_plain_roofline():
    v100 = DEVICES["v100"]
    required = compute_demand([CONVOLUTION], v100, SIMPLE, batch=3, precision="fp16")
    assert required.compute_s[0] == pytest.approx(3 * CONVOLUTION.flops / 125e12)
    assert required.memory_s[0] == pytest.approx(2 * (3 * 384_000 + 128 * 257) / 900e9)
    assert pass_ms(required, PERFECT) == pytest.approx(1e3 * max(required.compute_s[0], required.memory_s[0]))


def test_a_partly_filled_wave_of_tiles_costs_a_whole_wave():
    v100 = DEVICES["v100"]
    required = compute_demand([CONVOLUTION], v100, TILED, batch=1, precision="fp16")
    assert required.compute_s[0] == pytest.approx(80 * 2 * 128 * 128 * 256 / 125e12)
    ten = compute_demand([CONVOLUTION], v100, TILED, batch=10, precision="fp16")
    assert ten.compute_s[0] == required.compute_s[0], "one wave of 80 holds the 79 tiles of ten images"
    eleven = compute_demand([CONVOLUTION], v100, TILED, batch=11, precision="fp16")
    assert eleven.compute_s[0] == pytest.approx(2 * required.compute_s[0])


def test_the_cache_serves_what_fits_and_layout_copies_triple_the_traffic():
    plain, cached, copied = (
        compute_demand([CONVOLUTION], DEVICES["v100"], structure, batch=1, precision="fp16").memory_s[0]
        for structure in (SIMPLE, replace(SIMPLE, cached=True), replace(SIMPLE, layout_copies=True))
    )
    weights = 2 * 128 * 257 / 900e9
    assert cached - weights == pytest.approx((plain - weights) / 3)
    assert copied - weights == pytest.approx((plain - weights) * 3)
    large = compute_demand([CONVOLUTION], DEVICES["v100"], replace(SIMPLE, cached=True), batch=99, precision="fp16")
    assert (
        large.memory_s[0]
        == compute_demand([CONVOLUTION], DEVICES["v100"], SIMPLE, batch=99, precision="fp16").memory_s[0]
    )


SECONDS = st.lists(st.tuples(st.floats(1e-9, 1e-3), st.floats(1e-9, 1e-3)), min_size=1, max_size=30)


@settings(deadline=None)
@given(SECONDS, st.floats(0, 50), st.floats(0, 50))
def test_the_timeline_agrees_with_a_simulation_of_two_queues(seconds, gap_us, launch_us):
    compute, memory = np.array(seconds).T
    constants = replace(PERFECT, gap_us=gap_us, launch_us=launch_us)
    required = Demand(compute_s=compute, memory_s=memory, is_int8=False)
    launched = done = 0.0
    for c, m in seconds:
        launched += launch_us * 1e-6
        done = max(done, launched) + max(c, m) + gap_us * 1e-6
    assert pass_ms(required, constants) == pytest.approx(done * 1e3, rel=1e-9)
    assert timeline(required, constants).ms == pytest.approx(done * 1e3, rel=1e-9)


# --- fit --------------------------------------------------------------------------------------------------------------


def test_a_fit_recovers_the_constants_behind_synthetic_speeds():
    true = replace(fitting.FITTED["torch"].constants, compute=0.4, memory=0.8, launch_us=30.0)
    structure = fitting.STRUCTURES["torch"]
    rows = [replace(row, ms=replace(fitting.FITTED["torch"], constants=true).ms(row, structure)) for row in _paper()]
    found = fit(rows, structure).constants
    for name in FITTED_FIELDS["torch"]:
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.02)


@pytest.mark.parametrize("runtime", fitting.FITTED)
def test_the_committed_constants_are_those_of_the_fit(runtime):
    rows = TENSORRT_SPEEDS if runtime == "tensorrt" else _paper(fitting.FITTED_VARIANTS)
    found, committed = fit(rows, fitting.STRUCTURES[runtime]), fitting.FITTED[runtime]
    for name in FITTED_FIELDS[runtime]:
        assert getattr(committed.constants, name) == pytest.approx(getattr(found.constants, name), rel=COMMITTED_REL)
    assert committed.factors == pytest.approx(found.factors, rel=COMMITTED_REL)


def test_the_structure_is_the_one_with_the_best_fit():
    rows = _paper(fitting.FITTED_VARIANTS)
    assert min(CANDIDATES, key=lambda one: fit(rows, one).loss) == fitting.STRUCTURES["torch"]


@pytest.mark.parametrize(("batch", "committed"), [(1, fitting.V100_BATCH1), (32, fitting.V100_BATCH32)])
def test_the_held_out_error_on_the_papers_v100_is_the_committed_one_and_below_the_target(batch, committed):
    structure = fitting.STRUCTURES["torch"]
    found = fit(_paper(fitting.FITTED_VARIANTS), structure)
    unseen = [row for row in _paper() if row.variant not in fitting.FITTED_VARIANTS and row.batch == batch]
    _same(score_held_out(found, unseen, structure), committed)
    assert committed.median < TARGET


def test_the_error_on_another_gpu_is_the_committed_one():
    rows = [row for row in EVALUATION_ONLY if row.runtime == "torch"]
    structure = fitting.STRUCTURES["torch"]
    _same(score_held_out(fit(_paper(fitting.FITTED_VARIANTS), structure), rows, structure), fitting.TORCH_T4)


def test_the_error_of_a_device_without_published_speeds_is_the_committed_one():
    _same(leave_one_device_out(TENSORRT_SPEEDS, fitting.STRUCTURES["tensorrt"]), fitting.TENSORRT_DEVICES)


@pytest.mark.slow
def test_the_error_of_a_device_with_published_speeds_is_the_committed_one():
    found = leave_one_row_out(TENSORRT_SPEEDS, fitting.STRUCTURES["tensorrt"])
    assert {row.device for row, _ in found.rows} == set(fitting.TENSORRT_ROWS)
    for device, committed in fitting.TENSORRT_ROWS.items():
        _same(HeldOut(rows=tuple(pair for pair in found.rows if pair[0].device == device)), committed)


@pytest.mark.slow
def test_the_error_over_all_splits_is_the_committed_one():
    found, chosen = leave_groups_out(_paper(), CANDIDATES, fitted=3)
    assert sum(chosen.values()) == len(list(itertools.combinations(range(7), 3)))
    for batch, committed in ((1, fitting.V100_BATCH1_SPLITS), (32, fitting.V100_BATCH32_SPLITS)):
        _same(HeldOut(rows=tuple(pair for pair in found.rows if pair[0].batch == batch)), committed)


def test_a_held_out_row_does_not_affect_the_fit_that_is_evaluated_on_it():
    """An absurd row must not change its own fit, so its error grows by exactly the factor of the absurdity."""
    rows = TENSORRT_SPEEDS[:6]
    absurd = [replace(rows[0], ms=100 * rows[0].ms), *rows[1:]]
    honest, fooled = (leave_one_row_out(some, fitting.STRUCTURES["tensorrt"]).rows[0][1] for some in (rows, absurd))
    assert 1 + fooled == pytest.approx(100 * (1 + honest))


def _paper(variants=None):
    return [row for row in paper_speeds() if variants is None or row.variant in variants]


def _same(found, committed):
    assert len(found.rows) == committed.rows
    assert (found.median, found.worst) == pytest.approx((committed.median, committed.worst), abs=ERROR_ABS)


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_the_peaks_of_a_device_are_in_the_usual_order(device):
    assert device.name == find_device(device.name).name
    assert device.int8_tops is None or device.int8_tops == pytest.approx(2 * device.fp16_tflops, rel=0.02)
    assert device.tf32_tflops is None or device.fp32_tflops <= device.tf32_tflops < device.fp16_tflops
    assert device.source and device.gb_per_s > 0 and device.l2_mb > 0


def test_derived_peaks_of_jetsons_agree_with_their_data_sheets():
    # Sparse INT8 TOPS of the GPU alone from NVIDIA's module comparison; those of AGX Xavier are dense.
    sparse = {"agx-orin": 170, "agx-orin-32gb": 108, "orin-nx": 60, "orin-nx-8gb": 50, "orin-nano": 40,
              "orin-nano-4gb": 20, "orin-nano-super": 67, "orin-nano-4gb-super": 34}  # fmt: skip
    for name, tops in sparse.items():
        assert 2 * DEVICES[name].int8_tops == pytest.approx(tops, rel=0.03), name
    assert DEVICES["agx-xavier"].int8_tops == pytest.approx(22, rel=0.03)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("V100", "v100"), ("NVIDIA Jetson Orin NX", "orin-nx"), ("RTX4090", "rtx-4090"), ("4090", "rtx-4090"),
     ("geforce_rtx 3090", "rtx-3090"), ("V100-SXM2", "v100"), ("xavier nx", "xavier-nx"), ("AGX Orin", "agx-orin")],
)  # fmt: skip
def test_devices_are_found_in_common_spellings(spelling, name):
    assert find_device(spelling).name == name


# --- estimate ---------------------------------------------------------------------------------------------------------


def test_the_text_of_an_estimate_is_labelled_and_has_its_error():
    found = estimate("yolov7", device="v100", size=(480, 640))
    text = describe_estimate(found)
    assert text.startswith("estimated, not measured: yolov7 at 480x640 on NVIDIA Tesla V100 SXM2, PyTorch FP16")
    for part in ("error: median 1.6%, worst 2.4%", "bound by", "fitted on the V100 speeds of", "data sheet"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120
    assert found.error.known and found.error.rows == 4
    assert found.fps == pytest.approx(161, rel=0.1)


def test_the_papers_rows_are_estimated_within_the_target():
    for row in _paper():
        found = estimate(row.variant, device=row.device, batch=row.batch, size=row.input_hw)
        assert found.images_per_second == pytest.approx(row.fps, rel=TARGET), row


def test_the_fields_of_an_estimate_are_consistent():
    found = estimate("yolov7-tiny", device="orin-nano", batch=4, precision="int8")
    shares = found.shares
    assert shares.compute + shares.memory + shares.launch == pytest.approx(1)
    assert found.images_per_second == pytest.approx(4 * found.fps)
    assert found.gflops == pytest.approx(4 * complexity("yolov7-tiny", size=640).gflops, rel=BIAS_REL)
    times = [layer.ms for layer in found.layers]
    assert times == sorted(times, reverse=True) and sum(times) < found.ms


def test_a_small_network_waits_for_the_cpu_and_a_large_batch_does_not():
    assert estimate("yolov7-tiny", device="v100").shares.launch > 0.9
    assert estimate("yolov7-tiny", device="v100", batch=32).shares.launch < 0.1


def test_the_error_for_a_device_without_published_speeds_is_unknown():
    found = estimate("yolov7", device="orin-nano")
    assert (found.runtime, found.error.known) == ("tensorrt", False)
    assert "error: unknown, no speed of this device" in describe_estimate(found)
    assert "its only published speed" in describe_estimate(estimate("yolov7", device="orin-nx"))
    fp32 = estimate("yolov7", device="a100", precision="fp32")
    assert fp32.error.median is None and "no FP32 speed is published" in describe_estimate(fp32)


def test_a_square_input_is_not_comparable_with_the_papers_rectangles():
    assert any("161 FPS" in note for note in estimate("yolov7", device="v100").notes)
    for other in (estimate("yolov7", device="v100", size=(480, 640)), estimate("yolov7", device="v100", batch=8)):
        assert not any("161 FPS" in note for note in other.notes)


def test_an_estimate_is_rejected_as_a_measurement(tmp_path):
    document = estimate("yolov7", device="t4", precision="int8").to_dict()
    assert (document["kind"], document["measured"]) == ("y7 estimate", False)
    path = tmp_path / "estimate.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="not a report of y7 bench"):
        SpeedReport.load(path)


def test_more_work_and_slower_devices_take_longer():
    base = estimate("yolov7", device="agx-orin")
    assert base.ms < estimate("yolov7", device="agx-orin", batch=2).ms < 3 * base.ms
    assert base.ms < estimate("yolov7", device="agx-orin", size=1280).ms
    assert estimate("yolov7", device="agx-orin", precision="int8").ms < base.ms
    assert base.ms < estimate("yolov7", device="agx-orin", precision="fp32").ms
    assert base.ms < estimate("yolov7", device="agx-orin-32gb").ms


def test_equal_requests_have_equal_estimates():
    assert estimate("yolov7-d6", device="h200") == estimate("yolov7-d6", device="H200")


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"device": "orin-nxx"}, "Did you mean orin-nx"),
        ({"device": ""}, "One of: v100"),
        ({"device": "v100", "batch": 0}, "at least one image, not 0"),
        ({"device": "v100", "size": 100}, "multiples of 32, not 100"),
        ({"device": "v100", "size": (480, 0)}, "multiples of 32, not 0"),
        ({"device": "v100", "precision": "fp8"}, "precision 'fp8' cannot be estimated"),
        ({"device": "v100", "precision": "int8"}, "no figure for INT8"),
        ({"device": "t4", "precision": "int8", "runtime": "torch"}, "INT8 cannot be estimated with PyTorch"),
        ({"device": "t4", "runtime": "tflite"}, "runtime 'tflite' cannot be estimated"),
    ],
)
def test_what_cannot_be_estimated_is_rejected(request_fields, message):
    with pytest.raises(UsageError) as caught:
        estimate("yolov7", **request_fields)
    assert message in str(caught.value)


def test_an_unknown_variant_is_rejected():
    with pytest.raises(UsageError, match="yolov8"):
        estimate("yolov8", device="v100")
