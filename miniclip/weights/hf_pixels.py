"""Hugging Face's settings of an image processor <-> the fields of `VisionConfig`.

transformers 5 writes `processor_config.json` with the settings in a section `image_processor`, which wins; older ones
write `preprocessor_config.json`. What a file leaves out is as in transformers' CLIPImageProcessor. A step that it sets
to null is not taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from PIL import Image

from ..config import OPENAI_MEAN, OPENAI_STD, Interpolation, VisionConfig

_CLASSES = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_DEFAULTS: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "feature_extractor_type": "CLIPFeatureExtractor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "use_square_size": False,
    "resample": Image.Resampling.BICUBIC.value,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_MEAN,
    "image_std": OPENAI_STD,
    "do_pad": False,
    "pad_size": None,
}


def vision_fields(values: Mapping[str, Any], image_size: int, source: str) -> dict[str, Any]:
    """The fields of `VisionConfig` that say how pictures become pixels.

    Args:
        values: an image processor's settings.
        image_size: side of the model's input.

    Raises:
        ValueError: a setting that `Preprocess` can't do exactly; names it.
    """
    settings = _DEFAULTS | dict(values)

    def refuse(name: str, what: str) -> ValueError:
        return ValueError(f"{source} has {name!r}: {settings[name]!r}, which is not supported: {what}")

    for name in ("image_processor_type", "feature_extractor_type"):
        if settings[name] not in (None, *_CLASSES):
            raise refuse(name, f"only {_CLASSES[0]} is")
    for name, value in settings.items():
        if name.startswith("do_") and value and name not in _DEFAULTS:
            raise refuse(name, "it is no step of CLIPImageProcessor")
        if name.startswith("do_") and value not in (True, False, None):
            raise refuse(name, "it is true or false")
    fields: dict[str, Any] = {"preprocess": "hf", **_resize(settings, refuse)}
    if settings["do_center_crop"]:
        if _square(settings["crop_size"]) != image_size:
            takes = f"this model takes {image_size} x {image_size} pixels (image_size in its config.json)"
            raise refuse("crop_size", f"{takes}; one of the two files is another model's, so put the right one there")
    elif fields["resize"] != "squash" or fields["resize_size"] != image_size:
        raise refuse(
            "do_center_crop", f"without it pictures would not be the {image_size} x {image_size} of this model"
        )
    if settings["do_pad"] and settings["pad_size"] is not None and _square(settings["pad_size"]) != image_size:
        raise refuse("pad_size", f"this model takes {image_size} x {image_size} pixels")
    if fields["resize_size"] == image_size:
        fields["resize_size"] = None
    return fields | _mean_and_std(settings, refuse)


def _resize(settings: Mapping[str, Any], refuse: Any) -> dict[str, Any]:
    if not settings["do_resize"]:
        return {"resize": "none", "resize_size": None}
    filters = {Image.Resampling[name.upper()].value: name for name in get_args(Interpolation)}
    resample = settings["resample"]
    if type(resample) is not int or resample not in filters:  # transformers takes 3.0 for another filter than 3
        raise refuse("resample", f"it is one of Pillow's filters, {filters}")
    size = settings["size"]
    if isinstance(size, int) and not isinstance(size, bool):
        size = {"height": size, "width": size} if settings["default_to_square"] else {"shortest_edge": size}
    if settings["use_square_size"]:
        size = {"height": 224, "width": 224}  # transformers takes its class's size there, whatever else is set
    interpolation = filters[resample]
    shortest = size.get("shortest_edge") if isinstance(size, dict) and set(size) == {"shortest_edge"} else None
    side = _square(size) if shortest is None else shortest
    if not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise refuse("size", "it is {'shortest_edge': pixels}, or 'height' and 'width' that are equal")
    how = "squash" if shortest is None else "shortest"
    return {"resize": how, "resize_size": side, "interpolation": interpolation}


def _square(size: Any) -> int | None:
    """The side of a square, as transformers reads sizes; None if it is none."""
    if isinstance(size, int):
        return size
    if isinstance(size, list | tuple) and len(size) == 2:
        size = dict(zip(("height", "width"), size, strict=True))
    if isinstance(size, dict) and set(size) == {"height", "width"} and size["height"] == size["width"]:
        return size["height"]
    return None


def _mean_and_std(settings: Mapping[str, Any], refuse: Any) -> dict[str, Any]:
    """Of pixels in [0, 1]: transformers multiplies by a factor, which need not be 1/255, and normalises after that."""
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise refuse("rescale_factor", "it is a number greater than 0")
    mean, std = (
        settings[name] if settings["do_normalize"] else value for name, value in (("image_mean", 0), ("image_std", 1))
    )
    mean, std = (value if isinstance(value, list | tuple) else [value] * 3 for value in (mean, std))
    white = 255 * factor  # 1.0 where the factor is 1/255
    fields: dict[str, Any] = {}
    for name, values in (("mean", mean), ("std", std)):
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise refuse(f"image_{name}", "it is a number for each of three channels")
        fields[name] = tuple(value / white for value in values)
        try:
            VisionConfig(**{name: fields[name]})
        except ValueError as error:
            raise refuse(f"image_{name}", str(error)) from error
    return fields


def settings_of(vision: VisionConfig) -> dict[str, Any]:
    """A `preprocessor_config.json` that makes the same pixels."""
    side, resized = vision.image_size, vision.resize_size or vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": vision.resize != "none",
        "size": {"shortest_edge": resized} if vision.resize != "squash" else {"height": resized, "width": resized},
        "resample": Image.Resampling[vision.interpolation.upper()].value,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "do_convert_rgb": True,
    }
