"""Files into folders by class, and back: nothing is overwritten, and a list in the folder tells what to take back.

The list is written before the first file is touched, and what became of each file is seen on the disk: a sorting that
was killed at any moment can be taken back, and so can a taking back be gone on with.

FOLDER/cat/a.jpg                a file of the class "cat"
FOLDER/.miniclip/sorted-1.jsonl the list of the first sorting: a line for the whole, then one for each file
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from ..common.files import locked, sync, write_text
from ..common.wording import reason_of
from ..data.reading.scan import is_skipped_folder, same_name

LISTS = ".miniclip"
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # no other file would fare better
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)  # no file of these names on Windows
_MOST_FOLDER_BYTES = 200  # of a folder's name; file systems allow 255
_NUM_SAMPLES, _SAMPLE_BYTES = 8, 16 * 1024  # of a file, to recognise it by


# ---------------------------------------------------------------------------------------------------------------------
# Names of folders


def folder_names(classnames: Sequence[str]) -> dict[str, str]:
    """A folder's name for each class: legal on every system, not hidden, and unequal where case does not count.

    >>> folder_names(["cat", "Cat", "a/b", "a:b", "..", "con"])
    {'cat': 'cat', 'Cat': 'Cat (2)', 'a/b': 'a_b', 'a:b': 'a_b (2)', '..': '__', 'con': 'con_'}
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(classnames):
        found[name] = next(each for each in _numbered_names(_legal_name(name), "") if _name_key(each) not in taken)
        taken.add(_name_key(found[name]))
    return found


def _legal_name(name: str) -> str:
    legal = _FORBIDDEN.sub("_", same_name(name)).strip()
    legal = re.sub(r"^\.+|[. ]+$", lambda found: "_" * len(found[0]), legal) or "_"
    while len(os.fsencode(legal)) > _MOST_FOLDER_BYTES:
        legal = legal[:-1].rstrip(". ")
    legal = f"{legal}_" if _DEVICES.fullmatch(legal) else legal
    # A folder of a name that systems leave behind would not be read as a class.
    return f"_{legal}_" if is_skipped_folder(legal) else legal


def _numbered_names(stem: str, suffix: str, first: int = 1) -> Iterator[str]:
    """a.jpg, a (2).jpg, a (3).jpg, …"""
    for number in count(first):
        yield f"{stem}{f' ({number})' if number > 1 else ''}{suffix}"


def _name_key(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


# ---------------------------------------------------------------------------------------------------------------------
# What is to be done


@dataclass(frozen=True)
class Step:
    """A file, and where it goes.

    Args:
        content: what the file is recognised by, as the list has it; None if it is not known.
    """

    source: Path
    target: Path
    content: str | None = None


@dataclass(frozen=True)
class Plan:
    """A sorting, before anything is done.

    Args:
        folder: what the folders of the classes are in.
        is_move: whether files are moved, or else copied.
        steps: a file each.
        num_there: copies that are there already, as from an earlier run.
        left: why other files stay as they are.
    """

    folder: Path
    is_move: bool
    steps: Sequence[Step]
    num_there: int = 0
    left: Sequence[str] = ()

    def counts(self) -> Counter[str]:
        """Files by the folders that they go to."""
        return Counter(step.target.parent.name for step in self.steps)


def plan_sorting(
    files: Sequence[Path], labels: Sequence[str], classnames: Sequence[str], folder: str | Path, *, is_move: bool
) -> Plan:
    """Where each file goes. A name that is taken gets a number; content that is there is not copied again.

    A file that comes twice, as it does through a link to its folder, goes once.

    Args:
        files: N of them.
        labels: N classes, of `classnames`.
        folder: for the folders of the classes; need not be there.

    Raises:
        ValueError: a file has the name of a class's folder.
    """
    folder = Path(folder).absolute()
    into = {name: folder / each for name, each in folder_names(classnames).items()}
    there: dict[str, _Names] = {}  # in the folder of each class
    steps, left, num_there = [], [], 0
    first: dict[Path, Path] = {}  # of the names of one file, by way of linked folders
    for source, label in zip(files, labels, strict=True):
        if label not in there:
            there[label] = _Names(into[label])
        entry = _entry(source)
        if entry in first:
            left.append(f"{source} is {first[entry]} once more")
        elif is_move and source.is_symlink():
            left.append(f"{source} is a link, which is not moved")
        elif source.parent.resolve() == into[label].resolve():
            left.append(f"{source} is in its folder already")
        elif not is_move and there[label].has_content_of(source):
            num_there += 1
        else:
            steps.append(Step(source.absolute(), into[label] / there[label].take(source)))
        first.setdefault(entry, source)
    return Plan(folder, is_move, steps, num_there, left)


class _Names:
    """The names in a folder, those that are there and those that are planned, each with the file of its content."""

    def __init__(self, folder: Path) -> None:
        self.taken: set[str] = set()
        self.files: dict[tuple[str, int], list[Path]] = {}  # by name without number, and by size
        self.numbers: dict[str, int] = {}  # the last that was given, by name
        for path in _entries(folder):
            self._add(path.name, path)

    def _add(self, name: str, content: Path) -> None:
        self.taken.add(_name_key(name))
        with suppress(OSError):
            self.files.setdefault((_unnumbered(name), content.stat().st_size), []).append(content)

    def has_content_of(self, source: Path) -> bool:
        """Whether a file of this name, perhaps with a number, has the same bytes."""
        with suppress(OSError):
            alike = self.files.get((_unnumbered(source.name), source.stat().st_size), ())
            return any(_have_equal_bytes(source, each) for each in alike)
        return False

    def take(self, source: Path) -> str:
        """A name that no file has."""
        key = _name_key(source.name)
        for number, name in enumerate(_numbered_names(source.stem, source.suffix, self.numbers.get(key, 0) + 1)):
            if _name_key(name) not in self.taken:
                self.numbers[key] = self.numbers.get(key, 0) + 1 + number
                self._add(name, source)
                return name
        raise AssertionError("numbers do not end")


def _unnumbered(name: str) -> str:
    path = Path(name)
    return _name_key(re.sub(r"( \(\d+\))+$", "", path.stem) + path.suffix)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise ValueError(f"{folder} is a file, and the folder of a class needs its name") from error


def _have_equal_bytes(one: Path, other: Path) -> bool:
    try:
        return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Doing it


@dataclass
class Done:
    """What was done: the number of files, and the problems of those with which it could not be done."""

    num_files: int = 0
    problems: list[str] = field(default_factory=list)


def sort_files(plan: Plan, progress: Callable[[int], Any] | None = None) -> Done:
    """Carries a plan out.

    Args:
        progress: called with the number of files done.

    Raises:
        ValueError: another process sorts into the folder.
        OSError: the folder can't be written, or its disk is full; what is done is in the list.
    """
    done = Done()
    if not plan.steps:
        return done
    is_new = not plan.folder.exists()
    with _held(plan.folder):
        _write_list(plan, is_new)
        for number, step in enumerate(plan.steps, 1):
            step.target.parent.mkdir(exist_ok=True)
            try:
                _bring(step.source, step.target, plan.is_move)
                done.num_files += 1
            except OSError as error:
                if error.errno in _FATAL:
                    raise
                done.problems.append(f"{step.source} can't be {'moved' if plan.is_move else 'copied'}: {_why(error)}")
            if progress:
                progress(number)
    return done


def _held(folder: Path) -> Any:
    return locked(folder / LISTS / "lock", f"another process sorts files in {folder}", patience_s=0)


def _why(error: OSError) -> str:
    if isinstance(error, FileExistsError):
        return f"{error.filename} has come in the meantime"
    return error.strerror or str(error)


def _bring(source: Path, target: Path, is_move: bool) -> None:
    """Copies or moves a file to a name that is free; raises FileExistsError if it no longer is."""
    if is_move:
        try:
            with _reserved(target):
                os.replace(source, target)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:  # another disk
                raise
    part = _part_of(target)
    try:
        shutil.copy2(source, part)
        if is_move:  # the original goes, so its copy has to be on the disk
            with open(part, "rb+") as file:
                sync(file)
        with _reserved(target):
            os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    if is_move:
        try:
            source.unlink()
        except OSError:
            target.unlink()
            raise


@contextmanager
def _reserved(target: Path) -> Iterator[None]:
    """An empty file in the place of the one that then replaces it, so that no other gets its name."""
    descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    ours = os.fstat(descriptor).st_ino
    os.close(descriptor)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if target.stat().st_ino == ours:
                target.unlink()
        raise


def _part_of(target: Path) -> Path:
    """A copy that is not complete; the name is short, whatever the target's is, and readers of folders leave it out."""
    return target.with_name(f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.part")


# ---------------------------------------------------------------------------------------------------------------------
# Taking it back


def undo_sorting(folder: str | Path, progress: Callable[[int], Any] | None = None) -> Done:
    """Takes the last sorting into a folder back: files that were moved return, and copies are deleted.

    A copy that was changed stays, and is no longer listed. A copy whose original is gone, as that of a disk that is
    away, stays listed, as do a moved file in whose place is another one, or that was changed, and what has another
    file in its way. If that is all that the last list has left, the list before it is taken back, and so on; the
    problems name what stays of each. A file that has yet to come back from a later sorting waits for it.

    Raises:
        ValueError: no sorting is listed there.
    """
    folder = Path(folder).absolute()
    paths = _lists_from_last(folder)
    done, waiting = Done(), _Waiting(folder)
    numbers = count(1)

    def return_files(steps: Sequence[Step], is_move: bool) -> list[Step]:
        """Those that stay listed."""
        open_steps = []
        for step in reversed(steps):
            try:
                if waiting.has(step.target):
                    open_steps.append(step)
                else:
                    done.num_files += _return_file(step, is_move)
            except _StaysError as reason:
                done.problems.append(str(reason))
            except (OSError, ValueError) as error:
                done.problems.append(str(error))
                open_steps.append(step)
            if progress:
                progress(next(numbers))
        return open_steps[::-1]

    with _held(folder):
        for path in paths:
            facts, steps = _read_list(path, folder)
            open_steps = return_files(steps, facts["is_move"])
            for into in {step.target.parent for step in steps}:
                _remove_empty(into)
            if open_steps:
                waiting.add(path, facts, open_steps)
            else:
                waiting.inherit(facts)
                path.unlink()
            if done.num_files or not open_steps:
                break
    _remove_empty(folder / LISTS)
    if facts["is_new"]:
        _remove_empty(folder)
    return done


class _Waiting:
    """The lists of which something is still to be taken back, while those before them are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: set[Path] = set()
        self.first: tuple[Path, dict[str, Any], Sequence[Step]] | None = None

    def has(self, target: Path) -> bool:
        """Whether a file has yet to come back to this path."""
        return _entry(target) in self.sources

    def add(self, path: Path, facts: dict[str, Any], steps: Sequence[Step]) -> None:
        write_text(path, _as_lines(facts, steps, self.folder))
        self.sources.update(_entry(step.source) for step in steps)
        self.first = self.first or (path, facts, steps)

    def inherit(self, facts: dict[str, Any]) -> None:
        """Of a list that goes: that the folder was made for it, and goes with the last file."""
        if self.first and facts["is_new"]:
            path, own, steps = self.first
            write_text(path, _as_lines({**own, "is_new": True}, steps, self.folder))


def _entry(path: Path) -> Path:
    """The same by whichever links to its folder; the file itself may be one."""
    return path.parent.resolve() / path.name


class _StaysError(Exception):
    """What happened to a file since, after which it is nobody's to take back."""


def _return_file(step: Step, is_move: bool) -> bool:
    """Whether there was something to do.

    Raises:
        ValueError: nothing can be done as things are.
    """
    source, target = step.source, step.target
    for path in (source, target):
        _part_of(path).unlink(missing_ok=True)
    if not os.path.lexists(target):
        if is_move and not os.path.lexists(source):
            raise _StaysError(f"{target} is not there any more, and not at {source} either")
        return False
    is_one_file = source.resolve() == target.resolve()
    if is_one_file and not (is_move and source.is_symlink()):
        raise _StaysError(f"{target} stays: with {source} it is one file, by a link")
    if not is_one_file and (_is_reserved(target, source) or _have_equal_bytes(source, target)):
        target.unlink()
        return True
    if not is_move and source.exists():
        raise _StaysError(f"{target} stays: it was changed since")
    if not is_move and (target.is_symlink() or _is_changed(step)):
        raise _StaysError(f"{target} stays: it was changed since, and its original, {source}, is gone")
    if not is_move:
        raise ValueError(
            f"{target} stays: its original, {source}, is gone; bring that back, or if it was deleted for good, delete "
            "or rename the copy by hand to be rid of this"
        )
    if step.content is not None and (target.is_symlink() or _content(target) != step.content):
        raise ValueError(
            f"{target} stays: it is another file than the one that came from {source}, or was changed since; move it "
            "by hand"
        )
    if is_one_file or _is_reserved(source, target):  # by who keeps the old path working; by a killed taking back
        source.unlink()
    if os.path.lexists(source):
        raise ValueError(f"{target} stays: another file is in its way, {source}")
    source.parent.mkdir(parents=True, exist_ok=True)
    _bring(target, source, is_move=True)
    return True


def _is_changed(step: Step) -> bool:
    """Whether a copy is known to be another file by now; an empty one may be a killed process's."""
    return step.content is not None and step.target.stat().st_size > 0 and _content(step.target) != step.content


def _is_reserved(path: Path, other: Path) -> bool:
    """Whether this is the empty file of a killed process, and the other what should have replaced it."""
    return path.exists() and other.exists() and path.stat().st_size == 0 < other.stat().st_size


def _content(path: Path) -> str:
    """The same wherever a file is moved: a digest of its size and of samples of its bytes, all of them of a small one.

    Times and inodes would be cheaper, but other disks round the one and number the other anew.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size} ".encode())
        for number in range(_NUM_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# The list


def _lists(folder: Path) -> dict[int, Path]:
    """The lists of a folder by their numbers."""
    found = {path: re.fullmatch(r"sorted-(\d+)\.jsonl", path.name) for path in _entries(folder / LISTS)}
    return {int(match[1]): path for path, match in found.items() if match}


def _lists_from_last(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    there = _lists(folder)
    if not there:
        raise ValueError(f"{folder} has no list of files that were sorted into it ({LISTS}/sorted-1.jsonl)")
    return [there[number] for number in sorted(there, reverse=True)]


def _write_list(plan: Plan, is_new: bool) -> None:
    number = max(_lists(plan.folder), default=0) + 1
    facts = {"version": 1, "is_move": plan.is_move, "is_new": is_new}
    steps = [_recognisable(step) for step in plan.steps]
    write_text(plan.folder / LISTS / f"sorted-{number}.jsonl", _as_lines(facts, steps, plan.folder))


def _recognisable(step: Step) -> Step:
    with suppress(OSError):  # it can't be moved either, or only unread
        return replace(step, content=_content(step.source))
    return step


def _as_lines(facts: dict[str, Any], steps: Sequence[Step], folder: Path) -> str:
    """Paths within the folder are relative to it, so that it may be moved. Bytes that are no UTF-8 are escaped."""

    def written(path: Path) -> str:
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def row(step: Step) -> dict[str, str]:
        content = {} if step.content is None else {"content": step.content}
        return {"from": written(step.source), "to": written(step.target), **content}

    return "".join(json.dumps(each) + "\n" for each in [facts, *map(row, steps)])


def _read_list(path: Path, folder: Path) -> tuple[dict[str, Any], list[Step]]:
    try:
        facts, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if facts["version"] != 1:
            raise ValueError(f"version {facts['version']!r}, and this miniclip reads 1")
        if leads_out := [row["to"] for row in rows if Path(row["to"]).is_absolute() or ".." in Path(row["to"]).parts]:
            raise ValueError(f"{leads_out[0]!r} is not in the folder")
        # A list of before files were recognised has no content.
        return facts, [Step(folder / row["from"], folder / row["to"], row.get("content")) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of sorted files, or a damaged one: {reason_of(error)}") from error
