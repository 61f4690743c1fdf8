"""All that a driver imports, for a parent to import before its first fork. Starts no thread."""

from __future__ import annotations

import tests.chaos.environment  # noqa: F401 - before anything that reads it

# isort: split
import aiobotocore.session  # noqa: F401
import pyarrow.fs  # noqa: F401
import s3fs  # noqa: F401
import torch  # noqa: F401

import pipeline.driver
import pipeline.embed
import pipeline.local
import pipeline.models.levit  # noqa: F401
