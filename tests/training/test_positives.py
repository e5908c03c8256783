"""Groups, and several captions of an image: one loss for any number of processes, micro-batches, chunks and holes."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import warm
from batches import assert_near
from helpers import table, tiny_clip, tiny_config, trainer_at, write_pairs
from PIL import Image
from runs import arguments, command, metrics, state
from torch.nn.functional import log_softmax

import miniclip
from miniclip.commands import main as cli
from miniclip.commands import train as trainer
from miniclip.data.module import PairDataModule
from miniclip.data.pack import pack
from miniclip.data.pairs import Batch, CaptionChoice
from miniclip.data.sample_files import Packing
from miniclip.data.sources import read_pairs
from miniclip.training.step import CLIPTraining

HOLE, LONE = 3, 5  # a damaged picture, and one with a single caption


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """12 pairs of two captions in four groups, but for a damaged picture and one with a single caption."""
    folder = tmp_path_factory.mktemp("groups")
    write_pairs(folder / "src", 24, captions=2)
    lines = [f"{n:04d}.png,picture {n},{'' if n == LONE else f'number {n}'},{n % 4}" for n in range(12)]
    pack(read_pairs(table(folder / "src/t.csv", "image,caption_1,caption_2,kind", *lines)), folder / "shards",
         source="t.csv", packing=Packing(samples_per_shard=5))  # fmt: skip
    tar = folder / "shards/00000.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(b"\x89PNG", data.index(b"00000000%d.png" % HOLE))
    data[start : start + 60] = bytes(60)
    tar.write_bytes(data)
    cli.main(["shards", str(folder / "shards"), "--index-only", "--overwrite"])
    return folder / "shards"


OPTIONS = {
    "groups": {"positives": "group", "group": "kind"},
    "two captions": {"captions": CaptionChoice(per_image=2)},
    "groups of two captions": {"positives": "group", "group": "kind", "captions": CaptionChoice(per_image=2)},
}


def batch_of(shards: Path, case: str, rank: int = 0, ranks: int = 1) -> Batch:
    data = PairDataModule(str(shards), image_size=16, context_length=16, batch_size=12, num_workers=0, **OPTIONS[case])
    data.trainer = trainer_at(0, rank, ranks)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def step(batch: Batch, case: str, ranks: int = 1, loss: str = "clip", **options) -> dict[str, torch.Tensor]:
    """The loss and the gradients of a training step in double precision."""
    positives = OPTIONS[case].get("positives", "pair")
    bias = {"init_logit_bias": -2.0} if loss == "siglip" else {}
    torch.manual_seed(0)
    module = CLIPTraining(tiny_config(**bias), positives=positives, loss=loss, **options).double()
    module.trainer = trainer_at(0, 0, ranks)
    if module.teacher is not None:
        module.teacher.to(torch.device("cpu"), torch.float64)
    found = module.training_step(batch, 0)
    found.backward()
    return {"loss": found.detach()} | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def by_hand(batch: Batch, case: str) -> dict[str, torch.Tensor]:
    """The definition: a target for each image and text, shared evenly by all of the batch that fit it."""
    torch.manual_seed(0)
    model = CLIPTraining(tiny_config()).double().clip
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.config.vision.mean, model.config.vision.std))
    per_image = len(batch.tokens) // len(batch.images)
    there = torch.ones(len(batch.tokens), dtype=torch.bool) if batch.mask is None else batch.mask
    image_of = torch.arange(len(batch.tokens)) // per_image
    images = model.encode_image(((batch.images / 255 - mean) / std).double(), normalize=True)[image_of][there]
    texts = model.encode_text(batch.tokens, normalize=True)[there]
    groups = (batch.groups if OPTIONS[case].get("positives") == "group" else image_of)[there]
    fits = (groups[:, None] == groups).double()
    logits = model.logit_scale.exp() * images @ texts.T
    targets = fits / fits.sum(dim=1, keepdim=True)
    loss = -(targets * (log_softmax(logits, 1) + log_softmax(logits.T, 1))).sum(dim=1).mean() / 2
    loss.backward()
    return {"loss": loss.detach()} | {f"clip.{name}": p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_step_is_the_definition_with_holes_and_with_micro_batches(shards, case):
    batch = batch_of(shards, case)
    per_image = 2 if "two" in case else 1
    names = [int(key.split(":")[1]) for key in batch.keys]
    healthy = batch.mask.view(12, per_image)
    assert healthy.sum() == 11 * per_image - (per_image == 2)
    assert not healthy[names.index(HOLE)].any()
    assert healthy[names.index(LONE)].sum() == 1
    if "groups" in case:
        groups = batch.groups.view(12, per_image)
        alike = [[names[a] % 4 == names[b] % 4 or None for b in range(12)] for a in range(12)]
        for a in range(12):
            for b in range(12):
                if HOLE not in (names[a], names[b]):
                    assert (groups[a, 0] == groups[b, -1]) == bool(alike[a][b])
    expected = by_hand(batch, case)
    for size in (None, 5):
        found = step(batch, case, micro_batch_size=size)
        assert set(found) == set(expected)
        assert_near(found, expected, torch.float64)


def test_several_captions_give_the_gradients_of_a_choice_among_each_image_once(shards):
    """The image's copies only add ln 2 to what texts choose among."""
    batch = batch_of(shards, "two captions")
    whole = [row for row, key in enumerate(batch.keys) if int(key.split(":")[1]) not in (HOLE, LONE)]
    rows = torch.tensor([2 * row + n for row in whole for n in (0, 1)])
    batch = batch._replace(
        images=batch.images[whole], tokens=batch.tokens[rows], mask=None, keys=[batch.keys[row] for row in whole],
        caption_ids=batch.caption_ids[rows], groups=batch.groups[rows],
    )  # fmt: skip
    found = step(batch, "two captions")
    torch.manual_seed(0)
    model = CLIPTraining(tiny_config()).double()
    images, texts = model.encode_images(batch.images), model.encode_texts(batch.tokens)  # (10, E), (20, E)
    logits = model.clip.logit_scale.exp() * images @ texts.T
    own = torch.arange(20) // 2
    of_images = -log_softmax(logits, 1).gather(1, torch.arange(20).view(10, 2)).mean()
    of_texts = torch.nn.functional.cross_entropy(logits.T, own)
    loss = (of_images + of_texts) / 2
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert found["loss"] == pytest.approx(loss.item() + math.log(2) / 2)
    assert_near({name: found[name] for name in expected}, expected, torch.float64)


def work(rank: int, ranks: int, shards: Path, folder: str) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    results = {}
    for case in OPTIONS:
        for loss in ("clip", "siglip"):
            found = step(batch_of(shards, case, rank, ranks), case, ranks, loss, micro_batch_size=2)
            for value in found.values():  # what DDP does with gradients, and Lightning with the loss it logs
                dist.all_reduce(value)
                value /= ranks
            results[case, loss] = found
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_have_the_rows_of_the_whole_batch_one_after_the_other(shards, case, ranks):
    """So their loss is that of one process, as test_distributed.py shows for groups and holes of any kind."""
    whole, parts = batch_of(shards, case), [batch_of(shards, case, rank, ranks) for rank in range(ranks)]
    everywhere = {len(part.tokens) for part in parts}
    assert everywhere == {len(whole.tokens) // ranks}  # whatever each has of short samples and holes
    masks = [torch.ones(len(part.tokens), dtype=torch.bool) if part.mask is None else part.mask for part in parts]
    assert torch.equal(torch.cat(masks), whole.mask)
    for name in ("images", "caption_ids", "groups"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_have_the_loss_and_gradients_of_one_with_the_whole_batch(shards, tmp_path, ranks):
    multiprocessing.spawn(work, (ranks, shards, str(tmp_path)), nprocs=ranks)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for case in OPTIONS:
        batch = batch_of(shards, case)
        for loss in ("clip", "siglip"):
            expected = step(batch, case, loss=loss)
            for result in results:
                assert_near(result[case, loss], expected, torch.float64)


def test_a_teachers_loss_takes_several_captions_of_an_image(shards, tmp_path):
    miniclip.save(tiny_clip(1), tmp_path / "teacher")
    batch = batch_of(shards, "two captions")
    found = step(batch, "two captions", teacher=str(tmp_path / "teacher"), distillation=1.0)
    parts = step(batch, "two captions", teacher=str(tmp_path / "teacher"), distillation=1.0, micro_batch_size=5)
    assert torch.isfinite(found["loss"])
    assert_near(parts, found, torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def grouped(data, tmp_path_factory) -> Path:
    """The pictures of four colours, of which the colour is a column, with embeddings."""
    folder = tmp_path_factory.mktemp("grouped")
    for part in ("train", "val"):
        pictures = sorted((data / part).glob("*.png"))
        texts = [picture.with_suffix(".txt").read_text().split("\n") for picture in pictures]
        colours = [picture.stem.rstrip("0123456789") for picture in pictures]
        rows = [("image", "caption_1", "caption_2", "colour")]
        rows += [(str(each), *lines, colour) for each, lines, colour in zip(pictures, texts, colours, strict=True)]
        with open(folder / f"{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
        pack(read_pairs(folder / f"{part}.csv"), folder / "shards" / part, source=part)
    miniclip.save(tiny_clip(), folder / "model")
    cli.main(["embed", str(folder / "shards/train"), str(folder / "embeddings"), "--model", str(folder / "model")])
    return folder


@pytest.mark.long
def test_a_hard_run_of_groups_and_two_captions_stopped_midway_ends_at_the_same_bits(grouped, tmp_path):
    more = [
        "--data.negatives=hard",
        f"--data.neighbours={grouped / 'embeddings'}",
        "--model.positives=group",
        "--data.group=colour",
        "--data.captions.per_image=2",
        "--trainer.precision=64-true",
    ]
    stop = json.dumps({"class_path": "runs.StopAt", "init_args": {"step": 4}})
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    trainer.main(arguments(grouped, straight, *more, steps=7))
    with pytest.raises(SystemExit):
        trainer.main(arguments(grouped, stopped, *more, f"--trainer.callbacks=[{stop}]", steps=7))
    assert torch.load(stopped / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    trainer.main(arguments(grouped, stopped, *more, "--ckpt_path=last", steps=7))
    expected, found = state(straight), state(stopped)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    first = metrics(straight)[0]
    assert float(first["train/chance"]) == pytest.approx(math.log(24))  # texts that each of 12 images chooses among
    assert float(first["train/samples"]) == 12


SIGMOID = ["--model.loss=siglip", "--model.clip.init_logit_bias=-2.0"]
GROUPED = ["--model.positives=group", "--data.group=colour"]
FITTING = {"pair": [], "caption": ["--model.positives=caption"], "group": GROUPED}


@pytest.mark.sample(1)
@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("positives", FITTING)
def test_a_validation_counts_as_right_what_training_does(grouped, tmp_path, loss, positives):
    """The definition, on all held-out pairs at once. By retrieval equal captions are right answers in any case."""
    run = tmp_path / "run"
    more = [*FITTING[positives], *(SIGMOID if loss == "siglip" else []), "--trainer.precision=64-true"]
    trainer.main(arguments(grouped, run, *more, steps=1))
    model, preprocess = miniclip.load(run / "checkpoints/last.ckpt", device="cpu")
    model = model.double().eval().requires_grad_(False)
    with open(grouped / "val.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    images = torch.stack([preprocess(Image.open(row["image"])) for row in rows]).double()
    texts = miniclip.tokenize([row["caption_1"] for row in rows], model.context_length)
    cosines = model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T
    logits = model.logit_scale.exp() * cosines + (model.logit_bias if loss == "siglip" else 0)
    by = {"pair": range(16), "caption": [r["caption_1"] for r in rows], "group": [r["colour"] for r in rows]}
    alike = {name: torch.tensor([[a == b for b in values] for a in values]) for name, values in by.items()}
    assert [int(each.sum()) for each in alike.values()] == [16, 32, 64]  # 4 colours of 4, of two captions each
    fits = alike[positives].double()
    if loss == "siglip":
        expected = -torch.nn.functional.logsigmoid((2 * fits - 1) * logits).sum() / 16
    else:
        targets = fits / fits.sum(dim=1, keepdim=True)
        expected = -(targets * (log_softmax(logits, 1) + log_softmax(logits.T, 1))).sum() / 16 / 2
    right = alike["caption" if positives == "pair" else positives]
    found = [right[range(16), scores.argmax(1)].double().mean() for scores in (cosines, cosines.T)]
    logged = next(row for row in metrics(run) if row["val/loss"])
    assert float(logged["val/loss"]) == pytest.approx(float(expected), rel=1e-6)
    assert float(logged["val/retrieval_r1"]) == pytest.approx(float(sum(found)) / 2)


def entropy(fitting: int, pairs: int) -> float:
    share = fitting / pairs**2
    return -pairs * (share * math.log(share) + (1 - share) * math.log(1 - share))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "more, chance",
    [  # of 12 pictures with two captions each, a damaged one and one with a single caption
        ([], math.log(11)),
        (["--data.captions.per_image=2"], math.log(21)),
        (["--model.positives=group", "--data.group=kind"], math.log(11)),
        (SIGMOID, entropy(11, 11)),
        ([*SIGMOID, "--data.captions.per_image=2"], entropy(10 * 4 + 1, 21)),
    ],
)
def test_chance_is_over_the_texts_that_are_there(shards, tmp_path, more, chance):
    common = [f"--data.train={shards}", "--data.val=null", "--model.max_rejected=1"]
    trainer.main([*arguments(tmp_path, tmp_path / "run", *more, steps=1), *common])
    assert float(metrics(tmp_path / "run")[0]["train/chance"]) == pytest.approx(chance, rel=1e-6)


@pytest.mark.long
def test_processes_validate_groups_as_one_does(grouped, tmp_path):
    logged = []
    for devices, strategy in ((1, "auto"), (3, "ddp")):
        more = [*GROUPED, *SIGMOID, f"--trainer.devices={devices}", f"--trainer.strategy={strategy}"]
        done = warm.run(command(grouped, tmp_path / strategy, *more, steps=3))
        assert done.returncode == 0, done.stdout + done.stderr
        logged.append(next(row for row in metrics(tmp_path / strategy) if row["val/loss"]))
    one, three = logged
    assert float(three["val/loss"]) == pytest.approx(float(one["val/loss"]), rel=1e-4)
    assert three["val/retrieval_r1"] == one["val/retrieval_r1"]


@pytest.mark.long
def test_a_score_by_other_positives_is_not_compared(grouped, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.main(arguments(grouped, run, steps=1))
    trainer.main(arguments(grouped, run, *GROUPED, "--ckpt_path=last", steps=2))
    assert "best.ckpt was the best by val/retrieval_r1 on other validation pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--model.positives=group"], "data.group is 'group', and 00000.tar:000000000 has no such field"),
        (["--model.positives=group", "--data.group=color"], "has no such field: its .json has source, colour"),
        (
            ["--model.positives=group", "--data.group=colour", "--data.val={data}/shards/val"],
            "data.group is 'colour', and 00000.tar:000000000 of data.val has no such field",
        ),
        (["--model.positives=caption", "--data.captions.per_image=2"], "data.captions.per_image is 2"),
        (["--data.captions.per_image=0"], "per_image is 0; it must be at least 1"),
        (
            ["--data.negatives=hard", "--data.group=colour", "--data.batch_size=40"],
            "nothing to choose from; set data.batch_size to 20",
        ),
    ],
)
def test_a_run_that_cannot_hold_is_refused_before_its_first_step(data, grouped, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        trainer.main(arguments(grouped, tmp_path / "run", *(each.format(data=data) for each in more)))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_module_of_ones_own_without_groups_in_its_batches_is_told_what_to_set(shards):
    with pytest.raises(ValueError, match=r"model.positives is 'group', and the batches have none: set data.positives"):
        step(batch_of(shards, "two captions")._replace(groups=None), "groups")
