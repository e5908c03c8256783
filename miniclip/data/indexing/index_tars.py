"""An index for tars that somebody else wrote (img2dataset, say)."""

from __future__ import annotations

import glob
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...common.cache import Cache
from ...common.storage import (
    NotKeptError,
    check_scheme,
    expand,
    is_url,
    name_of,
    split_query,
    stamp_of,
    without_secrets,
)
from ..reading.scan import IMAGE_SUFFIXES, LeftOut, is_leftover, is_skipped_folder, scan
from ..shard_index import (
    INDEX_FILE,
    REJECTED_FILE,
    Packed,
    check_part,
    report_progress,
    rows_left_out,
    write_index,
    write_rejected,
)
from .journal import Journal, Record
from .one_tar import index_tar

_AT_ONCE = 16  # tars of which the headers are read at the same time: nearly all of it is waiting


def index_shards(
    source: str,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    needs_all: bool = False,
    part: tuple[int, int] = (1, 1),
    head: int | None = None,
) -> Packed:
    """Writes the index that shards from elsewhere (img2dataset's, say) lack.

    Damaged tars are left out and named. A repeated call goes on where one was interrupted, adds the damaged tars of an
    earlier one that have been replaced, and those that `head` left for later.

    Args:
        source: a folder of tars, or tars themselves: "data/{00000..00099}.tar", "https://…/{0..9}.tar". Remote ones are
            fetched into the cache, where training finds them again.
        out: the folder for the index, which then stands for the shards; by default theirs.
        needs_all: raise if a tar is damaged, and write no index.
        part: (i, n) indexes every n-th tar, from the i-th on; the part that ends last writes the index.
        head: index the first so many tars, from all but their pictures, which is a small part of their bytes. The index
            has no checksums of tars and pictures then. A later call without it reads every tar as a whole.

    Raises:
        ValueError: no tars there, none that is whole, an index that is there already, remote tars and no `out`, or an
            argument out of its range.
    """
    check_part(part)
    if head is not None and head < 1:
        raise ValueError(f"head is {head}; it must be at least 1")
    all_tars = tar_locations(source)
    if out is None and is_url(all_tars[0]):
        raise ValueError(
            f"{without_secrets(source)} is remote; name a folder OUT here for its index, which then stands for the "
            "shards"
        )
    if out is not None and Path(out).is_file():
        raise ValueError(
            f"{out} is a file, and an index wants a folder; a pattern of tars stands in quotes: 'data/*.tar'"
        )
    folder = Path(all_tars[0]).parent if out is None else Path(out)
    # By a name of its own, so that a run which has begun with an index by headers keeps it when the whole one comes.
    tars, names = all_tars[:head], _offset_names(all_tars, ".npz" if head is None else ".headers.npz")
    own = tars[part[0] - 1 :: part[1]]
    journal = Journal(folder, without_secrets(source), needs_checksums=head is None)
    if part[1] > 1 and (packed := _of_other_parts(journal, len(tars), overwrite)):
        return packed
    goes_on = journal.is_begun and not overwrite
    if not goes_on:
        _begin_index(journal, [names[tar] for tar in own], overwrite)
    known = journal.unchanged(own)
    todo = [tar for tar in own if "entry" not in known.get(tar, {})]
    done = len(own) - len(todo)
    report_progress(progress, done, 0)
    bytes_read = num_requests = 0
    for number, (record, fetched) in enumerate(_indexed(todo, folder, names, by_headers=head is not None), start=1):
        known[record["tar"]] = record
        journal.add(record)
        bytes_read, num_requests = bytes_read + fetched[0], num_requests + fetched[1]
        report_progress(progress, done, number)
    with journal.locked():
        if part[1] > 1:
            known = {**journal.latest(tars), **known}  # the other parts have asked for theirs
            if not journal.is_begun and (packed := _of_other_parts(journal, len(tars), overwrite)):
                return packed
        if missing := sum(tar not in known for tar in tars):
            return Packed(0, 0, 0, 0, missing=missing)
        packed = _publish_index(journal, {tar: known[tar] for tar in tars}, out is None, needs_all, goes_on)
        return replace(packed, bytes_read=bytes_read, num_requests=num_requests)


def _of_other_parts(journal: Journal, num_tars: int, overwrite: bool) -> Packed | None:
    """What the part that ended last has found, if it has.

    Raises:
        ValueError: `overwrite`, as each part would throw away the others' work.
    """
    if overwrite:
        raise ValueError(
            "an index in parts can't be overwritten, as each part would throw away what the others have done; delete "
            f"{journal.folder / INDEX_FILE} and {journal.path} first"
        )
    path = journal.folder / INDEX_FILE
    if journal.is_begun or not path.is_file():
        return None
    index = json.loads(path.read_text(encoding="utf-8"))
    if index.get("source") != journal.source or len(index["shards"]) != num_tars:
        return None
    size, left_out = sum(entry["bytes"] for entry in index["shards"]), sum(index.get("left_out", {}).values())
    return Packed(index["samples"], 0, num_tars, size, left_out=left_out)  # none is damaged or without a checksum


def _begin_index(journal: Journal, offsets: list[str], overwrite: bool) -> None:
    for name in (INDEX_FILE, *offsets):
        if (journal.folder / name).exists() and not overwrite:
            raise ValueError(f"{journal.folder / name} exists already; pass --overwrite to write it anew")
    journal.end()
    (journal.folder / INDEX_FILE).unlink(missing_ok=True)  # it must not be taken for that of the new offsets
    journal.begin()


def _indexed(
    tars: list[str], folder: Path, names: dict[str, str], by_headers: bool
) -> Iterator[tuple[Record, tuple[int, int]]]:
    """The record of each tar, and the bytes and requests that it took."""
    cache, is_over = Cache(), threading.Event()

    def index(tar: str) -> tuple[Record, tuple[int, int]]:
        record: Record = {"tar": tar, "stamp": None}
        try:
            record["stamp"] = stamp = stamp_of(tar)
            found = index_tar(tar, folder / names[tar], cache, by_headers, is_over, stamp)
        except NotKeptError:  # a full disk is no fault of the tar's: another call goes on with it
            raise
        except (ValueError, OSError) as error:
            return {**record, "damaged": str(error)}, (0, 0)
        name = name_of(tar)
        left_out = [(f"{name}:{each.source}", each.reason, each.count) for each in found.left_out]
        return {**record, "entry": found.entry, "left_out": left_out}, (found.bytes_read, found.num_requests)

    if not by_headers:
        yield from map(index, tars)
        return
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield from pool.map(index, tars)
    finally:
        is_over.set()  # Ctrl-C waits for a request, and not for a tar
        pool.shutdown(cancel_futures=True)


def _publish_index(
    journal: Journal, found: dict[str, Record], is_beside: bool, needs_all: bool, goes_on: bool
) -> Packed:
    """Writes `index.json` and `rejected.csv`.

    Args:
        goes_on: other calls have added to the journal, which stays for them if there is nothing to write.
    """
    damaged = {tar: record["damaged"] for tar, record in found.items() if "damaged" in record}
    healthy = {tar: record for tar, record in found.items() if tar not in damaged}
    if not healthy or (damaged and needs_all):
        if not goes_on:
            journal.end()
        how_many = f"{len(damaged)} of the {len(found)} tars in {journal.source} can't be indexed"
        what = how_many if healthy else f"no tar in {journal.source} can be indexed"
        raise ValueError(f"{what}: {'; '.join(damaged.values())}")
    left_out = [LeftOut(*each) for record in healthy.values() for each in record["left_out"]]
    left_out += _beside_tars(journal.source)
    counts = Counter[str]()
    for each in left_out:
        counts[each.reason] += each.count
    if damaged or left_out:
        rows = [("", name_of(tar), reason) for tar, reason in damaged.items()]
        write_rejected(journal.folder, rows + rows_left_out(left_out))
    else:
        (journal.folder / REJECTED_FILE).unlink(missing_ok=True)
    entries = [_located(tar, record, journal.folder, is_beside) for tar, record in healthy.items()]
    write_index(journal.folder, entries, {"source": journal.source} | ({"damaged": damaged} if damaged else {}), counts)
    if not damaged and journal.needs_checksums:  # else a later call goes on from what is indexed
        journal.end()
    samples, size = sum(entry["samples"] for entry in entries), sum(entry["bytes"] for entry in entries)
    unverified = sum(entry["sha256"] is None for entry in entries)
    return Packed(
        samples,
        0,
        len(entries),
        size,
        left_out=counts.total(),
        damaged=tuple(damaged.values()),
        unverified=unverified,
    )


def _beside_tars(source: str) -> list[LeftOut]:
    """What may hold samples in a folder of tars, and is none of them."""
    if is_url(source) or not Path(source).is_dir():
        return []
    found = []
    for path in sorted(Path(source).iterdir()):
        name = path.name.lower()
        if is_skipped_folder(path.name):
            continue
        if re.search(r"\.(tar\.\w+|t[gbx]z2?)$", name):
            found.append(LeftOut(path.name, "a compressed tar; unpack it to .tar"))
        elif name.endswith(".tar") and not path.name.endswith(".tar"):
            found.append(LeftOut(path.name, "a tar of another suffix; call it .tar"))
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            found.append(LeftOut(path.name, "a picture beside the tars"))
        elif path.is_dir():
            below = scan(path)
            tars = sum(other.suffix.lower() == ".tar" for other in below.others)
            counts = {"which is to be named itself": tars, "a picture beside the tars": len(below.images)}
            found += [LeftOut(f"{path.name}/", f"in a folder below, {what}", n) for what, n in counts.items() if n]
        elif path.suffix.lower() in (".zip", ".7z", ".rar"):
            found.append(LeftOut(path.name, "an archive; unpack it"))
    return found


def _located(tar: str, record: Record, folder: Path, is_beside: bool) -> dict[str, Any]:
    """A tar's entry for `index.json`, with its name if it lies beside it, else its whole path or URL."""
    if is_url(tar):
        file = tar
    else:
        is_beside = is_beside or Path(tar).parent.resolve() == folder.resolve()
        file = Path(tar).name if is_beside else str(Path(tar).resolve())
    return {**record["entry"], "file": file, "stamp": record["stamp"]}


def _offset_names(tars: list[str], suffix: str) -> dict[str, str]:
    """The `.npz` of each tar: of its name, or of its number where several have one name."""
    stems = [Path(name_of(tar)).stem for tar in tars]
    times = Counter(stems)
    return {
        tar: ("" if times[stem] == 1 else f"{number:05d}-") + stem + suffix
        for number, (tar, stem) in enumerate(zip(tars, stems, strict=True))
    }


def tar_locations(source: str) -> list[str]:
    """The tars that a folder or a pattern stands for: those of a folder and of `*` sorted, ranges in their order.

    Raises:
        ValueError: none, or a `*` at a URL.
    """
    if not is_url(source) and Path(source).is_dir():
        found = [str(path) for path in sorted(Path(source).glob("*.tar")) if not is_leftover(path.name)]
        if not found:
            raise ValueError(f"{source} holds no .tar")
        return found
    found = [location for name in expand(source) for location in _matching(name)]
    for location in found:
        if not name_of(location).endswith(".tar"):
            raise ValueError(
                f"{without_secrets(location)} is no .tar; give a folder of them, or a pattern as "
                "data/{00000..00099}.tar"
            )
        if not is_url(location) and not Path(location).is_file():
            raise ValueError(f"there is no file {location}")
    return found


def _matching(name: str) -> list[str]:
    """The files that match `*`, `?` and `[…]`; a name without them, or of a file, as it is."""
    check_scheme(name)
    if is_url(name):
        if "*" in split_query(name)[0]:
            raise ValueError(
                f"{without_secrets(name)}: what lies at a URL can't be listed; write the range, as {{00000..00099}}.tar"
            )
        return [name]
    if not glob.has_magic(name) or Path(name).is_file():
        return [name]
    found = [path for path in sorted(glob.glob(name)) if not is_leftover(Path(path).name)]  # noqa: PTH207
    if not found:
        raise ValueError(f"no file matches {name}")
    return found
