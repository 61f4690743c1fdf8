"""What lies at a path is told as the `input` of a job that reads exactly it, or refused with what to write."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from img2parquet.errors import InputError
from img2parquet.job import SOURCE_CLASSES
from img2parquet.read import PartLimits, read_part
from img2parquet.read.recognize import recognize
from img2parquet.schema import Part, Row
from img2parquet.storage import Store


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def keys(settings: dict[str, Any]) -> list[str]:
    """Read all rows that the recognized input gives."""
    source = SOURCE_CLASSES[settings["kind"]].model_validate(settings)
    parts = [Part(index, pieces) for index, pieces in enumerate(source.plan(PartLimits()))]  # type: ignore[attr-defined]
    items = [item for part in parts for item in read_part(source, part)]  # type: ignore[arg-type]
    assert all(isinstance(item, Row) for item in items), items
    return sorted(item.key for item in items if item.key)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a/0.jpg", "b/1.JPG", "b/.hidden.jpg", ".git/2.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(jpeg())
    (tmp_path / "photos" / "notes.txt").write_text("x")
    (tmp_path / "photos" / "metadata.csv").write_text("file_name,caption\na/0.jpg,x\n")
    return tmp_path / "photos"


def write_tar(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        member = tarfile.TarInfo(f"{path.name.partition('.')[0]}.jpg")
        member.size = len(jpeg())
        tar.addfile(member, io.BytesIO(jpeg()))


def test_a_folder_of_folders(photos: Path) -> None:
    found = recognize([str(photos)])
    assert found.input == {"kind": "folder", "uris": [str(photos)], "keep": ["class"]}
    assert found.about == "2 images (2 .jpg); not read: 1 .txt, 1 .csv" and found.name == "photos"
    assert keys(found.input) == ["a/0.jpg", "b/1.JPG"]


def test_images_beside_folders_have_no_class(photos: Path) -> None:
    (photos / "2.jpg").write_bytes(jpeg())
    assert "keep" not in recognize([str(photos)]).input
    assert keys(recognize([f"{photos}/*/*.jpg"]).input) == ["a/0.jpg"]
    assert keys(recognize([f"{photos}/2.jpg"]).input) == ["2.jpg"]


@pytest.mark.parametrize("names", [["0.tar", "1.tar"], ["x/0.tar", "y/z/1.tar"], ["0.tar", "1.tar.gz"]])
@pytest.mark.parametrize("folder", ["shards", "shards [old]"])
def test_tars(names: list[str], folder: str, tmp_path: Path) -> None:
    for name in names:
        write_tar(tmp_path / folder / name)
    (tmp_path / folder / "index.json").write_text("{}")
    found = recognize([str(tmp_path / folder)])
    assert found.input["kind"] == "webdataset" and keys(found.input) == ["0", "1"]
    assert keys(recognize([str(tmp_path / folder / names[0])]).input) == ["0"] or "[" in folder


IMAGES = pa.array([jpeg(0), jpeg(9)], pa.binary())
STRUCTS = pa.array([{"bytes": jpeg(0), "path": "x.jpg"}, {"bytes": jpeg(9), "path": "y.jpg"}])
PARQUET = {
    "hugging face": ({"image": STRUCTS, "label": [0, 1]}, {"image": "image", "keep": ["label"]}, ["x.jpg", "y.jpg"]),
    "bytes": (
        {"jpg": IMAGES, "id": [3, 4], "caption": ["a", "b"], "vector": [[1.0], [2.0]]},
        {"image": "jpg", "key": "id", "keep": ["caption"]},
        ["3", "4"],
    ),
    "a thumbnail besides": (
        {"thumb": IMAGES, "image": IMAGES, "name": ["p", "q"], "width": [1, 2], "a:b": [1, 2]},
        {"image": "image", "key": "name"},
        ["p", "q"],
    ),
}


@pytest.mark.parametrize("case", PARQUET)
def test_parquet_files(case: str, tmp_path: Path) -> None:
    columns, settings, expected = PARQUET[case]
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    found = recognize([str(tmp_path)])
    assert found.input == {"kind": "parquet", "uris": [f"{tmp_path}/*.parquet"], **settings}
    assert keys(found.input) == expected


LISTS: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "0.csv": (
        lambda path: path.write_text("id,Image_URL,label\n1,a/0.jpg,x\n2,b/1.JPG,y\n", encoding="utf-8-sig"),
        {"uri": "Image_URL", "keep": ["id", "label"]},
    ),
    "0.tsv": (lambda path: path.write_text("where\tn\na/0.jpg\t1\nb/1.JPG\t2\n"), {"uri": "where", "keep": ["n"]}),
    "0.jsonl": (
        lambda path: path.write_text('{"uri": "a/0.jpg", "labels": 1}\n{"uri": "b/1.JPG", "width": 2}\n'),
        {},
    ),
    "0.parquet": (
        lambda path: pq.write_table(pa.table({"path": ["a/0.jpg", "b/1.JPG"], "score": [0.5, 1]}), path),
        {"uri": "path", "keep": ["score"]},
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_images(name: str, photos: Path) -> None:
    write, settings = LISTS[name]
    write(photos / name)
    found = recognize([str(photos / name)], reserved=["labels"])
    assert found.input == {"kind": "table", "uris": [str(photos / name)], **settings}
    assert keys(found.input) == ["a/0.jpg", "b/1.JPG"]


def test_objects_of_a_bucket(s3_bucket: str) -> None:
    for name in ("a/0.jpg", "b/1.jpg"):
        Store().create(f"{s3_bucket}/photos/{name}", jpeg())
    assert keys(recognize([f"{s3_bucket}/photos"]).input) == ["a/0.jpg", "b/1.jpg"]
    assert keys(recognize([f"{s3_bucket}/photos/a/*.jpg"]).input) == ["0.jpg"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.mkdir(), ["nothing that can be read", "no files"]),
        (lambda p: None, ["in", "not found"]),
        (lambda p: (p.mkdir(), (p / "a.txt").write_text("")), ["nothing that can be read", "1 .txt"]),
        (
            lambda p: (p.mkdir(), (p / "a.jpg").write_bytes(jpeg()), write_tar(p / "b.tar")),
            ["two kinds", "1 image", "1 tar", "glob"],
        ),
        (
            lambda p: (p.mkdir(), pq.write_table(pa.table({"a": IMAGES, "b": IMAGES}), p / "0.parquet")),
            ["several columns", "a, b", "input.image"],
        ),
        (
            lambda p: (p.mkdir(), pq.write_table(pa.table({"a": [1], "b": ["x"]}), p / "0.parquet")),
            ["no column", "input.uri"],
        ),
        (lambda p: (p.mkdir(), (p / "0.csv").write_text("a,b\n1,2\n")), ["no column", "input.uri"]),
        (lambda p: (p.mkdir(), (p / "0.csv").write_text("")), ["no rows"]),
        (lambda p: (p.mkdir(), (p / "0.parquet").write_bytes(b"no")), ["cannot be read as Parquet"]),
    ],
)
def test_what_cannot_be_told_is_said(make: Callable[[Path], object], words: list[str], tmp_path: Path) -> None:
    make(tmp_path / "in")
    with pytest.raises(InputError) as told:
        recognize([str(tmp_path / "in")])
    assert all(word in str(told.value) for word in words), str(told.value)


@pytest.mark.parametrize(
    "text", ["link;note\na/0.jpg;x, y\n", "sep=|\nlink|note\na/0.jpg|x\n", "link\tnote\na/0.jpg\tx\n"]
)
def test_lists_with_other_delimiters(text: str, photos: Path) -> None:
    (photos / "l.csv").write_text(text)
    found = recognize([str(photos / "l.csv")]).input
    assert (found["uri"], found["keep"]) == ("link", ["note"]) and keys(found) == ["a/0.jpg"]


@pytest.mark.parametrize("rest", ["", "/*/*"])
def test_what_cannot_be_read_is_passed_over(photos: Path, rest: str) -> None:
    for name in ("a/.#x", "a/gone.jpg"):
        (photos / name).symlink_to("/nowhere")
    os.mkfifo(photos / "b" / "pipe.jpg")
    assert keys(recognize([f"{photos}{rest}"]).input) == ["a/0.jpg", "b/1.JPG"]
