"""Fixtures shared by the tests that use the bundled model."""

from __future__ import annotations

import pytest

from sjd2_engine import Engine


@pytest.fixture(scope="session")
def base() -> Engine:
    return Engine.from_pretrained("scenes", device="cpu")


@pytest.fixture(scope="session")
def tuned() -> Engine:
    return Engine.from_pretrained("scenes-sjd2", device="cpu")
