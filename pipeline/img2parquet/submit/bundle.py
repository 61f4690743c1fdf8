"""Pack the folder that is uploaded for a job: the job as JSON, the package's source, and its requirements.

No file of the current folder is uploaded, and no credential: the cluster's nodes have their own.
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

import img2parquet
from img2parquet.errors import JobError, JobFailed
from img2parquet.job import JobSpec, parse_job
from img2parquet.read.settings import SourceSettings
from img2parquet.storage import holds_secret, redact
from img2parquet.storage.backend import scheme_of

PACKAGE = Path(img2parquet.__file__).parent
DISTRIBUTION = "img2parquet"
STOP_EXTRA_S = 5  # in addition to resources.grace_s, for the driver to exit after its last commit
Install = Literal["upload", "pip", "image"]


@dataclass(frozen=True)
class Bundle:
    """A job to submit. `job_id` is made from the name and content of the job, so the same job has the same id."""

    job_id: str
    document: dict[str, Any]
    install: Install
    stop_wait_s: int

    def pack(self, folder: Path) -> dict[str, Any]:
        """Fill an empty folder and return the runtime environment for Ray."""
        (folder / "job.json").write_text(json.dumps(self.document, indent=1))
        (folder / "needs.json").write_text(json.dumps(needs(self.install)))
        shutil.copy(PACKAGE / "submit" / "bootstrap.py", folder)
        if self.install != "image":
            shutil.copytree(
                PACKAGE, folder / "img2parquet", ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
            )
        # Ray's default of three seconds between SIGTERM and SIGKILL would cut off the parts in progress
        environment: dict[str, Any] = {
            "working_dir": str(folder),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_wait_s)},
        }
        if self.install == "pip":
            environment["pip"] = [need for need in needs("pip")["requires"] if not re.match(r"ray\b", need)]
        return environment

    def entrypoint(self, as_json: bool) -> str:
        """Return the command to run on the head. A JSON file is valid YAML, so it is a job file."""
        return "python bootstrap.py run job.json --runner ray" + (" --json" if as_json else "")


def make_bundle(job: JobSpec, name: str, install: Install = "upload", shared_paths: bool = False) -> Bundle:
    """Prepare a job for a cluster; `name` is the name of the job file.

    Raises JobError for a place that the cluster cannot reach or that holds a secret (see `check_places`)."""
    check_places(job, shared_paths)
    document = job.model_dump(mode="json", exclude_unset=True)
    if parse_job(document) != job:
        raise JobFailed("the job changes when it is written as JSON; this is a bug, please report it")
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", Path(name).stem.lower()).strip("-")[:40] or "job"
    return Bundle(f"{DISTRIBUTION}-{slug}-{digest}", document, install, int(job.resources.grace_s) + STOP_EXTRA_S)


def check_places(job: JobSpec, shared_paths: bool) -> None:
    """Raises JobError for a URI that holds a secret, is local to this machine, or is local to one process."""
    for field, uri in _places(job):
        if holds_secret(uri):
            raise JobError(
                f"{field}: {redact(uri)} holds a login or a signature, which everybody with access to the cluster "
                "could read",
                hint="give the cluster's nodes a role or keys of their own, and use the URI without credentials",
            )
        if scheme_of(uri) == "memory":
            raise JobError(f"{field}: `{uri}` exists in one process only, and a cluster has many", hint="use a bucket")
        if not shared_paths and _is_path(uri):
            raise JobError(
                f"{field}: `{uri}` is a path of this machine, which the cluster's nodes do not have",
                hint="use the URI of a bucket, or pass --shared-paths if all nodes have this path (NFS, Lustre, EFS)",
            )


def _places(job: JobSpec) -> Iterator[tuple[str, str]]:
    assert isinstance(job.input, SourceSettings)
    yield from ((f"input.uris[{i}]", uri) for i, uri in enumerate(job.input.uris))
    for i, model in enumerate(job.models):
        if _is_path(model.model) or "://" in model.model:
            yield f"models[{i}].model", model.model
    yield "output.uri", job.output.uri


def _is_path(uri: str) -> bool:
    """Tell local paths from URIs; `org/name` is a hub repository, since loading a job makes folders absolute."""
    return scheme_of(uri) in ("file", "local") or uri.startswith(("/", ".", "~")) or "\\" in uri


def needs(install: Install) -> dict[str, Any]:
    """Return the requirements on the cluster: ours without extras, and our `version` if the package must be there."""
    try:
        declared, own = requires(DISTRIBUTION) or [], version(DISTRIBUTION)
    except PackageNotFoundError:
        raise JobFailed(
            f"the distribution `{DISTRIBUTION}` is not installed: only its source is on the path",
            hint="run `pip install .` in the checkout",
        ) from None
    plain = [need for need in declared if "extra ==" not in need]
    return {"requires": plain, "version": own if install == "image" else "", "install": install}
