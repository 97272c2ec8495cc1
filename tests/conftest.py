"""Fixtures shared by the tests that use the bundled model."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from sjd2_engine import Engine
from sjd2_kernels import backend, build


def pytest_configure() -> None:
    """Build the C core where a compiler is found and the library is not of these sources, so that it is tested."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A shell that starts something in the background lets it, and all that it starts, ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if build.why_unusable() is not None and build.find_compiler() is not None:
        build.build()


@pytest.fixture(params=["c", "reference"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test on the C core and on the reference."""
    if request.param == "c" and (reason := build.why_unusable()):
        pytest.skip(reason)
    with backend(request.param):
        yield


@pytest.fixture
def on_reference() -> Iterator[None]:
    """Run the test on the reference, for tests that break it on purpose."""
    with backend("reference"):
        yield


@pytest.fixture(scope="session")
def base() -> Engine:
    return Engine.from_pretrained("scenes", device="cpu")


@pytest.fixture(scope="session")
def tuned() -> Engine:
    return Engine.from_pretrained("scenes-sjd2", device="cpu")
