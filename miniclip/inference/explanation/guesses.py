"""Maps of why a model guessed what it guessed, for the galleries of `miniclip eval`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...common.thumbnail import thumbnail
from ...evaluation.encoder import Encoder
from ...evaluation.zero_shot import zero_shot_classifier
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
        target = zero_shot_classifier(self._encoder, [guess], data.templates, self._encoder.tokenize)[:, 0]
        picture = data.open(index)
        found = Picture(self._encoder, picture).map(target)
        return Heat(thumbnail(overlay(picture, found.on_picture()), BOX), guess, str(found.deletion))
