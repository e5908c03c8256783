"""A watch that reports when something takes too long, and where a thread is."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable


class Watch:
    """Calls `tell` when something takes longer than `silence_s`, and again each time the wait doubles.

    After a wait that was longer, the first call comes at twice the longest so far. A wait lasts from `begin` to `end`
    or the next `begin`; the watching thread lives within the `with`.

    Args:
        tell: called with the seconds so far, in a thread of its own.
    """

    def __init__(self, tell: Callable[[float], None], silence_s: float) -> None:
        self._tell, self._silence_s = tell, silence_s
        self._began: float | None = None
        self._longest = 0.0
        self._is_over = threading.Event()

    def begin(self) -> None:
        self.end()
        self._began = time.monotonic()

    def end(self) -> None:
        if self._began is not None:
            self._longest = max(self._longest, time.monotonic() - self._began)
        self._began = None

    def __enter__(self) -> Watch:
        threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()

    def _look(self) -> None:
        watched, told_at = None, 0.0
        while not self._is_over.wait(min(1.0, self._silence_s / 2)):
            if (began := self._began) is None:
                continue
            if began != watched:
                watched, told_at = began, max(self._silence_s, 2 * self._longest)
            if (seconds := time.monotonic() - began) >= told_at:
                self._tell(seconds)
                told_at = 2 * seconds


def where_is(thread: int, most: int = 24) -> str:
    """The `most` innermost calls of a thread, one a line; the last is the current one."""
    stack = traceback.extract_stack(sys._current_frames()[thread])[-most:]
    return "\n".join(f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in stack)
