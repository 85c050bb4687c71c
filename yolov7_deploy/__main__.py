"""Entry point of `python -m yolov7_deploy` and of the console command `y7`."""

import os
import sys

# How long OpenMP's threads, with which PyTorch computes, spin while they wait for each other: 40 microseconds. With its
# default, a millisecond, training beside three busy programs took 2.0 times as long and 2.4 times the CPU time.
SPIN_COUNT = "10000"


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # for Python processes that libraries start, since Python 3.11
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    from yolov7_deploy.cli.app import main as run

    run()


def _remove_working_directory() -> None:
    """Remove the working directory, which `python -m` puts first, from the module search path.

    It stays if it contains this package. Python itself has imported a few modules from it before this package runs.
    """
    # With `os`, which Python has imported, because `pathlib` could be a file of the working directory.
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    if sys.path[:1] == [os.getcwd()] and folder != sys.path[0]:  # noqa: PTH109
        del sys.path[0]


if __name__ == "__main__":
    _remove_working_directory()
    main()
