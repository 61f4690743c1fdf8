"""One Ray cluster of two CPUs for all tests of a process that do not test how Ray starts or dies.

A start costs ten seconds of CPU time, and the imports of its workers as much again."""

from __future__ import annotations

import atexit
import functools
import json
import os


@functools.cache
def shared_cluster() -> str:
    """Start the cluster, join it from this process, and return its address. It ends with the process.

    Its nodes keep the environment of this moment: a test whose workers need other variables passes them with
    `driver_environment`, or starts a cluster of its own."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    atexit.register(ray.shutdown)
    return str(ray.get_runtime_context().gcs_address)


def driver_environment(**worker_variables: str) -> dict[str, str]:
    """Return the environment of a driver in another process that joins the shared cluster.

    worker_variables: what the workers of its job are started with; the driver gets them too."""
    job = {"runtime_env": {"env_vars": worker_variables}} if worker_variables else {}
    joined = {"RAY_ADDRESS": shared_cluster(), "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}
    return {**os.environ, **worker_variables, **joined}
