"""Test every output kind against the same requirements, then each against its own."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from img2parquet.errors import InputError, NotFinite, OutputUnavailable, PartFailed
from img2parquet.images.preprocess import PreprocessSettings
from img2parquet.models import Card
from img2parquet.outputs import OUTPUTS, BatchRows, TensorOutput
from img2parquet.outputs.segmentation import png
from img2parquet.outputs.vectors import decode_vectors

NAMES = ("tench", "great white shark", "Eskimo dog, husky", "ключ", "", "ox", "ram", "cat", "hen", "ladybug")
GIVES = {
    "pooled": (24,),
    "pooled:cls": (24,),
    "pooled:mean": (24,),
    "pooled:tower": (32,),
    "logits": (10,),
    "logits:cls": (10,),
    "logits:distillation": (10,),
    "tokens": (5, 24),
    "tokens:0": (5, 24),
    "tokens:4": (5, 24),
    "feature_maps:stem": (8, 6, 6),
    "feature_maps:stage1": (16, 3, 3),
    "attentions:0": (2, 5, 5),
    "attentions:11": (2, 5, 5),
    "segmentation": (10, 4, 4),
    "visual_tokens": (16, 32),
}
TRUTHS: dict[str, Any] = {"label": 3, "shares": [0.5] * 10, "map": png(np.full((6, 5), 2), 10), "codes": [31] * 16}

# for each kind: every setting that changes the columns; {} stands for the defaults
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "embedding": [
        {},
        {"pool": "cls", "normalize": "l2"},
        {"pool": "mean", "dtype": "float16"},
        {"pool": "tower"},
        {"normalize": "l2", "dtype": "float16", "name": "v"},
        {"normalize": "l2", "dtype": "int8"},
        {"pool": "cls", "dtype": "binary", "name": "bits"},
        {"normalize": "l2", "dtype": "binary"},
    ],
    "logits": [{}, {"head": "cls"}, {"head": "distillation", "dtype": "float16"}],
    "labels": [{}, {"top_k": 1}, {"top_k": 99}, {"threshold": 0.2}, {"head": "distillation", "name": "what"}],
    "tokens": [{}, {"hidden_states": [0, 4]}, {"last": False, "hidden_states": [4], "dtype": "float16"}],
    "feature_maps": [{"stages": ["stem"]}, {"stages": ["stem", "stage1"], "dtype": "float16"}],
    "attentions": [{"layers": [0]}, {"layers": [11, 0], "dtype": "float16"}],
    "segmentation": [
        {},
        {"encoding": "rle"},
        {"size": "model"},
        {"size": "model", "encoding": "rle", "histogram": False, "name": "m"},
        {"size": 7},
        {"size": [3, 50], "encoding": "rle"},
    ],
    "visual_tokens": [{}, {"mask_ratio": 0, "top_k": 3}, {"seed": 7, "mask_ratio": 0.9, "top_k": 99, "name": "codes"}],
    "loss": [
        {"truth": "label"},
        {"truth": "shares", "head": "cls", "name": "bce"},
        {"truth": "map", "of": "segmentation", "reduce_labels": False},
        {"truth": "codes", "of": "visual_tokens", "mask_ratio": 0.5},
    ],
}
CASES = [
    pytest.param(kind, fields, id=f"{kind}-{i}")
    for kind in OUTPUTS
    for i, fields in enumerate(VARIANTS.get(kind, [{}]))
]


def make(kind: str, **fields: Any) -> Any:
    module, name = OUTPUTS[kind]
    return getattr(importlib.import_module(module), name).model_validate({"kind": kind, **fields})


def card(gives: dict[str, tuple[int, ...]] = GIVES, labels: tuple[str, ...] = NAMES) -> Card:
    settings = PreprocessSettings("exact", 32, 32, "bilinear", None, None)
    return Card("tiny", "fake", "fake:tiny", "0" * 64, {"use_mask_token": True}, settings, gives, "a fake", labels)


def batch(count: int) -> BatchRows:
    return BatchRows(
        [f"k{i}" for i in range(count)],
        [(40 + i, 60) for i in range(count)],
        {name: [value] * count for name, value in TRUTHS.items()},
    )


def features(wants: frozenset[str], count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, *GIVES[name], generator=draw) for name in sorted(wants)}


def table(output: Any, count: int, seed: int = 0) -> pa.Table:
    given = features(output.wants(card()), count, seed)
    return pa.table(output.columns(card(), given, batch(count)), schema=pa.schema(output.fields(card())))


# -- requirements of every kind ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_columns_are_as_declared(kind: str, fields: dict[str, Any]) -> None:
    output = make(kind, **fields)
    declared = output.fields(card())
    arrays = output.columns(card(), features(output.wants(card()), 3), batch(3))
    assert output.kind == kind
    assert tuple(f.name for f in declared) == output.column_names()
    assert [a.type for a in arrays] == [f.type for f in declared]
    assert [len(a) for a in arrays] == [3] * len(declared)
    assert [f.name for f in declared if f.nullable] == (list(output.column_names()) if kind == "loss" else [])
    assert not any(a.null_count for a in arrays)
    for array in arrays:
        array.validate(full=True)


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_a_batch_of_none_is_an_empty_column(kind: str, fields: dict[str, Any]) -> None:
    assert table(make(kind, **fields), 0).num_rows == 0


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_a_row_does_not_depend_on_its_batch(kind: str, fields: dict[str, Any]) -> None:
    output = make(kind, **fields)
    given = features(output.wants(card()), 6)
    whole = output.columns(card(), given, batch(6))
    kept = {name: values[2:4] for name, values in batch(6).passthrough.items()}
    rows = BatchRows(batch(6).keys[2:4], batch(6).sizes_HW[2:4], kept)
    part = output.columns(card(), {name: x[2:4] for name, x in given.items()}, rows)
    assert [a.slice(2, 2).to_pylist() for a in whole] == [a.to_pylist() for a in part]


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_bytes_per_row_is_an_upper_bound_and_not_a_wild_one(kind: str, fields: dict[str, Any]) -> None:
    output = make(kind, **fields)
    bound = output.bytes_per_row(card())
    small, large = (table(output, count, seed=1) for count in (8, 1032))
    assert large.nbytes / large.num_rows <= bound
    per_row = (parquet_bytes(large) - parquet_bytes(small)) / 1024
    assert per_row <= bound
    if isinstance(output, TensorOutput):
        assert bound <= 2.5 * per_row + 32


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_survives_parquet(kind: str, fields: dict[str, Any]) -> None:
    written = table(make(kind, **fields), 5)
    read = pq.read_table(pa.BufferReader(parquet(written)))
    assert read.to_pylist() == written.to_pylist()
    assert [f.metadata for f in read.schema] == [f.metadata for f in written.schema]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_unknown_field_is_refused_and_every_field_is_described(kind: str) -> None:
    output = make(kind, **VARIANTS.get(kind, [{}])[0])
    with pytest.raises(ValidationError, match="colour"):
        make(kind, **VARIANTS.get(kind, [{}])[0], colour="red")
    with pytest.raises(ValidationError, match="frozen"):
        output.name = "other"
    properties = type(output).model_json_schema()["properties"]
    assert [name for name, p in properties.items() if name != "kind" and not p.get("description")] == []


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_unavailable_names_what_the_checkpoint_gives(kind: str, fields: dict[str, Any]) -> None:
    headless = card(gives={"something:else": (3,)}, labels=())
    with pytest.raises(OutputUnavailable) as caught:
        make(kind, **fields).wants(headless)
    assert kind in caught.value.message and "`tiny`" in caught.value.message
    assert caught.value.known == ("something:else",)


@pytest.mark.parametrize(("kind", "fields"), CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_names_its_row(kind: str, fields: dict[str, Any], value: float) -> None:
    output = make(kind, **fields)
    given = features(output.wants(card()), 4)
    for x in given.values():
        x.view(4, -1)[2, 1] = value
    with pytest.raises(NotFinite, match="not finite in float") as caught:
        output.columns(card(), given, batch(4))
    assert caught.value.rows == (2,)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../x", "-x"])
def test_a_column_name_is_a_word(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        make("embedding", name=name)


def test_importing_outputs_loads_no_torch() -> None:
    modules = ["img2parquet.outputs", *(module for module, _ in OUTPUTS.values())]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- embedding -----------------------------------------------------------------------------------------------------


def column(output: Any, feature: torch.Tensor) -> list[Any]:
    (name,) = output.wants(card())
    return output.columns(card(), {name: feature}, batch(len(feature)))[0].to_pylist()  # type: ignore[no-any-return]


def test_l2_gives_length_one_and_leaves_zero() -> None:
    x_BD = torch.randn(3, 24)
    x_BD[1] = 0
    rows = torch.tensor(column(make("embedding", normalize="l2"), x_BD))
    torch.testing.assert_close(rows, torch.nn.functional.normalize(x_BD))
    assert rows[1].tolist() == [0.0] * 24


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_l2_survives_values_whose_squares_do_not_fit_float32(scale: float) -> None:
    x_BD = torch.randn(2, 24)
    rows = torch.tensor(column(make("embedding", normalize="l2"), x_BD * scale))
    torch.testing.assert_close(rows, torch.nn.functional.normalize(x_BD))


def test_l2_is_computed_wide_from_bfloat16() -> None:
    x_BD = torch.randn(2, 24).bfloat16()
    rows = torch.tensor(column(make("embedding", normalize="l2"), x_BD))
    torch.testing.assert_close(rows, torch.nn.functional.normalize(x_BD.float()))


def test_float16_overflow_is_refused_but_not_where_l2_removes_it() -> None:
    x_BD = torch.full((1, 24), 70000.0)
    with pytest.raises(PartFailed, match="float16"):
        column(make("embedding", dtype="float16"), x_BD)
    assert column(make("embedding", dtype="float16", normalize="l2"), x_BD)[0][0] == pytest.approx(24**-0.5, rel=1e-3)
    assert column(make("embedding"), x_BD)[0][0] == 70000.0


def decoded(x_BD: torch.Tensor, **settings: Any) -> tuple[np.ndarray, pa.Field]:
    output = make("embedding", **settings)
    [field] = output.fields(card())
    [stored] = output.columns(card(), {"pooled": x_BD}, batch(len(x_BD)))
    return decode_vectors(stored, field), field


def test_int8_is_within_half_a_step_and_says_how_it_is_decoded() -> None:
    x_BD = torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    x_BD[3] = 0
    x_BD[4] = torch.eye(24)[5] * 9  # a single component has the whole length: the largest code
    found_BD, field = decoded(x_BD, normalize="l2", dtype="int8")
    assert field.type == pa.list_(pa.int8(), 24)
    assert field.metadata[b"encoding"] == b"int8" and b"length 1" in field.metadata[b"decode"]
    unit_BD = torch.nn.functional.normalize(x_BD, dim=1).numpy()
    step = float(field.metadata[b"scale"])
    assert step == pytest.approx(1 / 127)  # 6 / sqrt(24) is more than 1, which no component is
    codes_BD = np.array(column(make("embedding", normalize="l2", dtype="int8"), x_BD))
    assert np.abs(codes_BD * step - unit_BD).max() <= step / 2 * 1.0001
    np.testing.assert_allclose(np.linalg.norm(found_BD, axis=1), [0.0 if i == 3 else 1.0 for i in range(50)], atol=1e-6)
    assert found_BD[4].argmax() == 5


def test_a_long_vector_has_small_steps_and_what_is_beyond_them_is_cut() -> None:
    from img2parquet.outputs.embedding import int8_codes, int8_scale

    assert int8_scale(900) == pytest.approx(6 / 30 / 127)
    codes_BD = int8_codes(np.eye(900, dtype=np.float32)[:1] * -1)
    assert codes_BD[0, 0] == -127 and not codes_BD[0, 1:].any()


def test_binary_is_the_signs() -> None:
    x_BD = torch.tensor([[1.0, -2.0, 0.0, 0.5] * 6])
    found_BD, field = decoded(x_BD, dtype="binary")
    assert field.type == pa.list_(pa.uint8(), 3)
    np.testing.assert_allclose(found_BD * 24**0.5, [[1, -1, -1, 1] * 6], rtol=1e-6)
    assert column(make("embedding", dtype="binary"), x_BD) == [[0b10011001] * 3]


@pytest.mark.parametrize("settings", [{"normalize": "l2", "dtype": "int8"}, {"dtype": "binary"}])
def test_codes_of_what_is_not_finite_are_refused(settings: dict[str, str]) -> None:
    x_BD = torch.ones(2, 24)
    x_BD[1, 3] = float("nan")
    with pytest.raises(NotFinite, match="not finite"):
        make("embedding", **settings).columns(card(), {"pooled": x_BD}, batch(2))


def test_int8_without_a_common_length_and_signs_of_nothing_negative_are_refused() -> None:
    with pytest.raises(ValidationError, match="needs `normalize: l2`"):
        make("embedding", dtype="int8")
    with pytest.raises(OutputUnavailable, match="no negative values"):
        make("embedding", dtype="binary").wants(dataclasses.replace(card(), family="bit"))


def test_floats_are_decoded_without_a_copy() -> None:
    x_BD = torch.randn(5, 24)
    [stored] = make("embedding").columns(card(), {"pooled": x_BD}, batch(5))
    [field] = make("embedding").fields(card())
    found_BD = decode_vectors(stored, field)
    assert found_BD.ctypes.data == stored.flatten().to_numpy(zero_copy_only=True).ctypes.data
    np.testing.assert_array_equal(found_BD, x_BD.numpy())
    with pytest.raises(InputError, match="holds no vectors"):
        decode_vectors(stored, pa.field("labels", pa.list_(pa.int32(), 24)))


def test_vectors_are_plain_fixed_size_lists() -> None:
    (declared,) = make("embedding").fields(card())
    assert declared.type == pa.list_(pa.float32(), 24)
    assert not isinstance(declared.type, pa.BaseExtensionType)


@pytest.mark.parametrize(
    ("pool", "feature"),
    [("model", "pooled"), ("cls", "pooled:cls"), ("mean", "pooled:mean"), ("tower", "pooled:tower")],
)
def test_pool_chooses_the_feature(pool: str, feature: str) -> None:
    assert make("embedding", pool=pool).wants(card()) == {feature}


def test_a_checkpoint_without_a_pooling_layer_says_what_it_has() -> None:
    untrained = card(gives={"pooled:cls": (24,), "pooled:mean": (24,)})
    with pytest.raises(OutputUnavailable) as caught:
        make("embedding").wants(untrained)
    assert "pooled:mean" in str(caught.value)


# -- labels --------------------------------------------------------------------------------------------------------


def test_labels_agree_with_softmax() -> None:
    logits_BK = torch.randn(5, 10) * 3
    for row, probs_K in zip(column(make("labels", top_k=10), logits_BK), logits_BK.softmax(1), strict=True):
        assert [label["id"] for label in row] == probs_K.argsort(descending=True).tolist()
        torch.testing.assert_close(
            torch.tensor([label["score"] for label in row]), probs_K.sort(descending=True).values
        )
        assert [label["name"] for label in row] == [NAMES[label["id"]] for label in row]


@pytest.mark.parametrize("k", [1, 3, 9])
def test_equal_scores_go_by_id_also_for_the_last_place(k: int) -> None:
    logits_BK = torch.tensor([[0.0] * 10, [1.0, 0, 2, 0, 0, 2, 0, 0, 0, 2]])
    ids = [[label["id"] for label in row] for row in column(make("labels", top_k=k), logits_BK)]
    assert ids == [list(range(k)), [2, 5, 9, 0, 1, 3, 4, 6, 7][:k]]


def test_threshold_may_leave_nothing() -> None:
    logits_BK = torch.tensor([[0.0] * 10, [9.0] + [0.0] * 9])
    rows = column(make("labels", threshold=0.5), logits_BK)
    assert [[label["name"] for label in row] for row in rows] == [[], ["tench"]]


def test_scores_of_bfloat16_logits_are_computed_in_float32() -> None:
    logits_BK = (torch.randn(2, 10) * 4).bfloat16()
    row = column(make("labels", top_k=1), logits_BK)[0]
    assert row[0]["score"] == pytest.approx(float(logits_BK.float().softmax(1)[0].max()), rel=1e-6)


def test_a_class_that_is_masked_out_is_no_fault() -> None:
    logits_BK = torch.zeros(1, 10)
    logits_BK[0, 3:] = float("-inf")
    row = column(make("labels"), logits_BK)[0]
    assert [round(label["score"], 3) for label in row] == [0.333, 0.333, 0.333, 0.0, 0.0]


def test_a_head_without_names_gets_the_references_names() -> None:
    nameless = card(labels=())
    labels = make("labels", top_k=1).columns(nameless, {"logits": torch.eye(10)[3:4]}, batch(1))[0]
    assert labels.to_pylist()[0][0]["name"] == "LABEL_3"


def test_names_that_do_not_fit_the_head_are_refused() -> None:
    with pytest.raises(OutputUnavailable, match="names 2 classes, but its head has 10"):
        make("labels").wants(card(labels=("a", "b")))


# -- tensors -------------------------------------------------------------------------------------------------------


def test_tensors_keep_their_order_and_shape() -> None:
    output = make("feature_maps", stages=["stem"])
    x_BCHW = torch.arange(2 * 8 * 6 * 6, dtype=torch.float32).reshape(2, 8, 6, 6)
    strided = x_BCHW.to(memory_format=torch.channels_last)
    assert torch.tensor(column(output, strided)).reshape(2, 8, 6, 6).equal(x_BCHW)
    assert json.loads(output.fields(card())[0].metadata[b"shape"]) == [8, 6, 6]


def test_column_names_of_layers_and_stages() -> None:
    assert make("tokens", hidden_states=[4, 0]).column_names() == ("tokens", "tokens_4", "tokens_0")
    assert make("tokens", name="t", last=False, hidden_states=[4]).column_names() == ("t_4",)
    assert make("feature_maps", stages=["stem"]).column_names() == ("feature_maps_stem",)
    assert make("attentions", layers=[11]).column_names() == ("attentions_11",)


def test_an_unknown_stage_or_layer_gets_the_nearest() -> None:
    with pytest.raises(OutputUnavailable, match="did you mean `feature_maps:stage1`") as caught:
        make("feature_maps", stages=["stage7"]).wants(card())
    assert "attentions:11" in str(caught.value)
    with pytest.raises(OutputUnavailable, match="attentions:12"):
        make("attentions", layers=[12]).wants(card())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("tokens", {"last": False}),
        ("tokens", {"hidden_states": [3, 3]}),
        ("tokens", {"hidden_states": [-1]}),
        ("feature_maps", {}),
        ("feature_maps", {"stages": []}),
        ("feature_maps", {"stages": ["stem", "stem"]}),
        ("attentions", {"layers": []}),
        ("attentions", {"layers": [1, 1]}),
        ("labels", {"top_k": 0}),
        ("labels", {"threshold": 1.5}),
        ("embedding", {"dtype": "float64"}),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make(kind, **fields)


def parquet(written: pa.Table) -> pa.Buffer:
    sink = io.BytesIO()
    pq.write_table(written, sink, compression="none", use_dictionary=False, write_statistics=False)
    return pa.py_buffer(sink.getvalue())


def parquet_bytes(written: pa.Table) -> int:
    return int(parquet(written).size)
