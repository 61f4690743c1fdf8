"""Whole jobs with secrets planted in the environment and in URLs: none is in the output, or in what is said."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from img2parquet.cli import main
from img2parquet.dataset.commit import Output
from img2parquet.errors import JobError
from img2parquet.job import parse_job
from img2parquet.storage import Store, names_in
from img2parquet.storage.backend import redact_text
from img2parquet.telemetry.prometheus import Page
from tests.security.servers import Answer, Web, web
from tests.support.small_job import job_dict, jpeg, make_checkpoint, make_shards

ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": "PLANTED-aws-secret",
    "AWS_SESSION_TOKEN": "PLANTED-aws-session",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountKey=PLANTED-azure",
    "AZURE_STORAGE_SAS_TOKEN": "sig=PLANTED-sas",
    "GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/PLANTED-google.json",
    "HF_TOKEN": "hf_PLANTED",
}
SIGNED = (
    "X-Amz-Credential=PLANTED-id&X-Amz-Signature=PLANTED-signature&X-Amz-Security-Token=PLANTED-token&sig=PLANTED-sas"
    "&token=PLANTED-bearer"
)
PLANTED = b"PLANTED"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    make_checkpoint(folder / "checkpoint")
    make_shards(folder / "in", shards=1, per_shard=6, broken=False)
    (folder / "in" / "a.jpg").write_bytes(jpeg(1))
    (folder / "in" / "bad.jpg").write_bytes(b"<html>")
    return folder


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG)


def files(made: Path) -> Callable[[str], Answer]:
    def answer(target: str) -> Answer:
        path = made / "in" / target.partition("?")[0].lstrip("/")
        return Answer(body=path.read_bytes(), headers={"ETag": '"1"'}) if path.is_file() else Answer(404)

    return answer


@pytest.fixture
def site(made: Path) -> Iterator[Web]:
    with web(files(made)) as server:
        yield server


def signed(site: Web, name: str) -> str:
    return f"http://user:PLANTED-password@127.0.0.1:{site.port}/{name}?v=1&{SIGNED}"


def write_job(folder: Path, made: Path, **settings: Any) -> Path:
    document = {**job_dict("unused", made / "checkpoint", str(folder / "out")), "reject_limit": 1.0}
    document["input"] = settings
    (folder / "job.yaml").write_text(yaml.safe_dump(document))
    return folder / "job.yaml"


def assert_nothing_leaked(folder: Path, said: bytes) -> None:
    """In no file below a folder, compressed or not, nor in what was said."""
    assert said.find(PLANTED) < 0, said[max(0, said.find(PLANTED) - 300) :][:600].decode()
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in ("job.yaml", "list.csv"):
            assert PLANTED not in path.read_bytes(), path
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                assert "PLANTED" not in f"{table.to_pydict()} {table.schema.metadata} {table.schema}", path


def run_all(job: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> tuple[int, bytes]:
    """`run`, then all that tells of it: the first exit code, and every word on stdout, stderr and in the log."""
    out = str(job.parent / "out")
    code = main(["run", str(job), "--runner", "local"])
    for command in (["plan", str(job)], ["status", out], ["rejects", out], ["verify", out]):
        main(command)
    said = capfd.readouterr()
    log = "\n".join(logging.Formatter("%(name)s %(message)s").format(record) for record in caplog.records)
    return code, (said.out + said.err + log).encode()


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    pq.write_table(
        __import__("pyarrow").table({"a": ["PLANTED" * 9] * 1000}), tmp_path / "a.parquet", compression="zstd"
    )
    with pytest.raises(AssertionError):
        assert_nothing_leaked(tmp_path, b"")
    with pytest.raises(AssertionError):
        assert_nothing_leaked(tmp_path / "none", b"a PLANTED word")


def test_a_job_over_signed_urls_leaves_no_trace_of_them(
    site: Web, made: Path, tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    job = write_job(tmp_path, made, kind="webdataset", uris=[signed(site, "000.tar")])
    code, said = run_all(job, capfd, caplog)
    assert code == 0 and b"rows in    6" in said
    assert any("PLANTED-signature" in target for target in site.asked)
    assert_nothing_leaked(tmp_path, said)


def test_a_list_of_signed_urls_leaves_no_trace_of_them(
    site: Web, made: Path, tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    names = [signed(site, name) for name in ("a.jpg", "bad.jpg", "gone.jpg", "a.jpg")]
    private = signed(site, "a.jpg").replace("127.0.0.1", "127.0.0.2")
    (made / "in" / "list.csv").write_text("\n".join(["uri,n", *(f"{name},1" for name in [*names, private])]))
    job = write_job(tmp_path, made, kind="table", uris=[signed(site, "list.csv")], keep=["uri", "n"])
    code, said = run_all(job, capfd, caplog)
    assert code == 0 and b"written    1 " in said and b"duplicate_key" in said
    assert_nothing_leaked(tmp_path, said)


def hang(target: str) -> Answer:
    time.sleep(1.5)
    return Answer(500)


FAULTS: dict[str, Callable[[str], Answer]] = {
    "forbidden": lambda target: Answer(403, f"<Error>{target}</Error>".encode()),
    "unauthorized": lambda target: Answer(401, headers={"WWW-Authenticate": f'Basic realm="{target}"'}),
    "gone": lambda target: Answer(404),
    "broken": lambda target: Answer(500, target.encode()),
    "redirected inside": lambda target: Answer(302, headers={"Location": f"http://127.0.0.2:9/{target}"}),
    "redirected nowhere": lambda target: Answer(302, headers={"Location": f"nosuch://{target}"}),
    "no http": lambda target: Answer(200, headers={"X": f"{target}\r\n\x00broken: {target}"}),
    "not a tar": lambda target: Answer(200, target.encode() * 100),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_failure_tells_a_secret(
    fault: str, made: Path, tmp_path: Path, capfd: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("img2parquet.storage.retry.time.sleep", lambda seconds: None)
    with web(FAULTS[fault]) as site:
        job = write_job(tmp_path, made, kind="webdataset", uris=[signed(site, "000.tar")])
        code, said = run_all(job, capfd, caplog)
    assert code != 0 or fault == "not a tar"
    assert b"error:" in said or b"rejected" in said
    assert_nothing_leaked(tmp_path, said)


def test_a_failure_in_the_middle_tells_none(
    made: Path, tmp_path: Path, capfd: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After planning; the message goes through a worker and the session's summary of failed parts."""
    monkeypatch.setattr("img2parquet.storage.retry.time.sleep", lambda seconds: None)
    asked: list[str] = []

    def answer(target: str) -> Answer:
        asked.append(target)
        return files(made)(target) if len(asked) == 1 else Answer(403, target.encode())

    with web(answer) as site:
        job = write_job(tmp_path, made, kind="webdataset", uris=[signed(site, "000.tar")])
        code, said = run_all(job, capfd, caplog)
    assert code == 1 and b"parts could not be done" in said
    assert_nothing_leaked(tmp_path, said)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.mark.parametrize("scheme", ["http", "s3", "ftp", "sftp"])
def test_a_server_that_is_down_tells_none(
    scheme: str, made: Path, tmp_path: Path, capfd: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("img2parquet.storage.retry.time.sleep", lambda seconds: None)
    host = f"user:PLANTED-password@127.0.0.1:{closed_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
    uri = "s3://bucket/a.tar" if scheme == "s3" else f"{scheme}://{host}/a.tar?{SIGNED}"
    code, said = run_all(write_job(tmp_path, made, kind="webdataset", uris=[uri]), capfd, caplog)
    assert code != 0 and b"error:" in said
    assert_nothing_leaked(tmp_path, said)


def test_a_model_that_is_not_there_tells_none(site: Web, made: Path, tmp_path: Path, capfd: Any, caplog: Any) -> None:
    job = write_job(tmp_path, made, kind="folder", uris=[str(made / "in")])
    for model in (signed(site, "checkpoint"), "org/no-such-model", "s3://user:PLANTED@bucket/model"):
        assert main(["run", str(job), "--runner", "local", "--set", f"models.0.model={model}"]) != 0
    said = capfd.readouterr()
    assert_nothing_leaked(tmp_path, (said.out + said.err + caplog.text).encode())


def test_lines_and_metrics_for_machines_tell_none_either(
    site: Web, made: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a job that reads by signed URLs, one of which leads nowhere."""
    pages: list[Page] = []

    def page() -> Page:
        pages.append(Page())
        return pages[-1]

    monkeypatch.setattr("img2parquet.telemetry.prometheus.Page", page)
    (tmp_path / "list.csv").write_text(f"uri\n{signed(site, 'a.jpg')}\n{signed(site, 'none.jpg')}\n")
    job = write_job(tmp_path, made, kind="table", uris=[str(tmp_path / "list.csv")],
                    storage_options={"http": {"allow_private_addresses": True}})  # fmt: skip
    assert main(["run", str(job), "--runner", "local", "--log-format", "json", "--metrics-port", "0"]) == 0
    assert main(["run", str(job) + "-none", "--log-format", "json", "--set", f"a.b={signed(site, 'a')}"]) == 2
    said = capfd.readouterr()
    assert "part_committed" in said.err and "not_found" in pages[0].text()
    assert_nothing_leaked(tmp_path, (said.out + said.err + pages[0].text()).encode())


def test_our_own_mistakes_tell_none(made: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise RuntimeError(f"could not do https://user:PLANTED@host/a?{SIGNED} at all")

    monkeypatch.setattr("img2parquet.engine.driver.run", break_down)
    assert main(["run", str(write_job(tmp_path, made, kind="folder", uris=[str(made / "in")]))]) == 1
    said = capfd.readouterr()
    assert "RuntimeError: could not do https://host/a at all" in said.err
    assert_nothing_leaked(tmp_path, (said.out + said.err).encode())


def test_words_around_urls_stay() -> None:
    text = "a (https://h/x?sig=S), `http://u:p@h/y?v=1&token=T`: s3://b/a?.tar, /z?sig=S"
    assert names_in(text) == "a (https://h/x), `http://h/y?v=1`: s3://b/a?.tar, /z"


def test_a_drivers_message_loses_every_query() -> None:
    """Also that of a path which a server repeats, whatever its parameters are called."""
    told = "400, message='Bad: GET /a.tar?v=1&odd=PLANTED HTTP/1.1', url='https://u:PLANTED@h/a?odd=PLANTED'"
    assert redact_text(told) == "400, message='Bad: GET /a.tar HTTP/1.1', url='https://h/a'"


OPTIONS = [
    {"gs": {"token": "PLANTED"}},
    {"az": {"account_key": "PLANTED"}},
    {"az": {"sas_token": "PLANTED"}},
    {"az": {"connection_string": "PLANTED"}},
    {"abfs": {"client_secret": "PLANTED"}},
    {"http": {"client_kwargs": {"headers": {"Authorization": "PLANTED"}}}},
    {"http": {"client_kwargs": {"cookies": {"a": "PLANTED"}}}},
    {"sftp": {"password": "PLANTED"}},
    {"key": "PLANTED"},
    {"secret": "PLANTED"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("where", ["input", "output"])
def test_options_that_are_secrets_are_refused_without_saying_them(
    options: dict[str, Any], where: str, made: Path, tmp_path: Path
) -> None:
    document = job_dict(f"{made}/in/*.tar", made / "checkpoint", str(tmp_path / "out"))
    document[where]["storage_options"] = options
    with pytest.raises(JobError, match="environment") as told:
        parse_job(document)
    assert "PLANTED" not in str(told.value)


def test_options_are_in_no_record(made: Path, tmp_path: Path, capfd: Any, caplog: Any) -> None:
    """They may name accounts, and what a driver's option holds nobody can tell."""
    job = write_job(
        tmp_path, made, kind="folder", uris=[str(made / "in")], storage_options={"gs": {"project": "PLANTED"}}
    )
    code, said = run_all(job, capfd, caplog)
    assert code == 0
    assert Output.at(str(tmp_path / "out"), Store()).run_record() is not None
    assert_nothing_leaked(tmp_path, said)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_under_ray_nothing_is_told_either(dies: bool, made: Path, tmp_path: Path) -> None:
    """Also in Ray's own logs, and when a worker raises what is none of our errors."""
    session = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a short path: its sockets' names are limited
    asked: list[str] = []

    def answer(target: str) -> Answer:
        asked.append(target)
        return files(made)(target) if len(asked) == 1 or not dies else Answer(403, target.encode())

    with web(answer) as site:
        job = write_job(tmp_path, made, kind="webdataset", uris=[signed(site, "000.tar")])
        environment = {**os.environ, "RAY_TMPDIR": str(session), "PYTHONLOGLEVEL": "DEBUG"}
        code = "import logging, sys; logging.basicConfig(level=0); from img2parquet.cli import main; sys.exit(main())"
        ran = subprocess.run(
            [sys.executable, "-c", code, "run", str(job), "--runner", "ray"],
            capture_output=True,
            env=environment,
            timeout=300,
        )
    try:
        assert ran.returncode == (1 if dies else 0), ran.stderr[-2000:]
        assert_nothing_leaked(tmp_path, ran.stdout + ran.stderr)
        logs = [path for path in session.rglob("logs/*") if path.is_file()]
        assert len(logs) > 5
        for path in logs:
            assert PLANTED not in path.read_bytes(), path
    finally:
        shutil.rmtree(session, ignore_errors=True)
