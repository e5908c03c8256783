"""Pairs -> shards: webdataset tars of image and text, each with an index of where its samples lie.

    OUT/00000.tar    000000000.jpg  000000000.txt  000000000.json   000000001.jpg …   (img2dataset's layout)
    OUT/00000.npz    the key of each sample, and offset and size of its members in the tar
    OUT/index.json   the shards with their counts, sizes and checksums
    OUT/rejected.csv what was left out, and why

`.txt` holds the captions, one a line. `data.shards.Shards` reads any sample at random."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..common.files import locked, refuse_foreign, swap_in, write_text
from ..common.storage import without_secrets
from .preparing import Results, prepared_by_threads, prepared_on_ray
from .reading.pair import Pair, Pairs, fingerprint
from .reading.scan import IMAGE_SUFFIXES, LeftOut
from .sample_files import Packing, Rejection
from .shard_index import (
    INDEX_FILE,
    PLAN_FILE,
    REJECTED_FILE,
    SCHEMA_VERSION,
    Packed,
    check_part,
    report_progress,
    rows_left_out,
    write_index,
    write_rejected,
)
from .tar_writer import Tar

_END_BYTES = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE  # the most that a tar's end takes


def pack(
    pairs: Sequence[Pair],
    out: str | Path,
    *,
    source: str,
    packing: Packing = Packing(),  # noqa: B008 (frozen)
    part: tuple[int, int] = (1, 1),
    workers: int | None = None,
    overwrite: bool = False,
    use_ray: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Packed:
    """Writes pairs as shards. The folder is called OUT.partial until it is complete.

    Every `samples_per_shard` pairs are a chunk, which is packed on its own: a repeated call leaves finished chunks as
    they are, and the parts of a job array pack different ones.

    Args:
        pairs: of `sources.read_pairs`.
        out: the folder to write; with a `val_fraction` it gets the folders train and val.
        source: where the pairs came from, for messages and the index.
        part: (i, n) packs every n-th chunk, from the i-th on; the part that ends last puts all together.
        workers: threads that read, decode and encode; by default one a core.
        overwrite: replace `out` if it exists, and the unfinished folder of another packing.
        use_ray: have Ray's actors read, decode and encode, instead of `workers`; see `preparing.py`.
        progress: called with the number of pairs done, now and then.

    Raises:
        ValueError: `out` exists, no pair can be used, another process is at it, or an argument out of its range.
    """
    out = Path(out)
    check_part(part)
    number, count = part
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if not len(pairs):
        what = f"no image ({', '.join(IMAGE_SUFFIXES)}) with a .txt of the same name beside it"
        raise ValueError(f"no pairs found in {source}: it holds {what if Path(source).is_dir() else 'no rows'}")
    here = str(Path(source).resolve()) if Path(source).exists() else without_secrets(source)  # photos is photos/
    plan = {"schema": SCHEMA_VERSION, "source": here, "pairs": len(pairs), "fingerprint": fingerprint(pairs)}
    plan |= {"found": pairs.found if isinstance(pairs, Pairs) else ""} | asdict(packing)
    work = out.with_name(f"{out.name}.partial")
    lock = out.with_name(f".{out.name}.lock")
    busy = f"another process is packing {out}"
    with locked(lock, busy, patience_s=600):
        if count > 1 and _is_of(out, plan):
            return read_packed(out)  # another part has finished
        _refuse_to_replace(out, overwrite)
        if _is_of(work, plan):  # only its name was missing
            _publish(out, work)
            return read_packed(out)
        _begin(out, work, plan, overwrite, busy)
    chunks = [
        _Chunk(work, n, range(start, min(start + packing.samples_per_shard, len(pairs))))
        for n, start in enumerate(range(0, len(pairs), packing.samples_per_shard))
    ]
    own, done = chunks[number - 1 :: count], 0
    ahead = prepared_on_ray(pairs, [chunk.indices for chunk in own if not chunk.is_done], packing)
    with closing(ahead):  # it begins when it is first asked
        for chunk in own:
            with locked(chunk.lock, busy, patience_s=0):
                if not chunk.is_done:
                    by_threads = prepared_by_threads(pairs, chunk.indices, packing, workers or os.cpu_count() or 1)
                    with nullcontext(ahead) if use_ray else closing(by_threads) as prepared:
                        chunk.write(prepared, packing, partial(report_progress, progress, done))
            done += len(chunk.indices)
            report_progress(progress, done, 0)
    with locked(lock, busy, patience_s=600):
        if (work / PLAN_FILE).is_file():
            if missing := sum(not chunk.is_done for chunk in chunks):
                return Packed(0, 0, 0, 0, 0, missing)
            _finish(out, work, plan, chunks, pairs.left_out if isinstance(pairs, Pairs) else ())
        elif not out.exists():
            raise ValueError(f"none of the {len(pairs)} pairs in {source} can be used, as another part has found")
        return read_packed(out)


def _is_of(out: Path, plan: dict[str, Any]) -> bool:
    """Whether a folder was made by this plan."""
    for path in (out / INDEX_FILE, out / "train" / INDEX_FILE):
        if path.is_file():
            index = json.loads(path.read_text(encoding="utf-8"))
            return all(index.get(key) == value for key, value in plan.items())
    return False


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ValueError(f"{out} exists already; pass --overwrite to replace it, or name another folder")
    if not any((out / name / INDEX_FILE).is_file() for name in (".", "train")):
        raise ValueError(f"{out} is not a folder of shards (it has no {INDEX_FILE}), so it is not overwritten")
    refuse_foreign(out, _packed_files(out), "packing")


def _packed_files(out: Path) -> set[Path]:
    """The files of a folder that `pack` made."""
    ours = {out / REJECTED_FILE}
    for folder in (out, out / "train", out / "val"):
        if (folder / INDEX_FILE).is_file():
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            if isinstance(index, dict) and "fingerprint" in index:  # an index alone was made for others' shards
                shards = index.get("shards", [])
                ours |= {folder / INDEX_FILE} | {folder / str(s.get(k)) for s in shards for k in ("file", "offsets")}
    return ours


def _begin(out: Path, work: Path, plan: dict[str, Any], overwrite: bool, busy: str) -> None:
    """Makes the folder to work in, or finds the one that the same packing has begun."""
    path = work / PLAN_FILE
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        different = [
            f"{key} was {begun.get(key)!r} and is {plan[key]!r}" for key in plan if begun.get(key) != plan[key]
        ]
        if not different:
            return
        for chunk_lock in work.glob("*.lock"):
            with locked(chunk_lock, busy, patience_s=0):
                pass
        if not overwrite:
            raise ValueError(
                f"{work} holds the beginning of another packing: {', '.join(different)}. Repeat that one to go on with "
                "it, or pass --overwrite to begin anew"
            )
        shutil.rmtree(work)
    elif work.exists() and any(not path.match(".*.tmp") for path in work.iterdir()):
        raise ValueError(f"{work} is in the way: it is no packing that was begun (it has no {PLAN_FILE})")
    write_text(path, json.dumps(plan, indent=1) + "\n")


class _Chunk:
    """Some consecutive pairs, which become one shard, or more if they are large, and as many held out.

    Args:
        indices: of the pairs; they are also the samples' keys.
    """

    def __init__(self, work: Path, number: int, indices: range) -> None:
        self.work, self.number, self.indices = work, number, indices
        self.result = work / f"chunk-{number:05d}.json"  # written last: a chunk without it is not done
        self.lock = work / f"chunk-{number:05d}.lock"

    @property
    def is_done(self) -> bool:
        return self.result.is_file()

    def read(self) -> dict[str, Any]:
        return json.loads(self.result.read_text(encoding="utf-8"))

    def write(self, prepared: Results, packing: Packing, progress: Callable[[int], None]) -> None:
        """Packs this chunk's part of what is prepared."""
        rejected: list[tuple[str, str, str]] = []
        shards: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        tars: dict[str, Tar] = {}
        turned = 0

        def close(side: str) -> None:
            shards[side].append(tars.pop(side).close())

        for index, result in self._own(prepared):
            if isinstance(result, Rejection):
                rejected.append((f"{index:09d}", result.source, result.reason))
            else:
                side = "val" if result.is_held_out else "train"
                turned += result.is_turned
                if side in tars and tars[side].size + result.size + _END_BYTES > packing.max_shard_bytes:
                    close(side)
                if side not in tars:
                    tars[side] = Tar(self.work / f"chunk-{self.number:05d}-{side}-{len(shards[side])}.tar")
                tars[side].write(f"{index:09d}", result.members)
            if (index + 1) % 64 == 0:
                progress(index + 1 - self.indices.start)
        for side in list(tars):
            close(side)
        write_text(self.result, json.dumps({"shards": shards, "rejected": rejected, "turned": turned}))

    def _own(self, prepared: Results) -> Results:
        """This chunk's results. Those before them are of a chunk that another process has packed meanwhile."""
        for index, result in prepared:
            if index >= self.indices.start:
                yield index, result
            if index == self.indices.stop - 1:
                return


def _finish(out: Path, work: Path, plan: dict[str, Any], chunks: list[_Chunk], left_out: Sequence[LeftOut]) -> None:
    """Numbers the chunks' shards, writes the index, and gives the folder its name.

    Each step can be done again by a process that comes after one that was killed here.
    """
    results = [chunk.read() for chunk in chunks]
    rejected = [tuple(row) for result in results for row in result["rejected"]]
    shards = {side: [entry for result in results for entry in result["shards"][side]] for side in ("train", "val")}
    counts = {side: sum(entry["samples"] for entry in entries) for side, entries in shards.items()}
    turned = sum(result["turned"] for result in results)
    if not sum(counts.values()):
        shutil.rmtree(work)
        examples = "".join(f"\n  {name}: {reason}" for _, name, reason in rejected[:5])
        dropped = Counter(each.reason[9:] for each in left_out if each.reason.startswith("dropped: "))
        by_reason = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common())
        beside = f", beside {dropped.total()} that a list drops ({by_reason})" if dropped else ""
        raise ValueError(f"none of the {plan['pairs']} pairs in {plan['source']} can be used{beside}:{examples}")
    assert sum(counts.values()) + len(rejected) == plan["pairs"]
    if plan["val_fraction"] and not all(counts.values()):
        empty = min(counts, key=lambda side: counts[side])
        shutil.rmtree(work)
        raise ValueError(
            f"of {sum(counts.values())} pairs none fell to the side {empty!r} with val_fraction "
            f"{plan['val_fraction']}; another fraction, or more pairs, would help"
        )
    write_rejected(work, [*rejected, *rows_left_out(left_out)])
    reasons = Counter[str]()
    for each in left_out:
        reasons[each.reason] += each.count
    for side in ("val", "train") if plan["val_fraction"] else ("train",):  # train's index tells that all is there
        folder = work / side if plan["val_fraction"] else work
        folder.mkdir(exist_ok=True)
        entries = []
        for number, entry in enumerate(shards[side]):
            for suffix in (".tar", ".npz"):
                before = (work / entry["file"]).with_suffix(suffix)
                if before.exists():
                    os.replace(before, folder / f"{number:05d}{suffix}")
            entries.append({**entry, "file": f"{number:05d}.tar", "offsets": f"{number:05d}.npz"})
        write_index(folder, entries, {**plan, "rejected": len(rejected), "turned": turned}, reasons)
    _publish(out, work)


def _publish(out: Path, work: Path) -> None:
    """Removes from a complete folder what only the packing needed, and gives it its name."""
    for pattern in ("chunk-*", ".*.tmp", "*/.*.tmp", PLAN_FILE):
        for path in work.glob(pattern):
            path.unlink(missing_ok=True)
    swap_in(work, out)


def read_packed(out: Path) -> Packed:
    folders = [out / "train", out / "val"] if (out / "train").is_dir() else [out]
    indexes = [json.loads((folder / INDEX_FILE).read_text(encoding="utf-8")) for folder in folders]
    entries = [entry for index in indexes for entry in index["shards"]]
    kept, held_out = [index["samples"] for index in indexes] + [0] * (2 - len(indexes))
    size, left_out = sum(entry["bytes"] for entry in entries), sum(indexes[0].get("left_out", {}).values())
    turned = indexes[0].get("turned", 0)
    return Packed(kept, indexes[0]["rejected"], len(entries), size, held_out, left_out=left_out, turned=turned)
