"""One run in a folder at a time."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..common.files import locked, write_text

_HOLDER = "running.json"  # in the run's folder, while a run holds it: process, host, start
_ORPHANS_S = 20.0  # the data workers of a process that was killed end within this time, and hold its lock until then


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keeps every other run out of a run's folder.

    Raises:
        ValueError: another run holds it; names its process, host and start.
    """
    holder = run / _HOLDER
    before = _describe(holder)
    busy = (
        f"{run} is in use by another run{f', {before}' if before else ''}; wait for it, or name another folder by "
        "--name. If that run is gone, delete the lock"
    )
    is_new = not run.exists()
    try:
        with locked(run / ".lock", busy, patience_s=0.0 if _may_be_alive(holder) else _ORPHANS_S):
            if before:
                print(f"{run}: an earlier run, {before}, was cut off; this run takes the folder over.", flush=True)
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            facts = {"process": os.getpid(), "host": socket.gethostname(), "start": now}
            write_text(holder, json.dumps(facts) + "\n")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                run.rmdir()


def _read(holder: Path) -> dict[str, object]:
    try:
        return dict(json.loads(holder.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _describe(holder: Path) -> str:
    facts = _read(holder)
    return f"process {facts.get('process')} on {facts.get('host')}, started {facts.get('start')}" if facts else ""


def _may_be_alive(holder: Path) -> bool:
    facts = _read(holder)
    process = facts.get("process")
    if facts.get("host") != socket.gethostname() or not isinstance(process, int):
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True
