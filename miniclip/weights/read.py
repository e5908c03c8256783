"""A path -> tensors by our names, and the architecture that they belong to."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..common.arguments import check_path
from ..config import OPENAI_MODELS, CLIPConfig
from ..data.wordings.kept import WORDINGS_FILE, Wordings
from ..tokenizer import VOCAB_SIZE, symbol_ids
from .architecture import config_from_hf, config_from_openclip, has_sizes_of, infer_config
from .containers import read_json, read_safetensors, read_tensors, refuse_stand_ins
from .download import HUB_PREFIX, fetch_hub, fetch_openai
from .folders import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    OPENCLIP_CONFIG_FILE,
    WEIGHTS_FILE,
    has_usual_name,
    own_weights,
    pair_in,
    refuse_unread,
)
from .heads import Hints
from .layouts import Tensors, is_hf, naming_of, to_native_keys
from .pickles import ForeignObjectError, is_torchscript, read_pickle, read_torchscript
from .shapes import differences
from .unwrap import unwrap

_OPENAI = Hints("quick_gelu", head_width=(64, 64))  # OpenAI's code has one activation, and one width of heads
_PROJECTIONS = {
    "image": ("visual.proj", "CLIPVisionModelWithProjection"),
    "text": ("text.text_projection", "CLIPTextModelWithProjection"),
}
LIGHTNING_CONFIG_KEY = "miniclip_config"  # where the trainer's checkpoints keep the architecture, as JSON
LIGHTNING_WORDINGS_KEY = "miniclip_wordings"  # likewise wordings.json, if the captions had wordings in common
LIGHTNING_PREFIX = "clip."
LIGHTNING_AVERAGE_PREFIX = "average."  # the same tensors averaged over the run, where it kept an average


@dataclass(frozen=True)
class Checkpoint:
    """What a file or directory holds.

    Args:
        format: one of the table in `load`.
        tensors: by our names, in the file's own precision.
        config: the architecture.
        wordings: of the captions that it was trained on, if they are known.
        called: what the file calls a tensor that has a name of ours.
        config_file: which tells the architecture; None for tensors, archives and checkpoints that do so themselves.
    """

    format: str
    tensors: Tensors
    config: CLIPConfig
    wordings: Wordings | None = None
    called: Callable[[str], str] = str
    config_file: Path | None = None


def available_models() -> list[str]:
    """The names that `load` knows without a path: OpenAI's nine."""
    return list(OPENAI_MODELS)


def locate(name: str | Path, download_root: str | Path | None = None) -> Path:
    """The path of a checkpoint; one that is given by a name is fetched if it is not there yet.

    Raises:
        ValueError: neither a path nor a name that is known, or the download fails.
    """
    text = check_path("name", name)
    if download_root is not None:
        check_path("download_root", download_root)
    if Path(name).exists():
        return Path(name)
    if text.startswith(HUB_PREFIX):
        return fetch_hub(text, download_root)
    if text in OPENAI_MODELS:
        return fetch_openai(text, download_root)
    raise ValueError(
        f"no checkpoint at {text!r}: it is no directory and no file, does not begin with {HUB_PREFIX}, and is none of "
        f"the names {', '.join(available_models())}{_near_name(text)}"
    )


def _near_name(text: str) -> str:
    """A model's name that was written otherwise (open_clip's ViT-B-32), or a file or folder beside."""
    names = {re.sub(r"\W", "", name).lower(): name for name in available_models()}
    near = difflib.get_close_matches(re.sub(r"\W", "", text).lower(), names, n=1, cutoff=0.85)
    if near:
        return f"; did you mean {names[near[0]]}?"
    folder = Path(text).parent
    there = [path.name for path in folder.iterdir()] if folder.is_dir() and os.access(folder, os.R_OK) else []
    near = difflib.get_close_matches(Path(text).name, there, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def read_checkpoint(name: str | Path, assumed: CLIPConfig | None = None, **hints: Any) -> Checkpoint:
    """What is at a path, whichever of the formats it is in.

    Args:
        assumed: the architecture of a file that does not tell its own.
        hints: the fields of `Hints`, for a checkpoint that does not tell them.

    Raises:
        ValueError: as `load`.
    """
    known, path = Hints(**hints), Path(name)
    if path.is_dir():
        checkpoint = replace(_read_directory(path), wordings=read_wordings(path))
    elif path.is_file():
        checkpoint = _read_file(path, known, assumed)
    else:
        raise ValueError(
            f"no checkpoint at {str(name)!r}; give a directory with {CONFIG_FILE} and {WEIGHTS_FILE}, or a .ckpt, .pt, "
            ".bin or .safetensors file"
        )
    known.refuse_contradiction(checkpoint.config, str(path))
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Directories: a configuration of one library and weights of one, which need not be the same library's


def _read_directory(path: Path) -> Checkpoint:
    if (path / ADAPTER_CONFIG_FILE).is_file():
        raise _peft_error(path)
    config_file, weights_file = pair_in([file.name for file in path.iterdir() if file.is_file()], str(path))
    if config_file == OPENCLIP_CONFIG_FILE:
        config, file_format = _openclip_config(path), "openclip"
    elif "model_type" in read_json(path / CONFIG_FILE):
        config, file_format = _hf_config(path), "hf"
    else:
        config = CLIPConfig.from_dict(read_json(path / CONFIG_FILE), str(path / CONFIG_FILE))
        if weights_file == WEIGHTS_FILE and (path / WEIGHTS_FILE).is_file():  # else it is in shards
            return Checkpoint("native", read_safetensors(path / WEIGHTS_FILE), config, config_file=path / config_file)
        file_format = "native"
    with _naming(path / weights_file):
        given = read_tensors(path / weights_file)
        tensors = to_native_keys(given)
    if config.towers != "both":
        projection, kind = _PROJECTIONS[config.towers]
        if projection not in tensors:
            raise ValueError(
                f"{path} is a CLIP's {config.towers} tower without its projection, so its features are not in the "
                f"space that images and texts share; look for transformers' {kind} of it"
            )
    tensors = _with_scale(tensors, config)
    return Checkpoint(file_format, tensors, config, called=naming_of(given), config_file=path / config_file)


def _with_scale(tensors: Tensors, config: CLIPConfig) -> Tensors:
    """One tower has no contrast, so its files have no temperature."""
    return tensors if config.towers == "both" else {"logit_scale": torch.zeros(()), **tensors}


def _openclip_config(folder: Path) -> CLIPConfig:
    path = folder / OPENCLIP_CONFIG_FILE
    with _naming(path):
        return config_from_openclip(read_json(path), str(path))


def _hf_config(folder: Path) -> CLIPConfig:
    """With the settings of the image processor, which transformers looks for in two files."""
    path = folder / CONFIG_FILE
    pixels, source = None, ""
    if (folder / "processor_config.json").is_file():
        pixels, source = read_json(folder / "processor_config.json").get("image_processor"), "processor_config.json"
    if pixels is None and (folder / "preprocessor_config.json").is_file():
        pixels, source = read_json(folder / "preprocessor_config.json"), "preprocessor_config.json"
    with _naming(path, folder / source):
        config = config_from_hf(read_json(path), str(path), pixels, str(folder / source))
    if config.text.vocab_size == VOCAB_SIZE:
        _refuse_other_words(folder)
    return config


def _refuse_other_words(folder: Path) -> None:
    """Of as many tokens as CLIP's tokenizer has, other ones would be read by its ids, and nothing would tell.

    Raises:
        ValueError: the folder's tokenizer gives tokens other ids.
    """
    words: Any = None
    for name in ("vocab.json", "tokenizer.json"):
        if words is None and (path := folder / name).is_file():
            found = read_json(path)
            model = found.get("model")
            words = found if name == "vocab.json" else model.get("vocab") if isinstance(model, dict) else None
    if words is None:
        return
    ids = words if isinstance(words, dict) else {}  # of kinds without merges it is a list
    ours = symbol_ids()
    wrong = [token for token in ours if ids.get(token) != ours[token]]
    if wrong:
        has = f"the id {ids[wrong[0]]}" if wrong[0] in ids else "no id"
        raise ValueError(
            f"{path} is another vocabulary than CLIP's, though it has as many tokens: {len(wrong):,} of CLIP's "
            f"{len(ours):,} have other ids there or none ({wrong[0]!r} is {ours[wrong[0]]} in CLIP's and has {has}). "
            "Texts would be read as other words; for ids of your own tokenizer, load a copy without that file"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _read_file(path: Path, hints: Hints, assumed: CLIPConfig | None) -> Checkpoint:
    refuse_stand_ins(path)
    refuse_unread(str(path))
    if path.name.endswith(".index.json"):
        raise ValueError(f"{path} lists the shards of weights; give the model's folder, {path.parent}")
    if path.suffix == ".json":
        raise ValueError(f"{path} is a configuration and holds no weights; give the model's folder, {path.parent}")
    if path.name.startswith("adapter_model."):
        raise _peft_error(path)
    if _is_safetensors(path):
        values: Any = read_safetensors(path)
    elif is_torchscript(path):
        values = read_torchscript(path)
    else:
        values = read_pickle(path)
        if isinstance(values, dict) and LIGHTNING_CONFIG_KEY in values:
            return _read_lightning(path, values)
    given = unwrap(values, str(path))
    with _naming(path):
        tensors, called = to_native_keys(given), naming_of(given)
    if "input_resolution" in given:  # an entry of OpenAI's archives, and of the state dicts that were made from them
        return Checkpoint("openai", tensors, _inferred(tensors, _OPENAI, path, called), called=called)
    file_format = "hf" if is_hf(given) else "openclip"
    beside, config_file = _config_beside(path, tensors, hints, file_format)
    wordings = None if beside is None else read_wordings(path.parent)
    config = beside or assumed
    if config is None:
        config = _inferred(tensors, hints, path, called)
        if config.text.eot_token is None:
            raise ValueError(
                f"{path} has {config.text.vocab_size} tokens and does not tell which of them ends a text (open_clip "
                "takes the largest id or eos_id, as pool_type says; transformers eos_token_id, or the largest id); put "
                "the model's open_clip_config.json or config.json beside it"
            )
    return Checkpoint(file_format, _with_scale(tensors, config), config, wordings, called, config_file)


def _is_safetensors(path: Path) -> bool:
    """By what the file begins with, since people rename: a length and a brace, else not what torch.save writes."""
    head = _beginning(path)
    return head[8:] == b"{" or (path.suffix == ".safetensors" and not head.startswith((b"PK\3\4", b"\x80\2")))


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(9)


def _read_lightning(path: Path, values: dict[str, Any]) -> Checkpoint:
    config = CLIPConfig.from_json(str(values[LIGHTNING_CONFIG_KEY]), str(path))
    tensors = values.get("state_dict")
    if not isinstance(tensors, dict) or not all(isinstance(each, torch.Tensor) for each in tensors.values()):
        raise ValueError(f"{path} is no checkpoint: its state_dict holds no tensors by their names")
    is_averaged = any(key.startswith(LIGHTNING_AVERAGE_PREFIX) for key in tensors)
    prefix = LIGHTNING_AVERAGE_PREFIX if is_averaged else LIGHTNING_PREFIX
    tensors = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    wordings = values.get(LIGHTNING_WORDINGS_KEY)
    return Checkpoint(
        "lightning", tensors, config, None if wordings is None else Wordings.from_json(str(wordings), str(path))
    )


def read_wordings(folder: Path) -> Wordings | None:
    """The wordings that lie beside a model's weights, or None.

    Raises:
        ValueError: the file is damaged, or of a later version.
    """
    path = folder / WORDINGS_FILE
    if not path.is_file():
        return None
    try:
        return Wordings.from_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; delete it to do without") from error


def _inferred(tensors: Tensors, hints: Hints, path: Path, called: Callable[[str], str]) -> CLIPConfig:
    with _naming(path):
        return infer_config(tensors, hints, str(path), called)


def _config_beside(
    path: Path, tensors: Tensors, hints: Hints, file_format: str
) -> tuple[CLIPConfig, Path] | tuple[None, None]:
    """The configuration in a file's folder, and its file, if these tensors are what it describes; of two, that of the
    library whose names they have.

    A warning names it where it may have been written for other weights of that folder.

    Raises:
        ValueError: it is these tensors', and can't be followed.
    """
    names = [file.name for file in path.parent.iterdir()]
    kinds = ((OPENCLIP_CONFIG_FILE, _openclip_config), (CONFIG_FILE, _any_config))
    for name, read in reversed(kinds) if file_format == "hf" else kinds:
        if not (path.parent / name).is_file():
            continue
        own = own_weights(name, names)
        try:
            config = read(path.parent)
            is_of = not differences(config, _with_scale(tensors, config))
        except ValueError:  # it may be another model's, or nothing of ours
            if _has_sizes_of(path.parent / name, tensors, otherwise=own == path.name):
                raise
            continue
        if is_of:
            if own and not has_usual_name(path.name) and hints.activation is None:
                warnings.warn(
                    f"{path} does not tell its activation or its pixels' mean: {config.activation} and "
                    f"{config.vision.mean} are those of {path.parent / name}, which lies there with {own}. If they are "
                    "not this file's, give it a folder of its own",
                    stacklevel=2,
                )
            return config, path.parent / name
    return None, None


def _has_sizes_of(config_file: Path, tensors: Tensors, otherwise: bool) -> bool:
    try:
        return has_sizes_of(read_json(config_file), tensors)
    except ValueError:  # no JSON
        return otherwise


def _any_config(folder: Path) -> CLIPConfig:
    values = read_json(folder / CONFIG_FILE)
    return _hf_config(folder) if "model_type" in values else CLIPConfig.from_dict(values, str(folder / CONFIG_FILE))


def _peft_error(path: Path) -> ValueError:
    return ValueError(
        f"{path} is an adapter of PEFT's (LoRA and the like), which changes a model that is elsewhere; load both with "
        "peft, call merge_and_unload(), save that model, and load it here"
    )


@contextmanager
def _naming(path: Path, *others: Path) -> Iterator[None]:
    """Whatever is wrong with the values in a file becomes an error that names it, or one of the others read with it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        if any(str(each) in str(error) for each in (path, *others)):
            raise
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {what}") from error


def read_torch_file(path: Path) -> dict[str, Any]:
    """A checkpoint of the trainer, to resume from.

    Raises:
        ValueError: damaged, no checkpoint, not the trainer's, or one that asks for code to be run.
    """
    refuse_stand_ins(path)
    weights = f"start from its weights: --model.start_from {path}"
    no_run = "and holds no run to resume, as a run's checkpoints/last.ckpt does"
    if _is_safetensors(path):
        raise ValueError(f"{path} is a safetensors file, which holds weights alone, {no_run}; {weights}")
    if not _beginning(path).startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is no file of torch.save's, {no_run}")
    instead = f"resume it with the program that wrote it, or {weights}"
    try:
        checkpoint = read_pickle(path, with_stubs=False)
    except ValueError as error:
        if not isinstance(error.__cause__, ForeignObjectError):
            raise
        raise ValueError(
            f"{path} holds a {error.__cause__.name}, which miniclip's trainer writes into no checkpoint (a callback of "
            f"your own may have), so there is no run in it to resume; {instead}"
        ) from error
    if not isinstance(checkpoint, dict) or LIGHTNING_CONFIG_KEY not in checkpoint:
        raise ValueError(
            f"{path} was not written by miniclip's trainer: it has no entry {LIGHTNING_CONFIG_KEY!r}; {instead}"
        )
    return checkpoint
