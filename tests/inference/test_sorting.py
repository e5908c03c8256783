"""Files in folders by class: none is lost or overwritten, and whatever happened is taken back."""

from __future__ import annotations

import doctest
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import everything_below

from miniclip.common.files import locked
from miniclip.inference import sorting
from miniclip.inference.sorting import Plan, folder_names, plan_sorting, sort_files, undo_sorting

CLASSES = ["none of these", "cat", "dog"]
ODD = os.fsdecode(b"caf\xe9 \xe5\x86\x99.jpg")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for name in ("a.jpg", "deep/a.jpg", "deep/er/A.JPG", "b.png", ODD):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the bytes of {os.fsencode(name)!r}")
        os.utime(folder / name, ns=(1_000_000_000, 2_000_000_000))
    return folder


def plan(photos: Path, out: Path, *, is_move: bool, most: int = 5) -> Plan:
    names = ["a.jpg", "deep/a.jpg", "deep/er/A.JPG", "b.png", ODD][:most]
    labels = ["cat", "cat", "cat", "dog", "none of these"][:most]
    return plan_sorting([photos / name for name in names], labels, CLASSES, out, is_move=is_move)


def contents(*folders: Path) -> set[bytes]:
    return {path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


SORTED = {
    "cat/a.jpg": "a.jpg", "cat/a (2).jpg": "deep/a.jpg", "cat/A (3).JPG": "deep/er/A.JPG", "dog/b.png": "b.png",
    f"none of these/{ODD}": ODD,
}  # fmt: skip


@pytest.mark.parametrize("is_move", [False, True], ids=["copy", "move"])
def test_files_go_into_folders_by_class_and_come_back(photos, tmp_path, is_move):
    before, out = everything_below(photos), tmp_path / "out"
    planned = plan(photos, out, is_move=is_move)
    assert not out.exists()
    assert planned.counts() == {"cat": 3, "dog": 1, "none of these": 1}
    done: list[int] = []
    assert sort_files(planned, done.append).num_files == 5
    assert done == [1, 2, 3, 4, 5]
    for name, original in SORTED.items():
        assert (out / name).read_bytes() == before[original]
        assert (out / name).stat().st_mtime_ns == 2_000_000_000
        assert (photos / original).exists() is not is_move
    back = undo_sorting(out)
    assert (back.num_files, back.problems) == (5, [])
    assert everything_below(photos) == before
    assert not out.exists()
    with pytest.raises(ValueError, match="no folder"):
        undo_sorting(out)


def test_nothing_is_overwritten_and_content_that_is_there_is_not_copied_again(photos, tmp_path):
    out = tmp_path / "out"
    (out / "cat").mkdir(parents=True)
    (out / "cat/a.jpg").write_text("mine")
    (out / "cat/A (2).JPG").write_bytes((photos / "deep/a.jpg").read_bytes())
    before = everything_below(out)
    first = plan(photos, out, is_move=False)
    assert (len(first.steps), first.num_there) == (4, 1)  # deep/a.jpg is there
    sort_files(first)
    assert before.items() <= everything_below(out).items()
    assert (out / "cat/a (3).jpg").read_bytes() == (photos / "a.jpg").read_bytes()
    again = plan(photos, out, is_move=False)
    assert (len(again.steps), again.num_there) == (0, 5)
    undo_sorting(out)
    assert everything_below(out) == before
    # A move keeps both: what was moved has to come back.
    assert len(plan(photos, out, is_move=True).steps) == 5


def test_a_file_that_comes_in_the_meantime_is_not_overwritten(photos, tmp_path):
    out = tmp_path / "out"
    planned = plan(photos, out, is_move=True)
    (out / "dog").mkdir(parents=True)
    (out / "dog/b.png").write_text("mine")
    (photos / "deep/a.jpg").unlink()
    done = sort_files(planned)
    assert done.num_files == 3
    assert len(done.problems) == 2
    assert "deep/a.jpg can't be moved: No such file" in done.problems[0]
    assert f"{out}/dog/b.png has come in the meantime" in done.problems[1]
    assert (out / "dog/b.png").read_text() == "mine"
    assert (photos / "b.png").exists()


def test_a_folder_is_sorted_in_place_as_often_as_one_likes(photos):
    before = everything_below(photos)
    files = [photos / "a.jpg", photos / "b.png"]
    sort_files(plan_sorting(files, ["cat", "dog"], CLASSES, photos, is_move=True))
    assert (photos / "cat/a.jpg").exists()
    again = plan_sorting([photos / "cat/a.jpg", photos / "dog/b.png"], ["cat", "cat"], CLASSES, photos, is_move=True)
    assert again.left == [f"{photos / 'cat/a.jpg'} is in its folder already"]
    sort_files(again)
    assert (photos / "cat/b.png").exists()
    moved = photos.rename(photos.with_name("elsewhere"))  # the list is of paths within it
    undo_sorting(moved)
    assert (moved / "dog/b.png").exists()
    undo_sorting(moved)
    assert everything_below(moved) == before


def test_links_are_copied_as_what_they_lead_to_and_never_moved(photos, tmp_path):
    link = photos / "link.jpg"
    link.symlink_to("a.jpg")
    moving = plan_sorting([link], ["cat"], CLASSES, tmp_path / "out", is_move=True)
    assert moving.steps == []
    assert moving.left == [f"{link} is a link, which is not moved"]
    sort_files(plan_sorting([link], ["cat"], CLASSES, tmp_path / "out", is_move=False))
    assert (tmp_path / "out/cat/link.jpg").read_bytes() == (photos / "a.jpg").read_bytes()
    assert not (tmp_path / "out/cat/link.jpg").is_symlink()


@pytest.mark.parametrize("is_move", [True, False], ids=["move", "copy"])
def test_a_file_that_is_found_again_through_a_linked_folder_goes_once(photos, tmp_path, is_move):
    out, before = tmp_path / "out", {name: data for name, data in everything_below(photos).items() if data is not None}
    (photos / "again").symlink_to("deep")
    names = ["again/a.jpg", "again/er/A.JPG", "b.png", "deep/a.jpg", "deep/er/A.JPG"]
    planned = plan_sorting([photos / name for name in names], ["cat"] * 5, CLASSES, out, is_move=is_move)
    assert len(planned.steps) == 3
    assert planned.left == [
        f"{photos}/deep/{name} is {photos}/again/{name} once more" for name in ("a.jpg", "er/A.JPG")
    ]
    done = sort_files(planned)
    assert (done.num_files, done.problems) == (3, [])
    assert len(list((out / "cat").iterdir())) == 3
    done = undo_sorting(out)
    assert (done.num_files, done.problems) == (3, [])
    assert {str(p.relative_to(photos)): p.read_bytes() for p in photos.rglob("*") if p.is_file()} == before


def other_disk() -> Path | None:
    shared = Path("/dev/shm")
    is_other = shared.is_dir() and shared.stat().st_dev != Path(tempfile.gettempdir()).stat().st_dev
    return shared if is_other and os.access(shared, os.W_OK) else None


@pytest.mark.skipif(other_disk() is None, reason="there is one disk only")
def test_files_move_to_another_disk_and_back(photos):
    before = everything_below(photos)
    with tempfile.TemporaryDirectory(dir=other_disk()) as disk:
        out = Path(disk, "out")
        assert sort_files(plan(photos, out, is_move=True)).num_files == 5
        assert [path for path in photos.rglob("*") if path.is_file()] == []
        assert set(filter(None, before.values())) < contents(out)
        assert undo_sorting(out).num_files == 5
        assert everything_below(photos) == before


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def killed_at(number: int, action: Callable[[], Any], *, is_other_disk: bool) -> bool:
    """Whether a process that does `action` was killed before the call of that number of those that change the disk."""
    if (pid := os.fork()) == 0:
        calls = 0

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                if function is replace and is_other_disk:
                    folders = {part for argument in arguments for part in Path(argument).parts} & {"photos", "out"}
                    if len(folders) == 2:
                        raise OSError(errno.EXDEV, "Invalid cross-device link")
                return function(*arguments, **options)

            return call

        try:
            replace = os.replace
            for module, name in (
                (os, "replace"), (os, "open"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (shutil, "copy2"),
                (shutil, "copystat"),
            ):  # fmt: skip
                setattr(module, name, watched(getattr(module, name)))
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize(
    ("is_move", "is_other_disk"),
    [*(pytest.param(is_move, False, marks=pytest.mark.long) for is_move in (False, True)), (True, True)],
    ids=["copy", "move", "to another disk"],
)
def test_a_sorting_that_is_killed_at_any_moment_loses_nothing_and_is_taken_back(
    photos, tmp_path, is_move, is_other_disk
):
    before, out = everything_below(photos), tmp_path / "out"
    originals = contents(photos)
    number = 1

    def sort() -> None:
        sort_files(plan(photos, out, is_move=is_move, most=2))

    while killed_at(number, sort, is_other_disk=is_other_disk):
        assert originals <= contents(photos, out)
        if list(out.glob(".miniclip/sorted-*.jsonl")):
            assert undo_sorting(out).problems == []
        assert everything_below(photos) == before
        shutil.rmtree(out, ignore_errors=True)  # its folder of lists, if none was written yet
        number += 1
    assert number > 10


@pytest.mark.long
@pytest.mark.parametrize("is_move", [pytest.param(False, marks=pytest.mark.long), True], ids=["copy", "move"])
def test_a_taking_back_that_is_killed_at_any_moment_is_gone_on_with(photos, tmp_path, is_move):
    before, out = everything_below(photos), tmp_path / "out"
    number = 1
    is_killed = True
    while is_killed:
        sort_files(plan(photos, out, is_move=is_move, most=2))
        is_killed = killed_at(number, lambda: undo_sorting(out), is_other_disk=number % 2 == 0)
        if list(out.glob(".miniclip/sorted-*.jsonl")):
            assert undo_sorting(out).problems == []
        assert everything_below(photos) == before
        assert contents(out) <= {b""}  # the lock of the one that was killed
        shutil.rmtree(out, ignore_errors=True)
        number += 1
    assert number > 10


# ---------------------------------------------------------------------------------------------------------------------
# What has changed since


def test_copies_that_are_more_than_copies_by_now_stay(photos, tmp_path):
    out = tmp_path / "out"
    sort_files(plan(photos, out, is_move=False))
    (out / "cat/a.jpg").write_text("retouched")
    (photos / "b.png").unlink()
    (out / "cat/a (2).jpg").rename(out / "dog/mine.jpg")
    done = undo_sorting(out)
    assert done.num_files == 2
    assert len(done.problems) == 2
    assert (
        f"{out}/dog/b.png stays: its original, {photos}/b.png, is gone; bring that back, or if it was deleted for "
        "good, delete or rename the copy by hand to be rid of this"
    ) in done.problems
    assert f"{out}/cat/a.jpg stays: it was changed since" in done.problems
    there = contents(out / "cat", out / "dog")
    assert sorted(there) == sorted([b"retouched", b"the bytes of b'b.png'", b"the bytes of b'deep/a.jpg'"])
    (photos / "b.png").write_bytes((out / "dog/b.png").read_bytes())
    assert undo_sorting(out).problems == []  # of what was changed or renamed it says no more
    assert sorted(contents(out)) == sorted([b"retouched", b"the bytes of b'deep/a.jpg'"])
    with pytest.raises(ValueError, match="has no list of files"):
        undo_sorting(out)


def test_copies_whose_originals_are_on_a_disk_that_is_away_are_taken_back_once_it_is_there(photos, tmp_path):
    out, before = tmp_path / "out", everything_below(photos)
    sort_files(plan(photos, out, is_move=False))
    away = photos.rename(tmp_path / "away")
    for _ in range(2):
        done = undo_sorting(out)
        assert (done.num_files, len(done.problems)) == (0, 5)
        assert len(contents(out)) == 5 + 1  # and the list
    away.rename(photos)
    done = undo_sorting(out)
    assert (done.num_files, done.problems) == (5, [])
    assert everything_below(photos) == before
    assert not out.exists()


def test_moved_files_that_were_corrected_by_hand_never_come_back_under_each_others_names(photos, tmp_path):
    out, before = tmp_path / "out", everything_below(photos)
    sort_files(plan(photos, out, is_move=True))  # all are of one time
    (out / "cat/a.jpg").rename(out / "dog/a.jpg")  # is a dog
    (out / "cat/a (2).jpg").rename(out / "cat/a.jpg")  # loses its number
    (out / "dog/b.png").write_text("retouched")
    (out / "cat/A (3).JPG").touch()
    done = undo_sorting(out)
    assert done.num_files == 2
    assert done.problems == [
        f"{out}/dog/b.png stays: it is another file than the one that came from {photos}/b.png, or was changed since; "
        "move it by hand",
        f"{out}/cat/a (2).jpg is not there any more, and not at {photos}/deep/a.jpg either",
        f"{out}/cat/a.jpg stays: it is another file than the one that came from {photos}/a.jpg, or was changed since; "
        "move it by hand",
    ]
    there = {name: content for name, content in everything_below(photos).items() if content is not None}
    assert there == {name: before[name] for name in ("deep/er/A.JPG", ODD)}
    assert (out / "cat/a.jpg").read_bytes() == before["deep/a.jpg"]
    # The list still has where the first came from.
    (out / "dog/a.jpg").replace(out / "cat/a.jpg")
    done = undo_sorting(out)
    assert (done.num_files, len(done.problems)) == (1, 1)
    assert (photos / "a.jpg").read_bytes() == before["a.jpg"]


@pytest.mark.parametrize("position", [0, 70_000, 140_000, 999_999])
def test_large_files_of_one_size_are_told_apart(photos, tmp_path, position):
    out, content = tmp_path / "out", bytearray(os.urandom(1000) * 1000)
    (photos / "a.jpg").write_bytes(content)
    sort_files(plan(photos, out, is_move=True, most=1))
    # Of compressed pictures all that follows is another, too.
    other = bytes(each ^ 1 for each in content[position:])
    (out / "cat/a.jpg").write_bytes(content[:position] + other)
    assert len(undo_sorting(out).problems) == 1
    (out / "cat/a.jpg").write_bytes(content)
    assert undo_sorting(out).problems == []
    assert (photos / "a.jpg").read_bytes() == content


def test_a_list_that_an_earlier_version_wrote_is_taken_back(photos, tmp_path):
    before, out = everything_below(photos), tmp_path / "out"
    sort_files(plan(photos, out, is_move=True))
    path = out / ".miniclip/sorted-1.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "content"}) + "\n" for row in rows))
    assert path.read_text().count('"content"') == 0
    assert undo_sorting(out).problems == []
    assert everything_below(photos) == before


@pytest.mark.parametrize("is_move", [True, False], ids=["move", "copy"])
def test_a_file_whose_old_path_is_a_link_to_it_is_not_deleted(photos, tmp_path, is_move):
    before, out = everything_below(photos), tmp_path / "out"
    originals = contents(photos)
    sort_files(plan(photos, out, is_move=is_move))
    steps = {each.name: each for each in out.rglob("*.jpg")} | {each.name: each for each in out.rglob("*.png")}
    for name in ("a.jpg", "b.png"):
        (photos / name).unlink(missing_ok=True)
        (photos / name).symlink_to(steps[name])
    done = undo_sorting(out)
    if is_move:
        assert (done.problems, everything_below(photos)) == ([], before)
    else:
        assert sorted(done.problems) == [
            f"{steps[name]} stays: with {photos / name} it is one file, by a link" for name in ("a.jpg", "b.png")
        ]
    assert sorted(set(contents(photos, out))) == sorted(set(originals))


def test_a_folder_that_is_a_link_to_the_sorted_one_loses_nothing(photos, tmp_path):
    out = tmp_path / "out"
    sort_files(plan_sorting([photos / "b.png"], ["dog"], CLASSES, out, is_move=True))
    (photos / "b.png").parent.rename(tmp_path / "elsewhere")
    photos.symlink_to(out / "dog")
    done = undo_sorting(out)
    assert done.problems == [f"{out}/dog/b.png stays: with {photos}/b.png it is one file, by a link"]
    assert (out / "dog/b.png").read_bytes() == b"the bytes of b'b.png'"


def test_what_has_another_file_in_its_way_comes_back_once_the_way_is_free(photos, tmp_path):
    before, out = everything_below(photos), tmp_path / "out"
    sort_files(plan(photos, out, is_move=True))
    (photos / "a.jpg").write_text("new")
    (out / "dog/b.png").unlink()
    done = undo_sorting(out)
    assert done.num_files == 3
    assert f"{out}/dog/b.png is not there any more, and not at {photos}/b.png either" in done.problems
    assert f"{out}/cat/a.jpg stays: another file is in its way, {photos}/a.jpg" in done.problems
    (photos / "a.jpg").unlink()
    assert undo_sorting(out).problems == []
    assert everything_below(photos) == {name: content for name, content in before.items() if name != "b.png"}
    assert not out.exists()


def test_the_last_of_several_sortings_is_taken_back_first(photos, tmp_path):
    out = tmp_path / "out"
    sort_files(plan_sorting([photos / "a.jpg"], ["cat"], CLASSES, out, is_move=False))
    sort_files(plan_sorting([photos / "b.png"], ["dog"], CLASSES, out, is_move=False))
    undo_sorting(out)
    assert sorted(path.name for path in out.iterdir()) == [".miniclip", "cat"]
    undo_sorting(out)
    assert not out.exists()


@pytest.mark.parametrize("is_move", [True, False], ids=["move", "copy"])
def test_what_can_never_be_taken_back_bars_no_earlier_sorting(photos, tmp_path, is_move):
    out = tmp_path / "out"
    sort_files(plan_sorting([photos / "a.jpg"], ["cat"], CLASSES, out, is_move=is_move))
    sort_files(plan_sorting([photos / "b.png", photos / ODD], ["dog"] * 2, CLASSES, out, is_move=is_move))
    if is_move:
        (out / "dog/b.png").write_text("retouched")
    else:
        (photos / "b.png").unlink()
    for num_files, left in ((1, {"cat/a.jpg", "dog/b.png"}), (1, {"dog/b.png"}), (0, {"dog/b.png"})):
        done = undo_sorting(out)
        assert (done.num_files, len(done.problems)) == (num_files, 1)
        assert f"{out}/dog/b.png stays" in done.problems[0]
        assert {str(path.relative_to(out)) for path in out.glob("[!.]*/*")} == left
    (out / "dog/b.png").unlink()
    undo_sorting(out)
    assert not out.exists()  # it was made for the first


def test_a_file_that_was_sorted_twice_comes_back_by_both_lists(photos, tmp_path):
    before, out = everything_below(photos), tmp_path / "out"
    sort_files(plan_sorting([photos / "a.jpg", photos / "b.png"], ["cat"] * 2, CLASSES, out, is_move=True))
    sort_files(plan_sorting([out / "cat/a.jpg"], ["dog"], CLASSES, out, is_move=True))
    (out / "dog/a.jpg").write_text("retouched")
    done = undo_sorting(out)
    assert (done.num_files, len(done.problems)) == (1, 1)  # b.png; where a.jpg came from stays in both lists
    assert (photos / "b.png").exists()
    (out / "dog/a.jpg").write_bytes(before["a.jpg"])
    for _ in range(2):
        assert undo_sorting(out).problems == []
    assert everything_below(photos) == before
    assert not out.exists()


def test_a_changed_copy_without_its_original_is_named_once(photos, tmp_path):
    out = tmp_path / "out"
    sort_files(plan_sorting([photos / "a.jpg", photos / "b.png"], ["cat"] * 2, CLASSES, out, is_move=False))
    (out / "cat/a.jpg").write_text("retouched")
    (photos / "a.jpg").unlink()
    done = undo_sorting(out)
    assert done.problems == [f"{out}/cat/a.jpg stays: it was changed since, and its original, {photos}/a.jpg, is gone"]
    assert everything_below(out) == {"cat": None, "cat/a.jpg": b"retouched"}


def test_a_damaged_list_is_named_and_two_processes_do_not_sort_into_one_folder(photos, tmp_path):
    out = tmp_path / "out"
    sort_files(plan(photos, out, is_move=False))
    with (
        locked(out / sorting.LISTS / "lock", ""),
        pytest.raises(ValueError, match=f"another process sorts files in {out}"),
    ):
        sort_files(plan(photos, out / "..", is_move=False)) if False else undo_sorting(out)
    (out / ".miniclip/sorted-1.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"sorted-1\.jsonl is not a list of sorted files"):
        undo_sorting(out)


def test_a_list_that_someone_else_wrote_reaches_no_file_outside_the_folder(tmp_path):
    (tmp_path / "secret").write_text("mine")
    for number, name in enumerate(("../secret", str(tmp_path / "secret")), 1):
        folder = tmp_path / f"gift {number}"
        (folder / ".miniclip").mkdir(parents=True)
        rows = [{"version": 1, "is_move": True, "is_new": False}, {"from": "stolen", "to": name}]
        (folder / ".miniclip/sorted-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match="is not in the folder"):
            undo_sorting(folder)
    assert (tmp_path / "secret").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("a red car", "a red car"), ("AC/DC", "AC_DC"), ("what?", "what_"), ("..", "__"), (".hidden", "_hidden"),
        ("end.", "end_"), ("nul", "nul_"), ("COM1.x", "COM1.x_"), ("", "_"), ("a\nb\0", "a_b_"), ("a.tmp", "_a.tmp_"),
        ("x" * 300, "x" * 200), ("写" * 100, "写" * 66), ("e\u0301", "é"), ("Thumbs.db", "_Thumbs.db_"),
        ("__pycache__", "___pycache___"),
    ],
)  # fmt: skip
def test_names_of_classes_become_legal_names_of_folders(name, folder):
    assert folder_names([name]) == {name: folder}


def test_the_example_is_right():
    assert doctest.testmod(sorting).failed == 0


def test_classes_never_share_a_folder():
    classes = ["Cat", "cat", "CAT", "a/b", "a:b", "a_b", "straße", "STRASSE", "é", "e\u0301"]
    folders = folder_names(classes)
    assert len({folder.casefold() for folder in folders.values()}) == len(folders) == len(classes)
