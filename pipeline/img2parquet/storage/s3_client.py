"""Send one request through an S3 client, which each process makes once for its options and environment."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from img2parquet.storage.backend import hush

SLOWEST_BYTES_PER_S = 256 << 10  # below this a transfer counts as stalled: client timeouts alone allow minutes
# what the client reads from the environment when it is made
ENVIRONMENT = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CA_BUNDLE", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ENDPOINT_URL_STS",
)  # fmt: skip
_CLIENTS: dict[tuple[object, ...], Any] = {}


@dataclass(frozen=True)
class S3Options:
    """S3's fields of `Store.options`; everything else, and every credential, comes from the environment."""

    endpoint_url: str = ""
    profile: str = ""
    region: str = ""
    anon: bool = False
    requester_pays: bool = False
    role_arn: str = ""  # a role to assume with the environment's or the profile's credentials; renewed automatically
    external_id: str = ""  # if the role's owner requires one
    addressing_style: str = ""  # path | virtual; by default `path` where an endpoint is given
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    attempts: int = 8
    backoff_s: float = 0.2

    @property
    def endpoint(self) -> str:
        return self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def send(
    options: S3Options, method: str, size_bytes: int | None, request: Mapping[str, Any]
) -> tuple[Mapping[str, Any], bytes]:
    """Return the store's response and its body.

    size_bytes: how much is transferred, None when only the store knows; it limits the time of the whole request, beside
    the limit of each wait."""
    from fsspec.asyn import sync

    key = _client_key(options)
    client = _CLIENTS.get(key) or _CLIENTS.setdefault(key, _make_client(options))
    limit_s = None if size_bytes is None else 2 * options.read_timeout_s + size_bytes / SLOWEST_BYTES_PER_S
    answer, data = sync(client.loop, _answer, client, limit_s, method, {**client.req_kw, **request})
    return answer, data


def forget_client(options: S3Options) -> None:
    """Make the next request read the credentials again."""
    _CLIENTS.pop(_client_key(options), None)


def _client_key(options: S3Options) -> tuple[object, ...]:
    return (os.getpid(), options, *(os.environ.get(name) for name in ENVIRONMENT))


async def _answer(
    client: Any, limit_s: float | None, method: str, request: dict[str, Any]
) -> tuple[Mapping[str, Any], bytes]:
    await client.set_session()  # reads botocore's models: seconds on a busy machine, and not the store's fault
    async with asyncio.timeout(limit_s):
        answer = await client._call_s3(method, **request)
        if "Body" not in answer:
            return answer, b""
        try:
            return answer, await answer["Body"].read()
        finally:
            answer["Body"].close()


def _make_client(options: S3Options) -> Any:
    import s3fs

    hush("botocore", "aiobotocore", "s3fs", "fsspec", "urllib3", "aiohttp")
    session = _session(options)
    style = options.addressing_style or ("path" if options.endpoint and not _is_virtual(options.endpoint) else "auto")
    client = s3fs.S3FileSystem(
        anon=options.anon,
        endpoint_url=options.endpoint_url or None,
        requester_pays=options.requester_pays,
        client_kwargs={"region_name": options.region} if options.region else {},
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": 1},  # `call_with_retries` does it
            "connect_timeout": options.connect_timeout_s,
            "read_timeout": options.read_timeout_s,
            "max_pool_connections": 64,
            "s3": {"addressing_style": style},
        },
        use_listings_cache=False,
        skip_instance_cache=True,
        session=session,
    )
    client.retries = 1
    return client


def _session(options: S3Options) -> Any:
    """Use botocore's provider chain (environment, profile, web identity, instance), and assume the role with it."""
    from aiobotocore.credentials import AioAssumeRoleCredentialFetcher, AioDeferredRefreshableCredentials
    from aiobotocore.session import AioSession
    from botocore.exceptions import NoCredentialsError

    session = AioSession(profile=options.profile or None)
    if not options.role_arn or options.anon:
        return session

    async def assume() -> Any:
        source = await AioSession(profile=options.profile or None).get_credentials()
        if source is None:
            raise NoCredentialsError
        asked = {
            "RoleSessionName": "img2parquet",
            **({"ExternalId": options.external_id} if options.external_id else {}),
        }
        region = {"region_name": options.region} if options.region else {}
        make_client = partial(AioSession(profile=options.profile or None).create_client, **region)
        return await AioAssumeRoleCredentialFetcher(make_client, source, options.role_arn, asked).fetch_credentials()

    session._credentials = AioDeferredRefreshableCredentials(refresh_using=assume, method="assume-role")
    return session


def _is_virtual(endpoint: str) -> bool:
    return any(host in endpoint for host in ("amazonaws.com", "aliyuncs.com"))
