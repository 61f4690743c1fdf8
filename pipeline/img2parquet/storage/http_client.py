"""Fetch http(s) bodies, without following a list or a redirect to private addresses.

* Addresses that are not public (loopback, private, link-local, cloud metadata) are reached only by a URL whose origin
  the user gave, never by a redirect to another origin, unless `allow_private_addresses` says so.
* The address of each connection is checked before a request is sent: a name may resolve to another one each time.
* Bodies are requested without content encoding, unpacked where a server compresses them all the same, and read no
  further than was asked for.
* URLs, and redirects, are asked for as they are written: servers may have signed their text.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import zlib
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult
from multidict import CIMultiDict, CIMultiDictProxy

from img2parquet.errors import PrivateAddress, StorageError
from img2parquet.storage.backend import host_of
from img2parquet.storage.uri_secrets import origin_of

NOT_IN_URLS = re.compile(r"""[^\x21-\x7e]|["<>\\^`{|}]|%(?![0-9A-Fa-f]{2})""")
INFLATED_BYTES, MOST_INFLATED_BYTES = 1 << 20, 1 << 30
METADATA = {ipaddress.ip_address("168.63.129.16")}  # Azure's own, though it looks public
NAT64 = ipaddress.ip_network("64:ff9b::/96")
_FIRST_URL: ContextVar[str] = ContextVar("first_url", default="")  # of the request: where a redirect came from
_MAY_BE_PRIVATE: ContextVar[bool] = ContextVar("may_be_private", default=False)


@dataclass(frozen=True)
class Reach:
    """Private addresses that requests may reach: those of `origins`; with None, those of any requested URL."""

    origins: frozenset[str] | None = frozenset()
    everywhere: bool = False

    def covers(self, first_url: str, url: str) -> bool:
        if self.everywhere:
            return True
        first = origin_of(first_url)
        return origin_of(url) == first and (self.origins is None or first in self.origins)


def filesystem(scheme: str, reach: Reach, options: dict[str, Any]) -> Any:
    """Make fsspec's filesystem with our client."""
    import fsspec

    settings = {"encoded": True, **options, "get_client": partial(_session, reach), "skip_instance_cache": True}
    return fsspec.filesystem(scheme, **settings)


def as_written(url: str) -> str:
    """Return a URL for a request: characters that none may hold are quoted, everything else stays as it is."""
    scheme, slashes, rest = url.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if slashes and not authority.isascii():
        url = f"{scheme}://{yarl.URL(f'{scheme}://{authority}').raw_authority}{rest[len(authority) :]}"
    return NOT_IN_URLS.sub(lambda found: quote(found[0].encode("utf-8", "surrogateescape")), url)


def fetch(filesystem: Any, url: str, span: tuple[int, int] | None, most_bytes: int | None) -> bytes:
    """Fetch bytes [first, last), and one more if the server sends it; without a span, at most `most_bytes`."""
    from fsspec.asyn import sync

    data: bytes = sync(filesystem.loop, _fetch, filesystem, url, span, most_bytes)
    return data


def is_public(address: str) -> bool:
    """Check that an address is public, also where IPv6 embeds an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and ip not in METADATA


async def _fetch(filesystem: Any, url: str, span: tuple[int, int] | None, most_bytes: int | None) -> bytes:
    session = await filesystem.set_session()
    settings = dict(filesystem.kwargs)
    headers = dict(settings.pop("headers", {}))
    if span:
        headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    async with session.get(filesystem.encode_url(url), headers=headers, **settings) as answer:
        answer.raise_for_status()
        if span and answer.status != 206:  # a server that ignores ranges
            return await _window(answer, *span)
        return await _window(answer, 0, span[1] - span[0] + 1 if span else most_bytes)


async def _window(answer: aiohttp.ClientResponse, start: int, stop: int | None) -> bytes:
    """Return bytes [start, stop) of a body; drop those before, do not read those after."""
    taken, position = [], 0
    async for chunk in _unpacked(answer):
        taken.append(chunk[max(start - position, 0) : None if stop is None else max(stop - position, 0)])
        position += len(chunk)
        if stop is not None and position >= stop:
            break
    return b"".join(taken)


async def _unpacked(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the chunks of a body, without the content encodings gzip and deflate."""
    encoding = answer.headers.get("Content-Encoding", "").strip().lower()
    inflater, size_bytes = None, 0
    async for chunk in answer.content.iter_any():
        if encoding and inflater is None:
            wbits, encoding = _wbits(encoding, chunk), ""
            inflater = zlib.decompressobj(wbits) if wbits else None
        if inflater is None:
            yield chunk
        while inflater is not None and chunk:
            try:
                data = inflater.decompress(chunk, INFLATED_BYTES)
            except zlib.error as error:
                raise aiohttp.ClientPayloadError(f"the compressed body is damaged: {error}") from error
            size_bytes += len(data)
            if size_bytes > MOST_INFLATED_BYTES:
                raise StorageError(
                    f"{host_of(str(answer.url))}: a body unpacks to more than {MOST_INFLATED_BYTES} bytes"
                )
            yield data
            chunk = inflater.unconsumed_tail
            if inflater.eof and inflater.unused_data:
                chunk, inflater = inflater.unused_data, zlib.decompressobj(wbits)


def _wbits(encoding: str, start: bytes) -> int:
    """Return zlib's parameter for a body; 0 where it is not packed, or in a way that zlib does not know."""
    if encoding in ("gzip", "x-gzip") and start.startswith(b"\x1f\x8b"):
        return 16 + zlib.MAX_WBITS
    if encoding != "deflate":
        return 0
    return zlib.MAX_WBITS if int.from_bytes(start[:2], "big") % 31 == 0 else -zlib.MAX_WBITS


async def _session(reach: Reach, **settings: Any) -> aiohttp.ClientSession:
    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(_remember)
    headers = {**settings.pop("headers", {}), "Accept-Encoding": "identity"}
    connector = _Connector(reach)
    return aiohttp.ClientSession(
        connector=connector,
        trace_configs=[trace],
        auto_decompress=False,
        headers=headers,
        response_class=_Answer,
        requote_redirect_url=False,
        **settings,
    )


class _Answer(aiohttp.ClientResponse):
    """An answer whose redirect is followed as it is written."""

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        headers = super().headers
        location = headers.get("Location", "")
        if location == as_written(location):
            return headers
        return CIMultiDictProxy(CIMultiDict({**headers, "Location": as_written(location)}))


async def _remember(session: Any, context: Any, request: aiohttp.TraceRequestStartParams) -> None:
    """Remember the first URL. aiohttp calls this once per request, not per redirect, in the task that connects."""
    _FIRST_URL.set(str(request.url))


class _Connector(aiohttp.TCPConnector):
    def __init__(self, reach: Reach) -> None:
        # without a cache of names: it would hand a later hop what an earlier one was allowed to resolve
        super().__init__(resolver=_Resolver(), use_dns_cache=False)
        self.reach = reach

    async def connect(self, req: Any, *how: Any, **else_: Any) -> Any:
        first, url = _FIRST_URL.get(), str(req.url)
        may_be_private = self.reach.covers(first, url)
        _MAY_BE_PRIVATE.set(may_be_private or req.proxy is not None)  # a proxy is the user's own
        if not may_be_private:
            _check(req.url.host, url)
        connection = await super().connect(req, *how, **else_)
        if not _MAY_BE_PRIVATE.get():
            self._check_peer(connection, url)  # also of a connection that was kept open
        return connection

    def _check_peer(self, connection: Any, url: str) -> None:
        peer = connection.transport.get_extra_info("peername") if connection.transport else None
        try:
            if not peer:
                raise aiohttp.ClientConnectionError("the connection is gone")
            _check(peer[0], url)
        except BaseException:
            connection.close()
            raise


class _Resolver(AbstractResolver):
    def __init__(self) -> None:
        self.system = aiohttp.DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self.system.resolve(host, port, family)
        if _MAY_BE_PRIVATE.get():
            return found
        public = [one for one in found if is_public(one["host"])]
        if found and not public:
            _check(found[0]["host"], f"http://{host}")
        return public

    async def close(self) -> None:
        await self.system.close()


def _check(host: str | None, url: str) -> None:
    """Raise PrivateAddress for an address that is not public; names are checked when they are resolved."""
    try:
        private = not is_public(host or "")
    except ValueError:
        return
    if private:
        raise PrivateAddress(
            f"refused to connect to {host_of(url)}: {host} is not a public address, and the job does not name it",
            hint="if it is yours, set input.storage_options: {http: {allow_private_addresses: true}}",
        )
