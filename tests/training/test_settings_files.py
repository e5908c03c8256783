"""Settings from files and flags: which wins, and what a file cannot say."""

import json

import pytest
import warm
import yaml
from jsonargparse import dict_to_namespace
from runs import ROOT, TINY, command, fails

from miniclip.commands import run_settings
from miniclip.commands import train as trainer
from miniclip.data.reading.unique_keys import BoundedSafe


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(
        "name: a\nseed_everything: 5\ntrainer:\n  max_steps: 10\n  callbacks: [{class_path: LearningRateMonitor}]\n"
    )
    (tmp_path / "b.yaml").write_text("name: b\ntrainer: {max_steps: 20}\n")
    (tmp_path / "trainer.yaml").write_text("{max_steps: 30, log_every_n_steps: 7}\n")
    return tmp_path


def settings(capsys, *args: str) -> dict:
    with pytest.raises(SystemExit) as stopped:
        trainer.main(["fit", *args, "--print_config"])
    printed = capsys.readouterr()
    assert stopped.value.code in (0, None), printed.err
    return yaml.safe_load(printed.out)


ORDERS = [
    # flags and files, name, seed_everything, trainer.max_steps
    (["--config", "a.yaml", "--name", "mine", "--trainer.max_steps", "2"], "mine", 5, 2),
    (["--name", "mine", "--trainer.max_steps", "2", "--config", "a.yaml"], "mine", 5, 2),
    (["--name=mine", "--trainer.max_steps=2", "--config=a.yaml"], "mine", 5, 2),
    (["--name", "mine", "-c", "a.yaml", "--trainer.max_steps", "2"], "mine", 5, 2),
    (["--name", "mine", "--trainer.max_steps", "2", "-ca.yaml"], "mine", 5, 2),
    (["--config", "a.yaml", "--trainer.max_steps", "4", "--config", "b.yaml"], "b", 5, 4),
    (["--config", "b.yaml", "--trainer.max_steps", "4", "--config", "a.yaml"], "a", 5, 4),
    (["--overwrite", "--config", "b.yaml", "--config", "a.yaml"], "a", 5, 10),
    (["--trainer.max_steps", "4", "--config", "a.yaml", "--trainer", "trainer.yaml"], "a", 5, 4),
    (["--config", "a.yaml", "--trainer", "trainer.yaml"], "a", 5, 30),
    (["--trainer", "trainer.yaml", "--config", "a.yaml"], "a", 5, 10),
    (["--trainer", "{max_steps: 9}", "--config", "a.yaml"], "a", 5, 9),
    (["--trainer", "{max_steps: 9}", "--trainer", "trainer.yaml", "--config", "a.yaml"], "a", 5, 9),
    (["--trainer.max_steps", "4", "--trainer", "{max_steps: 9}", "--config", "a.yaml"], "a", 5, 4),
    (["--trainer={max_steps: 9}", "--trainer.max_steps=4", "--config", "a.yaml"], "a", 5, 4),
    (["--trainer={max_steps: 9}", "--trainer={max_steps: 8}", "--config", "a.yaml"], "a", 5, 8),
]


@pytest.mark.sample(6)
@pytest.mark.parametrize("args, name, seed, steps", ORDERS, ids=[" ".join(order[0]) for order in ORDERS])
def test_flags_beat_files_and_later_files_earlier_ones(files, capsys, args, name, seed, steps):
    found = settings(capsys, *args)
    assert (found["name"], found["seed_everything"], found["trainer"]["max_steps"]) == (name, seed, steps)


def test_what_a_flag_appends_follows_what_the_files_have(files, capsys):
    found = settings(capsys, "--trainer.callbacks+=DeviceStatsMonitor", "--config", "b.yaml", "--config", "a.yaml")
    names = [each["class_path"].split(".")[-1] for each in found["trainer"]["callbacks"]]
    assert names == ["LearningRateMonitor", "DeviceStatsMonitor"]


def test_leading_zeros_and_colons_make_no_other_number(files, capsys):
    """To YAML 1.1 these are 399, 8 and 36,000,000: a run that was never validated."""
    (files / "c.yaml").write_text("name: 0617\nseed_everything: 010\ntrainer: {val_check_interval: 10:00:00:00}\n")
    found = settings(capsys, "--config", "c.yaml", "--trainer.max_time", "12:00:00:00", "--data.val_pairs", "1_000")
    assert (found["name"], found["seed_everything"], found["data"]["val_pairs"]) == ("0617", 10, 1000)
    assert (found["trainer"]["val_check_interval"], found["trainer"]["max_time"]) == ("10:00:00:00", "12:00:00:00")


TWICE = [
    # what the file has, the flags, what the error says
    ("trainer: {max_steps: 2}\nname: x\ntrainer: {max_epochs: 1}\n", [], "c.yaml: trainer comes twice in one mapping"),
    ("trainer:\n  max_steps: 2\n\n  max_steps: 3\n", [], "max_steps comes twice in one mapping, in lines 2 and 4"),
    ("name: [x\n", [], "c.yaml: while parsing a flow sequence"),
    ("name: x\n", ["--trainer", "twice.yaml"], "max_steps comes twice in one mapping, in lines 1 and 2"),
    ("name: x\n", ['--model.optimizer={"lr": 1, "lr": 2}'], "lr comes twice in one mapping, in line 1"),
    ("name: x\n", ["--model.optimizer.options={a: 1, b: {a: 2}, a: 3}"], "a comes twice in one mapping, in line 1"),
]


@pytest.mark.parametrize("text, flags, message", TWICE, ids=range(len(TWICE)))
def test_a_key_that_comes_twice_is_refused_with_its_lines(files, capsys, text, flags, message):
    (files / "c.yaml").write_text(text)
    (files / "twice.yaml").write_text("max_steps: 2\nmax_steps: 3\n")
    with pytest.raises(SystemExit) as stopped:
        trainer.main(["fit", "--config", "c.yaml", *flags, "--print_config"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def bomb(levels: int) -> str:
    """Each line stands for nine times what the line before it does: 9 ** levels values."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


SPITEFUL = [
    # what the file has, what the error says
    (bomb(9), "c.yaml: its aliases stand for more than 10,000 values, the last in line 5"),
    ("name: " + "[" * 3000 + "]" * 3000, "c.yaml: it is nested more than 100 deep in line 1"),
    ("".join(f"{' ' * depth}a:\n" for depth in range(3000)), "c.yaml: it is nested more than 100 deep in line 100"),
    ("data: &a\n  train: [*a]\n", "c.yaml: the alias *a in line 2 stands within what it stands for"),
]


@pytest.mark.parametrize("text, message", SPITEFUL, ids=range(len(SPITEFUL)))
def test_settings_that_stand_for_more_than_they_look_are_refused(files, capsys, text, message):
    (files / "c.yaml").write_text(text)
    assert message in fails(capsys, ["fit", "--config", "c.yaml"])


@pytest.mark.parametrize(
    "text, found",
    [("# nothing yet\n", "is empty"), ("- data\n", "holds a list"), ("data:\n", "gives data no value")],
)
def test_a_file_without_keys_or_values_is_named(files, capsys, text, found):
    (files / "c.yaml").write_text(text)
    assert f"c.yaml {found}; a file of settings has keys and values" in fails(capsys, ["fit", "--config", "c.yaml"])


def test_a_file_that_asks_for_an_object_of_pythons_is_named(files, capsys):
    (files / "c.yaml").write_text("name: !!python/object/apply:os.getcwd []\n")
    assert "error: c.yaml: could not determine a constructor" in fails(capsys, ["fit", "--config", "c.yaml"])


def test_a_long_list_that_is_named_twice_is_no_bomb():
    names = [f"shard {number}" for number in range(12_000)]
    text = yaml.safe_dump({"train": names, "val": names})  # the second is an alias
    assert "*id001" in text
    assert yaml.load(text, BoundedSafe) == {"train": names, "val": names}


def test_one_key_in_several_mappings_and_a_merged_one_are_no_repetition(files, capsys):
    (files / "c.yaml").write_text(
        "model: {clip: {vision: &tower {width: 32, layers: 2}, text: {<<: *tower, width: 48}}}\n"
    )
    towers = settings(capsys, "--config", "c.yaml")["model"]["clip"]
    assert [(towers[name]["width"], towers[name]["layers"]) for name in ("vision", "text")] == [(32, 2), (48, 2)]


def test_several_merges_into_one_mapping_are_no_repetition_and_what_they_hold_is_looked_at(files, capsys):
    (files / "c.yaml").write_text(
        "model:\n  clip:\n    vision: &a {width: 32}\n    text:\n      <<: *a\n      <<: {layers: 2}\n      width: 48\n"
    )
    found = settings(capsys, "--config", "c.yaml")["model"]["clip"]["text"]
    assert (found["width"], found["layers"]) == (48, 2)
    (files / "c.yaml").write_text("trainer:\n  <<: {max_steps: 2, max_steps: 3}\n  max_epochs: 1\n")
    with pytest.raises(SystemExit):
        trainer.main(["fit", "--config", "c.yaml", "--print_config"])
    assert "max_steps comes twice in one mapping, in line 2" in capsys.readouterr().err


def test_settings_of_a_group_on_the_command_line_may_be_longer_than_a_files_name(files, capsys):
    name = "x" * 5000
    found = settings(capsys, "--config", "a.yaml", "--trainer", json.dumps({"default_root_dir": name, "max_steps": 9}))
    assert (found["trainer"]["default_root_dir"], found["trainer"]["max_steps"]) == (name, 9)


NULLS = {
    "data": "data is null, and it takes keys: train, val, weights, batch_size, num_workers and ",
    "data.augmentation": "data.augmentation is null, and it takes keys: scale, ratio, flip, color, color_probability",
    "data.captions": "data.captions is null, and it takes keys: order, fields, line_weights, per_image; leave it out",
    "data.batch_size": "data.batch_size is None, and it takes int",
    "data.num_workers": "data.num_workers is None, and it takes int",
    "model": "model is null, and it takes keys: clip, optimizer, ",
    "model.clip.vision": "model.clip.vision is null, and it takes keys: kind, ",
    "model.clip.vision.width": "model.clip.vision.width is None, and it takes int",
    "model.optimizer": "model.optimizer is null, and it takes keys: kind, lr, ",
    "model.optimizer.final_lr": "model.optimizer.final_lr is None, and it takes float",
    "model.optimizer.betas": "model.optimizer.betas is None, and it takes tuple",
    "model.patch_dropout": "model.patch_dropout is None, and it takes float",
    "model.max_rejected": "model.max_rejected is None, and it takes float",
    "model.positives": "model.positives is None, and it takes pair, caption or group",
    "save_every_minutes": "save_every_minutes is None, and it takes float",
    "seed_everything": "seed_everything is None, and it takes int",
    "trainer": "trainer is null, and it takes keys: accelerator, ",
    "trainer.devices": "trainer.devices is None, and it takes list[int], str or int",
    "trainer.max_steps": "trainer.max_steps is None, and it takes int; -1 sets no limit",
}


@pytest.mark.parametrize("key", NULLS)
def test_a_key_without_a_value_is_named_with_what_it_takes(files, capsys, key):
    *parents, last = key.split(".")
    text = f"{last}:"  # as one whose lines were commented out
    for parent in reversed(parents):
        text = f"{parent}:\n" + "\n".join(f"  {line}" for line in text.split("\n"))
    (files / "c.yaml").write_text(f"monitor: val/loss\n{text}\n")
    with pytest.raises(SystemExit) as stopped:
        trainer.main(["fit", "--config", "a.yaml", "--config", "c.yaml", "--data.train=shards"])
    assert stopped.value.code == 2
    assert NULLS[key] in capsys.readouterr().err


def test_null_stays_a_value_where_it_is_one(files, capsys):
    """Each is the default, or an int or the like of which null is another value."""
    (files / "c.yaml").write_text(
        "name: null\nmodel: {ema_decay: null, clip: {text: {eot_token: null}}}\ndata: {train: null, val_pairs: null}\n"
        "trainer: {callbacks: null, check_val_every_n_epoch: null, precision: null}\n"
    )
    found = settings(capsys, "--config", "a.yaml", "--config", "c.yaml")
    assert found["name"] is None
    assert found["model"]["clip"]["text"]["eot_token"] is None
    assert (found["data"]["train"], found["data"]["val_pairs"]) == (None, None)
    assert (found["trainer"]["callbacks"], found["trainer"]["check_val_every_n_epoch"]) == (None, None)


ALLOWED = {
    "trainer.precision=fp16": "trainer.precision is fp16, and it takes 64, 32, 16, 16-mixed, bf16-mixed, 32-true, ",
    "trainer.precision=8": ", bf16-mixed, 32-true, 64-true, bf16 or null",
    "trainer.deterministic=perhaps": "trainer.deterministic is perhaps, and it takes bool, warn or null",
    "monitor_mode=lowest": "monitor_mode is lowest, and it takes max or min",
    "data.weights=[x]": "data.weights is ['x'], and it takes list[float] or null",
    "data.augmentation.scale=[a,b]": "data.augmentation.scale is a, and it takes float",
    "model.optimizer.betas=[0.9,0.98,1]": "and it takes tuple with 2 elements; in YAML a tuple is a list, as [1, 2]",
    "data.batch-size=3": "unknown key 'data.batch-size'; did you mean 'data.batch_size'?",
}


@pytest.mark.parametrize("flag", ALLOWED)
def test_a_value_that_is_none_of_those_allowed_is_answered_with_all_of_them(files, capsys, flag):
    with pytest.raises(SystemExit):
        trainer.main(["fit", "--config", "a.yaml", f"--{flag}"])
    assert ALLOWED[flag] in capsys.readouterr().err


IN_VAIN = {
    "model: {optimizer: {muon_lr: 0.5}}": "model.optimizer.muon_lr is 0.5, which has no effect: model.optimizer.kind",
    "model: {distillation: 0.7}": "model.distillation is 0.7, which has no effect: model.teacher is null",
    "trainer: {val_check_interval: 2}": "trainer.val_check_interval is 2, which has no effect: data.val is null, so",
    "data: {val_pairs: 7}": "data.val_pairs is 7, which has no effect: data.val is null, so nothing is validated",
    "monitor_mode: min": 'monitor_mode is "min", which has no effect: data.val is null, so nothing is validated',
    "trainer: {inference_mode: true}": "trainer.inference_mode is true, which has no effect: a run sets it to false",
    "trainer: {use_distributed_sampler: true}": "trainer.use_distributed_sampler is true, which has no effect",
    "trainer: {limit_test_batches: 0.5}": "trainer.limit_test_batches is 0.5, which has no effect: `fit` has no",
    "trainer: {limit_predict_batches: 0.5}": "trainer.limit_predict_batches is 0.5, which has no effect",
}


@pytest.mark.parametrize("text", IN_VAIN)
def test_what_a_file_sets_and_nothing_uses_is_a_warning_of_one_line(files, capsys, text):
    (files / "c.yaml").write_text(text)
    printed = fails(capsys, ["fit", *TINY, "--config=a.yaml", "--config=c.yaml", "--data.train=nowhere"])
    warning, error, *_ = printed.splitlines()
    assert warning.startswith(f"warning: {IN_VAIN[text]}")
    assert error.startswith("error: nowhere is not a folder of shards")


def test_validate_names_what_it_does_not_use_of_its_trainer_alone(files, capsys):
    (files / "c.yaml").write_text("model: {optimizer: {muon_lr: 0.5}}\ntrainer: {limit_test_batches: 0.5}\n")
    (files / "last.ckpt").write_bytes(b"")
    more = ["--ckpt_path=last.ckpt", "--data.train=nowhere", "--data.val=nowhere"]
    printed = fails(capsys, ["validate", *TINY, "--config=c.yaml", *more])
    assert "trainer.limit_test_batches is 0.5, which has no effect: `validate` has no batches of that kind" in printed
    assert "muon_lr" not in printed


def test_a_setting_that_says_what_happens_anyway_is_no_warning(files, capsys):
    (files / "c.yaml").write_text("trainer: {inference_mode: false, use_distributed_sampler: false}\n")
    more = ["--config=a.yaml", "--config=c.yaml", "--data.train=nowhere"]
    assert fails(capsys, ["fit", *TINY, *more]).startswith("error: nowhere")


@pytest.mark.sample(6)
@pytest.mark.parametrize("kind", [[], ["--model.optimizer.kind=adamw"]])
@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_set_nothing_in_vain(files, capsys, config, kind):
    found = settings(capsys, "--config", str(config), "--model.start_from=null", *kind)
    defaults = run_settings.dotted(settings(capsys))
    assert run_settings.without_effect("fit", dict_to_namespace(found), defaults) == []


def test_a_saved_configuration_of_a_run_with_defaults_sets_nothing_in_vain(files, capsys):
    (files / "c.yaml").write_text(yaml.safe_dump(settings(capsys, "--config=a.yaml")))
    more = ["--config=c.yaml", "--data.train=nowhere"]
    assert fails(capsys, ["fit", *TINY, *more]).startswith("error: nowhere")


@pytest.mark.long
@pytest.mark.parametrize("flag", ["--trainer.enable_model_summary=true", "--trainer.callbacks=ModelSummary"])
def test_lightnings_summary_of_the_model_is_printed_where_it_is_asked_for(data, tmp_path, flag):
    made = warm.run(command(data, tmp_path / "run", flag, steps=1), check=True)
    assert "Total params" in made.stdout + made.stderr


def test_the_flag_of_a_narrower_group_beats_that_of_a_wider_one(files, capsys):
    wide, narrow = "--model={optimizer: {lr: 1.0, warmup: 0.5}}", "--model.optimizer={lr: 2.0}"
    for flags in ([wide, narrow], [narrow, wide]):
        optimizer = settings(capsys, *flags)["model"]["optimizer"]
        assert (optimizer["lr"], optimizer["warmup"]) == (2.0, 0.5)


def test_a_file_for_several_verbs_stands_before_the_verb_and_the_error_says_so(files, capsys):
    (files / "c.yaml").write_text("fit: {data: {train: nowhere}, trainer: {max_steps: 3}}\n")
    assert "c.yaml has its settings under 'fit'; " in (said := fails(capsys, ["fit", *TINY, "--config=c.yaml"]))
    assert " --config c.yaml fit\n" in said
    for args in (
        ["--config=c.yaml", "fit", *TINY],
        ["--config=c.yaml"],
    ):  # as it advises; and the file chooses the verb
        assert fails(capsys, args).startswith("error: nowhere is not a folder of shards")
    (files / "d.yaml").write_text("fit: {name: x}\nvalidate: {name: x}\n")
    said = fails(capsys, ["validate", *TINY, "--config=d.yaml"])
    assert "d.yaml has its settings under 'fit' and 'validate'; " in said
    assert " --config d.yaml validate\n" in said


@pytest.mark.parametrize("key, kind", [("callbacks", "LearningRateMonitor"), ("logger", "CSVLogger")])
def test_a_class_whose_init_args_have_no_value_is_named(files, capsys, key, kind):
    (files / "c.yaml").write_text(f"trainer:\n  {key}:\n  - class_path: {kind}\n    init_args:\n")
    said = fails(capsys, ["fit", *TINY, "--config=c.yaml", "--data.train=nowhere"])
    assert f".{kind}' has init_args null, which takes keys; leave it out for the defaults" in said


NOWHERE = {
    "accelerator=quantum": "trainer.accelerator is 'quantum'; on this machine valid are auto, ",
    "accelerator=tpu": "trainer.accelerator is 'tpu'; on this machine valid are auto, ",
    "devices=many": "trainer.devices is 'many'; on cpu it takes auto or a number of processes, 1 or more",
    "devices=0": "trainer.devices is '0'; on cpu it takes auto or a number",
    "devices=-1": "trainer.devices is '-1'; on cpu it takes auto or a number",
    "devices=[]": "trainer.devices is []; on cpu it takes auto or a number",
    "devices=[0,1]": "trainer.devices is [0, 1]; on cpu it takes auto or a number",
    "devices=1.5": "trainer.devices is '1.5'; on cpu it takes auto or a number",
    "strategy=nonsense": "trainer.strategy is 'nonsense'; valid are auto, ddp, ",
    "strategy=xla": "trainer.strategy is 'xla'; valid are auto, ddp, ",
    "strategy=single_device": "trainer.strategy is 'single_device'; valid are auto, ddp, ",
    "num_nodes=0": "trainer.num_nodes is 0; it must be at least 1",
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("flag", NOWHERE)
def test_devices_that_there_are_not_are_answered_with_what_there_is(files, capsys, flag):
    said = fails(capsys, ["fit", *TINY, "--config=a.yaml", "--data.train=shards", f"--trainer.{flag}"])
    assert said.startswith(f"error: {NOWHERE[flag]}")
