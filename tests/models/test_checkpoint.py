"""Checkpoints fill a module: layouts, dtypes, hashes, and a corpus of checkpoints that must be refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LevitConfig, LevitForImageClassificationWithTeacher, ViTMSNConfig, ViTMSNForImageClassification

from img2parquet.errors import CheckpointError, ModelError, UnknownModel
from img2parquet.models import checkpoint, levit, vit_msn
from tests.models import oracle

SHARDS = ("model-00001-of-00002", "model-00002-of-00002")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViTMSN classifier."""
    config = ViTMSNConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=16, patch_size=8
    )
    return oracle.saved(ViTMSNForImageClassification(config), tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def features(folder: Path) -> Tensors:
    return oracle.run(oracle.ours(folder, fast=False), oracle.pixels(2, (16, 16)), "tokens", "logits")


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path, suffix: str = ".safetensors") -> None:
    """Split the weights into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, base = sorted(tensors), "model" if suffix == ".safetensors" else "pytorch_model"
    halves = names[::2], names[1::2]
    where = {}
    for stem, half in zip(SHARDS, halves, strict=True):
        part, file = {name: tensors[name] for name in half}, stem.replace("model", base) + suffix
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
        where |= dict.fromkeys(half, file)
    (folder / f"{base}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def as_bin(folder: Path, **options: Any) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "sharded": shard,
    "bin": as_bin,
    "old bin": lambda folder: as_bin(folder, _use_new_zipfile_serialization=False),
    "sharded bin": lambda folder: shard(folder, ".bin"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_numbers(layout: str, good: Path, folder: Path) -> None:
    LAYOUTS[layout](folder)
    for name, tensor in features(good).items():
        assert torch.equal(features(folder)[name], tensor)


@pytest.mark.parametrize("change", ["all prefixed", "none prefixed", "mixed"])
def test_the_base_prefix_is_optional_for_each_key(change: str, good: Path, folder: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for count, name in enumerate(sorted(tensors)):
            bare = name.removeprefix("vit.")
            keep = bare.startswith("classifier") or change == "none prefixed" or (change == "mixed" and count % 2)
            tensors[bare if keep else f"vit.{bare}"] = tensors.pop(name)

    rewrite(folder, rename)
    assert torch.equal(features(folder)["logits"], features(good)["logits"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_widths_become_float32_before_folding(dtype: torch.dtype, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    module: Any = oracle.ours(folder, fast=False)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    fast, plain = (oracle.ours(folder, fast=fast) for fast in (True, False))
    mine, theirs = (oracle.run(model, oracle.pixels(2, (16, 16)), "tokens") for model in (fast, plain))
    oracle.agree(mine, theirs)


def test_hash_follows_the_bytes(good: Path, folder: Path) -> None:
    first, copy = (checkpoint.weight_files(path) for path in (good, folder))
    assert first.hash() == copy.hash() and len(first.hash()) == 64
    (folder / "config.json").write_text("{}")
    assert copy.hash() == first.hash()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert copy.hash() != first.hash()


def test_unused_names_are_tolerated(tmp_path: Path) -> None:
    config = LevitConfig(hidden_sizes=[16, 16, 16], num_attention_heads=[1, 1, 1], depths=[1, 1, 1], image_size=32)
    folder = oracle.saved(LevitForImageClassificationWithTeacher(config), tmp_path)
    before = oracle.run(oracle.ours(folder), oracle.pixels(1, (32, 32)), "logits")["logits"]
    index = {"levit.encoder.stages.0.layers.0.module.attention_bias_idxs": torch.zeros(4, 4, dtype=torch.int64)}
    rewrite(folder, lambda tensors: tensors.update(index))
    after = oracle.run(oracle.ours(folder), oracle.pixels(1, (32, 32)), "logits")["logits"]
    assert torch.equal(before, after)


def edit_json(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def index_says(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"weight_map": {"vit.layernorm.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def both_dialects(tensors: Tensors) -> None:
    old = next(name for name in tensors if name.endswith("encoder.layer.0.attention.attention.query.weight"))
    tensors["vit.layers.0.attention.q_proj.weight"] = tensors[old].clone()


FIRST_QUERY = "encoder.layer.0.attention.attention.query.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds list, not an object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights: neither model.safetensors nor"),
    "one missing": (drop(FIRST_QUERY), rf"1 missing: {FIRST_QUERY} \(16, 16\)"),
    "many missing": (lambda f: edit_json(f / "config.json", num_hidden_layers=4), "32 missing: .* and 28 more"),
    "unexpected": (
        lambda f: rewrite(f, lambda t: t.update({"vit.extra.weight": torch.ones(3)})),
        r"1 unexpected: vit.extra.weight \(3,\)",
    ),
    "head without its bias": (drop("classifier.bias"), r"1 missing: classifier.bias \(2,\)"),
    "misshapen": (
        lambda f: edit_json(f / "config.json", intermediate_size=24),
        r"6 misshapen: .*intermediate.dense.bias is \(20,\), config.json makes it \(24,\)",
    ),
    "both dialects": (lambda f: rewrite(f, both_dialects), "both mean `blocks.0.attention.q.weight`"),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({"classifier.bias": torch.zeros(2, dtype=torch.int8)})),
        "`classifier.bias` is I8, not one of",
    ),
    "cut short": (lambda f: cut(f / "model.safetensors", 0.7), "not a whole safetensors file"),
    "cut in the header": (lambda f: cut(f / "model.safetensors", 0.01), "not a whole safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "git-lfs pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git lfs pull",
    ),
    "index outside": (index_says("../outside.safetensors"), "`../outside.safetensors` is outside"),
    "index absolute": (index_says("/etc/passwd"), "`/etc/passwd` is outside"),
    "index to nothing": (index_says("gone.safetensors"), "`gone.safetensors`, which does not exist"),
    "index without a map": (
        lambda f: (shard(f), edit_json(f / "model.safetensors.index.json", weight_map={})),
        "no `weight_map`",
    ),
    "a shard deleted": (lambda f: (shard(f), (f / f"{SHARDS[1]}.safetensors").unlink()), "which does not exist"),
    "in two shards": (
        lambda f: (shard(f), shutil.copy(f / f"{SHARDS[0]}.safetensors", f / f"{SHARDS[1]}.safetensors")),
        "is in two files",
    ),
    "a bin of junk": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(b"\x00junk" * 99)),
        "holds pickled code, or is not a torch file|not a whole torch file",
    ),
    "a bin cut short": (lambda f: (as_bin(f), cut(f / "pytorch_model.bin", 0.5)), "not a whole torch file"),
    "a bin of a list": (
        lambda f: ((f / "model.safetensors").unlink(), torch.save([1, 2], f / "pytorch_model.bin")),
        "not a table of tensors",
    ),
    "wrong model type": (lambda f: edit_json(f / "config.json", model_type="vit-msn"), "did you mean `vit_msn`"),
    "unknown model type": (lambda f: edit_json(f / "config.json", model_type="whisper"), "known: .*levit"),
    "another family": (lambda f: edit_json(f / "config.json", model_type="levit"), "num_attention_heads"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused(case: str, folder: Path) -> None:
    damage, said = BAD[case]
    damage(folder)
    with pytest.raises(ModelError, match=rf"(?s){said}") as caught:
        oracle.opened(folder).card()  # without reading a tensor
    assert isinstance(caught.value, CheckpointError | UnknownModel)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["plain pickle", "torch.save", "inside a table"])
def test_pickled_code_is_never_run(how: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    bomb: Any = {"classifier.bias": Bomb(marker)} if how == "inside a table" else Bomb(marker)
    if how == "plain pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled code(.|\n)*no code was run"):
        features(folder)
    assert not marker.exists()


def test_names_in_every_dialect() -> None:
    to = checkpoint.own_name
    assert to("encoder.layer.11.attention.output.dense.bias", vit_msn.KEYS) == "blocks.11.attention.out.bias"
    assert to("layers.3.mlp.fc1.weight", vit_msn.KEYS) == "blocks.3.mlp.up.weight"
    assert to("encoder.stages.1.layers.4.module.linear_up.batch_norm.weight", levit.KEYS) == "stages.1.4.up.norm.weight"
    assert to("encoder.stages.1.layers.4.keys_values.linear.weight", levit.KEYS) == "stages.1.4.kv.linear.weight"
    assert to("classifier_distill.linear.bias", levit.KEYS) == "heads.distillation.linear.bias"
    assert to("something.else", levit.KEYS) == "something.else"
    assert checkpoint.disk_name("blocks.7.mlp.down.bias", vit_msn.KEYS) == "encoder.layer.7.output.dense.bias"


def test_labels() -> None:
    assert checkpoint.label_names({"id2label": {"10": "k", **{str(n): f"c{n}" for n in range(10)}}})[-1] == "k"
    assert checkpoint.label_names({"num_labels": 3}) == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert checkpoint.num_labels({}) == 2


def test_random_weights_are_seeded() -> None:
    def filled(seed: int) -> Tensors:
        with torch.device("meta"):
            module = vit_msn.build(vit_msn.read_settings({"num_hidden_layers": 1}, (224, 224)), frozenset())
        checkpoint.RandomWeights(seed, "vit_msn", "ViTMSNModel", {}).fill(module, vit_msn)
        return module.state_dict()

    first, again, other = filled(0), filled(0), filled(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.class_11D"], other["embed.class_11D"])
