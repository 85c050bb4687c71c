"""Send images to a Triton server at the same time, and compare the answers with a local Detector.

`triton_proof.py` runs this in the server's environment, so that both sides have the same libraries:

    python benchmarks/triton_load.py CLIENT MODEL IMAGES ADDRESS --requests 200 --json result.json
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.http import InferenceServerClient

from yolov7_deploy import Detections, Detector
from yolov7_deploy.image import read_image

TIMEOUT_S = 120


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    for name in ("client", "model", "images"):
        arguments.add_argument(name, type=Path)
    arguments.add_argument("address")
    arguments.add_argument("--requests", type=int, default=200)
    arguments.add_argument("--json", type=Path, required=True)
    options = arguments.parse_args()
    paths = sorted(options.images.glob("*"))
    chosen = [paths[number % len(paths)] for number in range(options.requests)]
    answers = send_all(load_client(options.client), chosen, options.address)
    with Detector(options.model, device="cpu") as detector:
        expected = {path: detector(path) for path in paths}
    result = {"requests": len(answers), "images": len(paths)}
    options.json.write_text(json.dumps(result | compare(answers, [expected[path] for path in chosen])))


def load_client(path: Path) -> ModuleType:
    """Import the client that y7 triton wrote."""
    spec = importlib.util.spec_from_file_location("client", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def send_all(client: ModuleType, paths: list[Path], address: str) -> list[Any]:
    """Send one request from each of as many threads at the same time, and return the answers in order."""
    takes_bytes = "bytes" in str(inspect.signature(client.detect))
    images = {path: path.read_bytes() if takes_bytes else read_image(path) for path in set(paths)}
    answers: list[Any] = [None] * len(paths)
    barrier = threading.Barrier(len(paths))

    def send(number: int) -> None:
        with InferenceServerClient(address, network_timeout=TIMEOUT_S, connection_timeout=TIMEOUT_S) as server:
            barrier.wait()
            answers[number] = client.detect(server, images[paths[number]])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(len(paths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def compare(answers: list[Any], expected: list[Detections]) -> dict[str, object]:
    """Return how many answers have the same classes in the same order, and the largest differences of those."""
    same = [
        (answer, found)
        for answer, found in zip(answers, expected, strict=True)
        if answer is not None and np.array_equal(answer[2], found.class_ids)
    ]
    return {
        "answers_with_the_same_classes": len(same),
        "detections": sum(len(found) for found in expected),
        "largest_box_difference_px": max((difference(answer[0], found.boxes) for answer, found in same), default=None),
        "largest_score_difference": max((difference(answer[1], found.scores) for answer, found in same), default=None),
    }


def difference(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    return float(np.abs(one - other).max(initial=0))


if __name__ == "__main__":
    main()
