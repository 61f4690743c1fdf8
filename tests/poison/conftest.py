"""What the jobs of both runners share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))
