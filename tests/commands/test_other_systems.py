"""Systems that lack what Linux has: the commands run in an interpreter without it, whose workers are spawned."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_clip, write_pairs, write_picture
from runs import TINY

import miniclip

# Python runs a module of this name when it starts, in workers as well. Folders can't be opened, as on Windows.
SITE = """
import os, signal, sys

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("pread", "setpgid", "killpg", "sysconf", "getuid", "geteuid", "sched_getaffinity"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "sigtimedwait", "pthread_sigmask"):
    delattr(signal, name)

def open_no_folder(path, *arguments, open=os.open, **options):
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open(path, *arguments, **options)

os.open = open_no_folder
"""
PROGRAM = """
import importlib, multiprocessing, sys

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    import miniclip
    from miniclip.commands.main import VERBS, main

    for file, _ in VERBS.values():
        importlib.import_module(f"miniclip.commands.{file}")
    print("parameters:", sum(each.numel() for each in miniclip.load("model")[0].parameters()))
    main(["shards", "pairs", "shards", "--workers", "1"])
    main(["eval", "--model", "model", "--data", "classes", "--out", "report", "--workers", "0"])
    main(["train", "fit", *sys.argv[1:]])
"""


@pytest.mark.long
def test_every_verb_imports_and_the_main_ones_run_without_fcntl_resource_pread_and_folders_that_open(tmp_path):
    model = tiny_clip()
    miniclip.save(model, tmp_path / "model")
    write_pairs(tmp_path / "pairs", 12)
    for name in ("cat", "dog"):
        write_picture(tmp_path / "classes" / name / "one.png", seed=len(name))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    (tmp_path / "program.py").write_text(PROGRAM)
    root = str(Path(miniclip.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "program.py", *TINY, "--data.train=shards", "--data.batch_size=4", "--trainer.max_steps=2",
         "--trainer.default_root_dir=run"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), root, *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"parameters: {sum(each.numel() for each in model.parameters())}\n" in done.stdout
    assert "shards: 12 pairs in 1 shard," in done.stdout
    assert (tmp_path / "report/report.html").is_file()
    miniclip.load(tmp_path / "run/best")
    assert not list(tmp_path.rglob("*.lock"))


def test_an_interpreter_of_that_kind_lacks_what_it_should(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    script = "import os, tempfile\ntry: import fcntl\nexcept ImportError: os.open(tempfile.gettempdir(), os.O_RDONLY)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert "PermissionError" in done.stderr
