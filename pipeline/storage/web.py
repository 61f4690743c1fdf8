"""http(s): a client that does not go where a server or a list sends it, and the bytes that it gets.

* Addresses that are not public (loopback, private, link-local, cloud metadata) are reached only by a URL whose origin
  the user gave, never by a redirect to another origin, unless `allow_private_addresses` says so.
* Checked is the address of the connection, before a request goes over it: a name may resolve to another each time.
* A body is taken as it comes over the wire, without content encoding, and no further than was asked for.
"""

from __future__ import annotations

import ipaddress
import socket
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.errors import PrivateAddress
from pipeline.storage.entry import host_of
from pipeline.storage.given import origin_of

METADATA = {ipaddress.ip_address("168.63.129.16")}  # Azure's own, though it looks public
NAT64 = ipaddress.ip_network("64:ff9b::/96")
_FIRST_URL: ContextVar[str] = ContextVar("first_url", default="")  # of the request: where a redirect came from
_MAY_BE_PRIVATE: ContextVar[bool] = ContextVar("may_be_private", default=False)


@dataclass(frozen=True)
class Reach:
    """Where requests may go beside public addresses: `origins` that were given, None for whatever URL is asked for."""

    origins: frozenset[str] | None = frozenset()
    everywhere: bool = False

    def covers(self, first_url: str, url: str) -> bool:
        if self.everywhere:
            return True
        first = origin_of(first_url)
        return origin_of(url) == first and (self.origins is None or first in self.origins)


def filesystem(scheme: str, reach: Reach, options: dict[str, Any]) -> Any:
    """fsspec's, with our client."""
    import fsspec

    return fsspec.filesystem(scheme, **options, get_client=partial(_session, reach), skip_instance_cache=True)


def fetch(filesystem: Any, url: str, span: tuple[int, int] | None, most_bytes: int | None) -> bytes:
    """Bytes [first, last) of a body, and one more where there are too many; without a span, at most `most_bytes`."""
    from fsspec.asyn import sync

    data: bytes = sync(filesystem.loop, _fetch, filesystem, url, span, most_bytes)
    return data


def is_public(address: str) -> bool:
    """Whether anyone on the internet reaches it: IPv4 inside IPv6 counts as what it is."""
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
    """Bytes [start, stop) of a body; what comes before is dropped, what comes after is not read."""
    taken, position = [], 0
    async for chunk in answer.content.iter_any():
        taken.append(chunk[max(start - position, 0) : None if stop is None else max(stop - position, 0)])
        position += len(chunk)
        if stop is not None and position >= stop:
            break
    return b"".join(taken)


async def _session(reach: Reach, **settings: Any) -> aiohttp.ClientSession:
    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(_remember)
    headers = {**settings.pop("headers", {}), "Accept-Encoding": "identity"}
    connector = _Connector(reach)
    return aiohttp.ClientSession(
        connector=connector, trace_configs=[trace], auto_decompress=False, headers=headers, **settings
    )


async def _remember(session: Any, context: Any, request: aiohttp.TraceRequestStartParams) -> None:
    """Called once for a request, not for each redirect, in the task that goes on to connect."""
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
    """Raises PrivateAddress for an address that is not public; a name is looked at when it is resolved."""
    try:
        private = not is_public(host or "")
    except ValueError:
        return
    if private:
        raise PrivateAddress(
            f"refused to go to {host_of(url)}: {host} is not a public address, and the job does not name this server",
            hint="where it is yours, set input.storage_options: {http: {allow_private_addresses: true}}",
        )
