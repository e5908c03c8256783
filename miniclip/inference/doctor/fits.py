"""Captions that do not fit their picture, and pictures that fit only when they are turned, as a model sees them.

A cosine alone says little: some pictures are near to every text, some texts to every picture. So a pair is compared
with others that share its picture or its caption: the share of other captions that fit the picture at least as well,
and of other pictures that fit the caption. It is near 0 for a pair that belongs together, and anywhere between 0 and 1
for one that was put together by chance. The number of all such pairs is twice that of those above one half (Storey, "A
direct approach to false discovery rates", 2002, with lambda = 1/2).

N pictures, M captions of theirs, C compared with, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluation.encoder import Encoder
from ...evaluation.features import FeatureCache, encode_images, encode_texts
from ...evaluation.measures.ties import SAME
from .parts import Looked, Progress

COMPARED = 2048  # C
_PAIRS_AT_ONCE = 1024
_LEAST_SHARE, _MOST_SHARE = 0.05, 0.5
_FEW_PAIRS = 0.01  # of the pairs that may be reported in any case
_TRUST = 1.5  # times the estimated number may be reported
_TURNED_GAIN, _TURNED_FITS, _DOUBTFUL = 0.5, 0.2, 0.5


@dataclass(frozen=True)
class Fit:
    """
    Args:
        share: (N,) of other captions, or pictures, that fit at least as well; the larger of both, and the mean over
            several captions. NaN where the model could not read the picture.
        limit: of `share`, above which a pair is reported.
        estimated: share of the pairs that were put together by chance.
        turned: (N,) quarters to the left by which a picture fits much better; 0 for none.
        gain: (N,) how much better, in standard deviations of other pictures' cosines to the caption.
    """

    share: np.ndarray
    limit: float
    estimated: float
    turned: np.ndarray
    gain: np.ndarray


def fit_of(
    looked: Looked,
    rows: np.ndarray,
    model: Encoder,
    *,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    cache: FeatureCache | None = None,
    fingerprint: str | None = None,
    progress: Progress,
) -> Fit:
    """
    Args:
        rows: (N,) those of the pictures that have captions.
        seed: draws what pairs are compared with.
        cache, fingerprint: of the pictures; with both, no picture is encoded twice.
    """
    captions = [looked.captions[row] for row in rows.tolist()]
    texts = list(dict.fromkeys(caption for each in captions for caption in each))
    with progress("encoding captions", len(texts)) as report:
        text_features = encode_texts(model, texts, model.tokenize, report).cpu()  # (T, E)
    number = {text: index for index, text in enumerate(texts)}
    picture = np.repeat(np.arange(len(rows)), [len(each) for each in captions])  # (M,)
    text = np.array([number[caption] for each in captions for caption in each], dtype=np.int64)

    def encoded(which: np.ndarray, turns: int) -> Tensor:
        """(n, E), zero where a picture can't be read any more."""
        key = FeatureCache.key("doctor, as stored", model.image_fingerprint(), fingerprint, which.tolist(), turns)
        what = "encoding pictures" if not turns else f"encoding pictures turned by {90 * turns}°"
        with progress(what, len(which)) as report:
            found = encode_images(
                model.encode_image,
                model.preprocess,
                looked.pictures(rows[which], turns),
                device=model.logit_scale.device,
                batch_size=batch_size,
                num_workers=workers,
                cache=cache,
                key=key,
                progress=report,
            )
        out = torch.zeros(len(which), found.features.shape[1])
        out[torch.from_numpy(found.indices)] = F.normalize(found.features, dim=-1)
        return out

    image_features = encoded(np.arange(len(rows)), 0)
    others = _Others(image_features, text_features, picture, text, seed)
    share, standing = others.compare(image_features, picture, text)
    share = _mean_of(share, picture, len(rows))
    share[(image_features == 0).all(dim=1).numpy()] = np.nan
    standing = _mean_of(standing, picture, len(rows))
    limit, estimated = _share_limit(share)
    fitting = standing[share <= limit]
    usual = float(np.quantile(fitting, _TURNED_FITS)) if len(fitting) else np.inf
    turned, gain = _turned(encoded, others, picture, text, standing, usual)
    return Fit(share, limit, estimated, turned, gain)


def _mean_of(values: np.ndarray, picture: np.ndarray, N: int) -> np.ndarray:
    """(M,) of captions -> (N,) of pictures, each of which has at least one."""
    return np.bincount(picture, values, minlength=N) / np.bincount(picture, minlength=N)


class _Others:
    """The pairs that others are compared with: their first captions, and their pictures."""

    def __init__(self, images: Tensor, texts: Tensor, picture: np.ndarray, text: np.ndarray, seed: int) -> None:
        firsts = np.unique(picture, return_index=True)[1]
        chosen = np.random.default_rng(seed).permutation(firsts)[:COMPARED]
        self.texts, self.all_texts = texts[torch.from_numpy(text[chosen])], texts
        self.images = images[torch.from_numpy(picture[chosen])]

    def compare(self, images: Tensor, picture: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each pair of a picture and a text: the share of others that fit at least as well (M,), and how many
        standard deviations it stands above other pictures' cosines to the text (M,)."""
        shares, standings = [], []
        for start in range(0, len(picture), _PAIRS_AT_ONCE):
            own_images = images[torch.from_numpy(picture[start : start + _PAIRS_AT_ONCE])]
            own_texts = self.all_texts[torch.from_numpy(text[start : start + _PAIRS_AT_ONCE])]
            own = (own_images * own_texts).sum(dim=1, keepdim=True)  # (m, 1)
            to_texts, to_images = own_images @ self.texts.T, own_texts @ self.images.T  # (m, C)
            of_texts = (to_texts > own + SAME).float().mean(dim=1)
            of_images = (to_images > own + SAME).float().mean(dim=1)
            shares.append(torch.maximum(of_texts, of_images))
            spread = to_images.std(dim=1, correction=0).clamp(min=SAME)
            standings.append((own[:, 0] - to_images.mean(dim=1)) / spread)
        return torch.cat(shares).double().numpy(), torch.cat(standings).double().numpy()


def _share_limit(share: np.ndarray) -> tuple[float, float]:
    """The share from which a pair is reported, and the estimated share of pairs that were put together by chance.

    It begins at 5 % and rises until no more are reported than the estimate makes likely, or than 1 % of all: a model
    that separates little, or a set of few classes, must not accuse everyone.
    """
    known = share[np.isfinite(share)]
    if not len(known):
        return _MOST_SHARE, 0.0
    estimated = min(1.0, 2 * float((known > 0.5).mean()))
    for limit in np.arange(_LEAST_SHARE, _MOST_SHARE, 0.01).round(2).tolist():
        if (known > limit).mean() <= max(_FEW_PAIRS, _TRUST * estimated * (1 - limit)):
            return limit, estimated
    return _MOST_SHARE, estimated


def _turned(
    encoded: Callable[[np.ndarray, int], Tensor],
    others: _Others,
    picture: np.ndarray,
    text: np.ndarray,
    standing: np.ndarray,
    usual: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Quarters, and gains, of pictures that fit much better when they are turned. Only the less fitting half of all
    is tried, as turning costs three more looks.

    Args:
        usual: what most fitting pairs stand above; those that are turned must, too.
    """
    N = len(standing)
    turned, gain = np.zeros(N, dtype=np.int64), np.zeros(N)
    doubtful = np.sort(np.argsort(standing, kind="stable")[: int(_DOUBTFUL * N)])
    place = np.full(N, -1)
    place[doubtful] = np.arange(len(doubtful))
    is_of_doubtful = place[picture] >= 0
    for turns in (1, 2, 3) if len(doubtful) else ():
        images = encoded(doubtful, turns)
        own = place[picture[is_of_doubtful]]
        _, stands = others.compare(images, own, text[is_of_doubtful])
        stands = _mean_of(stands, own, len(doubtful))
        better = stands - standing[doubtful]
        is_turned = (better > np.maximum(gain[doubtful], _TURNED_GAIN)) & (stands >= usual)
        turned[doubtful[is_turned]], gain[doubtful[is_turned]] = turns, better[is_turned]
    return turned, gain
