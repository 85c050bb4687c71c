"""`y7 score` and the Ray Serve application on this machine: equal results, throughput, and workers that are killed.

Ray Data: the same images in this process, by one actor and by two; then again while one of two actors is killed, and
while the whole command is killed and started again. Every output file must equal that of the first run, byte by byte.

Ray Serve: clients that send images at the same time to two replicas. Each answer is compared with that of a `Detector`
for the same image alone. Then the same while one replica is killed: every request must be answered.

    python benchmarks/ray_proof.py [--machine cpu-2-core] [--images 600] [--requests 500] [--img 320]

Everything runs on 127.0.0.1. Each actor and each replica has one CPU core.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from recording import parser, record

from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.scoring.input import open_input
from yolov7_deploy.scoring.score import ScoreOptions, ScoreReport, prepare_ray, score

SHARD, BATCH = 50, 8
CLIENTS = 32
KILL_AT = 0.4  # of the work, when something is killed
ACTOR, REPLICA = "RayScorer", "ServeReplica:default:Model"  # in the process titles that Ray sets
START_TIMEOUT_S = 90.0
LINGER_S = 10.0
BOX_TOLERANCE = 0.05  # pixels between a batch and a single image, as in the tests of the Detector
HOST = "127.0.0.1"


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="y7-ray-") as name:
        folder = Path(name)
        write_shapes(folder / "shapes", train=options.images, val=1, size=options.img, seed=7)
        images, model = folder / "shapes" / "images" / "train", folder / "model.onnx"
        _export(model, options.img)
        settings = {"weights": "yolov7-tiny-shapes", "input_hw": [options.img, options.img], "images": options.images}
        result: dict[str, object] = {**settings, "score": data_proof(images, model, folder)}
        result["serve"] = serve_proof(images, model, requests=options.requests)
    failures = [text for part in ("score", "serve") for text in result[part]["failures"]]  # type: ignore[index]
    record(options.name, options.machine, {**result, "failures": failures})
    sys.exit("\n".join(failures) or 0)


def _export(model: Path, img: int) -> None:
    from yolov7_deploy import export

    export(bundled_weights(), model, img=img, batch=None, nms="standard", verify=False)


# --- Ray Data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of `score`: its report, its output folder, and images per second between first and last progress."""

    report: ScoreReport
    folder: Path
    rate: float


def data_proof(images: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Return figures and failures of all runs of `score`."""
    alone = run_score(images, model, folder / "alone", workers=0)
    one = run_score(images, model, folder / "one", workers=1)
    two = run_score(images, model, folder / "two", workers=2)
    killed = run_score(images, model, folder / "killed", workers=2, kill=True)
    resumed, kept = run_killed_command(images, model, folder / "resumed")
    runs = {"one actor": one, "two actors": two, "two actors, one killed": killed}
    equal = {name: equal_files(alone.folder, run.folder) for name, run in runs.items()}
    equal["command killed and started again"] = equal_files(alone.folder, folder / "resumed")
    failures = [f"the files of {name} differ" for name, is_equal in equal.items() if not is_equal]
    if len(killed.report.workers) != 3:
        failures.append(f"{len(killed.report.workers)} actors worked instead of two and a new one")
    return {
        "detections": alone.report.detections,
        "files": alone.report.shards,
        "equal_to_one_process": equal,
        "images_per_second": {
            "this process, all cores": round(alone.rate, 1),
            **{name: round(run.rate, 1) for name, run in runs.items()},
        },
        "two_actors_over_one": round(two.rate / one.rate, 2),
        "seconds_with_start": {name: round(run.report.seconds, 1) for name, run in runs.items()},
        "images_by_worker": {name: sorted(run.report.workers.values()) for name, run in runs.items()},
        "files_before_the_command_was_killed": kept,
        "images_done_by_the_second_command": resumed,
        "failures": failures,
    }


def run_score(images: Path, model: Path, output: Path, *, workers: int, kill: bool = False) -> Run:
    """Run `score`; with `kill`, kill one actor on the way."""
    times: list[tuple[float, int]] = []

    def progress(done: int, total: int) -> None:
        times.append((time.perf_counter(), done))
        if kill and not killed and done >= KILL_AT * total:
            killed.append(kill_one(ACTOR))

    killed: list[int] = []
    options = ScoreOptions(workers=workers, batch=BATCH, shard_size=SHARD, cpus=1 if workers else None)
    source = open_input(str(images))
    report = score(source, output, weights=model, detector={"device": "cpu"}, options=options, progress=progress)
    (first_s, first), (last_s, last) = times[0], times[-1]
    rate = (last - first) / (last_s - first_s) if last > first else 0.0
    note(f"{output.name}: {report.processed} images in {report.seconds:.1f} s, {rate:.1f} images/s")
    return Run(report=report, folder=output, rate=rate)


def note(text: str) -> None:
    """Print a line to standard error: a run takes minutes."""
    print(text, file=sys.stderr, flush=True)


def run_killed_command(images: Path, model: Path, output: Path) -> tuple[int, int]:
    """Kill `y7 score` on the way and start it again; return images of the second run, and files of the first one."""
    line = ["score", "--weights", model, "--input", images, "--output", output, "--device", "cpu", "--workers", "2"]
    line += ["--batch", BATCH, "--shard-size", SHARD, "--cpus", "1"]
    command = [sys.executable, "-m", "yolov7_deploy", *map(str, line)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and len(list(output.glob("part-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    for child in psutil.wait_procs(children, timeout=LINGER_S)[1]:  # agents of Ray notice it after minutes
        child.kill()
    kept = len(list(output.glob("part-*")))
    note(f"the command was killed with {kept} files")
    subprocess.run([*command, "--json", str(output.with_suffix(".json"))], check=True, capture_output=True)
    return json.loads(output.with_suffix(".json").read_text())["processed"], kept


def equal_files(one: Path, other: Path) -> bool:
    """Return whether two output folders have the same files with the same bytes."""
    names = [sorted(path.name for path in folder.glob("part-*")) for folder in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def kill_one(title: str) -> int:
    """Kill one of our descendants with this in its process title, and return its process id."""
    victim = next(process for process in _descendants() if title in _title(process))
    os.kill(victim.pid, signal.SIGKILL)
    return victim.pid


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


# --- Ray Serve --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to one request."""

    number: int
    status: int
    body: bytes
    batch: int
    ms: float


def serve_proof(images: Path, model: Path, *, requests: int) -> dict[str, Any]:
    """Return figures and failures of the application with two replicas."""
    files = [path.read_bytes() for path in sorted(images.iterdir())[:64]]
    with Detector(model, device="cpu") as detector:
        expected = [detector(data).to_dict()["detections"] for data in files]
    settings = {"weights": str(model), "device": "cpu", "replicas": 2, "cpus": 1, "batch_wait_ms": 20}
    with running_application(settings) as port:
        replies, seconds = send(port, files, requests)
        note(f"{len(replies)} requests in {seconds:.1f} s")
        during, _ = send(port, files, requests, at_share=lambda: kill_one(REPLICA))
        health = wait_for_health(port)
    failures = [
        f"{name}: {text}"
        for name, answers in (("load", replies), ("a replica dies", during))
        for text in wrong_answers(answers, expected)
    ]
    batches = Counter(reply.batch for reply in replies)
    if max(batches) < 2:
        failures.append("no batch had more than one image")
    times = sorted(reply.ms for reply in replies)
    return {
        "replicas": 2,
        "clients": CLIENTS,
        "requests": len(replies),
        "answered": sum(reply.status == 200 for reply in replies),
        "images_per_second": round(len(replies) / seconds, 1),
        "latency_ms": {"p50": round(statistics.median(times), 1), "p99": round(times[int(len(times) * 0.99)], 1)},
        "requests_by_batch_size": dict(sorted(batches.items())),
        "largest_box_difference_px": round(largest_difference(replies, expected), 6),
        "requests_while_a_replica_died": len(during),
        "answered_while_a_replica_died": sum(reply.status == 200 for reply in during),
        "slowest_while_a_replica_died_ms": round(max(reply.ms for reply in during), 1),
        "health_afterwards": health,
        "failures": failures,
    }


@contextmanager
def running_application(settings: dict[str, Any]) -> Iterator[int]:
    """Run the application on a free port of 127.0.0.1, and yield the port."""
    prepare_ray(is_local=True)
    import ray
    from ray import serve

    from yolov7_deploy.serving import app

    port = free_port()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": HOST, "port": port})
        serve.run(app(settings))
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def free_port() -> int:
    """Return a port of 127.0.0.1 that no program uses."""
    import socket

    with socket.socket() as opened:
        opened.bind((HOST, 0))
        return int(opened.getsockname()[1])


def send(
    port: int, files: Sequence[bytes], requests: int, *, at_share: Callable[[], object] | None = None
) -> tuple[list[Reply], float]:
    """Send requests from many clients; call `at_share` when the share KILL_AT of them is answered."""
    answered, lock = [0], threading.Lock()

    def one(number: int) -> Reply:
        reply = post(port, "/detect", files[number % len(files)], number=number)
        with lock:
            answered[0] += 1
            is_time = answered[0] == round(KILL_AT * requests)
        if is_time and at_share is not None:
            at_share()
        return reply

    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        replies = list(pool.map(one, range(requests)))
    return replies, time.perf_counter() - started


def post(port: int, path: str, body: bytes, *, number: int = 0) -> Reply:
    """Send one request."""
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    started = time.perf_counter()
    try:
        connection.request("POST", path, body=body, headers={"content-type": "image/png"})
        response = connection.getresponse()
        data, batch = response.read(), int(response.headers.get("x-batch-size", 0))
    finally:
        connection.close()
    ms = (time.perf_counter() - started) * 1e3
    return Reply(number=number, status=response.status, body=data, batch=batch, ms=ms)


def get(port: int, path: str) -> tuple[int, bytes]:
    """Return status and body of a page."""
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def wait_for_health(port: int) -> str:
    """Return the status of `/healthz`, as soon as it is well."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        status, body = get(port, "/healthz")
        if status == 200:
            return str(json.loads(body)["status"])
        time.sleep(0.5)
    return "unavailable"


def wrong_answers(replies: Sequence[Reply], expected: Sequence[list[dict[str, Any]]]) -> list[str]:
    """Return descriptions of requests that were not answered, or not as by the Detector."""
    statuses = Counter(reply.status for reply in replies if reply.status != 200)
    wrong = [f"{count} requests were answered with {status}" for status, count in statuses.items()]
    if not statuses and largest_difference(replies, expected) > BOX_TOLERANCE:
        wrong.append("boxes differ from those of the Detector")
    return wrong


def largest_difference(replies: Sequence[Reply], expected: Sequence[list[dict[str, Any]]]) -> float:
    """Return the largest difference of a coordinate in pixels; infinite if detections differ in number or class."""
    largest = 0.0
    for reply in replies:
        ours, theirs = json.loads(reply.body)["detections"], expected[reply.number % len(expected)]
        if [one["class_id"] for one in ours] != [one["class_id"] for one in theirs]:
            return float("inf")
        if ours:
            boxes = (np.array([one["box"] for one in found]) for found in (ours, theirs))
            largest = max(largest, *(float(np.abs(a - b).max()) for a, b in pairwise(boxes)))
    return largest


def _options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=600)
    arguments.add_argument("--requests", type=int, default=500)
    arguments.add_argument("--img", type=int, default=320)
    arguments.add_argument("--name", default="ray")
    return arguments.parse_args()


if __name__ == "__main__":
    main()
