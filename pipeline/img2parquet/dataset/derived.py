"""Locate partitions that were made from another partition's rows in the same output, and tell whose a file is.

OUT/model=<name>/part-<index>-<id>.parquet   one for each part of the source partition
OUT/_derived/<name>/                         its own _plan.parquet, _run.json, _manifest.parquet, _SUCCESS, ...

Where a retry or an extension added rows to the source partition, the same generation of the derived partition mirrors
it: its files and records have the names of that generation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from img2parquet.dataset.commit import PLAN, Output, is_part_file, model_of
from img2parquet.dataset.generations import History, RetryPlan, read_history, read_newer
from img2parquet.dataset.plan import Plan
from img2parquet.storage import join

FOLDER = "_derived"
PLAN_NAME = re.compile(rf"{FOLDER}/([A-Za-z0-9][A-Za-z0-9._+-]*)/{re.escape(PLAN)}")


def records_of(output: Output, name: str) -> Output:
    """Return the folder of a derived partition's records; its part files are in `output` itself."""
    return Output(output.store, join(output.uri, f"{FOLDER}/{name}"))


def derived_names(files: Collection[str]) -> list[str]:
    """List the derived partitions that have a plan. files: names of everything in the output."""
    return sorted(match[1] for name in files if (match := PLAN_NAME.fullmatch(name)))


def derived_history(output: Output, name: str, files: Collection[str]) -> History | None:
    """Read the plans of a derived partition; None where it has none. files: names of everything in the output.

    Raises RunMismatch when a later plan is missing."""
    records, start = records_of(output, name), f"{FOLDER}/{name}/"
    plan = records.stored_plan()
    if plan is None:
        return None
    return read_history(records, plan, [file.removeprefix(start) for file in files if file.startswith(start)])


def history_with(output: Output, plan: Plan, model: str | None, files: Collection[str]) -> History:
    """Read the plans that `model` belongs to: those of the derived partition of this name, else the output's own.

    plan: the output's first. Raises RunMismatch when a later plan is missing."""
    if model is not None and model not in plan.identities and model in derived_names(files):
        derived = derived_history(output, model, files)
        if derived is not None:
            return derived
    return read_history(output, plan, files)


def are_derived(files: Collection[str]) -> set[str]:
    """Return the part files that belong to derived partitions, which have plans of their own."""
    names = set(derived_names(files))
    return {name for name in files if is_part_file(name) and model_of(name) in names}


def foreign_files(history: History, files: Collection[str]) -> list[str]:
    """Return the part files that no plan of `history` names, sorted; for the history of a derived partition, those of
    its own partition alone."""
    derived, identities = set(derived_names(files)), history.first.identities
    own = identities.keys() if any("source" in what for what in identities.values()) else None

    def belongs(name: str) -> bool:
        return is_part_file(name) and (model_of(name) not in derived if own is None else model_of(name) in own)

    return sorted(name for name in files if belongs(name) and name not in history)


def unplanned_files(records: Output, history: History, files: Collection[str]) -> list[str]:
    """Return the foreign files that are not of a generation that another driver has started since `history` was read.

    records: the folder of the plans. Raises RunMismatch when a plan is missing."""
    return foreign_files(history, files) and foreign_files(read_newer(records, history, records.files()), files)


def mirror_problems(history: History, keys: Mapping[str, bytes]) -> Iterator[str]:
    """Yield a message for each derived file whose rows are not those of its source file. keys: a digest by file."""
    for plan in history.plans:
        for model, part, name in plan.files():
            source = plan.identities[model].get("source")
            if source is None:
                continue
            suffix = f"-retry{plan.generation}" if isinstance(plan, RetryPlan) else ""
            origin = f"model={source['model']}/part-{part.index:06d}-{part.id(source['identity'])}{suffix}.parquet"
            if name in keys and origin in keys and keys[name] != keys[origin]:
                yield f"{name}: its keys are not those of {origin}, which it was made from"
