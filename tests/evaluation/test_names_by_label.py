"""A file of names that holds the data's own labels: those decide, whatever the order of its lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import write_picture

from miniclip.data.sources import read_pairs
from miniclip.evaluation.datasets.name_files import names_of
from miniclip.evaluation.datasets.open import open_dataset

CODES = {"FELCA": "ant", "ALPHA": "bee", "ZETA": "cow", "MID": "doe"}
WORDNETS = {"n00000002": "cow", "n00000000": "ant", "n00000003": "doe", "n00000001": "bee"}
GAPS = {"10": "cow", "2": "ant", "33": "doe", "4": "bee"}  # as COCO's ids have


def folders(root: Path, labels: list[str]) -> Path:
    for number, label in enumerate(labels):
        write_picture(root / label / "0.png", number)
    return root


def table(header: str, names: dict[str, str]) -> str:
    return "\n".join([header, *(f"{key},{name}" for key, name in names.items())])


def written(kind: str, names: dict[str, str]) -> tuple[str, str]:
    """A file's name and text, as people write such a mapping."""
    if kind == "json":
        return "a.json", json.dumps(names)
    if kind == "json to labels":
        return "a.json", json.dumps({name: key for key, name in names.items()})
    if kind == "records":
        return "a.json", json.dumps({"categories": [{"id": key, "name": name} for key, name in names.items()]})
    if kind == "yaml":
        return "a.yaml", "\n".join(f"{key}: {name}" for key, name in names.items())
    if kind == "yaml within names":
        return "a.yaml", "names:\n" + "\n".join(f"  {key}: {name}" for key, name in names.items())
    if kind == "python":
        return "a.py", f"NAMES = {names}"
    return "a.csv", table(kind, names)


@pytest.mark.parametrize("names", [CODES, WORDNETS, GAPS])
@pytest.mark.parametrize(
    "kind",
    [
        *("json", "json to labels", "records", "yaml", "yaml within names", "python"),
        *("wnid,name", "code,name", "label,name", "id,class", "folder,class"),
    ],
)
def test_each_folder_has_the_name_that_the_file_gives_it(tmp_path, names, kind):
    name, text = written(kind, names)
    (tmp_path / name).write_text(text)
    data = open_dataset(folders(tmp_path / "data", list(names)), classnames=tmp_path / name)
    found = {path.parent.name: data.classnames[label] for path, label in zip(data.images, data.labels, strict=True)}
    assert found == names
    assert str(tmp_path / name) + ", by " in data.classnames_from


@pytest.mark.parametrize(
    "labels",
    [
        ("001.Black_footed_Tern", "010.Kea"),  # CUB's and Caltech's
        ("n02085620-Black_footed_Tern", "n02085782-Kea"),  # Stanford Dogs'
        ("00 - Black footed Tern", "01 - Kea"),
    ],
)
def test_classes_are_called_without_the_keys_before_their_names(tmp_path, labels):
    """With them, prompts read "a photo of a 001.Black footed Tern."."""
    source = folders(tmp_path / "data", list(labels))
    data = open_dataset(source)
    assert (data.labels, data.classnames) == ((0, 1), ("Black footed Tern", "Kea"))
    assert data.classnames_from == "the names of the folders, without the keys before them"
    (tmp_path / "names.txt").write_text("kea\nwren\nblack_footed tern\n")
    assert open_dataset(source, classnames=tmp_path / "names.txt").labels == (2, 0)


@pytest.mark.parametrize(
    "labels",
    [
        ("001.Tern", "Kea"),  # a name without a key
        ("0_tern", "1_kea"),  # one digit may be a part of it, as in 3 wheels
        ("24_hours", "48_hours"),
        ("01.Tern", "02.tern"),
        ("01.Tern", "01.Kea"),
        ("007_Tern", "24_Kea"),
    ],
)
def test_numbers_that_may_be_a_part_of_names_stay(tmp_path, labels):
    data = open_dataset(folders(tmp_path / "data", list(labels)))
    assert sorted(data.classnames) == sorted(label.replace("_", " ") for label in labels)
    assert data.classnames_from == "the names of the folders"


def test_a_list_with_the_background_before_the_classes_shifts_no_label(tmp_path):
    """TensorFlow's ImageNetLabels.txt has 1,001 lines, for labels from 1."""
    (tmp_path / "names.txt").write_text("background\nant\nbee\ncow\n")
    source, names = folders(tmp_path / "data", ["0", "1", "2"]), tmp_path / "names.txt"
    with pytest.raises(ValueError, match=r"begins with 'background', .* has the label 0, and none above 2 for 4 names"):
        open_dataset(source, classnames=names)
    assert open_dataset(folders(tmp_path / "words", ["ant", "cow"]), classnames=names).labels == (1, 3)
    assert open_dataset(folders(tmp_path / "from 1", ["1", "3"]), classnames=names).labels == (1, 3)
    assert open_dataset(folders(tmp_path / "all", ["0", "3"]), classnames=names).labels == (0, 3)
    names.write_text("0: background\n1: ant\n2: bee\n3: cow\n")
    assert open_dataset(source, classnames=names).labels == (0, 1, 2)


@pytest.mark.parametrize("end", ["", "\n\n"])
@pytest.mark.parametrize("between", [" ", "\t", "   ", ",", "; "])
def test_a_list_of_images_and_the_numbers_of_their_classes_is_a_table(tmp_path, between, end):
    """As Caffe's, and those of ImageNet's and Places' validation; beside the images, or above them."""
    images = ["val/b one.png", "val/a.png", "val/c.JPEG"]
    for number, image in enumerate(images):
        write_picture(tmp_path / image, number)
    lines = [f"{image}{between}{label}" for image, label in zip(images, (2, 0, 2), strict=True)]
    (tmp_path / "val.txt").write_text("\n".join(lines) + end)
    (tmp_path / "val/list.txt").write_text("\n".join(lines).replace("val/", ""))
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    for source in ("val.txt", "val/list.txt"):
        data = open_dataset(tmp_path / source, classnames=tmp_path / "names.txt")
        assert [Path(key).name for key in data.keys] == ["b one.png", "a.png", "c.JPEG"]
        assert (data.labels, data.classnames) == ((2, 0, 2), ("ant", "bee", "cow"))
    with pytest.raises(ValueError, match=r"names\.txt' is neither a folder per class, .* nor a table"):
        open_dataset(tmp_path / "names.txt")


@pytest.mark.parametrize("line", ["{image},{label}", "{label},{image}", "{image}; {label}"])
def test_a_csv_without_a_header_has_numbers_for_labels_and_anything_else_for_captions(tmp_path, line):
    """Numbers were captions, too: they trained a model and could not be evaluated on."""
    for number in range(3):
        write_picture(tmp_path / f"{number}.png", number)
    for source, labels in (("val.csv", (2, 0, 2)), ("other.csv", (2, "none", 2))):
        lines = [line.format(image=f"{number}.png", label=label) for number, label in enumerate(labels)]
        (tmp_path / source).write_text("\n".join(lines))
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    assert open_dataset(tmp_path / "val.csv", classnames=tmp_path / "names.txt").labels == (2, 0, 2)
    with pytest.raises(ValueError, match="no column for the captions: its columns are"):
        read_pairs(tmp_path / "val.csv")
    captions = [pair.captions for pair in read_pairs(tmp_path / "val.csv", caption_columns=["label"])]
    assert captions == [("2",), ("0",), ("2",)]
    assert [pair.captions for pair in read_pairs(tmp_path / "other.csv")] == [("2",), ("none",), ("2",)]


@pytest.mark.parametrize("between", [" ", ": ", "\t"])
def test_lines_with_wordnets_ids_are_read_by_id_in_any_order(tmp_path, between):
    (tmp_path / "words.txt").write_text("\n".join(f"{key}{between}{name}, Latin" for key, name in WORDNETS.items()))
    data = open_dataset(folders(tmp_path / "data", list(WORDNETS)), classnames=tmp_path / "words.txt")
    assert [data.classnames[label] for label in data.labels] == ["ant", "bee", "cow", "doe"]


def test_lines_with_labels_that_have_gaps_are_read_by_label(tmp_path):
    (tmp_path / "names.txt").write_text("1: ant\n3: bee\n90: cow\n")
    data = open_dataset(folders(tmp_path / "data", ["1", "03", "90"]), classnames=tmp_path / "names.txt")
    found = {path.parent.name: data.classnames[label] for path, label in zip(data.images, data.labels, strict=True)}
    assert found == {"1": "ant", "03": "bee", "90": "cow"}


def test_imagenets_class_index_names_its_folders_in_any_order(tmp_path):
    index = {str(n): list(entry) for n, entry in enumerate(WORDNETS.items())}
    (tmp_path / "index.json").write_text(json.dumps(index))
    data = open_dataset(folders(tmp_path / "data", list(WORDNETS)), classnames=tmp_path / "index.json")
    assert [data.classnames[label] for label in data.labels] == ["ant", "bee", "cow", "doe"]


def test_names_beside_the_data_and_labels_of_tables_and_lists_are_read_alike(tmp_path):
    folders(tmp_path, list(CODES))
    (tmp_path / "classnames.txt").write_text("classes:\n" + "\n".join(f"  {k}: {name}" for k, name in CODES.items()))
    assert [open_dataset(tmp_path).classnames[label] for label in (0, 1, 2, 3)] == ["bee", "ant", "doe", "cow"]
    (tmp_path / "names.json").write_text(json.dumps(CODES))
    (tmp_path / "t.csv").write_text("image,label\nFELCA/0.png,FELCA\nMID/0.png,MID\n")
    data = open_dataset(tmp_path / "t.csv", classnames=tmp_path / "names.json")
    assert [data.classnames[label] for label in data.labels] == ["ant", "doe"]
    assert sorted(data.classnames) == ["ant", "bee", "cow", "doe"]  # classes without an image may be guessed, too
    (tmp_path / "t.jsonl").write_text('{"image": "MID/0.png", "label": ["ZETA", "MID"]}\n')
    data = open_dataset(tmp_path / "t.jsonl", classnames=tmp_path / "names.json")
    assert {data.classnames[c] for c in data.labels[0].nonzero()[0]} == {"cow", "doe"}


def test_a_list_of_the_datas_own_is_translated_by_its_names(tmp_path):
    import datasets

    folders(tmp_path, list(CODES))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["MID_1", "FELCA"])})
    rows = {"image": [str(tmp_path / "MID" / "0.png"), str(tmp_path / "FELCA" / "0.png")], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    (tmp_path / "names.json").write_text(json.dumps({"FELCA": "ant", "MID_1": "doe", "ZETA": "cow"}))
    data = open_dataset(tmp_path / "set", classnames=tmp_path / "names.json")
    assert [data.classnames[label] for label in data.labels] == ["doe", "ant"]


def test_what_the_file_says_besides_does_not_change_the_order_of_its_labels(tmp_path):
    (tmp_path / "names.csv").write_text("index,coco_id,name\n1,1,bee\n0,3,ant\n2,2,cow\n")
    data = open_dataset(folders(tmp_path / "data", ["0", "1", "2"]), classnames=tmp_path / "names.csv")
    assert [data.classnames[label] for label in data.labels] == ["ant", "bee", "cow"]


@pytest.mark.parametrize(
    ("labels", "name", "text", "says"),
    [
        (["FELCA", "ALPHA", "MIT"], "a.json", json.dumps(CODES), "2 of the 3 labels.*'MIT' .near 'MID'"),
        (["n00000000", "n00000009"], "a.csv", table("wnid,name", WORDNETS), "column 'wnid' for 1 of the 2.*n00000009"),
        (["1", "2"], "a.csv", "coco_id,name\n2,a\n1,b\n7,c", "'a' by column 'coco_id' and 'c' by their order"),
        (["1", "2"], "a.csv", "a_id,b_id,name\n1,2,a\n2,1,b\n9,8,c", "'a' by .*'a_id' and 'b' by .*'b_id'"),
        (["a", "b"], "a.json", '{"a": "b", "b": "c", "c": "a"}', "'b' by its keys and 'c' by its values"),
        (["k1", "k2", "k3"], "a.csv", "code,name\nq2,b\nq1,a\nq3,c", "'q2' and others in column 'code'"),
    ],
)  # fmt: skip
def test_labels_that_a_file_has_in_part_or_twice_are_refused(tmp_path, labels, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        open_dataset(folders(tmp_path / "data", labels), classnames=tmp_path / name)


def test_numbers_and_codes_of_a_mapping_are_no_names():
    assert names_of('{"n00000001": 1, "n00000000": 0}', "a.json") == ("n00000000", "n00000001")


def test_a_mapping_between_words_and_numbers_names_in_words(tmp_path):
    (tmp_path / "a.json").write_text('{"ant": 5, "bee": 9}')
    with pytest.raises(ValueError, match=r"labels from 5 to 9.*those of the data"):
        open_dataset(folders(tmp_path / "data", ["ant", "bee"]), classnames=tmp_path / "a.json")


@pytest.mark.parametrize(
    "text",
    ["wnid,name\nn00000002,b\nn00000001,a", "name,model\nb,b747\na,a320", "code,name\nq2,B\nq1,A"],
)
def test_the_order_of_rows_says_nothing_where_the_labels_are_the_names(tmp_path, text):
    (tmp_path / "names.csv").write_text(text)
    data = open_dataset(folders(tmp_path / "data", ["a", "b"]), classnames=tmp_path / "names.csv")
    assert [data.classnames[label].lower() for label in data.labels] == ["a", "b"]


def test_codes_that_are_no_keys_say_nothing_of_the_order(tmp_path):
    folders(tmp_path, ["x", "y"])
    (tmp_path / "t.csv").write_text("image,label\nx/0.png,0\ny/0.png,1\n")
    for header, is_key in (("road", False), ("model", False), ("wnid", True), ("class_code", True)):
        (tmp_path / "names.csv").write_text(f"name,{header}\nnorth,A4\nsouth,A1")
        if is_key:
            with pytest.raises(ValueError, match=f"'A4' and others in column '{header}'.* in another order"):
                open_dataset(tmp_path / "t.csv", classnames=tmp_path / "names.csv")
        else:
            data = open_dataset(tmp_path / "t.csv", classnames=tmp_path / "names.csv")
            assert [data.classnames[label] for label in data.labels] == ["north", "south"]


def test_numbers_are_keys_only_where_their_column_is_called_so(tmp_path):
    counts = {"3": "ant", "1": "bee", "2": "cow"}
    folders(tmp_path / "data", ["1", "2", "3"])
    for header in ("num_images", "legs", "year"):
        (tmp_path / "names.csv").write_text(table(f"{header},name", counts))
        with pytest.raises(ValueError, match="are these numbered from 1"):
            open_dataset(tmp_path / "data", classnames=tmp_path / "names.csv")
    for header in ("class", "category", "coco_id", "folder", "No."):
        (tmp_path / "names.csv").write_text(table(f"{header},name", counts))
        data = open_dataset(tmp_path / "data", classnames=tmp_path / "names.csv")
        assert [data.classnames[label] for label in data.labels] == ["bee", "cow", "ant"]
    (tmp_path / "names.csv").write_text("name,legs\nworm,0\nsnail,1\nman,2\nhorse,4\nant,6\n")
    data = open_dataset(folders(tmp_path / "some", ["2", "4"]), classnames=tmp_path / "names.csv")
    assert [data.classnames[label] for label in data.labels] == ["man", "ant"]  # by the order of the rows


def test_keys_are_the_labels_in_any_case_and_a_column_of_labels_settles_the_order_without_them(tmp_path):
    import datasets

    folders(tmp_path, list(CODES))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["MID_1", "FELCA"])})
    rows = {"image": [str(tmp_path / "MID" / "0.png"), str(tmp_path / "FELCA" / "0.png")], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    for text in ("label,original,name\n1,Felca,ant\n0,mid 1,doe\n", "label,original,name\n1,FELCA,ant\n0,other,doe\n"):
        (tmp_path / "names.csv").write_text(text)
        data = open_dataset(tmp_path / "set", classnames=tmp_path / "names.csv")
        assert [data.classnames[label] for label in data.labels] == ["doe", "ant"]
    (tmp_path / "names.json").write_text(json.dumps({key.lower(): name for key, name in CODES.items()}))
    data = open_dataset(folders(tmp_path / "data", list(CODES)), classnames=tmp_path / "names.json")
    found = {path.parent.name: data.classnames[label] for path, label in zip(data.images, data.labels, strict=True)}
    assert found == CODES
