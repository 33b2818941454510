"""Every test of this folder computes on one thread: its thresholds are of that rounding."""

import pytest


@pytest.fixture(autouse=True)
def rounding(one_thread):
    """See `one_thread`."""
