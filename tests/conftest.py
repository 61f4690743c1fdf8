"""Fixtures that every test may ask for: an S3 server on loopback, buckets, and places to write to.

* The S3 environment is set before the first test, so that Ray workers and subprocesses inherit it whenever they are
  started; the server itself (moto, in this process) starts with the first test that asks for it.
* No test reaches the network: fake keys, no instance metadata, Hugging Face offline.
* Tests marked `realstore` run against the server of `infra/s3/rgw.sh`, as the environment names it before we replace
  it: `eval "$(infra/s3/rgw.sh env)" && pytest -m realstore`.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
