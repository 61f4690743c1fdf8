"""Labels by prompts equal the reference's, from vectors alone, as a partition that resumes and verifies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import img2parquet
from img2parquet.cli import main
from img2parquet.engine import driver
from img2parquet.errors import CheckpointError, InputError, OutputUnavailable, RunMismatch
from img2parquet.images.decode import decode
from img2parquet.images.preprocess import Preprocessor, normalize_on_device
from img2parquet.models import load_model
from img2parquet.models.prompts import TEMPLATES, class_prompts
from img2parquet.results.evaluation.evaluate import evaluate
from img2parquet.results.probe import label_partition
from img2parquet.results.probe.relabel import relabel
from img2parquet.results.verify import verify
from img2parquet.schema import Pixels
from tests.support.finished_outputs import copy_of, part_paths, rows_of, small_run
from tests.support.two_towers import IMAGES, Finished, job_of

CLASSES = ["cat", "dog", "red"]


@pytest.fixture
def out(words_run: Finished, tmp_path: Path) -> str:
    return copy_of(words_run.root / "out", tmp_path / "out")


def expected(model: Any, root: Path, prompts: list[str]) -> dict[str, np.ndarray]:
    """The reference's scores of each image for prompts, by key: one prompt for each class."""
    ours = load_model(str(root / "ckpt"))
    ids_KT = ours.text.tokenizer(prompts)
    scores = {}
    for path in sorted((root / "in").iterdir()):
        pixels = decode(path.read_bytes())
        assert isinstance(pixels, Pixels)
        crop_HWC = Preprocessor(ours.card.preprocess)(pixels)
        x_1CHW = normalize_on_device(torch.from_numpy(crop_HWC)[None], ours.card.preprocess, torch.float32)
        with torch.no_grad():
            logits_K = model(input_ids=ids_KT, pixel_values=x_1CHW).logits_per_image[0]
        is_clip = model.config.model_type == "clip"
        scores[path.name] = (logits_K.softmax(0) if is_clip else logits_K.sigmoid()).numpy()
    return scores


def test_scores_are_those_of_the_reference(words_run: Finished, out: str) -> None:
    made = relabel(out, CLASSES, top_k=2, name="words+mine")
    assert (made.model, made.rows, made.parts, made.parts_now) == ("words+mine", IMAGES, 3, 3)
    rows, theirs = (
        rows_of(out, "words+mine"),
        expected(words_run.model, words_run.root, [f"a photo of a {name}." for name in CLASSES]),
    )
    assert [row["key"] for row in rows] == [row["key"] for row in rows_of(out, "words")] and len(rows) == IMAGES
    for row in rows:
        scores_K = theirs[row["key"]]
        best = np.argsort(-scores_K, kind="stable")[:2]
        assert [label["id"] for label in row["labels"]] == best.tolist()
        assert [label["name"] for label in row["labels"]] == [CLASSES[id] for id in best]
        assert [label["score"] for label in row["labels"]] == pytest.approx(scores_K[best].tolist(), rel=2e-4, abs=1e-6)
        assert row["confidence"] == row["labels"][0]["score"]
    assert verify(out) == []


def test_a_class_of_several_prompts_has_the_mean_of_their_directions(words_run: Finished, out: str) -> None:
    root = words_run.root
    relabel(out, {"pet": ["a cat", "a {}", "the dog"], "red": "red"}, name="several")
    text = load_model(str(root / "ckpt")).text
    unit = torch.nn.functional.normalize(text(["a cat", "a pet", "the dog", "red"]), dim=1)
    classes = torch.nn.functional.normalize(torch.stack([unit[:3].mean(0), unit[3]]), dim=1).double().numpy()
    vectors = {row["key"]: np.array(row["embedding"]) for row in rows_of(out, "words")}
    for row in rows_of(out, "several"):
        unit_D = vectors[row["key"]] / np.linalg.norm(vectors[row["key"]])
        logits = text.logit_scale * (classes @ unit_D) + text.logit_bias
        assert row["labels"][0]["id"] == int(logits.argmax())


def test_prompts_name_the_partition_and_a_threshold_empties_lists(out: str) -> None:
    first, again, other = relabel(out, CLASSES), relabel(out, CLASSES), relabel(out, CLASSES[:2])
    assert first.model == again.model != other.model and first.model.startswith("words+prompts-")
    assert (first.parts_now, again.parts_now, other.parts_now) == (3, 0, 3)
    strict = relabel(out, CLASSES, threshold=1.0)
    rows = rows_of(out, strict.model)
    assert len(rows) == IMAGES and all(row["labels"] == [] and 0 < row["confidence"] < 1 for row in rows)
    assert verify(out) == []
    with pytest.raises(RunMismatch, match="made from another request: the classes and the prompts differ"):
        relabel(out, CLASSES[:2], name=first.model)


def test_no_image_and_no_checkpoint_of_images_is_read(
    words_run: Finished, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from img2parquet.read.folder import Folder

    monkeypatch.setattr(Folder, "read", lambda *_: pytest.fail("read a part"))
    monkeypatch.setattr("img2parquet.inference.steps.decode", lambda *_: pytest.fail("decoded an image"))
    moved = words_run.root.parent / "inputs-elsewhere"
    (words_run.root / "in").rename(moved)
    try:
        assert relabel(out, CLASSES).rows == IMAGES
    finally:
        moved.rename(words_run.root / "in")


def test_it_resumes_after_any_part(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, made = label_partition.Labeller.encode, list[int]()

    def dies(self: Any, number: int, *more: Any) -> bytes:
        made.append(number)
        if len(made) == 2:
            raise KeyboardInterrupt
        return encode(self, number, *more)

    monkeypatch.setattr(label_partition.Labeller, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        relabel(out, CLASSES, name="resumed")
    monkeypatch.undo()
    first = [path.read_bytes() for path in part_paths(out, "resumed")]
    assert len(first) == 1
    assert relabel(out, CLASSES, name="resumed").parts_now == 2
    relabel(out, CLASSES, name="at-once")
    assert [path.read_bytes() for path in part_paths(out, "resumed")][:1] == first
    assert [row["labels"] for row in rows_of(out, "resumed")] == [row["labels"] for row in rows_of(out, "at-once")]
    assert verify(out) == []


def test_evaluate_report_and_exports_take_it(words_run: Finished, tmp_path: Path) -> None:
    root = words_run.root
    out = copy_of(root / "out", tmp_path / "out")
    partition = relabel(out, CLASSES).model
    truths = {row["key"]: row["labels"][0]["name"] for row in rows_of(out, partition)}
    exported = img2parquet.export(out, "csv", str(tmp_path / "rows.csv"), model=partition)
    assert exported.rows == len(truths)
    [page] = img2parquet.report(out, tmp_path / "report.html")
    assert partition in page.read_text() and "a photo of a dog." in page.read_text()
    field = pq.read_schema(part_paths(out, partition)[0]).field("labels")
    is_clip = words_run.model.config.model_type == "clip"
    assert (field.metadata or {}).get(b"scores") == (None if is_clip else b"sigmoid")
    with pytest.raises(InputError):
        evaluate(out, "no such column", partition)


def test_the_command(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text("cat: [a cat, the cat]\n'no': a photo of nothing\n")
    assert main(["relabel", out, "--prompts", str(file), "--name", "by-file", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["classes"], said["rows"]) == ("by-file", ["cat", "no"], IMAGES)
    (tmp_path / "classes.txt").write_text("cat\n\n dog \n")
    sentences = ["--templates", "plain", "--templates", "the {}!"]
    assert main(["relabel", out, "--prompts", str(tmp_path / "classes.txt"), *sentences]) == 0
    shown = capsys.readouterr().out
    assert "2: cat, dog" in shown and f"{IMAGES} rows to model=words+prompts-" in shown
    derived = next(Path(out, "_derived").glob("words+prompts-*/_run.json"))
    assert json.loads(derived.read_text())["report"]["prompts"]["dog"] == ["a photo of a dog.", "the dog!"]


def test_the_80_sentences_of_imagenet() -> None:
    sentences = TEMPLATES["imagenet"]
    assert len(sentences) == len(set(sentences)) == 80
    assert all(sentence.count("{}") == 1 and sentence.endswith(".") for sentence in sentences)
    for known in ("itap of my {}.", "a photo of the hard to see {}.", "the origami {}.", "a {} in a video game."):
        assert known in sentences


WRONG: list[tuple[Any, Mapping[str, Any], str]] = [
    ([], {}, "no class|not a list"),
    (["cat", "cat"], {}, "class `cat` occurs twice"),
    (["cat", " "], {}, "not a list of texts"),
    ({"cat": []}, {}, "class `cat`: .* not a list of texts"),
    (["cat"], {"templates": "imagnet"}, "did you mean `imagenet`"),
    (["cat"], {"templates": ["a photo"]}, "no `{}` where the class goes"),
    (["cat"], {"top_k": 0}, "top_k: 0"),
    (["cat"], {"threshold": 2}, "threshold: 2"),
    (["cat"], {"name": "words"}, "not a valid name for a new partition"),
    (["cat " * 60, "dog"], {}, "tokens, its ends included"),
    ("/nowhere/classes.txt", {}, "no such file of prompts"),
]


@pytest.mark.parametrize(("prompts", "settings", "said"), WRONG)
def test_prompts_that_cannot_be_used(prompts: Any, settings: dict[str, Any], said: str, out: str) -> None:
    with pytest.raises(InputError, match=said):
        relabel(out, prompts, **settings)
    assert not Path(out, "_derived").exists()


@pytest.mark.parametrize("text", ["cat: [a cat\n", "3", "a: {b: c}", "no: a cat", "[cat, no]"])
def test_files_that_cannot_be_used(text: str, tmp_path: Path) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(text)
    with pytest.raises(InputError):
        class_prompts(str(file))


def test_models_and_vectors_that_know_no_words(words_run: Finished, tmp_path: Path) -> None:
    plain = copy_of(small_run(), tmp_path / "plain")
    with pytest.raises(OutputUnavailable, match=r"`tiny` \(levit\) has no text tower"):
        relabel(plain, CLASSES)
    root = words_run.root
    for n, (settings, said) in enumerate([({"pool": "tower"}, "pool: tower"), ({"dtype": "binary"}, "only the signs")]):
        driver.run(job_of(root, tmp_path / f"out-{n}", **settings), "local")
        with pytest.raises(OutputUnavailable, match=said):
            relabel(str(tmp_path / f"out-{n}"), CLASSES)


def test_a_checkpoint_without_its_tokenizer(words_run: Finished, out: str, tmp_path: Path) -> None:
    shutil.copytree(words_run.root / "ckpt", tmp_path / "moved")
    assert relabel(out, CLASSES, checkpoint=str(tmp_path / "moved")).rows == IMAGES
    (tmp_path / "moved" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        relabel(out, CLASSES[:2], checkpoint=str(tmp_path / "moved"))
