"""Signals that wait for the end of a step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


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
        """Inside the block a signal is noted and no more, however often it comes; one that is ignored stays ignored.

        In the main thread; elsewhere Python has no handlers to hold back.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is not None and handler is not signal.SIG_IGN:
                self._before[number] = handler
                signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        self.deliver()

    def _note(self, number: int, frame: FrameType | None) -> None:
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
        handler = self._before[number]
        if handler is signal.SIG_DFL:
            raise SystemExit(128 + number)
        handler(number, None)
