"""What people have in place of a checkpoint is named, whichever reader, place and library it goes through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from img2parquet.errors import CheckpointError, ModelError, UnknownModel
from img2parquet.models import ModelSpec, external, read_card
from img2parquet.models.flax_checkpoint import read_flax
from img2parquet.models.wrong_files import WRAPPERS
from tests.models import oracle
from tests.models.test_flax_checkpoint import Array, packed
from tests.models.test_hub import COMMIT, REPO, cache, lay_out  # noqa: F401 - a fixture

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 346293852\n"
ANNEX = "/annex/objects/SHA256E-s346293852--" + "a" * 64
PAGE = "\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
READERS = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
LIBRARIES = ("", "transformers:")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=16, patch_size=8
    )
    folder = oracle.saved(ViTForImageClassification(config), tmp_path_factory.mktemp("made"))
    squash = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(squash))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "ckpt"))


def tensors_of(folder: Path) -> Tensors:
    """Take the weights out of a folder."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return tensors


def refusal(model: str, **more: Any) -> str:
    with pytest.raises(ModelError) as caught:
        read_card(ModelSpec(model, **more))
    return str(caught.value)


def as_uri(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Put a folder into fsspec's memory store."""
    monkeypatch.setenv("IMG2PARQUET_CACHE", str(tmp_path / "cache"))
    store: Any = fsspec.filesystem("memory")
    if store.exists("/wrong"):
        store.rm("/wrong", recursive=True)
    for path in folder.iterdir():
        store.pipe(f"/wrong/{path.name}", path.read_bytes())
    return "memory://wrong"


# --- files that stand in for others ---


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", [*READERS, "model.ckpt", "model.pth", "weights.npz", "config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(POINTER, "git lfs pull"), (ANNEX, "git annex get"), (PAGE, "a web page")],
    ids=["lfs", "annex", "html"],
)
def test_a_stand_in_is_named(content: str, said: str, name: str, library: str, folder: Path) -> None:
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(content)
    message = refusal(f"{library}{folder}")
    assert said in message and str(folder / name) in message


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_pointer_in_place_of_settings(name: str, folder: Path) -> None:
    (folder / name).write_text(POINTER)
    assert "git lfs pull" in refusal(str(folder))


@pytest.mark.parametrize("name", [*READERS, "model.ckpt"])
def test_a_pointer_behind_a_uri(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors_of(folder)
    (folder / name).write_text(POINTER)
    assert "git lfs pull" in refusal(as_uri(folder, monkeypatch, tmp_path))


def test_a_pointer_in_the_hub_s_cache(cache: Path, folder: Path) -> None:  # noqa: F811
    tensors_of(folder)
    (folder / "pytorch_model.bin").write_text(POINTER)
    lay_out(cache, folder)
    for library in LIBRARIES:
        assert "git lfs pull" in refusal(library + REPO)


def test_a_pointer_among_shards(folder: Path) -> None:
    (folder / "model-1.safetensors").write_text(POINTER)
    (folder / "model.safetensors").rename(folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "git lfs pull" in refusal(str(folder))


# --- adapters ---


def adapter(folder: Path) -> Path:
    tensors_of(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
    save_file({"base_model.model.vit.q.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
def test_an_adapter_is_named(
    library: str, with_config: bool, folder: Path, made: Path, tmp_path: Path,
    cache: Path, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:  # fmt: skip
    adapter(folder)
    if with_config:
        shutil.copy(made / "config.json", folder)
    lay_out(cache, folder)
    for model in (str(folder), as_uri(folder, monkeypatch, tmp_path), REPO, f"{REPO}@{COMMIT}"):
        message = refusal(library + model)
        assert "LoRA/PEFT" in message and "merge_and_unload" in message, model


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_adapter_that_was_not_merged(library: str, folder: Path) -> None:
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors_of(folder).items()}
    tensors["base_model.model.vit.encoder.layer.0.q.lora_A.default.weight"] = torch.zeros(2, 16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "merge_and_unload" in refusal(f"{library}{folder}")


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_adapter_beside_weights_is_not_looked_at(library: str, folder: Path) -> None:
    before = read_card(f"{library}{folder}")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
    save_file({"q.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    assert read_card(f"{library}{folder}") == before


# --- names ---


def save_as(kind: str, folder: Path, tensors: Tensors) -> None:
    if kind == "model.safetensors":
        save_file(tensors, folder / kind, metadata={"format": "pt"})
    elif kind == "pytorch_model.bin":
        torch.save(tensors, folder / kind)
    else:
        turned = {2: (1, 0), 4: (2, 3, 1, 0)}  # Flax's order of a linear layer and of a convolution
        arrays = {
            name: np.transpose(one.numpy(), turned.get(one.dim(), range(one.dim()))) for name, one in tensors.items()
        }
        (folder / kind).write_bytes(packed({name: Array(array) for name, array in arrays.items()}))


@pytest.mark.parametrize("prefix", [*WRAPPERS, "module._orig_mod.", "model.module."])
@pytest.mark.parametrize("kind", READERS)
def test_a_prefix_is_named(prefix: str, kind: str, folder: Path) -> None:
    save_as(kind, folder, {prefix + name: tensor for name, tensor in tensors_of(folder).items()})
    assert f"begin with `{prefix}`" in refusal(str(folder))


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("kind", READERS[:2])
def test_a_prefix_is_named_to_users_of_transformers(prefix: str, kind: str, folder: Path) -> None:
    save_as(kind, folder, {prefix + name: tensor for name, tensor in tensors_of(folder).items()})
    assert f"begin with `{prefix}`" in refusal(f"transformers:{folder}")


def test_a_misfit_of_another_cause_names_no_prefix(folder: Path) -> None:
    tensors = tensors_of(folder)
    save_file({"model.x": torch.zeros(1), "model.y": torch.zeros(1)}, folder / "model.safetensors")
    assert "begin with" not in refusal(str(folder))
    tensors.pop("vit.layernorm.weight")
    save_file(tensors, folder / "model.safetensors")
    assert "begin with" not in refusal(str(folder))


# --- training checkpoints ---


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "model.pth", "checkpoint.pt"])
def test_a_training_checkpoint_is_named(name: str, key: str, library: str, folder: Path) -> None:
    torch.save({key: tensors_of(folder), "epoch": 3}, folder / name)
    message = refusal(f"{library}{folder}")
    assert "a training checkpoint" in message and f"`{key}`" in message and f'["{key}"]' in message


def test_a_training_checkpoint_with_code(folder: Path) -> None:
    torch.save({"state_dict": tensors_of(folder), "args": Path("x")}, folder / "pytorch_model.bin")
    message = refusal(str(folder))
    assert "pickled code" in message and "under `state_dict`" in message


def test_a_training_state_of_flax(tmp_path: Path) -> None:
    weights = {"dense": {"kernel": Array(np.zeros((2, 2), np.float32))}}
    (tmp_path / "flax_model.msgpack").write_bytes(packed({"step": 7, "params": weights}))
    with pytest.raises(CheckpointError, match=r"a training checkpoint, with tables under `params`"):
        read_flax(tmp_path / "flax_model.msgpack")


# --- other files ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("clip.safetensors", "rename it to `model.safetensors`"),
        ("weights.npz", "NumPy arrays"),
        ("tf_model.h5", "Keras's"),
        ("model.onnx", "exported graph"),
        ("model-q8.gguf", "quantised"),
    ],
)
def test_weights_that_no_reader_looks_for(
    name: str, said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with (folder / name).open("ab") as file:
        file.write(bytes(2000))
    for model in (str(folder), as_uri(folder, monkeypatch, tmp_path)):
        message = refusal(model)
        assert said in message and f"`{name}`" in message and "no weights" in message


# --- what transformers raises ---


class StrangeError(Exception):
    """Nothing that a list of exceptions would name."""


def broken(change: dict[str, Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))

    return damage


BROKEN: dict[str, dict[str, Any]] = {
    "an activation that it does not know": {"hidden_act": "swish7"},
    "a size of another type": {"hidden_size": "sixteen"},
    "heads that do not divide": {"num_attention_heads": 3},
    "no patch": {"patch_size": 0},
    "a list of lists": {"image_size": [[16]]},
    "quantised by bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "quantised by a method that nobody knows": {"quantization_config": {"quant_method": "new", "bits": 3}},
    "quantised, oddly written": {"quantization_config": "int8"},
    "an architecture that is not in a list": {"architectures": {"a": 1}},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_config_that_it_cannot_take_is_one_error(case: str, folder: Path) -> None:
    broken(BROKEN[case])(folder)
    message = refusal(f"transformers:{folder}")
    assert str(folder) in message or "config.json" in message


def test_whatever_the_library_raises_is_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def raises(*args: Any, **kwargs: Any) -> None:
        raise StrangeError("\n\nas nobody foresaw\nmore")

    monkeypatch.setattr(transformers.ViTForImageClassification, "from_pretrained", raises)
    message = refusal(f"transformers:{folder}")
    assert "transformers cannot load it: StrangeError: as nobody foresaw" in message
    monkeypatch.undo()
    monkeypatch.setattr(external, "features_of", raises)
    assert "the model takes no image of 16x16" in refusal(f"transformers:{folder}")


# --- names on the hub, and folders ---


def test_a_folder_named_like_the_organisation(cache: Path, made: Path, tmp_path: Path) -> None:  # noqa: F811
    lay_out(cache, made)
    (tmp_path / "someone").mkdir()
    for library in LIBRARIES:
        assert read_card(library + REPO).source.startswith(f"{REPO}@{COMMIT}")
    shutil.copytree(made, tmp_path / "someone" / "vit-tiny")
    assert read_card(REPO).source == f"{REPO}@{COMMIT}"
    with pytest.raises(UnknownModel, match=r"no model `someone/vit-tin`: not a folder, and(.|\n)*`someone/vit-tiny`"):
        read_card("someone/vit-tin")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("beside", ["adapter_model.safetensors", "vae.safetensors", "optimizer.bin", "other.msgpack"])
def test_a_uri_gives_the_weights_that_its_folder_gives(
    kind: str, beside: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_as(kind, folder, tensors_of(folder))
    (folder / beside).write_bytes(b"x" * 2000)
    local, remote = read_card(str(folder)), read_card(as_uri(folder, monkeypatch, tmp_path))
    assert remote.weights_hash == local.weights_hash and remote.gives == local.gives
    (fetched,) = (tmp_path / "cache" / "models").iterdir()
    assert sorted(path.name for path in fetched.iterdir()) == sorted(["config.json", kind, "preprocessor_config.json"])
