"""Fixtures for folders whose tests train: a run's report.html takes longer to draw than a short run to train."""

from collections.abc import Iterator
from unittest import mock

import pytest

WRITES = "bitnet_train.commands.train.write_run_page"


@pytest.fixture(scope="module", autouse=True)
def no_pages() -> Iterator[None]:
    """Trainings write no report.html, unless a test asks for ``pages``."""
    with mock.patch(WRITES):
        yield


@pytest.fixture
def pages() -> Iterator[None]:
    """Trainings write their report.html."""
    from bitnet_train.reporting.run_page import write_run_page

    with mock.patch(WRITES, write_run_page):
        yield
