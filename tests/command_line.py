"""Commands run as people run them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import warm

from miniclip.commands import main as cli


def run(
    *command: str, code: int = 0, cwd: Path | None = None, is_warm: bool = False
) -> subprocess.CompletedProcess[str]:
    """is_warm: by `warm.run`, where it does not matter when a process imports what."""
    if is_warm:
        done = warm.run([*command], cwd=cwd)
    else:
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def fails(capsys, args: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 2
    return capsys.readouterr().err
