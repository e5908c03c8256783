"""What a process has that is forked from a server of the tests (warm.py): the imports, and the tokenizer's tables."""

from contextlib import suppress

import matplotlib.pyplot  # noqa: F401
import torchvision  # noqa: F401

import miniclip.commands.train  # noqa: F401
from miniclip import tokenizer

with suppress(ImportError):
    import s3fs  # noqa: F401  # which Lightning looks for

tokenizer.tokenize(["a word"])
