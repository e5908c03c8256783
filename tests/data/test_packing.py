"""`pack` as people live with it: stopped, killed, repeated, in parts, filtered, split; every pair accounted for."""

from __future__ import annotations

import contextlib
import http.server
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import warm
from helpers import (
    all_members,
    everything_below,
    members,
    pack_folder,
    picture,
    rejected_rows,
    rejections,
    table,
    write_pairs,
    write_picture,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from miniclip.commands import main as cli
from miniclip.data.open_pairs import shard_pairs
from miniclip.data.pack import pack
from miniclip.data.reading.pair import Pair
from miniclip.data.sample_files import Packing
from miniclip.data.shard_index import Packed
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs


def png(seed: int = 0, size: tuple[int, int] = (6, 5)) -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def pairs_of(count: int, size: tuple[int, int] = (6, 5)) -> list[Pair]:
    return [Pair(f"number {n}", png(n, size), (f"caption {n}",), extra={"n": n}) for n in range(count)]


def check_complete(out: Path, pairs: list[Pair], packed: Packed) -> None:
    """Every pair is in one place, and the counts, the index and the files say the same."""
    folders = [out / "train", out / "val"] if (out / "train").is_dir() else [out]
    opened = [Shards(folder) for folder in folders]
    keys = [key for shards in opened for s in range(len(shards.counts)) for key in shards.keys(s)]
    rejected = rejected_rows(out)
    assert sorted([*keys, *(row[0] for row in rejected)]) == [f"{n:09d}" for n in range(len(pairs))]
    assert packed.kept + packed.held_out + packed.rejected == len(pairs)
    assert (packed.kept, packed.rejected) == (len(opened[0]), len(rejected))
    assert packed.held_out == (len(opened[1]) if len(opened) > 1 else 0)
    assert packed.shards == sum(len(shards.counts) for shards in opened)
    assert packed.size_bytes == sum(path.stat().st_size for path in out.rglob("*.tar"))
    for shards in opened:
        for number, record in enumerate(shards):
            pair = pairs[int(record.key)]
            assert shards.info(number)["source"] == pair.source
            assert record.captions == tuple(caption for caption in pair.captions if caption.strip())
    for key, source, reason in rejected:
        assert source == pairs[int(key)].source
        assert reason


# ---------------------------------------------------------------------------------------------------------------------
# Whatever goes in


def kinds_of_pair() -> dict[str, Pair]:
    return {
        "good": Pair("good", png(1), ("one", "two")),
        "twin": Pair("twin", png(1), ("the same picture",)),
        "other": Pair("other", png(2), ("words",)),
        "big": Pair("big", png(3, (40, 40)), ("words",)),
        "strip": Pair("strip", png(4, (40, 5)), ("words",)),
        "small": Pair("small", png(5, (3, 9)), ("words",)),
        "blank": Pair("blank", png(6), (" ", "")),
        "broken": Pair("broken", png(7)[:60], ("words",)),
        "text": Pair("text", b"no picture", ("words",)),
        "told": Pair("told", problem="its owner said so"),
        "gone": Pair("gone", Path("/nowhere/a.png"), ("words",)),
    }


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(kinds_of_pair())), min_size=1, max_size=12),
    samples_per_shard=st.integers(1, 13),
    max_shard_bytes=st.sampled_from([1, 12_000, 30_000, 2**30]),
    min_side=st.sampled_from([None, 4]),
    max_aspect=st.sampled_from([None, 2.0]),
    resize=st.sampled_from([None, 8]),
    workers=st.integers(1, 3),
)
def test_every_pair_is_either_in_a_shard_or_rejected_with_a_reason(tmp_path_factory, names, workers, **fields):
    out = tmp_path_factory.mktemp("any") / "out"
    kinds = kinds_of_pair()
    pairs = [kinds[name] for name in names]
    bad = {"blank", "broken", "text", "told", "gone"}
    bad |= {"small"} if fields["min_side"] else set()
    bad |= {"strip", "small"} if fields["max_aspect"] else set()
    if set(names) <= bad:
        with pytest.raises(ValueError, match=rf"none of the {len(pairs)} pairs in here can be used"):
            pack(pairs, out, source="here", packing=Packing(**fields), workers=workers)
        assert list(out.parent.iterdir()) == []
    else:
        packed = pack(pairs, out, source="here", packing=Packing(**fields), workers=workers)
        check_complete(out, pairs, packed)
        assert [row[1] for row in rejected_rows(out)] == [name for name in names if name in bad]


@pytest.mark.parametrize("workers", [1, 4])
def test_pairs_keep_their_order_and_their_numbers_are_their_keys(tmp_path, workers):
    pairs = pairs_of(100)
    pack(pairs, tmp_path / "out", source="here", packing=Packing(samples_per_shard=30), workers=workers)
    shards = Shards(tmp_path / "out")
    assert [(r.key, r.image, r.captions) for r in shards] == [
        (f"{n:09d}", pair.image, pair.captions) for n, pair in enumerate(pairs)
    ]
    assert shards.counts.tolist() == [30, 30, 30, 10]
    assert [shards.info(n)["n"] for n in range(100)] == list(range(100))


# ---------------------------------------------------------------------------------------------------------------------
# Filters and bounds


def test_images_that_are_too_small_or_too_long_are_rejected_with_their_sizes(tmp_path):
    sizes = {"even": (20, 20), "wide": (60, 20), "wider": (61, 20), "tall": (20, 61), "small": (100, 19)}
    pairs = [Pair(name, png(n, size), ("words",)) for n, (name, size) in enumerate(sizes.items())]
    packed = pack(pairs, tmp_path / "out", source="here", packing=Packing(min_side=20, max_aspect=3))
    check_complete(tmp_path / "out", pairs, packed)
    assert rejections(tmp_path / "out") == {
        "wider": "its sides are 61 x 20, more than 3 to 1",
        "tall": "its sides are 20 x 61, more than 3 to 1",
        "small": "its short side is 19 pixels, less than 20",
    }


def test_sizes_are_judged_before_shrinking(tmp_path):
    packing = Packing(min_side=20, resize=10)
    pack([Pair("a", png(0, (20, 30)), ("words",))], tmp_path / "out", source="here", packing=packing)
    assert Shards(tmp_path / "out").info(0) == {"source": "a", "width": 10, "height": 15}


@pytest.mark.parametrize("limit", [12_000, 31_000, 100_000])
@pytest.mark.parametrize("val_fraction", [0.0, 0.4])
def test_no_tar_is_larger_than_the_limit_nor_smaller_than_need_be(tmp_path, limit, val_fraction):
    pairs = pairs_of(40, (40, 30))  # 3.7 kB each
    packing = Packing(max_shard_bytes=limit, val_fraction=val_fraction, samples_per_shard=35)
    check_complete(tmp_path / "out", pairs, pack(pairs, tmp_path / "out", source="here", packing=packing))
    tars = sorted((tmp_path / "out").rglob("*.tar"))
    assert max(tar.stat().st_size for tar in tars) <= limit
    room = limit - 2 * 10240  # tars grow by records of that size
    ended_early = [tar for tar in tars if tar.stat().st_size < room - 8_000]
    assert len(ended_early) <= 4  # the last of each chunk and side


def test_an_image_larger_than_the_limit_has_a_tar_of_its_own(tmp_path):
    pairs = [*pairs_of(2), Pair("big", png(9, (60, 60)), ("words",)), *pairs_of(2)]
    packing = Packing(max_shard_bytes=10_240)
    check_complete(tmp_path / "out", pairs, pack(pairs, tmp_path / "out", source="here", packing=packing))
    alone = [tar for tar in (tmp_path / "out").glob("*.tar") if tar.stat().st_size > 10_240]
    assert [sorted(members(tar)) for tar in alone] == [[f"000000002.{suffix}" for suffix in ("json", "png", "txt")]]


# ---------------------------------------------------------------------------------------------------------------------
# Holding out


def split_of(out: Path) -> tuple[set[bytes], set[bytes]]:
    """The pictures of each side."""
    train, val = ({record.image for record in Shards(out / side)} for side in ("train", "val"))
    return train, val


def test_the_share_held_out_is_about_the_one_asked_for_and_nothing_is_lost(tmp_path):
    pairs = pairs_of(500, (2, 2))
    packing = Packing(val_fraction=0.2, samples_per_shard=120)
    packed = pack(pairs, tmp_path / "out", source="here", packing=packing)
    check_complete(tmp_path / "out", pairs, packed)
    assert 70 <= packed.held_out <= 130  # 100 on average, standard deviation 9


def test_copies_of_a_picture_are_on_the_same_side(tmp_path):
    pairs = [
        Pair(f"{copy} of {pair.source}", pair.image, (f"words {copy}",)) for copy in range(3) for pair in pairs_of(20)
    ]
    packing = Packing(val_fraction=0.5, samples_per_shard=7)
    packed = pack(pairs, tmp_path / "out", source="here", packing=packing)
    check_complete(tmp_path / "out", pairs, packed)
    train, val = split_of(tmp_path / "out")
    assert not train & val
    assert len(train | val) == 20
    for folder in ("train", "val"):
        assert set(Counter(r.image for r in Shards(tmp_path / "out" / folder)).values()) == {3}


@pytest.mark.parametrize("change", ["order", "shard size", "workers", "captions", "folder", "more pairs", "parts"])
def test_the_split_depends_on_nothing_but_the_pictures(tmp_path, change):
    pairs, fields, workers = pairs_of(40), {"val_fraction": 0.3, "samples_per_shard": 15}, 2
    pack(pairs, tmp_path / "out", source="here", packing=Packing(**fields), workers=workers)
    parts, added = 1, []
    if change == "order":
        pairs = pairs[::-1]
    elif change == "shard size":
        fields["samples_per_shard"], fields["max_shard_bytes"] = 9, 12_000
    elif change == "workers":
        workers = 1
    elif change == "captions":
        pairs = [Pair(pair.source, pair.image, ("something else",)) for pair in pairs]
    elif change == "folder":
        for n, pair in enumerate(pairs):
            path = tmp_path / "src" / f"x{n}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pair.image)
            path.with_suffix(".txt").write_text("words")
        pairs = read_pairs(tmp_path / "src")
    elif change == "more pairs":
        added = [Pair(f"new {n}", png(1000 + n), ("new",)) for n in range(10)]
        pairs = [*added, *pairs]
    else:
        parts = 3
    for part in range(1, parts + 1):
        pack(pairs, tmp_path / "other", source="here", packing=Packing(**fields), workers=workers, part=(part, parts))
    new = {pair.image for pair in added}
    train, val = split_of(tmp_path / "other")
    assert (train - new, val - new) == split_of(tmp_path / "out")


def test_shrunk_pictures_are_split_as_their_originals_are(tmp_path):
    pairs = pairs_of(30, (12, 12))
    for name, resize in (("whole", None), ("shrunk", 6)):
        pack(pairs, tmp_path / name, source="here", packing=Packing(val_fraction=0.4, resize=resize))
    for side in ("train", "val"):
        whole, shrunk = ([r.key for r in Shards(tmp_path / name / side)] for name in ("whole", "shrunk"))
        assert whole == shrunk


def test_a_share_that_leaves_a_side_empty_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"of 2 pairs none fell to the side 'val' with val_fraction 1e-09"):
        pack(pairs_of(2), tmp_path / "out", source="here", packing=Packing(val_fraction=1e-9))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_two_sides_names_them_when_it_is_opened_or_packed(tmp_path, capsys):
    pack(pairs_of(30), tmp_path / "out", source="here", packing=Packing(val_fraction=0.5))
    with pytest.raises(ValueError, match=r"out holds the parts train and val; name one of them: .*train"):
        Shards(tmp_path / "out")
    assert "train and val" in fails(capsys, str(tmp_path / "out"), str(tmp_path / "new"))


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_shard_bytes", 0),
        ("min_side", 0),
        ("max_aspect", 0.5),
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("val_fraction", float("nan")),
    ],
)
def test_a_setting_out_of_its_range_is_named_with_its_value(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it "):
        Packing(**{name: value})


# ---------------------------------------------------------------------------------------------------------------------
# Going on after a break


class Counted(list):
    """Pairs that remember which were asked for."""

    def __init__(self, pairs):
        super().__init__(pairs)
        self.read: list[int] = []

    def __getitem__(self, number):
        self.read.append(number)
        return super().__getitem__(number)


def in_child(action: Callable[[], object]) -> int:
    """The exit code of a forked process; minus the signal's number if one ended it."""
    child = os.fork()
    if not child:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_step(step: int) -> None:
    """From now on, this process is killed when it is about to change names on the disk for the `step`-th time."""
    taken = itertools.count(1)

    def deadly(function):
        def replaced(*args, **options):
            if next(taken) == step:
                kill_self()
            return function(*args, **options)

        return replaced

    for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync"):
        setattr(os, name, deadly(getattr(os, name)))


@pytest.mark.parametrize(
    ("case", "every"),
    [("held out", 4), *(pytest.param(case, 1, marks=pytest.mark.long) for case in ("held out", "over an old one"))],
)
def test_killed_at_any_step_the_repeated_command_gives_the_same_bytes_and_leaves_nothing_beside(tmp_path, case, every):
    pairs = [*pairs_of(3), Pair("bad", problem="bad")]
    packing = Packing(samples_per_shard=2, val_fraction=0.35 if case == "held out" else 0.0)
    overwrite = case == "over an old one"
    pack(pairs_of(2), tmp_path / "old", source="before")
    pack(pairs, tmp_path / "wanted", source="here", packing=packing)
    wanted, old = everything_below(tmp_path / "wanted"), everything_below(tmp_path / "old")
    wrong: dict[int, str] = {}
    for step in itertools.count(1, every):
        folder = tmp_path / str(step)
        out = folder / "out"
        if overwrite:
            shutil.copytree(tmp_path / "old", out)

        def once(out=out):
            return pack(pairs, out, source="here", packing=packing, overwrite=overwrite, workers=1)

        code = in_child(lambda step=step, once=once: (kill_before_step(step), once()))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        is_complete = out.exists() and everything_below(out) == wanted
        others = [everything_below(path) for path in folder.glob("*") if path.is_dir()] if folder.exists() else []
        if overwrite and old not in others and wanted not in others:
            wrong[step] = "killed: neither the old shards nor the new are to be found"
        elif out.exists() and not is_complete and not (overwrite and everything_below(out) == old):
            wrong[step] = "killed: what is there is neither the old nor the new"
        if not is_complete or overwrite:
            try:
                once()
            except Exception as error:
                wrong[step] = f"repeated: {error!r}"
            else:
                if everything_below(out) != wanted:
                    wrong[step] = f"repeated: other files, {sorted(set(everything_below(out)) ^ set(wanted))}"
                elif left := [path.name for path in folder.iterdir() if path != out]:
                    wrong[step] = f"repeated: {left} left beside it"
        shutil.rmtree(folder)
    assert step > 30  # else the steps were not counted
    assert not wrong, "\n".join(f"step {step} of {case}: {what}" for step, what in wrong.items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, "kill"])
def test_finished_chunks_are_neither_read_nor_written_again(tmp_path, error):
    pairs = Counted(pairs_of(10))
    packing = Packing(samples_per_shard=3)

    def stop(done: int) -> None:
        if done == 6:
            kill_self() if error == "kill" else (_ for _ in ()).throw(error("stop"))

    def first():
        return pack(pairs, tmp_path / "out", source="here", packing=packing, progress=stop)

    if error == "kill":
        assert in_child(first) == -signal.SIGKILL
    else:
        with pytest.raises(error, match="stop"):
            first()
    done = [(tmp_path / "out.partial" / f"chunk-{n:05d}-train-0.tar").stat() for n in (0, 1)]
    pairs.read.clear()
    told: list[int] = []
    check_complete(
        tmp_path / "out",
        pairs,
        pack(pairs, tmp_path / "out", source="here", packing=packing, progress=told.append),
    )
    assert sorted(set(pairs.read[:4])) == [6, 7, 8, 9]
    assert told[0] == 3, "the progress of what was done before is not told"
    assert told[-1] == 10
    after = [(tmp_path / "out" / f"{n:05d}.tar").stat() for n in (0, 1)]
    assert [(s.st_ino, s.st_mtime_ns) for s in after] == [(s.st_ino, s.st_mtime_ns) for s in done]


@pytest.mark.parametrize("killed_after", [1, 64, 100, 129, 199])
def test_killed_after_any_number_of_pairs_the_result_is_the_same(tmp_path, killed_after):
    packing = Packing(samples_per_shard=70, val_fraction=0.3, max_shard_bytes=60_000)
    pairs = pairs_of(200)
    pack(pairs, tmp_path / "wanted", source="here", packing=packing)

    class Deadly(list):
        def __getitem__(self, number):
            if number == killed_after:
                kill_self()
            return super().__getitem__(number)

    code = in_child(lambda: pack(Deadly(pairs), tmp_path / "out", source="here", packing=packing, workers=2))
    assert code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    pack(pairs, tmp_path / "out", source="here", packing=packing)
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "wanted"]


class SlowServer:
    """One picture at a URL. Whoever asks for it waits until `answer` is set; `asked` tells that someone has."""

    def __init__(self, picture: bytes) -> None:
        asked, answer = self.asked, self.answer = threading.Event(), threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.set()
                answer.wait(60)
                with contextlib.suppress(OSError):  # who asked may have been killed
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(picture)))
                    self.end_headers()
                    self.wfile.write(picture)

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.url = f"http://127.0.0.1:{self.http.server_port}/picture.png"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.mark.long
def test_a_command_that_was_killed_goes_on_when_it_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    pictures = write_pairs(tmp_path / "src", 8)
    server = SlowServer((pictures / "0005.png").read_bytes())
    images = [server.url if number == 5 else f"src/{number:04d}.png" for number in range(8)]
    source = table(tmp_path / "pairs.csv", "image,caption", *(f"{image},words {n}" for n, image in enumerate(images)))
    command = [sys.executable, "-m", "miniclip", "shards", str(source), str(tmp_path / "out")]
    command += ["--samples-per-shard", "2", "--resize", "16"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    assert server.asked.wait(60)  # in its third chunk
    process.kill()
    process.wait()
    finished = {path.name: path.stat() for path in (tmp_path / "out.partial").glob("chunk-0000[01]*.tar")}
    assert sorted(finished) == ["chunk-00000-train-0.tar", "chunk-00001-train-0.tar"]
    server.answer.set()
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert "8 pairs in 4 shards" in done.stdout
    for number, stat in enumerate(finished[name] for name in sorted(finished)):
        assert (tmp_path / "out" / f"{number:05d}.tar").stat().st_ino == stat.st_ino
    pack_folder(source, tmp_path / "wanted", samples_per_shard=2, resize=16, max_shard_bytes=10**9)
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "wanted")
    server.http.shutdown()


def begin(out: Path, pairs, source="here", **fields) -> None:
    """Packs the first chunk, and stops."""

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(pairs, out, source=source, packing=Packing(**fields), progress=stop)


@pytest.mark.parametrize(
    "change",
    [
        {"samples_per_shard": 4},
        {"resize": 32},
        {"quality": 80},
        {"min_side": 3},
        {"max_aspect": 2.5},
        {"val_fraction": 0.25},
        {"max_shard_bytes": 10**6},
    ],
)
def test_other_settings_than_those_that_were_begun_are_refused_by_name(tmp_path, change):
    pairs = pairs_of(9)
    fields = {"samples_per_shard": 3}
    begin(tmp_path / "out", pairs, **fields)
    before = everything_below(tmp_path)
    ((name, value),) = change.items()
    old = getattr(Packing(**fields), name)
    with pytest.raises(
        ValueError, match=f"beginning of another packing: {name} was {old!r} and is {value!r}. "
    ) as told:
        pack(pairs, tmp_path / "out", source="here", packing=Packing(**fields | change))
    assert "pass --overwrite to begin anew" in str(told.value)
    assert everything_below(tmp_path) == before
    pack(pairs, tmp_path / "out", source="here", packing=Packing(**fields | change), overwrite=True)
    pack(pairs, tmp_path / "wanted", source="here", packing=Packing(**fields | change))
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "wanted")
    assert not (tmp_path / "out.partial").exists()


def test_another_source_or_other_pairs_of_it_are_refused(tmp_path):
    begin(tmp_path / "out", pairs_of(9), samples_per_shard=3)
    packing = Packing(samples_per_shard=3)
    with pytest.raises(ValueError, match="source was 'here' and is 'there'"):
        pack(pairs_of(9), tmp_path / "out", source="there", packing=packing)
    with pytest.raises(ValueError, match="pairs was 9 and is 10"):
        pack(pairs_of(10), tmp_path / "out", source="here", packing=packing)
    with pytest.raises(ValueError, match="fingerprint was"):
        pack(pairs_of(9)[::-1], tmp_path / "out", source="here", packing=packing)


def test_other_captions_columns_than_those_that_were_begun_are_refused(tmp_path):
    """Else some shards would hold titles and others descriptions."""
    for n in range(4):
        write_picture(tmp_path / f"{n}.png", n)
    source = table(tmp_path / "t.csv", "file,title,text", *(f"{n}.png,title {n},text {n}" for n in range(4)))
    begin(tmp_path / "out", read_pairs(source, caption_columns=["title"]), str(source), samples_per_shard=2)
    with pytest.raises(ValueError, match="beginning of another packing"):
        pack(
            read_pairs(source, caption_columns=["text"]),
            tmp_path / "out",
            source=str(source),
            packing=Packing(samples_per_shard=2),
        )


def test_a_folder_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("a year's work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"out\.partial is in the way"):
            pack(pairs_of(2), tmp_path / "out", source="here", overwrite=overwrite)
    assert everything_below(tmp_path / "out.partial") == {"thesis.tex": b"a year's work"}


# ---------------------------------------------------------------------------------------------------------------------
# Several at once


class Packer:
    """A process that packs `pairs` and waits when it comes to the pair of a number."""

    def __init__(self, pairs: list[Pair], out: Path, wait_at: int, **options) -> None:
        arrived, tell_arrived = os.pipe()
        wait, self.go_on = os.pipe()

        class Waiting(list):
            def __getitem__(self, number):
                if number == wait_at:
                    os.write(tell_arrived, b"x")
                    os.read(wait, 1)
                return super().__getitem__(number)

        self.child = os.fork()
        if not self.child:
            try:
                pack(Waiting(pairs), out, source="here", packing=Packing(2), workers=1, **options)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(tell_arrived)
        assert os.read(arrived, 1) == b"x", "it ended before"

    def finish(self) -> int:
        os.write(self.go_on, b"x")
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@pytest.mark.parametrize("other", ["the same", "overwrite", "overwrite with other settings"])
def test_while_a_process_packs_another_is_refused_and_does_it_no_harm(tmp_path, other):
    pairs = pairs_of(6)
    packing = Packing(2, quality=50) if other.endswith("settings") else Packing(2)
    packer = Packer(pairs, tmp_path / "out", wait_at=3)
    try:
        with pytest.raises(ValueError, match=r"another process is packing .*out"):
            pack(pairs, tmp_path / "out", source="here", packing=packing, overwrite=other != "the same")
    finally:
        code = packer.finish()
    assert code == 0
    pack(pairs, tmp_path / "wanted", source="here", packing=Packing(2))
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "wanted"]


@pytest.mark.parametrize("part", [(1, 1), (1, 3), (2, 4)])
def test_two_processes_that_come_to_the_same_chunk_do_each_other_no_harm(tmp_path, part):
    """A job array begun again with another number of jobs while one of the old still runs."""
    pairs = pairs_of(6)
    packer = Packer(pairs, tmp_path / "out", wait_at=3, part=(2, 3))  # in the midst of the second chunk
    said = ""
    try:
        packed = pack(pairs, tmp_path / "out", source="here", packing=Packing(2), part=part)
        said = f"{packed.missing} missing"
    except ValueError as error:
        said = str(error)
    finally:
        code = packer.finish()
    assert code == 0, "the first process failed"
    assert "another process is packing" in said or "missing" in said
    if not (tmp_path / "out").exists():
        pack(pairs, tmp_path / "out", source="here", packing=Packing(2))
    pack(pairs, tmp_path / "wanted", source="here", packing=Packing(2))
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "wanted")


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3])))
def test_parts_give_in_any_order_the_bytes_of_the_whole(tmp_path, order):
    pairs = [*pairs_of(8), Pair("bad", problem="bad"), *pairs_of(3)]
    packing = Packing(samples_per_shard=2, val_fraction=0.4)
    whole = pack(pairs, tmp_path / "whole", source="here", packing=packing)
    missing = []
    for part in order:
        assert not (tmp_path / "parts").exists()
        packed = pack(pairs, tmp_path / "parts", source="here", packing=packing, part=(part, 3))
        missing.append(packed.missing)
    assert missing == [4, 2, 0]
    assert packed == whole
    assert everything_below(tmp_path / "parts") == everything_below(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_a_part_done_twice_does_no_harm(tmp_path):
    pairs = Counted(pairs_of(8))
    packing = Packing(samples_per_shard=2)
    pack(pairs, tmp_path / "whole", source="here", packing=packing)
    first = [pack(pairs, tmp_path / "parts", source="here", packing=packing, part=(1, 2)) for _ in range(2)]
    assert [packed.missing for packed in first] == [2, 2]
    pairs.read.clear()
    assert pack(pairs, tmp_path / "parts", source="here", packing=packing, part=(2, 2)).kept == 8
    assert sorted(pairs.read) == [2, 3, 6, 7]
    assert everything_below(tmp_path / "parts") == everything_below(tmp_path / "whole")


def test_more_parts_than_chunks_and_a_change_of_their_number_are_fine(tmp_path):
    pairs = pairs_of(6)
    packing = Packing(samples_per_shard=2)
    pack(pairs, tmp_path / "whole", source="here", packing=packing)
    for part in (9, 2, 1):
        pack(pairs, tmp_path / "parts", source="here", packing=packing, part=(part, 9))
    assert pack(pairs, tmp_path / "parts", source="here", packing=packing).kept == 6
    assert everything_below(tmp_path / "parts") == everything_below(tmp_path / "whole")


def test_a_part_that_ends_while_another_puts_all_together_says_the_same(tmp_path):
    pairs = pairs_of(4)
    said = []

    def meanwhile(done: int) -> None:  # between the last chunk of this part and its look at the others
        if done == 2:
            said.append(pack(pairs, tmp_path / "out", source="here", packing=Packing(2), part=(2, 2)))

    said.append(
        pack(pairs, tmp_path / "out", source="here", packing=Packing(2), part=(1, 2), progress=_once(meanwhile))
    )
    assert said[0] == said[1]
    check_complete(tmp_path / "out", pairs, said[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_every_part_is_told_when_nothing_can_be_used(tmp_path):
    pairs = [Pair(f"bad {n}", problem="its owner said so") for n in range(4)]

    def meanwhile(done: int) -> None:
        with pytest.raises(ValueError, match="none of the 4 pairs in here can be used"):
            pack(pairs, tmp_path / "out", source="here", packing=Packing(2), part=(2, 2))

    with pytest.raises(ValueError, match="can be used"):
        pack(pairs, tmp_path / "out", source="here", packing=Packing(2), part=(1, 2), progress=_once(meanwhile))
    assert list(tmp_path.iterdir()) == []


def _once(function: Callable[[int], None]) -> Callable[[int], None]:
    calls = itertools.count()
    return lambda done: function(done) if next(calls) == 0 else None


@pytest.mark.sample(4)
@pytest.mark.parametrize("round_", range(12))
def test_parts_that_run_at_the_same_time_give_the_bytes_of_the_whole(tmp_path, round_):
    """Many rounds of short parts, all started by one signal: they meet at the beginning and at the end."""
    pairs = pairs_of(12)
    packing = Packing(samples_per_shard=2, val_fraction=0.5)
    pack(pairs, tmp_path / "whole", source="here", packing=packing)
    out = tmp_path / "round" / "out"
    out.parent.mkdir()
    go, start = os.pipe()

    def part(number):
        os.close(start)
        os.read(go, 1)  # ends when the parent closes its end
        pack(pairs, out, source="here", packing=packing, part=(number, 6), workers=1)

    children = []
    for number in range(1, 7):
        child = os.fork()
        if not child:
            with open(out.parent / f"said by {number}", "w") as said:
                try:
                    part(number)
                    os._exit(0)
                except BaseException as error:
                    said.write(repr(error))
                    said.flush()
                finally:
                    os._exit(1)
        children.append(child)
    os.close(go)
    os.close(start)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), [path.read_text() for path in out.parent.glob("said by *")]
    assert everything_below(out) == everything_below(tmp_path / "whole")
    assert {p for p in out.parent.iterdir() if not p.name.startswith("said")} == {out}


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (-1, 2), (1, 0)])
def test_a_part_that_is_none_is_refused(tmp_path, part):
    with pytest.raises(ValueError, match=f"part is {part[0]}/{part[1]}; "):
        pack(pairs_of(2), tmp_path / "out", source="here", part=part)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Shards anew


def test_shards_sharded_anew_keep_captions_facts_and_pictures(tmp_path):
    pairs = [
        *pairs_of(6),
        Pair("bad", problem="bad"),
        Pair("last", png(99), ("eins", "zwei"), extra={"licence": "CC0"}),
    ]
    pack(pairs, tmp_path / "first", source="here", packing=Packing(samples_per_shard=3))
    again = shard_pairs(str(tmp_path / "first"))
    assert again.names[:1] + again.names[-1:] == ["00000.tar:000000000", "00002.tar:000000007"]
    packed = pack(again, tmp_path / "second", source="first", packing=Packing(samples_per_shard=5))
    assert (packed.kept, packed.rejected) == (7, 0)
    first, second = Shards(tmp_path / "first"), Shards(tmp_path / "second")
    assert [(r.image, r.captions) for r in second] == [(r.image, r.captions) for r in first]
    assert [second.info(n) for n in range(7)] == [first.info(n) for n in range(7)]


def test_shards_can_be_shrunk_and_filtered_and_rejections_name_tar_and_key(tmp_path):
    sizes = [(40, 30), (90, 9), (30, 40)]
    pairs = [Pair(f"p{n}", png(n, size), (f"caption {n}",), extra={"n": n}) for n, size in enumerate(sizes)]
    pack(pairs, tmp_path / "first", source="here", packing=Packing(samples_per_shard=2))
    packing = Packing(resize=15, max_aspect=5)
    pack(shard_pairs(str(tmp_path / "first")), tmp_path / "second", source="first", packing=packing)
    second = Shards(tmp_path / "second")
    assert [second.info(n) for n in range(2)] == [
        {"source": "p0", "n": 0, "width": 20, "height": 15},
        {"source": "p2", "n": 2, "width": 15, "height": 20},
    ]
    assert rejected_rows(tmp_path / "second") == [
        ["000000001", "00000.tar:000000001", "its sides are 90 x 9, more than 5 to 1"]
    ]


def test_a_class_beside_a_caption_survives_sharding_anew(tmp_path):
    from webdataset import TarWriter

    (tmp_path / "first").mkdir()
    with TarWriter(str(tmp_path / "first" / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "png": png(), "txt": b"words", "cls": b"7", "json": b'{"id": "x"}'})
    cli.main(["shards", str(tmp_path / "first"), "--index-only"])
    cli.main(["shards", str(tmp_path / "first"), str(tmp_path / "second")])
    content = all_members(tmp_path / "second")
    assert json.loads(content["000000000.json"])["id"] == "x"
    assert content.get("000000000.cls") == b"7" or json.loads(content["000000000.json"]).get("cls") in (7, "7")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def fails(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["shards", *args])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_help_shows_examples_and_what_happens_after_a_break(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["shards", "--help"])
    said = capsys.readouterr().out
    for example in (
        "miniclip shards photos shards --resize 256 --val-fraction 0.05",
        "miniclip shards pairs.csv titles --caption-column title --images photos",
        "miniclip shards 'laion/{00000..00099}.tar' --index-only",
        "after an interruption the same command resumes",
    ):
        assert example in said


def test_every_option_of_the_command_does_what_it_says(tmp_path, capsys):
    for n, size in enumerate([(40, 30), (30, 40), (90, 30), (20, 19), *[(33 + n, 33) for n in range(16)]]):
        write_picture(tmp_path / "pictures" / f"{n}.png", n, size)
    source = table(tmp_path / "t.csv", "id,bild,satz,titel", *(f"{n},{n}.png,satz {n},titel {n}" for n in range(20)))
    arguments = (
        "--image-column bild --caption-column titel --caption-column satz --resize 24 --quality 70 --min-side 20"
    )
    arguments += " --max-aspect 2 --val-fraction 0.4 --samples-per-shard 6 --max-shard-size 20kb --workers 2"
    command = ["shards", str(source), str(tmp_path / "out"), "--images", str(tmp_path / "pictures"), *arguments.split()]
    for part in ("1/2", "2/2"):
        cli.main([*command, "--part", part])
        captured = capsys.readouterr()
        assert f"20 images from column 'bild' in {tmp_path / 'pictures'}, captions from 'titel', 'satz'" in captured.err
        if part == "1/2":
            assert f"part 1 of 2 is done; {tmp_path / 'out'} comes when" in captured.out
            assert not (tmp_path / "out").exists()
    assert f"2 rejected, see {tmp_path / 'out' / 'rejected.csv'}" in captured.out
    assert "held out in" in captured.out
    packing = Packing(6, 20_000, 24, 70, 20, 2.0, 0.4)
    pairs = read_pairs(source, images=tmp_path / "pictures", image_column="bild", caption_columns=["titel", "satz"])
    packed = pack(pairs, tmp_path / "wanted", source=str(source), packing=packing)
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "wanted")
    check_complete(tmp_path / "out", list(pairs), packed)
    assert Shards(tmp_path / "out" / "train")[0].captions == ("titel 0", "satz 0")
    assert set(rejections(tmp_path / "out")) == {"2.png", "3.png"}
    assert "exists already; pass --overwrite" in fails(capsys, *command[1:])
    cli.main([*command, "--overwrite"])
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "wanted")


@pytest.mark.parametrize(
    "size, num_bytes",
    [("1GB", 10**9), ("500kb", 500_000), ("1.5MB", 1_500_000), ("20 KB", 20_000), ("12345", 12345)],
)
def test_a_size_is_written_as_people_write_it(tmp_path, size, num_bytes):
    cli.main(["shards", str(write_pairs(tmp_path / "src", 1)), str(tmp_path / "out"), "--max-shard-size", size])
    assert json.loads((tmp_path / "out" / "index.json").read_text())["max_shard_bytes"] == num_bytes


@pytest.mark.parametrize("size", ["rubbish", "GB", "", "1 parsec", "1,5GB", "infGB", "nanMB", "1TiB"])
def test_a_size_that_is_none_is_refused_with_examples(tmp_path, capsys, size):
    source = write_pairs(tmp_path / "src", 1)
    said = fails(capsys, str(source), str(tmp_path / "out"), "--max-shard-size", size)
    assert f"--max-shard-size: {size!r} is no size; write 500MB or 1GB" in said


@pytest.mark.parametrize("size", ["-1GB", "0", "0.0001KB"])
def test_a_size_of_nothing_is_refused(tmp_path, capsys, size):
    source = write_pairs(tmp_path / "src", 1)
    assert "it must be at least 1" in fails(capsys, str(source), str(tmp_path / "out"), f"--max-shard-size={size}")


@pytest.mark.parametrize(
    "part, says",
    [
        ("0/2", "part is 0/2; it goes from 1/2 to 2/2"),
        ("9/8", "part is 9/8; it goes from 1/8 to 8/8"),
        ("x", "'x' is no part; write 1/8 for the first of eight"),
        ("1", "'1' is no part; write 1/8"),
        ("1/", "'1/' is no part; write 1/8"),
        ("1/2/3", "'1/2/3' is no part; write 1/8"),
        ("²/3", "'²/3' is no part; write 1/8"),
        ("1/0", "part"),
    ],
)
def test_a_part_that_is_none_is_refused_by_the_command(tmp_path, capsys, part, says):
    source = write_pairs(tmp_path / "src", 1)
    said = fails(capsys, str(source), str(tmp_path / "out"), "--part", part)
    assert says in said
    assert list(tmp_path.iterdir()) == [source]


def test_a_missing_out_is_named(tmp_path, capsys):
    assert "OUT is missing" in fails(capsys, str(write_pairs(tmp_path / "src", 1)))


def test_tars_without_an_index_given_to_be_packed_name_the_command_that_writes_it(tmp_path, capsys):
    pack(pairs_of(3), tmp_path / "tars", source="here")
    (tmp_path / "tars" / "index.json").unlink()
    for source in (str(tmp_path / "tars"), str(tmp_path / "tars" / "{00000..00000}.tar")):
        assert "--index-only" in fails(capsys, source, str(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------------------------------
# Images that are looked at no more than they must be


@pytest.mark.parametrize("tail", [b"", b"\0" * 7, b"trailer of a telephone", b"\xff\xd9"])
def test_a_whole_jpeg_is_kept_with_all_that_follows_its_end(tmp_path, tail):
    buffer = io.BytesIO()
    picture(1).save(buffer, "JPEG")
    data = buffer.getvalue() + tail
    pack([Pair("a", data, ("words",))], tmp_path / "out", source="here")
    assert Shards(tmp_path / "out")[0].image == data


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("resize", [None, 10])
def test_an_image_that_is_cut_anywhere_or_damaged_is_rejected_shrunk_or_not(tmp_path, kind, resize):
    buffer = io.BytesIO()
    picture(1, (40, 30)).save(buffer, kind)
    data = buffer.getvalue()
    pairs = [Pair(f"cut by {n}", data[:-n], ("words",)) for n in (100, 400, len(data) - 200, len(data) - 10)]
    if kind == "PNG":
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        pairs.append(Pair("one bit", bytes(flipped), ("words",)))
    pairs.append(Pair("whole", data, ("words",)))
    packed = pack(pairs, tmp_path / "out", source="here", packing=Packing(resize=resize))
    check_complete(tmp_path / "out", pairs, packed)
    assert set(rejections(tmp_path / "out")) == {pair.source for pair in pairs[:-1]}


# ---------------------------------------------------------------------------------------------------------------------
# Names that are no text


def test_a_full_disk_is_an_error_that_names_the_tar(tmp_path):
    pairs = pairs_of(4, size=(100, 100))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*\.tar'$"):
            pack(pairs, tmp_path / "out", source="here", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_file_whose_name_is_not_utf8_stops_nothing(tmp_path):
    """As on disks that were written by other systems."""
    source = write_pairs(tmp_path / "src", 2)
    for name in (b"K\xe4fer.png", b"K\xe4se.png"):
        Path(os.fsdecode(bytes(source) + b"/" + name)).write_bytes(png(7))
    Path(os.fsdecode(bytes(source) + b"/K\xe4fer.txt")).write_text("words")
    pairs = read_pairs(source)
    packed = pack(pairs, tmp_path / "out", source="here")
    assert (packed.kept + packed.rejected, len(pairs)) == (4, 4)
    assert packed.kept >= 2
    rows = rejected_rows(tmp_path / "out")
    assert len(rows) == packed.rejected
    assert any("se.png" in row[1] for row in rows)


@pytest.mark.parametrize("field", ["image", "caption", "note"])
def test_half_a_surrogate_in_a_table_stops_nothing(tmp_path, field):
    """Half an emoji, as texts that were cut hold it."""
    write_pairs(tmp_path, 2)
    bad = {"image": "0001.png", "caption": "words", "note": "words"}
    bad[field] += "\ud83d"
    source = table(tmp_path / "t.jsonl", json.dumps({"image": "0000.png", "caption": "words"}), json.dumps(bad))
    packed = pack(read_pairs(source), tmp_path / "out", source="here")
    assert packed.kept + packed.rejected == 2
    assert packed.kept >= 1
    assert len(rejected_rows(tmp_path / "out")) == packed.rejected


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("resize", [None, 10])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_an_alpha_channel_is_kept_because_models_see_different_colours_under_it(tmp_path, mode, suffix, resize):
    """The shrunk one is Pillow's, which multiplies by the alpha channel."""
    image = picture(1, (40, 20)).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    folder = tmp_path / "in"
    folder.mkdir()
    image.save(folder / f"a.{suffix}")
    (folder / "a.txt").write_text("a cat")
    assert pack_folder(folder, tmp_path / "out", resize=resize).kept == 1
    (record,) = Shards(tmp_path / "out")
    stored = Image.open(io.BytesIO(record.image))
    expected = image if resize is None else image.resize((20, 10), Image.Resampling.BICUBIC)
    assert (stored.format, stored.mode) == ("PNG", mode)
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(expected))


@pytest.mark.parametrize("resize", [None, 10])
def test_a_transparent_palette_stays_one_because_models_see_different_colours_in_a_smaller_one(tmp_path, resize):
    image, folder = picture(1, (40, 20)).convert("RGB").quantize(7), tmp_path / "in"
    folder.mkdir()
    image.save(folder / "a.gif", transparency=3)
    (folder / "a.txt").write_text("a cat")
    assert pack_folder(folder, tmp_path / "out", resize=resize).kept == 1
    (record,) = Shards(tmp_path / "out")
    stored, original = Image.open(io.BytesIO(record.image)), Image.open(folder / "a.gif")
    assert (stored.format, stored.mode) == ("PNG", "P")
    np.testing.assert_array_equal(np.asarray(stored.convert("RGBA")), np.asarray(original.convert("RGBA")))


def test_a_screenshot_whose_alpha_hides_nothing_becomes_a_small_jpeg(tmp_path):
    image, folder = picture(1, (40, 20)).convert("RGBA"), tmp_path / "in"
    folder.mkdir()
    image.save(folder / "a.png")
    (folder / "a.txt").write_text("a cat")
    assert pack_folder(folder, tmp_path / "out", resize=10).kept == 1
    (record,) = Shards(tmp_path / "out")
    stored = Image.open(io.BytesIO(record.image))
    assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", (20, 10))


def test_a_disk_that_is_full_is_told_by_the_tar_that_does_not_fit(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(20):
        write_picture(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text("words")
    code = (
        "import resource; from miniclip.commands.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)); main(['shards', 'pictures', 'out'])"
    )
    done = warm.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 2
    assert "error: [Errno 27] File too large: 'out.partial/chunk-00000-train-0.tar'" in done.stderr
