"""Search by words: ranks against the reference's text vectors, mixed queries, filters, and spaces that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import img2parquet
from img2parquet.cli import main
from img2parquet.errors import InputError, OutputUnavailable
from img2parquet.models import load_model
from img2parquet.results.search.row_filter import parse_filter
from img2parquet.results.search.search import search
from tests.support.finished_outputs import copy_of, rows_of, small_run
from tests.support.two_towers import IMAGES, Finished

TABLE = pa.table(
    {
        "width": pa.array([100, 600, 700, None], pa.int32()),
        "label": ["cat", "dog", None, "cat"],
        "a-b": [0.5, -1.0, 2.0, 3.0],
        "row": [7, 8, 9, 10],
        "labels": [[1], [2], [3], [4]],
    }
)


def units(uri: str) -> tuple[list[str], np.ndarray]:
    rows = rows_of(uri, "words")
    vectors = np.array([row["embedding"] for row in rows], np.float64)
    return [row["key"] for row in rows], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def text_units(model: Any, root: Path, texts: list[str]) -> np.ndarray:
    """The reference's text vectors, of length 1."""
    ids = load_model(str(root / "ckpt")).text.tokenizer(texts)
    with torch.no_grad():
        found = model.get_text_features(ids).pooler_output
    return torch.nn.functional.normalize(found, dim=1).double().numpy()


def order(keys: list[str], scores: np.ndarray) -> list[str]:
    return [keys[i] for i in np.argsort(-scores, kind="stable")]


def test_ranks_are_brute_force_with_the_reference_s_texts(words_run: Finished) -> None:
    model, root = words_run.model, words_run.root
    out = str(root / "out")
    keys, unit = units(out)
    texts = text_units(model, root, ["a cat", "red dog", "a dog"])
    one = search(out, text="a cat", k=IMAGES)
    assert [hit.key for hit in one.hits] == order(keys, unit @ texts[0]) and one.query == "“a cat”"
    assert [hit.score for hit in one.hits] == pytest.approx(sorted(unit @ texts[0], reverse=True), abs=1e-5)
    mean = texts[:2].mean(0) - texts[2]
    both = search(out, text=["a cat", "red dog"], without="a dog", k=IMAGES)
    assert [hit.key for hit in both.hits] == order(keys, unit @ mean)
    assert both.hits[0].score == pytest.approx((unit @ (mean / np.linalg.norm(mean))).max(), abs=1e-5)
    mixed = search(out, key=keys[3], text="a cat", k=IMAGES)
    assert [hit.key for hit in mixed.hits] == [
        key for key in order(keys, unit @ (unit[3] + texts[0])) if key != keys[3]
    ]
    image = search(out, str(root / "in" / keys[3]), text="a cat", k=IMAGES)
    assert [hit.key for hit in image.hits] == order(keys, unit @ (unit[3] + texts[0]))


def test_the_index_serves_words_and_a_filter_goes_without_it(words_run: Finished, tmp_path: Path) -> None:
    out = copy_of(words_run.root / "out", tmp_path / "out")
    img2parquet.build_index(out)
    by_index, exact = search(out, text="a cat", k=4), search(out, text="a cat", k=4, exact=True)
    assert by_index.how == "index" and by_index.hits == exact.hits
    keys = [hit.key for hit in search(out, text="a cat", k=IMAGES).hits]
    some = search(out, text="a cat", where='key >= "06.jpg"', k=3)
    assert some.how == "exact" and some.compared == IMAGES - 6
    assert [hit.key for hit in some.hits] == [key for key in keys if key >= "06.jpg"][:3]
    assert search(out, text="a cat", where="width < 0").hits == ()


def test_the_command_and_its_page(
    words_run: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, page = str(words_run.root / "out"), tmp_path / "found.html"
    words = ["--text", "a <b>cat", "--not", "a dog", "--where", "width > 1"]
    assert main(["search", out, *words, "-k", "2", "--json", "--html", str(page)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    shown = page.read_text()
    assert "“a &lt;b&gt;cat”, not “a dog”, where width &gt; 1" in shown and "<b>cat" not in shown


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({}, InputError, "needs an image or a key, or a text"),
        ({"without": "a dog"}, InputError, "needs an image or a key, or a text"),
        ({"text": " "}, InputError, r"texts\[0\]: the prompt is empty"),
        ({"text": "cat " * 60}, InputError, "tokens, its ends included"),
        ({"text": "a cat", "without": "a cat"}, InputError, "nothing is left to look for"),
        ({"text": "a cat", "where": "wdith > 1"}, InputError, "no column `wdith`(.|\n)*did you mean `width`"),
        ({"text": "a cat", "where": "width >"}, InputError, "invalid syntax"),
    ],
)
def test_queries_that_are_refused(
    settings: dict[str, Any],
    error: type[Exception],
    said: str,
    words_run: Finished,
) -> None:
    with pytest.raises(error, match=said):
        search(str(words_run.root / "out"), **settings)


def test_a_model_without_words() -> None:
    with pytest.raises(OutputUnavailable, match=r"`tiny` \(levit\) has no text tower"):
        search(str(small_run()), text="a cat")


FILTERS = {
    "width > 512": [1, 2],
    "512 < width <= 600": [1],
    'label == "cat"': [0, 3],
    'label != "cat"': [1],
    'label in ("dog", "bird") or width < 200': [0, 1],
    'label not in ["dog"] and label is not None': [0, 3],
    "label is None": [2],
    "width is None and not row == 9": [3],
    'column("a-b") >= -1 and row > 7': [1, 2, 3],
    'column("a-b") == -1.0': [1],
    "1 < 2": [0, 1, 2, 3],
}


@pytest.mark.parametrize("text", FILTERS)
def test_filters(text: str) -> None:
    assert parse_filter(text, TABLE.schema).passes(TABLE) == FILTERS[text]


@pytest.mark.parametrize(
    "text",
    ["", "width", "width + 1 > 2", "__import__('os')", "width.real > 1", "label > 3", "labels == 1", "label in width",
     "width is 3", "width > 1; 2", "(lambda: 1)()", 'column("nothing") == 1', "column(1, 2) == 1", "f'{width}' == '1'"],
)  # fmt: skip
def test_filters_that_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--where"):
        parse_filter(text, TABLE.schema)
