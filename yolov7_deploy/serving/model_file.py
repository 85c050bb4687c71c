"""The model file of a server: the one that was opened, and what happened to it on the disk since."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import LoadError

logger = get_logger(__name__)

State = Literal["unchanged", "replaced", "missing"]


class ModelFile:
    """The file of a model that is served.

    A server keeps the model that it has opened, whatever happens to the file. But a replica that starts later would
    open the new file, and answers would depend on the replica. So a replica refuses a file other than the one that the
    application was started with.

    Args:
        path: The file.
        sha256: Its digest when the application was started.

    Raises:
        LoadError: The file is another one now.
    """

    def __init__(self, path: Path, *, sha256: str) -> None:
        self.path, self.sha256 = path, sha256
        self._stamp, self._state = _stamp(path), self._compare()
        if self._state != "unchanged":
            raise LoadError(
                f"{path} is {self._state}: it is not the file that the application was started with, and the other "
                "replicas still use that.",
                fix="Restart the application to serve the new file, or restore the old one.",
            )

    def state(self) -> State:
        """Return whether the file is unchanged; the content is read again only if the file looks different."""
        stamp = _stamp(self.path)
        if stamp != self._stamp:
            self._stamp, self._state = stamp, self._compare()
            if self._state != "unchanged":
                logger.warning("%s was %s; the model that was opened stays in use", self.path, self._state)
        return self._state

    def _compare(self) -> State:
        try:
            return "unchanged" if sha256_hex(self.path) == self.sha256 else "replaced"
        except OSError:
            return "missing"


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes with a file: inode, size and time of the last change."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
