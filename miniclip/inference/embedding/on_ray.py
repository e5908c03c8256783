"""One pass over images or texts by Ray's actors, on one machine or a cluster: some decode, some hold the model.

The rows are those of one process, in the same order. An actor that dies is started again, and does its batch again.
Every machine needs miniclip, the model, and the images under the same names (a shared disk, or URLs); only the process
that calls this writes.
"""

from __future__ import annotations

import pickle
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...common.ray_cluster import Surroundings, by_actors, fetched, ray_cluster
from ...evaluation.datasets.sets import EvaluationSet
from ...evaluation.encoder import Encoder, ModelError
from ...evaluation.features import EncodedBatch, encode_texts
from ...evaluation.other_libraries import open_model
from ..sources import Texts

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
    with ray_cluster() as ray:
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        each = 1 if cpus > 1 else 0.5
        num_decoders = max(1, cpus - gpus if gpus else cpus // _CPUS_PER_DECODER)
        num_encoders = gpus or max(1, cpus - (0 if is_text else num_decoders))
        shared, here = ray.put(data), Surroundings.here()
        batches = ray.data.from_numpy(blocks)
        if not is_text:
            facts = shared, ray.cloudpickle.dumps(encoder.preprocess), here
            batches = by_actors(ray, batches, _Decode, facts, num_decoders, num_cpus=each)
        fingerprint = encoder.text_fingerprint() if is_text else encoder.image_fingerprint()
        model = OnActor(encoder.name, encoder.precision, is_text, fingerprint, here)
        actor, given = (_EncodeTexts, (shared, model)) if is_text else (_EncodeImages, (model,))
        batches = by_actors(ray, batches, actor, given, num_encoders, num_cpus=each, num_gpus=1 if gpus else 0)
        for batch in batches.iter_batches(batch_size=None):
            if error := batch["error"][0]:
                raise ValueError(error)
            problems = {int(i): str(why) for i, why in zip(batch["index"], batch["problem"], strict=True) if why}
            is_healthy = np.array([not why for why in batch["problem"]], dtype=bool)
            features = torch.from_numpy(np.array(batch["features"])[is_healthy])
            yield EncodedBatch(batch["index"][is_healthy], features, problems)


# ---------------------------------------------------------------------------------------------------------------------
# What the actors do. A batch is a dictionary of arrays, of B rows each.


@dataclass(frozen=True)
class OnActor:
    """A model that each actor opens for itself, when it is first used."""

    name: str
    precision: str
    is_text: bool
    fingerprint: str | None
    here: Surroundings

    @cached_property
    def encoder(self) -> Encoder:
        import ray

        self.here.enter()
        found = open_model(self.name, "cuda" if ray.get_gpu_ids() else "cpu", self.precision)
        if self.fingerprint != (found.text_fingerprint() if self.is_text else found.image_fingerprint()):
            raise ValueError(
                f"{self.name} is another model, or read by another version of its library, on {platform.node()}"
            )
        return found


class _Decode:
    """Indices (`data`) -> pixels (B, …), and for those that can't be read a blank one and the reason.

    What the code of a user's model raises is no image's fault: it is the whole batch's `error`.
    """

    def __init__(self, data: Any, preprocess: bytes, here: Surroundings) -> None:
        here.enter()
        self.data, self.preprocess = fetched(data), pickle.loads(preprocess)

    @cached_property
    def blank(self) -> np.ndarray:
        return self.preprocess(Image.new("RGB", (32, 32))).numpy()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        B, error = len(batch["data"]), ""
        try:
            pixels, problems = zip(*map(self._pixels, batch["data"]), strict=True)
        except ModelError as found:
            pixels, problems, error = (np.zeros((3, 1, 1), np.float32),) * B, ("",) * B, str(found)
        problem = np.array(problems, dtype=object)
        return {"index": batch["data"], "pixels": np.stack(pixels), "problem": problem, "error": np.array([error] * B)}

    def _pixels(self, index: np.integer) -> tuple[np.ndarray, str]:
        try:
            return self.preprocess(self.data.open(int(index))).numpy(), ""
        except ModelError:
            raise
        except ValueError as error:
            return self.blank, str(error) or "unreadable"


class _EncodeImages:
    """Pixels -> features (B, E)."""

    def __init__(self, model: OnActor) -> None:
        self.model = model

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        images = torch.from_numpy(np.array(batch["pixels"]))
        error = str(batch["error"][0])
        return _encoded(batch["index"], batch["problem"], lambda: self.model.encoder.encode_image(images), error)


class _EncodeTexts:
    """Indices (`data`) -> features (B, E) of texts."""

    def __init__(self, data: Any, model: OnActor) -> None:
        self.data, self.model = fetched(data), model

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        texts = [self.data.texts[int(index)] for index in batch["data"]]
        problems = np.array([""] * len(texts), dtype=object)
        return _encoded(
            batch["data"], problems, lambda: encode_texts(self.model.encoder, texts, self.model.encoder.tokenize)
        )


def _encoded(
    indices: np.ndarray, problems: np.ndarray, encode: Callable[[], Tensor], error: str = ""
) -> dict[str, Any]:
    """A batch of features. A user's error is returned, as Ray makes a long report of one that is raised.

    Args:
        error: of the step before; nothing is encoded then.
    """
    features = np.zeros((len(indices), 1), np.float32)
    try:
        if not error:
            features = encode().float().cpu().numpy()
    except ValueError as found:
        error = str(found)
    return {"index": indices, "problem": problems, "features": features, "error": np.array([error] * len(indices))}
