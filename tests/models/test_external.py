"""Models that other libraries compute equal the library itself; a table lists them."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import img2parquet
from img2parquet.errors import CheckpointError, Img2ParquetError, MissingDependency, OutputUnavailable, UnknownModel
from img2parquet.job import parse_job
from img2parquet.models import ModelSpec, external, load_model, read_card
from img2parquet.models.processor import read_processor
from img2parquet.run_identity import identity
from tests.models import oracle

VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 8,
    "image_size": 32,
}  # fmt: skip
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 32, "patch_size": 4}
SEGFORMER = {
    "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16, "num_labels": 3,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20,
    "projection_dim": 12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
TABLE: dict[str, tuple[str, str, dict[str, Any], dict[str, str]]] = {  # class, its config's, settings, what is given
    "clip": ("CLIPModel", "CLIPConfig", {"vision_config": {**VIT, "projection_dim": 12}, "projection_dim": 12,
             "text_config": TEXT},
             {"tokens": "last_hidden_state", "pooled": "image_embeds"}),
    "clip_tower": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VIT, "projection_dim": 12},
                   {"tokens": "last_hidden_state", "pooled": "image_embeds"}),
    "siglip_classifier": ("SiglipForImageClassification", "SiglipConfig",
                          {"vision_config": VIT, "text_config": TEXT, "num_labels": 3}, {"logits": "logits"}),
    "clip_classifier": ("CLIPForImageClassification", "CLIPConfig",
                        {"vision_config": VIT, "text_config": TEXT, "num_labels": 3}, {"logits": "logits"}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VIT,
               {"tokens": "last_hidden_state", "pooled": "pooler_output"}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**VIT, "num_labels": 3}, {"logits": "logits"}),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, {"tokens": "last_hidden_state", "pooled": "pooler_output"}),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
                              {**DINO, "num_labels": 3}, {"logits": "logits"}),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "num_register_tokens": 2},
                   {"tokens": "last_hidden_state", "pooled": "pooler_output"}),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {**STAGES, "num_labels": 3}, {"logits": "logits"}),
    "swin": ("SwinForImageClassification", "SwinConfig", {**SWIN, "num_labels": 3}, {"logits": "logits"}),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER, {"segmentation": "logits"}),
}  # fmt: skip
KINDS = {  # further features that each one implies
    "clip": {"pooled", "pooled:cls", "pooled:mean", "tokens", "tokens:2"},
    "siglip": {"pooled", "pooled:mean", "tokens", "tokens:0"},
    "siglip_classifier": {"logits", "pooled", "pooled:mean", "tokens"},
    "clip_classifier": {"logits", "pooled", "pooled:cls", "tokens"},
    "vit": {"pooled", "logits", "tokens:2"},
    "dinov3_vit": {"pooled", "pooled:cls", "tokens"},
    "convnext": {"pooled", "pooled:mean", "logits", "feature_maps:stem", "feature_maps:stage4"},
    "swin": {"pooled", "logits", "feature_maps:stage1"},
    "segformer": {"pooled:mean", "segmentation", "feature_maps:stage4"},
}


def made(name: str, folder: Path) -> tuple[Any, Path]:
    cls, config, settings, _ = TABLE[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings))
    oracle.saved(model, folder)
    squash = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(squash))
    return model, folder


@pytest.mark.parametrize("name", TABLE)
def test_an_architecture_gives_what_its_library_gives(name: str, tmp_path: Path) -> None:
    model, folder = made(name, tmp_path)
    ours = load_model(f"transformers:{folder}")
    pixels_BHWC = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    x_BCHW = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    tower = external.TRANSFORMERS[model.config.model_type].classes[type(model).__name__]
    theirs = oracle.reference(getattr(transformers, tower).from_pretrained(folder), x_BCHW)
    wanted = {mine: getattr(theirs, their) for mine, their in TABLE[name][3].items()}
    everything = ours.forward_pixels(pixels_BHWC, frozenset(ours.card.gives))
    oracle.agree(everything, wanted)
    assert {key: tuple(value.shape[1:]) for key, value in everything.items()} == dict(ours.card.gives)
    assert KINDS.get(name, set()) <= ours.card.gives.keys()
    assert ours.card.implementation == f"reference (transformers {transformers.__version__})"
    assert ours.card == read_card(ModelSpec(f"transformers:{folder}"))


def test_mask2former_s_semantic_maps(tmp_path: Path) -> None:
    """Compare with the processor's own post-processing, at the source's size."""
    backbone = transformers.SwinConfig(
        **SWIN | {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}, out_indices=[1, 2, 3, 4]
    )
    small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, **small, dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_queries=5,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    oracle.saved(model, tmp_path, seed=None)
    ours = load_model(f"transformers:{tmp_path}", image_size=64)
    assert ours.card.gives == {"segmentation": (3, 384, 384)} and len(ours.card.labels) == 3
    pixels_BHWC = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), dtype=np.uint8)
    maps = ours.forward_pixels(pixels_BHWC, frozenset({"segmentation"}))["segmentation"]
    settings = ours.card.preprocess
    x = (torch.from_numpy(pixels_BHWC) / 255 - torch.tensor(settings.mean)) / torch.tensor(settings.std)
    out = oracle.reference(model.eval(), x.permute(0, 3, 1, 2))
    processor = transformers.Mask2FormerImageProcessorPil()
    (theirs,) = processor.post_process_semantic_segmentation(out, target_sizes=[(50, 70)])
    resized = torch.nn.functional.interpolate(maps, size=(50, 70), mode="bilinear", align_corners=False)
    assert (resized[0].argmax(0) == theirs).float().mean() > 0.999


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_native_and_reference_agree(name: str, tmp_path: Path) -> None:
    _, folder = made(name, tmp_path)
    pixels_BHWC = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    native, reference = load_model(str(folder)), load_model(f"transformers:{folder}")
    assert native.card.implementation == "native" and native.card.weights_hash == reference.card.weights_hash
    wants = frozenset({"pooled", "pooled:cls", "pooled:mean", "tokens:1"})
    theirs = reference.forward_pixels(pixels_BHWC, wants)
    oracle.agree(native.forward_pixels(pixels_BHWC, wants), theirs)


def test_the_identity_names_the_library_and_its_version(tmp_path: Path) -> None:
    _, folder = made("dinov3_vit", tmp_path)
    job = job_of(f"transformers:{folder}", tmp_path, [{"kind": "embedding"}])
    said = identity(job, job.models[0], read_card(ModelSpec(f"transformers:{folder}")), "float32")
    assert said["implementation"] == f"reference (transformers {transformers.__version__})"
    assert said["family"] == "transformers/dinov3_vit"
    native = made("dinov2", tmp_path / "native")[1]
    assert "implementation" not in identity(job, job.models[0], read_card(ModelSpec(str(native))), "float32")


def test_random_weights_and_another_dtype() -> None:
    name = "transformers:convnext"
    cards = [read_card(ModelSpec(name, weights=f"random({seed})")) for seed in (3, 3, 4)]
    assert cards[0].weights_hash == cards[1].weights_hash != cards[2].weights_hash
    model, again = (load_model(name, weights="random(3)", image_size=64) for _ in range(2))
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    assert torch.equal(model([image]).pooled, again([image]).pooled)
    half = load_model(name, weights="random(3)", image_size=64, dtype="bfloat16")([image]).pooled
    assert 0 < oracle.distance(half, model([image]).pooled) < 0.1


def test_a_whole_job(tmp_path: Path) -> None:
    _, folder = made("vit", tmp_path / "vit")
    _, towers = made("clip", tmp_path / "clip")
    (tmp_path / "in").mkdir()
    for k in range(3):
        Image.effect_noise((40 + k, 50), 90).convert("RGB").save(tmp_path / "in" / f"{k}.jpg")
    job = parse_job({
        "input": {"kind": "folder", "uris": [str(tmp_path / "in")]},
        "models": [
            {"model": f"transformers:{folder}", "outputs": [{"kind": "labels", "top_k": 2}, {"kind": "tokens"}]},
            {"model": f"transformers:{towers}", "outputs": [{"kind": "embedding", "normalize": "l2"}]},
        ],
        "output": {"uri": str(tmp_path / "out")},
        "dtype": "float32",
    })  # fmt: skip
    assert [model.name for model in job.models] == ["vit", "clip"]
    summary = img2parquet.run(job, runner="local")
    assert summary.rows_written == {"vit": 3, "clip": 3}
    table = img2parquet.open_results(str(tmp_path / "out"), model="clip").to_table()
    vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    assert vectors.shape == (3, 12) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_job_names_them_without_secrets(tmp_path: Path) -> None:
    job = job_of("transformers:s3://who:secret@bucket/models/clip-b@main", tmp_path, [{"kind": "embedding"}])
    assert job.models[0].name == "clip-b"
    assert job.models[0].model_dump()["model"] == "transformers:s3://bucket/models/clip-b@main"
    assert job_of("timm:resnet50.a1_in1k", tmp_path, [{"kind": "embedding"}]).models[0].name == "resnet50.a1_in1k"


def test_the_job_that_ships() -> None:
    job = img2parquet.load_job(str(Path(__file__).parents[2] / "jobs" / "embed_clip.yaml"))
    assert [model.name for model in job.models] == ["clip-vit-base-patch32", "dinov2-base"]


def job_of(model: str, folder: Path, outputs: list[dict[str, Any]]) -> Any:
    return parse_job({
        "input": {"kind": "folder", "uris": [str(folder)]}, "models": [{"model": model, "outputs": outputs}],
        "output": {"uri": str(folder / "out")},
    })  # fmt: skip


# --- what is refused ---


def edit(folder: Path, name: str, **changed: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


WRONG: dict[str, tuple[Callable[[Path], Any], type[Img2ParquetError], str]] = {
    "an unknown architecture": (
        lambda f: edit(f, "config.json", model_type="swinn"), UnknownModel, "unknown architecture `swinn`(.|\n)*`swin`"
    ),
    "another head": (
        lambda f: edit(f, "config.json", architectures=["ViTForMaskedImageModeling"]), UnknownModel,
        "architectures: `ViTFor",
    ),
    "another depth": (
        lambda f: edit(f, "config.json", num_hidden_layers=3), CheckpointError, "weights do not fit(.|\n)*missing"
    ),
    "fewer layers": (
        lambda f: edit(f, "config.json", num_hidden_layers=1), CheckpointError, "weights do not fit(.|\n)*unexpected"
    ),
    "another width": (
        lambda f: edit(f, "config.json", intermediate_size=25), CheckpointError, "weights do not fit(.|\n)*misshapen"
    ),
    "a million layers": (
        lambda f: edit(f, "config.json", num_hidden_layers=10**6), CheckpointError, "1000000 layers, more than"
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "no weights"),
    "Flax": (
        lambda f: (f / "model.safetensors").rename(f / "flax_model.msgpack"), CheckpointError, "no longer reads Flax"
    ),
    "a processor that is not known": (
        lambda f: edit(f, "preprocessor_config.json", image_processor_type="FooImageProcessor"),
        CheckpointError, "unknown image processor `FooImageProcessor`",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("break_it", "error", "said"), WRONG.values(), ids=WRONG)
def test_what_is_refused(break_it: Any, error: Any, said: str, tmp_path: Path) -> None:
    _, folder = made("vit", tmp_path)
    break_it(folder)
    with pytest.raises(error, match=said):
        read_card(ModelSpec(f"transformers:{folder}"))


def test_an_output_that_it_cannot_give(tmp_path: Path) -> None:
    _, folder = made("siglip", tmp_path)
    job = job_of(f"transformers:{folder}", tmp_path, [{"kind": "labels"}])
    with pytest.raises(OutputUnavailable, match="needs `logits`, which model"):
        job.models[0].outputs[0].wants(read_card(ModelSpec(f"transformers:{folder}")))


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *more: Any) -> Any:
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *more)

    monkeypatch.setattr(external.importlib, "import_module", without)
    with pytest.raises(MissingDependency, match=r"need the package transformers(.|\n)*img2parquet\[transformers\]"):
        read_card(ModelSpec("transformers:openai/clip-vit-base-patch32"))


# --- processors ---


@pytest.mark.parametrize(
    ("said", "image_size", "expected"),
    [
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, None, ("shortest_edge", 256, (224, 224))),
        ({"size": 224}, None, ("shortest_edge", 256, (224, 224))),
        ({"size": {"shortest_edge": 384}}, None, ("exact", 384, (384, 384))),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 384, ("exact", 384, (384, 384))),
        ({"size": {"shortest_edge": 384}}, 280, ("shortest_edge", 320, (280, 280))),
    ],
)
def test_convnext_crops_below_384(said: dict[str, Any], image_size: Any, expected: Any) -> None:
    found = read_processor({"image_processor_type": "ConvNextFeatureExtractor", **said}, {}, "", image_size).settings
    assert (found.resize, found.resize_height, found.size_HW) == expected


@pytest.mark.parametrize(
    ("kind", "size_HW"),
    [("CLIP", (224, 224)), ("Siglip", (224, 224)), ("Segformer", (512, 512)), ("DINOv3ViT", (224, 224))],
)
def test_defaults_of_the_processors(kind: str, size_HW: tuple[int, int]) -> None:
    """Read the defaults of transformers' class; from its source text if the class itself needs torchvision."""
    found = read_processor({}, {}, f"{kind}ImageProcessor").settings
    assert found.size_HW == size_HW
    theirs = getattr(transformers, f"{kind}ImageProcessorPil", None)
    if kind == "DINOv3ViT":
        assert theirs is None and found.resample == "bilinear"
        return
    assert found.resample == {2: "bilinear", 3: "bicubic"}[int(theirs().resample)]
    assert found.mean == tuple(theirs().image_mean) and found.std == tuple(theirs().image_std)


def test_images_of_every_size_need_one() -> None:
    said = {"image_processor_type": "Mask2FormerImageProcessor", "size": {"shortest_edge": 640, "longest_edge": 2560}}
    with pytest.raises(CheckpointError, match=r"different sizes(.|\n)*image_size: \[512, 512\]"):
        read_processor(said, {}, "")
    assert read_processor(said, {}, "", (384, 512)).settings.size_HW == (384, 512)


# --- timm, by a fake: timm itself imports torchvision, which may not be installed ---


class Net(nn.Module):
    """The part of timm's interface that is used."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 4)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = x.mean(dim=(2, 3))
        return pooled if pre_logits else self.fc(pooled)


CFG = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    def create_model(name: str, pretrained: bool, **arguments: Any) -> Net:
        if arguments.keys() - {"num_classes"}:
            raise TypeError("unexpected keyword")
        return Net()

    stand_in: Any = types.ModuleType("timm")
    stand_in.__version__, stand_in.create_model = "0.0", create_model
    stand_in.is_model, stand_in.list_models = lambda name: name == "net", lambda pattern: ["net"]
    stand_in.get_pretrained_cfg = lambda name: types.SimpleNamespace(to_dict=lambda: CFG)
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    return stand_in


def timm_folder(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file(oracle.randomised(Net()).state_dict(), folder / "model.safetensors")
    said = {"architecture": "net", "num_classes": 4, "label_names": list("abcd"), "pretrained_cfg": CFG}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_timm_from_a_folder(timm: Any, tmp_path: Path) -> None:
    model = load_model(f"timm:{timm_folder(tmp_path)}")
    card = model.card
    assert card.labels == tuple("abcd") and card.family == "timm/net" and card.implementation == "reference (timm 0.0)"
    assert (card.preprocess.resize_height, card.preprocess.size_HW) == (35, (32, 32)) and card.gives["logits"] == (4,)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    net = oracle.randomised(Net())
    theirs = net.fc(net.stem(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).mean((2, 3)))
    oracle.agree(model.forward_pixels(pixels, frozenset({"logits"})), {"logits": theirs})


FLAT = {"input_size": [3, 40, 40], "crop_pct": 0.8, "mean": [0.1, 0.2, 0.3], "std": [0.9], "interpolation": "bilinear"}


@pytest.mark.parametrize("nested", [False, True])
def test_timm_s_settings_lie_flat_or_in_a_section(nested: bool, timm: Any, tmp_path: Path) -> None:
    """Before timm 0.8 they were at the top of config.json, with `labels` for the classes' names."""
    timm_folder(tmp_path)
    said = {"pretrained_cfg": {**FLAT, "label_names": list("wxyz")}} if nested else {**FLAT, "labels": list("wxyz")}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "net", "num_classes": 4, **said}))
    card = read_card(ModelSpec(f"timm:{tmp_path}"))
    settings = card.preprocess
    assert (settings.resize_height, settings.size_HW, settings.resample) == (50, (40, 40), "bilinear")
    assert (settings.mean, settings.std, card.labels) == ((0.1, 0.2, 0.3), (0.9,) * 3, tuple("wxyz"))
    assert not any("timm's defaults" in note for note in card.notes)
    pil = read_card(ModelSpec(f"timm:{tmp_path}", preprocess="pil"))
    assert pil.preprocess == replace(settings, pixels="timm") and "Pillow's" in pil.notes[1]


def test_timm_s_settings_that_are_left_out_are_timm_s_defaults(timm: Any, tmp_path: Path) -> None:
    timm_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "net", "num_classes": 4, "crop_pct": None}))
    card = read_card(ModelSpec(f"timm:{tmp_path}"))
    assert (card.preprocess.resize_height, card.preprocess.size_HW) == (256, (224, 224))
    assert card.preprocess.resample == "bicubic" and card.preprocess.mean == (0.485, 0.456, 0.406)
    assert any("config.json does not say input_size, interpolation, crop_pct" in note for note in card.notes)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"input_size": [2, 32, 32]}, "num_channels: `2`"),
        ({"input_size": 32}, "input_size: `32`"),
        ({"crop_pct": "big"}, "crop_pct: `big`"),
        ({"interpolation": "random"}, "timm's random"),
        ({"crop_mode": "border"}, "crop mode border"),
        ({"mean": "half"}, "`image_mean` is 'half'"),
        ({"pretrained_cfg": [1]}, r"`pretrained_cfg` is \[1\]"),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao weights are not supported"),
    ],
)
def test_timm_s_settings_that_cannot_work(wrong: dict[str, Any], said: str, timm: Any, tmp_path: Path) -> None:
    timm_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "net", "num_classes": 4, **FLAT, **wrong}))
    with pytest.raises(CheckpointError, match=said):
        read_card(ModelSpec(f"timm:{tmp_path}"))


def test_whatever_timm_raises_is_one_error(timm: Any, tmp_path: Path) -> None:
    def raises(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("img_size must divide")

    timm.create_model = raises
    with pytest.raises(CheckpointError, match="timm cannot build it: AssertionError: img_size must divide"):
        read_card(ModelSpec(f"timm:{timm_folder(tmp_path)}"))


def test_a_package_that_cannot_be_imported_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(external.importlib, "import_module", fails)
    with pytest.raises(MissingDependency, match="timm cannot be imported: RuntimeError: operator torchvision::nms"):
        read_card(ModelSpec("timm:resnet18", weights="random(0)"))


def test_timm_that_cannot_be(timm: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"no architecture `nett`(.|\n)*`net`"):
        load_model("timm:nett", weights="random(0)")
    assert load_model("timm:net", weights="random(0)", image_size=40).card.preprocess.size_HW == (40, 40)
    folder = timm_folder(tmp_path)
    torch.save({}, folder / "pytorch_model.bin")
    from safetensors.torch import save_file

    save_file({"stem.bias": torch.zeros(6)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not fit timm's model"):
        read_card(ModelSpec(f"timm:{folder}"))


def test_timm_without_torchvision_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *more: Any) -> Any:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
        return real(name, *more)

    monkeypatch.setattr(external.importlib, "import_module", without)
    with pytest.raises(
        MissingDependency, match=r"the package torchvision, which it needs, is not(.|\n)*matches your torch"
    ):
        read_card(ModelSpec("timm:resnet18", weights="random(0)"))


def test_real_timm() -> None:
    """Runs only where timm can be imported, which needs torchvision."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    for name in ("resnet18", "vit_tiny_patch16_224", "convnext_atto"):
        model = load_model(f"timm:{name}", weights="random(0)", image_size=64)
        settings = model.card.preprocess
        x = (torch.from_numpy(pixels) / 255 - torch.tensor(settings.mean)) / torch.tensor(settings.std)
        theirs = oracle.reference(model.backbone.model, x.permute(0, 3, 1, 2))  # type: ignore[attr-defined]
        oracle.agree(model.forward_pixels(pixels, frozenset({"logits"})), {"logits": theirs})
        assert "pooled" in model.card.gives and timm.__version__ in model.card.implementation
