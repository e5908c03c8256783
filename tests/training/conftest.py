"""Fixtures of this wing."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import COLOURS

from miniclip.data.pack import pack
from miniclip.data.sample_files import Packing
from miniclip.data.sources import read_pairs


@pytest.fixture(autouse=True, scope="module")
def charts(request) -> Iterator[None]:
    """Runs that a test makes in its own process have charts on their page only where tests look at them: they take a
    quarter of a small run.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_progress.py":
            patch.setattr("miniclip.reports.run_page._plot", lambda *_: "")
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Plain pictures of four colours with captions: shards/train (40 pairs), shards/val (16), labels in val.csv."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    rows = [("filepath", "label")]
    for part, each in (("train", 10), ("val", 4)):
        (folder / part).mkdir()
        for colour, rgb in COLOURS.items():
            for number in range(each):
                pixels = np.array(rgb) + random.normal(0, 12, size=(20, 20, 3))
                name = f"{colour}{number}"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / part / f"{name}.png")
                words = ["a {} square", "something {}"] if number % 2 else ["a picture of {}", "{} paint"]
                (folder / part / f"{name}.txt").write_text("\n".join(word.format(colour) for word in words))
                if part == "val":
                    rows.append((f"val/{name}.png", colour))
        pack(read_pairs(folder / part), folder / "shards" / part, source=part, packing=Packing(samples_per_shard=15))
    with open(folder / "val.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder
