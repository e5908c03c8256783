"""Passwords and tokens of URLs stand in the files that fetch by them, and nowhere else that a command writes."""

import json
import re

import pytest
from helpers import pack_folder, tiny_clip, write_pairs
from runs import TINY
from servers import Server

from miniclip.commands.main import main
from miniclip.common.storage import read_bytes, without_secrets, without_secrets_in
from miniclip.evaluation.datasets.sets import EvaluationSet
from miniclip.weights.load import save


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://bob:s3cret@host/x.tar", "http://host/x.tar"),
        ("HTTPS://s3cret@host:80/@me/a@b.png?v=s3cret&w=s.3.cret", "HTTPS://host:80/@me/a@b.png?v=…&w=…"),
        ("http://bob:s3/cr#et@host/x", "http://host/x"),
        ("http://host/x?s3cret", "http://host/x?…"),
        ("http://host/my photo.png?token=s3cret, twice", "http://host/my photo.png?token=…, twice"),
        ("fetch --data 'http://bob:s3cret@h/{0..3}.tar?t=s3cret' b", "fetch --data 'http://h/{0..3}.tar?t=…' b"),
        ("train: [http://a?x=s3cret, http://bob:s3cret@c]", "train: [http://a?x=…, http://c]"),
        ("s3://key:s3cret@bucket/x", "s3://bucket/x"),
        ("hf://datasets/owner/name@main/x", "hf://datasets/owner/name@main/x"),  # a commit
        ("az://container@account/x", "az://container@account/x"),
        ("http://[::1]:80/x and http://host:80/x@y", "http://[::1]:80/x and http://host:80/x@y"),
        ('{"a":"http://host","b":"x@y"}', '{"a":"http://host","b":"x@y"}'),
        ("is it? a=b, and C:\\photos", "is it? a=b, and C:\\photos"),
        ("http://host/x?id=31&file=a.png&w=s3cret", "http://host/x?id=31&file=a.png&w=…"),
        ("http://host/x?pin=1234&api_key=1234", "http://host/x?pin=…&api_key=…"),
        ("--out 'sweep/lr=1&wd=0.1', R&D=1.png, a?b=c.png", "--out 'sweep/lr=1&wd=0.1', R&D=1.png, a?b=c.png"),
    ],
)
def test_what_is_shown_of_a_url_has_no_user_and_no_values(text, shown):
    assert without_secrets(text) == shown


def test_long_texts_take_no_time_that_grows_with_the_square_of_their_length():
    # which would be hours
    for long in ("http://h/?" + "a&" * 200_000, "x://a:" * 60_000, "a.b" * 100_000 + "://", "http://" * 60_000 + " @"):
        assert len(without_secrets(long)) <= len(long)


def test_texts_within_a_value_lose_their_secrets_and_its_json_stays_whole():
    value = {"a": ['http://h?token=s3cret" x', 7], "http://me:s3cret@h": None}
    assert without_secrets_in(value) == {"a": ['http://h?token=…" x', 7], "http://h": None}


def test_keys_that_differ_in_what_is_not_shown_stay_different():
    urls = [f"http://host/photo?name={name}" for name in ("cat", "dog", "cat")] + ["a.png"]
    found = EvaluationSet("set", urls).shown_keys(range(4))
    assert found[0] == found[2] != found[1]
    assert all(re.fullmatch(r"http://host/photo\?name=… \([0-9a-f]{8}\)", key) for key in found[:3])
    assert found[3] == "a.png"
    assert EvaluationSet("set", urls[1:2]).shown_keys([0]) == ["http://host/photo?name=…"]


@pytest.mark.parametrize("url", ["http://bob:s3cret@{}/gone?a=s3cret", "http://bob:s3/cret@{}/gone?a=s3cret"])
def test_an_error_names_a_url_without_its_secrets(url):
    with Server({}) as server, pytest.raises(ValueError, match="can't be read") as caught:
        read_bytes(url.format(server.url.removeprefix("http://")))
    assert "cret" not in str(caught.value)
    assert f"{server.url}/gone?a=…" in str(caught.value)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Shards, tars and pictures at a server that takes any password; the working folder is an empty one."""
    write_pairs(tmp_path / "pictures", 24, size=(20, 16))
    pack_folder(tmp_path / "pictures", tmp_path / "shards", samples_per_shard=12)
    folders = ("pictures", "shards")
    files = {f"/{name}/{path.name}": path.read_bytes() for name in folders for path in (tmp_path / name).iterdir()}
    files |= {f"/{path.name}": path.read_bytes() for path in (tmp_path / "shards").glob("*.tar")}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))
    with Server(files) as server:
        yield server.url.replace("://", "://bob:s3cret@")


def with_secrets(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and has_secret(path)}


def has_secret(path):
    return b"s3cret" in path.read_bytes() or "s3cret" in path.name


def test_a_run_and_its_scores_have_secrets_in_the_files_that_fetch_by_them_alone(served, tmp_path, capfd):
    main(["shards", f"{served}/{{00000..00001}}.tar", "index", "--index-only"])
    ends = ["--trainer.default_root_dir=run", "--trainer.max_steps=2"]
    main(["train", "fit", *TINY, "--data.train=index", f"--data.val={served}/shards", *ends])
    main(["eval", "--model", "run/best", "--data", f"{served}/{{00000..00001}}.tar", "--task", "retrieval", "--out",
          "run/report", "--workers", "0"])  # fmt: skip
    record = json.loads((tmp_path / "here/run/logs/version_0/run.json").read_text())
    tars = served.replace("bob:s3cret@", "") + "/{00000..00001}.tar"
    assert record["training_data"] == [{"source": tars, "pairs": 24}]
    main(["push", "run/best", "owner/name", "--dry-run"])
    out = "".join(capfd.readouterr())
    assert "owner/name" in out
    assert "s3cret" not in out
    assert with_secrets(tmp_path / "here") == {"index/index.json", "run/logs/version_0/config.yaml"}


def test_pictures_named_by_urls_are_packed_checked_and_scored_without_secrets(served, tmp_path, capfd):
    save(tiny_clip(1), "model")
    names = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))[:6]
    assert names
    rows = [f"{served}/pictures/{name}?token=s3cret,a picture of {name[:-4]}" for name in [*names, "gone.png"]]
    (tmp_path / "pictures.csv").write_text("\n".join(["url,caption", *rows]))
    main(["shards", "../pictures.csv", "shards"])
    main(["check", "../pictures.csv", "--out", "check.html"])
    main(["eval", "--model", "model", "--data", "../pictures.csv", "--task", "retrieval", "--out", "report",
          "--workers", "0"])  # fmt: skip
    main(["embed", "../pictures.csv", "embeddings", "--model", "model", "--workers", "0"])
    assert "s3cret" not in "".join(capfd.readouterr())
    assert with_secrets(tmp_path / "here") == {"embeddings/part-00000.parquet"}  # its keys and paths
