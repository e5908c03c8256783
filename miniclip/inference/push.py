"""A model to a hub, all files in one commit: a repository has the old model or the new one, never half of each."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..common.files import expand_home
from ..common.pictures import as_seen
from ..common.wording import cut_short
from ..data.wordings.kept import WORDINGS_FILE, Wordings
from ..images import open_image
from ..weights.convert import convert
from ..weights.folders import refuse_misread
from .card import CARD_FILE, card_for, is_untouched

_THUMBNAIL_SIDE = 256  # pixels, of the longer side
_SMALL = 1 << 26  # bytes; larger files are known by their SHA-256


@dataclass(frozen=True)
class Pushed:
    """What became of a push.

    Args:
        url: of the repository.
        files: that were uploaded or are there as they are here, with their sizes in bytes.
        is_new_commit: False if the repository had all of them already.
    """

    url: str
    files: dict[str, int]
    is_new_commit: bool


def push(
    model: str | Path,
    repository: str,
    *,
    to: str = "native",
    results: Sequence[str | Path] = (),
    license: str | None = None,  # noqa: A002
    thumbnails: Sequence[str | Path] = (),
    private: bool = False,
    overwrite: bool = False,
    **hints: Any,
) -> Pushed:
    """Uploads a model, its threshold and its card to "owner/name" on Hugging Face's hub, in one commit.

    A push that breaks off leaves the repository as it was, and is repeated by the same call: files that arrived are not
    sent again. The hub's client finds the token (`hf auth login`, or HF_TOKEN) and the server (HF_ENDPOINT).

    Args:
        model: as `miniclip.load` takes it.
        to: the layout of its files, as `convert` writes and verifies it: native, openclip or hf.
        results: results.json of `miniclip eval` for the card; by default the report beside the run.
        thumbnails: pictures to publish with the card, made small and without their metadata.
        private: makes a new repository private.
        overwrite: replaces other files of these names that the repository has; its history keeps them.
        hints: as `read_checkpoint` takes them.

    Raises:
        ValueError: the repository has other files of these names, or a model that would be loaded in place of this one;
            the hub refuses, or as `convert` and `read_origin`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repository(repository)
    pictures = dict(zip(thumbnail_names(thumbnails), map(_small, thumbnails), strict=True))
    card = card_for(model, repository, to=to, results=results, license=license, thumbnails=list(pictures), **hints)
    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="miniclip-push-") as temporary, _refused_by_the_hub(repository):
        folder = Path(temporary) / "model"
        convert(model, folder, to, **hints)
        _withhold_captions(folder)
        contents: dict[str, Path | bytes] = {path.name: path for path in sorted(folder.iterdir())}
        contents |= {CARD_FILE: card.encode(), **pictures}
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        before = api.model_info(repository, files_metadata=True)
        refuse_misread([file.rfilename for file in before.siblings or ()], repository, contents)
        if not overwrite:
            _refuse_other_files(api, repository, operations, before)
        commit = api.create_commit(repository, operations, commit_message=f"{to} weights of {Path(model).name}")
        sizes = {each.path_in_repo: each.upload_info.size for each in operations}
    return Pushed(str(url), sizes, commit.oid != before.sha)


def _withhold_captions(folder: Path) -> None:
    """Captions are people's data: of wordings.json only what many of them share is published."""
    path = folder / WORDINGS_FILE
    if path.is_file():
        wordings = Wordings.from_json(path.read_text(encoding="utf-8"), str(path))
        path.write_text(replace(wordings, examples=()).to_json(), encoding="utf-8")


def check_repository(repository: str) -> None:
    """Raises a ValueError for what the hub's client would refuse, too, but once the model is converted."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with suppress(HFValidationError):
        validate_repo_id(repository)
        if "/" in repository:
            return
    raise ValueError(
        f"{repository!r} is no repository; a name is owner/name, each of at most 96 letters (a to z), digits, '.', "
        "'_' and '-', without '.' or '-' at its ends, without '..' and '--', and the name without .git at its end"
    )


def _refuse_other_files(api: Any, repository: str, operations: Sequence[Any], before: Any) -> None:
    """Raises a ValueError if the repository has another content under a name that is about to be written."""
    from huggingface_hub.utils.sha import git_hash

    there = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in before.siblings or ()}
    other = []
    for operation in operations:
        name, info = operation.path_in_repo, operation.upload_info
        with operation.as_file() as file:  # the hub knows small files by git's name for their content
            own = {info.sha256.hex(), *([git_hash(file.read())] if info.size <= _SMALL else [])}
        if name in there and there[name] not in own and not (name == CARD_FILE and _is_own_card(api, repository)):
            other.append(name)
    if other:
        raise ValueError(
            f"{repository} has another {', '.join(other)}; pass --overwrite to replace what it has (its history keeps "
            "that), or choose another name"
        )


def _is_own_card(api: Any, repository: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repository, CARD_FILE, local_dir=folder)
        return is_untouched(Path(path).read_text(encoding="utf-8", errors="replace"))


def thumbnail_names(thumbnails: Sequence[str | Path]) -> list[str]:
    return [f"pictures/{index}.jpg" for index in range(len(thumbnails))]


def _small(picture: str | Path) -> bytes:
    """A JPEG without metadata: a camera's tags can hold where its owner lives."""
    path = expand_home(picture)
    try:
        image = as_seen(open_image(path.read_bytes(), str(path)))
    except OSError as error:
        raise ValueError(f"the thumbnail {path} can't be read: {error.strerror or error}") from error
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    clean = Image.frombytes("RGB", image.size, image.tobytes())
    buffer = io.BytesIO()
    clean.save(buffer, "jpeg", quality=85)
    return buffer.getvalue()


@contextmanager
def _refused_by_the_hub(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        yield
    except Exception as error:  # the hub's errors, and those of the library that it talks through
        if type(error) is ValueError:
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        has_no_right = status in (401, 403) or isinstance(error, LocalTokenNotFoundError | UnicodeEncodeError)
        hint = "; log in with `hf auth login`, or set HF_TOKEN to a token that may write there" if has_no_right else ""
        reason = cut_short(" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(
            f"{repository} was not pushed: {reason}{hint}. The repository is as it was; the same command tries again"
        ) from error
