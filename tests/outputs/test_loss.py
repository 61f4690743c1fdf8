"""Check that losses equal the reference's for each row, that bad ground truth is refused, that jobs report the mean."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BitConfig,
    BitForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

from img2parquet.cli import output
from img2parquet.engine.driver import run
from img2parquet.errors import CheckpointError, JobError, OutputUnavailable, PartFailed
from img2parquet.images.preprocess import PreprocessSettings
from img2parquet.job import parse_job
from img2parquet.models import Card
from img2parquet.outputs import BatchRows, resize_maps
from img2parquet.outputs.loss import Loss, loss_of_map
from img2parquet.results.reader import open_results
from img2parquet.run_identity import identity
from img2parquet.storage import Store
from tests.models import oracle
from tests.models.test_beit import TINY as BEIT
from tests.models.test_bit import TINY as BIT
from tests.models.test_levit import TINY as LEVIT
from tests.models.test_vit_msn import TINY as VIT_MSN
from tests.support.small_job import GOOD, job_dict

CLASSIFIERS = {
    "beit": (BeitForImageClassification, BeitConfig, BEIT),
    "bit": (BitForImageClassification, BitConfig, BIT),
    "levit": (LevitForImageClassification, LevitConfig, LEVIT),
    "vit_msn": (ViTMSNForImageClassification, ViTMSNConfig, VIT_MSN),
}
# problem_type of config.json, number of classes, ground truth of three rows
PROBLEMS: dict[str, tuple[str | None, int, list[Any]]] = {
    "ids": (None, 5, [4, 0, 2]),
    "ids, configured": ("single_label_classification", 5, [4, 0, 2]),
    "one number": (None, 1, [0.25, -3.0, 7.5]),
    "numbers, configured": ("regression", 3, [[1.0, 2.0, -3.0], [0.0, 0.5, 1.0], [9.0, 8.0, 7.0]]),
    "shares": (None, 3, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.25, 0.5, 1.0]]),
    "shares, configured": ("multi_label_classification", 3, [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]),
}
SEGMENTS: dict[str, Any] = {"num_labels": 7, "out_indices": [1, 2, 3, 4], "num_hidden_layers": 4, "hidden_size": 32}
NOISE = np.random.default_rng(0).integers(0, 7, (60, 60))
MASKED: dict[str, Any] = {"use_mask_token": True, "vocab_size": 11}


def rows(**passthrough: Any) -> BatchRows:
    count = len(next(iter(passthrough.values())))
    return BatchRows([f"k{i}" for i in range(count)], [(40, 40)] * count, passthrough)


def card(
    gives: Mapping[str, tuple[int, ...]], labels: tuple[str, ...] = (), reduces: bool = False, **config: Any
) -> Card:
    settings = PreprocessSettings("exact", 32, 32, "bilinear", None, None)
    return Card("tiny", "beit", "fake:", "0", config, settings, gives, "", labels, reduces_labels=reduces)


def losses(output: Loss, about: Card, scores: torch.Tensor, **passthrough: Any) -> list[Any]:
    (column,) = output.columns(about, {output.feature(about): scores}, rows(**passthrough))
    return column.to_pylist()  # type: ignore[no-any-return]


def ours(model: Any, folder: Path, output: Loss, x_BCHW: torch.Tensor, **passthrough: Any) -> list[Any]:
    """Return the column that our loader, backbone and output make of the saved checkpoint."""
    oracle.saved(model, folder)
    found = oracle.opened(folder, tuple(x_BCHW.shape[2:]))  # type: ignore[arg-type]
    about, given = found.card(), rows(**passthrough)
    backbone = found.filled(torch.float32, torch.device("cpu"), True)
    features = oracle.run(backbone, x_BCHW, *output.wants(about), **output.inputs(about, given))
    (column,) = output.columns(about, features, given)
    assert column.type == output.fields(about)[0].type
    return column.to_pylist()  # type: ignore[no-any-return]


def alone(model: Any, x_BCHW: torch.Tensor, labels: list[torch.Tensor], **inputs: Any) -> list[float]:
    """Return the reference's loss of each row in a batch of its own."""
    each = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(len(x_BCHW))]
    return [
        float(oracle.reference(model, x_BCHW[i : i + 1], labels=labels[i], **each[i]).loss) for i in range(len(x_BCHW))
    ]


def png(ids_HW: Any, mode: str = "L") -> bytes:
    sink = io.BytesIO()
    image = Image.fromarray(np.asarray(ids_HW, np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    image.save(sink, "PNG")
    return sink.getvalue()


# -- classification: every family, every problem -------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifiers_loss_is_the_references(family: str, problem: str, tmp_path: Path) -> None:
    kind, config, tiny = CLASSIFIERS[family]
    problem_type, num_labels, truths = PROBLEMS[problem]
    model = kind(config(**{**tiny, "num_labels": num_labels, "problem_type": problem_type}))
    side = tiny.get("image_size", 64)
    x_BCHW = oracle.pixels(3, (side, side))
    mine = ours(model, tmp_path, Loss(truth="t"), x_BCHW, t=truths)
    labels = [torch.tensor([truth]) for truth in truths]
    assert mine == pytest.approx(alone(model, x_BCHW, labels), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("head", ["default", "cls", "distillation"])
def test_levit_with_two_heads(head: Any, tmp_path: Path) -> None:
    model = LevitForImageClassificationWithTeacher(LevitConfig(**LEVIT))
    x_BCHW, truths = oracle.pixels(3), [2, 0, 1]
    mine = ours(model, tmp_path, Loss(truth="t", head=head), x_BCHW, t=truths)
    out = oracle.reference(model, x_BCHW)
    logits = {"default": out.logits, "cls": out.cls_logits, "distillation": out.distillation_logits}[head]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(truths), reduction="none")
    assert mine == pytest.approx(expected.tolist(), rel=1e-5)


def test_class_names_and_rows_without_a_truth() -> None:
    about, logits_BK = card({"logits": (3,)}, ("ox", "ram", "cat")), torch.randn(5, 3)
    mine = losses(Loss(truth="t"), about, logits_BK, t=["cat", None, "ox", "ram", None])
    expected = torch.nn.functional.cross_entropy(logits_BK[[0, 2, 3]], torch.tensor([2, 0, 1]), reduction="none")
    assert [mine[i] for i in (0, 2, 3)] == pytest.approx(expected.tolist())
    assert (mine[1], mine[4]) == (None, None)
    assert losses(Loss(truth="t"), about, logits_BK[:2], t=[None, None]) == [None, None]
    assert losses(Loss(truth="t"), about, logits_BK[:1], t=[-100]) == [None]  # the reference: NaN


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ("rat", ["`t` of `k1`: `rat` is not a class", "did you mean `cat`?", "known: ox, crane, cat, crane"]),
        ("crane", ["is the name of several classes: 1, 3"]),
        ("2", ["`keep: [t:int64]`"]),
        (4, ["class 4 is not among the model's classes 0 to 3"]),
        (-1, ["class -1"]),
        (2.0, ["`2.0` is neither a class id nor a class name", "`keep: [t:int64]`"]),
        (True, ["`True` is neither"]),
    ],
)
def test_a_class_that_the_model_does_not_have(truth: Any, expected: list[str]) -> None:
    about = card({"logits": (4,)}, ("ox", "crane", "cat", "crane"))
    with pytest.raises(PartFailed) as caught:
        losses(Loss(truth="t"), about, torch.zeros(2, 4), t=[0, truth])
    assert all(words in str(caught.value) for words in expected), str(caught.value)


@pytest.mark.parametrize(
    ("problem", "truth", "same"),
    [
        ("multi_label_classification", ["ox", "cat"], [1.0, 0.0, 1.0]),
        ("multi_label_classification", '["ox", "cat"]', [1.0, 0.0, 1.0]),
        ("multi_label_classification", "ram", [0.0, 1.0, 0.0]),
        ("multi_label_classification", [], [0.0, 0.0, 0.0]),
        ("multi_label_classification", "[1, 0, 0.5]", [1.0, 0.0, 0.5]),
        ("multi_label_classification", [True, False, True], [1.0, 0.0, 1.0]),
        (None, '["ox", "cat"]', [1.0, 0.0, 1.0]),
        ("regression", "[1.5, -2, 3e1]", [1.5, -2.0, 30.0]),
        ("regression", ["1.5", "-2", "30"], [1.5, -2.0, 30.0]),
    ],
)
def test_lists_of_names_and_what_a_source_kept_as_text(problem: str | None, truth: Any, same: list[float]) -> None:
    about, logits_BK = card({"logits": (3,)}, ("ox", "ram", "cat"), problem_type=problem), torch.randn(1, 3)
    expected = losses(Loss(truth="t"), about, logits_BK, t=[same])
    assert losses(Loss(truth="t"), about, logits_BK, t=[truth]) == expected


@pytest.mark.parametrize("truth", [["ox", "ox"], ["cow"], [0, 2], "cow"])
def test_lists_that_are_no_truth(truth: Any) -> None:
    about = card({"logits": (3,)}, ("ox", "ram", "cat"), problem_type="multi_label_classification")
    with pytest.raises(PartFailed, match="`t` of `k0`: "):
        losses(Loss(truth="t"), about, torch.zeros(1, 3), t=[truth])


@pytest.mark.parametrize(
    ("problem", "truth"),
    [
        ("multi_label_classification", [1.0, 0.0]),
        ("multi_label_classification", [1.0, 0.0, 2.0]),
        ("multi_label_classification", [1.0, 0.0, None]),
        ("multi_label_classification", "abc"),
        ("regression", [1.0, float("nan"), 0.0]),
        ("regression", 1.0),
    ],
)
def test_numbers_that_are_no_truth(problem: str, truth: Any) -> None:
    with pytest.raises(PartFailed, match=r"`t` of `k0`: .* is not 3 numbers"):
        losses(Loss(truth="t"), card({"logits": (3,)}, problem_type=problem), torch.zeros(1, 3), t=[truth])


def test_an_unknown_problem_type_is_refused() -> None:
    with pytest.raises(OutputUnavailable, match="`problem_type: guess`"):
        Loss(truth="t").wants(card({"logits": (3,)}, problem_type="guess"))


# -- masked image modelling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["every patch", "masked patches"])
@pytest.mark.parametrize("by", ["ratio", "column"])
def test_masked_image_modelling(given: str, by: str, tmp_path: Path) -> None:
    model, x_BCHW = BeitForMaskedImageModeling(BeitConfig(**BEIT | MASKED)), oracle.pixels(3, (32, 32))
    N = (32 // BEIT["patch_size"]) ** 2
    draw = np.random.default_rng(0)
    m = [(draw.random(N) < 0.3).tolist() for _ in range(3)]
    output = Loss(truth="t", mask_ratio=0.5, seed=3) if by == "ratio" else Loss(truth="t", mask_column="m")
    mask_BN = output.mask_BN(card({"visual_tokens": (N, 11)}, **MASKED), rows(m=m))
    codes_BN = draw.integers(0, 11, (3, N))
    codes_BN[0, np.flatnonzero(mask_BN[0])[0]] = -100  # one of the first row is ignored
    of_masked = [codes_N[mask_N] for codes_N, mask_N in zip(codes_BN, mask_BN, strict=True)]
    t = [c.tolist() for c in (codes_BN if given == "every patch" else of_masked)]
    t[1] = json.dumps(t[1])  # a source may have kept it as text
    mine = ours(model, tmp_path, output, x_BCHW, t=t, m=m)
    expected = alone(model, x_BCHW, list(map(torch.from_numpy, of_masked)), bool_masked_pos=torch.from_numpy(mask_BN))
    assert mine == pytest.approx(expected, rel=1e-5)


def test_nothing_masked_has_no_loss_and_no_mask_counts_every_patch() -> None:
    about, scores_BNV = card({"visual_tokens": (4, 5)}, **MASKED), torch.randn(1, 4, 5)
    assert losses(Loss(truth="t", mask_column="m"), about, scores_BNV, t=[[0] * 4], m=[[False] * 4]) == [None]
    unmasked = Loss(truth="t", mask_ratio=0)
    assert unmasked.inputs(about, rows(t=[[0] * 4])) == {}
    expected = torch.nn.functional.cross_entropy(scores_BNV[0], torch.tensor([0, 1, 2, 3]))
    assert losses(unmasked, about, scores_BNV, t=[[0, 1, 2, 3]]) == pytest.approx([float(expected)])


@pytest.mark.parametrize("truth", [[1] * 3, [1] * 4 + [5], [1.5] * 4, 3, "codes", [1, 2, 3, 5], [1, 2, 3, -1]], ids=str)
def test_codes_that_are_no_truth(truth: Any) -> None:
    about = card({"visual_tokens": (4, 5)}, **MASKED)
    with pytest.raises(PartFailed, match="`t` of `k0`: "):
        losses(Loss(truth="t", mask_ratio=0.5), about, torch.zeros(1, 4, 5), t=[truth])


def test_a_mask_needs_a_mask_token() -> None:
    with pytest.raises(OutputUnavailable, match="no mask token"):
        Loss(truth="t").wants(card({"visual_tokens": (4, 5)}))


# -- segmentation --------------------------------------------------------------------------------------------------


def segmenter(**changed: Any) -> BeitForSemanticSegmentation:
    return BeitForSemanticSegmentation(BeitConfig(**BEIT | SEGMENTS | changed))


@pytest.mark.parametrize("ignored", [255, 3])
@pytest.mark.parametrize("score_bytes", [1, 64 << 20])
def test_segmentation(ignored: int, score_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize_maps, "SCORE_BYTES", score_bytes)
    model = segmenter(use_auxiliary_head=False, semantic_loss_ignore_index=ignored)
    x_BCHW = oracle.pixels(3, (32, 32))
    truths = [np.random.default_rng(i).integers(0, 7, size) for i, size in enumerate([(40, 33), (5, 9), (32, 32)])]
    truths[0][:11, 7:] = ignored
    mine = ours(model, tmp_path, Loss(truth="t"), x_BCHW, t=[png(ids) for ids in truths])
    labels = [torch.from_numpy(ids)[None] for ids in truths]
    assert mine == pytest.approx(alone(model, x_BCHW, labels), rel=1e-5)


@pytest.mark.parametrize("in_memory_names", [False, True])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"auxiliary_num_convs": 2, "auxiliary_channels": 8},
        {"auxiliary_num_convs": 0, "auxiliary_channels": 32},
        {"auxiliary_concat_input": True, "auxiliary_loss_weight": 2.5},
        {"auxiliary_num_convs": 3, "auxiliary_concat_input": True, "semantic_loss_ignore_index": 3},
    ],
    ids=str,
)
def test_the_auxiliary_heads_loss_is_added(changed: dict[str, Any], in_memory_names: bool, tmp_path: Path) -> None:
    model, x_BCHW = segmenter(**changed), oracle.pixels(2, (32, 32))
    truths = [np.random.default_rng(i).integers(0, 7, (20, 30)) for i in range(2)]
    if in_memory_names:
        oracle.saved_as_state_dict(model, tmp_path)
    else:
        oracle.saved(model, tmp_path)
    labels = [torch.from_numpy(ids)[None] for ids in truths]
    expected = alone(model, x_BCHW, labels)
    for fast in (True, False):
        assert loss_column(tmp_path, x_BCHW, fast, t=[png(ids) for ids in truths]) == pytest.approx(expected, rel=1e-5)
    model.config.auxiliary_loss_weight = 0.0
    assert all(one < both - 0.1 for one, both in zip(alone(model, x_BCHW, labels), expected, strict=True))


def loss_column(folder: Path, x_BCHW: torch.Tensor, fast: bool = True, **passthrough: Any) -> list[Any]:
    found, output, about = oracle.opened(folder, (32, 32)), Loss(truth="t"), rows(**passthrough)
    backbone = found.filled(torch.float32, torch.device("cpu"), fast)
    features = oracle.run(backbone, x_BCHW, *output.wants(found.card()))
    return output.columns(found.card(), features, about)[0].to_pylist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["use_auxiliary_head: false", "files without it"])
def test_an_auxiliary_head_that_is_not_there_adds_nothing(how: str, tmp_path: Path) -> None:
    model, x_BCHW = segmenter(), oracle.pixels(2, (32, 32))
    truths = [np.random.default_rng(i).integers(0, 7, (20, 30)) for i in range(2)]
    oracle.saved(model, tmp_path)
    if how == "files without it":
        file = tmp_path / "model.safetensors"
        save_file({name: x for name, x in load_file(file).items() if not name.startswith("auxiliary")}, file)
    else:
        config = tmp_path / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "use_auxiliary_head": False}))
    mine = loss_column(tmp_path, x_BCHW, t=[png(ids) for ids in truths])
    model.config.auxiliary_loss_weight = 0.0
    assert mine == pytest.approx(alone(model, x_BCHW, [torch.from_numpy(ids)[None] for ids in truths]), rel=1e-5)
    assert any("auxiliary" in note for note in oracle.opened(tmp_path).card().notes) == (how == "files without it")


@pytest.mark.parametrize(
    "changed", [{"auxiliary_num_convs": 10**9}, {"auxiliary_num_convs": 0}, {"auxiliary_channels": 0}]
)
def test_an_auxiliary_head_that_cannot_be_built_is_refused(changed: dict[str, int], tmp_path: Path) -> None:
    from img2parquet.models import ModelSpec, read_card

    oracle.saved(segmenter(), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    with pytest.raises(CheckpointError, match="auxiliary_"):
        read_card(ModelSpec(str(tmp_path)))


def test_only_losses_that_the_auxiliary_head_changes_have_a_new_identity(tmp_path: Path) -> None:
    oracle.saved(segmenter(), tmp_path)
    about = oracle.opened(tmp_path).card()
    without = replace(about, gives={name: shape for name, shape in about.gives.items() if "auxiliary" not in name})
    for outputs, differs in (([{"kind": "loss", "truth": "label"}], True), ([{"kind": "segmentation"}], False)):
        wanted = {"model": str(tmp_path), "name": "tiny", "outputs": outputs}
        job = parse_job({**job_dict("x.tar", tmp_path, "out"), "models": [wanted]})
        now, before = (identity(job, job.models[0], one, "float32") for one in (about, without))
        assert (now != before) == differs == ("auxiliary_loss_weight" in now)


@pytest.mark.parametrize(("family", "K"), [("mask2former", 7), ("segformer", 1)])
def test_a_loss_that_the_reference_defines_otherwise_is_refused(family: str, K: int) -> None:
    about = replace(card({"segmentation": (K, 8, 8)}), family=f"transformers/{family}")
    with pytest.raises(OutputUnavailable, match="the reference's loss of model `tiny`"):
        Loss(truth="t").wants(about)
    Loss(truth="t").wants(replace(about, family="transformers/segformer", gives={"segmentation": (7, 8, 8)}))


def test_reduced_labels_are_the_references() -> None:
    from transformers import BeitImageProcessorPil

    raw = np.array([[0, 1, 2, 7, 255], [3, 0, 4, 5, 6]])
    reduced = BeitImageProcessorPil().reduce_label(raw.copy())
    gives, scores_BKhw = {"segmentation": (7, 3, 4)}, torch.randn(1, 7, 3, 4)
    expected = losses(Loss(truth="t"), card(gives), scores_BKhw, t=[png(reduced)])
    assert losses(Loss(truth="t"), card(gives, reduces=True), scores_BKhw, t=[png(raw)]) == expected
    assert losses(Loss(truth="t", reduce_labels=True), card(gives), scores_BKhw, t=[png(raw)]) == expected
    with pytest.raises(PartFailed, match="the map has class 7") as caught:
        losses(Loss(truth="t"), card(gives), scores_BKhw, t=[png(raw)])
    assert "reduce_labels: true" in caught.value.hint


@pytest.mark.parametrize("key", ["do_reduce_labels", "reduce_labels"])
def test_the_checkpoints_processor_says_whether_labels_are_reduced(key: str, tmp_path: Path) -> None:
    from img2parquet.models import ModelSpec, read_card

    oracle.saved(segmenter(), tmp_path)
    cards = []
    for value in (False, True):
        processor = {"image_processor_type": "BeitImageProcessor", "size": 32, key: value}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        cards.append(read_card(ModelSpec(str(tmp_path))))
    assert [about.reduces_labels for about in cards] == [False, True]
    assert read_card(ModelSpec("microsoft/beit-base-finetuned-ade-640-640", weights="random(0)")).reduces_labels
    job = parse_job(job_dict("x.tar", tmp_path, "out"))
    plain, reducing = (identity(job, job.models[0], about, "float32") for about in cards)
    assert plain != reducing  # losses differ, so the runs do


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_spellings_of_a_map(mode: str) -> None:
    ids, scores_Khw = np.arange(6).reshape(2, 3), torch.randn(7, 3, 4)
    expected = float(loss_of_map(scores_Khw, torch.from_numpy(ids), 255))
    for truth in (png(ids, mode), {"bytes": png(ids, mode), "path": None}):
        mine = losses(Loss(truth="t"), card({"segmentation": (7, 3, 4)}), scores_Khw[None], t=[truth])
        assert mine == pytest.approx([expected])


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_maps_of_few_bits_keep_their_ids(depth: int) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8 // depth, 1, depth, 0, 0, 0, 0)  # one byte's worth of grey pixels
    values = [i % 2**depth for i in range(8 // depth)]
    packed = sum(value << (8 - depth * (i + 1)) for i, value in enumerate(values))
    pixels = zlib.compress(bytes([0, packed]))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    scores_Khw = torch.randn(7, 1, 8 // depth)
    expected = losses(Loss(truth="t"), card({"segmentation": (7, 1, 4)}), scores_Khw[None], t=[png([values])])
    assert losses(Loss(truth="t"), card({"segmentation": (7, 1, 4)}), scores_Khw[None], t=[data]) == expected


@pytest.mark.parametrize(
    "truth", [b"", b"GIF89a", png(np.zeros((4, 4, 3))), png(NOISE)[:900], png(NOISE)[:20], "x.png", 3], ids=range(7)
)
def test_what_is_no_map_fails_its_part(truth: Any) -> None:
    with pytest.raises(PartFailed, match=r"`t` of `k0`: .*PNG"):
        losses(Loss(truth="t"), card({"segmentation": (7, 3, 4)}), torch.zeros(1, 7, 3, 4), t=[truth])


def test_a_map_of_only_ignored_pixels_has_no_loss() -> None:
    about = card({"segmentation": (7, 3, 4)})
    truths = [png(np.full((5, 5), 255)), None]
    assert losses(Loss(truth="t"), about, torch.zeros(2, 7, 3, 4), t=truths) == [None, None]


def test_a_map_for_the_whole_image_needs_a_model_that_sees_it() -> None:
    about = card({"segmentation": (7, 3, 4)})
    cropped = replace(about, preprocess=replace(about.preprocess, crop_height=24, crop_width=24))
    with pytest.raises(OutputUnavailable, match="sees a crop"):
        Loss(truth="t").wants(cropped)


# -- what a checkpoint has, and a whole job ------------------------------------------------------------------------


def test_the_head_decides_and_what_it_does_not_read_is_refused() -> None:
    classifier, masked = card({"logits": (3,), "pooled": (4,)}), card({"visual_tokens": (4, 5)}, **MASKED)
    assert Loss(truth="t").wants(classifier) == {"logits"}
    assert Loss(truth="t").wants(masked) == {"visual_tokens"}
    with pytest.raises(OutputUnavailable, match="`mask_ratio` is a setting of a visual_tokens loss"):
        Loss(truth="t", mask_ratio=0.5).wants(classifier)
    with pytest.raises(OutputUnavailable, match="needs `segmentation`") as caught:
        Loss(truth="t", of="segmentation").wants(classifier)
    assert caught.value.known == ("logits", "pooled")
    with pytest.raises(OutputUnavailable, match="output `loss` needs `logits`"):
        Loss(truth="t").wants(card({"pooled": (4,)}))


def loss_job(made: Path, out: Path | str, truth: str = "label", **more: Any) -> dict[str, Any]:
    document = job_dict(f"{made}/in/*.tar", made / "model", str(out), **more)
    document["models"][0]["outputs"] = [{"kind": "logits"}, {"kind": "loss", "truth": truth}]
    return document


def test_a_job_reports_the_mean(made: Path, output_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = parse_job(loss_job(made, output_root))
    summary = run(job, "local")
    table = open_results(output_root).to_table()
    logits_BK = torch.tensor(np.stack(table["logits"].to_numpy()))
    expected = torch.nn.functional.cross_entropy(logits_BK, torch.tensor(table["label"].to_pylist()), reduction="none")
    assert table["loss"].to_pylist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert summary.losses == {"tiny.loss": pytest.approx(float(expected.double().mean()), rel=1e-5)}
    assert table.num_rows == GOOD and table.schema.field("loss").nullable
    again = run(job, "local")  # nothing is left to do, and the summary still has the losses
    assert again.losses == summary.losses
    assert json.loads(Store().read(f"{output_root}/_SUCCESS"))["losses"] == summary.losses
    output.print_summary(again)
    assert f"loss       tiny.loss {summary.losses['tiny.loss']:.4f}\n" in capsys.readouterr().out


def test_a_truth_that_is_not_kept_is_refused_before_anything_is_read(made: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"output `loss` reads the column `class`, which `input\.keep` does not list"):
        parse_job(loss_job(made, tmp_path / "out", "class"))


def test_rows_without_a_truth_do_not_count(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.small_job import jpeg

    labels = [3, None, 1, None]
    columns = {"id": list("abcd"), "image": [jpeg(i) for i in range(4)], "t": pa.array(labels, pa.int64())}
    for name, changed in (("some", columns), ("none", {**columns, "t": pa.array([None] * 4, pa.int64())})):
        pq.write_table(pa.table(changed), tmp_path / f"{name}.parquet")
        source = {"kind": "parquet", "uris": [str(tmp_path / f"{name}.parquet")], "key": "id", "keep": ["t"]}
        summary = run(parse_job(loss_job(made, tmp_path / name, "t", input=source)), "local")
        found = open_results(str(tmp_path / name)).to_table()["loss"].to_pylist()
        if name == "some":
            assert [loss is None for loss in found] == [False, True, False, True]
            assert summary.losses["tiny.loss"] == pytest.approx((found[0] + found[2]) / 2)
        else:
            assert (found, summary.losses) == ([None] * 4, {"tiny.loss": None})
            output.print_summary(summary)
            assert "tiny.loss none: no row has ground truth" in capsys.readouterr().out
