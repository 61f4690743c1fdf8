"""Importing this sets the environment as tests/conftest.py does: no network, nobody's accounts, one thread a step."""

from __future__ import annotations

import os

from tests.conftest import ENVIRONMENT, FOREIGN

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

os.environ.update(ENVIRONMENT, **dict.fromkeys(ONE_THREAD, "1"))
for name in (*FOREIGN, "AWS_ENDPOINT_URL"):
    os.environ.pop(name, None)
