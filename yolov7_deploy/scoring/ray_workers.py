"""Detection by Ray Data: a pool of actors, each with a model of its own, on this machine or on a cluster.

Ray gives each actor a chunk of images at a time. If an actor dies, Ray starts another one, which gets the chunk again.
Call `prepare_ray` before this module is imported.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import ray.exceptions

from yolov7_deploy._output import is_verbose
from yolov7_deploy._process import keep_signal_handlers
from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import DeviceError, SourceError, UsageError, Y7Error
from yolov7_deploy.hardware.system import limit_cores, usable_cores
from yolov7_deploy.scoring.input import Chunk
from yolov7_deploy.scoring.scorer import OpenDetector, ScoredChunk, Scorer

CONNECT_TIMEOUT_S = 10.0
MAX_ATTEMPTS = 4  # at a chunk whose worker dies
_FIX = "Finished files are kept. Run the same command again with fewer workers, or with a smaller --batch."


@dataclass(frozen=True, kw_only=True, slots=True)
class RayWorkers:
    """The actors, see `ScoreOptions`; `device` is that of their models."""

    count: int
    batch: int
    cpus: float | None
    gpus: float | None
    device: str
    address: str | None

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda", "gpu"):
            raise UsageError(
                f"--device {self.device} names one GPU, but Ray chooses the GPU of each worker.", fix="--device cuda"
            )

    @property
    def actor_cpus(self) -> float:
        """CPU cores of each actor, which are also the threads of its model."""
        if self.cpus is not None:
            return self.cpus
        return 1 if self.address else max(1, (usable_cores() or os.cpu_count() or 1) // self.count)

    @property
    def actor_gpus(self) -> float:
        """GPUs of each actor."""
        return self.gpus if self.gpus is not None else float(self.device in ("cuda", "gpu"))


class Attempts:
    """Counts how often the work on each chunk began; runs as an actor of its own, which the death of others spares."""

    def __init__(self) -> None:
        self._begun = Counter[int]()

    def begin(self, first: int) -> int:
        """Return the number of this attempt, from 1, at the chunk that begins with an image."""
        self._begun[first] += 1
        return self._begun[first]


class RayScorer:
    """A `Scorer` as Ray Data calls it: with a batch of one chunk, a column of Python objects.

    Ray gives a chunk to another worker each time that one dies with it, without a limit: an image that crashes the
    decoder, or a batch that does not fit into memory, would go on for ever. So the attempts are counted.

    Args:
        open_detector: Function that opens the model.
        workers: The actors.
        attempts: Handle of the actor `Attempts`.
    """

    def __init__(self, open_detector: OpenDetector, workers: RayWorkers, attempts: Any) -> None:  # noqa: ANN401
        limit_cores(workers.actor_cpus)
        self._score, self._attempts = Scorer(open_detector, batch=workers.batch), attempts

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[ScoredChunk | Y7Error]]:
        """Return the records of each chunk, or its error: an exception would lose its type on the way."""
        return {"scored": [self._try(chunk) for chunk in batch["chunk"]]}

    def _try(self, chunk: Chunk) -> ScoredChunk | Y7Error:
        if ray.get(self._attempts.begin.remote(chunk.first)) > MAX_ATTEMPTS:
            name = next(chunk.items()).name
            return DeviceError(
                f"{MAX_ATTEMPTS} workers died while they processed the same {chunk.count} images, of which {name} is "
                "the first. The system kills workers when memory runs out; a damaged image can crash one, too.",
                fix=_FIX,
            )
        try:
            return self._score(chunk)
        except Y7Error as error:
            return error
        except MemoryError:
            return DeviceError("A worker ran out of memory.", fix=_FIX)


def score_on_ray(chunks: Iterable[Chunk], *, open_detector: OpenDetector, workers: RayWorkers) -> Iterator[ScoredChunk]:
    """Yield the records of all chunks, in any order.

    Raises:
        UsageError: There is no cluster at the address.
        DeviceError: The cluster does not have the CPUs or GPUs, or a worker died repeatedly or ran out of memory.
        Y7Error: An error in a worker, as it was raised there.
    """
    with _connected(workers):
        _check_resources(workers)
        try:
            for row in _dataset(list(chunks), open_detector, workers).iter_rows():
                if isinstance(row["scored"], Y7Error):
                    raise row["scored"]
                yield row["scored"]
        except (ray.exceptions.RayError, RuntimeError) as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise SourceError(f"Ray stopped: {reason}", fix="Its log says why:  y7 -v score") from error


def _dataset(chunks: Sequence[Chunk], open_detector: OpenDetector, workers: RayWorkers) -> Any:  # noqa: ANN401
    """Return the lazy dataset of records; each chunk is a block, which Ray gives to an actor as a whole."""
    attempts = ray.remote(Attempts).options(num_cpus=0).remote()
    rows = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=len(chunks))
    return rows.map_batches(
        RayScorer,
        fn_constructor_args=(open_detector, workers, attempts),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers.count, len(chunks))),
        num_cpus=workers.actor_cpus,
        num_gpus=workers.actor_gpus,
    )


@contextlib.contextmanager
def _connected(workers: RayWorkers) -> Iterator[None]:
    """Connect to the cluster, or start Ray on this machine, until the block ends."""
    options: dict[str, Any] = {"address": "local", "include_dashboard": False}
    if not is_verbose():  # the core of Ray prints its errors, also those that it deals with
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options["num_cpus"] = max(1, math.ceil(workers.count * workers.actor_cpus))
    if workers.address:
        options = {"address": workers.address}
        _check_address(workers.address)
    try:
        with keep_signal_handlers():  # Ray has a handler of its own for SIGTERM
            ray.init(log_to_driver=is_verbose(), logging_level="INFO" if is_verbose() else "ERROR", **options)
    except (ConnectionError, ValueError, OSError) as error:
        raise _no_cluster(workers.address, error) if workers.address else _not_started(error) from error
    except Exception as error:
        if type(error) is not Exception:  # what Ray raises if the machine is too busy for its limit of 30 seconds
            raise
        raise _not_started(error) from error
    try:
        _be_quiet()
        yield
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _not_started(error: Exception) -> DeviceError:
    """Return the error for a Ray that does not start on this machine: too busy, no memory, or no temporary folder."""
    return DeviceError(
        f"Ray did not start: {_first_line(error)}.",
        fix="Repeat it when the machine is less busy, or leave out --workers. If Ray's folder is the reason, "
        "choose another one:  export RAY_TMPDIR=/tmp",
    )


def _check_address(address: str) -> None:
    """Connect to the address of a cluster once: Ray would try for minutes.

    Raises:
        UsageError: No program listens there, or it is not an address.
    """
    if address == "auto":  # Ray looks for a cluster on this machine
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UsageError:
    reason = getattr(error, "strerror", None) or _first_line(error)
    return UsageError(
        f"Ray does not answer at {address}: {reason}.",
        fix="Start it, and pass the address that it prints:  ray start --head   Or leave out --address",
    )


def _be_quiet() -> None:
    """Leave the output to this package; `y7 -v` shows that of Ray."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = is_verbose()
    if not is_verbose():
        get_logger("ray.data").setLevel("ERROR")


def _check_resources(workers: RayWorkers) -> None:
    """Check that all actors fit into the cluster; those that do not would wait for ever.

    Raises:
        DeviceError: The cluster is too small.
    """
    available = ray.cluster_resources()
    for name, option, each in (("CPU", "--cpus", workers.actor_cpus), ("GPU", "--gpus", workers.actor_gpus)):
        needed, present = workers.count * each, float(available.get(name, 0))
        if needed > present:
            raise DeviceError(
                f"{workers.count} workers with {each:g} {name}s each need {needed:g}, but Ray has {present:g}.",
                fix=f"Use fewer:  --workers {int(present // each)}   or less for each:  {option} 0.5",
            )
