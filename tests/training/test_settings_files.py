"""Settings from files and flags: which wins, and what a file cannot say."""

import pytest
import yaml

from miniclip.commands import train as trainer


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
]


@pytest.mark.parametrize("args, name, seed, steps", ORDERS, ids=[" ".join(order[0]) for order in ORDERS])
def test_flags_beat_files_and_later_files_earlier_ones(files, capsys, args, name, seed, steps):
    found = settings(capsys, *args)
    assert (found["name"], found["seed_everything"], found["trainer"]["max_steps"]) == (name, seed, steps)


def test_what_a_flag_appends_follows_what_the_files_have(files, capsys):
    found = settings(capsys, "--trainer.callbacks+=DeviceStatsMonitor", "--config", "b.yaml", "--config", "a.yaml")
    names = [each["class_path"].split(".")[-1] for each in found["trainer"]["callbacks"]]
    assert names == ["LearningRateMonitor", "DeviceStatsMonitor"]


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


def test_one_key_in_several_mappings_and_a_merged_one_are_no_repetition(files, capsys):
    (files / "c.yaml").write_text(
        "model: {clip: {vision: &tower {width: 32, layers: 2}, text: {<<: *tower, width: 48}}}\n"
    )
    towers = settings(capsys, "--config", "c.yaml")["model"]["clip"]
    assert [(towers[name]["width"], towers[name]["layers"]) for name in ("vision", "text")] == [(32, 2), (48, 2)]
