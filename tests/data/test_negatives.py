"""Hard negatives: alike samples in one batch, every sample once an epoch, the same batches on every machine."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import pack_folder, table, tiny_clip, trainer_at, write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

import miniclip
from miniclip.commands import main as cli
from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.module import PairDataModule
from miniclip.data.pack import pack
from miniclip.data.pairs import group_id
from miniclip.data.sample_files import Packing
from miniclip.data.sampling.negatives import Groups, HardOrder, Neighbours, _two_means, quantised
from miniclip.data.sampling.order import BatchSampler, SampleOrder
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs


def directions(centres: int, each: int, seed: int = 0) -> np.ndarray:
    """(centres * each, 32) unit vectors around distant centres, one centre after the other."""
    random = np.random.default_rng(seed)
    vectors = np.repeat(np.eye(32)[:centres], each, axis=0) + 0.05 * random.standard_normal((centres * each, 32))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def likeness(kind: str, count: int, seed: int = 0) -> Neighbours | Groups:
    random = np.random.default_rng(seed)
    if kind == "neighbours":
        return Neighbours(quantised(directions(1, count, seed)))
    groups = random.integers(0, max(1, count // 3), count)
    return Groups(lambda samples: groups[samples], "group")


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(lambda counts: sum(counts) >= 4),
    batch_size=st.integers(2, 12),
    seed=st.integers(0, 9),
    kind=st.sampled_from(["neighbours", "groups"]),
    cut=st.integers(1, 50),
)
def test_every_epoch_is_every_sample_once_and_slices_are_parts_of_one_sequence(counts, batch_size, seed, kind, cut):
    total = sum(counts)
    batch_size = min(batch_size, total // 2)
    order = HardOrder(SampleOrder(np.array(counts), seed), batch_size, likeness(kind, total))
    whole = order.slice(0, 3 * total)
    for epoch in range(3):
        places = whole[epoch * total : (epoch + 1) * total]
        assert {number for number, _ in places} == {epoch}
        assert sorted(sample for _, sample in places) == list(range(total))
    fresh = HardOrder(SampleOrder(np.array(counts), seed), batch_size, likeness(kind, total))
    for start in reversed(range(0, 3 * total, cut)):  # as a resumed run, which has not been there before
        assert fresh.slice(start, min(start + cut, 3 * total)) == whole[start : start + cut]


@pytest.mark.parametrize("kind", ["neighbours", "groups"])
def test_ranks_share_the_batches_of_one_process_and_a_resumed_run_goes_on_with_them(kind):
    def batches(rank: int, ranks: int, step: int = 0) -> list[list[tuple[int, int]]]:
        order = HardOrder(SampleOrder(np.array([30, 40, 27]), 5), 12, likeness(kind, 97))
        return list(BatchSampler(order, 12, lambda: step, rank, ranks))

    whole = batches(0, 1)
    for ranks in (2, 3):
        shares = [batches(rank, ranks) for rank in range(ranks)]
        assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole
    assert batches(0, 1, step=3) == whole[3:]


def test_a_pool_of_clusters_becomes_one_batch_of_each():
    # Eight centres of 16 samples, so each pool of eight batches can be cut into pure ones.
    order = HardOrder(SampleOrder(np.full(8, 16), 0), 16, Neighbours(quantised(directions(8, 16))))
    for epoch in range(3):
        for start in range(epoch * 128, (epoch + 1) * 128, 16):
            assert len({sample // 16 for _, sample in order.slice(start, start + 16)}) == 1
    firsts = [order.slice(epoch * 128, epoch * 128 + 1)[0][1] // 16 for epoch in range(12)]
    assert len(set(firsts)) > 3  # the batches of a pool come in random order


def test_a_batch_holds_far_more_of_the_nearest_than_a_random_one():
    features = np.random.default_rng(0).standard_normal((1024, 16)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    nearest = np.argsort(-features @ features.T, axis=1)[:, 1:11]  # the oracle: all cosines
    shares = {}
    for name, order in {
        "random": SampleOrder(np.array([1024]), 0),
        "hard": HardOrder(SampleOrder(np.array([1024]), 0), 128, Neighbours(quantised(features))),
    }.items():
        found = 0
        for start in range(0, 1024, 128):
            batch = [sample for _, sample in order.slice(start, start + 128)]
            found += int(np.isin(nearest[batch], batch).sum())
        shares[name] = found / (1024 * 10)
    assert shares["random"] < 0.15
    assert shares["hard"] > 3 * shares["random"]


def test_two_means_are_those_of_whole_numbers_of_any_size():
    random = np.random.default_rng(3)
    features = random.integers(-127, 128, (300, 700)).astype(np.float32)
    found = _two_means(features, 110, np.random.default_rng(4))

    exact = features.astype(object).astype(int).tolist()  # Python's own, without limit
    first, second = np.random.default_rng(4).choice(300, 2, replace=False)
    direction = [a - b for a, b in zip(exact[first], exact[second], strict=True)]
    left: set[int] = set()
    for _ in range(5):
        most, limit = max(map(abs, direction)), min(127, 2**24 // (127 * 700) - 1)
        small = [value * limit // most for value in direction]
        along = [sum(a * b for a, b in zip(row, small, strict=True)) for row in exact]
        before, left = left, set(sorted(range(300), key=lambda n: -along[n])[:110])
        if left == before:
            break
        sums = [sum(column[n] for n in left) for column in zip(*exact, strict=True)]
        totals = [sum(column) for column in zip(*exact, strict=True)]
        direction = [each * 190 - (total - each) * 110 for each, total in zip(sums, totals, strict=True)]
    assert set(np.flatnonzero(found)) == left


def test_a_group_that_fits_lies_in_one_batch_or_in_two_that_meet():
    groups = np.repeat(np.arange(40), 5)  # 200 samples, groups of five
    order = HardOrder(SampleOrder(np.full(10, 20), 1), 20, Groups(lambda samples: groups[samples], "group"))
    for epoch in range(2):
        starts = range(epoch * 200, (epoch + 1) * 200, 20)
        for start in starts:
            assert len({groups[sample] for _, sample in order.slice(start, start + 20)}) == 4
    pairs = [{groups[sample] for _, sample in order.slice(start, start + 20)} for start in (0, 200)]
    assert pairs[0] != pairs[1]  # other groups meet in the next epoch


def test_a_million_samples_cost_under_a_tenth_of_a_millisecond_each_and_a_byte_a_feature():
    import time

    features = np.random.default_rng(0).integers(-127, 128, (1_000_000, 64), dtype=np.int8)
    order = HardOrder(SampleOrder(np.full(100, 10_000), 0), 1024, Neighbours(features))
    begin = time.process_time()
    places = order.slice(0, 8 * 8192)
    assert time.process_time() - begin < 1e-4 * len(places)
    assert len({sample for _, sample in places}) == 8 * 8192
    assert features.nbytes == 64e6


# ---------------------------------------------------------------------------------------------------------------------
# Of shards


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Shards of 24 pairs, of a table with the columns kind and lot, and a model to embed them with."""
    folder = tmp_path_factory.mktemp("shelf")
    write_pairs(folder / "src", 24)
    lines = [f"{n:04d}.png,picture {n},k{n % 3},{n // 2 if n % 5 else ''}" for n in range(24)]
    source = table(folder / "src" / "pairs.csv", "image,caption,kind,lot", *lines)
    for name, count in (("shards", 10), ("other", 7)):
        pack(read_pairs(source), folder / name, source=str(source), packing=Packing(samples_per_shard=count))
    pack_folder(folder / "src", folder / "bare")
    miniclip.save(tiny_clip(), folder / "model")
    embed(folder, "shards", "embeddings")
    return folder


def embed(folder: Path, shards: str, out: str, *more: str, model: str = "model") -> None:
    cli.main(["embed", str(folder / shards), str(folder / out), "--model", str(folder / model), *more])


def module(train: Path | list[str], **options: Any) -> PairDataModule:
    train = train if isinstance(train, list) else str(train)
    data = PairDataModule(
        train, **{"image_size": 16, "context_length": 16, "batch_size": 4, "num_workers": 0, **options}
    )
    data.trainer = trainer_at(0)
    data.setup("fit")
    return data


def hard(shelf: Path, **options: Any) -> PairDataModule:
    return module(shelf / "shards", negatives="hard", neighbours=str(shelf / "embeddings"), **options)


def check_neighbours(data: PairDataModule, embeddings: Path, expected_keys: list[str]) -> None:
    import pandas as pd

    features = data.likeness().features
    rows = pd.read_parquet(embeddings).set_index("key")
    assert len(features) == len(expected_keys) == len(rows)
    for index, key in enumerate(expected_keys):
        np.testing.assert_array_equal(features[index], quantised(np.stack([rows.embedding[key]]))[0])


def test_neighbours_are_what_miniclip_embed_wrote_for_each_sample(shelf):
    keys = [f"{n // 10:05d}.tar:{n:09d}" for n in range(24)]
    check_neighbours(hard(shelf), shelf / "embeddings", [f"{shelf / 'shards'}/{key}" for key in keys])


def test_embeddings_whose_keys_have_no_folder_are_those_of_their_samples_too(shelf, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(shelf / "embeddings", tmp_path / "before")  # as earlier versions wrote them
    table = pq.read_table(tmp_path / "before/part-00000.parquet")
    keys = [f"{n // 10:05d}.tar:{n:09d}" for n in range(24)]
    pq.write_table(table.set_column(0, "key", pa.array(keys)), tmp_path / "before/part-00000.parquet")
    data = module(shelf / "shards", negatives="hard", neighbours=str(tmp_path / "before"))
    check_neighbours(data, tmp_path / "before", keys)
    np.testing.assert_array_equal(data.likeness().features, hard(shelf).likeness().features)


def test_neighbours_of_tars_of_one_name_are_those_of_their_own_folder(shelf, tmp_path):
    index_shards(f"{shelf}/{{other,shards}}/00000.tar", tmp_path / "both")
    cli.main(["embed", str(tmp_path / "both"), str(tmp_path / "out"), "--model", str(shelf / "model")])
    data = module(tmp_path / "both", negatives="hard", neighbours=str(tmp_path / "out"))
    keys = [f"{shelf.resolve()}/other/00000.tar:{n:09d}" for n in range(7)]
    keys += [f"{shelf.resolve()}/shards/00000.tar:{n:09d}" for n in range(10)]
    check_neighbours(data, tmp_path / "out", keys)
    assert Shards(tmp_path / "both").names() == keys


def rewrite_keys(folder: Path, keys: list[str], rows: list[int], unreadable: int = 0) -> None:
    """Some rows of embeddings in one file, with the keys that another version or another place gave them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = folder / "part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.set_column(0, "key", pa.array(keys)).take(rows), part)
    manifest = json.loads((folder / "_manifest.json").read_text())
    (folder / "_manifest.json").write_text(json.dumps(manifest | {"unreadable": unreadable}))


def test_tars_of_one_name_have_their_neighbours_whatever_folder_is_in_the_keys(shelf, tmp_path):
    """The oracle is the order: seven samples of other, then ten of shards, whose first seven have the same keys."""
    index_shards(f"{shelf}/{{other,shards}}/00000.tar", tmp_path / "both")
    cli.main(["embed", str(tmp_path / "both"), str(tmp_path / "out"), "--model", str(shelf / "model")])
    expected = module(tmp_path / "both", negatives="hard", neighbours=str(tmp_path / "out")).likeness().features
    samples = [("other", n) for n in range(7)] + [("shards", n) for n in range(10)]
    bare = [f"00000.tar:{n:09d}" for _, n in samples]
    places = [f"{shelf.resolve()}/{part}/00000.tar:{n:09d}" for part, n in samples]
    moved = [f"/mnt/{part}/00000.tar:{n:09d}" for part, n in samples]
    every, but_own, but_shared = [*range(17)], [n for n in range(17) if n != 15], [n for n in range(17) if n != 3]

    def features(keys: list[str], rows: list[int]) -> np.ndarray:
        shutil.copytree(tmp_path / "out", tmp_path / "other", dirs_exist_ok=True)
        rewrite_keys(tmp_path / "other", keys, rows, 17 - len(rows))
        return module(tmp_path / "both", negatives="hard", neighbours=str(tmp_path / "other")).likeness().features

    for keys in (bare, places, moved):
        np.testing.assert_array_equal(features(keys, every), expected)
        np.testing.assert_array_equal(features(keys, but_own), np.where(np.arange(17)[:, None] == 15, 0, expected))
    np.testing.assert_array_equal(features(places, but_shared), np.where(np.arange(17)[:, None] == 3, 0, expected))
    for keys in (bare, moved):
        with pytest.raises(ValueError, match=r"other has fewer rows than samples of 1 names that come several times"):
            features(keys, but_shared)


def test_batches_of_neighbours_come_from_the_loader_with_their_pictures(shelf):
    data = hard(shelf)
    keys = [key for batch in data.train_dataloader() for key in batch.keys]
    names = [Shards(shelf / "shards").name(sample) for _, sample in data.sample_order().slice(0, 24)]
    assert keys == names
    assert sorted(keys) == sorted(set(keys))
    assert "each once, in batches of neighbours in" in data.describe()


@pytest.mark.long
def test_batches_of_one_group_follow_a_column_of_the_table(shelf):
    data = module(shelf / "shards", negatives="hard", group="kind")
    shards = Shards(shelf / "shards")
    kinds = [
        Counter(shards.info(sample)["kind"] for _, sample in data.sample_order().slice(n, n + 4))
        for n in range(0, 24, 4)
    ]
    assert sorted(len(kind) for kind in kinds) == [1] * 6
    assert "in batches of groups by 'kind'" in data.describe()


def test_a_checkpoint_of_random_batches_is_refused_by_hard_ones_and_its_own_is_taken(shelf):
    state = hard(shelf).state_dict()
    hard(shelf).load_state_dict(state)
    assert state["negatives"].startswith("hard, neighbours ")
    plain = module(shelf / "shards")
    with pytest.raises(ValueError, match=r"trained with negatives hard, neighbours \w+, this run has None"):
        plain.load_state_dict(state)
    older = {name: value for name, value in plain.state_dict().items() if "negatives" not in name and "." not in name}
    plain.load_state_dict(older)  # written before there was a choice


@pytest.mark.parametrize(
    "options, message",
    [
        ({"negatives": "harder"}, "data.negatives is 'harder'; valid are random, hard"),
        ({"neighbours": "x"}, "data.neighbours is x, which nothing uses: set data.negatives to hard"),
        ({"group": "kind"}, "data.group is 'kind', which nothing uses: set model.positives to group"),
        ({"negatives": "hard", "neighbours": ["a", "b"]}, "data.neighbours names 2 folders and data.train 1 sources"),
        ({"negatives": "hard", "order": "stream"}, "which needs all samples known, and data.order is 'stream'"),
        ({"negatives": "hard", "weights": [1.0]}, "data.negatives is 'hard' and data.weights is set"),
        (
            {"negatives": "hard", "positives": "group", "group": "kind"},
            "by the same groups ('kind'): a batch of one group has nothing to tell apart. Set data.neighbours",
        ),
        ({"negatives": "hard", "group": "sort"}, "data.group is 'sort', and 00000.tar:000000000 has no such field"),
        ({"positives": "group"}, "has no such field: its .json has source, kind, lot, width, height"),
        (
            {"positives": "caption", "captions": miniclip.data.pairs.CaptionChoice(per_image=2)},
            "data.captions.per_image is 2",
        ),
    ],
)
def test_what_contradicts_itself_or_is_not_there_is_refused_before_a_step(shelf, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        module(shelf / "shards", **options)


def test_a_batch_that_leaves_nothing_to_choose_from_is_refused(shelf):
    with pytest.raises(ValueError, match=r"a batch of 13 takes all or most of the 24 samples.*to 12 or less"):
        hard(shelf, batch_size=13).sample_order()


def test_embeddings_of_anything_else_are_refused_with_the_command_that_writes_the_right_ones(shelf, tmp_path):
    def refused(folder: Path, message: str, train: Path | list[str] | None = None, **more: Any) -> None:
        data = module(train or shelf / "shards", negatives="hard", neighbours=more.pop("neighbours", str(folder)))
        with pytest.raises(ValueError, match=message):
            data.sample_order()

    remedy = re.escape(f"`miniclip embed {shelf / 'shards'} ")
    refused(tmp_path / "gone", f"gone does not exist.*{remedy}")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", f"empty is not a folder of embeddings.*{remedy}")
    refused("https://host/x", "is https://host/x; it must be a folder on a disk")
    embed(shelf, "other", "of-other")
    refused(shelf / "of-other", f"was not made from {shelf / 'shards'} as it is now.*{remedy}")
    embed(shelf, "shards", "of-texts", "--texts")
    refused(shelf / "of-texts", "holds embeddings of texts in the layout parquet")
    miniclip.save(tiny_clip(1), shelf / "model1")
    embed(shelf, "other", "by-another", model="model1")
    both = {"neighbours": [str(shelf / "embeddings"), str(shelf / "by-another")]}
    refused(shelf, "was written by another model", [str(shelf / "shards"), str(shelf / "other")], **both)
    embed(shelf, "other", "rounded", "--precision", "bf16")
    both = {"neighbours": [str(shelf / "embeddings"), str(shelf / "rounded")]}
    refused(shelf, r"rounded was written in bf16, and .*", [str(shelf / "shards"), str(shelf / "other")], **both)


def test_embeddings_that_miss_a_sample_or_a_file_are_refused(shelf, tmp_path):
    embed(shelf, "shards", "short", "--rows-per-file", "20")
    manifest = json.loads((shelf / "short/_manifest.json").read_text())
    (shelf / "short/part-00001.parquet").unlink()
    data = module(shelf / "shards", negatives="hard", neighbours=str(shelf / "short"))
    with pytest.raises(ValueError, match=r"part-00001.parquet is damaged or gone"):
        data.sample_order()
    manifest["files"] = {"part-00000.parquet": 20}
    (shelf / "short/_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has embeddings of 20 of the 24 samples and lists 0 that could not be read"):
        data.sample_order()
    (shelf / "short/_manifest.json").write_text(
        json.dumps({"kind": "image", "layout": "parquet", "is_complete": False})
    )
    with pytest.raises(ValueError, match="short is not complete: repeat the `miniclip embed`"):
        data.sample_order()
    (shelf / "short/_manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"_manifest\.json is damaged"):
        data.sample_order()


def test_several_sources_have_their_embeddings_one_after_the_other(shelf):
    embed(shelf, "other", "of-other-too")
    sources = [str(shelf / "other"), str(shelf / "shards")]
    neighbours = [str(shelf / "of-other-too"), str(shelf / "embeddings")]
    data = module(sources, negatives="hard", neighbours=neighbours)
    features = data.likeness().features
    np.testing.assert_array_equal(features[:24], features[24:])  # the same pictures in other shards
    assert len(data.sample_order().slice(0, 48)) == 48


# ---------------------------------------------------------------------------------------------------------------------
# Groups that are put into shards


def groups_of(shards: Path) -> list[Any]:
    opened = Shards(shards)
    return [opened.info(index)["group"] for index in range(len(opened))]


@pytest.mark.parametrize("source", ["src", "src/pairs.csv", "bare"])
def test_a_table_of_groups_is_put_into_shards_and_what_it_leaves_out_is_alone(shelf, tmp_path, capsys, source):
    name = "00000.tar:00000000{}" if source == "bare" else "000{}.png"
    key = [name.format(n) if source == "bare" else f"{n:04d}.png" for n in range(10)]
    groups = table(tmp_path / "groups.csv", "key,group", f"{key[1]},red", f"{key[4]},red", f"{key[5]},7", "gone,7")
    cli.main(["shards", str(shelf / source), str(tmp_path / "out"), "--groups", str(groups)])
    err = capsys.readouterr().err
    assert "3 of 24 pairs are in 2 groups" in err
    assert "1 of the rows of" in err
    assert "gone" in err
    expected = [{1: "red", 4: "red", 5: "7"}.get(n) for n in range(24)]
    assert groups_of(tmp_path / "out") == expected
    (batch,) = module(tmp_path / "out", positives="group", batch_size=24).train_dataloader()
    by_key = dict(zip(batch.keys, batch.groups.tolist(), strict=True))
    of_sample = [by_key[Shards(tmp_path / "out").name(n)] for n in range(24)]
    assert of_sample[1] == of_sample[4]
    assert len(set(of_sample)) == 23


NO_VALUES = ("nan", "nan", "NA", "<NA>", "None", "", " ")


def test_cells_without_a_value_are_no_group(shelf, tmp_path, capsys):
    rows = [f"{n:04d}.png,{group}" for n, group in enumerate(("red", "red", *NO_VALUES))]
    groups = table(tmp_path / "groups.csv", "key,group", *rows)
    cli.main(["shards", str(shelf / "src"), str(tmp_path / "out"), "--groups", str(groups)])
    told = "2 of 24 pairs are in 1 group, by .*in no group are those of 'nan' .2 times., 'NA' .1 times., '<NA>'"
    assert re.search(told, capsys.readouterr().err)
    assert groups_of(tmp_path / "out") == ["red", "red", *[None] * 22]


@pytest.mark.parametrize("options", [{"positives": "group"}, {"negatives": "hard"}])
def test_a_column_of_cells_without_a_value_groups_no_strangers(tmp_path, options):
    kinds = ("red", "red", "nan", *NO_VALUES, "7", "7.0")
    folder = write_pairs(tmp_path / "src", len(kinds))
    rows = [f"{n:04d}.png,text {n},{kind}" for n, kind in enumerate(kinds)]
    pack(read_pairs(table(folder / "t.csv", "image,caption,kind", *rows)), tmp_path / "out", source="t")
    with pytest.warns(
        UserWarning, match=r"of 12 samples that were looked at, 'nan' \(3 times\), 'NA' .* a group of its"
    ):
        data = module(tmp_path / "out", group="kind", batch_size=12, **options)
    shards = Shards(tmp_path / "out")
    of_sample = [group_id(shards.info(n), "kind", shards.name(n)) for n in range(12)]
    assert of_sample[0] == of_sample[1]
    assert len(set(of_sample)) == 11  # one pair alone: 7 and 7.0 are other texts
    if "positives" in options:
        (batch,) = data.train_dataloader()
        assert Counter(batch.groups.tolist()) == Counter(of_sample)


@pytest.mark.parametrize(
    "lines, message",
    [
        (["key,kind", "0001.png,a"], "has no column 'group'; its columns are 'key', 'kind'"),
        (["key,group", "0001.png,a", "0001.png,b"], "row 2: 0001.png has the group 'b' and in a row before 'a'"),
        (["key,group", "nowhere.png,a"], "names a pair of"),
    ],
)
def test_a_table_that_gives_no_groups_is_refused(shelf, tmp_path, capsys, lines, message):
    groups = table(tmp_path / "groups.csv", *lines)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["shards", str(shelf / "src"), str(tmp_path / "out"), "--groups", str(groups)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
