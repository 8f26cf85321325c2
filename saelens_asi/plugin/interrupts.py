"""Signals that wait for the end of a step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sae_lens.training._interruption import InterruptedException, interrupt_callback

logger = logging.getLogger(__name__)


class Interrupts:
    """Whether SIGINT or SIGTERM has come."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._as_keyboard = False

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let a signal be noted, and no more: twice as well. A handler of the user's own stays as it is."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            # SAELens's own by its name: run as a script, its module holds a second one.
            if handler in (signal.SIG_DFL, signal.default_int_handler) or (
                getattr(handler, "__name__", None) == interrupt_callback.__name__
            ):
                before[number] = signal.signal(number, self._note)
        self._as_keyboard = before.get(signal.SIGINT) is signal.default_int_handler
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            logger.warning("%s: the step ends first, then a checkpoint is written", signal.Signals(number).name)
        self.received = self.received or signal.Signals(number)

    def exception(self) -> BaseException:
        """What the signal would have raised."""
        if self.received is signal.SIGINT and self._as_keyboard:
            return KeyboardInterrupt()
        return InterruptedException(f"{self.received.name if self.received else 'a signal'} came")
