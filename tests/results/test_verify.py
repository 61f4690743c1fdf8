"""An output that was tampered with is found out, whatever was done to it."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from img2parquet.dataset.commit import PLAN, RECORDS, SUCCESS
from img2parquet.dataset.part_file import DIGEST_KEY, _encode, _seal, is_intact
from img2parquet.dataset.plan import Plan
from img2parquet.dataset.sealed_json import seal
from img2parquet.engine.driver import run
from img2parquet.errors import InputError
from img2parquet.results.reader import open_results
from img2parquet.results.verify import RepeatedKeys, verify
from img2parquet.schema import Part, Piece
from tests.support.small_job import make_checkpoint, make_shards, small_job


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make_shards(folder / "in", shards=3, per_shard=8, broken=False)
    checkpoint = make_checkpoint(folder / "checkpoint")
    run(small_job(f"{folder}/in/*.tar", checkpoint, str(folder / "out")), "local")
    other = small_job(f"{folder}/in/*.tar", checkpoint, str(folder / "other"), decode={"alpha": "drop"})
    run(other, "local")
    return folder


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))


def part(output: Path, index: int = 1) -> Path:
    return sorted((output / "model=tiny").iterdir())[index]


def test_an_untouched_output_is_fine(output: Path) -> None:
    assert verify(str(output)) == []


def delete(output: Path, finished: Path) -> None:
    part(output).unlink()


def truncate(output: Path, finished: Path) -> None:
    part(output).write_bytes(part(output).read_bytes()[:-100])


def empty(output: Path, finished: Path) -> None:
    part(output).write_bytes(b"")


def flip_a_byte(output: Path, finished: Path) -> None:
    data = bytearray(part(output).read_bytes())
    data[len(data) // 3] ^= 1
    part(output).write_bytes(data)


def rewrite(path: Path, table: pa.Table) -> None:
    """A well-formed file with the old footer's words, as a careful hand would make it."""
    metadata = {k: v for k, v in pq.read_metadata(path).metadata.items() if k != b"ARROW:schema"}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def remove_a_row(output: Path, finished: Path) -> None:
    path = part(output)
    rewrite(path, pq.ParquetFile(path).read().slice(1))


def double_a_row(output: Path, finished: Path) -> None:
    path = part(output)
    table = pq.ParquetFile(path).read()
    rewrite(path, pa.concat_tables([table, table.slice(0, 1)]))


def duplicate_a_part(output: Path, finished: Path) -> None:
    shutil.copy(part(output), part(output).with_name("part-000007-" + "0" * 16 + ".parquet"))


def swap_two_parts(output: Path, finished: Path) -> None:
    first, second = part(output, 0), part(output, 1)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


def add_a_part_of_another_run(output: Path, finished: Path) -> None:
    shutil.copy(part(finished / "other"), output / "model=tiny")


def replace_by_a_part_of_another_run(output: Path, finished: Path) -> None:
    shutil.copy(part(finished / "other"), part(output))


def forget_the_end(output: Path, finished: Path) -> None:
    (output / "_SUCCESS").unlink()


def forget_the_manifest(output: Path, finished: Path) -> None:
    (output / "_manifest.parquet").unlink()


def change_the_plan(output: Path, finished: Path) -> None:
    shutil.copy(finished / "other" / "_plan.parquet", output / "_plan.parquet")


def rename_a_part(output: Path, finished: Path) -> None:
    part(output).rename(part(output).with_name("part-000001-" + "0" * 16 + ".parquet"))


def move_a_part_to_another_model(output: Path, finished: Path) -> None:
    (output / "model=other").mkdir()
    part(output).rename(output / "model=other" / part(output).name)


def add_a_file_that_readers_see(output: Path, finished: Path) -> None:
    shutil.copy(part(output), output / "more.parquet")


def add_a_note_beside_the_parts(output: Path, finished: Path) -> None:
    (part(output).parent / "note.txt").write_text("x")


HIDDEN = ["_y.parquet", ".y.parquet", "_deep/y.parquet", ".deep/er/_y.parquet"]


@pytest.mark.parametrize("name", ["y.parquet", "deep/y.parquet", *HIDDEN])
def test_every_parquet_file_in_a_partition_is_planned_or_reported(output: Path, name: str) -> None:
    """DuckDB's and Polars' globs count hidden names too."""
    for model in ("tiny", "other"):
        to = output / f"model={model}" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(path for path in (output / "model=tiny").glob("part-*")), to)
    found = [f"not of this run: model={model}/{name}" for model in ("other", "tiny")]
    assert verify(str(output)) == found
    if "/" not in name:
        rows = duckdb.sql(f"from '{output}/model=*/*.parquet'")
        assert len(rows) > open_results(str(output)).count_rows()


def test_hidden_files_that_no_reader_takes_for_rows_are_left_alone(output: Path) -> None:
    for name in ("_SUCCESS", ".part.crc", "_notes.txt"):
        (output / "model=tiny" / name).write_text("x")
    assert verify(str(output)) == []


def forge(path: Path, table: pa.Table) -> None:
    """Other rows under the old footer's words, sealed as we would seal it: all that its own file says is right."""
    said = pq.read_metadata(path).metadata
    metadata = {k.decode(): v.decode() for k, v in said.items() if k not in (b"ARROW:schema", DIGEST_KEY)}
    forged = _seal(_encode(table, metadata))
    assert is_intact(forged)
    path.write_bytes(forged)


def forge_a_part(output: Path, finished: Path) -> None:
    path = part(output)
    table = pq.ParquetFile(path).read()
    shifted = table.set_column(
        table.column_names.index("width"), table.field("width"), pc.add(table["width"], 1).cast("int32")
    )
    forge(path, shifted)


def forge_a_footer(output: Path, finished: Path) -> None:
    """One word of the same length, sealed again."""
    path = part(output)
    data = path.read_bytes()
    at = data.rindex(DIGEST_KEY)
    start = data.index(b"sha256:", at) + 7
    blank = data.replace(b'"alpha": "white"', b'"alpha": "black"')
    forged = _seal(blank[:start] + b"0" * 64 + blank[start + 64 :])
    assert is_intact(forged) and len(forged) == len(data) and forged != data
    path.write_bytes(forged)


def change_a_record(name: str, **change: object) -> Callable[[Path, Path], None]:
    def tamper(output: Path, finished: Path) -> None:
        values = json.loads((output / name).read_bytes())
        values.pop("sha256")
        assert values.keys() >= change.keys()
        (output / name).write_bytes(seal({**values, **change}))

    tamper.__name__ = f"change {', '.join(change)} of {name}"
    return tamper


def take_a_record_of_another_run(name: str) -> Callable[[Path, Path], None]:
    def tamper(output: Path, finished: Path) -> None:
        shutil.copy(finished / "other" / name, output / name)

    tamper.__name__ = f"take {name} of another run"
    return tamper


def hide_a_changed_record(output: Path, finished: Path) -> None:
    shutil.copy(finished / "other" / "_rejects.parquet", output / "_rejects.parquet")
    record = json.loads((output / "_run.json").read_bytes())
    record.pop("sha256")
    (output / "_run.json").write_bytes(seal({**record, "batch_size": 9}))
    change_a_record("_SUCCESS", files={})(output, finished)


TAMPERINGS = [
    hide_a_changed_record,
    rename_a_part, move_a_part_to_another_model, add_a_file_that_readers_see, add_a_note_beside_the_parts, forge_a_part,
    forge_a_footer,
    change_a_record("_SUCCESS", rows_in=23), change_a_record("_SUCCESS", rows_written={"tiny": 23}),
    change_a_record("_SUCCESS", rejected={"empty": 1}), change_a_record("_SUCCESS", parts=2),
    change_a_record("_run.json", plan_sha256="0" * 64), change_a_record("_run.json", batch_size=9),
    change_a_record("_run.json", job={}), change_a_record("_run.json", identities={}),
    *(take_a_record_of_another_run(name) for name in ("_SUCCESS", "_run.json", "_manifest.parquet")),

    delete, truncate, empty, flip_a_byte, remove_a_row, double_a_row, duplicate_a_part, swap_two_parts,
    add_a_part_of_another_run, replace_by_a_part_of_another_run, forget_the_end, forget_the_manifest, change_the_plan,
]  # fmt: skip


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda f: f.__name__)
def test_tampering_is_found(output: Path, finished: Path, tamper: Callable[[Path, Path], None]) -> None:
    tamper(output, finished)
    assert verify(str(output))


def test_a_key_that_is_there_twice_is_named(output: Path) -> None:
    path = part(output)
    table = pq.ParquetFile(path).read()
    keys = table["key"].to_pylist()
    twice = table.set_column(0, table.field("key"), pa.array([keys[1], *keys[1:]]))
    forge(path, twice)
    problem = f"model `tiny`: key `{keys[1]}` of {table['shard'][0]} occurs 2 times"
    assert verify(str(output)).count(problem) == 1


def test_keys_are_compared_wherever_a_shard_has_rows() -> None:
    """Within a file, between a part and its retry, between the parts of one shard; not between shards or models."""
    whole, spread = Piece("whole.tar", 9, ""), [Piece("spread.tar", 9, "", start, start + 3) for start in (0, 3, 6)]
    parts = tuple(Part(i, pieces) for i, pieces in enumerate([(whole, spread[0]), (spread[1],), (spread[2],)]))
    keys = RepeatedKeys(Plan(parts, {}))
    keys.add("m", 0, {"whole.tar": ["a", "b", "a", "a"], "spread.tar": ["a", "c"]})
    keys.add("m", 0, {"whole.tar": ["b", "d"]})  # of a retry
    keys.add("n", 0, {"whole.tar": ["a", "d"], "gone.tar": ["a"]})
    keys.add("m", 1, {"spread.tar": ["b", "d"], "gone.tar": ["a"]})
    assert not [of for of in keys.kept if "whole.tar" in of], "no part that follows has rows of it"
    keys.add("m", 2, {"spread.tar": ["e", "c", "c"], "gone.tar": ["a"]})
    assert sorted(keys.problems()) == [
        "model `m`: key `a` of gone.tar occurs 2 times",
        "model `m`: key `a` of whole.tar occurs 3 times",
        "model `m`: key `b` of whole.tar occurs 2 times",
        "model `m`: key `c` of spread.tar occurs 3 times",
    ]


@pytest.mark.parametrize("name", (*RECORDS, SUCCESS))
@pytest.mark.parametrize("change", ["flip", "cut", "empty", "pickle", "remove"])
def test_any_change_of_a_record_is_told_and_raises_nothing(output: Path, name: str, change: str) -> None:
    data = (output / name).read_bytes()
    spots = range(0, len(data), max(1, len(data) // 12))
    changed = {
        "flip": [data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :] for at in spots],
        "cut": [data[:at] for at in spots],
        "empty": [b""],
        "pickle": [pickle.dumps(data)],
        "remove": [],
    }[change]
    for content in changed:
        (output / name).write_bytes(content)
        assert verify(str(output)), len(content)
    if change == "remove" and name != PLAN:  # without a plan it is no output
        (output / name).unlink()
        assert verify(str(output)) != []


def test_a_changed_word_of_the_record_is_told_before_the_job_has_ended(output: Path) -> None:
    """Before there is a _SUCCESS with a digest of it."""
    (output / "_SUCCESS").unlink()
    record = (output / "_run.json").read_text()
    assert not [problem for problem in verify(str(output)) if "_run.json" in problem]
    (output / "_run.json").write_text(record.replace('"batch_size": 8', '"batch_size": 9'))
    assert [problem for problem in verify(str(output)) if "_run.json" in problem]


def test_any_changed_byte_of_a_part_is_found(output: Path) -> None:
    data = part(output).read_bytes()
    assert is_intact(data)
    for position in range(0, len(data), 7):
        assert not is_intact(data[:position] + bytes([data[position] ^ 0x20]) + data[position + 1 :]), position


def test_the_footer_accounts_for_every_row(output: Path) -> None:
    said = pq.read_metadata(part(output)).metadata
    assert int(said[b"img2parquet.rows_in"]) == 8
    assert json.loads(zlib.decompress(base64.b64decode(said[b"img2parquet.rejects"]))) == []
    assert json.loads(said[b"img2parquet.about"])["dtype"] == "float32"


def test_a_folder_that_is_no_output_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"_plan\.parquet"):
        verify(str(tmp_path))
