"""What a session has counted -> Prometheus: a page on this machine, and whatever else a runner offers.

    METRICS     every metric there is: its kind, its labels, what it says
    Sample      one value of one metric, as it stands
    Publisher   tells sinks how things stand every few seconds, from a thread of its own: images pay nothing for it
    Page        a sink: http://HOST:PORT/metrics for one process (`run --metrics-port`)

Ray's own exporter is a sink in `ray_metrics.py`; it puts `ray_` before each name.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol

from pipeline.errors import UserError

log = logging.getLogger(__name__)

EVERY_S = 5.0
PART_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper bounds of the histogram
BOUNDS = (*PART_SECONDS, float("inf"))


@dataclass(frozen=True)
class Metric:
    kind: str  # counter | gauge | histogram
    labels: tuple[str, ...]  # beside `run`
    help: str


METRICS = {
    "img2parquet_images_total": Metric("counter", (), "Images whose batches came back, whatever became of them"),
    "img2parquet_rejects_total": Metric("counter", ("model", "reason"), "Images that a model could not use"),
    "img2parquet_rows_total": Metric("counter", ("model",), "Rows in part files that were committed"),
    "img2parquet_parts": Metric("gauge", (), "Parts of the plan"),
    "img2parquet_parts_committed": Metric("gauge", (), "Parts that are committed, those of earlier sessions included"),
    "img2parquet_parts_failed": Metric("gauge", (), "Parts that this session gave up"),
    "img2parquet_stage_seconds_total": Metric("counter", ("stage",), "Busy seconds, summed over workers"),
    "img2parquet_stage_images_total": Metric("counter", ("stage",), "Images done; from embed on, once for each model"),
    "img2parquet_stage_bytes_total": Metric("counter", ("stage",), "Bytes handed on"),
    "img2parquet_part_seconds": Metric("histogram", ("stage",), "Seconds that a part's file took"),
    "img2parquet_waited_seconds_total": Metric("counter", ("pool",), "Seconds between batches, summed over workers"),
    "img2parquet_workers": Metric("gauge", ("pool",), "How many work at once"),
    "img2parquet_queue_depth": Metric("gauge", ("stage",), "Parts begun (gather); whole and not stored (commit)"),
    "img2parquet_commit_blocked_seconds_total": Metric("counter", (), "Seconds that the driver waited for commits"),
    "img2parquet_driver_seconds_total": Metric("counter", (), "CPU seconds of the driver's thread that gathers"),
    "img2parquet_retries_total": Metric("counter", ("reason",), "Requests to stores that were sent again"),
    "img2parquet_retry_wait_seconds_total": Metric("counter", (), "Back-off before them, summed over threads"),
    "img2parquet_stalls_total": Metric("counter", (), "Times that no batch came for resources.stall_s"),
    "img2parquet_idle_seconds": Metric("gauge", (), "Seconds since the last batch came"),
    "img2parquet_running": Metric("gauge", (), "1 while a session works, 0 when it has ended"),
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """`labels`: values in the order of the metric's own, without `run`. Counters tell their sum so far."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


class Sink(Protocol):
    def tell(self, run: str, samples: Sequence[Sample], seen: Sequence[Sample]) -> None:
        """How things stand; and the observations of histograms since the last call. From one thread at a time."""


SINKS: list[Sink] = []  # of this process, beside the runner's


class Publisher:
    """`stand` is asked every few seconds and once at the end; it gives samples and new observations."""

    def __init__(
        self, run: str, sinks: Iterable[Sink], stand: Callable[[bool], tuple[list[Sample], list[Sample]]]
    ) -> None:
        self.run, self.sinks, self.stand, self.ended = run, list(sinks), stand, threading.Event()
        self.thread = threading.Thread(target=self._work, name="img2parquet-metrics", daemon=True)

    def __enter__(self) -> Publisher:
        if self.sinks:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.sinks:
            self.thread.join(EVERY_S)  # a sink that hangs does not hold up the job's end

    def _work(self) -> None:
        while self.publish(is_last=False) and not self.ended.wait(EVERY_S):
            pass
        self.ended.wait()
        self.publish(is_last=True)

    def publish(self, is_last: bool) -> bool:
        """Tell every sink; one that fails is left out from then on. Whether any is left."""
        samples, seen = self.stand(not is_last)
        for sink in list(self.sinks):
            try:
                sink.tell(self.run, samples, seen)
            except Exception as error:  # metrics are no reason to stop a job
                log.warning("no more metrics to %s: %s: %s", type(sink).__name__, type(error).__name__, error)
                self.sinks.remove(sink)
        return bool(self.sinks)


class Page:
    """The samples of this process as Prometheus' text format, over HTTP."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runs: dict[str, Sequence[Sample]] = {}
        self.histograms: dict[tuple[str, str, tuple[str, ...]], Counter[float]] = defaultdict(Counter)
        self.sums: dict[tuple[str, str, tuple[str, ...]], float] = defaultdict(float)

    def tell(self, run: str, samples: Sequence[Sample], seen: Sequence[Sample]) -> None:
        with self.lock:
            self.runs[run] = samples
            for one in seen:
                key = (run, one.name, one.labels)
                self.histograms[key].update(bound for bound in BOUNDS if one.value <= bound)
                self.sums[key] += one.value

    def text(self) -> str:
        with self.lock:
            lines = [line for name, metric in METRICS.items() for line in self._metric(name, metric)]
        return "\n".join([*lines, ""])

    def _metric(self, name: str, metric: Metric) -> Iterator[str]:
        yield f"# HELP {name} {metric.help}"
        yield f"# TYPE {name} {metric.kind}"
        names = ("run", *metric.labels)
        for run, samples in self.runs.items():
            for one in samples:
                if one.name == name:
                    yield f"{name}{_labels(names, (run, *one.labels))} {one.value:.12g}"
        for (run, of, labels), counts in self.histograms.items():
            if of == name:
                for bound in BOUNDS:
                    le = "+Inf" if bound == float("inf") else f"{bound:g}"
                    yield f"{name}_bucket{_labels((*names, 'le'), (run, *labels, le))} {counts[bound]}"
                yield f"{name}_sum{_labels(names, (run, *labels))} {self.sums[run, of, labels]:.12g}"
                yield f"{name}_count{_labels(names, (run, *labels))} {counts[float('inf')]}"


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def parse_address(text: str) -> tuple[str, int]:
    """`9400` -> this machine alone; `0.0.0.0:9400` -> whoever reaches it. Raises UserError."""
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise UserError(f"--metrics-port {text}: expected PORT or HOST:PORT", hint="for example --metrics-port 9400")
    return host.strip("[]") or "127.0.0.1", int(port)


@contextmanager
def served(address: str | None) -> Iterator[int]:
    """A page for this process's sessions while it is entered; its port, 0 without an address. Raises UserError."""
    if not address:
        yield 0
        return
    page, server = Page(), _server(*parse_address(address))
    server.RequestHandlerClass = _handler(page)
    threading.Thread(target=server.serve_forever, args=(0.2,), name="img2parquet-page", daemon=True).start()
    SINKS.append(page)
    try:
        yield server.server_port
    finally:
        SINKS.remove(page)
        server.shutdown()
        server.server_close()


def _server(host: str, port: int) -> ThreadingHTTPServer:
    try:
        server = ThreadingHTTPServer((host, port), BaseHTTPRequestHandler)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--metrics-port: cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            hint="is another job using it? 0 takes a free one",
        ) from None
    server.daemon_threads = True
    return server


def _handler(page: Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/metrics"
            body = (page.text() if found else "metrics are at /metrics\n").encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            with suppress(ConnectionError):  # who asked has left
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
