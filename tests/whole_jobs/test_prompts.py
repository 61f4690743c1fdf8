"""A model whose classes are prompts is a classifier like any other: scored as the reference, recorded, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import img2parquet
from img2parquet.cli import main
from img2parquet.engine import class_weights
from img2parquet.errors import InputError, JobError, OutputUnavailable, RunMismatch, StorageError
from img2parquet.images.decode import decode
from img2parquet.images.preprocess import Preprocessor, normalize_on_device
from img2parquet.job import load_job, parse_job
from img2parquet.models import ModelSpec, load_model
from img2parquet.models.prompts import class_prompts
from img2parquet.results.probe.relabel import relabel
from img2parquet.results.verify import verify
from img2parquet.schema import Pixels
from tests.support.finished_outputs import rows_of, small_run
from tests.support.two_towers import IMAGES, KINDS, Finished, finished_run, job_of

CLASSES = {"cat": ["a cat"], "dog": ["the dog"], "red": ["red!"]}
OUTPUTS = [{"kind": "labels", "top_k": 2}, {"kind": "logits"}, {"kind": "embedding"}]


@pytest.fixture(params=KINDS)
def words_run(request: pytest.FixtureRequest) -> Finished:
    return finished_run(request.param)


def prompted(words_run: Finished, output: Path, prompts: Any = None, **more: Any) -> dict[str, Any]:
    job = job_of(words_run.root, output, rows_per_part=5)
    job["models"][0] |= {"outputs": OUTPUTS, "prompts": CLASSES if prompts is None else prompts, **more}
    return job


def expected(words_run: Finished, prompts: list[str]) -> dict[str, np.ndarray]:
    """The reference's `logits_per_image` by key."""
    ours, found = load_model(str(words_run.root / "ckpt")), {}
    for path in sorted((words_run.root / "in").iterdir()):
        pixels = decode(path.read_bytes())
        assert isinstance(pixels, Pixels)
        crop_HWC = Preprocessor(ours.card.preprocess)(pixels)
        x_1CHW = normalize_on_device(torch.from_numpy(crop_HWC)[None], ours.card.preprocess, torch.float32)
        with torch.no_grad():
            logits = words_run.model(input_ids=ours.text.tokenizer(prompts), pixel_values=x_1CHW).logits_per_image
        found[path.name] = logits[0].numpy()
    return found


def test_scores_are_those_of_the_reference_and_of_relabel(words_run: Finished, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    img2parquet.run(prompted(words_run, tmp_path / "out"))
    theirs = expected(words_run, [prompts[0] for prompts in CLASSES.values()])
    is_clip = words_run.model.config.model_type == "clip"
    rows = rows_of(out, "words")
    assert len(rows) == IMAGES
    for row in rows:
        logits_K = theirs[row["key"]]
        np.testing.assert_allclose(row["logits"], logits_K, rtol=2e-4, atol=2e-4)
        scores_K = np.exp(logits_K) / np.exp(logits_K).sum() if is_clip else 1 / (1 + np.exp(-logits_K))
        best = np.argsort(-logits_K, kind="stable")[:2]
        assert [label["name"] for label in row["labels"]] == [list(CLASSES)[id] for id in best]
        assert [label["score"] for label in row["labels"]] == pytest.approx(scores_K[best].tolist(), rel=1e-3, abs=1e-6)
    again = relabel(out, CLASSES, top_k=2)
    for mine, later in zip(rows, rows_of(out, again.model), strict=True):
        assert [label["id"] for label in mine["labels"]] == [label["id"] for label in later["labels"]]
        scores = [[label["score"] for label in row["labels"]] for row in (mine, later)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-6)
    assert verify(out) == []


def test_the_classifier_is_made_once_and_kept(
    words_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, stored = prompted(words_run, tmp_path / "out"), tmp_path / "out" / "_prompts-words.safetensors"
    img2parquet.run(job)
    first, parts = stored.read_bytes(), sorted((tmp_path / "out" / "model=words").iterdir())
    before = parts[1].read_bytes()
    parts[1].unlink()
    (tmp_path / "out" / "_SUCCESS").unlink()
    monkeypatch.setattr(class_weights, "load_model", lambda *_: pytest.fail("embedded the prompts again"))
    assert img2parquet.run(job).parts_done_before == 2
    assert parts[1].read_bytes() == before and stored.read_bytes() == first
    record = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert record["job"]["models"][0]["prompts"] == CLASSES and "templates" not in record["job"]["models"][0]
    assert record["notes"]["words"][-1] == "its 3 classes are 3 prompts"
    for damaged in (first[:-1] + bytes([first[-1] ^ 1]), first[:50]):
        stored.write_bytes(damaged)
        assert any("_prompts-words" in problem for problem in verify(str(tmp_path / "out")))
        parts[1].unlink(missing_ok=True)
        with pytest.raises(StorageError, match=r"_prompts-words\.safetensors: .*(.|\n)*remove the file"):
            img2parquet.run(job)


def test_other_prompts_are_another_run(words_run: Finished, tmp_path: Path) -> None:
    img2parquet.run(prompted(words_run, tmp_path / "out"))
    with pytest.raises(RunMismatch, match="prompts"):
        img2parquet.run(prompted(words_run, tmp_path / "out", {**CLASSES, "red": ["a red"]}))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    job = parse_job(prompted(words_run, tmp_path / "out", str(tmp_path / "classes.txt"), templates=["a {}", "the {}!"]))
    prompts = job.models[0].class_prompts
    assert prompts is not None and prompts.prompts == (("a cat", "the cat!"), ("a dog", "the dog!"))
    assert parse_job(job.model_dump(mode="json")).models[0].class_prompts == prompts  # as a record is read


def test_readers_take_the_classes_as_those_of_a_checkpoint(words_run: Finished, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    img2parquet.run(prompted(words_run, tmp_path / "out"))
    [page] = img2parquet.report(out, tmp_path / "report.html")
    assert "dog" in page.read_text()
    assert img2parquet.export(out, "label-studio", str(tmp_path / "tasks"), images="https://x/{key}").rows == IMAGES
    spec = ModelSpec(str(words_run.root / "ckpt"), prompts=class_prompts(CLASSES))
    card = load_model(spec).card
    assert card.labels == tuple(CLASSES) and card.gives["logits"] == (3,) and card.prompts


def test_label_in_one_line(words_run: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    words = ["--model", str(words_run.root / "ckpt"), "--prompts", str(tmp_path / "classes.txt")]
    options = ["--runner", "local", "--set", "dtype=float32", "--set", "models.0.name=words"]
    assert main(["label", str(words_run.root / "in"), *words, "--to", str(tmp_path / "out"), *options]) == 0
    rows = rows_of(str(tmp_path / "out"), "words")
    assert {label["name"] for row in rows for label in row["labels"]} == {"cat", "dog"} and "embedding" in rows[0]
    assert load_job(tmp_path / "out.yaml").models[0].class_prompts == class_prompts(["cat", "dog"])
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["models"][0]["prompts"].endswith("classes.txt")
    assert "2 prompts" in capsys.readouterr().err


def test_prompts_that_are_refused_before_anything_is_written(words_run: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for prompts, said in (([], "models.0..*no class|not a list"), (["cat", "cat"], "`cat` occurs twice")):
        with pytest.raises(JobError, match=said):
            img2parquet.run(prompted(words_run, out, prompts))
    with pytest.raises(JobError, match="did you mean `imagenet`"):
        img2parquet.run(prompted(words_run, out, templates="imagnet"))
    with pytest.raises(JobError, match="`templates` needs `prompts`"):
        parse_job({**(job := job_of(words_run.root, out)), "models": [{**job["models"][0], "templates": "imagenet"}]})
    with pytest.raises(InputError, match="tokens, its ends included"):
        img2parquet.run(prompted(words_run, out, {"cat": ["cat " * 60], "dog": ["a dog"]}))
    if words_run.model.config.model_type == "clip":
        with pytest.raises(InputError, match="always gets 1"):
            img2parquet.run(prompted(words_run, out, ["cat"]))
        with pytest.raises(InputError, match="always gets 1"):
            relabel(words_run.out, ["cat"])
    for model, said in (
        (str(small_run().parent / "model"), "no text tower"),
        ("transformers:openai/clip", "its library"),
    ):
        with pytest.raises(OutputUnavailable, match=said):
            img2parquet.run(prompted(words_run, out, model=model))
    assert not out.exists()
