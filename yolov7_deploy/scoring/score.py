"""Detection in millions of images: in this process, or by Ray on the cores and machines of a cluster.

The input is divided into shards. Each has a file of its own in the output folder, which is complete or absent, so a run
that was interrupted does only what is missing when it is started again.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolov7_deploy._console import write_json
from yolov7_deploy._output_folder import lock_run_folder
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import SourceError, UsageError, missing_library
from yolov7_deploy.scoring.input import Chunk, ScoreInput
from yolov7_deploy.scoring.output import (
    COCO_RESULTS,
    FORMATS,
    SCHEMA,
    SUMMARY,
    CocoIds,
    Shards,
    ShardWriter,
    create_output,
    open_output,
    read_ids,
    write_coco,
)
from yolov7_deploy.scoring.scorer import OpenDetector, ScoredChunk, Scorer
from yolov7_deploy.sources import Skipped

BATCH, SHARD_SIZE = 8, 1000
_CHUNK = 64  # images; what is lost if a worker dies
_CHUNKS_PER_WORKER = 4  # at least, so that the workers finish together
_NOT_IN_SETTINGS = ("device",)  # the results of one run may come from different devices

Progress = Callable[[int, int], None]
RunChunks = Callable[[Iterable[Chunk]], Iterator[ScoredChunk]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """Options of `score`.

    Attributes:
        workers: Number of processes with a model of their own, which Ray starts; 0 runs everything in this process.
        batch: Number of images in each call of a model.
        cpus: CPU cores of each worker; `None` divides those of this machine.
        gpus: GPUs of each worker, also a fraction; `None` is 1 if `device` is a GPU, else 0.
        address: Address of a running Ray cluster; `None` starts Ray on this machine, for this run.
        format: Format of the shards, `jsonl` or `parquet`.
        shard_size: Number of images in each file.
        coco: COCO annotation file with the ids for `coco_results.json`; `None` does not write it.
    """

    workers: int = 0
    batch: int = BATCH
    cpus: float | None = None
    gpus: float | None = None
    address: str | None = None
    format: str = "jsonl"
    shard_size: int = SHARD_SIZE
    coco: Path | None = None

    def __post_init__(self) -> None:
        for name, lowest in (("workers", 0), ("batch", 1), ("shard_size", 1)):
            if getattr(self, name) < lowest:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"{option} must be at least {lowest}, not {getattr(self, name)}.", fix=f"For example: {option} 2"
                )
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"--{name} must be at least 0, not {value}.", fix=f"For example: --{name} 1")
        if self.format not in FORMATS:
            raise UsageError(f"--format {self.format} is unknown.", fix=f"One of: {', '.join(FORMATS)}")
        given = {"--cpus": self.cpus, "--gpus": self.gpus, "--address": self.address}
        needless = [name for name, value in given.items() if value is not None]
        if needless and not self.workers:
            raise UsageError(f"{needless[0]} has no effect without workers of Ray.", fix="Add  --workers 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReport:
    """The result of a run.

    Attributes:
        images: Number of images of the input.
        processed: Number of those that this run processed; earlier runs processed the others.
        detections: Number of detections in all images.
        unreadable: Images that could not be read, with reasons.
        shards: Number of output files.
        resumed: Number of those that existed before this run.
        seconds: Duration of this run, with the start of the workers.
        workers: Number of images that each process did, by `HOST:PROCESS_ID`.
        coco_rows: Number of rows in `coco_results.json`; `None` without it.
        notes: What was left out of that file.
    """

    images: int
    processed: int
    detections: int
    unreadable: tuple[Skipped, ...]
    shards: int
    resumed: int
    seconds: float
    workers: Mapping[str, int]
    coco_rows: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def images_per_second(self) -> float:
        """The throughput of this run, with the start of the workers."""
        return self.processed / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {"schema": SCHEMA, **asdict(self), "images_per_second": round(self.images_per_second, 3)}


def score(
    source: ScoreInput,
    output: Path,
    *,
    weights: Path,
    detector: Mapping[str, Any],
    options: ScoreOptions,
    progress: Progress = lambda done, total: None,
) -> ScoreReport:
    """Detect the objects in all images of the input, and write one file per shard.

    Shards that exist are not done again. Images that cannot be read are counted and named in the report, and their
    records have the reason.

    Args:
        source: The images, see `open_input`.
        output: The output folder: a new or empty one, or that of a run with the same settings, which is resumed.
        weights: The model file; it must exist under this path on every machine of a cluster.
        detector: Further arguments of `Detector`.
        options: See `ScoreOptions`.
        progress: Called with the number of finished and of all images.

    Raises:
        UsageError: The folder cannot be written, has other files, or has results of a run with other settings.
        SourceError: No image can be read, or a file of the input or output is damaged.
        DeviceError: A worker ran out of memory, or died repeatedly.
        LoadError: The model cannot be opened.
    """
    started = time.perf_counter()
    run = _runner(functools.partial(Detector, weights.absolute(), **detector), detector.get("device"), options)
    ids = None if options.coco is None else read_ids(options.coco)
    shards = Shards(folder=output, images=len(source), size=options.shard_size, format=options.format)
    create_output(output)
    with lock_run_folder(output, activity="being written by", harm="mix their results"):
        open_output(output, settings=_settings(source, weights, detector, options))
        missing = shards.missing()
        workers = _fill(source, shards, missing, run=run, options=options, progress=progress)
        report = _summarize(
            shards, ids=ids, resumed=len(shards) - len(missing), workers=workers, seconds=time.perf_counter() - started
        )
        write_json(report.to_dict(), output / SUMMARY)
    if len(report.unreadable) == report.images:
        first = report.unreadable[0]
        raise SourceError(f"None of the {report.images:,} images can be read: {first.reason}", fix="Check the paths.")
    return report


def _settings(source: ScoreInput, weights: Path, detector: Mapping[str, Any], options: ScoreOptions) -> dict[str, Any]:
    """Return everything that the results depend on."""
    return {
        "weights": weights.name,
        "weights_sha256": sha256_hex(weights),
        **{name: value for name, value in detector.items() if name not in _NOT_IN_SETTINGS},
        "images": len(source),
        "images_sha256": source.digest(),
        "format": options.format,
        "shard_size": options.shard_size,
    }


def _fill(
    source: ScoreInput,
    shards: Shards,
    missing: Sequence[int],
    *,
    run: RunChunks,
    options: ScoreOptions,
    progress: Progress,
) -> Counter[str]:
    """Write the missing shards; return the number of images of each worker."""
    wanted = [shards.numbers(shard) for shard in missing]
    total = sum(map(len, wanted))
    done, workers = len(source) - total, Counter[str]()
    if not total:
        return workers
    writer = ShardWriter(shards)
    for scored in run(source.chunks(wanted, size=chunk_size(total, options))):
        for number, record in enumerate(scored.records, start=scored.first):
            writer.add(number, record)
        workers[scored.worker] += len(scored.records)
        done += len(scored.records)
        progress(done, len(source))
    return workers


def chunk_size(images: int, options: ScoreOptions) -> int:
    """Return the number of images that a worker gets at a time: whole batches, and several times for each worker."""
    share = math.ceil(images / (max(options.workers, 1) * _CHUNKS_PER_WORKER))
    batches = math.ceil(min(share, _CHUNK) / options.batch)
    return max(1, batches) * options.batch


def _runner(open_detector: OpenDetector, device: object, options: ScoreOptions) -> RunChunks:
    """Return the function that detects the objects in chunks, in this process or on Ray.

    Raises:
        MissingLibraryError: Ray is not installed.
        UsageError: The device is one that Ray chooses.
    """
    if not options.workers:
        return functools.partial(_score_here, Scorer(open_detector, batch=options.batch))
    prepare_ray(is_local=options.address is None)
    try:
        from yolov7_deploy.scoring.ray_workers import RayWorkers, score_on_ray
    except ModuleNotFoundError as error:
        raise missing_library(error, f"for --workers {options.workers}") from error
    workers = RayWorkers(
        count=options.workers,
        batch=options.batch,
        cpus=options.cpus,
        gpus=options.gpus,
        device=str(device or "auto"),
        address=options.address,
    )
    return functools.partial(score_on_ray, open_detector=open_detector, workers=workers)


def prepare_ray(*, is_local: bool) -> None:
    """Set the environment of Ray in this process and those it starts; call this before Ray is imported.

    Ray sends no usage statistics to its authors. Variables that are set already are not changed.

    Args:
        is_local: Ray runs on this machine only, so it listens on 127.0.0.1 only.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if is_local:
        # On every system, despite its name: without clusters, Ray uses the loopback interface
        # (ray/_private/services.py, `get_node_ip_address`).
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _score_here(scorer: Scorer, chunks: Iterable[Chunk]) -> Iterator[ScoredChunk]:
    with contextlib.closing(scorer):
        yield from map(scorer, chunks)


def _summarize(
    shards: Shards, *, ids: CocoIds | None, resumed: int, workers: Mapping[str, int], seconds: float
) -> ScoreReport:
    """Read all shards, of this run and of earlier ones; write the COCO results on the way."""
    unreadable: list[Skipped] = []
    detections = 0

    def records() -> Iterator[dict[str, Any]]:
        nonlocal detections
        for shard in range(len(shards)):
            for record in shards.read(shard):
                detections += len(record["detections"])
                if "error" in record:
                    unreadable.append(Skipped(path=record["path"], reason=record["error"]))
                yield record

    if ids is None:
        for _ in records():
            pass
    rows = None if ids is None else write_coco(records(), shards.folder / COCO_RESULTS, ids=ids)
    return ScoreReport(
        images=shards.images,
        processed=sum(workers.values()),
        detections=detections,
        unreadable=tuple(unreadable),
        shards=len(shards),
        resumed=resumed,
        seconds=seconds,
        workers=dict(workers),
        coco_rows=rows,
        notes=_coco_notes(ids),
    )


def _coco_notes(ids: CocoIds | None) -> tuple[str, ...]:
    if ids is None:
        return ()
    notes = []
    if ids.unknown_images:
        notes.append(f"{len(ids.unknown_images)} images have no id, such as {ids.unknown_images[0]}")
    if ids.unknown_classes:
        notes.append(f"these classes have no id: {', '.join(sorted(ids.unknown_classes))}")
    return tuple(notes)
