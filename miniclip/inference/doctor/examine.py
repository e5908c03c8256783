"""Pairs, and what they will be validated and tested on -> all that is wrong with them, by the pair.

N pictures of all parts, B pairs of a batch.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ...data.wordings.equal_captions import same_caption
from ...evaluation.encoder import Encoder
from ...evaluation.features import FeatureCache
from ...images import Preprocess
from . import costs
from .captions import Naming, doubt_in, junk_in, naming, normalised, repeated
from .costs import Cost
from .findings import REASONS, Finding
from .fits import Fit, fit_of
from .languages import languages
from .near import NEAR, Likeness, find_alike
from .parts import TEST, TRAIN, VAL, Looked, Progress, Source, look_at
from .pictures import BLANK_LEVELS

_BLUR_LEAST, _BLUR_MOST, _BLUR_SPREADS = 0.45, 0.65, 3.5


@contextmanager
def _silent(what: str, total: int) -> Iterator[object]:
    yield lambda done: None


@dataclass(frozen=True)
class Diagnosis:
    """
    Args:
        looked: the usable pictures, whose rows the findings name.
        findings: by the gravity of their reason, the worst of each first.
        groups: rows of train that should share a target, two at least in each.
        costs: what the findings do to the loss.
        language: of most captions, ISO 639-1.
        names: captions that name other pictures, too, as in `Naming.examples`.
        repeated: captions that are boilerplate, with their number of pictures.
        estimated_mismatch: share of the pairs that were put together by chance, as a model sees it; None without one.
    """

    looked: Looked
    findings: Sequence[Finding]
    groups: Sequence[Sequence[int]]
    costs: Sequence[Cost]
    language: str
    names: Sequence[tuple[str, int, int, str]]
    repeated: Mapping[str, int]
    estimated_mismatch: float | None

    def counts(self) -> dict[str, int]:
        """Pairs under each reason, those with none left out."""
        found = Counter(finding.reason for finding in self.findings)
        return {reason: found[reason] for reason in REASONS if found[reason]}

    def dropped(self, reasons: Sequence[str]) -> dict[int, Finding]:
        """By row, the gravest finding of each pair that has one of these reasons."""
        out: dict[int, Finding] = {}
        for finding in self.findings:
            if finding.reason in reasons:
                out.setdefault(finding.row, finding)
        return out


def examine(
    sources: Sequence[Source],
    *,
    model: Encoder | None = None,
    image_size: int = 224,
    batch_size: int = 256,
    near: float = NEAR,
    seed: int = 0,
    workers: int | None = None,
    images_at_once: int = 64,
    cache: FeatureCache | None = None,
    fingerprint: str | None = None,
    progress: Progress = _silent,  # type: ignore[assignment]
) -> Diagnosis:
    """
    Args:
        sources: of the parts train, val and test.
        model: without one, captions that do not fit, and turned pictures without a tag, are not looked for.
        image_size: side of the model's input that is planned, pixels.
        batch_size: pairs that are contrasted with each other.
        near: likeness from which pictures are near duplicates.
        seed: draws the pairs that others are compared with.
        workers: threads that decode, and processes for the model.
        images_at_once: through the model.
        cache, fingerprint: keep the model's features, and stand for the pictures.

    Raises:
        ValueError: a library is missing, an argument out of its range, or not one pair can be used.
    """
    _refuse_bad_arguments(image_size, batch_size, workers, images_at_once)
    preprocess = Preprocess(image_size, (0, 0, 0), (1, 1, 1)) if model is None else model.preprocess
    looked = look_at(sources, image_size, preprocess, workers, progress)
    train = looked.rows_of(TRAIN)
    if not len(train):
        reasons = "; ".join(f"{kind} ({count:,})" for kind, (count, _) in list(looked.problems.items())[:3])
        raise ValueError(f"not one of the pairs can be used: {reasons or 'there are none'}")
    alike = find_alike(looked, near, progress)
    captions = [looked.captions[row] for row in train.tolist()]
    shared = _shared_captions(looked, train)
    empty = [_emptiness(each, shared) for each in captions]
    are_junk = [each is not None for each in empty]
    with progress("languages", len(captions)) as report:
        language, others = languages(captions, are_junk, report)
    named = naming(captions, are_junk)
    fit = None
    if model is not None:
        kept = {"seed": seed, "batch_size": images_at_once, "workers": workers or 0, "cache": cache}
        fit = fit_of(looked, train, model, fingerprint=fingerprint, progress=progress, **kept)  # type: ignore[arg-type]
    often = repeated(captions)
    found = [
        *_alike_findings(looked, alike),
        *_picture_findings(looked, train, image_size),
        *_caption_findings(train, captions, empty, often, others, named),
        *_fit_findings(train, fit),
    ]
    order = {reason: place for place, reason in enumerate(REASONS)}
    found.sort(key=lambda finding: (order[finding.reason], _mildness(finding), finding.row))
    groups = _groups_of_train(looked, train, alike, are_junk, often)
    spent = _costs(looked, train, alike, captions, named, fit, batch_size)
    estimated = None if fit is None else fit.estimated
    return Diagnosis(looked, found, groups, spent, language, named.examples, often, estimated)


def _refuse_bad_arguments(image_size: int, batch_size: int, workers: int | None, images_at_once: int) -> None:
    if missing := [name for name in ("imagehash", "py3langid") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"doctor needs {' and '.join(missing)}: pip install 'miniclip[doctor]'")
    given = {"image_size": (image_size, 1), "batch_size": (batch_size, 2), "workers": (workers, 1)}
    for name, (value, least) in (given | {"images_at_once": (images_at_once, 1)}).items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def _mildness(finding: Finding) -> float:
    """Sorts the worst of a reason first."""
    return finding.score if finding.reason in ("blank", "tiny", "language") else -finding.score


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _alike_findings(looked: Looked, alike: Likeness) -> Iterator[Finding]:
    """What a picture shares with a part that must not know it (train with val and test, val with test), and with its
    own part, where one of each group is kept: the largest that is no copy."""
    rank = {TEST: 0, VAL: 1, TRAIN: 2}
    for rows in alike.groups():
        ordered = sorted(rows.tolist(), key=lambda row: (rank[looked.part(row)], -int(looked.sides[row].prod()), row))
        of_digest: dict[bytes, list[int]] = {}
        for row in ordered:
            of_digest.setdefault(looked.digests[row], []).append(row)
        copied = {row: twin for same in of_digest.values() for row in same if (twin := _copied(looked, row, same)) >= 0}
        kept = next(row for row in ordered if row not in copied)
        for row in ordered:
            part, likeness = looked.part(row), float(alike.likeness[row])
            if part != looked.part(ordered[0]):
                first = of_digest[looked.digests[row]][0]
                reason, known = ("leak", first) if looked.part(first) != part else ("near-leak", ordered[0])
                yield Finding(row, reason, likeness, f"in {looked.part(known)}: {looked.key(known)}", known)
            if row in copied:
                yield Finding(row, "copy", likeness, f"as {looked.key(copied[row])}", copied[row])
            elif row != kept and part == looked.part(kept):
                note = f"as {looked.key(kept)}" if part == TRAIN else f"in {part}: {looked.key(kept)}"
                yield Finding(row, "near-duplicate", likeness, note, kept)


def _copied(looked: Looked, row: int, same: Sequence[int]) -> int:
    """The pair of train, of those with the same pixels, that makes this one a copy; -1 for none."""
    return next((other for other in same if other != row and _is_copy(looked, row, other)), -1)


def _is_copy(looked: Looked, row: int, other: int) -> bool:
    """Whether of two pictures of the same pixels, both of train, the other has all captions that this one has, and
    comes first where each has all of the other's."""
    if not looked.part(row) == looked.part(other) == TRAIN:
        return False
    own, others = ({normalised(caption) for caption in looked.captions[each]} for each in (row, other))
    return own < others or (own == others and other < row)


def _picture_findings(looked: Looked, train: np.ndarray, image_size: int) -> Iterator[Finding]:
    for row in train[looked.levels[train] <= BLANK_LEVELS].tolist():
        yield Finding(row, "blank", float(looked.levels[row]))
    for row in train[looked.is_turned[train]].tolist():
        yield Finding(row, "turned", 1.0, "miniclip shards --upright turns the pixels")
    short = looked.sides[train].min(axis=1)
    are_tiny = short < image_size / 2
    for row in train[are_tiny].tolist():
        yield Finding(row, "tiny", float(looked.sides[row].min()), "{} x {} pixels".format(*looked.sides[row]))
    is_judged = (looked.levels[train] > BLANK_LEVELS) & ~are_tiny
    blur = looked.blur[train]
    limit = _blur_limit(blur[is_judged])
    for row in train[is_judged & (blur > limit)].tolist():
        yield Finding(row, "blurred", float(looked.blur[row]))


def _blur_limit(blur: np.ndarray) -> float:
    """Far above the set's own median, as drawings and photographs differ; a median and its spread do not see a few."""
    if not len(blur):
        return _BLUR_MOST
    middle = float(np.median(blur))
    spread = 1.4826 * float(np.median(np.abs(blur - middle)))
    return min(max(middle + _BLUR_SPREADS * spread, _BLUR_LEAST), _BLUR_MOST)


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def _shared_captions(looked: Looked, train: np.ndarray) -> set[str]:
    """Those of several pictures whose pixels differ."""
    digests: dict[str, set[bytes]] = {}
    for row in train.tolist():
        for caption in looked.captions[row]:
            digests.setdefault(caption, set()).add(looked.digests[row])
    return {caption for caption, own in digests.items() if len(own) > 1}


def _emptiness(captions: Sequence[str], shared: set[str]) -> tuple[str, str] | None:
    """The reason where none of the captions says anything, or hardly anything, and what the first is; else None."""
    junk = [junk_in(caption, caption in shared) for caption in captions]
    if all(junk):
        return "junk-caption", junk[0]
    found = [why or doubt_in(caption, caption in shared) for caption, why in zip(captions, junk, strict=True)]
    return ("says-little", found[0]) if all(found) else None


def _caption_findings(
    train: np.ndarray,
    captions: Sequence[Sequence[str]],
    empty: Sequence[tuple[str, str] | None],
    often: Mapping[str, int],
    others: Sequence[tuple[str, float] | None],
    named: Naming,
) -> Iterator[Finding]:
    for place, row in enumerate(train.tolist()):
        first = captions[place][0]
        if (found := empty[place]) is not None:
            reason, what = found
            yield Finding(row, reason, 1.0, f"{what}: {first}")
            if reason == "junk-caption":
                continue
        texts = [normalised(caption) for caption in captions[place]]
        if all(text in often for text in texts):
            yield Finding(row, "boilerplate", float(min(often[text] for text in texts)), first)
        if (other := others[place]) is not None:
            yield Finding(row, "language", other[1], f"{other[0]}: {first}")
        if named.most[place]:
            yield Finding(row, "names-others", float(named.most[place]), first)


def _fit_findings(train: np.ndarray, fit: Fit | None) -> Iterator[Finding]:
    if fit is None:
        return
    for place in np.flatnonzero(fit.turned > 0).tolist():
        note = f"a turn to the left by {90 * int(fit.turned[place])}° fits"
        yield Finding(int(train[place]), "turned-pixels", float(fit.gain[place]), note)
    for place in np.flatnonzero((fit.share > fit.limit) & (fit.turned == 0)).tolist():
        yield Finding(int(train[place]), "mismatch", float(fit.share[place]))


# ---------------------------------------------------------------------------------------------------------------------
# Groups, and the loss


def _groups_of_train(
    looked: Looked, train: np.ndarray, alike: Likeness, are_junk: Sequence[bool], often: Mapping[str, int]
) -> list[list[int]]:
    """Pairs of train with the same captions but for case and punctuation, or nearly the same picture; also by way of
    others. Captions that say nothing join none."""
    parent: dict[object, object] = {}

    def root(of: object) -> object:
        while parent.setdefault(of, of) != of:
            parent[of] = parent[parent[of]]
            of = parent[of]
        return of

    for place, row in enumerate(train.tolist()):
        texts = frozenset(normalised(caption) for caption in looked.captions[row])
        joined: list[object] = [] if are_junk[place] or texts & set(often) else [texts]
        joined += [int(alike.group[row])] if alike.group[row] >= 0 else []
        for label in joined:
            parent[root(label)] = root(("pair", row))
    rows_of: dict[object, list[int]] = {}
    for row in train.tolist():
        rows_of.setdefault(root(("pair", row)), []).append(row)
    return [rows for rows in rows_of.values() if len(rows) > 1]


def _costs(
    looked: Looked,
    train: np.ndarray,
    alike: Likeness,
    captions: Sequence[Sequence[str]],
    named: Naming,
    fit: Fit | None,
    batch_size: int,
) -> list[Cost]:
    equal = [[same_caption(caption) for caption in each] for each in captions]
    same = [["blank"] if looked.levels[row] <= BLANK_LEVELS else [_picture_label(alike, row)] for row in train.tolist()]
    found = [
        costs.of_equal("equal captions", equal, batch_size),
        costs.of_equal("pictures that are nearly the same", same, batch_size),
        costs.of_naming(named.mean, batch_size),
    ]
    return found if fit is None else [*found, costs.of_chance(fit.estimated, batch_size)]


def _picture_label(alike: Likeness, row: int) -> object:
    return f"group {alike.group[row]}" if alike.group[row] >= 0 else f"picture {row}"
