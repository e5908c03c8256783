"""The members of a tar that somebody else wrote -> samples; each member belongs to one, or is left out by reason.

A member's key is its name up to the first dot, as in webdataset, and what follows is its kind. Further than webdataset
goes: names with dots of their own (`photo.v2.jpg`, `photo.v2.txt`), members that say what they are (`7.image.jpg`,
`7.caption.txt`), links, keys that come again, tars joined together, and pictures and texts in folders of their own."""

from __future__ import annotations

import os
import posixpath
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO

from ...common.ranges import ReadWholeError
from ...common.storage import UnreadableError
from ...common.wording import reason_of
from ..reading.cells import decode_text
from ..reading.folders import preference, same_sample
from ..reading.scan import (
    LEFTOVER,
    TEXT_SUFFIXES,
    LeftOut,
    holds_picture,
    is_leftover,
    is_skipped_folder,
)
from ..shard_index import Member, Sample, kind_of


def with_content(member: Member, file: IO[bytes]) -> Member:
    """The member after its content was read."""
    file.seek(member.offset)
    data = file.read(member.size)
    try:
        decode_text(data, member.name)
    except ValueError:
        return member._replace(crc32=zlib.crc32(data), is_text=False)
    return member._replace(crc32=zlib.crc32(data))


def read_samples(file: IO[bytes], name: str, skips_pictures: bool = False) -> tuple[list[Sample], list[LeftOut]]:
    """The samples of a tar in their order, and the members that are left out.

    Args:
        name: of the tar, for messages.
        skips_pictures: read the headers, and the content of members that a sample has beside its picture.

    Raises:
        ValueError: no tar, or one that is damaged or cut short.
    """
    left_out: list[LeftOut] = []
    members: list[Member] = []
    for member in _walk_members(file, name, left_out, skips_pictures):
        if reason := _skipped(member.name):
            left_out.append(LeftOut(member.name, reason))
        else:
            members.append(member)
    samples = _group_samples(file, members, left_out)
    return _join_halves(samples, left_out), _by_kind(left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Members


class TarHeaders(tarfile.TarFile):
    """The members of a tar, from where its file stands.

    Args:
        name: of the tar, for messages.

    Raises, also while it is iterated:
        ValueError: no tar, or one that is damaged or cut short.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._shown_name = name
        super().__init__(fileobj=file)

    def next(self) -> tarfile.TarInfo | None:
        try:
            return super().next()
        except (OSError, UnreadableError, ReadWholeError):  # of the file
            raise
        except Exception as error:  # tarfile raises whatever its code comes upon in odd headers, as RecursionError
            raise ValueError(
                f"{self._shown_name} is no tar, or a damaged or compressed one: {reason_of(error)}"
            ) from error


def _walk_members(file: IO[bytes], path: str, left_out: list[LeftOut], skips_pictures: bool) -> Iterator[Member]:
    """Files and links to files; `cat a.tar b.tar` makes a file of two tars, whose members come one after the other."""
    size = file.seek(0, os.SEEK_END)
    known: dict[str, Member | None] = {}  # by place; None for a link to nothing
    links: list[tuple[str, str]] = []
    start = 0
    while start < size or not start:
        file.seek(start)
        with TarHeaders(file, path) as tar:
            for info in tar:
                if info.size < 0:
                    raise ValueError(f"{path} is damaged: {info.name} has a size of {info.size} bytes")
                if info.isreg() and not info.issparse() and info.offset_data + info.size > size:
                    raise ValueError(
                        f"{path} is cut short: {info.name} should end at byte {info.offset_data + info.size}"
                    )
                if info.issym():
                    links.append((info.name, posixpath.join(posixpath.dirname(info.name), info.linkname)))
                elif info.islnk():  # to a member that came before
                    if target := known.get(posixpath.normpath(info.linkname)):
                        member = target._replace(name=info.name)
                        known[posixpath.normpath(info.name)] = member
                        yield member
                    else:  # but for a symbolic link
                        links.append((info.name, info.linkname))
                elif info.issparse() or not (info.isreg() or info.isdir()):
                    left_out.append(LeftOut(info.name, "no regular file"))
                elif info.isreg():
                    member = Member(info.name, info.offset_data, info.size)
                    kind = kind_of(info.name.rpartition(".")[2])
                    if kind and not (skips_pictures and kind == "image"):
                        member = with_content(member, file)
                    known[posixpath.normpath(info.name)] = member
                    yield member
            end = tar.offset
        if start and end == start:
            left_out.append(LeftOut(f"from byte {start} on", "bytes after the tar's end that are no tar"))
            break
        start = _next_tar(path, file, end)
    target_of = {posixpath.normpath(name): posixpath.normpath(target) for name, target in links}
    for name, target_name in links:  # a symbolic link may come before its target, which may be another link
        place, passed = posixpath.normpath(target_name), set[str]()
        while place in target_of and place not in known and place not in passed:
            passed.add(place)
            place = target_of[place]
        target = known.get(place)
        known |= dict.fromkeys(passed, target)  # each link of a chain is passed once
        if target:
            yield target._replace(name=name)
        else:
            left_out.append(LeftOut(name, "a link to nothing"))


def _next_tar(path: str, file: IO[bytes], end: int) -> int:
    """Where bytes other than zeros follow the zeros at a tar's end; the file's size if none do."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if block != tarfile.NUL * tarfile.BLOCKSIZE:
        what = f"is damaged at byte {end}" if len(block) == tarfile.BLOCKSIZE else "is cut short"
        raise ValueError(f"{path} {what}: it lacks the zeros at its end")
    while block and not block.strip(b"\0"):
        end += len(block)
        block = file.read(1 << 20)
    return end + (len(block) - len(block.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE


def _skipped(name: str) -> str:
    """The reason to pass over a member because of its name; empty if there is none."""
    *folders, last = [part for part in name.split("/") if part not in ("", ".", "..")] or [""]
    if is_leftover(last) or any(is_leftover(folder) for folder in folders):
        return LEFTOVER
    if any(is_skipped_folder(folder) for folder in folders):
        return "in a hidden folder"
    return "a hidden file" if last.startswith(".") else ""


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def _group_samples(file: IO[bytes], members: Iterable[Member], left_out: list[LeftOut]) -> list[Sample]:
    groups: dict[tuple[str, int], list[tuple[str, Member]]] = defaultdict(list)
    times = Counter[str]()
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        groups[folder + slash + stem, times[member.name]].append((suffix, member))
        times[member.name] += 1
    samples = []
    for (key, repetition), group in groups.items():
        for sample_key, parts in _parted(key, group, left_out):
            sample = _sample(file, parts, left_out)
            if "image" in sample or (not repetition and not sample.keys().isdisjoint(("txt", "json"))):
                samples.append((sample_key, sample))
            else:
                reason = "a member that comes again without a picture" if repetition else "a member of no pair"
                left_out += [LeftOut(member.name, reason) for member in sample.values()]
    return samples


def _parted(
    key: str, group: list[tuple[str, Member]], left_out: list[LeftOut]
) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """A group of one key, and those whose names have a dot of their own and are samples by themselves."""
    plain = [(suffix, member) for suffix, member in group if "." not in suffix]
    dotted: dict[str, list[tuple[str, Member]]] = defaultdict(list)
    for suffix, member in group:
        if "." in suffix:
            stem, _, last = suffix.rpartition(".")
            dotted[f"{key}.{stem}"].append((last, member))
    has_pair = {kind_of(suffix) for suffix, _ in plain} & {"image", "txt"}
    if plain:
        yield key, plain
    for longer_key, parts in dotted.items():
        kinds = {kind_of(suffix) for suffix, _ in parts}
        is_pair = {"image", "txt"} <= kinds
        if not has_pair or is_pair or (kinds.isdisjoint(has_pair) and same_sample(longer_key) == same_sample(key)):
            yield longer_key, parts
        else:
            left_out += [LeftOut(member.name, f"another member of a sample ({_ending(member)})") for _, member in parts]


def _sample(file: IO[bytes], parts: list[tuple[str, Member]], left_out: list[LeftOut]) -> dict[str, Member]:
    """One member of each kind; a photograph before a mask, and a .txt before other texts."""
    by_kind: dict[str | None, list[Member]] = defaultdict(list)
    for suffix, member in parts:
        by_kind[kind_of(suffix)].append(member)
    unknown = by_kind.pop(None, [])
    if "image" not in by_kind:
        pictures = [member for member in unknown if holds_picture(_head(file, member), member.name)]
        unknown = [member for member in unknown if member not in pictures]
        if pictures:
            by_kind["image"] = pictures
    sample = {}
    for kind, found in by_kind.items():
        first, *others = sorted(found, key=lambda member: _rank(member.name))
        sample[str(kind)] = first
        what = {"image": "picture", "txt": "text"}.get(str(kind), "member")
        left_out += [LeftOut(member.name, f"another {what} of a sample ({_ending(member)})") for member in others]
    left_out += [LeftOut(member.name, f"a member of a kind that is not read ({_ending(member)})") for member in unknown]
    return sample


def _rank(name: str) -> tuple[int, str]:
    suffix = PurePosixPath(name).suffix.lower()
    return (TEXT_SUFFIXES.index(suffix), name) if suffix in TEXT_SUFFIXES else preference(name)


def _head(file: IO[bytes], member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.size, 32))


def _join_halves(samples: list[Sample], left_out: list[LeftOut]) -> list[Sample]:
    """Pictures and texts in folders of their own (images/a.jpg, texts/a.txt), or that say what they are, together. A
    text of a key that has pictures without one, of which it may be any's, is left out."""
    used = set[int]()
    for half, lacks, key_of in (
        ("txt", {"txt"}, same_sample),
        ("txt", {"txt", "json"}, _same_key),
        ("json", {"json"}, _same_key),
    ):
        halves = defaultdict[str, list[Sample]](list)
        images = defaultdict[str, list[Sample]](list)
        for sample in samples:
            if "image" not in sample[1] and half in sample[1] and id(sample) not in used:
                halves[key_of(sample[0])].append(sample)
        for sample in samples if halves else ():
            if "image" in sample[1] and lacks.isdisjoint(sample[1]):
                images[key_of(sample[0])].append(sample)
        for key, found in images.items():
            if len(found) == len(halves[key]) == 1:
                used.add(id(halves[key][0]))
                for kind, member in halves[key][0][1].items():
                    found[0][1].setdefault(kind, member)
    bare = {_split_key(key)[0] for key, sample in samples if "image" in sample and "txt" not in sample}
    for sample in samples:
        key, stem = _split_key(sample[0])
        if "image" in sample[1] or id(sample) in used:
            continue
        if "txt" not in sample[1]:
            reason = "a member of no pair"
        elif key in bare and not any(letter.isdigit() for letter in stem):
            reason = "a text whose picture can't be known, as its key has pictures of other names"
        else:
            continue
        used.add(id(sample))
        left_out += [LeftOut(member.name, reason) for member in sample[1].values()]
    return [sample for sample in samples if id(sample) not in used]


# People's words for a picture and its text.
_PAIR_WORDS = ("input", "inputs", "output", "outputs", "rgb", "prompt", "prompts")


def _same_key(key: str) -> str:
    """`same_sample`, of a few more words behind webdataset's key: 7.input.jpg, 7.outputs.txt."""
    own, word = _split_key(key)
    return same_sample(own if word.lower() in _PAIR_WORDS else key)


def _split_key(key: str) -> tuple[str, str]:
    """webdataset's key of a sample, and what its name has behind that."""
    folder, slash, name = key.rpartition("/")
    stem, _, rest = name.partition(".")
    return folder + slash + stem, rest


def _ending(member: Member) -> str:
    _, dot, suffix = member.name.rpartition("/")[2].partition(".")
    return dot + suffix or "no suffix"


def _by_kind(left_out: list[LeftOut]) -> list[LeftOut]:
    """Members of a kind that each sample may have are counted, not listed one by one."""
    many = Counter(each.reason for each in left_out if each.reason.startswith("a member of a kind"))
    examples = {each.reason: each.source for each in reversed(left_out)}
    counted = [LeftOut(examples[reason], reason, count) for reason, count in many.items()]
    return [each for each in left_out if each.reason not in many] + counted
