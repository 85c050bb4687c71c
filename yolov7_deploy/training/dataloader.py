"""The images of an epoch in order, and batches of them, augmented by worker processes while the device computes."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from yolov7_deploy._process import ENDING_SIGNALS
from yolov7_deploy.datasets.samples import DoubleArray, IntArray
from yolov7_deploy.errors import DeviceError, UsageError, Y7Error
from yolov7_deploy.training.augment import Augmentation, make_sample
from yolov7_deploy.training.dataset import ImageReader, ImageStore
from yolov7_deploy.training.sample import Batch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h of glibc


def compute_image_weights(class_ids: Sequence[IntArray], aps: DoubleArray) -> DoubleArray | None:
    """Return sampling weights of images, float64 [N], sum 1, so that rare classes with low AP are sampled more often.

    The weight of an image is proportional to the sum over its boxes of (1 - AP_c)^2 / n_c, with n_c boxes of class c.

    Args:
        class_ids: Classes of the boxes of each image.
        aps: AP of each class, [C].

    Returns:
        `None` if there is no box.
    """
    counts = np.stack([np.bincount(ids, minlength=len(aps)) for ids in class_ids])
    weights: DoubleArray = counts @ ((1 - aps) ** 2 / np.maximum(counts.sum(0), 1))
    total = float(weights.sum())
    return weights / total if total > 0 else None


_ORDER = 1  # separates the random numbers of an epoch's order from those of its samples


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRequest:
    """A request for one batch.

    Attributes:
        epoch: Number of the epoch.
        positions: Positions of the samples in the epoch; seed, epoch and position determine all choices in a sample.
        indices: The first image of each sample.
        hw: Height and width of the samples.
        mosaic: Allow mosaics.
    """

    epoch: int
    positions: tuple[int, ...]
    indices: tuple[int, ...]
    hw: tuple[int, int]
    mosaic: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShard:
    """The part of a step's images that one process takes; all parts together are the batch of a single process.

    Attributes:
        batch: Images per step and process.
        rank: Number of this process.
        world_size: Number of processes.
    """

    batch: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"A batch of {self.batch} for process {self.rank} of {self.world_size} is not possible.",
                fix="For example:  --batch 16",
            )

    @property
    def total_batch(self) -> int:
        """Images per step of all processes."""
        return self.batch * self.world_size

    def positions(self, step: int) -> range:
        """Return the positions in the epoch that this process takes in a step."""
        start = step * self.total_batch + self.rank * self.batch
        return range(start, start + self.batch)


def epoch_order(count: int, *, seed: int, epoch: int, weights: DoubleArray | None = None) -> IntArray:
    """Return the images of an epoch, int64 [count]: a permutation, or a sample with replacement if there are weights.

    Raises:
        UsageError: There is not one non-negative weight per image, or all are 0.
    """
    rng = np.random.default_rng((seed, epoch, 0, _ORDER))
    if weights is None:
        return rng.permutation(count)
    total = float(weights.sum())
    if weights.shape != (count,) or not 0 < total < np.inf or weights.min() < 0:
        raise UsageError(f"{len(weights)} weights for {count} images.", fix="Give one number, 0 or larger, per image.")
    return rng.choice(count, size=count, p=weights / total)


def square_requests(order: IntArray, shard: BatchShard, *, epoch: int, size: int, start: int) -> Iterator[BatchRequest]:
    """Yield the square batches of an epoch from step `start`; the first images are repeated to fill the last batch."""
    for step in range(start, -(-len(order) // shard.total_batch)):
        positions = shard.positions(step)
        indices = order[np.array(positions) % len(order)].tolist()
        yield BatchRequest(
            epoch=epoch, positions=tuple(positions), indices=tuple(indices), hw=(size, size), mosaic=True
        )


def rect_requests(
    image_hw: IntArray, shard: BatchShard, *, seed: int, epoch: int, size: int, stride: int, start: int
) -> Iterator[BatchRequest]:
    """Yield batches of images with similar aspect ratios, as small as possible; only the batch order is random.

    An incomplete batch is filled with images of the batch before it.

    Args:
        image_hw: int64 [N, 2], height and width of each image.
        shard: The part of this process; all processes have the same batch shape in a step.
        seed: Random seed of the order.
        epoch: Number of the epoch, which also determines the order.
        size: The longer side.
        stride: Height and width are multiples of this.
        start: The first step.
    """
    aspect_ratios = image_hw[:, 0] / image_hw[:, 1]
    order = np.argsort(aspect_ratios, kind="stable")
    steps = -(-len(order) // shard.total_batch)
    groups = np.random.default_rng((seed, epoch, 0, _ORDER)).permutation(steps)
    for step in range(start, steps):
        first = min(int(groups[step]) * shard.total_batch, max(0, len(order) - shard.total_batch))
        group = order[(first + np.arange(shard.total_batch)) % len(order)]
        chosen = slice(shard.rank * shard.batch, (shard.rank + 1) * shard.batch)
        yield BatchRequest(
            epoch=epoch,
            positions=tuple(shard.positions(step)),
            indices=tuple(group[chosen].tolist()),
            hw=rect_hw(aspect_ratios[group], size=size, stride=stride),
            mosaic=False,
        )


ROUNDING = 1e-9  # of a quotient, so that a side that is a multiple of the stride is not rounded up


def rect_hw(aspect_ratios: DoubleArray, *, size: int, stride: int) -> tuple[int, int]:
    """Return height and width of a batch of images with these ratios height / width, as in the official program."""
    low, high = float(aspect_ratios.min()), float(aspect_ratios.max())
    height, width = (high, 1.0) if high < 1 else (1.0, 1 / low) if low > 1 else (1.0, 1.0)
    tall, wide = (int(np.ceil(side * size / stride - ROUNDING)) * stride for side in (height, width))
    return tall, wide


class TrainLoader:
    """Yields the batches of an epoch, which do not depend on the number of workers or on the first step.

    A sample is a function of seed, epoch and its position in the epoch. In distributed training, the batches of all
    processes together are exactly the batch of a single process.

    Attributes:
        store: Images and labels.
        image_weights: float64 [N], relative frequency of each image in epochs that start from now on (not with `rect`);
            `None` samples each image once.
        steps: Number of batches of an epoch. All are full, so the last one can repeat images.
    """

    def __init__(
        self,
        store: ImageStore,
        augmentation: Augmentation,
        *,
        batch: int,
        workers: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        rect: bool = False,
        stride: int = 32,
        pin_memory: bool = False,
    ) -> None:
        """Prepare the loader; workers start with the first epoch.

        Args:
            store: Images and labels, with the size of `augmentation`.
            augmentation: Settings of the augmentation.
            batch: Images per batch of this process.
            workers: Number of worker processes; with 0, batches are created in this process on request.
            seed: Random seed.
            rank: Number of this process in distributed training.
            world_size: Number of processes in distributed training.
            rect: Use batches of images with similar aspect ratios, without mosaics.
            stride: Height and width of these batches are multiples of this.
            pin_memory: Return batches in page-locked memory, for asynchronous copies to a GPU.

        Raises:
            UsageError: A number is out of range, or the sizes differ.
        """
        if workers < 0 or seed < 0 or store.size != augmentation.size:
            raise UsageError(
                f"{workers} workers, seed {seed}, images of {store.size} for samples of {augmentation.size} pixels.",
                fix="Use workers and seed of at least 0, and the same size for store and augmentation.",
            )
        self.store, self._size, self._seed = store, augmentation.size, seed
        self.image_weights: DoubleArray | None = None
        self._shard = BatchShard(batch=batch, rank=rank, world_size=world_size)
        self._rect, self._stride = rect, stride
        self._requests = _RequestSampler()
        self.steps = -(-len(store) // self._shard.total_batch)
        self._loader: DataLoader[Batch | Y7Error] | None = DataLoader(
            _BatchDataset(store, augmentation, seed=seed),
            batch_size=None,  # an element is a whole batch
            sampler=self._requests,
            collate_fn=_identity,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            multiprocessing_context=_multiprocessing_context() if workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # otherwise each epoch would advance the global generator of the training
        )

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step `start`; they are the same as those of a complete epoch.

        Args:
            epoch: Number of the epoch, from 0.
            start: The first step.

        Raises:
            DatasetError: No image can be read.
            DeviceError: A worker process died.
            UsageError: `image_weights` are invalid, or the loader is closed.
        """
        if self._loader is None:
            raise UsageError("The loader is closed.", fix="Create a new TrainLoader.")
        self._requests.pending = list(self._epoch_requests(epoch, start))
        try:
            batches = iter(self._loader) if self._requests.pending else iter(())
        except OSError as error:  # fork failed
            raise _out_of_memory(f"A process that loads images cannot be started: {error}.") from error
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise _out_of_memory(f"A process that loads images died: {error}") from error
            if batch is None:
                return
            if isinstance(batch, Y7Error):
                raise batch
            yield batch

    def _epoch_requests(self, epoch: int, start: int) -> Iterator[BatchRequest]:
        if self._rect:
            image_hw = np.array([self.store.hw(index) for index in range(len(self.store))])
            return rect_requests(
                image_hw, self._shard, seed=self._seed, epoch=epoch, size=self._size, stride=self._stride, start=start
            )
        order = epoch_order(len(self.store), seed=self._seed, epoch=epoch, weights=self.image_weights)
        return square_requests(order, self._shard, epoch=epoch, size=self._size, start=start)

    def close(self) -> None:
        """Stop the workers."""
        loader, self._loader = self._loader, None
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            with contextlib.suppress(RuntimeError):  # `epoch` has already reported a worker that died
                iterator._shutdown_workers()


class _RequestSampler(Sampler[BatchRequest]):
    """The requests that the loader passes to its workers next."""

    def __init__(self) -> None:
        self.pending: Sequence[BatchRequest] = ()

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.pending)

    def __len__(self) -> int:
        return len(self.pending)


class _BatchDataset(Dataset[Batch | Y7Error]):
    """Creates batches in a worker; our errors are returned as values, because torch would add a traceback to them."""

    def __init__(self, store: ImageStore, augmentation: Augmentation, *, seed: int) -> None:
        self._store, self._augmentation, self._seed = store, augmentation, seed

    def __getitem__(self, request: BatchRequest) -> Batch | Y7Error:
        try:
            return make_batch(self._store, self._augmentation, request, seed=self._seed)
        except Y7Error as error:
            return error


def make_batch(store: ImageStore, augmentation: Augmentation, request: BatchRequest, *, seed: int) -> Batch:
    """Return the requested batch, which depends only on the arguments and on the image files.

    Raises:
        DatasetError: No image can be read.
    """
    reader = ImageReader(store)
    images = _allocate_images((len(request.indices), *request.hw, 3))
    targets = []
    for number, (position, index) in enumerate(zip(request.positions, request.indices, strict=True)):
        sample_targets = make_sample(
            reader,
            augmentation,
            index=index,
            epoch=request.epoch,
            out=images[number].numpy(),
            mosaic=request.mosaic,
            rng=np.random.default_rng((seed, request.epoch, position)),
        )
        targets.append(np.insert(sample_targets, 0, number, axis=1))
    if not reader.has_read:
        store.require_readable_image()
    return Batch(
        images=images,
        targets=torch.from_numpy(np.concatenate(targets)),
        paths=tuple(store.path(index) for index in request.indices),
        problems=tuple(reader.problems[index] for index in sorted(reader.problems)),
    )


def _identity(batch: list[Batch]) -> list[Batch]:
    return batch  # torch types this as a list; without a batch size it is a single element


def _start_worker(worker_id: int) -> None:
    _keep_freed_memory()
    cv2.setNumThreads(0)  # workers already run in parallel
    for number in ENDING_SIGNALS:  # the main process stops the workers
        signal.signal(number, signal.SIG_IGN)


def _keep_freed_memory() -> None:
    """Let glibc keep up to 128 MB of freed memory for the next image; other C libraries are left unchanged.

    Otherwise the system maps and unmaps the pages of every image, which takes a fifth of a worker's time.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_TRIM_THRESHOLD, 2**27)
        set_option(_M_MMAP_THRESHOLD, 2**25)


def _multiprocessing_context() -> str | None:
    """Return "fork" if available, so that workers share the cache of the store, or `None` for the default."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def _allocate_images(shape: tuple[int, ...]) -> torch.Tensor:
    """Allocate the images of a batch, uint8; in a worker in shared memory, so that passing the batch copies nothing."""
    images = torch.empty(shape, dtype=torch.uint8)
    if get_worker_info() is None:
        return images
    try:
        images.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise _out_of_memory(
            f"A batch of {images.nbytes / 1e6:.0f} MB cannot be put into shared memory: {error}"
        ) from error
    return images


def _out_of_memory(message: str) -> DeviceError:
    return DeviceError(
        f"{message.strip().splitlines()[0]} The usual reason is too little memory, or a full /dev/shm.",
        fix="Use fewer processes, or none:  --workers 0      In a container:  docker run --shm-size 8g ...",
    )
