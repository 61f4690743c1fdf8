"""Prompts become the reference's text vectors, and what no vector should come from is refused, saying what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from img2parquet.errors import CheckpointError, Img2ParquetError, InputError, MissingDependency, OutputUnavailable
from img2parquet.models import load_model
from tests.models import oracle
from tests.models import test_clip as clip
from tests.models import test_siglip as siglip
from tests.models.towers import clip_tokenizer, gemma_tokenizer, siglip_tokenizer

TEXTS = ["a cat", "a Red  DOG, and a cat!", "é", "dog dog"]


def clip_folder(folder: Path, eos: int = 519, **changed: Any) -> tuple[Any, Path]:
    text = {"vocab_size": 520, "eos_token_id": eos, "bos_token_id": 518, "max_position_embeddings": 40, **changed}
    model = clip.reference(text=text)
    return model, oracle.saved(model, folder)


def siglip_folder(folder: Path, **changed: Any) -> tuple[Any, Path]:
    model = siglip.reference(text={"vocab_size": 320, "max_position_embeddings": 40, **changed})
    return model, oracle.saved(model, folder)


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert mine.dtype == torch.float32 and mine.device.type == "cpu"
    oracle.agree({"text": mine}, {"text": theirs})


@pytest.mark.parametrize("eos", [519, 2])
def test_clip(eos: int, tmp_path: Path) -> None:
    """Both rules for the token that is read: config.json's end token, and the highest number."""
    model, folder = clip_folder(tmp_path, eos)
    tokens = clip_tokenizer(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model.get_text_features(**tokens).pooler_output
    for fast in (False, True):
        ours = load_model(str(folder), fast=fast)
        close(ours.text_features(TEXTS), theirs)
        close(ours.text_features(TEXTS[1:2]), theirs[1:2])


def test_siglip_2(tmp_path: Path) -> None:
    model, folder = siglip_folder(tmp_path)
    lower = [text.lower() for text in TEXTS]
    ids = gemma_tokenizer(folder)(lower, add_special_tokens=False)["input_ids"]
    padded = torch.tensor([[*row, 1, *[0] * (39 - len(row))] for row in ids])
    with torch.no_grad():
        theirs = model.get_text_features(padded).pooler_output
    close(load_model(str(folder)).text_features(TEXTS), theirs)


def test_siglip(tmp_path: Path) -> None:
    """Lower case without punctuation, ended once, and padded with the end token."""
    model, folder = siglip_folder(tmp_path)
    siglip_tokenizer(folder)
    padded = torch.tensor([[2, 3, 4, 5, *[1] * 36], [4, *[1] * 39]])
    with torch.no_grad():
        theirs = model.get_text_features(padded).pooler_output
    close(load_model(str(folder)).text_features(["A  Red. cats!", "cat"]), theirs)


def test_scores_are_the_reference_s(tmp_path: Path) -> None:
    for name in ("clip", "siglip"):
        folder = tmp_path / name
        model, _ = clip_folder(folder) if name == "clip" else siglip_folder(folder, projection_size=32)
        (clip_tokenizer if name == "clip" else gemma_tokenizer)(folder)
        ours = load_model(str(folder))
        ids_BT, x_BCHW = ours.text.tokenizer(TEXTS), oracle.pixels(2, (32, 32))
        with torch.no_grad():
            theirs = model(input_ids=ids_BT, pixel_values=x_BCHW).logits_per_image
        images = oracle.run(ours.backbone, x_BCHW, "pooled")["pooled"]
        cosines = torch.nn.functional.cosine_similarity(images[:, None], ours.text_features(TEXTS)[None], dim=-1)
        oracle.agree({"scores": cosines * ours.text.logit_scale + ours.text.logit_bias}, {"scores": theirs})


def test_a_file_that_cuts_and_pads_does_neither_here(tmp_path: Path) -> None:
    _, folder = clip_folder(tmp_path)
    clip_tokenizer(folder)
    before = load_model(str(folder)).text_features(TEXTS)
    said = json.loads((folder / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0}
    said |= {"truncation": cut, "padding": {**pad, "pad_token": "x"}}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    assert torch.equal(load_model(str(folder)).text_features(TEXTS), before)


def test_more_prompts_than_one_batch(tmp_path: Path) -> None:
    _, folder = clip_folder(tmp_path)
    clip_tokenizer(folder)
    ours = load_model(str(folder))
    many = ours.text_features([f"a cat {number}" for number in range(70)])
    assert many.shape == (70, 20)
    oracle.agree({"last": many[69:]}, {"last": ours.text_features(["a cat 69"])})


REFUSED = [
    ([], InputError, "no prompt"),
    ("a cat", InputError, "a list of strings"),
    (["a cat", None], InputError, "a list of strings"),
    (["a cat", " \n"], InputError, r"texts\[1\]: the prompt is empty"),
    (
        ["cat " * 39],
        InputError,
        r"texts\[0\]: `cat cat(.|\n)*\.\.\.`: 41 tokens, its ends included; the model reads 40",
    ),
    (["a<|endoftext|>cat"], InputError, r"texts\[0\](.|\n)*`<\|endoftext\|>`, which marks a prompt's ends"),
]


@pytest.mark.parametrize(("texts", "error", "said"), REFUSED)
def test_prompts_that_are_refused(texts: Any, error: type[Img2ParquetError], said: str, tmp_path: Path) -> None:
    _, folder = clip_folder(tmp_path)
    clip_tokenizer(folder)
    with pytest.raises(error, match=said):
        load_model(str(folder)).text_features(texts)


def test_the_longest_prompt_is_read_whole(tmp_path: Path) -> None:
    model, folder = clip_folder(tmp_path)
    tokens = clip_tokenizer(folder)(["cat " * 38], return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 40)
    with torch.no_grad():
        close(load_model(str(folder)).text_features(["cat " * 38]), model.get_text_features(**tokens).pooler_output)


def test_a_prompt_of_which_nothing_is_left(tmp_path: Path) -> None:
    _, folder = siglip_folder(tmp_path)
    siglip_tokenizer(folder)
    with pytest.raises(InputError, match=r"texts\[0\]: `!\?`: the tokenizer leaves nothing"):
        load_model(str(folder)).text_features(["!?"])


def test_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    _, folder = clip_folder(tmp_path / "none")
    ours = load_model(str(folder))  # images need no tokenizer
    with pytest.raises(CheckpointError, match=r"no tokenizer.json(.|\n)*save_pretrained"):
        ours.text_features(["a cat"])
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer's file"):
        load_model(str(folder)).text_features(["a cat"])
    _, folder = clip_folder(tmp_path / "larger", vocab_size=500, eos=499)
    clip_tokenizer(folder)
    with pytest.raises(CheckpointError, match=r"of another model: it has 520 tokens(.|\n)*knows 500 tokens"):
        load_model(str(folder)).text_features(["a cat"])
    _, folder = clip_folder(tmp_path / "smaller", vocab_size=700, eos=699)
    clip_tokenizer(folder)
    with pytest.raises(CheckpointError, match=r"ends in 519(.|\n)*end in 699"):
        load_model(str(folder)).text_features(["a cat"])
    _, folder = siglip_folder(tmp_path / "gemma", vocab_size=100)
    gemma_tokenizer(folder)
    with pytest.raises(CheckpointError, match="of another model"):
        load_model(str(folder)).text_features(["a cat"])


def test_models_without_a_text_tower(tmp_path: Path) -> None:
    tower = clip.reference("CLIPVisionModelWithProjection")
    with pytest.raises(OutputUnavailable, match=r"has no text tower(.|\n)*a whole CLIP or SigLIP"):
        load_model(str(oracle.saved(tower, tmp_path / "tower"))).text_features(["a cat"])
    with pytest.raises(OutputUnavailable, match="has no text tower"):
        load_model("facebook/levit-128S", weights="random(0)").text_features(["a cat"])
    _, folder = clip_folder(tmp_path / "whole")
    with pytest.raises(OutputUnavailable, match=r"has no text tower(.|\n)*leave out the prefix `transformers:`"):
        load_model(f"transformers:{folder}", image_size=32).text_features(["a cat"])
    with pytest.raises(CheckpointError, match="random weights have no tokenizer"):
        load_model("openai/clip-vit-base-patch32", weights="random(0)").text_features(["a cat"])


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = clip_folder(tmp_path)
    clip_tokenizer(folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependency, match=r"need the package tokenizers(.|\n)*img2parquet\[text\]"):
        load_model(str(folder)).text_features(["a cat"])


def test_half_precision(tmp_path: Path) -> None:
    _, folder = clip_folder(tmp_path)
    clip_tokenizer(folder)
    exact = load_model(str(folder)).text_features(TEXTS)
    drifted = load_model(str(folder), dtype="bfloat16").text_features(TEXTS)
    assert drifted.dtype == torch.float32 and 1e-5 < oracle.distance(drifted, exact) < 0.05


def test_the_library_reads_the_same_folder(tmp_path: Path) -> None:
    """The folder that is native here still goes through transformers with the prefix, with the same image vector."""
    model, folder = clip_folder(tmp_path)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, theirs = load_model(str(folder), image_size=32), load_model(f"transformers:{folder}", image_size=32)
    wants = frozenset({"pooled", "pooled:cls", "pooled:mean", "tokens", "tokens:1"})
    oracle.agree(ours.forward_pixels(pixels, wants), theirs.forward_pixels(pixels, wants))
    assert ours.card.weights_hash == theirs.card.weights_hash and isinstance(model, transformers.CLIPModel)
