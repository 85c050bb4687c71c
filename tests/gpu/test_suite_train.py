"""The suite's part `train` on a CPU with a few small images, so that no line runs first on a real GPU."""

import json
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("faster_coco_eval")

import torch

from tests.gpu import PARTS, train, train_loading, train_run, train_steps
from tests.gpu.environment import Setting
from tests.gpu.targets import Goals
from tests.support.training_runs import leave_out_charts
from yolov7_deploy.training.loggers import EpochRecord

TINY = "yolov7-tiny"
STAGES = {"images", "forward", "assignment", "loss", "backward", "optimizer", "average", "rest"}
# A loader's processes are forked, and torch has threads.
pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the whole part records."""
    place = tmp_path_factory.mktemp("part") / "result.json"
    with pytest.MonkeyPatch.context() as change:
        leave_out_charts(change)
        train.measure(Setting(folder=place.parent, result=place, emulated=True))
    return json.loads(place.read_text())


def bench_in(folder, **changes):
    """A bench on the CPU that has time left."""
    setting = Setting(folder=folder, result=folder / "result.json", emulated=True)
    plain = {"sizes": train.EMULATED, "device": torch.device("cpu"), "ends": time.monotonic() + train.PART_S}
    return train_steps.Bench(setting=setting, goals=Goals(setting), folder=folder, **{**plain, **changes})


def recorded(bench):
    return json.loads(bench.setting.result.read_text())


def record_of(epoch, **changes):
    losses = {"box": 1.0, "obj": 1.0, "cls": 1.0, "total": 3.0, "positives": 9.0}
    rates = {"lr_norm": 0.1, "lr_weight": 0.1, "lr_bias": 0.1, "momentum": 0.9}
    return EpochRecord(
        **{"epoch": epoch, "size": 64, "images_per_s": 5.0, "seconds": 1.0, **losses, **rates, **changes}
    )


# --- the whole part ---------------------------------------------------------------------------------------------------


def test_every_piece_runs_without_a_gpu(results, tmp_path):
    names = {name for name, _ in train.pieces(bench_in(tmp_path))}
    assert names <= set(results)
    assert {name for name in names if "failed" in results[name] or "skipped" in results[name]} == set()


def test_a_step_is_told_in_shares_of_its_stages(results):
    found = results[f"{TINY} batch 2 float16"]
    assert found["images_per_s"] > 0 and found["memory_gb"] is None
    assert set(found["stage_share"]) == STAGES
    assert sum(found["stage_share"].values()) == pytest.approx(1, abs=1e-3)
    assert all(found["stage_ms"][name] > 0 for name in STAGES - {"rest"}), "an update is among the steps"
    assert "steps of their own" in found["note"]


def test_each_precision_says_what_it_is(results):
    words = [results[f"{TINY} batch 2 {name}"]["precision"] for name in ("float16", "TF32", "float32")]
    assert words == ["bfloat16", "float32, convolutions in TF32 (torch's default)", "float32"]


def test_the_loader_is_measured_alone_and_with_the_learner(results):
    for name in (f"{TINY} with its loader", f"{TINY} with its loader, images cached"):
        found = results[name]
        assert min(found[f"{what}images_per_s"] for what in ("", "loader_", "learner_")) > 0
        assert 0 <= found["share_waiting_for_loader"] < 1 and 0 <= found["share_host_waits"] < 1


def test_the_training_is_told_by_its_table(results):
    found = results["training"]
    assert (found["epochs"], found["epochs_wanted"], found["ended"], found["no_ap"]) == (2, 2, "whole", "")
    assert found["ap"] is not None and list(found["ap_of_epochs"]) == ["1", "2"]
    assert found["last_losses"]["total"] == found["results_csv"][-1]["total"]


def test_one_device_beside_itself_has_the_same_losses_and_updates_and_nobody_judges_that(results):
    found = results[f"{TINY} losses as on a CPU"]
    assert found["most_apart"] == 0 and [step["updates_apart"] for step in found["steps"]] == [0, 0, 0]
    assert len({step["cpu"]["box"] for step in found["steps"]}) == 3, "the weights changed from step to step"
    (goal,) = results["goals"].values()
    assert goal == {"met": None, "why": train_steps.NO_GPU}


def test_the_part_is_known_and_has_less_time_than_a_run():
    (part,) = [part for part in PARTS if part.name == "train"]
    assert part.needs == ("torch",) and train.PART_S < part.budget_s <= 540


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_piece_that_fails_is_recorded_and_the_others_run(tmp_path, monkeypatch):
    def breaks():
        raise RuntimeError("CUDA error: it broke")

    chosen = [("first", breaks), ("second", lambda: {"found": 1})]
    monkeypatch.setattr(train, "pieces", lambda bench: chosen)
    setting = Setting(folder=tmp_path, result=tmp_path / "result.json", emulated=True)
    with pytest.raises(AssertionError, match=r"failed: \['first'\]"):
        train.measure(setting)
    results = json.loads(setting.result.read_text())
    assert results["first"]["failed"] == "RuntimeError: CUDA error: it broke"
    assert "in breaks" in results["first"]["traceback"]
    assert results["second"]["found"] == 1


def test_a_piece_without_time_is_left_out(tmp_path):
    bench = bench_in(tmp_path, ends=time.monotonic() + train.PIECE_S - 1)
    assert train.succeeded(bench, "late", lambda: pytest.fail("it was begun"))
    assert recorded(bench)["late"] == {"skipped": "only 44 s were left"}


def stepper(kind=train_steps.Stepper, *, calm=False):
    """Steps of a small network with two classes."""
    made = train_steps.new_stepper(
        train.EMULATED, TINY, 2, device=train_steps.CPU, half=False, calm=calm, classes=("a", "b")
    )
    return kind(made.learner)


def noise():
    """A batch for it."""
    batch = train_steps.noise_on(2, train.EMULATED.img, train_steps.CPU)
    batch.targets[:, 1] %= 2
    return batch


def test_losses_and_updates_that_differ_are_told_in_relative_terms():
    class Dark(train_steps.Stepper):
        def __call__(self, batch):
            return super().__call__(replace(batch, images=batch.images // 2))

    found = train_steps.step_apart(stepper(Dark), stepper(), noise())
    for name, apart in found["apart"].items():
        assert apart == pytest.approx(abs(found["device"][name] / found["cpu"][name] - 1)) and apart > 1e-5
    assert found["updates_apart"] > 0.01


def test_the_distance_of_updates_is_in_lengths_of_the_second():
    before, here, there = ({"model.0.weight": torch.tensor(value)} for value in ([1.0, 1.0], [4.0, 1.0], [1.0, 3.0]))
    assert train_steps.update_distance(before, here, there) == pytest.approx((9 + 4) ** 0.5 / 2)


def test_a_loss_that_is_no_number_fails_the_step():
    broken = stepper(calm=True)
    with torch.no_grad():
        next(broken.learner.model.parameters()).fill_(float("nan"))
    with pytest.raises(AssertionError, match="no number in step 0"):
        broken(noise())


# --- how long a training may be ---------------------------------------------------------------------------------------


def test_as_many_epochs_are_asked_for_as_fit(tmp_path):
    sizes = replace(train.REAL, sets=10, train=100)
    fast = bench_in(tmp_path, sizes=sizes, rates={TINY: 1000.0})
    for bench in (fast, bench_in(tmp_path, sizes=sizes)):
        epochs = train_run.affordable_epochs(bench, TINY, 180.0)
        rate = bench.rates.get(TINY, train_run.SLOW_RATE)
        spent = epochs * (1000 / rate + train_run.EPOCH_S) + 3 * train_run.VALIDATION_S + train_run.START_S
        assert 180 - 1000 / rate - train_run.EPOCH_S < spent <= 180
    assert train_run.affordable_epochs(fast, TINY, 1.0) == train_run.LEAST_EPOCHS
    assert train_run.affordable_epochs(fast, TINY, 1e6) == train_run.MOST_EPOCHS


def test_a_training_past_its_time_ends_after_an_epoch_and_keeps_what_it_has(tmp_path):
    bench = bench_in(tmp_path)
    diary = train_run.Diary(bench.setting, time.monotonic() + 60)
    diary.epoch_done(record_of(1))
    late = train_run.Diary(bench.setting, time.monotonic() - 1)
    with pytest.raises(train_run.OutOfTime):
        late.epoch_done(record_of(2))
    assert recorded(bench)["training so far"]["epoch"] == 2


def test_epochs_without_a_validation_have_no_ap():
    records = [record_of(1, total=5.0), record_of(2, ap=0.25, ap50=0.5), record_of(3, total=2.0, images_per_s=7.0)]
    found = train_run.told(records)
    assert (found["ap"], found["ap50"], found["ap_of_epochs"]) == (0.25, 0.5, {"2": 0.25})
    assert (found["first_losses"]["total"], found["last_losses"]["total"], found["images_per_s"]) == (5.0, 2.0, 5.0)
    assert train_run.told(records[:1])["ap"] is None


def test_without_the_metric_a_training_runs_and_says_why_it_has_no_ap(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, train_run.METRIC, None)
    leave_out_charts(monkeypatch)
    bench = bench_in(tmp_path)
    train_loading.make_shapes(bench)
    found = train_run.train_shapes(bench, TINY)
    assert found["ap"] is None and found["epochs"] == 2
    assert found["no_ap"].startswith("faster_coco_eval was brought for another Python: ")
