"""Metrics while a job runs: what the page shows, and that dashboard and alerts name only exported metrics."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from img2parquet.cli import main
from img2parquet.errors import UserError
from img2parquet.telemetry import prometheus
from img2parquet.telemetry.prometheus import METRICS, SINKS, Page, Publisher, Sample, parse_address, served
from tests.support.small_job import job_dict, make_checkpoint, make_shards

INFRA = Path(__file__).parents[2] / "infra"
NAME = re.compile(r"img2parquet_[a-z_]+")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics")
    make_shards(folder / "in")
    document = job_dict(f"{folder}/in/*.tar", make_checkpoint(folder / "model"), str(folder / "out"), reject_limit=1.0)
    (folder / "job.yaml").write_text(yaml.safe_dump(document))
    return folder / "job.yaml"


def exported() -> set[str]:
    """Return every name that a scrape shows."""
    names = {name for name, metric in METRICS.items() if metric.kind != "histogram"}
    histograms = {name for name, metric in METRICS.items() if metric.kind == "histogram"}
    return names | {name + end for name in histograms for end in ("_bucket", "_sum", "_count")}


def values(text: str) -> dict[str, float]:
    """Parse the text format into {`name{label="x"}`: value}, without the label `run`."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {named(sample.name, sample.labels): sample.value for sample in samples}


def named(name: str, labels: dict[str, str]) -> str:
    shown = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()) if label != "run")
    return f"{name}{{{shown}}}" if shown else name


def test_a_job_publishes_what_it_did(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[Page] = []
    monkeypatch.setattr(prometheus, "Page", lambda: pages.append(Page()) or pages[-1])
    assert main(["run", str(job), "--runner", "local", "--metrics-port", "0"]) == 0
    text = pages[0].text()
    found = values(text)
    rejects = {name: value for name, value in found.items() if name.startswith("img2parquet_rejects_total")}
    rows = {name: value for name, value in found.items() if name.startswith("img2parquet_rows_total")}
    assert rejects and rows
    assert found["img2parquet_images_total"] == sum(rejects.values()) + sum(rows.values())  # of one model
    assert (
        found["img2parquet_parts"]
        == found["img2parquet_parts_committed"]
        == found['img2parquet_part_seconds_count{stage="commit"}']
    )
    assert found['img2parquet_stage_images_total{stage="embed"}'] == sum(rows.values())
    assert found['img2parquet_stage_seconds_total{stage="decode"}'] > 0
    assert found["img2parquet_running"] == 0
    assert found['img2parquet_queue_depth{stage="commit"}'] == found['img2parquet_queue_depth{stage="gather"}'] == 0
    assert {name.partition("{")[0] for name in found} <= exported()
    assert re.search(r'img2parquet_running\{run="[0-9a-f]{12}"\} 0\.0\n', text)
    assert not SINKS


def test_the_page_is_served_on_loopback_by_default() -> None:
    with served("0") as port:
        SINKS[-1].update(
            "r", [Sample("img2parquet_parts", 3.0)], [Sample("img2parquet_part_seconds", 0.2, ("commit",))]
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
    assert 'img2parquet_parts{run="r"} 3.0\n' in text
    assert 'img2parquet_part_seconds_bucket{le="0.1",run="r",stage="commit"} 0.0\n' in text
    assert 'img2parquet_part_seconds_bucket{le="0.25",run="r",stage="commit"} 1.0\n' in text
    assert 'img2parquet_part_seconds_bucket{le="10",run="r",stage="commit"} 1.0\n' in text
    assert 'img2parquet_part_seconds_bucket{le="+Inf",run="r",stage="commit"} 1.0\n' in text
    assert 'img2parquet_part_seconds_sum{run="r",stage="commit"} 0.2\n' in text
    assert 'img2parquet_part_seconds_count{run="r",stage="commit"} 1.0\n' in text
    assert parse_address("9400") == ("127.0.0.1", 9400)
    assert parse_address("0.0.0.0:9400") == ("0.0.0.0", 9400)
    assert parse_address("[::1]:9400") == ("::1", 9400)


def test_every_metric_is_named_typed_and_explained() -> None:
    """As in METRICS, although the library stores the name of a counter without `_total`."""
    page = Page()
    samples = [
        Sample(name, 1.0, ("x",) * len(metric.labels)) for name, metric in METRICS.items() if metric.kind != "histogram"
    ]
    page.update("r", samples, [Sample("img2parquet_part_seconds", 0.2, ("commit",))])
    lines = page.text().splitlines()
    for name, metric in METRICS.items():
        assert f"# HELP {name} {metric.help}" in lines and f"# TYPE {name} {metric.kind}" in lines
    shown = {re.match(NAME, line)[0] for line in lines if not line.startswith("#")}  # type: ignore[index]
    assert shown == exported()


def test_openmetrics_is_served_on_request() -> None:
    with served("0") as port:
        SINKS[-1].update("r", [Sample("img2parquet_images_total", 3.0)], [])
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics?name[]=img2parquet_images_total")
        request.add_header("Accept", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
            text = answer.read().decode()
    assert 'img2parquet_images_total{run="r"} 3.0\n' in text and text.endswith("# EOF\n")
    assert "img2parquet_parts" not in text


def test_label_values_are_data() -> None:
    page = Page()
    page.update("r", [Sample("img2parquet_rows_total", 1.0, ('a"b\\c\nd',))], [])
    assert 'model="a\\"b\\\\c\\nd",run="r"} 1.0\n' in page.text()


@pytest.mark.parametrize("address", ["x", "1:x", "99999", "-1"])
def test_a_malformed_address_is_refused(address: str, job: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match="expected PORT or HOST:PORT"):
        parse_address(address)
    assert main(["run", str(job), "--runner", "local", f"--metrics-port={address}"]) == 2
    assert "--metrics-port" in capsys.readouterr().err


def test_a_taken_port_is_reported(job: Path, capsys: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["run", str(job), "--runner", "local", "--metrics-port", str(other.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1:" in capsys.readouterr().err


def test_a_failing_sink_is_dropped_and_the_others_continue() -> None:
    class Broken:
        def update(self, *_: object) -> None:
            raise OSError("no")

    page, collected = Page(), threading.Event()

    def collect(is_running: bool) -> tuple[list[Sample], list[Sample]]:
        collected.set()
        return [Sample("img2parquet_running", float(is_running))], []

    with Publisher("r", [Broken(), page], collect) as publisher:
        assert collected.wait(10)
    assert publisher.sinks == [page]
    assert 'img2parquet_running{run="r"} 0.0\n' in page.text()  # updated once more at the end


def test_without_sinks_nothing_is_collected() -> None:
    def collect(is_running: bool) -> tuple[list[Sample], list[Sample]]:
        raise AssertionError("nobody listens")

    with Publisher("r", [], collect) as publisher:
        assert not publisher.thread.is_alive()


def test_the_dashboard_names_only_what_is_exported() -> None:
    board = json.loads((INFRA / "grafana" / "img2parquet.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in NAME.findall(query)}
    assert named <= exported()
    used = {name.removesuffix("_bucket") for name in named}
    assert used == set(METRICS), "a metric that no panel shows, or the reverse"
    assert all("(ray_)?img2parquet_" in query and 'run=~"$run"' in query for query in queries)
    assert NAME.findall(board["templating"]["list"][1]["definition"]) == ["img2parquet_running"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) > 10
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(places) == len(set(places)) and all(panel["title"] for panel in board["panels"])


def test_labels_of_the_dashboard_are_those_of_the_metrics() -> None:
    board = json.loads((INFRA / "grafana" / "img2parquet.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            known = {"run", "le"} | {
                label for name in NAME.findall(target["expr"]) for label in METRICS[name.removesuffix("_bucket")].labels
            }
            asked = {label.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(",")}
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert asked | shown <= known, (panel["title"], target)
            assert not shown - asked, (panel["title"], target)


def test_the_alerts_name_only_what_is_exported() -> None:
    rules = yaml.safe_load((INFRA / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    named = {name for rule in rules for name in NAME.findall(rule["expr"])}
    assert named and named <= exported()
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "warn") for rule in rules)


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt-get install prometheus")
def test_prometheus_itself_agrees() -> None:
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        subprocess.run(["promtool", *command], cwd=INFRA / "prometheus", check=True, timeout=300)
