"""A proxy that stands before an S3 server and breaks chosen requests: HTTP in, HTTP with faults out.

    with FaultProxy("http://127.0.0.1:5000") as proxy:
        proxy.set(Fault("slowdown", method="GET", path="/b/key", times=2))
        ...                                       # clients talk to proxy.url
        assert proxy.log == [("GET", "/b/key", "slowdown"), ...]

* Reaches every client and process, and any server: `Host` and all signed headers pass unchanged.
* One request per connection. Bodies are held in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit

# kind -> HTTP status and S3 code of a canned answer
CANNED = {
    "slowdown": (503, "SlowDown"),
    "internal": (500, "InternalError"),
    "expired": (400, "ExpiredToken"),
    "expired403": (403, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
    "conflict": (409, "ConditionalRequestConflict"),
    "ok_error": (200, "InternalError"),  # as CompleteMultipartUpload may answer
}
# reset           RST before the request's body is read
# reset_body      RST after `arg` of the answer's body; truncate: FIN there; short: FIN, and a length that agrees
# stall           wait `arg` seconds first; stall_body: at half of the body
# lost_reply      the server does it all, the client never hears
KINDS = {*CANNED, "reset", "reset_body", "truncate", "short", "stall", "stall_body", "lost_reply"}
BODILESS = {204, 304}


@dataclass(frozen=True)
class Fault:
    """Fires on requests whose method and path?query match, after the first `skip`, at most `times` times."""

    kind: str
    method: str = ".*"
    path: str = ""
    prob: float = 1.0
    times: int = 1 << 30
    skip: int = 0
    arg: float = 0.5

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind


@dataclass
class _Rule:
    fault: Fault
    skip: int
    times: int


@dataclass
class Message:
    first_line: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def get(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    def without(self, *names: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.headers if key.lower() not in names]

    def head(self, headers: list[tuple[str, str]]) -> bytes:
        lines = [self.first_line, *(f"{key}: {value}" for key, value in headers), "", ""]
        return "\r\n".join(lines).encode("latin-1")


class FaultProxy:
    def __init__(self, upstream: str, *, seed: int = 0, drop_headers: Collection[str] = ()) -> None:
        """`drop_headers` (lower case) are taken from every request: so a store forgets a condition."""
        parts = urlsplit(upstream)
        self._host, self._port, self._drop = parts.hostname, parts.port, tuple(drop_headers)
        self._random, self._lock = random.Random(seed), threading.Lock()
        self.log: list[tuple[str, str, str]] = []
        self.set()

    def set(self, *rules: Fault, seed: int | None = None) -> None:
        """Replace the rules and clear the log; with a seed, chance begins anew."""
        with self._lock:
            self._random = self._random if seed is None else random.Random(seed)
            self._rules = [_Rule(fault, fault.skip, fault.times) for fault in rules]
            self.log.clear()

    def fired(self, kind: str = "") -> int:
        """How many requests met a fault (of that kind)."""
        return sum(fault == kind if kind else bool(fault) for _, _, fault in list(self.log))

    def __enter__(self) -> FaultProxy:
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10)

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(ready))
        self._loop.close()

    async def _serve(self, ready: threading.Event) -> None:
        self._done = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512, limit=1 << 20)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await self._done.wait()
        server.close()
        self._loop.set_exception_handler(lambda loop, context: None)  # connections that are cut off now are no mistake
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._request(reader, writer)
        with contextlib.suppress(OSError):
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await _read_head(reader)
        method, path, _ = request.first_line.split(" ", 2)
        fault = self._choose(method, path)
        kind = fault.kind if fault else ""
        if kind == "reset":
            return _reset(writer)
        if fault and kind == "stall":
            await asyncio.sleep(fault.arg)
        if request.get("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = await _read_body(reader, request, until_close=False)
        if kind in CANNED:
            writer.write(_canned(kind, method))
            await writer.drain()
            return None
        answer = await self._forward(request, method)
        if kind == "lost_reply":
            return _reset(writer)
        return await _reply(writer, answer, fault)

    def _choose(self, method: str, path: str) -> Fault | None:
        with self._lock:
            chosen = next((rule for rule in self._rules if self._fires(rule, method, path)), None)
            fault = chosen.fault if chosen else None
            self.log.append((method, path, fault.kind if fault else ""))
            return fault

    def _fires(self, rule: _Rule, method: str, path: str) -> bool:
        fault = rule.fault
        if not re.fullmatch(fault.method, method) or not re.search(fault.path, path) or rule.times == 0:
            return False
        if rule.skip:
            rule.skip -= 1
            return False
        if self._random.random() >= fault.prob:
            return False
        rule.times -= 1
        return True

    async def _forward(self, request: Message, method: str) -> Message:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        try:
            headers = [*request.without("connection", "expect", *self._drop), ("Connection", "close")]
            writer.write(request.head(headers) + request.body)
            await writer.drain()
            answer = await _read_head(reader)
            while answer.first_line.split(" ")[1] == "100":
                answer = await _read_head(reader)
            if method != "HEAD" and int(answer.first_line.split(" ")[1]) not in BODILESS:
                answer.body = await _read_body(reader, answer, until_close=True)
            return answer
        finally:
            writer.close()


async def _read_head(reader: asyncio.StreamReader) -> Message:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return Message(lines[0], [(name, value.strip()) for name, _, value in pairs])


async def _read_body(reader: asyncio.StreamReader, message: Message, *, until_close: bool) -> bytes:
    """As it is framed: chunks with their trailers stay chunks."""
    if "chunked" in message.get("transfer-encoding").lower():
        return await _read_chunks(reader)
    if length := message.get("content-length"):
        return await reader.readexactly(int(length))
    return await reader.read() if until_close else b""


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    raw = bytearray()
    while True:
        line = await reader.readuntil(b"\r\n")
        raw += line
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        raw += await reader.readexactly(size + 2)
    while line != b"\r\n":  # trailers
        line = await reader.readuntil(b"\r\n")
        raw += line
    return bytes(raw)


def _canned(kind: str, method: str) -> bytes:
    status, code = CANNED[kind]
    xml = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>injected</Message></Error>'
    head = f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(xml)}\r\n"
    return (head + "Connection: close\r\n\r\n" + ("" if method == "HEAD" else xml)).encode()


async def _reply(writer: asyncio.StreamWriter, answer: Message, fault: Fault | None) -> None:
    kind, body = (fault.kind, answer.body) if fault else ("", answer.body)
    headers = [*answer.without("connection"), ("Connection", "close")]
    cut = int(len(body) * fault.arg) if fault and kind in ("reset_body", "truncate", "short") else len(body)
    if kind == "short" and body and answer.get("content-length"):
        headers = [(key, str(cut) if key.lower() == "content-length" else value) for key, value in headers]
    writer.write(answer.head(headers))
    if fault and kind == "stall_body" and body:
        writer.write(body[: len(body) // 2])
        await writer.drain()
        await asyncio.sleep(fault.arg)
        writer.write(body[len(body) // 2 :])
    else:
        writer.write(body[:cut])
    await writer.drain()
    if kind == "reset_body" and body:
        _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    plain: socket.socket = writer.get_extra_info("socket")
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
