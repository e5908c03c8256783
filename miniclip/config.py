"""The architecture of a CLIP model, as data: what must be known to build it and to feed it. No torch in this file.

A `CLIPConfig` travels with the weights as `config.json`, so that activation, resolution, mean and standard deviation
can never be mismatched. "The paper" is CLIP's (Radford et al. 2021, https://arxiv.org/abs/2103.00020) in every file.
`OPENAI_MODELS` holds the nine models of its tables 19 and 20.

A logit is the cosine of an image's and a text's embedding times a scale (the inverse of a temperature), plus a bias if
the model has one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Activation = Literal["gelu", "quick_gelu"]
VisionKind = Literal["vit", "resnet", "timm"]
Towers = Literal["both", "image", "text"]
TimmProjection = Literal["linear", "mlp", "none", "classifier"]
Preprocessing = Literal["openai", "hf"]
Resize = Literal["shortest", "squash", "none"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]

# Mean and standard deviation of CLIP's training images, RGB in [0, 1] (`_transform` in OpenAI's clip/clip.py).
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Initial logarithm of the logits' scale: CLIP's (paper section 2.5) and SigLIP's. SigLIP's bias (Zhai et al. 2023,
# section 3.2) is negative because few of a batch's B * B combinations of an image and a text are pairs.
CLIP_LOGIT_SCALE = math.log(1 / 0.07)
SIGLIP_LOGIT_SCALE, SIGLIP_LOGIT_BIAS = math.log(10), -10.0
# Training that clamps keeps the scale below 100; other training may go beyond, but softmax has one class long before.
_MAX_LOGIT_SCALE = math.log(10_000)


def check_logit_scale(name: str, value: float) -> None:
    """Raises a ValueError for a logarithm of the logits' scale that can only be the scale itself, as 100 or 1 / 0.07,
    and warns of one below 0, which will be that of a temperature, as ln 0.07.

    Features are as they should be, and all probabilities that are made of them would be 0 or 1, or nearly equal.
    """
    if value > _MAX_LOGIT_SCALE:
        raise ValueError(
            f"{name} is {value:.6g}; it must be the logarithm of the scale, at most {_MAX_LOGIT_SCALE:.2f}. If "
            f"{value:.6g} is the scale itself, store {math.log(value):.6g}"
        )
    if value < 0:
        warnings.warn(
            f"{name} is {value:.6g}, so that cosines are multiplied by {math.exp(value):.3g} and classes have nearly "
            f"equal probabilities. If {value:.6g} is the logarithm of a temperature, store {-value:.6g}",
            stacklevel=2,
        )


def _require_positive(config: Any, *names: str) -> None:
    """Raises a ValueError unless each named field is a whole number above 0, or, for a ratio, any number above 0."""
    for name in names:
        value = getattr(config, name)
        is_number = isinstance(value, int | float if name.endswith("ratio") else int) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            what = "a finite number" if name.endswith("ratio") else "a whole number"
            raise ValueError(f"{type(config).__name__}.{name} is {value!r}; it must be {what} greater than 0")


def _require_at_most(config: Any, most: int, cost: str, *names: str) -> None:
    """Raises a ValueError where a field is so large that memory would run out, which would be torch's own error."""
    for name in names:
        if getattr(config, name) > most:
            raise ValueError(
                f"{type(config).__name__}.{name} is {getattr(config, name)}; it must be at most {most}: {cost}"
            )


def _set_numbers(config: Any, name: str, count: int, kind: type, least: float, most: float = math.inf) -> None:
    """Makes a field a tuple of `count` numbers: JSON and YAML give lists, and equality wants one type."""
    value = getattr(config, name)
    try:
        is_number = not any(isinstance(number, str | bool) for number in value)
        numbers = tuple(kind(number) for number in value) if is_number else ()
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != count or not all(least <= number <= most for number in numbers):
        allowed = f"{count} numbers from {least:g}" + ("" if most == math.inf else f" to {most:g}")
        raise ValueError(f"{type(config).__name__}.{name} is {numbers or value!r}; it must be {allowed}")
    object.__setattr__(config, name, numbers)


def _set_finite(config: Any, name: str) -> None:
    """Makes a field a float: JSON and YAML give whole numbers where the fraction is 0."""
    value = getattr(config, name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{type(config).__name__}.{name} is {value!r}; it must be a finite number")
    object.__setattr__(config, name, float(value))


def _require_heads(config: VisionConfig | TextConfig) -> None:
    width = config.pooled_width if isinstance(config, VisionConfig) else config.width
    if width % config.head_width:
        raise ValueError(
            f"{type(config).__name__}.width is {config.width}, which is not a multiple of head_width "
            f"{config.head_width}; every attention head needs the same whole number of channels"
        )


def _require_choice(config: Any, name: str, choices: Any) -> None:
    value = getattr(config, name)
    if value not in get_args(choices):
        raise ValueError(f"{type(config).__name__}.{name} is {value!r}; valid are {', '.join(get_args(choices))}")


@dataclass(frozen=True)
class VisionConfig:
    """The image tower (paper section 2.4).

    Args:
        kind: "vit", the vision transformer of Dosovitskiy et al. 2020 with one more layer norm before the blocks;
            "resnet", CLIP's modified residual network; or "timm", any image model of that library.
        image_size: side of the square input, pixels.
        patch_size: of a ViT: side of a patch, pixels; divides `image_size`.
        width: of a ViT: channels of a token. Of a ResNet: channels after the stem, a 32nd of those that are pooled.
        layers: of a ViT: number of residual attention blocks.
        blocks: of a ResNet: number of bottlenecks in each of its four stages.
        head_width: channels of one attention head; divides `width` (of a ResNet, 32 times it).
        mlp_ratio: of a ViT: width of the blocks' hidden layer, in units of `width`.
        timm_model: of a timm tower: the model's name in timm; `patch_size` to `mlp_ratio` have no effect then.
        timm_pool: timm's `global_pool`, which makes one vector of the model's features; empty for the model's default.
        timm_projection: from that vector to the embedding: "linear" is a matrix, "mlp" two layers, "none" nothing, and
            "classifier" the model's own last layer.
        timm_projection_bias: whether the matrix, or the second layer of the MLP, has a bias.
        mean, std: of the training images, RGB in [0, 1]; inputs are normalised with them. At most 1e4, and `std` at
            least 1e-4, so that pixels stay finite and apart.
        preprocess: "openai" resizes, crops and then converts to RGB; "hf" (Hugging Face) converts first, and rounds
            the crop's offset down.
        resize: before the crop, "shortest" brings the short side to `resize_size`, "squash" both sides; "none" leaves
            the picture as it is.
        resize_size: pixels; by default `image_size`.
        interpolation: the filter of that resizing, by its name in Pillow.
    """

    kind: VisionKind = "vit"
    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    head_width: int = 64
    mlp_ratio: float = 4.0
    timm_model: str = ""
    timm_pool: str = ""
    timm_projection: TimmProjection = "linear"
    timm_projection_bias: bool = False
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    preprocess: Preprocessing = "openai"
    resize: Resize = "shortest"
    resize_size: int | None = None
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _require_choice(self, "kind", VisionKind)
        _require_choice(self, "preprocess", Preprocessing)
        _require_choice(self, "resize", Resize)
        _require_choice(self, "interpolation", Interpolation)
        _require_choice(self, "timm_projection", TimmProjection)
        if (self.kind == "timm") != bool(self.timm_model):
            raise ValueError(
                f"VisionConfig.kind is {self.kind!r} and timm_model {self.timm_model!r}; a model's name belongs to "
                "kind 'timm' and to no other"
            )
        # timm takes the addresses hf-hub:… and local-dir:… as well; only the names of its own models are allowed here.
        if not isinstance(self.timm_model, str) or not re.fullmatch(r"[\w.]*", self.timm_model):
            raise ValueError(
                f"VisionConfig.timm_model is {self.timm_model!r}; it must be the name of one of timm's own models, as "
                "'vit_base_patch16_224'"
            )
        _require_positive(self, "image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")
        if self.resize_size is not None:
            _require_positive(self, "resize_size")
        sizes = ("image_size",) if self.resize_size is None else ("image_size", "resize_size")
        _require_at_most(self, 16_384, "pixels of a picture of that side take 3.2 GB in float32", *sizes)
        _require_heads(self)
        if self.image_size % self.stride:
            what = f"patch_size {self.patch_size}" if self.kind == "vit" else "32, a ResNet's stride"
            raise ValueError(
                f"VisionConfig.image_size is {self.image_size}, which is not a multiple of {what}; a strip of "
                "pixels at the edge would never be seen"
            )
        _set_numbers(self, "blocks", 4, int, least=1)
        _set_numbers(self, "mean", 3, float, least=-1e4, most=1e4)
        _set_numbers(self, "std", 3, float, least=1e-4, most=1e4)

    @property
    def stride(self) -> int:
        """Pixels from one place of the feature map to the next; 1 for timm, so that any `image_size` is allowed."""
        return {"vit": self.patch_size, "resnet": 32, "timm": 1}[self.kind]

    @property
    def pooled_width(self) -> int:
        """Channels where the image is pooled to one vector."""
        return 32 * self.width if self.kind == "resnet" else self.width

    @property
    def heads(self) -> int:
        return self.pooled_width // self.head_width

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.stride) ** 2


@dataclass(frozen=True)
class TextConfig:
    """The text tower: a causal transformer with GPT-2's architecture (paper section 2.4).

    Args:
        context_length: the most tokens of a text, start and end tokens included.
        vocab_size: rows of the token embedding.
        eot_token: id of the end-of-text token; the output at a row's first one becomes the text's embedding. None for
            the row's largest id, where open_clip and old files of Hugging Face's look: in a vocabulary that was
            enlarged, that may be an added token.
        width, layers, head_width, mlp_ratio: as in VisionConfig.
    """

    context_length: int = 77
    vocab_size: int = 49408
    eot_token: int | None = 49407
    width: int = 512
    layers: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        _require_positive(self, "context_length", "vocab_size", "width", "layers", "head_width", "mlp_ratio")
        _require_at_most(self, 16_384, "attention over so many tokens takes 1 GB a head in float32", "context_length")
        _require_heads(self)
        is_id = type(self.eot_token) is int and 0 <= self.eot_token < self.vocab_size
        if self.eot_token is not None and not is_id:
            raise ValueError(
                f"TextConfig.eot_token is {self.eot_token!r}; it must be a token id, 0 to {self.vocab_size - 1}"
            )

    @property
    def heads(self) -> int:
        return self.width // self.head_width


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers and the width of the space they meet in.

    Args:
        embed_dim: channels of the shared embedding.
        activation: of the blocks' hidden layer. OpenAI's weights need "quick_gelu", x * sigmoid(1.702 x);
            with "gelu" they run without an error and give worse features.
        towers: which of the two are there. A checkpoint of one alone, with its projection, conditions a diffusion
            model or serves search; it encodes, and is not trained.
        init_logit_scale: initial value of the logarithm of the logits' scale.
        init_logit_bias: initial value of the logits' bias, which the sigmoid loss needs (SigLIP: scale ln 10, bias
            -10); None for no bias.
    """

    embed_dim: int = 512
    activation: Activation = "quick_gelu"
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    towers: Towers = "both"
    init_logit_scale: float = CLIP_LOGIT_SCALE
    init_logit_bias: float | None = None

    def __post_init__(self) -> None:
        for name, tower in (("vision", VisionConfig), ("text", TextConfig)):
            if not isinstance(getattr(self, name), tower):
                raise ValueError(
                    f"CLIPConfig.{name} is {getattr(self, name)!r}; it must be a {tower.__name__}, and "
                    "`CLIPConfig.from_dict` takes plain values"
                )
        _require_positive(self, "embed_dim")
        _require_choice(self, "towers", Towers)
        _require_choice(self, "activation", Activation)
        _set_finite(self, "init_logit_scale")
        check_logit_scale("CLIPConfig.init_logit_scale", self.init_logit_scale)
        if self.init_logit_bias is not None:
            _set_finite(self, "init_logit_bias")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested plain values, as `from_dict` takes them."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the configuration") -> CLIPConfig:
        """The inverse of `to_dict`; missing keys take their defaults, unknown ones are an error.

        Args:
            source: where the values came from, for the error.

        Raises:
            ValueError: an unknown key, or a value that the architecture does not allow.
        """
        values = dict(_known(cls, values, source))
        sections = {
            name: _known(tower, values.pop(name, {}), f"{source}, section {name!r}")
            for name, tower in (("vision", VisionConfig), ("text", TextConfig))
        }
        try:
            return cls(vision=VisionConfig(**sections["vision"]), text=TextConfig(**sections["text"]), **values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_json(cls, text: str, source: str = "the configuration") -> CLIPConfig:
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{source} is not JSON: {error}") from error
        return cls.from_dict(values, source)


def _known(cls: Any, values: Any, source: str) -> dict[str, Any]:
    """`values`, after making sure that every key is a field of `cls`."""
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds {values!r}; it must be a mapping of names to values")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ValueError(f"{source} has the unknown key {key!r}; valid are {', '.join(names)}")
    return values


def differences(first: Any, second: Any, name: str, whose: tuple[str, str]) -> list[str]:
    """A line for each value in which two nested configurations differ, of those that both have.

    Args:
        first, second: as `CLIPConfig.to_dict` gives them.
        name: what the keys in the lines begin with; may be empty.
        whose: the words that a line has before the first's value and before the second's.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        both = [key for key in first if key in second]
        return [
            line for key in both for line in differences(first[key], second[key], f"{name}.{key}".lstrip("."), whose)
        ]
    return [] if first == second else [f"  {name}: {whose[0]} {first}, {whose[1]} {second}"]


def _vit(embed_dim: int, text_width: int, image_size: int, patch_size: int, width: int, layers: int) -> CLIPConfig:
    vision = VisionConfig(image_size=image_size, patch_size=patch_size, width=width, layers=layers)
    return CLIPConfig(embed_dim=embed_dim, vision=vision, text=TextConfig(width=text_width))


def _resnet(
    embed_dim: int, text_width: int, image_size: int, width: int, blocks: tuple[int, int, int, int]
) -> CLIPConfig:
    vision = VisionConfig(kind="resnet", image_size=image_size, width=width, blocks=blocks)
    return CLIPConfig(embed_dim=embed_dim, vision=vision, text=TextConfig(width=text_width))


OPENAI_MODELS: dict[str, CLIPConfig] = {
    "RN50": _resnet(1024, 512, image_size=224, width=64, blocks=(3, 4, 6, 3)),
    "RN101": _resnet(512, 512, image_size=224, width=64, blocks=(3, 4, 23, 3)),
    "RN50x4": _resnet(640, 640, image_size=288, width=80, blocks=(4, 6, 10, 6)),
    "RN50x16": _resnet(768, 768, image_size=384, width=96, blocks=(6, 8, 18, 8)),
    "RN50x64": _resnet(1024, 1024, image_size=448, width=128, blocks=(3, 15, 36, 10)),
    "ViT-B/32": _vit(512, 512, image_size=224, patch_size=32, width=768, layers=12),
    "ViT-B/16": _vit(512, 512, image_size=224, patch_size=16, width=768, layers=12),
    "ViT-L/14": _vit(768, 768, image_size=224, patch_size=14, width=1024, layers=24),
    "ViT-L/14@336px": _vit(768, 768, image_size=336, patch_size=14, width=1024, layers=24),
}
