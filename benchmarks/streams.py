"""Many cameras and one model: throughput, ages, fairness, a camera that dies, and memory.

Cameras are MJPEG servers in another process (`mjpeg_server.py`), faster than the model, so that it is always busy:
each round begins with the speed of the network alone, from which the rate of the cameras follows. The bare loop is
what the streams are compared with: `detector.batch` on one frame of each camera, again and again, while the same
readers decode the same streams in the background, with no bookkeeping, no ages, and no reconnections. It takes the
newest frames, or the same ones again if there are no newer ones, so it never waits. Both run in interleaved blocks.
Streams never detect a frame twice, so their ratio is to the lower of the bare loop and the rate of the cameras.

    python benchmarks/streams.py [--cameras 16] [--minutes 30 [--long-fps 1]] [--machine cpu-2-core]

With `--minutes`, the streams run for so long, one camera dies every minute, and memory, threads and open files must
not grow. `--long-fps` is the rate of each camera in that run, for machines that others use at the same time.
`--keep-long-run` measures everything else again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from recording import parser, record, result_path

from yolov7_deploy import Detector, Streams, export
from yolov7_deploy.sources.live import LiveReader
from yolov7_deploy.streams import MAX_AGE_S

SERVER = Path(__file__).with_name("mjpeg_server.py")
OVERLOAD = 1.25  # frames of all cameras per frame that the network alone can process
ROUNDS = 5
ALONE_S = 2.0  # of the network alone, at the begin of a round
WARMUP_S = 3.0  # until all streams are connected and the batches have their size
MIN_RATIO = 0.9
MAX_UNFAIRNESS = 0.1
DEAD_S = 5.0
MAX_RETURN_S = 12.0  # the waits before the first attempts are 1, 2, 4 and 8 seconds
SETTLED, MAX_GROWTH = 0.2, 0.02  # as in soak.py
# A minute of the long run: seconds until the next sample of memory, and whether the dead camera starts again before it.
MINUTE = ((2.0, False), (13.0, True), (15.0, False), (15.0, False), (15.0, False))


class Cameras:
    """The process of the cameras, a context manager.

    Args:
        number: How many.
        hw: Height and width of their frames.
    """

    def __init__(self, number: int, hw: tuple[int, int]) -> None:
        size = ["--height", str(hw[0]), "--width", str(hw[1])]
        command = [sys.executable, str(SERVER), "--control", "--cameras", str(number), *size]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input = self._process.stdin
        self.addresses = [self._process.stdout.readline().strip() for _ in range(number)]

    def command(self, line: str) -> None:
        """Send a command; see `mjpeg_server.py`."""
        self._input.write(line + "\n")
        self._input.flush()

    def __enter__(self) -> Cameras:
        return self

    def __exit__(self, *error: object) -> None:
        self._input.close()
        self._process.wait()


@dataclass(kw_only=True, slots=True)
class Run:
    """Frames and times of a run of streams.

    Attributes:
        frames: Number of frames of each camera.
        queue_age_s, latency_s: Those of each frame.
        batches: Number of batches.
        seconds: Wall time.
        cores: Mean number of cores that this process kept busy.
        all_cores: Mean number of cores that all programs kept busy.
    """

    frames: list[int]
    queue_age_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    batches: int = 0
    seconds: float = 0.0
    cores: float = 0.0
    all_cores: float = 0.0

    @property
    def rate(self) -> float:
        """Frames per second."""
        return sum(self.frames) / self.seconds

    @property
    def cpu_ms(self) -> float:
        """Processor time of this process per frame in milliseconds, with the decoding of frames that were dropped."""
        return self.cores / self.rate * 1e3

    @property
    def unfairness(self) -> float:
        """Difference of the most and the least frames of a camera, relative to the mean."""
        return (max(self.frames) - min(self.frames)) / statistics.fmean(self.frames)


def run_streams(streams: Streams, *, seconds: float) -> Run:
    """Iterate for some seconds; `streams` continue afterwards."""
    run = Run(frames=[0] * len(streams.counters))
    process, batches = psutil.Process(), streams.batch_times.count
    begin, busy, all_busy = time.perf_counter(), _busy_s(process), _all_busy_s()
    for frame, _ in streams:
        run.frames[frame.stream] += 1
        run.queue_age_s.append(frame.queue_age_s)
        run.latency_s.append(frame.latency_s)
        if time.perf_counter() - begin > seconds:
            break
    run.seconds = time.perf_counter() - begin
    run.cores = (_busy_s(process) - busy) / run.seconds
    run.all_cores = (_all_busy_s() - all_busy) / run.seconds
    run.batches = streams.batch_times.count - batches
    return run


@contextlib.contextmanager
def opened(detector: Detector, addresses: Sequence[str]) -> Iterator[Streams]:
    """Yield streams that have run for a while."""
    with detector.streams(addresses) as streams:
        run_streams(streams, seconds=WARMUP_S)
        yield streams


def bare_loop(detector: Detector, addresses: Sequence[str], *, seconds: float) -> Run:
    """Run batches of the newest frames, which the same readers decode; return all frames as those of one camera."""
    readers = [LiveReader(address) for address in addresses]
    process = psutil.Process()
    try:
        images = [reader.take(timeout_s=WARMUP_S) for reader in readers]
        newest = [live.image for live in images if live is not None]
        assert len(newest) == len(readers), "a camera sent no frame"
        detector.batch(newest)
        count, begin, busy = 0, time.perf_counter(), _busy_s(process)
        while time.perf_counter() - begin < seconds:
            for index, reader in enumerate(readers):
                live = reader.poll()
                newest[index] = newest[index] if live is None else live.image
            count += len(detector.batch(newest))
        elapsed = time.perf_counter() - begin
        return Run(frames=[count], seconds=elapsed, cores=(_busy_s(process) - busy) / elapsed)
    finally:
        for reader in readers:
            reader.stop()
        for reader in readers:
            reader.close()


def network_alone(detector: Detector, hw: tuple[int, int], *, batch: int, seconds: float) -> float:
    """Return images per second without any camera."""
    images = [np.random.default_rng(seed).integers(0, 256, (*hw, 3), np.uint8) for seed in range(batch)]
    detector.batch(images)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        count += len(detector.batch(images))
    return count / (time.perf_counter() - begin)


def dead_camera(streams: Streams, cameras: Cameras, *, camera: int) -> dict[str, object]:
    """Stop a camera for some seconds, and return how long it took until its next frame, and the rate of the others."""
    cameras.command(f"stop {camera}")
    without = run_streams(streams, seconds=DEAD_S)
    cameras.command(f"start {camera}")
    begin = time.perf_counter()
    for frame, _ in streams:
        if frame.stream == camera or time.perf_counter() - begin > MAX_RETURN_S:
            break
    return {
        "seconds_until_it_is_back": round(time.perf_counter() - begin, 2),
        "frames_per_second_of_the_others": round(without.rate, 1),
        "longest_latency_ms_of_the_others": round(max(without.latency_s) * 1e3, 1),
        "its_state": streams.counters[camera].state,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Resources of the process, and the frames since the sample before; a list of all ages would grow.

    Attributes:
        seconds: Since the begin of the run.
        memory_mb, threads, files: Resident memory, and the numbers of threads and open files.
        frames: Number of frames.
        queue_age_s: The longest age.
        rate: Frames per second.
        cores: Number of cores that this process kept busy.
    """

    seconds: float
    memory_mb: float
    threads: int
    files: int
    frames: int
    queue_age_s: float
    rate: float
    cores: float


def long_run(streams: Streams, cameras: Cameras, *, minutes: float) -> dict[str, object]:
    """Run for some minutes, in each of which a camera dies, and return what happened to the resources."""
    begin, connections = time.perf_counter(), sum(one.connections for one in streams.counters)
    samples: list[Sample] = []
    deaths = 0
    while time.perf_counter() - begin < minutes * 60:
        camera = deaths % len(streams.counters)
        cameras.command(f"stop {camera}")
        deaths += 1
        for seconds, is_start in MINUTE:
            if is_start:
                cameras.command(f"start {camera}")
            samples.append(_sample(run_streams(streams, seconds=seconds), begin=begin))
    return {
        **summarize(samples),
        "minutes": round((time.perf_counter() - begin) / 60, 1),
        "deaths": deaths,
        "reconnections": sum(one.connections for one in streams.counters) - connections,
        "states": sorted({one.state for one in streams.counters}),
    }


def _sample(run: Run, *, begin: float) -> Sample:
    process = psutil.Process()
    return Sample(
        seconds=time.perf_counter() - begin,
        memory_mb=process.memory_info().rss / 1e6,
        threads=process.num_threads(),
        files=process.num_fds(),
        frames=sum(run.frames),
        queue_age_s=max(run.queue_age_s),
        rate=run.rate,
        cores=run.cores,
    )


def summarize(samples: Sequence[Sample]) -> dict[str, object]:
    """Return memory over time, its slope by least squares after the start, and the frames."""
    settled = samples[int(SETTLED * len(samples)) :]
    seconds, memory = [one.seconds for one in settled], [one.memory_mb for one in settled]
    slope = float(np.polyfit(seconds, memory, 1)[0]) if len(settled) > 1 else 0.0
    return {
        "frames": sum(one.frames for one in samples),
        "frames_per_second": round(statistics.median(one.rate for one in samples), 1),
        "longest_queue_age_ms": round(max(one.queue_age_s for one in samples) * 1e3, 1),
        "cores": round(statistics.fmean(one.cores for one in samples), 3),
        "seconds": [round(one.seconds) for one in samples],
        "memory_mb": [round(one.memory_mb, 1) for one in samples],
        "memory_slope_mb_per_hour": round(slope * 3600, 2),
        "memory_growth": round(slope * (seconds[-1] - seconds[0]) / memory[0], 4),
        "memory_growth_limit": MAX_GROWTH,
        "threads": sorted({one.threads for one in settled}),
        "open_files": sorted({one.files for one in settled}),
    }


def _busy_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _all_busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """Return percentiles of seconds as milliseconds."""
    found = np.percentile(np.asarray(values) * 1e3, (50, 95, 99, 100))
    return {name: round(float(value), 1) for name, value in zip(("p50", "p95", "p99", "max"), found, strict=True)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One block of the streams and one of the bare loop, with cameras of the same rate.

    Attributes:
        alone: Images per second of the network without cameras, just before.
        fps: Frames per second of each camera.
        offered: Frames per second of all cameras.
        streams, bare: The blocks.
    """

    alone: float
    fps: float
    offered: float
    streams: Run
    bare: Run

    @property
    def ratio(self) -> float:
        """Throughput of the streams relative to the bare loop."""
        return self.streams.rate / min(self.bare.rate, self.offered)


def compare(
    detector: Detector, cameras: Cameras, *, rounds: int, block_s: float, hw: tuple[int, int]
) -> Iterator[Round]:
    """Yield rounds; the order of the two blocks alternates."""
    number = len(cameras.addresses)
    for index in range(rounds):
        alone = network_alone(detector, hw, batch=number, seconds=ALONE_S)
        fps = round(OVERLOAD * alone / number, 1)
        cameras.command(f"fps {fps}")
        loop = bare_loop(detector, cameras.addresses, seconds=block_s) if index % 2 == 0 else None
        with opened(detector, cameras.addresses) as streams:
            run = run_streams(streams, seconds=block_s)
        bare = loop or bare_loop(detector, cameras.addresses, seconds=block_s)
        yield Round(alone=alone, fps=fps, offered=fps * number, streams=run, bare=bare)


def failures(result: dict[str, object]) -> list[str]:
    """Return what does not hold; empty if everything does."""
    found = []
    if result["ratio"] < MIN_RATIO:  # type: ignore[operator]
        found.append(f"the ratio {result['ratio']} is below {MIN_RATIO}")
    if result["unfairness"] > MAX_UNFAIRNESS:  # type: ignore[operator]
        found.append(f"the unfairness {result['unfairness']} is above {MAX_UNFAIRNESS}")
    if result["queue_age_ms"]["max"] > MAX_AGE_S * 1e3:  # type: ignore[index]
        found.append("a processed frame was older than the limit")
    if result["dead_camera"]["its_state"] != "running":  # type: ignore[index]
        found.append("the stopped camera did not come back")
    long = result.get("long_run")
    if isinstance(long, dict):
        found += long_failures(long)
    return found


def long_failures(long: dict[str, object]) -> list[str]:
    """Return what does not hold of the long run."""
    found = []
    if long["memory_growth"] > MAX_GROWTH:  # type: ignore[operator]
        found.append(f"memory grew by {long['memory_growth']:.1%}")
    if long["states"] != ["running"]:
        found.append(f"a camera did not come back: {long['states']}")
    return found


def measure(options: argparse.Namespace, detector: Detector) -> dict[str, object]:
    hw = (options.height, options.width)
    with Cameras(options.cameras, hw) as cameras:
        rounds = list(compare(detector, cameras, rounds=options.rounds, block_s=options.block_s, hw=hw))
        with opened(detector, cameras.addresses) as streams:
            dead = dead_camera(streams, cameras, camera=1)
            print(f"ratios {[round(one.ratio, 3) for one in rounds]}, {dead}", file=sys.stderr, flush=True)
            fps = options.long_fps or rounds[-1].fps
            if options.minutes:
                cameras.command(f"fps {fps}")
                run_streams(streams, seconds=WARMUP_S)
            long = long_run(streams, cameras, minutes=options.minutes) if options.minutes else None
    return {
        "cameras": options.cameras,
        "frame_hw": list(hw),
        "input_hw": list(detector.input_hw),
        "runtime": dict(detector.runtime_info),
        "block_seconds": options.block_s,
        **summarize_rounds(rounds, cameras=options.cameras),
        "dead_camera": dead,
        **({} if long is None else {"long_run": {"camera_fps": fps, **long}}),
    }


def summarize_rounds(rounds: Sequence[Round], *, cameras: int) -> dict[str, object]:
    """Return throughput, fairness and ages of all rounds."""
    runs = [one.streams for one in rounds]
    frames = [sum(run.frames[camera] for run in runs) for camera in range(cameras)]
    total = Run(frames=frames, seconds=sum(run.seconds for run in runs))
    return {
        "network_alone_per_second": [round(one.alone, 1) for one in rounds],
        "camera_fps": [one.fps for one in rounds],
        "bare_loop_per_second": [round(one.bare.rate, 1) for one in rounds],
        "streams_per_second": [round(run.rate, 1) for run in runs],
        "ratios": [round(one.ratio, 3) for one in rounds],
        "ratio": round(statistics.median(one.ratio for one in rounds), 3),
        "ratio_limit": MIN_RATIO,
        "bare_loop_cpu_ms_per_frame": [round(one.bare.cpu_ms, 2) for one in rounds],
        "streams_cpu_ms_per_frame": [round(run.cpu_ms, 2) for run in runs],
        "frames_by_camera": frames,
        "unfairness": round(total.unfairness, 4),
        "frames_per_batch": round(sum(frames) / sum(run.batches for run in runs), 2),
        "cores": round(statistics.fmean(run.cores for run in runs), 2),
        "cores_of_cameras_and_other_programs": round(statistics.fmean(run.all_cores - run.cores for run in runs), 2),
        "max_age_ms": MAX_AGE_S * 1e3,
        "queue_age_ms": milliseconds([age for run in runs for age in run.queue_age_s]),
        "latency_ms": milliseconds([latency for run in runs for latency in run.latency_s]),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cameras", type=int, default=16)
    arguments.add_argument("--height", type=int, default=240)
    arguments.add_argument("--width", type=int, default=320)
    arguments.add_argument("--img", type=int, default=192)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--block-s", type=float, default=15.0)
    arguments.add_argument("--minutes", type=float, default=0.0, help="length of the long run; 0 leaves it out")
    arguments.add_argument("--long-fps", type=float, default=0.0, help="rate of each camera in it; 0: that of before")
    arguments.add_argument("--keep-long-run", action="store_true", help="keep the long run of the earlier result")
    options = arguments.parse_args()
    earlier = json.loads(result_path("streams", options.machine).read_text())["result"] if options.keep_long_run else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shapes.onnx"
        export("yolov7-tiny-shapes", path, img=options.img, batch=None)
        with Detector(path, device="cpu", runtime="onnxruntime") as detector:
            result = measure(options, detector)
    if "long_run" in earlier:
        result["long_run"] = earlier["long_run"]
    result["failures"] = failures(result)
    record("streams", options.machine, result)
    sys.exit("\n".join(failures(result)) or 0)


if __name__ == "__main__":
    main()
