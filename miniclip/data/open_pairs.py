"""A source or shards, as a user names them -> pairs; and sources packed into the cache for training."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from itertools import islice
from pathlib import Path, PurePosixPath

from ..common.cache import make_room, remove_unused, use
from ..common.files import cache_folder, locked, remove
from ..common.storage import is_url, name_of
from ..common.wording import counted
from .indexing.tar_members import TarHeaders
from .pack import pack, read_packed
from .reading.folders import same_sample
from .reading.huggingface import HUB_PREFIX
from .reading.pair import Pair, Pairs, fingerprint
from .reading.scan import image_files, is_leftover, same_name, scan
from .reading.splits import is_all_of, is_named
from .reading.tables import is_parquet, is_pattern
from .shard_index import INDEX_FILE, REJECTED_FILE, kind_of
from .shards import Shards, split_sample_name
from .sources import read_pairs

_HASH = "[0-9a-f]" * 16  # a pattern of the last part of a packed source's name
_MEMBERS_LOOKED_AT = 1000  # of each tar beside pictures
_READ_AS = 8  # raised where the same source is read as other pairs than by earlier versions


def shard_pairs(source: str, split: str | None = None) -> Pairs:
    """The samples of shards as pairs, to be sharded anew.

    Args:
        split: that of `Shards`.
    """
    shards = Shards(source, split=split)
    names = shards.names()

    def read(index: int) -> Pair:
        try:
            record, extra = shards[index], shards.info(index)
        except ValueError as error:
            return Pair(names[index], problem=str(error))
        facts = {name: value for name, value in extra.items() if name not in ("width", "height")}
        return Pair(names[index], record.image, record.captions, None if record.image else "no image", facts)

    found = f"{counted(len(names), 'sample')} of {counted(len(shards.entries), 'shard')}"
    return Pairs(names, read, found, left_out=shards.left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Training on a source that is not packed yet


def is_shards(source: str) -> bool:
    """Whether a source is a folder, pattern or URL of shards, rather than one for `read_pairs`.

    A folder has an index, or tars that are not left over from unpacking the pictures below them. A few further pictures
    (docs/preview.png) are none of the samples.

    Raises:
        ValueError: a folder of tars without an index holds as many other pictures, or pairs, or a folder per class.
    """
    path = Path(source)
    if source.startswith(HUB_PREFIX) or path.is_file():
        return source.endswith(".tar")
    if not path.is_dir():
        return name_of(source).endswith(".tar") or is_url(source)
    is_indexed = any((path / name / INDEX_FILE).is_file() for name in (".", "train"))
    return is_indexed or (any(path.glob("*.tar")) and not _is_of_pictures(path))


def _is_of_pictures(folder: Path) -> bool:
    """Whether a folder of tars is read for the pictures in and below it. See `is_shards`."""
    below = scan(folder)
    tars = [tar for tar in sorted(folder.glob("*.tar")) if tar.is_file() and tar.stat().st_size]
    if not below.images:
        return False
    there, held, are_whole = {same_name(image.stem) for image in below.images}, list[str](), True
    for tar in tars:
        try:
            with open(tar, "rb") as file, TarHeaders(file, str(tar)) as headers:
                names = [PurePosixPath(member.name) for member in islice(headers, _MEMBERS_LOOKED_AT)]
        except (ValueError, OSError):
            names, are_whole = [], False
        images = [name for name in names if kind_of(name.suffix[1:]) == "image" and not is_leftover(name.name)]
        held += [same_name(image.stem) for image in images]
    if 2 * sum(name in there for name in held) >= len(held) and (held or are_whole):
        return True
    own = {same_sample(image.relative_to(folder).with_suffix("")) for image in below.images}
    has_pairs = any(same_sample(text.relative_to(folder).with_suffix("")) in own for text in below.texts)
    in_each = Counter(image.parent for image in below.images)
    are_classes = sum(count > 1 for place, count in in_each.items() if place != folder) > 1
    if len(below.images) < len(held) and not has_pairs and not are_classes:
        return False
    place = Path(os.path.commonpath([image.parent for image in below.images]))
    pictures = "move the tars elsewhere" if place == folder else f"name {place}"
    raise ValueError(
        f"{folder} holds {counted(len(tars), 'tar')} without an index, and {counted(len(below.images), 'picture')} not "
        f"in them; which are meant can't be known. For the tars name '{folder}/*.tar'; for the pictures {pictures}"
    )


def open_pairs(
    source: str,
    *,
    images: str | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    split: str | None = None,
    default_split: str = "train",
) -> Pairs:
    """The pairs of shards, or of anything that `read_pairs` reads.

    Args:
        split, default_split: as those of `read_pairs`.

    Raises:
        ValueError: as `Shards` and `read_pairs`.
    """
    if not is_shards(source):
        return read_pairs(
            source,
            images=images,
            image_column=image_column,
            caption_columns=caption_columns,
            split=split,
            default_split=default_split,
        )
    if images or image_column or caption_columns:
        raise ValueError(f"--images, --image-column and --caption-column are for tables; {source} is shards")
    pairs = shard_pairs(source, split or default_split)
    if split and not (is_named(Path(source), split) or is_all_of(split) or _are_named(pairs, split)):
        raise ValueError(f"{source} is shards, so --split {split} can't be followed; name the folder of that part")
    return pairs


def _are_named(pairs: Pairs, split: str) -> bool:
    """Whether the names of all tars tell this split."""
    return all(is_named(Path(tar), split) for tar in {split_sample_name(name)[0] for name in pairs.names})


def pack_into_cache(source: str, limit_bytes: int = 50 * 10**9, default_split: str = "train") -> str:
    """The location of a source's shards. A source that is not packed yet is packed into the cache, and again whenever
    it has changed.

    Args:
        default_split: the part of a source that has several.
        limit_bytes: sources that were not used for longest leave the cache, so that all together have no more than
            this; but none that a process uses, which began to when it called this.

    Raises:
        ValueError: as `read_pairs` and `pack`.
    """
    path = Path(source)
    is_packable = path.is_file() or is_pattern(source) or is_parquet(path) or (path.is_dir() and image_files(path))
    if is_shards(source) or not is_packable:
        return source  # `Shards` raises if nothing is there
    try:
        pairs = read_pairs(source, default_split=default_split)
        name = hashlib.sha256(
            f"{_READ_AS} {path.resolve()} {fingerprint(pairs, is_of_disk=True)}".encode()
        ).hexdigest()[:16]
        out = cache_folder("packed") / f"{path.stem}-{name}"
        with _room(out.parent):
            use(out)
        with locked(Path(f"{out}.lock"), f"another process is packing {out}"):
            if not out.exists():
                print(f"Packing {source} into {out}, once: {pairs.found}", flush=True)
                pack(pairs, out, source=source)
            with suppress(OSError):  # another user's
                os.utime(out)
        _leave_at_most(out.parent, limit_bytes)
    except ValueError as error:
        raise ValueError(f"{error} (to pack it otherwise: `miniclip shards {source} OUT`)") from error
    packed = read_packed(out)
    listed = f", listed in {out / REJECTED_FILE}" if packed.rejected or packed.left_out else ""
    left_out = f", {packed.left_out} left out" if packed.left_out else ""
    print(f"{source}: {packed.kept} pairs packed in {out}; {packed.rejected} rejected{left_out}{listed}", flush=True)
    return str(out)


def _room(folder: Path) -> AbstractContextManager[None]:
    """Held by who decides what is used and what leaves."""
    return locked(folder / "folder.lock", f"another process makes room in {folder}")


def _leave_at_most(folder: Path, limit_bytes: int) -> None:
    """Deletes packed sources, those not used for longest first, and the beginnings of packings that were given up."""

    def delete(path: Path) -> None:
        when = datetime.fromtimestamp(path.stat().st_mtime)
        remove_unused(path, used_as=path.with_name(path.name.removesuffix(".partial")))
        print(f"Removed {path}, not used since {when:%Y-%m-%d}: data.cache_gb is {limit_bytes / 1e9:g}", flush=True)

    with _room(folder):
        for path in folder.glob(f".*-{_HASH}*.old"):  # of a process that was killed while it deleted
            remove(path)
        names = (f"*-{_HASH}", f"*-{_HASH}.partial")  # as the folder may hold other people's files
        make_room([path for name in names for path in folder.glob(name)], limit_bytes, delete)
