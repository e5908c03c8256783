"""Cases of training: steps, losses, GradCache, the input pipeline, and whole epochs."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import open_clip_train.data
import peers
import samples
import torch
import torch.nn.functional as F
from contenders import LIMIT, OURS
from harness import Case, Job, process
from machine import vendor_name
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.transform import image_transform
from torch import Tensor
from webdataset.tariterators import tar_file_expander

import miniclip
from miniclip.commands import train as trainer
from miniclip.config import CLIPConfig
from miniclip.data.augmentation import decode_rgb
from miniclip.data.module import PairDataModule
from miniclip.data.pairs import Batch, Sample, collate
from miniclip.images import normalize
from miniclip.tokenizer import encode_for_model
from miniclip.training.optimizer import OptimizerConfig, make_optimizer
from miniclip.training.step import CLIPTraining
from miniclip.weights.layouts import from_openai_keys

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ADAMW = OptimizerConfig(lr=1e-9)  # a rate so small that all contenders' weights stay alike
_BYTES_OF_ADAMW = 28  # a parameter: it reads weight, gradient and two averages, and writes weight and averages


def cases(size: str, folder: Path) -> list[Case]:
    """size: "full", "quick" or "tiny". folder: where what they read is made when first needed."""
    counts = {"full": (64, 32, 16), "quick": (32, 4, 4), "tiny": (4, 4, 4)}[size]
    is_full = size == "full"  # each measurement of memory is a process with seconds of imports
    wanted = (
        (3.0, 2.8) if vendor_name() == "AMD" else (2.1, 1.8)
    )  # on AMD open_clip's products go to the slower library
    small, b32, rn50 = (peers.architecture(name, size) for name in ("small", "ViT-B/32", "RN50"))
    return [
        step(
            "train-small",
            "training step, small ViT",
            small,
            counts[0],
            folder,
            wanted[0],
            memory_target=0.75 if is_full else None,
        ),
        step(
            "train-b32",
            "training step, ViT-B/32",
            b32,
            counts[1],
            folder,
            wanted[1],
            memory_target=0.75 if is_full else None,
        ),
        step("train-rn50", "training step, RN50", rn50, counts[2], folder, measures_memory=is_full),
        step(
            "train-small-checkpointed",
            "training step, small ViT, activation checkpointing",
            small,
            counts[0],
            folder,
            measures_memory=is_full,
            checkpoints=True,
        ),
        step(
            "train-small-dropout", "training step, small ViT, half the patches", small, counts[0], folder, dropout=0.5
        ),
        *losses(size),
        gradcache(size, small, folder),
        *(pipeline(side, size, folder) for side in ((512, 256) if size != "tiny" else (64,))),
        epochs(size, small, folder),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# One step


def our_step(
    config: CLIPConfig,
    folder: Path,
    texts: list[str],
    micro_batch_size: int | None = None,
    where: torch.device = CPU,
    precision: torch.dtype = torch.float32,
    **options: Any,
) -> Job:
    module = CLIPTraining(config, ADAMW, micro_batch_size=micro_batch_size, **options)
    module.clip.load_state_dict(peers.state(config, folder))
    module.train().to(where)
    optimizer = make_optimizer(module.clip, ADAMW)
    batch = our_batch(config, texts, where)

    def loss_and_gradient() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(where.type, torch.bfloat16, enabled=precision != torch.float32):
            scale = module.clip.logit_scale.exp()
            loss = miniclip.clip_loss(*module.features(batch), scale, chunk_size=min(1024, len(texts)))
        loss.backward()
        return loss.detach()

    def run() -> None:
        loss_and_gradient()
        optimizer.step()
        wait_for(where)

    def result() -> Any:
        module.clip.load_state_dict(peers.state(config, folder))
        module.double()
        return _outcome(loss_and_gradient(), dict(module.clip.named_parameters()))

    return Job(run, result=result)


def our_batch(config: CLIPConfig, texts: list[str], where: torch.device = CPU) -> Batch:
    no_image = torch.empty(3, 0, 0, dtype=torch.uint8)  # the pixels are drawn where they are needed
    batch = collate([Sample(no_image, [encode_for_model(text)], "") for text in texts])
    return batch._replace(images=pixels(config, len(texts), where), tokens=batch.tokens.to(where))


def their_step(
    config: CLIPConfig,
    folder: Path,
    texts: list[str],
    parts: int = 1,
    where: torch.device = CPU,
    precision: torch.dtype = torch.float32,
    checkpoints: bool = False,
    dropout: float = 0.0,
    compiles: bool = False,
) -> Job:
    """A step as open_clip's train_one_epoch makes it; `parts` is --accum-freq."""
    model = peers.openclips(config, folder, force_patch_dropout=dropout or None).train().to(where)
    model.set_grad_checkpointing(checkpoints)
    images = normalize(pixels(config, len(texts), where), config.vision.mean, config.vision.std)
    tokens = open_clip.get_tokenizer("ViT-B-32")(texts).to(where)
    optimizer, loss_of, call = their_optimizer(model), ClipLoss(), torch.compile(model) if compiles else model
    autocast = partial(torch.autocast, where.type, torch.bfloat16, enabled=precision != torch.float32)

    def loss_and_gradient() -> Tensor:
        optimizer.zero_grad()
        if parts == 1:
            with autocast():
                loss = loss_of(*call(images.to(model.logit_scale.dtype), tokens))
            loss.backward()
            return loss.detach()
        batches = list(zip(images.to(model.logit_scale.dtype).chunk(parts), tokens.chunk(parts), strict=True))
        with torch.no_grad(), autocast():
            known = [call(*batch)[:2] for batch in batches]
        for number, batch in enumerate(batches):
            with autocast():
                *features, scale = call(*batch)
                whole = [
                    torch.cat([one[side] if n != number else features[side] for n, one in enumerate(known)])
                    for side in (0, 1)
                ]
                loss = loss_of(*whole, scale)
            loss.backward()
        return loss.detach()

    def run() -> None:
        loss_and_gradient()
        optimizer.step()
        wait_for(where)

    def result() -> Any:
        model.load_state_dict(peers.openclips(config, folder).state_dict())
        model.double()
        return _outcome(loss_and_gradient(), from_openai_keys(dict(model.named_parameters())))

    return Job(run, result=result)


def wait_for(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def their_optimizer(model: Any, config: OptimizerConfig = ADAMW) -> torch.optim.Optimizer:
    """open_clip's parameter groups with our AdamW: one kernel, which its own trainer does not ask for."""
    decays = {name: p.ndim >= 2 and not any(part in name for part in ("bn", "ln", "bias")) for name, p in _named(model)}
    groups = [
        {"params": [p for name, p in _named(model) if not decays[name]], "weight_decay": 0.0},
        {"params": [p for name, p in _named(model) if decays[name]], "weight_decay": config.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _named(model: Any) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


def pixels(config: CLIPConfig, count: int, where: torch.device = CPU) -> Tensor:
    """Random pixels; every run on the same kind of device draws the same."""
    side, random = config.vision.image_size, torch.Generator(where).manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=where, generator=random)


def _outcome(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and the whole gradient at the initial weights, in float64.

    In float32, batch norm over a few images turns last bits into percents. After steps whose last bits differ, a block
    that started at 0 has other signs, so that ReLU, which still sees zeros, passes other gradients. The gradient of the
    scale is left out, because open_clip multiplies it when it accumulates.
    """
    gradients = [parameters[name].grad for name in sorted(parameters) if name != "logit_scale"]
    return {"loss": loss, "gradient": torch.cat([g.flatten() for g in gradients if g is not None])}


def step(
    name: str,
    title: str,
    config: CLIPConfig,
    count: int,
    folder: Path,
    target: float | None = None,
    memory_target: float | None = None,
    measures_memory: bool = False,
    checkpoints: bool = False,
    dropout: float = 0.0,
) -> Case:
    texts = samples.captions(count)

    def drawn(job: Job) -> Job:
        return job._replace(result=lambda: None) if dropout else job  # each draws its own patches

    def ours() -> Job:
        return drawn(our_step(config, folder, texts, checkpoint_activations=checkpoints, patch_dropout=dropout))

    def theirs() -> Job:
        return drawn(their_step(config, folder, texts, checkpoints=checkpoints, dropout=dropout))

    return Case(
        name,
        f"{title}, batch {count}",
        {OURS: ours, "open_clip": theirs},
        targets={"open_clip": target} if target else {},
        memory_target=memory_target,
        measures_memory=measures_memory,
        bytes_moved=_BYTES_OF_ADAMW * _num_parameters(config),
        note="captions as long as those of Conceptual Captions, 11 words on average; losses and gradients agree"
        if name == "train-small"
        else "",
    )


def _num_parameters(config: CLIPConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in miniclip.CLIP(config).parameters())


def gradcache(size: str, config: CLIPConfig, folder: Path) -> Case:
    count, micro = {"full": (512, 64), "quick": (32, 8), "tiny": (8, 2)}[size]
    texts = samples.captions(count)
    return Case(
        "gradcache",
        f"training step, small ViT, batch {count} in parts of {micro}",
        {
            OURS: partial(our_step, config, folder, texts, micro),
            "open_clip": partial(their_step, config, folder, texts, count // micro),
        },
        measures_memory=size == "full",
        bytes_moved=_BYTES_OF_ADAMW * _num_parameters(config),
        is_slow=True,
        note="open_clip's --accum-freq; its gradient of the scale, which is not compared, is as many times too large "
        "as there are parts",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The loss alone


def losses(size: str) -> list[Case]:
    count, width = {"full": (16384, 512), "quick": (2048, 512), "tiny": (16, 8)}[size]

    def features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(0)
        images, texts = (F.normalize(torch.randn(count, width, generator=random), dim=-1) for _ in range(2))
        return images, texts, torch.tensor(30.0), torch.tensor(-10.0)

    def job(loss: Callable[..., Tensor]) -> Job:
        inputs = [tensor.requires_grad_() for tensor in features()]

        def run() -> dict[str, Tensor]:
            for tensor in inputs:
                tensor.grad = None
            value = loss(*inputs)
            value.backward()
            gradients = {str(n): tensor.grad for n, tensor in enumerate(inputs) if tensor.grad is not None}
            return {"loss": value.detach(), **gradients}

        return Job(run)

    chunk = min(512, count // 4)
    sides: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "clip": (
            lambda i, t, s, b, **more: miniclip.clip_loss(i, t, s, **more),
            lambda i, t, s, b: ClipLoss()(i, t, s),
        ),
        "siglip": (lambda i, t, s, b, **more: miniclip.siglip_loss(i, t, s, b, **more), SigLipLoss()),
    }
    found = []
    for name, (ours, theirs) in sides.items():
        for chunk_size in (chunk, None):
            how = f"in slices of {chunk_size}" if chunk_size else "the whole matrix at once"
            found.append(
                Case(
                    f"loss-{name}" if chunk_size else f"loss-{name}-whole",
                    f"{name} loss, {count:,} pairs of width {width}, {how}",
                    {
                        OURS: partial(job, partial(ours, chunk_size=chunk_size)),
                        "open_clip": partial(job, theirs),
                    },
                    measures_memory=size == "full",
                    is_slow=size == "full",
                )
            )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Data


def open_clips_data(shards: Path, count: int, batch_size: int, image_size: int, workers: int) -> Any:
    settings = SimpleNamespace(
        train_data=_braces(shards),
        train_num_samples=count,
        train_data_upsampling_factors=None,
        batch_size=batch_size,
        workers=workers,
        world_size=1,
        seed=0,
    )
    # webdataset from 0.2.100 on marks the end of each tar, which open_clip, written for 0.2.86, does not expect.
    open_clip_train.data.tar_file_expander = partial(tar_file_expander, eof_value=None)
    transform = image_transform(image_size, is_train=True)
    return open_clip_train.data.get_wds_dataset(
        settings, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32")
    )


def _braces(shards: Path) -> str:
    """All shards of a folder as one pattern, for open_clip."""
    names = sorted(path.stem for path in shards.glob("*.tar"))
    return str(shards / f"{{{names[0]}..{names[-1]}}}.tar")


def pipeline(side: int, size: str, folder: Path) -> Case:
    """From shards to batches of 224 pixels, as each library feeds its trainer: in this process, with one thread."""
    count, batch_size, image_size = {"full": (256, 64, 224), "quick": (64, 32, 224), "tiny": (8, 4, 32)}[size]

    def loader() -> Any:
        shards = samples.shards(folder, count, side)
        data = PairDataModule(str(shards), batch_size=batch_size, num_workers=0, image_size=image_size)
        place = SimpleNamespace(root_device=CPU)
        # The parts of a trainer that a batch asks for.
        data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1, strategy=place)
        data.setup("fit")
        return data.train_dataloader()

    def ours() -> Job:
        batches = loader()
        mean, std = peers.SMALL.vision.mean, peers.SMALL.vision.std

        def normalised(batch: Batch) -> int:
            return len(normalize(batch.images, mean, std))

        return Job(lambda: sum(map(normalised, batches)))

    def theirs() -> Job:
        batches = open_clips_data(samples.shards(folder, count, side), count, batch_size, image_size, 0).dataloader
        return Job(lambda: sum(len(images) for images, _ in batches))

    def decoding() -> Job:
        """Decodes at the smallest size from which a crop of nine tenths can be resized."""
        shards = loader().dataset.shards
        shrink = next(s for s in (4, 2, 1) if 0.9 * side >= s * image_size or s == 1)
        encoded = [shards[number].image for number in range(count)]
        return Job(lambda: [decode_rgb(image, shrink) for image in encoded] and None)

    return Case(
        f"pipeline-{side}",
        f"input pipeline, {count} JPEGs of {side}² to normalised batches of {image_size}², one core",
        {OURS: ours, "open_clip": theirs, LIMIT: decoding},
        targets={"open_clip": 3.2} if side == 512 else {},
        threads=1,
        note="open_clip's default augmentation on both sides, each drawing its own crops; miniclip's trainer "
        "normalises on the device, here it is done on the core as well; the limit is decoding alone",
    )


_OPEN_CLIPS_TRAINER = """
import sys
from functools import partial
import open_clip
import open_clip_train.data
import torch
from open_clip_train.main import main
from webdataset.tariterators import tar_file_expander

torch.optim.AdamW = partial(torch.optim.AdamW, fused=True)  # one kernel, as ours is
# webdataset from 0.2.100 on marks the end of each tar, which open_clip, written for 0.2.86, does not expect.
open_clip_train.data.tar_file_expander = partial(tar_file_expander, eof_value=None)
open_clip.add_model_config(sys.argv[1])
main(sys.argv[2:])
"""


def epochs(size: str, config: CLIPConfig, folder: Path) -> Case:
    """Each library's own command, the whole process: shards to a checkpoint, with two workers."""
    count, batch_size, side = {"full": (4096, 64, 256), "quick": (128, 32, 256), "tiny": (8, 4, 64)}[size]
    num_steps, rate = count // batch_size, 5e-4
    interval = min(8, num_steps)

    def ours() -> Job:
        data = {"train": str(samples.shards(folder, count, side)), "batch_size": batch_size, "num_workers": 2}
        training = {"max_epochs": 1, "log_every_n_steps": interval, "enable_progress_bar": False, "accelerator": "cpu"}
        model = {"clip": asdict(config), "optimizer": {"lr": rate}}
        settings = folder / "epoch.yaml"
        settings.write_text(json.dumps({"model": model, "data": data, "trainer": training}))  # JSON is YAML
        flags = ["fit", f"--config={settings}", "--trainer.default_root_dir"]

        def run() -> int:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                process(sys.executable, ROOT / "train.py", *flags, place)
                (table,) = Path(place).glob("logs/*/metrics.csv")
                with table.open() as file:
                    return int(float([row["train/samples"] for row in csv.DictReader(file)][-1]))

        def counted() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as place, _silence():
                trainer.main([*flags, place])

        return Job(run, counted=counted)

    def theirs() -> Job:
        shards = samples.shards(folder, count, side)
        name = peers.model_name(config, folder)
        command = [sys.executable, "-c", _OPEN_CLIPS_TRAINER, folder / "open_clip", f"--model={name}", f"--lr={rate}"]
        command += [f"--train-data={_braces(shards)}", f"--train-num-samples={count}", "--dataset-type=webdataset"]
        command += [f"--batch-size={batch_size}", "--workers=2", "--epochs=1", "--precision=fp32"]
        command += [f"--warmup={num_steps // 10}", f"--log-every-n-steps={interval}", "--name=run"]

        def run() -> int:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                process(*command, f"--logs={place}")
                return int(re.findall(r"\[ *(\d+)/", Path(place, "run/out.log").read_text())[-1])

        return Job(run)

    return Case(
        "epoch",
        f"an epoch, small ViT, {count:,} JPEGs of {side}² in shards, batch {batch_size}, two workers",
        {OURS: ours, "open_clip": theirs},
        targets={"open_clip": 2.2},
        is_slow=True,
        note="`miniclip train fit` and open_clip_train.main, imports and checkpoints included; open_clip has AdamW "
        "in one kernel, and by default would take 80 ms more a step",
    )


@contextlib.contextmanager
def _silence() -> Any:
    """Discards the output of trainers."""
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings(), peers.no_log():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
