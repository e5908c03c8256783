"""Callbacks for prompts: one keeps the wordings of the captions, one scores a run by zero-shot classification."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ..common.processes import all_gather_objects, warn_once
from ..common.storage import is_url
from ..data.pairs import Batch
from ..data.wordings.kept import Wordings
from ..data.wordings.mine import NUM_CAPTIONS, mine
from ..data.wordings.units import units_of_tokens
from ..evaluation.datasets.open import open_dataset
from ..evaluation.datasets.sets import LabelledImages, labelled
from ..evaluation.prompts import DefaultTemplates, class_prompts, suited
from ..evaluation.zero_shot import told_of_same_names, zero_shot_scores
from ..model import CLIP
from ..tokenizer import END_OF_TEXT
from ..weights.load import preprocess_for
from .progress import scores_line
from .step import CLIPTraining


class CaptionWordings(Callback):
    """Finds the wordings of the captions in the first steps, and gives them to the model, which keeps them.

    The order is random, so the first captions are a sample of all; what is read are the texts of the batches, so
    nothing is read twice. All processes share theirs and find the same, in the order in which one would read them.

    What is found depends on the captions so far alone, whenever it was looked for. Checkpoints hold them until there
    are enough; they leave with nothing that is made of a checkpoint.
    """

    def __init__(self) -> None:
        self._own: list[list[list[int]]] = []  # of this process's steps that are not shared yet: token ids
        self._captions: list[list[int]] = []  # of all processes and the steps before, without start and end
        self._num_steps = self._num_looked_at = 0
        self._is_done = False
        self._before: Wordings | None = None  # which the model has as long as none are found
        self._num_before = 0  # captions that those are of, in a checkpoint that holds none
        self._is_loaded = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CLIPTraining)
        if not self._is_loaded:
            self._before = pl_module.clip.wordings

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self._is_done:
            return
        self._own.append(_whole_texts(batch, trainer.datamodule.context_length))  # type: ignore[attr-defined]
        self._num_steps += 1
        if self._num_steps * trainer.datamodule.batch_size >= NUM_CAPTIONS:  # type: ignore[attr-defined]
            self._tell(trainer, pl_module)
            self._is_done, self._captions = True, []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._find(pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._find(module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._is_done:
            self._tell(trainer, pl_module)

    def _tell(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        found = self._find(module)
        if trainer.is_global_zero:
            print(f"Wordings of the captions: {found or _NONE_FOUND}", flush=True)

    def _find(self, module: pl.LightningModule) -> Wordings | None:
        """Of the captions so far; a collective of all processes."""
        assert isinstance(module, CLIPTraining)
        if not self._is_done and self._num_steps > self._num_looked_at:
            self._num_looked_at = self._num_steps
            self._share()
            found = mine([units_of_tokens(each) for each in self._captions])
            if found is None or found.num_captions < self._num_before:
                found = self._before
            module.keep_wordings(found)
        return module.clip.wordings

    def _share(self) -> None:
        """Joins the captions of all processes, step by step; a collective of them."""
        for step in zip(*all_gather_objects(self._own), strict=True):
            self._captions += [caption for own in step for caption in own]
        self._own = []
        del self._captions[NUM_CAPTIONS:]  # of images with several

    def state_dict(self) -> dict[str, Any]:
        if not self._is_done:
            self._share()
        before = None if self._before is None else self._before.to_json()
        state = {"is_done": self._is_done, "num_found_in": self._num_before, "before": before}
        return {**state, "num_steps": self._num_steps, "captions": self._captions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._is_done, self._num_before = state_dict["is_done"], state_dict["num_found_in"]
        if "captions" not in state_dict:  # of an earlier version, which goes on with later captions
            return
        before = state_dict["before"]
        self._before = None if before is None else Wordings.from_json(before, "the checkpoint")
        self._num_steps, self._captions = state_dict["num_steps"], list(state_dict["captions"])
        self._is_loaded = True


_NONE_FOUND = "none in common, so `miniclip eval` asks with 'a photo of a {}.'"


def _whole_texts(batch: Batch, context_length: int) -> list[list[int]]:
    """The ids of the captions, but of those that were cut or belong to a sample that could not be read."""
    rows = batch.tokens.tolist()
    is_read = [True] * len(rows) if batch.mask is None else batch.mask.tolist()
    texts = [row[1 : row.index(END_OF_TEXT)] for row in rows]
    return [text for text, is_there in zip(texts, is_read, strict=True) if is_there and len(text) + 2 < context_length]


class ZeroShotEvaluation(Callback):
    """Logs the zero-shot accuracy on labelled images, `val/zero_shot_acc1`, at each validation.

    A run that starts from a trained model is scored before its first step, too, and prints both scores at its end.

    Args:
        data: labelled images, as `miniclip eval --data` takes them.
        templates: name of a template set, or a file; by default the data's own.
        batch_size: images per step.
        others: NAME -> more labelled images with their own prompts, logged as `val/zero_shot_acc1_NAME`: what a
            fine-tuned model should not forget.
    """

    def __init__(
        self, data: str, templates: str | None = None, batch_size: int = 256, others: dict[str, str] | None = None
    ) -> None:
        self.data, self.templates, self.batch_size, self.others = data, templates, batch_size, others or {}
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.scored_data: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """Of what it logs."""
        return ["val/zero_shot_acc1", *(f"val/zero_shot_acc1_{name}" for name in self.others)]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        datasets = [open_dataset(self.data, templates=self.templates), *map(open_dataset, self.others.values())]
        self.datasets = dict(zip(self.names, map(labelled, datasets), strict=True))
        if stage == "fit":  # the first process's
            asked = self.datasets if trainer.is_global_zero else {}
            own = {name: _labelled_digest(data) for name, data in asked.items()}
            self.scored_data = all_gather_objects(own)[0]

    def _score(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        model = pl_module.scored
        assert isinstance(model, CLIP)
        preprocess = preprocess_for(model.config)
        accuracies = {}
        for name, dataset in self.datasets.items():
            asked = suited(dataset, model.wordings)
            # As in validation, also before the first step. What FSDP2 gathers in half precision needs autocast.
            is_sliced = pl_module.device_mesh is not None
            precision = trainer.precision_plugin.forward_context() if is_sliced else nullcontext()
            with torch.compiler.set_stance("force_eager"), precision:
                scores = zero_shot_scores(
                    model, preprocess, asked, batch_size=self.batch_size, num_workers=num_decoders(trainer)
                )
            for sentence in told_of_same_names(scores.same_prompts):
                warn_once(f"{name}: {sentence}", stacklevel=2)
            accuracies[name] = float(scores.is_right.mean())
        return accuracies

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step or not getattr(pl_module, "starts_trained", False):
            return
        self.before = self._score(trainer, pl_module)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(self.before, step=-1)  # the first step is 0
            print(f"before training: {scores_line(self.before)}", flush=True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after = self._score(trainer, pl_module)
        pl_module.log_dict(dict(self.after), sync_dist=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.before and self.after and trainer.is_global_zero:
            changes = [f"{name} {self.before[name]:.3f} → {self.after[name]:.3f}" for name in self.datasets]
            print(f"from before training to the last validation: {'  '.join(changes)}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = state_dict["before"], state_dict["after"]


def _labelled_digest(data: LabelledImages) -> str:
    """Changes with the images' names, sizes, labels or prompts; not with the folder that they lie in or their times,
    which are others on another machine, and not with the prompts that nobody chose, which follow the model."""
    is_default = isinstance(data.templates, DefaultTemplates)
    prompts = [] if is_default else [class_prompts(data.templates, name) for name in data.classnames]
    keys = [data.shown(index).split("/") for index in range(len(data))]
    at_each_depth = enumerate(zip(*(key[:-1] for key in keys), strict=False))
    shared = next((depth for depth, parts in at_each_depth if len(set(parts)) > 1), min(map(len, keys)) - 1)
    names = ["/".join(key[shared:]) for key in keys]
    sizes = [_bytes_of_image(image) for image in data.images] if isinstance(data.images, list | tuple) else None
    facts = [names, sizes, [int(label) for label in data.labels], data.classnames, prompts, data.upright]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _bytes_of_image(image: Any) -> int | None:
    """Bytes of a file that lies here or in memory."""
    if isinstance(image, bytes):
        return len(image)
    if not isinstance(image, str | Path) or is_url(str(image)):
        return None
    with suppress(OSError):
        return Path(image).stat().st_size
    return None


def num_decoders(trainer: pl.Trainer) -> int:
    """Processes that decode images to score: as many as for training where a GPU would wait for them. On a CPU they
    would take the cores from the model."""
    if trainer.strategy.root_device.type == "cpu":
        return 0
    return int(getattr(trainer.datamodule, "num_workers", 0))  # type: ignore[attr-defined]
