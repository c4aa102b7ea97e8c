"""A short storm: studies on a file and on a server are killed at random moments and end as if left in peace.

`benchmarks/crash.py` is the long one.
"""

from __future__ import annotations

import pytest

from tests.postgres import programs
from tests.storm import storm

pytestmark = pytest.mark.slow


@pytest.mark.skipif(programs() is None, reason="needs PostgreSQL")
def test_studies_that_are_killed_at_random_end_as_if_left_in_peace():
    """Command, workers, all of them, server: no trial lost, changed, doubled or left running, every file whole."""
    done, faults = storm(8, seed=1, per_study=4, trials=8)
    assert not faults
    assert sum(done.values()) == 8
