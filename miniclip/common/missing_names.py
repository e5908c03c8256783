"""Errors of a name that a module lacks, for a module's `__getattr__`."""

from __future__ import annotations

import opcode
from types import FrameType


def missing_name(module: str, message: str, caller: FrameType) -> AttributeError | ImportError:
    """The error to raise, so that the message reaches the reader.

    `hasattr` and `getattr` need an AttributeError, and `from … import …` replaces one by a sentence of Python's own.

    Args:
        caller: the frame that asked: `sys._getframe(1)` in `__getattr__`.
    """
    is_import = caller.f_code.co_code[caller.f_lasti] == opcode.opmap["IMPORT_FROM"]
    return ImportError(message, name=module) if is_import else AttributeError(message)
