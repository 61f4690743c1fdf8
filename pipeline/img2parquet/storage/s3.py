"""Read and write `s3://` through s3fs: one plain request per call, pinned by ETag.

* A file is created by one PUT with `If-None-Match: *`. Some stores ignore the condition in multipart uploads.
* Listings are read page by page and never cached; no request is made per object.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, NoReturn

from img2parquet.errors import AlreadyExists, InputError, OutcomeUnknown, StorageError
from img2parquet.storage.backend import Entry, Skip, changed, clip, host_of, redact
from img2parquet.storage.ranged_file import FILE_BUFFER_BYTES, RangedFile
from img2parquet.storage.retry import Fault, RetryBudget, ShortBody, call_with_retries, error_of
from img2parquet.storage.retry_counters import RETRIES
from img2parquet.storage.s3_client import S3Options, forget_client, send
from img2parquet.storage.write_hooks import reached

BUCKET_KEY = re.compile(r"s3://(?P<bucket>arn:[^/]+:accesspoint[:/][^/]+|[^/]+)/?(?P<key>.*)", re.DOTALL)
MAX_PUT_BYTES = 5 << 30


@dataclass(frozen=True)
class S3Backend:
    options: S3Options = field(default_factory=S3Options)

    def stat(self, uri: str) -> Entry:
        bucket, key = _object(uri)
        head = self._head(uri, bucket, key, lambda fault: self._refuse(fault, uri))
        return Entry(uri, head["ContentLength"], _plain(head["ETag"]))

    def exists(self, uri: str) -> bool:
        bucket, key = _object(uri)
        return bool(self._head(uri, bucket, key, lambda fault: {} if fault.status == 404 else self._refuse(fault, uri)))

    def scan(self, prefix: str, *, deep: bool, skip: Skip | None = None) -> Iterator[Entry]:
        bucket, start = _bucket_key(prefix)
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": start, **({} if deep else {"Delimiter": "/"})}
        while True:
            page, _ = self._ask(prefix, "list_objects_v2", **request)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # a marker that some tool made for a folder
                    yield Entry(f"s3://{bucket}/{item['Key']}", item["Size"], _plain(item.get("ETag")))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, uri: str, start: int, stop: int | None, expect: Entry | None) -> bytes:
        bucket, key = _object(uri)
        if expect is not None:
            start, stop = clip(expect.size_bytes, start, stop)
        if stop is not None and start >= stop and not (expect and expect.size_bytes == 0):
            return b""
        request = {"Bucket": bucket, "Key": key, **_condition(start, stop, expect)}

        def fetch() -> bytes:
            answer, data = self._request("get_object", None if stop is None else stop - start, request)
            return _checked(uri, answer, data, start, stop, expect)

        return call_with_retries(
            fetch, lambda fault: self._no_bytes(fault, uri, expect), self._retry_budget, renew=self._renew
        )

    def open(self, uri: str, expect: Entry | None) -> BinaryIO:
        return io.BufferedReader(RangedFile(self.read, expect or self.stat(uri)), FILE_BUFFER_BYTES)

    def create(self, uri: str, data: bytes) -> None:
        bucket, key = _object(uri)
        if len(data) > MAX_PUT_BYTES:
            raise StorageError(f"{redact(uri)}: {len(data)} bytes are too many for one PUT", hint="make parts smaller")
        request = {"Bucket": bucket, "Key": key, "Body": data, "IfNoneMatch": "*"}

        def put() -> None:
            answer, _ = self._request("put_object", len(data), request)
            reached("answered", uri)
            if not answer.get("ETag"):
                raise OutcomeUnknown(f"{redact(uri)}: the store's answer to the PUT has no ETag")

        # not retried when it may have had an effect: then the caller checks
        call_with_retries(
            put,
            lambda fault: self._not_created(fault, uri),
            replace(self._retry_budget, busy_factor=1.0),  # the caller retries too
            again=lambda fault: fault.is_undone,
            renew=self._renew,
        )

    def delete(self, uri: str) -> None:
        bucket, key = _object(uri)
        self._ask(uri, "delete_object", Bucket=bucket, Key=key)

    def sweep(self, folder: str, older_than_s: float) -> int:
        return 0  # a PUT that broke off leaves nothing

    def _head(
        self, uri: str, bucket: str, key: str, otherwise: Callable[[Fault], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        def ask() -> Mapping[str, Any]:
            head, _ = self._request("head_object", 0, {"Bucket": bucket, "Key": key})
            if not head.get("ETag"):
                raise ShortBody("an answer without ETag")
            return head

        def refused(fault: Fault) -> Mapping[str, Any]:
            told = self._explained(fault, uri) if fault.status in (400, 403) else fault
            if not told.is_expired:
                return otherwise(told)
            RETRIES.add(told.kind, 0.0)
            self._renew()
            return call_with_retries(ask, lambda _: otherwise(told), self._retry_budget)

        return call_with_retries(ask, refused, self._retry_budget)

    def _ask(self, uri: str, method: str, **request: Any) -> tuple[Mapping[str, Any], bytes]:
        return call_with_retries(
            lambda: self._request(method, 0, request),
            lambda fault: self._refuse(fault, uri),
            self._retry_budget,
            renew=self._renew,
        )

    def _request(
        self, method: str, size_bytes: int | None, request: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], bytes]:
        return send(self.options, method, size_bytes, request)

    def _renew(self) -> None:
        forget_client(self.options)

    @property
    def _retry_budget(self) -> RetryBudget:
        return RetryBudget(attempts=self.options.attempts, backoff_s=self.options.backoff_s)

    def _refuse(self, fault: Fault, uri: str) -> NoReturn:
        raise error_of(self._explained(fault, uri), uri, self._endpoint())

    def _explained(self, fault: Fault, uri: str) -> Fault:
        """Find the cause of a failed HEAD, whose response has no body, by listing once: a missing bucket, expired
        credentials."""
        if not fault.code.isdigit():
            return fault
        bucket, key = _bucket_key(uri)
        request = {"Bucket": bucket, "Prefix": key, "MaxKeys": 1}

        def ask() -> Fault:
            self._request("list_objects_v2", 0, request)
            return fault

        told = call_with_retries(ask, lambda told: told, RetryBudget(attempts=1, busy_factor=1.0))
        return told if told.is_denied or told.code == "NoSuchBucket" else fault

    def _no_bytes(self, fault: Fault, uri: str, expect: Entry | None) -> bytes:
        if fault.status == 412 and expect is not None:
            raise changed(expect, 0, "")
        if fault.status == 416 and expect is None:
            return b""  # the range begins behind the end
        return self._refuse(fault, uri)

    def _not_created(self, fault: Fault, uri: str) -> NoReturn:
        if fault.status == 412:
            raise AlreadyExists(f"{redact(uri)} exists")
        if fault.status == 501:
            raise StorageError(f"{redact(uri)}: this store has no conditional writes", hint="use another store")
        # unreachable too: aiohttp sends a PUT again by itself when the connection broke, so the last word is not all
        if fault.is_final or fault.status == 429:
            self._refuse(fault, uri)
        raise OutcomeUnknown(error_of(fault, uri, self._endpoint()).message + "; whether it was created is not known")

    def _endpoint(self) -> str:
        return host_of(self.options.endpoint) if self.options.endpoint else "AWS S3"


def _bucket_key(uri: str) -> tuple[str, str]:
    match = BUCKET_KEY.fullmatch(uri)
    if match is None:
        raise InputError(f"{redact(uri)}: no bucket is named", hint="use s3://bucket/key")
    return match["bucket"], match["key"]


def _object(uri: str) -> tuple[str, str]:
    bucket, key = _bucket_key(uri)
    if not key or key.endswith("/"):
        raise InputError(f"{redact(uri)}: names a folder, not an object")
    return bucket, key


def _condition(start: int, stop: int | None, expect: Entry | None) -> dict[str, str]:
    condition = {"IfMatch": f'"{expect.etag}"'} if expect is not None and expect.etag else {}
    # a plain GET is checked against the checksum stored with the object, if any; an answer to a range tells the whole
    # size, which shows a body cut short by a middlebox that wrote the length anew
    whole = expect is not None and (start, stop) == (0, expect.size_bytes)
    return condition if whole else {**condition, "Range": f"bytes={start}-{'' if stop is None else stop - 1}"}


def _checked(
    uri: str, answer: Mapping[str, Any], data: bytes, start: int, stop: int | None, expect: Entry | None
) -> bytes:
    """Return the requested bytes, complete and of the expected version. Raises ShortBody, StorageError."""
    etag = _plain(answer.get("ETag"))
    if not etag:
        raise ShortBody("an answer without ETag")  # an error page sent with status 200
    ranged = answer.get("ContentRange")
    size_bytes = int(ranged.rpartition("/")[2]) if ranged else int(answer["ContentLength"])
    if expect is not None and (size_bytes, etag) != (expect.size_bytes, expect.etag or etag):
        if etag == expect.etag and size_bytes < expect.size_bytes and not ranged:
            raise ShortBody(f"{size_bytes} bytes announced of {expect.size_bytes}")
        raise changed(expect, size_bytes, etag)
    first, last = clip(size_bytes, start, stop)
    wanted = last - first if ranged else size_bytes
    if len(data) != wanted:
        raise ShortBody(f"{len(data)} of {wanted} bytes arrived")
    return data if ranged else data[first:last]


def _plain(etag: str | None) -> str:
    return (etag or "").strip('"')
