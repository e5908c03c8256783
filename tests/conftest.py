import gc
import os
from collections.abc import Iterator

import pytest

# One thread a process: the tests run in two processes, and threads that wait for each other on a busy machine are slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    """What a command called here has put out of the collector's reach comes back into it."""
    yield
    gc.unfreeze()
