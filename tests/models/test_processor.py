"""A checkpoint's image processor is found wherever it lies, and what is assumed is said aloud."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from img2parquet.errors import CheckpointError
from img2parquet.inference.embed_images import embed
from img2parquet.job import parse_job
from img2parquet.models import ModelSpec, load_model, read_card
from img2parquet.models.external import TRANSFORMERS
from img2parquet.models.processor import open_processor, read_processor
from img2parquet.run_identity import identity
from tests.models import oracle
from tests.models.test_external import TABLE
from tests.models.test_external import made as external_made
from tests.models.test_hub import REPO, cache, lay_out  # noqa: F401 - a fixture
from tests.models.test_wrong_files import as_uri

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
NATIVE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "beit": ("BeitConfig", "BeitModel", {**SMALL, "intermediate_size": 20}),
    "bit": ("BitConfig", "BitModel",
            {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16, "num_groups": 4}),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", {**SMALL, "intermediate_size": 20}),
    "dinov2": ("Dinov2Config", "Dinov2Model", SMALL),
    "levit": ("LevitConfig", "LevitModel", {"image_size": 64, "hidden_sizes": [16, 24, 32], "depths": [1, 1, 1],
              "num_attention_heads": [1, 2, 2], "key_dim": [8, 8, 8]}),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {**SMALL, "intermediate_size": 20}),
    "vit": ("ViTConfig", "ViTModel", {**SMALL, "intermediate_size": 20}),
    "vit_msn": ("ViTMSNConfig", "ViTMSNModel", {**SMALL, "intermediate_size": 20}),
}  # fmt: skip
ALL = [*NATIVE, *(f"transformers:{name}" for name in TABLE)]
SAID = {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7], "resample": 3}
MAIN = {"image_processor_type": "ViTImageProcessor", **SAID}
OTHER = {**MAIN, "image_mean": [0.5, 0.5, 0.5]}


def model_of(name: str, folder: Path) -> str:
    """Save a small model of a family, without an image processor."""
    library, _, kind = name.rpartition(":")
    if library:
        external_made(kind, folder)
        (folder / "preprocessor_config.json").unlink()
        return f"transformers:{folder}"
    config, model, settings = NATIVE[kind]
    oracle.saved(getattr(transformers, model)(getattr(transformers, config)(**settings)), folder)
    return str(folder)


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ALL)
def test_where_settings_lie(name: str, tmp_path: Path) -> None:
    """transformers 5 nests the image processor in processor_config.json, and reads that file first."""
    model = model_of(name, tmp_path)
    silent = read_card(ModelSpec(model, image_size=64))
    assert [note for note in silent.notes if note.startswith("no preprocessor_config.json: the defaults of")]
    nested = {"image_processor": MAIN, "processor_class": "CLIPProcessor"}
    for written in (
        {"preprocessor_config.json": MAIN},
        {"processor_config.json": nested},
        {"processor_config.json": nested, "preprocessor_config.json": OTHER},
        {"processor_config.json": {"processor_class": "CLIPProcessor"}, "preprocessor_config.json": MAIN},
        {"preprocessor_config.json": {"image_processor": MAIN}},
    ):
        for path in tmp_path.glob("*processor_config.json"):
            path.unlink()
        for file, content in written.items():
            write(tmp_path, file, content)
        card = read_card(ModelSpec(model, image_size=64))
        assert (card.preprocess.mean, card.preprocess.resample) == ((0.1, 0.2, 0.3), "bicubic"), written
        assert not [note for note in card.notes if "processor_config.json" in note]


def test_a_nested_processor_behind_a_uri_and_on_the_hub(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    folder = tmp_path / "ckpt"
    model_of("vit", folder)
    write(folder, "processor_config.json", {"image_processor": MAIN})
    lay_out(cache, folder)
    for model in (as_uri(folder, monkeypatch, tmp_path), REPO, f"transformers:{REPO}"):
        assert read_card(model).preprocess.mean == (0.1, 0.2, 0.3)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    write(tmp_path, "processor_config.json", {"image_processor": {**MAIN, "resample": 9}})
    with pytest.raises(CheckpointError, match=r"^processor_config.json: `resample` is 9"):
        open_processor(tmp_path, {}, "-")
    write(tmp_path, "processor_config.json", {"image_processor": ["ViT"]})
    with pytest.raises(CheckpointError, match=r"^processor_config.json: `image_processor` is \['ViT'\]"):
        open_processor(tmp_path, {}, "-")


@pytest.mark.parametrize(
    ("config", "size_HW"),
    [
        ({"image_size": 48}, (48, 48)),
        ({"image_size": [40, 48]}, (40, 48)),
        ({"vision_config": {"image_size": 32}}, (32, 32)),
        ({}, (224, 224)),
    ],
)
def test_without_a_file_the_config_has_the_size(config: dict[str, Any], size_HW: tuple[int, int]) -> None:
    found = read_processor(None, config, "ViTImageProcessor")
    assert found.settings.size_HW == size_HW
    assert f"{size_HW[0]}x{size_HW[1]}, bilinear, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)" in found.notes[0]
    with pytest.raises(CheckpointError, match="image_size"):
        read_processor(None, {"image_size": [1, 2, 3]}, "ViTImageProcessor")


def test_nulls_of_steps_that_are_done_are_said() -> None:
    found = read_processor({**MAIN, "image_mean": None, "crop_size": None, "do_rescale": None}, {}, "-")
    assert found.settings.mean == (0.5,) * 3 and found.settings.rescale_factor == 1.0
    assert found.notes == ("preprocessor_config.json: `image_mean` is null: the default of ViTImageProcessor is used",)


def test_segformer_s_class_never_crops() -> None:
    written = {**MAIN, "image_processor_type": "SegformerImageProcessor", "do_center_crop": True, "crop_size": 16}
    theirs = transformers.SegformerImageProcessorPil.from_dict(written)(Image.new("RGB", (50, 60)))["pixel_values"][0]
    assert read_processor(written, {}, "-").settings.size_HW == theirs.shape[1:] == (32, 32)


def test_convnext_without_a_resize_is_refused() -> None:
    with pytest.raises(CheckpointError, match="different sizes"):
        read_processor({"image_processor_type": "ConvNextImageProcessor", "do_resize": False}, {}, "-")


def test_every_architecture_has_a_known_processor() -> None:
    for name, kind in TRANSFORMERS.items():
        size = 64 if "Mask" in kind.processor else None
        assert read_processor(None, {}, kind.processor, size).settings.size_HW, name


# --- preprocess: pil ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model_of("vit", tmp_path / "vit")
    write(tmp_path / "vit", "preprocessor_config.json", MAIN)
    return tmp_path / "vit"


def job_with(mode: str | None, model: Path | str, folder: Path) -> Any:
    return parse_job({
        "input": {"kind": "folder", "uris": [str(folder)]},
        "models": [{"model": str(model), "outputs": [{"kind": "embedding"}]}],
        "output": {"uri": str(folder / "out")}, **({"preprocess": mode} if mode else {}),
    })  # fmt: skip


@pytest.mark.parametrize("library", ["", "transformers:"])
def test_a_job_s_mode_reaches_the_card_and_the_identity(library: str, checkpoint: Path, tmp_path: Path) -> None:
    said = {}
    for mode in (None, "exact", "fast", "pil"):
        job = job_with(mode, f"{library}{checkpoint}", tmp_path)
        card = read_card(job.spec_of(job.models[0]))
        assert card.preprocess.pixels == ("pil" if mode == "pil" else "torchvision")
        assert any("PIL backend" in note for note in card.notes) == (mode == "pil")
        said[mode] = identity(job, job.models[0], card, "float32")["preprocess"]
    assert said[None] == said["exact"] and "pixels" not in said["exact"] and said["exact"]["mode"] == "exact"
    assert (said["pil"]["mode"], said["pil"]["pixels"]) == ("pil", "pil")
    assert said["pil"]["backend"].startswith("pillow") and said["exact"]["backend"].startswith("torch")


def test_models_and_embed_in_python(checkpoint: Path) -> None:
    """The reference is transformers' own processor and model."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    processor = transformers.ViTImageProcessorPil.from_pretrained(checkpoint)
    reference = transformers.ViTModel.from_pretrained(checkpoint)
    x = processor([image], return_tensors="pt")["pixel_values"]
    theirs = oracle.reference(reference, x).last_hidden_state[:, 0]
    pil = load_model(str(checkpoint), preprocess="pil")
    assert oracle.distance(pil([image], wants=["pooled:cls"])["pooled:cls"], theirs) < 1e-5
    vectors = embed([image], str(checkpoint), pool="cls", preprocess="pil", dtype="float32", device="cpu")
    assert np.allclose(vectors, embed([image], pil, pool="cls")) and np.allclose(vectors, theirs.numpy(), atol=1e-5)
    exact = load_model(str(checkpoint))
    assert not np.allclose(vectors, embed([image], exact, pool="cls"), atol=1e-5)
    with pytest.raises(Exception, match='preprocess="pil"'):
        embed([image], exact, preprocess="pil")
    with pytest.raises(Exception, match="must be given in the ModelSpec"):
        load_model(ModelSpec(str(checkpoint)), preprocess="pil")


def test_a_whole_job_with_pil_s_pixels(checkpoint: Path, tmp_path: Path) -> None:
    import img2parquet

    (tmp_path / "in").mkdir()
    images = [Image.effect_noise((90, 50 + k), 90).convert("RGB") for k in range(2)]
    for k, image in enumerate(images):
        image.save(tmp_path / "in" / f"{k}.png")
    job = job_with("pil", checkpoint, tmp_path / "in").model_copy(update={"dtype": "float32"})
    job = parse_job({**job.model_dump(mode="json"), "output": {"uri": str(tmp_path / "out")}})
    assert img2parquet.run(job, runner="local").rows_written == {"vit": 2}
    table = img2parquet.open_results(str(tmp_path / "out")).to_table().sort_by("key")
    expected = load_model(str(checkpoint), preprocess="pil")(images).pooled.numpy()
    assert np.allclose(np.stack(table["embedding"].to_numpy(zero_copy_only=False)), expected, atol=1e-5)
    record = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert record["job"]["preprocess"] == "pil"
    shutil.rmtree(tmp_path / "out")
