"""Two small servers on loopback that speak what the real drivers of gs:// and az:// ask of Google and Azure.

    with google() as url: ...     gcsfs finds it by STORAGE_EMULATOR_HOST
    with azure() as url: ...      adlfs by the BlobEndpoint of a connection string

Objects are held in memory, each with a generation; a create under a condition is decided under a lock, as the stores
promise. `lose` answers are computed and never sent: the server did it, the client does not hear.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ACCOUNT, KEY = "planted", "UExBTlRFRC1henVyZS1rZXk="


@dataclass(frozen=True)
class Blob:
    data: bytes
    generation: int

    @property
    def etag(self) -> str:
        return md5(b"%d " % self.generation + self.data).hexdigest()


@dataclass
class Objects:
    """`lose`: how many answers to creates are lost on their way; `refuse`: the status that every request is told."""

    blobs: dict[str, Blob] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    asked: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    generations: Iterator[int] = field(default_factory=lambda: count(1))
    lose: int = 0
    refuse: int = 0
    url: str = ""

    def create(self, name: str, data: bytes, only_new: bool) -> Blob | None:
        with self.lock:
            if only_new and name in self.blobs:
                return None
            self.blobs[name] = Blob(data, next(self.generations))
            return self.blobs[name]

    def below(self, prefix: str, delimiter: str) -> tuple[list[tuple[str, Blob]], list[str]]:
        """Objects, and the folders where names are cut at a delimiter."""
        found, folders = [], set()
        for name, blob in sorted(self.blobs.items()):
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                else:
                    found.append((name, blob))
        return found, sorted(folders)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: Objects

    def _any(self) -> None:
        length = self.headers.get("Content-Length")
        self.body = self.rfile.read(int(length)) if length else self._chunks()
        self.objects.asked.append((self.command, self.path))
        self.objects.headers.append(dict(self.headers))
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.answer(parts.path)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def answer(self, path: str) -> None:
        raise NotImplementedError

    def say(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):
                self.wfile.write(body)

    def loses(self) -> bool:
        if not self.objects.lose:
            return False
        self.objects.lose -= 1
        self.close_connection = True
        return True

    def span(self, size: int) -> tuple[int, int] | None:
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("x-ms-range") or self.headers.get("Range") or "")
        return (int(asked[1]), min(int(asked[2] or size - 1) + 1, size)) if asked else None

    def _chunks(self) -> bytes:
        data = b""
        while "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            size = int(self.rfile.readline(), 16)
            data += self.rfile.read(size + 2)[:size]
            if not size:
                break
        return data

    def log_message(self, *_: object) -> None:
        pass


class Google(Handler):
    def answer(self, path: str) -> None:
        if self.objects.refuse:
            error = {"error": {"code": self.objects.refuse, "message": "PLANTED is not allowed"}}
            return self.say(self.objects.refuse, json.dumps(error).encode())
        bucket, slash, name = path.partition("/b/")[2].partition("/o")
        if not slash:
            return self.say(200, b'{"name": "b", "kind": "storage#bucket"}')
        name = f"{bucket}/{unquote(name.lstrip('/'))}"
        if path.startswith("/upload/"):
            return self._upload(bucket)
        if name.endswith("/") and "prefix" not in self.query and self.command == "GET" and path.endswith("/o/"):
            return self._list(bucket)
        if path.rstrip("/").endswith("/o"):
            return self._list(bucket)
        blob = self.objects.blobs.get(name)
        if blob is None:
            return self.say(404, b'{"error": {"code": 404, "message": "No such object"}}')
        if self.command == "DELETE":
            del self.objects.blobs[name]
            return self.say(204)
        if "/download/" not in path and self.query.get("alt") != "media":
            return self.say(200, json.dumps(_resource(name, blob)).encode())
        span = self.span(len(blob.data))
        if span and span[0] >= len(blob.data):
            return self.say(416)
        start, stop = span or (0, len(blob.data))
        return self.say(206 if span else 200, blob.data[start:stop], "application/octet-stream")

    def _upload(self, bucket: str) -> None:
        if self.query["uploadType"] != "multipart":
            return self.say(400, b'{"error": {"code": 400, "message": "one request was expected"}}')
        boundary = re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"])
        assert boundary
        parts = self.body.split(b"--" + boundary[1].encode())[1:3]
        about, data = (part.partition(b"\n\n" if b"\r\n\r\n" not in part[:200] else b"\r\n\r\n")[2] for part in parts)
        name = f"{bucket}/{json.loads(about)['name']}"
        data = data.removesuffix(b"\n").removesuffix(b"\r")
        blob = self.objects.create(name, data, self.query.get("ifGenerationMatch") == "0")
        if self.loses():
            return None
        if blob is None:
            return self.say(412, b'{"error": {"code": 412, "message": "conditionNotMet"}}')
        return self.say(200, json.dumps(_resource(name, blob)).encode())

    def _list(self, bucket: str) -> None:
        found, folders = self.objects.below(f"{bucket}/{self.query.get('prefix', '')}", self.query.get("delimiter", ""))
        items = [_resource(name, blob) for name, blob in found]
        prefixes = [folder[len(bucket) + 1 :] for folder in folders]
        self.say(200, json.dumps({"kind": "storage#objects", "items": items, "prefixes": prefixes}).encode())


def _resource(name: str, blob: Blob) -> dict[str, object]:
    bucket, _, key = name.partition("/")
    return {
        "kind": "storage#object", "bucket": bucket, "name": key, "size": str(len(blob.data)), "etag": blob.etag,
        "generation": str(blob.generation), "updated": "2026-01-01T00:00:00Z", "timeCreated": "2026-01-01T00:00:00Z",
    }  # fmt: skip


class Azure(Handler):
    def answer(self, path: str) -> None:
        name = unquote(path).removeprefix(f"/{ACCOUNT}/")
        if self.objects.refuse:
            return self._error(self.objects.refuse, "AuthorizationFailure")
        if self.query.get("comp") == "list":
            return self._list(name)
        if self.query.get("restype") == "container":
            return self.say(200, kind="application/xml", ETag='"c"', Last_Modified=formatdate(0, usegmt=True))
        blob = self.objects.blobs.get(name)
        if self.command == "PUT":
            return self._put(name)
        if blob is None:
            return self._error(404, "BlobNotFound")
        if self.command == "DELETE":
            del self.objects.blobs[name]
            return self.say(202)
        about = {"ETag": f'"{blob.etag}"', "Last_Modified": formatdate(0, usegmt=True), "x_ms_blob_type": "BlockBlob",
                 "x_ms_creation_time": formatdate(0, usegmt=True)}  # fmt: skip
        if self.command == "HEAD":
            return self.say(200, kind="application/octet-stream", Content_Length=str(len(blob.data)), **about)
        span = self.span(len(blob.data))
        if span and span[0] >= len(blob.data):
            return self._error(416, "InvalidRange")
        start, stop = span or (0, len(blob.data))
        if span:
            about["Content_Range"] = f"bytes {start}-{stop - 1}/{len(blob.data)}"
        return self.say(206 if span else 200, blob.data[start:stop], "application/octet-stream", **about)

    def _put(self, name: str) -> None:
        blob = self.objects.create(name, self.body, self.headers.get("If-None-Match") == "*")
        if self.loses():
            return None
        if blob is None:
            return self._error(409, "BlobAlreadyExists")
        return self.say(
            201, ETag=f'"{blob.etag}"', Last_Modified=formatdate(0, usegmt=True), x_ms_request_server_encrypted="true"
        )

    def _list(self, container: str) -> None:
        start, delimiter = f"{container}/{self.query.get('prefix', '')}", self.query.get("delimiter", "")
        found, folders = self.objects.below(start, delimiter)
        cut = len(container) + 1
        blobs = "".join(
            f"<Blob><Name>{escape(name[cut:])}</Name><Properties>"
            f"<Last-Modified>{formatdate(0, usegmt=True)}</Last-Modified>"
            f"<Etag>{blob.etag}</Etag><Content-Length>{len(blob.data)}</Content-Length>"
            "<Content-Type>application/octet-stream</Content-Type><BlobType>BlockBlob</BlobType></Properties></Blob>"
            for name, blob in found
        )
        prefixes = "".join(f"<BlobPrefix><Name>{escape(folder[cut:])}</Name></BlobPrefix>" for folder in folders)
        xml = (
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="{container}">'
            f"<Blobs>{blobs}{prefixes}</Blobs><NextMarker/></EnumerationResults>"
        )
        self.say(200, xml.encode(), "application/xml")

    def _error(self, status: int, code: str) -> None:
        xml = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>PLANTED</Message></Error>'
        self.say(status, xml.encode(), "application/xml", x_ms_error_code=code)


@contextmanager
def _served(kind: type[Handler]) -> Iterator[Objects]:
    objects = Objects()
    handler = type(kind.__name__, (kind,), {"objects": objects})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    objects.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield objects
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def google() -> Iterator[Objects]:
    with _served(Google) as objects:
        yield objects


@contextmanager
def azure() -> Iterator[Objects]:
    with _served(Azure) as objects:
        yield objects


def connection_string(url: str) -> str:
    return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={url}/{ACCOUNT};"
