"""A folder of pictures and texts -> pairs. Every file belongs to a pair, is rejected, or is left out by reason."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

from ...common.wording import counted, some
from .cells import NoCaptionsError, caption_lines, captions_of_facts, decode_text, encoding_of, names_picture, one_line
from .imagefolder import is_imagefolders, read_imagefolder
from .json_tables import parse_json
from .pair import Pair, Pairs
from .scan import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    LeftOut,
    Scan,
    image_files,
    is_skipped_folder,
    same_name,
    scan,
)
from .splits import different_splits, equal_splits, is_all_of, is_named, role_of, split_in
from .tables import what_else

# What only says what a file is, of a folder or before a suffix: images/a.jpg and captions/a.txt are a pair, as are
# a.image.jpg and a.caption.txt.
_ROLES = frozenset(
    {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "jpg", "jpgs", "jpeg", "jpegs", "png"}
    | {"text", "texts", "txt", "txts", "caption", "captions"}  # not labels: those of detectors are numbers
)

_LOOKED_INTO = 100  # files, or folders, where no picture has a text
_READ_AT_ONCE = 16
_TAKEOUT_LONGEST = 46  # characters that Google's Takeout leaves of a name before .json


def read_folder(
    folder: Path, split: str = "train", is_asked_for: bool = False, caption_columns: Sequence[str] = ()
) -> Pairs:
    """The pairs of pictures with a text of the same name: beside them (a.txt, a.caption, a.jpg.txt, a.json), in folders
    of their own (images/a.jpg, texts/a.txt), or with roles in their names (a.image.jpg, a.text.txt); or those that a
    `metadata.jsonl` (or .csv, .parquet) names, or several such tables, each the pictures in and below its own folder.

    Args:
        is_asked_for: as that of `rows_of_split`, unless the folder's name tells the split.
        caption_columns: of the tables; by default found by their names.

    Raises:
        ValueError: columns of a folder without such a table, neither pictures nor texts, pictures without texts beside
            a table that may have them, or no such split.
    """
    files = scan(folder)
    places = (folder, *(folder / name for name in equal_splits(split)))
    tables = [
        path
        for path in files.others
        if is_imagefolders(path, not caption_columns and (bool(files.texts) or path.parent not in places))
    ]
    if tables and (caption_columns or any(path.parent in places for path in tables) or not _match(files)[0]):
        return read_imagefolder(files, tables, split, is_asked_for, caption_columns)
    if caption_columns:
        raise ValueError(
            f"--caption-column can't be followed: {folder} is a folder, without a metadata.jsonl (or .csv, .parquet) "
            "whose column file_name names its pictures"
        )
    if is_asked_for and not is_named(folder, split):
        parts = pair_splits(folder)
        names = [str(place) for part in parts for place in parts[part]]
        there = f"; name one of its parts: {', '.join(names)}" if parts else ""
        if parts or not is_all_of(split):
            raise ValueError(f"{folder} is a folder of pairs, so --split {split} can't be followed{there}")
    if not files.images and not files.texts:
        raise ValueError(f"no pairs found in {folder}: it holds {_what_lies_in(files)}")
    return _pairs_by_name(files)


def pair_splits(folder: Path) -> dict[str, list[Path]]:
    """The parts of a folder's pairs, as train and test are, and the folders of each: right in it, else one folder
    below, as images/train; none where a table names the pairs."""
    below = [path for path in folder.iterdir() if not is_skipped_folder(path.name)]
    if any(path.is_file() and is_imagefolders(path, needs_captions=True) for path in below):
        return {}
    folders = [path for path in below if path.is_dir()]
    parts = different_splits(path.name for path in folders)
    if not parts:
        with_images = {image.relative_to(folder).parts[0] for image in image_files(folder)}
        inner = [each for path in folders for each in path.glob("*/")]
        parts = different_splits(path.name for path in inner if path.parent.name in with_images)
        folders = inner
    return {part: sorted(path for path in folders if path.name == part) for part in parts}


def same_sample(key: PurePath | str) -> str:
    """Equal for the picture and the text of a pair in folders of their own, or with roles in their names: the path
    without the roles.

    Args:
        key: the path without its suffix.
    """
    *folders, name = PurePath(key).parts
    stem, dot, role = name.rpartition(".")
    if dot and role.lower() in _ROLES:
        name = stem
    return same_name("/".join((*(folder for folder in folders if folder.lower() not in _ROLES), name)))


def preference(path: PurePath | str) -> tuple[int, str]:
    """Orders pictures of one name: photographs come first, as masks are stored without loss (.png)."""
    suffix = PurePath(path).suffix.lower()
    return (IMAGE_SUFFIXES.index(suffix) if suffix in IMAGE_SUFFIXES else len(IMAGE_SUFFIXES), str(path))


def _pairs_by_name(files: Scan) -> Pairs:
    folder = files.folder
    text_of, beside = _match(files)
    by_text: dict[Path, list[Path]] = defaultdict(list)
    for image, text in text_of.items():
        by_text[text].append(image)
    taken_for: dict[Path, Path] = {}  # pictures that lose their text to another of the same name
    for text, claimants in by_text.items():
        first, *others = sorted(claimants, key=lambda path: (path.stem != text.stem, preference(path)))
        taken_for |= dict.fromkeys(others, first)
    used = set(text_of.values())
    alone = [text for text in files.texts if text not in used and text not in beside]
    alone_set = set(alone)
    left_out = [
        LeftOut(str(text.relative_to(folder)), "another text for a picture that has one")
        for text in files.texts
        if text not in used and text not in alone_set
    ]
    left_out += files.left_out
    left_out += files.unread(path for path in files.others if path not in used)
    if not used and files.images and (tables := _possible_tables(files)):
        found = (
            f"{folder} holds {len(files.images)} images without a text beside them, and "
            f"{some([str(path.relative_to(folder)) for path in tables], 3)}"
        )
        if what := what_else(tables[0]):
            raise ValueError(f"{found}, which is {what}")
        where = _folder_of_pictures(files, tables[0])
        raise ValueError(
            f"{found}. If that has their captions, name it: miniclip shards {tables[0]} OUT --images {where}"
        )
    names = [str(path.relative_to(folder)) for path in (*files.images, *alone)]
    elsewhere = _by_stem(files)

    def read(index: int) -> Pair:
        name = names[index]
        if index >= len(files.images):
            text = alone[index - len(files.images)]
            hint = _hint(elsewhere, text, is_picture=False)
            return Pair(name, problem=f"no image: there is no {text.stem}.jpg, .png, … beside it{hint}")
        image = files.images[index]
        if image in taken_for:
            return Pair(name, problem=f"{taken_for[image].name} has the same name and is taken for their text")
        if image not in text_of:
            hint = _hint(elsewhere, image, is_picture=True)
            return Pair(name, problem=f"no captions: there is no {image.stem}.txt beside it{hint}")
        text = text_of[image]
        try:
            return Pair(name, image, tuple(_captions_of(text, image)))
        except FileNotFoundError:
            return Pair(name, problem=f"no captions: there is no {text.name} beside it")
        except OSError as error:
            return Pair(name, problem=f"{text.name} can't be read: {error}")
        except ValueError as error:
            return Pair(name, problem=str(error))

    forms = Counter((text.suffix.lower(), text.parent == image.parent) for image, text in text_of.items())
    found = " and ".join(
        f"the {suffix} {'beside each' if beside else 'in folders of their own'}" for suffix, beside in sorted(forms)
    )
    found = f"{counted(len(files.images), 'image')}, captions from {found or 'the .txt beside each'}"
    found += _all_of_splits(folder, text_of)
    read_from = [file for image in files.images for file in (image, text_of.get(image, image.with_suffix(".txt")))]
    return Pairs(names, read, found, [*read_from, *alone], left_out)


def _all_of_splits(folder: Path, text_of: Mapping[Path, Path]) -> str:
    """Which parts of a folder, or of one below it, are read together; empty if there are none."""
    for depth in (1, 2):
        place_of = {image: image.relative_to(folder).parts[:-1][:depth] for image in text_of}
        splits = different_splits({place[-1] for place in place_of.values() if len(place) == depth})
        place_of = {image: place for image, place in place_of.items() if len(place) == depth and place[-1] in splits}
        if splits:
            places = sorted({"/".join(place) for place in place_of.values()})
            is_apart = any(not text_of[image].is_relative_to(folder.joinpath(*place_of[image])) for image in place_of)
            remedy = "" if is_apart else ": name one of them to take it alone"
            return f", all of the folders {', '.join(places)}{remedy}"
    return ""


def _match(files: Scan) -> tuple[dict[Path, Path], set[Path]]:
    """The text of each picture that has one, and all that lie beside a picture under its name. Texts come before JSON,
    which programs put beside a picture as well, unless they hold no captions."""
    texts_of: dict[Path, list[Path]] = {}  # the best first
    beside: set[Path] = set()
    images_of_stem = Counter((image.parent, same_name(image.stem)) for image in files.images)
    cut = {image: _cut_by_takeout(image.name) for image in files.images if len(image.name) > _TAKEOUT_LONGEST}
    images_of_cut = Counter((image.parent, name) for image, name in cut.items())
    for captions in (files.texts, [path for path in files.others if path.suffix.lower() == ".json"]):
        by_name: dict[tuple[Path, str], list[Path]] = defaultdict(list)
        for path in captions:
            by_name[path.parent, same_name(_takeout_picture(path.stem))].append(path)
        for image in files.images:
            own = (image.stem, image.name)
            names = list(map(same_name, own))
            if images_of_stem[image.parent, names[0]] > 1:  # a.jpg.txt tells whose it is, where a.txt does not
                names.reverse()
            if captions is not files.texts and image in cut and images_of_cut[image.parent, cut[image]] == 1:
                names.append(same_name(cut[image]))
            for name in dict.fromkeys(names):
                if texts := by_name.get((image.parent, name)):
                    beside.update(texts)
                    texts_of.setdefault(image, []).extend(
                        sorted(texts, key=lambda path: (path.stem not in own, _text_rank(path), path))
                    )
        apart = _match_apart(files, captions, {image: texts[0] for image, texts in texts_of.items()})
        texts_of |= {image: [text] for image, text in apart.items()}
    return _best_texts(texts_of), beside


def _best_texts(texts_of: Mapping[Path, Sequence[Path]]) -> dict[Path, Path]:
    """The first text of each picture that holds captions, such as a.jpg.txt beside a detector's a.txt; else the first
    of all. JSON, which may be of a shop or a program, stands in where most texts of such a name hold none."""

    def written(image: Path) -> Path | None:
        texts = [text for text in texts_of[image] if text.suffix.lower() != ".json"]
        return next((text for text in texts if _has_captions(text, image)), None)

    several = [image for image, texts in texts_of.items() if len(texts) > 1]
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:  # a network's storage answers many as fast as one
        written_of = dict(zip(several, pool.map(written, several), strict=True))
    beside = Counter(_own_suffix(text, image) for image in several for text in texts_of[image])
    holding = Counter(_own_suffix(text, image) for image, text in written_of.items() if text)

    def best(image: Path, texts: Sequence[Path]) -> Path:
        if len(texts) == 1:
            return texts[0]
        if text := written_of[image]:
            return text
        suffixes = [_own_suffix(text, image) for text in texts if text.suffix.lower() != ".json"]
        if any(2 * holding[suffix] >= beside[suffix] for suffix in suffixes):
            return texts[0]
        return next((text for text in texts if text.suffix.lower() == ".json" and _has_captions(text, image)), texts[0])

    return {image: best(image, texts) for image, texts in texts_of.items()}


def _own_suffix(text: Path, image: Path) -> str:
    """What a text's name adds to its picture's: .txt, .jpg.txt."""
    return text.name.removeprefix(image.stem)


def _has_captions(text: Path, image: Path) -> bool:
    try:
        return any(map(one_line, _captions_of(text, image)))
    except NoCaptionsError:
        return False
    except (OSError, ValueError):  # of another encoding, say, which is reported where it is read
        return True


def _match_apart(files: Scan, captions: Iterable[Path], text_of: Mapping[Path, Path]) -> dict[Path, Path]:
    """Pictures and texts of one name in folders of their own, or with roles in their names, if there is one of each."""
    used = set(text_of.values())
    images_of, texts_of = defaultdict[str, list[Path]](list), defaultdict[str, list[Path]](list)
    for image in files.images:
        if image not in text_of:
            images_of[same_sample(image.relative_to(files.folder).with_suffix(""))].append(image)
    for text in captions if images_of else ():
        if text not in used:
            texts_of[same_sample(text.relative_to(files.folder).with_suffix(""))].append(text)
    return {images[0]: texts_of[key][0] for key, images in images_of.items() if len(images) == len(texts_of[key]) == 1}


def _takeout_picture(stem: str) -> str:
    """The picture of a JSON of Google's Takeout: that of `IMG(1).jpg` is IMG.jpg.supplemental-metadata(1).json, whose
    last word is cut where the name would be too long. Any other stem as it is."""
    name, number = re.fullmatch(r"(.*?)(\(\d+\))?", stem, re.S).groups("")  # type: ignore[union-attr]
    picture, _, word = name.rpartition(".")
    if "supplemental-metadata".startswith(word) and PurePath(picture).suffix.lower() in IMAGE_SUFFIXES:
        name = picture
    path = PurePath(name)
    return f"{path.stem}{number}{path.suffix}" if path.suffix.lower() in IMAGE_SUFFIXES else stem


def _cut_by_takeout(name: str) -> str:
    """What Google's Takeout leaves of a long name in that of its JSON, and then the number."""
    stem, number, suffix = re.fullmatch(r"(.*?)(\(\d+\))?(\.[^.]*)?", name, re.S).groups("")  # type: ignore[union-attr]
    return f"{stem}{suffix}"[:_TAKEOUT_LONGEST] + number


def _text_rank(path: Path) -> int:
    suffix = path.suffix.lower()
    return TEXT_SUFFIXES.index(suffix) if suffix in TEXT_SUFFIXES else len(TEXT_SUFFIXES)


def _captions_of(path: Path, image: Path) -> list[str]:
    text = decode_text(path.read_bytes(), path.name)
    if path.suffix.lower() != ".json":
        return caption_lines(text)
    try:
        captions = captions_of_facts(parse_json(text), image.name)
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON with a caption: {error}") from error
    if not captions:
        raise NoCaptionsError(f"no captions: there is no {image.stem}.txt beside it, and {path.name} has no caption")
    return captions


def _by_stem(files: Scan) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for path in (*files.images, *files.texts, *files.others):
        found[same_name(path.stem).casefold()].append(path)
    return found


def _hint(elsewhere: dict[str, list[Path]], path: Path, is_picture: bool) -> str:
    """The nearest file of the same name that may be meant, though it is of another kind or in another place."""
    others = [each for each in elsewhere.get(same_name(path.stem).casefold(), ()) if each != path]
    if is_picture:
        others = [each for each in others if each.suffix.lower() not in IMAGE_SUFFIXES]
    nearest = min(others, key=lambda each: -len(os.path.commonpath([path, each])), default=None)
    return f"; {nearest.name} lies in {nearest.parent}" if nearest else ""


def _possible_tables(files: Scan) -> list[Path]:
    """What may hold the captions of all pictures: tables, and files that begin with the names of some (Flickr8k's);
    those of train first. What is to be written as a table before comes last."""
    found = {path for path in files.others if path.suffix.lower() in (*TABLE_SUFFIXES, ".json", ".gz", ".xlsx")}
    names = {image.name for image in files.images}
    for path in (*files.texts, *files.others)[:_LOOKED_INTO]:
        if not _first_text(path).lstrip().startswith(("{", "[")):  # JSON is read by its suffix alone
            found |= {path} if any(PurePath(cell).name in names for cell in _first_cells(path)) else set()

    def is_for_another(path: Path) -> bool:
        return any(role_of(split_in(part)) in ("val", "test") for part in path.relative_to(files.folder).parts)

    return sorted(found, key=lambda path: (what_else(path) is not None, is_for_another(path), path))


def _folder_of_pictures(files: Scan, table: Path) -> Path:
    """The folder that a table's paths are relative to, if it is the same for all at its beginning; else the one that
    all pictures are below."""
    common = Path(os.path.commonpath([image.parent for image in files.images]))
    there, known = set(files.images), {image.name for image in files.images}
    names = [cell for cell in _first_cells(table) if names_picture(cell) and PurePath(cell).name in known]
    places = (table.parent, common, *dict.fromkeys(image.parent for image in files.images)) if names else ()
    return next((p for p in places[:_LOOKED_INTO] if all(p / name in there for name in names)), common)


def _first_text(path: Path) -> str:
    """What a file begins with, also as Latin-1, which old spreadsheets write and which is refused where it is read."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return ""
    return f"{head.decode(encoding_of(head), 'replace')}\n{head.decode('latin-1')}"


def _first_cells(path: Path) -> list[str]:
    text = _first_text(path)
    return [cell.strip() for cell in (*re.split(r"[\t\r\n,;|#\"]", text), *text.split()) if cell.strip()]


def _what_lies_in(files: Scan) -> str:
    wanted = f"no image ({', '.join(IMAGE_SUFFIXES)}) with a .txt of the same name beside it"
    kinds = Counter(path.suffix.lower() or "no suffix" for path in files.others)
    if not kinds:
        return wanted
    listed = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(5))
    examples: Sequence[str] = [str(path.relative_to(files.folder)) for path in files.others]
    return f"{wanted}, but {len(files.others)} other files ({listed}): {some(examples, 3)}"
