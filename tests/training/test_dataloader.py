"""The training loader: batches independent of workers, the order of images, and messages for failures."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.support.training_images import dataset_of, random_dataset
from yolov7_deploy.errors import DatasetError, DeviceError, UsageError
from yolov7_deploy.training.augment import Augmentation
from yolov7_deploy.training.dataloader import (
    BatchShard,
    TrainLoader,
    compute_image_weights,
    epoch_order,
    rect_hw,
    rect_requests,
    square_requests,
)
from yolov7_deploy.training.dataset import ImageStore
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.sample import Batch

SIZE = 48
COUNT = 10
HYP = Hyperparameters(mixup=0.5, paste_in=0.5, flipud=0.3)
HWS = [(48, 32), (30, 48), (48, 48), (20, 48), (48, 40), (40, 48), (48, 24), (36, 48), (48, 36), (28, 48)]
STOP_S = 20.0  # limit for an interrupted program to end; it takes about one second

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return random_dataset(tmp_path_factory.mktemp("loader"), HWS, suffix=".jpg")


@pytest.fixture
def loaders(dataset):
    """Return a factory of loaders, which closes them at the end."""
    made = []

    def get(*, batch=4, workers=0, seed=1, cache_bytes=0, hyp=HYP, source=dataset, **options):
        store = ImageStore(source, size=SIZE, cache_bytes=cache_bytes)
        made.append(
            TrainLoader(store, Augmentation(hyp=hyp, size=SIZE), batch=batch, workers=workers, seed=seed, **options)
        )
        return made[-1]

    yield get
    for loader in made:
        loader.close()


def assert_same(ours, expected):
    ours, expected = list(ours), list(expected)
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert one.paths == other.paths
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_rgb_images_and_targets_in_fractions(loaders):
    loader = loaders()
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps == 3
    for batch in batches:
        assert batch.images.shape == (4, SIZE, SIZE, 3) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert batch.targets.shape[1] == 6 and batch.targets.dtype == torch.float32
        assert set(batch.targets[:, 0].tolist()) <= {0, 1, 2, 3}
        assert (batch.targets[:, 0].diff() >= 0).all()
        assert batch.problems == () and len(batch.paths) == 4


@pytest.mark.parametrize("rect", [False, True])
def test_batches_do_not_depend_on_the_number_of_workers(loaders, rect):
    alone = loaders(rect=rect)
    for workers in (1, 2):
        several = loaders(workers=workers, rect=rect)
        for epoch in (0, 3):
            assert_same(several.epoch(epoch), alone.epoch(epoch))


@pytest.mark.parametrize("rect", [False, True])
def test_two_processes_together_have_the_batch_of_one(loaders, rect):
    alone = loaders(batch=4, rect=rect, stride=8)
    ranks = [loaders(batch=2, rank=rank, world_size=2, rect=rect, stride=8) for rank in range(2)]
    assert {loader.steps for loader in (alone, *ranks)} == {3}
    for both, first, second in zip(alone.epoch(2), *(rank.epoch(2) for rank in ranks), strict=True):
        assert torch.equal(both.images, torch.cat([first.images, second.images]))
        assert both.paths == first.paths + second.paths
        second.targets[:, 0] += 2
        assert torch.equal(both.targets, torch.cat([first.targets, second.targets]))


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_start_at_any_step(loaders, workers, rect):
    loader = loaders(batch=3, workers=workers, rect=rect)
    batches = list(loader.epoch(1))
    for start in range(5):
        assert_same(loader.epoch(1, start=start), batches[start:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_incomplete_epoch_does_not_change_the_next_one(loaders, workers):
    loader = loaders(batch=2, workers=workers)
    expected = list(loader.epoch(1))
    batches_of_epoch = loader.epoch(0)
    next(batches_of_epoch)
    batches_of_epoch.close()
    assert_same(loader.epoch(1), expected)


def test_the_cache_is_filled_by_all_workers(loaders, monkeypatch):
    loader = loaders(workers=2, cache_bytes=10**6, hyp=Hyperparameters(mosaic=0.0))
    first = list(loader.epoch(0))
    monkeypatch.setattr("yolov7_deploy.training.dataset.read_image", None)
    again = loaders(hyp=Hyperparameters(mosaic=0.0))
    again.store._cache = loader.store._cache
    assert_same(again.epoch(0), first)


def test_the_global_generator_is_not_advanced(loaders):
    before = torch.random.get_rng_state()
    for workers in (0, 1):
        list(loaders(workers=workers).epoch(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_epochs_and_seeds_differ(loaders):
    batches = [next(loaders(seed=seed).epoch(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(batches):
        for other in batches[:i]:
            assert not torch.equal(one.images, other.images)


def test_two_samples_of_one_image_in_an_epoch_differ(loaders, dataset):
    only = dataset_of([dataset.record(0)])
    batch = next(loaders(batch=2, source=only).epoch(0))
    assert not torch.equal(batch.images[0], batch.images[1])


# --- order and batch shape --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "world_size"), [(1, 1), (3, 1), (4, 2), (7, 3), (25, 1)])
def test_each_image_is_used_once_and_the_first_ones_twice_to_fill_the_last_batch(batch, world_size):
    order = epoch_order(COUNT, seed=0, epoch=0)
    shards = [BatchShard(batch=batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = zip(*(square_requests(order, shard, epoch=0, size=SIZE, start=0) for shard in shards), strict=True)
    seen = [index for step in steps for request in step for index in request.indices]
    assert len(seen) % (batch * world_size) == 0 and len(seen) - COUNT < batch * world_size
    assert sorted(seen[:COUNT]) == list(range(COUNT))
    assert seen[COUNT:] == (seen[:COUNT] * 3)[: len(seen) - COUNT]


def test_images_are_sampled_by_their_weights(loaders):
    weights = np.zeros(COUNT)
    weights[[2, 5]] = 1.0, 3.0
    orders = np.concatenate([epoch_order(COUNT, seed=0, epoch=epoch, weights=weights) for epoch in range(100)])
    assert set(orders.tolist()) == {2, 5}
    assert 0.7 < np.mean(orders == 5) < 0.8
    loader = loaders(workers=1)
    loader.image_weights = weights
    paths = {path for batch in loader.epoch(0) for path in batch.paths}
    assert paths <= {loader.store.path(2), loader.store.path(5)}


def test_images_of_rare_classes_with_low_ap_get_larger_weights():
    classes = [np.array([0, 0]), np.array([0, 1]), np.array([], np.int64)]
    weights = compute_image_weights(classes, np.array([0.5, 0.0]))  # 0.5^2 / 3 for each box of class 0, 1 for class 1
    assert weights == pytest.approx([2 / 15, 13 / 15, 0])
    assert compute_image_weights(classes, np.ones(2)) is None


@pytest.mark.parametrize("weights", [np.ones(3), np.zeros(COUNT), np.full(COUNT, -1.0), np.full(COUNT, np.nan)])
def test_invalid_weights_are_refused(weights):
    with pytest.raises(UsageError, match="weights for 10 images"):
        epoch_order(COUNT, seed=0, epoch=0, weights=weights)


@pytest.mark.parametrize(
    ("shapes", "hw"),
    [
        ([0.5, 0.75], (480, 640)),
        ([0.5, 0.76], (512, 640)),
        ([2.0, 4.0], (640, 320)),
        ([0.5, 2.0], (640, 640)),
        ([1.0], (640, 640)),
    ],
)
def test_a_rect_batch_is_as_small_as_its_images_allow(shapes, hw):
    assert rect_hw(np.array(shapes), size=640, stride=32) == hw


def test_rect_batches_have_similar_images_in_a_random_order():
    rng = np.random.default_rng(0)
    sides = rng.integers(10, 100, (50, 2))
    options = {"seed": 3, "size": 64, "stride": 8, "start": 0}
    epochs = [list(rect_requests(sides, BatchShard(batch=8), epoch=epoch, **options)) for epoch in range(2)]
    groups = [{request.indices: request.hw for request in requests} for requests in epochs]
    assert groups[0] == groups[1] and list(groups[0]) != list(groups[1])
    assert set().union(*groups[0]) == set(range(50)) and len(epochs[0]) == 7
    shapes = sides[:, 0] / sides[:, 1]
    for indices in groups[0]:
        low, high = shapes[list(indices)].min(), shapes[list(indices)].max()
        assert np.count_nonzero((shapes > low) & (shapes < high)) <= 6  # images of other batches have other ratios
    assert all(len(indices) == 8 and not request.mosaic for indices, request in zip(groups[0], epochs[0], strict=True))


def test_rect_batches_of_few_images_are_full():
    sides = np.array([[10, 20], [20, 10]])
    (request,) = rect_requests(sides, BatchShard(batch=5), seed=0, epoch=0, size=64, stride=8, start=0)
    assert request.indices == (0, 1, 0, 1, 0)


def test_rect_batches_have_different_shapes(loaders):
    shapes = {tuple(batch.images.shape) for batch in loaders(batch=2, rect=True, stride=8).epoch(0)}
    assert all(shape[1] % 8 == shape[2] % 8 == 0 for shape in shapes)
    assert any(shape[1] < shape[2] for shape in shapes) and any(shape[1] > shape[2] for shape in shapes)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_the_epoch_continues(loaders, tmp_path, workers):
    broken = random_dataset(tmp_path, HWS)
    broken.path(3).write_bytes(b"not an image")
    loader = loaders(batch=5, workers=workers, source=broken)
    batches = list(loader.epoch(0))
    problems = {problem for batch in batches for problem in batch.problems}
    assert len(batches) == 2 and len(problems) == 1
    assert "003.png" in problems.pop()


@pytest.mark.parametrize("workers", [0, 1])
def test_training_ends_if_no_image_can_be_read(loaders, tmp_path, workers):
    broken = random_dataset(tmp_path, HWS[:3])
    for index in range(3):
        broken.path(index).write_bytes(b"not an image")
    with pytest.raises(DatasetError, match="None of the 3 training images can be read"):
        list(loaders(workers=workers, source=broken).epoch(0))


@needs_fork
def test_a_dead_worker_is_reported_with_a_fix(loaders, monkeypatch):
    loader = loaders(workers=1)
    monkeypatch.setattr(loader.store, "load_scaled", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DeviceError, match="loads images died") as caught:
        list(loader.epoch(0))
    assert "--workers 0" in caught.value.fix and "--shm-size" in caught.value.fix
    loader.close()


@needs_fork
def test_full_shared_memory_is_reported_with_a_fix(loaders, monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DeviceError, match="No space left on device") as caught:
        list(loaders(workers=1).epoch(0))
    assert "--workers 0" in caught.value.fix and "--shm-size" in caught.value.fix


@needs_fork
def test_workers_that_cannot_start_are_reported_with_a_fix(loaders, monkeypatch):
    def full():
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", full)
    with pytest.raises(DeviceError, match="Cannot allocate memory"):
        list(loaders(workers=1).epoch(0))


def test_other_errors_are_not_reported_as_a_dead_worker(loaders, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("something else")

    for workers in (0, 1):
        loader = loaders(workers=workers)
        monkeypatch.setattr(loader.store, "load_scaled", broken)
        with pytest.raises(RuntimeError, match="something else"):
            list(loader.epoch(0))


def test_closing_stops_the_workers(loaders):
    before = set(psutil.Process().children())
    loader = loaders(workers=2)
    list(loader.epoch(0))
    workers = set(psutil.Process().children()) - before
    assert len(workers) >= 2
    loader.close()
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    loader.close()
    with pytest.raises(UsageError, match="closed"):
        next(loader.epoch(1))


@needs_fork
def test_an_interrupt_stops_the_workers_without_output(dataset):
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.training.test_dataloader import HYP, HWS, SIZE, Augmentation, ImageStore, TrainLoader, dataset_of
        from tests.support.training_images import record
        store = ImageStore(dataset_of([record({str(dataset.path(0))!r}, HWS[0])]), size=SIZE)
        loader = TrainLoader(store, Augmentation(hyp=HYP, size=SIZE), batch=2, workers=2, seed=0)
        try:
            for epoch in range(10**9):
                for batch in loader.epoch(epoch):
                    print(flush=True)
        except KeyboardInterrupt:
            loader.close()
            print("interrupted", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        process.stdout.readline()
        workers = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=STOP_S)
    finally:
        process.kill()
    assert out.endswith("interrupted\n") and err == "" and process.returncode == 0
    assert len(workers) >= 2 and not any(worker.is_running() for worker in workers)


@needs_fork
def test_workers_ignore_the_signals_that_stop_a_training(loaders):
    """A terminal or scheduler sends them to all processes, while the main process still finishes its step."""
    before = set(psutil.Process().children())
    loader = loaders(workers=1)
    expected = list(loader.epoch(0))
    for worker in set(psutil.Process().children()) - before:
        for number in (signal.SIGINT, signal.SIGTERM):
            worker.send_signal(number)
    time.sleep(0.1)
    assert_same(loader.epoch(0), expected)


@pytest.mark.parametrize(
    "options", [{"workers": -1}, {"seed": -1}, {"batch": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}]
)
def test_arguments_out_of_range_are_refused(loaders, options):
    with pytest.raises(UsageError):
        loaders(**options)


def test_store_and_augmentation_must_agree(dataset):
    with pytest.raises(UsageError, match="48 for samples of 64"):
        TrainLoader(ImageStore(dataset, size=48), Augmentation(hyp=HYP, size=64), batch=1, workers=0, seed=0)


def test_pinning_keeps_the_content_of_a_batch(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 0)
    batch = Batch(images=torch.ones(1, 2, 2, 3), targets=torch.ones(1, 6), paths=(Path("a"),), problems=("b",))
    pinned = batch.pin_memory()
    assert pinned.images is not batch.images and torch.equal(pinned.images, batch.images)
    assert (pinned.paths, pinned.problems) == (batch.paths, batch.problems)
