"""Move batches to the device and results back, such that uploading, computing and fetching overlap.

    with device.lane() as lane:
        pixels = lane.upload(crops)            through pinned memory, on the lane's own stream
        with lane.computing():                 on the device's one computing stream, one caller at a time
            features = model(pixels)           only launched: nothing waits here
        with lane.fetching():                  once they are computed, on the lane's own stream again
            columns = ...                      reduced on the device, then moved to the host

- Any number of threads may call; each waits only for its own batch. While one encodes its columns, the forward pass of
  the next batch runs and the one after it is copied. For each batch the same kernels run in the same order, whatever
  else is on the device, so its numbers do not depend on other batches.
- At most `LANES` batches are on the device at any time, so its memory is bounded whatever the number of threads.
- Pinned memory comes from torch's own cache, which reuses a block only when the copies from it are done.
- Tensors of one stream are read on another one. They are freed only after the host has waited for both streams, so the
  allocator needs no `record_stream`.
- On a CPU all of this does nothing.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from img2parquet.models.tensors import as_tensor

LANES = 3  # one computes, one is being uploaded, one is being fetched
PAD_FROM = 0.75  # of a batch: padded to the whole size, for which libraries and the allocator are warmed up

# Messages of errors other than torch.OutOfMemoryError that mean the same: torch's libraries allocate by themselves.
OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # the library's own first allocation
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "can't allocate memory",  # the CPU's allocator
)


class Stream(Protocol):
    """A queue of work that a device does in order: `torch.cuda.Stream`."""

    def wait_stream(self, stream: Any) -> None:
        """Make later work of this stream wait for the work of `stream` so far; the caller does not wait."""

    def synchronize(self) -> None:
        """Wait until all work of this stream is done."""


class Event(Protocol):
    """A mark in a stream's work: `torch.cuda.Event`."""

    def record(self, stream: Any) -> None:
        """Put the mark after the work of `stream` so far."""

    def synchronize(self) -> None:
        """Wait until the work before the mark is done."""


class AcceleratorApi(Protocol):
    """The parts of an accelerator's runtime that are used here: `Cuda`, or a fake one in tests."""

    def stream(self) -> Stream:
        """Make a new stream."""

    def computing_stream(self) -> Stream:
        """Return the one stream that models run on."""

    def event(self) -> Event:
        """Make a new event."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Run what is inside on `stream`."""

    def upload(self, host: Tensor, rows: int) -> Tensor:
        """Copy a tensor to the device on the current stream, padded with zeros to `rows` rows. Does not wait."""

    def synchronize(self) -> None:
        """Wait until all streams of the device are idle."""

    def release_cache(self) -> None:
        """Return cached memory to the device."""

    def memory(self) -> tuple[int, int]:
        """Return free and total memory in bytes."""

    def capture(self, call: Callable[[], Any]) -> Callable[[], None]:
        """Capture the kernels that `call` launches; return a function that replays them in one launch."""


@dataclass
class DeviceClock:
    """Measure how long a device computed one batch, and how long it was idle before that."""

    busy_s: float = 0.0
    idle_s: float = 0.0
    trying_s: float = 0.0  # the part of busy_s spent on finding out whether a CUDA graph pays
    replayed: int = 0  # images whose forward pass was the replay of a CUDA graph


class Lane(Protocol):
    """A slot for one batch on a device."""

    @property
    def alone(self) -> bool:
        """Whether no other batch is on the device."""

    @property
    def clock(self) -> DeviceClock | None:
        """The device's time for this batch; None where the caller's own clock measures the same."""

    def rows(self, count: int, batch_size: int) -> int:
        """Return how many rows to upload for `count` images: more than `count` where a whole batch runs better."""

    def upload(self, array: Any, rows: int) -> Tensor:
        """Copy an array or tensor from host memory to the device, padded with zeros to `rows` rows. Does not wait."""

    def computing(self) -> AbstractContextManager[None]:
        """Launch what runs inside on the computing stream, after the lane's uploads."""

    def fetching(self) -> AbstractContextManager[None]:
        """Wait for what was launched, then run what is inside on the lane's own stream."""


class Device(Protocol):
    """A CPU or an accelerator on which a worker's models run."""

    @property
    def api(self) -> AcceleratorApi | None:
        """The accelerator's runtime; None on a CPU."""

    def lane(self) -> AbstractContextManager[Lane]:
        """Wait for a free lane and take it."""

    def alone(self) -> AbstractContextManager[Lane]:
        """Wait until no other batch is on the device, release its cached memory, and take a lane."""

    def memory(self) -> str:
        """Describe free and total memory, for error messages."""


def open_device(name: str) -> Device:
    """Open the device named `cpu`, `cuda` or `cuda:<n>`."""
    return Cpu() if torch.device(name).type == "cpu" else Accelerator(Cuda(torch.device(name)))


class Cpu:
    """A CPU: no streams, and no limit on the number of lanes."""

    api = None

    def lane(self) -> AbstractContextManager[Lane]:
        return nullcontext(CpuLane())

    alone = lane

    def memory(self) -> str:
        pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return f"the machine has {pages * page_bytes / 2**30:.1f} GiB"


class CpuLane:
    """A lane that does nothing but convert arrays to tensors."""

    alone, clock = True, None

    def rows(self, count: int, batch_size: int) -> int:
        return count

    def upload(self, array: Any, rows: int) -> Tensor:
        return as_tensor(array)

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    fetching = computing


class Accelerator:
    """An accelerator with `LANES` lanes over one computing stream."""

    def __init__(self, api: AcceleratorApi, lanes: int = LANES) -> None:
        self.api: AcceleratorApi = api
        self.count, self._alone, queue_ = lanes, threading.Lock(), ComputeQueue()
        self.free: queue.Queue[AcceleratorLane] = queue.Queue()
        for _ in range(lanes):
            self.free.put(AcceleratorLane(api, queue_))

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        lane = self.free.get()
        lane.clock = DeviceClock()
        try:
            yield lane
        finally:
            self.free.put(lane)

    @contextmanager
    def alone(self) -> Iterator[Lane]:
        with self._alone:  # only one thread collects lanes at a time: two would wait for each other's
            lanes = [self.free.get() for _ in range(self.count)]
            try:
                self.api.release_cache()
                lanes[0].alone, lanes[0].clock = True, DeviceClock()
                yield lanes[0]
            finally:
                lanes[0].alone = False
                for lane in lanes:
                    self.free.put(lane)

    def memory(self) -> str:
        free, total = self.api.memory()
        return f"{free / 2**30:.1f} of the device's {total / 2**30:.1f} GiB are free"


class ComputeQueue:
    """Let one thread launch at a time, and keep when the device was last seen to finish."""

    def __init__(self) -> None:
        self.launching, self.lock = threading.Lock(), threading.Lock()
        self.done: float | None = None

    def finished(self, launched: float, clock: DeviceClock) -> None:
        """Add to `clock` the busy and idle seconds of the work that was launched at `launched` and is done now.

        The time before the first batch is start-up and not counted."""
        now = time.perf_counter()
        with self.lock:
            last = launched if self.done is None else self.done
            clock.idle_s += max(0.0, launched - last)
            clock.busy_s += max(0.0, now - max(launched, last))
            self.done = now


class AcceleratorLane:
    """A lane with a stream of its own for copies."""

    def __init__(self, api: AcceleratorApi, compute: ComputeQueue) -> None:
        self.api, self.compute, self.alone, self.clock = api, compute, False, DeviceClock()
        self.stream, self.computed, self.launched = api.stream(), api.event(), 0.0

    def rows(self, count: int, batch_size: int) -> int:
        return batch_size if count >= PAD_FROM * batch_size else count

    def upload(self, array: Any, rows: int) -> Tensor:
        with self.api.on(self.stream):
            return self.api.upload(as_tensor(array), rows)

    @contextmanager
    def computing(self) -> Iterator[None]:
        with self.compute.launching:
            self.launched, stream = time.perf_counter(), self.api.computing_stream()
            stream.wait_stream(self.stream)
            with self._synchronized_after_errors():
                yield
            self.computed.record(stream)

    @contextmanager
    def fetching(self) -> Iterator[None]:
        self.computed.synchronize()  # sleeps; other threads run
        self.compute.finished(self.launched, self.clock)
        with self.api.on(self.stream), self._synchronized_after_errors():
            yield
        self.stream.synchronize()

    @contextmanager
    def _synchronized_after_errors(self) -> Iterator[None]:
        """Wait for the device after an error: tensors are freed at once then, so nothing may still read them."""
        try:
            yield
        except BaseException:
            self.api.synchronize()
            raise


class Cuda:
    """The `AcceleratorApi` of torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", device.index or 0)

    def stream(self) -> Stream:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def computing_stream(self) -> Stream:
        return torch.cuda.default_stream(self.device)

    def event(self) -> Event:
        # a waiting thread sleeps, which leaves its core to decoding
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def upload(self, host: Tensor, rows: int) -> Tensor:
        pinned = torch.empty((rows, *host.shape[1:]), dtype=host.dtype, pin_memory=True)
        pinned[: len(host)].copy_(host)
        pinned[len(host) :].zero_()
        return pinned.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.device)

    def capture(self, call: Callable[[], Any]) -> Callable[[], None]:
        """Capture the kernels that `call` launches; return a function that replays them in one launch."""
        side, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # warm up: what libraries set up in a first call cannot be captured
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        # thread_local: other threads continue to copy meanwhile
        with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        return graph.replay


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or a library that it uses, failed to allocate memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
