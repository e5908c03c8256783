"""What the page of troubleshooting quotes is what the code says, and what people ask has an answer there."""

import ast
import re
from functools import cache

import pytest
from shown import ROOT

from miniclip.commands import main as cli

PAGE = ROOT / "docs/troubleshooting.md"
MESSAGES = re.findall(r"^- (`.*?):(?= |\n)", PAGE.read_text().partition("\n## Messages\n")[2], re.MULTILINE | re.DOTALL)
OF_OTHERS = ("CUDA out of memory", "requires a different Python")


@cache
def templates() -> list[str]:
    """Every text in the code, with … for what is put in."""
    return [
        " ".join(text.split())
        for path in sorted((ROOT / "miniclip").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (text := _text(node))
    ]


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(each.value) if isinstance(each, ast.Constant) else "…" for each in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def quoted() -> list[str]:
    return [" ".join(text.split()) for entry in MESSAGES for text in re.findall(r"`([^`]+)`", entry)]


def test_every_message_that_the_page_quotes_is_one_of_the_codes():
    code = templates()
    assert len(quoted()) > 30
    for message in quoted():
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert message in OF_OTHERS or any(re.search(pattern, text) for text in code), message


def test_a_message_that_the_code_does_not_have_would_be_found():
    code = templates()
    assert not any(re.search(r"no pears found in .*: it holds .*", text) for text in code)


# What people asked most often of CLIP's implementations, and the heading that answers it.
QUESTIONS = {
    "it hangs and says nothing": "It stands still and says nothing",
    "what format must my data have": "Which columns must a table have?",
    "fine-tuning collapsed or forgot": "Fine-tuning made everything else worse",
    "the loss stays at chance": "The loss stays where it began",
    "NaN": "NaN",
    "the GPU is idle": "The GPU is idle",
    "is the gradient right": "Several GPUs: is the gradient right? Is the batch size per GPU?",
    "QuickGELU": "Scores are lower than published",
    "convert to Hugging Face": "It has to go to Hugging Face or open_clip",
    "load offline": "No network",
    "what is an epoch": "What is an epoch, and how many steps has it?",
    "small GPU, small batch": "Out of memory",
    "resume, keep the best": "It has to go on after a crash; which checkpoint is the best?",
    "not reproducible": "Two runs with the same seed differ",
    "evaluate my own images": "My own pictures as a test",
    "none of these": "The model is sure, and wrong",
    "77 tokens": "Captions are too long",
    "ONNX is wrong": "ONNX gives other numbers",
    "recipes for small data": "My data are few: which recipe?",
    "slow on a CPU": "It is slow on a CPU",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_asked_most_often_has_an_answer(question):
    _, found, answer = PAGE.read_text().partition(f"\n### {QUESTIONS[question]}\n")
    assert found
    assert len(answer.partition("\n#")[0].split()) > 15


def test_the_metrics_and_options_that_it_names_are_there():
    text, code = PAGE.read_text(), " ".join(templates())
    for metric in re.findall(r"`(?:train|val)/(\w+)`", text):
        assert metric in code, metric
    known = {option for verb in cli.VERBS if verb != "train" for option in options_of(verb)}
    known |= {"--ckpt_path", "--overwrite", "--name", "--shm-size", "--ipc", "--config"}
    for option in re.findall(r"(?<![\w-])(--[a-z][\w-]*)(?![\w.-])", text):
        assert option in known, option


def options_of(verb: str) -> set[str]:
    import importlib

    return set(importlib.import_module(f"miniclip.commands.{cli.VERBS[verb][0]}").parser()._option_string_actions)
