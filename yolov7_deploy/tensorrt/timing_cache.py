"""Measured kernel times, kept per device and TensorRT version so that the next build need not measure them again.

The cache is a convenience: a file that cannot be read, used or written is a note in the record and never an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from yolov7_deploy._atomic_file import whole_file

Trt = Any  # objects of the TensorRT that is installed

SUFFIX = ".timing"


class TimingCache:
    """The timing cache of one build.

    Args:
        place: A file, or a folder (ends with a slash) in which the device gets a file; empty for no cache.
        device: What must be equal for measured times to be of use.
    """

    def __init__(self, place: str, *, device: str) -> None:
        self.notes: tuple[str, ...] = ()
        self._path: Path | None = None
        if place.endswith("/"):
            self._path = Path(place) / f"{re.sub(r'[^A-Za-z0-9.]+', '-', device)}{SUFFIX}"
        elif place:
            self._path = Path(place)

    @property
    def used(self) -> str:
        """The file, empty for none."""
        return str(self._path) if self._path else ""

    def give_to(self, config: Trt) -> None:
        """Puts what was measured before into a configuration, or an empty cache that fills."""
        if self._path is None:
            return
        if not self._put(config, self._read()):
            self._note("is of another TensorRT or device, or damaged; it is measured anew")
            self._put(config, b"")

    def keep(self, config: Trt) -> tuple[str, ...]:
        """Writes what is known now, complete or not at all; gives the notes."""
        cache = config.get_timing_cache() if self._path else None
        if self._path is None or cache is None:
            return self.notes
        try:
            with whole_file(self._path) as unfinished:
                unfinished.write_bytes(cache.serialize())
        except OSError as error:
            self._note(f"cannot be written ({error.strerror or error}); the next build measures again")
        return self.notes

    def _put(self, config: Trt, data: bytes) -> bool:
        try:
            cache = config.create_timing_cache(data)
        except (TypeError, RuntimeError):  # pybind's word for a null pointer
            return False
        return cache is not None and bool(config.set_timing_cache(cache, False))

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes() if self._path else b""
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._note(f"cannot be read ({error.strerror or error})")
            return b""

    def _note(self, what: str) -> None:
        self.notes = (*self.notes, f"the timing cache {self._path} {what}")
