"""All that a driver imports, for a parent to import before its first fork. Starts no thread."""

from __future__ import annotations

import tests.harness.chaos.environment  # noqa: F401 - before anything that reads it

# isort: split
import aiobotocore.session  # noqa: F401
import pyarrow.fs  # noqa: F401
import s3fs  # noqa: F401
import torch  # noqa: F401

import img2parquet.engine.driver
import img2parquet.inference.steps
import img2parquet.models.levit
import img2parquet.runners.local  # noqa: F401
