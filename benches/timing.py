"""How long a call takes: on a GPU by events around graph replays with a cold L2, on the CPU by the clock.

Knows neither ops nor models. All times are in seconds.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlrt.quantiles import quantiles

Call = Callable[[], Any]

FLUSH_BYTES = 256 * 1024**2  # several times the L2 of any card so far
MIN_RUNS, MAX_RUNS = 5, 50


def measure(call: Call, device: str, *, seconds: float = 0.3, graph: bool = True, cold: bool = True) -> dict[str, Any]:
    """Time a call that leaves its inputs as they are, or writes the same to them each time.

    Args:
        call: what is timed; on a GPU it must only enqueue work.
        device: "cuda" or "cpu".
        seconds: about how long to go on, between MIN_RUNS and MAX_RUNS runs.
        graph: on a GPU, replay a recording of the call where it can be recorded, so that the host's work is not timed.
        cold: on a GPU, write over the L2 cache before every run.

    Returns:
        Quantiles in seconds, `runs`, and `graph`: whether a recording was replayed.
    """
    if device != "cuda":
        return _measure_on_host(call, seconds)
    call()
    replay = _recorded(call) if graph else None
    found = _measure_on_gpu(replay or call, seconds, cold)
    return {**found, "graph": replay is not None}


def wall(call: Call, device: str, runs: int) -> dict[str, Any]:
    """Time `runs` runs of a call by the host's clock, the device's work included; the caller warms up."""
    times = []
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return {**quantiles(times), "runs": runs}


def synchronize(device: str) -> None:
    """Wait for what is enqueued on a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_is_lost(device: str) -> bool:
    """Return whether a kernel has broken this process's context, which only a new process mends."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def _measure_on_host(call: Call, seconds: float) -> dict[str, Any]:
    call()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < MIN_RUNS or (time.perf_counter() - begun < seconds and len(times) < MAX_RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {**quantiles(times), "runs": len(times), "graph": False}


def _measure_on_gpu(call: Call, seconds: float, cold: bool) -> dict[str, Any]:
    for _ in range(2):
        call()
    once = _timed([call], cold)[0]
    flush_seconds = FLUSH_BYTES / 1e12 if cold else 0.0
    runs = int(min(max(seconds / max(once + flush_seconds, 1e-6), MIN_RUNS), MAX_RUNS))
    times = _timed([call] * runs, cold)
    return {**quantiles(times), "runs": runs}


def _timed(calls: Sequence[Call], cold: bool) -> list[float]:
    """Enqueue all calls before any is waited for: the host runs ahead, and the flush hides what it takes to launch."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    flush = _flush_buffer() if cold else None
    torch.cuda.synchronize()
    for call, (start, stop) in zip(calls, events, strict=True):
        if flush is not None:
            flush.zero_()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def _recorded(call: Call) -> Call | None:
    """Return the replay of a call, or None where it cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    before, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.set_stream(before)  # a recording that fails leaves its own stream behind
        torch.cuda.synchronize()
        return None
    replay: Call = graph.replay
    return replay
