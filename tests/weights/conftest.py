"""Fixtures of the weights' tests."""

import pytest
from conversions import archive


@pytest.fixture
def source(tmp_path):
    return archive(tmp_path)
