"""The two trainers that time_to_quality.py compares, the batches that both see, and their common evaluation."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.loss import ClipLoss
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from PIL import Image
from torch import Tensor

import miniclip
from miniclip.config import CLIPConfig
from miniclip.data.augmentation import Augmentation
from miniclip.data.pairs import Batch, CaptionChoice, PairDataset, collate
from miniclip.data.sampling.order import SampleOrder
from miniclip.data.shards import Shards
from miniclip.evaluation.datasets.open import open_dataset
from miniclip.evaluation.measures.ranking import recall_at_1
from miniclip.evaluation.zero_shot import zero_shot_classifier
from miniclip.images import normalize
from miniclip.training.optimizer import OptimizerConfig, learning_rate_factor, make_optimizer, warmup_steps
from miniclip.training.step import MAX_LOGIT_SCALE, CLIPTraining, move_average
from miniclip.weights.layouts import from_openai_keys

EVALUATIONS = 12  # of a run


class Batches:
    """The batches of a run, read from shards; both sides see the same batch n."""

    def __init__(self, folder: Path, clip: CLIPConfig, augmentation: Augmentation, size: int, seed: int) -> None:
        shards = Shards(folder / "shards")
        self.pairs = PairDataset(
            shards, clip.vision.image_size, clip.text.context_length, augmentation, CaptionChoice(), seed
        )
        self.order, self.size = SampleOrder(shards.counts, seed), size

    def __getitem__(self, n: int) -> Batch:
        return collate([self.pairs[place] for place in self.order.slice(n * self.size, (n + 1) * self.size)])


class Examination:
    """Scores a model on a table of labelled pictures: top-1, and retrieval if every picture has a caption beside it."""

    def __init__(self, table: Path, preprocess: Any) -> None:
        self.data: Any = open_dataset(str(table))
        with open(table, encoding="utf-8") as file:
            paths = [table.parent / line.split(",")[0] for line in file.read().splitlines()[1:]]
        self.images = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])  # (N, 3, R, R)
        texts = [path.with_suffix(".txt") for path in paths]
        is_captioned = all(path.is_file() for path in texts)
        self.captions = [path.read_text().splitlines()[0] for path in texts] if is_captioned else []

    @torch.no_grad()
    def __call__(self, model: miniclip.CLIP) -> dict[str, float]:
        model.eval()
        features = torch.cat([model.encode_image(part, normalize=True) for part in self.images.split(256)])
        classifier = zero_shot_classifier(model, self.data.classnames, self.data.templates)
        guesses = (features @ classifier).argmax(dim=1)
        found = {"top1": 100 * (guesses == torch.tensor(self.data.labels)).double().mean().item()}
        if self.captions:
            tokens = miniclip.tokenize(self.captions, model.context_length)
            texts = torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(256)])
            found["r1"] = 50 * (recall_at_1(features, texts) + recall_at_1(texts, features))
        return found


class Clock:
    """Adds up processor and wall-clock seconds of `with` blocks; blocks within `paused` do not count."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    def __enter__(self) -> None:
        self.cpu_s -= time.process_time()
        self.wall_s -= time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.cpu_s += time.process_time()
        self.wall_s += time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.__exit__()
        yield
        self.__enter__()


class Stretch:
    """The batches between two evaluations, in the form of open_clip's loop; making them stops the clock."""

    def __init__(self, batches: Batches, first: int, count: int, clip: CLIPConfig, clock: Clock) -> None:
        self.batches, self.first, self.num_batches, self.clip, self.clock = batches, first, count, clip, clock
        self.num_samples = count * batches.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for n in range(self.first, self.first + self.num_batches):
            with self.clock.paused():
                batch = self.batches[n]
                vision = self.clip.vision
                images = normalize(batch.images, vision.mean, vision.std)
                tokens = torch.zeros(len(images), self.clip.text.context_length, dtype=torch.long)
                tokens[:, : batch.tokens.shape[1]] = batch.tokens
            yield images, tokens


@dataclass(frozen=True)
class Point:
    """An evaluation of a run: when it was, and the validation score in %."""

    step: int
    samples: int
    cpu_s: float
    wall_s: float
    val: float


class Course:
    """The validation scores of a run, and two sets of weights: the best, and the first to reach `target`."""

    def __init__(self, exam: Examination, target: float = math.inf) -> None:
        self.exam, self.target = exam, target
        self.points: list[Point] = []
        self.kept: dict[str, dict[str, Tensor]] = {}

    def note(self, step: int, batch_size: int, clock: Clock, model: miniclip.CLIP) -> None:
        val = self.exam(model)["top1"]
        if val > max((point.val for point in self.points), default=-1.0):
            self.kept["best"] = copy.deepcopy(model.state_dict())
        if val >= self.target and "reached" not in self.kept:
            self.kept["reached"] = copy.deepcopy(model.state_dict())
        self.points.append(Point(step, step * batch_size, clock.cpu_s, clock.wall_s, val))


def stretches(steps: int) -> list[tuple[int, int]]:
    """(first step, number of steps) before each evaluation."""
    ends = sorted({round(steps * (n + 1) / EVALUATIONS) for n in range(EVALUATIONS)} - {0})
    return [(first, last - first) for first, last in zip([0, *ends], ends, strict=False)]


class Side(NamedTuple):
    """A trainer. advance(first step, steps) trains; scored() is the model so far; clock runs while it trains."""

    advance: Callable[[int, int], None]
    scored: Callable[[], miniclip.CLIP]
    clock: Clock


def open_clip_side(clip: CLIPConfig, batches: Batches, steps: int, rate: float, warmup: float, seed: int) -> Side:
    torch.manual_seed(seed)
    vision, text = clip.vision, clip.text
    model = open_clip.model.CLIP(
        clip.embed_dim,
        open_clip.model.CLIPVisionCfg(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            width=vision.width,
            layers=vision.layers,
            head_width=vision.head_width,
        ),
        open_clip.model.CLIPTextCfg(
            context_length=text.context_length,
            width=text.width,
            layers=text.layers,
            heads=text.width // text.head_width,
        ),
        output_dict=True,
    )
    # Its main.py does not decay gains, biases and the logit scale.
    spared = [p.ndim < 2 or any(part in n for part in ("bn", "ln", "bias")) for n, p in model.named_parameters()]
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p, is_spared in zip(parameters, spared, strict=True) if is_spared], "weight_decay": 0.0},
        {"params": [p for p, is_spared in zip(parameters, spared, strict=True) if not is_spared], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6)
    schedule = cosine_lr(optimizer, rate, round(warmup * steps), steps)
    settings = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False, grad_clip_norm=None,
        rank=0, world_size=1, log_every_n_steps=10**9, batch_size=batches.size, wandb=False,
    )  # fmt: skip
    same = miniclip.CLIP(clip)  # for the evaluation
    clock = Clock()

    def advance(first: int, count: int) -> None:
        stretch = Stretch(batches, first, count, clip, clock)
        data = {"train": SimpleNamespace(dataloader=stretch, set_epoch=lambda epoch: None)}
        with clock:
            # Each stretch is an epoch of its loop, which counts steps from 0.
            train_one_epoch(
                model, data, ClipLoss(), 0, optimizer, None, lambda step: schedule(first + step), None, settings
            )

    def scored() -> miniclip.CLIP:
        same.load_state_dict(from_openai_keys(model.state_dict()))
        return same

    return Side(advance, scored, clock)


def our_side(clip: CLIPConfig, batches: Batches, steps: int, recipe: dict[str, Any], seed: int) -> Side:
    """recipe: arguments of CLIPTraining, with `optimizer`, as in a configuration."""
    torch.manual_seed(seed)
    config = OptimizerConfig(**recipe.get("optimizer", {}))
    module = CLIPTraining(clip, config, **{name: value for name, value in recipe.items() if name != "optimizer"})
    optimizer = make_optimizer(module.clip, config)
    warmup = warmup_steps(config, steps, batches.size, max(1, batches.order.num_samples // batches.size))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, steps, warmup, config.schedule, config.cooldown, config.final_lr),
    )
    clock = Clock()

    def advance(first: int, count: int) -> None:
        module.train()
        for n in range(first, first + count):
            batch = batches[n]
            with clock:
                groups = batch.caption_ids if module.positives == "caption" else None
                loss = miniclip.clip_loss(*module.features(batch), module.clip.logit_scale.exp(), groups=groups)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    module.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
                if module.average is not None and module.ema_decay is not None:
                    move_average(module.average, module.clip, min(module.ema_decay, (1 + n) / (10 + n)))

    return Side(advance, lambda: module.scored, clock)


def train(side: Side, course: Course, steps: int, batch_size: int) -> None:
    for first, count in stretches(steps):
        side.advance(first, count)
        course.note(first + count, batch_size, side.clock, side.scored())


def costs_in_turns(sides: list[Side], rounds: int) -> list[float]:
    """Each side's median processor seconds a step. They take turns, so that a busy machine slows both alike."""
    times: list[list[float]] = [[] for _ in sides]
    for n in range(rounds + 1):
        for side, seconds in zip(sides, times, strict=True):
            before = side.clock.cpu_s
            side.advance(n, 1)
            seconds.append(side.clock.cpu_s - before)
    return [statistics.median(seconds[1:]) for seconds in times]  # the first includes one-time costs
