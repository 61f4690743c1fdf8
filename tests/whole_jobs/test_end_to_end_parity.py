"""Compare whole jobs over JPEGs with transformers: equal floats from the same crop, close ones from the JPEG.

Also check that a job may use any image size and output that its checkpoint allows, and that others are refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import skimage
import torch
import transformers
import yaml
from PIL import Image
from torch import Tensor

from img2parquet.cli import main
from img2parquet.engine.driver import run
from img2parquet.images.decode import decode
from img2parquet.images.preprocess import Preprocessor
from img2parquet.inference import steps
from img2parquet.job import parse_job
from img2parquet.models import ModelSpec, read_card
from img2parquet.results.reader import open_results
from img2parquet.schema import Pixels
from tests.models import oracle
from tests.models.test_beit import TINY as BEIT
from tests.models.test_bit import TINY as BIT
from tests.models.test_levit import TINY as LEVIT
from tests.models.test_vit_msn import TINY as VIT_MSN

SIDE = 64
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OUTPUTS = [{"kind": "embedding"}, {"kind": "logits"}]
Uint8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """One family: a tiny classifier, its published processor at a small size, and the reference's outputs."""

    architecture: str
    config: dict[str, Any]
    processor: str
    geometry: dict[str, Any]
    embedding: Callable[[Any], Tensor]  # of the base model's output
    base: str
    pixels_within: int  # levels from Pillow's resize: 2 where the aspect ratio is kept, 8 where it is squashed
    forward: dict[str, Any] = field(default_factory=dict)  # at other sizes


CASES = {
    "levit": Case(
        "LevitForImageClassificationWithTeacher",
        LEVIT,
        "LevitImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_size": SIDE, "resample": 3, **IMAGENET},
        lambda out: out.pooler_output,
        "levit",
        2,
    ),
    "beit": Case(
        "BeitForImageClassification",
        {**BEIT, "image_size": SIDE, "use_relative_position_bias": True},
        "BeitImageProcessor",
        {"size": SIDE, "resample": 2, "do_center_crop": False, **HALF},
        lambda out: out.pooler_output,
        "beit",
        8,
    ),
    "vit_msn": Case(
        "ViTMSNForImageClassification",
        {**VIT_MSN, "image_size": SIDE},
        "ViTImageProcessor",
        {"size": SIDE, "resample": 2, **IMAGENET},
        lambda out: out.last_hidden_state[:, 0],
        "vit",
        8,
        {"interpolate_pos_encoding": True},
    ),
    "bit": Case(
        "BitForImageClassification",
        BIT,
        "BitImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_size": SIDE, "resample": 2, **HALF},
        lambda out: out.pooler_output.flatten(1),
        "bit",
        2,
    ),
}
SIZES: dict[str, list[Any]] = {
    "levit": [[50, 61]],  # the same grid after four convolutions
    "beit": [96, [32, 80], 100],  # 100 is cut: 4 of its pixels fill no patch
    "vit_msn": [[64, 96], 40, [64, 90]],
    "bit": [71, [33, 97]],
}
IMPOSSIBLE: list[tuple[str, Any, str]] = [
    ("levit", 80, "4x4 grid"),
    ("beit", 7, "smaller than a patch, 8x8"),
    ("vit_msn", [64, 5], "smaller than a patch, 8x8"),
    ("bit", 0, "at least 1"),
]


def photographs() -> dict[str, bytes]:
    """Cut JPEGs of many shapes from the photographs in scikit-image's wheel; return their bytes by key."""
    shapes = [(270, 450), (300, 170), (97, 260), (300, 300), (290, 199), (130, 131), (64, 64), (60, 90)]
    found = {}
    for name in ("astronaut", "chelsea", "coffee"):
        photo = Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png").convert("RGB")
        for n, (height, width) in enumerate(shapes):
            left, top = (photo.width - width) * n // 7, (photo.height - height) * (n % 3) // 2
            sink = io.BytesIO()
            photo.crop((left, top, left + width, top + height)).save(sink, "JPEG", quality=92)
            found[f"{name}{n}.jpg"] = sink.getvalue()
    return found


@dataclass(frozen=True)
class Made:
    folder: Path
    images: dict[str, bytes]
    models: dict[str, Any] = field(default_factory=dict)

    def checkpoint(self, architecture: str, family: str) -> tuple[Path, Any]:
        """A seeded checkpoint on disk, and the reference's model of it."""
        case, folder = CASES[family], self.folder / architecture
        if architecture not in self.models:
            kind = getattr(transformers, architecture)
            self.models[architecture] = kind(kind.config_class(**case.config))
            oracle.saved(self.models[architecture], folder)
            (folder / "preprocessor_config.json").write_text(json.dumps(processor_config(case)))
        return folder, self.models[architecture]

    def job(self, checkpoint: Path, out: Path, outputs: list[dict[str, Any]], **model: Any) -> dict[str, Any]:
        return {
            "input": {"kind": "folder", "uris": [str(self.folder / "images")]},
            "models": [{"model": str(checkpoint), "name": "m", "outputs": outputs, **model}],
            "output": {"uri": str(out)},
            "dtype": "float32",
            "resources": {"workers": 1, "batch_size": 5},
        }


def processor_config(case: Case) -> dict[str, Any]:
    return {"image_processor_type": case.processor, **case.geometry}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, images = tmp_path_factory.mktemp("parity"), photographs()
    (folder / "images").mkdir()
    for name, data in images.items():
        (folder / "images" / name).write_bytes(data)
    return Made(folder, images)


def written(document: dict[str, Any]) -> tuple[list[str], dict[str, Tensor]]:
    """Run the job in this process; return the keys and vector columns."""
    run(parse_job(document), "local")
    table = open_results(document["output"]["uri"]).to_table()
    columns = {name: torch.tensor(np.stack(table[name].to_numpy())) for name in ("embedding", "logits")}
    return table["key"].to_pylist(), columns


def crop(checkpoint: Path, data: bytes, image_size: Any = None) -> Uint8:
    size = tuple(image_size) if isinstance(image_size, list) else image_size
    pixels = decode(data)
    assert isinstance(pixels, Pixels)
    found = Preprocessor(read_card(ModelSpec(str(checkpoint), image_size=size)).preprocess)(pixels)
    assert isinstance(found, np.ndarray)
    return found


def reference(case: Case, model: Any, crops: list[Uint8], **forward: Any) -> dict[str, Tensor]:
    """Compute crops with transformers, normalised by its own processor."""
    processor = getattr(transformers, case.processor + "Pil").from_dict(processor_config(case))
    x_BCHW = processor(crops, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    base = oracle.reference(getattr(model, case.base), x_BCHW, **forward)
    logits = oracle.reference(model, x_BCHW, **forward).logits
    return {"embedding": case.embedding(base), "logits": logits}


def centred_cosines(mine_BD: Tensor, theirs_BD: Tensor) -> Tensor:
    """Return the cosine of each pair after subtracting the mean over the images, which all embeddings share."""
    mean_D = theirs_BD.mean(0)
    return torch.nn.functional.cosine_similarity(mine_BD - mean_D, theirs_BD - mean_D)


@pytest.mark.parametrize("family", CASES)
def test_columns_are_what_the_reference_makes_of_the_same_crops(family: str, made: Made, tmp_path: Path) -> None:
    case = CASES[family]
    folder, model = made.checkpoint(case.architecture, family)
    keys, columns = written(made.job(folder, tmp_path / "out", OUTPUTS))
    assert len(keys) == len(made.images)
    crops = [crop(folder, data) for data in (made.images[key] for key in keys)]
    assert crops[0].shape == (SIDE, SIDE, 3)
    oracle.agree(columns, reference(case, model, crops))


@pytest.mark.parametrize("family", CASES)
def test_from_the_jpeg_with_the_references_own_pil_processor(family: str, made: Made, tmp_path: Path) -> None:
    """Measured here: pixels within 2 (LeViT, bicubic) and 1, cosines above 0.9999. Noisier and larger pictures that are
    squashed differ by up to 12, because Pillow exchanges its two passes for some shapes (tests/images).
    A crop that lies one pixel off gives a cosine below 0.8."""
    case = CASES[family]
    folder, model = made.checkpoint(case.architecture, family)
    keys, columns = written(made.job(folder, tmp_path / "out", OUTPUTS))
    processor = getattr(transformers, case.processor + "Pil").from_pretrained(folder)
    theirs = []
    for data in (made.images[key] for key in keys):
        image = Image.open(io.BytesIO(data))
        exact = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0].transpose(1, 2, 0)
        difference = np.abs(crop(folder, data).astype(int) - exact.astype(int))
        assert difference.max() <= case.pixels_within
        theirs.append(exact.astype(np.uint8))
    expected = reference(case, model, theirs)
    cosines_B = centred_cosines(columns["embedding"], expected["embedding"])
    assert cosines_B.min() >= 0.999


@pytest.mark.parametrize(("family", "size"), [(family, size) for family in SIZES for size in SIZES[family]], ids=str)
def test_any_size_that_the_architecture_allows(family: str, size: Any, made: Made, tmp_path: Path) -> None:
    case = CASES[family]
    folder, model = made.checkpoint(case.architecture, family)
    keys, columns = written(made.job(folder, tmp_path / "out", OUTPUTS, image_size=size))
    crops = [crop(folder, data, size) for data in (made.images[key] for key in keys)]
    assert crops[0].shape[:2] == (tuple(size) if isinstance(size, list) else (size, size))
    oracle.agree(columns, reference(case, model, crops, **case.forward))


def refused(document: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a job that must be refused, with exit code 2, one error and nothing written; return the error's text."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    capsys.readouterr()  # what making the checkpoint said
    assert main(["run", str(path), "--runner", "local"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("error: ") == 1 and "Traceback" not in said.err
    assert not Path(document["output"]["uri"]).exists()
    return said.err


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if an image is read."""
    from img2parquet.read.folder import Folder

    monkeypatch.setattr(steps, "decode", lambda *_: pytest.fail("decoded an image"))
    monkeypatch.setattr(Folder, "read", lambda *_: pytest.fail("read a part"))


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("family", "size", "words"), IMPOSSIBLE, ids=str)
def test_other_sizes_are_refused_before_anything_is_read(
    family: str, size: Any, words: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made.checkpoint(CASES[family].architecture, family)
    said = refused(made.job(folder, tmp_path / "out", OUTPUTS, image_size=size), tmp_path, capsys)
    assert words in said and str(size[0] if isinstance(size, list) else size) in said


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("architecture", "family", "output", "lacks", "gives"),
    [
        ("ViTMSNModel", "vit_msn", {"kind": "labels"}, "`logits`", "pooled:mean"),
        ("BeitForImageClassification", "beit", {"kind": "segmentation"}, "`segmentation`", "logits"),
        ("LevitForImageClassificationWithTeacher", "levit", {"kind": "segmentation"}, "`segmentation`", "logits:cls"),
        ("BeitForMaskedImageModeling", "beit", {"kind": "embedding"}, "`pooled`", "pooled:mean"),
        ("BitForImageClassification", "bit", {"kind": "tokens"}, "`tokens`", "feature_maps:stage1"),
        ("LevitModel", "levit", {"kind": "loss", "truth": "class"}, "`logits`", "tokens:0"),
    ],
)
def test_outputs_that_a_checkpoint_cannot_give_are_refused_with_those_it_can(
    architecture: str,
    family: str,
    output: dict[str, Any],
    lacks: str,
    gives: str,
    made: Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = made.checkpoint(architecture, family)
    document = made.job(folder, tmp_path / "out", [output])
    document["input"]["keep"] = ["class"]
    said = refused(document, tmp_path, capsys)
    assert f"output `{output['kind']}` needs {lacks}, which model `m` ({family}) does not give" in said
    assert gives in said.partition("known: ")[2]
