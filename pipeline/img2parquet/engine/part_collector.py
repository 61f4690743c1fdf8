"""Collect batches by part until the part is complete, and keep track of what is missing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping

from img2parquet.batch import Embedded, Failed
from img2parquet.dataset.part_file import PartBuffer
from img2parquet.engine.stall_detector import UnfinishedPart
from img2parquet.schema import Part


class PartCollector:
    """The scheduler's `PartTracker`. Only the driver's thread changes it.

    parts: all of the plan by index; left: the indices that this session has to do."""

    def __init__(self, parts: Mapping[int, Part], left: Collection[int], batch_size: int) -> None:
        self.parts, self.left, self.batch_size = parts, left, batch_size
        self.buffers: dict[int, PartBuffer] = {}
        self.received_at: dict[int, float] = {}  # of the last batch of each part in `buffers`
        self.complete: set[int] = set()  # parts that were handed over to be committed
        self.failed: dict[int, str] = {}
        self.created_at = self.last_batch_at = time.monotonic()

    def add(self, result: Embedded) -> bool:
        """Keep a batch. Return False for one that is not needed: a repeated one, or of a complete or failed part."""
        index = result.part_index
        if index in self.failed or index in self.complete:
            return False
        buffer = self.buffers.setdefault(index, PartBuffer(self.parts[index]))
        if result.k in buffer.batches:  # the part was run again
            return False
        buffer.add(result, self.batch_size)
        self.received_at[index] = self.last_batch_at = time.monotonic()
        return True

    def take_complete(self, index: int) -> PartBuffer | None:
        """Hand over the part's batches once all of them are there."""
        if not self.buffers[index].is_whole:
            return None
        self.complete.add(index)
        del self.received_at[index]
        return self.buffers.pop(index)

    def fail(self, result: Failed) -> None:
        """Give up a part, unless another stream has completed it."""
        if result.part_index not in self.complete:
            self.failed[result.part_index] = result.message
            self.buffers.pop(result.part_index, None)

    def unfinished(self) -> list[int]:
        return [index for index in self.left if index not in self.complete and index not in self.failed]

    def started(self) -> set[int]:
        return set(self.buffers)

    def describe(self, index: int) -> UnfinishedPart:
        received = self.buffers[index].batches if index in self.buffers else {}
        missing_k = next(k for k in itertools.count() if k not in received)
        since_s = time.monotonic() - self.received_at.get(index, self.created_at)
        return UnfinishedPart(index, len(received), missing_k, since_s)
