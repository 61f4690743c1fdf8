"""Outputs that are damaged, empty, unfinished or not ours: each command that asks one says what is wrong, in a line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2parquet.cli import main
from img2parquet.dataset.commit import Output
from img2parquet.dataset.generations import encode_extension, encode_retry, of_generation, read_history
from img2parquet.dataset.plan import Plan
from img2parquet.dataset.rejects import to_table
from img2parquet.errors import RunMismatch, StorageError
from img2parquet.schema import Part, Piece, Reject
from tests.support.finished_outputs import small_run

FIRST, LATER, PLAN, RUN = "model=tiny/part-000000-*", "model=tiny/part-000003-*", "_plan.parquet", "_run.json"


def asked(uri: Path, to: Path) -> list[list[str]]:
    """Every command that reads an output, each with a destination of its own."""
    return [
        ["export", str(uri), "--to", "csv", str(to / "rows.csv")],
        ["export", str(uri), "--to", "label-studio", str(to / "tasks")],
        ["evaluate", str(uri), "--truth", "label"],
        ["index", str(uri), "--to", str(to / "index")],
        ["duplicates", str(uri), "--to", str(to / "dups.parquet")],
        ["search", str(uri), "--key", "000/0001", "--html", str(to / "found.html")],
        ["status", str(uri)],
        ["rejects", str(uri)],
        ["verify", str(uri)],
        ["report", str(uri), "--to", str(to / "r.html")],
    ]


def copied(to: Path, without: str = "") -> Path:
    shutil.copytree(small_run(), to, ignore=shutil.ignore_patterns(*without.split()))
    return to


def codes(uri: Path, to: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[int, str]]:
    """What each command ends with, and says."""
    to.mkdir()
    said = {}
    for command in asked(uri, to):
        code = main(command)
        told = capsys.readouterr()
        assert "Traceback" not in told.err and (code != 2 or told.err.startswith("error: ")), told.err
        said[" ".join([command[0], *command[3:4]] if command[0] == "export" else command[:1])] = (code, told.err)
    return said


@pytest.mark.parametrize("name", [FIRST, LATER])
def test_a_part_that_is_cut_short(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = copied(tmp_path / "out")
    part = next(uri.glob(name))
    part.write_bytes(part.read_bytes()[:-40])
    said = codes(uri, tmp_path / "to", capsys)
    for command in ("export csv", "export label-studio", "evaluate", "index", "duplicates"):
        code, text = said[command]
        assert code == 1 and part.name in text and "cannot be read" in text, (command, text)
    assert said["verify"][0] == 1 and said["report"][0] == 0
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["r.html"]  # nothing half done


def test_a_plan_that_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = copied(tmp_path / "out")
    (uri / PLAN).write_bytes(b"PAR1")
    said = codes(uri, tmp_path / "to", capsys)
    assert said.pop("report")[0] == 0 and said.pop("verify")[0] == 1
    assert all(code == 1 and f"{PLAN}: cannot be read" in text for code, text in said.values())


def later_plan(kind: str, uri: Path) -> bytes:
    """That of a retry of one row, or of an extension by one shard."""
    plan = Output.at(str(uri)).stored_plan()
    assert plan is not None
    if kind == "extension":
        return encode_extension(Plan((Part(len(plan.parts), (Piece("/new.tar", 9, "e"),)),), plan.identities), 1, b"")
    reject = Reject(3, "key", plan.parts[0].pieces[0].uri, "decode", "truncated", "ends early", 512)
    return encode_retry(to_table({0: {"tiny": [reject]}}), 1, b"", ["truncated"])


@pytest.mark.parametrize("kind", ["", "extension", "retry"])
def test_a_changed_bit_of_a_plan_is_told_where_it_is_read(kind: str, tmp_path: Path) -> None:
    """Or decodes to another plan, which the digest in `_run.json` tells; never to what fails later."""
    uri, told = copied(tmp_path / "out", "model=*"), 0
    path, output = uri / (of_generation(PLAN, 1) if kind else PLAN), Output.at(str(uri))
    data = later_plan(kind, uri) if kind else path.read_bytes()
    for at in range(0, len(data), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            plan = output.stored_plan()
            assert plan is not None
            history = read_history(output, plan, [path.name])
        except (StorageError, RunMismatch) as error:
            told += path.name in str(error)
            continue
        assert all(history.plan.parts) and all(history.names_by_part())
    assert len(data) / 12 < told < len(data) / 3


def test_a_record_that_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows do not depend on it; thumbnails do."""
    uri = copied(tmp_path / "out")
    (uri / RUN).write_text("{")
    said = codes(uri, tmp_path / "to", capsys)
    assert [command for command, (code, _) in said.items() if code] == ["verify"]
    assert "no thumbnail" in (tmp_path / "to" / "found.html").read_text()
    assert main(["search", str(uri), "--image", str(tmp_path / "none.jpg")]) == 2


def test_nothing_is_there_or_nothing_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = copied(tmp_path / "out", "model=* _SUCCESS _manifest.parquet _rejects.parquet")
    said = codes(planned, tmp_path / "planned", capsys)
    assert {code for command, (code, _) in said.items() if command in ("status", "rejects", "report")} == {0}
    for command in ("export csv", "evaluate", "index", "duplicates", "search"):
        assert said[command][0] == 2 and "committed yet" in said[command][1]
    (tmp_path / "theirs").mkdir()
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "theirs" / "a.parquet")
    for number, place in enumerate((tmp_path / "nowhere", tmp_path / "theirs")):
        said = codes(place, tmp_path / f"to{number}", capsys)
        assert said.pop("report")[0] == (0 if place.name == "theirs" else 2)
        assert all(code == 2 and "no _plan.parquet here" in text for code, text in said.values())


def test_vectors_of_two_runs_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = copied(tmp_path / "out")
    part = next(uri.glob(FIRST))
    part.with_name("part-000000-0123456789abcdef.parquet").write_bytes(part.read_bytes())
    said = codes(uri, tmp_path / "to", capsys)
    for command in ("index", "duplicates", "search"):
        assert said[command][0] == 2 and "two identities cannot be compared" in said[command][1]
    assert said["export csv"][0] == said["evaluate"][0] == 0  # they read what the plan names
