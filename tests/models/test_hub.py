"""Model files are found in a folder, behind a URI, and in the hub's cache (laid out by hand)."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest

from img2parquet.errors import MissingDependency, UnknownModel
from img2parquet.models import ModelSpec, hub, load_model, read_card
from tests.models import oracle

COMMIT, OTHER = "a" * 40, "b" * 40
REPO = "someone/tiny-msn"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTMSNConfig, ViTMSNModel

    config = ViTMSNConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=16, patch_size=8
    )
    return oracle.saved(ViTMSNModel(config), tmp_path_factory.mktemp("made"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, with no network behind it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def lay_out(cache: Path, files: Path, commit: str = COMMIT, ref: str | None = "main", but: str = "") -> Path:
    """Lay out a repository as huggingface_hub does: blobs, a snapshot of links to them, a ref naming the snapshot."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
    for folder in (snapshot, blobs, repo / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for path in files.iterdir():
        if path.name != but:
            shutil.copy(path, blobs / f"{commit[:8]}-{path.name}")
            (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{commit[:8]}-{path.name}", snapshot))
    if ref:
        (repo / "refs" / ref).write_text(commit)
    return snapshot


def test_a_folder(made: Path) -> None:
    assert hub.find(str(made)) == hub.find(f"file://{made}") == hub.LocatedCheckpoint(made, str(made))
    assert load_model(str(made), name="m").card.name == "m"


def test_a_file_is_not_a_folder(made: Path) -> None:
    with pytest.raises(UnknownModel, match=r"is a file(.|\n)*use its folder"):
        hub.find(str(made / "config.json"))


def test_main_and_a_revision_from_the_offline_cache(cache: Path, made: Path, tmp_path: Path) -> None:
    lay_out(cache, made)
    other = Path(shutil.copytree(made, tmp_path / "other"))
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"layer_norm_eps": 1e-06', '"layer_norm_eps": 0.5'))
    lay_out(cache, other, OTHER, ref="v2")
    main = load_model(REPO)
    assert (main.card.name, main.card.source) == ("tiny-msn", f"{REPO}@{COMMIT}")
    for revision in ("v2", OTHER):
        card = read_card(ModelSpec(f"{REPO}@{revision}"))
        assert (card.source, card.config["layer_norm_eps"]) == (f"{REPO}@{OTHER}", 0.5)


def test_sharded_weights_in_the_cache(cache: Path, made: Path, tmp_path: Path) -> None:
    from tests.models.test_checkpoint import SHARDS, shard

    folder = Path(shutil.copytree(made, tmp_path / "sharded"))
    shard(folder)
    snapshot = lay_out(cache, folder)
    assert load_model(REPO).card.gives
    (snapshot / f"{SHARDS[1]}.safetensors").unlink()
    with pytest.raises(UnknownModel, match="has no weights in the hub's cache"):
        load_model(REPO)


def test_what_is_not_cached_says_how_to_fetch_it(cache: Path, made: Path) -> None:
    with pytest.raises(UnknownModel, match=f"hf download {REPO} --revision v9"):
        hub.find(f"{REPO}@v9")
    with pytest.raises(UnknownModel, match=r"did you mean `facebook/levit-256`"):
        load_model("facebok/levit-256")
    with pytest.raises(UnknownModel, match=r"hf download facebook/levit-256`; or .*random\(0\)"):
        load_model("facebook/levit-256")
    lay_out(cache, made, but="model.safetensors")
    with pytest.raises(UnknownModel, match=f"has no weights(.|\n)*hf download {REPO} --revision {COMMIT}"):
        load_model(REPO)


def test_a_name_that_is_nothing(cache: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "models" / "birds")
    with pytest.raises(UnknownModel, match=r"did you mean `models/birds`"):
        load_model("models/bird")
    with pytest.raises(UnknownModel, match=r"did you mean `facebook/vit-msn-small`"):
        load_model("vit-msn-smal")


def test_the_hub_s_package_is_asked_for_late(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match="pip install huggingface_hub"):
        hub.find(REPO)


@pytest.fixture
def remote(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the folder into fsspec's memory store, with unrelated files beside the checkpoint."""
    monkeypatch.setenv("IMG2PARQUET_CACHE", str(tmp_path / "cache"))
    store: Any = fsspec.filesystem("memory")
    for path in made.iterdir():
        store.pipe(f"/models/tiny/{path.name}", path.read_bytes())
    for name in ("flax_model.msgpack", "pytorch_model.bin", "runs/events.bin"):
        store.pipe(f"/models/tiny/{name}", b"large")
    return "memory://models/tiny"


def fetched(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "models").iterdir())


def test_a_uri_is_fetched_once_and_keyed_by_content(
    remote: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, streamed = hub.Store.stream, []

    def counted(store: hub.Store, uri: str, *args: Any, **kwargs: Any) -> Any:
        streamed.append(uri)
        return stream(store, uri, *args, **kwargs)

    monkeypatch.setattr(hub.Store, "stream", counted)
    card = read_card(ModelSpec(remote))
    assert (card.name, card.source) == ("tiny", remote)
    assert card.weights_hash == read_card(ModelSpec(str(made))).weights_hash
    (folder,) = fetched(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    read_card(ModelSpec(remote))
    assert fetched(tmp_path) == [folder] and len(streamed) == 2
    config = (made / "config.json").read_bytes()
    fsspec.filesystem("memory").pipe("/models/tiny/config.json", config + b"\n")
    read_card(ModelSpec(remote))
    assert len(fetched(tmp_path)) == 2


def test_a_fetch_that_breaks_leaves_nothing(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*args: Any, **kwargs: Any) -> Any:
        yield b"half"
        raise OSError("gone")

    monkeypatch.setattr(hub.Store, "stream", cut)
    with pytest.raises(OSError, match="gone"):
        hub.find(remote)
    assert fetched(tmp_path) == []


def test_a_uri_without_a_config(remote: str) -> None:
    with pytest.raises(UnknownModel, match=r"no config.json"):
        hub.find("memory://models")


# --- a text tower needs its tokenizer too ---


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models.test_text import clip_folder
    from tests.models.towers import clip_tokenizer

    _, folder = clip_folder(tmp_path_factory.mktemp("towers"))
    clip_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def open_clip(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenCLIP's files alone, beside a tokenizer."""
    from transformers import CLIPModel

    from tests.models.test_clip import as_open_clip, open_clip_config

    model, folder = CLIPModel.from_pretrained(towers), tmp_path_factory.mktemp("open_clip")
    as_open_clip(model, folder, "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(model)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(towers / name, folder / name)
    return folder


@pytest.mark.parametrize("dialect", ["towers", "open_clip"])
def test_prompts_of_a_model_by_name_and_by_uri(
    dialect: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    files: Path = request.getfixturevalue(dialect)
    lay_out(cache, files)
    asked = list[str]()
    download = huggingface_hub.hf_hub_download

    def counted(repo: str, name: str, **more: Any) -> str:
        asked.append(name)
        return str(download(repo, name, **more))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", counted)
    vectors = load_model(REPO).text_features(["a cat"])
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(asked)
    monkeypatch.setenv("IMG2PARQUET_CACHE", str(tmp_path / "cache"))
    for path in files.iterdir():
        fsspec.filesystem("memory").pipe(f"/models/{dialect}/{path.name}", path.read_bytes())
    assert load_model(f"memory://models/{dialect}").text_features(["a cat"]).equal(vectors)


def test_a_model_without_a_text_tower_asks_for_no_tokenizer(
    cache: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(cache, made)
    asked = list[str]()
    download = huggingface_hub.hf_hub_download
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda repo, name, **more: asked.append(name) or download(repo, name, **more),
    )
    load_model(REPO)
    assert "config.json" in asked and not any("tokenizer" in name or "open_clip" in name for name in asked)
