"""A model from a checkpoint of any layout, and to our own directory. Nothing here runs code from a file.

| format    | what it is                                                                   |
|-----------|------------------------------------------------------------------------------|
| native    | our directory: config.json + model.safetensors                               |
| lightning | the trainer's .ckpt                                                          |
| openai    | OpenAI's TorchScript archive, or a state dict with its names                 |
| openclip  | OpenCLIP's directory (open_clip_config.json), or a state dict with its names |
| hf        | a Hugging Face directory of a CLIPModel, or of one of its towers with its    |
|           | projection; or a state dict with a CLIPModel's names                         |

Loading is: tensors in, whatever holds them (`read`), our names, by one table per layout (`layouts`), the architecture,
from the layout's own configuration or from the tensors' shapes, and a model, strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..common.device import find_device
from ..common.files import write_text
from ..config import Activation, CLIPConfig
from ..images import Preprocess
from ..model import CLIP
from .layouts import Tensors
from .read import CONFIG_FILE, WEIGHTS_FILE, Checkpoint, locate, read_checkpoint, resize, write_safetensors

# ---------------------------------------------------------------------------------------------------------------------
# The three functions that most people need


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | Path | None = None,
    *,
    activation: Activation | None = None,
    dtype: torch.dtype = torch.float32,
    image_size: int | None = None,
    context_length: int | None = None,
) -> tuple[CLIP, Callable[[Image.Image], Tensor]]:
    """A trained model and the preprocessing that belongs to it.

    Args:
        name: the path of a checkpoint in any of the formats above, one of OpenAI's names (`available_models()`), or
            "hf-hub:owner/name". A path wins over a name.
        device: where to; by default a GPU if there is one.
        jit: only False; there for scripts written for OpenAI's package.
        download_root: where downloads are kept; by default the user's cache.
        activation: for checkpoints that do not tell it (a bare state dict); an error if they tell another.
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
        raise ValueError("jit=True would run the code inside the checkpoint; only jit=False is supported")
    device = find_device(device)
    checkpoint = resize(read_checkpoint(locate(name, download_root), activation), image_size, context_length)
    return build(checkpoint, str(name), dtype).to(device).eval(), preprocess_for(checkpoint.config)


def save(model: CLIP, directory: str | Path, overwrite: bool = False) -> None:
    """Writes `config.json` and `model.safetensors`; `load(directory)` gives the model back, bit for bit.

    Raises:
        ValueError: the directory already holds a model, and `overwrite` is False.
    """
    directory = Path(directory)
    there = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (directory / name).exists()]
    if there and not overwrite:
        raise ValueError(f"{directory} already holds a model ({', '.join(there)}); pass overwrite=True to replace it")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    write_safetensors(directory / WEIGHTS_FILE, tensors)
    write_text(directory / CONFIG_FILE, model.config.to_json())


def preprocess_for(config: CLIPConfig) -> Preprocess:
    return Preprocess(config.vision.image_size, config.vision.mean, config.vision.std, config.vision.preprocess)


class _Unfilled(TorchFunctionMode):
    """Under it, modules are made in no time: no memory is taken, and no random numbers are drawn to be overwritten.

    The device "meta" alone would do the former; but its `normal_` is a reference implementation, for which torch
    imports its compiler: a second, and 200 MB.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def build(checkpoint: Checkpoint, source: str, dtype: torch.dtype = torch.float32) -> CLIP:
    """The model of a checkpoint, on the CPU. It takes the tensors over one by one: the checkpoint is left without.

    Raises:
        ValueError: a tensor's name or shape does not fit the architecture; lists both sides.
    """
    if checkpoint.config.vision.kind == "timm":  # its models may compute buffers that no checkpoint holds
        model = CLIP(checkpoint.config)
    else:
        with torch.device("meta"), _Unfilled():
            model = CLIP(checkpoint.config)
    tensors = checkpoint.tensors
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):  # a counter that inference never reads; some layouts lack it
            tensors.setdefault(name, torch.zeros((), dtype=buffer.dtype))
    _compare(model, tensors, source)  # before anything is made of them
    converted: Tensors = {}
    for name in list(tensors):
        tensor = tensors.pop(name)  # so that its part of the file leaves memory as the converted one comes
        # One layout in memory, so that the bits of a result do not depend on the format that the weights came in.
        converted[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    model.load_state_dict(converted, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _compare(model: CLIP, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises a ValueError that lists both sides, if names, shapes or kinds of tensors differ."""
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    nothing = "no such tensor"
    differences = [
        f"  {key}: the architecture has {wanted.get(key, nothing)}, the file {found.get(key, nothing)}"
        for key in sorted(wanted.keys() | found.keys())
        if wanted.get(key) != found.get(key)
    ]
    if differences:
        shown = "\n".join(differences[:10] + ([f"  and {len(differences) - 10} more"] if differences[10:] else []))
        raise ValueError(f"the weights in {source} belong to another architecture:\n{shown}")
    for key, tensor in tensors.items():
        is_number = tensor.is_floating_point() or key.endswith("num_batches_tracked")
        if not is_number or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{key} in {source} is {tensor.dtype}, {tensor.layout}; it must be plain floating point")
