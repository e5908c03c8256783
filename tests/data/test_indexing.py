"""Tars of others get an index in parts, and from their headers alone. Oracle: one call that reads every byte."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import warm
from helpers import everything_below
from servers import Server
from webdataset import TarWriter

from miniclip.commands import main as cli
from miniclip.common import storage
from miniclip.common.cache import Cache
from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.indexing.one_tar import index_tar
from miniclip.data.shards import Shards

PICTURE_BYTES = 60_000
NUM_TARS, PER_TAR = 5, 4


@pytest.fixture(scope="module")
def laion(tmp_path_factory) -> Path:
    """Tars as img2dataset writes them, of pictures that are large beside their headers."""
    return write_tars(tmp_path_factory.mktemp("tars") / "laion")


def write_tars(folder: Path, num_tars: int = NUM_TARS, picture_bytes: int = PICTURE_BYTES) -> Path:
    folder.mkdir()
    chance = random.Random(0)
    for number in range(num_tars):
        with TarWriter(str(folder / f"{number:05d}.tar"), encoder=False) as writer:
            for key in range(number * PER_TAR, (number + 1) * PER_TAR):
                facts = {"url": f"https://example.org/{key}", "caption": f"Satz {key}", "width": 256, "height": 256}
                members = {"jpg": chance.randbytes(picture_bytes), "txt": f"Satz {key}".encode()}
                writer.write({"__key__": f"{key:09d}", **members, "json": json.dumps(facts).encode()})
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def served(laion):
    with Server({f"/{path.name}": path.read_bytes() for path in laion.glob("*.tar")}) as server:
        yield server


def pattern(server: Server, last: int = NUM_TARS - 1) -> str:
    return f"{server.url}/{{00000..{last:05d}}}.tar"


def everything_read(shards: Shards) -> list[object]:
    return [(shards[n], shards.info(n), shards.name(n).rpartition("/")[2]) for n in range(len(shards))]


def index_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "index.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# By headers


def test_the_first_tars_are_indexed_without_their_pictures_and_read_as_with_a_whole_index(
    laion, served, tmp_path, capsys
):
    cli.main(["shards", pattern(served), str(tmp_path / "head"), "--index-only", "--head", "2"])
    said = capsys.readouterr().out
    assert "8 samples in 2 shards, 0.5 MB" in said
    assert "the pictures of 2 shards have no checksums" in said
    assert "The same command without --head adds the other 3 tars" in said
    asked = {path for path, _ in served.gets}
    assert asked == {"/00000.tar", "/00001.tar"}
    assert all(wanted for _, wanted in served.gets)
    bounds = [wanted.removeprefix("bytes=").split("-") for _, wanted in served.gets]
    read = sum(int(end) - int(start) + 1 for start, end in bounds)
    total = sum((laion / name.lstrip("/")).stat().st_size for name in asked)
    assert read < 0.15 * total
    assert f"{read / 1e6:.2f} MB were read in {len(served.gets)} requests" in said
    assert not list((tmp_path / "cache").rglob("*.cached"))
    whole = tmp_path / "whole"
    index_shards(str(laion / "{00000..00001}.tar"), whole)
    assert everything_read(Shards(tmp_path / "head")) == everything_read(Shards(whole))


def test_an_index_by_headers_says_that_it_has_no_checksums_of_tars_and_pictures(laion, served, tmp_path):
    index_shards(pattern(served), tmp_path / "head", head=1)
    index_shards(str(laion / "00000.tar"), tmp_path / "whole")
    (entry,), (whole,) = index_of(tmp_path / "head")["shards"], index_of(tmp_path / "whole")["shards"]
    assert (entry["sha256"], entry["bytes"], entry["samples"]) == (None, whole["bytes"], whole["samples"])
    with np.load(tmp_path / "head" / entry["offsets"]) as found, np.load(tmp_path / "whole" / "00000.npz") as expected:
        assert set(expected) - set(found) == {"image_crc32"}
        assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert Shards(tmp_path / "head").checksums is None


def test_more_tars_come_in_and_the_whole_index_is_at_last_that_of_one_call(laion, served, tmp_path):
    out = tmp_path / "index"
    index_shards(pattern(served), out, head=1)
    begun = Shards(out)
    requests = len(served.gets)
    assert index_shards(pattern(served), out, head=3).shards == 3
    assert not [path for path, _ in served.gets[requests:] if path == "/00000.tar"]
    assert [record.key for record in Shards(out)] == [f"{key:09d}" for key in range(3 * PER_TAR)]
    assert index_shards(pattern(served), out).shards == NUM_TARS
    index_shards(pattern(served), tmp_path / "one")
    found, expected = everything_below(out), everything_below(tmp_path / "one")
    assert {name: data for name, data in found.items() if not name.endswith(".headers.npz")} == expected
    assert len(everything_read(begun)) == PER_TAR  # a run that began with the first index goes on with it


def test_a_server_without_ranges_sends_whole_tars_and_the_index_has_all_checksums(laion, tmp_path, capsys):
    with Server({f"/{path.name}": path.read_bytes() for path in laion.glob("*.tar")}, has_range=False) as server:
        cli.main(["shards", pattern(server), str(tmp_path / "head"), "--index-only", "--head", "2"])
        assert "no checksums" not in capsys.readouterr().out
        assert Shards(tmp_path / "head").checksums is not None
        gets = len(server.gets)
        assert everything_read(Shards(tmp_path / "head"))
        assert len(server.gets) == gets  # they are in the cache


def test_where_pictures_are_small_the_tar_is_fetched_as_a_whole(tmp_path):
    folder = write_tars(tmp_path / "small", num_tars=1, picture_bytes=900)
    content = (folder / "00000.tar").read_bytes()
    with TarWriter(str(folder / "00000.tar"), encoder=False) as writer:
        for key in range(200):
            writer.write({"__key__": f"{key:09d}", "jpg": b"\xff" * 900, "txt": b"words"})
    content = (folder / "00000.tar").read_bytes()
    with Server({"/00000.tar": content}) as server:
        done = index_shards(f"{server.url}/00000.tar", tmp_path / "head", head=1)
    assert (done.kept, done.unverified) == (200, 0)
    assert done.bytes_read < 2 * len(content)
    assert done.num_requests < 20


def test_an_interruption_waits_for_a_request_and_not_for_a_tar(laion, tmp_path):
    is_over = threading.Event()
    files = {"/00000.tar": (laion / "00000.tar").read_bytes()}
    with Server(files, before=lambda path, start: is_over.set()) as server:
        with pytest.raises(InterruptedError):
            index_tar(f"{server.url}/00000.tar", tmp_path / "a.npz", Cache(), by_headers=True, is_over=is_over)
        assert len(server.gets) == 1
    assert not (tmp_path / "a.npz").exists()


def test_a_tar_that_is_cut_short_is_named_without_reading_its_pictures(laion, tmp_path, capsys):
    files = {f"/{path.name}": path.read_bytes() for path in laion.glob("*.tar")}
    files["/00001.tar"] = files["/00001.tar"][:100_000]
    with Server(files) as server:
        cli.main(["shards", pattern(server), str(tmp_path / "head"), "--index-only", "--head", "3"])
    said = capsys.readouterr()
    assert "8 samples in 2 shards" in said.out
    assert "1 of 3 tars is damaged" in said.err
    assert "/00001.tar is cut short" in said.err


def test_a_picture_that_lies_elsewhere_than_the_headers_said_is_an_error_still(laion, tmp_path):
    files = {f"/{path.name}": path.read_bytes() for path in laion.glob("*.tar")}
    with Server(files) as server:
        index_shards(pattern(server), tmp_path / "head", head=1)
        files["/00000.tar"] = files["/00000.tar"][512:] + b"\0" * 512
        with pytest.raises(ValueError, match=r"another file than when it was indexed"):
            Shards(tmp_path / "head")[0]


@pytest.mark.long
def test_s3_is_read_by_ranges_too(laion, tmp_path, s3):
    filesystem = storage.filesystem("s3://pictures")
    filesystem.mkdir("pictures")
    for path in laion.glob("*.tar"):
        filesystem.pipe_file(f"pictures/{path.name}", path.read_bytes())
    done = index_shards("s3://pictures/{00000..00004}.tar", tmp_path / "head", head=2)
    assert (done.kept, done.unverified) == (2 * PER_TAR, 2)
    assert done.bytes_read < 0.15 * done.size_bytes
    index_shards(str(laion / "{00000..00001}.tar"), tmp_path / "whole")
    assert everything_read(Shards(tmp_path / "head")) == everything_read(Shards(tmp_path / "whole"))


def test_remote_tars_that_were_replaced_meanwhile_are_indexed_anew_and_damaged_ones_once_they_are(laion, tmp_path):
    files = {f"/{path.name}": path.read_bytes() for path in laion.glob("*.tar")}
    sound = files["/00001.tar"]
    with Server({**files, "/00001.tar": sound[:100_000]}) as server:
        server.etags = dict.fromkeys(files, '"1"')
        assert len(index_shards(pattern(server, 2), tmp_path / "out").damaged) == 1
        server.gets.clear()
        assert len(index_shards(pattern(server, 2), tmp_path / "out").damaged) == 1
        assert server.gets == []
        server.files["/00001.tar"] = sound
        server.files["/00002.tar"] = files["/00002.tar"].replace(b"Satz", b"Sonn")
        server.etags["/00002.tar"] = '"2"'
        assert not index_shards(pattern(server, 2), tmp_path / "out").damaged
        assert [path for path, _ in server.gets] == ["/00001.tar", "/00002.tar"]
        found = everything_read(Shards(tmp_path / "out"))
        assert [record.captions for record, *_ in found[-PER_TAR:]] == [(f"Sonn {n}",) for n in range(8, 12)]
        index_shards(pattern(server, 2), tmp_path / "one")
        assert found == everything_read(Shards(tmp_path / "one"))


def test_an_index_by_headers_made_anew_reads_the_new_tars_and_not_those_in_the_cache(laion, tmp_path):
    files = {"/00000.tar": (laion / "00000.tar").read_bytes()}
    with Server(files) as server:
        server.etags = {"/00000.tar": '"1"'}
        index_shards(f"{server.url}/00000.tar", tmp_path / "head", head=1)
        old = Shards(tmp_path / "head")[0].image
        new = bytes(255 - byte for byte in old)
        server.files = {"/00000.tar": files["/00000.tar"].replace(old, new)}
        server.etags = {"/00000.tar": '"2"'}
        index_shards(f"{server.url}/00000.tar", tmp_path / "head", head=1, overwrite=True)
        assert Shards(tmp_path / "head")[0].image == new


def test_tars_with_a_query_are_indexed_with_it_and_their_files_have_plain_names(laion, served, tmp_path):
    query = "?sv=1&sig=a/b%2F"
    index_shards(pattern(served) + query, tmp_path / "out")
    index_shards(str(laion), tmp_path / "plain")
    assert everything_read(Shards(tmp_path / "out")) == everything_read(Shards(tmp_path / "plain"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "plain").iterdir()
    }
    assert {path.partition("?")[2] for path, _ in served.gets} == {query[1:]}
    with pytest.raises(ValueError, match="what lies at a URL can't be listed"):
        index_shards(f"{served.url}/*.tar{query}", tmp_path / "none")
    # A folder with an index at a URL, and some of its tars.
    served.files |= {f"/s/{path.name}": path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    served.files |= {f"/s/{path.name}": path.read_bytes() for path in laion.iterdir()}
    served.files["/s/index.json"] = served.files["/s/index.json"].replace(f"{laion}/".encode(), b"")
    expected = everything_read(Shards(tmp_path / "plain"))
    assert everything_read(Shards(f"{served.url}/s{query}")) == expected
    assert everything_read(Shards(f"{served.url}/s/{{00001..00002}}.tar{query}")) == expected[PER_TAR : 3 * PER_TAR]


def test_an_index_that_was_begun_goes_on_at_another_address_when_the_old_one_refuses(laion, tmp_path):
    files = {f"/new/{path.name}": path.read_bytes() for path in laion.glob("*.tar")}
    with Server({name.replace("new", "old"): content for name, content in files.items()}) as server:
        server.refusal = 403
        new, old = (f"{server.url}/{place}/{{00000..00002}}.tar" for place in ("new", "old"))
        index_shards(old, tmp_path / "out", head=1)
        server.files = files
        server.heads.clear()
        done = index_shards(new, tmp_path / "out")
        assert server.heads == [f"/new/0000{number}.tar" for number in range(3)]
        assert done == index_shards(new, tmp_path / "one")
    gone = {"index.partial.jsonl", "00000.headers.npz"}
    found = everything_below(tmp_path / "out")
    assert {name: found[name] for name in found if name not in gone} == everything_below(tmp_path / "one")


def test_a_tar_that_cannot_be_asked_for_when_an_index_goes_on_is_named_and_another_call_has_it(laion, tmp_path):
    files = {f"/{path.name}": path.read_bytes() for path in laion.glob("*.tar")}
    with Server({**files, "/00000.tar": files["/00000.tar"][:9_000]}) as server:
        server.refusal = 403
        assert len(index_shards(pattern(server, 2), tmp_path / "out").damaged) == 1
        server.files = {name: files[name] for name in ("/00000.tar", "/00002.tar")}
        (damaged,) = index_shards(pattern(server, 2), tmp_path / "out").damaged
        assert re.match(r"http://\S+/00001\.tar can't be read \(1 try\): .*403", damaged)
        server.files = {}
        with pytest.raises(ValueError, match=r"no tar in .* can be indexed"):
            index_shards(pattern(server, 2), tmp_path / "out")
        server.files = files
        server.gets.clear()
        done = index_shards(pattern(server, 2), tmp_path / "out")
        assert (done.shards, done.damaged, server.gets) == (3, (), [])
        index_shards(pattern(server, 2), tmp_path / "one")
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "one")


def test_a_cache_that_cannot_be_written_is_no_fault_of_tars_and_shards(laion, served, tmp_path, monkeypatch):
    index_shards(str(laion), tmp_path / "there")
    served.files |= {f"/s/{path.name}": path.read_bytes() for path in (tmp_path / "there").iterdir()}
    served.files["/s/index.json"] = served.files["/s/index.json"].replace(f"{laion}/".encode(), b"")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"^http://\S+/s/00000\.npz can't be kept in \S+/file/shards: [^;]*$"):
        Shards(f"{served.url}/s").keys(0)
    with pytest.raises(ValueError, match=r"^http://\S+/00000\.tar can't be kept in \S+/file/shards: "):
        index_shards(pattern(served), tmp_path / "out")
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))
    assert index_shards(pattern(served), tmp_path / "out").shards == NUM_TARS  # none of them is taken for damaged
    del served.files["/s/00000.npz"]
    with pytest.raises(ValueError, match=r"^http://\S+/s/00000\.npz can't be read \(1 try\): .*404"):
        Shards(f"{served.url}/s").keys(0)


FULL_DISK = """
import resource, sys
from miniclip.data.indexing.index_tars import index_shards
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
index_shards(sys.argv[1], "out")
"""


def test_an_index_that_cannot_be_written_is_no_fault_of_its_tar(laion, tmp_path):
    tars = shutil.copytree(laion, tmp_path / "tars")
    with TarWriter(str(tars / "00003.tar"), encoder=False) as writer:  # of an index that is larger than the others
        for key in range(500):
            writer.write({"__key__": f"{key:09d}", "jpg": b"jpg", "txt": b"text"})
    # What a process may write is bounded, which fails in the middle of a file as a full disk does.
    done = warm.run([sys.executable, "-c", FULL_DISK, "tars"], cwd=tmp_path)
    assert re.search(
        r"NotKeptError: the index of tars/00003\.tar can't be written to out/00003\.npz: .*large", done.stderr
    )
    kept = {"index.partial.jsonl", *(f"{number:05d}.npz" for number in range(3))}
    assert everything_below(tmp_path / "out").keys() == kept
    with contextlib.chdir(tmp_path):
        assert index_shards("tars", tmp_path / "out") == index_shards("tars", tmp_path / "one")
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "one")


# ---------------------------------------------------------------------------------------------------------------------
# In parts


@pytest.mark.parametrize("order", list(permutations((1, 2, 3))), ids=str)
def test_parts_in_any_order_give_the_index_of_one_call(laion, tmp_path, order):
    one = shutil.copytree(laion, tmp_path / "one" / "laion")
    parts = shutil.copytree(laion, tmp_path / "parts" / "laion")
    for folder in (one, parts):
        (folder / "00003.tar").write_bytes(b"<html>404</html>" * 100)
        os.utime(folder / "00003.tar", (0, 0))
    source = "laion/{00000..00004}.tar"
    with contextlib.chdir(one.parent):
        whole = index_shards(source)
    with contextlib.chdir(parts.parent):
        done = [index_shards(source, part=(number, 3)) for number in order]
        again = index_shards(source, part=(order[0], 3))
    assert [each.missing for each in done[:2]] == [NUM_TARS - own(order[:1]), NUM_TARS - own(order[:2])]
    assert done[2] == whole == again
    assert everything_below(parts) == {
        **everything_below(one),
        "index.partial.jsonl": read(parts, "index.partial.jsonl"),
    }


def own(numbers: tuple[int, ...]) -> int:
    return sum(len(range(number - 1, NUM_TARS, 3)) for number in numbers)


def read(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def test_processes_at_the_same_time_write_one_index(laion, tmp_path):
    command = [
        sys.executable,
        "-m",
        "miniclip",
        "shards",
        str(laion),
        str(tmp_path / "parts"),
        "--index-only",
        "--part",
    ]
    running = [
        warm.Popen([*command, f"{number}/2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in (1, 2)
    ]
    said = sorted(process.communicate(timeout=300)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert any("20 samples in 5 shards" in each for each in said)
    index_shards(str(laion), tmp_path / "one")
    assert everything_below(tmp_path / "parts") == everything_below(tmp_path / "one")


KILLED = """
import os, signal, sys
from miniclip.data.indexing import index_tars
index = index_tars.index_tar

def index_or_die(tar, *rest):
    if tar.endswith("00004.tar"):
        with open("index/index.partial.jsonl", "a") as file:
            file.write('{"tar": "torn')  # as a disk leaves it
        os.kill(os.getpid(), signal.SIGKILL)
    return index(tar, *rest)

index_tars.index_tar = index_or_die
index_tars.index_shards(sys.argv[1], "index", part=(1, 2))
"""


def test_a_part_that_is_killed_goes_on_and_loses_nothing(laion, tmp_path):
    done = warm.run([sys.executable, "-c", KILLED, str(laion)], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    kept = (tmp_path / "index" / "00000.npz").stat().st_mtime_ns
    assert index_shards(str(laion), tmp_path / "index", part=(2, 2)).missing == 1
    assert index_shards(str(laion), tmp_path / "index", part=(1, 2)).kept == NUM_TARS * PER_TAR
    assert (tmp_path / "index" / "00000.npz").stat().st_mtime_ns == kept
    index_shards(str(laion), tmp_path / "one")
    assert everything_below(tmp_path / "index") == everything_below(tmp_path / "one")


def test_a_part_that_comes_after_the_end_finds_the_index(laion, tmp_path, capsys):
    for number in (1, 2, 1):
        cli.main(["shards", str(laion), str(tmp_path / "index"), "--index-only", "--part", f"{number}/2"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "part 1 of 2 is done; the index comes when 2 tars more are"
    assert said[1] == said[2]
    assert "20 samples in 5 shards" in said[1]


def test_a_part_asks_for_its_own_tars_once_and_for_no_others(served, tmp_path):
    for number in (1, 2, 3):
        served.heads.clear()
        done = index_shards(pattern(served), tmp_path / "index", part=(number, 3))
        assert served.heads == [f"/{tar:05d}.tar" for tar in range(NUM_TARS)[number - 1 :: 3]]
    assert done == index_shards(pattern(served), tmp_path / "one")
    assert everything_below(tmp_path / "index") == everything_below(tmp_path / "one")


def test_a_part_whose_server_refused_for_a_while_is_no_damaged_one_to_the_others(laion, tmp_path):
    files = {f"/{path.name}": path.read_bytes() for path in laion.glob("*.tar")}
    with Server(files) as server:
        server.refusal = 403
        for server.files in (files, {}, files):
            index_shards(pattern(server), tmp_path / "index", part=(1, 2))
        assert not index_shards(pattern(server), tmp_path / "index", part=(2, 2)).damaged
        index_shards(pattern(server), tmp_path / "one")
    assert everything_below(tmp_path / "index") == everything_below(tmp_path / "one")


def test_parts_and_headers_go_together(laion, tmp_path):
    for number in (2, 1):
        done = index_shards(str(laion), tmp_path / "index", part=(number, 2), head=3)
    assert (done.kept, done.shards, done.unverified) == (3 * PER_TAR, 3, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--head", "0"], "head is 0; it must be at least 1"),
        (["--part", "4/3"], "part is 4/3; it goes from 1/3 to 3/3"),
        (
            ["--part", "1/2", "--overwrite"],
            "an index in parts can't be overwritten, .* delete .*index.json and .*first",
        ),
    ],
)
def test_a_mistake_is_one_sentence(laion, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["shards", str(laion), str(tmp_path / "out"), "--index-only", *options])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_the_shell_has_expanded_is_refused_before_a_tar_is_read(laion, capsys):
    tars = sorted(map(str, laion.glob("*.tar")))[:2]
    with pytest.raises(SystemExit) as ended:
        cli.main(["shards", *tars, "--index-only"])
    assert ended.value.code == 2
    assert re.search(r"tar is a file, .* a pattern of tars stands in quotes", capsys.readouterr().err)


def test_head_without_an_index_to_write_is_refused(laion, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["shards", str(laion), str(tmp_path / "out"), "--head", "2"])
    assert ended.value.code == 2
    assert "--head is for --index-only" in capsys.readouterr().err
