"""Time of `import yolov7_deploy` and `y7 --help` against a bare start of Python in the same run.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
import time

from recording import parser, record

COMMANDS = {
    "python": ["-c", "pass"],
    "import": ["-c", "import yolov7_deploy"],
    "help": ["-m", "yolov7_deploy", "--help"],
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=15)
    options = arguments.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.runs):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    middle = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    record(
        "startup",
        options.machine,
        {
            "runs": options.runs,
            "python_s": round(middle["python"], 3),
            "import_s": round(middle["import"] - middle["python"], 3),
            "help_s": round(middle["help"], 3),
            "help_best_s": round(min(seconds["help"]), 3),
            "import_limit_s": 0.15,
            "help_limit_s": 0.4,
        },
    )


if __name__ == "__main__":
    main()
