"""Pairs -> what training on them would meet, found on a random sample before the first step.

Works on any sequence of pairs: of shards, or of a source that is not packed yet. N usable images of the sample, M
captions of theirs, B pairs of a batch; shares are of 1, lengths of texts in tokens, start and end included."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..common.storage import is_url, read_bytes
from ..common.thumbnail import thumbnail
from ..common.wording import cut_short, portion, share_of
from ..images import open_image
from ..tokenizer import encode
from .augmentation import Augmentation
from .reading.pair import Pair
from .shards import Shards

if TYPE_CHECKING:
    from .pairs import CaptionChoice
_CONTACTS, _TOP_CAPTIONS = 24, 10
_CONTACT_BOX = (256, 128)  # pixels
_CHUNK = 64  # pairs that are read, then decoded
_TIMED_IMAGES, _TIMED_S, _BRIEF_S = 128, 2.0, 1.0
_NOTABLE = 0.01  # a share from which something is worth a sentence
_NOTABLE_LOSS = 0.1  # of chance
_TEMPLATE = 0.5  # share of the captions that makes one wording a template


class Problem(NamedTuple):
    """A kind of reason why samples can't be used: how many have it, some of their names, and the first one's reason."""

    kind: str
    num_samples: int
    examples: tuple[str, ...]
    reason: str


class Contact(NamedTuple):
    """A sample to look at: its thumbnail is a `data:` URL."""

    source: str
    caption: str
    thumbnail: str


@dataclass(frozen=True)
class Findings:
    """What was found in a sample of some pairs, and what it was held against.

    Args:
        num_pairs, num_sampled: of the data, and of those looked at. All that follows is about the latter.
        image_size, context_length, batch_size: of the training that is planned: pixels, tokens, pairs.
        problems: why some can't be used, the most frequent kind first.
        short_sides, aspects: (N,) pixels, and long side / short side.
        formats, modes: images by file format and by kind of pixels ("RGB", "L", "CMYK", "RGB, 16 bit", …).
        num_rotated: images that an EXIF tag turns or mirrors.
        num_copies: images of which the sample holds another with the same bytes.
        captions_per_image: (N,)
        num_blank: captions without a character, beside others that have some.
        token_counts: (M,) before any cut.
        num_repeated: captions that another image of the sample has too, but for case and white space.
        top_captions: texts that several images have, the most frequent first, with their number of images.
        template, template_share, template_texts: the most frequent caption when digits and punctuation are taken out,
            its share of the captions, and how many different captions it stands for.
        false_negatives: expected share of the B - 1 others in a batch that have the caption of a row.
        lowest_loss: the loss, nats, that no model can undercut because of those; chance is ln B.
        mean_bytes: size of an image file.
        source: the data, as the user named it.
        needed: images/s that training consumes, or None where that is not known.
        read_bytes_per_s: by all threads together; may come from the page cache.
        decode_images_per_s: decoded and augmented by one core.
        contacts: some samples to look at.
    """

    num_pairs: int
    num_sampled: int
    image_size: int
    context_length: int
    batch_size: int
    problems: tuple[Problem, ...]
    short_sides: np.ndarray
    aspects: np.ndarray
    formats: Mapping[str, int]
    modes: Mapping[str, int]
    num_rotated: int
    num_copies: int
    captions_per_image: np.ndarray
    num_blank: int
    token_counts: np.ndarray
    num_repeated: int
    top_captions: tuple[tuple[str, int], ...]
    template: str
    template_share: float
    template_texts: int
    false_negatives: float
    lowest_loss: float
    mean_bytes: float
    source: str = ""
    needed: float | None = None
    read_bytes_per_s: float = 0.0
    decode_images_per_s: float = 0.0
    contacts: tuple[Contact, ...] = ()

    @property
    def num_usable(self) -> int:
        return len(self.short_sides)

    @property
    def workers(self) -> int | None:
        """Processes that decode as many images as are needed."""
        return math.ceil(self.needed / self.decode_images_per_s) if self.needed and self.decode_images_per_s else None


@dataclass(frozen=True)
class Pipeline:
    """The input pipeline by itself: seconds that each stage takes for `num_images` in one process, then images/s.

    `alone_images_per_s` is the whole in one process, `loader_images_per_s` with `workers` of them.
    """

    num_images: int
    seconds: Mapping[str, float]
    alone_images_per_s: float
    workers: int
    loader_images_per_s: float


# ---------------------------------------------------------------------------------------------------------------------
# Looking


class _Look(NamedTuple):
    """One pair, looked at. With a problem, nothing else is known of it."""

    source: str
    problem: str = ""
    kind: str = ""
    captions: tuple[str, ...] = ()
    num_blank: int = 0
    size: tuple[int, int] = (0, 0)
    format: str = ""
    mode: str = ""
    is_rotated: bool = False
    digest: bytes = b""
    num_bytes: int = 0
    thumbnail: str = ""


def sample_numbers(total: int, samples: int | None, seed: int) -> list[int]:
    """Which of `total` to look at, in order, so that reading stays local; None for all."""
    if samples is None or samples >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, samples, replace=False).tolist())


def _fetch(read: Callable[[int], Pair], number: int) -> tuple[Pair, bytes | str]:
    """A pair with its image's bytes, or with why there are none."""
    pair = Pair(f"sample {number}")
    try:
        pair = read(number)
        if pair.problem or pair.image is None:
            return pair, pair.problem or "no image"
        if isinstance(pair.image, bytes):
            return pair, pair.image
        return pair, pair.image.read_bytes() if isinstance(pair.image, Path) else read_bytes(pair.image)
    except Exception as error:  # libraries of the network, and of tables, raise anything
        return pair, _say(error)


def _say(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def _look(fetched: tuple[Pair, bytes | str], with_thumbnail: bool = False) -> _Look:
    pair, data = fetched
    try:
        if isinstance(data, str):
            raise ValueError(data)
        lines = [" ".join(caption.split()) for caption in pair.captions]
        captions = tuple(line for line in lines if line)
        if not captions:
            raise ValueError("every caption is empty" if lines else "it has no caption")
        image = open_image(data, "it")
        header = Image.open(io.BytesIO(data))  # what it was before 16 bits became 8
        is_16_bits = header.mode.startswith("I") or (header.format == "PNG" and data[24] == 16)
        mode = header.mode + (", 16 bit" if is_16_bits else "")
        picture = thumbnail(image, _CONTACT_BOX) if with_thumbnail else ""
        digest, blank = hashlib.sha256(data).digest(), len(lines) - len(captions)
        facts = (image.size, header.format or "?", mode, _is_rotated(header), digest, len(data), picture)
        return _Look(pair.source, "", "", captions, blank, *facts)
    except Exception as error:  # a damaged picture can raise anything
        return _Look(pair.source, _say(error), _kind(_say(error), pair))


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) not in (0, 1)
    except Exception:  # a damaged tag turns nothing
        return False


def _kind(reason: str, pair: Pair) -> str:
    """The reason without the sample's own names and numbers, so that equal ones can be counted."""
    known = [pair.source, pair.source.rpartition(":")[2], pair.image if isinstance(pair.image, Path | str) else ""]
    names = {part for name in map(str, known) for part in (name, Path(name).name, Path(name).stem + ".")} - {"", "."}
    for name in sorted(names, key=len, reverse=True):
        reason = re.sub(rf"(?<!\w){re.escape(name)}" + (r"\w+" if name[-1] == "." else r"(?!\w)"), "…", reason)
    return re.sub(r"\w+://\S+|(?<!\w)/\S+|(?<![\w-])(0x[0-9a-f]+|\d+)", "…", reason)


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def false_negatives(captions: Sequence[Sequence[str]], batch_size: int) -> tuple[float, float]:
    """What equal captions do to the loss, from those of a sample of images (one of several is shown at random).

    Returns:
        the expected share of a row's B - 1 others that have its caption, and the lowest loss that leaves, in nats.

    The share is the equal ordered pairs of different images over all of them, N (N - 1): two images of a batch are such
    a pair, so the estimate has no bias. (Its square, the sum of squared frequencies, would count each with itself.)

    The loss: k others in a batch have the text of a row. Equal texts have equal embeddings, so an image gives them
    equal logits, and the right one gets at most 1 / (k + 1) of the probability: at least ln(k + 1). Seen from the text,
    k + 1 rows share one distribution over the images while each asks for another; the mean of -ln q over k + 1 shares q
    that sum to at most 1 is least where all are 1 / (k + 1): ln(k + 1) again. So the loss is at least E[ln(k + 1)] with
    k ~ Binomial(B - 1, p), p the share of the other images that have the text. Where nothing else is alike a large
    model comes as close to it as it likes.
    """
    N = len(captions)
    if N < 2:
        return 0.0, 0.0
    rows = [{text: count / len(texts) for text, count in Counter(texts).items()} for texts in captions]
    total = defaultdict[str, float](float)
    for row in rows:
        for text, share in row.items():
            total[text] += share
    shares = np.array([share for row in rows for share in row.values()])
    p = np.array([(total[text] - share) / (N - 1) for row in rows for text, share in row.items()])
    p = p.round(12).clip(0, 1)  # what a sum of thirds leaves must not stand for a caption of its own
    levels, level_of = np.unique(p, return_inverse=True)
    losses = np.array([_expected_log(batch_size - 1, float(level)) for level in levels])
    return float(shares @ p) / N, float(shares @ losses[level_of]) / N


def _expected_log(n: int, p: float) -> float:
    """E[ln(1 + K)], K ~ Binomial(n, p)."""
    if p in (0, 1):
        return math.log(1 + n * p)
    k = np.arange(n + 1)
    log_factorial = np.cumsum(np.log(np.maximum(k, 1)))
    log_choose = log_factorial[n] - log_factorial - log_factorial[::-1]
    return float(np.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p)) @ np.log1p(k))


def examine(
    pairs: Sequence[Pair],
    *,
    source: str = "the data",
    samples: int | None = 2000,
    image_size: int = 224,
    context_length: int = 77,
    batch_size: int = 256,
    needed: float | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Findings:
    """Reads a random sample of the pairs, and counts.

    Args:
        samples: how many to look at; None for all. The seed decides which.
        needed: images/s that training consumes.
        workers: threads that read and decode; by default one a core.
        progress: called with the number of samples done, now and then.

    Raises:
        ValueError: there are no pairs, or an argument out of its range.
    """
    given = {"samples": (samples, 1), "image_size": (image_size, 1), "context_length": (context_length, 3)}
    for name, (value, least) in (given | {"batch_size": (batch_size, 2), "workers": (workers, 1)}).items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if needed is not None and not 0 < needed < math.inf:
        raise ValueError(f"needed is {needed}; it is a number of images a second, above 0")
    if not len(pairs):
        raise ValueError(f"no pairs found in {source}")
    numbers = sample_numbers(len(pairs), samples, seed)
    # More than are shown, as some may be unreadable.
    candidates = np.random.default_rng([seed, 1]).permutation(len(numbers))[: 2 * _CONTACTS].tolist()
    looks: list[_Look] = []
    timed: list[bytes] = []
    read_s, read_size = 0.0, 0
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        # Reading and decoding take turns, so that each can be timed.
        for start in range(0, len(numbers), _CHUNK):
            begin = time.perf_counter()
            fetched = list(pool.map(lambda n: _fetch(pairs.__getitem__, n), numbers[start : start + _CHUNK]))
            read_s += time.perf_counter() - begin
            read_size += sum(len(data) for _, data in fetched if isinstance(data, bytes))
            looks += pool.map(_look, fetched, [start + place in candidates for place in range(len(fetched))])
            good = [d for (_, d), look in zip(fetched, looks[start:], strict=True) if not look.problem]
            timed += [data for data in good if isinstance(data, bytes)][: _TIMED_IMAGES - len(timed)]
            if progress:
                progress(len(looks))
    shown = [look for look in (looks[place] for place in candidates) if look.thumbnail][:_CONTACTS]
    return replace(
        _findings(looks, len(pairs), image_size, context_length, batch_size),
        source=source,
        needed=needed,
        read_bytes_per_s=read_size / read_s,
        decode_images_per_s=_decode_rate(timed, image_size),
        contacts=tuple(Contact(look.source, look.captions[0], look.thumbnail) for look in shown),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """As a worker of the loader has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _decode_rate(images: Sequence[bytes], image_size: int) -> float:
    """Images/s of one core."""
    augmentation, random = Augmentation(), np.random.default_rng(0)
    with one_thread():
        begin = time.perf_counter()
        for done, data in enumerate(images):
            if done == 1:
                begin = time.perf_counter()  # the first one waits for imports
            augmentation.decode(data, image_size, random)
            if time.perf_counter() - begin > _TIMED_S:
                break
        return max(1, done) / (time.perf_counter() - begin) if images else 0.0


def _findings(
    looks: Sequence[_Look], num_pairs: int, image_size: int, context_length: int, batch_size: int
) -> Findings:
    good = [look for look in looks if not look.problem]
    kinds = defaultdict[str, list[_Look]](list)
    for look in looks:
        if look.problem:
            kinds[look.kind].append(look)
    by_count = sorted(kinds.items(), key=lambda item: -len(item[1]))
    folded = [[text.casefold() for text in look.captions] for look in good]
    images_with = Counter(text for texts in folded for text in set(texts))
    templates = Counter(_template(text) for texts in folded for text in texts)
    (template, uses), *_ = templates.most_common(1) or [("", 0)]
    copies = Counter(look.digest for look in good)
    sides = np.array([look.size for look in good]).reshape(-1, 2)
    share, lowest_loss = false_negatives(folded, batch_size)
    return Findings(
        num_pairs=num_pairs,
        num_sampled=len(looks),
        image_size=image_size,
        context_length=context_length,
        batch_size=batch_size,
        problems=tuple(Problem(k, len(bad), tuple(b.source for b in bad[:3]), bad[0].problem) for k, bad in by_count),
        short_sides=sides.min(axis=1),
        aspects=sides.max(axis=1) / sides.min(axis=1),
        formats=dict(Counter(look.format for look in good).most_common()),
        modes=dict(Counter(look.mode for look in good).most_common()),
        num_rotated=sum(look.is_rotated for look in good),
        num_copies=sum(copies[look.digest] > 1 for look in good),
        captions_per_image=np.array([len(texts) for texts in folded], dtype=int),
        num_blank=sum(look.num_blank for look in good),
        token_counts=np.array([len(encode(text)) + 2 for look in good for text in look.captions], dtype=int),
        num_repeated=sum(images_with[text] > 1 for texts in folded for text in texts),
        top_captions=tuple(item for item in images_with.most_common(_TOP_CAPTIONS) if item[1] > 1),
        template=template,
        template_share=uses / max(1, templates.total()),
        template_texts=sum(_template(text) == template for text in images_with),
        false_negatives=share,
        lowest_loss=lowest_loss,
        mean_bytes=float(np.mean([look.num_bytes for look in good])) if good else 0.0,
    )


def _template(text: str) -> str:
    """What is left of a caption without digits and punctuation."""
    return " ".join(re.sub(r"[\W\d_]+", " ", text).split())


def what_spoils(f: Findings, are_captions_shared: bool = False) -> list[str]:
    """What would make a model worse without anyone noticing."""
    num_bad, num_others = f.num_sampled - f.num_usable, f.false_negatives * (f.batch_size - 1)
    cut, small = share_of(f.token_counts > f.context_length), share_of(f.short_sides < f.image_size / 2)
    out = [
        f"{num_bad:,} of {f.num_sampled:,} samples ({portion(num_bad / f.num_sampled)}) can't be used; "
        f"{problem.num_samples:,} like this one: {cut_short(problem.examples[0])}: {cut_short(problem.reason, 300)}"
        for problem in f.problems[:1]
    ]
    if cut >= _NOTABLE:
        out.append(
            f"{portion(cut)} of the captions are longer than {f.context_length} tokens: their ends are cut off and "
            "never read. Put what matters first, shorten them, or raise the context length"
        )
    if f.lowest_loss >= _NOTABLE_LOSS * math.log(f.batch_size) and not are_captions_shared:
        out.append(
            f"{portion(f.num_repeated / len(f.token_counts))} of the captions occur with more than one image: in a "
            f"batch of {f.batch_size:,} a pair meets {num_others:.2g} others with its own caption, "
            f"is told to differ from them, and the loss can't fall below {f.lowest_loss:.2f} (chance is "
            f"{math.log(f.batch_size):.2f}). Train with model.positives=caption, which lets them belong together; or "
            "use richer captions, or a smaller batch"
        )
    if f.template_share >= _TEMPLATE and f.template_texts > 1:
        out.append(
            f"{portion(f.template_share)} of the captions are {cut_short(f.template, 80)!r} but for digits and "
            f"punctuation ({f.template_texts:,} texts): little tells them apart. Describe what is to be seen"
        )
    if small >= _NOTABLE:
        out.append(
            f"{portion(small)} of the images have a short side under {f.image_size / 2:g} pixels, less than half of "
            f"the {f.image_size} that the model sees: they are blown up. Use larger ones, or a smaller image size"
        )
    return out


def advice(f: Findings) -> list[str]:
    """Sentences about what to do; the graver ones first."""
    out = what_spoils(f) or ["Nothing was found that would spoil training"]
    if not f.num_usable:
        return out
    copied, turned = f.num_copies / f.num_usable, f.num_rotated / f.num_usable
    if f.batch_size > f.num_pairs:
        out.append(f"A batch of {f.batch_size:,} is more than the {f.num_pairs:,} pairs; use a smaller one")
    if f.num_blank:
        out.append(f"Blank captions: {f.num_blank:,}; `miniclip shards` leaves such lines out")
    if copied >= _NOTABLE:
        out.append(
            f"{portion(copied)} of the images have a copy in the sample; in all the data it is as many or more. Put "
            "the captions of an image together, as lines of one .txt or as rows with one path"
        )
    if turned >= _NOTABLE:
        out.append(
            f"{portion(turned)} of the images are turned by an EXIF tag, which neither packing nor training heeds: "
            "the model sees them as they are stored. Turn the files themselves"
        )
    if not f.workers:
        rate = f"{f.decode_images_per_s:,.0f}"
        return [*out, f"Each worker feeds about {rate} images/s; --needed N says how many workers N images/s take"]
    cores = os.cpu_count() or 1
    too_many = f". This machine has {cores} cores; smaller images (miniclip shards --resize) decode faster"
    out.append(
        f"Workers for {f.needed:g} images/s: {f.workers:,}, as each feeds about {f.decode_images_per_s:,.0f}"
        + (too_many if f.workers > cores else "")
    )
    if f.needed and f.needed * f.mean_bytes > f.read_bytes_per_s:
        out.append(f"Reading gives {f.read_bytes_per_s / f.mean_bytes:,.0f} images/s, fewer than are needed")
    return out


def brief(
    shards: Shards,
    context_length: int,
    batch_size: int,
    seed: int = 0,
    samples: int = 128,
    image_size: int = 224,
    captions: CaptionChoice | None = None,
    positives: str = "pair",
) -> list[str]:
    """Warnings about what would spoil training, from a glance at some random samples; none if all is well.

    It looks for about a second at most, so what is remote is not fetched for it; and never raises for bad data.

    Args:
        positives: as training is set; with "caption" pairs of equal captions are not told to differ.
    """

    there: set[str] = set()

    def read(number: int) -> Pair:
        record = shards[number]
        name = f"{shards.entries[shards.locate(number)[0]].name}:{record.key}"
        texts = captions.texts(record.captions, lambda: shards.info(number)) if captions else {"txt": record.captions}
        there.update(name for name, found in texts.items() if found)
        lines = tuple(line for found in texts.values() for line in found)
        return Pair(name, record.image, lines, None if record.image else "no image")

    end = time.perf_counter() + _BRIEF_S
    numbers = np.random.default_rng(seed).permutation(sample_numbers(len(shards), samples, seed)).tolist()
    local = [n for n in numbers if not is_url(shards.entries[shards.locate(n)[0]].location)]
    looks = [_look(_fetch(read, number)) for number in local if time.perf_counter() < end]
    if not looks:
        return []
    wanted = (captions.fields if captions else None) or {}
    absent = [f"no sample looked at has the caption field {name!r}" for name in wanted if name not in there]
    findings = _findings(looks, len(shards), image_size, context_length, batch_size)
    return absent + what_spoils(findings, are_captions_shared=positives == "caption")
