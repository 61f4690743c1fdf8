"""One seed: mutated shards of every input kind through plan and read, or through a whole small job with `verify`.

Every row is accounted for: rows in = rows + rejects, numbered without gaps, no key twice; or one clear error of ours.
"""

from __future__ import annotations

import gzip
import io
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from img2parquet.errors import Img2ParquetError, InputError, PartFailed
from img2parquet.read import PartLimits, read_part
from img2parquet.schema import Part, Reason, Reject, Row
from tests.harness.fuzz.children import Suite
from tests.harness.fuzz.mutate import mutated
from tests.read.broken_shards import BROKEN_SHARDS, GZIPPED, body_at, header_at, images, jpeg, parquet, tar
from tests.read.sources import make_source

REASONS = set(get_args(Reason))
MEMBERS = [m for i in range(12) for m in ((f"{i:03}.jpg", jpeg(i)), (f"{i:03}.json", b'{"label": %d}' % i))]
TAR = tar(MEMBERS)
KINDS = ("tar", "tar", "bits", "gzip", "gzipped", "parquet", "parquet", "footer", "list", "folder", "odd")


@dataclass(frozen=True)
class Shards:
    """Files by name, and the `input:` that reads them. `changed`: the bytes of the first file that were changed."""

    kind: str
    files: Mapping[str, bytes]
    settings: Mapping[str, Any]
    changed: tuple[int, int] | None = None


def make(seed: int) -> Shards:
    rng = random.Random(f"shard {seed}")
    kind = rng.choice(KINDS)
    others = [TAR, GZIPPED, *(data for shard in rng.sample(BROKEN_SHARDS, 3) for data in shard.files.values())]
    return _MAKERS[kind](kind, rng, others)


def _tars(kind: str, rng: random.Random, others: list[bytes]) -> Shards:
    data = mutated(rng.choice((TAR, TAR, tar(images(), rng.choice((1, 2))))), rng, others)
    settings = {"kind": "webdataset", "uris": ["a.tar", "b.tar"], "keep": ["label:int64", "txt"]}
    if rng.random() < 0.3:
        settings["split_above_bytes"] = 2048
    return Shards(kind, {"a.tar": data, "b.tar": TAR}, settings)


def _bits(kind: str, rng: random.Random, others: list[bytes]) -> Shards:
    """Bytes that change in one place and no other: what lies outside has to come through."""
    at, length = rng.randrange(len(TAR)), rng.choice((1, 1, 4, 100, 600))
    data = (TAR[:at] + rng.choice((bytes(length), rng.randbytes(length))) + TAR[at + length :])[: len(TAR)]
    return Shards(kind, {"a.tar": data}, {"kind": "webdataset", "uris": ["a.tar"]}, (at, at + length))


def _gzips(kind: str, rng: random.Random, others: list[bytes]) -> Shards:
    """The stream changed, or what is in it."""
    data = mutated(TAR, rng, others) if kind == "gzipped" else TAR
    packed = gzip.compress(data, rng.choice((1, 9)), mtime=0)
    packed = packed if kind == "gzipped" else mutated(packed, rng, others)
    return Shards(kind, {"a.tar.gz": packed}, {"kind": "webdataset", "uris": ["a.tar.gz"], "keep": ["label:int64"]})


def _parquets(kind: str, rng: random.Random, others: list[bytes]) -> Shards:
    data = _parquet(rng)
    if kind == "footer":  # where a blind change lies in one time of a hundred
        start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(start, len(data))
            changed[at] = rng.choice((changed[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        data = bytes(changed)
    else:
        data = mutated(data, rng, others)
    return Shards(kind, {"a.parquet": data}, {"kind": "parquet", "uris": ["a.parquet"], "key": "id", "keep": ["n"]})


def _parquet(rng: random.Random) -> bytes:
    columns = {"image": [jpeg(i) for i in range(12)], "id": [f"{i:03}" for i in range(12)], "n": [*range(11), None]}
    sink = io.BytesIO()
    pq.write_table(
        pa.table(columns), sink, compression=rng.choice(("none", "snappy", "zstd", "gzip")),
        row_group_size=rng.choice((3, 12)), use_dictionary=rng.random() < 0.5,
        data_page_version=rng.choice(("1.0", "2.0")), write_batch_size=rng.choice((2, 1024)), data_page_size=100,
    )  # fmt: skip
    return sink.getvalue()


def _lists(kind: str, rng: random.Random, others: list[bytes]) -> Shards:
    form = rng.choice(("csv", "tsv", "jsonl", "parquet"))
    files = {f"img/{i}.jpg": jpeg(i) for i in range(6)}
    if form == "parquet":
        data = parquet({"uri": list(files), "n": list(range(6))})
    elif form == "jsonl":
        data = b"".join(b'{"uri": "%s", "n": %d}\n' % (name.encode(), i) for i, name in enumerate(files))
    else:
        comma = b"," if form == "csv" else b"\t"
        data = b"uri" + comma + b"n\n" + b"".join(n.encode() + comma + b"%d\n" % i for i, n in enumerate(files))
    settings = {"kind": "table", "uris": [f"a.{form}"], "keep": ["n:int64"], "threads": 1}
    return Shards(kind, {**files, f"a.{form}": mutated(data, rng, others)}, settings)


def _folders(kind: str, rng: random.Random, others: list[bytes]) -> Shards:
    """Names of all sorts, and bytes of all sorts."""
    letters = "aé x.\n\t*?[]{}#%&=;:'\"\\\u202e-_~0"
    names = {"".join(rng.choice(letters) for _ in range(rng.randrange(1, 20))).strip("/") for _ in range(8)}
    files = {f"f/{name}.{rng.choice(('jpg', 'JPG', 'png', 'txt'))}": jpeg(i) for i, name in enumerate(sorted(names))}
    broken = {name: mutated(data, rng, others) if rng.random() < 0.3 else data for name, data in files.items()}
    return Shards(kind, {"f/0.jpg": jpeg(0), **broken}, {"kind": "folder", "uris": ["f"], "keep": ["class"]})


def _odd(kind: str, rng: random.Random, others: list[bytes]) -> Shards:
    """One of the broken shards that tests know, broken further."""
    shard = rng.choice(BROKEN_SHARDS)
    name = rng.choice(sorted(shard.files))
    return Shards(kind, {**shard.files, name: mutated(shard.files[name], rng, others)}, shard.settings)


_MAKERS = {
    "tar": _tars, "bits": _bits, "gzip": _gzips, "gzipped": _gzips, "parquet": _parquets, "footer": _parquets,
    "list": _lists, "folder": _folders, "odd": _odd,
}  # fmt: skip


# --- through a reader ------------------------------------------------------------------------------------------------


def check_reader(seed: int, shards: Shards) -> str:
    """`read` or `read, with rejects`, or which of our errors came. Raises AssertionError, or what was not ours."""
    with tempfile.TemporaryDirectory() as folder:
        settings = _put(shards, Path(folder))
        try:
            source = make_source(settings)
            parts = [Part(i, pieces) for i, pieces in enumerate(source.plan(PartLimits(rows=5)))]
        except InputError as error:
            assert error.message
            return f"{shards.kind}: refused"
        items: list[Row | Reject] = []
        failed = False
        for part in parts:
            found = []
            try:
                for item in read_part(source, part):
                    found.append(item)
            except PartFailed as error:
                assert error.message
                failed = True
                continue
            _account(part, found)
            items += found
        if shards.changed:
            assert not failed
            _check_untouched(shards.changed, items)
        rejected = any(isinstance(item, Reject) for item in items)
        return f"{shards.kind}: " + ("part failed" if failed else "read, with rejects" if rejected else "read")


def _put(shards: Shards, folder: Path) -> dict[str, Any]:
    for name, data in shards.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {**shards.settings, "uris": [str(folder / uri) for uri in shards.settings["uris"]]}


def _account(part: Part, items: list[Row | Reject]) -> None:
    assert [item.row for item in items] == list(range(len(items)))
    assert part.rows in (None, len(items)), f"{len(items)} rows where the plan has {part.rows}"
    keys = [(item.shard, item.key) for item in items if isinstance(item, Row)]
    assert len(keys) == len(set(keys))
    assert all(item.reason in REASONS and item.message for item in items if isinstance(item, Reject))


def _check_untouched(changed: tuple[int, int], items: list[Row | Reject]) -> None:
    """Images whose header and body were not touched are read whole, or lie in a stretch that is told as damaged."""
    rows = {item.key: bytes(item.image) for item in items if isinstance(item, Row)}
    damages = [item for item in items if isinstance(item, Reject) and item.reason == "shard_damaged"]
    stretches = [tuple(int(w) for w in d.message.split("from byte ")[1].split(",")[0].split(" to ")) for d in damages]
    for number, (name, body) in enumerate(MEMBERS):
        start, stop = header_at(TAR, number), body_at(TAR, number) + len(body)
        if name.endswith(".jpg") and (stop <= changed[0] or changed[1] <= start):
            told = any(start < b and a < stop for a, b in stretches)
            assert told or rows.get(name[:3]) == body, f"{name} is lost: {changed} was changed"


# --- through a whole job ---------------------------------------------------------------------------------------------


def check_job(checkpoint: Path, seed: int, shards: Shards) -> str:
    """The job ends with every row written or rejected and a clean `verify`, or with one of our errors."""
    import img2parquet
    from tests.support.small_job import small_job

    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder) / "out")
        source = _put(shards, Path(folder))
        resources = {"workers": 1, "batch_size": 8}
        try:
            job = small_job("", checkpoint, uri, input=source, reject_limit=1.0, resources=resources)
            summary = img2parquet.run(job, "local")
        except Img2ParquetError as error:
            assert str(error)
            return f"{shards.kind}: {type(error).__name__}"
        written = summary.rows_written["tiny"]
        assert summary.rows_in == written + sum(summary.rejected.values())
        assert img2parquet.open_results(uri).count_rows() == written
        problems = _problems(uri)
        assert not problems, problems
        return f"{shards.kind}: " + ("done, with rejects" if summary.rejected else "done")


def _problems(uri: str) -> list[str]:
    """What `verify` finds; a key that two parts of the odd shards share is theirs, and told."""
    from img2parquet.results.verify import verify

    return [problem for problem in verify(uri) if "key" not in problem]


READERS = Suite(make, check_reader, limit_s=30, most_mb=300)
