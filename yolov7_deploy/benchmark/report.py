"""SpeedReport: what a benchmark measured, on what, and how; the document that `--json` writes and `--compare` reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yolov7_deploy._serialization import from_plain, shown
from yolov7_deploy.errors import UsageError
from yolov7_deploy.hardware.clocks import Clocks

SCHEMA = 1

# In the order of the work. `end_to_end` is the wall time of the same call without any measuring inside it.
SPANS = ("preprocess", "upload", "engine", "download", "postprocess", "end_to_end")
BUSY = 0.05  # of the machine's processor time for others: from here on times are theirs as well


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanTime:
    """Milliseconds that a span took per call (a call runs a whole batch).

    Attributes:
        name: One of `SPANS`.
        p50, p90, p99, mean, least: Over all calls.
        blocks: Medians of consecutive equal parts of the run; calls next to each other are alike, blocks less so, so
            they are what two runs are compared by.
    """

    name: str
    p50: float
    p90: float
    p99: float
    mean: float
    least: float
    blocks: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """Electric energy while a row was measured.

    Attributes:
        source: What measured it, and what it covers: `NVML (GPU board)`, `INA3221 VDD_IN`, `RAPL (processor package)`.
        watts: Mean power while the calls ran.
        idle_watts: Mean power just before, with the model loaded and nothing running; `None` where not measured.
        joules_per_image: Mean power divided by throughput, idle power included.
        samples: Readings behind the mean.
    """

    source: str
    watts: float
    idle_watts: float | None
    joules_per_image: float
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedRow:
    """One batch size with one number of threads.

    Attributes:
        batch: Images that enter the network together.
        threads: Callers at the same time.
        calls: End to end, by a single caller: what the percentiles are of.
        images, seconds: Done by all callers together, and how long that took.
        images_per_second: Of all threads together, end to end.
        spans: One for each of `SPANS`, of a single caller; rows of one batch size share them.
        other_load: Share of the machine's processor time that other programs had meanwhile, 0 to 1; `None` where the
            system does not tell.
        loaded: Time of a call while all callers were at work, end to end; `None` for a single caller.
        warmup_calls, warmup_s: Before anything was measured.
        settled: The warm-up ended because times had become stable, not because its limit was reached.
        host_peak_bytes: Highest resident memory of this process.
        gpu_peak_bytes: Highest memory in use on the GPU by anybody, above what was in use before the model was
            loaded; `None` without a GPU.
        energy: `None` where nothing measures power; `energy_absent` says why.
        clocks: `None` where nothing tells them.
    """

    batch: int
    threads: int
    calls: int
    images: int
    seconds: float
    images_per_second: float
    spans: tuple[SpanTime, ...]
    warmup_calls: int
    warmup_s: float
    settled: bool
    host_peak_bytes: int
    gpu_peak_bytes: int | None
    energy: Energy | None
    energy_absent: str = ""
    clocks: Clocks | None = None
    loaded: SpanTime | None = None
    other_load: float | None = None

    def span(self, name: str) -> SpanTime:
        """The span of this name."""
        return next(span for span in self.spans if span.name == name)


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperSpeed:
    """The row of the paper that a report stands beside, and what its numbers are.

    Attributes:
        model, size, source: Which row.
        device: `V100`.
        fps: Batch 1, `None` where the paper has none.
        batch32_ms: Milliseconds an image at batch 32.
        ap: On val2017, in percent.
        span: What its times include, in words.
    """

    model: str
    size: int
    source: str
    device: str
    fps: float | None
    batch32_ms: float | None
    ap: float | None
    span: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedReport:
    """Everything about one run of the benchmark.

    Attributes:
        weights, weights_sha256: The file.
        variant: Official name of the model, empty for foreign files.
        backend, precision, nms: How it ran; `nms` is the kind inside the file or `host`.
        device: `cpu`, `cuda:0`.
        machine: Name of what it ran on, such as `NVIDIA H200` or the processor's name.
        environment: Versions and facts by name, for the reader and for telling two reports apart.
        input_hw: Of the network.
        frame_hw: Of the images given.
        frames: Where the images came from, in words.
        settings: How it was measured, by name: CUDA graph, transfers, waiting, threads of the runtime.
        rows: One for each batch size and number of threads.
        detections_per_image: Mean; NMS takes longer the more there is to suppress. `None` where not told.
        paper: The paper's row, where it was asked for.
        ap: Average precision (0 to 1) measured with this artifact, and `ap_source` where that is written and
            of how many images, where they are not the whole of val2017.
        notes: What a reader should know.
        y7_version: Version of this package.
        started_at: Date and time in UTC, ISO 8601.
    """

    weights: str
    weights_sha256: str
    variant: str
    backend: str
    precision: str
    nms: str
    device: str
    machine: str
    environment: tuple[tuple[str, str], ...]
    input_hw: tuple[int, int]
    frame_hw: tuple[int, int]
    frames: str
    settings: tuple[tuple[str, str], ...]
    rows: tuple[SpeedRow, ...]
    detections_per_image: float | None = None
    paper: PaperSpeed | None = None
    ap: float | None = None
    ap_source: str = ""
    notes: tuple[str, ...] = ()
    y7_version: str = ""
    started_at: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"schema": SCHEMA, "kind": "y7 bench"}

    @classmethod
    def load(cls, path: str | Path) -> SpeedReport:
        """The report in a JSON file.

        Raises:
            UsageError: The file is absent or no report of this schema; the message names the field.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(raw, dict) or raw.get("kind") != "y7 bench":
                raise ValueError("it is no report of y7 bench")
            if raw.get("schema") != SCHEMA:
                raise ValueError(f"its schema is {shown(raw.get('schema'))}, this version reads {SCHEMA}")
            return from_plain(cls, raw)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{path} cannot be compared with: {error}.", fix="Write one:  y7 bench --json old.json"
            ) from error
