"""A model from a checkpoint of any layout, and to our own directory. Nothing here runs code from a file.

| format    | what it is                                                                   |
|-----------|------------------------------------------------------------------------------|
| native    | our directory: config.json + model.safetensors                               |
| lightning | the trainer's .ckpt                                                          |
| openai    | OpenAI's TorchScript archive, or the state dict in it                        |
| openclip  | OpenCLIP's directory (open_clip_config.json), or a state dict or TorchScript |
|           | archive with its names, which are OpenAI's                                   |
| hf        | a Hugging Face directory of a CLIPModel, or of one of its towers with its    |
|           | projection; or a state dict with a CLIPModel's names                         |

Loading is: tensors in, whatever holds them (`read`), our names, by one table per layout (`layouts`), the architecture,
from the layout's own configuration or from the tensors' shapes, and a model, strictly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.arguments import check_path, shown
from ..common.device import find_device
from ..common.files import write_text
from ..config import OPENAI_MODELS, Activation, CLIPConfig, check_logit_scale
from ..data.wordings.kept import WORDINGS_FILE
from ..images import Preprocess
from ..model import CLIP
from .computation import refuse_other_computation
from .containers import write_safetensors
from .download import HUB_PREFIX
from .folders import CONFIG_FILE, WEIGHTS_FILE, refuse_to_save
from .layouts import Tensors, to_native_keys
from .read import Checkpoint, locate, read_checkpoint
from .shapes import differences, unfilled
from .unwrap import refuse_no_weights, without_wrappers

# ---------------------------------------------------------------------------------------------------------------------
# The three functions that most people need


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | Path | None = None,
    *,
    activation: Activation | None = None,
    heads: int | tuple[int, int] | None = None,
    head_width: int | tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    context_length: int | None = None,
) -> tuple[CLIP, Callable[[Image.Image], Tensor]]:
    """A trained model and the preprocessing that belongs to it.

    Args:
        name: the path of a checkpoint in any of the formats above, one of OpenAI's names (`available_models()`), or
            "hf-hub:owner/name". A path wins over a name.
        device: where to; by default a GPU if there is one.
        jit: warned about and ignored; there for scripts written for OpenAI's package.
        download_root: where downloads are kept; by default the user's cache.
        activation: for checkpoints that do not tell it (a bare state dict); an error if they tell another.
        heads: attention heads of the image and of the text tower, one number if they are equal; for a bare state dict
            that is no published model, as no tensor's shape tells.
        head_width: channels of a head instead; one number, or two, of the image and of the text tower.
        dtype: of the weights, the same on every device.
        image_size: another input resolution, pixels; position embeddings are interpolated (bicubic).
        context_length: another one; position embeddings are cut, or extended by repeating the last.

    Returns:
        The model in evaluation mode, and a function from a PIL image to (3, R, R).

    Raises:
        ValueError: nothing there, not a checkpoint, weights and architecture that do not belong together, no such
            device, or a download that fails.
    """
    if jit:
        warnings.warn("jit=True is ignored: no code of a checkpoint is run", stacklevel=2)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; it must be a floating type of torch's, as torch.float16")
    device = find_device(device)
    hints: dict[str, Any] = {"activation": activation, "heads": heads, "head_width": head_width}
    checkpoint = read_checkpoint(locate(name, download_root), **hints)
    if (image_size, context_length) != (None, None):
        _refuse_misfits(checkpoint.config, checkpoint.tensors, str(name), checkpoint.called)
        checkpoint = resize(checkpoint, image_size, context_length)
    return build(checkpoint, str(name), dtype).to(device).eval(), preprocess_for(checkpoint.config)


def from_pretrained(name: str | Path, **options: Any) -> tuple[CLIP, Callable[[Image.Image], Tensor]]:
    """`load` for people who name models as hubs do: a folder, or "owner/name" of Hugging Face's hub.

    Args:
        options: as those of `load`.

    Raises:
        ValueError: as `load`.
    """
    name = check_path("name", name)
    is_here = Path(name).exists() or name.startswith(HUB_PREFIX) or name.count("/") != 1
    return load(name if is_here or name in OPENAI_MODELS else f"{HUB_PREFIX}{name}", **options)


def save(model: CLIP, directory: str | Path, overwrite: bool = False) -> None:
    """Writes `config.json` and `model.safetensors`, and `wordings.json` if the model has them; `load(directory)` gives
    the model back, bit for bit, but for its hooks. One of torch.compile's or of `miniclip.openclip` becomes ours.

    It warns if parts of the model are not as its config describes, and it can't be found out whether features differ.

    Raises:
        ValueError: the directory already holds a model, and `overwrite` is False; it holds one that `load` would read
            in place of this one; or the model is no CLIP, one that `load` could not read back, or one that computes
            something else than its config describes (another activation, a `forward` of its own). Nothing is
            written.
    """
    if not isinstance(getattr(model, "config", None), CLIPConfig):
        is_module = isinstance(model, torch.nn.Module)
        what = f"a {type(model).__name__} of {type(model).__module__}" if is_module else shown(model)
        parts = model.named_children() if is_module else ()  # as nn.DataParallel and DistributedDataParallel have it
        if own := next((part for part, held in parts if isinstance(getattr(held, "config", None), CLIPConfig)), None):
            raise ValueError(f"model is {what}, which holds a CLIP as its .{own}; save that")
        raise ValueError(
            f"model is {what}; it must be a CLIP, as `miniclip.load` returns it first. torch.save keeps the "
            "state_dict() of any other, and `load` reads a CLIP's"
        )
    directory = Path(check_path("directory", directory))
    refuse_to_save(directory, overwrite)
    tensors = _tensors_to_save(model)  # before anything is written
    write_safetensors(directory / WEIGHTS_FILE, tensors)
    write_text(directory / CONFIG_FILE, model.config.to_json())
    wordings = getattr(model, "wordings", None)  # a model of `miniclip.openclip` has none
    if wordings is None:
        (directory / WORDINGS_FILE).unlink(missing_ok=True)  # another model's
    else:
        write_text(directory / WORDINGS_FILE, wordings.to_json())


def _tensors_to_save(model: CLIP) -> Tensors:
    """A model's tensors by our names, as its configuration describes them.

    Raises:
        ValueError: `load` could not read them back; says why and what to do.
    """
    found = model.state_dict()
    refuse_no_weights(found, "the model", "save what comes of it")
    named = to_native_keys(without_wrappers(found, "the model"))
    tensors, storages = {}, set()
    for name, tensor in named.items():
        _refuse_no_numbers(name, tensor)
        tensors[name] = tensor.detach().cpu().contiguous()
        storage = tensors[name].untyped_storage().data_ptr()
        if storage in storages:  # tied, or parts of one vector: safetensors takes each tensor by itself
            tensors[name] = tensors[name].clone()
        storages.add(storage)
    if wrong := differences(model.config, tensors, "the model"):
        what = "the model has other tensors than its config describes, so `load` could not read it back:"
        remedy = "set model.config to its sizes (dataclasses.replace), or keep its state_dict() with torch.save"
        raise ValueError("\n".join([what, *wrong, remedy]))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise ValueError(
                f"{name} of the model holds infinite numbers or NaN, which `load` refuses: its training diverged. Save "
                "an earlier state, or keep this one's state_dict() with torch.save"
            )
    check_logit_scale("logit_scale of the model", float(tensors["logit_scale"]))
    refuse_other_computation(model)
    return tensors


def _refuse_no_numbers(name: str, tensor: Tensor) -> None:
    """Raises a ValueError for a tensor of a model whose numbers are elsewhere, or not plain ones."""
    if tensor.is_meta:
        raise ValueError(
            f"{name} of the model is on the meta device, so its numbers are elsewhere or nowhere; where accelerate "
            "keeps them (offloading), remove_hook_from_module(model, recurse=True) of accelerate.hooks brings them back"
        )
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise ValueError(
            f"{name} of the model is a {type(tensor).__name__}, and `load` reads plain tensors; gather the parts of "
            "FSDP2's (full_tensor()), dequantise quantised ones, and save what comes of it"
        )


def preprocess_for(config: CLIPConfig) -> Preprocess:
    vision = config.vision
    how = vision.preprocess, vision.resize, vision.resize_size, vision.interpolation
    return Preprocess(vision.image_size, vision.mean, vision.std, *how)


def build(checkpoint: Checkpoint, source: str, dtype: torch.dtype = torch.float32) -> CLIP:
    """The model of a checkpoint, on the CPU. It takes the tensors over one by one: the checkpoint is left without.

    Raises:
        ValueError: a tensor's name or shape does not fit the architecture, and lists both sides; or a tensor is not
            finite.
    """
    config, tensors, called = checkpoint.config, checkpoint.tensors, checkpoint.called
    _refuse_misfits(config, tensors, source, called)  # before anything is made of them
    # timm's models may compute buffers that no checkpoint holds
    model = CLIP(config) if config.vision.kind == "timm" else unfilled(config)
    converted: Tensors = {}
    for name in list(tensors):
        tensor = tensors.pop(name)  # so that its part of the file leaves memory as the converted one comes
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise ValueError(
                f"{called(name)} in {source} holds infinite numbers or NaN: the run that wrote it diverged, or the "
                "file is damaged. Take an earlier checkpoint"
            )
        if name == "logit_scale":
            check_logit_scale(f"{called(name)} in {source}", float(tensor))
        # One layout in memory, so that the bits of a result do not depend on the format that the weights came in.
        converted[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    model.load_state_dict(converted, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.wordings = checkpoint.wordings
    return model


def _is_finite(tensor: Tensor) -> bool:
    total = tensor.sum(dtype=torch.float32)  # one pass; it may be infinite where no number is
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def _refuse_misfits(config: CLIPConfig, tensors: Tensors, source: str, called: Callable[[str], str]) -> None:
    """Raises a ValueError if names, shapes or kinds of tensors are not the architecture's."""
    for name in [name for name in tensors if name.endswith(".running_var")]:
        counter = name.replace(".running_var", ".num_batches_tracked")  # inference never reads it; some layouts lack it
        tensors.setdefault(counter, torch.zeros((), dtype=torch.long))
    try:
        wrong = differences(config, tensors, called=called)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if wrong:
        raise ValueError("\n".join([f"the weights in {source} belong to another architecture:", *wrong]))
    for key, tensor in tensors.items():
        is_number = tensor.is_floating_point() or key.endswith("num_batches_tracked")
        if not is_number or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}"
            raise ValueError(f"{called(key)} in {source} is {kind}; it must be plain floating point")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            shape = tuple(tensor.shape)
            raise ValueError(f"{called(key)} in {source} repeats fewer numbers than its shape {shape} holds")


def resize(checkpoint: Checkpoint, image_size: int | None, context_length: int | None) -> Checkpoint:
    """The same weights for another resolution or context length.

    Position embeddings of the image's places are interpolated (bicubic, as ViTs are fine-tuned at a higher resolution;
    Dosovitskiy et al. 2020, section 3.2); those of the text are cut, or extended by repeating the last one.

    Raises:
        ValueError: a size that the architecture does not allow, or of a tower that is not there.
    """
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    for name, size, now, tower in (
        ("image_size", image_size, config.vision.image_size, "image"),
        ("context_length", context_length, config.text.context_length, "text"),
    ):
        if size not in (None, now) and config.towers not in (tower, "both"):
            raise ValueError(f"{name}={size!r}: this model has no {tower} tower; it is the other one alone")
    if image_size is not None and image_size != config.vision.image_size:
        if config.vision.kind == "timm":
            raise ValueError(f"image_size={image_size}: the resolution of a timm tower is not changed")
        name = "visual.positional_embedding" if config.vision.kind == "vit" else "visual.attnpool.positional_embedding"
        before = config.vision.resize_size
        resized = None if before is None else round(before * image_size / config.vision.image_size)
        config = replace(config, vision=replace(config.vision, image_size=image_size, resize_size=resized))
        tensors[name] = interpolate_places(tensors[name], round(config.vision.num_patches**0.5))
    if context_length is not None and context_length != config.text.context_length:
        table = tensors["text.positional_embedding"]
        config = replace(config, text=replace(config.text, context_length=context_length))
        extra = max(0, context_length - len(table))
        tensors["text.positional_embedding"] = torch.cat([table[:context_length], table[-1:].expand(extra, -1)])
    return replace(checkpoint, config=config, tensors=tensors)


def interpolate_places(table: Tensor, side: int, mode: str = "bicubic", antialias: bool = True) -> Tensor:
    """Position embeddings of a token and a square of places, for another square: (1 + old * old, D) -> (1 + N, D)."""
    old = round((len(table) - 1) ** 0.5)
    grid = table[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    grid = F.interpolate(grid, size=(side, side), mode=mode, antialias=antialias, align_corners=False)
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)])
