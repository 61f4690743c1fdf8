"""`img2parquet.embed` gives what a job writes for the same images, and names an image that it cannot use."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import img2parquet
from img2parquet.errors import InputError, OutputUnavailable, UnknownModel
from img2parquet.images.decode import decode
from img2parquet.schema import Pixels
from tests.support.small_job import make_checkpoint, make_shards, small_job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    make_shards(folder / "in", shards=1, per_shard=11, broken=False)
    make_checkpoint(folder / "model")
    return folder


@pytest.fixture(scope="module")
def files(made: Path) -> list[bytes]:
    with tarfile.open(made / "in" / "000.tar") as tar:
        return [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]  # type: ignore[union-attr]


def rgb(data: bytes) -> np.ndarray:
    pixels = decode(data)
    assert isinstance(pixels, Pixels)
    return pixels.rgb_HWC


def test_every_kind_of_image_gives_the_rows_of_a_job(made: Path, files: list[bytes], tmp_path: Path) -> None:
    job = small_job(f"{made}/in/*.tar", made / "model", str(tmp_path / "out"))
    img2parquet.run(job, "local")
    table = img2parquet.open_results(str(tmp_path / "out"), "tiny").to_table()
    written_ND = img2parquet.decode_vectors(table.column("embedding"), table.schema.field("embedding"))
    paths = []
    for n, data in enumerate(files):
        paths.append(tmp_path / f"{n}.jpg")
        paths[-1].write_bytes(data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        folder = str(made / "model")
        ours_ND = img2parquet.embed(files, folder, normalize="l2", dtype="float32", batch_size=8)
        assert ours_ND.dtype == np.float32 and ours_ND.shape == written_ND.shape
        assert np.array_equal(ours_ND, written_ND)  # the same batches, the same threads: the same bits
        model = img2parquet.load_model(folder)
        arrays = [rgb(data) for data in files]
        mixed = [*paths[:2], str(paths[2]), bytearray(files[3]), *arrays[4:6], *map(Image.fromarray, arrays[6:])]
        for images in (paths, arrays, mixed, (image for image in arrays)):
            assert np.array_equal(img2parquet.embed(images, model=model, normalize="l2", batch_size=8), written_ND)
        alone_ND = img2parquet.embed(files, model, normalize="l2", batch_size=1)
        assert np.abs(alone_ND - written_ND).max() < 1e-5
        raw_ND = img2parquet.embed(files, model)
        assert np.abs(raw_ND / np.linalg.norm(raw_ND, axis=1, keepdims=True) - written_ND).max() < 1e-5
    finally:
        torch.set_num_threads(threads)


def test_pil_images_are_turned_upright_and_put_on_white(made: Path) -> None:
    model = img2parquet.load_model(str(made / "model"))
    rng = np.random.default_rng(0)
    stored = Image.fromarray(rng.integers(0, 255, (90, 70, 4), dtype=np.uint8), "RGBA")
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    stored.save(sink, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(sink.getvalue()))
    both_ND = img2parquet.embed([sink.getvalue(), opened], model)
    assert np.array_equal(both_ND[0], both_ND[1])


def test_no_images_give_no_rows(made: Path) -> None:
    model = img2parquet.load_model(str(made / "model"))
    assert img2parquet.embed([], model).shape == (0, model.card.gives["pooled"][0])


def test_what_cannot_be_embedded_is_named(made: Path, files: list[bytes], tmp_path: Path) -> None:
    model = img2parquet.load_model(str(made / "model"))
    (tmp_path / "page.jpg").write_bytes(b"<html>no</html>")
    good = files[0]
    bad = [
        ([good, good[: len(good) // 2]], r"images\[1\]: truncated: "),
        ([good, tmp_path / "page.jpg"], r"images\[1\] \(.*page\.jpg\): not_an_image"),
        ([str(tmp_path / "gone.jpg")], r"images\[0\] \(.*gone\.jpg\): no such file"),
        ([np.zeros((8, 8), np.uint8)], r"images\[0\]: uint8 \(8, 8\) is not"),
        ([good, np.zeros((8, 8, 3), np.float32)], r"images\[1\]: float32"),
        ([good, 7], r"images\[1\]: expected an image, not an object of type int"),
        ([good, None], r"images\[1\]: expected an image, not an object of type NoneType"),
        (good, "expected a list of images, not a single bytes"),
        (tmp_path / "page.jpg", "expected a list of images"),
        (np.zeros((8, 8, 3), np.uint8), "not a list of images"),
        (Image.new("RGB", (8, 8)), "expected a list of images, not a single Image"),
    ]
    for images, words in bad:
        with pytest.raises(InputError, match=words):
            img2parquet.embed(images, model)  # type: ignore[arg-type]


def test_wishes_that_cannot_be(made: Path, files: list[bytes]) -> None:
    model = img2parquet.load_model(str(made / "model"))
    with pytest.raises(InputError, match="dtype: this model is loaded already"):
        img2parquet.embed(files, model, dtype="float32")
    with pytest.raises(InputError, match="batch_size: 0 is not a batch size"):
        img2parquet.embed(files, model, batch_size=0)
    with pytest.raises(InputError, match="neither `exact` nor `fast`"):
        img2parquet.embed(files, model, preprocess="quick")  # type: ignore[arg-type]
    with pytest.raises(OutputUnavailable, match="pooled:cls"):
        img2parquet.embed(files, model, pool="cls")  # LeViT has no class token
    with pytest.raises(UnknownModel):
        img2parquet.embed(files, "facebook/levit-255")


def test_it_is_a_name_of_the_package_whatever_was_imported_before() -> None:
    code = (
        "import img2parquet\n"
        "import img2parquet.inference.steps\n"
        "assert all(hasattr(img2parquet, name) for name in img2parquet.__all__)\n"
        "try:\n    img2parquet.embed([], model='./nowhere')\n"
        "except img2parquet.errors.UserError:\n    print('called')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True)
    assert ran.stdout == "called\n"
    light = (
        "import sys, img2parquet; print('embed' in img2parquet.__all__, 'torch' in sys.modules, 'ray' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", light], check=True, timeout=300, capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "False", "False"]
