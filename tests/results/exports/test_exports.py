"""What every format must do: whole or not there, nothing overwritten, one clear error, unfinished outputs said so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import img2parquet
from img2parquet.cli import main
from img2parquet.errors import AlreadyExists, InputError, MissingDependency, StorageError, UserError
from img2parquet.results.exports import EXPORTS, ExportOptions
from img2parquet.results.exports.destination import MARK
from tests.results.exports.conftest import HOSTILE, PARTS

MODELS = {"coco": "masks", "coco-panoptic": "masks", "npy": "vectors", "lance": "vectors"}
IS_FOLDER = {to: getattr(import_module(m), c).shape == "folder" for to, (m, c) in EXPORTS.items()}


def exported(out: str, to: str, destination: object, **more: Any) -> Any:
    model = MODELS.get(to, "photos")
    columns = ("embedding",) if model == "vectors" else ()
    return img2parquet.export(out, to, str(destination), model=model, columns=columns, **more)


def tree(folder: Path) -> dict[str, bytes]:
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder.parent)): path.read_bytes() for path in files}


@pytest.mark.parametrize("to", EXPORTS)
def test_a_second_export_is_refused_and_forced_only_over_the_first(out: str, tmp_path: Path, to: str) -> None:
    done = exported(out, to, tmp_path / "x")
    assert (done.rows, done.parts, done.parts_planned) == (len(HOSTILE), PARTS, PARTS)
    before = tree(tmp_path / "x")
    with pytest.raises(AlreadyExists, match="--force"):
        exported(out, to, tmp_path / "x")
    assert tree(tmp_path / "x") == before
    exported(out, to, tmp_path / "x", force=True)
    if to != "lance":  # whose files are named at random
        assert tree(tmp_path / "x") == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]  # nothing temporary is left
    if IS_FOLDER[to]:
        (tmp_path / "x" / MARK).unlink()
        with pytest.raises(UserError, match="not an earlier export"):
            exported(out, to, tmp_path / "x", force=True)


@pytest.mark.parametrize("to", EXPORTS)
def test_names_of_files_are_never_keys(out: str, tmp_path: Path, to: str) -> None:
    exported(out, to, tmp_path / "x")
    names = {part for name in tree(tmp_path / "x") for part in name.split("/")}
    assert not names & {part for key in HOSTILE for part in key.split("/") if part}


@pytest.mark.parametrize("to", ["coco", "npy", "csv"])
def test_what_fails_half_way_leaves_nothing(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    from img2parquet.results.exports.rows import ExportRows

    whole = ExportRows.batches

    def broken(self: ExportRows, *args: Any, **more: Any) -> Any:
        for number, batch in enumerate(whole(self, *args, **more)):
            if number == 2:
                raise OSError(28, "No space left on device")
            yield batch

    monkeypatch.setattr(ExportRows, "batches", broken)
    with pytest.raises(StorageError, match="No space left"):
        exported(out, to, tmp_path / "deep" / "x")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_kill_half_way_leaves_no_destination(out: str, tmp_path: Path) -> None:
    code = (
        "import os, img2parquet; from img2parquet.results.exports.destination import Destination\n"
        "Destination.put = lambda *_: os.kill(os.getpid(), 9)\n"
        f"img2parquet.export({out!r}, 'csv', {str(tmp_path / 'x.csv')!r}, model='photos')"
    )
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert ran.returncode == -9
    assert not (tmp_path / "x.csv").exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert exported(out, "csv", tmp_path / "x.csv").rows == len(HOSTILE)


def test_somebody_who_is_faster_is_not_overwritten(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from img2parquet.results.exports.destination import Destination

    put = Destination.put

    def late(self: Destination, *args: Any) -> None:
        Path(self.uri).write_text("theirs")
        put(self, *args)

    monkeypatch.setattr(Destination, "put", late)
    with pytest.raises(AlreadyExists):
        exported(out, "csv", tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "theirs"


def test_an_unfinished_output_exports_what_is_committed_and_says_so(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    sorted((tmp_path / "out" / "model=photos").iterdir())[1].unlink()
    code = main(["export", str(tmp_path / "out"), "--to", "csv", str(tmp_path / "x.csv"), "--model", "photos"])
    said = capsys.readouterr()
    assert code == 0
    assert "exported   8 rows" in said.out
    assert "2 of 3 parts are committed" in said.err
    for path in (tmp_path / "out" / "model=photos").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="nothing is committed"):
        exported(str(tmp_path / "out"), "csv", tmp_path / "y.csv")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{out}", "--to", "cocoa", "{tmp}/x", "--model", "photos"], "did you mean `coco`"),
        (["{out}", "--to", "csv", "{tmp}/x"], "choose one with --model"),
        (["{out}", "--to", "csv", "{tmp}/x", "--model", "photo"], "did you mean `photos`"),
        (["{out}", "--to", "csv", "{tmp}/x", "--model", "photos", "--columns", "lable"], "did you mean `labels`"),
        (["{out}", "--to", "csv", "{out}/x.csv", "--model", "photos"], "inside or around the output"),
        (
            ["{out}", "--to", "npy", "{out}/..", "--model", "vectors", "--columns", "embedding"],
            "inside or around the output",
        ),
        (["{out}", "--to", "csv", "{tmp}/x/", "--model", "photos"], "one file, not a folder"),
        (["{out}", "--to", "csv", "{tmp}/x", "--model", "photos", "--images", "a"], "does not use --images"),
        (["{out}", "--to", "coco", "{tmp}/x", "--model", "masks", "--masks", "png"], "known: rle, polygons"),
        (["{tmp}", "--to", "csv", "{tmp}2/x"], "not an output of img2parquet"),
        (["{out}", "--to", "csv", "/proc/nope/x", "--model", "photos"], "/proc/nope"),
        (["{out}", "--to", "csv", "{tmp}", "--model", "photos", "--force"], "is a folder"),
    ],
)
def test_mistakes_end_in_one_message(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code = main(["export", *(a.replace("{out}", out).replace("{tmp}", str(tmp_path)) for a in arguments)])
    said = capsys.readouterr().err
    assert code in (1, 2) and words in said, said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_lance_without_its_package_names_the_extra(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(MissingDependency, match=r"pip install 'img2parquet\[lance\]'"):
        exported(out, "lance", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["csv", "npy", "datasets", "label-studio"])
def test_a_store_gets_the_same_bytes(out: str, tmp_path: Path, s3_bucket: str, s3_client: Any, to: str) -> None:
    from img2parquet.storage import Store

    exported(out, to, tmp_path / "x")
    exported(out, to, f"{s3_bucket}/deep/x")
    listed = {entry.uri: Store().read(entry.uri) for entry in Store().list_files(f"{s3_bucket}/deep")}
    assert listed == {f"{s3_bucket}/deep/{name}": data for name, data in tree(tmp_path / "x").items()}
    with pytest.raises(AlreadyExists):
        exported(out, to, f"{s3_bucket}/deep/x")
    exported(out, to, f"{s3_bucket}/deep/x", force=True)
    assert len(Store().list_files(f"{s3_bucket}/deep")) == len(listed)


def test_memory_does_not_grow_with_the_rows(made: Path, tmp_path: Path) -> None:
    """The same rows many times over: what Python and numpy hold at most stays what it was."""
    import pyarrow.parquet as pq

    from img2parquet.results.exports.destination import Workspace
    from img2parquet.results.exports.rows import ExportRows

    source = ExportRows.at(str(made / "out"), "photos", (), {})
    few = source.dataset.to_table().drop(["model"])
    peaks = []
    for times in (20, 400):
        path = tmp_path / f"{times}.parquet"
        pq.write_table(pa.concat_tables([few] * times), path, row_group_size=240)
        source.dataset = pa.dataset.dataset(path)
        tracemalloc.start()
        import_module("img2parquet.results.exports.jsonl").Jsonl(ExportOptions()).write(
            source, Workspace(tmp_path / f"{times}", path)
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert source.rows_read == 420 * len(HOSTILE)
    assert peaks[1] < 1.5 * peaks[0] + 200_000


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "a {shard}?b/ü"),
        ("/data/{key}.jpg", "/data/a {shard}?b/ü.jpg"),
        ("https://x/{shard}/{key}", "https://x/s%7Bkey%7D/a%20%7Bshard%7D%3Fb/%C3%BC"),
        ("s3://x/{shard}/{key}", "s3://x/s{key}/a {shard}?b/ü"),
    ],
)
def test_a_key_in_a_template_is_text(template: str | None, expected: str) -> None:
    assert ExportOptions(images=template).image_of("a {shard}?b/ü", "s{key}") == expected


def test_the_command_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    said = capsys.readouterr().out
    assert all(to in said for to in EXPORTS) and "examples:" in said


def test_a_folder_says_what_it_is(out: str, tmp_path: Path) -> None:
    exported(out, "npy", tmp_path / "x")
    assert json.loads((tmp_path / "x" / MARK).read_text()) == {"img2parquet": "export", "format": "npy"}
