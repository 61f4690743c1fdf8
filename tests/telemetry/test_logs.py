"""`--log-format json`: every line on stderr, of Ray's workers too, is a JSON object with its run and part."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from img2parquet.cli import main
from img2parquet.cli.progress import Progress
from img2parquet.dataset.commit import Output
from img2parquet.engine.run_report import Tally
from img2parquet.storage import Store
from img2parquet.telemetry import logs
from tests.support.ray_cluster import driver_environment
from tests.support.small_job import job_dict, make_checkpoint, make_shards

HEAD = {"time", "level", "logger", "run", "part", "message"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    shards = make_shards(folder / "in", shards=2)
    make_checkpoint(folder / "model")
    last = shards[-1]
    last.write_bytes(last.read_bytes().rstrip(b"\0") + bytes(512))  # without its end-of-archive marker: a warning
    return folder


@pytest.fixture(autouse=True)
def plain_text_again() -> Iterator[None]:
    yield
    logs.end()


def write_job(made: Path, folder: Path) -> Path:
    document = job_dict(f"{made}/in/*.tar", made / "model", str(folder / "out"), reject_limit=1.0)
    document["input"]["shards_per_part"] = 1
    (folder / "job.yaml").write_text(yaml.safe_dump(document))
    return folder / "job.yaml"


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def check(lines: list[dict[str, Any]], output: str) -> None:
    """Assert what holds for both runners."""
    record = Output.at(output, Store()).run_record()
    assert record is not None
    run = record["plan_sha256"][:12]
    assert lines and all(set(line) >= HEAD for line in lines)
    committed = [line for line in lines if line.get("event") == "part_committed"]
    assert sorted(line["part"] for line in committed) == [0, 1]
    assert all(line["run"] == run and line["rows"] > 0 for line in committed)
    assert {line["file"] for line in committed} == {
        str(path.relative_to(output)) for path in Path(output).glob("model=*/*.parquet")
    }
    (warned,) = [line for line in lines if "end-of-archive marker" in line["message"]]
    assert (warned["part"], warned["run"], warned["level"]) == (1, run, "warning")
    progress = [line for line in lines if line.get("event") == "progress"]
    assert progress[-1]["parts_done"] == progress[-1]["parts"] == 2


def test_a_local_job_writes_only_objects(made: Path, tmp_path: Path, capfd: Any) -> None:
    job = write_job(made, tmp_path)
    assert main(["run", str(job), "--runner", "local", "--log-format", "json"]) == 0
    said = capfd.readouterr()
    check(lines_of(said.err), str(tmp_path / "out"))
    assert said.out.startswith("parts      2")  # the summary is a result
    assert not logs.is_json() and not any(isinstance(h, logs.JsonLines) for h in logging.getLogger().handlers)


def test_errors_are_objects_too(tmp_path: Path, capfd: Any) -> None:
    assert main(["run", str(tmp_path / "none.yaml"), "--log-format", "json"]) == 2
    (line,) = lines_of(capfd.readouterr().err)
    assert (line["level"], line["run"], line["part"]) == ("error", None, None)
    assert "none.yaml" in line["message"]


def test_lines_hold_no_secrets_and_no_control_characters(capsys: Any) -> None:
    logs.use_json("run")
    log = logging.getLogger("img2parquet.test")
    try:
        raise OSError("https://me:PLANTED@host/a?sig=PLANTED")
    except OSError:
        log.exception("could not read https://host/a?X-Amz-Signature=PLANTED\x1b[2J\x7f")
    logs.write_line("at https://host/a?token=PLANTED")
    text = capsys.readouterr().err
    first, second = lines_of(text)
    assert "PLANTED" not in text and "\x1b" not in text and "\x7f" not in text
    assert first["message"].startswith("could not read https://host/a") and "OSError: https://host/a" in first["error"]
    assert second["message"] == "at https://host/a"


def test_a_part_belongs_to_its_thread(capsys: Any) -> None:
    logs.use_json()
    assert logs.set_run("0123456789abcdef").run == "0123456789ab"
    log = logging.getLogger("img2parquet.test")

    def work(part: int) -> None:
        logs.at_part(part)
        log.info("at work")

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.info("outside")
    lines = lines_of(capsys.readouterr().err)
    assert sorted(line["part"] for line in lines[:-1]) == [0, 1, 2, 3]
    assert lines[-1]["part"] is None and {line["run"] for line in lines} == {"0123456789ab"}


def test_lines_of_workers_are_repeated_as_they_are(capsys: Any) -> None:
    logs.use_json("r")
    own = json.dumps({"time": "2026-01-01T00:00:00Z", "level": "warning", "message": "x", "part": 3})
    logs.repeat([own, "Fatal Python error: \x1b[1m", ""])
    first, second = lines_of(capsys.readouterr().err)
    assert first["part"] == 3
    assert (second["logger"], second["message"]) == ("worker", "Fatal Python error: \x1b[1m")


def test_the_live_line_is_off() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    logs.use_json()
    terminal = Terminal()
    progress = Progress(terminal)
    progress(Tally("out", parts=3, parts_committed=3, rows_in=5))
    progress.close()
    (line,) = lines_of(terminal.getvalue())
    assert (line["event"], line["parts"], line["rows_in"]) == ("progress", 3, 5)


ON_RAY = """
import sys, time, urllib.request
import ray
from img2parquet.cli import main
from img2parquet.dataset.commit import Output
from img2parquet.storage import Store
job, output, *names = sys.argv[1:]
code = main(["run", job, "--log-format", "json"])
if code:
    sys.exit(code)
run = Output.at(output, Store()).run_record()["plan_sha256"][:12]
(node,) = ray.nodes()
url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
until, ours = time.monotonic() + 120, []
while time.monotonic() < until and not all(f"ray_img2parquet_{name}{{" in "".join(ours) for name in names):
    time.sleep(1)
    with urllib.request.urlopen(url, timeout=10) as answer:  # the cluster has run other jobs too
        ours = [line for line in answer.read().decode().splitlines() if f'run="{run}"' in line]
print("\\n".join(ours))
"""


@pytest.mark.slow
def test_on_ray_workers_lines_arrive_and_rays_exporter_has_the_metrics(made: Path, tmp_path: Path) -> None:
    job = write_job(made, tmp_path)
    names = ("images_total", "rows_total", "stage_seconds_total", "parts_committed", "part_seconds_bucket")
    ran = subprocess.run(
        [sys.executable, "-c", ON_RAY, str(job), str(tmp_path / "out"), *names],
        capture_output=True,
        text=True,
        timeout=300,
        env=driver_environment(),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = lines_of(ran.stderr)
    check(lines, str(tmp_path / "out"))
    (warned,) = [line for line in lines if "end-of-archive marker" in line["message"]]
    assert warned["pid"] and warned["node"]  # it comes from a worker
    samples = [line for line in ran.stdout.splitlines() if line.startswith("ray_img2parquet_")]
    for name in names:
        assert any(line.startswith(f"ray_img2parquet_{name}{{") for line in samples), (name, samples)
    (rows,) = [line for line in samples if line.startswith("ray_img2parquet_rows_total{")]
    assert 'model="tiny"' in rows and float(rows.split()[-1]) > 0
