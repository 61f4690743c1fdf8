"""One finished output for all tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.results.report.hostile import make_output


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_output(tmp_path_factory.mktemp("report"))
