"""What `import img2parquet` gives: every name there, documented, and each function on an output called by its URI."""

from __future__ import annotations

import ast
import inspect
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import img2parquet
from img2parquet import errors
from tests.support.finished_outputs import copy_of, rows_of, small_run
from tests.support.small_job import BROKEN, GOOD, ROWS, SHARDS, make_checkpoint, small_job

ON_AN_OUTPUT = (
    "status", "open_results", "read_rejects", "verify", "report", "evaluate", "find_mistakes", "fit_probe",
    "relabel", "export",
    "search",
    "build_index", "find_duplicates", "retry",
)  # fmt: skip
OTHERS = (
    "run", "load_job", "parse_job", "embed", "class_labels", "class_masks", "compute_loss", "load_model",
    "decode_vectors",
)  # fmt: skip
RESULTS = (
    "Summary", "RetrySummary", "Status", "Evaluation", "MistakesSummary", "ProbeSummary", "RelabelSummary",
    "ExportSummary", "SearchResult", "Hit", "IndexSummary", "DuplicateSummary", "JobSpec", "Model",
)  # fmt: skip
PROTOCOLS = ("Source", "Output", "Family")
EXCEPTIONS = tuple(name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception))


@pytest.fixture
def out(tmp_path: Path) -> str:
    return copy_of(small_run(), tmp_path / "out")


def test_the_surface_is_what_is_listed() -> None:
    assert sorted(img2parquet.__all__) == sorted((*ON_AN_OUTPUT, *OTHERS, *RESULTS, *PROTOCOLS, *EXCEPTIONS))
    assert set(img2parquet.__all__) <= set(dir(img2parquet))
    tree = ast.parse(Path(img2parquet.__file__).read_text())
    shown_to_editors = {
        alias.name
        for block in tree.body
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown_to_editors == set(img2parquet.__all__)


@pytest.mark.parametrize("name", img2parquet.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    found = getattr(img2parquet, name)
    text = inspect.getdoc(found) or ""
    assert len(text) > 20 and not text.startswith(f"{name}("), "a dataclass without a docstring shows its signature"
    assert not inspect.ismodule(found)


@pytest.mark.parametrize("name", [*ON_AN_OUTPUT, *OTHERS])
def test_functions_are_plain_and_say_what_they_raise(name: str) -> None:
    function = getattr(img2parquet, name)
    assert inspect.isfunction(function)
    parameters = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert "Raises " in (function.__doc__ or "")
    if name in ON_AN_OUTPUT:
        assert next(iter(parameters)) == "uri" and parameters["uri"].annotation == "str"
        assert "storage_options" in parameters or name == "retry"  # whose `overrides` say them as a job file would


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute `serach`"):
        img2parquet.serach  # type: ignore[attr-defined] # noqa: B018


def test_the_package_loads_nothing_heavy_and_lists_its_names() -> None:
    heavy = ("torch", "ray", "pyarrow")
    code = f"import sys, img2parquet; dir(img2parquet); print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_status(out: str) -> None:
    now = img2parquet.status(out)
    assert isinstance(now, img2parquet.Status) and now.is_complete
    assert (now.parts, now.rows_in, now.rejected) == (SHARDS, ROWS, len(BROKEN))


def test_open_results_and_decode_vectors(out: str) -> None:
    table = img2parquet.open_results(out, "tiny").to_table()
    vectors_ND = img2parquet.decode_vectors(table["embedding"], table.schema.field("embedding"))
    assert table.num_rows == len(vectors_ND) == GOOD


def test_read_rejects(out: str) -> None:
    assert img2parquet.read_rejects(out).num_rows == len(BROKEN)
    assert img2parquet.read_rejects(out, superseded=True).num_rows == 0


def test_verify(out: str) -> None:
    assert img2parquet.verify(out) == []
    next(Path(out, "model=tiny").glob("*.parquet")).unlink()
    assert any(problem.startswith("missing: ") for problem in img2parquet.verify(out))


def test_evaluate(out: str) -> None:
    found = img2parquet.evaluate(out, "label")
    assert isinstance(found, img2parquet.Evaluation) and found.rows == GOOD and found.top1 is not None


def test_search_by_image_and_by_key(out: str, tmp_path: Path) -> None:
    key = rows_of(out)[30]["key"]
    with tarfile.open(small_run().parent / "in" / f"{key.split('/')[0]}.tar") as tar:
        member = tar.extractfile(f"{key}.jpg")
        assert member
        (tmp_path / "query.jpg").write_bytes(member.read())
    by_image = img2parquet.search(out, str(tmp_path / "query.jpg"), k=5)
    by_key = img2parquet.search(out, key=key, k=4)
    assert isinstance(by_image, img2parquet.SearchResult) and by_image.hits[0].key == key
    assert [hit.key for hit in by_key.hits] == [hit.key for hit in by_image.hits[1:]]
    assert (by_key.model, by_key.column, by_key.compared) == ("tiny", "embedding", GOOD)
    for image, also_key in ((None, None), ("query.jpg", key)):
        with pytest.raises(img2parquet.InputError, match="an image or a key"):
            img2parquet.search(out, image, key=also_key)


def test_build_index(out: str, tmp_path: Path) -> None:
    built = img2parquet.build_index(out, to=str(tmp_path / "index"))
    assert isinstance(built, img2parquet.IndexSummary) and (built.rows, built.parts_added) == (GOOD, SHARDS)
    assert img2parquet.search(out, key=rows_of(out)[0]["key"], index=built.uri).how == "index"


def test_find_duplicates(out: str, tmp_path: Path) -> None:
    found = img2parquet.find_duplicates(out, str(tmp_path / "duplicates.parquet"), 0.999)
    assert isinstance(found, img2parquet.DuplicateSummary) and found.rows == GOOD
    assert Path(found.uri).is_file()


def test_find_mistakes(out: str, tmp_path: Path) -> None:
    found = img2parquet.find_mistakes(out, "label", str(tmp_path / "suspects.csv"))
    assert isinstance(found, img2parquet.MistakesSummary) and found.rows == GOOD
    assert len((tmp_path / "suspects.csv").read_text().splitlines()) == 1 + found.suspects


def test_fit_probe(out: str, tmp_path: Path) -> None:
    lines = [f"{row['key']},{row['label'] % 2}" for row in rows_of(out)[:40]]
    (tmp_path / "labels.csv").write_text("\n".join(["key,label", *lines]))
    made = img2parquet.fit_probe(out, str(tmp_path / "labels.csv"))
    assert isinstance(made, img2parquet.ProbeSummary) and (made.model, made.rows) == ("tiny+probe", GOOD)


def test_relabel(out: str) -> None:
    with pytest.raises(img2parquet.OutputUnavailable, match="no text tower"):
        img2parquet.relabel(out, ["cat", "dog"])


def test_report(out: str, tmp_path: Path) -> None:
    [page] = img2parquet.report(out, tmp_path / "report.html", sample=20)
    assert page.read_text().startswith("<!doctype html>")


def test_export(out: str, tmp_path: Path) -> None:
    done = img2parquet.export(out, "csv", str(tmp_path / "rows.csv"))
    assert isinstance(done, img2parquet.ExportSummary) and done.rows == GOOD and Path(done.destination).is_file()


def test_retry_with_nothing_to_try(out: str) -> None:
    summary = img2parquet.retry(out, ["not_found"], "local")
    assert isinstance(summary, img2parquet.RetrySummary) and summary.tried == 0


def test_run_resumes_a_finished_job_and_does_nothing() -> None:
    folder = small_run().parent
    job = small_job(str(folder / "in" / "*.tar"), folder / "model", str(folder / "finished"))
    summary = img2parquet.run(job, "local")
    assert isinstance(summary, img2parquet.Summary) and summary.parts_done_before == summary.parts == SHARDS


def test_load_job_is_parse_job_on_a_file(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "input: {kind: webdataset, uris: [/x/*.tar]}\n"
        "models: [{model: facebook/levit-256, outputs: [{kind: embedding}]}]\n"
    )
    overrides = [f"output.uri={tmp_path / 'out'}"]
    job = img2parquet.load_job(str(tmp_path / "job.yaml"), overrides)
    assert isinstance(job, img2parquet.JobSpec) and job.output.uri == str(tmp_path / "out")
    assert job == img2parquet.parse_job(job.model_dump(mode="json"))


def test_embed_takes_what_load_model_gives(tmp_path: Path) -> None:
    model = img2parquet.load_model(str(make_checkpoint(tmp_path / "tiny")))
    sink = io.BytesIO()
    Image.fromarray(np.zeros((80, 80, 3), np.uint8)).save(sink, "PNG")
    assert isinstance(model, img2parquet.Model)
    assert img2parquet.embed([sink.getvalue()], model).shape == (1, *model.card.gives["pooled"])


@pytest.mark.parametrize("name", ["status", "open_results", "read_rejects", "verify", "build_index", "report"])
def test_a_folder_that_is_no_output_is_an_input_error(name: str, tmp_path: Path) -> None:
    function: Callable[[str], Any] = getattr(img2parquet, name)
    with pytest.raises(img2parquet.InputError):
        function(str(tmp_path))
