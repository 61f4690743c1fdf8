"""Keep the folders of the user's own files off the import path of Ray's workers (see `isolation/import_path.py`)."""

from __future__ import annotations

import os
from typing import Any

import ray._private.ray_constants
from ray.job_config import JobConfig

from img2parquet.isolation.import_path import package_folders

UV_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"


class OwnCodeOnly(JobConfig):  # type: ignore[misc, unused-ignore]
    """A job whose workers get this package's folder, where it is not installed, and no other folder of the driver.

    `ray.init` appends the current folder and the script's folder to the list that it finds here. It is given a new list
    each time, so what it appends is lost.
    """

    @property
    def _py_driver_sys_path(self) -> list[str]:
        return package_folders()

    @_py_driver_sys_path.setter
    def _py_driver_sys_path(self, folders: list[str]) -> None:
        pass


def own_code_only(address: str | None) -> dict[str, Any]:
    """Return arguments for `ray.init`: none for Ray Client, which passes on no folder of this machine."""
    if UV_HOOK not in os.environ:  # below `uv run`, Ray would upload the current folder and import from it
        ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    return {} if address and "://" in address else {"job_config": OwnCodeOnly()}
