"""Finds a weights file: a path, or an official name looked for here, in `$Y7_WEIGHTS_DIR`, in the cache, online.

Only official names may reach the network, and only when no local place has them.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from yolov7_deploy._atomic_file import whole_file
from yolov7_deploy.errors import LoadError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

RELEASE_URL = "https://github.com/WongKinYiu/yolov7/releases/download/v0.1"
WEIGHTS_DIR_VARIABLE = "Y7_WEIGHTS_DIR"

# Files of the authors' release v0.1; tiny has no training form there, and tiny-silu was never published.
OFFICIAL_NAMES = (
    "yolov7",
    "yolov7-tiny",
    "yolov7x",
    "yolov7-w6",
    "yolov7-e6",
    "yolov7-d6",
    "yolov7-e6e",
    "yolov7_training",
    "yolov7x_training",
    "yolov7-w6_training",
    "yolov7-e6_training",
    "yolov7-d6_training",
    "yolov7-e6e_training",
)

# Comes along with the package, so that everything can be tried without a network; benchmarks/demo_weights.py made it.
SHAPES_WEIGHTS = "yolov7-tiny-shapes"

# Digests that are publicly known; the others are checked by length only.
SHA256 = {"yolov7": "d1ac3c74eb96a3eec77949c0f37a06bc272756606ff011d9353f7abff4e0c71d"}

TIMEOUT_S = 30.0
_BLOCK_BYTES = 2**18
# The largest official file (E6E, training) is about 0.35 GB.
_MAX_BYTES = 2**31


def find_weights(
    name_or_path: str | Path,
    *,
    progress: Progress | None = None,
    base_url: str = RELEASE_URL,
    timeout_s: float = TIMEOUT_S,
) -> Path:
    """The path of a weights file, downloaded into the cache if it is an official one found nowhere else.

    A name such as `yolov7` (or `yolov7.pt`) means, in this order: `yolov7.pt`, `yolov7.safetensors`,
    `yolov7_training.pt` in the working directory, in `$Y7_WEIGHTS_DIR`, in `~/.cache/yolov7_deploy`
    (`$XDG_CACHE_HOME` is respected), else the authors' release. `yolov7-tiny-shapes` comes along with this package. A
    path is only ever a path.

    Args:
        name_or_path: Official name or path.
        progress: Called during a download with bytes done and bytes in all (0 if the server does not say).
        base_url: Where the release lies; the file name is appended.
        timeout_s: Longest silence of the server, in seconds.

    Raises:
        LoadError: There is no such file; for an official name the message lists the places looked at.
    """
    path = Path(name_or_path)
    if os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a name is too long for any file
        return path
    name = str(name_or_path).removesuffix(".pt")
    if name == SHAPES_WEIGHTS:
        return shipped_weights()
    if name not in OFFICIAL_NAMES:
        raise _absent(path)
    local = find_local_weights(name)
    if local is not None:
        return local
    url = f"{base_url.rstrip('/')}/{name}.pt"
    target = cache_dir() / f"{name}.pt"
    start = time.perf_counter()
    try:
        _download(url, target, name=name, progress=progress, timeout_s=timeout_s)
    except (OSError, http.client.HTTPException, ValueError) as error:
        looked = "".join(f"\n  {label}: {folder or 'not set'}" for label, folder in _places().items())
        raise LoadError(
            f"{name} was not found ({' / '.join(_file_names(name))}) in any of these places:{looked}"
            f"\n  the authors' release: {url} ({_reason(error)})",
            fix=f"Download that address where there is a network, and name the file:  --weights {name}.pt",
        ) from error
    logger.info("weights: %s -> %s in %.1f s", url, target, time.perf_counter() - start)
    return target


def find_local_weights(name: str) -> Path | None:
    """The file of an official name in the local places, in the order of `find_weights`; `None` where there is none."""
    folders = [folder for folder in _places().values() if folder is not None]
    candidates = (folder / file for folder in folders for file in _file_names(name))
    return next((path for path in candidates if path.is_file()), None)


def shipped_weights() -> Path:
    """The file of the small trained network that comes along with this package."""
    return Path(__file__).parent / "assets" / f"{SHAPES_WEIGHTS}.safetensors"


def cache_dir() -> Path:
    """The folder of downloaded weights: `$XDG_CACHE_HOME/yolov7_deploy`, by default `~/.cache/yolov7_deploy`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "yolov7_deploy"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


def _places() -> dict[str, Path | None]:
    """The local places in the order they are looked at, with their labels for messages."""
    chosen = os.environ.get(WEIGHTS_DIR_VARIABLE)
    return {
        "working directory": Path.cwd(),
        f"${WEIGHTS_DIR_VARIABLE}": Path(chosen) if chosen else None,
        "cache": cache_dir(),
    }


def _file_names(name: str) -> tuple[str, ...]:
    plain = (f"{name}.pt", f"{name}.safetensors")
    return plain if name.endswith("_training") else (*plain, f"{name}_training.pt")


def _absent(path: Path) -> LoadError:
    if os.path.isdir(path):  # noqa: PTH112
        return LoadError(f"{path} is a folder, not a weights file.", fix=f"Name the file inside it:  {path}/NAME.pt")
    names = ", ".join(name for name in OFFICIAL_NAMES if not name.endswith("_training"))
    if path.suffix or path.parent != Path():
        return LoadError(f"{path} does not exist.", fix=f"Check the path, or use an official name: {names}")
    return LoadError(f"{path} is neither a file nor an official name.", fix=f"Official names: {names}")


def _download(url: str, target: Path, *, name: str, progress: Progress | None, timeout_s: float) -> None:
    """Fetches a file under a temporary name, checks length and digest, then renames it.

    Raises:
        LoadError: What arrived is not what the release holds.
        OSError: Network or disk; also `http.client.HTTPException` and `ValueError` for a malformed answer.
    """
    digest = hashlib.sha256()
    done = 0
    with whole_file(target) as unfinished:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer, unfinished.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            while block := answer.read(_BLOCK_BYTES):
                done += len(block)
                if done > _MAX_BYTES:
                    raise ValueError(f"more than {_MAX_BYTES} bytes")
                file.write(block)
                digest.update(block)
                if progress is not None:
                    progress(done, total)
        _check_arrived(url, done, total, digest.hexdigest(), SHA256.get(name, ""))


def _check_arrived(url: str, done: int, total: int, digest: str, expected: str) -> None:
    if done == 0 or done < total:
        raise LoadError(
            f"The download of {url} broke off after {done} of {total or 'unknown'} bytes; nothing was kept.",
            fix="Run the same command again.",
        )
    if expected and digest != expected:
        raise LoadError(
            f"The download of {url} is not the published file: its SHA-256 is {digest}, not {expected}.",
            fix="A proxy may have answered in its place. Download the file by other means and name its path.",
        )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection: {error.reason}"
    return f"{type(error).__name__}: {error}"
