"""Environment variables that Ray reads when it is imported."""

from __future__ import annotations

import os


def prepare_ray(*, is_local: bool) -> None:
    """Set the environment of Ray in this process and those it starts; call this before Ray is imported.

    Ray sends no usage statistics to its authors. Variables that are set already are not changed.

    Args:
        is_local: Ray runs on this machine only, so it listens on 127.0.0.1 only.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if is_local:
        # On every system, despite its name: without clusters, Ray uses the loopback interface
        # (ray/_private/services.py, `get_node_ip_address`).
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
