"""Whole jobs run from shards to committed rows, on disk and on S3, in one process and on Ray."""

from __future__ import annotations

import json
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import img2parquet
from img2parquet.dataset.commit import Output
from img2parquet.dataset.listing import parse_name
from img2parquet.engine.driver import Summary, run
from img2parquet.errors import InputError, JobFailed, RejectLimitExceeded, RunMismatch, StorageError
from img2parquet.images.preprocess import Preprocessor
from img2parquet.inference import steps
from img2parquet.results.reader import open_results, read_rejects, status
from img2parquet.results.verify import verify
from img2parquet.storage import Store
from tests.support.small_job import (
    BROKEN,
    GOOD,
    ROWS,
    SHARDS,
    add_member,
    job_dict,
    jpeg,
    make_checkpoint,
    make_shards,
    small_job,
    thin_png,
)


def parts(uri: str) -> dict[str, bytes]:
    """Read every part file of an output, by name."""
    output = Output.at(uri)
    return {name: output.store.read(entry.uri) for name, entry in output.part_files().items()}


def check(summary: Summary, uri: str) -> None:
    assert summary.rows_in == ROWS
    assert summary.rows_written == {"tiny": GOOD}
    assert summary.rejected == {"empty": 1, "not_an_image": 1, "truncated": 1}
    assert verify(uri) == []


def test_every_row_is_written_or_rejected(shards: str, checkpoint: Path, output_root: str) -> None:
    job = small_job(shards, checkpoint, output_root)
    check(run(job, "local"), output_root)
    table = open_results(output_root).to_table()
    assert table.num_rows == GOOD
    assert len(set(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True))) == GOOD
    vectors = np.stack(table["embedding"].to_numpy())
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert table["label"].to_pylist()[:7] == [0, 1, 2, 4, 0, 1, 2]  # row 3 is broken, and later labels do not shift
    assert table["caption"][3].as_py() == "no. 4"
    assert all(row[0]["score"] >= row[1]["score"] for row in table["labels"].to_pylist())
    rejects = read_rejects(output_root).to_pylist()
    assert sorted((r["part"], r["row"], r["reason"]) for r in rejects) == sorted(
        (shard, row, reason) for (shard, row), (reason, _) in BROKEN.items()
    )


def test_the_second_run_does_no_work(
    shards: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_job(shards, checkpoint, str(tmp_path / "out"))
    run(job, "local")
    before = parts(job.output.uri)
    monkeypatch.setattr(steps, "decode", lambda *_: pytest.fail("decoded an image again"))
    again = run(job, "local")
    assert again.parts_done_before == again.parts == SHARDS
    assert again.rows_in == ROWS
    assert parts(job.output.uri) == before


def test_each_image_is_decoded_once_however_many_models(
    shards: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = job_dict(shards, checkpoint, str(tmp_path / "out"))
    second = {"model": str(checkpoint), "name": "wide", "image_size": 64, "outputs": [{"kind": "tokens"}]}
    job = img2parquet.parse_job({**document, "models": [*document["models"], second]})
    seen: list[bytes] = []
    real = steps.decode
    monkeypatch.setattr(steps, "decode", lambda image, *rest: seen.append(bytes(image)) or real(image, *rest))
    summary = run(job, "local")
    assert summary.rows_written == {"tiny": GOOD, "wide": GOOD}
    assert len(seen) == ROWS
    assert sum(summary.rejected.values()) == len(BROKEN)  # an image that both models rejected counts once
    assert verify(job.output.uri) == []
    assert open_results(job.output.uri, "wide").to_table()["model"].to_pylist() == ["wide"] * GOOD


def test_models_of_one_geometry_share_their_crops(
    shards: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_checkpoint(tmp_path / "other", seed=3)
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.5] * 3}))
    document = job_dict(shards, checkpoint, str(tmp_path / "out"))
    second = {"model": str(other), "name": "other", "outputs": [{"kind": "embedding"}]}
    made: list[object] = []
    monkeypatch.setattr(steps, "Preprocessor", lambda settings: made.append(settings) or Preprocessor(settings))
    run(img2parquet.parse_job({**document, "models": [*document["models"], second]}), "local")
    assert len(made) == 1


@pytest.mark.slow
def test_ray_writes_the_same_files_as_one_process(
    shards: str, checkpoint: Path, tmp_path: Path, ray_cluster: str
) -> None:
    written = {}
    for runner, workers in (("local", 1), ("local", 2), ("ray", 1), ("ray", 2)):
        uri = str(tmp_path / f"{runner}{workers}")
        job = small_job(shards, checkpoint, uri, resources={"workers": workers, "batch_size": 8})
        check(run(job, runner), uri)
        written[runner, workers] = parts(uri)
    first = written["local", 1]
    assert len(first) == SHARDS
    for other in written.values():
        assert other == first


def test_models_whose_names_begin_alike_are_told_apart(shards: str, checkpoint: Path, tmp_path: Path) -> None:
    """`tiny-2/` sorts before `tiny/`, and `tiny` before `tiny-2`."""
    first = job_dict(shards, checkpoint, str(tmp_path / "out"))["models"][0]
    long_and_thin = {**first, "name": "tiny-2", "model": str(make_checkpoint(tmp_path / "other"))}
    (tmp_path / "other" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}'
    )
    with tarfile.open(tmp_path / "thin.tar", "w") as tar:
        add_member(tar, "good.jpg", jpeg(1))
        add_member(tar, "thin.png", thin_png())
    document = job_dict(f"{tmp_path}/thin.tar", checkpoint, str(tmp_path / "out"), reject_limit=1.0)
    summary = run(img2parquet.parse_job({**document, "models": [first, long_and_thin]}), "local")
    # a shortest edge of 64 makes the thin image too long; squashed to 64 x 64 it is an image like any other
    assert summary.rows_written == {"tiny": 1, "tiny-2": 2}
    assert summary.rejected == {"aspect_ratio": 1}
    assert verify(document["output"]["uri"]) == []


def upload(shards: str, bucket: str) -> str:
    folder = Path(shards).parent
    for path in folder.glob("*.tar"):
        Store().create(f"{bucket}/in/{path.name}", path.read_bytes())
    return f"{bucket}/in/{{000..005}}.tar"


@pytest.mark.slow
def test_from_s3_to_s3_with_both_runners(shards: str, checkpoint: Path, s3_bucket: str, ray_cluster: str) -> None:
    remote = upload(shards, s3_bucket)
    for runner in ("local", "ray"):
        uri = f"{s3_bucket}/{runner}"
        check(run(small_job(remote, checkpoint, uri), runner), uri)
        assert open_results(uri).to_table()["shard"][0].as_py() == f"{s3_bucket}/in/000.tar"
    assert parts(f"{s3_bucket}/local") == parts(f"{s3_bucket}/ray")


@pytest.mark.realstore
def test_from_and_to_a_real_store(shards: str, checkpoint: Path, realstore_bucket: str) -> None:
    uri = f"{realstore_bucket}/out"
    check(run(small_job(upload(shards, realstore_bucket), checkpoint, uri), "local"), uri)


@pytest.mark.slow
def test_a_stage_of_its_own_for_decoding_gives_the_same_files(
    shards: str, checkpoint: Path, tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Split decoding off as with GPUs, but without one: pixels cross the object store between two actor pools."""
    from img2parquet.runners import ray_data

    job = small_job(shards, checkpoint, str(tmp_path / "fused"))
    run(job, "local")
    monkeypatch.setattr(ray_data, "prepares_separately", lambda work: True)
    apart = small_job(shards, checkpoint, str(tmp_path / "apart"), resources={"workers": 1, "batch_size": 8})
    check(run(apart, "ray"), apart.output.uri)
    assert parts(apart.output.uri) == parts(job.output.uri)


def test_results_do_not_depend_on_the_order_of_the_shards(shards: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shards).parent
    listed = sorted(str(p) for p in folder.glob("*.tar"))
    one = small_job(shards, checkpoint, str(tmp_path / "a"))
    document = job_dict(shards, checkpoint, str(tmp_path / "b"))
    document["input"]["uris"] = listed[::-1]
    run(one, "local")
    run(img2parquet.parse_job(document), "local")
    assert parts(str(tmp_path / "a")) == parts(str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("models.0.outputs.1.top_k=1", "outputs"),
        ("dtype=bfloat16", "dtype"),
        ("decode.alpha=drop", "decode.alpha"),
        ("models.0.name=other", "models"),
    ],
)
def test_another_run_is_refused_naming_what_differs(
    shards: str, checkpoint: Path, tmp_path: Path, override: str, named: str
) -> None:
    document = job_dict(shards, checkpoint, str(tmp_path / "out"))
    run(img2parquet.parse_job(document), "local")
    before = parts(str(tmp_path / "out"))
    with pytest.raises(RunMismatch, match=named):
        run(img2parquet.parse_job(document, [override]), "local")
    assert parts(str(tmp_path / "out")) == before


def test_another_checkpoint_is_another_run(shards: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", seed=1)
    job = small_job(shards, folder, str(tmp_path / "out"))
    run(job, "local")
    make_checkpoint(folder, seed=2)
    with pytest.raises(RunMismatch, match="weights"):
        run(job, "local")


def test_a_folder_with_other_files_is_not_written_to(shards: str, checkpoint: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "model=tiny" / "data.parquet"
    foreign.parent.mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), foreign)
    with pytest.raises(RunMismatch, match="no _plan"):
        run(small_job(shards, checkpoint, str(tmp_path / "out")), "local")
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["data.parquet"]


def test_too_many_rejects_fail_the_job_after_committing(shards: str, checkpoint: Path, tmp_path: Path) -> None:
    document = job_dict(shards, checkpoint, str(tmp_path / "out"), reject_limit=0.01)
    with pytest.raises(RejectLimitExceeded, match=f"3 of {ROWS} images"):
        run(img2parquet.parse_job(document), "local")
    assert len(parts(str(tmp_path / "out"))) == SHARDS
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    accepted = run(img2parquet.parse_job(document, ["reject_limit=0.5"]), "local")
    assert accepted.parts_done_before == SHARDS
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["rows_in"] == ROWS


def test_an_input_that_changed_fails_its_part_and_no_other(checkpoint: Path, tmp_path: Path) -> None:
    paths = make_shards(tmp_path / "in", broken=False)
    job = small_job(f"{tmp_path}/in/*.tar", checkpoint, str(tmp_path / "out"))
    run(job, "local")
    done = sorted((tmp_path / "out" / "model=tiny").iterdir())
    done[2].unlink()
    for name in ("_SUCCESS", "_manifest.parquet", "_rejects.parquet"):
        (tmp_path / "out" / name).unlink()
    paths[2].write_bytes(paths[3].read_bytes() + b"\0" * 512)
    with pytest.raises(JobFailed, match="1 of 6 parts could not be done") as caught:
        run(job, "local")
    assert paths[2].name in str(caught.value)
    assert not done[2].exists()


def test_status_and_results_while_a_job_is_under_way(shards: str, checkpoint: Path, tmp_path: Path) -> None:
    job = small_job(shards, checkpoint, str(tmp_path / "out"))
    seen: list[tuple[int, int]] = []

    def look(tally: object) -> None:
        now = status(job.output.uri)
        seen.append((now.parts_done["tiny"], now.rows_written["tiny"]))
        if now.parts_done["tiny"]:
            assert open_results(job.output.uri).count_rows() >= now.rows_written["tiny"]

    run(job, "local", on_change=look)  # type: ignore[arg-type]
    assert seen == sorted(seen)
    assert len({parts_done for parts_done, _ in seen}) > 2
    last = status(job.output.uri)
    assert last.is_complete
    assert (last.rows_in, last.rejected) == (ROWS, len(BROKEN))


def test_changes_are_told_by_one_thread_at_a_time(shards: str, checkpoint: Path, tmp_path: Path) -> None:
    """Check `on_change` while several threads commit parts."""
    inside, overlapped, tellers = threading.Lock(), list[object](), set[int]()

    def look(tally: object) -> None:
        tellers.add(threading.get_ident())
        if not inside.acquire(blocking=False):
            overlapped.append(tally)
            return
        time.sleep(0.02)
        inside.release()

    run(small_job(shards, checkpoint, str(tmp_path / "out")), "local", on_change=look)  # type: ignore[arg-type]
    assert len(tellers) > 1 and not overlapped


def test_empty_and_missing_inputs(checkpoint: Path, tmp_path: Path) -> None:
    for uri in (f"{tmp_path}/none/*.tar", f"{tmp_path}/none.tar", "s3://no-such-bucket-here/x.tar"):
        with pytest.raises((InputError, StorageError)):
            run(small_job(uri, checkpoint, str(tmp_path / "out")), "local")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("members", [{}, {"README": b"x", ".x.jpg": b"x"}])
def test_an_input_without_rows_and_rejects_is_an_error(
    members: dict[str, bytes], checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        for name, data in members.items():
            add_member(tar, name, data)
    job = small_job(f"{tmp_path}/none.tar", checkpoint, str(tmp_path / "out"))
    for _ in range(2):
        with pytest.raises(InputError, match="neither rows nor rejects"):
            run(job, "local")
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert ("none.tar: skipped members that are not images: " in caplog.text) == bool(members)


def test_rows_of_a_part_without_good_images(checkpoint: Path, tmp_path: Path) -> None:
    """A part without rows is a file with the full schema and no rows."""
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add_member(tar, "a.jpg", b"no image")
    job = small_job(f"{tmp_path}/bad.tar", checkpoint, str(tmp_path / "out"), reject_limit=1.0)
    summary = run(job, "local")
    assert (summary.rows_in, summary.rows_written) == (1, {"tiny": 0})
    table = open_results(job.output.uri).to_table()
    assert table.num_rows == 0
    assert "embedding" in table.column_names
    assert verify(job.output.uri) == []


def test_part_names_are_content_not_rank(shards: str, checkpoint: Path, tmp_path: Path) -> None:
    run(small_job(shards, checkpoint, str(tmp_path / "out")), "local")
    names = sorted(Output(Store(), str(tmp_path / "out")).part_files())
    parsed = [parse_name(name) for name in names]
    assert [p[1] for p in parsed if p] == list(range(SHARDS))
    assert len({p[2] for p in parsed if p}) == SHARDS
