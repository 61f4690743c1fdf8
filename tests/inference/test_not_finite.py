"""A row whose values are not finite is rejected, and its neighbours are written: every output and both runners."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import img2parquet
from img2parquet.errors import InputError, RejectLimitExceeded
from img2parquet.inference import embed_images
from img2parquet.inference.device import Accelerator, Cpu, Device
from img2parquet.inference.forward import Columns, ModelExecutor
from img2parquet.job import JobSpec
from img2parquet.models.model import Model
from img2parquet.outputs.embedding import Embedding
from tests.outputs.test_outputs import CASES, card, features, make
from tests.outputs.test_outputs import batch as rows
from tests.support.fake_accelerator import FakeApi
from tests.support.small_job import job_dict, make_checkpoint, make_shards

ROWS, BAD = 6, (1, 4)


class Overflowing:
    """A model that gives infinity for images whose pixels are 255, and runs out of memory above `most` images."""

    def __init__(self, most: int) -> None:
        self.card, self.most, self.device = card(), most, torch.device("cpu")

    def forward_pixels(self, x_BHWC: torch.Tensor, wants: frozenset[str], **inputs: Any) -> dict[str, torch.Tensor]:
        if len(x_BHWC) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        every = features(wants, ROWS)
        found = {name: feature[x_BHWC[:, 0, 0, 0].long() % 100] for name, feature in every.items()}
        for feature in found.values():
            feature[x_BHWC[:, 0, 0, 1] == 255] = float("inf")
        return found


def columns(outputs: list[Any], bad: tuple[int, ...], device: Device, most: int = 99) -> Columns:
    """Pixel 0 of an image is its number, pixel 1 whether it overflows."""
    pixels = np.zeros((ROWS, 1, 1, 3), np.uint8)
    pixels[:, 0, 0, 0], pixels[list(bad), 0, 0, 1] = np.arange(ROWS), 255
    executor = ModelExecutor(cast(Model, Overflowing(most)), outputs, ROWS, device)
    executor.graphs = None
    found = None
    while found is None:
        with device.alone() as lane:
            found = executor.columns(lane, pixels, rows(ROWS))
    return found


@pytest.mark.parametrize("most", [99, 3, 1])
@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_every_output_leaves_out_the_row_alone(kind: str, fields: dict[str, Any], most: int) -> None:
    outputs = [make(kind, **fields), Embedding(name="beside")]
    whole, found = columns(outputs, (), Cpu()), columns(outputs, BAD, Cpu(), most)
    kept = pa.array([row for row in range(ROWS) if row not in BAD])
    assert found.arrays == [column.take(kept) for column in whole.arrays]
    assert found.not_finite.keys() == set(BAD) and not whole.not_finite
    name = outputs[0].column_names()[0]
    assert all(f"column `{name}`" in why and "not finite in float" in why for why in found.not_finite.values())


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_a_batch_may_lose_all_its_rows(kind: str, fields: dict[str, Any]) -> None:
    found = columns([make(kind, **fields)], tuple(range(ROWS)), Accelerator(FakeApi()))
    declared = make(kind, **fields).fields(card())
    assert [len(column) for column in found.arrays] == [0] * len(declared) and len(found.not_finite) == ROWS
    assert [column.type for column in found.arrays] == [field.type for field in declared]


# -- whole jobs ----------------------------------------------------------------------------------------------------

OUTPUTS = [{"kind": "logits", "dtype": "float16"}, {"kind": "labels", "top_k": 2}]


def job(folder: Path, share: float, out: str, **more: Any) -> JobSpec:
    """Make a job over 12 images, for that share of which a logit is beyond float16.

    Both heads of the tiny LeViT end in a linear layer, which is scaled."""
    shards, model = folder / "in", folder / "model"
    make_shards(shards, 2, 6, broken=False)
    make_checkpoint(model)
    images = [name for tar in sorted(shards.iterdir()) for name in _images_in(tar)]
    largest = np.sort(np.abs(img2parquet.load_model(str(model))(images, ["logits"]).logits.numpy()).max(axis=1))
    keep = len(images) - round(share * len(images))
    limit = (largest[keep - 1] + largest[keep]) / 2 if keep else largest[0] / 2
    weights = load_file(model / "model.safetensors")
    scaled = {
        name: t * (65504 / limit) if ".linear." in name and "classifier" in name else t for name, t in weights.items()
    }
    save_file(scaled, model / "model.safetensors", metadata={"format": "pt"})
    given = job_dict(f"{shards}/*.tar", model, str(folder / out), **more)
    given["models"][0]["outputs"] = OUTPUTS
    return img2parquet.parse_job(given)


def _images_in(tar: Path) -> list[Image.Image]:
    with tarfile.open(tar) as file:
        names = [name for name in file.getnames() if name.endswith(".jpg")]
        return [Image.open(io.BytesIO(cast(IO[bytes], file.extractfile(name)).read())) for name in names]


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_a_job_writes_the_other_rows(runner: Literal["local", "ray"], tmp_path: Path, request: Any) -> None:
    if runner == "ray":
        request.getfixturevalue("ray_cluster")
    summary = img2parquet.run(job(tmp_path, 2 / 12, "out", reject_limit=0.5), runner=runner)
    assert summary.rejected == {"not_finite": 2} and summary.rows_written == {"tiny": 10}
    rejects = img2parquet.read_rejects(str(tmp_path / "out")).to_pylist()
    assert {(r["stage"], r["reason"], r["message"]) for r in rejects} == {
        ("embed", "not_finite", "column `logits`: the model's values are not finite in float16")
    }
    rows = img2parquet.open_results(str(tmp_path / "out")).to_table()
    assert np.isfinite(np.array(rows["logits"].to_pylist())).all() and rows.num_rows == 10
    assert not {r["key"] for r in rejects} & set(rows["key"].to_pylist())
    assert img2parquet.verify(str(tmp_path / "out")) == []


def test_a_model_that_overflows_everywhere_ends_with_a_likely_cause(tmp_path: Path) -> None:
    with pytest.raises(RejectLimitExceeded, match=r"12 of 12 .*\(not_finite 12\)") as raised:
        img2parquet.run(job(tmp_path, 1.0, "out"), runner="local")
    assert "dtype: float32" in raised.value.hint and "weights" in raised.value.hint


def test_embed_names_the_image() -> None:
    model = cast(Model, Overflowing(9))
    with pytest.raises(InputError, match=r"images\[1\]: not_finite"):
        embed_images._Executor(model, Embedding(), 2)(
            [embed_images._Crop(f"images[{n}]", (1, 1), np.array([[[n, 255 * n, 0]]], np.uint8)) for n in range(2)], {}
        )
