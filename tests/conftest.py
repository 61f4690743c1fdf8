"""Fixtures for every test: a small job made once, a Ray cluster, an S3 server on loopback, places to write to.

* The S3 environment is set before the first test, so that Ray workers and subprocesses inherit it whenever they are
  started; the server itself (moto, in this process) starts with the first test that asks for it.
* No test reaches the network: fake keys, no instance metadata, Hugging Face offline.
* Tests marked `realstore` run against the server of `infra/s3/rgw.sh`, as the environment names it before we replace
  it: `eval "$(infra/s3/rgw.sh env)" && pytest -m realstore`.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import logging
import os
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.ray_cluster import shared_cluster

REALSTORE = os.environ.get("IMG2PARQUET_REALSTORE", "")
REALSTORE_KEYS = {
    name: os.environ.get(name, "") for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
}
# below the range from which the kernel takes ephemeral ports, so that it is still free when the server starts
MOTO_PORT = random.SystemRandom().randrange(20_000, 32_000)
MOTO_URL = f"http://127.0.0.1:{MOTO_PORT}"
ENVIRONMENT = {
    "AWS_ENDPOINT_URL": MOTO_URL,
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "OMP_NUM_THREADS": "1",  # small models: two threads gain nothing, and on a busy machine wait for each other
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
FOREIGN = (
    "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE", "AWS_REQUEST_CHECKSUM_CALCULATION",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    os.environ.update(ENVIRONMENT)
    for name in FOREIGN:
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = 'no IMG2PARQUET_REALSTORE: `eval "$(infra/s3/rgw.sh env)"` after `infra/s3/rgw.sh start`'
    for item in items:
        if item.get_closest_marker("realstore") and not REALSTORE:
            item.add_marker(pytest.mark.skip(reason=reason))


# ---- the small job of tests/support/small_job.py, made once per process; tests only read it -------------------------


@pytest.fixture(scope="session")
def made() -> Iterator[Path]:
    """A folder with the shards `in/*.tar` and the checkpoint `model`."""
    from tests.support.small_job import small_set

    folder = small_set(0)
    before = _stamps(folder)
    yield folder
    changed = before.items() ^ {path: stamp for path, stamp in _stamps(folder).items() if path in before}.items()
    assert not changed, f"a test has changed what all share: {sorted(path for path, _ in changed)}"


@pytest.fixture(scope="session")
def shards(made: Path) -> str:
    return f"{made}/in/*.tar"


@pytest.fixture(scope="session")
def checkpoint(made: Path) -> Path:
    return made / "model"


@pytest.fixture(scope="session")
def finished(made: Path) -> Path:
    """The output of an undisturbed run."""
    from tests.support.finished_outputs import small_run

    return small_run()


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module", autouse=True)
def freed_memory_returns() -> Iterator[None]:
    """Give freed memory back after each module: a job in this process has told glibc to keep its peak for ever, and
    several test processes share the machine."""
    yield
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# ---- Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ray_cluster() -> str:
    """The address of the cluster of `tests/support/ray_cluster.py`; nothing runs on it."""
    import ray

    address, until = shared_cluster(), time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < until, "an earlier test has left something running on Ray"
        time.sleep(0.05)
    return address


# ---- S3 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of a moto server; it forgets everything when the session ends, and checks no keys."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=MOTO_PORT, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request otherwise
    server.start()
    yield MOTO_URL
    server.stop()


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> str:
    """A new bucket on moto: `s3://test-<8 hex digits>`."""
    return _new_bucket(s3_endpoint, "testing", "testing")


@pytest.fixture
def realstore_bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket on the real store, with this test's environment pointing there. A Ray cluster that was started
    before this test still has the old environment: start one inside the test."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", REALSTORE)
    for name, value in REALSTORE_KEYS.items():
        monkeypatch.setenv(name, value or ENVIRONMENT[name])
    # Ceph 16 answers 411 to the trailing checksums of pyarrow's uploads
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    return _new_bucket(REALSTORE, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])


@pytest.fixture(params=["disk", "s3", pytest.param("rgw", marks=pytest.mark.realstore)])
def output_root(request: pytest.FixtureRequest) -> str:
    """An empty place that a job may write to: a local folder, or a prefix in a new bucket. Nothing exists there yet."""
    if request.param == "disk":
        folder: Path = request.getfixturevalue("tmp_path")
        return str(folder / "out")
    bucket: str = request.getfixturevalue({"s3": "s3_bucket", "rgw": "realstore_bucket"}[request.param])
    return f"{bucket}/out"


@pytest.fixture
def s3_client() -> Any:
    """boto3's own client for the server that the environment names: a second opinion on what lies there."""
    return _client(*(os.environ[name] for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")))


def _new_bucket(endpoint: str, key: str, secret: str) -> str:
    name = f"test-{uuid.uuid4().hex[:8]}"
    _client(endpoint, key, secret).create_bucket(Bucket=name)
    return f"s3://{name}"


@functools.cache
def _client(endpoint: str, key: str, secret: str) -> Any:
    import boto3  # type: ignore[import-untyped, unused-ignore]

    return boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret)
