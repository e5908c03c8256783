"""What all tests run under, and the fixtures that several wings use. A wing's own are in its folder's conftest.py."""

from __future__ import annotations

import compileall
import contextlib
import gc
import io
import os
import random
import signal
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from browser import CHROMEDRIVER, CHROMIUM, Browser

# One thread a process: the tests run in two processes, and threads that wait for each other on a busy machine are slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the commands set it
# Hundreds of processes are started, and each would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

SLOW_WINGS = ("docs", "training", "commands", "benchmarks", "inference")


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job ignores ctrl-c, and so would each process that a test starts to interrupt it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Some tests bound how large a file may grow, and Python would leave modules cut short that it compiles there.
    if hasattr(config, "workerinput"):
        import warm

        warm.start_fork_server()
    else:
        compileall.compile_dir(Path(__file__).parents[1] / "miniclip", quiet=1)


def spare_collector(freeze: Callable[[], None] = gc.freeze) -> None:
    """A process that has imported all that is tested holds over a million objects, which a collection goes through in
    the better part of a second, and Lightning asks for one at the end of each run: they are put out of its reach.
    """
    gc.collect()
    freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()  # nothing of what is imported goes away again
    try:
        return (yield)
    finally:
        spare_collector()
        gc.freeze = lambda: None  # commands that are called here would put a test's own garbage out of reach, too
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before `-m "not long"` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that start processes come first, or one would be left for one of two processes to end with. Of a test
    that is marked `sample(n)`, n cases stay: the first and the last, and others that its name draws, as one alone is.
    """
    items.sort(key=lambda item: item.path.parent.name not in SLOW_WINGS)
    matrices = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("long"):
            matrices[item.path, item.function.__name__].append(item)
    for (_, name), cases in matrices.items():
        (number,) = cases[0].get_closest_marker("sample").args
        ends = {cases[0], cases[-1]} if number > 1 else set()
        between = [case for case in cases if case not in ends]
        kept = ends | {*random.Random(name).sample(between, min(number - len(ends), len(between)))}
        for item in cases:
            if item not in kept:
                item.add_marker(pytest.mark.long)


@pytest.hookimpl(tryfirst=True)  # before fixtures of any scope are made
def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own does not hang on the tests before it: in some order of them, it would
    be weights that miss a bound.
    """
    import torch

    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def convolutions_in_float32() -> None:
    """Where there is a GPU, models of several libraries compute on it, and PyTorch rounds convolutions to TF32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True, scope="module")
def spared() -> Iterator[None]:
    """What a module has imported, too, is spared by the collections of those after it."""
    yield
    spare_collector()


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


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 without buckets, which the environment names."""
    from moto.server import ThreadedMotoServer

    from miniclip.common import storage

    with contextlib.redirect_stderr(io.StringIO()):
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "ENDPOINT_URL": address,
        "ACCESS_KEY_ID": "testing",
        "SECRET_ACCESS_KEY": "testing",
        "DEFAULT_REGION": "us-east-1",
        "REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    storage._filesystem_of.cache_clear()  # it reads the environment once
    yield address
    storage._filesystem_of.cache_clear()
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).close()
    server.stop()
