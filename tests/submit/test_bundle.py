"""A bundle holds the resolved job and the package, no file of the current folder and no credential."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from img2parquet.job import load_job, parse_job
from img2parquet.submit.bundle import Install, make_bundle, needs
from img2parquet.submit.jobs_client import End, Shown, _end
from tests.support.small_job import job_dict, small_job

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
BUCKET = ("s3://photos/*.tar", "facebook/levit-256", "s3://photos/out")


def test_the_upload_holds_the_job_and_the_package_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = tmp_path / "here"
    secrets.mkdir()
    (secrets / ".env").write_text("AWS_SECRET_ACCESS_KEY=planted-7c1f")
    monkeypatch.chdir(secrets)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-7c1f")
    folder = tmp_path / "bundle"
    folder.mkdir()
    environment = make_bundle(small_job(*BUCKET), "photos.yaml").pack(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["bootstrap.py", "img2parquet", "job.json", "needs.json"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".py", ".typed", ".json", ".html", ".css", ".js"}
    assert not any(b"planted-7c1f" in path.read_bytes() for path in files)
    assert "planted-7c1f" not in json.dumps(environment)
    assert sum(path.stat().st_size for path in files) < 3 << 20
    assert environment["working_dir"] == str(folder) and set(environment) == {"working_dir", "env_vars"}
    ran = subprocess.run(  # the package is complete: it runs from there
        [sys.executable, "-m", "img2parquet.cli", "schema"], cwd=folder, capture_output=True, text=True, timeout=300,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert ran.returncode == 0 and json.loads(ran.stdout)["title"] == "img2parquet job"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_is_the_same_after_writing_and_reading_it(path: Path, tmp_path: Path) -> None:
    job = load_job(path)
    make_bundle(job, path.name, "image", shared_paths=True).pack(tmp_path)
    assert load_job(tmp_path / "job.json") == job


def test_the_same_job_has_the_same_id() -> None:
    first, second = (make_bundle(small_job(*BUCKET), "My Photos!.yaml").job_id for _ in range(2))
    other = make_bundle(small_job(*BUCKET[:2], "s3://photos/elsewhere"), "My Photos!.yaml").job_id
    assert first == second != other and first.startswith("img2parquet-my-photos-")


def test_a_stopped_job_has_its_grace_period() -> None:
    job = parse_job(job_dict(*BUCKET, resources={"grace_s": 40}))
    assert make_bundle(job, "x").stop_wait_s > 40


def test_pip_installs_the_requirements_but_not_another_ray(tmp_path: Path) -> None:
    wanted = make_bundle(small_job(*BUCKET), "x", "pip").pack(tmp_path)["pip"]
    names = {need.split(">")[0].split("[")[0] for need in wanted}
    assert {"torch", "pyarrow", "pillow", "simplejpeg"} <= names and "ray" not in names and "mypy" not in names


@pytest.mark.parametrize(
    ("install", "change", "said"),
    [
        ("upload", {"requires": ["pyarrow>=999"]}, "pyarrow is "),
        ("upload", {"requires": ["no-such-thing-at-all"]}, "no-such-thing-at-all is not installed"),
        ("image", {"version": "99.1"}, "and 99.1 was submitted"),
    ],
)
def test_a_cluster_with_missing_requirements_reports_them(
    tmp_path: Path, install: Install, change: dict[str, Any], said: str
) -> None:
    make_bundle(small_job(*BUCKET), "x", install).pack(tmp_path)
    (tmp_path / "needs.json").write_text(json.dumps({**needs(install), **change}))
    command = [sys.executable, "bootstrap.py", "schema"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2 and said in ran.stderr and ran.stdout == ""
    assert ran.stderr.count("\n") == 2 and "hint: " in ran.stderr


def test_a_cluster_that_meets_the_requirements_runs_the_command(tmp_path: Path) -> None:
    make_bundle(small_job(*BUCKET), "x").pack(tmp_path)
    command = [sys.executable, "bootstrap.py", "schema"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and ran.stdout.startswith("{")


def test_a_log_that_is_sent_again_is_shown_once() -> None:
    said: list[str] = []
    shown = Shown(said.append)
    for texts in (["one\n", "tw"], ["one\ntwo\n", "three\n"], ["one\n"], ["one\ntwo\nthree\nfour\n"]):
        shown.begin()
        for text in texts:
            shown.add(text)
    shown.whole("one\ntwo\nthree\nfour\nfive\n")
    assert "".join(said) == "one\ntwo\nthree\nfour\nfive\n"


@pytest.mark.parametrize(
    ("status", "code", "end"),
    [
        ("SUCCEEDED", 0, End("SUCCEEDED", 0)),
        ("FAILED", 2, End("FAILED", 2)),
        ("FAILED", -9, End("FAILED", 137, "it died")),
        ("FAILED", None, End("FAILED", 1, "it died")),
        ("STOPPED", -15, End("STOPPED", 143)),
        ("STOPPED", 143, End("STOPPED", 143)),
    ],
)
def test_how_a_job_ended(status: str, code: int | None, end: End) -> None:
    class Status:
        value = status

    class Info:
        driver_exit_code, message = code, "it died\nat some place"

    Info.status = Status  # type: ignore[attr-defined]
    assert _end(Info) == end
