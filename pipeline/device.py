"""A batch's way to the device and back, such that copying, computing and fetching overlap.

    with device.lane() as lane:
        pixels = lane.upload(crops)            pinned memory, then the lane's own stream
        with lane.computing():                 the device's one stream that computes, one caller at a time
            features = model(pixels)           launched only: nothing waits here
        with lane.fetching():                  when they are computed; the lane's own stream again
            columns = ...                      reduced there, moved to the host

* As many threads as like may call; each waits for its own batch alone. While one encodes its columns, the next one's
  forward pass runs and the one after it is copied. The same kernels run in the same order for a batch, whatever is
  beside it, so its numbers do not depend on that.
* `LANES` batches are on the device at any time: its memory is bounded whatever the number of threads.
* Pinned memory is torch's own cache of it, which gives a block again only when the copies from it are done.
* Tensors of one stream are read on another; they are freed only after the host has waited for both, so the allocator
  needs no further word about it.
* On a CPU all of this is nothing.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

LANES = 3  # one computes, one is being copied, one is being fetched
FULL_ENOUGH = 0.75  # of a batch: it is padded to the whole size, for which libraries and allocator are warm

# What torch says, beyond its own class, when memory ran out: its libraries allocate by themselves.
SAID = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # the library's own first allocation
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "can't allocate memory",  # the CPU's allocator
)


class Stream(Protocol):
    """Work that a device does in order: `torch.cuda.Stream`."""

    def wait_stream(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...


class Event(Protocol):
    """A place in a stream's work: `torch.cuda.Event`."""

    def record(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...


class Api(Protocol):
    """What is asked of an accelerator's runtime: `Cuda`, or in tests something that only behaves as one."""

    def stream(self) -> Stream: ...
    def computing_stream(self) -> Stream: ...
    def event(self) -> Event: ...
    def on(self, stream: Any) -> AbstractContextManager[Any]: ...
    def upload(self, host: Tensor, rows: int) -> Tensor: ...
    def synchronize(self) -> None: ...
    def release_cache(self) -> None: ...
    def memory(self) -> tuple[int, int]: ...
    def capture(self, call: Callable[[], Any]) -> Callable[[], None]: ...


@dataclass
class Clock:
    """What a device did for one batch, and how long before that it had nothing to do."""

    busy_s: float = 0.0
    idle_s: float = 0.0
    trying_s: float = 0.0  # of busy_s: whether a CUDA graph pays
    replayed: int = 0  # images whose forward pass was one


class Lane(Protocol):
    """One batch's turn on a device."""

    @property
    def alone(self) -> bool:
        """Whether no other batch is there."""

    @property
    def clock(self) -> Clock | None:
        """None where the caller's own clock tells as much."""

    def rows(self, count: int, batch_size: int) -> int:
        """How many rows to upload for `count` images: more than these where a whole batch runs better."""

    def upload(self, array: Any, rows: int) -> Tensor:
        """An array or tensor in host memory -> the device, with rows of zeros up to `rows`. Does not wait."""

    def computing(self) -> AbstractContextManager[None]: ...
    def fetching(self) -> AbstractContextManager[None]: ...


class Device(Protocol):
    """Where a worker's models run."""

    @property
    def api(self) -> Api | None:
        """None on a CPU."""

    def lane(self) -> AbstractContextManager[Lane]:
        """Waits for a free one."""

    def alone(self) -> AbstractContextManager[Lane]:
        """Waits until no other batch is there; what was cached for them is given back."""

    def memory(self) -> str:
        """Free and total memory, for an error's text."""


def open_device(name: str) -> Device:
    """`cpu`, `cuda` or `cuda:<n>` -> the device."""
    return Cpu() if torch.device(name).type == "cpu" else Accelerator(Cuda(torch.device(name)))


class Cpu:
    """No streams and no limits: every call has the same lane."""

    api = None

    def lane(self) -> AbstractContextManager[Lane]:
        return nullcontext(CpuLane())

    alone = lane

    def memory(self) -> str:
        pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return f"the machine has {pages * page_bytes / 2**30:.1f} GiB"


class CpuLane:
    alone, clock = True, None

    def rows(self, count: int, batch_size: int) -> int:
        return count

    def upload(self, array: Any, rows: int) -> Tensor:
        return as_tensor(array)

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    fetching = computing


class Accelerator:
    """`LANES` lanes over one computing stream."""

    def __init__(self, api: Api, lanes: int = LANES) -> None:
        self.api: Api = api
        self.count, self._alone, queue_ = lanes, threading.Lock(), ComputeQueue()
        self.free: queue.Queue[AcceleratorLane] = queue.Queue()
        for _ in range(lanes):
            self.free.put(AcceleratorLane(api, queue_))

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        lane = self.free.get()
        lane.clock = Clock()
        try:
            yield lane
        finally:
            self.free.put(lane)

    @contextmanager
    def alone(self) -> Iterator[Lane]:
        with self._alone:  # one at a time collects lanes, or two would wait for each other's
            lanes = [self.free.get() for _ in range(self.count)]
            try:
                self.api.release_cache()
                lanes[0].alone, lanes[0].clock = True, Clock()
                yield lanes[0]
            finally:
                lanes[0].alone = False
                for lane in lanes:
                    self.free.put(lane)

    def memory(self) -> str:
        free, total = self.api.memory()
        return f"{free / 2**30:.1f} of the device's {total / 2**30:.1f} GiB are free"


class ComputeQueue:
    """Who may launch, and when the device was last seen to be done."""

    def __init__(self) -> None:
        self.launching, self.lock = threading.Lock(), threading.Lock()
        self.done: float | None = None

    def finished(self, launched: float, clock: Clock) -> None:
        """What was launched then is computed now. The wait for a first batch is start-up and not counted."""
        now = time.perf_counter()
        with self.lock:
            last = launched if self.done is None else self.done
            clock.idle_s += max(0.0, launched - last)
            clock.busy_s += max(0.0, now - max(launched, last))
            self.done = now


class AcceleratorLane:
    def __init__(self, api: Api, compute: ComputeQueue) -> None:
        self.api, self.compute, self.alone, self.clock = api, compute, False, Clock()
        self.stream, self.computed, self.launched = api.stream(), api.event(), 0.0

    def rows(self, count: int, batch_size: int) -> int:
        return batch_size if count >= FULL_ENOUGH * batch_size else count

    def upload(self, array: Any, rows: int) -> Tensor:
        with self.api.on(self.stream):
            return self.api.upload(as_tensor(array), rows)

    @contextmanager
    def computing(self) -> Iterator[None]:
        with self.compute.launching:
            self.launched, stream = time.perf_counter(), self.api.computing_stream()
            stream.wait_stream(self.stream)
            with self._nothing_left_behind():
                yield
            self.computed.record(stream)

    @contextmanager
    def fetching(self) -> Iterator[None]:
        self.computed.synchronize()  # sleeps; other threads run
        self.compute.finished(self.launched, self.clock)
        with self.api.on(self.stream), self._nothing_left_behind():
            yield
        self.stream.synchronize()

    @contextmanager
    def _nothing_left_behind(self) -> Iterator[None]:
        """After an error tensors are freed at once: by then nothing on the device may read them."""
        try:
            yield
        except BaseException:
            self.api.synchronize()
            raise


class Cuda:
    """torch.cuda, as `Api`."""

    def __init__(self, place: torch.device) -> None:
        self.place = torch.device("cuda", place.index or 0)

    def stream(self) -> Stream:
        return torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]

    def computing_stream(self) -> Stream:
        return torch.cuda.default_stream(self.place)

    def event(self) -> Event:
        # who waits sleeps: the core belongs to those who decode
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def upload(self, host: Tensor, rows: int) -> Tensor:
        pinned = torch.empty((rows, *host.shape[1:]), dtype=host.dtype, pin_memory=True)
        pinned[: len(host)].copy_(host)
        pinned[len(host) :].zero_()
        return pinned.to(self.place, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.place)

    def release_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.place)

    def capture(self, call: Callable[[], Any]) -> Callable[[], None]:
        """The kernels that `call` launches, as one launch."""
        side, graph = torch.cuda.Stream(self.place), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(side):  # what libraries set up at a first call cannot be captured
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.place).wait_stream(side)
        # thread_local: other threads go on copying meanwhile
        with torch.cuda.device(self.place), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        return graph.replay


def to_host(tensor: Tensor) -> Tensor:
    """Through pinned memory, as fast as the bus; waits for the current stream alone. The copy out of it gives it back:
    columns live until their part is written."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned.clone()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or a library below it, could not have the memory that it asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in SAID)


def as_tensor(value: Any) -> Tensor:
    """Arrays as they are; Ray's are read-only, which torch warns of, but nothing here writes to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(value)
