"""What the documents show is true: their commands and code run, their links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def shell(folder, tmp_path_factory):
    """Runs a command where `make demo` was, with a model of two steps, and where a reader has pictures of his own."""
    work = tmp_path_factory.mktemp("documents") / "work"
    shutil.copytree(folder, work)
    for name in ("configs", "train.py", "eval_zeroshot.py"):
        (work / name).symlink_to(ROOT / name)
    source = work / "runs/digits/data"
    shutil.copytree(source / "val", work / "my_pairs")
    for digit in ("three", "seven"):
        (work / "my_photos" / digit).mkdir(parents=True)
        for path in sorted((source / "test").glob(f"*_{digit}_*.png"))[:3]:
            shutil.copy(path, work / "my_photos" / digit)
    shutil.copy(path, work / "picture.png")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(command: str) -> Path:
        program, *words = shlex.split(command)
        scripts = {"python": [], "miniclip": [str(Path(sys.executable).with_name("miniclip"))]}
        if program in scripts and not set("|<>&;*$") & set(command):  # what a shell would start, sooner
            done = warm.run([sys.executable, *scripts[program], *words], cwd=work, env=environment)
        else:
            done = subprocess.run(
                command, shell=True, cwd=work, env=environment, capture_output=True, text=True, check=False
            )
        assert done.returncode == 0, command + done.stdout + done.stderr
        return work

    run("python train.py fit --config configs/digits.yaml --trainer.max_steps 2 --trainer.val_check_interval 2")
    return run


def commands_of(document: str) -> list[str]:
    lines = [line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0] for line in lines if line]


SEARCHING = ("miniclip classify", "miniclip index", "miniclip search")


def test_every_command_of_the_readme_runs(shell):
    ran = 0
    for command in commands_of("README.md"):
        # The environment that runs these tests is what the first two make.
        if not command.startswith(("make ", "pip install", *SEARCHING)):
            work = shell(command + (" --trainer.max_steps 2 --data.batch_size 16" if " fit " in command else ""))
            ran += 1
    assert ran == 7
    assert (work / "runs/photos/report.html").is_file()
    assert (work / "runs/mine/best/config.json").is_file()


def test_the_first_ten_minutes_of_the_readme_run(shell):
    commands = [command for command in commands_of("README.md") if command.startswith(SEARCHING)]
    assert len(commands) == 4
    for command in commands:
        work = shell(command)
    assert len([*(work / "runs/sorted").rglob("*.png")]) == 926
    assert (work / "runs/sevens.html").is_file()


@pytest.mark.parametrize("document", ["README.md", "docs/python.md"])
def test_the_code_of_a_page_runs_with_the_demos_model(document, shell, tmp_path):
    (tmp_path / "example.py").write_text("".join(blocks(document, "python")))
    shell(f"python {tmp_path}/example.py")


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
    for document in DOCUMENTS:
        for target, _, heading in re.findall(r"\]\(([^)#:]*)(#([^)]+))?\)", document.read_text()):
            page = document.parent / target if target else document
            if target in {"reference/api.md", "reference/commands.md", "reference/settings.md"}:
                continue  # made when the site is built
            assert page.exists(), f"{document.name} links to {target}"
            assert not heading or heading in anchors(page), f"{document.name} links to {target}#{heading}"


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
