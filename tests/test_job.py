"""Test the job file: its fields and defaults, overrides, and the errors for mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from img2parquet.errors import JobError
from img2parquet.job import json_schema, load_job, parse_job
from img2parquet.run_identity import differences, identity_hash

JOB = {
    "input": {"kind": "webdataset", "uris": ["shards/{000..003}.tar"], "keep": ["label"]},
    "models": [
        {"model": "facebook/levit-128S@main", "outputs": [{"kind": "embedding"}, {"kind": "labels", "top_k": 3}]}
    ],
    "output": {"uri": "out/try"},
}


def changed(path: str, value: object) -> dict[str, object]:
    document = json.loads(json.dumps(JOB))
    *steps, last = path.split(".")
    place = document
    for step in steps:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[int(last) if isinstance(place, list) else last] = value
    return document  # type: ignore[no-any-return]


def test_a_job_is_read_with_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB))
    job = load_job(path)
    assert job.models[0].name == "levit-128S"
    assert job.output.rows_per_part == 16_384
    assert (job.dtype, job.preprocess, job.reject_limit) == ("auto", "exact", 0.05)
    with pytest.raises(ValidationError):
        job.dtype = "float32"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("inputs", {}, ["unknown field `inputs`", "did you mean `input`"]),
        ("input.uri", ["x"], ["unknown field `input.uri`", "did you mean `uris`"]),
        (
            "input.kind",
            "webdatset",
            ["unknown kind `webdatset`", "did you mean `webdataset`", "folder, parquet, table"],
        ),
        ("models.0.output", [], ["unknown field `models[0].output`", "did you mean `outputs`"]),
        ("models.0.outputs.0", {"kind": "embeding"}, ["models[0].outputs[0]", "did you mean `embedding`"]),
        ("models.0.outputs.1.topk", 3, ["unknown field `models[0].outputs[1].topk`", "did you mean `top_k`"]),
        ("models.0.outputs.1.top_k", 0, ["models[0].outputs[1].top_k", "greater than or equal to 1"]),
        ("models.0.name", "a/b", ["becomes the folder model=<name>"]),
        ("models.0.outputs", [{"kind": "embedding"}, {"kind": "embedding"}], ["both write the column `embedding`"]),
        ("models.0.outputs.0.name", "width", ["column `width`", "every result row"]),
        ("models.0.outputs.0.name", "label", ["column `label`", "input.keep"]),
        ("models", [JOB["models"][0], JOB["models"][0]], ["two models are named `levit-128S`"]),  # type: ignore[index]
        ("models", [], ["models", "at least 1"]),
        ("output", {}, ["`output.uri` is missing"]),
        ("reject_limit", 2, ["reject_limit", "less than or equal to 1"]),
        ("dtype", "float64", ["dtype"]),
        ("models.0.weights", "zeros", ["models[0].weights"]),
    ],
)
def test_mistakes_are_named_with_their_place_and_the_nearest_word(path: str, value: object, words: list[str]) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(changed(path, value), where="jobs/x.yaml")
    text = str(caught.value)
    assert text.startswith("jobs/x.yaml: ")
    for word in words:
        assert word in text, text


def test_anything_can_be_overridden() -> None:
    job = parse_job(
        JOB,
        [
            "output.uri=s3://b/x",
            "models.0.outputs[1].top_k=2",
            "reject_limit=0.5",
            "resources.workers=3",
            "dtype=float32",
        ],
    )
    assert job.output.uri == "s3://b/x"
    assert job.models[0].outputs[1].model_dump()["top_k"] == 2
    assert (job.reject_limit, job.resources.workers, job.dtype) == (0.5, 3, "float32")


@pytest.mark.parametrize("text", ["output.uri", "=3", "models.7.name=x", "models.x=1", "dtype.a=1", "a={"])
def test_an_override_that_fits_nowhere_is_refused(text: str) -> None:
    with pytest.raises(JobError):
        parse_job(JOB, [text])


@pytest.mark.parametrize("text", ["", "- a\n- b", "a: [", "a: !!python/object/apply:os.system ['true']"])
def test_a_file_that_is_no_job_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(JobError, match=r"job\.yaml"):
        load_job(path)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "label_photos.yaml").write_text("")
    with pytest.raises(JobError, match=r"did you mean `label_photos\.yaml`"):
        load_job(tmp_path / "label_photo.yaml")


def test_the_schema_describes_every_field_and_refuses_unknown_ones() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    for name, definition in schema["$defs"].items():
        for field, spec in definition.get("properties", {}).items():
            if field != "kind":
                assert "description" in spec, f"{name}.{field} has no description"


def test_every_ready_job_file_is_valid() -> None:
    for path in sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml")):
        load_job(path)


def test_differences_name_the_place_and_both_values() -> None:
    ours, theirs = {"dtype": "float32", "a": {"b": [1]}}, {"dtype": "bfloat16", "a": {"b": [2]}}
    assert differences(ours, theirs) == ["a.b: [1], was [2]", 'dtype: "float32", was "bfloat16"']
    assert differences(ours, ours) == []
    assert identity_hash(ours) != identity_hash(theirs)


def test_auto_may_be_written_out() -> None:
    auto = {"workers": "auto", "batch_size": "auto", "gpus_per_worker": "auto"}
    assert parse_job({**JOB, "resources": auto}).resources == parse_job(JOB).resources


@pytest.mark.parametrize("setting", [{"workers": 0}, {"batch_size": 0}, {"batch_size": -1}, {"gpus_per_worker": -0.5}])
def test_resources_of_nothing_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(JobError, match=r"resources\." + next(iter(setting))):
        parse_job({**JOB, "resources": setting})
