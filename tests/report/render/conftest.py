"""A browser for the tests of pages."""

from collections.abc import Iterator
from typing import Any

import pytest
from tools import start_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as tool:
        chromium = start_chromium(tool)
        yield chromium
        chromium.close()
