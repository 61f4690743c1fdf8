"""Serve a folder's files as objects of one bucket with a delay: `python -m infra.bench.static_s3 FOLDER 0.02`

It implements what reading needs of S3's protocol and no more: GET with Range and If-Match, HEAD, a listing in one page.
Bodies go from the file to the socket by sendfile, so that the server is not the limit. It prints its port and serves on
loopback until its standard input is closed.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE, Popen
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bench"


@contextmanager
def serving(folder: Path, latency_s: float) -> Iterator[str]:
    """Run the server in a process of its own; yield the endpoint's URL."""
    command = [sys.executable, "-m", "infra.bench.static_s3", str(folder), str(latency_s)]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdin and process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


class Objects(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder: Path
    latency_s: float

    def do_GET(self) -> None:
        time.sleep(self.latency_s)
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        path = (self.folder / key).resolve()
        if bucket != BUCKET or not path.is_relative_to(self.folder):
            return self._say(404)
        if not key:
            return self._list({name: values[0] for name, values in parse_qs(parts.query).items()})
        if not path.is_file():
            return self._say(404)
        return self._send(path)

    do_HEAD = do_GET

    def _send(self, path: Path) -> None:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
            if self.headers.get("If-Match", etag) != etag:
                return self._say(412)
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop = (int(asked[1]), int(asked[2] or status.st_size) + 1) if asked else (0, status.st_size)
            stop = min(stop, status.st_size)
            if asked and start >= stop:
                return self._say(416)
            headers = {"ETag": etag, "Last-Modified": self.date_time_string(int(status.st_mtime))}
            if asked:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{status.st_size}"
            self._head(206 if asked else 200, stop - start, headers)
            if self.command == "GET" and stop > start:
                self.wfile.flush()
                self.connection.sendfile(file, start, stop - start)
        return None

    def _list(self, query: dict[str, str]) -> None:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        items = []
        for path in files:
            key, status = str(path.relative_to(self.folder)), path.stat()
            if key.startswith(query.get("prefix", "")):
                items.append(
                    f"<Contents><Key>{escape(key)}</Key><Size>{status.st_size}</Size>"
                    f"<LastModified>2026-01-01T00:00:00Z</LastModified>"
                    f"<ETag>&quot;{status.st_mtime_ns:x}-{status.st_size:x}&quot;</ETag></Contents>"
                )
        xml = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>"
        self._say(200, f'<?xml version="1.0" encoding="UTF-8"?>{xml}'.encode())

    def _say(self, status: int, body: bytes = b"") -> None:
        self._head(status, len(body), {"Content-Type": "application/xml"})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, size_bytes: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(size_bytes)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main(folder: str, latency_s: str) -> None:
    handler = type("Handler", (Objects,), {"folder": Path(folder).resolve(), "latency_s": float(latency_s)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
