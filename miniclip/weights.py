"""Checkpoints in and out, in every layout that CLIP weights come in. Nothing here runs code from a file.

| format    | what it is                                                                   |
|-----------|------------------------------------------------------------------------------|
| native    | our directory: config.json + model.safetensors                               |
| lightning | the trainer's .ckpt                                                          |
| openai    | OpenAI's TorchScript archive, or a state dict with its names                 |
| openclip  | OpenCLIP's directory (open_clip_config.json), or a state dict with its names |
| hf        | a Hugging Face directory of a CLIPModel, or of one of its towers with its    |
|           | projection; or a state dict with a CLIPModel's names                         |

Reading a checkpoint is: tensors in, whatever holds them -> our names, by one table per layout -> the architecture,
from the layout's own configuration or from the tensors' shapes -> a model, strictly. Writing runs the tables backwards.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .config import (
    OPENAI_MODELS,
    SIGLIP_LOGIT_BIAS,
    SIGLIP_LOGIT_SCALE,
    Activation,
    CLIPConfig,
    TextConfig,
    TimmProjection,
    Towers,
    VisionConfig,
)
from .device import find_device
from .fetch import HUB_PREFIX, fetch_hub, fetch_openai
from .files import atomic_write, write_text
from .images import Preprocess
from .model import CLIP

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
OPENCLIP_CONFIG_FILE = "open_clip_config.json"
LIGHTNING_CONFIG_KEY = "miniclip_config"  # where the trainer's checkpoints keep the architecture, as JSON
LIGHTNING_PREFIX = "clip."
LIGHTNING_AVERAGE_PREFIX = "average."  # the same tensors averaged over the run, where it kept an average

Tensors = dict[str, Tensor]


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
    _assign(model, converted)
    return model


def load_tensors(model: CLIP, tensors: Mapping[str, Tensor], source: str) -> None:
    """Puts tensors into a model, all of them or none.

    Raises:
        ValueError: a name or shape that does not fit; lists both sides.
    """
    _compare(model, tensors, source)
    _assign(model, tensors)


def _assign(model: CLIP, tensors: Mapping[str, Tensor]) -> None:
    model.load_state_dict(tensors, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


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
    elif _is_torchscript(path):
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
    if _is_hf(tensors):
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


# ---------------------------------------------------------------------------------------------------------------------
# TorchScript archives

_MAX_PICKLE_BYTES = 64 << 20
_STORAGE_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class _Stub:
    """Stands for an object of a class that the archive defines; only its attributes are of interest."""

    def __init__(self, *args: Any) -> None:
        del args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})


class _ArchiveUnpickler(pickle.Unpickler):
    """Unpickles tensors, containers and stubs, and nothing else: no name in the file reaches a function of Python's."""

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype, int], Tensor]) -> None:
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type("_Stub", (_Stub,), {})  # a new one each time: a file may set attributes of what it is given
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _rebuild_tensor(*args),
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, tag: value,
        }
        if (module, name) not in allowed:
            raise ValueError(f"it asks for {module}.{name}, which no CLIP checkpoint needs")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _location, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"it has a record of unknown kind {kind!r}")
        return self.storage(str(key), dtype, int(count))


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)  # raises if it would reach beyond the storage


def _is_torchscript(path: Path) -> bool:
    try:
        if not zipfile.is_zipfile(path):  # may raise, too
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception as error:  # a damaged directory can raise anything
        raise ValueError(f"{path} is a damaged archive: {error}") from error


def read_torchscript(path: Path) -> Tensors:
    """The parameters and buffers of a TorchScript archive, by their dotted names, mapped from the file.

    OpenAI published CLIP as such archives. They are zip files of a pickle that describes the modules, a record for each
    tensor, and code, which is not looked at.

    Raises:
        ValueError: damaged, compressed (the records of a genuine one are stored), or asking for anything but tensors.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            length = os.fstat(file.fileno()).st_size
            records = {info.filename: info for info in archive.infolist()}
            root = next(name for name in records if name.endswith("/data.pkl")).removesuffix("data.pkl")
            for name, info in records.items():
                is_read = name == f"{root}data.pkl" or name.startswith(f"{root}data/")
                if is_read and info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"its record {name} is compressed, from {info.file_size} bytes")
            if records[f"{root}data.pkl"].file_size > _MAX_PICKLE_BYTES:
                raise ValueError(f"its description of the modules takes {records[f'{root}data.pkl'].file_size} bytes")

            def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
                info = records[f"{root}data/{key}"]
                size = count * torch.empty((), dtype=dtype).element_size()
                if size > info.file_size:
                    raise ValueError(f"its record {info.filename} is shorter than the tensor in it")
                file.seek(max(0, info.header_offset))
                header = file.read(30)
                if not header.startswith(b"PK\x03\x04"):
                    raise ValueError(f"its record {info.filename} is not where its directory says")
                name_size, extra_size = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
                offset = info.header_offset + 30 + name_size + extra_size
                if offset + size > length:
                    raise ValueError(f"its record {info.filename} is cut short")
                if count == 0:
                    return torch.empty(0, dtype=dtype)
                # A mapping of its own for each, so that its pages leave memory with the tensor.
                before = offset % mmap.ALLOCATIONGRANULARITY
                view = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=offset - before)
                return torch.frombuffer(view, dtype=dtype, count=count, offset=before)

            description = archive.read(f"{root}data.pkl")
            for operation, argument, _ in pickletools.genops(description):
                if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(description):
                    raise ValueError("it asks for a table larger than itself")
            module = _ArchiveUnpickler(io.BytesIO(description), storage).load()
    except Exception as error:  # a damaged or spiteful pickle can raise anything
        raise ValueError(f"{path} is not a TorchScript archive that can be read safely: {error}") from error
    found: Tensors = {}
    _collect_tensors(module, "", found, set())
    return found


def _collect_tensors(module: Any, prefix: str, found: Tensors, seen: set[int]) -> None:
    """The tensors of a module and of those in it; each module once, however many names it has."""
    seen.add(id(module))
    for name, value in vars(module).items() if isinstance(module, _Stub) else ():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Stub) and id(value) not in seen and len(prefix) < 200:
            _collect_tensors(value, f"{prefix}{name}.", found, seen)


# ---------------------------------------------------------------------------------------------------------------------
# Names: one table per layout, read from left to right on the way in and from right to left on the way out

_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size", "attn_mask")

_HF_NAMES = (
    ("text_model.embeddings.token_embedding.", "text.token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
    ("text_model.encoder.layers.", "text.transformer.resblocks."),
    ("text_model.final_layer_norm.", "text.ln_final."),
    ("text_projection.weight", "text.text_projection"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),  # spelt so
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
)
_HF_NAMES_IN_BLOCKS = (
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_HF_TRANSPOSED = ("text.text_projection", "visual.proj")


def from_openai_keys(tensors: Mapping[str, Tensor]) -> Tensors:
    """OpenAI's names to ours: the text tower's parameters stand at the top level there, under `text.` here."""
    return {
        key if key.startswith("visual.") or key in ("logit_scale", "logit_bias") else f"text.{key}": tensor
        for key, tensor in tensors.items()
        if key not in _OPENAI_EXTRAS
    }


def to_openai_keys(tensors: Mapping[str, Tensor]) -> Tensors:
    return {key.removeprefix("text."): tensor for key, tensor in tensors.items()}


def _is_hf(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(("text_model.", "vision_model.")) for key in tensors)


def from_hf_keys(tensors: Mapping[str, Tensor]) -> Tensors:
    """Hugging Face's names to ours; queries, keys and values become one matrix."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        if key.endswith(".embeddings.position_ids"):
            continue
        name = _rename(key, _HF_NAMES, _HF_NAMES_IN_BLOCKS)
        if ".self_attn." not in name:
            out[name] = tensor.T if name in _HF_TRANSPOSED else tensor
        elif ".self_attn.q_proj." in name:
            parts = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            missing = [part for part in parts if part not in tensors]
            if missing:
                raise ValueError(f"the checkpoint has {key} and no {missing[0]}")
            stacked = torch.cat([tensors[part] for part in parts])
            out[name.replace(".self_attn.q_proj.", ".attn.in_proj_")] = stacked
        elif not name.replace(".k_proj.", ".v_proj.").endswith((".v_proj.weight", ".v_proj.bias")):
            out[name] = tensor
    return out


def to_hf_keys(tensors: Mapping[str, Tensor]) -> Tensors:
    names, in_blocks = (tuple((b, a) for a, b in table) for table in (_HF_NAMES, _HF_NAMES_IN_BLOCKS))
    out: Tensors = {}
    for key, tensor in tensors.items():
        name = _rename(key, names, in_blocks)
        if ".attn.in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = rows
        else:
            out[name] = tensor.T if key in _HF_TRANSPOSED else tensor
    return out


def _rename(key: str, names: tuple[tuple[str, str], ...], in_blocks: tuple[tuple[str, str], ...]) -> str:
    for before, after in names:
        if key.startswith(before):
            key = after + key.removeprefix(before)
            break
    for before, after in in_blocks:
        key = key.replace(before, after)
    return key


# ---------------------------------------------------------------------------------------------------------------------
# The architecture, from tensors or from another library's configuration


def infer_config(tensors: Mapping[str, Tensor], activation: Activation, source: str) -> CLIPConfig:
    """The architecture that tensors (by our names) belong to. Heads are 64 channels wide, as in all of OpenAI's.

    Raises:
        ValueError: a tensor that tells the architecture is missing.
    """

    def shape(name: str, sides: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != sides:
            raise ValueError(f"{source} has no tensor {name} of {sides} sides, so it is no CLIP that can be read")
        return tuple(tensors[name].shape)

    def count(pattern: str) -> int:
        return len({match[1] for key in tensors if (match := re.match(pattern, key))})

    if any(key.startswith("visual.trunk.") for key in tensors):
        raise ValueError(f"{source} has an image tower of timm's, which its tensors don't tell apart from others")
    context_length, width = shape("text.positional_embedding", 2)
    vocab_size, _ = shape("text.token_embedding.weight", 2)
    _, embed_dim = shape("text.text_projection", 2)
    text = TextConfig(
        context_length=context_length,
        vocab_size=vocab_size,
        eot_token=vocab_size - 1,
        width=width,
        layers=count(r"text\.transformer\.resblocks\.(\d+)\."),
        mlp_ratio=shape("text.transformer.resblocks.0.mlp.c_fc.weight", 2)[0] / width,
    )
    if "visual.proj" in tensors:
        width, _, patch_size, _ = shape("visual.conv1.weight", 4)
        side = round((shape("visual.positional_embedding", 2)[0] - 1) ** 0.5)
        vision = VisionConfig(
            image_size=patch_size * side,
            patch_size=patch_size,
            width=width,
            layers=count(r"visual\.transformer\.resblocks\.(\d+)\."),
            mlp_ratio=shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0] / width,
        )
    else:
        side = round((shape("visual.attnpool.positional_embedding", 2)[0] - 1) ** 0.5)
        vision = VisionConfig(
            kind="resnet",
            image_size=32 * side,
            width=shape("visual.layer1.0.conv1.weight", 4)[0],
            blocks=tuple(count(rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)),  # type: ignore[arg-type]
        )
    config = CLIPConfig(embed_dim, activation, vision, text)
    if "logit_bias" not in tensors:
        return config
    # Trained scale and bias do not tell where they began; the paper's, then.
    return replace(config, init_logit_scale=SIGLIP_LOGIT_SCALE, init_logit_bias=SIGLIP_LOGIT_BIAS)


def _refuse_unknown(values: Mapping[str, Any], supported: Mapping[str, Any], source: str) -> None:
    """A setting that is neither read nor at the one value that our towers have must not be passed over."""
    for key, value in values.items():
        if key not in supported:
            raise ValueError(f"{source} has the setting {key!r}: {value!r}, which is not supported")
        expected = supported[key]
        if expected is not _ANY and value != expected:
            raise ValueError(f"{source} has {key!r}: {value!r}; only {expected!r} is supported")


_ANY = object()
_OPENCLIP_MODEL = dict.fromkeys(("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"), _ANY) | {
    "multimodal_cfg": None, "output_dict": _ANY, "init_logit_scale": _ANY, "init_logit_bias": _ANY,
    "cast_dtype": _ANY, "nonscalar_logit_scale": False,
}  # fmt: skip
_OPENCLIP_VISION = dict.fromkeys(("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"), _ANY) | {
    "ls_init_value": None, "patch_dropout": _ANY, "attentional_pool": False, "no_ln_pre": False,
    "pos_embed_type": "learnable", "final_ln_after_pool": False, "pool_type": "tok", "output_tokens": _ANY,
    "act_kwargs": None, "norm_kwargs": None, "global_average_pool": False, "input_patchnorm": False,
    "timm_model_name": _ANY, "timm_model_pretrained": _ANY, "timm_pool": _ANY, "timm_proj": _ANY,
    "timm_proj_bias": _ANY, "timm_drop": _ANY, "timm_drop_path": _ANY,
}  # fmt: skip
_OPENCLIP_TEXT = dict.fromkeys(("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"), _ANY) | {
    "hf_model_name": None, "hf_tokenizer_name": None, "ls_init_value": None, "embed_cls": False, "pad_id": _ANY,
    "no_causal_mask": False, "final_ln_after_pool": False, "pool_type": "argmax", "proj_bias": False,
    "output_tokens": _ANY, "act_kwargs": None, "norm_kwargs": None, "tokenizer_kwargs": None, "proj_type": "linear",
}  # fmt: skip
_OPENCLIP_PREPROCESS = {"mean": _ANY, "std": _ANY, "size": _ANY, "mode": "RGB", "interpolation": "bicubic",
                        "resize_mode": "shortest", "fill_color": _ANY}  # fmt: skip


def config_from_openclip(values: Mapping[str, Any], source: str) -> CLIPConfig:
    """The architecture of an `open_clip_config.json`.

    Raises:
        ValueError: a setting that our towers do not have.
    """
    model = values.get("model_cfg")
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
        raise ValueError(f"{source} has no model_cfg with a vision_cfg")
    vision, text, pixels = model["vision_cfg"], model.get("text_cfg", {}), values.get("preprocess_cfg", {})
    for section, supported, name in (
        (model, _OPENCLIP_MODEL, "model_cfg"),
        (vision, _OPENCLIP_VISION, "vision_cfg"),
        (text, _OPENCLIP_TEXT, "text_cfg"),
        (pixels, _OPENCLIP_PREPROCESS, "preprocess_cfg"),
    ):
        _refuse_unknown(section, supported, f"{source}, {name}")
    shared: dict[str, Any] = {name: tuple(pixels[name]) for name in ("mean", "std") if name in pixels}
    shared |= {"image_size": vision.get("image_size", 224)}
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    if vision.get("timm_model_name"):
        tower = _timm_from_openclip(vision, shared, source)
    elif isinstance(layers, list | tuple):
        shared |= {"head_width": vision.get("head_width", 64)}
        tower = VisionConfig(kind="resnet", blocks=tuple(layers), width=width, **shared)
    else:
        shared |= {"head_width": vision.get("head_width", 64)}
        patch_size, mlp_ratio = vision.get("patch_size", 16), vision.get("mlp_ratio", 4.0)
        tower = VisionConfig(layers=layers, width=width, patch_size=patch_size, mlp_ratio=mlp_ratio, **shared)
    vocab_size, width = text.get("vocab_size", 49408), text.get("width", 512)
    words = TextConfig(
        context_length=text.get("context_length", 77),
        vocab_size=vocab_size,
        eot_token=vocab_size - 1,
        width=width,
        layers=text.get("layers", 12),
        head_width=width // text.get("heads", 8),
        mlp_ratio=text.get("mlp_ratio", 4.0),
    )
    start = {name: model[name] for name in ("init_logit_scale", "init_logit_bias") if name in model}
    return CLIPConfig(model["embed_dim"], "quick_gelu" if model.get("quick_gelu") else "gelu", tower, words, **start)


_TIMM_PROJECTIONS: dict[str, TimmProjection] = {"linear": "linear", "mlp": "mlp", "none": "none", "": "classifier"}


def _timm_from_openclip(vision: Mapping[str, Any], shared: dict[str, Any], source: str) -> VisionConfig:
    pool, projection = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear")
    if pool in ("abs_attn", "rot_attn") or projection not in _TIMM_PROJECTIONS:
        raise ValueError(
            f"{source} has timm_pool {pool!r} and timm_proj {projection!r}, which are not supported together"
        )
    return VisionConfig(
        kind="timm",
        timm_model=vision["timm_model_name"],
        timm_pool=pool,
        timm_projection=_TIMM_PROJECTIONS[projection],
        timm_projection_bias=vision.get("timm_proj_bias", False),
        **shared,
    )


_HF_TOWERS: dict[str, Towers] = {"clip": "both", "clip_vision_model": "image", "clip_text_model": "text"}


def config_from_hf(values: Mapping[str, Any], pixels: Mapping[str, Any], source: str) -> CLIPConfig:
    """The architecture of a Hugging Face CLIP's `config.json`; what it leaves out is as in transformers.

    Args:
        pixels: its `preprocessor_config.json`, if it has one.

    Raises:
        ValueError: another kind of model, or a setting that our towers do not have.
    """
    if values.get("model_type") not in _HF_TOWERS:
        raise ValueError(
            f"{source} is of a model of type {values.get('model_type')!r}; valid are {', '.join(_HF_TOWERS)}"
        )
    towers = _HF_TOWERS[values["model_type"]]
    if towers != "both":  # the file of one tower is what stands in a section in the file of both
        values = {f"{'vision' if towers == 'image' else 'text'}_config": values} | dict(values)
    # Old files hold the towers' settings twice; transformers lets the newer one, `*_config`, win.
    vision, text = (
        values.get(f"{name}_config") or values.get(f"{name}_config_dict") or {} for name in ("vision", "text")
    )
    there = [section for section, absent in ((vision, "text"), (text, "image")) if towers != absent]
    activations = {section.get("hidden_act", "quick_gelu") for section in there}
    if len(activations) > 1 or not activations <= set(get_args(Activation)):
        raise ValueError(f"{source} has the activations {sorted(activations)}; one of quick_gelu and gelu for both")
    for section in (vision, text):
        if section.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"{source} has layer_norm_eps {section['layer_norm_eps']}; only 1e-05 is supported")

    def tower(section: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
        width = section.get("hidden_size", width)
        return {
            "width": width,
            "layers": section.get("num_hidden_layers", 12),
            "head_width": width // section.get("num_attention_heads", heads),
            "mlp_ratio": section.get("intermediate_size", 4 * width) / width,
        }

    vocab_size = text.get("vocab_size", 49408)
    end = text.get("eos_token_id", 49407)
    words = TextConfig(
        context_length=text.get("max_position_embeddings", 77),
        vocab_size=vocab_size,
        # Files from before 2023 say 2, which transformers itself takes to mean "the largest id".
        eot_token=vocab_size - 1 if end == 2 else end,
        **tower(text, 512, 8),
    )
    images: dict[str, Any] = {}
    if pixels:
        images = {"mean": pixels.get("image_mean", VisionConfig.mean), "std": pixels.get("image_std", VisionConfig.std)}
        images["preprocess"] = "hf"
    image_size, patch_size = vision.get("image_size", 224), vision.get("patch_size", 32)
    seen = VisionConfig(image_size=image_size, patch_size=patch_size, **tower(vision, 768, 12), **images)
    return CLIPConfig(values.get("projection_dim", 512), activations.pop(), seen, words, towers)


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
