"""Packing by Ray's actors, on two CPUs of this machine. Oracle: the plain command, byte for byte."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys

import pytest
from helpers import everything_below, table, write_pairs

from miniclip.commands import main as cli
from miniclip.data.open_pairs import open_pairs

ON_TWO_CPUS = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["DRIVER"] = str(os.getpid())
import ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
from miniclip.commands.main import main
main(["shards", *sys.argv[1:], "--engine", "ray"])
"""

# Python runs a module of this name when it starts. The actor that first opens a certain picture ends by SIGKILL.
MORTAL = """
import os, signal, sys
from pathlib import Path

MARK = Path(__file__).with_name("has died")

def die_once(event, arguments):
    if event == "open" and str(arguments[0]).endswith("0077.png") and os.environ.get("DRIVER") != str(os.getpid()):
        try:
            MARK.touch(exist_ok=False)
        except FileExistsError:
            return
        os.write(os.open(MARK, os.O_WRONLY), str(os.getpid()).encode())
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die_once)
"""


def on_ray(folder, *args, code=0, path=""):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_memory_monitor_refresh_ms": "0",  # else a machine that is short of memory ends actors for ever
        "PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-c", ON_TWO_CPUS, *map(str, args)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.long
def test_an_actor_that_is_killed_starts_again_and_the_shards_are_those_of_the_plain_command(tmp_path, monkeypatch):
    """Relative paths, shrunk pictures, torn ones, two sides, chunks that end within an actor's piece."""
    photos = write_pairs(tmp_path / "photos", 150)
    (photos / "0017.png").write_bytes(b"torn")
    (photos / "0018.txt").write_text("\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(MORTAL)
    options = ["--samples-per-shard", "40", "--resize", "16", "--val-fraction", "0.2", "--min-side", "9"]
    done = on_ray(tmp_path, "photos", "ray", *options, path=tmp_path / "site")
    assert int((tmp_path / "site" / "has died").read_text()) != os.getpid()
    monkeypatch.chdir(tmp_path)
    cli.main(["shards", "photos", "plain", *options])
    assert everything_below(tmp_path / "ray") == everything_below(tmp_path / "plain")
    assert "held out in 8 shards" in done.stdout
    assert "2 rejected" in done.stdout


@pytest.mark.long
def test_a_run_on_ray_that_is_killed_goes_on_without_it_and_the_other_way_round(tmp_path):
    write_pairs(tmp_path / "photos", 100)
    killed = (
        "import os, signal\nfrom miniclip.data.tar_writer import Tar\nwrite = Tar.write\n"
        "def write_some(self, key, members):\n"
        "    if key == '000000050':\n        os.kill(os.getpid(), signal.SIGKILL)\n    write(self, key, members)\n"
        "Tar.write = write_some\n"
    )
    args = ["photos", "out", "--samples-per-shard", "20"]
    done = subprocess.run(
        [sys.executable, "-c", killed + ON_TWO_CPUS, *args], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "out.partial").glob("chunk-*.json"))) == 2
    cli.main(["shards", str(tmp_path / "photos"), str(tmp_path / "plain"), "--samples-per-shard", "20"])
    on_ray(tmp_path, *args)
    assert everything_below(tmp_path / "out").keys() == everything_below(tmp_path / "plain").keys()
    for tar in (tmp_path / "plain").glob("*.tar"):
        assert (tmp_path / "out" / tar.name).read_bytes() == tar.read_bytes()


@pytest.mark.long
def test_a_picture_that_only_this_machine_has_is_an_error_and_no_rejection(tmp_path):
    """An actor does not see what the process that calls sees: here, for a folder that it must not open."""
    write_pairs(tmp_path / "photos", 10)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def blind(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('0003.png') and 'DRIVER' in os.environ:\n"
        "        if os.environ['DRIVER'] != str(os.getpid()):\n"
        "            raise FileNotFoundError(2, 'No such file or directory', str(arguments[0]))\n"
        "sys.addaudithook(blind)\n"
    )
    done = on_ray(tmp_path, "photos", "out", path=tmp_path / "site", code=2)
    assert "0003.png can't be read on" in done.stderr
    assert "every machine needs the pictures under the same names" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def kinds_of_source(folder):
    write_pairs(folder / "photos", 3)
    rows = ["image,caption"] + [f"photos/{path.name},words" for path in sorted((folder / "photos").glob("*.png"))]
    yield str(folder / "photos")
    yield str(table(folder / "pairs.csv", *rows))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [path.read_bytes() for path in sorted((folder / "photos").glob("*.png"))]
    parquet.write_table(pyarrow.table({"image": images, "caption": ["one", "two", "three"]}), folder / "p.parquet")
    yield str(folder / "p.parquet")
    import datasets

    datasets.Dataset.from_dict(
        {"image": [{"bytes": image, "path": None} for image in images], "caption": ["one", "two", "three"]},
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    ).save_to_disk(str(folder / "set"))
    yield str(folder / "set")
    cli.main(["shards", str(folder / "photos"), str(folder / "shards")])
    yield str(folder / "shards")


def test_the_pairs_of_every_kind_of_source_travel_to_an_actor(tmp_path):
    import cloudpickle  # as Ray does it

    for source in kinds_of_source(tmp_path):
        pairs = open_pairs(source)
        assert [pairs[0]] == [pairs[0]]  # its files are open
        there = pickle.loads(cloudpickle.dumps(pairs))
        assert [there[index] for index in range(3)] == [pairs[index] for index in range(3)], source


def test_several_machines_index_by_parts_and_not_by_ray(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["shards", str(tmp_path), "--index-only", "--engine", "ray"])
    assert ended.value.code == 2
    assert "--engine is for packing; several machines index tars with --part" in capsys.readouterr().err
