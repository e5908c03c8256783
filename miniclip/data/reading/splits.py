"""The parts of data (train, val, test): by the names of files and folders, or by a table's column that names that of
each row: one called `split` (or `set`, `subset`, `partition`), else one whose every cell is such a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...common.wording import some
from .scan import LeftOut

SPLIT_COLUMNS = ("split", "set", "subset", "partition")
EQUAL_SPLITS = (
    ("train", "training", "trn", "restval"),
    ("val", "valid", "validation", "validate", "dev", "eval"),
    ("test", "testing", "tst"),
)


_ROLE_OF = {name: names[0] for names in EQUAL_SPLITS for name in names}
_FOLDER = re.compile(rf"(?:{'|'.join(SPLIT_COLUMNS)})=(.+)", re.I)  # as Spark and pandas partition
_SHARD = re.compile(r"(.+?)[-_.](?:([\d*]+-of-[\d*]+).*|[\d*]+)", re.S)  # testA-00000-of-00001, as the hub has them
_PART_NAMES = "|".join(_ROLE_OF)
_PART = re.compile(  # COCO's train2017, Kaggle's PublicTest
    rf"(?:(?:public|private)[-_ ]?)?({_PART_NAMES})(?:[-_ ]?(?:set|data|images?|split))?\d*", re.I
)
_FLAG = re.compile(r"is[_ ]?([a-z]+?)(?:[_ ](?:image|sample|row|set))?", re.I)


def role_of(name: str) -> str:
    """What a part of this name is for, "train", "val" or "test"; empty where the name says something else."""
    found = _PART.fullmatch(name)
    return _ROLE_OF[found[1].lower()] if found else ""


def different_splits(names: Iterable[str]) -> list[str]:
    """Those of the names that are parts, if they are so for two reasons at least, as train and test are; else none."""
    roles = {name: role for name in names if (role := role_of(name))}
    return sorted(roles) if len(set(roles.values())) > 1 else []


def split_in(name: str) -> str:
    """The part that a file's or a folder's name tells among other words: train-00000-of-00002, coco_test, split=val."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    found = [word if word in _ROLE_OF else role_of(word) for word in words if role_of(word)]  # trainset is train
    return found[0] if found and (len(set(found)) == 1 or role_of(words[0])) else ""


def _is_split_folder(name: str) -> bool:
    """Whether a folder says that its name is a split's: split=testA."""
    return _FOLDER.fullmatch(name) is not None


def _is_shard_of_split(name: str) -> bool:
    """Whether a file is called as Hugging Face's hub calls those of a split, known or not: testA-00000-of-00001."""
    found = _SHARD.fullmatch(name)
    return found is not None and found[2] is not None


def part_called(name: str) -> str:
    """A file's or a folder's name as that of a part: without a shard's number, and without `split=`."""
    name = found[1] if (found := _FOLDER.fullmatch(name)) else name
    return found[1] if (found := _SHARD.fullmatch(name)) else name


def splits_of_files(folder: Path, files: Iterable[Path]) -> dict[Path, str]:
    """The split of each file below a folder, by its name or a folder's; none of any where no name tells one.

    A name that tells no known split is a split's own at the level at which others tell theirs: of files, or of folders.
    In a folder `data` all before a shard's number is the split's name, as `datasets` has it: test_dev is not test.
    """
    names = {file: (file.stem, *reversed(file.relative_to(folder).parts[:-1])) for file in files}

    def levels(tells: Callable[[str], Any]) -> set[int]:
        return {level for each in names.values() for level, name in enumerate(each) if tells(name)}

    told = levels(split_in) or levels(_is_split_folder) or levels(_is_shard_of_split)
    if not told:
        return {}
    own = {file: part_called(each[min(*told, len(each) - 1)]) for file, each in names.items()}
    whole = {
        file: part_called(file.stem) for file in names if file.parent.name == "data" and _is_shard_of_split(file.stem)
    }
    return {file: next(filter(None, map(split_in, each)), own[file]) for file, each in names.items()} | whole


def splits_named(names: list[str], split: str | None) -> list[str]:
    """What `splits_of_files` found, if those are splits: one is known (of train, val and test), or asked for."""
    return names if split in names or any(map(role_of, names)) else []


def equal_splits(split: str) -> tuple[str, ...]:
    """The names of a part that mean the same as this one, itself among them."""
    return next((names for names in EQUAL_SPLITS if split in names), (split,))


def same_parts(there: Iterable[str], split: str) -> list[str]:
    """Those of the names that are this part, or mean the same; else those of the same purpose, if one of the two says
    no more: val and val2017, but not val2014 and val2017."""
    there, asked = list(there), split.strip().lower()
    plain = equal_splits(role_of(asked)) if role_of(asked) else ()
    return [name for name in there if name.lower() in equal_splits(asked)] or [
        name for name in there if role_of(name) in plain and not {name.lower(), asked}.isdisjoint(plain)
    ]


def split_among(there: Collection[str], split: str, source: str) -> str:
    """The part of this name, else the first that means the same.

    Raises:
        ValueError: there is none.
    """
    chosen = next((name for name in (split, *equal_splits(split)) if name in there), None)
    if chosen is None:
        raise ValueError(f"{source} has no split {split!r}; valid are {', '.join(there)}")
    return chosen


def choose_split(there: Sequence[str], split: str | None, source: str) -> str:
    """The part to evaluate on: the one that is asked for, by its name or the only one for the same; else the one for
    testing, or validation, or the only one that is not for training, or the only one.

    Raises:
        ValueError: there is none, or several may be meant.
    """
    found: list[str] = []
    if split is not None:
        found = [split] if split in there else same_parts(there, split)
    for role in ("test", "val") if split is None else ():
        usual = [name for name in equal_splits(role) if name in there][:1]
        found = found or usual or [name for name in there if role_of(name) == role]
    if split is None and not found:
        found = not_for_training(there) if len(there) > 1 else list(there)
    if len(found) != 1 or not found[0]:
        has = ", ".join(name or "blank cells" for name in there)
        raise ValueError(f"{source} has no split {split or 'test'!r}; it has {has}")
    return found[0]


def not_for_training(there: Iterable[str]) -> list[str]:
    """Those of the names that do not begin with train, blank ones too."""
    return [name for name in there if not (name.lower().startswith("train") or role_of(name) == "train")]


class Rows(list[dict[str, Any]]):
    """Rows in memory, and what of their file is none. `ParquetRows` and `DatasetsRows` have methods of these names.

    Args:
        chosen: the numbers that the rows have in their file; None for all of it.
    """

    left_out: tuple[LeftOut, ...] = ()
    note = ""
    taken_from: tuple[Any, Sequence[str]] | None = None  # of rows of one part: all rows, and the part of each

    def __init__(self, rows: Iterable[dict[str, Any]], chosen: Sequence[int] | None = None) -> None:
        super().__init__(rows)
        self.chosen = chosen

    def only(self, rows: Sequence[int]) -> Rows:
        return Rows((self[row] for row in rows), rows)

    def called(self, number: int) -> str:
        """What a row is called, by its number in the file."""
        return f"row {number}"

    def first_text(self, name: str) -> str:
        """The first value of a column, if it is a short text; else an empty one."""
        value = self[0].get(name) if self else ""
        return value if isinstance(value, str) else ""

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self]

    def whole(self, name: str) -> Sequence[Any]:
        """A column with all of its values, whatever they are."""
        return self.column(name)


def numbers_of(rows: Any) -> Sequence[int]:
    """The number that each row has in its own table, from 0, whichever of them were chosen."""
    chosen: Sequence[int] | None = getattr(rows, "chosen", None)
    return range(len(rows)) if chosen is None else chosen


def parts_in(columns: Sequence[str], rows: Any, split: str | None = None) -> tuple[str, list[str]]:
    """The column that names the part of each row, and the parts, sorted, "" if one is blank; none without one.

    Args:
        split: one that is asked for: of several columns that which has it.
    """
    column, parts = _part_of_each(columns, rows, equal_splits(split.strip().lower()) if split else ())
    return column, sorted(set(parts))


def has_split_column(columns: Sequence[str]) -> bool:
    return any(column.strip().lower() in SPLIT_COLUMNS for column in columns)


def unfollowed_column(columns: Sequence[str], rows: Any) -> str:
    """A column that may tell the parts where none is followed; empty if there is none. It tells one by yes and no, as
    is_train does and fastai's is_valid, which may also say that a row is sound; or it names two parts among others."""
    flags = ((column, _FLAG.fullmatch(column.strip())) for column in columns)
    may_tell = [column for column, flag in flags if flag and role_of(flag[1])]
    may_tell += (
        each for each in _begin_with_part(columns, rows) if len(_roles(map(split_in, _cells_as_parts(rows, each)))) > 1
    )
    return next(iter(may_tell), "")


def is_named(path: Path, split: str) -> bool:
    """Whether the name of a file, a pattern or a folder says that this part is what it holds."""
    name, part = path.resolve().name if path.is_dir() else path.stem, split.strip()
    told = role_of(name) if path.is_dir() else split_in(name)
    return told in equal_splits(role_of(part) or part.lower()) or part_called(name) == part


def is_all_of(split: str) -> bool:
    """Whether a source that tells of no parts is this one as a whole: what nobody holds out is for training."""
    return role_of(split.strip()) == "train"


def rows_of_split(
    source: str | Path, columns: Sequence[str], rows: Any, split: str, is_asked_for: bool = False, is_told: bool = False
) -> Any:
    """The rows of a part, and those of the others in `left_out`.

    Args:
        is_asked_for: by its name, so that it must be there. One that is only usual is not looked for where the column
            names no two parts, as train and test are, and none of train where val is usual: all rows are taken, and
            `note` says so.
        is_told: by the name of the file or the folder, so that it holds no other part.

    Raises:
        ValueError: there is no such part.
    """
    equal = equal_splits(split.strip().lower())
    column, parts = _part_of_each(columns, rows, equal if is_asked_for else ())
    wanted = set(same_parts(set(parts), split))
    there = sorted(set(parts) - {""})
    if not column and is_asked_for:
        if is_all_of(split):
            return rows
        raise ValueError(f"{source} has no split {split!r}; a column 'split' would name the part of each row")
    roles = _roles(parts)
    if not is_asked_for and len(roles) < 2 and (is_told or not ("train" in roles and "val" in equal)):
        if not set(there) <= wanted:
            rows.note = f", all rows: column {column!r} has {some(there, 3)}; --split takes those of one"
        elif not column and (other := unfollowed_column(columns, rows)):
            rows.note = f", all rows: column {other!r} is not followed, as one 'split' of parts' names would be"
        return rows
    if wanted.isdisjoint(parts):
        valid = some(there, 20) or "none, as it is blank"
        raise ValueError(f"{source} has no row whose column {column!r} is {split!r}; valid for --split are {valid}")
    return rows_with(rows, parts, wanted)


def rows_of_parts(columns: Sequence[str], rows: Any, wanted: Collection[str]) -> Any:
    """The rows of several of the parts that `parts_in` gives, and those of the others in `left_out`."""
    return rows_with(rows, _part_of_each(columns, rows)[1], wanted)


def rows_with(rows: Any, parts: Sequence[str], wanted: Collection[str]) -> Any:
    """The rows whose parts, one a row, are wanted, and those of the others in `left_out`."""
    kept = [row for row, part in enumerate(parts) if part in wanted]
    if len(kept) == len(parts):
        return rows
    left_out = [
        LeftOut(rows.called(row), f"a row of another split ({part or 'blank'})")
        for row, part in enumerate(parts)
        if part not in wanted
    ]
    chosen = rows.only(kept)
    chosen.left_out = (*getattr(rows, "left_out", ()), *left_out)
    chosen.taken_from = rows, parts
    return chosen


def _roles(parts: Iterable[str]) -> set[str]:
    return {role for part in parts if (role := role_of(part))}


def _part_of_each(columns: Sequence[str], rows: Any, wanted: Collection[str] = ()) -> tuple[str, list[str]]:
    """The column, and the part of each row in lower case, "" for a blank one. Of several columns that which has a part
    that is wanted, else that which names two parts, as train and test are. Where none is called as such columns are,
    one of another name (`phase`, `data set`) counts if it names two parts and its cells hold nothing else."""
    called = [column for column in columns if column.strip().lower() in SPLIT_COLUMNS]
    found = []
    for place, column in enumerate(called or _begin_with_part(columns, rows)):
        parts = _cells_as_parts(rows, column)
        names_two = len(_roles(parts)) > 1
        if called or (names_two and all(map(_is_plain_part, set(parts)))):
            index = SPLIT_COLUMNS.index(column.strip().lower()) if called else place
            found.append(((set(wanted).isdisjoint(parts), not names_two, index), column, parts))
    return min(found)[1:] if found else ("", [])


def _cells_as_parts(rows: Any, column: str) -> list[str]:
    return ["" if value is None or value != value else str(value).strip().lower() for value in rows.column(column)]


def _begin_with_part(columns: Iterable[str], rows: Any) -> list[str]:
    return [column for column in columns if _is_plain_part(rows.first_text(column))]


def _is_plain_part(name: str) -> bool:
    """Whether it is a part's name and nothing else; a folder of COCO's, train2014, may stand for where a picture is."""
    return bool(role_of(name.strip())) and not name.strip()[-1:].isdigit()
