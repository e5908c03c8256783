"""Weights from elsewhere: OpenAI's nine models by name, and `hf-hub:owner/name`.

A download is written beside its target under a temporary name, goes on where it broke, is checked against its checksum
once, and only then gets its name. So what has its name is whole, and is not hashed again.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import urllib.request
from pathlib import Path

from filelock import FileLock

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
_BLOCK_BYTES = 1 << 20
_MOST_TRIES = 6
_TIMEOUT_S = 30


def cache_folder(download_root: str | Path | None = None) -> Path:
    """Where OpenAI's files are kept: `download_root`, else `clip` below the user's cache (XDG_CACHE_HOME, ~/.cache)."""
    if download_root is not None:
        return Path(download_root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clip"


def fetch_openai(name: str, download_root: str | Path | None = None) -> Path:
    """The file of one of OpenAI's models, downloaded if it is not there yet.

    Raises:
        ValueError: it can't be had; says which file to put where.
    """
    checksum, file = OPENAI_FILES[name].split("/")
    return download(f"{OPENAI_BASE_URL}/{checksum}/{file}", cache_folder(download_root) / file, checksum)


def fetch_hub(name: str, download_root: str | Path | None = None) -> Path:
    """A model's folder in Hugging Face's cache, downloaded if it is not there yet.

    Raises:
        ValueError: the model can't be had.
    """
    from huggingface_hub import snapshot_download  # only this needs it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner = name.removeprefix(HUB_PREFIX)
    patterns = ["*.json", "*.safetensors", "*.bin", "*.txt"]
    try:
        try:  # what is there already needs no network
            return Path(
                snapshot_download(owner, allow_patterns=patterns, cache_dir=download_root, local_files_only=True)
            )
        except LocalEntryNotFoundError:
            ignored = ["*.h5", "*.msgpack", "*.onnx", "*training_args*"]
            return Path(
                snapshot_download(owner, allow_patterns=patterns, ignore_patterns=ignored, cache_dir=download_root)
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{name!r} can't be had: {reason}. Without a network, copy the model's folder here and give its path"
        ) from error


def download(url: str, path: Path, sha256: str) -> Path:
    """Fetches a file once, whatever the number of processes that want it.

    Raises:
        ValueError: the connection keeps failing (what has come is kept for the next try), or the checksum is wrong.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():  # another process was faster
            return path
        for attempt in range(_MOST_TRIES):
            try:
                _continue(url, partial)
                break
            except (OSError, urllib.error.URLError) as error:
                is_final = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410)
                if is_final or attempt == _MOST_TRIES - 1:
                    raise ValueError(
                        f"{url} can't be fetched: {error}. Without a network, put that file at {path}"
                    ) from error
                time.sleep(min(8.0, 0.25 * 2**attempt))
        with open(partial, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            partial.unlink()
            raise ValueError(f"{url} came with the checksum {found}, and {sha256} is expected; it was thrown away")
        os.replace(partial, path)
    return path


def _continue(url: str, partial: Path) -> None:
    """Appends what is missing of a file; raises ConnectionError if the connection ends before the file does."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing
            return
        raise
    with answer, open(partial, "ab" if answer.status == 206 else "wb") as file:
        have = have if answer.status == 206 else 0
        total = have + int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
        columns = (TextColumn(url.rsplit("/", 1)[-1]), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("", total=total, completed=have)
            while block := answer.read(_BLOCK_BYTES):
                file.write(block)
                bar.update(task, advance=len(block))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and partial.stat().st_size < total:
        raise ConnectionError(f"the connection ended after {partial.stat().st_size} of {total} bytes")
