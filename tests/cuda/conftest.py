"""The device of the tests whose arrays lie on a GPU."""

import pytest
from device_arrays import Watched


@pytest.fixture(scope="module")
def shared():
    """One device for the tests of a file: kernels with user functions are compiled once."""
    return Watched()


@pytest.fixture
def device(shared):
    with shared.used():
        yield shared
