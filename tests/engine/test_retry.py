"""Retries turn repaired rejects into rows, keep the others open, and account for every image once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import img2parquet
from img2parquet.cli import main
from img2parquet.dataset.commit import SUCCESS, Output
from img2parquet.dataset.footer import read_footer
from img2parquet.dataset.part_file import _encode, _seal, is_intact
from img2parquet.dataset.sealed_json import seal
from img2parquet.engine.driver import run
from img2parquet.engine.retry import retry
from img2parquet.errors import InputError, JobError, JobFailed, RejectLimitExceeded, RunMismatch
from img2parquet.inference import steps
from img2parquet.job import JobSpec, parse_job
from img2parquet.results.reader import open_results, read_rejects, status
from img2parquet.results.verify import verify
from img2parquet.storage import Store, join
from tests.support.small_job import add_member, job_dict, jpeg, make_checkpoint, thin_png

ROWS, PER_PART = 20, 6
GONE, PAGE = (3, 7, 15), 12  # listed images that do not exist, and one that is not an image


def put(root: str, number: int, data: bytes | None = None) -> None:
    """Write a listed image over an earlier one, as other writers may; our own store never does."""
    uri = join(root, f"img/{number}.jpg")
    Store().delete(uri) if Store().exists(uri) else None
    Store().create(uri, jpeg(number) if data is None else data)


def put_input(root: str) -> None:
    for number in range(ROWS):
        if number not in GONE:
            put(root, number, b"<html>" if number == PAGE else None)
    lines = "".join(f"img/{number}.jpg,{number}\n" for number in range(ROWS))
    Store().create(join(root, "list.csv"), ("uri,n\n" + lines).encode())


def table_job(root: str, checkpoint: Path, **more: Any) -> JobSpec:
    document = job_dict("unused", checkpoint, join(root, "out"), **{"reject_limit": 1.0, **more})
    document["input"] = {"kind": "table", "uris": [join(root, "list.csv")], "keep": ["n:int64"]}
    document["output"]["rows_per_part"] = PER_PART
    document["resources"] = {"workers": 2, "batch_size": 2}
    return parse_job(document)


@pytest.fixture
def root(output_root: str) -> str:
    put_input(output_root)
    return output_root


@pytest.fixture
def disk(tmp_path: Path) -> str:
    put_input(str(tmp_path))
    return str(tmp_path)


def files(uri: str) -> dict[str, bytes]:
    output = Output.at(uri)
    return {name: output.store.read(entry.uri) for name, entry in output.files().items() if "_meter" not in name}


def parts(uri: str) -> dict[str, bytes]:
    return {name: data for name, data in files(uri).items() if name.startswith("model=")}


def numbers(uri: str, model: str | None = None) -> list[int]:
    return sorted(open_results(uri, model).to_table(columns=["n"])["n"].to_pylist())


def standing(uri: str) -> dict[int, str]:
    table = read_rejects(uri).to_pylist()
    return {int(row["key"].split("/")[-1].split(".")[0]): row["reason"] for row in table}


def check_sums(uri: str) -> None:
    """Check, from footers alone: for each part and model, rows in = rows of all generations + open rejects."""
    output = Output.at(uri)
    rows_in, rows, rejects = dict[Any, int](), dict[Any, int](), dict[Any, set[int]]()
    for name, entry in sorted(output.part_files().items(), key=lambda item: ("-retry" in item[0], item[0])):
        footer = read_footer(output.store, entry)
        of = (name.split("/")[0], footer.part_index)
        if footer.generation == 0:
            rows_in[of], rejects[of] = footer.rows_in, set()
        rejects[of] -= {reject["row"] for reject in footer.superseded}
        rejects[of] |= {reject["row"] for reject in footer.rejects}
        rows[of] = rows.get(of, 0) + footer.rows
    assert rows_in == {of: rows[of] + len(rejects[of]) for of in rows_in}


def test_repaired_images_become_rows_and_the_rest_stay_open(root: str, checkpoint: Path) -> None:
    job = table_job(root, checkpoint)
    uri = job.output.uri
    run(job, "local")
    before = files(uri)
    assert standing(uri) == {3: "not_found", 7: "not_found", 12: "not_an_image", 15: "not_found"}
    for number in (3, 7):
        put(root, number)
    put(root, PAGE)
    summary = img2parquet.retry(uri, ["not_found"], runner="local")
    assert (summary.generation, summary.tried, summary.recovered) == (1, 3, {"tiny": 2})
    assert (summary.rows_in, summary.rows_written) == (ROWS, {"tiny": 18})
    assert summary.rejected == {"not_an_image": 1, "not_found": 1}
    assert standing(uri) == {12: "not_an_image", 15: "not_found"}  # 12 has another reason
    assert numbers(uri) == sorted(set(range(ROWS)) - {12, 15})
    assert verify(uri) == []
    check_sums(uri)
    after = files(uri)
    assert {name: after[name] for name in before} == before  # earlier files are unchanged
    added = sorted(after.keys() - before.keys())
    assert [name for name in added if name[0] == "_"] == [
        "_SUCCESS-1", "_manifest-1.parquet", "_plan-1.parquet", "_rejects-1.parquet", "_run-1.json"
    ]  # fmt: skip
    assert [name[11:22] + name[-15:] for name in added if name[0] != "_"] == [
        f"part-00000{part}-retry1.parquet" for part in (0, 1, 2)
    ]
    superseded = read_rejects(uri, superseded=True).to_pylist()
    assert [row["key"] for row in superseded] == [f"img/{number}.jpg" for number in GONE]
    now = status(uri)
    assert (now.is_complete, now.generation, now.rejected, now.rows_written) == (True, 1, 2, {"tiny": 18})
    assert run(job, "local").rows_written == {"tiny": 18}  # the job itself has nothing to do, and reports the same


def test_a_retry_of_a_retry(disk: str, checkpoint: Path) -> None:
    job = table_job(disk, checkpoint)
    uri = job.output.uri
    run(job, "local")
    put(disk, 3)
    retry(uri, runner="local")
    assert standing(uri) == {7: "not_found", 12: "not_an_image", 15: "not_found"}
    put(disk, 7, b"")
    put(disk, PAGE)
    second = retry(uri, runner="local")
    assert (second.generation, second.tried, second.recovered) == (2, 3, {"tiny": 1})
    assert standing(uri) == {7: "empty", 15: "not_found"}  # now for another reason
    for number in (7, 15):
        put(disk, number)
    third = retry(uri, runner="local")
    assert (third.generation, third.rejected, third.rows_written) == (3, {}, {"tiny": ROWS})
    assert numbers(uri) == list(range(ROWS))
    assert verify(uri) == []
    check_sums(uri)
    whole = table_job(disk, checkpoint).model_copy(
        update={"output": job.output.model_copy(update={"uri": join(disk, "whole")})}
    )
    run(whole, "local")
    ours, theirs = (open_results(u).to_table().sort_by("n") for u in (uri, whole.output.uri))
    for column in ours.column_names:
        if column in ("embedding", "logits"):  # batches differ, so the last bits may too
            np.testing.assert_allclose(*(np.stack(t[column].to_numpy()) for t in (ours, theirs)), atol=1e-5)
        elif column != "labels":
            assert ours[column].to_pylist() == theirs[column].to_pylist()


def test_nothing_to_do_is_said_and_writes_nothing(
    disk: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = table_job(disk, checkpoint)
    run(job, "local")
    before = files(job.output.uri)
    assert main(["retry", job.output.uri, "--reason", "timed_out", "--runner", "local"]) == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said and f"rows in    {ROWS}" in said and "not_found 3" in said
    assert files(job.output.uri) == before
    for number in (*GONE, PAGE):
        put(disk, number)
    assert main(["retry", job.output.uri, "--runner", "local"]) == 0
    assert "4 images tried again, 4 rows to model=tiny" in capsys.readouterr().out
    assert retry(job.output.uri, runner="local").tried == 0
    assert main(["status", job.output.uri]) == 0
    said = capsys.readouterr().out
    assert "retried    1 times\n" in said and "rejected   0" in said
    assert main(["rejects", job.output.uri]) == 0
    assert capsys.readouterr().out == ""
    assert main(["rejects", job.output.uri, "--superseded"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_only_what_was_rejected_is_decoded_again(disk: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = table_job(disk, checkpoint)
    run(job, "local")
    put(disk, 7)
    seen: list[bytes] = []
    real = steps.decode
    monkeypatch.setattr(steps, "decode", lambda image, *rest: seen.append(bytes(image)) or real(image, *rest))
    retry(job.output.uri, runner="local")
    assert sorted(seen) == sorted([jpeg(7), b"<html>"])


def test_reasons_that_cannot_be_tried_again_and_unknown_ones(disk: str, checkpoint: Path) -> None:
    job = table_job(disk, checkpoint)
    run(job, "local")
    with pytest.raises(JobError, match="duplicate_key` cannot be retried"):
        retry(job.output.uri, ["duplicate_key"], "local")
    with pytest.raises(JobError, match="did you mean `not_found`"):
        retry(job.output.uri, ["notfound"], "local")


def test_a_key_that_its_part_has_by_now_is_not_written_twice(tmp_path: Path, checkpoint: Path) -> None:
    """The first of two rows with one key was rejected, so the second was kept."""
    put(str(tmp_path), 0)
    (tmp_path / "list.csv").write_text("uri,id,n\nimg/1.jpg,a,0\nimg/0.jpg,a,1\nimg/2.jpg,b,2\nimg/2.jpg,b,3\n")
    job = table_job(str(tmp_path), checkpoint)
    job = job.model_copy(update={"input": job.input.model_copy(update={"key": "id"})})  # type: ignore[attr-defined]
    run(job, "local")
    assert numbers(job.output.uri) == [1]
    for number in (1, 2):
        put(str(tmp_path), number)
    summary = retry(job.output.uri, runner="local")
    assert (summary.tried, summary.rejected) == (2, {"duplicate_key": 1, "not_found": 1})
    assert numbers(job.output.uri) == [1, 2]
    assert retry(job.output.uri, runner="local").tried == 0
    assert verify(job.output.uri) == []


def test_an_unfinished_job_cannot_be_retried(disk: str, checkpoint: Path) -> None:
    job = table_job(disk, checkpoint)
    with pytest.raises(InputError, match=r"no _run\.json"):
        retry(job.output.uri, runner="local")
    run(job, "local")
    folder = Path(job.output.uri)
    next((folder / "model=tiny").iterdir()).unlink()
    for name in (SUCCESS, "_manifest.parquet", "_rejects.parquet"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="1 part files are missing"):
        retry(job.output.uri, runner="local")


def test_another_identity_is_refused_before_anything_is_written(disk: str, checkpoint: Path, tmp_path: Path) -> None:
    weights = make_checkpoint(tmp_path / "model", seed=1)
    job = table_job(disk, weights)
    run(job, "local")
    before = files(job.output.uri)
    with pytest.raises(RunMismatch, match="top_k"):
        retry(job.output.uri, runner="local", overrides=["models.0.outputs.1.top_k=3"])
    make_checkpoint(weights, seed=2)
    with pytest.raises(RunMismatch, match="weights"):
        retry(job.output.uri, runner="local")
    assert files(job.output.uri) == before


def test_the_reject_limit_is_judged_over_all_generations(disk: str, checkpoint: Path) -> None:
    job = table_job(disk, checkpoint, reject_limit=0.1)
    uri = job.output.uri
    with pytest.raises(RejectLimitExceeded, match="4 of 20"):
        run(job, "local")
    put(disk, 3)
    with pytest.raises(RejectLimitExceeded, match="3 of 20"):
        retry(uri, runner="local")
    assert not status(uri).is_complete
    with pytest.raises(RunMismatch, match="retry 1 was started for every reason"):
        retry(uri, ["not_found"], "local")
    retry(uri, runner="local", overrides=["reject_limit=0.2"])
    put(disk, 7)
    put(disk, 15)
    retry(uri, runner="local")
    assert run(job, "local").rejected == {"not_an_image": 1}  # within the limit by now
    assert verify(uri) == []


def test_a_shard_that_changed_fails_its_part_and_no_other(tmp_path: Path, checkpoint: Path) -> None:
    for number in range(6):
        put(str(tmp_path), number, b"" if number in (1, 4) else None)
    document = job_dict("unused", checkpoint, str(tmp_path / "out"), reject_limit=1.0)
    document["input"] = {"kind": "folder", "uris": [f"{tmp_path}/img"]}
    document["output"]["rows_per_part"] = 3
    job = parse_job(document)
    run(job, "local")
    put(str(tmp_path), 1)  # a loose file is pinned: repaired in place, it is another file
    with pytest.raises(JobFailed, match=r"1 of 2 parts could not be done(.|\n)*1\.jpg"):
        retry(job.output.uri, runner="local")
    assert [name for name in parts(job.output.uri) if "000001" in name and "retry1" in name]
    put(str(tmp_path), 1, b"")
    assert verify(job.output.uri) != []


def test_only_the_model_that_rejected_a_row_gets_it(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled by its shortest edge, a thin image becomes too long; squashed to a square, it is an ordinary image."""
    square = make_checkpoint(tmp_path / "square", seed=5)
    geometry = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}
    (square / "preprocessor_config.json").write_text(json.dumps(geometry))
    for number in range(4):
        put(str(tmp_path), number, {1: thin_png(), 2: b""}.get(number))
    (tmp_path / "list.csv").write_text("uri,n\n" + "".join(f"img/{n}.jpg,{n}\n" for n in range(4)))
    job = table_job(str(tmp_path), checkpoint)
    second = parse_job(
        {
            **job_dict("x", square, "out"),
            "models": [{"model": str(square), "name": "sq", "outputs": [{"kind": "tokens"}]}],
        }
    )
    job = job.model_copy(update={"models": (*job.models, *second.models)})
    uri = job.output.uri
    assert run(job, "local").rows_written == {"sq": 3, "tiny": 2}
    put(str(tmp_path), 1)
    loaded: list[str] = []
    real = steps.ModelExecutor
    monkeypatch.setattr(
        steps, "ModelExecutor", lambda model, *rest: loaded.append(model.card.name) or real(model, *rest)
    )
    first = retry(uri, ["aspect_ratio"], "local")
    assert (first.rows_written, first.recovered) == ({"sq": 3, "tiny": 3}, {"sq": 0, "tiny": 1})
    assert loaded == ["tiny"]  # the other has nothing to do
    assert [name[:11] for name in parts(uri) if "retry1" in name] == ["model=tiny/"]
    assert first.rejected == {"empty": 1}
    put(str(tmp_path), 2, thin_png())
    second_try = retry(uri, runner="local")
    assert (second_try.rows_written, second_try.rejected) == ({"sq": 4, "tiny": 3}, {"aspect_ratio": 1})
    assert (numbers(uri, "sq"), numbers(uri, "tiny")) == ([0, 1, 2, 3], [0, 1, 3])
    assert verify(uri) == []
    check_sums(uri)


def test_models_with_different_rejects_in_one_part(tmp_path: Path, checkpoint: Path) -> None:
    """Both models are retried together; each file has the rows that its own model had rejected."""
    square = make_checkpoint(tmp_path / "square", seed=5)
    geometry = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}
    (square / "preprocessor_config.json").write_text(json.dumps(geometry))
    for number in range(6):
        put(str(tmp_path), number, {1: thin_png(), 2: b"", 4: thin_png()}.get(number))
    (tmp_path / "list.csv").write_text("uri,n\n" + "".join(f"img/{n}.jpg,{n}\n" for n in range(6)))
    job = table_job(str(tmp_path), checkpoint)
    other = {"model": str(square), "name": "sq", "outputs": [{"kind": "embedding"}]}
    models = parse_job({**job_dict("x", square, "out"), "models": [other]}).models
    job = job.model_copy(update={"models": (*job.models, *models)})
    run(job, "local")
    for number in (1, 2):
        put(str(tmp_path), number)
    summary = retry(job.output.uri, runner="local")
    assert (summary.tried, summary.recovered) == (3, {"sq": 1, "tiny": 2})
    assert summary.rejected == {"aspect_ratio": 1}
    assert numbers(job.output.uri, "sq") == list(range(6))
    assert numbers(job.output.uri, "tiny") == [0, 1, 2, 3, 5]
    assert verify(job.output.uri) == []
    check_sums(job.output.uri)


def test_masks_and_labels_of_tars_after_a_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tar members are pinned; here the decoder failed and no longer does. Sidecars come with the image."""
    import tarfile

    from img2parquet.schema import Rejection

    checkpoints = Path(__file__).parents[2] / "infra" / "demo" / "checkpoints"
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(5):
                add_member(tar, f"{number}.cls", b"%d" % number)
                add_member(tar, f"{number}.jpg", jpeg(10 * shard + number))
    document = job_dict(f"{tmp_path}/*.tar", checkpoints / "beit-textures", str(tmp_path / "out"), reject_limit=1.0)
    document["input"]["keep"] = ["cls"]
    document["models"] = [
        {"model": str(checkpoints / "beit-textures"), "name": "beit", "outputs": [{"kind": "segmentation"}]},
        {"model": str(checkpoints / "levit-photos"), "name": "levit", "outputs": [{"kind": "labels", "top_k": 3}]},
    ]
    job = parse_job(document)
    whole = parse_job({**document, "output": {"uri": str(tmp_path / "whole")}})
    run(whole, "local")
    bad, real = {jpeg(1), jpeg(4), jpeg(12)}, steps.decode
    monkeypatch.setattr(
        steps, "decode",
        lambda image, *rest: Rejection("corrupt_data", "it failed") if bytes(image) in bad else real(image, *rest),
    )  # fmt: skip
    assert run(job, "local").rejected == {"corrupt_data": 3}
    monkeypatch.undo()
    summary = retry(job.output.uri, ["corrupt_data"], "local")
    assert (summary.rejected, summary.rows_written) == ({}, {"beit": 10, "levit": 10})
    order = [("shard", "ascending"), ("key", "ascending")]
    for model, column in (("beit", "mask"), ("levit", "labels")):
        ours, theirs = (open_results(u, model).to_table().sort_by(order) for u in (job.output.uri, whole.output.uri))
        assert ours["cls"].to_pylist() == theirs["cls"].to_pylist() == [0, 1, 2, 3, 4] * 2
        if column == "mask":
            assert ours["width"].to_pylist() == theirs["width"].to_pylist()
            assert all(mask[:4] == b"\x89PNG" for mask in ours[column].to_pylist())
        else:
            ids = [[[label["id"] for label in row] for row in table[column].to_pylist()] for table in (ours, theirs)]
            assert ids[0] == ids[1]
    assert verify(job.output.uri) == []


# ---- tampering with a retry, and mistakes --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retried(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("retried")
    put_input(str(folder))
    job = table_job(str(folder), checkpoint)
    run(job, "local")
    shutil.copytree(folder / "out", folder / "before")
    put(str(folder), 3)
    retry(job.output.uri, ["not_found"], "local")
    put(str(folder), PAGE)
    retry(job.output.uri, runner="local")
    return folder


def retry_part(out: Path) -> Path:
    return next((out / "model=tiny").glob("part-000000-*-retry1.parquet"))


def write_again(path: Path, table: pa.Table | None = None, **said: str) -> None:
    """Write a validly sealed file with other rows or other footer metadata."""
    old = {k.decode(): v.decode() for k, v in pq.read_metadata(path).metadata.items()}
    kept = {k: v for k, v in old.items() if k not in ("ARROW:schema", "img2parquet.zz_file")}
    data = _seal(
        _encode(table or pq.ParquetFile(path).read(), {**kept, **{f"img2parquet.{k}": v for k, v in said.items()}})
    )
    assert is_intact(data)
    path.write_bytes(data)


def delete_a_retry_part(out: Path, before: Path) -> None:
    retry_part(out).unlink()


def copy_a_retry_part(out: Path, before: Path) -> None:
    shutil.copy(retry_part(out), str(retry_part(out)).replace("retry1", "retry3"))


def double_rows(out: Path, before: Path) -> None:
    base = next((out / "model=tiny").glob("part-000000-*[0-9a-f].parquet"))
    write_again(retry_part(out), pq.ParquetFile(base).read().slice(0, 1))


def supersede_nothing(out: Path, before: Path) -> None:
    old = pq.read_metadata(retry_part(out)).metadata[b"img2parquet.rejects"].decode()
    write_again(retry_part(out), superseded=old)


def say_another_generation(out: Path, before: Path) -> None:
    write_again(retry_part(out), generation="2")


def flip_a_byte(name: str) -> Callable[[Path, Path], None]:
    def tamper(out: Path, before: Path) -> None:
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 0x20
        (out / name).write_bytes(bytes(data))

    tamper.__name__ = f"flip a byte of {name}"
    return tamper


def remove(name: str) -> Callable[[Path, Path], None]:
    def tamper(out: Path, before: Path) -> None:
        (out / name).unlink()

    tamper.__name__ = f"remove {name}"
    return tamper


def take_older_rejects(out: Path, before: Path) -> None:
    shutil.copy(out / "_rejects.parquet", out / "_rejects-2.parquet")


def change_totals(out: Path, before: Path) -> None:
    values = json.loads((out / "_SUCCESS-2").read_bytes())
    values.pop("sha256")
    (out / "_SUCCESS-2").write_bytes(seal({**values, "rows_written": {"tiny": 20}}))


def take_the_parent_of_another(out: Path, before: Path) -> None:
    shutil.copy(out / "_manifest-1.parquet", out / "_manifest.parquet")


RECORDS_1 = ("_plan-1.parquet", "_run-1.json", "_manifest-1.parquet", "_rejects-1.parquet", "_SUCCESS-1")
LAST = ("_plan-2.parquet", "_run-2.json", "_manifest-2.parquet", "_rejects-2.parquet", "_SUCCESS-2")
TAMPERINGS = [
    delete_a_retry_part, copy_a_retry_part, double_rows, supersede_nothing, say_another_generation, take_older_rejects,
    change_totals, take_the_parent_of_another,
    *map(flip_a_byte, (*RECORDS_1, *LAST)), *map(remove, (*RECORDS_1, *LAST)),
]  # fmt: skip


def test_an_untouched_retry_is_fine(retried: Path) -> None:
    assert verify(str(retried / "out")) == []
    check_sums(str(retried / "out"))


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda f: f.__name__)
def test_tampering_is_found(retried: Path, tmp_path: Path, tamper: Callable[[Path, Path], None]) -> None:
    out = Path(shutil.copytree(retried / "out", tmp_path / "out"))
    tamper(out, retried / "before")
    assert verify(str(out))


# ---- runners, kills, concurrency -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_runners_write_the_same_files(disk: str, checkpoint: Path, ray_cluster: str) -> None:
    job = table_job(disk, checkpoint)
    run(job, "local")
    for number in (3, 7, PAGE):
        put(disk, number)
    written = {}
    for runner, workers in (("local", 1), ("local", 2), ("ray", 1), ("ray", 2)):
        uri = join(disk, f"{runner}{workers}")
        shutil.copytree(job.output.uri, uri)
        summary = retry(uri, runner=runner, overrides=[f"resources.workers={workers}"])
        assert (summary.tried, summary.rejected) == (4, {"not_found": 1})
        assert verify(uri) == []
        written[runner, workers] = parts(uri)
    first = written["local", 1]
    assert sum("retry1" in name for name in first) == 3
    for other in written.values():
        assert other == first


def start(uri: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "img2parquet.cli", "retry", uri, "--runner", "local"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_two_retries_at_once_write_each_row_once(root: str, checkpoint: Path) -> None:
    job = table_job(root, checkpoint)
    run(job, "local")
    for number in GONE:
        put(root, number)
    both = [start(job.output.uri) for _ in range(2)]
    for process in both:
        said = process.communicate(timeout=240)[1].decode()
        assert process.returncode == 0, said
    assert numbers(job.output.uri) == sorted(set(range(ROWS)) - {PAGE})
    assert verify(job.output.uri) == []
    check_sums(job.output.uri)


@pytest.mark.slow
def test_a_retry_that_is_killed_at_any_step_goes_on_with_the_same_command() -> None:
    """Every third step, on a disk and on S3; `make chaos` does all. In a process of its own, since only a
    single-threaded one may fork."""
    command = [sys.executable, "-m", "tests.harness.chaos.on_retry", "--each", "4", "--every", "3"]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " 0 failures" in ran.stdout.splitlines()[-1]
