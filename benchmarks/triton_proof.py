"""y7 triton on a real server: 200 requests at once, their boxes against a local Detector, batches and warm-up.

The server is that of the wheel nvidia-pytriton: Triton 2.51 for CPUs with the Python backend only. Its environment:

    python3 -m venv triton && triton/bin/pip install nvidia-pytriton==0.7.0 'numpy<2' '.[cpu]'
    python benchmarks/triton_proof.py --server triton

Two repositories are served. `python` is written with --backend python. `network` is written for ONNX Runtime, whose
backend the wheel does not have: the Python backend runs the file in its place with the same configuration, so that
everything but the C++ of that backend is used. The requests come from the clients that are written with the
repositories. The configurations, also one for TensorRT, are parsed by the messages of tritonclient.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recording import parser, record

from yolov7_deploy import export
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.deployment.triton import write_triton_repository
from yolov7_deploy.deployment.triton_config import TritonOptions
from yolov7_deploy.inspection.onnx_file import read_onnx
from yolov7_deploy.metadata import InputKind

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.served_files import save_engine

LOAD = Path(__file__).parent / "triton_load.py"
HOST = "127.0.0.1"
# Of Triton's docs/user_guide/metrics.md; failures have one counter for each reason.
COUNTERS = (
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
)
START_S = 120
SIZE = 320
# Runs a file as Triton's ONNX Runtime backend does: one session, the images of a batch together.
NETWORK_MODEL = """
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]

    def execute(self, requests):
        images = [triton.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        arrays = self.session.run(self.names, {"images": np.concatenate(images)})
        ends = np.cumsum([len(part) for part in images])[:-1]
        parts = zip(*(np.split(array, ends) for array in arrays))
        return [
            triton.InferenceResponse([triton.Tensor(*pair) for pair in zip(self.names, part)]) for part in parts
        ]
"""
PARSE = """
import sys
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
for path in sys.argv[1:]:
    print(text_format.Parse(open(path).read(), model_config_pb2.ModelConfig()).backend)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A running server: addresses of its HTTP and metrics ports, and its log."""

    http: str
    metrics: str
    log: Path

    def get(self, address: str) -> str:
        """Return the text at an address of the server."""
        with urllib.request.urlopen(f"http://{address}", timeout=30) as response:
            return str(response.read().decode())

    def batches(self, model: str) -> dict[str, int]:
        """Return how many batches of each size the model has run, by the statistics of the server."""
        statistics = json.loads(self.get(f"{self.http}/v2/models/{model}/stats"))["model_stats"][0]
        return {str(entry["batch_size"]): entry["compute_infer"]["count"] for entry in statistics["batch_stats"]}

    def counts(self, model: str) -> dict[str, float]:
        """Return the counters of a model from the Prometheus endpoint; an image counts once, and a batch is one run."""
        text = self.get(f"{self.metrics}/metrics")
        return {
            name: sum(map(float, re.findall(rf'^{name}{{.*model="{model}".*}} (\S+)$', text, re.M)))
            for name in COUNTERS
        }

    def warmups(self) -> list[str]:
        """Return the names of the warm-up requests that the log says have run."""
        return re.findall(r"is running warmup sample '([^']*)'", self.log.read_text())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--server", type=Path, required=True, help="environment with nvidia-pytriton")
    arguments.add_argument("--requests", type=int, default=200)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = prove(options.server.resolve(), Path(name), requests=options.requests)
    record("triton", options.machine, result)


def prove(
    environment: Path, folder: Path, *, requests: int, images: int = 40, input_kind: InputKind = "uint8"
) -> dict[str, object]:
    """Serve both repositories and return the figures; the folder takes everything that is written."""
    model = folder / "shapes.onnx"
    export("yolov7-tiny-shapes", model, img=SIZE, batch=None, input_kind=input_kind, verify=False)
    write_shapes(folder / "shapes", train=1, val=images, size=SIZE, seed=1)
    repositories = {
        "python": TritonOptions(backend="python", queue_delay_ms=20),
        "network": TritonOptions(backend="onnxruntime", queue_delay_ms=20),
    }
    for name, options in repositories.items():
        write_triton_repository(model, folder / name, options)
    engine = save_engine(folder / "shapes.engine", metadata=read_onnx(model).metadata)
    write_triton_repository(engine, folder / "tensorrt")
    configs = [folder / name / "shapes/config.pbtxt" for name in (*repositories, "tensorrt")]
    parsed = parse_configs(environment, configs)
    run_in_python(folder / "network/shapes")
    figures = {name: serve(environment, folder, folder / name, model, requests=requests) for name in repositories}
    return {"requests": requests, "input": input_kind, "parsed_by_tritonclient": parsed, **figures}


def parse_configs(environment: Path, paths: list[Path]) -> list[str]:
    """Return the backends that the original protobuf messages read from configurations."""
    command = [str(environment / "bin/python"), "-c", PARSE, *map(str, paths)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def run_in_python(model: Path) -> None:
    """Replace the ONNX Runtime backend of a model by the Python backend."""
    config = (model / "config.pbtxt").read_text()
    (model / "config.pbtxt").write_text(
        config.replace('backend: "onnxruntime"', 'backend: "python"').replace(
            'default_model_filename: "model.onnx"\n', ""
        )
    )
    (model / "1/model.py").write_text(NETWORK_MODEL)


def serve(environment: Path, folder: Path, repository: Path, model: Path, *, requests: int) -> dict[str, object]:
    """Start a server, send the requests, and return what was answered and how."""
    answers = folder / f"{repository.name}.json"
    with running_server(environment, repository, folder / f"{repository.name}-server") as server:
        warm = server.counts("shapes")
        command = [str(environment / "bin/python"), str(LOAD), str(repository / "client.py"), str(model)]
        command += [str(folder / "shapes/images/val"), server.http, "--requests", str(requests), "--json", str(answers)]
        subprocess.run(command, check=True, timeout=600)
        counts = {name: value - warm[name] for name, value in server.counts("shapes").items()}
        return {
            "server": json.loads(server.get(f"{server.http}/v2"))["version"],
            **json.loads(answers.read_text()),
            "warmups": server.warmups(),
            "metrics": counts,
            "mean_batch": round(counts["nv_inference_count"] / counts["nv_inference_exec_count"], 2),
            "batches_by_size_with_warmups": server.batches("shapes"),
        }


@contextlib.contextmanager
def running_server(environment: Path, repository: Path, folder: Path) -> Iterator[Server]:
    """Start the server of an environment on free ports of the loopback interface; it is ended afterwards.

    Args:
        environment: Virtual environment with nvidia-pytriton.
        repository: The model repository.
        folder: For its log, and for the Python backend with the program for this version of Python.
    """
    site = next((environment / "lib").glob("python3*/site-packages"))
    ports = free_ports(3)
    folder.mkdir()
    shutil.copytree(site / "pytriton/tritonserver/backends/python", folder / "backends/python")
    version = site.parent.name.removeprefix("python")
    stub = site / f"pytriton/tritonserver/python_backend_stubs/{version}/triton_python_backend_stub"
    shutil.copy(stub, folder / "backends/python")
    command = [str(site / "pytriton/tritonserver/bin/tritonserver"), f"--model-repository={repository}"]
    command += [f"--backend-directory={folder}/backends", "--log-verbose=1", "--disable-auto-complete-config"]
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command += [f"--{name}-address={HOST}", f"--{name}-port={port}"]
    server = Server(http=f"{HOST}:{ports[0]}", metrics=f"{HOST}:{ports[2]}", log=folder / "server.log")
    with server.log.open("w") as log:
        process = subprocess.Popen(command, env=server_environment(environment, site), stdout=log, stderr=log)
    try:
        wait_until_ready(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def server_environment(environment: Path, site: Path) -> dict[str, str]:
    """Return the variables with which the server finds its libraries, libpython and the environment's Python."""
    command = [str(environment / "bin/python"), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    libpython = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    libraries = [str(site / "nvidia_pytriton.libs"), libpython, os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "PATH": f"{environment}/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
    }


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server has loaded and warmed up its models."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            server.get(f"{server.http}/v2/health/ready")
            return
        except urllib.error.HTTPError as error:  # it listens, and is not ready
            error.close()
        except OSError:
            pass
        time.sleep(0.2)
    print(server.log.read_text()[-5000:], file=sys.stderr)
    raise RuntimeError(f"the server did not become ready; exit code {process.poll()}")


if __name__ == "__main__":
    main()
