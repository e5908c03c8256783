"""Weights from elsewhere: OpenAI's nine models by name, and `hf-hub:owner/name`.

A download is written beside its target under a temporary name, goes on where it broke, is checked against its checksum
once, and only then gets its name. So what has its name is whole, and is not hashed again.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..common import cache
from ..common.files import expand_home, locked, user_cache, write_text
from ..common.storage import NotKeptError
from ..common.wording import some
from .folders import CONFIG_FILE, files_to_fetch, pair_in

# The published addresses (OpenAI's clip/clip.py): the folder is the file's SHA-256.
OPENAI_BASE_URL = "https://openaipublic.azureedge.net/clip/models"
OPENAI_FILES = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
HUB_PREFIX = "hf-hub:"


def openai_folder(download_root: str | Path | None = None) -> Path:
    """Where OpenAI's files are kept: `download_root`, else `clip` below the user's cache (XDG_CACHE_HOME, ~/.cache)."""
    return user_cache() / "clip" if download_root is None else expand_home(download_root)


def fetch_openai(name: str, download_root: str | Path | None = None) -> Path:
    """The file of one of OpenAI's models, downloaded if it is not there yet.

    Raises:
        ValueError: it can't be had; says which file to put where.
    """
    checksum, file = OPENAI_FILES[name].split("/")
    return download(f"{OPENAI_BASE_URL}/{checksum}/{file}", openai_folder(download_root) / file, checksum)


def fetch_hub(name: str, download_root: str | Path | None = None) -> Path:
    """A model's folder in Hugging Face's cache, of the newest commit on the hub's main branch.

    What is missing of it is fetched. Where the hub can't be asked, the commit that the cache has as `main` is taken. A
    warning says so, and another one says when the commit is not the one that the cache had.

    Raises:
        ValueError: the model can't be had.
    """
    from huggingface_hub import HfApi, constants, snapshot_download  # only this needs it
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, cached = name.removeprefix(HUB_PREFIX), None
    with _refusing(name):
        with suppress(LocalEntryNotFoundError):  # whatever there is of it: another library may have fetched one file
            cached = Path(
                snapshot_download(repository, cache_dir=download_root, local_files_only=True, allow_patterns=[])
            )
        try:
            listed = HfApi().model_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as error:  # as for the hub's own libraries, what is here then stands for what is there
            if cached is None:
                raise
            _refuse_part(cached, name)
            if not isinstance(error, OfflineModeIsEnabled):
                reason = f"the hub can't be asked ({_first_line(error)})"
                warnings.warn(f"{name}: {reason}; the cache's commit {cached.name} is loaded", stacklevel=2)
            return cached
    wanted = files_to_fetch([file.rfilename for file in listed.siblings or ()], name)
    with _refusing(name):
        folder = Path(
            snapshot_download(repository, revision=listed.sha, allow_patterns=wanted, cache_dir=download_root)
        )
        # By the cache's documented layout. A download by number does not write it, and one of `main` does too early,
        # when its files have not come.
        if cached is None or cached.name != folder.name:
            with suppress(OSError):  # a cache that others may only read
                write_text(folder.parent.parent / "refs" / "main", folder.name)
    if cached is not None and cached.name != folder.name:
        warnings.warn(f"{name} is commit {folder.name} now; the cache had {cached.name}", stacklevel=2)
    return folder


def _refuse_part(folder: Path, name: str) -> None:
    """Raises a ValueError if a folder of the cache lacks configuration or weights, and warns if it may lack more.

    Which files belong to it only the hub knows.
    """
    names = sorted(path.name for path in folder.iterdir())
    try:
        config, _ = pair_in(names, name)
    except ValueError as error:
        raise ValueError(f"the hub can't be asked, and of it the cache has only {some(names)}") from error
    is_hf = config == CONFIG_FILE and "model_type" in json.loads((folder / config).read_bytes())
    if is_hf and not any(each.endswith("processor_config.json") for each in names):
        warnings.warn(
            f"the cache has no preprocessor_config.json of {name}, and the hub can't be asked for one: pictures are "
            "prepared as OpenAI's code does it",
            stacklevel=3,
        )


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"{name!r} can't be had without its owner's leave: ask on its page, and {login}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{name!r} can't be had: the name is wrong, or it is private; then {login}") from error
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no model: a name is hf-hub:owner/name, without a revision or a file") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r} can't be had: the token has letters that no token has; {login}") from error
    except Exception as error:  # the hub's errors, and those of the library that it talks through
        raise ValueError(
            f"{name!r} can't be had: {_first_line(error)}. Without a network, copy the model's folder here and give "
            "its path"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def download(url: str, path: Path, sha256: str) -> Path:
    """Fetches a file once, however many processes want it.

    Raises:
        ValueError: the connection keeps failing (what has come is kept for the next try), or the checksum is wrong.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    with locked(path.with_name(f".{path.name}.lock"), f"another process is fetching {url}"):
        if path.is_file():  # another process was faster
            return path
        try:
            with _progress_bar(path.name) as progress:
                problem = cache.download(url, partial, sha256=sha256, progress=progress)
        except NotKeptError:
            raise
        except ValueError as error:
            if not partial.stat().st_size:
                partial.unlink()
            raise ValueError(f"{error}. Without a network, put that file at {path}") from error
        if problem:
            raise ValueError(f"{url} has {problem}; it was thrown away")
        os.replace(partial, path)
    return path


@contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar of bytes and remaining time on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
