"""Names of others are data: in rows and rejects to the letter, in no file's name, on no terminal as they are."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.cli import main
from img2parquet.cli.output import say
from img2parquet.dataset.listing import parse_name
from img2parquet.engine.driver import run
from img2parquet.errors import JobError, printable
from img2parquet.job import parse_job
from img2parquet.read import PartLimits
from img2parquet.read.webdataset import WebDataset
from img2parquet.results.reader import open_results, read_rejects
from img2parquet.schema import Part
from tests.support.small_job import job_dict, jpeg

KEYS = [
    "a\nb", "a\r\nerror: all is lost", "a\0b", "\x1b[2J\x1b]0;owned\x07", "\x9b31m", "\u202egnp.exe", "\u2066x\u2069",
    "<script>alert(1)</script>", "'; DROP TABLE images; --", '"},{"key": "x', "../../../etc/passwd", "/etc/passwd",
    "C:\\Windows\\x", "model=other/part-000000-0000000000000000", "_SUCCESS", "$(rm -rf ~)", "`id`", "%s%n", "{0}", "~",
    ".", "..", " ", "\t", "k" * 1_000_000, "\u00e9", "e\u0301", "\U0001f600", "\ufeff", "\ud7ff",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each key once with an image and once, behind `bad:`, without."""
    folder = tmp_path_factory.mktemp("hostile")
    keys = KEYS + [f"bad:{key}" for key in KEYS]
    images = [b"<html>" if key.startswith("bad:") else jpeg(1) for key in keys]
    pq.write_table(pa.table({"id": keys, "image": images, "note": keys}), folder / "a.parquet")
    document = job_dict("unused", checkpoint, str(folder / "out"), reject_limit=1.0)
    document["input"] = {"kind": "parquet", "uris": [f"{folder}/a.parquet"], "key": "id", "keep": ["note"]}
    run(parse_job(document), "local")
    return folder


def test_keys_are_data_to_the_letter(results: Path) -> None:
    rows = open_results(str(results / "out")).to_table(columns=["key", "note"]).to_pylist()
    assert [row["key"] for row in rows] == KEYS == [row["note"] for row in rows]
    assert read_rejects(str(results / "out")).column("key").to_pylist() == [f"bad:{key}" for key in KEYS]


def test_no_file_is_named_after_a_key(results: Path) -> None:
    names = {str(path.relative_to(results / "out")) for path in (results / "out").rglob("*") if path.is_file()}
    for name in names:
        assert parse_name(name) or name.startswith(("_run", "_plan", "_manifest", "_rejects", "_SUCCESS", "_meter-"))


def test_rejects_are_one_line_of_plain_ascii_json_each(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rejects", str(results / "out")]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert [json.loads(line)["key"] for line in lines[:-1]] == [f"bad:{key}" for key in KEYS]
    assert all(line.isascii() and line.isprintable() for line in lines)


def test_problems_are_one_line_each(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is there twice is named by `verify`."""
    monkeypatch.setattr(
        "img2parquet.results.verify.verify", lambda output: [f"key `{key}` is there twice" for key in KEYS]
    )
    assert main(["verify", str(results / "out")]) == 1
    out = capsys.readouterr().out
    assert len(out.split("\n")) == len(KEYS) + 1
    assert all(line.isprintable() for line in out.split("\n"))


@pytest.mark.parametrize("key", KEYS, ids=lambda key: ascii(key)[:30])
def test_nothing_said_moves_the_cursor(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(f"error: `{key}`")
    said = capsys.readouterr().out
    assert all(letter.isprintable() for letter in said.replace("\n", ""))


def test_plain_words_of_any_alphabet_stay() -> None:
    for words in ("caf\u00e9 \u6f22\u5b57 \u0645\u0631\u062d\u0628\u0627", "a\nb", "`x`: 3 %, \U0001f600"):
        assert printable(words) == words
    assert printable("\x1b[31m\u202e\x9b") == "\\x1b[31m\\u202e\\x9b"


@pytest.mark.parametrize("name", ["../x", "a/b", "a\nb", "\x1b[2J", "", "..", ".x", "a b", "a=b", "\u202ex", "_x"])
def test_a_partition_is_named_by_a_word(name: str, checkpoint: Path, tmp_path: Path) -> None:
    document: dict[str, Any] = job_dict("x.tar", checkpoint, str(tmp_path / "out"))
    document["models"][0]["name"] = name
    if name == "":
        assert parse_job(document).models[0].name == checkpoint.name
        return
    with pytest.raises(JobError, match="use only letters, digits"):
        parse_job(document)


LINKS = {"sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE}
KINDS = {**LINKS, "pipe": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE, "file": tarfile.REGTYPE}
NAMES = [
    "/tmp/escaped.jpg",
    "../../escaped.jpg",
    "a/../../escaped.jpg",
    "~/escaped.jpg",
    "\\\\host\\escaped.jpg",
    "./e.jpg",
]


def test_a_member_is_never_written_anywhere(tmp_path: Path) -> None:
    """Whatever its name, kind and target: reading opens the shard and nothing else, and makes no file or link."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name in NAMES:
            for kind, type_ in KINDS.items():
                info = tarfile.TarInfo(f"{name.removesuffix('.jpg')}-{kind}.jpg")
                info.type, info.linkname, info.mode = type_, "/etc/passwd", 0o6777
                info.size = len(jpeg(1)) if kind == "file" else 0
                tar.addfile(info, io.BytesIO(jpeg(1)) if kind == "file" else None)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(sink.getvalue())
    source = WebDataset(uris=(f"{tmp_path}/in/a.tar",))
    touched: list[str] = []
    listening = [True]  # a hook stays for ever

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if listening[0] and event.startswith(("open", "os.mkdir", "os.link", "os.symlink", "os.rename", "os.chmod")):
            touched.append(str(arguments[0]))

    sys.addaudithook(audit)
    try:
        items = [item for i, pieces in enumerate(source.plan(PartLimits())) for item in source.read(Part(i, pieces))]
    finally:
        listening[0] = False
    assert {path for path in touched if not path.endswith((".py", ".pyc"))} == {f"{tmp_path}/in/a.tar"}
    keys = {item.key for item in items}
    assert len(items) == len(NAMES) * 3  # files, and both kinds of links, which are rejects; the others are no images
    assert {f"{name.removesuffix('.jpg')}-file" for name in NAMES} <= keys
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert not Path("/tmp/escaped-file.jpg").exists()
