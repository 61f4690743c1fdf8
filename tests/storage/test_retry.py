"""What becomes of a request when the store, or the way to it, breaks: a fault proxy before moto (and RGW)."""

from __future__ import annotations

import logging
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from botocore.exceptions import (  # type: ignore[import-untyped, unused-ignore]
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
)
from s3fs.core import S3FileSystem

from img2parquet.errors import (
    AccessDenied,
    AlreadyExists,
    Img2ParquetError,
    InputError,
    MissingDependency,
    NotFound,
    OutcomeUnknown,
    StorageError,
)
from img2parquet.storage import Entry, Store, join, redact, s3
from img2parquet.storage.retry import RetryBudget, call_with_retries, fault_of
from img2parquet.storage.retry_counters import RETRIES, Retries
from tests.support.s3_proxy import Fault, FaultProxy

DATA = os.urandom(300_000)
FAST = {"backoff_s": 0.01}
BRIEF = {"backoff_s": 0.01, "read_timeout_s": 1.0, "attempts": 3}
PASSING = ("slowdown", "internal", "reset", "reset_body", "truncate", "short", "ok_error", "lost_reply")


@pytest.fixture(params=["s3", pytest.param("rgw", marks=pytest.mark.realstore)])
def bucket(request: pytest.FixtureRequest) -> str:
    name: str = request.getfixturevalue({"s3": "s3_bucket", "rgw": "realstore_bucket"}[request.param])
    return name


@pytest.fixture(scope="module")
def proxies() -> Iterator[dict[str, FaultProxy]]:
    """One for each upstream in all tests, since each new endpoint costs a client."""
    made: dict[str, FaultProxy] = {}
    with ExitStack() as stack:
        yield made
        for proxy in made.values():
            stack.push(proxy)


@pytest.fixture
def proxy(bucket: str, proxies: dict[str, FaultProxy]) -> FaultProxy:
    upstream = os.environ["AWS_ENDPOINT_URL"]
    if upstream not in proxies:
        proxies[upstream] = FaultProxy(upstream).__enter__()
    proxies[upstream].set()
    return proxies[upstream]


@pytest.fixture
def store(proxy: FaultProxy) -> Store:
    return Store({"endpoint_url": proxy.url, **FAST})


@pytest.fixture
def there(bucket: str) -> str:
    """An object that is there, created without the proxy."""
    Store().create(join(bucket, "there"), DATA)
    return join(bucket, "there")


@pytest.mark.parametrize("kind", PASSING)
def test_reads_survive_what_passes(kind: str, store: Store, proxy: FaultProxy, there: str) -> None:
    for start, stop in ((0, None), (5, 200_000)):
        proxy.set(Fault(kind, method="GET", times=3))
        assert store.read(there, start, stop) == DATA[start:stop]
        assert proxy.fired() == 3
    proxy.set(Fault(kind, method="HEAD", times=3))
    assert store.stat(there).size_bytes == len(DATA)


@pytest.mark.parametrize("kind", [*PASSING, "stall"])
def test_reads_that_never_work_end_in_one_clear_error(kind: str, proxy: FaultProxy, there: str) -> None:
    proxy.set(Fault(kind, method="GET", arg=1.5 if kind == "stall" else 0.5))
    with pytest.raises(StorageError, match="/there: "):
        Store({"endpoint_url": proxy.url, **BRIEF}).read(there)
    # one layer of retries, not the product of three; but aiohttp sends once more
    # by itself on a reset, and a store that says it is busy is asked 2.5 times as often
    assert proxy.fired() == {"reset": 6, "lost_reply": 6, "slowdown": 8}.get(kind, 3)


def test_a_body_that_stops_is_not_waited_for(proxy: FaultProxy, there: str) -> None:
    proxy.set(Fault("stall_body", method="GET", times=1, arg=60))
    assert Store({"endpoint_url": proxy.url, **BRIEF}).read(there) == DATA
    assert proxy.fired() == 1


def test_a_short_body_is_never_returned_as_whole(proxy: FaultProxy, there: str) -> None:
    """Also where its length agrees with what a middlebox wrote into the header, and nothing was planned."""
    store = Store({"endpoint_url": proxy.url, **BRIEF})
    entry = Store().stat(there)
    asked: list[Callable[[], bytes]] = [
        lambda: store.read(there),
        lambda: store.read(there, 10),
        lambda: store.read(there, expect=entry),
    ]
    for read in asked:
        proxy.set(Fault("short", method="GET"))
        with pytest.raises(StorageError):
            read()
        assert proxy.fired("short") == 3


def test_a_changed_object_is_not_even_sent(store: Store, there: str) -> None:
    with pytest.raises(StorageError, match="now another etag"):  # the store's 412, not our comparison
        store.read(there, expect=Entry(there, len(DATA), "0" * 32))


def test_a_changed_object_is_refused_where_the_store_ignores_if_match(s3_bucket: str) -> None:
    """By its etag in the answer: its size may be as planned. Before moto only, as a changed header is not signed."""
    uri = join(s3_bucket, "a")
    Store().create(uri, DATA)
    planned = Store().stat(uri)
    Store().delete(uri)
    Store().create(uri, DATA[::-1])
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], drop_headers=["if-match"]) as proxy:
        store = Store({"endpoint_url": proxy.url, **FAST})
        asked: list[Callable[[], object]] = [
            lambda: store.read(uri, expect=planned),
            lambda: store.read(uri, 5, 9, expect=planned),
            lambda: store.open(uri, expect=planned).read(),
            lambda: list(store.stream(uri, expect=planned, chunk_bytes=1 << 16)),
        ]
        for ask in asked:
            with pytest.raises(StorageError, match=f"changed since .*etag `{planned.etag}`, now .*etag"):
                ask()


@pytest.mark.parametrize("kind", PASSING)
def test_listings_are_whole(kind: str, bucket: str, store: Store, proxy: FaultProxy, there: str) -> None:
    proxy.set(Fault(kind, method="GET", path="list-type", times=2))
    assert [entry.uri for entry in store.list_files(bucket)] == [there]
    assert proxy.fired() == 2


def test_a_listing_of_many_pages_goes_on_where_it_broke(
    bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [join(bucket, f"p/{number:02d}") for number in range(25)]
    for name in names:
        Store().create(name, b"x")
    small_pages: Any = S3FileSystem._call_s3
    monkeypatch.setattr(
        S3FileSystem,
        "_call_s3",
        lambda self, method, **request: small_pages(
            self, method, **request, **({"MaxKeys": 10} if method == "list_objects_v2" else {})
        ),
    )
    proxy.set(Fault("internal", method="GET", path="continuation-token", times=2))
    assert [entry.uri for entry in Store({"endpoint_url": proxy.url, **FAST}).list_files(bucket)] == names
    assert len(proxy.log) == 5  # three pages and two failures; nothing per object


def test_names_of_one_folder_cost_one_listing(bucket: str, store: Store, proxy: FaultProxy) -> None:
    for number in range(30):
        Store().create(join(bucket, f"p/{number:03d}.tar"), b"x")
    proxy.set()
    assert len(store.expand([bucket + "/p/{000..029}.tar"])) == 30
    assert [method for method, _, _ in proxy.log] == ["GET"]
    proxy.set()
    assert len(store.expand([bucket + "/p/*.tar", bucket + "/**/00?.tar"])) == 30
    assert [method for method, _, _ in proxy.log] == ["GET", "GET"]


@pytest.mark.parametrize("kind", ["slowdown", "conflict"])
def test_a_create_is_sent_again_where_the_store_says_that_it_did_nothing(
    kind: str, bucket: str, store: Store, proxy: FaultProxy
) -> None:
    proxy.set(Fault(kind, method="PUT", times=2))
    store.create(join(bucket, "new"), DATA)
    assert len(proxy.log) == 3
    assert Store().read(join(bucket, "new")) == DATA


@pytest.mark.parametrize("kind", ["internal", "reset", "lost_reply", "ok_error", "stall", "slowdown"])
def test_an_ambiguous_create_says_so_and_is_not_repeated(kind: str, bucket: str, proxy: FaultProxy) -> None:
    """By us: aiohttp sends once more by itself on a reset, and hears 412 of its own first request."""
    store = Store({"endpoint_url": proxy.url, **BRIEF})
    proxy.set(Fault(kind, method="PUT", arg=60))  # only a stall looks at it
    with pytest.raises(OutcomeUnknown, match=r"whether it was created is not known|no ETag"):
        store.create(join(bucket, "new"), DATA[:1000])
    assert len(proxy.log) == {"slowdown": 3, "reset": 2, "lost_reply": 2}.get(kind, 1)
    proxy.set()
    assert store.exists(join(bucket, "new")) == (kind == "lost_reply")


def test_a_put_whose_answer_has_no_etag_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "send", lambda *_: ({}, b""))
    with pytest.raises(OutcomeUnknown, match=r"s3://b/new: .* no ETag"):
        Store().create("s3://b/new", b"x")


def test_a_lost_reply_leaves_one_object_and_the_next_attempt_hears_of_it(
    bucket: str, store: Store, proxy: FaultProxy
) -> None:
    proxy.set(Fault("lost_reply", method="PUT", times=1))
    with pytest.raises((AlreadyExists, OutcomeUnknown)):
        store.create(join(bucket, "new"), DATA)
    with pytest.raises(AlreadyExists):
        store.create(join(bucket, "new"), b"another attempt")
    assert Store().read(join(bucket, "new")) == DATA
    assert len(Store().list_files(bucket)) == 1


@pytest.mark.parametrize("kind, hint", [("denied", "policy"), ("expired", "expired"), ("expired403", "expired")])
@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "DELETE"])
def test_a_refusal_is_told_at_once(
    kind: str, hint: str, method: str, bucket: str, store: Store, proxy: FaultProxy, there: str
) -> None:
    proxy.set(Fault(kind))
    ask: dict[str, Callable[[str], object]] = {
        "GET": store.read,
        "HEAD": store.stat,
        "DELETE": store.delete,
        "PUT": lambda uri: store.create(uri, b"x"),
    }
    with pytest.raises(AccessDenied, match=hint):
        ask[method](there)
    # for HEAD one more request, which has a body, and botocore's for the bucket; expired keys are read anew once
    assert len(proxy.log) <= (5 if method == "HEAD" else 2)


def test_expired_credentials_are_read_anew_once(store: Store, proxy: FaultProxy, there: str, bucket: str) -> None:
    proxy.set(Fault("expired", times=1))
    assert store.read(there) == DATA
    proxy.set(Fault("expired", times=1))
    store.create(join(bucket, "new"), b"x")
    # an answer to HEAD has no body that could say so: the store is asked in another way (by botocore, for the bucket)
    proxy.set(Fault("expired", times=3))
    assert store.stat(there).size_bytes == len(DATA)
    assert [method for method, _, _ in proxy.log] == ["HEAD", "HEAD", "GET", "HEAD"]


def test_a_store_that_ignores_conditions_is_found_out(s3_bucket: str) -> None:
    """Before moto only: a store that checks signatures refuses a request without its signed header."""
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], drop_headers=["if-none-match"]) as proxy:
        store = Store({"endpoint_url": proxy.url, **FAST})
        assert not store.creates_exclusively(join(s3_bucket, "out"))
        assert store.list_files(s3_bucket) == []


@pytest.mark.parametrize("kind", ["lost_reply", "slowdown", "internal", "reset"])
def test_the_probe_is_not_fooled_by_faults(kind: str, bucket: str, store: Store, proxy: FaultProxy) -> None:
    proxy.set(Fault(kind, method="PUT", times=1))
    assert store.creates_exclusively(bucket)
    assert store.list_files(bucket) == []


def test_a_probe_that_may_not_be_deleted_does_not_stop_the_job(bucket: str, store: Store, proxy: FaultProxy) -> None:
    proxy.set(Fault("denied", method="DELETE"))
    assert store.creates_exclusively(bucket)


@pytest.mark.parametrize("size_bytes", [0, 9 << 20, pytest.param(120 << 20, marks=pytest.mark.slow)])
def test_a_create_of_any_size_is_one_plain_put(size_bytes: int, s3_bucket: str) -> None:
    """s3fs turns 100 MiB and more into multipart uploads, where some stores overwrite."""
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        store = Store({"endpoint_url": proxy.url, "read_timeout_s": 60})
        store.create(join(s3_bucket, "new"), bytes(size_bytes))
        with pytest.raises(AlreadyExists):
            store.create(join(s3_bucket, "new"), bytes(size_bytes))
        assert [(method, path) for method, path, _ in proxy.log] == [("PUT", f"/{s3_bucket[5:]}/new")] * 2


def test_a_missing_bucket_is_named(bucket: str, store: Store) -> None:
    for ask in (store.stat, store.read, store.list_files, lambda uri: store.create(uri, b"x")):
        with pytest.raises(NotFound, match="no such bucket"):
            ask("s3://no-such-bucket-here/a")
    assert not store.exists("s3://no-such-bucket-here/a")


def test_an_endpoint_that_does_not_listen_is_named() -> None:
    store = Store({"endpoint_url": "http://127.0.0.1:9", "backoff_s": 0.001})
    for ask in (store.stat, store.read, store.list_files, lambda uri: store.create(uri, b"x")):
        with pytest.raises(StorageError, match=r"no answer from http://127\.0\.0\.1:9") as told:
            ask("s3://bucket/a")
        assert not isinstance(told.value, (NotFound, AccessDenied, AlreadyExists))


@pytest.mark.realstore
@pytest.mark.parametrize(
    "name, value, hint",
    [("AWS_SECRET_ACCESS_KEY", "WRONG", "secret does not belong"), ("AWS_ACCESS_KEY_ID", "NOBODY", "does not know")],
)
def test_wrong_keys_are_told(
    name: str, value: str, hint: str, realstore_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    for ask in (Store().stat, Store().read, Store().list_files, lambda uri: Store().create(uri, b"x")):
        with pytest.raises(AccessDenied, match=hint) as told:
            ask(realstore_bucket + "/a")
        assert value not in str(told.value)


def test_no_credentials_are_told(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for ask in (Store().read, lambda uri: Store().create(uri, b"x")):
        with pytest.raises(AccessDenied, match="set AWS_PROFILE"):
            ask(s3_bucket + "/a")
    with pytest.raises(AccessDenied, match="AWS_PROFILE"):
        Store({"profile": "nobody"}).read(s3_bucket + "/a")
    assert Store({"anon": True}).list_files(s3_bucket) == []


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="did you mean `endpoint_url`"):
        Store({"endpoint": "http://x"})
    with pytest.raises(InputError, match="credentials are not options"):
        Store({"secret": "x"})
    with pytest.raises(InputError, match="`anon`: not of type bool"):
        Store({"anon": "yes"})
    with pytest.raises(InputError, match="unknown storage option `s3`"):
        Store({"s3": {"anon": True}})
    Store({"gs": {"project": "x"}, "anon": True, "read_timeout_s": 5})


def test_schemes_without_a_driver() -> None:
    with pytest.raises(InputError, match="unknown scheme `s4://`"):
        Store().read("s4://b/k")
    with pytest.raises(MissingDependency, match="pip install ossfs"):
        Store().read("oss://b/k")


def test_what_is_not_in_the_environment_but_changes_is_seen(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test or a notebook that changes the endpoint gets it, although clients are kept."""
    assert Store().list_files(s3_bucket) == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
        Store({"backoff_s": 0.001}).list_files(s3_bucket)


@pytest.mark.parametrize(
    "uri, printed",
    [
        ("https://user:pw@host/a.jpg?X-Amz-Signature=abc#x", "https://host/a.jpg"),
        ("s3://bucket/a?b#c", "s3://bucket/a?b#c"),
        ("abfss://container@account.dfs.core.windows.net/a?sig=x", "abfss://container@account.dfs.core.windows.net/a"),
        ("/a/b?c@d", "/a/b?c@d"),
        ("sftp://me:pw@host/x@y", "sftp://host/x@y"),
    ],
)
def test_secrets_are_not_printed(uri: str, printed: str) -> None:
    assert redact(uri) == printed


def test_no_error_carries_a_signed_url(there: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    url = f"{proxy.url}/{there[5:]}?X-Amz-Signature=VERYSECRET"
    caplog.set_level(logging.WARNING)
    for kind in ("denied", "reset"):
        proxy.set(Fault(kind))
        for ask in (Store().read, Store().stat, Store().open):
            with pytest.raises(Img2ParquetError) as told:
                _impatient(ask, url)
            assert "VERYSECRET" not in "".join(traceback.format_exception(told.value))
            assert str(pickle.loads(pickle.dumps(told.value))) == str(told.value)
    assert "VERYSECRET" not in caplog.text


def _impatient(ask, uri: str) -> object:  # type: ignore[no-untyped-def]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: None)
        return ask(uri)


def test_images_over_http(s3_bucket: str, s3_client) -> None:  # type: ignore[no-untyped-def]
    """moto's objects through plain http, as a table of URLs would name them."""
    Store().create(s3_bucket + "/a.jpg", DATA)
    signed = {"Bucket": s3_bucket[5:], "Key": "a.jpg"}
    url = s3_client.generate_presigned_url("get_object", Params=signed)
    assert Store().read(url) == DATA
    assert Store().read(url, 5, 100) == DATA[5:100]
    assert Store().expand([url])[0].uri == url
    with pytest.raises(InputError, match="is read-only here"):
        Store().create(url, b"x")
    for ask in (Store().read, Store().stat):
        with pytest.raises(NotFound):
            ask(s3_client.generate_presigned_url("get_object", Params={**signed, "Key": "b"}))


def test_a_web_server_that_is_down_is_not_a_missing_image() -> None:
    """fsspec's http says FileNotFoundError of both; a job must not reject images for it."""
    for ask in (Store().read, Store().stat, Store().open):
        with pytest.raises(StorageError, match="no answer") as told:
            _impatient(ask, "http://127.0.0.1:9/a.jpg")
        assert not isinstance(told.value, NotFound)


def test_a_server_that_ignores_ranges_is_cut_by_us(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/a"
        assert Store().read(url, 1000, 2000) == DATA[1000:2000]
        assert b"".join(Store().stream(url, 7, chunk_bytes=100_000)) == DATA[7:]
    finally:
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def aws(status: int, code: str) -> Exception:
    error: Exception = ClientError(
        {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Op"
    )
    return error


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


class HttpError(Exception):
    """As gcsfs has it."""

    code = 412


@pytest.mark.parametrize(
    "error, status, is_final, is_undone",
    [
        (aws(503, "SlowDown"), 503, False, True),
        (aws(500, "InternalError"), 500, False, False),
        (aws(400, "RequestTimeout"), 400, False, True),
        (aws(400, "ExpiredToken"), 400, True, False),
        (aws(400, "AuthorizationHeaderMalformed"), 400, True, False),
        (aws(404, "NoSuchKey"), 404, True, False),
        (caused(OSError(22, "m"), aws(412, "PreconditionFailed")), 412, True, False),  # Ceph's, through s3fs
        (caused(FileExistsError("m"), aws(412, "PreconditionFailed")), 412, True, False),  # AWS's
        (caused(FileNotFoundError("m"), ConnectionResetError()), 0, False, False),  # fsspec's http
        (caused(FileNotFoundError("m"), KeyError()), 404, True, False),  # its memory
        (HttpError(), 412, True, False),
        (NoCredentialsError(), 0, True, False),
        (TimeoutError(), 0, False, False),
        (ConnectionResetError(), 0, False, False),
        (EndpointConnectionError(endpoint_url="http://x"), 0, False, False),  # aiobotocore's word for a reset, too
        (ConnectTimeoutError(endpoint_url="http://x"), 0, False, True),
    ],
    ids=repr,
)
def test_faults_are_told_by_what_the_store_said(error: Exception, status: int, is_final: bool, is_undone: bool) -> None:
    fault = fault_of(error)
    assert (fault.status, fault.is_final, fault.is_undone) == (status, is_final, is_undone)


def test_what_is_denied_is_told_by_its_status() -> None:
    assert [fault_of(aws(status, "Other")).is_denied for status in (400, 401, 402, 403, 404)] == [
        False, True, False, True, False,
    ]  # fmt: skip


def test_retries_are_counted_by_kind_and_told_once(store: Store, proxy: FaultProxy, there: str) -> None:
    RETRIES.take()
    proxy.set(Fault("slowdown", method="GET", times=2), Fault("truncate", method="GET", times=1))
    store.read(there)
    told = RETRIES.take()
    assert {kind: times for kind, (times, _) in told.items()} == {"SlowDown": 2, "ContentLengthError": 1}
    assert all(0 < waited_s < 1 for _, waited_s in told.values())
    assert RETRIES.take() == {}


def test_a_store_that_invents_codes_cannot_fill_the_memory() -> None:
    retries = Retries()
    for number in range(1000):
        retries.add(f"Code{number}" * 100, 0.5)
    retries.add("\x1b[2J", 0.5)
    told = retries.take()
    assert len(told) == 33 and sum(times for times, _ in told.values()) == 1001
    assert max(map(len, told)) <= 48 and "other" in told


def test_a_mistake_of_ours_is_not_a_fault_of_the_store() -> None:
    with pytest.raises(ZeroDivisionError):
        call_with_retries(lambda: 1 // 0, lambda fault: 0, RetryBudget())


def test_patience_ends() -> None:
    waits = [RetryBudget().after(attempt, fault_of(aws(500, "InternalError"))) for attempt in range(1, 9)]
    assert waits[-1] is None and 5 < sum(filter(None, waits)) < 30
    waits = [RetryBudget().after(attempt, fault_of(aws(503, "SlowDown"))) for attempt in range(1, 21)]
    assert waits[-1] is None and None not in waits[:-1] and 50 < sum(filter(None, waits)) < 120
    assert RetryBudget().after(4, fault_of(ConnectTimeoutError(endpoint_url="http://x"))) is None
