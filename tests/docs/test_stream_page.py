"""The code of docs/stream.md, run in a folder with what it reads."""

import re
from pathlib import Path

from helpers import pack_folder, write_pairs

PAGE = Path(__file__).parents[2] / "docs/stream.md"


def test_the_pipeline_of_the_page_gives_pictures_and_texts(tmp_path, monkeypatch):
    pack_folder(write_pairs(tmp_path / "src", 8), tmp_path / "runs/digits/shards/train")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert sorted(text.strip() for _, text in names["pipeline"]) == [f"picture {n}, caption 0" for n in range(8)]
