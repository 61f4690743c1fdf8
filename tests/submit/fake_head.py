"""Serve canned answers to the requests that `img2parquet submit` makes before it submits."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def fake_head(
    ray: str = "2.60.0", python: str = "3.11.7", resources: Mapping[str, float] | None = None, **more: Any
) -> Iterator[str]:
    """Yield the address. `more` maps paths to (status, body); the list `asked` receives each request."""
    node = {"raylet": {"state": "ALIVE", "resourcesTotal": resources if resources is not None else {"CPU": 4.0}}}
    answers = {
        "/api/version": {"version": "4", "ray_version": ray, "ray_commit": "x", "session_name": "s"},
        "/api/v0/cluster_metadata": {"data": {"rayVersion": ray, "pythonVersion": python}},
        "/nodes?view=summary": {"data": {"summary": [node]}},
        "/api/jobs/": [],
    }
    asked: list[str] = more.get("asked", [])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"GET {self.path}")
            status, body = more.get(self.path, (200, answers.get(self.path)))
            self._say(404 if body is None else status, body)

        def do_PUT(self) -> None:
            self._note("PUT")

        def do_POST(self) -> None:
            self._note("POST")

        def _note(self, what: str) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(f"{what} {self.path}")
            self._say(500, {"error": "it is not one"})

        def _say(self, status: int, body: Any) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
