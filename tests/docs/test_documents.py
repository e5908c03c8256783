"""What the documents show is true, and their links lead somewhere; `test_commands.py` runs their commands."""

import re
import sys
from pathlib import Path

import pytest
import warm
from shown import PAGES

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", ["docs/architecture.md", "docs/speed.md", "docs/openai.md"])
def test_the_code_of_a_page_is_true(document, tmp_path):
    steps = blocks(document, "python")
    assert steps
    (tmp_path / "page.py").write_text("".join(steps))
    done = warm.run([sys.executable, tmp_path / "page.py"], cwd=ROOT)
    assert done.returncode == 0, done.stderr


def anchors(document: Path) -> set[str]:
    """The names by which a link reaches the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_file_and_heading_that_a_document_links_to_is_there():
    for document in PAGES:
        for target, _, heading in re.findall(r"\]\(([^)#:]*)(#([^)]+))?\)", document.read_text()):
            page = document.parent / target if target else document
            if target.removeprefix("../") in {f"reference/{name}.md" for name in ("api", "commands", "settings")}:
                continue  # made when the site is built
            assert page.exists(), f"{document.name} links to {target}"
            assert not heading or heading in anchors(page), f"{document.name} links to {target}#{heading}"


def test_every_address_of_another_site_is_well_formed():
    addresses = [(page.name, url) for page in PAGES for url in re.findall(r"\]\((\w+:[^)]*)\)", page.read_text())]
    assert len(addresses) > 30
    for page, url in addresses:
        assert re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[\w./~%=?&#:+@,-]*)?", url), f"{page}: {url}"


def test_the_readme_leads_to_every_page_of_a_job_and_to_the_sites_contents():
    pages = {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")}
    linked = set(re.findall(r"\]\((docs/[^)#]*)", (ROOT / "README.md").read_text()))
    of_the_site = ("index", "start", "exercises", "glossary", "bibliography", "coming_from", "troubleshooting", "log")
    assert pages - {f"docs/{name}.md" for name in of_the_site} <= linked


def test_lines_of_the_documents_are_at_most_120_wide_but_for_tables_and_pictures():
    for document in DOCUMENTS:
        for number, line in enumerate(document.read_text().splitlines(), start=1):
            assert len(line) <= 120 or line.startswith(("|", "![")), f"{document.name}, line {number}: {len(line)} wide"


def test_each_experiment_of_the_log_opens_with_its_question_and_answer():
    entries = re.split(r"^## ", (ROOT / "docs/log.md").read_text(), flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        title, _, first, *_ = entry.splitlines()
        assert re.match(r"\d{4}-\d\d-\d\d: ", title)
        assert re.match(r"\*[A-Z][^→]*\? → ", first), title
