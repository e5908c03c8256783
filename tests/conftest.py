"""What all tests run under, and the fixtures that several wings use. A wing's own are in its folder's conftest.py."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from browser import CHROMEDRIVER, CHROMIUM, Browser

# One thread a process: the tests run in two processes, and threads that wait for each other on a busy machine are slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the commands set it


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    """What a command called here has put out of the collector's reach comes back into it."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM or not CHROMEDRIVER:
        pytest.skip("no chromium with its driver on this machine")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
