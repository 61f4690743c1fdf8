"""Images by URI from real web servers: what they refuse, how they send, and which text of a URL they see."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from img2parquet.read.folder import Folder
from img2parquet.read.table import Table
from img2parquet.schema import Row
from img2parquet.storage import Store, retry
from img2parquet.storage.http_client import as_written
from tests.read.broken_shards import jpeg
from tests.read.test_table import read
from tests.security.servers import Answer, Web, redirect, web

ALLOWED = {"http": {"allow_private_addresses": True}}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)


def answer(path: str) -> Answer:
    status = int(path.split("/")[1]) if path[1:4].isdigit() else 200
    return redirect(path) if status == 302 else Answer(status, jpeg(1))


@pytest.fixture
def site() -> Iterator[Web]:
    with web(answer) as site:
        yield site


def write_list(folder: Path, *uris: str) -> Table:
    path = folder / "l.jsonl"
    path.write_text("".join(f'{{"uri": "{uri}"}}\n' for uri in uris))
    return Table(uris=(str(path),), storage_options=ALLOWED)


def test_a_dead_link_costs_its_own_row(tmp_path: Path, site: Web) -> None:
    dead = {
        **{f"{site.url}/{status}/x.jpg": "refused" for status in (302, 400, 401, 403, 405, 418, 451)},
        **{f"{site.url}/{status}/x.jpg": "not_found" for status in (404, 410)},
        **{f"{site.url}/{status}/x.jpg": "unreachable" for status in (408, 429, 500, 502, 503, 504)},
        "http://127.0.0.1:9/x.jpg": "unreachable",
        "http://no-such-host.invalid/x.jpg": "unreachable",
    }
    items = read(write_list(tmp_path, *dead, f"{site.url}/1.jpg"))
    assert {item.key: getattr(item, "reason", "row") for item in items[:-1]} == dead
    assert isinstance(items[-1], Row) and items[-1].image == jpeg(1)


def test_an_image_at_an_address_with_a_query(site: Web) -> None:
    for query in ("?x=1", "?X-Amz-Signature=a%2Fb", "#part", "?a=/b.txt"):
        (row,) = read(Folder(uris=(f"{site.url}/a.jpg{query}",)))
        assert isinstance(row, Row) and row.image == jpeg(1)


PACKED = {
    "gzip": gzip.compress,
    "x-gzip": lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]),
    "deflate": zlib.compress,
    "DEFLATE": lambda data: zlib.compress(data, wbits=-15),
    "identity": bytes,
    "gzip, but it is not": bytes,
}


@pytest.mark.parametrize("has_length", [True, False])
@pytest.mark.parametrize("encoding", PACKED)
def test_a_server_may_compress_what_it_sends(tmp_path: Path, encoding: str, has_length: bool) -> None:
    def packed(path: str) -> Answer:
        listed = b"uri\na.jpg\n" if path.endswith(".csv") else jpeg(1)
        body, headers = PACKED[encoding](listed), {"Content-Encoding": encoding.partition(",")[0]}
        return Answer(200, body, headers) if has_length else Answer(200, b"", headers, lambda: iter([body]))

    with web(packed) as site:
        (row,) = read(Table(uris=(site.url + "/l.csv",), storage_options=ALLOWED))
        assert isinstance(row, Row) and row.image == jpeg(1)
        assert Store(ALLOWED).read(site.url + "/a.jpg", 5, 50) == jpeg(1)[5:50]
        assert Store(ALLOWED).stat(site.url + "/a.jpg").size_bytes == len(jpeg(1))


def test_an_object_that_is_stored_compressed_is_unpacked(output_root: str) -> None:
    """As `Content-Encoding: gzip` says of objects in S3 and GCS, whichever header the store sends."""
    Store().create(f"{output_root}/f/a.jpg", gzip.compress(jpeg(1)))
    Store().create(f"{output_root}/l.csv", b"uri\nf/a.jpg\n")
    folder = Folder(uris=(f"{output_root}/f",))
    table = Table(uris=(f"{output_root}/l.csv",))
    for source in (folder, table):
        (row,) = read(source)  # type: ignore[arg-type]
        assert isinstance(row, Row) and row.image == jpeg(1)


def test_what_unpacks_to_too_much_is_not_held(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(gzip.compress(bytes(10 << 20)))
    (tmp_path / "l.csv").write_text("uri\na.jpg\n")
    (reject,) = read(Table(uris=(f"{tmp_path}/l.csv",), max_image_bytes=1 << 20))
    assert getattr(reject, "reason", "") == "unsupported"


TARGETS = ["/img%27s/a%28b.jpg?path=x%2Fy&s=abc", "/a+b.jpg?x=%20+%7e&&y", "/a;b,c.jpg?sig=%3d%3D", "/x//y/z%2e.jpg"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("is_redirected", [False, True])
def test_a_url_arrives_as_written(tmp_path: Path, target: str, is_redirected: bool) -> None:
    def signed(path: str) -> Answer:
        if is_redirected and path == "/first":
            return redirect(target)
        return Answer(200 if path == target else 403, jpeg(1))

    with web(signed) as site:
        (row,) = read(write_list(tmp_path, site.url + ("/first" if is_redirected else target)))
    assert isinstance(row, Row) and set(site.asked) <= {target, "/first"}


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ('http://h/a b/ü.jpg?q=é"<', "http://h/a%20b/%C3%BC.jpg?q=%C3%A9%22%3C"),
        ("http://h/100%/50%25.jpg", "http://h/100%25/50%25.jpg"),
        ("http://bücher.example/a", "http://xn--bcher-kva.example/a"),
        ("/a b", "/a%20b"),
        ("", ""),
    ],
)
def test_what_no_url_may_hold_is_quoted(url: str, asked: str) -> None:
    assert as_written(url) == asked == as_written(asked)


def test_a_redirect_with_blanks_is_followed(tmp_path: Path) -> None:
    with web(lambda path: redirect("/a b.jpg") if path == "/first" else Answer(200, jpeg(1))) as site:
        (row,) = read(write_list(tmp_path, site.url + "/first"))
    assert isinstance(row, Row) and "/a%20b.jpg" in site.asked
