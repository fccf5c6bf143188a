"""Timing: providers in turn, inputs in rotation, percentiles over a fixed time; and the machine's own ceilings.

On a GPU the calls are captured into one CUDA graph for each provider and its replays are timed with events, so neither
Python nor launch latency is measured. What cannot be captured is timed as it is launched, and says so.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

PERCENTILES = (0.2, 0.5, 0.8)
GRAPH_SECONDS = 1e-2  # of the calls in one graph as they take without one, so that its start does not show
MAX_CALLS = 1024  # in a graph
LEAST_SAMPLES = 5
CACHES = 4  # rotating inputs hold that many times the L2 cache, so that each call finds its own pushed out
MAX_SETS = 64


@dataclass(frozen=True)
class Timing:
    """Microseconds a call at the percentiles 20, 50 and 80 of `samples` samples, each the mean of `calls` calls."""

    us: tuple[float, float, float]
    samples: int
    calls: int
    timer: str


def memory_bytes(what: str) -> int:
    """Of this process, from the kernel: "VmRSS" now, "VmHWM" the most since `forget_peak`."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def forget_peak() -> None:
    """Makes the most memory that the process has had what it has now."""
    Path("/proc/self/clear_refs").write_text("5")


def number_of_sets(num_bytes: int, least: int, device: torch.device) -> int:
    """How many sets of inputs to rotate, given the bytes that a call touches; `least` on a CPU, cold or not."""
    if device.type != "cuda":
        return least
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(least, min(MAX_SETS, -(-CACHES * cache // num_bytes)))


def timer(call: Callable[[Any], Any], sets: Sequence[Any], device: torch.device) -> "Timer":
    """Get a function of one input ready to be timed: called on every set, and captured on a GPU.

    Raises:
        Whatever the function does.
    """
    return _GpuTimer(call, sets) if device.type == "cuda" else _CpuTimer(call, sets)


def time_in_turn(timers: Mapping[str, "Timer"], *, seconds: float) -> dict[str, Timing]:
    """A sample of each after the other for `seconds` in all, at least `LEAST_SAMPLES`, whatever the time."""
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_SAMPLES or time.perf_counter() < stop:
        for one in timers.values():
            one.sample()
        for one in timers.values():
            one.wait()
        rounds += 1
    return {name: one.result() for name, one in timers.items()}


def _timing(seconds: Sequence[float], calls: int, timer: str) -> Timing:
    """From the seconds that each sample took."""
    us = torch.tensor(seconds, dtype=torch.float64) * 1e6 / calls
    p20, p50, p80 = us.quantile(torch.tensor(PERCENTILES, dtype=torch.float64)).tolist()
    return Timing((p20, p50, p80), len(seconds), calls, timer)


class Timer(Protocol):
    """What takes samples and makes a `Timing` of them."""

    def sample(self) -> None: ...

    def wait(self) -> None: ...

    def result(self) -> Timing: ...


class _CpuTimer:
    """A sample is one call after the other on every set."""

    def __init__(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> None:
        self.call, self.sets = call, sets
        self.seconds: list[float] = []
        self.sample()  # warm
        self.seconds.clear()

    def sample(self) -> None:
        began = time.perf_counter()
        for inputs in self.sets:
            self.call(inputs)
        self.seconds.append(time.perf_counter() - began)

    def wait(self) -> None:
        """Nothing is under way."""

    def result(self) -> Timing:
        return _timing(self.seconds, len(self.sets), "perf_counter")


class _GpuTimer:
    """A sample is one replay of a graph of calls, whole rotations of the sets, between two events."""

    def __init__(self, call: Callable[[Any], Any], sets: Sequence[Any]) -> None:
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

        def rotate(rotations: int) -> None:
            for _ in range(rotations):
                for inputs in sets:
                    call(inputs)

        rotate(1)
        self.replay = lambda: rotate(1)
        self.sample()
        torch.cuda.synchronize()
        start, end = self.events.pop()
        seconds = max(start.elapsed_time(end) / 1e3, 1e-6)
        rotations = max(1, min(MAX_CALLS // len(sets), round(GRAPH_SECONDS / seconds + 0.5)))
        self.calls = rotations * len(sets)
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream where the capture breaks off
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                rotate(rotations)
        except RuntimeError:  # it waits for the device, or allocates where a graph may not
            torch.cuda.synchronize()
            self.timer, self.replay = "events", lambda: rotate(rotations)
        else:
            self.timer, self.replay = "graph", graph.replay
        self.replay()

    def sample(self) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.replay()
        end.record()
        self.events.append((start, end))

    def wait(self) -> None:
        """Until the sample before the last is over: the GPU always has work, and no start waits for Python."""
        if len(self.events) > 1:
            self.events[-2][1].synchronize()

    def result(self) -> Timing:
        self.events[-1][1].synchronize()
        return _timing([start.elapsed_time(end) / 1e3 for start, end in self.events], self.calls, self.timer)


def ceilings(device: torch.device, *, seconds: float = 0.5) -> dict[str, float]:
    """What this machine reaches: GB/s of a copy (read and written) and of reading alone, TFLOP/s of a square product in
    each dtype.

    Reading alone is a product of a matrix and a vector in bfloat16. float32 products are true ones: torch must not have
    been told to use TF32.
    """
    on_gpu = device.type == "cuda"
    num_bytes, width = (2**31, 8192) if on_gpu else (2**24, 256)
    source = torch.randn(num_bytes // 4, device=device)
    pairs = [(source, torch.empty_like(source))]
    copy = {"copy": timer(lambda pair: pair[1].copy_(pair[0]), pairs, device)}
    found = {"copy_gbs": 2 * num_bytes / time_in_turn(copy, seconds=seconds)["copy"].us[1] / 1e3}
    del source, pairs, copy
    matrix = torch.randn(num_bytes // 2 // 4096, 4096, device=device, dtype=torch.bfloat16)
    vector = torch.randn(4096, 1, device=device, dtype=torch.bfloat16)
    read = {"read": timer(lambda pair: pair[0] @ pair[1], [(matrix, vector)], device)}
    found["read_gbs"] = num_bytes / time_in_turn(read, seconds=seconds)["read"].us[1] / 1e3
    del matrix, vector, read
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        factors = [torch.randn(width, width, device=device, dtype=dtype) for _ in range(2)]
        matmul = {"mm": timer(lambda pair: pair[0] @ pair[1], [factors], device)}
        found[f"{name}_tflops"] = 2 * width**3 / time_in_turn(matmul, seconds=seconds)["mm"].us[1] / 1e6
    return found
