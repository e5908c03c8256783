"""The larger CLIP that a smaller one is distilled from.

b pairs, R resolution, L text tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tokenizer, weights
from .images import normalize


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
        self.model, _ = weights.load(name, device="cpu")
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
