"""Outputs of an older version are read, verified, resumed and extended unchanged. See make_older_output.py."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from img2parquet.cli import main
from img2parquet.dataset.commit import Output
from img2parquet.engine.driver import run
from img2parquet.engine.retry import retry
from img2parquet.job import JobSpec, parse_job
from img2parquet.results.reader import open_results, read_rejects, status
from img2parquet.results.verify import verify
from tests.support.small_job import jpeg

ARCHIVE = Path(__file__).parents[1] / "golden" / "older_output.zip"
BUCKET = "older-output"
SHARDS, LISTS = f"s3://{BUCKET}/shards", f"s3://{BUCKET}/lists"
WRITTEN_AT_END = ("_rejects.parquet", "_manifest.parquet", "_SUCCESS")

Make = Callable[..., JobSpec]


@pytest.fixture
def bucket(s3_endpoint: str, s3_client: Any) -> dict[str, bytes]:
    """Upload what the older version wrote and read; return it by key."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        stored = {
            name.removeprefix("bucket/"): archive.read(name)
            for name in archive.namelist()
            if name.startswith("bucket/")
        }
    s3_client.create_bucket(Bucket=BUCKET)
    for entry in s3_client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        s3_client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    for key, data in stored.items():
        s3_client.put_object(Bucket=BUCKET, Key=key, Body=data)
    return stored


@pytest.fixture
def make_job(tmp_path: Path) -> Make:
    """Read a stored job file, with the checkpoint where it is unpacked now."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if not name.startswith("bucket/")])

    def make(name: str) -> JobSpec:
        document = yaml.safe_load((tmp_path / "jobs" / f"{name}.yaml").read_text())
        document["models"][0]["model"] = str(tmp_path / "tiny")
        return parse_job(document)

    return make


def files(uri: str) -> dict[str, bytes]:
    """Everything in an output but the meters, by name."""
    output = Output.at(uri)
    return {name: output.store.read(entry.uri) for name, entry in output.files().items() if "_meter-" not in name}


def stored_files(bucket: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {
        key.removeprefix(f"{name}/"): data
        for key, data in bucket.items()
        if key.startswith(f"{name}/") and "_meter-" not in key
    }


def totals(success: bytes) -> dict[str, Any]:
    return {name: value for name, value in json.loads(success).items() if name not in ("files", "sha256")}


def test_a_finished_output_is_read_and_verified(bucket: dict[str, bytes]) -> None:
    table = open_results(SHARDS).to_table()
    assert table.num_rows == 22 and table["label"].to_pylist()[:4] == [0, 1, 2, 4]  # row 3 was rejected
    assert sorted((r["part"], r["row"], r["reason"]) for r in read_rejects(SHARDS).to_pylist()) == [
        (0, 3, "empty"),
        (2, 7, "not_an_image"),
    ]
    now = status(SHARDS)
    assert now.is_complete and now.parts_done == {"tiny": 3} and (now.rows_in, now.rejected) == (24, 2)
    assert verify(SHARDS) == []


def test_its_retry_and_its_extension_are_read_and_verified(bucket: dict[str, bytes]) -> None:
    assert sorted(open_results(LISTS).to_table()["n"].to_pylist()) == [0, 1, 2, 3, 5, 6, 7]
    assert [r["reason"] for r in read_rejects(LISTS).to_pylist()] == ["not_an_image"]
    assert [r["reason"] for r in read_rejects(LISTS, superseded=True).to_pylist()] == ["not_found"]
    now = status(LISTS)
    assert now.is_complete and (now.generation, now.rows_in, now.rows_written) == (2, 8, {"tiny": 7})
    assert verify(LISTS) == []


def test_its_rows_are_searched_reported_and_labelled(bucket: dict[str, bytes], tmp_path: Path) -> None:
    key = open_results(LISTS).to_table()["key"][0].as_py()
    assert main(["index", LISTS]) == 0
    assert main(["search", LISTS, "--key", key, "-k", "3"]) == 0
    assert main(["report", LISTS, "--to", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000
    rows = open_results(SHARDS).to_table(columns=["key", "label"]).to_pylist()
    labels = "".join(f"{row['key']},{'odd' if row['label'] % 2 else 'even'}\n" for row in rows)
    (tmp_path / "labels.csv").write_text("key,label\n" + labels)
    assert main(["probe", SHARDS, "--labels", str(tmp_path / "labels.csv")]) == 0
    assert open_results(SHARDS, "tiny+probe").to_table().num_rows == 22
    assert verify(SHARDS) == []


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_an_unfinished_job_is_resumed(bucket: dict[str, bytes], make_job: Make, s3_client: Any, lost: int) -> None:
    """The older version was stopped before it had committed one part; today's does that one, and finalizes the job."""
    old = stored_files(bucket, "shards")
    parts = sorted(name for name in old if name.startswith("model="))
    for name in (parts[lost], *WRITTEN_AT_END):
        s3_client.delete_object(Bucket=BUCKET, Key=f"shards/{name}")
    now = status(SHARDS)
    assert not now.is_complete and now.parts_done == {"tiny": 2}
    summary = run(make_job("shards"), "local")
    assert (summary.parts, summary.parts_done_before, summary.rows_in) == (3, 2, 24)
    assert (summary.rows_written, summary.rejected) == ({"tiny": 22}, {"empty": 1, "not_an_image": 1})
    new = files(SHARDS)
    assert new.keys() == old.keys()
    changed = {name for name in old if new[name] != old[name]}
    assert changed <= {"_manifest.parquet", "_SUCCESS", parts[lost]}  # the manifest has our meter, _SUCCESS its digest
    assert parts[lost] not in changed or not same_libraries(old["_run.json"])
    table, expected = (pq.read_table(pa.BufferReader(data[parts[lost]])) for data in (new, old))
    assert table.equals(expected)
    manifest, expected = (pq.read_table(pa.BufferReader(data["_manifest.parquet"])) for data in (new, old))
    assert parts[lost] in changed or manifest.equals(expected)
    assert totals(new["_SUCCESS"]) == totals(old["_SUCCESS"])
    assert verify(SHARDS) == []
    again = run(make_job("shards"), "local")
    assert again.parts_done_before == again.parts == 3 and files(SHARDS) == new  # there was nothing left to do


def same_libraries(record: bytes) -> bool:
    """Whether Parquet files are encoded by the library that the older version used."""
    versions = json.loads(record)["versions"]
    return bool(versions["pyarrow"] == pa.__version__ and versions["torch"] == torch.__version__)


@pytest.mark.parametrize("name", ["shards", "lists"])
def test_nothing_is_left_to_do_in_a_finished_output(bucket: dict[str, bytes], make_job: Make, name: str) -> None:
    job, uri = make_job(name), f"s3://{BUCKET}/{name}"
    summary = run(job, "local", extend=True)
    assert summary.parts == summary.parts_done_before and summary.added == 0
    assert summary.generation == (2 if name == "lists" else 0)
    assert files(uri) == stored_files(bucket, name)


def test_lost_files_of_every_generation_come_back(bucket: dict[str, bytes], make_job: Make, s3_client: Any) -> None:
    """An extension that the older version had planned, and a part of its job, are done again to the same bytes."""
    old = stored_files(bucket, "lists")
    parts = sorted(name for name in old if name.startswith("model=") and "-retry" not in name)
    records = ("_rejects-2.parquet", "_manifest-2.parquet", "_SUCCESS-2")
    for name in (parts[0], parts[2], *records):
        s3_client.delete_object(Bucket=BUCKET, Key=f"lists/{name}")
    assert verify(LISTS) != []
    s3_client.delete_object(Bucket=BUCKET, Key="in/img/2.jpg")  # as it was when the job ran: the retry came later
    summary = run(make_job("lists"), "local", extend=True)
    assert (summary.generation, summary.rows_in, summary.rows_written) == (2, 8, {"tiny": 7})
    new = files(LISTS)
    assert new.keys() == old.keys()
    for name in (parts[0], parts[2]):
        tables = (pq.read_table(pa.BufferReader(data[name])) for data in (new, old))
        assert next(tables).equals(next(tables))
        assert new[name] == old[name] or not same_libraries(old["_run.json"])
    untouched = old.keys() - {parts[0], parts[2], *records[1:]}
    assert {name: new[name] for name in untouched} == {name: old[name] for name in untouched}
    assert totals(new["_SUCCESS-2"]) == totals(old["_SUCCESS-2"])
    assert verify(LISTS) == []


def test_its_rejects_are_retried_in_a_new_generation(
    bucket: dict[str, bytes], make_job: Make, s3_client: Any, tmp_path: Path
) -> None:
    s3_client.put_object(Bucket=BUCKET, Key="in/img/4.jpg", Body=jpeg(4))
    make_job("lists")  # unpacks the checkpoint
    place = f"models[0].model={json.dumps(str(tmp_path / 'tiny'))}"
    summary = retry(LISTS, runner="local", overrides=[place])
    assert (summary.generation, summary.recovered, summary.rejected) == (3, {"tiny": 1}, {})
    old, new = stored_files(bucket, "lists"), files(LISTS)
    assert {name: new[name] for name in old} == old
    assert sorted(open_results(LISTS).to_table()["n"].to_pylist()) == list(range(8))
    assert verify(LISTS) == []
