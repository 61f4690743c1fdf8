"""Fetch many small objects in parallel and return them in order, in bounded memory."""

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
    at_most: int = 0,
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of `fetch`, in the order of the items; the first exception ends it.

    At most 2 x `threads` results wait, or `at_most` where it is given, and no more than IN_FLIGHT_BYTES by what
    `size_of` expects."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    in_flight_bytes = 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        for item in items:
            while waiting and (
                len(waiting) >= (at_most or 2 * threads) or in_flight_bytes + size_of(item) > IN_FLIGHT_BYTES
            ):
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
