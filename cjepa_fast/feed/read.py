"""Reading ahead: threads plan batches and read their encoded images while the caller computes."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cjepa_fast.errors import UserError
from cjepa_fast.feed.manifest import SampleError
from cjepa_fast.feed.mixture import Mixture

ALARM_S, PATIENCE = 60.0, 10  # seconds without an image until a warning, and warnings until an error

log = logging.getLogger(__name__)

_Part = Future[tuple[list[Any], dict[int, str]]]  # encoded images of a part of a batch, and faults by id


@dataclass(kw_only=True, eq=False)
class Request:
    """One batch to decode: its images, and the other inputs of DALI's graph by name."""

    ids: np.ndarray
    inputs: dict[str, np.ndarray]
    step: int
    epoch: int = 0
    encoded: list[Any] = field(default_factory=list)  # DALI's TensorCPU, uint8 [bytes] each
    unread: dict[int, str] = field(default_factory=dict)  # ids that cannot be read, and why


class Reader:
    """A thread that takes `requests` ahead of the caller, and threads that read their images.

    A read that never ends does not block `close`: its thread is left behind.

    Args:
        threads: number of threads that read.
        depth: batches that wait for the caller at most.
    """

    def __init__(self, source: Mixture, requests: Iterator[Request], *, threads: int, depth: int) -> None:
        self._source, self._requests, self._stopped = source, requests, False
        self._ready: queue.Queue[tuple[Request, list[_Part]] | Exception | None] = queue.Queue(depth)
        self._tasks: queue.SimpleQueue[tuple[_Part, np.ndarray] | None] = queue.SimpleQueue()
        self._parts = 2 * threads  # of a batch; more than threads, as some are slower to read
        self._planner = threading.Thread(target=self._plan, daemon=True, name="plan batches")
        self._readers = [threading.Thread(target=self._read, daemon=True, name="read images") for _ in range(threads)]
        for thread in (self._planner, *self._readers):
            thread.start()

    def get(self) -> Request | None:
        """Return the next request with its encoded images, or None behind the last.

        Raises:
            UserError: nothing came for ten minutes.
        """
        item = self._wait(self._ready.get)
        if isinstance(item, Exception):
            raise item
        if item is None:
            return None
        request, parts = item
        for part, ids in zip(parts, np.array_split(request.ids, len(parts)), strict=True):
            encoded, unread = self._wait(part.result, ids)
            request.encoded += encoded
            request.unread |= unread
        return request

    def _wait(self, get: Callable[..., Any], ids: np.ndarray | None = None) -> Any:
        where = ""
        for times in range(1, PATIENCE + 1):
            try:
                return get(timeout=ALARM_S)
            except (queue.Empty, FutureTimeoutError):
                where = "" if ids is None else f", reading {self._source.name(int(ids[0]))} or one soon behind it"
                log.warning("no image for %g s%s: is the storage slow or gone?", times * ALARM_S, where)
        raise UserError(f"no image for {PATIENCE * ALARM_S:g} s{where}: go on with --resume when the storage is back")

    def close(self) -> None:
        """Stop all threads; those in a read get a second to end."""
        self._stopped = True
        for _ in self._readers:
            self._tasks.put(None)
        while self._planner.is_alive():  # perhaps it waits for room in the queue
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._planner.join(0.001)
        for thread in self._readers:
            thread.join(1.0)

    def _plan(self) -> None:
        try:
            for request in self._requests:
                parts: list[_Part] = []
                for ids in np.array_split(request.ids, min(len(request.ids), self._parts)):
                    parts.append(Future())
                    self._tasks.put((parts[-1], ids))
                self._ready.put((request, parts))
                if self._stopped:
                    return
            self._ready.put(None)
        except Exception as error:  # `get` raises it in the caller's thread
            self._ready.put(error)

    def _read(self) -> None:
        from nvidia.dali.tensors import TensorCPU  # made here: DALI would convert arrays in the caller's time

        while (task := self._tasks.get()) is not None and not self._stopped:
            part, ids = task
            encoded, unread = [], {}
            for data in self._source.read_many(ids):
                if isinstance(data, SampleError):
                    unread[data.sample] = str(data)
                else:
                    encoded.append(TensorCPU(data))
            part.set_result((encoded, unread))
