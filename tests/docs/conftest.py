from pathlib import Path

import digits
import pytest

from miniclip.data.pack import pack
from miniclip.data.sources import read_pairs


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """What `make demo` makes, up to training, as runs/digits below a working directory."""
    folder = tmp_path_factory.mktemp("demo")
    digits.make(folder / "runs/digits/data")
    for part in ("train", "val"):
        source = folder / "runs/digits/data" / part
        pack(read_pairs(source), folder / "runs/digits/shards" / part, source=part)
    return folder
