"""Training keeps the wordings of its captions: in checkpoints, in best/, in a resumed run; no loss changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import pack_folder, tiny_clip, tiny_config, write_picture
from pytorch_lightning import Callback
from runs import COLOURS, StopAt, arguments, command, metrics

import miniclip
from miniclip.commands import train as trainer
from miniclip.data.module import PairDataModule
from miniclip.data.wordings.kept import Wording, Wordings
from miniclip.evaluation.datasets.open import open_dataset
from miniclip.evaluation.other_libraries import open_model
from miniclip.evaluation.suite import Task, evaluate
from miniclip.tokenizer import decode, encode
from miniclip.training.step import CLIPTraining
from miniclip.training.zero_shot import CaptionWordings
from miniclip.weights.convert import convert

WORDINGS = {"a {} square", "something {}", "a picture of {}", "{} paint"}  # of the captions of `data`

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def prompts(path: Path) -> set[str]:
    wordings = miniclip.load(path, device="cpu")[0].wordings
    return set() if wordings is None else set(wordings.templates(tuple(COLOURS)))


def nine_steps(data: Path, run: Path) -> list[str]:
    scored = f"{{class_path: miniclip.training.zero_shot.ZeroShotEvaluation, init_args: {{data: {data / 'val.csv'}}}}}"
    options = [f"--trainer.callbacks+={scored}", "--model.ema_decay=0.9", "--data.num_workers=0"]
    return arguments(data, run, *options, steps=9)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run that was stopped at step 4 and went on to step 9."""
    folder = tmp_path_factory.mktemp("wordings") / "run"
    stop = f"{{class_path: {StopAt.__module__}.StopAt, init_args: {{step: 4}}}}"
    args = nine_steps(data, folder)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        trainer.main([*args, f"--trainer.callbacks+={stop}"])
    signal.signal(signal.SIGINT, handler)
    assert prompts(folder / "checkpoints/last.ckpt") == WORDINGS
    trainer.main([*args, "--ckpt_path=last"])
    return folder


def test_a_run_keeps_the_wordings_in_its_checkpoints_and_its_model(run):
    for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "best", "best/model.safetensors"):
        assert prompts(run / name) == WORDINGS, name
    kept = json.loads((run / "best/wordings.json").read_text())
    assert set(kept["examples"]) <= {wording.replace("{}", colour) for wording in WORDINGS for colour in COLOURS}
    assert kept["num_captions"] == 36  # the first validation was best
    assert miniclip.load(run / "checkpoints/last.ckpt", device="cpu")[0].wordings.num_captions == 9 * 12


def looked_at(run: Path, name: str = "last") -> tuple[Any, Any]:
    """What a checkpoint holds of the captions so far, and what was found in them."""
    found = torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)
    return found["callbacks"]["CaptionWordings"], found["miniclip_wordings"]


@pytest.mark.long
def test_a_run_that_was_stopped_finds_what_one_does_that_was_not(run, data, tmp_path):
    trainer.main(nine_steps(data, tmp_path / "straight"))
    for name in ("last", "best"):
        assert looked_at(run, name) == looked_at(tmp_path / "straight", name), name
    captions = looked_at(run)[0]["captions"]
    assert len(captions) == 9 * 12
    assert {decode(each).strip() for each in captions} <= {
        each.format(colour) for each in WORDINGS for colour in COLOURS
    }


@pytest.mark.long
def test_processes_read_the_captions_in_the_order_of_one_which_goes_on_with_them(run, data, tmp_path):
    options = ["--data.num_workers=0", "--trainer.devices=2", "--trainer.strategy=ddp"]
    subprocess.run(
        command(data, tmp_path / "run", *options, steps=4), check=True, env={**os.environ, "PYTHONPATH": "."}
    )
    trainer.main(arguments(data, tmp_path / "run", "--data.num_workers=0", "--ckpt_path=last", steps=9))
    assert looked_at(tmp_path / "run") == looked_at(run)


def test_what_was_found_is_a_matter_of_the_captions_and_not_of_when_it_was_looked_for(tmp_path):
    """The first batches have a wording, and all together have none."""
    rare = [encode(f"a sketch of a {each}") for each in ("cat", "dog", "cow")]
    free_pairs(tmp_path)
    free = [encode(path.read_text()) for path in sorted((tmp_path / "train").glob("*.txt"))]
    watched, module = CaptionWordings(), CLIPTraining(clip=tiny_config())
    state = {"is_done": False, "num_found_in": 0, "before": None}
    for num_steps, captions, texts in ((1, rare, ["a sketch of a {}"]), (2, rare + free, None)):
        watched.load_state_dict({**state, "num_steps": num_steps, "captions": captions})
        watched.on_validation_start(pl.Trainer(logger=False), module)
        found = module.clip.wordings
        assert (found and [each.text for each in found.wordings]) == texts


@pytest.mark.long
def test_a_checkpoint_without_the_captions_goes_on_with_what_it_found_as_before(run, data, tmp_path):
    """It keeps that until more captions were read than it is of."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    kept = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert kept["global_step"] == 3
    kept["callbacks"]["CaptionWordings"] = {"is_done": False, "num_found_in": 36}
    torch.save(kept, folder / "checkpoints/last.ckpt")
    found = []
    for steps in (5, 9):  # 24 and then 72 captions
        more = ["--model.ema_decay=0.9", "--data.num_workers=0", "--ckpt_path=last"]
        trainer.main(arguments(data, folder, *more, steps=steps))
        found.append(miniclip.load(folder / "checkpoints/last.ckpt", device="cpu")[0].wordings.num_captions)
    assert found == [36, 72]


def test_nothing_that_is_made_of_a_checkpoint_has_the_captions_that_it_holds(run, tmp_path):
    whole = run / "checkpoints/last.ckpt"
    values = torch.load(whole, weights_only=True)
    assert values["callbacks"].pop("CaptionWordings")["captions"]
    torch.save(values, tmp_path / "without.ckpt")
    for name, path in (("of", whole), ("without", tmp_path / "without.ckpt")):
        convert(path, tmp_path / "converted" / name, "native")
        miniclip.save(miniclip.load(path, device="cpu")[0], tmp_path / "saved" / name)
    for way in ("converted", "saved"):
        one, other = (
            {path.name: path.read_bytes() for path in (tmp_path / way / name).iterdir()} for name in ("of", "without")
        )
        assert one == other
        assert set(one) == {"config.json", "model.safetensors", "wordings.json"}


def test_a_run_is_scored_by_the_prompts_that_eval_takes(run, data):
    own, default = evaluate(open_model(str(run / "checkpoints/last.ckpt"), "cpu"), Task(open_dataset(data / "val.csv")))
    assert set(own.data.templates) == WORDINGS
    assert default.data.templates == ("a photo of a {c}.",)
    logged = [row["val/zero_shot_acc1"] for row in metrics(run, version=1) if row["val/zero_shot_acc1"]]
    assert float(logged[-1]) == pytest.approx(own.scores.metrics.acc1)


class _Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def fitted(shards: Path, folder: Path, *callbacks: Callback, **options: Any) -> CLIPTraining:
    """A module after 8 steps of Lightning's own trainer, with validations and a checkpoint in between."""
    pl.seed_everything(0)
    fit = pl.Trainer(
        accelerator="cpu", max_steps=8, logger=False, val_check_interval=2, callbacks=list(callbacks),
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    module = CLIPTraining(**options)
    options = {"batch_size": 12, "image_size": 16, "context_length": 16, "num_workers": 0}
    fit.fit(module, PairDataModule(str(shards / "train"), str(shards / "val"), **options))
    return module


def test_losses_and_weights_are_those_of_a_run_that_looks_for_no_wordings(data, tmp_path):
    """Bit for bit; wordings are looked for at each validation and checkpoint as well."""
    plain, watched = _Losses(), _Losses()
    without = fitted(data / "shards", tmp_path, plain, clip=tiny_config()).clip
    module = fitted(data / "shards", tmp_path, watched, CaptionWordings(), clip=tiny_config())
    assert plain.values == watched.values
    assert len(plain.values) == 8
    assert all(torch.equal(value, module.clip.state_dict()[name]) for name, value in without.state_dict().items())
    assert without.wordings is None
    assert set(module.clip.wordings.templates(tuple(COLOURS))) == WORDINGS


def free_pairs(folder: Path) -> Path:
    """Shards of captions without a word in common."""
    for part in ("train", "val"):
        for n in range(24):
            path = write_picture(folder / part / f"{n}.png", n)
            path.with_suffix(".txt").write_text(" ".join(f"{chr(97 + n)}{chr(97 + k)}q" for k in range(5)))
        pack_folder(folder / part, folder / "shards" / part)
    return folder / "shards"


def test_captions_without_wordings_leave_none_and_the_run_says_so(tmp_path, capsys):
    module = fitted(free_pairs(tmp_path), tmp_path, CaptionWordings(), clip=tiny_config())
    assert "Wordings of the captions: none in common" in capsys.readouterr().out
    assert module.clip.wordings is None


def test_a_model_that_is_trained_on_keeps_its_wordings_where_new_captions_have_none(tmp_path, capsys):
    start = tiny_clip()
    start.wordings = Wordings((Wording("a {} of old", 1.0),), (), 100)
    miniclip.save(start, tmp_path / "start")
    module = fitted(free_pairs(tmp_path), tmp_path, CaptionWordings(), start_from=str(tmp_path / "start"))
    assert module.clip.wordings == start.wordings
    assert "a {} of old" in capsys.readouterr().out


def test_what_is_cut_and_what_can_not_be_read_is_no_caption(tmp_path):
    for n in range(30):
        path = write_picture(tmp_path / "all" / f"{n}.png", n)
        text = ("a sketch of a {}", "one {} of too many words that go on and on until they are cut off")[n % 2]
        path.with_suffix(".txt").write_text(text.replace("{}", ("cat", "dog", "cow")[n % 3]))
    pack_folder(tmp_path / "all", tmp_path / "shards/train")
    pack_folder(tmp_path / "all", tmp_path / "shards/val")
    module = fitted(tmp_path / "shards", tmp_path, CaptionWordings(), clip=tiny_config())
    assert [each.text for each in module.clip.wordings.wordings] == ["a sketch of a {}"]
