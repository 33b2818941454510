"""The packaged demo under the names that tests of nodes use."""

import pytest


@pytest.fixture
def base(demo_model):
    return demo_model


@pytest.fixture
def model(demo_model):
    return demo_model


@pytest.fixture
def weights(demo_weights):
    return demo_weights
