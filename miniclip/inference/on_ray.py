"""One pass over images or texts by Ray's actors, on one machine or a cluster: some decode, some hold the model.

The rows are those of one process, in the same order. An actor that dies is started again, and does its batch again.
Every machine needs miniclip, the model, and the images under the same names (a shared disk, or URLs); only the process
that calls this writes.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..evaluation.datasets.sets import EvaluationSet
from ..evaluation.encoder import Encoder
from ..evaluation.features import EncodedBatch, encode_texts
from ..evaluation.other_libraries import open_model
from .sources import Texts

_CPUS_PER_DECODER = 8  # without GPUs: encoding an image takes about ten times as long as decoding it
_TEXTS_PER_BATCH = 1024


def encode_on_ray(
    encoder: Encoder, data: EvaluationSet | Texts, indices: Sequence[int], batch_size: int
) -> Iterator[EncodedBatch]:
    """One pass over some rows, in the order of `indices`.

    RAY_ADDRESS in the environment names a cluster; without it, and without one on this machine, one of this machine is
    started and ended. Each GPU gets an actor that holds the model; without GPUs, most CPUs do.

    Args:
        encoder: named so that `open_model` finds it on every machine.

    Raises:
        ValueError: Ray is not installed, or an actor meets what a single process would raise, or another model.
    """
    is_text = isinstance(data, Texts)
    size = _TEXTS_PER_BATCH if is_text else batch_size
    blocks = [np.array(indices[start : start + size]) for start in range(0, len(indices), size)]
    with _ray() as ray, _user_errors(ray):
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        each = 1 if cpus > 1 else 0.5
        num_decoders = max(1, cpus - gpus if gpus else cpus // _CPUS_PER_DECODER)
        num_encoders = gpus or max(1, cpus - (0 if is_text else num_decoders))
        shared, here = ray.put(data), os.getcwd()  # noqa: PTH109
        batches = ray.data.from_numpy(blocks)
        if not is_text:
            batches = _by_actors(ray, batches, _Decode, (shared, encoder.preprocess, here), num_decoders, num_cpus=each)
        model = encoder.name, encoder.text_fingerprint() if is_text else encoder.image_fingerprint(), here
        actor, facts = (_EncodeTexts, (shared, *model)) if is_text else (_EncodeImages, model)
        batches = _by_actors(ray, batches, actor, facts, num_encoders, num_cpus=each, num_gpus=1 if gpus else 0)
        for batch in batches.iter_batches(batch_size=None):
            problems = {int(i): str(why) for i, why in zip(batch["index"], batch["problem"], strict=True) if why}
            is_healthy = np.array([not why for why in batch["problem"]], dtype=bool)
            features = torch.from_numpy(np.array(batch["features"])[is_healthy])
            yield EncodedBatch(batch["index"][is_healthy], features, problems)


@contextmanager
def _ray() -> Iterator[Any]:
    """Ray with its library of data sets, connected to a cluster; one that is started here is ended here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"Ray is not installed: pip install 'miniclip[ray]' ({error})") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
        return
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _user_errors(ray: Any) -> Iterator[None]:
    """What a user can cause, as it would be in one process."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: Any = error
        while cause is not None and (isinstance(cause, ray.exceptions.RayError) or not isinstance(cause, ValueError)):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise ValueError(str(cause)) from error


def _by_actors(ray: Any, batches: Any, actor: type, facts: tuple[Any, ...], most: int, **resources: float) -> Any:
    compute = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
    return batches.map_batches(actor, batch_size=None, fn_constructor_args=facts, compute=compute, **resources)


# ---------------------------------------------------------------------------------------------------------------------
# What the actors do. A batch is a dictionary of arrays, of B rows each.


class _Decode:
    """Indices (`data`) -> pixels (B, …), and for those that can't be read a blank one and the reason."""

    def __init__(self, data: Any, preprocess: Any, folder: str) -> None:
        _work_in(folder)
        self.data, self.preprocess = _fetched(data), preprocess
        self.blank = preprocess(Image.new("RGB", (32, 32))).numpy()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        pixels, problems = [], []
        for index in batch["data"]:
            try:
                pixels.append(self.preprocess(self.data.open(int(index))).numpy())
                problems.append("")
            except ValueError as error:
                pixels.append(self.blank)
                problems.append(str(error) or "unreadable")
        return {"index": batch["data"], "pixels": np.stack(pixels), "problem": np.array(problems, dtype=object)}


class _EncodeImages:
    """Pixels -> features (B, E)."""

    def __init__(self, name: str, fingerprint: str | None, folder: str) -> None:
        self.encoder = _opened(name, folder)
        _refuse_other_model(name, fingerprint, self.encoder.image_fingerprint())

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        features = self.encoder.encode_image(torch.from_numpy(np.array(batch["pixels"])))
        return {"index": batch["index"], "problem": batch["problem"], "features": features.float().cpu().numpy()}


class _EncodeTexts:
    """Indices (`data`) -> features (B, E) of texts."""

    def __init__(self, data: Any, name: str, fingerprint: str | None, folder: str) -> None:
        self.data, self.encoder = _fetched(data), _opened(name, folder)
        _refuse_other_model(name, fingerprint, self.encoder.text_fingerprint())

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        texts = [self.data.texts[int(index)] for index in batch["data"]]
        features = encode_texts(self.encoder, texts, self.encoder.tokenize).cpu().numpy()
        return {"index": batch["data"], "problem": np.array([""] * len(texts), dtype=object), "features": features}


def _fetched(data: Any) -> Any:
    import ray

    return ray.get(data) if isinstance(data, ray.ObjectRef) else data


def _work_in(folder: str) -> None:
    """Relative paths are those of the process that calls, where its folder is there."""
    with suppress(OSError):
        os.chdir(folder)


def _opened(name: str, folder: str) -> Encoder:
    import ray

    _work_in(folder)
    return open_model(name, "cuda" if ray.get_gpu_ids() else "cpu")


def _refuse_other_model(name: str, expected: str | None, found: str | None) -> None:
    if expected != found:
        raise ValueError(
            f"{name} is another model, or read by another version of its library, on the machine {platform.node()}"
        )
