"""Share a finished run of a model that knows words among the tests of results."""

from __future__ import annotations

import pytest

from tests.support.two_towers import KINDS, Finished, finished_run


@pytest.fixture(params=KINDS)
def words_run(request: pytest.FixtureRequest) -> Finished:
    return finished_run(request.param)
