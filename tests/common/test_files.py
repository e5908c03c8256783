"""Files that appear whole or not at all, and locks: on plain disks, and on those that lack a call."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from miniclip.common.files import atomic_write, free_memory, locked, stand_in, swap_in, user_errors, write_text

LACKING = [errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP]  # answers of FUSE, old NFS and SMB


@pytest.fixture
def without(monkeypatch):
    """A call of the system that answers with an error from now on."""

    def install(module, name, number):
        def refuse(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(module, name, refuse)

    return install


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all


def test_a_file_appears_under_its_name_only_once_complete(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        assert len(list(path.parent.iterdir())) == 1  # the temporary one stands in the same folder
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_write(path) as file:
            file.write(b"new")
            file.flush()
            assert path.read_bytes() == b"old"
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_without_an_old_file_leaves_nothing(tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.write("text where bytes belong")
    assert list(tmp_path.iterdir()) == []


def test_text_is_written_as_utf8(tmp_path):
    write_text(tmp_path / "file.txt", "Löwe\n")
    assert (tmp_path / "file.txt").read_bytes() == b"L\xc3\xb6we\n"


def test_a_file_is_written_under_a_hidden_name_of_its_folder_that_no_other_writer_has(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    with atomic_write(path) as first, atomic_write(path) as second:
        names = {each.name for each in tmp_path.iterdir()} - {path.name}
        assert len(names) == 2  # though one process, which may have the id of another container's, writes both
        assert all(re.fullmatch(r"\.model\.safetensors\.\w{16}\.tmp", name) for name in names)
        assert path.read_bytes() == b"before"
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"  # whose writer ended last
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_the_disk_allows_can_be_written(tmp_path):
    path = tmp_path / ("x" * 255)
    write_text(path, "kept")
    assert path.read_text() == "kept"


@pytest.mark.parametrize("number", LACKING)
def test_a_disk_that_cannot_sync_is_written_to(tmp_path, without, number):
    without(os, "fsync", number)
    write_text(tmp_path / "new/file", "kept")
    assert (tmp_path / "new/file").read_text() == "kept"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/inside").write_text("new")
    swap_in(tmp_path / "folder", tmp_path / "new")
    assert (tmp_path / "new/inside").read_text() == "new"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_to_sync_is_an_error_and_keeps_what_was_there(tmp_path, without, number):
    path = tmp_path / "file"
    path.write_text("before")
    without(os, "fsync", number)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as failed:
        write_text(path, "after")
    assert failed.value.filename == (None if number == errno.EIO else str(path))  # which reading may fail by, too
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_stands_in_for_a_file_is_never_named_in_its_place(tmp_path):
    out = tmp_path / "out.pt"
    with pytest.raises(FileNotFoundError) as failed, stand_in(out, "busy") as temporary:
        (temporary / "weights").read_bytes()
    assert failed.value.filename == str(out)
    with pytest.raises(FileNotFoundError) as failed, stand_in(out, "busy"):  # a source's error is its own
        (tmp_path / "source").read_bytes()
    assert failed.value.filename == str(tmp_path / "source")
    with pytest.raises(OSError, match="No space left") as failed, stand_in(out, "busy"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert failed.value.filename == str(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as failed, stand_in(tmp_path / "file" / "out", "busy"):
        pass
    assert failed.value.filename == str(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match=r"^busy \(it holds "), stand_in(out, "busy"), stand_in(out, "busy"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_killed_processes_left_in_place_of_a_file_is_removed_by_the_next_and_nothing_else(tmp_path):
    out, killed = tmp_path / "out", tmp_path / f".out.{'0a' * 8}.tmp"
    others = [".out.notes.tmp", f".out.{'0a' * 8}.tmp.pt", f".out2.{'0a' * 8}.tmp", "out.tmp"]
    for name in (killed.name, *others):
        write_text(tmp_path / name / "model", "half")
    with stand_in(out, "busy"):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, ".out.lock"])
    write_text(killed / "model", "whole")  # killed between the two renames of a swap
    (tmp_path / ".out.old").mkdir()
    with stand_in(out, "busy"):
        assert (killed / "model").read_text() == "whole"


# ---------------------------------------------------------------------------------------------------------------------
# Locks


@pytest.mark.parametrize("number", [None, *LACKING])
def test_a_lock_keeps_others_out_until_it_is_released_even_where_the_disk_has_none(tmp_path, without, number):
    if number is not None:
        without(fcntl, "flock", number)
    path = tmp_path / "new" / ".lock"
    with (
        locked(path, "the folder is in use", patience_s=0),
        pytest.raises(ValueError, match=rf"^the folder is in use \(it holds {re.escape(str(path))}"),
        locked(path, "the folder is in use", patience_s=0),
    ):
        pass
    with locked(path, "it was released", patience_s=0):
        pass
    assert list(path.parent.iterdir()) == []


def test_a_lock_that_may_not_be_made_is_an_error(tmp_path, without):
    without(fcntl, "flock", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / ".lock", "busy", patience_s=0):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    hold = "import os, sys; from pathlib import Path; from miniclip.common.files import locked\n"
    hold += "with locked(Path(sys.argv[1]), 'busy'): os._exit(7)"
    path = tmp_path / ".lock"
    assert subprocess.run([sys.executable, "-c", hold, str(path)], check=False).returncode == 7
    with locked(path, "it is gone", patience_s=0):
        pass


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="it needs a folder in which nobody can write, root neither"
)
def test_where_nothing_can_be_written_the_error_names_what_was_asked_for_and_no_temporary_file():
    with pytest.raises(OSError, match=r"'/proc/report\.json'$"), atomic_write("/proc/report.json"):
        pass
    with pytest.raises(OSError, match=r"'/proc'$"), locked(Path("/proc/.out.lock"), "another process writes"):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Free memory


def system(root, available_kb=None, groups="", **files):
    """Linux' files on memory, by their paths below the control groups."""
    (root / "proc/self").mkdir(parents=True)
    if available_kb is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 9999 kB\nMemAvailable: {available_kb} kB\nHugePages_Free: 0\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


STAT = "anon 500\nfile 370\nshmem 70\ninactive_file 200\nactive_file 100\n"
STAT_1 = "active_file 7\ninactive_file 7\ntotal_active_file 100\ntotal_inactive_file 200\n"


@pytest.mark.parametrize(
    ("linux", "free"),
    [
        ({}, None),
        ({"available_kb": 3}, 3072),
        ({"available_kb": 3, "groups": "0::/a\n"}, 3072),  # of a container, where the group is not to be seen
        (
            # 2000 - 900 + 200 + 100; the group above leaves more
            {
                "available_kb": 3,
                "groups": "0::/user/a:b\n",
                "user/a:b/memory.max": "2000\n",
                "user/a:b/memory.current": "900\n",
                "user/a:b/memory.stat": STAT,
                "user/memory.max": "5000\n",
                "user/memory.current": "900\n",
                "memory.stat": STAT,
            },
            1400,
        ),
        (
            {
                "available_kb": 3,
                "groups": "0::/user/a\n",
                "user/a/memory.max": "max\n",
                "user/a/memory.current": "900\n",
                "user/memory.max": "1000\n",
                "user/memory.current": "1000\n",
            },
            0,
        ),
        ({"groups": "0::/\n", "memory.max": "1000\n", "memory.current": "400\n"}, 600),
        (
            {
                "available_kb": 3,
                "groups": "9:name=systemd:/\n4:cpu,memory:/docker/0a1b\n0::/\n",
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "950\n",
                "memory/memory.stat": STAT_1,
            },
            350,
        ),
        (
            {
                "available_kb": 3,
                "groups": "4:memory:/\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "950\n",
                "memory/memory.stat": STAT_1,
            },
            3072,
        ),
    ],
)
def test_free_memory_is_what_the_system_and_the_limits_of_a_container_leave(tmp_path, linux, free):
    assert free_memory(system(tmp_path, **linux)) == free


def test_free_memory_is_unknown_where_the_system_has_no_such_files(tmp_path):
    assert free_memory(tmp_path) is None


def test_an_error_that_quotes_megabytes_is_cut_to_what_a_terminal_bears(capsys):
    with pytest.raises(SystemExit, match="2"), user_errors():
        raise ValueError("there is no file " + "x" * 5_000_000)
    assert re.fullmatch(r"error: there is no file x{1000,70000}…\n\(.*\)\n", capsys.readouterr().err)
