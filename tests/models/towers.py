"""Compare both towers of CLIP and SigLIP with transformers, and make small tokenizers for them.

Shapes: B batch, C channels, H W image, T tokens of a prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from img2parquet.images.preprocess import Preprocessor
from img2parquet.models.processor import read_processor
from img2parquet.models.two_towers import TextTower
from img2parquet.schema import Pixels
from tests.harness.golden.crop_sources import SIZES_HW, picture
from tests.models import oracle

TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TINY_TEXT: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 29, "vocab_size": 640,
    "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def expected(model: Any, x_BCHW: Tensor, **asked: Any) -> dict[str, Tensor]:
    """Map the reference's outputs for images to our names."""
    with torch.no_grad():
        tower = getattr(model, "vision_model", model)
        out = tower(x_BCHW, output_hidden_states=True, output_attentions=True, **asked)
        found = {f"tokens:{k}": state for k, state in enumerate(out.hidden_states)}
        found |= {f"attentions:{k}": weights for k, weights in enumerate(out.attentions)}
        last, first = out.last_hidden_state, int(model.config.model_type.startswith("clip"))
        found |= {"tokens": last, "pooled:mean": last[:, first:].mean(dim=1)} | (
            {"pooled:cls": last[:, 0]} if first else {}
        )
        if out.pooler_output is not None:
            found |= {"pooled:tower": out.pooler_output, "pooled": out.pooler_output}
        if hasattr(model, "get_image_features"):
            found["pooled"] = model.get_image_features(x_BCHW, **asked).pooler_output
        elif hasattr(model, "visual_projection"):
            found["pooled"] = model(x_BCHW, **asked).image_embeds
        elif hasattr(model, "classifier"):
            found["logits"] = model(x_BCHW, **asked).logits
    return found


def check_images(model: Any, folder: Path, size_HW: tuple[int, int] | None = None) -> None:
    """Compare every feature, plain and fast, from one saved checkpoint, with the shapes that `gives` promises."""
    config = getattr(model.config, "vision_config", model.config)
    trained = (config.image_size, config.image_size)
    x_BCHW = oracle.pixels(2, size_HW or trained, config.num_channels)
    asked = {"interpolate_pos_encoding": True} if size_HW else {}

    def outputs(model: Any, x_BCHW: Tensor) -> dict[str, Tensor]:
        return expected(model, x_BCHW, **asked)

    theirs = outputs(model, x_BCHW)
    for fast in (False, True):
        backbone = oracle.ours(folder, fast=fast, size_HW=size_HW or trained)
        mine = oracle.run(backbone, x_BCHW, *backbone.gives())
        assert {name: tuple(tensor.shape[1:]) for name, tensor in mine.items()} == backbone.gives()
        assert mine.keys() == theirs.keys()
        oracle.agree_to_rounding(mine, theirs, outputs, model, x_BCHW)
        # without attentions the fast form takes its other path
        names = [name for name in theirs if not name.startswith("attentions")]
        alone = oracle.run(backbone, x_BCHW, *names)
        oracle.agree_to_rounding(alone, {name: theirs[name] for name in names}, outputs, model, x_BCHW)


def prompts(config: Any, batch: int = 3, seed: int = 5) -> Tensor:
    """Return random token ids of prompts of several lengths, ended and padded, ids_BT."""
    T, generator = config.max_position_embeddings, torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, config.vocab_size - 1, (batch, T), generator=generator)
    for row, length in enumerate(torch.randint(1, T, (batch,), generator=generator).tolist()):
        legacy = config.model_type.startswith("clip") and config.eos_token_id == 2
        ids_BT[row, length] = config.vocab_size - 1 if legacy else config.eos_token_id % config.vocab_size
        ids_BT[row, length + 1 :] = config.pad_token_id
    return ids_BT


def check_texts(model: Any, folder: Path) -> None:
    """Compare the text towers, plain and fast, on random prompts; and the trained factor and offset."""
    ids_BT = prompts(model.config.text_config)

    def outputs(model: Any, ids_BT: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"text": model.get_text_features(ids_BT.long()).pooler_output}

    theirs = outputs(model, ids_BT)
    for fast in (False, True):
        text = oracle.opened(folder, (32, 32)).text(torch.float32, torch.device("cpu"), fast)
        with torch.inference_mode():
            mine = {"text": text.tower(ids_BT)}
        oracle.agree(mine, theirs)
        assert isinstance(text.tower, TextTower) != fast
        assert abs(text.logit_scale - float(model.logit_scale.exp())) < 1e-5
        assert abs(text.logit_bias - float(getattr(model, "logit_bias", torch.zeros(1)))) < 1e-6


def settings_by_section(family: Any, said: dict[str, Any], image: Any) -> dict[str, Any]:
    """Return our settings of both towers by their place in the reference's config: `text_config.vocab_size`."""
    text = family.TEXT.build(said, frozenset({"text_projection.weight", "text_model.head.weight"}))
    assert text is not None
    ours = {"input_size", "num_labels", "has_identity_head", "from_timm", "projection_dim", "embedding_size"}
    found = {
        f"{section}.{name}": getattr(read, name)
        for section, read in (("vision_config", image), ("text_config", text.settings))
        for name in read.__dataclass_fields__
        if name not in ours
    }
    found["num_labels"] = image.num_labels
    if hasattr(image, "projection_dim"):
        assert image.projection_dim == text.settings.embedding_size
        return found | {"projection_dim": image.projection_dim}
    return found | {"text_config.projection_size": text.settings.embedding_size}


def compare_fields(family: Any, theirs: Any, said: dict[str, Any]) -> None:
    """Compare the settings of both towers with the reference's config, one by one."""
    side = theirs.vision_config.image_size
    for name, mine in settings_by_section(family, said, family.read_settings(said, (side, side))).items():
        section, _, field = name.rpartition(".")
        value = getattr(getattr(theirs, section) if section else theirs, field)
        assert mine == ((value, value) if field in ("image_size", "patch_size") else value), name


def check_crops(entry: Any, processor: Any) -> None:
    """Compare the crops of a published checkpoint with those of the reference's PIL backend, bit for bit."""
    read = read_processor(dict(entry.preprocessor), {}, "", pixels="pil").settings
    steps = {**entry.preprocessor, "do_rescale": False, "do_normalize": False}
    theirs = processor(**{name: value for name, value in steps.items() if name != "image_processor_type"})
    for name in SIZES_HW:
        rgb_HWC = picture(name)
        (expected_CHW,) = theirs(Image.fromarray(rgb_HWC), return_tensors="np")["pixel_values"]
        crop_HWC = Preprocessor(read)(Pixels(rgb_HWC))
        assert np.array_equal(crop_HWC, expected_CHW.transpose(1, 2, 0).astype(np.uint8)), name


def clip_tokenizer(folder: Path) -> Any:
    """Save a CLIP tokenizer of bytes and a few merges; its end token has the highest number but `pad`'s."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "ca", "cat</w>", "do", "dog</w>", "re", "red</w>"]
    vocab = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    tokenizer.save_pretrained(folder)
    return tokenizer


def gemma_tokenizer(folder: Path) -> Any:
    """Save SigLIP 2's tokenizer with a small vocabulary, as Gemma's is saved: an end token, no lower-casing."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*"▁abcdefghijklmnopqrstuvwxyz.!ABC", "ca", "cat", "do", "dog"]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g")]
    tokenizer = transformers.Siglip2Tokenizer(vocab=vocab, merges=merges)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocab["<eos>"])]
    )
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(backend.to_str())
    plain["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    said = {"tokenizer_class": "GemmaTokenizer", "pad_token": "<pad>", "eos_token": "<eos>", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return tokenizer


def siglip_tokenizer(folder: Path) -> Any:
    """Save SigLIP's tokenizer, a unigram model over words, whose file neither lower-cases nor drops punctuation."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁a", -1.0), ("▁red", -1.5), ("▁cat", -2.0), ("s", -2.5), (".", -3.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((letter, -9.0) for letter in "▁bcdefghijk")], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "SiglipTokenizer", "pad_token": {"content": "</s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return tokenizer
