"""Compile the CUDA kernels with their driver, compare every result with a CPU reference, and time each case.

    python benchmarks/kernel_driver.py --machine NAME-OF-THE-GPU
    python benchmarks/kernel_driver.py --machine NAME-OF-THE-GPU --define Y7_OVERLAP=0

The second command is for compute capability 9.0 and later: `suppress` waits for the end of `select` before it starts.
Needs nvcc and a GPU. `kernel_driver.cpp` says what the cases are and how results are compared.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from recording import parser, record

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "plugins" / "kernels"
SOURCES = [Path(__file__).with_suffix(".cpp"), *(KERNELS / name for name in ("nms.cu", "letterbox.cu", "status.cu"))]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--nvcc", default="nvcc")
    arguments.add_argument("--arch", default="native", help="argument of nvcc's -arch")
    arguments.add_argument("--seeds", default="3", help="images per case")
    arguments.add_argument("--calls", default="1000", help="timed calls per image")
    arguments.add_argument("--define", action="append", default=[], help="macro such as Y7_OVERLAP=0; recorded")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "kernel_driver"
        command = [
            options.nvcc,
            "-std=c++17",
            "-O3",
            "-fmad=false",
            "-Xcompiler=-ffp-contract=off",
            f"-arch={options.arch}",
        ]
        command += [f"-D{define}" for define in options.define]
        command += [f"-I{KERNELS}", *map(str, SOURCES), "-o", str(program)]
        subprocess.run(command, check=True)
        run = [str(program), "--seeds", options.seeds, "--calls", options.calls]
        done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
    rows = json.loads(done.stdout)["rows"]
    name = "_".join(["kernels", *(define.replace("=", "-") for define in options.define)])
    record(name, options.machine, {row.pop("case"): row for row in rows})


if __name__ == "__main__":
    main()
