"""Signals that wait for the end of a step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# Of these many signals ``signals_held_back`` holds the last no longer: what they wait for may hang.
_PATIENCE = 3


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[dict[signal.Signals, Any]]:
    """Inside the block SIGINT and SIGTERM go to ``handle``; gives what they went to before.

    In the main thread; elsewhere Python has no handlers to replace. A handler that was not set from Python cannot be
    put back, and one that ignores the signal goes on to do so: neither is replaced.
    """
    before: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if handler is not None and handler is not signal.SIG_IGN:
                    before[number] = handler
                    signal.signal(number, handle)
        yield before
    finally:
        _put_back(before)


def _put_back(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def signals_held_back() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM, also a second one, wait for the end of the block; gives whether one has come.

    The block looks at that where its work is whole, saves it and ends. The signal then does what it would have done;
    where its handler comes back, KeyboardInterrupt is raised. A third one goes through at once.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) >= _PATIENCE:
            _put_back(before)
            received.clear()
            signal.raise_signal(number)
        else:
            logger.warning("signal %d: saving what there is first", number)

    try:
        with _handled_by(hold) as before:
            yield lambda: bool(received)
    finally:
        if received:
            signal.raise_signal(received[0])
            raise KeyboardInterrupt


class Interrupts:
    """SIGINT and SIGTERM that came meanwhile, and what they would have done.

    Attributes:
        received: the first that came and was not delivered yet.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Inside the block a signal is noted and no more, however often it comes."""
        with _handled_by(self.note) as self._before:
            yield
        self.deliver()

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Note a signal, of this process or of another that works with it."""
        if self.received is None:
            self.received = signal.Signals(number)
            logger.warning("%s: the step ends first, then the run is saved", self.received.name)

    def deliver(self) -> None:
        """Do what the signal would have done: KeyboardInterrupt, SystemExit(143), or what the user's own handler does.

        Nothing where none has come. A handler that returns lets the run go on.
        """
        number, self.received = self.received, None
        if number is None:
            return
        handler = self._before.get(number, signal.SIG_DFL)
        if handler is signal.SIG_DFL:
            raise SystemExit(128 + number)
        handler(number, None)
