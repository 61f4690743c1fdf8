"""Talk to the head of a Ray cluster through its Jobs API: describe the cluster, submit a bundle, follow the job.

* Requests go through Ray's own client, which handles tokens, TLS and proxies. It needs `ray`, not its `default` extra.
* A log that breaks off continues where it stopped: the head sends it from the beginning, and lines already shown are
  skipped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2parquet.errors import JobError, JobFailed, UserError
from img2parquet.submit.bootstrap import OLDEST
from img2parquet.submit.bundle import Bundle, needs

CONNECT_S = 10.0
STARTING_S = 120.0  # how long a head may take from its first response until it accepts jobs
NOT_YET = "No available agent"  # in its error message until then
LOST_S = 120.0  # how long a head may be unreachable while its log is followed
ALIVE = ("PENDING", "RUNNING")
OVERRIDING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray's client prefers them to its argument
VERBOSE = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")


@dataclass(frozen=True)
class Facts:
    """The versions and resources of a cluster; empty where an older head does not report them."""

    ray: str
    python: str
    resources: dict[str, float]

    def __str__(self) -> str:
        cpus, gpus = (f"{self.resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
        return f"Ray {self.ray or 'unknown'}, Python {self.python or 'unknown'}, now {cpus} and {gpus}"


@dataclass(frozen=True)
class End:
    """The end of a job. `exit_code` is the driver's, 128 + n if signal n ended it, or 1 if it never started."""

    status: str
    exit_code: int
    message: str = ""


class JobsClient:
    """A connection to a head. Raises UserError when there is none or it refuses us, JobFailed when it goes away."""

    def __init__(self, address: str) -> None:
        self.address = as_url(address)
        _check_head(self.address)
        with _without_overrides(), _as_user_error(self.address):
            from ray.job_submission import JobSubmissionClient

            for name in VERBOSE:
                logging.getLogger(name).setLevel(logging.ERROR)
            self.client: Any = JobSubmissionClient(self.address)

    def facts(self) -> Facts:
        about = self._get("/api/v0/cluster_metadata")
        nodes = self._get("/nodes?view=summary").get("summary", [])
        resources: dict[str, float] = {}
        for node in nodes:
            raylet = node.get("raylet", {})
            if raylet.get("state", "ALIVE") == "ALIVE":
                for name, amount in raylet.get("resourcesTotal", {}).items():
                    resources[name] = resources.get(name, 0.0) + amount
        return Facts(str(about.get("rayVersion", "")), str(about.get("pythonVersion", "")), resources)

    def _get(self, path: str) -> dict[str, Any]:
        """Return the data of a GET request, or {} if this head does not know the path."""
        with _as_user_error(self.address):
            answer = self.client._do_request("GET", path, timeout=CONNECT_S)
            data = answer.json().get("data") if answer.status_code == 200 else None
        return data if isinstance(data, dict) else {}

    def submit(self, bundle: Bundle, as_json: bool = False) -> tuple[str, bool]:
        """Submit a bundle unless the same job is running. Return the job's id and whether it was already running."""
        with _as_user_error(self.address):
            known = {job.submission_id: str(job.status.value) for job in self.client.list_jobs() if job.submission_id}
        ours = [name for name in known if re.fullmatch(re.escape(bundle.job_id) + r"(-\d+)?", name)]
        for name in ours:
            if known[name] in ALIVE:
                return name, True
        job_id = f"{bundle.job_id}-{len(ours) + 1}" if ours else bundle.job_id
        with tempfile.TemporaryDirectory(prefix="img2parquet-submit-") as folder, _as_user_error(self.address):
            environment = bundle.pack(Path(folder))
            return job_id, not self._begin(job_id, bundle.entrypoint(as_json), environment)

    def _begin(self, job_id: str, entrypoint: str, environment: dict[str, Any]) -> bool:
        """Submit, waiting for a head that is still starting. Return False if the same job was submitted meanwhile."""
        started_at = time.monotonic()
        while True:
            try:
                self.client.submit_job(entrypoint=entrypoint, runtime_env=environment, submission_id=job_id)
                return True
            except RuntimeError as error:
                if "already" in str(error):
                    return False
                if NOT_YET not in str(error) or time.monotonic() - started_at > STARTING_S:
                    raise
            time.sleep(1.0)

    def follow(self, job_id: str, write: Callable[[str], None]) -> End:
        """Pass the job's log to `write` as it grows, and return its end. Raises JobFailed if the head stays away."""
        shown, seen_at = Shown(write), time.monotonic()
        while True:
            try:
                asyncio.run(self._tail(job_id, shown))
                info = self.client.get_job_info(job_id)
                if info.status.value not in ALIVE:
                    shown.whole(self.client.get_job_logs(job_id))
                    return _end(info)
                seen_at = time.monotonic()
            except _connection_errors() as error:
                if time.monotonic() - seen_at > LOST_S:
                    raise JobFailed(
                        f"the head at `{self.address}` has been unreachable for {LOST_S:.0f} s: {_one_line(error)}",
                        hint="the job may still be running: the same command follows it again, or resumes it if it "
                        "ended with its cluster",
                    ) from None
            time.sleep(1.0)

    async def _tail(self, job_id: str, shown: Shown) -> None:
        shown.begin()
        async for text in self.client.tail_job_logs(job_id):
            shown.add(text)


class Shown:
    """Pass on a log that may be sent again from its beginning, each character once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.count, self.at = write, 0, 0

    def begin(self) -> None:
        self.at = 0

    def add(self, text: str) -> None:
        new = text[max(0, self.count - self.at) :]
        self.at += len(text)
        self.count = max(self.count, self.at)
        if new:
            self.write(new)

    def whole(self, text: str) -> None:
        self.begin()
        self.add(text)


def check(facts: Facts, gpus_wanted: bool, waits_for_gpus: bool) -> list[str]:
    """Return notes for the user. Raises JobError when the cluster cannot run the job.

    waits_for_gpus: the job asks for a number of GPUs, which an autoscaler may add."""
    from packaging.requirements import Requirement

    python = tuple(int(number) for number in re.findall(r"\d+", facts.python)[:2])
    if python and python < OLDEST:
        raise JobError(
            f"the cluster runs Python {facts.python}, and img2parquet needs {OLDEST[0]}.{OLDEST[1]} or newer",
            hint="start the cluster from infra/docker/Dockerfile, or from an image of Ray with a newer Python (-py312)",
        )
    wanted = next(Requirement(need) for need in needs("upload")["requires"] if re.match(r"ray\b", need))
    if facts.ray and not wanted.specifier.contains(facts.ray, prereleases=True):
        raise JobError(
            f"the cluster runs Ray {facts.ray}, and img2parquet needs {wanted.specifier}",
            hint="start the cluster with a newer Ray (infra/docker/Dockerfile pins one that is tested)",
        )
    if gpus_wanted and facts.resources and not facts.resources.get("GPU"):
        if not waits_for_gpus:
            raise JobError(
                "the job requires a GPU (`resources.device: cuda`), and no node of the cluster has one",
                hint="add a GPU node or set `resources.device: auto`; on a cluster that adds GPU nodes on demand, set "
                "`resources.gpus_per_worker: 1`",
            )
        return ["no node has a GPU yet: the job waits until the cluster adds one"]
    return []


def as_url(address: str) -> str:
    """Complete `head:8265` to `http://head:8265`. Raises UserError for an address that cannot be a Jobs API."""
    scheme, slashes, rest = address.partition("://")
    if not slashes:
        scheme, rest = "http", address
    if scheme not in ("http", "https") or not rest.strip("/"):
        raise UserError(
            f"--address {address}: not the address of a Jobs API, which a head serves over HTTP",
            hint="for example http://head:8265, the dashboard's address; `ray://` and port 6379 are other services",
        )
    return f"{scheme}://{rest.rstrip('/')}"


def _check_head(address: str) -> None:
    """Raises UserError when no head responds in time: Ray's client has no time limit of its own."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_S) as answer:
            if b"ray_version" in answer.read(1000):
                return
        problem = "responds, but not as a Ray head"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return  # it requires a token, which Ray's client may have
        problem = f"responds, but not as a Ray head: {error}"
    except (OSError, ValueError) as error:
        problem = f"does not respond: {getattr(error, 'reason', error)}"
    raise UserError(
        f"--address {address} {problem}",
        hint="pass the dashboard's address (port 8265); on Kubernetes: "
        "kubectl port-forward service/CLUSTER-head-svc 8265:8265, then --address http://localhost:8265",
    )


@contextmanager
def _as_user_error(address: str) -> Iterator[None]:
    """Turn errors of Ray's client into one message."""
    try:
        yield
    except _connection_errors() as error:
        token = "token" in str(error).lower() or "auth" in type(error).__name__.lower()
        hint = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token, and RAY_AUTH_MODE=token"
        raise UserError(f"the head at `{address}` refused: {_one_line(error)}", hint=hint if token else "") from None


def _connection_errors() -> tuple[type[Exception], ...]:
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    return (ConnectionError, RuntimeError, OSError, aiohttp.ClientError, requests.RequestException, AuthenticationError)


@contextmanager
def _without_overrides() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in OVERRIDING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _end(info: Any) -> End:
    status, code = str(info.status.value), info.driver_exit_code
    if status == "SUCCEEDED":
        return End(status, 0)
    if status == "STOPPED":
        return End(status, code if code and code > 0 else 143)
    message = "" if code and code > 0 else _one_line(info.message or "")
    return End(status, 1 if not code else code if code > 0 else 128 - code, message)


def _one_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else ""
