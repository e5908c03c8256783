"""Learning from a teacher: the larger CLIP, and the loss that compares a student's choices with its."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import tokenizer
from ..fast.sliced_loss import gather_pairs, slices
from ..images import normalize
from ..weights.load import load


def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    across_processes: bool = False,
) -> Tensor:
    """How far a student's choices among the batch are from a teacher's: cross-entropy of one softmax to the other.

    For each image the teacher says how likely each text of the batch is, for each text each image; the student is to
    say the same ("affinity mimicking" of TinyCLIP, Wu et al. 2023, section 3.1, https://arxiv.org/abs/2309.12314;
    "contrastive relational distillation" of CLIP-KD, Yang et al. 2024, https://arxiv.org/abs/2307.12732). The least
    value is the teacher's own entropy, and there the gradient is zero. Computed in at least float32.

    Args:
        image_features, text_features: (b, E), of unit length, the student's.
        teacher_image_features, teacher_text_features: (b, F), of unit length, of the same pairs; they get no gradient.
        logit_scale, teacher_logit_scale: inverse temperatures, already exponentiated.
        chunk_size: rows of the (b, B) logits that are in memory at a time, by default all.
        mask, across_processes: as in `clip_loss`.

    Returns:
        A scalar, the mean over pairs and both directions.

    Raises:
        ValueError: shapes that do not pair up, or a mask that leaves no pair.
    """
    if len(teacher_image_features) != len(image_features):
        raise ValueError(
            f"the teacher's features are of {len(teacher_image_features)} pairs, not {len(image_features)}"
        )
    with torch.autocast(image_features.device.type, enabled=False):
        s = gather_pairs(image_features, text_features, chunk_size, mask, None, across_processes)
        taught_images = teacher_image_features.detach().to(s.images.dtype)
        taught_texts = teacher_text_features.detach().to(s.images.dtype)
        t = gather_pairs(taught_images, taught_texts, chunk_size, mask, None, across_processes)
        scales = s.number(logit_scale), s.number(teacher_logit_scale).detach()
        losses = torch.zeros_like(s.images[:, 0])  # (b,)
        for mine, others, taught, taught_others in (
            (s.images, s.all_texts, t.images, t.all_texts),
            (s.texts, s.everywhere(s.images), t.texts, s.everywhere(t.images)),
        ):
            parts = []
            for rows in slices(len(losses), s.chunk_size):
                inputs = (mine[rows], others, taught[rows], taught_others, *scales, s.all_mask)
                if s.chunk_size >= len(losses):
                    parts.append(_cross_entropy(*inputs))
                else:  # logits are computed again for the gradient
                    parts.append(checkpoint(_cross_entropy, *inputs, use_reentrant=False, preserve_rng_state=False))
            losses = losses + torch.cat(parts) / 2
        return losses.mean() if s.mask is None else losses.where(s.mask, 0).sum() / s.num_pairs


def _cross_entropy(
    own: Tensor,
    others: Tensor,
    teachers_own: Tensor,
    teachers_others: Tensor,
    scale: Tensor,
    teacher_scale: Tensor,
    healthy: Tensor | None,
) -> Tensor:
    """(n, E), (B, E) of the student and (n, F), (B, F) of the teacher -> (n,)."""
    wanted = _masked((teacher_scale * teachers_own) @ teachers_others.T, healthy, 1).softmax(dim=1)  # (n, B)
    found = _masked((scale * own) @ others.T, healthy, 1).log_softmax(dim=1)
    return -torch.linalg.vecdot(wanted, found)


def _masked(logits: Tensor, mask: Tensor | None, side: int) -> Tensor:
    """The least number where the mask says no along a side; not -inf, as inf - inf is no number."""
    if mask is None:
        return logits
    return logits.masked_fill(~mask.unsqueeze(1 - side), torch.finfo(logits.dtype).min)


class Teacher:
    """A frozen CLIP that says what it makes of the student's own batches.

    It is not a module, so no optimiser, no checkpoint and no process group of the student's sees it.

    - It looks at the very crop that the student looks at, of the student's size. Where its own size is another, that is
      resized on the device (bilinear, antialiased); a teacher of more pixels therefore sees an enlarged picture and is
      a little worse than it could be. To let it see more, raise the student's size.
    - It normalises with its own mean and deviation.
    - Where its context is shorter than the student's, longer texts are cut for it, the end token last.

    Args:
        name: anything that `miniclip.load` takes.

    Raises:
        ValueError: as `miniclip.load`; or a tower is missing, or it reads other token ids than CLIP's.
    """

    def __init__(self, name: str) -> None:
        self.model, _ = load(name, device="cpu")
        self.model.requires_grad_(False)
        config = self.model.config
        if config.towers != "both":
            raise ValueError(f"model.teacher {name!r} has the {config.towers} tower alone; a teacher needs both")
        tokenizer.refuse_other_ids(config.text, f"model.teacher {name!r}", "the student's")

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.to(device, dtype)

    @property
    def logit_scale(self) -> Tensor:
        """Exponentiated."""
        return self.model.logit_scale.exp()

    @torch.no_grad()
    def features(self, images: Tensor, tokens: Tensor, micro_batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Unit features, (b, F) each, of uint8 pixels (b, 3, R, R) and token ids (b, L)."""
        size = micro_batch_size or len(images)
        splits = zip(images.split(size), tokens.split(size), strict=True)
        parts = [
            (
                self.model.encode_image(self._pixels(some_images), normalize=True),
                self.model.encode_text(self._cut(some_tokens), normalize=True),
            )
            for some_images, some_tokens in splits
        ]
        image_features, text_features = (torch.cat(features) for features in zip(*parts, strict=True))
        return image_features, text_features

    def _pixels(self, images: Tensor) -> Tensor:
        """(b, 3, R, R) uint8 -> normalised, of the teacher's resolution."""
        vision = self.model.config.vision
        if images.shape[-1] != vision.image_size:
            images = F.interpolate(images.float(), size=vision.image_size, mode="bilinear", antialias=True)
        return normalize(images, vision.mean, vision.std)

    def _cut(self, tokens: Tensor) -> Tensor:
        """(b, L) -> (b, at most the teacher's context length)."""
        end = self.model.config.text.eot_token
        if tokens.shape[1] <= self.model.context_length:
            return tokens
        tokens = tokens[:, : self.model.context_length].clone()
        has_end = (tokens == end).any(dim=1)
        tokens[:, -1] = tokens[:, -1].where(has_end, end)
        return tokens
