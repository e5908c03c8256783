"""What a set to evaluate on is: images with one label, several labels, or captions."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ...common.processes import warn_once
from ...common.storage import is_url, read_bytes, without_secrets
from ...common.wording import columns_in_words
from ...data.reading.cells import text_of_cell, words_for_no_value
from ...data.reading.scan import LeftOut
from ...images import open_image, orientation, to_8_bits, upright
from ..prompts import Prompts

TASKS = ("classification", "multilabel", "retrieval")


@dataclass(frozen=True)
class NoImage:
    """In the place of an image that can't be had; counts as one that can't be read."""

    reason: str


@dataclass(frozen=True)
class EvaluationSet:
    """N images, wherever they are. Safe to read from in other processes.

    Args:
        name: for reports.
        images: N times a path, a URL, bytes, or a picture; may read them only when it is asked for one.
        keys: what the user knows each image by; by default its path.
        metadata: what else is known of the images, N values under each name, for scores of parts of them: a list of
            them, or an `ArrowColumn`.
        identity: changes whenever an image does, and can be computed without reading them.
        left_out: files and rows of the source that are no image of the set, with the reason.
        names: what `miniclip shards` calls each image, of a table or data set of which a split was asked for.
        upright: pictures that EXIF turns are opened as viewers show them; by default as they are stored, which is how
            CLIP's scores were published.
        task: what the images are for, one of `TASKS`; none for bare images. `has_classes`: prompts describe classes.
    """

    task: ClassVar[str] = ""
    has_classes: ClassVar[bool] = False

    name: str
    images: Sequence[Any]
    keys: Sequence[str] | None = field(default=None, kw_only=True)
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict, kw_only=True)
    identity: str | None = field(default=None, kw_only=True)
    left_out: Sequence[LeftOut] = field(default=(), kw_only=True)
    names: Sequence[str] | None = field(default=None, kw_only=True)
    upright: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        return str(self.images[index]) if self.keys is None else self.keys[index]

    def shown(self, index: int) -> str:
        """The key as it may be published."""
        return without_secrets(self.key(index))

    def shown_keys(self, indices: Iterable[int]) -> list[str]:
        """The keys as they may be published. Those that differ in what is not shown have a digest behind them."""
        indices = list(indices)
        found = [self.shown(index) for index in indices]
        whole = defaultdict[str, set[str]](set)
        for index, name in zip(indices, found, strict=True):
            whole[name].add(self.key(index))
        return [
            name if len(whole[name]) == 1 else f"{name} ({digest_lines([self.key(index)])[:8]})"
            for index, name in zip(indices, found, strict=True)
        ]

    def open(self, index: int) -> Image.Image:
        """The decoded image.

        Raises:
            ValueError: it can't be read; names its source.
        """
        return self.decoded(self.stored(index), index)

    def decoded(self, stored: Image.Image | bytes, index: int) -> Image.Image:
        """The image of what `stored` gives.

        Raises:
            ValueError: it is no image that can be read; names its source.
        """
        key = self.shown(index)
        image = open_image(stored, key) if isinstance(stored, bytes) else to_8_bits(stored, key)
        return upright(image) if self.upright else image

    def stored(self, index: int) -> Image.Image | bytes:
        """The bytes of a file; or a picture that was opened before.

        Raises:
            ValueError: there is none, or it can't be had; names its source.
        """
        try:
            image = self.images[index]
            if isinstance(image, Image.Image):
                return image
            if image is None:
                raise ValueError(f"{self.shown(index)} has no image")
            if isinstance(image, NoImage):
                raise ValueError(f"{self.shown(index)}: {image.reason}")
            return read_bytes(image)
        except OSError as error:
            raise ValueError(f"{self.shown(index)} can't be read: {error.strerror or error}") from error

    def column(self, name: str) -> list[str | None]:
        """N values of the metadata as texts, None where there is none.

        Raises:
            ValueError: there is no such column; names those that are there.
        """
        return column_of(self.metadata, name, self.name)

    def fingerprint(self) -> str:
        """Stands for the images, how they are opened, and their order: the same as long as none changes.

        Files are known by path, size and times, URLs by their address, and what is in memory by its bytes. The times
        are those of modification and, of pictures' own files, of the change to them, which no program can set back.
        """
        return self.fingerprints()[0]

    def fingerprints(self) -> tuple[str, str]:
        """That, and the one of earlier versions, which had no times of change."""
        opened = ["upright"] if self.upright else []
        if self.identity is not None:
            return (digest_lines([self.identity, *opened]),) * 2
        now, before = [hashlib.sha256() for _ in range(2)]
        for index in range(len(self)):
            known, changed = _image_identity(self.images[index], self.key(index))
            _add_line(now, known + changed)
            _add_line(before, known)
        for each in opened:
            _add_line(now, each)
            _add_line(before, each)
        return now.hexdigest(), before.hexdigest()


def column_of(metadata: Mapping[str, Sequence[Any]], name: str, source: str) -> list[str | None]:
    """As `EvaluationSet.column`; a warning names the texts that are taken for no value."""
    if name not in metadata:
        has = f"its columns are {columns_in_words(metadata)}" if metadata else "it has none"
        raise ValueError(f"{source} has no column {name!r}; {has}")
    cells = metadata[name]
    if words := words_for_no_value(cells):
        # From here whoever calls, so that it is shown once for a set.
        warn_once(f"{source}: {words} in column {name!r} are taken for cells without a value", stacklevel=1)
    return [text_of_cell(cell) for cell in cells]


def digest_lines(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        _add_line(digest, text)
    return digest.hexdigest()


def _add_line(digest: Any, text: str) -> None:
    digest.update(text.encode("utf-8", "surrogatepass") + b"\0")


def _image_identity(image: Any, key: str) -> tuple[str, str]:
    """A text that changes whenever the image does, but for a file that gets its size and time back; and that file's
    time of change."""
    if isinstance(image, Image.Image):
        return _picture_identity(image), ""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest(), ""
    if image is None or isinstance(image, NoImage) or (isinstance(image, str) and is_url(image)):
        return f"{image} {key}", ""
    return file_identity(image)


def file_identity(path: str | Path) -> tuple[str, str]:
    """A file's path, size and time of modification; and its time of change, which a program can't set."""
    try:
        facts = Path(path).stat()
    except OSError:
        return f"{path} is missing", ""
    return f"{Path(path).resolve()} {facts.st_size} {facts.st_mtime_ns}", f" {facts.st_ctime_ns}"


def _picture_identity(picture: Image.Image) -> str:
    """Its pixels; their colours, where a palette or a value that is transparent gives them those; and its turn."""
    facts = [picture.mode, str(picture.size), hashlib.sha256(picture.tobytes()).hexdigest()]
    transparent = picture.info.get("transparency")
    if transparent is not None:
        facts.append(repr(transparent))
    if picture.mode in ("P", "PA"):
        facts += [hashlib.sha256(picture.convert("RGBA").tobytes()).hexdigest()]
    if (turn := orientation(picture)) > 1:
        facts.append(str(turn))
    return " ".join(facts)


@dataclass(frozen=True)
class GroupedImages(EvaluationSet):
    """N images that nothing is asked of but what they are like.

    Args:
        groups: as those of `LabelledImages`.
    """

    groups: tuple[str, ...]


@dataclass(frozen=True)
class LabelledImages(EvaluationSet):
    """N images of C classes, each of one.

    Args:
        labels: N indices of classes, 0 to C - 1.
        classnames: C names, as they go into the prompts.
        templates: the prompts' wordings, for all classes or by class.
        groups: N values; images of one value are not independent of each other (views of one scene, scans of one
            hand) and widen the interval as fewer would. By default every image for itself.
        classnames_from, templates_from: where those came from, for who reads the scores.
    """

    labels: tuple[int, ...]
    classnames: tuple[str, ...]
    templates: Prompts
    groups: tuple[str, ...]
    classnames_from: str = field(default="", kw_only=True)
    templates_from: str = field(default="", kw_only=True)

    task = "classification"
    has_classes = True


@dataclass(frozen=True, eq=False)
class MultilabelImages(EvaluationSet):
    """N images of C classes, each of any number of them.

    Args:
        labels: (N, C) booleans.
        classnames, templates, groups, classnames_from, templates_from: as those of `LabelledImages`.
    """

    labels: np.ndarray
    classnames: tuple[str, ...]
    templates: Prompts
    groups: tuple[str, ...]
    classnames_from: str = field(default="", kw_only=True)
    templates_from: str = field(default="", kw_only=True)

    task = "multilabel"
    has_classes = True


@dataclass(frozen=True)
class CaptionedImages(EvaluationSet):
    """N images, each with at least one caption, to be found by them and the other way round.

    Args:
        captions: N times the texts of an image.
        groups: as those of `LabelledImages`.
    """

    captions: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]

    task = "retrieval"


@dataclass(frozen=True)
class Found:
    """What a source holds, before class names and prompts are settled.

    Args:
        labels: N names or indices, as texts; lists of them for several labels each.
        labels_from: where the labels are read, which the class names are taken from if there are no others.
        are_cells: labels are what somebody wrote into cells of a table, or files, and may be several in one.
        classnames: the source's own, in the order of its labels.
        class_labels: the label of each of the class names, where their file says it.
        templates: the source's own, or what reads them.
        beside: files that may hold names and prompts, in the order in which they count.
    """

    name: str
    images: Sequence[Any]
    keys: Sequence[str] | None = None
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    labels: Sequence[str] | Sequence[list[str]] = ()
    labels_from: str = ""
    are_cells: bool = False
    captions: tuple[tuple[str, ...], ...] = ()
    classnames: tuple[str, ...] | None = None
    classnames_from: str = ""
    class_labels: tuple[str, ...] | None = None
    templates: Prompts | Callable[[], Prompts] | None = None
    templates_from: str = ""
    beside: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    identity: str | None = None
    left_out: Sequence[LeftOut] = ()

    @property
    def task(self) -> str:
        if self.captions:
            return "retrieval"
        return "multilabel" if isinstance(self.labels[0], list) else "classification"


def labelled(data: EvaluationSet) -> LabelledImages:
    """The same, for who needs one label for each image.

    Raises:
        ValueError: the set is of another kind.
    """
    if isinstance(data, LabelledImages):
        return data
    has = "several labels for each image" if data.has_classes else "captions, for retrieval"
    raise ValueError(f"{data.name} has {has}; zero-shot classification needs one label for each image")


@dataclass(frozen=True)
class Columns:
    """The columns that were asked for."""

    label: str | None
    image: str | None
    group: str | None

    def refuse(self, source: str, what: str, *names: str) -> None:
        """Raises ValueError if one of `names` is asked for, of a source that has no columns."""
        for name in names:
            if getattr(self, name):
                article = "an" if name == "image" else "a"
                raise ValueError(f"{source} is {what} and has no columns; {article} {name} column needs a table")

    def check(self, columns: Sequence[str], source: str) -> None:
        for name in (self.label, self.image, self.group):
            if name is not None and name not in columns:
                raise ValueError(f"{source} has no column {name!r}; its columns are {columns_in_words(columns)}")
