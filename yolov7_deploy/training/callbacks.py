"""Who looks on while a network is trained: nobody, or a command that shows it to people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from yolov7_deploy.training.loggers import EpochRecord

ShowStep = Callable[[int, int, str], None]
ShowCount = Callable[[int, int], None]


class TrainCallback(Protocol):
    """What is told of a training."""

    def say(self, words: str) -> None:
        """Something worth a line."""

    def epoch(self, epoch: int, epochs: int) -> AbstractContextManager[ShowStep]:
        """An epoch (from 0) begins; what is given is called with steps done, steps in all, and a note."""

    def counting(self, what: str) -> AbstractContextManager[ShowCount]:
        """Something else that takes time; what is given is called with done and in all."""

    def epoch_done(self, record: EpochRecord) -> None:
        """What an epoch came to."""


class NullCallback:
    """A watch that shows nothing."""

    def say(self, words: str) -> None:
        """Nothing."""

    @contextmanager
    def epoch(self, epoch: int, epochs: int) -> Iterator[ShowStep]:
        """Nothing."""
        yield lambda done, total, note: None

    @contextmanager
    def counting(self, what: str) -> Iterator[ShowCount]:
        """Nothing."""
        yield lambda done, total: None

    def epoch_done(self, record: EpochRecord) -> None:
        """Nothing."""
