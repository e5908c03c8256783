"""`miniclip explain`: pictures and texts -> maps of what mattered, and how far to believe them."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ...common.files import atomic_write
from ...common.wording import some
from ..output import MODELS, add_model, add_output, note, note_left_out, note_unreadable, results
from ..terminal import add_upright, lasting_imports, new_parser, progress_bar, utf8_text

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ...evaluation.datasets.sets import EvaluationSet
    from ...inference.explanation.deletion import Deletion
    from ...inference.explanation.explain import Explainer, Explanation

_MOST_IN_NAME = 60  # letters of a text in a file's name
_SHOWN = {
    "image": str, "text": str, "cosine": float, "deletion": float, "random": str, "insertion": float, "better": str,
    "words": list, "map": str,
}  # fmt: skip
_COLUMNS = {
    "image": str, "text": str, "cosine": float, "method": str, "deletion": float, "insertion": float, "random": float,
    "random_low": float, "random_high": float, "is_better": bool, "words": list, "word_relevances": list[float],
    "words_deletion": float, "words_insertion": float, "words_random": float, "words_random_low": float,
    "words_random_high": float, "words_is_better": bool, "tokens": list, "token_relevances": list[float], "map": str,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "explain",
        "Shows what a model's score of a picture and a text hangs on: a heat map over the picture, warm where\n"
        "something speaks for the text and cold where it speaks against it, and the weight of each word. Each map is\n"
        "checked: pixels are blurred away in the order of the map, the important ones first (deletion: the mean\n"
        "cosine, lower is better), or come back in that order (insertion: higher is better), and eight random maps\n"
        "show what no insight would score: their mean, and where 95 of 100 would lie. Each picture is mapped for each\n"
        "text.\n\n" + MODELS,
        notes="IMAGE is a file, a folder, a quoted pattern ('photos/**/*.jpg'), a table with a column of images\n"
        "(.csv, .tsv, .jsonl, .json, .parquet), shards, a URL, or - for standard input.\n"
        "A map is of the picture as viewers show it; stripes cover what the model does not see. Pictures of less than\n"
        "448 pixels are enlarged in PNG, not in --array.",
        examples="""
miniclip explain picture.jpg "a red car" --model runs/digits/best
miniclip explain picture.jpg "a red car" "a street" --out maps
miniclip explain picture.jpg "a red car" --method gradients --out car.png --array car.npy
miniclip explain 'photos/dog/1*.png' "a dog" --json""",
    )
    parser.add_argument("image", metavar="IMAGE", help="as below")
    parser.add_argument("text", type=utf8_text, metavar="TEXT", nargs="*", help="what to look for, in quotes")
    parser.add_argument("--texts", metavar="FILE", help="more of them: a file with one a line, or - for standard input")
    add_model(parser)
    parser.add_argument(
        "--method",
        choices=("attention", "gradients", "occlusion"),
        help="attention: relevance through attention, for miniclip's ViTs; gradients: integrated gradients, for every "
        "model of torch's; occlusion: parts are covered, for any model; default: the first that the model allows",
    )
    parser.add_argument(
        "--out", default="explained", metavar="DIR", help="folder for the maps; or FILE.png, for a single one"
    )
    parser.add_argument(
        "--array", metavar="FILE", help="the maps as float32, NaN where nothing is seen: .npy for one, .npz for several"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    add_upright(parser)
    add_output(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    _check_texts(options)
    with lasting_imports():
        from ...evaluation.other_libraries import open_model
        from ...inference.explanation.explain import Explainer
        from ...inference.sources import image_set, text_set

    if options.texts:
        found = text_set(options.texts)
        note_left_out(found.left_out)
        options.text += found.texts
    texts = list(dict.fromkeys(options.text))
    if len(texts) < len(options.text):
        note(f"note: {len(options.text) - len(texts)} of {len(options.text)} texts are named twice, and mapped once")
    data = image_set([options.image], upright=options.upright)
    note_left_out(data.left_out)
    paths = _paths(data, texts, options)
    explainer = Explainer(open_model(options.model, options.device), options.method)
    for text in texts:
        explainer.text(text)  # what can't be read is refused before the first picture
    _explain(explainer, data, texts, paths, options)


def _explain(
    explainer: Explainer, data: EvaluationSet, texts: list[str], paths: list[list[Path]], options: argparse.Namespace
) -> None:
    is_whole = bool(options.json or options.csv or options.parquet)
    problems: list[str] = []
    num_worse = 0
    with (
        results(options, _COLUMNS if is_whole else _SHOWN) as write,
        _arrays(options.array) as keep,
        progress_bar("explaining", len(data)) as progress,
    ):
        for index in range(len(data)):
            try:
                picture = data.open(index)
                explanations = explainer(picture, texts)
            except ValueError as error:
                problems.append(str(error))
                continue
            for explanation, path in zip(explanations, paths[index], strict=True):
                _write_map(picture, explanation.map.on_picture(), path, keep)
                write(_row(data.key(index), explanation, path, is_whole))
                num_worse += not explanation.map.deletion.is_better
            progress(index + 1)
        if len(problems) == len(data):
            raise ValueError(f"nothing can be explained: {problems[0]}" + (" (and so on)" if problems[1:] else ""))
    note_unreadable(problems, len(data))
    num_maps = (len(data) - len(problems)) * len(texts)
    if num_worse:
        note(
            f"note: {num_worse} of {num_maps} maps can't be told from random ones by deletion and insertion: do not "
            "build on one of them alone; another --method may do better"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


def _check_texts(options: argparse.Namespace) -> None:
    from ...data.reading.scan import IMAGE_SUFFIXES

    if not options.text and not options.texts:
        raise ValueError("a text is needed after the image: what to look for, in quotes (or --texts FILE)")
    if options.image == options.texts == "-":
        raise ValueError("both the image and --texts are -; standard input can be read once")
    for text in options.text:
        if Path(text).suffix.lower() in IMAGE_SUFFIXES and Path(text).exists():
            raise ValueError(
                f"the text {text!r} is a picture that is there; put several pictures into one quoted pattern"
            )


def _paths(data: EvaluationSet, texts: Sequence[str], options: argparse.Namespace) -> list[list[Path]]:
    """Where the map of each picture and text goes.

    Raises:
        ValueError: a file that is there, a folder that is not, or one file for several maps.
    """
    from ...data.reading.scan import IMAGE_SUFFIXES

    out, num_maps = Path(options.out), len(data) * len(texts)
    if out.suffix.lower() == ".png":
        if num_maps > 1:
            raise ValueError(f"--out {out} is one file, and there are {num_maps} maps; name a folder")
        found = [[out]]
    elif out.suffix.lower() in IMAGE_SUFFIXES or out.is_file():
        raise ValueError(f"--out {out} is neither a folder nor a .png")
    else:
        used: Counter[str] = Counter()
        found = [[out / _file_name(data.shown(index), text, used) for text in texts] for index in range(len(data))]
    targets = [path for row in found for path in row]
    if options.array:
        targets.append(Path(options.array))
        suffix = Path(options.array).suffix
        if suffix not in (".npy", ".npz"):
            raise ValueError(f"--array {options.array} ends in {suffix or 'nothing'}; it must end in .npy or .npz")
        if suffix == ".npy" and num_maps > 1:
            raise ValueError(f"--array {options.array} is one map's, and there are {num_maps}; name a file .npz")
    for folder in dict.fromkeys([out if found != [[out]] else out.parent, *(path.parent for path in targets)]):
        if not folder.is_dir() and (folder != out or not folder.parent.is_dir()):
            raise ValueError(f"there is no folder {folder if folder != out else folder.parent}; make it first")
    there = [str(path) for path in targets if path.exists()]
    if there and not options.overwrite:
        raise ValueError(f"{some(there, 3)} is already there; pass --overwrite to replace it, or name another --out")
    return found


def _file_name(key: str, text: str, used: Counter[str]) -> str:
    """photo.a_red_car.png, each once."""
    stem = re.sub(r"[^\w. -]+", "_", PurePath(re.split(r"[/\\:]", key)[-1]).stem) or "image"
    words = re.sub(r"\W+", "_", text.lower()).strip("_")[:_MOST_IN_NAME]
    name = f"{stem[:_MOST_IN_NAME]}.{words or 'text'}"
    used[name] += 1
    return f"{name}-{used[name]}.png" if used[name] > 1 else f"{name}.png"


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def _write_map(
    picture: Image.Image, relevance: np.ndarray, path: Path, keep: Callable[[str, np.ndarray], None]
) -> None:
    """Writes the overlay, and hands on the array, both as viewers show the picture."""
    import numpy as np
    from PIL import Image

    from ...images import orientation, turned
    from ...reports.heat import overlay

    turn = orientation(picture)
    with atomic_write(path) as file:
        turned(overlay(picture, relevance), turn).save(file, "PNG")
    keep(path.stem, np.asarray(turned(Image.fromarray(relevance), turn)))


@contextmanager
def _arrays(path: str | None) -> Iterator[Callable[[str, np.ndarray], None]]:
    """A function that keeps an array under its name: in a .npy the only one, in a .npz as many as come."""
    if path is None:
        yield lambda name, array: None
        return
    from numpy.lib.format import write_array

    with atomic_write(path) as file:
        if path.endswith(".npy"):
            yield lambda name, array: write_array(file, array)
            return
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:

            def keep(name: str, array: np.ndarray) -> None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    write_array(member, array)

            yield keep


def _row(key: str, explanation: Explanation, path: Path, is_whole: bool) -> dict[str, Any]:
    found, words = explanation.map, explanation.words
    row: dict[str, Any] = {"image": key, "text": explanation.text, "cosine": found.cosine, "map": str(path)}
    row |= {"deletion": found.deletion.deletion, "insertion": found.deletion.insertion}
    if not is_whole:
        low, high = found.deletion.interval
        weights = sorted(zip(words.relevances, words.words, strict=True), reverse=True)
        return row | {
            "random": f"{found.deletion.random:.4f} ({low:.3f} to {high:.3f})",
            "better": "yes" if found.deletion.is_better else "no",
            "words": [f"{word} {weight:+.2f}" for weight, word in weights],
        }
    row |= {"method": found.method} | _deletion("", found.deletion)
    row |= {"words": words.words, "word_relevances": words.relevances} | _deletion("words_", words.deletion)
    return row | {"tokens": words.tokens, "token_relevances": words.token_relevances}


def _deletion(prefix: str, deletion: Deletion) -> dict[str, Any]:
    values = {"deletion": deletion.deletion, "insertion": deletion.insertion, "random": deletion.random}
    low, high = deletion.interval
    values |= {"random_low": low, "random_high": high, "is_better": deletion.is_better}
    return {prefix + name: value for name, value in values.items()}
