"""Problems of the job, the address or the cluster are reported before anything is sent."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from img2parquet.cli import main
from tests.submit.fake_head import fake_head
from tests.support.small_job import job_dict


def job_file(folder: Path, **more: Any) -> str:
    path = folder / "job.yaml"
    document = job_dict("s3://photos/*.tar", "facebook/levit-256", "s3://photos/out", **more)
    path.write_text(yaml.safe_dump(document))
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a refusal prints: one error and perhaps a hint, on stderr only."""
    assert main(["submit", *arguments]) == 2
    out, said = capsys.readouterr()
    assert out == "" and said.count("error: ") == 1 and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("resources.wrokers=2", "did you mean `workers`?"),
        ("output.uri=out/here", "output.uri: `/"),
        ("input.uris.0=/data/*.tar", "input.uris[0]: `/data/*.tar` is a path of this machine"),
        ("models.0.model=./checkpoint", "models[0].model: `./checkpoint` is a path"),
        ("output.uri=memory://out", "exists in one process only"),
        ("input.uris.0=https://u:hush@host/a.tar", "input.uris[0]: https://host/a.tar holds a login"),
        ("input.uris.0=https://host/a.tar?X-Amz-Signature=hush", "holds a login or a signature"),
    ],
)
def test_a_job_that_cannot_work_there_is_not_submitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    asked: list[str] = []
    with fake_head(asked=asked) as address:
        words = refused(capsys, job_file(tmp_path), "--address", address, "--set", override)
    assert said in words and "hush" not in words and asked == []


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "not the address of a Jobs API"),
        ("ftp://head", "not the address of a Jobs API"),
        ("http://", "not the address of a Jobs API"),
        ("", "no cluster is named"),
    ],
)
def test_addresses_that_cannot_be_a_jobs_api_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str, said: str
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert said in refused(capsys, job_file(tmp_path), "--address", address)


def test_an_address_where_nobody_listens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = refused(capsys, job_file(tmp_path), "--address", address)
    assert f"http://{address} does not respond" in said and "port-forward" in said


def test_an_address_of_another_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for answer in ((200, "<html>hello</html>"), (404, "no")):
        with fake_head(**{"/api/version": answer}) as address:
            assert "not as a Ray head" in refused(capsys, job_file(tmp_path), "--address", address)


@pytest.mark.parametrize(
    ("cluster", "resources", "said"),
    [
        ({"python": "3.9.19"}, {}, "the cluster runs Python 3.9.19, and img2parquet needs 3.11"),
        ({"ray": "2.31.0"}, {}, "the cluster runs Ray 2.31.0"),
        ({"ray": "3.1.0"}, {}, "the cluster runs Ray 3.1.0"),
        ({}, {"device": "cuda"}, "the job requires a GPU (`resources.device: cuda`), and no node"),
    ],
)
def test_a_cluster_that_cannot_run_the_job(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cluster: dict[str, Any],
    resources: dict[str, Any],
    said: str,
) -> None:
    asked: list[str] = []
    with fake_head(asked=asked, **cluster) as address:
        words = refused(capsys, job_file(tmp_path, resources=resources), "--address", address)
    assert said in words and not any(request.startswith(("PUT", "POST")) for request in asked)


def test_a_cluster_may_still_add_the_requested_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checks pass as far as the upload, which this head refuses."""
    asked: list[str] = []
    job = job_file(tmp_path, resources={"device": "cuda", "gpus_per_worker": 1})
    with fake_head(asked=asked) as address:
        assert main(["submit", job, "--address", address]) == 2
    said = capsys.readouterr().err
    assert "note: no node has a GPU yet" in said and "refused" in said and "Traceback" not in said
    assert [request for request in asked if request.startswith("PUT /api/packages/gcs/")]


def test_an_existing_gpu_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_file(tmp_path, resources={"device": "cuda"})
    with fake_head(resources={"CPU": 8.0, "GPU": 2.0}) as address:
        assert main(["submit", job, "--address", address]) == 2  # it refuses the upload
    said = capsys.readouterr().err
    assert "now 8 CPUs and 2 GPUs" in said and "note" not in said
