"""A page that runs the model in the browser: static files around the towers in ONNX, for any host of files."""

from __future__ import annotations

import io
import json
import lzma
from pathlib import Path

from PIL import Image

from ...common.files import ASSETS, atomic_write, write_text
from ...common.pictures import shrunk
from ...evaluation.datasets.sets import EvaluationSet
from ...evaluation.features import encode_images
from .proof import Progress, RunnerPixels, runner_features
from .runner import Clip, on_white

_PACKED = ".xz"  # WebAssembly takes 14 MB, and packed 2
_FOUND_SIDE = 160  # pixels
MOST_PICTURES = 5000
_SEARCH_FILES = ("search/index.json", "search/features.bin")


def write_page(folder: Path) -> None:
    """The page, its scripts, and onnxruntime-web, which runs the towers."""
    for name, path in _copied_files().items():
        data = path.read_bytes()
        with atomic_write(folder / name) as file:
            file.write(lzma.decompress(data) if path.suffix == _PACKED else data)


def _copied_files() -> dict[str, Path]:
    """Files of the page by their names in its folder, and where the package has them."""
    root = ASSETS / "web"
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix().removesuffix(_PACKED): path for path in paths}


def page_files(num_pictures: int) -> list[str]:
    """What a page that searches so many pictures has beside the towers."""
    return [*_copied_files(), *_SEARCH_FILES, *(f"search/{_thumbnail_name(number)}" for number in range(num_pictures))]


def write_search(
    folder: Path, data: EvaluationSet, *, batch_size: int, num_workers: int, progress: Progress
) -> tuple[int, tuple[str, ...]]:
    """Pictures that the page searches: their features by the towers of the folder, names and thumbnails.

    Returns:
        How many there are, and why the others can't be read.
    """
    runner = Clip(folder)
    with progress(f"{data.name}: to be searched", len(data)) as advance:
        found = encode_images(
            runner_features(runner),
            RunnerPixels(folder),
            data,
            batch_size=batch_size,
            num_workers=num_workers,
            progress=advance,
        )
    pictures = []
    for number, index in enumerate(found.indices.tolist()):
        name = _thumbnail_name(number)
        with atomic_write(folder / "search" / name) as file:
            file.write(_thumbnail(data.open(index), runner.facts["pixels"]["style"]))
        pictures.append({"name": Path(data.shown(index)).name, "thumbnail": name})
    with atomic_write(folder / "search" / "features.bin") as file:
        file.write(found.unit.numpy().astype("<f4").tobytes())
    write_text(folder / "search" / "index.json", json.dumps(pictures, ensure_ascii=False))
    return len(pictures), found.unreadable


def _thumbnail_name(number: int) -> str:
    return f"{number:04d}.jpg"


def _thumbnail(image: Image.Image, style: str) -> bytes:
    buffer = io.BytesIO()
    shrunk(on_white(image) if style == "hf" else image, _FOUND_SIDE).save(buffer, "jpeg", quality=80)
    return buffer.getvalue()
