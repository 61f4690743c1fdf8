"""Search: by image and by key, against brute force in numpy; the sheet, with hostile keys and without sources."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from img2parquet.cli import main
from img2parquet.errors import CheckpointError, InputError
from img2parquet.results.embeddings import Hit, Nearest, open_vectors
from img2parquet.results.search.html_page import pictures_of, render
from img2parquet.results.search.query_image import embed_image
from img2parquet.results.search.search import search_vectors
from tests.support.finished_outputs import copy_of, part_paths, rows_of, small_run
from tests.support.small_job import make_checkpoint


@pytest.fixture
def out(tmp_path: Path) -> str:
    return copy_of(small_run(), tmp_path / "out")


def image_of(key: str, to: Path) -> str:
    shard = small_run().parent / "in" / f"{key.split('/')[0]}.tar"
    with tarfile.open(shard) as tar:
        member = tar.extractfile(f"{key}.jpg")
        assert member
        to.write_bytes(member.read())
    return str(to)


def test_exact_search_is_brute_force(out: str) -> None:
    rows = rows_of(out)
    table = np.array([row["embedding"] for row in rows], np.float64)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    query = np.random.default_rng(0).standard_normal(table.shape[1])
    query /= np.linalg.norm(query)
    order = np.argsort(-(table @ query), kind="stable")[:9]
    answer = search_vectors(open_vectors(out), query.astype(np.float32), 9)
    assert [hit.key for hit in answer.hits] == [rows[i]["key"] for i in order]
    assert [hit.shard for hit in answer.hits] == [rows[i]["shard"] for i in order]
    np.testing.assert_allclose([hit.score for hit in answer.hits], (table @ query)[order], atol=1e-6)
    assert answer.compared == len(rows)


def test_nearest_does_not_depend_on_blocks_and_keeps_the_first_of_equals() -> None:
    rng = np.random.default_rng(1)
    units = rng.integers(-1, 2, (200, 3)).astype(np.float32)  # many rows alike
    query = np.array([[1, 0.5, 0.25]], np.float32)
    whole = Nearest(query, 20)
    whole.add(units, np.arange(200, dtype=np.uint64))
    for size in (1, 7, 64):
        parts = Nearest(query, 20)
        for first in range(0, 200, size):
            parts.add(units[first : first + size], np.arange(first, min(200, first + size), dtype=np.uint64))
        assert parts.places[0].tolist() == whole.places[0].tolist()
    expected = sorted(range(200), key=lambda i: (-float(units[i] @ query[0]), i))[:20]
    assert whole.places[0].tolist() == expected


def test_an_image_gets_the_vector_that_the_run_gave_it(out: str, tmp_path: Path) -> None:
    row = rows_of(out)[30]
    vector_D = embed_image(open_vectors(out), image_of(row["key"], tmp_path / "q.jpg"))
    np.testing.assert_allclose(vector_D, row["embedding"], atol=2e-6)
    assert search_vectors(open_vectors(out), vector_D, 1).hits[0].key == row["key"]


def test_another_checkpoint_is_refused_and_a_moved_one_is_named(out: str, tmp_path: Path) -> None:
    image = image_of(rows_of(out)[0]["key"], tmp_path / "q.jpg")
    other = make_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="weights' hash"):
        embed_image(open_vectors(out), image, str(other))
    moved = shutil.copytree(small_run().parent / "model", tmp_path / "moved")
    np.testing.assert_array_equal(
        embed_image(open_vectors(out), image, str(moved)), embed_image(open_vectors(out), image)
    )


def test_what_is_no_image_is_told(out: str, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"<html>")
    with pytest.raises(InputError, match="not_an_image"):
        embed_image(open_vectors(out), str(tmp_path / "x.jpg"))
    with pytest.raises(InputError, match="no such image"):
        embed_image(open_vectors(out), str(tmp_path / "none.jpg"))


def test_by_key(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = rows_of(out)[7]["key"]
    assert main(["search", out, "--key", key, "-k", "3", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3 and key not in {line["key"] for line in lines}
    assert lines == sorted(lines, key=lambda line: -line["score"])
    assert main(["search", out, "--key", "nobody"]) == 2
    assert "no row with the key `nobody`" in capsys.readouterr().err
    assert main(["search", out, "--key", key, "-k", "0"]) == 2


class Reader(HTMLParser):
    """Which elements there are, what they load, and their text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_sheet_has_thumbnails_of_the_source_images(out: str, tmp_path: Path) -> None:
    from PIL import Image

    page = tmp_path / "found.html"
    image = image_of(rows_of(out)[30]["key"], tmp_path / "q.jpg")
    assert main(["search", out, "--image", image, "-k", "8", "--html", str(page)]) == 0
    found = Reader(page.read_text())
    assert len(found.loads) == 9 and all(load.startswith("data:image/webp;base64,") for load in found.loads)
    assert "script" not in found.tags and "without a thumbnail" not in found.text
    vectors = open_vectors(out)
    hits = search_vectors(vectors, vectors.vector(rows_of(out)[30]["key"])[1], 3).hits
    pictures = pictures_of(vectors, hits)
    row = rows_of(out)[30]
    assert Image.open(io.BytesIO(pictures[row["shard"], row["key"]])).size == (row["width"], row["height"])
    assert main(["search", out, "--key", row["key"], "--html", str(page)]) == 0  # the user's file, written again
    assert main(["search", out, "--key", row["key"], "--html", str(tmp_path / "x.txt")]) == 2


def test_hostile_keys_stay_text() -> None:
    key = "<img src=x onerror=alert(1)>\"'&\x1b[31m\u202e\n</figcaption><script>alert(1)</script>"
    page = render(f"Rows like {key}", "about", [Hit(key, key, 0.5, 0, 0)], {(key, key): b"webp"})
    found = Reader(page)
    assert "script" not in found.tags and found.tags.count("img") == 1
    assert "<script>alert(1)</script>" in found.text and "\x1b" not in page and "\u202e" not in page


def test_without_the_shards_there_is_a_sheet_with_a_note(tmp_path: Path) -> None:
    from img2parquet.engine.driver import run
    from tests.support.small_job import make_shards, small_job

    make_shards(tmp_path / "shards", shards=2, per_shard=4, broken=False)
    out = str(tmp_path / "out")
    run(small_job(str(tmp_path / "shards" / "*.tar"), small_run().parent / "model", out), "local")
    (tmp_path / "shards" / "001.tar").unlink()
    page = tmp_path / "found.html"
    assert main(["search", out, "--key", rows_of(out)[0]["key"], "-k", "7", "--html", str(page)]) == 0
    found = Reader(page.read_text())
    assert len(found.loads) == 3 and "4 without a thumbnail" in found.text and found.text.count("no thumbnail") == 4


def test_a_key_of_two_shards_needs_the_shard(out: str) -> None:
    part = part_paths(out)[0]
    assert part.is_file()
    vectors = open_vectors(out)
    row = rows_of(out)[0]
    assert vectors.vector(row["key"], row["shard"])[0] == vectors.vector(row["key"])[0]
    with pytest.raises(InputError, match="of shard `elsewhere`"):
        vectors.vector(row["key"], "elsewhere")
