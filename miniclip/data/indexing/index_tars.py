"""An index for tars that somebody else wrote (img2dataset, say)."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...common.cache import Cache
from ...common.storage import check_scheme, expand, is_url
from ..reading.cells import decode_text
from ..reading.scan import LeftOut, is_leftover
from ..shard_index import (
    INDEX_FILE,
    REJECTED_FILE,
    Extents,
    Packed,
    index_entry,
    report_progress,
    rows_left_out,
    write_index,
    write_rejected,
)
from .tar_members import Member, read_samples

_PARTIAL_FILE = "index.partial.jsonl"  # the tars that are indexed so far


def index_shard(path: Path, offsets: Path) -> tuple[dict[str, Any], list[LeftOut]]:
    """Writes the `.npz` of a tar; returns the tar's entry for `index.json`, and the members that are left out.

    Raises:
        ValueError: it is no tar, or one that is damaged or cut short.
    """
    samples, left_out = read_samples(path)
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()

        def extent(kind: str, member: Member) -> tuple[int, int, int]:
            file.seek(member.offset)
            data = file.read(member.size)
            if kind == "txt":
                decode_text(data, member.name)
            return member.offset, member.size, zlib.crc32(data)

        found: list[tuple[str, Extents]] = []
        for key, sample in samples:
            try:
                found.append((key, {kind: extent(kind, member) for kind, member in sample.items()}))
            except ValueError:
                text = sample.pop("txt")
                left_out.append(LeftOut(text.name, "a text that is not UTF-8"))
                if "cls" in sample or "npy" in sample:  # labelled
                    found.append((key, {kind: extent(kind, member) for kind, member in sample.items()}))
                else:
                    left_out += [LeftOut(member.name, "a member whose text is not UTF-8") for member in sample.values()]
    return index_entry(path, found, offsets, checksum), left_out


def index_shards(
    source: str,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    needs_all: bool = False,
) -> Packed:
    """Writes the index that shards from elsewhere (img2dataset's, say) lack.

    Damaged tars are left out and named. A repeated call goes on where one was interrupted, and adds the damaged tars
    of an earlier one that have been replaced.

    Args:
        source: a folder of tars, or tars themselves: "data/{00000..00099}.tar", "https://…/{0..9}.tar". Remote ones are
            fetched into the cache, where training finds them again.
        out: the folder for the index, which then stands for the shards; by default theirs.
        needs_all: raise if a tar is damaged, and write no index.

    Raises:
        ValueError: no tars there, none that is whole, an index that is there already, or remote tars and no `out`.
    """
    tars = tar_locations(source)
    if out is None and is_url(tars[0]):
        raise ValueError(f"{source} is remote; name a folder OUT here for its index, which then stands for the shards")
    folder = Path(tars[0]).parent if out is None else Path(out)
    known = {} if overwrite else _known_entries(folder)
    names = _offset_names(tars)
    for name in (*([] if known else [INDEX_FILE]), *(names[tar] for tar in tars if tar not in known)):
        if (folder / name).exists() and not overwrite:
            raise ValueError(f"{folder / name} exists already; pass --overwrite to write it anew")
    folder.mkdir(parents=True, exist_ok=True)
    if not known:
        for name in (INDEX_FILE, _PARTIAL_FILE):  # an old index must not be taken for that of the new offsets
            (folder / name).unlink(missing_ok=True)
    cache, damaged = Cache(), dict[str, str]()
    found: dict[str, dict[str, Any]] = {}
    with open(folder / _PARTIAL_FILE, "a", encoding="utf-8") as partial:
        for number, location in enumerate(tars):
            stamp = _stamp(location)
            if location in known and known[location]["stamp"] == stamp:
                found[location] = known[location]
            else:
                try:
                    found[location] = {**_index_location(location, folder / names[location], cache), "stamp": stamp}
                except (ValueError, OSError) as error:
                    damaged[location] = str(error)
                else:
                    partial.write(json.dumps({"tar": location, **found[location]}) + "\n")
                    partial.flush()
            report_progress(progress, number + 1, 0)
    if not found or (damaged and needs_all):
        (folder / _PARTIAL_FILE).unlink()
        how_many = f"{len(damaged)} of the {len(tars)} tars in {source} can't be indexed"
        raise ValueError(
            f"{how_many if found else f'no tar in {source} can be indexed'}: {'; '.join(damaged.values())}"
        )
    return _write_found(folder, source, found, damaged, is_beside=out is None)


def _index_location(location: str, offsets: Path, cache: Cache) -> dict[str, Any]:
    if not is_url(location):
        entry, left_out = index_shard(Path(location), offsets)
    else:
        with cache.open(location) as file:
            entry, left_out = index_shard(Path(file.name), offsets)
        cache.verified(location, entry["sha256"])
    name = location.rpartition("/")[2]
    return {"entry": entry, "left_out": [(f"{name}:{each.source}", each.reason, each.count) for each in left_out]}


def _write_found(
    folder: Path, source: str, found: dict[str, dict[str, Any]], damaged: dict[str, str], is_beside: bool
) -> Packed:
    entries, left_out = [], []
    for location, indexed in found.items():
        beside = is_beside or Path(location).parent.resolve() == folder.resolve()
        here = location if is_url(location) else str(Path(location).resolve())
        file = Path(location).name if beside and not is_url(location) else here
        entries.append({**indexed["entry"], "file": file, "stamp": indexed["stamp"]})
        left_out += [LeftOut(*each) for each in indexed["left_out"]]
    counts = Counter[str]()
    for each in left_out:
        counts[each.reason] += each.count
    if damaged or left_out:
        rows = [("", location.rpartition("/")[2], reason) for location, reason in damaged.items()]
        write_rejected(folder, rows + rows_left_out(left_out))
    else:
        (folder / REJECTED_FILE).unlink(missing_ok=True)
    facts = {"source": source} | ({"damaged": damaged} if damaged else {})
    samples, size = sum(entry["samples"] for entry in entries), sum(entry["bytes"] for entry in entries)
    write_index(folder, entries, facts, counts)
    if not damaged:  # else the next call reads from it what is indexed
        (folder / _PARTIAL_FILE).unlink()
    return Packed(samples, 0, len(entries), size, left_out=counts.total(), damaged=tuple(damaged.values()))


def _known_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What an earlier call has indexed that was interrupted, or that met damaged tars, by the tars' locations."""
    known: dict[str, dict[str, Any]] = {}
    try:
        lines = (folder / _PARTIAL_FILE).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            indexed = json.loads(line)
            entry = indexed["entry"]
            offsets = (folder / entry["offsets"]).read_bytes()
            if hashlib.sha256(offsets).hexdigest() == entry["offsets_sha256"]:
                known[indexed.pop("tar")] = indexed
        except (ValueError, KeyError, TypeError, OSError):
            continue  # the last line of a call that was killed, or offsets that are gone
    return known


def _stamp(location: str) -> list[int] | None:
    """Size and time of a local tar, which change when it is replaced."""
    if is_url(location):
        return None
    facts = Path(location).stat()
    return [facts.st_size, facts.st_mtime_ns]


def _offset_names(tars: list[str]) -> dict[str, str]:
    """The `.npz` of each tar: of its name, or of its number where several have one name."""
    stems = Counter(Path(tar).stem for tar in tars)
    return {
        tar: f"{Path(tar).stem}.npz" if stems[Path(tar).stem] == 1 else f"{number:05d}-{Path(tar).stem}.npz"
        for number, tar in enumerate(tars)
    }


def tar_locations(source: str) -> list[str]:
    """The tars that a folder or a pattern stands for, sorted.

    Raises:
        ValueError: none.
    """
    if not is_url(source) and Path(source).is_dir():
        found = [str(path) for path in sorted(Path(source).glob("*.tar")) if not is_leftover(path.name)]
        if not found:
            raise ValueError(f"{source} holds no .tar")
        return found
    found = expand(source)
    for location in found:
        check_scheme(location)
        if not location.endswith(".tar"):
            raise ValueError(f"{location} is no .tar; give a folder of them, or a pattern as data/{{00000..00099}}.tar")
        if not is_url(location) and not Path(location).is_file():
            raise ValueError(f"there is no file {location}")
    return found
