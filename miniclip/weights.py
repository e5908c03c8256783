"""Checkpoints in and out. Nothing here runs code from a file.

Native checkpoints are a directory of two files: `config.json` (the architecture, activation, resolution, mean and
standard deviation) and `model.safetensors`. The trainer's own Lightning checkpoints load too.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor

from .config import CLIPConfig
from .files import atomic_write, write_text
from .model import CLIP
from .transforms import Preprocess

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
LIGHTNING_CONFIG_KEY = "miniclip_config"  # where the trainer's checkpoints keep the architecture, as JSON
LIGHTNING_PREFIX = "clip."


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | Path | None = None,
) -> tuple[CLIP, Callable[[Image.Image], Tensor]]:
    """A trained model and the preprocessing that belongs to it.

    Args:
        name: a directory that `save` wrote, or a checkpoint of the trainer (`*.ckpt`).
        device: where to; by default a GPU if there is one.
        jit: only False; there for scripts written for OpenAI's package.
        download_root: not needed for local files.

    Returns:
        The model in float32 and evaluation mode, and a function from a PIL image to (3, R, R).

    Raises:
        ValueError: nothing there, not a checkpoint, weights and architecture that do not belong together, or no such
            device.
    """
    del download_root
    if jit:
        raise ValueError("jit=True would run the code inside the checkpoint; only jit=False is supported")
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no device; valid are cpu, cuda, cuda:1, …") from error
    config, tensors = read_checkpoint(name)
    with torch.device("meta"):  # no time spent on random numbers that are then overwritten
        model = CLIP(config)
    load_tensors(model, {key: tensor.float() for key, tensor in tensors.items()}, str(name))
    return model.to(device).eval(), preprocess_for(config)


def preprocess_for(config: CLIPConfig) -> Preprocess:
    return Preprocess(config.vision.image_size, config.vision.mean, config.vision.std)


def save(model: CLIP, directory: str | Path, overwrite: bool = False) -> None:
    """Writes `config.json` and `model.safetensors`; `load(directory)` gives the model back, bit for bit.

    Raises:
        ValueError: the directory already holds a model, and `overwrite` is False.
    """
    directory = Path(directory)
    if (directory / WEIGHTS_FILE).exists() and not overwrite:
        raise ValueError(f"{directory} already holds a model; pass overwrite=True to replace it")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with atomic_write(directory / WEIGHTS_FILE) as file:
        file.write(save_safetensors(tensors, metadata={"format": "pt"}))
    write_text(directory / CONFIG_FILE, model.config.to_json())


def read_checkpoint(name: str | Path) -> tuple[CLIPConfig, dict[str, Tensor]]:
    """Architecture and tensors of a checkpoint, still in the file's own precision.

    Raises:
        ValueError: as `load`.
    """
    path = Path(name)
    if path.is_dir():
        return _read_directory(path)
    if path.is_file():
        return _read_lightning(path)
    raise ValueError(
        f"no checkpoint at {str(name)!r}; give a directory with {CONFIG_FILE} and {WEIGHTS_FILE}, or a .ckpt file"
    )


def _read_directory(path: Path) -> tuple[CLIPConfig, dict[str, Tensor]]:
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (path / file).is_file()]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; a model's directory has both")
    config = CLIPConfig.from_json((path / CONFIG_FILE).read_text(encoding="utf-8"), str(path / CONFIG_FILE))
    try:
        return config, load_file(path / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS_FILE} is damaged or no safetensors file: {error}") from error


def read_torch_file(path: Path) -> dict[str, Any]:
    """A checkpoint of the trainer, on the CPU, without running code from it.

    Raises:
        ValueError: damaged, no checkpoint, not the trainer's, or one that asks for code to be run.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {reason}") from error
    if not isinstance(checkpoint, dict) or LIGHTNING_CONFIG_KEY not in checkpoint:
        raise ValueError(f"{path} was not written by miniclip's trainer: it has no entry {LIGHTNING_CONFIG_KEY!r}")
    return checkpoint


def _read_lightning(path: Path) -> tuple[CLIPConfig, dict[str, Tensor]]:
    checkpoint = read_torch_file(path)
    config = CLIPConfig.from_dict(json.loads(checkpoint[LIGHTNING_CONFIG_KEY]), str(path))
    prefix = LIGHTNING_PREFIX
    tensors = {k.removeprefix(prefix): t for k, t in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return config, tensors


def load_tensors(model: CLIP, tensors: Mapping[str, Tensor], source: str) -> None:
    """Puts tensors into a model, all of them or none.

    Raises:
        ValueError: a name or shape that does not fit; lists both sides.
    """
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
    model.load_state_dict(tensors, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def from_openai_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names to ours: the text tower's parameters stand at the top level there, under `text.` here."""
    dropped = ("input_resolution", "context_length", "vocab_size")
    kept = {key: tensor for key, tensor in tensors.items() if key not in dropped}
    return {
        key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}": tensor
        for key, tensor in kept.items()
    }
