import os
import subprocess
import sys
from pathlib import Path

import digits
import pytest

from miniclip.common.files import locked
from miniclip.data.pack import pack
from miniclip.data.sources import read_pairs


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """What `make demo` makes, up to training, as runs/digits below a working directory: once for all workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "demo"
    made = folder / "made"
    with locked(folder / "lock", "the demo's data are being made"):
        if not made.exists():
            digits.make(folder / "runs/digits/data")
            for part in ("train", "val"):
                source = folder / "runs/digits/data" / part
                pack(read_pairs(source), folder / "runs/digits/shards" / part, source=part)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """All of the site, built as by `make docs`: half a minute."""
    out = tmp_path_factory.mktemp("site")
    docs = Path(__file__).parents[2] / "docs"
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", str(docs), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out
