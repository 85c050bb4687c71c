"""The part `train` of the GPU suite on a CPU with few small images, so that every line is tested."""

import json
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("faster_coco_eval")

import torch

from tests.gpu import PARTS, train, train_loading, train_run, train_steps
from tests.gpu.environment import Environment
from tests.gpu.targets import Targets
from tests.support.training_runs import disable_charts
from yolov7_deploy.training.loggers import EpochRecord

TINY = "yolov7-tiny"
STAGES = {"images", "forward", "assignment", "loss", "backward", "optimizer", "ema", "rest"}
# A loader's processes are forked, and torch has threads.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of the complete part."""
    path = tmp_path_factory.mktemp("part") / "result.json"
    with pytest.MonkeyPatch.context() as change:
        disable_charts(change)
        train.measure(Environment(folder=path.parent, result=path, emulated=True))
    return json.loads(path.read_text())


def bench_in(folder, **changes):
    """Return a bench on the CPU with time left."""
    env = Environment(folder=folder, result=folder / "result.json", emulated=True)
    defaults = {"sizes": train.EMULATED, "device": torch.device("cpu"), "ends": time.monotonic() + train.PART_S}
    return train_steps.Bench(env=env, targets=Targets(env), folder=folder, **{**defaults, **changes})


def recorded(bench):
    return json.loads(bench.env.result.read_text())


def record_of(epoch, **changes):
    losses = {"box": 1.0, "obj": 1.0, "cls": 1.0, "total": 3.0, "positives": 9.0}
    rates = {"lr_norm": 0.1, "lr_weight": 0.1, "lr_bias": 0.1, "momentum": 0.9}
    return EpochRecord(
        **{"epoch": epoch, "size": 64, "images_per_s": 5.0, "seconds": 1.0, **losses, **rates, **changes}
    )


# --- the complete part ------------------------------------------------------------------------------------------------


def test_every_measurement_runs_without_a_gpu(results, tmp_path):
    names = {name for name, _ in train.measurements(bench_in(tmp_path))}
    assert names <= set(results)
    assert {name for name in names if "failed" in results[name] or "skipped" in results[name]} == set()


def test_a_step_is_reported_by_stage(results):
    found = results[f"{TINY} batch 2 float16"]
    assert found["images_per_s"] > 0 and found["memory_gb"] is None
    assert set(found["stage_share"]) == STAGES
    assert sum(found["stage_share"].values()) == pytest.approx(1, abs=1e-3)
    assert all(found["stage_ms"][name] > 0 for name in STAGES - {"rest"}), "an update is among the steps"
    assert "separate steps" in found["note"]


def test_each_precision_is_named(results):
    names = [results[f"{TINY} batch 2 {name}"]["precision"] for name in ("float16", "TF32", "float32")]
    assert names == ["bfloat16", "float32, convolutions in TF32 (torch's default)", "float32"]


def test_the_loader_is_measured_alone_and_with_training(results):
    for name in (f"{TINY} with its loader", f"{TINY} with its loader, images cached"):
        found = results[name]
        assert min(found[f"{what}images_per_s"] for what in ("", "loader_", "training_")) > 0
        assert 0 <= found["share_waiting_for_loader"] < 1 and 0 <= found["share_host_waits"] < 1


def test_the_training_is_summarized_from_its_results(results):
    found = results["training"]
    assert (found["epochs"], found["epochs_planned"], found["ended"], found["no_ap"]) == (2, 2, "complete", "")
    assert found["ap"] is not None and list(found["ap_by_epoch"]) == ["1", "2"]
    assert found["last_losses"]["total"] == found["results_csv"][-1]["total"]


def test_a_device_compared_with_itself_has_the_same_losses_and_updates_and_no_target(results):
    found = results[f"{TINY} losses as on a CPU"]
    assert found["max_difference"] == 0 and [step["update_difference"] for step in found["steps"]] == [0, 0, 0]
    assert len({step["cpu"]["box"] for step in found["steps"]}) == 3, "the weights changed from step to step"
    (target,) = results["targets"].values()
    assert target == {"met": None, "why": train_steps.NO_GPU}


def test_the_part_fits_into_one_run():
    (part,) = [part for part in PARTS if part.name == "train"]
    assert part.needs == ("torch",) and train.PART_S < part.budget_s <= 540


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failed_measurement_is_recorded_and_the_others_run(tmp_path, monkeypatch):
    def breaks():
        raise RuntimeError("CUDA error: it broke")

    chosen = [("first", breaks), ("second", lambda: {"found": 1})]
    monkeypatch.setattr(train, "measurements", lambda bench: chosen)
    env = Environment(folder=tmp_path, result=tmp_path / "result.json", emulated=True)
    with pytest.raises(AssertionError, match=r"failed: \['first'\]"):
        train.measure(env)
    results = json.loads(env.result.read_text())
    assert results["first"]["failed"] == "RuntimeError: CUDA error: it broke"
    assert "in breaks" in results["first"]["traceback"]
    assert results["second"]["found"] == 1


def test_a_measurement_without_time_is_skipped(tmp_path):
    bench = bench_in(tmp_path, ends=time.monotonic() + train.MEASUREMENT_S - 1)
    assert train.run_measurement(bench, "late", lambda: pytest.fail("it was started"))
    assert recorded(bench)["late"] == {"skipped": "only 44 s were left"}


def stepper(kind=train_steps.Stepper, *, small_steps=False):
    """Return a stepper of a small network with two classes."""
    made = train_steps.new_stepper(
        train.EMULATED, TINY, 2, device=train_steps.CPU, half=False, small_steps=small_steps, classes=("a", "b")
    )
    return kind(made.train_step)


def noise():
    """Return a batch for it."""
    batch = train_steps.noise_batch_on(2, train.EMULATED.img, train_steps.CPU)
    batch.targets[:, 1] %= 2
    return batch


def test_different_losses_and_updates_are_reported_relatively():
    class DarkStepper(train_steps.Stepper):
        def __call__(self, batch):
            return super().__call__(replace(batch, images=batch.images // 2))

    found = train_steps.compare_step(stepper(DarkStepper), stepper(), noise())
    for name, difference in found["difference"].items():
        assert difference == pytest.approx(abs(found["device"][name] / found["cpu"][name] - 1)) and difference > 1e-5
    assert found["update_difference"] > 0.01


def test_the_distance_of_updates_is_relative_to_the_second():
    before, here, there = ({"model.0.weight": torch.tensor(value)} for value in ([1.0, 1.0], [4.0, 1.0], [1.0, 3.0]))
    assert train_steps.update_distance(before, here, there) == pytest.approx((9 + 4) ** 0.5 / 2)


def test_a_loss_that_is_not_finite_fails_the_step():
    broken = stepper(small_steps=True)
    with torch.no_grad():
        next(broken.train_step.model.parameters()).fill_(float("nan"))
    with pytest.raises(AssertionError, match="not finite in step 0"):
        broken(noise())


# --- duration of the training -----------------------------------------------------------------------------------------


def test_as_many_epochs_are_planned_as_fit_into_the_time(tmp_path):
    sizes = replace(train.REAL, sets=10, train=100)
    fast = bench_in(tmp_path, sizes=sizes, rates={TINY: 1000.0})
    for bench in (fast, bench_in(tmp_path, sizes=sizes)):
        epochs = train_run.affordable_epochs(bench, TINY, 180.0)
        rate = bench.rates.get(TINY, train_run.SLOW_RATE)
        spent = epochs * (1000 / rate + train_run.EPOCH_S) + 3 * train_run.VALIDATION_S + train_run.START_S
        assert 180 - 1000 / rate - train_run.EPOCH_S < spent <= 180
    assert train_run.affordable_epochs(fast, TINY, 1.0) == train_run.MIN_EPOCHS
    assert train_run.affordable_epochs(fast, TINY, 1e6) == train_run.MAX_EPOCHS


def test_a_training_over_its_time_limit_stops_after_an_epoch_and_keeps_its_results(tmp_path):
    bench = bench_in(tmp_path)
    log = train_run.TrainingLog(bench.env, time.monotonic() + 60)
    log.on_epoch_end(record_of(1))
    late = train_run.TrainingLog(bench.env, time.monotonic() - 1)
    with pytest.raises(train_run.TimeLimitReached):
        late.on_epoch_end(record_of(2))
    assert recorded(bench)["training so far"]["epoch"] == 2


def test_epochs_without_a_validation_have_no_ap():
    records = [record_of(1, total=5.0), record_of(2, ap=0.25, ap50=0.5), record_of(3, total=2.0, images_per_s=7.0)]
    found = train_run.summarize_epochs(records)
    assert (found["ap"], found["ap50"], found["ap_by_epoch"]) == (0.25, 0.5, {"2": 0.25})
    assert (found["first_losses"]["total"], found["last_losses"]["total"], found["images_per_s"]) == (5.0, 2.0, 5.0)
    assert train_run.summarize_epochs(records[:1])["ap"] is None


def test_without_the_metric_training_runs_and_records_why_there_is_no_ap(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, train_run.METRIC, None)
    for name in ("draw_labels", "draw_results"):  # draw_evaluation has nothing to draw
        monkeypatch.setattr(f"yolov7_deploy.training.run.{name}", lambda *_: None)
    bench = bench_in(tmp_path)
    train_loading.make_shapes(bench)
    found = train_run.train_shapes(bench, TINY)
    assert found["ap"] is None and found["epochs"] == 2
    assert found["no_ap"].startswith("faster_coco_eval is for another Python version: ")
