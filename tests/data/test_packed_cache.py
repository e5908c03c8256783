"""Sources that are packed into the cache: what was not used for longest leaves it, and nothing that is used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import trainer_at, write_pairs

from miniclip.common import cache as cache_module
from miniclip.data.module import PairDataModule
from miniclip.data.open_pairs import pack_into_cache
from miniclip.data.shards import Shards

ROOT = Path(__file__).parents[2]
OLD = 1_000_000_000


@pytest.fixture(autouse=True)
def packed(tmp_path, monkeypatch):
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module, "_used", {})
    return tmp_path / "cache" / "packed"


def source(tmp_path, name, count=4):
    return str(write_pairs(tmp_path / name, count))


def in_another_process(where):
    """Packs a source, prints a line, and waits for its standard input to end."""
    code = (
        "import sys; from miniclip.data.open_pairs import pack_into_cache; "
        f"print('at', pack_into_cache({where!r}), flush=True); sys.stdin.read()"
    )
    path = os.pathsep.join([str(ROOT), *sys.path])
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    line = next(line for line in process.stdout if line.startswith("at "))
    return process, Path(line[3:].strip())


def packed_by_another(where, age=0):
    """A packed source that nobody uses any more, as after the end of the process that packed it."""
    out = Path(pack_into_cache(where))
    cache_module._used.pop(out).close()
    os.utime(out, (OLD + age, OLD + age))
    return out


def names(packed):
    return sorted(path.name.rpartition("-")[0] for path in packed.iterdir() if path.is_dir())


def test_a_caption_that_was_edited_and_has_its_size_and_time_back_is_packed_anew(tmp_path):
    where = source(tmp_path, "one", 2)
    first = pack_into_cache(where)
    text = Path(where, "0000.txt")
    facts = text.stat()
    text.write_text(text.read_text()[::-1])
    os.utime(text, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert text.stat().st_size == facts.st_size
    assert first != pack_into_cache(where) == pack_into_cache(where)


def test_what_was_not_used_for_longest_leaves_first_and_is_named(tmp_path, packed, capsys):
    first, second = (packed_by_another(source(tmp_path, name), age) for age, name in enumerate(("b", "a")))
    size = sum(file.stat().st_size for file in second.iterdir())
    out = pack_into_cache(source(tmp_path, "new"), limit_bytes=2 * size + size // 2)
    assert names(packed) == ["a", "new"]
    assert f"Removed {first}, not used since 2001-09-09" in capsys.readouterr().out
    assert len(Shards(out)) == 4
    os.utime(second, (OLD, OLD))
    assert pack_into_cache(str(tmp_path / "a")) == str(second)
    assert second.stat().st_mtime > OLD, "use counts"


def test_what_another_process_uses_stays_until_that_has_ended_even_by_a_kill(tmp_path, packed):
    process, used = in_another_process(source(tmp_path, "used"))
    os.utime(used, (OLD, OLD))
    pack_into_cache(source(tmp_path, "new"), limit_bytes=1)
    assert names(packed) == ["new", "used"]
    assert len(Shards(used)) == 4
    process.send_signal(signal.SIGKILL)
    process.wait()
    pack_into_cache(str(tmp_path / "new"), limit_bytes=1)
    assert names(packed) == ["new"], "one's own stays, however large"
    assert len([path for path in packed.iterdir() if path.name.endswith(".used")]) == 1


def test_half_of_a_deleted_source_is_never_taken_for_the_whole(tmp_path, packed, monkeypatch):
    first = packed_by_another(source(tmp_path, "first"))
    removals = []

    def remove_half(path):
        removals.append(path)
        if path.is_dir():
            (path / "00000.tar").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "remove", remove_half)
        with pytest.raises(KeyboardInterrupt):
            pack_into_cache(source(tmp_path, "new"), limit_bytes=1)
    assert removals
    assert not first.exists()
    again = pack_into_cache(str(tmp_path / "first"), limit_bytes=1)
    assert len(Shards(again)) == 4
    assert all(record.image for record in Shards(again))
    assert not [*packed.glob(".*.old")]


def test_a_packing_that_was_given_up_leaves_and_what_is_not_ours_stays(tmp_path, packed):
    given_up = packed / f"old-{'0' * 16}.partial"
    for folder in (given_up, packed / "mine", packed / "mine-0123"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 1000)
        os.utime(folder, (OLD, OLD))
    pack_into_cache(source(tmp_path, "new"), limit_bytes=1)
    assert not given_up.exists()
    assert {"mine", "mine-0123"} <= {path.name for path in packed.iterdir()}


def test_the_bound_is_that_of_the_run(tmp_path, packed):
    packed_by_another(source(tmp_path, "old"))
    module = PairDataModule(source(tmp_path, "new"), batch_size=2, num_workers=0, cache_gb=1e-6)
    module.trainer = trainer_at(0)
    module.prepare_data()
    module.setup("fit")
    assert names(packed) == ["new"]
    assert len(module.train_shards) == 4
