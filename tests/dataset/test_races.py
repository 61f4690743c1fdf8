"""Two commands at work on one output: each does what it was asked for, and neither takes the other's files for wrong.

Every race is staged: the other command runs in full at the worst moment of the first, in place of a function's start.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from img2parquet.dataset import extension
from img2parquet.dataset.commit import SUCCESS, Output
from img2parquet.engine import driver
from img2parquet.engine import retry as retry_module
from img2parquet.engine.driver import run
from img2parquet.engine.retry import retry
from img2parquet.errors import RunMismatch
from img2parquet.job import JobSpec
from img2parquet.results.embeddings import open_vectors
from img2parquet.results.probe import label_partition
from img2parquet.results.probe.linear_probe import fit_probe
from img2parquet.results.reader import open_results
from img2parquet.results.search import index as index_module
from img2parquet.results.search.index import index_vectors, open_index
from img2parquet.results.verify import verify
from tests.support.finished_outputs import copy_of, small_run
from tests.support.small_job import make_shards, small_job

PER_SHARD = 8


@pytest.fixture(scope="module")
def all_shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Make tars of 8 images, with one bad image in each of 0 and 2."""
    return make_shards(tmp_path_factory.mktemp("shards"), 6, PER_SHARD)


@pytest.fixture
def bring(all_shards: list[Path], tmp_path: Path) -> Callable[..., None]:
    (tmp_path / "in").mkdir()

    def copy(*numbers: int) -> None:
        for number in numbers:
            shutil.copy2(all_shards[number], tmp_path / "in" / all_shards[number].name)

    return copy


@pytest.fixture
def job(bring: Callable[..., None], checkpoint: Path, tmp_path: Path) -> JobSpec:
    """A finished job on the first two shards."""
    bring(0, 1)
    job = small_job(f"{tmp_path}/in/*.tar", checkpoint, f"{tmp_path}/out", reject_limit=1.0)
    run(job, "local")
    return job


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def stage(module: Any, name: str, other: Callable[[], object]) -> None:
        """Run `other` when the function is next called, and then the function."""
        real, done = getattr(module, name), list[bool]()

        def staged(*args: Any, **options: Any) -> Any:
            if not done:
                done.append(True)
                other()
            return real(*args, **options)

        monkeypatch.setattr(module, name, staged)

    return stage


def rows(uri: str, model: str | None = None) -> int:
    return int(open_results(uri, model).count_rows())


@pytest.mark.parametrize("other_ends", ["well", "killed", "extended again"])
def test_the_loser_of_two_extensions_does_what_the_winner_had_not_seen(
    job: JobSpec, bring: Callable[..., None], before: Callable[..., None], tmp_path: Path, other_ends: str
) -> None:
    uri, late = job.output.uri, tmp_path / "in"

    def other() -> None:
        """Extend by shard 2 alone, as if 3 and 4 had come after the other command had listed the input."""
        for number in (3, 4):
            (late / f"00{number}.tar").rename(tmp_path / f"{number}")
        run(job, "local", extend=True)
        if other_ends == "killed":
            for path in [*Path(uri).glob("*-1*"), *Path(uri).glob("model=tiny/part-000002-*")]:
                if path.name != "_plan-1.parquet":
                    path.unlink()
        for number in (3, 4):
            (tmp_path / f"{number}").rename(late / f"00{number}.tar")
        if other_ends == "extended again":
            bring(5)
            run(job, "local", extend=True)

    bring(2, 3, 4)
    before(extension, "store_later", other)
    summary = run(job, "local", extend=True)
    shards = 6 if other_ends == "extended again" else 5
    assert verify(uri) == [] and rows(uri) == shards * PER_SHARD - 2
    assert (summary.rows_in, summary.generation) == (shards * PER_SHARD, 2)
    assert run(job, "local", extend=True).added == 0


def test_an_extension_that_finds_a_retry_says_so_and_works_afterwards(
    job: JobSpec, bring: Callable[..., None], before: Callable[..., None]
) -> None:
    bring(2)
    before(extension, "store_later", lambda: retry(job.output.uri, runner="local"))
    with pytest.raises(RunMismatch, match="a retry has just started") as refused:
        run(job, "local", extend=True)
    assert "run the same command again" in refused.value.hint
    assert run(job, "local", extend=True).generation == 2 and verify(job.output.uri) == []


@pytest.mark.parametrize("moment", ["start_retry", "end_generation"])
def test_a_retry_that_another_overtakes_ends_as_that_one(
    job: JobSpec, bring: Callable[..., None], before: Callable[..., None], moment: str
) -> None:
    uri = job.output.uri

    def other() -> None:
        retry(uri, runner="local")
        bring(2, 3)
        run(job, "local", extend=True)

    before(retry_module, moment, other)
    summary = retry(uri, runner="local")
    assert (summary.tried, summary.recovered) == (1, {"tiny": 0})
    assert verify(uri) == [] and rows(uri) == 4 * PER_SHARD - 2


def test_a_job_that_is_extended_while_it_ends_is_not_of_another_run(
    job: JobSpec, bring: Callable[..., None], before: Callable[..., None]
) -> None:
    uri = job.output.uri
    for name in ("_manifest.parquet", "_rejects.parquet", SUCCESS):
        (Path(uri) / name).unlink()

    def other() -> None:
        bring(2)
        run(job, "local", extend=True)

    before(driver, "finalize", other)
    assert run(job, "local").rows_in >= 2 * PER_SHARD
    assert verify(uri) == [] and rows(uri) == 3 * PER_SHARD - 2


def test_a_listing_that_missed_the_plan_of_its_newest_files_is_no_mixture(
    job: JobSpec, bring: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store lists names in order, a page at a time: a plan may be stored behind the page, and its files before it."""
    bring(2)
    run(job, "local", extend=True)
    real, listed = Output.files, list[object]()

    def without_plan(output: Output) -> Any:
        listed.append(output)
        files = real(output)
        return files if len(listed) > 1 else {name: files[name] for name in files if name != "_plan-1.parquet"}

    monkeypatch.setattr(Output, "files", without_plan)
    assert sorted(open_vectors(job.output.uri).parts) == [0, 1, 2]


def test_a_probe_that_another_overtakes_ends_well(
    job: JobSpec, bring: Callable[..., None], before: Callable[..., None], tmp_path: Path
) -> None:
    uri, labels = job.output.uri, tmp_path / "labels.csv"
    keys = open_results(uri).to_table(columns=["key", "label"]).to_pylist()
    labels.write_text("key,label\n" + "".join(f"{row['key']},{row['label'] % 2}\n" for row in keys))

    def other() -> None:
        bring(2)
        run(job, "local", extend=True)
        fit_probe(uri, str(labels))

    before(label_partition, "_label", other)
    fit_probe(uri, str(labels))
    assert fit_probe(uri, str(labels)).parts_left == 0
    assert verify(uri) == [] and rows(uri) == rows(uri, "tiny+probe") == 3 * PER_SHARD - 2


def test_an_index_whose_last_segment_another_build_removes_grows_from_the_newest(
    tmp_path: Path, before: Callable[..., None]
) -> None:
    uri = copy_of(small_run(), tmp_path / "out")
    late = sorted(Path(uri, "model=tiny").iterdir())[3:]

    def come(*paths: Path) -> None:
        for path in paths:
            (tmp_path / path.name).rename(path)

    for path in late:
        path.rename(tmp_path / path.name)
    index_vectors(open_vectors(uri))
    come(late[0])
    first = open_vectors(uri)

    def other() -> None:
        index_vectors(first)
        for path in late[1:]:
            come(path)
            index_vectors(open_vectors(uri))

    before(index_module, "_grow", other)
    index_vectors(first)
    index = open_index(open_vectors(uri))
    assert index and sorted(index.parts) == list(range(6))
