"""Requests to stop: SIGTERM, SIGINT, and SIGUSR1, which Slurm can send ahead of a time limit."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType


class InterruptFlag:
    """A flag that signals set. All processes read it together at the next log line, so that they agree.

    A second signal ends the process at once, unless it follows within `REPEAT_S`: where a scheduler signals every
    process and torchrun passes its own signal on, each signal arrives twice.
    """

    REPEAT_S = 5.0

    def __init__(self) -> None:
        self.is_set, self._since = False, 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_set:
            self.is_set, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > self.REPEAT_S:
            os._exit(128 + number)
