"""Threads of the tests: processes of pytest-xdist share the cores instead of competing for them."""

import os

_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if _PROCESSES > 1:  # set before PyTorch is imported, whose waiting OpenMP threads keep cores busy
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _PROCESSES)))
