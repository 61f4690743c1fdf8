"""gs:// and az:// when things go wrong, hf:// and https:// as what they are: stores that are only read."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from fsspec.registry import get_filesystem_class

from img2parquet.dataset.commit import Output
from img2parquet.errors import AccessDenied, AlreadyExists, InputError, JobError, MissingDependency
from img2parquet.job import parse_job
from img2parquet.storage import Store
from tests.storage.clouds import KEY, Objects, azure, connection_string, google
from tests.support.small_job import job_dict


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Objects]]:
    with (google if request.param == "gs" else azure)() as objects:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", objects.url)
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(objects.url))
        monkeypatch.setattr(
            "img2parquet.storage.fsspec_backend._FILESYSTEMS", {}
        )  # which know the servers of other tests
        get_filesystem_class(request.param).clear_instance_cache()
        yield f"{request.param}://bucket-{id(objects):x}/out", objects


def test_a_create_carries_the_condition(cloud: tuple[str, Objects]) -> None:
    root, objects = cloud
    Store().create(f"{root}/a", b"x")
    if root.startswith("gs"):
        (asked,) = [path for method, path in objects.asked if method == "POST"]
        assert "ifGenerationMatch=0" in asked
    else:
        (headers,) = [h for (method, _), h in zip(objects.asked, objects.headers, strict=True) if method == "PUT"]
        assert headers["If-None-Match"] == "*"


def test_a_large_part_is_one_request(cloud: tuple[str, Objects]) -> None:
    """Google's driver would cut it into several from 50 MiB on; parts may have 64."""
    root, objects = cloud
    data = bytes(60 << 20)
    Store().create(f"{root}/a", data)
    assert Store().stat(f"{root}/a").size_bytes == len(data)
    assert len([method for method, _ in objects.asked if method in ("POST", "PUT")]) == 1


def test_a_lost_answer_never_makes_a_second_object(cloud: tuple[str, Objects]) -> None:
    """Whether the driver asks again, and is told that it exists, or gives up: `put_once` says that it is there."""
    root, objects = cloud
    objects.lose = 1
    assert Output.at(root, Store()).put_once("part", b"first") in ("created", "done")
    assert Store().read(f"{root}/part") == b"first"
    assert next(blob.generation for blob in objects.blobs.values()) == 1
    with pytest.raises(AlreadyExists):
        Store().create(f"{root}/part", b"second")


def test_a_refusal_is_told_at_once_and_without_secrets(cloud: tuple[str, Objects]) -> None:
    """gcsfs looks for a file in three ways; none of them is tried again."""
    root, objects = cloud
    objects.refuse = 403
    for ask in (lambda: Store().read(f"{root}/a", 0, 5), lambda: Store().create(f"{root}/a", b"x")):
        asked = len(objects.asked)
        with pytest.raises(AccessDenied, match="access denied") as told:
            ask()
        assert KEY not in str(told.value) and len(objects.asked) - asked <= 3


def test_public_buckets_of_google_are_asked_anonymously(
    cloud: tuple[str, Objects], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = cloud
    if root.startswith("az"):
        pytest.skip("adlfs knows `anon` itself")

    async def refuse(filesystem: object) -> None:
        raise ConnectionError("our server speaks no gRPC")

    # gcsfs takes half a minute to see that, and then does without
    monkeypatch.setattr("gcsfs.extended_gcsfs.ExtendedGcsFileSystem._get_control_plane_client", refuse)
    Store().create(f"{root}/a", b"x")
    assert Store({"gs": {"anon": True}}).read(f"{root}/a") == b"x"


@pytest.mark.parametrize("uri", ["https://host/out", "hf://datasets/me/out", "sftp://host/out", "http://host/out"])
def test_what_is_only_read_cannot_be_an_output(uri: str) -> None:
    """Told when the job is loaded, before any model is."""
    with pytest.raises(JobError, match="can be an input, not an output") as told:
        parse_job(job_dict("in/*.tar", "model", uri))
    assert "s3://" in str(told.value) and "gs://" in str(told.value)
    with pytest.raises(InputError, match="not an output"):
        Store().create(f"{uri}/a", b"x")


@pytest.mark.parametrize("scheme, extra", [("gs", "gs"), ("gcs", "gs"), ("az", "az"), ("abfs", "az"), ("hf", "hub")])
def test_a_driver_that_is_missing_is_asked_for_by_its_extra(
    scheme: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"gs": "gcsfs", "az": "adlfs", "hub": "huggingface_hub"}[extra]
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=rf"pip install 'img2parquet\[{extra}\]'"):
        Store().read(f"{scheme}://bucket/a")
