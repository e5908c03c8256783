"""`miniclip export`: a model -> a folder that runs without miniclip and gives the same answers, or no folder at all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...common.files import refuse_foreign, remove, stand_in, swap_in, write_text
from ...common.wording import some
from ...evaluation.datasets.open import open_dataset, open_images
from ...evaluation.datasets.sets import EvaluationSet, LabelledImages
from ...evaluation.encoder import from_clip
from ...evaluation.other_libraries import OPENCLIP_PREFIX, PYTHON_PREFIX, TRANSFORMERS_PREFIX
from ...evaluation.prompts import suited
from ...images import Preprocess
from ...model import CLIP
from ...weights.containers import read_json
from ...weights.load import load
from ..thresholds import FILE as THRESHOLD_FILE
from ..thresholds import ModelThreshold, find_threshold
from . import runner as runner_file
from .facts import FACTS_FILE, FACTS_FILES, Classes, export_facts, has_own_ids, write_facts
from .onnx_files import require, shrink_onnx, write_onnx
from .openvino_files import write_openvino
from .proof import Progress, Proof, prove_on_noise, prove_on_pictures, time_towers
from .runner import Clip
from .torch_program import write_program
from .towers import Tower, towers
from .web import MOST_PICTURES, page_files, write_page, write_search

# target: its precisions
TARGETS = {
    "onnx": ("float32", "float16", "bfloat16", "int8"),
    "torch": ("float32", "float16", "bfloat16"),
    "openvino": ("float32", "float16"),
    "web": ("float32", "float16", "bfloat16", "int8"),
}
_SUFFIXES = {"float32": "", "float16": "_fp16", "bfloat16": "_bf16", "int8": "_quantized"}  # transformers.js's
_RUNNER_FILE, _PROOF_FILE = "run.py", "proof.json"
_DIFFERS = ".differs"  # follows the folder's name where an export is kept for a look, and not called done


class ExportDiffersError(ValueError):
    """The export was written and gives other answers than the model."""


@dataclass(frozen=True)
class Exported:
    folder: Path
    target: str
    facts: dict[str, Any]
    proof: Proof
    data: EvaluationSet | None = None


def export(
    name: str,
    out: str | Path,
    target: str,
    *,
    precision: str = "float32",
    prove: str | None = None,
    search: str | None = None,
    overwrite: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress = lambda what, total: nullcontext(lambda done: None),
) -> Exported:
    """Writes a folder and proves it, and only then gives it its name.

    Args:
        name: a model, as `load` takes it.
        target, precision: of `TARGETS`.
        search: images that the page of "web" searches, likewise.
        prove: images, as `open_dataset` or `open_images` takes them, on which both are run.
        overwrite: replace `out` if it is an export and holds nothing else.

    Raises:
        ExportDiffersError: it gives other answers than the model; it is kept beside `out`, for a look.
        ValueError: no such model, target or precision, a package that is missing, `out` exists, or nothing can be read
            of `prove`.
    """
    out = Path(out)
    _refuse_request(name, target, precision)
    aside = out.with_name(out.name + _DIFFERS)
    refuse_existing(out, overwrite)
    refuse_existing(aside, overwrite=True)
    data = None if prove is None else _open_proof(prove)
    pictures = None if search is None else _open_pictures(search, target)
    model, preprocess = load(name, "cpu")
    assert isinstance(preprocess, Preprocess)
    model.requires_grad_(False)
    _refuse_model(model, name, target, needs_images=bool(data or pictures))
    threshold = find_threshold(name)
    if threshold is not None:
        threshold.check_model(from_clip(model, preprocess, name))
        data, pictures = (each and replace(each, upright=threshold.upright) for each in (data, pictures))
    if isinstance(data, LabelledImages):
        data = _with_prompts(data, model, threshold)
    classes = _classes_of(threshold, data, model)
    with stand_in(out, f"another process is writing {out}") as temporary:
        refuse_existing(out, overwrite)  # another process may have written it meanwhile
        files = {each.name: _file_of(each, target, precision) for each in towers(model)}
        facts = export_facts(model, preprocess, name, files, precision, classes)
        write_facts(temporary, facts, model.config)
        write_text(temporary / _RUNNER_FILE, Path(runner_file.__file__).read_text(encoding="utf-8"))
        if threshold is not None:
            write_text(temporary / THRESHOLD_FILE, Path(threshold.source).read_text(encoding="utf-8"))
        with _scratch(temporary) as scratch:
            _write_towers(model, temporary, scratch, facts, target, progress)
            threads = torch.get_num_threads()
            plain = Clip(scratch, threads) if (scratch / FACTS_FILE).is_file() else None
            proof = _prove(
                model, preprocess, name, Clip(temporary, threads), plain, data, batch_size, num_workers, progress
            )
        if target == "web":
            write_page(temporary)
        if pictures is not None and not proof.problems():
            options: Any = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
            facts["num_pictures"], unsearched = write_search(temporary, pictures, **options)
            write_facts(temporary, facts, model.config)
            _warn_unread(unsearched, pictures.name)
        write_text(temporary / _PROOF_FILE, json.dumps(proof.as_dict(), indent=1, ensure_ascii=False) + "\n")
        if problems := proof.problems():
            swap_in(temporary, aside)
            raise ExportDiffersError(
                f"the export gives other answers than {name}, so it is not put into {out}; it is kept in {aside}: "
                + "; ".join(problems)
            )
        swap_in(temporary, out)
    return Exported(out, target, facts, proof, data)


def _with_prompts(data: LabelledImages, model: CLIP, threshold: ModelThreshold | None) -> LabelledImages:
    """With the prompts that the verbs ask the model with: those of its threshold, else those with the data."""
    if threshold is not None and (own := threshold.templates_for(data.classnames)) is not None:
        data = replace(data, templates=own, templates_from=f"those of {threshold.source}")
    data = suited(data, model.wordings)
    if threshold is not None:
        threshold.warn_if_other(data.classnames, data.templates, data.upright)
    return data


def _classes_of(threshold: ModelThreshold | None, data: EvaluationSet | None, model: CLIP) -> Classes:
    """Those of the model's threshold, else of the images that prove it, else no more than the wordings it knows."""
    if threshold is not None:
        return Classes(threshold.classnames, threshold.templates or (), threshold.cosine, threshold.upright)
    if isinstance(data, LabelledImages):
        return Classes(data.classnames, data.templates)
    return Classes() if model.wordings is None else Classes((), model.wordings.templates())


# ---------------------------------------------------------------------------------------------------------------------
# What can't be done


def _refuse_model(model: CLIP, name: str, target: str, needs_images: bool) -> None:
    if model.config.towers == "text" and (needs_images or target == "web"):
        raise ValueError(f"{name} has no image tower, so there is nothing to do with pictures")
    if target == "web" and not has_own_ids(model.config):
        raise ValueError(f"{name} has no text tower that reads CLIP's ids, and a page without words has no use")


def _refuse_request(name: str, target: str, precision: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"there is no target {target!r}; valid are {', '.join(TARGETS)}")
    if precision not in TARGETS[target]:
        raise ValueError(f"{target} is not offered in {precision}; valid are {', '.join(TARGETS[target])}")
    require("tokenizers", extra="onnx", what="an export's proof")
    if target != "torch":
        require("onnx", "onnxscript", "onnxruntime", extra="onnx", what=f"an export to {target}")
    if target == "openvino":
        require("openvino", extra="openvino", what="an export to openvino")
    for prefix in (OPENCLIP_PREFIX, TRANSFORMERS_PREFIX, PYTHON_PREFIX):
        if name.startswith(prefix):
            raise ValueError(
                f"{name} is another library's model, and exports are of miniclip's; where it is a CLIP, `miniclip "
                f"convert CHECKPOINT FOLDER --to native` of its file or folder makes it one"
            )


def refuse_existing(out: Path, overwrite: bool) -> None:
    """
    Raises:
        ValueError: `out` exists, and is to stay, is no export or holds something else, too.
    """
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise ValueError(f"{out} exists already; pass --overwrite to replace it, or name another folder")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not (out / FACTS_FILE).is_file():
        raise ValueError(f"{out} is no export of miniclip's, so it is not overwritten")
    refuse_foreign(out, _exported_files(out), "`miniclip export`")


def _exported_files(out: Path) -> set[Path]:
    """What an export may have written into its folder, and Python's bytecode of its run.py."""
    facts = read_json(out / FACTS_FILE)
    files = facts.get("files")
    paths = [out / str(name) for name in files.values()] if isinstance(files, dict) else []
    beside = [other for path in paths for other in (path.with_name(f"{path.name}.data"), path.with_suffix(".bin"))]
    names = [*FACTS_FILES, _RUNNER_FILE, _PROOF_FILE, THRESHOLD_FILE, *page_files(facts.get("num_pictures", 0))]
    return {*paths, *beside, *(out / name for name in names), *out.glob(f"__pycache__/{Path(_RUNNER_FILE).stem}.*")}


def _open_proof(source: str) -> EvaluationSet:
    """With labels if there are some."""
    try:
        return open_dataset(source)
    except ValueError as error:
        try:
            return open_images(source)
        except ValueError:
            raise error from None


def _open_pictures(source: str, target: str) -> EvaluationSet:
    if target != "web":
        raise ValueError(f"pictures to search belong to --to web, and {target} has no page")
    data = open_images(source)
    if len(data) > MOST_PICTURES:
        raise ValueError(
            f"{source} has {len(data)} pictures; a page searches at most {MOST_PICTURES}, as a browser has to load them"
        )
    return data


def _warn_unread(unread: tuple[str, ...], name: str) -> None:
    if unread:
        warnings.warn(f"{name}: {len(unread)} pictures can't be read or searched: {some(unread, 2)}", stacklevel=3)


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder beside it for what is made on the way."""
    scratch = folder.with_name(f"{folder.name}.scratch")
    try:
        scratch.mkdir(parents=True)
        yield scratch
    finally:
        remove(scratch)


def _file_of(tower: Tower, target: str, precision: str) -> str:
    if target in ("onnx", "web"):
        return f"onnx/{tower.file}{_SUFFIXES[precision]}.onnx"
    return f"{tower.file}.{'pt2' if target == 'torch' else 'xml'}"


def _write_towers(
    model: CLIP, folder: Path, scratch: Path, facts: dict[str, Any], target: str, progress: Progress
) -> None:
    """The towers' files; those in float32, to compare speeds with, go to `scratch` if it is another precision."""
    precision, names = facts["precision"], list(facts["files"])
    with progress(f"writing {target} files", len(names)) as advance:
        for done, (tower, name) in enumerate(zip(towers(model), names, strict=True), start=1):
            path, plain, graph = folder / facts["files"][name], scratch / facts["files"][name], scratch / "graph.onnx"
            if target != "torch":
                write_onnx(tower, graph)
            for out, kind in ((path, precision), *(((plain, "float32"),) if precision != "float32" else ())):
                out.parent.mkdir(parents=True, exist_ok=True)
                if target == "torch":
                    write_program(tower, out, kind)
                elif target == "openvino":
                    write_openvino(graph, out, kind)
                else:
                    shrink_onnx(graph, out, kind)
            advance(done)
    if precision != "float32":
        write_text(scratch / FACTS_FILE, json.dumps(facts))


def _prove(
    model: CLIP,
    preprocess: Preprocess,
    name: str,
    runner: Clip,
    plain: Clip | None,
    data: EvaluationSet | None,
    batch_size: int,
    num_workers: int,
    progress: Progress,
) -> Proof:
    agreements = prove_on_noise(model, runner)
    timings = time_towers(model, runner, plain)
    paths = {tower: runner.folder / file for tower, file in runner.facts["files"].items()}
    sizes = {
        tower: sum(each.stat().st_size for each in path.parent.glob(f"{path.stem}.*")) for tower, path in paths.items()
    }
    proof = Proof(runner.facts["precision"], tuple(agreements), tuple(timings), sizes)
    if data is None or proof.problems():
        return proof
    encoder = from_clip(model, preprocess, name)
    more, guesses, unreadable = prove_on_pictures(
        encoder, model, runner, data, batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    return replace(proof, agreements=(*agreements, *more), guesses=guesses, unreadable=unreadable)
