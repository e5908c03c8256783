"""What a sample of pairs holds, counted: problems, sizes, lengths of captions, and how often captions repeat.

N usable images of the sample, M captions of theirs, B pairs of a batch; shares are of 1, lengths of texts in tokens,
start and end included."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..tokenizer import encode
from .wordings.equal_captions import same_caption, words_of

_TOP_CAPTIONS = 10


class Look(NamedTuple):
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
        num_repeated: captions that another image of the sample has too, but for case, white space and the
            encoding of accents.
        top_captions: texts that several images have, the most frequent first, with their number of images.
        template, template_share, template_texts: the most frequent caption when digits and punctuation are taken out,
            its share of the captions, and how many different captions it stands for. Where nothing is left of a
            caption then, it counts among the wordless ones instead.
        wordless: captions of digits and punctuation alone, each behind the name of its sample.
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
    wordless: tuple[tuple[str, str], ...]
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


def count(looks: Sequence[Look], num_pairs: int, image_size: int, context_length: int, batch_size: int) -> Findings:
    good = [look for look in looks if not look.problem]
    kinds = defaultdict[str, list[Look]](list)
    for look in looks:
        if look.problem:
            kinds[look.kind].append(look)
    by_count = sorted(kinds.items(), key=lambda item: -len(item[1]))
    folded = [[same_caption(text) for text in look.captions] for look in good]
    images_with = Counter(text for texts in folded for text in set(texts))
    templates = Counter(wording_of(text) for texts in folded for text in texts)
    num_captions = templates.total()
    templates.pop("", None)
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
        template_share=uses / max(1, num_captions),
        template_texts=sum(wording_of(text) == template != "" for text in images_with),
        wordless=tuple((look.source, text) for look in good for text in look.captions if not wording_of(text)),
        false_negatives=share,
        lowest_loss=lowest_loss,
        mean_bytes=float(np.mean([look.num_bytes for look in good])) if good else 0.0,
    )


def wording_of(text: str) -> str:
    """What is left of a caption without digits and punctuation."""
    return " ".join(words_of(re.sub(r"\d+", " ", text)))


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
    losses = np.array([expected_log(batch_size - 1, float(level)) for level in levels])
    return float(shares @ p) / N, float(shares @ losses[level_of]) / N


def expected_log(n: int, p: float) -> float:
    """E[ln(1 + K)] in nats, K ~ Binomial(n, p)."""
    if p in (0, 1):
        return math.log(1 + n * p)
    k = np.arange(n + 1)
    log_factorial = np.cumsum(np.log(np.maximum(k, 1)))
    log_choose = log_factorial[n] - log_factorial - log_factorial[::-1]
    return float(np.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p)) @ np.log1p(k))
