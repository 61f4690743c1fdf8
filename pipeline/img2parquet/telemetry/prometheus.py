"""Publish a session's metrics to Prometheus: on a page of this process, and through exporters that a runner offers.

    METRICS     every metric: its kind, its labels and its help text
    Sample      the value of one metric with one set of labels
    Publisher   updates the sinks every few seconds on a thread of its own, so that images do not wait for it
    Page        a sink that serves http://HOST:PORT/metrics for this process (`run --metrics-port`)

Ray's own exporter is a sink in `runners/ray_metrics.py`; it puts `ray_` before each name.
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

from prometheus_client import CollectorRegistry, MetricsHandler, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from img2parquet.errors import UserError

log = logging.getLogger(__name__)

EVERY_S = 5.0
PART_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper bounds of the histogram
BOUNDS = (*PART_SECONDS, float("inf"))


@dataclass(frozen=True)
class Metric:
    kind: str  # counter | gauge | histogram
    labels: tuple[str, ...]  # in addition to `run`
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
    """The value of one metric. `labels` holds the values of the metric's labels in their order, without `run`.

    The value of a counter is its total so far."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


class Sink(Protocol):
    def update(self, run: str, samples: Sequence[Sample], observed: Sequence[Sample]) -> None:
        """Take the current samples, and the observations of histograms since the last call.

        Called from one thread at a time."""


SINKS: list[Sink] = []  # of this process, in addition to the runner's


class Publisher:
    """Update sinks every few seconds while entered, and once at the end.

    `collect(is_running)` returns the current samples and the new observations."""

    def __init__(
        self, run: str, sinks: Iterable[Sink], collect: Callable[[bool], tuple[list[Sample], list[Sample]]]
    ) -> None:
        self.run, self.sinks, self.collect, self.ended = run, list(sinks), collect, threading.Event()
        self.thread = threading.Thread(target=self._work, name="img2parquet-metrics", daemon=True)

    def __enter__(self) -> Publisher:
        if self.sinks:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.sinks:
            self.thread.join(EVERY_S)  # a sink that hangs does not delay the end of the job

    def _work(self) -> None:
        while self.publish(is_last=False) and not self.ended.wait(EVERY_S):
            pass
        self.ended.wait()
        self.publish(is_last=True)

    def publish(self, is_last: bool) -> bool:
        """Update every sink and drop each one that fails. Return whether any is left."""
        samples, observed = self.collect(not is_last)
        for sink in list(self.sinks):
            try:
                sink.update(self.run, samples, observed)
            except Exception as error:  # a job does not stop for its metrics
                log.warning("no more metrics to %s: %s: %s", type(sink).__name__, type(error).__name__, error)
                self.sinks.remove(sink)
        return bool(self.sinks)


class Page(Collector):
    """Collect the latest samples of each run of this process, for prometheus_client to expose."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.runs: dict[str, Sequence[Sample]] = {}
        self.histograms: dict[tuple[str, str, tuple[str, ...]], Counter[float]] = defaultdict(Counter)
        self.sums: dict[tuple[str, str, tuple[str, ...]], float] = defaultdict(float)

    def update(self, run: str, samples: Sequence[Sample], observed: Sequence[Sample]) -> None:
        with self.lock:
            self.runs[run] = samples
            for one in observed:
                key = (run, one.name, one.labels)
                self.histograms[key].update(bound for bound in BOUNDS if one.value <= bound)
                self.sums[key] += one.value

    def collect(self) -> list[Family]:
        with self.lock:
            return [self._family(name, metric) for name, metric in METRICS.items()]

    def _family(self, name: str, metric: Metric) -> Family:
        labels = ("run", *metric.labels)
        if metric.kind == "histogram":
            histogram = HistogramMetricFamily(name, metric.help, labels=labels)
            for (run, key, values), counts in self.histograms.items():
                if key == name:
                    buckets = [(_le(bound), float(counts[bound])) for bound in BOUNDS]
                    histogram.add_metric((run, *values), buckets, self.sums[run, key, values])
            return histogram
        family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
            name, metric.help, None, labels
        )
        for run, samples in self.runs.items():
            for one in samples:
                if one.name == name:
                    family.add_metric((run, *one.labels), one.value)
        return family

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry()).decode()

    def registry(self) -> CollectorRegistry:
        made = CollectorRegistry(auto_describe=True)
        made.register(self)
        return made


Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def _le(bound: float) -> str:
    return "+Inf" if bound == float("inf") else f"{bound:g}"


def parse_address(text: str) -> tuple[str, int]:
    """Split `--metrics-port` into host and port: `9400` listens on loopback only, `0.0.0.0:9400` on every interface.

    Raises UserError when the text is neither PORT nor HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise UserError(f"--metrics-port {text}: expected PORT or HOST:PORT", hint="for example --metrics-port 9400")
    return host.strip("[]") or "127.0.0.1", int(port)


@contextmanager
def served(address: str | None) -> Iterator[int]:
    """Serve the metrics of this process's sessions while entered. Yields the port, or 0 without an address.

    Raises UserError when the address is malformed or cannot be listened on."""
    if not address:
        yield 0
        return
    page = Page()
    server = _server(*parse_address(address), _handler(page))
    threading.Thread(target=server.serve_forever, args=(0.2,), name="img2parquet-page", daemon=True).start()
    SINKS.append(page)
    try:
        yield server.server_port
    finally:
        SINKS.remove(page)
        server.shutdown()
        server.server_close()


def _server(host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    try:
        server = ThreadingHTTPServer((host, port), handler)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--metrics-port: cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            hint="is another job using this port? port 0 takes a free one",
        ) from None
    server.daemon_threads = True
    return server


def _handler(page: Page) -> type[MetricsHandler]:
    """prometheus_client's own handler, at /metrics alone. Its `start_http_server` would answer at every path."""

    class Handler(MetricsHandler):
        registry = page.registry()
        timeout = 10

        def do_GET(self) -> None:
            with suppress(ConnectionError):  # the client has left
                if self.path.partition("?")[0] == "/metrics":
                    super().do_GET()
                else:
                    self.send_error(404, "metrics are at /metrics")

    return Handler
