"""Whole jobs whose input and output lie behind a proxy that breaks requests: the same bytes, or one clear error."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from img2parquet.dataset.commit import Output
from img2parquet.engine.driver import run
from img2parquet.errors import AccessDenied, Img2ParquetError, JobFailed, OutcomeUnknown, StorageError
from img2parquet.results.reader import status
from img2parquet.results.verify import verify
from img2parquet.storage import Store, join
from img2parquet.storage.retry_counters import RETRIES
from tests.support.s3_proxy import Fault, FaultProxy
from tests.support.small_job import GOOD, ROWS, make_shards, small_job

CLIENT = {"backoff_s": 0.005, "read_timeout_s": 1.0}
BRIEF = {**CLIENT, "attempts": 3}
TARS = r"\.tar$"
SEED = 1  # of the proxy: with it, a chance of 5 % comes up early enough for the few requests of a small job


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def make_job(s3_bucket: str, checkpoint: Path, tars: list[Path], proxy: FaultProxy) -> Callable[..., Any]:
    """The small job, its input in the bucket already: `make_job("out", endpoint, **client options)`."""
    for path in tars:
        Store().create(join(s3_bucket, "in", path.name), path.read_bytes())
    proxy.set()
    RETRIES.take()

    def make(name: str, endpoint: str = "", **client: Any) -> Any:
        options = {"endpoint_url": endpoint or proxy.url, **CLIENT, **client}
        job = small_job(f"{s3_bucket}/in/*.tar", checkpoint, join(s3_bucket, name))
        source = job.input.model_copy(update={"storage_options": options})
        target = job.output.model_copy(update={"storage_options": options})
        return job.model_copy(update={"input": source, "output": target})

    return make


def parts(uri: str) -> dict[str, bytes]:
    """Past the proxy."""
    output = Output.at(uri)
    return {name: output.store.read(entry.uri) for name, entry in output.part_files().items()}


# aiohttp sends once more by itself on a reset and where no reply came, so we see only two in a row
FAULTS = {
    "slowdown 5 %": [Fault("slowdown", prob=0.05)],
    "slowdown 20 %": [Fault("slowdown", prob=0.2)],
    "slowdown 50 %": [Fault("slowdown", prob=0.5)],
    "errors of the server": [Fault("internal", prob=0.2)],
    "resets": [Fault("reset", prob=0.4)],
    "resets in mid-body": [Fault("reset_body", method="GET", prob=0.3)],
    "bodies that break off": [Fault("truncate", method="GET", prob=0.3)],
    "short bodies with a length that agrees": [Fault("short", method="GET", prob=0.3)],
    "stalls": [Fault("stall", prob=1.0, skip=5, times=2, arg=5.0), Fault("stall_body", method="GET", times=2, arg=60)],
    "an error under status 200": [Fault("ok_error", prob=0.15)],
    "replies lost to most PUTs": [Fault("lost_reply", method="PUT", prob=0.7)],
    "replies lost to every PUT of a part": [Fault("lost_reply", method="PUT", path="/part-")],
    "conflicts": [Fault("conflict", method="PUT", prob=0.4)],
    "expired credentials, renewed": [
        Fault("expired", method="GET", path=TARS, times=1),
        Fault("expired403", method="PUT", path="/part-", times=1),
    ],
    "several": [Fault("slowdown", prob=0.1), Fault("lost_reply", method="PUT", prob=0.2), Fault("short", times=4)],
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_job_ends_with_the_same_bytes(name: str, make_job: Callable[..., Any], proxy: FaultProxy) -> None:
    quiet, job = make_job("quiet", os.environ["AWS_ENDPOINT_URL"]), make_job("out")
    run(quiet, "local")
    RETRIES.take()
    proxy.set(*FAULTS[name], seed=SEED)
    summary = run(job, "local")
    fired = proxy.fired()
    proxy.set()
    assert fired > 0
    assert (summary.rows_in, summary.rows_written) == (ROWS, {"tiny": GOOD})
    assert verify(job.output.uri) == []
    assert parts(job.output.uri) == parts(quiet.output.uri)
    told = status(job.output.uri).retries
    assert 0 < sum(told.values()) <= fired + told.get("OutcomeUnknown", 0), told


def test_the_counts_in_status_are_the_faults_that_were_met(make_job: Callable[..., Any], proxy: FaultProxy) -> None:
    job = make_job("out")
    proxy.set(
        Fault("slowdown", method="GET", path=TARS, prob=0.5), Fault("truncate", method="GET", path=TARS, prob=0.5)
    )
    run(job, "local")
    slow, cut = proxy.fired("slowdown"), proxy.fired("truncate")
    proxy.set()
    assert slow > 0 and cut > 0
    assert status(job.output.uri).retries == {"SlowDown": slow, "ContentLengthError": cut}


@pytest.mark.slow
def test_the_counts_of_ray_workers_come_home(make_job: Callable[..., Any], proxy: FaultProxy, ray_cluster: str) -> None:
    job = make_job("out")
    try:
        proxy.set(Fault("slowdown", method="GET", path=TARS, prob=0.5))
        run(job, "ray")
        fired = proxy.fired()
    finally:
        proxy.set()
    assert status(job.output.uri).retries == {"SlowDown": fired}
    assert verify(job.output.uri) == []


def test_a_part_that_cannot_be_read_fails_alone_in_bounded_time(
    make_job: Callable[..., Any], proxy: FaultProxy
) -> None:
    for kind, at_most in (("slowdown", 10), ("short", 10), ("stall", 10)):
        job = make_job(f"out-{kind}", **BRIEF)
        proxy.set(Fault(kind, method="GET", path=r"/003\.tar$", arg=5.0 if kind == "stall" else 0.5))
        started = time.monotonic()
        with pytest.raises(JobFailed, match=r"1 of 6 parts could not be done:\n  part 3: .*/003\.tar") as told:
            run(job, "local")
        assert time.monotonic() - started < at_most * 3  # seconds, on a busy machine
        assert "run the same command again" in str(told.value)
        proxy.set()
        run(job, "local")
        assert verify(job.output.uri) == []


@pytest.mark.parametrize(
    "fault, error",
    [
        (Fault("denied", method="GET", path=TARS, skip=3), JobFailed),  # by the parts that cannot be read
        (Fault("denied", method="PUT", path="/part-", skip=2), AccessDenied),
        (Fault("expired", method="PUT", path="/part-", skip=2), AccessDenied),
        (Fault("internal", method="PUT", path="/part-", skip=2), OutcomeUnknown),
        (Fault("ok_error", method="PUT", path="/_manifest"), OutcomeUnknown),
    ],
    ids=lambda value: getattr(value, "kind", getattr(value, "__name__", "")),
)
def test_what_does_not_pass_is_one_clear_error_and_the_next_run_goes_on(
    fault: Fault, error: type[Img2ParquetError], make_job: Callable[..., Any], proxy: FaultProxy
) -> None:
    job = make_job("out", **BRIEF)
    proxy.set(fault)
    with pytest.raises(error) as told:
        run(job, "local")
    assert type(told.value) is error
    assert re.search(r"s3://test-\w+/(in|out)/", told.value.message), "which object"
    proxy.set()
    there = parts(job.output.uri)
    summary = run(job, "local")
    assert summary.parts_done_before == len(there)
    assert verify(job.output.uri) == []
    assert parts(job.output.uri).items() >= there.items()


def test_a_refusal_is_not_asked_for_again(make_job: Callable[..., Any], proxy: FaultProxy) -> None:
    proxy.set(Fault("denied", method="PUT", path="/part-000000"))
    with pytest.raises(AccessDenied):
        run(make_job("out"), "local")
    assert proxy.fired() == 1


def test_a_store_that_ignores_conditions_gets_no_part(make_job: Callable[..., Any]) -> None:
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], drop_headers=["if-none-match"]) as forgetful:
        job = make_job("out", forgetful.url)
        with pytest.raises(StorageError, match="ignores `If-None-Match"):
            run(job, "local")
    assert parts(job.output.uri) == {}
