"""Lookup of weights files: by path, or by official name in local folders, else by download from the authors' release.

Only official names are ever downloaded, and only if no local folder has them.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._download import IncompleteDownloadError, download
from yolov7_deploy._text import expand_user, get_logger, hide_credentials, similar_file, suggest
from yolov7_deploy.errors import LoadError

logger = get_logger(__name__)

Progress = Callable[[int, int], None]

RELEASE_URL = "https://github.com/WongKinYiu/yolov7/releases/download/v0.1"
WEIGHTS_DIR_VARIABLE = "Y7_WEIGHTS_DIR"
NO_HOME = Path("/nonexistent")  # as of system users on Debian

# Files of the authors' release v0.1. It has no training weights of tiny; tiny-silu was never published.
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

# Part of this package, so that everything can be tried offline; benchmarks/demo_weights.py trained it.
SHAPES_WEIGHTS = "yolov7-tiny-shapes"

# Publicly known digests; the other downloads are checked by length only.
SHA256 = {"yolov7": "d1ac3c74eb96a3eec77949c0f37a06bc272756606ff011d9353f7abff4e0c71d"}

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".safetensors")
ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
MODEL_SUFFIXES = (*CHECKPOINT_SUFFIXES, ".onnx", *ENGINE_SUFFIXES)

# Files that are taken for weights by mistake: what they are, and the options that are right.
_IMAGE = ("an image", "Images are the source:  --weights {name} --source {path}")
_VIDEO = ("a video", "Videos are the source:  --weights {name} --source {path}")
_DATA = ("the description of a dataset", "Datasets are the data:  --weights {name} --data {path}")
_OTHER_KINDS = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"), _IMAGE),
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv"), _VIDEO),
    **dict.fromkeys((".yaml", ".yml", ".json"), _DATA),
}

TIMEOUT_S = 30.0  # of the network
_MIN_BYTES_PER_S = 10_000  # mean; slower than a modem, so the server or the network does not work
# The largest official file (E6E, training) is about 0.35 GB.
_MAX_BYTES = 2**31


def find_weights(name_or_path: str | Path, *, progress: Progress | None = None, offline: bool = False) -> Path:
    """Return the path of a weights file; an official one that is not found locally is downloaded into the cache.

    For a name such as `yolov7` (or `yolov7.pt`) the files `yolov7.pt`, `yolov7.safetensors` and `yolov7_training.pt`
    are looked for in the working directory, in `$Y7_WEIGHTS_DIR` and in the cache (`~/.cache/yolov7_deploy`, or
    under `$XDG_CACHE_HOME`), in this order. `yolov7-tiny-shapes` and its export `yolov7-tiny-shapes.onnx` are part of
    this package. Anything else is a path and is never downloaded.

    Args:
        name_or_path: Official name or path.
        progress: Called during a download with bytes done and total bytes (0 if the server does not send a length).
        offline: Download nothing.

    Raises:
        LoadError: There is no such file; for an official name the message lists where it was looked for.
    """
    path = Path(name_or_path)
    if os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a name is too long for any file
        if path.suffix.lower() in _OTHER_KINDS:
            raise _other_kind(path)
        return path
    name = str(name_or_path).removesuffix(".pt")
    if name.removesuffix(".safetensors") == SHAPES_WEIGHTS:
        return bundled_weights()
    if name == f"{SHAPES_WEIGHTS}.onnx":
        return bundled_onnx()
    if name not in OFFICIAL_NAMES:
        raise _not_found(path)
    local = find_local_weights(name)
    if local is not None:
        return local
    if offline:
        raise _not_local(name)
    url = f"{RELEASE_URL}/{name}.pt"
    target = cache_dir() / f"{name}.pt"
    start = time.perf_counter()
    try:
        _download(url, target, name=name, progress=progress)
    except IncompleteDownloadError as error:
        raise _incomplete(url, str(error.strerror)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise LoadError(
            f"{_searched(name)}\n  the authors' release: {url} ({hide_credentials(_reason(error))})",
            fix=f"Download this URL on a machine with network access, and pass the file:  --weights {name}.pt\n"
            "Without it, the included network of six shapes:  --weights yolov7-tiny-shapes",
        ) from error
    logger.info("weights: %s -> %s in %.1f s", url, target, time.perf_counter() - start)
    return target


def find_local_weights(name: str) -> Path | None:
    """Return the local file of an official name, in the order of `find_weights`; `None` if there is none."""
    folders = [folder for folder in weights_folders().values() if folder is not None]
    candidates = (folder / file for folder in folders for file in _file_names(name))
    return next((path for path in candidates if path.is_file()), None)


def bundled_weights() -> Path:
    """Return the path of the small trained network that is part of this package."""
    return Path(__file__).parent / "assets" / f"{SHAPES_WEIGHTS}.safetensors"


def bundled_onnx() -> Path:
    """Return the path of that network as an FP16 ONNX file, which runs where torch is not installed."""
    return bundled_weights().with_suffix(".onnx")


def cache_dir() -> Path:
    """Return the folder of downloaded weights: `$XDG_CACHE_HOME/yolov7_deploy`, by default `~/.cache/yolov7_deploy`.

    A user without a home folder, as in a container that runs with any user ID, has one that cannot be written.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else expand_user("~/.cache")
    return (NO_HOME if folder.parts[:1] == ("~",) else folder) / "yolov7_deploy"


def weights_folders() -> dict[str, Path | None]:
    """Return the local folders of official weights by their label, in search order; `None` for one that is not set."""
    chosen = os.environ.get(WEIGHTS_DIR_VARIABLE)
    return {
        "working directory": Path.cwd(),
        f"${WEIGHTS_DIR_VARIABLE}": Path(chosen) if chosen else None,
        "cache": cache_dir(),
    }


def _file_names(name: str) -> tuple[str, ...]:
    names = (f"{name}.pt", f"{name}.safetensors")
    return names if name.endswith("_training") else (*names, f"{name}_training.pt")


def _searched(name: str) -> str:
    folders = "".join(f"\n  {label}: {folder or 'not set'}" for label, folder in weights_folders().items())
    return f"{name} ({' / '.join(_file_names(name))}) was not found in any of these locations:{folders}"


def _not_local(name: str) -> LoadError:
    return LoadError(_searched(name), fix="Pass the path of a file, or copy the weights into one of these folders.")


def _not_found(path: Path) -> LoadError:
    if os.path.isdir(path):  # noqa: PTH112 - as in `find_weights`
        return _folder(path)
    if os.path.exists(path):  # noqa: PTH110 - as in `find_weights`
        return LoadError(f"{path} is not a file but a named pipe, a device or a socket.", fix="Pass a file.")
    names = [name for name in OFFICIAL_NAMES if not name.endswith("_training")]
    is_path = bool(path.suffix) or path.parent != Path()
    fix = (
        suggest(path.stem, [*names, SHAPES_WEIGHTS])
        if not is_path
        else f"Check the path, or use an official name: {', '.join(names)}"
    )
    similar = similar_file(path, suffixes=MODEL_SUFFIXES)
    if similar is not None:
        fix = f"Did you mean {similar}?"
    return LoadError(f"{path} {'does not exist' if is_path else 'is neither a file nor an official name'}.", fix=fix)


def _folder(path: Path) -> LoadError:
    files = similar_file(path / "best.safetensors", suffixes=MODEL_SUFFIXES)
    if files is not None and files.parent == path:
        return LoadError(f"{path} is a folder, not a weights file.", fix=f"Pass the file inside it:  --weights {files}")
    return LoadError(
        f"{path} is a folder, and has no weights file ({', '.join(MODEL_SUFFIXES)}).",
        fix=f"Pass a file, or an official name:  --weights {OFFICIAL_NAMES[0]}",
    )


def _other_kind(path: Path) -> LoadError:
    kind, fix = _OTHER_KINDS[path.suffix.lower()]
    return LoadError(f"{path} is {kind}, not a model file.", fix=fix.format(name=OFFICIAL_NAMES[0], path=path))


def _download(url: str, target: Path, *, name: str, progress: Progress | None) -> None:
    """Download to a temporary file, check length and digest, then rename it.

    Raises:
        LoadError: The download is empty, or is not the published file.
        OSError: Network or disk; also `http.client.HTTPException` and `ValueError` for a malformed response.
    """
    digest = hashlib.sha256()
    done = 0
    with atomic_write(target) as temporary:
        blocks = download(url, max_bytes=_MAX_BYTES, timeout_s=TIMEOUT_S, min_bytes_per_s=_MIN_BYTES_PER_S)
        with temporary.open("wb") as file, contextlib.closing(blocks):
            for block, total in blocks:
                done += len(block)
                file.write(block)
                digest.update(block)
                if progress is not None:
                    progress(done, total)
        _check_download(url, done, digest.hexdigest(), SHA256.get(name, ""))


def _incomplete(url: str, reason: str) -> LoadError:
    return LoadError(
        f"The download of {url} is incomplete: {reason}. Nothing was saved.", fix="Run the same command again."
    )


def _check_download(url: str, done: int, digest: str, expected: str) -> None:
    if done == 0:
        raise _incomplete(url, "no bytes were sent")
    if expected and digest != expected:
        raise LoadError(
            f"The download of {url} is not the published file: its SHA-256 is {digest}, expected {expected}.",
            fix="A proxy may have sent something else. Download the file by other means and pass its path.",
        )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection: {error.reason}"
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
