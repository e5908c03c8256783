"""Images or texts -> embeddings: an array in Python, or a folder of files for as many as a disk holds.

Embeddings have length 1: their scalar products are cosines, which is what CLIP was trained on and what indexes take.

N rows of a source, E embedding, B batch.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...common.arguments import check_list
from ...common.storage import is_url, without_secrets
from ...common.version import __version__
from ...data.reading.scan import IMAGE_SUFFIXES
from ...evaluation.datasets.sets import EvaluationSet
from ...evaluation.encoder import Encoder, collecting_cut, report_cut
from ...evaluation.features import EncodedBatch, encode_in_batches, encode_texts
from ...evaluation.fingerprints import PROBE_TEXTS, probe_outputs, probe_pictures
from ...evaluation.other_libraries import as_encoder
from ..names import existing
from ..sources import Texts, image_set
from .parts import KINDS, Embedded, Plan, Work
from .source_rows import SourceRows, columns_left_out

_TEXTS_AT_ONCE = 2048  # sorted by length together; more is slower to show its progress

# ---------------------------------------------------------------------------------------------------------------------
# An array


def embed(
    inputs: Any,
    model: Any,
    *,
    kind: Literal["image", "text"] | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    upright: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
) -> np.ndarray:
    """Embeddings (N, E) of images or texts, float32, each of length 1: `miniclip.embed(photos, model="ViT-B/32")`.

    Args:
        inputs: paths (`pathlib.Path`), PIL images, arrays of pixels (H, W, 3) or the bytes of files are images; a
            `str` is a text. One alone is a list of one.
        model: a name or folder that `miniclip eval` takes, what `miniclip.load` returns, an `Encoder`, or an object
            with the five things.
        kind: "image" reads strings as paths and URLs; "text" takes them as texts, whatever they look like.
        device, precision: for a model that is named; "bf16" is faster on some CPUs (`open_model`).
        upright: turn images as EXIF says that viewers show them.
        num_workers: processes that decode images.

    Raises:
        ValueError: an image that can't be read, nothing to embed, or, without a `kind`, a string that names a file or a
            URL: whether its text or its picture is meant can't be known.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"kind is {kind!r}; it must be {' or '.join(KINDS)}")
    items = _as_items(inputs)
    kinds = {kind or _image_or_text(item) for item in items}
    if len(kinds) > 1:
        raise ValueError("images and texts are mixed; embed the ones, then the others")
    if not items:
        raise ValueError("there is nothing to embed: the list is empty")
    encoder = as_encoder(model, device, precision)
    if kinds == {"text"}:
        if others := [item for item in items if not isinstance(item, str)]:
            raise ValueError(f"among the texts is a value of type {type(others[0]).__name__}; each must be a str")
        return encode_texts(encoder, items, encoder.tokenize).cpu().numpy()
    images = [item if not isinstance(item, str | Path) else _one_image(item) for item in items]
    data = image_set(images, upright=upright)
    if len(data) != len(items):
        raise ValueError(f"{len(items) - len(data)} of {len(items)} are no images: {data.left_out[0].source}")
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    parts = []
    for batch in encode_in_batches(encoder.encode_image, encoder.preprocess, data, range(len(data)), **options):
        for problem in batch.problems.values():
            raise ValueError(problem)
        parts.append(unit(batch.features))
    return np.concatenate(parts)


def _as_items(inputs: Any) -> list[Any]:
    is_one = isinstance(inputs, str | Path | bytes | bytearray | Image.Image)
    if is_one or getattr(inputs, "ndim", 1) in (2, 3):
        return [inputs]
    return check_list("inputs", inputs, "images or of texts, or one of them")


def _image_or_text(item: Any) -> str:
    if not isinstance(item, str):
        return "image"
    if is_url(item) or item.lower().endswith(IMAGE_SUFFIXES) or existing(item):
        raise ValueError(
            f"{item!r} may be meant as a text or as the place of an image; pass kind='text' or kind='image' "
            "(a pathlib.Path is always an image)"
        )
    return "text"


def _one_image(location: str | Path) -> str | Path:
    """A path or URL of one picture, so that rows stay those of the list."""
    if isinstance(location, Path) or not is_url(location):
        if Path(location).is_dir():
            raise ValueError(
                f"{location} is a folder; name its pictures, or embed it by `miniclip embed {location} OUT`"
            )
        if not Path(location).is_file():
            raise ValueError(f"there is no file {location}")
    return location


# ---------------------------------------------------------------------------------------------------------------------
# A folder


def embed_source(
    data: EvaluationSet | Texts,
    encoder: Encoder,
    out: str | Path,
    *,
    source: str,
    layout: str = "parquet",
    dtype: str | None = None,
    rows_per_file: int = 10_000,
    part: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    use_ray: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> Embedded:
    """Writes the embeddings of a source into a folder, as `parts.py` describes it.

    What is held at once is a batch and the embeddings of a part, beside the names of the source's rows.

    Args:
        source: where the data are from, for messages and the manifest.
        dtype: by default float32, and float16 for clip-retrieval, whose own it is.
        rows_per_file: of the source; a process that is killed loses at most the part it is at.
        part: (i, n): every n-th part, from the i-th on; the process that ends last completes the folder.
        overwrite: replace what other data or another model have written there.
        use_ray: have Ray's actors decode and encode; see `on_ray.py`.
        progress: called with the number of this process's rows that are done.

    Raises:
        ValueError: an argument out of its range, `out` belongs to something else, or no row can be read.
    """
    _require_pyarrow()
    if is_url(str(out)):
        raise ValueError(f"{out} is a URL; name a folder on a disk, and copy it when it is complete")
    out = Path(out)
    number, count = part
    if not 1 <= number <= count:
        raise ValueError(f"part is {number}/{count}; it goes from 1/{count} to {count}/{count}")
    if rows_per_file < 1:
        raise ValueError(f"rows_per_file is {rows_per_file}; it must be at least 1")
    _refuse_place(out, source)
    rows = SourceRows(data)
    dtype = dtype or ("float16" if layout == "clip-retrieval" else "float32")
    work = Work(out, plan_of(rows, encoder, source, dtype, layout, rows_per_file), part, overwrite, rows.digests)
    rows.begun_at = work.plan.place
    with work.part_lock():
        missing = work.missing()
        done = sum(len(work.plan.indices(each)) for each in set(work.own()) - set(missing))
        if progress:
            progress(done)
        indices = [index for each in missing for index in work.plan.indices(each)]
        if use_ray:
            from .on_ray import encode_on_ray

            batches = encode_on_ray(encoder, data, indices, batch_size)
        elif isinstance(data, Texts):
            batches = encode_text_set(encoder, data, [work.plan.indices(each) for each in missing])
        else:
            options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
            options["needs_digests"] = rows.keys_fingerprint is not None
            batches = encode_in_batches(encoder.encode_image, encoder.preprocess, data, indices, **options)
        for batch in batches if missing else ():
            embeddings = unit(batch.features).astype(dtype, copy=False)
            work.add(batch.indices, embeddings, batch.problems, rows, batch.digests)
            done += len(batch.indices) + len(batch.problems)
            if progress:
                progress(done)
        return work.finish(
            [*data.left_out, *columns_left_out(data)], versions(encoder), getattr(data, "identity", None)
        )


def encode_text_set(encoder: Encoder, data: Texts, parts: Iterable[Sequence[int]]) -> Iterator[EncodedBatch]:
    """One pass over texts; those of a part that are alike are together, so that few tokens are padding.

    At the end it is reported how many of them a model cut.
    """
    longer: list[str] = []
    why: dict[str, str] = {}
    num_texts = 0
    for part in parts:
        for start in range(0, len(part), _TEXTS_AT_ONCE):
            indices = part[start : start + _TEXTS_AT_ONCE]
            texts = [data.texts[index] for index in indices]
            with collecting_cut() as found:
                features = encode_texts(encoder, texts, encoder.tokenize)
            longer += [text for text in texts if text in found]
            why |= found
            num_texts += len(texts)
            yield EncodedBatch(np.array(indices), features.cpu(), {})
    report_cut(longer, num_texts, why)


def unit(features: Tensor) -> np.ndarray:
    return F.normalize(features.float(), dim=-1).cpu().numpy()


def plan_of(rows: SourceRows, encoder: Encoder, source: str, dtype: str, layout: str, rows_per_file: int) -> Plan:
    is_text = rows.kind == "text"
    function, probes = (
        (encoder.tokenize, [[each] for each in PROBE_TEXTS]) if is_text else (encoder.preprocess, probe_pictures())
    )
    fingerprint, earlier = rows.fingerprints()
    return Plan(
        kind=rows.kind,
        source=str(Path(source).resolve()) if Path(source).exists() else without_secrets(source),
        source_fingerprint=fingerprint,
        rows=len(rows.data),
        model=encoder.name,
        library=encoder.library,
        precision=encoder.precision,
        model_fingerprint=encoder.text_fingerprint() if is_text else encoder.image_fingerprint(),
        preprocessing=probe_outputs(function, probes),
        dtype=dtype,
        layout=layout,
        rows_per_file=rows_per_file,
        upright=isinstance(rows.data, EvaluationSet) and rows.data.upright,
        place=rows.place,
        keys_fingerprint=rows.keys_fingerprint,
        earlier_fingerprints=earlier,
    )


def versions(encoder: Encoder) -> dict[str, str]:
    import pyarrow

    modules = {"torch": torch, "numpy": np, "pyarrow": pyarrow}
    found = {"miniclip": __version__, "python": platform.python_version()}
    return found | {name: str(module.__version__) for name, module in modules.items()} | {"library": encoder.library}


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError("files of embeddings need pyarrow: pip install 'miniclip[eval]'") from error


def _refuse_place(out: Path, source: str) -> None:
    folder = Path(source)
    if out.name in ("", ".."):
        raise ValueError(f"{out} is no new folder; give it a name")
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies in {source}, which it is written from; name a folder elsewhere")
