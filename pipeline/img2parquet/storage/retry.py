"""Classify what storage drivers raise, retry what may pass, and raise our errors for the rest.

This is the only layer of retries: botocore's and s3fs's own are switched off, since 5 x 5 attempts of two layers took
40 s and neither covers a body that breaks off. Our errors are raised outside the driver's `except`, so that their
context holds no exception with a signed URL.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from img2parquet.errors import AccessDenied, Img2ParquetError, InputError, NotFound, Refused, StorageError, Unreachable
from img2parquet.storage.backend import redact, redact_text
from img2parquet.storage.retry_counters import RETRIES

T = TypeVar("T")

BUSY_STATUS = {408, 429, 500, 502, 503, 504}
REFUSED_UNDONE = {409, 429, 503}  # the store says that it did not do it; 500 and 504 leave that open
UNDONE_CODES = {  # some of them come with status 400
    "BadDigest", "ConditionalRequestConflict", "RequestLimitExceeded", "RequestTimeout", "SlowDown", "Throttling",
    "ThrottlingException", "XAmzContentSHA256Mismatch",
}  # fmt: skip
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"}
BUSY_CODES = {"SlowDown", "RequestLimitExceeded", "Throttling", "ThrottlingException"}
UNREACHABLE = {"ClientConnectorError", "ConnectTimeoutError"}  # botocore's EndpointConnectionError is also a reset
# these leave no doubt that nothing was sent, and no reason to try again
NO_CREDENTIALS = {
    "NoCredentialsError": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; `anon: true` if public",
    "PartialCredentialsError": "a key without its secret, or the reverse: check the AWS_* variables",
    "ProfileNotFound": "no such profile in ~/.aws/config: check AWS_PROFILE",
    "CredentialRetrievalError": "the credential provider failed: log in again",
    "UnauthorizedSSOTokenError": "run `aws sso login`",
    "SSOTokenLoadError": "run `aws sso login`",
    "TokenRetrievalError": "run `aws sso login`",
    "LocalTokenNotFoundError": "set HF_TOKEN, or log in: `hf auth login`",
    "DefaultCredentialsError": "log in: `gcloud auth application-default login`",
    "ClientAuthenticationError": "log in: `az login`",
}
DENIED = {
    "InvalidAccessKeyId": "this store does not know the access key: is AWS_ENDPOINT_URL the right one?",
    "SignatureDoesNotMatch": "the secret does not belong to the access key: check AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set AWS_REGION or `region`",
    "AccessDenied": "the credentials are good, but may not do this: check the bucket's policy",
    **dict.fromkeys(EXPIRED, "the credentials have expired: get new ones, then run the same command again"),
}
NO_SENSE = {"InvalidBucketName", "ParamValidationError", "InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError"}
ENDLESS = {"TooManyRedirects"}
TELLING = {*UNREACHABLE, *NO_CREDENTIALS, *NO_SENSE}  # classes that say more than their causes
DRIVERS = (
    "aiobotocore", "aiohttp", "adlfs", "azure", "boto", "botocore", "fsspec", "gcsfs", "google", "http",
    "huggingface_hub", "requests", "s3fs", "ssl", "urllib3",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A failed request.

    status: the HTTP status or the nearest to it, 0 when the store gave none. code: the store's error code, or the
    exception's class name."""

    status: int
    code: str
    message: str

    @property
    def is_expired(self) -> bool:
        return self.code in EXPIRED

    @property
    def is_denied(self) -> bool:
        return self.status in (401, 403) or self.code in DENIED or self.code in NO_CREDENTIALS

    @property
    def is_busy(self) -> bool:
        """The store asks for fewer requests per second, for minutes while it splits a prefix."""
        return self.status in (429, 503) or self.code in BUSY_CODES

    @property
    def kind(self) -> str:
        """Name the fault in counters: the store's error code, or the exception's class name."""
        return f"HTTP {self.code}" if self.code.isdigit() else self.code

    @property
    def is_final(self) -> bool:
        """The request had no effect, and would be refused again."""
        refused = 400 <= self.status < 500 and self.status not in BUSY_STATUS and self.code not in UNDONE_CODES
        return self.is_denied or self.code in NO_SENSE or self.code in ENDLESS or refused

    @property
    def is_undone(self) -> bool:
        """The request had no effect, but may succeed when it is repeated."""
        return self.status in REFUSED_UNDONE or self.code in UNREACHABLE or self.code in UNDONE_CODES


@dataclass(frozen=True)
class RetryBudget:
    """How often to retry, and how long to wait.

    8 attempts wait about 15 s in all, enough for a store's restart. A store that cannot be reached is given up after
    `attempts_unreachable`, so that a wrong endpoint is reported soon. One that answers 503 SlowDown is asked up to 2.5
    times as often, for about 90 s: where every second request is refused, 8 attempts would lose one request of 256,
    and with it a part."""

    attempts: int = 8
    attempts_unreachable: int = 4
    backoff_s: float = 0.2
    busy_factor: float = 2.5

    def after(self, attempt: int, fault: Fault) -> float | None:
        """Return the seconds to wait after this failed attempt (from 1), or None to give up."""
        if attempt >= self._allowed(fault):
            return None
        return float(min(8.0, self.backoff_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))

    def _allowed(self, fault: Fault) -> int:
        if fault.code in UNREACHABLE:
            return min(self.attempts, self.attempts_unreachable)
        return math.ceil(self.attempts * self.busy_factor) if fault.is_busy else self.attempts


class ShortBody(OSError):
    """The body differs from what the store announced."""


def call_with_retries(
    action: Callable[[], T],
    otherwise: Callable[[Fault], T],
    budget: RetryBudget,
    *,
    again: Callable[[Fault], bool] = lambda fault: not fault.is_final,
    renew: Callable[[], None] | None = None,
) -> T:
    """Call `action` until it succeeds or the budget is used up; then return `otherwise` of the last fault.

    renew: called once when credentials have expired."""
    attempt = 0
    while True:
        attempt += 1
        fault = _try(action)
        if not isinstance(fault, _Refused):
            return fault
        if fault.own:
            raise fault.own
        if fault.fault.is_expired and renew:
            RETRIES.add(fault.fault.kind, 0.0)
            renew, attempt = renew(), 0
            continue
        wait_s = budget.after(attempt, fault.fault) if again(fault.fault) else None
        if wait_s is None:
            return otherwise(fault.fault)
        RETRIES.add(fault.fault.kind, wait_s)
        time.sleep(wait_s)


@dataclass(frozen=True)
class _Refused:
    fault: Fault
    own: Img2ParquetError | None = None  # raised by us below the driver, which has wrapped it


def _try(action: Callable[[], T]) -> T | _Refused:
    try:
        return action()
    except Img2ParquetError:
        raise
    except Exception as error:
        if not _is_drivers(error):
            raise
        own = next((link for link in _chain(error) if isinstance(link, Img2ParquetError)), None)
        return _Refused(fault_of(error), own)


def _is_drivers(error: BaseException) -> bool:
    return isinstance(error, (OSError, TimeoutError, EOFError)) or type(error).__module__.startswith(DRIVERS)


def fault_of(error: BaseException) -> Fault:
    """Find the HTTP response behind an exception, however its driver wrapped it.

    Classes alone mislead: s3fs raises another one for Ceph's 412 than for AWS's, and fsspec's http raises
    FileNotFoundError for everything."""
    chain = list(_chain(error))
    for link in chain:
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            said = response.get("Error", {})
            status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            return Fault(status, str(said.get("Code", status)), str(said.get("Message", "")))
    if any(isinstance(link, FileExistsError) for link in chain):
        return Fault(412, "FileExistsError", "")  # adlfs, of Azure's 409 BlobAlreadyExists; gcsfs, of 412
    for link in chain:
        if status := _http_status(link):
            return Fault(status, type(link).__name__, str(getattr(link, "message", "")))
    root = [link for link in chain if _is_drivers(link)][-1]
    if str(root).startswith("Forbidden: "):  # all that gcsfs tells of a 403
        return Fault(403, "Forbidden", str(root).partition("\n")[2])
    telling = (name for link in chain for name in _class_names(link) if name in TELLING)
    return Fault(_builtin_status(root), next(telling, type(root).__name__), str(root))


def _http_status(error: BaseException) -> int:
    """Return the status of an exception of aiohttp, gcsfs or azure; 0 for aiohttp's own 400 of a malformed body."""
    if type(error).__module__ == "aiohttp.http_exceptions":
        return 0
    told = (getattr(error, name, None) for name in ("status", "code", "status_code"))
    return next((status for status in told if isinstance(status, int) and status >= 400), 0)


def _class_names(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _builtin_status(error: BaseException) -> int:
    kinds = {
        FileNotFoundError: 404,
        NotADirectoryError: 404,
        IsADirectoryError: 404,
        PermissionError: 403,
        FileExistsError: 412,
    }
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), 0)


def error_of(fault: Fault, uri: str, endpoint: str = "") -> Img2ParquetError:
    """Return our error for a request about `uri` that failed for good."""
    what, said = redact(uri), _said(fault)
    if fault.code in NO_SENSE:
        return InputError(f"{what}: not a usable URI{said}")
    if fault.is_denied:
        hint = DENIED.get(fault.code) or NO_CREDENTIALS.get(fault.code) or DENIED["AccessDenied"]
        return AccessDenied(f"{what}: access denied{said}", hint=hint)
    if fault.code == "NoSuchBucket":
        return NotFound(f"{what}: there is no such bucket", hint="create it first, or check AWS_ENDPOINT_URL")
    if fault.status in (404, 410):
        return NotFound(f"{what}: not found")
    if fault.code in UNREACHABLE:
        return Unreachable(
            f"{what}: no answer from {endpoint or 'the store'}{said}", hint="is the address right, and is it up?"
        )
    if fault.status in (301, 307):
        return StorageError(f"{what}: the bucket is in another region{said}", hint="set AWS_REGION or `region`")
    kind = Refused if fault.is_final else Unreachable
    hint = "" if fault.is_final else "this may pass: run the same command again"
    return kind(f"{what}: the store failed{said}", hint=hint)


def _said(fault: Fault) -> str:
    status = f"HTTP {fault.status} " if fault.status else ""
    message = redact_text(fault.message).strip()
    return f" ({status}{fault.code}{': ' + message[:300] if message else ''})"
