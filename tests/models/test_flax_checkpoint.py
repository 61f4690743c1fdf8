"""Flax checkpoints give Flax's own outputs; damaged, hostile and foreign files are refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from img2parquet.errors import CheckpointError
from img2parquet.models import ModelSpec, read_card
from img2parquet.models.checkpoint import weight_files
from img2parquet.models.flax_checkpoint import CHUNKED, read_flax
from tests.models import oracle

GOLDEN = Path(__file__).parents[1] / "golden" / "flax_beit"
CASES = ("classifier", "masked", "bfloat16")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_beit_gives_what_flax_gave(case: str, fast: bool) -> None:
    stored = np.load(GOLDEN / case / "expected.npz")
    expected = {name: torch.from_numpy(stored[name]) for name in stored.files if stored[name].dtype == np.float32}
    x_BCHW = expected.pop("pixels_BCHW")
    inputs = {"mask_BN": torch.from_numpy(stored["mask_BN"])} if case == "masked" else {}
    mine = oracle.run(oracle.ours(GOLDEN / case, fast=fast), x_BCHW, *expected, **inputs)
    assert {"classifier": "logits", "masked": "visual_tokens", "bfloat16": "pooled"}[case] in expected
    oracle.agree(mine, expected)


def test_a_card_of_a_flax_checkpoint() -> None:
    card = read_card(ModelSpec(str(GOLDEN / "classifier")))
    assert card.family == "beit" and "logits" in card.gives and len(card.weights_hash) == 64


def test_bfloat16_is_read_bit_for_bit() -> None:
    arrays = {array.name: array for array in read_flax(GOLDEN / "bfloat16" / "flax_model.msgpack")}
    weight = arrays["encoder.layer.0.intermediate.dense.weight"]
    assert weight.dtype == torch.bfloat16 and weight.shape == (24, 16) and weight.tensor().shape == (24, 16)


def test_safetensors_come_first(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "classifier", tmp_path / "both"))
    assert weight_files(folder).files[0].name == "flax_model.msgpack"
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    assert weight_files(folder).files[0].name == "model.safetensors"


def test_shards_of_flax(tmp_path: Path) -> None:
    """Sharded files have paths as names in one map, and an index that lists the file of each."""
    tensors = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "b/scale": np.ones(3, np.float32)}
    names = {}
    for k, (name, array) in enumerate(tensors.items(), 1):
        file = names[name] = f"flax_model-0000{k}-of-00002.msgpack"
        (tmp_path / file).write_bytes(packed({name: Array(array)}))
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": names}))
    found = weight_files(tmp_path).tensors()
    assert torch.equal(found["a.weight"], torch.from_numpy(tensors["a/kernel"].T)) and found["b.weight"].shape == (3,)


def test_arrays_in_pieces(tmp_path: Path) -> None:
    array = np.arange(10, dtype=np.float32)
    pieces = {"0": Array(array[:4]), "1": Array(array[4:])}
    whole = {CHUNKED: True, "shape": {"0": 2, "1": 5}, "chunks": pieces}
    read = read_flax(written(tmp_path, packed({"x": {"bias": whole}})))
    assert torch.equal(read[0].tensor(), torch.from_numpy(array.reshape(2, 5)))


def test_convolutions_are_turned(tmp_path: Path) -> None:
    kernel_HWIO = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    (found,) = read_flax(written(tmp_path, packed({"conv": {"kernel": Array(kernel_HWIO)}})))
    assert found.name == "conv.weight" and found.shape == (5, 4, 2, 3)
    assert torch.equal(found.tensor(), torch.from_numpy(kernel_HWIO).permute(3, 2, 0, 1))


FLOATS = np.zeros(3, np.float32)
BROKEN = {
    "empty": (b"", "not readable"),
    "another format": (b"\x80\x02}q\x00.", "follow its end|begins no value"),
    "no map": (b"\x93\x01\x02\x03", "holds no map"),
    "a leaf that is no array": (b"\x81\xa1x\x05", "`x` is int, not an array"),
    "a key twice": (b"\x82\xa1x\x80\xa1x\x80", "twice"),
    "a key that is no text": (b"\x81\x01\x80", "has the key 1"),
    "more entries than bytes": (b"\xdf\xff\xff\xff\xff", "are said to follow"),
    "a list of numbers": (b"\x81\xa1x\xdc\x00\x50" + bytes(80), "is no shape"),
    "nested for ever": (b"\x81\xa1x" * 500 + b"\x80", "nested more than"),
    "text that is not": (b"\x81\xa1\xff\x80", "not UTF-8"),
    "reserved": (b"\xc1", "begins no value"),
    "another extension": (b"\x81\xa1x\xd4\x09\x00", "type 9"),
    "an array of nothing": (b"\x81\xa1x\xd4\x01\x00", r"not \(shape, type, bytes\)"),
}


@pytest.mark.parametrize(("data", "said"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_flax_checkpoint(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_flax(written(tmp_path, data))


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ([4], "float32", r"12 bytes, not the 16 of float32 \(4,\)"),
        ([-3], "float32", r"has the shape \(-3,\)"),
        ([2**62, 2**62], "float32", "12 bytes, not the"),
        ([3], "object", "of type object"),
        ([3], "O", "of type O"),
        ([True, 3], "float32", "has the shape"),
    ],
)
def test_arrays_that_are_not_what_they_say(shape: list[Any], dtype: str, said: str, tmp_path: Path) -> None:
    data = packed({"x": Array(FLOATS, shape, dtype)})
    with pytest.raises(CheckpointError, match=said):
        read_flax(written(tmp_path, data))


def test_every_cut_is_found(tmp_path: Path) -> None:
    whole = packed({"a": {"kernel": Array(np.ones((2, 2), np.float32))}, "b": {"bias": Array(FLOATS)}})
    assert len(read_flax(written(tmp_path, whole))) == 2
    for length in range(len(whole)):
        with pytest.raises(CheckpointError):
            read_flax(written(tmp_path, whole[:length]))


def test_a_byte_that_changed_is_an_error_or_an_array(tmp_path: Path) -> None:
    """No other exception is raised, and no more memory is used than the file has bytes."""
    whole = packed({"a": {"kernel": Array(np.ones((2, 2), np.float32))}, "b": {"bias": Array(FLOATS)}})
    rng = np.random.default_rng(0)
    for place in range(len(whole)):
        for value in rng.integers(0, 256, 8):
            data = whole[:place] + bytes([value]) + whole[place + 1 :]
            try:
                assert all(array.tensor().numel() <= len(whole) for array in read_flax(written(tmp_path, data)))
            except CheckpointError:
                continue


class Array:
    """Encode an array as Flax does; `shape` and `dtype` may be wrong."""

    def __init__(self, array: Any, shape: list[Any] | None = None, dtype: str | None = None) -> None:
        self.array, self.shape, self.dtype = array, shape or list(array.shape), dtype or array.dtype.name

    def packed(self) -> bytes:
        data = self.array.tobytes()
        inner = packed([self.shape, self.dtype]) + b"\xc6" + struct.pack(">I", len(data)) + data
        inner = b"\x93" + inner[1:]
        return b"\xc9" + struct.pack(">Ib", len(inner), 1) + inner


def packed(value: Any) -> bytes:
    """Encode as msgpack what the tests need."""
    if isinstance(value, Array):
        return value.packed()
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, str):
        return b"\xdb" + struct.pack(">I", len(value.encode())) + value.encode()
    if isinstance(value, list):
        assert len(value) < 16
        return bytes([0x90 | len(value)]) + b"".join(map(packed, value))
    assert isinstance(value, Mapping)
    return b"\xdf" + struct.pack(">I", len(value)) + b"".join(packed(key) + packed(one) for key, one in value.items())


def written(folder: Path, data: bytes) -> Path:
    path = folder / "flax_model.msgpack"
    path.write_bytes(data)
    return path
