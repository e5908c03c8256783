"""The notebooks run from the first cell to the last as they are, and are kept as source alone."""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from foreign_models import openclip_model, write_archive
from nbclient import NotebookClient

from miniclip.config import CLIPConfig, TextConfig, VisionConfig

FOLDER = Path(__file__).parents[2] / "docs/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(autouse=True)
def scratch(monkeypatch):
    """What notebooks write and their commands keep goes with the test; sockets below it want a short path."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        yield


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def printed(name: str, folder: Path) -> str:
    """What the cells of a notebook print, run one after another in a folder; a cell that fails raises."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=800, startup_timeout=600, resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_clip_from_nothing_learns_and_equals_the_package(tmp_path):
    out = printed("from_nothing", tmp_path)
    digit, ink, both = (float(share) for share in re.findall(r"([\d.]+)% of \d+ pictures right", out))
    assert digit > 70  # chance is 10
    assert ink > 90  # chance is 12.5
    assert both > 50  # chance is 1.25
    assert re.search(r"gradients of \d+ parameters: off by \de-1[3-9]", out)


def test_clip_from_nothing_has_at_most_100_lines_of_clip():
    source = [
        cell.source for cell in cells(FOLDER / "from_nothing.ipynb", "code") if "clip" in cell.metadata.get("tags", [])
    ]
    assert len(source) == 6
    assert sum(bool(line.strip()) for text in source for line in text.splitlines()) <= 100


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_folder_of_pairs_becomes_a_model_that_searches_and_is_exported(tmp_path):
    out = printed("your_own_pairs", tmp_path)
    for reason in ("leak", "copy", "blank", "junk-caption"):  # each is planted once
        assert re.search(rf"{reason} +│ 1 ", out), reason
    assert float(re.search(r"captions' \(1\) │ +\d+ │ +20 │ +([\d.]+)", out)[1]) > 60  # chance is 5
    assert "shapes-onnx: onnx, float32" in out
    assert not [*tmp_path.iterdir()]


@pytest.mark.long
def test_the_cells_for_openais_weights_run_on_random_ones_of_their_format(tmp_path, monkeypatch):
    vision = VisionConfig(image_size=224, patch_size=32, width=128, layers=2)
    config = CLIPConfig(64, "quick_gelu", vision, TextConfig(width=128, layers=2))
    archive = write_archive(openclip_model(config), config, tmp_path / "ViT-B-32.pt")
    monkeypatch.setenv("MINICLIP_MODEL", str(archive))
    out = printed("openai_weights", tmp_path)
    for photo in ("china.jpg", "flower.jpg", "grace_hopper.jpg"):
        assert len(re.findall(photo, out)) == 3, photo  # its classes, its place in the search, the command's row


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_source_in_short_lines(path):
    for cell in cells(path, "code"):
        assert cell.outputs == []
        assert cell.execution_count is None
    for cell in nbformat.read(path, as_version=4).cells:
        assert all(len(line) <= 120 for line in cell.source.splitlines())


def test_the_links_of_the_notebooks_lead_somewhere():
    for path in NOTEBOOKS:
        for cell in cells(path, "markdown"):
            for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", cell.source):
                made = target.startswith("../reference/")  # when the site is built
                assert made or (FOLDER / target).is_file(), f"{path.name} links to {target}"
