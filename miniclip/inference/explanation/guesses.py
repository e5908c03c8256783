"""Maps of why a model guessed what it guessed, for the galleries of `miniclip eval`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...common.pictures import thumbnail
from ...evaluation.encoder import Encoder
from ...evaluation.prompts import class_prompts
from ...reports.galleries import BOX, Heat
from ...reports.heat import overlay
from .explain import Picture


class GuessMaps:
    """A map for a model, an image of a data set, and a class that the model took it for.

    Args:
        open_encoder: from a model's name. One model is kept at a time.
        progress: called with the number of maps done.
    """

    def __init__(self, open_encoder: Callable[[str], Encoder], progress: Callable[[int], None]) -> None:
        self._open, self._progress, self._num_done = open_encoder, progress, 0
        self._encoder: Encoder | None = None
        self._name = ""

    def __call__(self, model: str, data: Any, index: int, guess: str) -> Heat:
        """
        Args:
            model: its name.
            data: has classes and their prompts.
            guess: a class's name.

        Raises:
            ValueError: the image can't be read any more.
        """
        self._num_done += 1
        self._progress(self._num_done)
        if self._encoder is None or self._name != model:
            self._encoder, self._name = self._open(model), model
        picture = data.open(index)
        found = Picture(self._encoder, picture).map(
            _class_features(self._encoder, class_prompts(data.templates, guess))
        )
        return Heat(thumbnail(overlay(picture, found.on_picture()), BOX), guess, str(found.deletion))


def _class_features(encoder: Encoder, prompts: list[str]) -> Tensor:
    """(E,), as `zero_shot_classifier` makes them, which all processes of an evaluation would have to call."""
    features = F.normalize(encoder.encode_text(encoder.tokenize(prompts)).float(), dim=-1)
    return F.normalize(features.mean(dim=0), dim=0)
