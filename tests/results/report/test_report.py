"""The page as a whole: what is in it, what is not, and outputs in every state."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import img2parquet
from img2parquet.cli import main
from img2parquet.dataset.commit import Output
from img2parquet.errors import InputError, UserError
from img2parquet.outputs.labels import LABELS
from img2parquet.outputs.segmentation import png
from img2parquet.results.report import report
from img2parquet.results.report.page import MARK, embedded, policy, visible
from img2parquet.results.report.row_sample import read_samples
from img2parquet.results.report.run_summary import read_run_summary
from img2parquet.results.report.sections import show
from tests.results.report.hostile import KEYS, NAMES, PER_SHARD, SHARDS
from tests.support import finished_outputs


class Tags(HTMLParser):
    """Start tags with their attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def page(output: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(str(output), tmp_path_factory.mktemp("page") / "r.html")[0].read_text()


def values(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def copied(output: Path, to: Path, without: str = "") -> Path:
    shutil.copytree(output, to, ignore=shutil.ignore_patterns(*without.split()))
    return to


def test_the_page_names_totals_models_and_rejects(page: str) -> None:
    text = " ".join(Tags(page).texts)
    rows = SHARDS * PER_SHARD
    assert f"{rows}" in text and f"{rows - 2}" in text
    assert "Complete" in text and "tiny" in text and "not_an_image" in text and "truncated" in text
    for title in ("Embedding map", "Labels", "Confidence", "Calibration", "Random rows", "Least confident", "By label",
                  "Nearest neighbours", "Near-duplicates", "Rejects", "Where the time went", "What ran"):  # fmt: skip
        assert title in text, title


def test_nothing_is_loaded_and_nothing_foreign_runs(page: str) -> None:
    tags = Tags(page)
    assert len(tags.named("script")) == 2 and len(tags.named("style")) == 1  # ours and the data
    for _, attributes in tags.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset")]
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("src") or "data:").startswith("data:")
    assert not {"link", "iframe", "object", "base", "form", "embed"} & {tag for tag, _ in tags.tags}
    meta = next(m for m in tags.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert str(meta["content"]).startswith("default-src 'none'; img-src data:") and "unsafe" not in str(meta["content"])


def test_hostile_names_are_text(page: str) -> None:
    tags = Tags(page)
    assert not [a for a in tags.named("img") if a.get("src") == "x"]
    text = " ".join(tags.texts)
    assert NAMES[0] in text and "{{ 7 * 7 }}" in text  # shown as they are, and not computed
    assert "\u202e" not in page and "\x1b" not in page  # what turns text around is spelled out
    assert "\\u202e" in page
    keys = values(page)["maps"][0]["keys"]
    assert any(key.startswith(KEYS[0]) for key in keys) and any(key.startswith(KEYS[1]) for key in keys)


def test_no_credentials(page: str) -> None:
    assert "hunter2" not in page


def test_every_sampled_row_has_a_point_and_a_picture(page: str) -> None:
    data = values(page)
    (points,) = data["maps"]
    rows = SHARDS * PER_SHARD - 2
    assert len(points["layouts"]["PCA"]) == len(points["keys"]) == len(points["group"]) == rows
    assert len(set(points["picture"])) == rows
    assert all(data["pictures"][i].startswith("data:image/webp;base64,") for i in points["picture"])


def test_the_truncated_reject_has_a_thumbnail(page: str) -> None:
    rejects = page[page.index('id="rejects"') : page.index('id="speed"')]
    assert rejects.count("data-picture") == 1


def test_truth_is_found_where_values_are_class_names(page: str, output: Path, tmp_path: Path) -> None:
    assert "Against <code>label</code>" in page
    other = report(str(output), tmp_path / "r.html", truth="caption")[0].read_text()
    assert "Against <code>" not in other and "labels of tiny is not scored" in other  # captions are no classes
    with pytest.raises(InputError, match="no model has a column `lable`"):
        report(str(output), tmp_path / "r.html", truth="lable")


def test_the_same_output_gives_the_same_page(page: str, output: Path, tmp_path: Path) -> None:
    again = report(str(output), tmp_path / "r.html")[0].read_text()
    # thumbnails come as they are fetched; what they are numbered by may differ, what is shown may not
    pick = [{key: points[key] for key in ("layouts", "keys", "says", "group")} for points in values(page)["maps"]]
    assert pick == [{key: points[key] for key in pick[0]} for points in values(again)["maps"]]


def test_a_small_sample_is_that_small(output: Path, tmp_path: Path) -> None:
    page = report(str(output), tmp_path / "r.html", sample=10)[0].read_text()
    assert len(values(page)["maps"][0]["keys"]) == 10


def test_sheets_are_written_beside_the_page(output: Path, tmp_path: Path) -> None:
    paths = img2parquet.report(str(output), to=tmp_path / "r.html", images=True)  # as users call it
    names = {path.name for path in paths}
    assert {"r.html", "r-tiny-random.png", "r-tiny-unsure.png", "r-tiny-map.png"} <= names
    for path in paths[1:]:
        with Image.open(path) as image:
            assert image.format == "PNG" and len(image.getcolors(1 << 24) or []) > 10, path


def test_missing_shards_give_a_page_without_thumbnails_and_a_note(output: Path, tmp_path: Path) -> None:
    moved = output.parent / "in-moved"
    (output.parent / "in").rename(moved)
    try:
        page = report(str(output), tmp_path / "r.html")[0].read_text()
    finally:
        moved.rename(output.parent / "in")
    assert values(page)["pictures"] == []
    assert "is gone since the plan was made" in page and "Embedding map" in page and "no thumbnail" in page


def test_an_unfinished_output_shows_what_is_committed(output: Path, tmp_path: Path) -> None:
    there = copied(output, tmp_path / "out", "_SUCCESS _manifest.parquet _rejects.parquet part-000002-*")
    page = report(str(there), tmp_path / "r.html")[0].read_text()
    text = " ".join(Tags(page).texts)
    assert "Not finished" in text and "has not finished" in text
    assert f"{2 * PER_SHARD - 2}" in text and "not_an_image" in text  # from footers
    assert len(values(page)["maps"][0]["keys"]) == 2 * PER_SHARD - 2


def test_an_output_with_nothing_committed(output: Path, tmp_path: Path) -> None:
    there = copied(output, tmp_path / "out", "_SUCCESS _manifest.parquet _rejects.parquet model=* _meter-*")
    text = report(str(there), tmp_path / "r.html")[0].read_text()
    assert "Nothing committed yet" in text and "What ran" in text


def test_a_retry_adds_its_rows(output: Path, tmp_path: Path) -> None:
    there = copied(output, tmp_path / "out")
    summary = img2parquet.retry(str(there), runner="local")
    assert summary.generation == 1
    page = report(str(there), tmp_path / "r.html")[0].read_text()
    assert "Complete" in page and len(values(page)["maps"][0]["keys"]) == SHARDS * PER_SHARD - 2
    (there / "_SUCCESS-1").unlink()
    page = report(str(there), tmp_path / "r.html")[0].read_text()
    assert "its last retry has not finished" in page and "not_an_image" in page


def test_a_foreign_folder_of_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([float(i * i % 7) for i in range(80)], pa.float32()), 4)
    pq.write_table(pa.table({"key": [f"k{i}" for i in range(20)], "vector": vectors}), folder / "a.parquet")
    (folder / "b.parquet").write_bytes(b"no Parquet at all")
    page = report(str(folder), tmp_path / "r.html")[0].read_text()
    assert "Not an output of img2parquet" in page and "b.parquet cannot be read" in page
    assert len(values(page)["maps"][0]["keys"]) == 20


def test_an_empty_folder_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing to report on"):
        report(str(tmp_path / "empty"), tmp_path / "r.html")


def test_damaged_records_and_parts_become_notes(output: Path, tmp_path: Path) -> None:
    there = copied(output, tmp_path / "out")
    (there / "_run.json").write_text("{")
    (there / "_rejects.parquet").write_bytes(b"PAR1")
    part = next(there.glob("model=tiny/part-000001-*"))
    part.write_bytes(part.read_bytes()[:-100])
    text = report(str(there), tmp_path / "r.html")[0].read_text()
    assert "record cannot be read" in text and "rejects cannot be read" in text and "part-000001" in text


def test_a_file_that_is_no_report_is_left_alone(output: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<p>three years of work</p>")
    with pytest.raises(UserError, match="is not a report"):
        report(str(output), thesis)
    assert thesis.read_text() == "<p>three years of work</p>"
    for to in ("s3://bucket/r.html", tmp_path / "no" / "r.html", tmp_path):
        with pytest.raises(UserError):
            report(str(output), to)
    with pytest.raises(UserError, match="sample of 0"):
        report(str(output), tmp_path / "r.html", sample=0)


def test_an_older_report_is_replaced(output: Path, tmp_path: Path) -> None:
    old = tmp_path / "r.html"
    old.write_text(f"<!doctype html>\n{MARK}\nold")
    report(str(output), old, sample=5)
    assert "old" not in old.read_text()[:60] and [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_the_command(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(output), "--to", str(tmp_path / "r.html"), "--sample", "20"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'r.html'}\n"
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nothing to report on" in capsys.readouterr().err


def test_from_s3(output: Path, tmp_path: Path, s3_bucket: str) -> None:
    store = Output.at(f"{s3_bucket}/out")
    for path in output.rglob("*"):
        if path.is_file():
            store.put_once(str(path.relative_to(output)), path.read_bytes())
    page = report(f"{s3_bucket}/out", tmp_path / "r.html", sample=30)[0].read_text()
    assert len(values(page)["pictures"]) >= 30


def test_embedded_json_cannot_leave_its_element() -> None:
    text = str(embedded({"a": "</script><!--&\u2028"}))
    assert "<" not in text and ">" not in text and "\u2028" not in text
    assert json.loads(text) == {"a": "</script><!--&\u2028"}


def test_the_policy_is_of_these_very_texts() -> None:
    assert policy("a", "b") != policy("a", "c") and policy("a", "b") != policy("c", "b")


def test_visible_is_one_short_line() -> None:
    assert visible("a\nb") == "a\\nb" and visible("x" * 500, 10) == "x" * 9 + "…"
    assert "hunter2" not in visible("see https://me:hunter2@example.com/a.jpg")


def test_classes_of_one_name_are_shown_apart(tmp_path: Path) -> None:
    names = ["crane", "crane", "dog", ""]
    ids = [0, 0, 0, 1, 1, 2, 3]
    labels = pa.array([[{"id": k, "name": names[k], "score": 0.9}] for k in ids], LABELS)
    mask = pa.field("mask", pa.binary(), metadata={"labels": json.dumps(names)})
    masks = pa.array([png(np.full((10, 10), k, np.int64), 4) for k in ids])
    fields = [pa.field("labels", LABELS), mask, pa.field("truth", pa.int64())]
    table = pa.Table.from_arrays([labels, masks, pa.array([0, 1, 1, 1, 0, 2, 3])], schema=pa.schema(fields))
    identity = {
        "outputs": [{"kind": "labels", "name": "labels"}, {"kind": "segmentation", "name": "mask"}],
        "config": {"id2label": {str(k): name for k, name in enumerate(names)}},
    }
    uri = finished_outputs.make_output(str(tmp_path / "out"), identity, [table])
    summary = read_run_summary(uri, {})
    (section,) = show(summary, read_samples(summary, 100, "truth"), "truth").sections
    assert section.label_counts == [("crane (0)", 3), ("crane (1)", 2), ("class 3", 1), ("dog", 1)]
    assert [name for _, name, _ in section.areas][:2] == ["crane (0)", "crane (1)"]
    judged = section.judged["labels"]
    assert judged.names == ["class 3", "crane (0)", "crane (1)", "dog"]
    assert judged.confusion.tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 2, 1, 0], [0, 0, 0, 1]]
    page = report(uri, tmp_path / "r.html", truth="truth")[0].read_text()
    assert "crane (0)" in page and "crane (1)" in page
