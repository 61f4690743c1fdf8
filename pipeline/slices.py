"""`2/8` -> a slice of a frozen plan: every eighth part, from part 2 on; and which other slices an output was begun in.

* What a slice holds follows from the parts' indices alone, so drivers that share a plan agree without a word.
* A driver that has something to do says so once, in `_shard-<i>-of-<n>.json`. Nothing waits for these records: they
  only tell a later driver that the same parts were begun under another division.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from math import gcd

from pipeline.commit import Output
from pipeline.errors import JobError, RunMismatch
from pipeline.generations import of_generation
from pipeline.plan import Plan

TEXT = re.compile(r"(\d{1,9})/(\d{1,9})")
NAME = re.compile(r"_shard-(\d{1,9})-of-(\d{1,9})(?:-(\d+))?\.json")


@dataclass(frozen=True, order=True)
class Slice:
    """Parts whose index leaves the rest `index` when divided by `count`. Raises JobError where there is no such one."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            last = f"0/{self.count} to {self.count - 1}/{self.count}" if self.count > 0 else "0/1"
            raise JobError(f"shard `{self}`: there is no such one", hint=f"they are counted from 0: {last}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def __contains__(self, part_index: int) -> bool:
        return part_index % self.count == self.index

    def overlaps(self, other: Slice) -> bool:
        """Whether a part may be in both: two classes of rests meet where they agree on the common divisor."""
        return (self.index - other.index) % gcd(self.count, other.count) == 0

    def count_of(self, plan: Plan) -> tuple[int, int | None]:
        """Parts of a plan that are in it, and their rows; None where only reading could tell."""
        if self == WHOLE:
            return len(plan.parts), plan.rows
        counts = [part.rows for part in plan.parts if part.index in self]
        return len(counts), None if None in counts else sum(count or 0 for count in counts)

    def record_name(self, generation: int) -> str:
        return of_generation(f"_shard-{self.index}-of-{self.count}.json", generation)


WHOLE = Slice(0, 1)


def parse_slice(given: str | tuple[int, int] | None) -> Slice:
    """`2/8` or (2, 8); None is all. Raises JobError."""
    if given is None:
        return WHOLE
    if not isinstance(given, str):
        return Slice(*given)
    match = TEXT.fullmatch(given.strip())
    if match is None:
        raise JobError(f"shard `{given}` cannot be understood", hint="say which of how many, from 0: `--shard 2/8`")
    return Slice(int(match[1]), int(match[2]))


def announce(output: Output, plan: Plan, ours: Slice, generation: int, files: Iterable[str]) -> None:
    """Say that `ours` has begun. files: names in the output. Raises RunMismatch where another division has begun parts
    of it that are not all there: two drivers would do the same work. A driver of all that is left is never refused."""
    if ours == WHOLE:
        return
    there = set(files)
    for other in sorted(_announced(there, generation)):
        if other.count == ours.count or not ours.overlaps(other):
            continue
        both = {index for index in plan.left(there) if index in ours and index in other}
        if both:
            record = f"{output.uri}/{of_generation(f'_shard-*-of-{other.count}.json', generation)}"
            raise RunMismatch(
                f"{output.uri}: --shard {ours} overlaps --shard {other}, which was begun here: both have "
                f"{len(both):,} parts that are not done, part {min(both)} for one",
                hint=f"divide by {other.count} as the others do; where those drivers are over for good, remove "
                f"{record}, or leave out --shard: one driver then does all that is left",
            )
    output.put_once(ours.record_name(generation), json.dumps({"shard": str(ours)}).encode())


def left_by_slice(plan: Plan, files: Container[str], count: int) -> dict[Slice, int]:
    """Parts that are not done, of each of `count` slices that has some."""
    left = Counter(index % count for index in plan.left(files))
    return {Slice(index, count): left[index] for index in sorted(left)}


def _announced(files: Iterable[str], generation: int) -> Iterator[Slice]:
    for name in files:
        match = NAME.fullmatch(name)
        if match and int(match[3] or 0) == generation and int(match[1]) < int(match[2]):
            yield Slice(int(match[1]), int(match[2]))
