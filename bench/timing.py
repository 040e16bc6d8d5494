"""Timing of functions that do the same work, side by side.

    interleaved     the functions take turns in rounds: a settling clock or a busy neighbour slows all alike
    cold inputs     on a GPU the calls rotate over clones of the inputs that together exceed its L2 cache: every call
                    reads from memory, as in training
    no host time    on a GPU events time the replays of a CUDA graph of many calls. A function that cannot be captured
                    is queued behind a sleeping kernel; the result says `starved` if the GPU still waited for the host
    warm            every function runs for a while before the measurement
On a CPU the host's clock times a batch of calls; the caches are as the calls leave them.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = tuple[Any, ...]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_INTERVAL_MS = {"cuda": 1.0, "cpu": 5.0}  # least measured interval, far above the resolution of the clocks
_WARM_S = {"cuda": 0.05, "cpu": 0.02}
_MOST_CALLS, _MOST_ROUNDS, _LEAST_ROUNDS = 200, 300, 5


class Timing(NamedTuple):
    """Milliseconds per call: median and 20th and 80th percentile of `samples` intervals of `calls` calls each."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    calls: int
    method: str  # "graph", "queue" or "host"
    starved: bool  # the GPU waited for the host in some interval
    host_us: float | None  # the host's time for an ordinary call; None on a CPU


class Ceilings(NamedTuple):
    """Rates of this device: a large copy (bytes read plus bytes written) and the best of some matrix products."""

    copy_gb_s: float
    matmul_tflop_s: float


class Captured:
    """Calls of one function in a CUDA graph, one input set after the other."""

    method, starved = "graph", False

    def __init__(self, call: Callable[..., Any], sets: Sequence[Inputs], calls: int) -> None:
        self.calls = calls
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for index in range(calls):
                call(*sets[index % len(sets)])
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def interval_ms(self) -> float:
        self.begin.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / self.calls


class Queued:
    """Calls of one function, launched while the GPU sleeps."""

    method = "queue"

    def __init__(self, call: Callable[..., Any], sets: Sequence[Inputs], calls: int, host_s: float) -> None:
        self.call, self.sets, self.calls, self.starved = call, sets, calls, False
        self.cycles = int(1.5 * host_s * calls * 2e9)  # at 2 GHz, more than most GPUs run at
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def interval_ms(self) -> float:
        torch.cuda._sleep(self.cycles)
        self.begin.record()
        for index in range(self.calls):
            self.call(*self.sets[index % len(self.sets)])
        self.starved |= self.begin.query()  # the first call began before the last was launched
        self.end.record()
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / self.calls


class OnHost:
    """Calls of one function on a CPU."""

    method, starved = "host", False

    def __init__(self, call: Callable[..., Any], sets: Sequence[Inputs], calls: int) -> None:
        self.call, self.sets, self.calls = call, sets, calls

    def interval_ms(self) -> float:
        start = time.perf_counter()
        for index in range(self.calls):
            self.call(*self.sets[index % len(self.sets)])
        return (time.perf_counter() - start) * 1e3 / self.calls


def measure(
    functions: dict[str, Callable[..., Any]], sets: Sequence[Inputs], device: str, seconds: float,
    methods: Mapping[str, str] | None = None,
) -> dict[str, Timing]:  # fmt: skip
    """Time each function on one input set, about `seconds` each, taking turns.

    Args:
        sets: equal inputs to rotate over, see `cold_sets`.
        device: "cuda" or "cpu".
        methods: on a GPU, "graph" (the default; "queue" if capture fails), "queue" or "host" for each function.
    """
    prepared = {
        name: _prepare(call, sets, (methods or {}).get(name, "graph") if device == "cuda" else "host")
        for name, call in functions.items()
    }
    names, samples = list(prepared), {name: [] for name in prepared}
    start, rounds = time.perf_counter(), 0
    while rounds < _LEAST_ROUNDS or (
        rounds < _MOST_ROUNDS and time.perf_counter() - start < seconds * len(names)
    ):  # fmt: skip
        for index in range(len(names)):  # the order turns: the function before leaves its heat and its cache
            name = names[(index + rounds) % len(names)]
            samples[name].append(prepared[name][0].interval_ms())
        rounds += 1
    timings = {}
    for name, (runner, host_us) in prepared.items():
        p20, _, _, p80 = statistics.quantiles(samples[name], n=5, method="inclusive")
        timings[name] = Timing(
            statistics.median(samples[name]), p20, p80, rounds, runner.calls, runner.method, runner.starved, host_us
        )
    return timings


def _prepare(
    call: Callable[..., Any], sets: Sequence[Inputs], method: str
) -> tuple[Captured | Queued | OnHost, float | None]:  # fmt: skip
    """Warm a function up and choose the calls of an interval; also return the host's microseconds a call."""
    device = "cpu" if method == "host" else "cuda"
    once = _warm_up(call, sets, device)
    if device == "cpu":
        return OnHost(call, sets, _calls(once, device)), None
    torch.cuda.synchronize()
    start = time.perf_counter()
    for inputs in sets[:10]:
        call(*inputs)
    host_s = (time.perf_counter() - start) / len(sets[:10])
    torch.cuda.synchronize()
    queued = Queued(call, sets, min(10, _calls(once, device)), host_s)
    calls = max(len(sets), _calls(queued.interval_ms() / 1e3, device))  # `once` held the launch, too
    runner = None
    if method == "graph":
        try:
            runner = Captured(call, sets, calls)
        except RuntimeError:  # capture forbids a host synchronisation or an allocation; `method` tells
            torch.cuda.synchronize()
    runner = runner or Queued(call, sets, min(calls, 50), host_s)
    runner.interval_ms()
    return runner, host_s * 1e6


def _calls(seconds: float, device: str) -> int:
    return min(_MOST_CALLS, max(1, math.ceil(_INTERVAL_MS[device] / 1e3 / seconds)))


def _warm_up(call: Callable[..., Any], sets: Sequence[Inputs], device: str) -> float:
    """Return seconds a call after at least three calls, off the default stream, as capture requires."""

    def run() -> float:
        start = last = time.perf_counter()
        calls = 0
        while calls < 3 or last - start < _WARM_S[device]:
            begun = time.perf_counter()
            call(*sets[calls % len(sets)])
            if device == "cuda":
                torch.cuda.synchronize()
            last, calls = time.perf_counter(), calls + 1
        return last - begun

    if device == "cpu":
        return run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once = run()
    torch.cuda.current_stream().wait_stream(stream)
    return once


def tensors(value: Any) -> list[Tensor]:
    """List the tensors of a tensor, or of nested tuples and lists; other values are left out."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (tuple, list)) else []


def clone(value: Any) -> Any:
    """Copy a value into own memory; leaves stay leaves that require gradients."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return type(value)(clone(part) for part in value) if isinstance(value, (tuple, list)) else value


def cold_sets(inputs: Inputs, device: str) -> list[Inputs]:
    """Return `inputs` and clones that together exceed twice the GPU's L2 cache; on a CPU the inputs alone."""
    size = sum(tensor.nbytes for tensor in tensors(inputs))
    if device == "cpu" or size == 0:
        return [inputs]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [inputs, *(clone(inputs) for _ in range(min(_MOST_CALLS, math.ceil(2 * cache / size)) - 1))]


def extra_memory(call: Callable[..., Any], inputs: Inputs) -> int:
    """Return the peak bytes of one call on the GPU beyond its inputs, result included."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call(*inputs)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: str, dtype: torch.dtype, quick: bool) -> Ceilings:
    """Measure the ceilings of the device, on random data: zeros multiply faster."""
    elements = 2**30 if device == "cuda" and not quick else 2**24
    source, target = (torch.empty(elements, dtype=torch.uint8, device=device).random_() for _ in range(2))
    copy = measure({"copy": target.copy_}, [(source,)], device, 0.3)["copy"].median_ms
    del source, target
    best = 0.0
    for side in (512,) if device == "cpu" else (2048,) if quick else (4096, 8192):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = measure({"product": torch.mm}, [(a, b)], device, 0.3)["product"].median_ms
        best = max(best, 2 * side**3 / product * 1e-9)
    return Ceilings(2 * elements / copy * 1e-6, best)
