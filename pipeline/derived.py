"""Partitions made from another partition's rows, in the same output: where their records lie, which files are theirs.

OUT/model=<name>/part-<index>-<id>.parquet   one for each part of the partition that it was made from
OUT/_derived/<name>/                         its own _plan.parquet, _run.json, _manifest.parquet, _SUCCESS, ...

Where a retry or an extension added rows to the first, the same generation of the second mirrors it, in files and
records so named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from pipeline.commit import PLAN, Output, is_visible, model_of
from pipeline.generations import History, RetryPlan, read_history
from pipeline.plan import Plan
from pipeline.storage import join

FOLDER = "_derived"
PLACE = re.compile(rf"{FOLDER}/([A-Za-z0-9][A-Za-z0-9._+-]*)/{re.escape(PLAN)}")


def records_of(output: Output, name: str) -> Output:
    """Where the records of one derived partition lie; its parts lie in `output` itself."""
    return Output(output.store, join(output.uri, f"{FOLDER}/{name}"))


def derived_names(files: Collection[str]) -> list[str]:
    """Of everything that lies in an output, the derived partitions that have a plan."""
    return sorted(match[1] for name in files if (match := PLACE.fullmatch(name)))


def derived_history(output: Output, name: str, files: Collection[str]) -> History | None:
    """The plans of a derived partition. files: everything in the output. Raises RunMismatch for a later one that is
    missing."""
    records, start = records_of(output, name), f"{FOLDER}/{name}/"
    plan = records.stored_plan()
    if plan is None:
        return None
    return read_history(records, plan, [file.removeprefix(start) for file in files if file.startswith(start)])


def history_with(output: Output, plan: Plan, model: str | None, files: Collection[str]) -> History:
    """The plans that `model` belongs to: the output's own and its later generations', or that of a derived partition of
    this name. Raises RunMismatch for a later plan that is missing."""
    if model is not None and model not in plan.identities and model in derived_names(files):
        derived = derived_history(output, model, files)
        if derived is not None:
            return derived
    return read_history(output, plan, files)


def are_derived(files: Collection[str]) -> set[str]:
    """The part files that belong to derived partitions, which have plans of their own."""
    names = set(derived_names(files))
    return {name for name in files if is_visible(name) and name.startswith("model=") and model_of(name) in names}


def mirror_problems(history: History, keys: Mapping[str, bytes]) -> Iterator[str]:
    """Where a derived file's rows are not those of the one that it was made from. keys: of each file, a digest."""
    for plan in (history.first, *history.later):
        for model, part, name in plan.files():
            source = plan.identities[model].get("source")
            if source is None:
                continue
            suffix = f"-retry{plan.generation}" if isinstance(plan, RetryPlan) else ""
            origin = f"model={source['model']}/part-{part.index:06d}-{part.id(source['identity'])}{suffix}.parquet"
            if name in keys and origin in keys and keys[name] != keys[origin]:
                yield f"{name}: its keys are not those of {origin}, which it was made from"
