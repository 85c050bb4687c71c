"""Signals that end a program: SIGINT (Ctrl-C), SIGTERM (`docker stop`, systemd) and SIGHUP (a closed terminal)."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# SIGHUP does not exist on Windows.
ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], None]


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end.

    Attributes:
        number: Number of the signal; shells report 128 plus this number as exit code.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The exit code of a program that ends for this reason: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


@contextlib.contextmanager
def handle_signals(handler: Handler) -> Iterator[None]:
    """Call a function for the signals that end a program, until the block ends.

    Ignored signals stay ignored, such as SIGHUP under `nohup`. Outside the main thread, which alone receives signals,
    nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    handled = [number for number in ENDING_SIGNALS if previous[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            before = previous[number]
            signal.signal(number, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def raise_interrupted() -> Iterator[None]:
    """Raise `Interrupted` at the first signal that ends a program, until the block ends.

    Later ones do not disturb the work that finishes the program, except Ctrl-C, which raises each time.
    """
    ending = False

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal ending
        if not ending or number == signal.SIGINT:
            ending = True
            raise Interrupted(number)

    with handle_signals(interrupt):
        yield


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Defer signals that end a program to the end of the block, so that a result can be finished.

    Raises:
        Interrupted: A signal arrived in the block.
    """
    received: list[int] = []
    with handle_signals(lambda number, _: received.append(number)):
        yield
    if received:
        raise Interrupted(received[0])
