"""Running a step as one CUDA graph, and reading its results without waiting for the device.

A captured graph replays kernels on the addresses they were captured with. So a step may only read and write tensors
that are allocated once, must have fixed shapes, and must not copy to the host. Where there is no CUDA device the same
step runs eagerly.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], object]
MAX_GRAPHS = 8  # one per width, and few widths are worth a graph
ONE_AT_A_TIME = threading.Lock()  # for what runs on the stream that captures


@dataclass(frozen=True)
class CaptureReport:
    """How many graphs there are, the seconds their capture took and the device bytes it reserved."""

    graphs: int
    seconds: float
    bytes: int


@cache
def stream_for(work: str, device: torch.device) -> torch.cuda.Stream:
    """The stream of one kind of work, the same for the whole process.

    PyTorch hands out streams from a pool of 32 in turn, and its libraries keep a workspace for each that they have
    seen. With a stream per graph or session, pictures would sooner or later be drawn on the stream of a capture, and
    write into the workspace that a graph beside them uses.
    """
    return torch.cuda.Stream(device)


class StepGraphs:
    """Runs steps: the first time of a key eagerly, on CUDA then captured, and replayed from the second time on.

    The eager run is a real step and the warm-up at once: it compiles kernels and allocates workspaces, and nothing has
    to be undone afterwards. Capturing records without running. All graphs share one memory pool; beyond `limit` of
    them the one longest unused is dropped. `work` names the stream that captures.
    """

    def __init__(self, device: torch.device, limit: int = MAX_GRAPHS, work: str = "steps") -> None:
        self.device, self.limit, self.work = device, limit, work
        self._graphs: OrderedDict[Hashable, Step] = OrderedDict()
        self._warm: set[Hashable] = set()
        self._pool: Any = None
        self._seconds, self._bytes, self._count = 0.0, 0, 0

    def run(self, key: Hashable, step: Step) -> None:
        """Do one step; `key` names everything that the captured kernels depend on beside tensors' contents."""
        if self.device.type != "cuda":
            step()
        elif key in self._graphs:
            self._graphs.move_to_end(key)
            self._graphs[key]()
        elif key not in self._warm:
            self._warm.add(key)
            self._warm_up(step)
        else:
            while len(self._graphs) >= self.limit:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(step)
            self._graphs[key]()

    def clear(self) -> None:
        """Forget every graph: something they were captured with is gone."""
        self._graphs.clear()
        self._warm.clear()

    def report(self) -> CaptureReport:
        """What was captured so far, dropped graphs included."""
        return CaptureReport(self._count, self._seconds, self._bytes)

    def _warm_up(self, step: Step) -> None:
        """Run on the stream that captures: libraries keep workspaces per stream."""
        current, side = torch.cuda.current_stream(self.device), stream_for(self.work, self.device)
        side.wait_stream(current)
        with ONE_AT_A_TIME, torch.cuda.stream(side):
            step()
        current.wait_stream(side)

    def _capture(self, step: Step) -> Step:
        started = time.perf_counter()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()  # a pool ends with its last graph
        graph, stream = torch.cuda.CUDAGraph(), stream_for(self.work, self.device)
        # What other threads do to the device meanwhile is none of this capture's business.
        capture = torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local")
        with ONE_AT_A_TIME, torch.cuda.device(self.device), capture:
            before = torch.cuda.memory_reserved(self.device)  # entering has given cached memory back
            step()
        self._count += 1
        self._seconds += time.perf_counter() - started
        self._bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        return graph.replay


class Lagged:
    """Small tensors on their way to the host: pushed now, popped when a later step is already running.

    On CUDA a push is a copy to pinned memory behind everything queued so far; to pop waits for that copy alone.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, value: Tensor) -> None:
        """Queue a copy of `value`, which may change afterwards."""
        if value.device.type != "cuda":
            self._queue.append((value.clone(), None))
            return
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(value.device))
        self._queue.append((host, event))

    def pop(self) -> Tensor:
        """The oldest copy, on the CPU."""
        host, event = self._queue.popleft()
        if event is not None:
            event.synchronize()
        return host

    @property
    def ready(self) -> bool:
        """Whether `pop` would return at once."""
        return bool(self._queue) and (self._queue[0][1] is None or self._queue[0][1].query())
