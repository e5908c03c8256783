"""How wide the attention heads of a bare state dict are: no shape shows it, and with another width a model is wrong.

It is a hint of the caller's, or that of the published model with the same shapes, or asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from ..config import Activation, CLIPConfig

_PAIR = "as two numbers, of the image tower and of the text tower"


class NotToldError(ValueError):
    """A checkpoint does not tell its activation or how wide its heads are, and no hint does."""


@dataclass(frozen=True)
class Hints:
    """What the caller knows of a checkpoint that does not tell it.

    Args:
        activation: of the blocks' hidden layer.
        heads: attention heads of the image tower and of the text tower; or one number, for both.
        head_width: channels of one head instead (of a ResNet in the attention that pools); one number is for the towers
            that are no published ones.
    """

    activation: Activation | None = None
    heads: int | tuple[int, int] | None = None
    head_width: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in get_args(Activation):
            raise ValueError(f"activation is {self.activation!r}; valid are {', '.join(get_args(Activation))}")
        if self.heads is not None and self.head_width is not None:
            raise ValueError(f"heads={self.heads} and head_width={self.head_width} mean the same; give one of them")
        for name in ("heads", "head_width"):
            value = getattr(self, name)
            numbers = value if isinstance(value, list | tuple) else () if value is None else (value, value)
            is_valid = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
            if len(numbers) not in (0, 2) or not is_valid or value in ([], ()):
                raise ValueError(f"{name} is {value!r}; it must be a whole number greater than 0, or two of them")

    def refuse_contradiction(self, config: CLIPConfig, source: str) -> None:
        """Raises a ValueError if the checkpoint tells otherwise."""
        if self.activation not in (None, config.activation):
            raise ValueError(
                f"{source} says that its activation is {config.activation}, and activation={self.activation!r} was "
                "asked for"
            )
        for name in ("heads", "head_width"):
            asked, found = getattr(self, name), (getattr(config.vision, name), getattr(config.text, name))
            is_same = asked in found if isinstance(asked, int) else asked is None or tuple(asked) == found
            if not is_same:
                raise ValueError(
                    f"{source} says that its {name} is {found[0]} in the image tower and {found[1]} in the text tower, "
                    f"and {name}={asked} was asked for"
                )


# Channels of one head of published towers by (width, blocks, width of the hidden layer), of ResNets by (width, blocks
# of each stage): all architectures of open_clip 3.3 (open_clip/model_configs) that our towers can build.
_PUBLISHED: dict[str, dict[tuple[Any, ...], int]] = {
    "image": {
        (384, 12, 1536): 64,  # ViT-S
        (512, 12, 2048): 64,  # ViT-M
        (768, 12, 3072): 64,  # ViT-B
        (896, 12, 3584): 64,  # ViT-B-plus
        (1024, 24, 4096): 64,  # ViT-L
        (1280, 32, 5120): 80,  # ViT-H
        (1408, 40, 6144): 88,  # ViT-g
        (1664, 48, 8192): 104,  # ViT-bigG
        (1792, 56, 15360): 112,  # ViT-e
        (64, (3, 4, 6, 3)): 64,  # RN50
        (64, (3, 4, 23, 3)): 64,  # RN101
        (80, (4, 6, 10, 6)): 64,  # RN50x4
        (96, (6, 8, 18, 8)): 64,  # RN50x16
        (128, (3, 15, 36, 10)): 64,  # RN50x64
    },
    "text": {
        (256, 10, 1024): 64,
        (384, 12, 1536): 64,
        (512, 12, 2048): 64,  # ViT-B, RN50
        (640, 12, 2560): 64,
        (768, 12, 3072): 64,  # ViT-L
        (768, 16, 3072): 64,
        (1024, 12, 4096): 64,
        (1024, 20, 4096): 64,
        (1024, 24, 4096): 64,  # ViT-H, ViT-g
        (1280, 24, 5120): 64,
        (1280, 32, 5120): 64,  # ViT-bigG
        (1280, 36, 5120): 64,
    },
}


_ONE_HEAD = ()


class Tower(NamedTuple):
    """Whose heads are looked for: what is pooled is `width` channels wide; `shape` is a key of `_PUBLISHED`."""

    name: Literal["image", "text"]
    width: int
    shape: tuple[Any, ...]

    @property
    def published(self) -> int | None:
        return 64 if self.shape == _ONE_HEAD else _PUBLISHED[self.name].get(self.shape)


def head_widths(towers: Sequence[Tower], hints: Hints, source: str) -> list[int]:
    """Channels of one head of each tower.

    Raises:
        NotToldError: (a ValueError) it is not known; says what to give.
        ValueError: hints that do not fit or could be meant for either tower.
    """
    name = "head_width" if hints.heads is None else "heads"
    asked = getattr(hints, name)
    if asked is None and (narrow := [tower for tower in towers if tower.published is None and tower.width == 64]):
        warnings.warn(
            f"{source} does not tell how many attention heads its {narrow[0].name} tower of 64 channels has; it is "
            "taken to have one, as no published CLIP has narrower ones. heads=… says otherwise",
            stacklevel=2,
        )
        towers = [tower._replace(shape=_ONE_HEAD) if tower in narrow else tower for tower in towers]
    unknown = [tower for tower in towers if tower.published is None]
    if asked is None and unknown:
        raise NotToldError(
            f"{source} does not tell how wide the attention heads of its {unknown[0].name} tower are ("
            f"{unknown[0].width} channels, no published model). Pass head_width=64 if they are as OpenAI's, else their "
            f"width (miniclip convert and info: --head-width), {_PAIR} if they differ; or put the model's config.json "
            "or open_clip_config.json beside the file"
        )
    if isinstance(asked, int):
        known = [_in_units(tower, name) for tower in towers if tower.published is not None]
        is_clear = len({tower.width for tower in unknown}) == 1 or name == "head_width" if unknown else asked in known
        if not is_clear:
            widths = " and ".join(f"{tower.width} ({tower.name})" for tower in towers)
            raise ValueError(f"{name}={asked} for towers {widths} wide in {source} is not clear; give {name} {_PAIR}")
        return [tower.published or _channels(tower, asked, name, source) for tower in towers]
    if asked is None:
        return [tower.published or 0 for tower in towers]
    return [_channels(tower, number, name, source) for tower, number in zip(towers, asked, strict=True)]


def _in_units(tower: Tower, name: str) -> int:
    assert tower.published is not None
    return tower.published if name == "head_width" else tower.width // tower.published


def _channels(tower: Tower, asked: int, name: str, source: str) -> int:
    if tower.width % asked:
        raise ValueError(
            f"{name}={asked}: the {tower.name} tower of {source} is {tower.width} wide, which is no multiple of it; "
            f"where towers differ, give {name} {_PAIR}"
        )
    return asked if name == "head_width" else tower.width // asked
