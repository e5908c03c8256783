"""Whatever holds a checkpoint -> tensors, the architecture, and where both came from."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ..common.files import atomic_write
from ..config import OPENAI_MODELS, Activation, CLIPConfig
from .architecture import config_from_hf, config_from_openclip, infer_config
from .download import HUB_PREFIX, fetch_hub, fetch_openai
from .layouts import Tensors, from_hf_keys, from_openai_keys, is_hf
from .torchscript import is_torchscript, read_torchscript

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
OPENCLIP_CONFIG_FILE = "open_clip_config.json"
LIGHTNING_CONFIG_KEY = "miniclip_config"  # where the trainer's checkpoints keep the architecture, as JSON
LIGHTNING_PREFIX = "clip."
LIGHTNING_AVERAGE_PREFIX = "average."  # the same tensors averaged over the run, where it kept an average


@dataclass(frozen=True)
class Checkpoint:
    """What a file or directory holds.

    Args:
        format: one of the table above.
        tensors: by our names, in the file's own precision.
        config: the architecture.
    """

    format: str
    tensors: Tensors
    config: CLIPConfig


def available_models() -> list[str]:
    """The names that `load` knows without a path: OpenAI's nine."""
    return list(OPENAI_MODELS)


def locate(name: str | Path, download_root: str | Path | None = None) -> Path:
    """The path of a checkpoint; one that is given by a name is fetched if it is not there yet.

    Raises:
        ValueError: neither a path nor a name that is known, or the download fails.
    """
    text = str(name)
    if Path(name).exists():
        return Path(name)
    if text.startswith(HUB_PREFIX):
        return fetch_hub(text, download_root)
    if text in OPENAI_MODELS:
        return fetch_openai(text, download_root)
    raise ValueError(
        f"no checkpoint at {text!r}: it is no directory and no file, does not begin with {HUB_PREFIX}, and is none of "
        f"the names {', '.join(available_models())}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(name: str | Path, activation: Activation | None = None) -> Checkpoint:
    """What is at a path, whichever of the formats it is in.

    Raises:
        ValueError: as `load`.
    """
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}; valid are {', '.join(get_args(Activation))}")
    path = Path(name)
    if path.is_dir():
        checkpoint = _read_directory(path, activation)
    elif path.is_file():
        checkpoint = _read_file(path, activation)
    else:
        raise ValueError(
            f"no checkpoint at {str(name)!r}; give a directory with {CONFIG_FILE} and {WEIGHTS_FILE}, or a .ckpt, .pt, "
            ".bin or .safetensors file"
        )
    known = checkpoint.config.activation
    if activation is not None and activation != known:
        raise ValueError(f"{path} says that its activation is {known}, and activation={activation!r} was asked for")
    return checkpoint


def _read_directory(path: Path, activation: Activation | None) -> Checkpoint:
    if (path / OPENCLIP_CONFIG_FILE).is_file():
        values = _read_json(path / OPENCLIP_CONFIG_FILE)
        tensors = _native_keys(_weights_in(path, "open_clip_model.safetensors", "open_clip_pytorch_model.bin"), path)
        with _naming(path / OPENCLIP_CONFIG_FILE):
            return Checkpoint("openclip", tensors, config_from_openclip(values, str(path / OPENCLIP_CONFIG_FILE)))
    alternatives = (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    missing = [] if (path / CONFIG_FILE).is_file() else [CONFIG_FILE]
    missing += [] if any((path / name).is_file() for name in alternatives) else [WEIGHTS_FILE]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; a model's directory has {CONFIG_FILE} and weights")
    values = _read_json(path / CONFIG_FILE)
    if "model_type" not in values:
        config = CLIPConfig.from_dict(values, str(path / CONFIG_FILE))
        return Checkpoint("native", _weights_in(path, WEIGHTS_FILE), config)
    with _naming(path / CONFIG_FILE):
        config = config_from_hf(values, _optional_json(path / "preprocessor_config.json"), str(path / CONFIG_FILE))
    tensors = from_hf_keys(_weights_in(path, WEIGHTS_FILE, "pytorch_model.bin"))
    if config.towers != "both":
        projection = {"image": "visual.proj", "text": "text.text_projection"}[config.towers]
        if projection not in tensors:
            raise ValueError(
                f"{path} is a CLIP's {config.towers} tower without its projection, so its features are not in the "
                f"space that images and texts share; look for the {values['model_type']} 'with projection'"
            )
        tensors.setdefault("logit_scale", torch.zeros(()))  # one tower has no contrast, and its files no temperature
    return Checkpoint("hf", tensors, config)


def _read_file(path: Path, activation: Activation | None) -> Checkpoint:
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif is_torchscript(path):
        tensors = from_openai_keys(read_torchscript(path))
        return Checkpoint("openai", tensors, infer_config(tensors, "quick_gelu", str(path)))
    else:
        values = _read_torch(path)
        if isinstance(values, dict) and LIGHTNING_CONFIG_KEY in values:
            config = CLIPConfig.from_json(str(values[LIGHTNING_CONFIG_KEY]), str(path))
            tensors = _unwrap(values.get("state_dict"), path)
            is_averaged = any(key.startswith(LIGHTNING_AVERAGE_PREFIX) for key in tensors)
            prefix = LIGHTNING_AVERAGE_PREFIX if is_averaged else LIGHTNING_PREFIX
            tensors = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            return Checkpoint("lightning", tensors, config)
        tensors = _unwrap(values, path)
    if is_hf(tensors):
        file_format, native = "hf", from_hf_keys(tensors)
    else:
        # OpenAI's build_model takes these three entries along, so only its files have them.
        file_format = "openai" if "input_resolution" in tensors else "openclip"
        native = _native_keys(tensors, path)
    if file_format == "openai":
        activation = "quick_gelu"
    if activation is None:
        raise ValueError(
            f"{path} does not tell its activation. Pass activation='quick_gelu' if the weights come from OpenAI's "
            "(also fine-tuned ones), 'gelu' if they are OpenCLIP's own; with the wrong one the model runs, and is "
            "worse (nothing to pass it to? once: miniclip convert FILE FOLDER --to native --activation quick_gelu)"
        )
    with _naming(path):
        return Checkpoint(file_format, native, infer_config(native, activation, str(path)))


def _native_keys(tensors: Tensors, path: Path) -> Tensors:
    """From OpenAI's names, or from OpenCLIP's of a model with a text tower of its own, which are ours."""
    tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    if not any(key.startswith("visual.") for key in tensors):
        raise ValueError(
            f"{path} is no CLIP: it has no image tower. Its tensors are {', '.join(sorted(tensors)[:4])}, …"
        )
    if any(key.startswith("text.") for key in tensors):
        return {key: tensor for key, tensor in tensors.items() if key != "text.attn_mask"}
    return from_openai_keys(tensors)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever is wrong with the values in a file becomes an error that names it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        if str(path) in str(error):
            raise
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}") from error


def _unwrap(values: Any, path: Path) -> Tensors:
    """The state dict inside the wrappers that trainers put around it."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()) or not values:
        raise ValueError(f"{path} is no checkpoint: it holds a {type(values).__name__}, not tensors by their names")
    return {str(key).removeprefix("module."): tensor for key, tensor in values.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must be a mapping of names to values")
    return values


def _optional_json(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _weights_in(folder: Path, *names: str) -> Tensors:
    """The tensors of the first of some files that is there, whole or in shards."""
    for name in names:
        if (folder / name).is_file():
            return _read_tensors(folder / name)
        if (folder / f"{name}.index.json").is_file():
            index = _read_json(folder / f"{name}.index.json")
            tensors: Tensors = {}
            parts = index.get("weight_map")
            if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
                raise ValueError(f"{folder / name}.index.json has no weight_map of tensors to files")
            for part in sorted(set(parts.values())):
                if Path(part).name != part or not (folder / part).is_file():
                    raise ValueError(f"{folder / name}.index.json names the file {part!r}, which is not in {folder}")
                tensors |= _read_tensors(folder / part)
            return tensors
    raise ValueError(f"{folder} has no weights: no {' and no '.join(names)}")


def _read_tensors(path: Path) -> Tensors:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _unwrap(_read_torch(path), path)


def _read_safetensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Writes tensors, whole or not at all."""
    with atomic_write(path) as file:
        file.write(save_safetensors(tensors, metadata={"format": "pt"}))


def _read_torch(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, without running code from the file."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise ValueError(f"its record {info.filename} is compressed, from {info.file_size} bytes")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except Exception as error:  # a damaged pickle can raise anything
        # Of torch's message only what is wrong, without its advice to run the file's code after all.
        forbidden = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+)", str(error))
        reason = (
            f"it asks for {forbidden[1]}" if forbidden else str(error).split("\n")[0].split("weights_only")[0][:200]
        )
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {reason}") from error


def read_torch_file(path: Path) -> dict[str, Any]:
    """A checkpoint of the trainer, to resume from.

    Raises:
        ValueError: damaged, no checkpoint, not the trainer's, or one that asks for code to be run.
    """
    checkpoint = _read_torch(path)
    if not isinstance(checkpoint, dict) or LIGHTNING_CONFIG_KEY not in checkpoint:
        raise ValueError(f"{path} was not written by miniclip's trainer: it has no entry {LIGHTNING_CONFIG_KEY!r}")
    return checkpoint


def resize(checkpoint: Checkpoint, image_size: int | None, context_length: int | None) -> Checkpoint:
    """The same weights for another resolution or context length.

    Position embeddings of the image's places are interpolated (bicubic, as ViTs are fine-tuned at a higher resolution;
    Dosovitskiy et al. 2020, section 3.2); those of the text are cut, or extended by repeating the last one.

    Raises:
        ValueError: a size that the architecture does not allow.
    """
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    if image_size is not None and image_size != config.vision.image_size:
        if config.vision.kind == "timm":
            raise ValueError(f"image_size={image_size}: the resolution of a timm tower is not changed")
        name = "visual.positional_embedding" if config.vision.kind == "vit" else "visual.attnpool.positional_embedding"
        config = replace(config, vision=replace(config.vision, image_size=image_size))
        table = tensors[name]
        old, new = round((len(table) - 1) ** 0.5), round(config.vision.num_patches**0.5)
        grid = table[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
        places = grid.permute(0, 2, 3, 1).reshape(new * new, -1).to(table.dtype)
        tensors[name] = torch.cat([table[:1], places])
    if context_length is not None and context_length != config.text.context_length:
        table = tensors["text.positional_embedding"]
        config = replace(config, text=replace(config.text, context_length=context_length))
        extra = max(0, context_length - len(table))
        tensors["text.positional_embedding"] = torch.cat([table[:context_length], table[-1:].expand(extra, -1)])
    return replace(checkpoint, config=config, tensors=tensors)
