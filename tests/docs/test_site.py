"""The site cannot drift from the code: its cells run, its reference is made from it, and every page can be reached."""

import os
import re
import sys
from pathlib import Path

import pytest
import warm

import miniclip
from miniclip.commands.main import VERBS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(page for page in [*DOCS.glob("*.md"), *DOCS.glob("learn/*.md")] if "{code-cell}" in page.read_text())
sys.path.insert(0, str(DOCS))

import reference_pages  # noqa: E402

# Runs pages in one process, each with names of its own, and prints what their shape comments get wrong.
RUN = """
import os, sys
from pathlib import Path
import matplotlib
from shape_comments import cells, judge, recording
matplotlib.use("Agg")
pages = [cells(Path(page), are_built=True) for page in sys.argv[1:]]
comments, reached = {comment for page in pages for comment in page.comments()}, set()
for page in pages:
    os.chdir(Path(page.path).parent)
    with recording([page]) as calls:
        exec(compile(page.text, page.path, "exec"), {})
    found, wrong = judge(calls.values(), {})
    reached |= found
    if wrong:
        raise SystemExit("\\n".join(wrong))
print("shape comments:", len(reached), "of", len(comments))
"""


WHY = DOCS / "why.md"  # trains for half a minute


@pytest.mark.parametrize(
    ("pages", "least"),
    [([page for page in NOTEBOOKS if page != WHY], 4), pytest.param([WHY], 0, marks=pytest.mark.long)],
    ids=["learn", "why"],
)
def test_every_cell_of_the_pages_runs_and_the_shapes_in_its_comments_are_true(pages, least):
    """The pages' asserts compare with the long way."""
    path = os.pathsep.join(each for each in sys.path if each)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", RUN, *map(str, pages)]
    done = warm.run(command, env=environment)
    assert done.returncode == 0, done.stderr
    ((reached, there),) = re.findall(r"^shape comments: (\d+) of (\d+)$", done.stdout, re.MULTILINE)
    assert int(reached) == int(there) >= least
    assert WHY in pages or "gathered with gradient: off by 0%" in done.stdout
    assert len(NOTEBOOKS) == 11


def toctrees(page: Path) -> list[Path]:
    entries = re.findall(r"```{toctree}\n(.*?)```", page.read_text(), re.DOTALL)
    names = [line for entry in entries for line in entry.splitlines() if line and not line.startswith(":")]
    pages = [page.parent / f"{name}.md" for name in names]
    return [each for name in pages if name.is_file() for each in [name, *toctrees(name)]]


def test_no_page_takes_the_name_of_one_that_the_builder_writes():
    """Sphinx writes search.html over a page of that name, without a word."""
    assert not {"search", "genindex", "modindex", "py-modindex"} & {page.stem for page in DOCS.glob("*.md")}


def test_every_page_is_in_the_sites_contents_once():
    made = {"_build", "jupyter_execute", "reference"}
    pages = {page for page in DOCS.rglob("*.md") if not made & set(page.parts)}
    contents = [page for page in toctrees(DOCS / "index.md") if not made & set(page.parts)]
    assert sorted(contents) == sorted(pages - {DOCS / "index.md"})


def test_files_that_pages_include_and_offer_are_there():
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        included = re.findall(r"^```{literalinclude} (\S+)\n:pyobject: (\S+)", text, re.MULTILINE)
        for target, name in included:
            source = (page.parent / target).read_text()
            assert re.search(rf"^\s*(class|def) {name.split('.')[-1]}\b", source, re.MULTILINE), f"{page.name}: {name}"
        for target in re.findall(r"{download}`[^<]*<([^>]*)>`", text):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_the_reference_has_every_public_name_verb_and_key():
    api, commands, settings = reference_pages.api(), reference_pages.commands(), reference_pages.settings()
    for name in set(miniclip._HOME) - {"__version__"}:
        assert f":: {name}\n" in api
    for verb in VERBS:
        assert f"## miniclip {verb}\n" in commands
    meanings = dict(re.findall(r"^`([\w.]+)`\n: (`.*`, default .*)$", settings, re.MULTILINE))
    keys = {"name", "model.optimizer.lr", "model.clip.vision.width", "data.batch_size", "data.captions.order"}
    assert keys <= meanings.keys()
    assert all(re.search(r"\. .{4,}", meaning) for meaning in meanings.values())
    assert settings.count("\n: ") == len(meanings)


@pytest.mark.long
def test_the_site_is_built_without_a_warning_and_asks_no_other_host(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]* src=\"([^\"]*)\"|<link[^>]* href=\"([^\"]*)\"", page.read_text()
        )
        assert not [each for pair in loaded for each in pair if each.startswith(("http:", "https:", "//"))], page.name


@pytest.mark.long
def test_every_link_of_the_site_leads_to_a_page_and_a_place_in_it(site):
    text = {page: page.read_text() for page in site.rglob("*.html")}
    places = {page: set(re.findall(r' id="([^"]+)"', content)) for page, content in text.items()}
    count = 0
    for page, content in text.items():
        for target, _, place in re.findall(r'<a [^>]*href="([^"#:]*)(#([^"]*))?"', content):
            to = (page.parent / target).resolve() if target else page
            assert to.exists(), f"{page.relative_to(site)}: {target}"
            known = places.get(to)
            assert not place or known is None or place in known, f"{page.relative_to(site)}: {target}#{place}"
            count += 1
    assert count > 2000
