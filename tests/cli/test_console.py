"""The command line: exit codes, streams, and one clear message for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from img2parquet.cli import main
from img2parquet.results import reader
from tests.support.small_job import GOOD, ROWS, job_dict


def write_job(made: Path, folder: Path, **changes: Any) -> Path:
    document = job_dict(f"{made}/in/*.tar", made / "model", str(folder / "out"))
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**document, **changes}))
    return path


def test_a_job_from_plan_to_verify(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, out = str(write_job(made, tmp_path)), str(tmp_path / "out")
    assert main(["plan", job]) == 0
    assert "0 of 6 parts committed" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()  # planning writes nothing
    assert main(["run", job, "--runner", "local"]) == 0
    said = capsys.readouterr()
    assert f"rows in    {ROWS}" in said.out
    assert f"written    {GOOD} to model=tiny" in said.out
    assert "parts 6/6" in said.err
    assert said.out.count("\nbottleneck ") == 1 and "-bound: " in said.out
    assert main(["plan", job]) == 0
    assert "6 of 6 parts committed" in capsys.readouterr().out
    assert main(["run", job, "--runner", "local"]) == 0
    again = capsys.readouterr().out
    assert "nothing to do" in again and "bottleneck" not in again
    assert main(["status", out]) == 0
    now = capsys.readouterr().out
    assert "state      complete" in now and "-bound: " in now and "6 parts of session 2" in now
    assert main(["verify", out]) == 0
    assert "ok" in capsys.readouterr().err
    assert main(["rejects", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(json.loads(line)["reason"] for line in lines) == ["empty", "not_an_image", "truncated"]
    next((tmp_path / "out" / "model=tiny").iterdir()).unlink()
    assert main(["verify", out]) == 1
    assert "missing: model=tiny/part-" in capsys.readouterr().out


def test_status_of_many_parts_says_how_to_count(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["run", str(write_job(made, tmp_path)), "--runner", "local"]) == 0
    (tmp_path / "out" / "_SUCCESS").unlink()
    monkeypatch.setattr(reader, "FEW_FILES", 5)
    capsys.readouterr()
    assert main(["status", out]) == 0
    assert "rejected   not counted; --rejects reads" in capsys.readouterr().out
    assert main(["status", out, "--rejects"]) == 0
    assert "rejected   3\n" in capsys.readouterr().out
    assert main(["status", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rejected"] is None
    assert main(["status", out, "--json", "--rejects"]) == 0
    assert json.loads(capsys.readouterr().out)["rejected"] == 3
    assert main(["verify", out, "--json"]) == 1
    assert any("_SUCCESS" in problem for problem in json.loads(capsys.readouterr().out))


def test_the_summary_as_json(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(write_job(made, tmp_path)), "--runner", "local", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows_in"] == ROWS
    assert said["meter"]["stages"]["read"]["images"] == ROWS and said["bottleneck"] == said["meter"]["bottleneck"]


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("input.uris=[nowhere/*.tar]", 2, "nowhere"),
        ("input.uris=[s3://no-such-bucket-q/x.tar]", 2, "no-such-bucket-q"),
        ("models.0.model=facebook/levit-255", 2, "levit-25"),
        ("models.0.model=./nowhere", 2, "nowhere"),
        ("models.0.outputs=[{kind: feature_maps, stages: [stage1]}]", 2, "stage1"),
        ("models.0.outputs.0.kind=embeding", 2, "did you mean `embedding`"),
        ("models.0.image_size=80", 2, "80"),
        ("reject_limit=0.001", 1, "reject_limit"),
        ("resources={device: cpu, gpus_per_worker: 1}", 2, "resources.device"),
        ("resources.device=cuda", 2, "resources.device"),
        ("input.keep=[width]", 2, "width"),
        ("input.storage_options={secret: x}", 2, "secret"),
        ("output.uri=/proc/nope/out", 1, "/proc/nope"),
        ("output.uri=nosuch://bucket/x", 2, "nosuch"),
    ],
)
def test_mistakes_end_in_one_message(
    made: Path,
    tmp_path: Path,
    s3_endpoint: str,
    capsys: pytest.CaptureFixture[str],
    override: str,
    code: int,
    words: str,
) -> None:
    job = str(write_job(made, tmp_path))
    assert main(["run", job, "--runner", "local", "--set", override]) == code
    said = capsys.readouterr().err
    assert "error: " in said
    assert words in said, said
    assert "Traceback" not in said
    if code == 2:
        assert not list(tmp_path.glob("out/model=*"))


def test_unreachable_storage_is_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = str(write_job(made, tmp_path))
    overrides = ["--set", "output.uri=s3://b/x", "--set", "output.storage_options.endpoint_url=http://127.0.0.1:9"]
    assert main(["run", job, "--runner", "local", *overrides]) == 1
    assert "127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["jump"], ["run"], ["run", "x.yaml", "--runner", "spark"]])
def test_misuse_is_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("command", ["status", "verify", "rejects"])
def test_a_folder_that_is_no_output(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "_plan.parquet" in capsys.readouterr().err


def test_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    for name in ("facebook/levit-128S", "facebook/levit-384", "facebook/vit-msn-small", "facebook/vit-msn-large-7"):
        assert name in said


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "img2parquet job"
