"""A live fleet for the tests of this folder: a head, and nodes that tests add and take away."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.multinode.site import write_site

ROOT = Path(__file__).parents[3]
LIMIT_S = 500  # of any one thing, on a machine that has much else to do


class Fleet:
    """The cluster of `serve.py`. `environment` is what talks to it: its token, and our package's place."""

    def __init__(self, folder: Path) -> None:
        self.marks = folder / "marks"
        self.marks.mkdir()
        token = secrets.token_hex(16)
        base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = base | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{base['PATH']}",
        }
        # on the nodes the package comes with the job, not from here
        nodes = self.environment | {"PYTHONPATH": f"{write_site(folder / 'site')}", "FLEET_MARKS": str(self.marks)}
        self.log = (folder / "serve.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/harness/multinode/serve.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=nodes,
            cwd=folder,
        )  # fmt: skip
        about = self._answer()
        self.address, self.jobs = about["address"], about["jobs"]

    def add(self, **resources: float) -> str:
        node: str = self._ask({"add": resources})["node"]
        return node

    def remove(self, node: str) -> None:
        self._ask({"remove": node})

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("serve: "):
                answer: dict[str, Any] = json.loads(line.removeprefix("serve: "))
                return answer
        self.log.seek(0)
        raise AssertionError(f"the cluster has ended: {self.log.read()[-3000:]}")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "img2parquet.cli", "submit", *arguments, "--address", self.jobs, "--shared-paths"]

    def submit(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), cwd=cwd, capture_output=True, text=True, env=self.environment, timeout=LIMIT_S
        )

    def ray(self, *arguments: str) -> str:
        """What Ray's own command says."""
        command = [sys.executable, "-m", "ray.scripts.scripts", *arguments, "--address", self.jobs]
        ran = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=LIMIT_S)
        return ran.stdout + ran.stderr

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(LIMIT_S)
        self.log.close()


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    yield made
    made.stop()
