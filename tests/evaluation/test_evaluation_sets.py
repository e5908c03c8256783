"""Every layout that people keep evaluation data in: the same images give the same labels, names and pixels."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Served, picture, tiny_clip, write_pairs, write_picture
from servers import Server
from torch.utils.data import ConcatDataset, DataLoader
from written_sets import lines, tar

from miniclip import tokenizer
from miniclip.commands import main as cli
from miniclip.common import storage
from miniclip.data.indexing.index_tars import index_shards
from miniclip.evaluation.datasets.open import open_dataset
from miniclip.evaluation.datasets.sets import CaptionedImages, LabelledImages, MultilabelImages, labelled
from miniclip.evaluation.datasets.tars import hub_location, indexed
from miniclip.evaluation.prompts import template_set
from miniclip.evaluation.zero_shot import zero_shot_classifier

NAMES = ("barn owl", "crane", "kea")
LABELS = (2, 0, 1, 1, 0, 2, 2)
SCENES = tuple("aabbccd")
TEMPLATES = ("a {c} in the wild", "{c}!")


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """A cache of its own, no proxy, short waits between tries; and a hub that does not answer, for who asks for one."""
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(storage, "_WAITS_S", (0.001,) * 2)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def benchmark_set(root: Path, members: dict[str, list[bytes]], split: str = "test", shards: int = 2, **texts: str):
    """CLIP_benchmark's layout; `texts` are its .txt by name."""
    count = len(LABELS)
    for shard in range(shards):
        numbers = range(shard * count // shards, (shard + 1) * count // shards)
        samples = {f"s{n:07d}": {"png": png(n), **{m: values[n] for m, values in members.items()}} for n in numbers}
        tar(root / split / f"{shard}.tar", samples)
    lines(root / split / "nshards.txt", str(shards))
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)
    return root


CLS = [str(label).encode() for label in LABELS]
NAMED = {"classnames": "\n".join(NAMES) + "\n", "zeroshot_classification_templates": "\n".join(TEMPLATES) + "\n"}


def write(layout: str, root: Path) -> Path | str:
    """The pictures with their labels in one of the layouts."""
    rows = [{"image": f"pictures/{n}.png", "species": NAMES[label], "scene": SCENES[n]}
            for n, label in enumerate(LABELS)]  # fmt: skip
    if layout == "folder":
        for n, label in enumerate(LABELS):
            write_picture(root / NAMES[label].replace(" ", "_") / f"{n}.png", n)
        return root
    for n in range(len(LABELS)):
        write_picture(root / "pictures" / f"{n}.png", n)
    if layout in ("csv", "tsv"):
        with open(root / f"birds.{layout}", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if layout == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif layout == "jsonl":
        lines(root / "birds.jsonl", *map(json.dumps, rows))
    elif layout in ("parquet", "parquet with images"):
        import pyarrow
        from pyarrow import parquet

        if layout == "parquet with images":
            rows = [{**row, "image": {"bytes": png(n), "path": None}} for n, row in enumerate(rows)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), root / "birds.parquet", row_group_size=3)
        return root / "birds.parquet"
    elif layout in ("datasets", "parquet of datasets"):
        import datasets

        features = datasets.Features(
            {"image": datasets.Image(), "species": datasets.ClassLabel(names=list(NAMES)),
             "scene": datasets.Value("string")}
        )  # fmt: skip
        columns = {
            "image": [{"bytes": png(n), "path": None} for n in range(len(LABELS))],
            "species": list(LABELS),
            "scene": list(SCENES),
        }
        made = datasets.Dataset.from_dict(columns, features=features)
        if layout == "datasets":
            datasets.DatasetDict({"train": made.select([0]), "test": made}).save_to_disk(root / "set")
            return root / "set"
        made.to_parquet(root / "birds.parquet")
        return root / "birds.parquet"
    elif layout in ("shards", "bare shards"):
        for shard, numbers in enumerate(((0, 1, 2, 3), (4, 5, 6))):
            facts = {n: json.dumps({"scene": SCENES[n]}).encode() for n in numbers}
            samples = {f"{n:09d}": {"png": png(n), "cls": CLS[n], "json": facts[n]} for n in numbers}
            tar(root / "shards" / f"{shard:05d}.tar", samples)
        lines(root / "shards" / "classnames.txt", *NAMES)
        if layout == "shards":
            index_shards(str(root / "shards"))
        return root / "shards"
    return root / f"birds.{layout}"


TABLES = ["csv", "tsv", "jsonl", "parquet", "parquet with images", "parquet of datasets", "datasets"]
LAYOUTS = ["folder", *TABLES, "shards", "bare shards"]


def is_of(data, number: int, seed: int) -> bool:
    return np.array_equal(np.asarray(data.open(number).convert("RGB")), np.asarray(picture(seed)))


def seeds_of(data) -> list[int]:
    """Which picture each image is, by its pixels."""
    known = {picture(seed).tobytes(): seed for seed in range(20)}
    return [known[data.open(number).convert("RGB").tobytes()] for number in range(len(data))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_labels_names_and_pixels(tmp_path, layout):
    source = write(layout, tmp_path / "birds")
    column = {"label_column": "species"} if layout in TABLES else {}
    data = open_dataset(source, **column)
    assert isinstance(data, LabelledImages)
    assert data.classnames == NAMES
    seeds = seeds_of(data)
    assert sorted(seeds) == list(range(len(LABELS)))
    assert [data.labels[number] for number in range(len(data))] == [LABELS[seed] for seed in seeds]
    assert len({data.key(number) for number in range(len(data))}) == len(LABELS)
    assert data.templates == ("a photo of a {c}.",)
    assert data.templates_from == "the built-in set 'simple'"
    assert data.classnames_from
    if layout != "folder":
        grouped = open_dataset(source, **column, group_column="scene")
        assert grouped.groups == SCENES
        assert list(grouped.metadata["scene"]) == list(SCENES)
    assert not (Path(source) / "index.json").exists() or layout == "shards"  # what is theirs stays as it was


class Opened(torch.utils.data.Dataset):
    def __init__(self, data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> bytes:
        return self.data.open(number).convert("RGB").tobytes()


def opened(layout: str, root: Path):
    if layout == "pairs":
        return open_dataset(write_pairs(root / "pairs", len(LABELS)), task="retrieval")
    return open_dataset(write(layout, root), label_column=None if layout == "shards" else "species")


LAZY = ["parquet with images", "datasets", "shards", "pairs"]


@pytest.mark.parametrize("layout", LAZY)
def test_images_are_read_by_the_forked_workers_of_a_loader(tmp_path, layout):
    data = opened(layout, tmp_path)
    before = data.open(0).tobytes()  # what is open here already must not get in their way
    loader = DataLoader(Opened(data), batch_size=3, num_workers=2, collate_fn=list, multiprocessing_context="fork")
    read = [pixels for batch in loader for pixels in batch]
    assert read == [picture(seed).tobytes() for seed in range(len(LABELS))]
    assert before == read[0]


@pytest.mark.long
def test_images_are_read_by_workers_that_start_anew(tmp_path):
    sets = [opened(layout, tmp_path / layout) for layout in LAZY]
    for data in sets:
        data.open(0)
    together = ConcatDataset([Opened(data) for data in sets])
    loader = DataLoader(together, batch_size=3, num_workers=1, collate_fn=list, multiprocessing_context="spawn")
    read = [pixels for batch in loader for pixels in batch]
    assert read == [picture(seed).tobytes() for seed in range(len(LABELS))] * len(sets)


def test_a_class_label_is_found_by_its_type(tmp_path):
    data = open_dataset(write("datasets", tmp_path))
    assert (data.labels, data.classnames) == (LABELS, NAMES)
    assert data.classnames_from == "column 'species', a ClassLabel"
    assert len(open_dataset(tmp_path / "set", split="train")) == 1
    with pytest.raises(ValueError, match="has no split 'val'; it has train, test"):
        open_dataset(tmp_path / "set", split="val")
    with pytest.raises(ValueError, match="has no column 'kind'; its columns are 'image', 'species', 'scene'"):
        open_dataset(tmp_path / "set", label_column="kind")


def saved_set(path: Path, features: dict, **columns) -> Path:
    import datasets

    columns["image"] = [{"bytes": png(n), "path": None} for n in range(len(next(iter(columns.values()))))]
    features = datasets.Features({"image": datasets.Image(), **features})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(path)
    return path


def test_a_set_without_class_label_names_its_columns(tmp_path):
    import datasets

    source = saved_set(tmp_path / "set", {"kind": datasets.Value("string")}, kind=["kea", "crane"])
    with pytest.raises(ValueError, match=r"no column of type ClassLabel; its columns are .*kind.*--label-column"):
        open_dataset(source)
    data = open_dataset(source, label_column="kind")
    assert (data.labels, data.classnames) == ((1, 0), ("crane", "kea"))


def test_several_class_labels_have_to_be_chosen_from(tmp_path):
    import datasets

    features = {"fine": datasets.ClassLabel(names=["x", "y"]), "coarse": datasets.ClassLabel(names=["z"])}
    source = saved_set(tmp_path / "set", features, fine=[1, 0], coarse=[0, 0])
    with pytest.raises(ValueError, match="several columns of classes, fine, coarse; choose one with --label-column"):
        open_dataset(source)
    assert open_dataset(source, label_column="fine").labels == (1, 0)


def test_a_split_without_labels_says_so(tmp_path):
    import datasets

    features = {"label": datasets.ClassLabel(names=["x", "y"])}
    source = saved_set(tmp_path / "set", features, label=[-1, -1])
    with pytest.raises(ValueError, match="-1 marks images without a label"):
        open_dataset(source)


def test_other_names_for_a_class_label_must_be_as_many(tmp_path):
    names = lines(tmp_path / "names.txt", "x", "y")
    with pytest.raises(ValueError, match=r"has 3 classes .* and there are 2 class names in .*names\.txt"):
        open_dataset(write("datasets", tmp_path), classnames=names)
    names = lines(tmp_path / "names.txt", "x", "y", "z")
    data = open_dataset(tmp_path / "set", classnames=names)
    assert (data.labels, data.classnames, data.classnames_from) == (LABELS, ("x", "y", "z"), str(names))


def test_a_class_labels_own_names_in_another_order_are_refused(tmp_path):
    names = lines(tmp_path / "names.txt", *sorted(NAMES, reverse=True))
    with pytest.raises(ValueError, match=r"in another order: label 0 is 'barn owl' .*, a ClassLabel\) and 'kea' there"):
        open_dataset(write("datasets", tmp_path), classnames=names)


def test_of_several_columns_of_pictures_the_one_known_by_its_name_is_taken(tmp_path):
    import datasets

    from miniclip.data.sources import read_pairs

    def saved(name: str, *columns: str) -> Path:
        cells = {column: [{"bytes": png(n), "path": None}] for n, column in enumerate(columns)}
        kinds = datasets.Features(
            {column: datasets.Image() for column in columns}
            | {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x"])}
        )
        rows = datasets.Dataset.from_dict({**cells, "text": ["a kea"], "label": [0]}, features=kinds)
        rows.save_to_disk(tmp_path / name)
        return tmp_path / name

    source = saved("masked", "conditioning_image", "image")
    assert is_of(open_dataset(source), 0, 1)
    pair = read_pairs(source)[0]
    assert (pair.image, pair.extra) == (png(1), {"label": 0})
    unknown = saved("unknown", "before", "after")
    for read in (open_dataset, read_pairs):
        with pytest.raises(
            ValueError, match="several columns of images, before, after; choose one with --image-column"
        ):
            read(unknown)
    assert is_of(open_dataset(unknown, image_column="after"), 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# CLIP_benchmark's sets


def test_a_set_of_clip_benchmarks_brings_names_and_templates(tmp_path):
    root = benchmark_set(tmp_path / "wds_birds", {"cls": CLS}, **NAMED)
    data = open_dataset(root)
    assert (data.name, data.labels, data.classnames, data.templates) == ("wds_birds", LABELS, NAMES, TEMPLATES)
    assert seeds_of(data) == list(range(len(LABELS)))
    assert data.key(0) == "0.tar:s0000000"
    assert "classnames.txt" in data.classnames_from
    assert "zeroshot_classification_templates.txt" in data.templates_from
    assert open_dataset(root, templates="imagenet7").templates != TEMPLATES
    assert sorted(path.name for path in (root / "test").iterdir()) == ["0.tar", "1.tar", "nshards.txt"]


def test_tars_beyond_the_number_of_shards_are_left_out_by_name(tmp_path):
    for n in range(4):
        tar(tmp_path / f"test/{n}.tar", {f"s{n}": {"png": png(n), "cls": b"%d" % (n % 2)}})
    lines(tmp_path / "test/nshards.txt", "2")
    with pytest.warns(
        UserWarning, match=r"2 left out: a tar beyond the number in nshards.txt \(2\): 2 \(2.tar, 3.tar\)"
    ):
        data = open_dataset(tmp_path)
    assert seeds_of(data) == [0, 1]
    assert [each.source for each in data.left_out] == ["2.tar", "3.tar"]


def test_more_than_nine_shards_keep_the_order_of_their_numbers(tmp_path):
    for n in range(11):
        tar(tmp_path / f"test/{n}.tar", {f"s{n}": {"png": png(n), "cls": b"%d" % n}})
    lines(tmp_path / "test/nshards.txt", "11")
    data = open_dataset(tmp_path)
    assert data.labels == tuple(range(11))
    assert seeds_of(data) == list(range(11))
    assert data.classnames_from == "the labels, which are numbers"


def test_an_index_in_the_cache_is_made_anew_when_a_tar_changes(tmp_path):
    root = benchmark_set(tmp_path / "set", {"cls": CLS}, **NAMED)
    assert open_dataset(root).labels == LABELS
    tar(root / "test/1.tar", {"s9": {"png": png(9), "cls": b"1"}})
    data = open_dataset(root)
    assert data.labels == (*LABELS[:3], 1)
    assert is_of(data, 3, 9)


def test_several_labels_each(tmp_path):
    hot = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]], dtype=bool)
    arrays = []
    for row in hot:
        buffer = io.BytesIO()
        np.save(buffer, row.astype(np.int64))
        arrays.append(buffer.getvalue())
    data = open_dataset(benchmark_set(tmp_path / "set", {"npy": arrays}, dataset_type="multilabel\n", **NAMED))
    assert isinstance(data, MultilabelImages)
    np.testing.assert_array_equal(data.labels, hot)
    assert (data.classnames, data.templates) == (NAMES, TEMPLATES)
    assert seeds_of(data) == list(range(len(LABELS)))
    with pytest.raises(ValueError, match="set has several labels for each image; zero-shot classification needs one"):
        labelled(data)
    rows = [{"image": f"{n}.png", "labels": [NAMES[c] for c in np.flatnonzero(row)]} for n, row in enumerate(hot)]
    table = open_dataset(lines(tmp_path / "birds.jsonl", *map(json.dumps, rows)))
    assert table.classnames == NAMES
    np.testing.assert_array_equal(table.labels, hot)


@pytest.mark.parametrize("values", [[1, 0], [1, 0, 2], [[1, 0, 0]], ["a", "b", "c"]])
def test_an_array_that_does_not_fit_the_names_is_refused(tmp_path, values):
    buffer = io.BytesIO()
    np.save(buffer, np.array(values))
    arrays = [buffer.getvalue()] * len(LABELS)
    root = benchmark_set(tmp_path / "set", {"npy": arrays}, dataset_type="multilabel", **NAMED)
    with pytest.raises(ValueError, match=r"0\.tar:s0000000: its \.npy has the shape .* each of the 3 class names"):
        open_dataset(root)


def test_an_array_of_pickles_is_not_opened(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}, 0, 1], dtype=object), allow_pickle=True)
    check_that_it_is_not_opened(tmp_path / "set", buffer.getvalue())


def test_an_array_that_says_it_has_a_shape_of_exabytes_is_not_opened(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**60,)})
    check_that_it_is_not_opened(tmp_path / "set", buffer.getvalue())


def check_that_it_is_not_opened(root, array):
    benchmark_set(root, {"npy": [array] * len(LABELS)}, dataset_type="multilabel", **NAMED)
    with pytest.raises(ValueError, match=r"0\.tar:s0000000: its \.npy can't be read"):
        open_dataset(root)


def test_captions_one_a_line(tmp_path):
    texts = [f"a bird, {n}\n\n another  view of {n}\n".encode() for n in range(len(LABELS))]
    data = open_dataset(benchmark_set(tmp_path / "set", {"txt": texts}, dataset_type="retrieval"))
    assert isinstance(data, CaptionedImages)
    assert data.captions == tuple((f"a bird, {n}", f"another view of {n}") for n in range(len(LABELS)))
    assert seeds_of(data) == list(range(len(LABELS)))
    with pytest.raises(ValueError, match="class names and templates are not for it"):
        open_dataset(tmp_path / "set", templates="imagenet7")


def test_an_image_without_caption_is_named(tmp_path):
    texts = [b"a", b"b", b" \n", b"d", b"e", b"f", b"g"]
    root = benchmark_set(tmp_path / "set", {"txt": texts}, dataset_type="retrieval")
    with pytest.raises(ValueError, match=r"1 of 7 images have no caption: 0\.tar:s0000002"):
        open_dataset(root)


def test_what_can_be_trained_on_can_be_retrieved_from(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 4, captions=2)
    data = open_dataset(folder, task="retrieval")
    assert isinstance(data, CaptionedImages)
    assert data.captions[3] == ("picture 3, caption 0", "picture 3, caption 1")
    assert seeds_of(data) == [0, 1, 2, 3]
    assert data.key(3) == "0003.png"
    rows = [f"pairs/{n:04d}.png,one of {n}" for n in range(4)] + ["pairs/0000.png,once more"]
    table = open_dataset(lines(tmp_path / "pairs.csv", "filepath,caption", *rows), task="retrieval")
    assert table.captions == (("one of 0", "once more"), ("one of 1",), ("one of 2",), ("one of 3",))
    (folder / "0002.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0002\.png is not an image"):
        data.open(2)


def test_what_training_rejects_of_a_source_of_pairs_is_left_out_of_retrieval_and_told(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 5)
    (folder / "README.txt").write_text("Pictures of 2019")
    (folder / "0001.txt").unlink()
    (folder / "0002.txt").write_text("a bird\n\n \n")
    (folder / "0003.txt").write_text("\n")
    with pytest.warns(UserWarning, match=r"3 left out: .*0001\.png.*0003\.png.*README\.txt"):
        data = open_dataset(folder, task="retrieval")
    assert data.captions == (("picture 0, caption 0",), ("a bird",), ("picture 4, caption 0",))
    assert [data.key(index) for index in range(3)] == ["0000.png", "0002.png", "0004.png"]
    assert seeds_of(data) == [0, 2, 4]
    assert seeds_of(pickle.loads(pickle.dumps(data))) == [0, 2, 4]
    reasons = {each.source: each.reason for each in data.left_out}
    assert reasons["README.txt"].startswith("no image: ")
    assert reasons["0001.png"].startswith("no captions: ")
    assert reasons["0003.png"] == "it has no caption"
    rows = ["pairs/0000.png,one of 0", "pairs/0001.png,", "pairs/0002.png,one of 2"]
    with pytest.warns(UserWarning, match=r"1 left out: it has no caption: 1 \(pairs/0001\.png\)"):
        table = open_dataset(lines(tmp_path / "pairs.csv", "filepath,caption", *rows), task="retrieval")
    assert (table.captions, seeds_of(table)) == ((("one of 0",), ("one of 2",)), [0, 2])


@pytest.mark.parametrize(
    "task, message",
    [
        ("retrieval", r"has no \.txt beside its images, as retrieval needs; it is for classification"),
        ("multilabel", r"has no \.npy beside its images"),
        ("segmentation", "task is 'segmentation'; it must be one of classification, multilabel, retrieval"),
    ],
)
def test_a_task_that_the_data_are_not_for_is_refused(tmp_path, task, message):
    root = benchmark_set(tmp_path / "set", {"cls": CLS}, **NAMED)
    with pytest.raises(ValueError, match=message):
        open_dataset(root, task=task)


BROKEN_SETS = {
    "no number": ({"test/nshards.txt": b"many\n"}, r"nshards\.txt holds 'many'; it must be the number of shards"),
    "one shard too many": ({"test/nshards.txt": b"3\n"}, r"there is no file .*2\.tar"),
    "unknown kind": ({"dataset_type.txt": b"video"}, r"dataset_type\.txt holds 'video'; known are classification"),
    "too few names": ({"classnames.txt": b"x\ny\n"}, "has labels up to 2, but there are 2 class names"),
    "no place in a template": (
        {"zeroshot_classification_templates.txt": b"a bird\n"},
        r"zeroshot_classification_templates\.txt of the data: template 'a bird' has no place for the class name",
    ),
    "a tar that is none": ({"test/1.tar": b"<html>404</html>" * 100}, r"1\.tar is no tar, or a damaged"),
    "a tar cut short": ({"test/1.tar": None}, r"1\.tar is (no tar|cut short)"),
    "only for training": ({"test/nshards.txt": b"", "train/nshards.txt": b"1"}, "holds ''"),
}


@pytest.mark.parametrize("content, message", BROKEN_SETS.values(), ids=BROKEN_SETS)
def test_a_broken_set_of_clip_benchmarks_is_told(tmp_path, content, message):
    root = benchmark_set(tmp_path / "set", {"cls": CLS}, **NAMED)
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(path.read_bytes()[:1500] if data is None else data)
    with pytest.raises(ValueError, match=message):
        open_dataset(root)


def test_a_split_that_is_not_there_is_told_with_those_that_are(tmp_path):
    root = benchmark_set(tmp_path / "set", {"cls": CLS}, **NAMED)
    benchmark_set(root, {"cls": CLS[::-1]}, split="train", shards=1)
    assert open_dataset(root).labels == LABELS
    assert open_dataset(root, split="train").labels == LABELS[::-1]
    with pytest.raises(ValueError, match="has no split 'dev'; it has test, train"):
        open_dataset(root, split="dev")


def test_shards_without_labels_are_told(tmp_path):
    tar(tmp_path / "0.tar", {"a": {"png": png(0)}})
    with pytest.raises(ValueError, match=r"has neither labels \(\.cls, \.npy\) nor captions \(\.txt, \.json\)"):
        open_dataset(tmp_path)


def test_a_tar_beside_folders_per_class_without_labels_tells_of_them(tmp_path):
    tar(tmp_path / "backup.tar", {"cat/1": {"png": png(0)}})
    write_picture(tmp_path / "cat" / "1.png", 0)
    index_shards(str(tmp_path))  # without an index the folder is that of the pictures
    with pytest.raises(ValueError, match=r"neither labels .*1 left out: in a folder below, a picture beside the tars"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(("task", "member"), [("classification", "cls"), ("retrieval", "txt")])
def test_json_of_a_sample_that_is_damaged_is_named_and_the_sample_is_scored(tmp_path, task, member):
    json_of = {"a": b"{cut", "b": b'{"scene": 1}', "c": b'{"scene": 1}'}
    tar(tmp_path / "0.tar", {key: {"png": png(0), member: b"0", "json": facts} for key, facts in json_of.items()})
    data = open_dataset(tmp_path, task=task, group_column="scene")
    assert len(data) == 3
    assert [(each.source, each.reason) for each in data.left_out] == [
        ("0.tar:a", "a .json that can't be read, so its columns have no value")
    ]
    assert data.groups[1] == data.groups[2] != data.groups[0]


def test_a_sample_whose_captions_are_in_a_damaged_json_alone_is_named_and_left_out_of_retrieval(tmp_path):
    json_of = {"a": b"{cut", "b": b'{"caption": "two", "scene": 1}', "c": b'{"caption": "three", "scene": 2}'}
    members = {key: {"png": png(n), "json": facts} for n, (key, facts) in enumerate(json_of.items())}
    tar(tmp_path / "0.tar", members)
    with pytest.warns(UserWarning, match=r"1 left out: a \.json that can't be read, and no captions .*\(0\.tar:a\)"):
        data = open_dataset(tmp_path, group_column="scene")
    assert (data.captions, data.groups) == ((("two",), ("three",)), ("1", "2"))
    assert seeds_of(data) == [1, 2]
    tar(tmp_path / "0.tar", members | {"d": {"png": png(3)}})
    with pytest.raises(ValueError, match=r"1 of 4 images have no caption: 0\.tar:d"):
        open_dataset(tmp_path)


def test_a_shard_that_lost_a_label_names_the_sample(tmp_path):
    tar(tmp_path / "0.tar", {"a": {"png": png(0), "cls": b"0"}, "b": {"png": png(1)}})
    with pytest.raises(ValueError, match=r"0\.tar:b has no label"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("is_indexed", [False, True])
@pytest.mark.parametrize(
    ("parts", "scored", "asked"),
    [
        (["imagenet1k-train", "imagenet1k-validation"], "imagenet1k-validation", {"val": 1, "train": 0}),
        (["test", "train", "val"], "test", {"validation": 2, "Val": 2}),
        (["testA", "testB", "train"], "it has testA, testB, train", {"testA": 0, "train": 2}),
        (["set"], "set", {}),
        (["train"], "train", {"train": 0}),
    ],
)
def test_of_tars_named_by_split_one_is_scored(tmp_path, parts, scored, asked, is_indexed):
    for number, part in enumerate(parts):
        for shard in range(2):
            seed = 2 * number + shard
            tar(tmp_path / f"{part}-{shard:04d}.tar", {f"s{seed}": {"png": png(seed), "cls": b"0", "txt": b"a cat"}})
    if is_indexed:
        index_shards(str(tmp_path))
    for task in ("classification", "retrieval"):
        if scored in parts:
            data, rest = open_dataset(tmp_path, task=task), [part for part in parts if part != scored]
            first = 2 * parts.index(scored)
            assert seeds_of(data) == [first, first + 1]
            assert data.key(0) == f"{scored}-0000.tar:s{first}"
            other = [each.source for each in data.left_out if each.reason == "a file of another split"]
            assert other == [f"{part}-{shard:04d}.tar" for part in rest for shard in range(2)]
        else:
            with pytest.raises(ValueError, match=scored):
                open_dataset(tmp_path, task=task)
        for split, place in asked.items():
            data = open_dataset(tmp_path, task=task, split=split)
            assert seeds_of(data) == [2 * place, 2 * place + 1]
        with pytest.raises(ValueError, match="split 'dogs'; it has"):
            open_dataset(tmp_path, task=task, split="dogs")


def test_tars_of_other_splits_are_not_opened(tmp_path):
    tar(tmp_path / "val-0.tar", {"a": {"png": png(0), "cls": b"0"}})
    (tmp_path / "train-0.tar").write_bytes(b"cut")
    assert seeds_of(open_dataset(tmp_path)) == [0]


def test_a_split_of_tars_in_a_folder_is_found_by_its_other_names(tmp_path):
    tar(tmp_path / "val/0.tar", {"a": {"png": png(0), "cls": b"0"}})
    tar(tmp_path / "0.tar", {"b": {"png": png(1), "cls": b"0"}})
    assert [seeds_of(open_dataset(tmp_path, split=split)) for split in ("val", "validation")] == [[0], [0]]


def test_a_pattern_of_tars_names_some_of_them(tmp_path):
    write("bare shards", tmp_path)
    data = open_dataset(str(tmp_path / "shards/{00001..00001}.tar"))
    assert (data.labels, data.name, data.classnames) == (LABELS[4:], "shards", NAMES)
    with pytest.raises(ValueError, match="--split test can't be followed"):
        open_dataset(str(tmp_path / "shards/00001.tar"), split="test")
    with pytest.raises(ValueError, match="is a set of shards and has no columns; a label column needs a table"):
        open_dataset(tmp_path / "shards", label_column="cls")


# ---------------------------------------------------------------------------------------------------------------------
# From elsewhere


def test_a_set_at_a_url_is_the_same_and_fetched_once(tmp_path):
    root = benchmark_set(tmp_path / "served/wds_birds", {"cls": CLS}, **NAMED)
    here = open_dataset(root)
    with Served(tmp_path / "served") as server:
        for url in (f"{server.url}/wds_birds", f"{server.url}/wds_birds/"):
            data = open_dataset(url)
            assert (data.name, data.labels, data.classnames, data.templates) == (
                here.name, here.labels, here.classnames, here.templates,
            )  # fmt: skip
            assert [data.open(n).tobytes() for n in range(7)] == [here.open(n).tobytes() for n in range(7)]
        tars = [path for path in server.gets if path.endswith(".tar")]
        assert sorted(tars) == ["/wds_birds/test/0.tar", "/wds_birds/test/1.tar"]
        with pytest.raises(ValueError, match="has no split 'dev'; it has test"):
            open_dataset(f"{server.url}/wds_birds", split="dev")
        with pytest.raises(ValueError, match=r"wds_bird is no set to evaluate on.*look whether the address is right"):
            open_dataset(f"{server.url}/wds_bird")
        (root / "test/nshards.txt").write_text("3")
        with pytest.raises(ValueError, match=r"test/2\.tar can't be read .*"):
            open_dataset(f"{server.url}/wds_birds")


def tar_of(folder: Path, **labels: bytes) -> bytes:
    """A tar of one picture for each key, with its label."""
    tar(folder / "made.tar", {key: {"png": png(0), "cls": label} for key, label in labels.items()})
    return (folder / "made.tar").read_bytes()


def test_tars_at_a_url_that_have_changed_are_read_anew_by_their_version_or_else_their_size(tmp_path):
    files = {"/s/0.tar": tar_of(tmp_path, a=b"0")}
    other = {"/s/0.tar": tar_of(tmp_path, a=b"7")}
    longer = {"/s/0.tar": tar_of(tmp_path, **{f"{n}": b"5" for n in range(9)})}
    assert len(files["/s/0.tar"]) == len(other["/s/0.tar"]) < len(longer["/s/0.tar"])

    def labels(server: Server) -> list[str]:
        data = open_dataset(f"{server.url}/s/{{0..0}}.tar")
        return [data.classnames[label] for label in data.labels]

    with Server(files) as server:
        for etag, content, expected in (("1", files, ["0"]), ("2", other, ["7"]), ("1", files, ["0"])):
            server.files, server.etags = content, {"/s/0.tar": etag}
            assert labels(server) == expected
        assert len(server.gets) == 2  # the first index and its tar are still there
        server.files, server.etags, server.has_head = longer, {}, False
        assert labels(server) == ["5"] * 9


def test_where_it_cannot_be_asked_whether_tars_have_changed_the_kept_index_is_used_with_a_warning(tmp_path):
    with Server({"/0.tar": tar_of(tmp_path, a=b"0")}) as server:
        source = f"{server.url.replace('//', '//me:pass@')}/{{0..0}}.tar"
        assert len(indexed(source)) == 1
        server.fault = lambda number: 503
        with pytest.warns(UserWarning, match=r"can't be asked .*the index that was made of these tars before") as told:
            assert len(indexed(source)) == 1
        assert "pass" not in str(told[0].message)
        with pytest.raises(ValueError, match="503"):
            indexed(f"{server.url}/{{0..1}}.tar")  # of which no index is kept
        server.fault = lambda number: None
        del server.files["/0.tar"]
        with pytest.raises(ValueError, match="404"):  # gone, which is an answer
            indexed(source)


def test_of_a_server_that_says_nothing_of_its_tars_the_kept_index_is_used_with_a_warning(tmp_path):
    with Server({"/0.tar": tar_of(tmp_path, a=b"0")}) as server:
        server.has_length = False
        assert len(indexed(f"{server.url}/0.tar")) == 1
        with pytest.warns(UserWarning, match="neither the size nor the version"):
            assert len(indexed(f"{server.url}/0.tar")) == 1


def test_sets_and_tars_at_a_url_with_a_query_are_read_with_it(tmp_path):
    root = benchmark_set(tmp_path / "wds_birds", {"cls": CLS}, **NAMED)
    query = "?token=a/b/"
    with Server({f"/{path.relative_to(tmp_path)}": path.read_bytes() for path in root.rglob("*.*")}) as server:
        for source in ("wds_birds", "wds_birds/test/{0..1}.tar"):
            data = open_dataset(f"{server.url}/{source}{query}", classnames=root / "classnames.txt")
            assert data.labels == LABELS
            assert [data.open(n).tobytes() for n in range(7)] == [picture(n).tobytes() for n in range(7)]
        assert {path.partition("?")[2] for path in [*server.heads, *(path for path, _ in server.gets)]} == {query[1:]}
        assert open_dataset(f"{server.url}/wds_birds{query}").name == "wds_birds"


def test_the_address_of_a_hubs_page_has_no_case_but_in_the_names_of_its_sets(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    for page in ("https://hub.example/datasets/A/b", "HTTPS://Hub.example/datasets/A/b/tree/main"):
        assert hub_location(page) == hub_location("hf-hub:A/b") == "https://hub.example/datasets/A/b/resolve/main"


def test_indexed_shards_at_a_url(tmp_path):
    write("shards", tmp_path)
    with Served(tmp_path) as server:
        data = open_dataset(f"{server.url}/shards", group_column="scene")
        assert (data.labels, data.classnames, data.groups) == (LABELS, NAMES, SCENES)
        assert seeds_of(data) == list(range(7))
        bare = open_dataset(f"{server.url}/shards/{{00000..00001}}.tar")
        assert bare.labels == LABELS


@pytest.mark.parametrize("source", ["hf-hub:birders/wds_birds", "{url}/datasets/birders/wds_birds",
                                    "{url}/datasets/birders/wds_birds/tree/main",
                                    "{url}/datasets/birders/wds_birds/resolve/main"])  # fmt: skip
def test_a_set_on_the_hub_goes_by_its_name_or_its_address(tmp_path, monkeypatch, source):
    benchmark_set(tmp_path / "datasets/birders/wds_birds/resolve/main", {"cls": CLS}, **NAMED)
    with Served(tmp_path) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        data = open_dataset(source.format(url=server.url))
        assert (data.name, data.labels, data.templates) == ("wds_birds", LABELS, TEMPLATES)
        assert seeds_of(data) == list(range(7))


def test_a_set_of_the_hub_that_is_no_clip_benchmarks_is_read_by_its_library(tmp_path, monkeypatch):
    """The library takes a folder of that name before it asks the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache/datasets")
    made = write("parquet of datasets", tmp_path)
    (tmp_path / "birders/birds").mkdir(parents=True)
    made.rename(tmp_path / "birders/birds/test-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    with Served(tmp_path / "pictures") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        data = open_dataset("hf-hub:birders/birds")
    assert (data.name, data.labels, data.classnames) == ("birds", LABELS, NAMES)
    assert seeds_of(data) == list(range(7))


def test_a_scheme_that_would_run_a_program_is_refused():
    with pytest.raises(ValueError, match="no program is run"):
        open_dataset("pipe:touch owned")


# ---------------------------------------------------------------------------------------------------------------------
# torchvision's


def cifar(root: Path, monkeypatch) -> Path:
    """CIFAR-10's files with a few images, and torchvision told their checksums."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def dump(name: str, values: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(values, protocol=2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(seeds: range) -> dict:
        pixels = np.stack([np.asarray(picture(seed, (32, 32))) for seed in seeds])
        return {"data": pixels.transpose(0, 3, 1, 2).reshape(len(seeds), -1), "labels": [seed % 3 for seed in seeds]}

    monkeypatch.setattr(CIFAR10, "train_list", [dump(f"data_batch_{n}", batch(range(n, n + 1))) for n in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [dump("test_batch", batch(range(10, 15)))])
    name, md5 = dump("batches.meta", {"label_names": ["aeroplane", "sea_bird", "cat"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return root


def test_cifar10_of_torchvision(tmp_path, monkeypatch):
    root = cifar(tmp_path / "there", monkeypatch)
    data = open_dataset("torchvision:CIFAR10", root=root)
    assert (data.name, data.labels, data.classnames) == ("CIFAR10", (1, 2, 0, 1, 2), ("aeroplane", "sea bird", "cat"))
    assert (len(data.templates), data.templates_from) == (18, "the built-in set 'cifar10'")
    assert data.fingerprint() != open_dataset("torchvision:CIFAR10", root=root, split="train").fingerprint()
    assert [data.open(n).tobytes() for n in range(5)] == [picture(n, (32, 32)).tobytes() for n in range(10, 15)]
    assert data.key(3) == "CIFAR10/test/3"
    assert open_dataset("torchvision:CIFAR10", root=root, split="train").labels == (1, 2, 0, 1, 2)
    with pytest.raises(ValueError, match="has no split 'val'; valid are train, test"):
        open_dataset("torchvision:CIFAR10", root=root, split="val")
    with pytest.raises(ValueError, match=r"has 3 classes .* and there are 1000 class names"):
        open_dataset("torchvision:CIFAR10", root=root, classnames="imagenet")


def test_a_pickle_of_cifars_that_was_changed_is_not_opened(tmp_path, monkeypatch):
    root = cifar(tmp_path / "there", monkeypatch)

    class Owned:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    (root / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(Owned()))
    with pytest.raises(ValueError, match="not found or corrupted"):
        open_dataset("torchvision:CIFAR10", root=root)
    assert not (tmp_path / "owned").exists()


def test_fashion_mnist_of_torchvision(tmp_path):
    from torchvision.datasets import FashionMNIST

    folder = tmp_path / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    for part, values in (("images-idx3", pixels), ("labels-idx1", np.array([9, 0, 5], dtype=np.uint8))):
        header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
        (folder / f"t10k-{part}-ubyte").write_bytes(header + values.tobytes())
        (folder / f"train-{part}-ubyte").write_bytes(header + values.tobytes())
    data = open_dataset("torchvision:FashionMNIST", root=tmp_path)
    assert data.labels == (9, 0, 5)
    assert data.classnames == tuple(name.replace("_", " ") for name in FashionMNIST.classes)
    np.testing.assert_array_equal(np.asarray(data.open(2)), pixels[2])


def save_folders(folder: Path, names, suffix: str = "jpg") -> None:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        picture(number).save(folder / name / f"0.{suffix}")


EUROSAT = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"


def test_built_in_names_of_torchvision_are_those_of_the_folders(tmp_path):
    save_folders(tmp_path / "eurosat/2750", EUROSAT.split())
    data = open_dataset("torchvision:EuroSAT", root=tmp_path)
    assert data.labels == tuple(range(10))
    names = dict(zip(EUROSAT.split(), data.classnames, strict=True))
    assert (names["HerbaceousVegetation"], names["SeaLake"]) == ("brushland or shrubland", "lake or sea")


def test_codes_of_countries_are_those_of_the_built_in_names():
    from miniclip.evaluation.datasets.torchvision_sets import CLASS_FOLDERS
    from miniclip.evaluation.prompts import classname_set

    codes = CLASS_FOLDERS["Country211"]
    assert list(codes) == sorted(set(codes))
    names = dict(zip(codes, classname_set("country211"), strict=True))
    told = {
        "AX": "Aland", "CD": "DR Congo", "DZ": "Algeria", "GS": "South Georgia", "KN": "St. Kitts",
        "MF": "Saint-Martin", "PS": "Palestine", "SX": "Sint Maarten", "SZ": "Eswatini", "XK": "Kosovo",
    }  # fmt: skip
    for code, name in told.items():
        assert names[code].startswith(name), code


@pytest.mark.parametrize(
    "name, split, folder, names, message",
    [
        ("EuroSAT", None, "eurosat/2750", ["AnnualCrop", "Forest", "SeaLake"],
         "3 class folders, without HerbaceousVegetation, Highway, .* counts? all 10; .* name the folder"),
        ("EuroSAT", None, "eurosat/2750", ["@eaDir", *EUROSAT.split()], "11 class folders, with @eaDir, no class"),
        ("EuroSAT", None, "eurosat/2750", [*EUROSAT.split()[:9], "Sea"], "without SeaLake, and with Sea, no class"),
        ("Country211", "test", "country211/test", ["AD", "ZW"], "2 class folders, without AE, AF, "),
        ("GTSRB", "train", "gtsrb/GTSRB/Training", ["00001", "00042"], "2 class folders, without 00000, 00002, "),
    ],
)  # fmt: skip
def test_a_set_of_torchvision_with_other_folders_is_refused(tmp_path, name, split, folder, names, message):
    save_folders(tmp_path / folder, names, "ppm" if name == "GTSRB" else "jpg")
    with pytest.raises(ValueError, match=message):
        open_dataset(f"torchvision:{name}", root=tmp_path, split=split)


def test_a_part_of_imagenets_folders_is_refused(tmp_path):
    names = {"n01440764": ("tench",), "n01443537": ("goldfish",), "n01484850": ("great white shark",)}
    torch.save((names, []), tmp_path / "meta.bin")
    save_folders(tmp_path / "val", ["n01440764", "n01484850"])
    with pytest.raises(ValueError, match=r"2 class folders, without n01443537\. Its labels count all 3"):
        open_dataset("torchvision:ImageNet", root=tmp_path)


@pytest.mark.parametrize(
    "source, message",
    [
        ("torchvision:CIFAR10", r"CIFAR10 can't be had from .*nowhere.*--root names the folder.*--download"),
        ("torchvision:cifar10", r"no classification set 'cifar10' \(is CIFAR10 meant\?\)"),
        ("torchvision:CocoCaptions", r"no classification set 'CocoCaptions'.*there are CIFAR10, CIFAR100"),
        ("torchvision:EuroSAT", r"EuroSAT can't be had from"),
    ],
)
def test_a_set_that_torchvision_lacks_is_told(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(source, root=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere/cifar-10-python.tar.gz").exists()


def test_every_name_is_one_of_torchvisions():
    from torchvision import datasets

    from miniclip.evaluation.datasets.torchvision_sets import TORCHVISION_SETS

    assert all(issubclass(getattr(datasets, name), datasets.VisionDataset) for name in TORCHVISION_SETS)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts by class


PROMPTS = {"Barn_owl": ["an owl with a heart-shaped face", "a pale owl"], "crane": ["a tall grey bird"],
           "kea": ["a green parrot in the snow", "a parrot", "it eats cars"], "dodo": ["gone"]}  # fmt: skip


def test_prompts_by_class_find_their_classes_and_make_the_classifier(tmp_path):
    path = lines(tmp_path / "cupl.json", json.dumps(PROMPTS))
    data = open_dataset(write("folder", tmp_path / "birds"), templates=path)
    assert data.templates == {name: tuple(PROMPTS[name.replace("barn owl", "Barn_owl")]) for name in NAMES}
    assert data.templates_from == str(path)
    model = tiny_clip()
    classifier = zero_shot_classifier(model, data.classnames, data.templates)
    for column, name in enumerate(NAMES):
        with torch.no_grad():
            tokens = tokenizer.tokenize(list(data.templates[name]), context_length=16)
            mean = F.normalize(model.encode_text(tokens), dim=-1).mean(dim=0)
        torch.testing.assert_close(classifier[:, column], F.normalize(mean, dim=0), atol=1e-6, rtol=1e-5)


def test_prompts_of_names_that_differ_in_case_go_to_each_its_own(tmp_path):
    names = lines(tmp_path / "names.txt", "turkey", "Turkey", "barn_owl")
    source = lines(tmp_path / "t.csv", "image,label", "a.png,0", "b.png,1", "c.png,2")

    def prompts_of(**prompts: str) -> list[tuple[str, ...]]:
        path = lines(tmp_path / "t.json", json.dumps({name: [prompt] for name, prompt in prompts.items()}))
        return list(open_dataset(source, classnames=names, templates=path).templates.values())

    owl = {"Barn owl": "an owl"}
    assert prompts_of(turkey="a bird", Turkey="a country", **owl) == [("a bird",), ("a country",), ("an owl",)]
    assert prompts_of(Turkey="a country", turkey="a bird", **owl) == [("a bird",), ("a country",), ("an owl",)]
    assert prompts_of(TURKEY="either", turkey="a bird", Turkey="a country", **owl)[:2] == [("a bird",), ("a country",)]
    assert prompts_of(TURKEY="either", **owl) == [("either",), ("either",), ("an owl",)]
    assert prompts_of(TURKEY="either", TurKey="either", **owl)[0] == ("either",)
    with pytest.raises(ValueError, match=r"other prompts for 'turkey' than for 'TURKEY', and .* the class 'Turkey'"):
        prompts_of(turkey="a bird", TURKEY="a country", **owl)


def test_prompts_for_each_class_that_come_of_templates_make_the_templates_classifier():
    model = tiny_clip()
    by_class = {name: [f"a {name}", f"the {name}!"] for name in NAMES}
    torch.testing.assert_close(
        zero_shot_classifier(model, NAMES, by_class), zero_shot_classifier(model, NAMES, ["a {}", "the {c}!"])
    )
    with pytest.raises(ValueError, match="prompts for 3 classes, and none for 'keas'; near is 'kea'"):
        zero_shot_classifier(model, ["keas"], by_class)


def test_templates_of_shards_are_read_if_no_others_are_asked_for(tmp_path):
    source = benchmark_set(tmp_path / "set", {"cls": CLS}, **NAMED)
    (source / "zeroshot_classification_templates.txt").write_text("a {domain} of {c}\n")
    with pytest.raises(ValueError, match=r"nothing fills \{domain\} in template"):
        open_dataset(source)
    assert open_dataset(source, templates="simple").templates == template_set("simple")
    assert open_dataset(source, templates=()).templates == ()
    (source / "zeroshot_classification_templates.txt").write_text("")
    with pytest.raises(ValueError, match=r"templates\.txt is empty"):
        open_dataset(source)
    assert open_dataset(source, templates="simple").templates == template_set("simple")


def test_prompts_by_class_lie_beside_the_data_too(tmp_path):
    write("folder", tmp_path)
    path = lines(tmp_path / "templates.json", json.dumps(PROMPTS))
    data = open_dataset(tmp_path)
    assert data.templates_from == str(path)
    assert data.templates["crane"] == ("a tall grey bird",)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", "holds no templates"),
        ('{"kea": []}', "'kea' must have a list of prompts"),
        ('{"kea": "a bird"}', "'kea' must have a list of prompts"),
        ('{"kea": ["a", " "]}', "'kea' must have a list of prompts"),
        (
            '{"barn owls": ["x"], "kea": ["y"]}',
            r"has prompts for 2 classes and the data have 3; without any are 'barn owl' \(near 'barn owls'\), 'crane'$",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_told(tmp_path, content, message):
    path = lines(tmp_path / "cupl.json", content)
    with pytest.raises(ValueError, match=message):
        open_dataset(write("folder", tmp_path / "birds"), templates=path)


# ---------------------------------------------------------------------------------------------------------------------
# What people get wrong


def test_the_folder_above_the_classes_is_told(tmp_path):
    write("folder", tmp_path / "all/birds")
    with pytest.raises(ValueError, match=r"one class folder, 'birds', .* the folders barn_owl, crane, kea\..* name .*"):
        open_dataset(tmp_path / "all")


@pytest.mark.parametrize("tops", [("fold0", "fold1"), ("images", "masks"), ("0", "1"), ("day", "dusk", "night")])
@pytest.mark.parametrize("classes", [("cat", "dog"), ("0", "1", "2"), ("cat", "dog", "rare")])
def test_folders_that_hold_the_same_classes_are_no_classes(tmp_path, tops, classes):
    for number, name in enumerate((top, name) for top in tops for name in classes):
        if name != (tops[0], "rare"):
            write_picture(tmp_path.joinpath(*name, "a.png"), number)
    match = rf"{tops[0]}.* hold no image, but folders of the same names: {classes[0]}.* --split {tops[0]},"
    remedy = (
        "call the folders by their names"
        if tops == ("0", "1")
        else r"list them with --classnames or in .*classnames\.txt"
    )
    with pytest.raises(ValueError, match=f"{match}.* are the classes, {remedy}"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, split=tops[-1]).classnames == classes
    lines(tmp_path / "classnames.txt", *tops)
    if tops != ("0", "1"):  # of which nothing says whether they are folds or labels
        assert open_dataset(tmp_path).classnames == tops
        with pytest.raises(ValueError, match=f"{len(tops)} class(es)?"):
            open_dataset(tmp_path, classnames=lines(tmp_path / "others.txt", *classes))


def test_numbered_folders_are_the_classes_of_as_many_names_and_their_folders_are_not(tmp_path):
    for number, (top, side) in enumerate((top, side) for top in "0123" for side in ("left", "right")):
        write_picture(tmp_path / "set" / top / side / "a.png", number)
    with pytest.raises(
        ValueError, match=r"by their names, or list the names of all 4 with --classnames or in .*\.txt$"
    ):
        open_dataset(tmp_path / "set")
    names = ("car", "bus", "train", "plane")
    data = open_dataset(tmp_path / "set", classnames=lines(tmp_path / "names.txt", *names))
    assert (data.classnames, data.labels) == (names, (0, 0, 1, 1, 2, 2, 3, 3))
    for others in (names[:2], (*names, "boat"), ("left", "right", "up", "down"), ("Left", "right")):
        with pytest.raises(ValueError, match="hold no image, but folders of the same names: left, right"):
            open_dataset(tmp_path / "set", classnames=lines(tmp_path / "others.txt", *others))
    lines(tmp_path / "set/classnames.txt", *names)
    assert open_dataset(tmp_path / "set").classnames == names


@pytest.mark.parametrize("classes", [("cat", "dog"), ("0", "1")])
def test_as_many_names_as_folds_do_not_make_classes_of_them(tmp_path, classes):
    for number, (top, name) in enumerate((top, name) for top in "01" for name in classes):
        write_picture(tmp_path / "set" / top / name / "a.png", number)
    with pytest.raises(ValueError, match=r"call the folders by their names$"):
        open_dataset(tmp_path / "set", classnames=lines(tmp_path / "names.txt", "cat", "dog"))


@pytest.mark.parametrize("inner", [("001", "002"), ("train", "test"), ("a", "b.c", "d"), ("only",)])
def test_classes_may_have_folders_of_subjects_and_splits(tmp_path, inner):
    for number, (top, name) in enumerate((top, name) for top in ("cat", "dog") for name in inner):
        own = name if len(name) != 1 else f"{name} of {top}"  # some differ
        write_picture(tmp_path / top / own / "a.png", number)
    assert open_dataset(tmp_path).classnames == ("cat", "dog")
    for number, top in enumerate(("cat", "dog")):  # images of its own make a folder a class
        write_picture(tmp_path / top / "x" / "a.png", number)
        write_picture(tmp_path / top / "y" / "a.png", number)
    write_picture(tmp_path / "cat/a.png", 9)
    assert open_dataset(tmp_path).classnames == ("cat", "dog")


def test_the_folder_above_the_splits_is_told_and_a_split_is_followed(tmp_path):
    write("folder", tmp_path / "birds/val")
    write_picture(tmp_path / "birds/train/kea/9.png", 9)
    with pytest.warns(UserWarning, match="1 left out: beside val/, the split that is read: 1 .train/"):
        by_default = open_dataset(tmp_path / "birds")
    data = open_dataset(tmp_path / "birds", split="val")
    assert by_default.images == data.images
    assert {path.parent.parent.name for path in data.images} == {"val"}
    assert (data.name, data.classnames) == ("birds", NAMES)
    lines(tmp_path / "birds/classnames.txt", *reversed(NAMES))
    assert open_dataset(tmp_path / "birds", split="val").classnames == NAMES[::-1]
    with pytest.raises(ValueError, match="no folder for the split 'test'; it has train, val"):
        open_dataset(tmp_path / "birds", split="test")


def test_images_right_in_the_folder_are_counted(tmp_path):
    for n in range(3):
        write_picture(tmp_path / f"{n}.png", n)
    with pytest.raises(ValueError, match="it holds 3 images directly"):
        open_dataset(tmp_path)


def test_a_label_that_is_no_class_is_told_with_the_near_ones(tmp_path):
    source = lines(tmp_path / "birds.csv", "image,label", "0.png,kea", "1.png,barn owls", "2.png,crane")
    lines(tmp_path / "birds.classnames.txt", *NAMES)
    with pytest.raises(ValueError, match=r"'barn owls' \(near 'barn owl'\)"):
        open_dataset(source)


def test_a_table_has_no_split(tmp_path):
    with pytest.raises(ValueError, match=r"birds\.csv is a table and has no split 'test'"):
        open_dataset(write("csv", tmp_path), split="test")


def test_a_row_without_image_is_named_when_it_is_opened(tmp_path):
    data = open_dataset(lines(tmp_path / "birds.csv", "image,label", ",kea", "0.png,crane"))
    with pytest.raises(ValueError, match=r"^birds\.csv: row 1 has no image"):
        data.open(0)
    with pytest.raises(ValueError, match=r"0\.png can't be read: No such file or directory$"):
        data.open(1)


def test_numbers_in_tables_with_gaps_are_still_labels(tmp_path):
    rows = [{"image": "a.png", "label": 1.0}, {"image": "b.png", "label": 0}, {"image": "c.png", "label": 10}]
    data = open_dataset(lines(tmp_path / "birds.jsonl", *map(json.dumps, rows)))
    assert (data.labels, data.classnames) == ((1, 0, 2), ("0", "1", "10"))
    data = open_dataset(lines(tmp_path / "birds.csv", "image,label", "a.png,1.0", "b.png,0.0", "c.png,10"))
    assert (data.labels, data.classnames) == ((1, 0, 2), ("0", "1", "10"))


@pytest.mark.parametrize(
    "labels, classnames",
    [
        (["5,000", "1,000", "10,000"], ("1,000", "10,000", "5,000")),
        (["10", "1,000", "500"], ("1,000", "10", "500")),
        (["10", "1.000", "100"], ("1.000", "10", "100")),
        (["1.0", "2.5", "2"], ("1.0", "2", "2.5")),
        (["1.000", "0.000", "2.000"], ("0", "1", "2")),  # no number of thousands is 0.000
        (["1,0", "0,0", "10,0"], ("0", "1", "10")),
        (["1.0", "2.0", "10"], ("1", "2", "10")),
    ],
)
def test_labels_lose_the_decimal_of_a_column_of_whole_numbers_and_no_other(tmp_path, labels, classnames):
    rows = [f'{number}.png,"{label}"' for number, label in enumerate(labels)]
    data = open_dataset(lines(tmp_path / "notes.csv", "image,label", *rows))
    assert data.classnames == classnames
    named = [label if label in classnames else re.split("[.,]", label)[0] for label in labels]
    assert [data.classnames[label] for label in data.labels] == named


@pytest.mark.parametrize(
    "labels, message",
    [
        (["1", "1.0", "2"], "the labels '1' and '1.0', which would be two classes of one name"),
        (["281,282", "281", "282"], "the label '281,282', which is several in one cell"),
        (["001,002", "001", "003"], "the label '001,002', which is several in one cell"),
        (["-1.0", "0.0", "1.0"], "the label '-1'"),
    ],
)
def test_labels_of_two_readings_are_refused(tmp_path, labels, message):
    rows = [f'{number}.png,"{label}"' for number, label in enumerate(labels)]
    with pytest.raises(ValueError, match=message):
        open_dataset(lines(tmp_path / "notes.csv", "image,label", *rows))


@pytest.mark.parametrize("label, message", [({"a": 1}, "row 1 .* for a label"), ([], "no label for any image")])
def test_what_can_be_no_label_is_refused(tmp_path, label, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(lines(tmp_path / "birds.jsonl", json.dumps({"image": "a.png", "label": label})))


def test_a_column_of_labels_and_lists_of_them_is_refused(tmp_path):
    rows = [{"image": "a.png", "label": "x"}, {"image": "b.png", "label": ["x", "y"]}]
    with pytest.raises(ValueError, match="lists of labels in some rows and single labels in others"):
        open_dataset(lines(tmp_path / "birds.jsonl", *map(json.dumps, rows)))


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import miniclip

    out = tmp_path_factory.mktemp("model") / "tiny"
    miniclip.save(tiny_clip(), out)
    return out


def test_eval_takes_them_all_and_scores_them_alike(tmp_path, model, capsys):
    sources = [str(write("parquet", tmp_path / "a")), str(write("parquet of datasets", tmp_path / "b"))]
    prompts = lines(tmp_path / "cupl.json", json.dumps(PROMPTS))
    command = ["eval", "--model", str(model), "--device", "cpu", "--templates", str(prompts)]
    cli.main([*command, "--data", *sources, "--label-column", "species", "--out", str(tmp_path / "tables")])
    said = capsys.readouterr().out
    assert "1 to 3" in said  # prompts for each class
    assert f"({prompts})" in said
    assert "(from column 'species', a ClassLabel)" in said
    shards = benchmark_set(tmp_path / "wds", {"cls": CLS}, **NAMED)
    benchmark_set(shards, {"cls": CLS}, split="extra")
    cli.main([*command, "--data", str(shards), "--split", "extra", "--out", str(tmp_path / "shards")])
    files = [tmp_path / out / "results.json" for out in ("tables", "shards")]
    results = [result for file in files for result in json.loads(file.read_text())["results"]]
    first = results[0]
    assert first["templates"]["crane"] == ["a tall grey bird"]
    assert first["templates_from"] == str(prompts)
    for result in results:
        assert result["metrics"] == first["metrics"]
        for name in ("labels", "guesses", "cosines", "probabilities"):
            assert result["samples"][name] == first["samples"][name]
    assert results[2]["samples"]["keys"][0] == "0.tar:s0000000"
    assert "it eats cars" in (tmp_path / "tables/report.html").read_text()


def test_eval_says_that_numbers_and_wordnets_ids_are_no_names(tmp_path, model, capsys):
    for n in range(2):
        tar(tmp_path / f"set/{n}.tar", {f"{n}": {"png": png(n), "cls": b"%d" % n}})
        (tmp_path / f"folders/n0144000{n}").mkdir(parents=True)
        (tmp_path / f"folders/n0144000{n}/0.png").write_bytes(png(n))
    sets = [str(tmp_path / "set"), str(tmp_path / "folders")]
    cli.main(["eval", "--model", str(model), "--data", *sets, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "set: its classes are called by number; --classnames gives them words" in said
    assert "folders: its classes are called by WordNet id; --classnames gives them words" in said


@pytest.mark.parametrize(
    "more, message",
    [
        (["--split", "test"], "no folder for the split 'test'"),
        (["--label-column", "x"], "is a folder and has no columns; a label column needs a table"),
        (["--image-column", "x"], "is a folder and has no columns; an image column needs a table"),
        (["--download"], "a download is for torchvision's sets"),
    ],
)
def test_options_that_can_not_be_followed_are_told(tmp_path, model, capsys, more, message):
    source = write("folder", tmp_path / "birds")
    with pytest.raises(SystemExit):
        cli.main(["eval", "--model", str(model), "--data", str(source), "--out", str(tmp_path / "out"), *more])
    assert message in capsys.readouterr().err


def test_sets_of_several_labels_have_no_accuracy_among_the_first(tmp_path, model, capsys):
    for n in range(2):
        write_picture(tmp_path / f"{n}.png", n)
    table = lines(
        tmp_path / "t.jsonl", *(json.dumps({"image": f"{n}.png", "label": ["cat", "dog"][n:]}) for n in (0, 1))
    )
    command = ["eval", "--model", str(model), "--data", str(table), "--out", str(tmp_path / "out"), "--topk", "3"]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "--topk is for one label an image, or captions, and all sets of --data" in capsys.readouterr().err


def test_a_set_with_captions_is_for_retrieval_and_has_no_classes(tmp_path, model, capsys):
    texts = [b"a bird of kind %d" % n for n in range(len(LABELS))]
    source = benchmark_set(tmp_path / "set", {"txt": texts}, dataset_type="retrieval")
    command = ["eval", "--model", str(model), "--data", str(source), "--out", str(tmp_path / "out")]
    for more, message in (
        (["--classnames", "imagenet"], "has captions, not classes"),
        (["--templates", "simple"], "are for classes"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*command, *more])
        assert message in capsys.readouterr().err
    cli.main(command)
    (result,) = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert (result["task"], result["num_texts"]) == ("zeroshot_retrieval", len(LABELS))


def test_captions_in_json_are_for_retrieval_and_what_an_index_left_out_is_counted(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for n in range(3):
            data = io.BytesIO()
            picture(n).save(data, "PNG")
            for name, content in (
                (f"{n}.png", data.getvalue()),
                (f"{n}.json", json.dumps({"caption": f"no {n}"}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        member = tarfile.TarInfo("__MACOSX/._0.png")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"abcd"))
    with pytest.warns(UserWarning, match="1 left out"):
        data = open_dataset(tmp_path / "00000.tar")
    assert isinstance(data, CaptionedImages)
    assert data.captions == (("no 0",), ("no 1",), ("no 2",))
    assert sum(each.count for each in data.left_out) == 1
