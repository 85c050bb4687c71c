"""Batches of augmented images, made by worker processes while the device computes."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from yolov7_deploy.datasets.samples import DoubleArray
from yolov7_deploy.errors import DeviceError, UsageError, Y7Error
from yolov7_deploy.training.augment import Augmentation, make_scene
from yolov7_deploy.training.dataset import ImageReader, ImageStore
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.training.sampler import Request, Share, mixed_order, mixed_requests, rect_requests

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class TrainLoader:
    """The batches of each epoch, the same ones whatever the number of workers, and from any step on.

    Every scene is a function of seed, epoch and its position in the epoch. Processes that train together see in a
    step exactly what one process with all their images would see.

    Attributes:
        store: Images and labels.
        order_weights: float64 [N], how often each image comes in the epochs that begin from now on, relatively, not
            in `rect`; `None` is each once.
        steps: Batches of an epoch; each is full, so the last one may show images a second time.
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
        world: int = 1,
        rect: bool = False,
        stride: int = 32,
        pin_memory: bool = False,
    ) -> None:
        """Prepares the loader; workers start with the first epoch.

        Args:
            store: Images and labels, of the size of `augmentation`.
            augmentation: What is done to them.
            batch: Images in a batch of this process.
            workers: Processes that make batches; 0 makes them here, when they are asked for.
            seed: Of every choice.
            rank: Number of this process among those that train together.
            world: How many these are.
            rect: Batches of images of similar shape, without mosaics.
            stride: Sides of such batches are multiples of this.
            pin_memory: Batches lie in page-locked memory, from where a GPU takes them while it computes.

        Raises:
            UsageError: Numbers that cannot mean anything.
        """
        if workers < 0 or seed < 0 or store.size != augmentation.size:
            raise UsageError(
                f"{workers} workers, seed {seed}, images of {store.size} for scenes of {augmentation.size} pixels.",
                fix="Workers and seed go from 0, and both sizes are one.",
            )
        self.store, self._size, self._seed = store, augmentation.size, seed
        self.order_weights: DoubleArray | None = None
        self._share = Share(batch=batch, rank=rank, world=world)
        self._rect, self._stride = rect, stride
        self._requests = _Requests()
        self.steps = -(-len(store) // self._share.whole)
        self._loader: DataLoader[Batch | Y7Error] | None = DataLoader(
            _Scenes(store, augmentation, seed=seed),
            batch_size=None,  # an element is a whole batch
            sampler=self._requests,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            multiprocessing_context=_context() if workers else None,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each epoch would take a number from the generator of the training
        )

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on, exactly those that a whole epoch shows there.

        Args:
            epoch: From 0.
            start: The first step.

        Raises:
            DatasetError: No image can be read.
            DeviceError: A worker died.
            UsageError: Weights that do not fit, or after `close`.
        """
        if self._loader is None:
            raise UsageError("The loader is closed.", fix="Make a new TrainLoader.")
        self._requests.coming = list(self._requested(epoch, start))
        try:
            batches = iter(self._loader) if self._requests.coming else iter(())
        except OSError as error:  # of the fork
            raise _no_memory(f"No process to load images can be started: {error}.") from error
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise _no_memory(f"A process that loads images died: {error}") from error
            if batch is None:
                return
            if isinstance(batch, Y7Error):
                raise batch
            yield batch

    def _requested(self, epoch: int, start: int) -> Iterator[Request]:
        if self._rect:
            sides = np.array([self.store.hw(index) for index in range(len(self.store))])
            return rect_requests(
                sides, self._share, seed=self._seed, epoch=epoch, size=self._size, stride=self._stride, start=start
            )
        order = mixed_order(len(self.store), seed=self._seed, epoch=epoch, weights=self.order_weights)
        return mixed_requests(order, self._share, epoch=epoch, size=self._size, start=start)

    def close(self) -> None:
        """Ends the workers."""
        loader, self._loader = self._loader, None
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            with contextlib.suppress(RuntimeError):  # a worker that died is told once, by `epoch`
                iterator._shutdown_workers()


class _Requests(Sampler[Request]):
    """What the loader hands to its workers next."""

    def __init__(self) -> None:
        self.coming: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.coming)

    def __len__(self) -> int:
        return len(self.coming)


class _Scenes(Dataset[Batch | Y7Error]):
    """Makes batches, in a worker; errors of ours travel as values, since torch would wrap them in their traceback."""

    def __init__(self, store: ImageStore, augmentation: Augmentation, *, seed: int) -> None:
        self._store, self._augmentation, self._seed = store, augmentation, seed

    def __getitem__(self, request: Request) -> Batch | Y7Error:
        try:
            return make_batch(self._store, self._augmentation, request, seed=self._seed)
        except Y7Error as error:
            return error


def make_batch(store: ImageStore, augmentation: Augmentation, request: Request, *, seed: int) -> Batch:
    """The batch that is asked for: a function of its arguments and of the files.

    Raises:
        DatasetError: No image can be read.
    """
    reader = ImageReader(store)
    images = _empty((len(request.indices), *request.hw, 3))
    targets = []
    for number, (position, index) in enumerate(zip(request.positions, request.indices, strict=True)):
        found = make_scene(
            reader,
            augmentation,
            index=index,
            epoch=request.epoch,
            out=images[number].numpy(),
            mosaic=request.mosaic,
            rng=np.random.default_rng((seed, request.epoch, position)),
        )
        targets.append(np.insert(found, 0, number, axis=1))
    if not reader.has_read:
        store.require_a_image()
    return Batch(
        images=images,
        targets=torch.from_numpy(np.concatenate(targets)),
        paths=tuple(store.path(index) for index in request.indices),
        problems=tuple(reader.problems[index] for index in sorted(reader.problems)),
    )


def _as_it_is(batch: list[Batch]) -> list[Batch]:
    return batch  # torch's type says list; without a batch size it is the element


def _start_worker(number: int) -> None:
    _keep_memory()
    cv2.setNumThreads(0)  # the batches are in parallel already
    for number_of in (signal.SIGINT, signal.SIGTERM):  # the process that trains ends the workers
        signal.signal(number_of, signal.SIG_IGN)


def _keep_memory() -> None:
    """Lets the C library keep up to 128 MB that were freed for the next image, where it can be told so.

    Every image would be handed out by the system, page by page, and given back: a fifth of a worker's time.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_TRIM_THRESHOLD, 2**27)
        set_option(_M_MMAP_THRESHOLD, 2**25)


def _context() -> str | None:
    """Forked workers share the cache of the store; a system without them has its own way."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    """Memory for a batch, uint8; in a worker it is shared, so that nothing is copied when the batch is handed over."""
    images = torch.empty(shape, dtype=torch.uint8)
    if get_worker_info() is None:
        return images
    try:
        images.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise _no_memory(f"A batch of {images.nbytes / 1e6:.0f} MB cannot be handed over: {error}") from error
    return images


def _no_memory(what: str) -> DeviceError:
    return DeviceError(
        f"{what.strip().splitlines()[0]} Mostly memory is short, or /dev/shm is full.",
        fix="Fewer processes, or none:  --workers 0      In a container:  docker run --shm-size 8g ...",
    )
