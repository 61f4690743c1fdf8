"""A job -> the folder that is uploaded for it: the job as JSON, the package's source, what `arrive.py` must find.

Nothing of the folder in which the command was given goes along, and no credential: the cluster's nodes have their own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import pipeline
from pipeline.errors import JobError, JobFailed
from pipeline.job import JobSpec, parse_job
from pipeline.read.settings import SourceSettings
from pipeline.storage import holds_secret, redact
from pipeline.storage.entry import scheme_of

PACKAGE = Path(pipeline.__file__).parent
DISTRIBUTION = "img2parquet"
STOP_EXTRA_S = 5  # beyond resources.grace_s, for the driver to end after its last commit
Install = Literal["upload", "pip", "image"]


@dataclass(frozen=True)
class Parcel:
    """What a cluster is asked to do. `job_id` names job and output: the same job gets the same one."""

    job_id: str
    document: dict[str, Any]
    install: Install
    stop_wait_s: int

    def pack(self, folder: Path) -> dict[str, Any]:
        """Fill an empty folder; the runtime environment that Ray makes of it."""
        (folder / "job.json").write_text(json.dumps(self.document, indent=1))
        (folder / "needs.json").write_text(json.dumps(needs(self.install)))
        shutil.copy(PACKAGE / "submit" / "arrive.py", folder)
        if self.install != "image":
            shutil.copytree(PACKAGE, folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))
        # Ray's own three seconds between SIGTERM and SIGKILL would cut off the parts that are under way
        environment: dict[str, Any] = {
            "working_dir": str(folder),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_wait_s)},
        }
        if self.install == "pip":
            environment["pip"] = [need for need in needs("pip")["requires"] if not re.match(r"ray\b", need)]
        return environment

    def entrypoint(self, as_json: bool) -> str:
        """A JSON file is a YAML file too."""
        return "python arrive.py run job.json --runner ray" + (" --json" if as_json else "")


def parcel(job: JobSpec, name: str, install: Install = "upload", shared_paths: bool = False) -> Parcel:
    """name: of the job file. Raises JobError for what a cluster cannot see, or must not be told."""
    check_places(job, shared_paths)
    document = job.model_dump(mode="json", exclude_unset=True)
    if parse_job(document) != job:
        raise JobFailed("the job does not survive being written down; that is our mistake, please report it")
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", Path(name).stem.lower()).strip("-")[:40] or "job"
    return Parcel(f"{DISTRIBUTION}-{slug}-{digest}", document, install, int(job.resources.grace_s) + STOP_EXTRA_S)


def check_places(job: JobSpec, shared_paths: bool) -> None:
    """Raises JobError for a URI that holds a secret, that only this machine sees, or that no two processes share."""
    for field, uri in _places(job):
        if holds_secret(uri):
            raise JobError(
                f"{field}: {redact(uri)} holds a login or a signature, which anybody who may look at the cluster "
                "could read",
                hint="give the cluster's nodes a role or keys of their own, and name the place without them",
            )
        if scheme_of(uri) == "memory":
            raise JobError(f"{field}: `{uri}` lives in one process, and a cluster has many", hint="use a bucket")
        if not shared_paths and _is_path(uri):
            raise JobError(
                f"{field}: `{uri}` is a path of this machine, which the cluster's nodes do not have",
                hint="use a bucket's URI, or say --shared-paths where all nodes have this path (NFS, Lustre, EFS)",
            )


def _places(job: JobSpec) -> Iterator[tuple[str, str]]:
    assert isinstance(job.input, SourceSettings)
    yield from ((f"input.uris[{i}]", uri) for i, uri in enumerate(job.input.uris))
    for i, model in enumerate(job.models):
        if _is_path(model.model) or "://" in model.model:
            yield f"models[{i}].model", model.model
    yield "output.uri", job.output.uri


def _is_path(uri: str) -> bool:
    """A repository of the hub, `org/name`, is none: folders that are here were made absolute with the job."""
    return scheme_of(uri) in ("file", "local") or uri.startswith(("/", ".", "~")) or "\\" in uri


def needs(install: Install) -> dict[str, Any]:
    """What must be on the cluster: our requirements without extras; `version` where the package itself must be."""
    try:
        every, own = requires(DISTRIBUTION) or [], version(DISTRIBUTION)
    except PackageNotFoundError:
        raise JobFailed(
            f"the distribution `{DISTRIBUTION}` is not installed here, only its source is there",
            hint="pip install . (or make test, which does)",
        ) from None
    plain = [need for need in every if "extra ==" not in need]
    return {"requires": plain, "version": own if install == "image" else "", "install": install}
