"""An accelerator's runtime that only behaves as one: tensors lie in host memory, but copies happen late, on threads.

What is read before its copy was waited for is wrong by far, so a missing wait is seen in the results.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

COPY_S = 0.01


class FakeStream:
    """Work done in order by one thread; what the computing stream does, its caller does at once."""

    def __init__(self) -> None:
        self.thread, self.work = ThreadPoolExecutor(1), list[Future[None]]()

    def do(self, call: Callable[[], None]) -> None:
        self.work.append(self.thread.submit(call))

    def wait_stream(self, stream: FakeStream) -> None:
        stream.synchronize()

    def synchronize(self) -> None:
        for future in wait(self.work).done:
            future.result()


class FakeEvent:
    def __init__(self) -> None:
        self.stream: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        assert self.stream is not None, "nothing was recorded"
        self.stream.synchronize()


class FakeApi:
    """`img2parquet.inference.device.AcceleratorApi`. `free` is what `memory` says."""

    def __init__(self, free: int = 60, total: int = 100) -> None:
        self.computing, self.here = FakeStream(), threading.local()
        self.free, self.total = free, total
        self.waits = self.releases = self.captures = 0

    def stream(self) -> FakeStream:
        return FakeStream()

    def computing_stream(self) -> FakeStream:
        return self.computing

    def event(self) -> FakeEvent:
        return FakeEvent()

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        self.here.stream = stream
        yield
        self.here.stream = None

    def upload(self, host: Tensor, rows: int) -> Tensor:
        pinned, there = host.clone(), torch.full((rows, *host.shape[1:]), 77, dtype=torch.uint8).to(host.dtype)

        def copy() -> None:
            time.sleep(COPY_S)
            there.zero_()
            there[: len(pinned)] = pinned

        stream = getattr(self.here, "stream", None)
        if stream is None:
            copy()
        else:
            stream.do(copy)
        return there

    def synchronize(self) -> None:
        self.waits += 1

    def release_cache(self) -> None:
        self.releases += 1

    def memory(self) -> tuple[int, int]:
        return self.free, self.total

    def capture(self, call: Callable[[], Any]) -> Callable[[], None]:
        self.captures += 1
        call()
        return call
