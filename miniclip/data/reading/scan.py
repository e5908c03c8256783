"""The files below a folder, each once: pictures, texts, others, and what is left out, by reason.

Training, packing and evaluation use this one list, so that they agree about what a folder holds. Linked folders are
followed, as torchvision's ImageFolder does."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...common.wording import some

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jpg_large", ".webp", ".png", ".apng",
    ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx",
)  # fmt: skip
TEXT_SUFFIXES = (".txt", ".caption", ".captions", ".cap", ".text")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
UNREAD_PICTURES = (
    ".heic", ".heif", ".jxl", ".ico", ".tga", ".exr", ".hdr", ".svg", ".psd", ".eps",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf",
    ".nrw", ".sr2", ".srf", ".srw", ".pef", ".raw", ".rwl", ".gpr",
    ".3fr", ".fff", ".iiq", ".mos", ".mef", ".erf", ".kdc", ".dcr",
)  # fmt: skip
_LEFTOVER_NAMES = frozenset(
    {  # of macOS, Windows, network storage, and others
        "__macosx", ".ds_store", "icon\r", ".localized", ".apdisk", ".appledouble", ".appledb", ".appledesktop",
        "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler",
        "system volume information", "$onedrivetemp", "$windows.~bt", "$windows.~ws", "msocache", "recycle.bin",
        "network trash folder", "temporary items", "picasa.ini", ".picasa.ini",
        "@eadir", "#recycle", "@recycle", "@recently-snapshot", "#snapshot", "~snapshot", "@tmp", "@sharebin",
        ".@__thumb", "@__thumb", "lost+found", "__pycache__",
    }
)  # fmt: skip
_SUFFIX = "|".join(map(re.escape, (*IMAGE_SUFFIXES, *TEXT_SUFFIXES)))
_LEFTOVER_PATTERN = re.compile(
    r"\._.*|.*~|~\$.*|\.~lock\..*|\.nfs[0-9a-f]+|\.fuse_hidden.*|.*\.(tmp|temp|part|partial|crdownload|download|swp|bak)"
    r"|synophoto_.*|synofile_.*|.*@syno(resource|eastream)|found\.\d{3}|.*:zone\.identifier"
    # Around a picture's or text's name: exiftool's and merge tools' backups, wget's numbers, copies of Emacs and rsync.
    rf"|.*({_SUFFIX})(_original|\.(orig|old|backup|\d{{1,3}}))|#.*({_SUFFIX})#|\..*({_SUFFIX})\.[a-z0-9]{{6}}",
    re.I | re.S,
)
LEFTOVER = "left behind by a system or a program"
OTHER_SPLIT = "a file of another split"


@dataclass(frozen=True, order=True)
class LeftOut:
    """What lies in a source and is not taken.

    Args:
        source: the file (a folder of `count` files ends in /), row or member.
        reason: what it is, in a few words without its name; equal reasons are counted together.
    """

    source: str
    reason: str
    count: int = 1


@dataclass(frozen=True)
class Scan:
    """Every file below `folder` is in one of these, and in one only. Paths begin with `folder`; all are sorted.

    Args:
        images: files with a picture's suffix, or with another one and a picture's first bytes.
        texts: files with a suffix of captions.
        others: all other files; `unread` gives the reason for those that nobody takes.
        left_out: leftovers of systems and programs, hidden folders, links to nothing or back to a folder above, what
            can't be opened, and what is no regular file.
    """

    folder: Path
    images: tuple[Path, ...]
    texts: tuple[Path, ...]
    others: tuple[Path, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def num_files(self) -> int:
        files = len(self.images) + len(self.texts) + len(self.others)
        return files + sum(each.count for each in self.left_out)

    def unread(self, paths: Iterable[Path]) -> list[LeftOut]:
        """Files that are not taken, with what their suffix says."""
        return [LeftOut(str(path.relative_to(self.folder)), unread_reason(path.name)) for path in sorted(paths)]


def scan(folder: Path) -> Scan:
    """Sorts the files below a folder, those in linked folders too.

    Raises:
        ValueError: the folder itself can't be listed.
    """
    found: dict[str, list[Path]] = {"images": [], "texts": [], "others": []}
    left_out: list[LeftOut] = []
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise ValueError(f"{folder} can't be listed: {error.strerror or error}") from error

    for path, reason, count in _walk(folder, ()):
        if reason:
            left_out.append(LeftOut(f"{path.relative_to(folder)}{'' if count is None else '/'}", reason, count or 1))
        else:
            found[_kind_of(path)].append(path)
    images, texts, others = (tuple(sorted(found[kind])) for kind in ("images", "texts", "others"))
    return Scan(folder, images, texts, others, tuple(sorted(left_out)))


def image_files(folder: Path) -> list[Path]:
    """The pictures below a folder, in the order of their paths."""
    return list(scan(folder).images)


def files_below(folder: Path, suffix: str) -> Iterator[Path]:
    """The files of a suffix below a folder, as `scan` finds them, in no order."""
    return (path for path, reason, _ in _walk(folder, ()) if not reason and path.suffix.lower() == suffix)


def is_leftover(name: str) -> bool:
    """Whether systems or programs leave files or folders of this name behind: __MACOSX, Thumbs.db, ._photo.jpg …"""
    return name.casefold() in _LEFTOVER_NAMES or _LEFTOVER_PATTERN.fullmatch(name) is not None


def is_skipped_folder(name: str) -> bool:
    """Whether a folder of this name is passed over: a leftover, or hidden (.git, .ipynb_checkpoints, .Trash-1000)."""
    return name.startswith(".") or is_leftover(name)


def same_name(name: str) -> str:
    """Equal for names that look alike: Macs write é as e and an accent (NFD), others as one character (NFC)."""
    return unicodedata.normalize("NFC", name)


def holds_picture(head: bytes, name: str = "") -> bool:
    """Whether a file's first 32 bytes are those of a picture that can be read.

    Args:
        name: of the file, if it has one. Raw files of cameras begin as TIFF does, with a small preview.
    """
    if head.startswith((b"II*\0", b"MM\0*")):
        return Path(name).suffix.lower() not in UNREAD_PICTURES
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"))
        or head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"))
        or head[4:12] in (b"ftypavif", b"ftypavis")
        or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
        or (head.startswith(b"BM") and head[14:18] in (b"\x0c\0\0\0", b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0"))
    )


def unread_reason(name: str) -> str:
    """Why a file of this name is not taken."""
    suffix = Path(name).suffix.lower()
    if suffix in UNREAD_PICTURES:
        return f"a picture of a kind that is not read ({suffix}; as .jpg or .png it would be)"
    if suffix == ".tar":
        return "a tar, which is read where it is named itself"
    return f"neither a picture nor a caption ({suffix or 'no suffix'})"


def summary(left_out: Iterable[LeftOut]) -> str:
    """One sentence: how many were left out, for which reasons, and examples of each. Empty if there are none."""
    by_reason: dict[str, list[LeftOut]] = {}
    for each in left_out:
        by_reason.setdefault(each.reason, []).append(each)
    counts = {reason: sum(each.count for each in group) for reason, group in by_reason.items()}
    total = sum(counts.values())
    if not total:
        return ""
    order = sorted(by_reason, key=lambda reason: -counts[reason])
    parts = [
        f"{reason}: {counts[reason]:,} ({some([each.source for each in by_reason[reason]], 2)})" for reason in order
    ]
    return f"{total:,} left out: {'; '.join(parts)}"


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[Path, str, int | None]]:
    """Each file without a reason, and what is passed over with one; for a folder, with the number of its files."""
    try:
        facts = folder.stat()
        here = (facts.st_dev, facts.st_ino)
        if here in above:
            yield folder, "a link back to a folder above it", None
            return
        with os.scandir(folder) as entries:
            listed = list(entries)
    except OSError as error:
        yield folder, f"a folder that can't be opened ({error.strerror or error})", 1
        return
    for entry in listed:
        path = folder / entry.name
        try:
            if entry.is_dir():
                if not is_skipped_folder(entry.name):
                    yield from _walk(path, (*above, here))
                elif count := _count_files(path):
                    yield path, LEFTOVER if is_leftover(entry.name) else "in a hidden folder", count
            elif is_leftover(entry.name):
                yield path, LEFTOVER, None
            elif entry.is_file():
                yield path, "", None
            else:
                yield path, "a link to nothing" if entry.is_symlink() else "no regular file", None
        except OSError as error:  # a link to itself, a disk that went away
            yield path, f"a link to nothing ({error.strerror})" if entry.is_symlink() else f"unreadable ({error})", None


def _kind_of(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "images"
    if suffix in TEXT_SUFFIXES:
        return "texts"
    if suffix in TABLE_SUFFIXES or suffix in (".json", ".tar", ".npz"):
        return "others"
    try:
        with open(path, "rb") as file:
            return "images" if holds_picture(file.read(32), path.name) else "others"
    except OSError:
        return "others"


def _count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))
