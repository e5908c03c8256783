"""open_clip's transforms of pictures to pixels, their settings, and what training draws at random.

R resolution.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from PIL import Image
from torch import Tensor

from . import openai, openclip_names
from .config import OPENAI_MEAN, OPENAI_STD
from .weights.architecture import side_of_square

Transform = Callable[[Image.Image], Tensor]


@dataclass
class PreprocessCfg:
    size: int | tuple[int, int] = 224
    mode: str = "RGB"
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        if self.mode != "RGB":
            raise ValueError(f"mode is {self.mode!r}; pictures are 'RGB'")

    @property
    def num_channels(self) -> int:
        return 3

    @property
    def input_size(self) -> tuple[int, ...]:
        return 3, *((self.size, self.size) if isinstance(self.size, int) else self.size)


def merge_preprocess_dict(base: PreprocessCfg | Mapping[str, Any], overlay: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those settings of both that a PreprocessCfg has; None of the second changes nothing."""
    known = {field.name for field in fields(PreprocessCfg)}
    given = asdict(base) if isinstance(base, PreprocessCfg) else dict(base)
    given |= {name: value for name, value in (overlay or {}).items() if value is not None}
    return {name: value for name, value in given.items() if name in known}


def merge_preprocess_kwargs(base: PreprocessCfg | Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
    return merge_preprocess_dict(base, kwargs)


@dataclass
class AugmentationCfg:
    """Augmentation of training: `scale` is of the crop's area.

    `ratio` and erasing (`re_`) need `use_timm`, which takes timm's transforms. Without it, colours change by the four
    of `color_jitter` with `color_jitter_prob`, and go with `gray_scale_prob`.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] | None = None
    color_jitter: Any = None
    re_prob: float | None = None
    re_count: int | None = None
    use_timm: bool = False
    color_jitter_prob: float | None = None
    gray_scale_prob: float | None = None


def image_transform(
    image_size: int | Sequence[int],
    is_train: bool,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    resize_mode: str | None = None,
    interpolation: str | None = None,
    fill_color: int = 0,
    aug_cfg: Any = None,
) -> Transform:
    """torchvision's transforms of a PIL image to (3, R, R).

    Args:
        is_train: a random crop of `aug_cfg["scale"]` of the area, 0.9 to 1, in place of the middle.
        resize_mode: "shortest" side, "squash" both, or "longest" side, with edges of `fill_color`.
        aug_cfg: an AugmentationCfg, or some of its fields.

    Raises:
        ValueError: a picture that is not square, another mode, or augmentation that would be ignored.
    """
    from torchvision import transforms  # a second, and only this needs it

    side = side_of_square("image_size", image_size if isinstance(image_size, int) else [image_size[0], image_size[-1]])
    modes, filters = ("shortest", "longest", "squash"), ("bicubic", "bilinear", "random")
    mode, interpolation = resize_mode or "shortest", interpolation or "bicubic"
    for value, name, valid in ((mode, "resize_mode", modes), (interpolation, "interpolation", filters)):
        if value not in valid:
            raise ValueError(f"{name} is {value!r}; valid are {', '.join(valid)}")
    filter_ = transforms.InterpolationMode("bilinear" if interpolation == "bilinear" else "bicubic")
    usual = openclip_names.OPENAI_DATASET_MEAN, openclip_names.OPENAI_DATASET_STD
    mean, std = (
        list(given) if isinstance(given, Sequence) else [given] * 3 for given in (mean or usual[0], std or usual[1])
    )
    augmentation = AugmentationCfg(**aug_cfg) if isinstance(aug_cfg, Mapping) else aug_cfg or AugmentationCfg()
    if is_train and augmentation.use_timm:
        return _of_timm(side, mean, std, interpolation, augmentation)
    if is_train:
        crop = transforms.RandomResizedCrop(
            side, scale=tuple(augmentation.scale), interpolation=transforms.InterpolationMode.BICUBIC
        )
        steps = [crop, openai._convert_image_to_rgb, *_of_colours(augmentation)]
    elif mode == "squash":
        steps = [transforms.Resize((side, side), interpolation=filter_), openai._convert_image_to_rgb]
    elif mode == "longest":
        steps = [_FitLongest(side, filter_, fill_color), openai._convert_image_to_rgb]
    else:
        steps = [
            transforms.Resize(side, interpolation=filter_),
            transforms.CenterCrop(side),
            openai._convert_image_to_rgb,
        ]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


def image_transform_v2(cfg: PreprocessCfg, is_train: bool, aug_cfg: Any = None) -> Transform:
    """`image_transform` of these settings."""
    return image_transform(
        cfg.size, is_train, cfg.mean, cfg.std, cfg.resize_mode, cfg.interpolation, cfg.fill_color, aug_cfg
    )


def _of_timm(side: int, mean: Any, std: Any, interpolation: str, augmentation: AugmentationCfg) -> Transform:
    from timm.data.transforms_factory import create_transform  # half a second, which only this needs

    names = ("scale", "ratio", "re_prob", "re_count")
    given = {name: value for name in names if (value := getattr(augmentation, name)) is not None}
    given |= {"color_jitter": augmentation.color_jitter, "interpolation": interpolation, "re_mode": "pixel"}
    return create_transform((3, side, side), is_training=True, hflip=0.0, mean=mean, std=std, **given)


def _of_colours(augmentation: AugmentationCfg) -> list[Any]:
    """
    Raises:
        ValueError: a setting that has no effect without timm's transforms, or a jitter that is none of four numbers.
    """
    from torchvision import transforms

    jitter, chance = augmentation.color_jitter, augmentation.color_jitter_prob
    for name in ("ratio", "re_prob", "re_count"):
        if getattr(augmentation, name) is not None:
            raise ValueError(f"aug_cfg has {name}={getattr(augmentation, name)!r}, which needs use_timm=True")
    if bool(chance) != (jitter is not None) or (chance and len(jitter) != 4):
        raise ValueError(
            f"aug_cfg has color_jitter={jitter!r} and color_jitter_prob={chance!r}; without use_timm=True, the first "
            "is of brightness, contrast, saturation and hue, and each needs the other"
        )
    steps = [_Sometimes(chance, transforms.ColorJitter(*jitter))] if chance else []
    gray = augmentation.gray_scale_prob
    return [*steps, _Sometimes(gray, transforms.Grayscale(num_output_channels=3))] if gray else steps


@dataclass
class _Sometimes:
    """The picture or, with this probability, the transform's."""

    probability: float
    transform: Callable[[Image.Image], Image.Image]

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.transform(image) if random.random() < self.probability else image


@dataclass
class _FitLongest:
    """The whole picture, in the middle of a square with this side."""

    size: int
    interpolation: Any
    fill: int

    def __call__(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms import functional

        ratio = max(image.size) / self.size
        width, height = (round(each / ratio) for each in image.size)
        image = functional.resize(image, [height, width], self.interpolation)
        left, top = self.size - width, self.size - height
        edges = [left // 2, top // 2, (left + 1) // 2, (top + 1) // 2]
        return functional.pad(image, edges, fill=self.fill)
