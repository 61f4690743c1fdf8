"""Many small objects, fetched in parallel and handed over in order, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT_BYTES = 256 << 20


def fetch_in_order(
    items: Iterable[Item],
    fetch: Callable[[Item], Result],
    threads: int,
    size_of: Callable[[Item], int] = lambda item: 0,
) -> Iterator[tuple[Item, Result]]:
    """Each item with what `fetch` returned for it, in the items' order; the first exception ends it.

    At most 2 x `threads` results wait, and no more than IN_FLIGHT_BYTES by what `size_of` expects."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    in_flight_bytes = 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        for item in items:
            while waiting and (len(waiting) >= 2 * threads or in_flight_bytes + size_of(item) > IN_FLIGHT_BYTES):
                first, future = waiting.popleft()
                in_flight_bytes -= size_of(first)
                yield first, future.result()
            in_flight_bytes += size_of(item)
            waiting.append((item, pool.submit(fetch, item)))
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_ahead(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same chunks, the next one always under way: a store's answer does not wait for what is done with the last."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="read")
    try:
        future = pool.submit(next, chunks, None)
        while (chunk := future.result()) is not None:
            future = pool.submit(next, chunks, None)
            yield chunk
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
