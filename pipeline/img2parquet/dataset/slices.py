"""Divide a plan among several drivers: slice `2/8` is every eighth part, from part 2 on.

* What a slice contains follows from the part indices alone, so drivers that share a plan need not communicate.
* A driver that has work to do records its slice once, in `_shard-<i>-of-<n>.json`. Nothing waits for these records:
  they only tell a later driver that the same parts were started under another division.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from math import gcd

from img2parquet.dataset.commit import Output
from img2parquet.dataset.generations import of_generation
from img2parquet.dataset.plan import Plan
from img2parquet.errors import JobError, RunMismatch

TEXT = re.compile(r"(\d{1,9})/(\d{1,9})")
NAME = re.compile(r"_shard-(\d{1,9})-of-(\d{1,9})(?:-(\d+))?\.json")


@dataclass(frozen=True, order=True)
class Slice:
    """Parts whose index modulo `count` is `index`. Raises JobError when `index` is out of range."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            count = max(self.count, 1)
            raise JobError(
                f"shard `{self}`: slice index out of range: expected 0 to {count - 1}",
                hint=f"slices are counted from 0: 0/{count} to {count - 1}/{count}",
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def __contains__(self, part_index: int) -> bool:
        return part_index % self.count == self.index

    def overlaps(self, other: Slice) -> bool:
        """Return whether the slices can share a part: two residue classes do when they agree modulo the greatest common
        divisor."""
        return (self.index - other.index) % gcd(self.count, other.count) == 0

    def count_of(self, plan: Plan) -> tuple[int, int | None]:
        """Count the slice's parts of a plan, and their rows; None where only reading can count rows."""
        if self == WHOLE:
            return len(plan.parts), plan.rows
        counts = [part.rows for part in plan.parts if part.index in self]
        return len(counts), None if None in counts else sum(count or 0 for count in counts)

    def record_name(self, generation: int) -> str:
        return of_generation(f"_shard-{self.index}-of-{self.count}.json", generation)


WHOLE = Slice(0, 1)


def parse_slice(given: str | tuple[int, int] | None) -> Slice:
    """Parse `2/8` or (2, 8); None is the whole plan. Raises JobError."""
    if given is None:
        return WHOLE
    if not isinstance(given, str):
        return Slice(*given)
    match = TEXT.fullmatch(given.strip())
    if match is None:
        raise JobError(f"shard `{given}`: not a slice", hint="give its index, from 0, and their number: `--shard 2/8`")
    return Slice(int(match[1]), int(match[2]))


def announce(output: Output, plan: Plan, ours: Slice, files: Iterable[str]) -> None:
    """Record that our slice was started. files: names in the output.

    Raises RunMismatch when an overlapping slice of another division was started and their common parts are not all
    committed: two drivers would do the same work. A driver of the whole plan is never refused."""
    if ours == WHOLE:
        return
    there, generation = set(files), plan.generation
    for other in sorted(_announced(there, generation)):
        if other.count == ours.count or not ours.overlaps(other):
            continue
        both = {index for index in plan.left(there) if index in ours and index in other}
        if both:
            record = f"{output.uri}/{of_generation(f'_shard-*-of-{other.count}.json', generation)}"
            raise RunMismatch(
                f"{output.uri}: --shard {ours} overlaps --shard {other}, which was started here: they share "
                f"{len(both):,} uncommitted parts, part {min(both)} for one",
                hint=f"divide by {other.count} as the other drivers do; if those have ended for good, remove "
                f"{record}, or leave out --shard, and one driver does everything that is left",
            )
    output.put_once(ours.record_name(generation), json.dumps({"shard": str(ours)}).encode())


def left_by_slice(plan: Plan, files: Container[str], count: int) -> dict[Slice, int]:
    """Count the uncommitted parts of each of `count` slices that has some."""
    left = Counter(index % count for index in plan.left(files))
    return {Slice(index, count): left[index] for index in sorted(left)}


def _announced(files: Iterable[str], generation: int) -> Iterator[Slice]:
    for name in files:
        match = NAME.fullmatch(name)
        if match and int(match[3] or 0) == generation and int(match[1]) < int(match[2]):
            yield Slice(int(match[1]), int(match[2]))
