"""Plan a retry: choose which open rejects of an output to try again, and store them as the plan of a new generation.

The plan is stored once, as a job's is: a driver that finds one which has not finished continues it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from img2parquet.dataset.commit import MANIFEST, PLAN, REJECTS, Output
from img2parquet.dataset.generations import (
    History,
    LaterPlan,
    RetryPlan,
    encode_retry,
    of_generation,
    read_open_rejects,
    store_later,
)
from img2parquet.dataset.rejects import by_part_and_model, to_table
from img2parquet.errors import InputError, RunMismatch
from img2parquet.schema import REASONS
from img2parquet.storage import Entry
from img2parquet.storage.parallel import fetch_in_order

FINAL = {  # reasons that follow from the input files alone, which are pinned: a retry could not change the outcome
    "duplicate_key": "its part has another row of that key",
    "no_key": "the shard names no key for the row",
    "shard_damaged": "the shard's own bytes are damaged",
}
KEY_READERS = 16


def retryable(reasons: Sequence[str]) -> list[str]:
    """Return the given reasons, or every reason that can be retried where none are given."""
    return list(reasons) or [reason for reason in REASONS if reason not in FINAL]


def plan_retry(output: Output, history: History, reasons: tuple[str, ...]) -> tuple[History, bytes | None]:
    """Encode the plan of a new retry, or read that of an unfinished one; return it with the history before it.

    The plan is None where there is nothing to retry. Raises RunMismatch when the unfinished generation is an extension
    or a retry for other reasons, InputError when the last generation has not ended, StorageError."""
    files = output.files()
    if unfinished := history.unfinished(files):
        _check_same_retry(output, unfinished, reasons)
        return history.upto(history.generation - 1), output.read(of_generation(PLAN, history.generation))
    missing = set(history.names_by_part()) - files.keys()
    records = [of_generation(name, history.generation) for name in (REJECTS, MANIFEST)]
    parent, open_rejects = output.read(records[1]), read_open_rejects(output, history.generation)
    if missing or parent is None or open_rejects is None:
        what = f"{len(missing)} part files are missing" if missing else f"no {' or no '.join(records)}"
        raise InputError(
            f"{output.uri}: the job has not finished: {what}",
            hint="`img2parquet run` it first; only a finished job can be retried",
        )
    chosen = open_rejects.filter(pc.is_in(open_rejects.column("reason"), pa.array(retryable(reasons), pa.string())))
    chosen = _without_written(output, history, files, chosen)
    return history, encode_retry(chosen, history.generation + 1, parent, reasons) if chosen.num_rows else None


def start_retry(output: Output, before: History, data: bytes, reasons: tuple[str, ...]) -> tuple[RetryPlan, str]:
    """Store the plan of a retry, unless another driver has; return the stored plan and its hash.

    Raises RunMismatch when that one is an extension or a retry for other reasons."""
    plan, digest = store_later(output, data, before)
    return _check_same_retry(output, plan, reasons), digest


def _without_written(output: Output, history: History, files: Mapping[str, Entry], rejects: pa.Table) -> pa.Table:
    """Drop rejects whose key already has a row in their part: a list may name a key twice, and the first row of it may
    have been rejected."""
    left = {part: dict(of_models) for part, of_models in by_part_and_model(rejects).items()}
    wanted = (file for file in history.indexed() if file[0] in left.get(file[1], ()))

    def keys(file: tuple[str, int, str]) -> set[str]:
        entry = files[file[2]]
        with output.store.open(entry.uri, expect=entry) as opened:
            return set(pq.read_table(opened, columns=["key"]).column("key").to_pylist())

    for (model, part, _), written in fetch_in_order(wanted, keys, KEY_READERS):
        left[part][model] = tuple(reject for reject in left[part][model] if reject.key not in written)
    return to_table(left)


def _check_same_retry(output: Output, plan: LaterPlan, reasons: tuple[str, ...]) -> RetryPlan:
    if not isinstance(plan, RetryPlan):
        raise RunMismatch(
            f"{output.uri}: extension {plan.generation} was started and has to finish before a retry starts",
            hint="run the job again with `--extend`; if it ended with too many rejects, a higher "
            "`--set reject_limit=...` accepts them",
        )
    if plan.reasons != reasons:
        theirs = " ".join(f"--reason {reason}" for reason in plan.reasons)
        raise RunMismatch(
            f"{output.uri}: retry {plan.generation} was started {f'with {theirs}' if theirs else 'for every reason'}, "
            "and has to finish before another one starts",
            hint=f"img2parquet retry {output.uri}{f' {theirs}' if theirs else ''}",
        )
    return plan
