"""The examples in the book's docstrings run as they stand."""

import doctest
import importlib

import pytest

WITH_EXAMPLES = ["loss"]


@pytest.mark.parametrize("chapter", WITH_EXAMPLES)
def test_the_examples_of_a_chapter_are_right(chapter):
    module = importlib.import_module(f"miniclip.{chapter}")
    tried = doctest.testmod(module, raise_on_error=True)
    assert tried.attempted > 5
    assert tried.failed == 0
