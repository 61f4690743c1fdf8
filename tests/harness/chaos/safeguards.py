"""Each safeguard turned off in turn, and which tests see it: `python -m tests.harness.chaos.safeguards [NAME ...]`.

A safeguard that no test misses is not tested. Also a plugin: `pytest -p tests.harness.chaos.safeguards --without NAME`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
DISK, STORE, FAULTS = "tests/storage/test_disk.py", "tests/storage/test_store.py", "tests/storage/test_retry.py"
JOBS, COMMIT, DRIVER = (
    "tests/harness/chaos/test_store_faults.py",
    "tests/dataset/test_commit.py",
    "tests/engine/test_driver.py",
)
ISOLATED = "tests/isolation/test_isolated_steps.py"
VERIFY = "tests/results/test_verify.py"
ENOUGH = 6


@dataclass(frozen=True)
class Safeguard:
    """`tests`: files that should see its absence; with `chaos`, runs of the chaos suite too."""

    promise: str
    turn_off: Callable[[], None]
    tests: tuple[str, ...]
    chaos: bool = False
    enough: int = ENOUGH  # red tests, before the others are not run any more


def _create_once() -> None:
    """A file replaces the one that is there, a PUT has no condition; and the probe that would notice is silent."""
    from img2parquet.storage import disk, s3

    send = s3.send

    def send_plainly(options: Any, method: str, size_bytes: int | None, request: Mapping[str, Any]) -> Any:
        return send(options, method, size_bytes, _without(request, "IfNoneMatch"))

    s3.send = send_plainly
    disk._give_name = lambda temporary, final: temporary.replace(final) and None
    _probe()


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _probe() -> None:
    from img2parquet.storage import Store

    Store.creates_exclusively = lambda self, folder_uri: True  # type: ignore[method-assign]


def _look() -> None:
    from img2parquet.dataset.commit import Output

    Output._is_there = lambda self, uri: False  # type: ignore[method-assign]


def _412_is_done() -> None:
    """Somebody else's object is an error."""
    from img2parquet.dataset.commit import Output

    put_once = Output.put_once

    def strict(self: Output, name: str, data: bytes) -> Any:
        answer = put_once(self, name, data)
        assert answer == "created", f"{name} exists"
        return answer

    Output.put_once = strict  # type: ignore[method-assign]


def _names() -> None:
    """Part ids that depend on the process."""
    from img2parquet import schema
    from img2parquet.dataset import plan

    def random_id(identity: str, covers: str) -> str:
        return f"{os.getpid():016x}"

    plan.part_id = schema.part_id = random_id


def _checksums() -> None:
    """Of a part's whole file, and of its pages."""
    import pyarrow.parquet as pq

    from img2parquet.dataset import part_file
    from img2parquet.results import verify

    part_file.is_intact = verify.is_intact = lambda data: True
    real = pq.ParquetFile
    pq.ParquetFile = lambda source, **options: real(source, **_without(options, "page_checksum_verification"))


def _record_digests() -> None:
    """What _SUCCESS says of the other records is believed."""
    from img2parquet.dataset.commit import Output

    real = Output.digests
    Output.digests = lambda self, names: dict(names) if isinstance(names, Mapping) else real(self, names)  # type: ignore[method-assign]


def _lengths() -> None:
    """Whatever number of bytes has come is taken for all."""
    from img2parquet.storage import s3

    s3._checked = lambda uri, answer, data, start, stop, expect: (
        data if answer.get("ContentRange") else data[start:stop]
    )


def _pins() -> None:
    """The input's version is not held against the plan's."""
    from img2parquet.storage import disk, s3

    read, open_ = s3.S3Backend.read, disk.DiskBackend.open
    s3.S3Backend.read = lambda self, uri, start, stop, expect: read(self, uri, start, stop, None)  # type: ignore[method-assign]
    disk.DiskBackend.open = lambda self, uri, expect: open_(self, uri, None)  # type: ignore[method-assign]


def _identity() -> None:
    from img2parquet.dataset import commit

    commit.check_same_run = lambda *_: None


def _retries() -> None:
    from img2parquet.storage.retry import RetryBudget

    RetryBudget.after = lambda self, attempt, fault: None  # type: ignore[method-assign]


def _attempts() -> None:
    """What killed its worker is tried for ever."""
    from img2parquet.engine import stall_detector
    from img2parquet.isolation import isolated_steps, supervisor

    isolated_steps.TRIES = isolated_steps.READ_TRIES = supervisor.DEATHS = stall_detector.RERUNS = 1 << 60


def _hidden_temporaries() -> None:
    """A file is written under its own name."""
    from img2parquet.storage import disk

    def write_in_place(self: disk.DiskBackend, uri: str, data: bytes) -> None:
        with disk._errors(uri):
            disk._make_folders(Path(uri).parent)
            disk._write_synced(Path(uri), data, uri)

    disk.DiskBackend.create = write_in_place  # type: ignore[method-assign]


SAFEGUARDS = {
    "create-once": Safeguard("no object is ever written over", _create_once, (DISK, STORE), chaos=True),
    "probe": Safeguard("a store that ignores conditions is refused", _probe, (JOBS,)),
    "look": Safeguard("after an unknown outcome, the store is asked what is there", _look, (JOBS, COMMIT)),
    "412-is-done": Safeguard("an object that is there already is a success", _412_is_done, (JOBS, COMMIT), chaos=True),
    "names": Safeguard("a part's name depends on what it covers and the identity alone", _names, (COMMIT,), chaos=True),
    "checksums": Safeguard("a changed byte of a part is found", _checksums, (VERIFY,)),
    "record-digests": Safeguard("a changed record is found", _record_digests, (VERIFY,)),
    "lengths": Safeguard("a short body is never taken for a whole one", _lengths, (FAULTS, JOBS)),
    "pins": Safeguard("an input that changed since its plan is not read", _pins, (STORE, DRIVER)),
    "identity": Safeguard("another run's output is not resumed", _identity, (DRIVER, COMMIT)),
    "retries": Safeguard("what passes is waited for", _retries, (FAULTS, JOBS)),
    "attempts": Safeguard("what kills its worker is not tried for ever", _attempts, (ISOLATED,), enough=2),
    "temporaries": Safeguard("a file has its name only when it is whole", _hidden_temporaries, (DISK,), chaos=True),
}  # fmt: skip


# ---- a pytest plugin ---------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without", choices=list(SAFEGUARDS), help="turn this safeguard off")


def pytest_configure(config: pytest.Config) -> None:
    if name := config.getoption("--without"):
        SAFEGUARDS[name].turn_off()


# ---- all of them -------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.harness.chaos.safeguards")
    parser.add_argument("names", nargs="*", default=list(SAFEGUARDS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="the list as JSON; what is there of other safeguards stays")
    arguments = parser.parse_args()
    started, missed = time.monotonic(), dict[str, list[str]]()
    for name in arguments.names:
        missed[name] = _tests_that_miss(name)
        if arguments.out:
            _write(arguments.out, name, missed[name])
    held = sum(map(bool, missed.values()))
    print(f"safeguards: {held} of {len(missed)} turned off make a test fail, {time.monotonic() - started:.0f} s")
    return 0 if held == len(missed) else 1


def _write(out: Path, name: str, red: list[str]) -> None:
    """After each: a suite that is stopped leaves what it had."""
    table = json.loads(out.read_text()) if out.exists() else {}
    table[name] = {"without": SAFEGUARDS[name].promise, "red": red}
    ordered = {name: table[name] for name in SAFEGUARDS if name in table}
    out.write_text(json.dumps(ordered, indent=1) + "\n")


def _tests_that_miss(name: str) -> list[str]:
    """Tests that are green with everything on, and red without this: not all, but enough. Raises SystemExit where some
    are red in any case."""
    safeguard = SAFEGUARDS[name]
    if broken := _red("", safeguard.tests):  # as on a machine so busy that tests run out of time
        raise SystemExit("red with everything on:\n    " + "\n    ".join(sorted(broken)))
    red = sorted(_red(name, safeguard.tests))
    if safeguard.chaos:
        red += _chaos_problems(name)
    print(f"without {name} ({safeguard.promise}): {len(red)} red", *red, sep="\n    ", flush=True)
    return red


_GREEN: dict[tuple[str, tuple[str, ...]], set[str]] = {}


def _red(without: str, files: tuple[str, ...]) -> set[str]:
    """Remembered for the run with everything on, which several safeguards share."""
    if (without, files) not in _GREEN:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", "--timeout=300"]
        command += ["-m", "not slow and not realstore", "-p", "tests.harness.chaos.safeguards", *files]
        ran = _run([*command, *([f"--maxfail={SAFEGUARDS[without].enough}", "--without", without] if without else [])])
        if ran.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with {ran.returncode}:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
        told = re.findall(r"^(?:FAILED|ERROR) (\S+\.py::.*?)(?: - .*)?$", ran.stdout, re.MULTILINE)
        _GREEN[without, files] = set(told)
    return _GREEN[without, files]


def _chaos_problems(without: str) -> list[str]:
    """What the chaos suite found, once for each sort of problem."""
    ran = _run([sys.executable, "-m", "tests.harness.chaos", "--each", "3", "--without", without])
    told = re.findall(r"^FAILED (\w+) on (\w+)", ran.stdout, re.MULTILINE)
    return sorted({f"chaos: {kind} on {store}" for kind, store in told})


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)


if __name__ == "__main__":
    sys.exit(main())
