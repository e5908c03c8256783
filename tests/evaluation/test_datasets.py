"""What can be evaluated on: labels, names and prompts belong together, or it is said why not."""

from __future__ import annotations

import pickle
import shutil
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
from helpers import write_picture
from PIL import Image

from miniclip.data.reading.tables import IMAGE_COLUMNS
from miniclip.evaluation.datasets.folders_and_tables import LABEL_COLUMNS
from miniclip.evaluation.datasets.open import open_dataset, open_images
from miniclip.evaluation.prompts import (
    CLASSNAME_SETS,
    TEMPLATE_SETS,
    classname_set,
    fill,
    imagenet_classnames,
    template_set,
)


def class_folders(root: Path, *names: str, images: int = 2) -> Path:
    for name in names:
        for number in range(images):
            write_picture(root / name / f"{number}.png", number)
    return root


def lines(path: Path, *content: str) -> Path:
    path.write_text("\n".join(content) + "\n", encoding="utf-8")
    return path


def labels_by_file(data) -> dict[str, str]:
    """What each picture is said to be, by its path below the data."""
    return {
        f"{path.parent.name}/{path.name}": data.classnames[label]
        for path, label in zip(data.images, data.labels, strict=True)
    }


# ---------------------------------------------------------------------------------------------------------------------
# A folder per class


def test_class_folders_are_sorted_and_underscores_read_as_spaces(tmp_path):
    data = open_dataset(class_folders(tmp_path / "pets", "tiger", "Käse", "tabby_cat", "sub folder"))
    assert data.name == "pets"
    assert data.classnames == ("Käse", "sub folder", "tabby cat", "tiger")
    assert data.labels == (0, 0, 1, 1, 2, 2, 3, 3)
    assert len(data) == len(data.images) == len(data.groups) == 8
    assert data.templates == ("a photo of a {c}.",)
    assert len(set(data.groups)) == 8  # every picture for itself


def test_pictures_may_lie_deeper_in_a_class_folder(tmp_path):
    write_picture(tmp_path / "cat" / "young" / "a.jpg")
    write_picture(tmp_path / "cat" / "b.WEBP", format="WEBP")
    write_picture(tmp_path / "dog" / "c.png")
    assert open_dataset(tmp_path).labels == (0, 0, 1)


def test_hidden_folders_and_stray_files_are_no_classes(tmp_path):
    class_folders(tmp_path, "cat", "dog", ".cache")
    write_picture(tmp_path / "cover.png")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "cat" / "notes.txt").write_text("about")
    data = open_dataset(tmp_path)
    assert data.classnames == ("cat", "dog")
    assert len(data) == 4


def test_images_open_decoded_and_a_broken_one_is_named(tmp_path):
    class_folders(tmp_path, "cat", "dog", images=1)
    (tmp_path / "cat" / "broken.png").write_text("no picture")
    data = open_dataset(tmp_path)
    assert data.open(0).size == (24, 20)
    with pytest.raises(ValueError, match=r"cat/broken\.png is not an image"):
        data.open(1)
    data.images[2].unlink()
    with pytest.raises(ValueError, match=r"dog/0\.png can't be read"):
        data.open(2)


@pytest.mark.parametrize("name", ["photos", "photos.v2", "my photos"])
def test_the_data_is_called_by_its_folder(tmp_path, name):
    assert open_dataset(class_folders(tmp_path / name, "cat")).name == name


def test_the_folder_one_stands_in_has_a_name_too(tmp_path, monkeypatch):
    class_folders(tmp_path / "pets", "cat")
    monkeypatch.chdir(tmp_path / "pets")
    assert open_dataset(".").name == "pets"


# ---------------------------------------------------------------------------------------------------------------------
# Class names that lie with the data, or are asked for


def test_names_that_hold_those_of_the_folders_give_the_order_of_the_labels(tmp_path):
    class_folders(tmp_path, "tabby_cat", "tiger", images=1)
    lines(tmp_path / "classnames.txt", "zebra", "tiger", "tabby cat")
    data = open_dataset(tmp_path)
    assert data.classnames == ("zebra", "tiger", "tabby cat")
    assert labels_by_file(data) == {"tabby_cat/0.png": "tabby cat", "tiger/0.png": "tiger"}


def test_folders_with_keys_of_their_own_take_the_names_in_sorted_order(tmp_path):
    class_folders(tmp_path, "n02123045", "n01440764", images=1)
    lines(tmp_path / "classnames.txt", "tench", "tabby cat")
    assert labels_by_file(open_dataset(tmp_path)) == {"n01440764/0.png": "tench", "n02123045/0.png": "tabby cat"}


def test_folders_called_by_number_take_the_names_by_number(tmp_path):
    class_folders(tmp_path, *map(str, range(11)), images=1)
    lines(tmp_path / "classnames.txt", *(f"class {n}" for n in range(11)))
    assert labels_by_file(open_dataset(tmp_path)) == {f"{n}/0.png": f"class {n}" for n in range(11)}


def test_names_written_as_the_folders_are_keep_to_their_folders(tmp_path):
    """With underscores on both sides, and in another order than the sorted one."""
    class_folders(tmp_path, "tabby_cat", "siamese_cat", images=1)
    lines(tmp_path / "classnames.txt", "tabby_cat", "siamese_cat")
    found = {path: name.replace("_", " ") for path, name in labels_by_file(open_dataset(tmp_path)).items()}
    assert found == {"tabby_cat/0.png": "tabby cat", "siamese_cat/0.png": "siamese cat"}


def test_a_misspelt_name_among_matching_ones_shuffles_no_labels(tmp_path):
    class_folders(tmp_path, "cat", "dog", "tiger", images=1)
    lines(tmp_path / "classnames.txt", "tiger", "cat", "dgo")
    with pytest.raises(ValueError, match="'dog'"):
        open_dataset(tmp_path)


def test_names_asked_for_come_before_those_of_the_data(tmp_path):
    class_folders(tmp_path / "data", "1", "2", images=1)
    lines(tmp_path / "data" / "classnames.txt", "a", "b", "c")
    other = lines(tmp_path / "other.txt", "x", "y", "z")
    assert open_dataset(tmp_path / "data", classnames=other).classnames == ("x", "y", "z")
    assert open_dataset(tmp_path / "data", classnames="imagenet").classnames == imagenet_classnames()


def test_counts_that_do_not_match_are_both_told(tmp_path):
    class_folders(tmp_path, "key1", "key2", "key3", images=1)
    lines(tmp_path / "classnames.txt", "cat", "dog")
    with pytest.raises(ValueError, match=r"has 3 classes and there are 2 class names; .*'key1', 'key2', 'key3'"):
        open_dataset(tmp_path)


def test_a_table_of_names_refuses_a_list_that_holds_one_twice(tmp_path):
    write_picture(tmp_path / "a.png")
    source = lines(tmp_path / "data.csv", "filepath,label", "a.png,crane")
    names = lines(tmp_path / "names.txt", "crane", "maillot", "crane")
    with pytest.raises(ValueError, match=r"class names hold duplicates, so .*data\.csv must give labels as numbers"):
        open_dataset(source, classnames=names)


def test_a_list_that_holds_a_name_twice_is_fine_for_numbers(tmp_path):
    source = lines(tmp_path / "data.csv", "filepath,label", "a.png,0", "a.png,2")
    data = open_dataset(source, classnames=lines(tmp_path / "names.txt", "crane", "maillot", "crane"))
    assert (data.labels, data.classnames) == ((0, 2), ("crane", "maillot", "crane"))


@pytest.mark.parametrize(
    "content, says",
    [
        ("cat\n\ndog\n", "classnames.txt is blank in line 2"),
        ("", "classnames.txt is empty"),
        ("\n \n", "classnames.txt is empty"),
    ],
)
def test_a_blank_line_among_the_names_is_refused_by_its_number(tmp_path, content, says):
    class_folders(tmp_path, "cat", "dog", images=1)
    (tmp_path / "classnames.txt").write_text(content)
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        open_dataset(tmp_path)


@pytest.mark.parametrize("content", ["\ufeffcat\r\ndog\r\n", "cat \ndog\n\n\n"], ids=["Windows", "blanks at the end"])
def test_line_ends_and_marks_of_other_systems_do_not_get_into_the_names(tmp_path, content):
    class_folders(tmp_path, "dog", "cat", images=1)
    (tmp_path / "classnames.txt").write_bytes(content.encode())
    assert open_dataset(tmp_path).classnames == ("cat", "dog")


def test_names_that_are_not_utf8_are_told_by_their_file(tmp_path):
    class_folders(tmp_path, "dog", "cat", images=1)
    (tmp_path / "classnames.txt").write_bytes("Käse\nBrot\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classnames\.txt"):
        open_dataset(tmp_path)


def test_a_missing_file_of_names_is_named(tmp_path):
    class_folders(tmp_path, "cat")
    with pytest.raises(ValueError, match=r"no file .*nowhere\.txt"):
        open_dataset(tmp_path, classnames=tmp_path / "nowhere.txt")


# ---------------------------------------------------------------------------------------------------------------------
# Templates


def test_templates_beside_the_data_are_used_unless_others_are_asked_for(tmp_path):
    class_folders(tmp_path, "cat")
    lines(tmp_path / "templates.txt", "ein Bild: {}", "{c}!")
    other = lines(tmp_path / "other_templates.txt", "a {}")
    assert open_dataset(tmp_path).templates == ("ein Bild: {}", "{c}!")
    assert open_dataset(tmp_path, templates=other).templates == ("a {}",)
    for name in TEMPLATE_SETS:
        assert open_dataset(tmp_path, templates=name).templates == template_set(name)
    assert [len(template_set(name)) for name in TEMPLATE_SETS[:3]] == [1, 80, 7]


def test_an_unknown_template_set_is_named_with_those_there_are(tmp_path):
    class_folders(tmp_path, "cat")
    with pytest.raises(ValueError, match="imagenet81") as caught:
        open_dataset(tmp_path, templates="imagenet81")
    for name in TEMPLATE_SETS:
        assert name in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# A labelled table


def test_a_table_of_names_sorts_them_into_classes(tmp_path):
    write_picture(tmp_path / "sub" / "a b.png")
    source = lines(
        tmp_path / "birds.csv", "filepath,label", "sub/a b.png, tabby_cat ", "sub/a b.png,dog", "gone.png,dog"
    )
    data = open_dataset(source)
    assert (data.name, data.classnames, data.labels) == ("birds", ("dog", "tabby cat"), (1, 0, 0))
    assert data.open(0).size == (24, 20)
    assert data.images[2] == tmp_path / "gone.png"  # found out, and counted, when it is opened
    assert len(set(data.groups)) == 3


def test_numbers_in_a_table_are_places_in_the_list_of_names_beside_it(tmp_path):
    source = lines(tmp_path / "birds.tsv", "image\tclass", "a.png\t2", "a.png\t0", "a.png\t010")
    lines(tmp_path / "birds.classnames.txt", *(f"bird {n}" for n in range(11)))
    lines(tmp_path / "birds.templates.txt", "a bird: {}")
    lines(tmp_path / "classnames.txt", "of", "a", "folder")
    data = open_dataset(source)
    assert data.labels == (2, 0, 10)
    assert data.classnames[10] == "bird 10"
    assert data.templates == ("a bird: {}",)


def test_names_in_a_table_find_their_places_in_the_list_beside_it(tmp_path):
    source = lines(tmp_path / "birds.csv", "image,class", "a.png,barn_owl", "a.png,crane")
    lines(tmp_path / "birds.classnames.txt", "crane", "kea", "barn owl")
    data = open_dataset(source)
    assert (data.labels, data.classnames) == ((2, 0), ("crane", "kea", "barn owl"))


@pytest.mark.parametrize("column", [*LABEL_COLUMNS, "LABEL"])
def test_the_label_column_is_known_by_any_of_its_names(tmp_path, column):
    data = open_dataset(lines(tmp_path / "data.csv", f"filepath,{column}", "a.png,cat"))
    assert data.classnames == ("cat",)


def test_a_group_column_says_what_belongs_together(tmp_path):
    source = lines(tmp_path / "data.csv", "filepath,label,hand", "a.png,x,7", "b.png,y,7", "c.png,x,9")
    assert open_dataset(source, group_column="hand").groups == ("7", "7", "9")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_image_without_a_group_stands_alone(tmp_path, kind):
    """Those of unknown scenes are not of one scene, which would make the interval too wide."""
    table = tmp_path / f"birds.{kind}"
    if kind == "csv":
        table.write_text("image,label,scene\na.png,kea,x\nb.png,kea,\nc.png,owl,\nd.png,owl,x\n")
    else:
        scenes = ('"x"', "null", "NaN", '"x"')
        table.write_text(
            "".join(f'{{"image": "{n}.png", "label": "kea", "scene": {s}}}\n' for n, s in enumerate(scenes))
        )
    a, b, c, d = open_dataset(table, group_column="scene").groups
    assert a == d == "x"
    assert len({a, b, c}) == 3


def test_what_programs_write_for_a_missing_value_is_no_group_and_is_told(tmp_path):
    written = ["nan", "<NA>", "NA", "None", "null", "N/A", "n/a", "#N/A", "\\N", " NA ", "\u200b", "", "  "]
    rows = [f"{row}.png,cat,{scene}" for row, scene in enumerate(["x", *written, "NA", "x", "none", "NAM"])]
    source = lines(tmp_path / "data.csv", "filepath,label,scene", *rows)
    with pytest.warns(UserWarning, match=r"'nan' \(1 times\), .*'NA' \(3 times\), .* in column 'scene' are taken for"):
        data = open_dataset(source, group_column="scene")
    first, *alone, last, none, nam = data.groups
    assert (first, last, none, nam) == ("x", "x", "none", "NAM")
    assert len({*alone, first, none, nam}) == len(written) + 4
    assert data.column("scene") == ["x", *[None] * (len(written) + 1), "x", "none", "NAM"]


def test_a_class_may_have_the_name_of_nothing_and_a_cell_may_not(tmp_path):
    rows = ("a.png,None", "b.png,NA", "c.png,null", "d.png,none")
    assert open_dataset(lines(tmp_path / "a.csv", "filepath,label", *rows[:3])).classnames == ("NA", "None", "null")
    for word in ("nan", "<NA>", "#N/A", "\\N", " nan ", "\u200b"):
        with pytest.raises(ValueError, match=r"b\.csv: row 2 \(e\.png\) has no label"):
            open_dataset(lines(tmp_path / "b.csv", "filepath,label", "d.png,none", f"e.png,{word}"))


def test_pictures_of_kinds_that_are_not_read_are_told(tmp_path):
    folder = class_folders(tmp_path, "cat", "dog")
    for name in ("cat/IMG_0001.HEIC", "dog/IMG_0002.heic", "dog/logo.svg", "dog/notes.txt"):
        (folder / name).write_bytes(b"whatever")
    with pytest.warns(UserWarning, match=r"4 left out: .*\.heic.*: 2 \(cat/IMG_0001\.HEIC.*\*\.txt.*\.svg"):
        data = open_dataset(folder)
    assert len(data) == 4


def test_a_tar_that_was_left_above_class_folders_is_told_and_makes_no_shards_of_them(tmp_path):
    folder = class_folders(tmp_path, "cat", "dog")
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        tar.add(folder / "cat", "cat")
    for data in (open_dataset, open_images):
        with pytest.warns(UserWarning, match=r"1 left out: a tar, which is read.*: 1 \(ILSVRC2012_img_val\.tar\)"):
            assert len(data(folder)) == 4
    assert open_dataset(folder).classnames == ("cat", "dog")


def test_an_unknown_group_column_is_named_with_those_there_are(tmp_path):
    source = lines(tmp_path / "data.csv", "filepath,label,hand", "a.png,x,7")
    with pytest.raises(ValueError, match=r"has no column 'writer'; its columns are 'filepath', 'label', 'hand'"):
        open_dataset(source, group_column="writer")


def test_a_folder_has_no_group_column(tmp_path):
    with pytest.raises(ValueError, match="is a folder and has no columns; a group column needs a table"):
        open_dataset(class_folders(tmp_path, "cat"), group_column="hand")


@pytest.mark.parametrize("missing", ["filepath", "label"])
def test_a_missing_column_is_named_with_those_wanted(tmp_path, missing):
    column = "label" if missing == "filepath" else "filepath"
    with pytest.raises(ValueError, match="has no column for") as caught:
        open_dataset(lines(tmp_path / "data.csv", f"{column},Höhe", "x,1"))
    for name in (column, "Höhe", *(IMAGE_COLUMNS if missing == "filepath" else LABEL_COLUMNS)):
        assert name in str(caught.value)


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.csv has columns and no rows"):
        open_dataset(lines(tmp_path / "data.csv", "filepath,label"))


@pytest.mark.parametrize("row", ["b.png,", "b.png,  ", "b.png", "b.png,nan", "b.png,<NA>"])
def test_a_row_without_a_label_is_named(tmp_path, row):
    with pytest.raises(ValueError, match=r"data\.csv: row 2 \(b\.png\) has no label"):
        open_dataset(lines(tmp_path / "data.csv", "filepath,label", "a.png,cat", row))


def test_a_number_beyond_the_names_is_told_with_their_count(tmp_path):
    source = lines(tmp_path / "data.csv", "filepath,label", "a.png,0", "b.png,2")
    lines(tmp_path / "data.classnames.txt", "cat", "dog")
    with pytest.raises(ValueError, match=r"data\.csv has labels up to 2, but there are 2 class names"):
        open_dataset(source)


def numbered(folder: Path, labels: Sequence[int], names: Sequence[str]) -> Path:
    """A table of an image for each label, beside a list of names."""
    lines(folder / "data.classnames.txt", *names)
    rows = [f"{row}.png,{label}" for row, label in enumerate(labels)]
    return lines(folder / "data.csv", "filepath,label", *rows)


@pytest.mark.parametrize("labels, names", [((1, 2, 3), "12345"), ((2, 1), "0213"), ((1, 0), "10")])
def test_labels_that_are_names_and_numbers_of_other_classes_are_refused(tmp_path, labels, names):
    label = min(label for label in labels if names[label] != str(label))
    says = f"has the label '{label}', which is the name of class {names.index(str(label))} and the number of the class "
    with pytest.raises(ValueError, match=rf"{says}that is called '{names[label]}'\. If the labels are names, leave"):
        open_dataset(numbered(tmp_path, labels, names))
    (tmp_path / "data.classnames.txt").unlink()
    assert open_dataset(tmp_path / "data.csv").classnames == tuple(sorted(map(str, labels)))


@pytest.mark.parametrize(
    "labels, names, indices",
    [
        ((3, 1, 2), "0123", (3, 1, 2)),  # both readings are the same
        ((1, 0, 3), "1234", (1, 0, 3)),  # 0 is no name
        ((1, 4, 2), "1234", (0, 3, 1)),  # 4 is no number of a class
    ],
)
def test_labels_that_can_be_read_in_one_way_are(tmp_path, recwarn, labels, names, indices):
    data = open_dataset(numbered(tmp_path, labels, names))
    assert (data.labels, data.classnames) == (indices, tuple(names))
    assert not recwarn.list


def test_the_numbers_of_a_class_label_are_no_names(tmp_path, recwarn):
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=list("1234"))})
    rows = {"image": ["a.png", "b.png"], "label": [1, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    assert open_dataset(tmp_path / "data.parquet").labels == (1, 2)
    assert not [each for each in recwarn.list if issubclass(each.category, UserWarning)]


def test_labels_that_may_be_numbered_from_1_are_told(tmp_path):
    names = ("zero", "one", "two", "three")
    for labels, is_told in (((1, 2, 3), True), ((2, 1), True), ((0, 1, 2), False), ((1, 3), False), ((2,), False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert open_dataset(numbered(tmp_path, labels, names)).labels == labels
        says = f"no image has the label 0 ('zero'), and all from 1 to {len(labels)} occur"
        assert [says in str(each.message) for each in caught] == [True] * is_told
    with pytest.raises(ValueError, match=r"labels up to 4, but there are 4 class names\. Labels count from 0: are"):
        open_dataset(numbered(tmp_path, (1, 2, 4), names))


def test_a_negative_number_is_no_label(tmp_path):
    source = lines(tmp_path / "data.csv", "filepath,label", "a.png,0", "b.png,1", "c.png,-1")
    lines(tmp_path / "data.classnames.txt", "cat", "dog")
    with pytest.raises(ValueError, match="'-1'"):
        open_dataset(source)


# ---------------------------------------------------------------------------------------------------------------------
# No data


@pytest.mark.parametrize(
    "name, says", [("nowhere", "is not there"), ("a.doc", "is neither a folder per class, nor shards")]
)
def test_a_source_that_is_none_is_named(tmp_path, name, says):
    (tmp_path / "a.doc").write_text("{}")
    with pytest.raises(ValueError, match=f"data '.*{name}' {says}"):
        open_dataset(tmp_path / name)


def test_a_folder_without_class_folders_is_refused(tmp_path):
    write_picture(tmp_path / "a.png")
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(ValueError, match="has no classes: it must hold one folder of images for each class"):
        open_dataset(tmp_path)


def test_a_second_column_without_a_header_is_taken_for_labels_by_no_guess(tmp_path):
    write_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"'image', 'caption'; .* If it has no header, .* as image,label$"):
        open_dataset(lines(tmp_path / "table.csv", "a.png,cat"))
    assert open_dataset(lines(tmp_path / "table.csv", "image,label", "a.png,cat")).classnames == ("cat",)


def test_classifys_folder_of_what_is_no_class_is_left_out_and_named(tmp_path):
    class_folders(tmp_path, "cat", "dog")
    class_folders(tmp_path, "none of these", images=3)
    write_picture(tmp_path / "none of these/deep/4.png")
    with pytest.warns(UserWarning, match=r"in classify's folder of what is none.*: 4 \(none of these/\)"):
        data = open_dataset(tmp_path)
    assert labels_by_file(data) == {"cat/0.png": "cat", "cat/1.png": "cat", "dog/0.png": "dog", "dog/1.png": "dog"}
    assert sum(each.count for each in data.left_out) == 4
    assert len(open_images(tmp_path / "none of these")) == 4
    for name in ("cat", "dog"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(ValueError, match=r"has no classes: .*, and 'none of these' is classify's folder"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("is_beside", [True, False])
def test_classifys_folder_is_a_class_where_the_names_are_listed_and_have_it(tmp_path, is_beside):
    class_folders(tmp_path / "data", "cat", "dog", "none of these")
    listed = lines(tmp_path / ("data/classnames.txt" if is_beside else "names"), "cat", "none of these", "dog")
    data = open_dataset(tmp_path / "data", None if is_beside else listed)
    assert data.classnames == ("cat", "none of these", "dog")
    assert sorted(data.labels) == [0, 0, 1, 1, 2, 2]
    assert not data.left_out


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder of parquet"])
def test_images_of_no_class_need_no_labels_in_a_table(tmp_path, kind):
    rows = [{"image": f"{n}.png", "scene": f"s{n // 2}", "split": ("test", "train")[n == 5]} for n in range(6)]
    for row in rows:
        write_picture(tmp_path / row["image"], 7)
    if kind == "folder of parquet":  # whose splits are in the names of its files
        rows = [{"image": row["image"], "scene": row["scene"]} for row in rows[:5]]
    source = tmp_path / "outside.csv"
    if kind == "csv":
        lines(source, *(",".join(row) for row in (list(rows[0]), *(list(row.values()) for row in rows))))
    else:
        source = tmp_path / "tables" / "outside.parquet"
        datasets.Dataset.from_list(
            [{**row, "image": (tmp_path / row["image"]).read_bytes()} for row in rows]
        ).to_parquet(source.parent.mkdir() or source)
        source = source.parent if kind == "folder of parquet" else source
    with pytest.raises(ValueError, match="has no column for the labels"):
        open_dataset(source)
    data = open_images(source, "scene")
    assert data.groups == ("s0", "s0", "s1", "s1", "s2")  # of the split that a labelled set would be read of
    assert [data.open(index).size for index in range(len(data))] == [Image.open(tmp_path / "0.png").size] * 5
    assert open_images(source).groups == tuple("01234")
    with pytest.warns(UserWarning, match="has no column 'photographer'; each of its images counts as independent"):
        assert open_images(source, "photographer").groups == tuple("01234")


def test_an_image_that_has_a_row_for_each_caption_is_one_of_no_class(tmp_path):
    for number in range(3):
        write_picture(tmp_path / f"{number}.png", number)
    names = ["0.png", "1.png", "./0.png", "2.png", "1.png"]
    rows = [
        f"{name},a caption {row},{scene}" for row, (name, scene) in enumerate(zip(names, ["", *"tsut"], strict=True))
    ]
    table = lines(tmp_path / "captions.csv", "file,caption,scene", *rows)
    with pytest.warns(UserWarning, match="2 left out: a further row of an image: 2"):
        data = open_images(table)
    assert [Path(data.key(index)).name for index in range(len(data))] == ["0.png", "1.png", "2.png"]
    assert data.groups == tuple("012")
    assert [data.open(n).tobytes() for n in range(3)] == [
        Image.open(tmp_path / f"{n}.png").convert("RGB").tobytes() for n in range(3)
    ]
    assert len(pickle.loads(pickle.dumps(data)).images) == 3
    with pytest.warns(UserWarning, match="a further row"):
        assert open_images(table, "scene").groups == tuple("stu")
    with pytest.raises(
        ValueError, match=r"0\.png has the caption 'a caption 0' in one row and 'a caption 2' in another"
    ):
        open_images(table, "caption")


def test_class_folders_without_any_image_are_refused(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("no picture")
    with pytest.raises(ValueError, match="has 2 class folders and no image in any of them"):
        open_dataset(tmp_path)


def test_a_class_folder_without_images_is_named(tmp_path):
    class_folders(tmp_path, "cat", "dog")
    (tmp_path / "empty one").mkdir()
    with pytest.raises(ValueError, match="has class folders without images: empty one"):
        open_dataset(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# What is built in

# Classes of each set (paper, appendix A, table 9; KITTI's distances and CLEVR's counts as VTAB has them).
NUM_CLASSES = {
    "imagenet": 1000,
    "pets": 37,
    "caltech101": 102,
    "flowers": 102,
    "mnist": 10,
    "fer2013": 7,
    "eurosat": 10,
    "gtsrb": 43,
    "kitti_closest_vehicle_distance": 4,
    "country211": 211,
    "pcam": 2,
    "clevr_count_all": 8,
    "svhn": 10,
}


def test_every_built_in_template_has_a_place_for_the_name_and_every_name_is_one():
    for name in TEMPLATE_SETS:
        wordings = template_set(name)
        assert wordings
        assert all("XYZ" in fill(wording, "XYZ") for wording in wordings)
        assert len(set(wordings)) == len(wordings) or name == "imagenet80"
    assert {name: len(classname_set(name)) for name in CLASSNAME_SETS} == NUM_CLASSES
    assert all(text == text.strip() and text for name in CLASSNAME_SETS for text in classname_set(name))


def test_the_papers_prompts_are_there_by_name(tmp_path):
    write_picture(tmp_path / "data" / "7" / "1.png")
    data = open_dataset(tmp_path / "data", classnames="mnist", templates="mnist")
    assert data.classnames[data.labels[0]] == "7"
    assert data.templates == ('a photo of the number: "{c}".',)
    assert (data.classnames_from, data.templates_from) == ("the built-in 'mnist'", "the built-in set 'mnist'")
