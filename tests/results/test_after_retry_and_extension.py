"""What retries and extensions added is indexed, found, grouped, judged and labelled with the rest."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import img2parquet
from img2parquet.cli import main
from img2parquet.engine.driver import run
from img2parquet.errors import InputError
from img2parquet.results.embeddings import open_vectors, part_index
from img2parquet.results.evaluation.evaluate import evaluate
from img2parquet.results.probe.linear_probe import fit_probe
from img2parquet.results.reader import open_results
from img2parquet.results.search.duplicates import group_duplicates
from img2parquet.results.search.html_page import pictures_of
from img2parquet.results.search.index import build_index, index_vectors, open_index
from img2parquet.results.search.search import search_vectors
from img2parquet.results.verify import verify
from img2parquet.storage import join
from tests.engine.test_retry import put, put_input, table_job
from tests.support.small_job import jpeg, make_checkpoint


@pytest.fixture(scope="module")
def retried(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A table of 20 images, indexed when four were rejected; then two of them came back. The output, and a late key."""
    root = str(tmp_path_factory.mktemp("retried"))
    put_input(root)
    job = table_job(root, make_checkpoint(Path(root) / "tiny"))
    run(job, "local")
    assert build_index(job.output.uri).rows == 16
    for number in (3, 7):
        put(root, number, jpeg(5))  # the image that row 5 has
    assert img2parquet.retry(job.output.uri, runner="local").recovered == {"tiny": 2}
    table = open_results(job.output.uri).to_table(columns=["key", "n"]).to_pylist()
    return job.output.uri, next(row["key"] for row in table if row["n"] == 7)


def test_the_index_gets_the_new_files_and_finds_their_rows(retried: tuple[str, str]) -> None:
    uri, key = retried
    vectors = open_vectors(uri)
    place, query_D = vectors.vector(key)
    early = search_vectors(vectors, query_D, 4)
    assert early.how == "index" and len(early.not_indexed) == 3 and vectors.parts_left == 0
    assert {part_index(number) for number in early.not_indexed} == {0, 1, 2}
    built = index_vectors(vectors)
    assert (built.rows, built.parts_added, built.generation) == (18, 3, 2)
    found = search_vectors(vectors, query_D, 4)
    assert found.hits == early.hits and not found.not_indexed
    assert [hit.score for hit in found.hits[:3]] == pytest.approx([1, 1, 1], abs=1e-6) and place
    index = open_index(vectors)
    assert index and index.rows == 18


def test_thumbnails_and_duplicates_of_retried_rows(retried: tuple[str, str], tmp_path: Path) -> None:
    uri, key = retried
    vectors = open_vectors(uri)
    hits = search_vectors(vectors, vectors.vector(key)[1], 3).hits
    assert len(pictures_of(vectors, hits)) == 3  # listed images, one of which the first run did not have
    found = group_duplicates(vectors, str(tmp_path / "dups.parquet"), 0.9999999)
    assert found.rows == 18 and found.largest >= 3


def parities(uri: str, to: Path) -> list[dict[str, object]]:
    """A CSV that says of each row whether its number is odd; the rows."""
    rows = sorted(open_results(uri).to_table(columns=["key", "n"]).to_pylist(), key=lambda row: row["n"])
    with to.open("w", newline="") as file:
        csv.writer(file).writerows([("key", "label"), *((row["key"], str(row["n"] % 2)) for row in rows)])
    return rows


def test_a_probe_labels_what_retries_won_too(
    retried: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, late = retried
    rows = parities(uri, tmp_path / "labels.csv")
    made = fit_probe(uri, str(tmp_path / "labels.csv"))
    assert (made.rows, made.parts_now, made.parts_left) == (18, 7, 0)
    assert (made.retry_files, made.retry_files_left) == (3, 0)
    labelled = open_results(uri, "tiny+probe").to_table(columns=["key", "n", "labels"]).to_pylist()
    assert sorted(row["key"] for row in labelled) == sorted(row["key"] for row in rows) and late
    assert verify(uri) == []
    assert main(["probe", uri, "--labels", str(tmp_path / "labels.csv")]) == 0  # nothing is left
    assert "18 rows to model=tiny+probe, 0 of 4 parts now" in (out := capsys.readouterr().out)
    assert "in 3 files" in out


def test_a_probe_goes_on_after_a_retry(tmp_path: Path) -> None:
    """The same command adds the files of the new generation; what is damaged or gone is found, and made again alike."""
    put_input(str(tmp_path))
    job = table_job(str(tmp_path), make_checkpoint(tmp_path / "tiny"))
    uri, labels = job.output.uri, str(tmp_path / "labels.csv")
    run(job, "local")
    parities(uri, tmp_path / "labels.csv")
    made = fit_probe(uri, labels)
    assert (made.rows, made.parts_now, made.retry_files) == (16, 4, 0) and verify(uri) == []
    before = {path.name: path.read_bytes() for path in Path(uri, "model=tiny+probe").iterdir()}
    put(str(tmp_path), 3, jpeg(5))
    assert img2parquet.retry(uri, runner="local").recovered == {"tiny": 1}
    again = fit_probe(uri, labels)
    assert (again.rows, again.parts_now, again.retry_files, again.report) == (17, 3, 3, made.report)
    assert verify(uri) == []
    after = {path.name: path.read_bytes() for path in Path(uri, "model=tiny+probe").iterdir()}
    assert {name: after[name] for name in before} == before
    name = min(after.keys() - before.keys())
    Path(uri, "model=tiny+probe", name).unlink()
    assert any(f"missing: model=tiny+probe/{name}" in problem for problem in verify(uri))
    assert fit_probe(uri, labels).parts_now == 1 and Path(uri, "model=tiny+probe", name).read_bytes() == after[name]
    assert verify(uri) == []


def test_evaluation_counts_retried_rows(retried: tuple[str, str]) -> None:
    uri, _ = retried
    with pytest.raises(InputError, match="class 5 is not among"):
        evaluate(uri, "n")  # the numbers of the images, of which the model has five classes
    assert main(["evaluate", uri, "--truth", "n"]) == 2


@pytest.mark.parametrize("when", ["before and after", "after"])
def test_a_probe_labels_what_extensions_and_retries_added(when: str, tmp_path: Path) -> None:
    """Generation by generation: the output is extended, then rejects of its first part are retried."""
    root, uri, labels = str(tmp_path), str(tmp_path / "out"), str(tmp_path / "labels.csv")
    put_input(root)
    job = table_job(root, make_checkpoint(tmp_path / "tiny"))
    run(job, "local")
    parities(uri, tmp_path / "labels.csv")
    if when != "after":
        assert fit_probe(uri, labels).rows == 16
    (tmp_path / "more.csv").write_text("uri,n\n" + "".join(f"img/{number}.jpg,{number}\n" for number in (20, 21)))
    for number in (20, 21):
        put(root, number)
    lists = (*job.input.uris, join(root, "more.csv"))
    longer = job.model_copy(update={"input": job.input.model_copy(update={"uris": lists})})
    assert run(longer, "local", extend=True).generation == 1
    put(root, 3, jpeg(5))
    assert img2parquet.retry(uri, runner="local").recovered == {"tiny": 1}
    made = fit_probe(uri, labels)
    assert (made.rows, made.parts_left, made.retry_files_left) == (19, 0, 0) and verify(uri) == []
    rows = open_results(uri, "tiny+probe").to_table(columns=["n"])["n"].to_pylist()
    assert {20, 21, 3} <= set(rows) and sorted(rows) == sorted(open_results(uri).to_table()["n"].to_pylist())
    assert fit_probe(uri, labels).parts_now == 0
