"""Which files of a model's folder belong together: its configuration and its weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePath

from ..common.wording import some

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
OPENCLIP_CONFIG_FILE = "open_clip_config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"  # of PEFT's
THRESHOLD_FILE = "threshold.json"  # of `miniclip calibrate`; it holds for the same weights in any layout
# The order in which open_clip and transformers look for their own weights; either may be in shards, with an index.
_OPENCLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
_HF_WEIGHTS = (WEIGHTS_FILE, "pytorch_model.bin")
_REWRITTEN = "transformers 4 rewrites them: CLIPModel.from_pretrained(FOLDER, {}=True).save_pretrained(OUT)"
_EXPORTED = "an export to run, not to load: name the model that it was made from"
_DISTRIBUTED = ".distcp"
_NOT_READ = {
    _DISTRIBUTED: "a part of a checkpoint of torch.distributed.checkpoint; `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt` makes one file of it",
    ".msgpack": f"weights of Flax; {_REWRITTEN.format('from_flax')}",
    ".h5": f"weights of TensorFlow; {_REWRITTEN.format('from_tf')}",
    **dict.fromkeys((".onnx", ".tflite", ".gguf", ".mlmodel", ".engine", ".pte"), _EXPORTED),
}
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def pair_in(names: Collection[str], where: str) -> tuple[str, str]:
    """The names of a configuration and of weights, of the same library if there are such.

    Args:
        names: of all files of the folder.
        where: the folder, for the error.

    Raises:
        ValueError: either is missing, or several files of weights could be meant.
    """
    configs = [name for name in (OPENCLIP_CONFIG_FILE, CONFIG_FILE) if name in names]
    found = [name for name in (*_OPENCLIP_WEIGHTS, *_HF_WEIGHTS) if name in names or f"{name}.index.json" in names]
    for config, own in ((OPENCLIP_CONFIG_FILE, _OPENCLIP_WEIGHTS), (CONFIG_FILE, _HF_WEIGHTS)):
        same = [name for name in own if name in found]
        if config in configs and same:
            return config, same[0]
    for name in sorted(names):
        if not found and PurePath(name).suffix == _DISTRIBUTED:  # beside small files of its trainer's
            refuse_unread(name, where)
    others = sorted(name for name in names if PurePath(name).suffix in WEIGHTS_SUFFIXES)
    if configs and len(found or others) == 1:
        return configs[0], (found or others)[0]
    if not found and not others:
        for name in sorted(names):
            refuse_unread(name, where)
    if found and found[0] not in names and not configs:
        raise ValueError(
            f"{where} has weights in shards ({found[0]}.index.json) and no {CONFIG_FILE}; put the model's "
            f"{CONFIG_FILE} or {OPENCLIP_CONFIG_FILE} there, or make one file of them and load that"
        )
    is_openclips = OPENCLIP_CONFIG_FILE in configs or (not configs and any(name in _OPENCLIP_WEIGHTS for name in found))
    config = OPENCLIP_CONFIG_FILE if is_openclips else CONFIG_FILE
    weights = f"{_OPENCLIP_WEIGHTS[0]} or {_OPENCLIP_WEIGHTS[2]}" if is_openclips else WEIGHTS_FILE
    missing = [] if configs else [config]
    missing += [] if found else [weights]
    there = f"; of {', '.join(others[:4])} give the path of the one that is meant" if others else _elsewhere(where)
    raise ValueError(f"{where} has no {' and no '.join(missing)}; a model's directory has {config} and weights{there}")


def refuse_to_save(folder: Path, overwrite: bool, option: str = "overwrite=True") -> None:
    """What every writer of a model into a folder asks before it writes.

    Args:
        option: what the caller's user passes to replace a model.

    Raises:
        ValueError: the folder holds a model and `overwrite` is False, or `load` would read something else there.
    """
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    refuse_misread(there, str(folder))
    models = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name in there]
    if models and not overwrite:
        raise ValueError(f"{folder} already holds a model ({', '.join(models)}); pass {option} to replace it")


def refuse_misread(there: Collection[str], where: str, written: Collection[str] = (CONFIG_FILE, WEIGHTS_FILE)) -> None:
    """Raises a ValueError if `load` would read what lies in a folder already, and not a model that is written there.

    Args:
        there: the names of the folder's files.
        where: the folder or repository, for the error.
        written: the names of the model's files.
    """
    for name, what in ((ADAPTER_CONFIG_FILE, "an adapter of PEFT's"), (OPENCLIP_CONFIG_FILE, "OpenCLIP's model")):
        if name in there and name not in written:
            raise ValueError(
                f"{where} holds {name}, so what is loaded from there would be {what} and not the model that is to be "
                "written; name another place, or move that file and its weights away"
            )


def own_weights(config: str, names: Collection[str]) -> str | None:
    """The weights in a folder that a configuration's library would load with it, if they are there."""
    own = _OPENCLIP_WEIGHTS if config == OPENCLIP_CONFIG_FILE else _HF_WEIGHTS
    return next((name for name in own if name in names or f"{name}.index.json" in names), None)


def has_usual_name(weights: str) -> bool:
    """Whether a file is named as the weights of a folder's one model are."""
    return weights in (*_OPENCLIP_WEIGHTS, *_HF_WEIGHTS)


def _elsewhere(where: str) -> str:
    """Where the model of a folder lies that holds none itself: of a run in `best`, or while it goes on in its last
    checkpoint; of DeepSpeed's in parts; of sentence-transformers, diffusers and Trainer in folders below."""
    best, last = Path(where, "best"), Path(where, "checkpoints", "last.ckpt")
    found = best if (best / CONFIG_FILE).is_file() else last if last.is_file() else None
    if found:
        return f". It is the folder of a run, whose model is {found}"
    if Path(where, "zero_to_fp32.py").is_file():
        return (
            ". It is a checkpoint of DeepSpeed's; `python zero_to_fp32.py . OUT` in it writes the weights in one piece"
        )
    below = sorted({path.parent.name for path in Path(where).glob("*/*config.json") if _has_weights(path.parent)})
    return f". Models lie below it, in {some(below)}; give the path of the one that is meant" if below else ""


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in WEIGHTS_SUFFIXES for path in folder.iterdir())


def refuse_unread(name: str, where: str = "") -> None:
    """Raises a ValueError for a file of weights of another framework; says what to do."""
    if what := _NOT_READ.get(PurePath(name).suffix.lower()):
        raise ValueError(f"{where}{': ' if where else ''}{name} is not read; it is {what}")


def files_to_fetch(names: Collection[str], where: str) -> list[str]:
    """Of a repository's files the small ones at its top, and one copy of the weights.

    Raises:
        ValueError: as `pair_in`.
    """
    top = [name for name in names if "/" not in name]
    _, weights = pair_in(top, where)
    stem, suffix = PurePath(weights).stem, PurePath(weights).suffix
    # Weights in shards are model-00001-of-00002.safetensors and so on, beside model.safetensors.index.json.
    parts = [] if weights in top else [name for name in top if name.startswith(f"{stem}-") and name.endswith(suffix)]
    small = [name for name in top if PurePath(name).suffix in (".json", ".txt")]
    return sorted({*small, *parts, *([weights] if weights in top else [])})
