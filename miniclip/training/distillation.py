"""Distillation: a larger CLIP as the teacher, and the loss that pulls the student's choices towards the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import tokenizer
from ..evaluation.fingerprints import digest_value
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
    """Cross-entropy of the student's softmax over the batch to the teacher's, from images to texts and back.

    The teacher gives each image a distribution over the batch's texts and each text one over its images; the student
    learns them ("affinity mimicking" of TinyCLIP, Wu et al. 2023, section 3.1, https://arxiv.org/abs/2309.12314;
    "contrastive relational distillation" of CLIP-KD, Yang et al. 2024, https://arxiv.org/abs/2307.12732). The minimum
    is the teacher's own entropy, where the gradient is zero. Computed in at least float32.

    Args:
        image_features, text_features: the student's, (b, E), of unit length.
        teacher_image_features, teacher_text_features: the teacher's of the same pairs, (b, F), of unit length; they
            get no gradient.
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
        scales = (
            s.number("logit_scale", logit_scale),
            s.number("teacher_logit_scale", teacher_logit_scale).detach(),
        )
        losses = torch.zeros_like(s.images[:, 0])  # (b,)
        for own, others, taught, taught_others in (
            (s.images, s.all_texts, t.images, t.all_texts),
            (s.texts, s.everywhere(s.images), t.texts, s.everywhere(t.images)),
        ):
            parts = []
            for rows in slices(len(losses), s.chunk_size):
                inputs = (own[rows], others, taught[rows], taught_others, *scales, s.all_mask)
                if s.chunk_size >= len(losses):
                    parts.append(_cross_entropy(*inputs))
                else:  # the logits are recomputed for the gradient
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
    targets = _masked((teacher_scale * teachers_own) @ teachers_others.T, healthy).softmax(dim=1)  # (n, B)
    log_probabilities = _masked((scale * own) @ others.T, healthy).log_softmax(dim=1)
    return -torch.linalg.vecdot(targets, log_probabilities)


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """(n, B) logits, with the least number in the masked columns; not -inf, because inf - inf is NaN."""
    return logits if mask is None else logits.masked_fill(~mask, torch.finfo(logits.dtype).min)


class Teacher:
    """A frozen CLIP that encodes the student's batches.

    The teacher is not a module, so the student's optimiser, checkpoints and process group do not see it.

    - It sees the same crop as the student, resized on the device to its own resolution (bilinear, antialiased). A
      teacher of higher resolution therefore sees an enlarged picture and is a little worse than it could be; a higher
      resolution of the student lets it see more.
    - It normalises pixels with its own mean and standard deviation.
    - If its context is shorter than the student's, longer texts are cut for it, with the end token last.

    Args:
        name: anything that `miniclip.load` takes.

    Raises:
        ValueError: as `miniclip.load`; or a tower is missing, or its token ids are not CLIP's.
    """

    def __init__(self, name: str) -> None:
        self.model, _ = load(name, device="cpu")
        self.model.requires_grad_(False)
        config = self.model.config
        if config.towers != "both":
            raise ValueError(f"model.teacher {name!r} has the {config.towers} tower alone; a teacher needs both")
        tokenizer.refuse_other_ids(config.text, f"model.teacher {name!r}", "the student's")
        self.digest = str(digest_value(self.model.state_dict()))[:16]  # as read, whatever device or precision comes

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.to(device, dtype)

    @property
    def logit_scale(self) -> Tensor:
        """Exponentiated."""
        return self.model.logit_scale.exp()

    @torch.no_grad()
    def features(self, images: Tensor, tokens: Tensor, micro_batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Unit features (B, F) and (b, F) of uint8 pixels (B, 3, R, R) and token ids (b, L)."""
        image_parts = images.split(micro_batch_size or len(images))
        token_parts = tokens.split(micro_batch_size or len(tokens))
        return (
            torch.cat([self.model.encode_image(self._pixels(part), normalize=True) for part in image_parts]),
            torch.cat([self.model.encode_text(self._cut(part), normalize=True) for part in token_parts]),
        )

    def _pixels(self, images: Tensor) -> Tensor:
        """(b, 3, R, R) uint8 -> normalised pixels of the teacher's resolution."""
        vision = self.model.config.vision
        if images.shape[-1] != vision.image_size:
            images = F.interpolate(images.float(), size=vision.image_size, mode="bilinear", antialias=True)
        return normalize(images, vision.mean, vision.std)

    def _cut(self, tokens: Tensor) -> Tensor:
        """(b, L) -> (b, at most the teacher's context length)."""
        end = self.model.config.text.eot_token
        assert end is not None, "refuse_other_ids lets CLIP's own pass alone"
        if tokens.shape[1] <= self.model.context_length:
            return tokens
        tokens = tokens[:, : self.model.context_length].clone()
        has_end = (tokens == end).any(dim=1)
        tokens[:, -1] = tokens[:, -1].where(has_end, end)
        return tokens
