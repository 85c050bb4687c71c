"""Seconds and peak memory of `y7 export` with verification, as one process from start to end.

python benchmarks/export_cost.py --weights yolov7
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recording import parser, record


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", default="yolov7")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "exported.onnx"
        command = [
            sys.executable,
            "-m",
            "yolov7_deploy",
            "export",
            "--weights",
            options.weights,
            "--output",
            str(output),
        ]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        size = output.stat().st_size
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    record(
        "export_cost",
        options.machine,
        {
            "weights": Path(options.weights).name,
            "seconds": round(seconds, 1),
            "seconds_limit": 60,
            "peak_memory_gb": round(peak_kb * 1024 / 1e9, 2),
            "peak_memory_limit_gb": 4,
            "file_mb": round(size / 1e6, 1),
        },
    )


if __name__ == "__main__":
    main()
