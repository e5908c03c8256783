"""What people really have: names in files of any usual kind, folders that systems left things in, odd cells."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import tarfile
import unicodedata
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from helpers import write_picture
from PIL import Image
from written_sets import tar

from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.reading.scan import IMAGE_SUFFIXES, is_leftover, is_skipped_folder
from miniclip.evaluation.datasets.folders_and_tables import refuse_joined
from miniclip.evaluation.datasets.name_files import names_of, templates_of
from miniclip.evaluation.datasets.open import open_dataset, open_images
from miniclip.evaluation.datasets.sets import LabelledImages
from miniclip.evaluation.datasets.tars import indexed

FISH = ("tench", "goldfish", "great white shark")


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


# ---------------------------------------------------------------------------------------------------------------------
# Class names and templates in files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.txt", "\n".join(FISH)),
        ("windows.txt", "\r\n".join(FISH) + "\r\n"),
        ("indented.json", json.dumps(FISH, indent=2)),
        ("line.json", json.dumps(FISH)),
        ("json.txt", json.dumps(FISH, indent=1)),
        ("index.json", json.dumps({str(n): [f"n0144076{n}", name.replace(" ", "_")] for n, name in enumerate(FISH)})),
        ("config.json", json.dumps({"model_type": "vit", "id2label": dict(enumerate(FISH))})),
        ("label2id.json", json.dumps({name: n for n, name in reversed(list(enumerate(FISH)))})),
        ("categories.json", json.dumps([{"id": 2 - n, "name": name} for n, name in enumerate(reversed(FISH))])),
        ("python.txt", "[\n" + "".join(f"    '{name}',  # a fish\n" for name in FISH) + "]\n"),
        ("python.py", f"CLASSES = {FISH!r}\n"),
        ("between_brackets.txt", "".join(f'"{name}",\n' for name in FISH)),
        ("one_line.txt", ", ".join(FISH)),
        ("with_commas.txt", ",\n".join(FISH)),
        ("numbered.txt", "".join(f"{n}: {name}\n" for n, name in enumerate(FISH))),
        ("numbered_otherwise.txt", "".join(f"{n}\t{name}\n" for n, name in reversed(list(enumerate(FISH))))),
        ("dictionary.txt", "{" + ",\n ".join(f"{n}: {name!r}" for n, name in enumerate(FISH)) + "}"),
        ("synset_words.txt", "".join(f"n0144076{n} {name}, Latin name\n" for n, name in enumerate(FISH))),
        ("header.csv", "id,name\n" + "".join(f"{n},{name}\n" for n, name in reversed(list(enumerate(FISH))))),
        ("one_column.csv", "name\n" + "\n".join(FISH)),
        ("header.txt", "label,name\n" + "".join(f"{n},{name}\n" for n, name in enumerate(FISH))),
        ("header.tsv", "label\tname\n" + "".join(f"{n}\t{name}\n" for n, name in enumerate(FISH))),
        ("yolo.yaml", "nc: 3\nnames:\n" + "".join(f"  {n}: {name}\n" for n, name in enumerate(FISH))),
        ("list.yaml", "".join(f"- {name}\n" for name in FISH)),
        ("list.txt", "".join(f"- {name}\n" for name in FISH)),
        ("yaml.txt", "nc: 3\nnames:\n" + "".join(f"  {n}: {name}\n" for n, name in enumerate(FISH))),
        ("yaml_in_a_line.txt", f"names: [{', '.join(FISH)}]"),
        ("labels_behind.txt", "".join(f"{name}: {n}\n" for n, name in reversed(list(enumerate(FISH))))),
        ("labels_behind_a_comma.txt", "".join(f"{name},{n}\n" for n, name in enumerate(FISH))),
        ("semicolons.txt", "; ".join(FISH)),
        ("ids_and_colons.txt", "".join(f"n0144076{n}: {name}, Latin name\n" for n, name in enumerate(FISH))),
        ("program.py", f'"""Fish."""\nimport torch\n\nCLASSES = {FISH!r}\n'),
        ("program.txt", f"from __future__ import annotations\nNAMES = {FISH!r}"),
        ("semicolons_at_ends.txt", "".join(f"{name};\n" for name in FISH)),
        ("typographic.txt", "".join(f"“{name}”\n" for name in FISH)),
        ("bars.txt", "id|name\n" + "".join(f"{n}|{name}\n" for n, name in enumerate(FISH))),
        ("camel_case.csv", "ClassId,ClassName\n" + "".join(f"{2 - n},{FISH[2 - n]}\n" for n in range(3))),
        ("camel_case.txt", "ClassId,Name\n" + "".join(f"{2 - n},{FISH[2 - n]}\n" for n in range(3))),
        ("mnist.json", json.dumps([{"coarse_label": n, "class": FISH[n]} for n in (1, 2, 0)])),
    ],
)
def test_class_names_of_any_usual_kind_are_read_in_label_order(name, text):
    assert names_of(text, name) == FISH


def test_a_separator_of_lines_within_a_text_of_json_lines_ends_none():
    assert names_of('"a\u2028b"\n"c\x85d"\r\n', "a.jsonl") == names_of('["a\u2028b", "c\x85d"]', "a.json")


@pytest.mark.parametrize(
    ("name", "text", "place", "remedy"),
    [
        ("a.txt", "0 cats\n1 cat\n2 cats", "'0 cats'", "a JSON list keeps numbers"),
        ("a.txt", "1. tench\n2. goldfish", "labels from 1 to 2", "labels are 0, 1, 2"),
        ("a.json", '[{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]', "labels from 1 to 3", "labels are 0, 1"),
        ("a.json", '{"tench": "a fish"}', "'tench'", "one name a line"),
        ("a.json", '["tench", ["goldfish"]]', "entry 1", "must be a text"),
        ("a.json", '["tench", ""]', "entry 1", "not empty"),
        ("a.json", '{"a": 0, "b": 0}', "one label to several", "one name a line"),
        ("a.txt", "# my classes\ntench\ngoldfish", "line 1", "one name a line"),
        ("a.txt", "## Classes\ntench\ngoldfish", "line 1 looks like a comment", "one name a line"),
        ("a.txt", "name\ntench\ngoldfish", "'name'", r"\.csv"),
        ("a.txt", "tench\n\ngoldfish", "line 2", "none may be blank"),
        ("a.txt", '["tench",\n "goldfish"', r"begins with '\[\"tench\"", "one name a line"),
        ("a.txt", "tench\n]", "line 2", "one name a line"),
        ("a.txt", "n01440764 b\nn01440001 a", "another order", "in label order"),
        ("a.txt", "n01440764\nn01443537", "ids.*n01440764", "one name a line"),
        ("a.txt", "tench 0\ngoldfish 1", "'tench 0'", "a JSON list keeps numbers"),
        ("a.txt", "tench=0\ngoldfish=1", "'tench=0", "one name a line"),
        ("a.py", "import torch\nA = ['tench']\nB = ['goldfish']", "more than one list", "one name a line"),
        ("a.txt", "class Fish(Enum):\n    TENCH = 0", "'class Fish", "one name a line"),
        ("a.txt", "dict(tench=0, goldfish=1)", r"'dict\(tench", "one name a line"),
        ("a.txt", "<classes>\n<name>tench</name>\n</classes>", "line 1 is '<classes>'", "one name a line"),
        ("a.txt", "['tench' 'goldfish']", "no comma stands between 'tench' and 'goldfish'", "one name a line"),
        ("a.py", "A = ['tench',\n  'goldfish'\n  'shark']", "between 'goldfish' and 'shark'", "one name a line"),
        ("a.txt", "const fish = ['tench', 'goldfish'];", "is code and no name", "one name a line"),
        ("a.txt", 'fish <- c("tench", "goldfish")', "is code and no name", "one name a line"),
        ("a.txt", "0: tench\n1: goldfish\n3: shark", "not 0, 1, 2 …: 0, 1, 3", "no gaps"),
        ("a.txt", "1 tench\n2 goldfish\n4 shark", "not 0, 1, 2 …: 1, 2, 4", "a JSON list keeps numbers"),
        ("a.json", '{"0": "tench", "0": "goldfish"}', "'0' comes twice in one object", ""),
        ("a.txt", "{0: 'tench', 0: 'goldfish'}", "a mapping has a key twice", "one name a line"),
        ("a.csv", "x,y\n1,2", "'x', 'y'", "call it 'name'"),
        ("a.csv", "id,name\n0,tench\n0,goldfish", "'id' has a label twice", ""),
        ("a.yaml", "{", "is not YAML", ""),
        ("a.txt", " \n", "is empty", ""),
    ],
)  # fmt: skip
def test_names_that_could_be_read_in_two_ways_are_refused_with_the_remedy(name, text, place, remedy):
    with pytest.raises(ValueError, match=place) as caught:
        names_of(text, name)
    assert re.search(remedy, str(caught.value))


def names_by(header: str, *rows: str) -> tuple[str, ...]:
    return names_of("\n".join([header, *rows]), "a.csv")


@pytest.mark.parametrize("header", ["ClassId", "label_idx", "category_id", "#", "Nr.", "gt", "code", "y", "species_id"])
def test_a_column_that_counts_the_rows_has_the_labels_whatever_its_header(header):
    assert names_by(f"{header},Name", "1,goldfish", "0,tench", "2,great white shark") == FISH
    assert names_by(f"Name,{header}", "great white shark,2.0", "tench,0.0", "goldfish,1.0") == FISH
    with pytest.raises(ValueError, match=r"from 1 to 3 in column .*, and they begin with 1"):
        names_by(f"{header},Name", "1,tench", "2,goldfish", "3,great white shark")


def test_numbers_of_another_kind_are_no_labels_and_two_columns_of_labels_are_refused():
    assert names_by("name,images", "tench,30", "goldfish,10", "great white shark,20") == FISH
    assert names_by("name,kind", "tench,0", "goldfish,0", "great white shark,1") == FISH
    assert (
        names_by(",class_id,name", "0,2,great white shark", "1,0,tench", "2,1,goldfish") == FISH
    )  # beside pandas' index
    assert names_by("Nr.,gt,name", "1,2,great white shark", "2,0,tench", "3,1,goldfish") == FISH  # labels count from 0
    assert names_by("rank,label,name", "0,2,great white shark", "1,0,tench", "2,1,goldfish") == FISH
    assert names_by("id,gt,name", "0,0,tench", "1,1,goldfish", "2,2,great white shark") == FISH
    assert names_by("count,name", "1,tench") == ("tench",)  # one class has no order
    for header in ("rank,gt,name", "index,class_id,name", "id,category_id,name", "rank,place,name"):
        first, second, _ = header.split(",")
        with pytest.raises(ValueError, match=f"'({first}|{second})' and '({first}|{second})', which differ; .*'label'"):
            names_by(header, "0,2,great white shark", "1,0,tench", "2,1,goldfish")
    with pytest.raises(ValueError, match="'id' and 'rank', which differ"):
        names_by("id,rank,name", "1,2,great white shark", "2,0,tench", "3,1,goldfish")


def test_of_several_columns_of_numbers_the_one_of_a_known_header_that_counts_from_0_has_the_labels():
    assert names_by("id,rank,name", "1,2,goldfish", "0,1,tench", "2,0,great white shark") == FISH
    assert names_by("id,parent,name", "0,1,tench", "1,2,goldfish", "2,0,great white shark") == FISH
    assert names_by("index,number,name", "2,9,great white shark", "0,7,tench", "1,3,goldfish") == FISH
    for header in ("index,id,name", "class_id,id,name"):
        assert names_by(header, "2,13,great white shark", "0,1,tench", "1,2,goldfish") == FISH
    assert names_by("id,trainId,name", "7,0,tench", "8,1,goldfish", "11,2,great white shark") == FISH
    assert names_by("id,place,name", "7,0,tench", "8,1,goldfish", "11,2,great white shark") == FISH
    with pytest.raises(ValueError, match=r"from 1 to 3 in column 'id'.* and they begin with 1"):
        names_by("id,rank,name", "1,1,tench", "2,2,goldfish", "3,3,great white shark")


@pytest.mark.parametrize("header", ["rank", "floors", "digit", "order"])
def test_a_column_that_counts_something_else_from_1_is_no_label(header):
    assert names_by(f"name,{header}", "tench,2", "goldfish,1", "great white shark,3") == FISH


def test_yes_and_no_of_two_classes_is_no_label():
    assert names_by("name,is_animal", "dog,1", "car,0") == ("dog", "car")
    assert names_by("name,train,test", "dog,0,1", "car,1,0") == ("dog", "car")
    assert names_by("id,name,is_animal", "0,dog,1", "1,car,0") == ("dog", "car")
    assert names_by("id,name,is_animal", "1,car,1", "0,dog,0") == ("dog", "car")
    assert names_by("y,name,is_animal", "1,car,0", "0,dog,1") == ("dog", "car")
    panoptic = [{"id": 0, "name": "dog", "isthing": 1}, {"id": 1, "name": "car", "isthing": 0}]
    assert names_of(json.dumps(panoptic), "a.json") == ("dog", "car")
    with pytest.raises(ValueError, match=r"from 1 to 2 in column 'id'.* and they begin with 1"):
        names_of(json.dumps([{**each, "id": each["id"] + 1} for each in panoptic]), "a.json")


@pytest.mark.parametrize("separator", [",", "\t", ";", "|", ", "])
@pytest.mark.parametrize("names", [("text", "title", "list"), ("class", "name", "category"), ("description", "a", "b")])
def test_a_numbered_list_whose_first_class_is_called_as_a_column_is_no_table(separator, names):
    before = [f"{n}{separator}{name}\n" for n, name in enumerate(names)]
    after = [f"{name}{separator}{n}\n" for n, name in enumerate(names)]
    for lines in (before, after):
        assert names_of("".join(lines), "a.txt") == names
        assert names_of("".join([lines[0], lines[2], lines[1]]), "a.txt") == names
    for lines in (before, [before[0], before[2], before[1]], after):
        with pytest.raises(ValueError, match=f"begins with '.*{names[0]}.*no header; name the columns.*label and name"):
            names_of("".join(lines), "a.csv")
    assert names_of(f"2{separator}{names[2]}\n0{separator}{names[0]}\n1{separator}{names[1]}", "a.txt") == names


def test_a_year_may_be_a_columns_header():
    assert names_by("name,2020,2021", "tench,3,7", "goldfish,2,9", "great white shark,9,1") == FISH


def test_two_keys_of_one_label_are_refused():
    with pytest.raises(ValueError, match="gives one label to several names"):
        names_of('{"0": "tench", "00": "shark", "1": "goldfish"}', "a.json")


def test_numbers_that_belong_to_the_names_stay():
    assert names_of("3 doors\n5 doors", "a.txt") == ("3 doors", "5 doors")
    assert names_of("0\n1\n2", "a.txt") == ("0", "1", "2")
    assert names_of('["0 cats", "1 cat"]', "a.json") == ("0 cats", "1 cat")
    assert names_of("level 0\nlevel 1\nlevel 2", "a.txt") == ("level 0", "level 1", "level 2")
    assert names_of("1 euro\n2 euro\n5 euro", "a.txt") == ("1 euro", "2 euro", "5 euro")
    assert names_of("1.5 mm\n0.5 inch", "a.txt") == ("1.5 mm", "0.5 inch")
    assert names_of("crane (bird), crane (machine)", "a.txt") == ("crane (bird)", "crane (machine)")
    assert names_of("Boeing 737\nBoeing 747", "a.txt") == ("Boeing 737", "Boeing 747")


def test_names_with_colons_brackets_and_words_of_python_stay():
    names = ("Alien: Covenant", "crane (bird)", "import", "class", "a = b", "lambda")
    assert names_of("\n".join(names), "a.txt") == names


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a photo of a {}.\nart of the {}, in oil"),
        ("a.json", '["a photo of a {}.", "art of the {}, in oil"]'),
        ("a.txt", "['a photo of a {}.', 'art of the {}, in oil']"),
        ("a.txt", "'a photo of a {}.',\n'art of the {}, in oil',"),
        ("a.py", "T = [\n    lambda c: f'a photo of a {c}.',\n    lambda c: f'art of the {c}, in oil',\n]"),
        ("a.txt", "    lambda c: f'a photo of a {c}.',\n    lambda c: f'art of the {c}, in oil',\n"),
        ("a.txt", "lambda c: 'a photo of a {}.'.format(c),\nlambda c: 'art of the {}, in oil'.format(c)"),
        ("a.yaml", "- a photo of a {}.\n- art of the {}, in oil"),
        ("a.csv", 'template\na photo of a {}.\n"art of the {}, in oil"'),
    ],
)
def test_templates_pasted_from_code_are_those_of_plain_lines(name, text):
    assert templates_of(text, name) == ("a photo of a {}.", "art of the {}, in oil")


@pytest.mark.parametrize("text", ["{}", "{c}", "{c} in the snow", "{}, a bird\n{}", "{} at night\na photo of a {}"])
def test_a_template_may_begin_with_its_place(text):
    assert templates_of(text, "a.txt") == tuple(text.split("\n"))


def test_blank_lines_and_comments_among_templates_are_refused_as_no_templates():
    for text, told in (
        ("a photo of a {}.\n\nart of the {}", r"^a\.txt is blank in line 2; take it out$"),
        (
            "a photo of a {}.\n; for {}",
            r"^a\.txt, line 2 looks like a comment \('; for {}'\), and would be a template; take",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            templates_of(text, "a.txt")


def test_numbered_templates_are_taken_without_their_numbers():
    assert templates_of("1. a photo of a {}.\n2. art of the {}", "a.txt") == ("a photo of a {}.", "art of the {}")
    assert templates_of("prompt, 1\na {c}, 2", "a.txt") == ("prompt", "a {c}")


def test_templates_of_a_table_need_no_labels_from_0():
    assert templates_of("Nr.,template\n1,a photo of a {}.\n2,art of the {}", "a.csv") == (
        "a photo of a {}.",
        "art of the {}",
    )
    for header in ("id,order,template", "order,id,template", "rank,place,template", ",number,template"):
        assert templates_of(f"{header}\n0,1,a {{}}\n1,0,the {{}}", "a.csv") == ("a {}", "the {}")
    with pytest.raises(ValueError, match="'label' has a label twice"):  # the prompts of each class are not for all
        templates_of("label,template\n0,a {}\n0,the {}\n1,my {}", "a.csv")


def test_code_among_templates_is_not_run(tmp_path):
    text = f"[lambda c: open({str(tmp_path / 'ran')!r}, 'w') and c]"
    with pytest.raises(ValueError, match=r"line 1.*one name a line"):
        templates_of(text, "a.py")
    assert not (tmp_path / "ran").exists()


def test_names_of_a_file_reach_the_labels_of_a_table(tmp_path):
    for n in range(3):
        write_picture(tmp_path / f"{n}.png", n)
    (tmp_path / "t.csv").write_text("filepath,label\n0.png,0\n1.png,1\n2.png,2\n")
    (tmp_path / "names.json").write_text(json.dumps(FISH, indent=2))
    data = open_dataset(tmp_path / "t.csv", classnames=tmp_path / "names.json")
    assert [data.classnames[label] for label in data.labels] == list(FISH)


# ---------------------------------------------------------------------------------------------------------------------
# Accents


def test_names_from_a_mac_are_the_names_that_are_typed(tmp_path):
    names = ("café", "über", "パン")
    for n, name in enumerate(names):
        write_picture(tmp_path / "ev" / nfd(name) / "1.png", n)
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")
    (tmp_path / "p.json").write_text(json.dumps({name: [f"a {name}"] for name in names}), encoding="utf-8")
    data = open_dataset(tmp_path / "ev", classnames=tmp_path / "names.txt", templates=tmp_path / "p.json")
    assert (data.classnames, data.labels) == (names, (0, 1, 2))
    assert data.templates == {name: (f"a {name}",) for name in names}
    assert open_dataset(tmp_path / "ev").classnames == names


def test_labels_that_look_alike_are_one_class_and_files_are_found_by_either_spelling(tmp_path):
    write_picture(tmp_path / f"{nfd('crème')}.png", 0)
    write_picture(tmp_path / "b.png", 1)
    table = f"filepath,label\ncrème.png,{nfd('café')}\nb.png,café\nb.png,tea\n"
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    data = open_dataset(tmp_path / "t.csv")
    assert (data.classnames, data.labels) == (("café", "tea"), (0, 0, 1))
    assert data.open(0).size == data.open(1).size


# ---------------------------------------------------------------------------------------------------------------------
# Folders: everything that lies there is an image of a class, or counted with the reason


def test_what_systems_leave_behind_is_no_class_and_is_counted(tmp_path):
    for n, name in enumerate(("cat/0.png", "cat/1.jfif", "dog/0.png")):
        write_picture(tmp_path / name, n)
    for name in (
        "__MACOSX/cat/._0.png", "cat/._0.png", "cat/Thumbs.db", "desktop.ini", ".ipynb_checkpoints/0.png",
        "cat/.ipynb_checkpoints/0-checkpoint.png", "@eaDir/cat/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/x.png",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "lost+found").mkdir()
    with pytest.warns(UserWarning, match=r"8 left out: .*left behind by a system"):
        data = open_dataset(tmp_path)
    assert data.classnames == ("cat", "dog")
    assert len(data) == 3
    assert sum(each.count for each in data.left_out) == 8


@pytest.mark.parametrize(
    "name",
    [
        "0.jpg_original", "0.JPG.orig", "0.png.old", "0.jpg.backup", "0.jpg.1", ".1.jpg.Xa91bc", "#0.jpg#", "0.txt.1",
        "0.jpg:Zone.Identifier", "Network Trash Folder", "Temporary Items", "$OneDriveTemp", "FOUND.000", "MSOCache",
        "@sharebin", "~snapshot", "0.jpg@SynoEAStream",
    ],
)  # fmt: skip
def test_backups_and_copies_are_leftovers_in_folders_and_in_tars(tmp_path, name):
    for n, each in enumerate(("cat/a.png", "dog/a.png", f"cat/{name}", f"{name}/x.png")):
        write_picture(tmp_path / "data" / f"{each}.png", n).rename(tmp_path / "data" / each)
    with pytest.warns(UserWarning, match=r"2 left out: left behind by a system or a program: 2 \("):
        data = open_dataset(tmp_path / "data")
    assert (len(data), data.classnames) == (2, ("cat", "dog"))
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        tar.add(tmp_path / "data", arcname="data")
    shards = indexed(str(tmp_path / "tars"))
    assert len(shards) == 2
    assert sum(each.count for each in shards.left_out) == 2


@pytest.mark.parametrize(
    "name", ["Recycled", "#猫#", "original", "photo_original.jpg", "v1.2", "a.b.001", "IMG.orig", "0.jpg_large", "old"]
)
def test_names_that_only_look_like_leftovers_are_read(name):
    assert not is_leftover(name)


def test_linked_folders_count_as_torchvision_counts_them(tmp_path):
    write_picture(tmp_path / "ev/cat/0.png", 0)
    write_picture(tmp_path / "ev/dog/0.png", 1)
    for n in range(3):
        write_picture(tmp_path / f"disk/{n}.png", n)
    (tmp_path / "ev/cat/more").symlink_to(tmp_path / "disk")
    (tmp_path / "ev/bird").symlink_to(tmp_path / "disk")
    (tmp_path / "ev/dog/gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match=r"1 left out: a link to nothing: 1 \(dog/gone\.png\)"):
        data = open_dataset(tmp_path / "ev")
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "ev"))
    assert list(data.classnames) == theirs.classes
    there = [(path, label) for path, label in theirs.samples if Path(path).exists()]
    assert list(zip(map(str, data.images), data.labels, strict=True)) == there


@pytest.mark.parametrize("seed", range(8))
def test_of_any_tree_what_is_kept_and_what_is_left_out_add_up(tmp_path, seed):
    choose = random.Random(seed)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    folders = ["", "sub", "__MACOSX", ".git", "@eaDir", "a b", nfd("é"), "_x"]
    names = [
        "a{}.png",
        "a{}.JPG",
        "b{}.jfif",
        "c{}.heic",
        "d{}",
        "e{}.txt",
        "._a{}.png",
        "f{}.md",
        "Thumbs.db",
        "g{}.csv",
    ]
    root, num_files = tmp_path / "ev", 0
    for category in ("cat", "dog", "kea"):
        (root / category).mkdir(parents=True)
        (root / category / "own.png").write_bytes(picture.getvalue())
        num_files += 1
    for n in range(40):
        above = root / choose.choice(["cat", "dog", "kea", "", "__MACOSX"]) / choose.choice(folders)
        path = above / choose.choice(names).format(n)
        if above.parent == root and above.name not in ("cat", "dog", "kea") and not is_skipped_folder(above.name):
            continue  # another class
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.getvalue() if choose.random() < 0.8 else b"text")
            num_files += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data, bare = open_dataset(root), open_images(root)
    assert data.classnames == ("cat", "dog", "kea")
    assert len(data) + sum(each.count for each in data.left_out) == num_files
    assert len(bare) + sum(each.count for each in bare.left_out) == num_files
    assert all(each.reason for each in data.left_out)
    theirs = torchvision.datasets.ImageFolder(
        str(root), is_valid_file=lambda path: path.endswith(IMAGE_SUFFIXES), allow_empty=True
    ).samples
    skipped = {path for path, _ in theirs if any(map(is_skipped_folder, Path(path).relative_to(root).parts))}
    assert {path for path, _ in theirs} - skipped <= set(map(str, data.images))


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_cells_that_are_no_paths_are_pictures_or_name_their_row(tmp_path):
    images = [
        png(0),
        base64.b64encode(png(1)).decode(),
        np.zeros((9, 7, 3), int).tolist(),
        None,
        [1.5, 2.5],
        "gone.png",
    ]
    rows = [
        {"image": base64.b64encode(each).decode() if isinstance(each, bytes) else each, "label": "ab"[n % 2]}
        for n, each in enumerate(images)
    ]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    data = open_dataset(tmp_path / "t.json")
    assert [data.open(n).size for n in range(3)] == [(7, 9)] * 3
    for n, says in ((3, "row 4 has no image"), (4, "row 5: .*numbers"), (5, "gone.png")):
        with pytest.raises(ValueError, match=says):
            data.open(n)
    assert len(data.fingerprint()) == 64


@pytest.mark.parametrize(
    "write",
    [
        lambda rows: json.dumps(rows),
        lambda rows: "\n".join(map(json.dumps, rows)),
        lambda rows: json.dumps({"data": rows}),
        lambda rows: json.dumps({row["file"]: row["label"] for row in rows}),
        lambda rows: json.dumps({row["file"]: {"label": row["label"]} for row in rows}),
    ],
    ids=["records", "lines", "within", "file to label", "file to record"],
)
def test_labels_in_json_of_any_usual_shape(tmp_path, write):
    rows = [{"file": f"{n}.png", "label": ("cat", "dog")[n % 2]} for n in range(4)]
    for n in range(4):
        write_picture(tmp_path / f"{n}.png", n)
    (tmp_path / "t.json").write_text(write(rows))
    data = open_dataset(tmp_path / "t.json")
    assert (data.classnames, data.labels) == (("cat", "dog"), (0, 1, 0, 1))
    assert data.open(3).size


def test_lists_of_labels_that_went_through_a_csv_are_several_labels(tmp_path):
    table = "filepath,label\na.png,\"['cat', 'dog']\"\nb.png,['dog']\n"
    (tmp_path / "t.csv").write_text(table)
    data = open_dataset(tmp_path / "t.csv")
    assert data.classnames == ("cat", "dog")
    assert data.labels.tolist() == [[True, True], [False, True]]


def test_a_folder_of_parquet_is_read_by_its_split_and_a_pattern_as_one_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name: str, labels: list[str]) -> None:
        cells = [{"bytes": png(n), "path": None} for n in range(len(labels))]
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table({"image": cells, "label": labels}), tmp_path / "data" / name)

    write("train-00000-of-00001.parquet", ["cat", "dog", "kea"])
    write("test-00000-of-00002.parquet", ["cat", "dog"])
    write("test-00001-of-00002.parquet", ["dog"])
    (tmp_path / "README.md").write_text("---")
    with pytest.warns(UserWarning, match="left out"):
        data = open_dataset(tmp_path)
    assert (data.classnames, data.labels) == (("cat", "dog"), (0, 1, 1))
    assert data.open(2).size == (7, 9)
    with pytest.warns(UserWarning, match="left out"):
        assert len(open_dataset(tmp_path, split="train")) == 3
    assert len(open_dataset(f"{tmp_path}/data/test-*.parquet")) == 3


def test_a_table_with_a_column_of_splits_is_scored_on_one_and_tells_the_others(tmp_path):
    for number in range(4):
        write_picture(tmp_path / f"{number}.jpg", number)
    rows = ["image,label,caption,split", "0.jpg,cat,a cat,train", "1.jpg,dog,a dog,val", "2.jpg,cat,the cat,val"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    for task, size in ((None, 2), ("retrieval", 2)):
        with pytest.warns(UserWarning, match="a row of another split .train.: 1"):
            data = open_dataset(tmp_path / "t.csv", task=task)
        assert len(data) == size
        assert [Path(key).name for key in data.keys] == ["1.jpg", "2.jpg"]
        with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
            open_dataset(tmp_path / "t.csv", split="test", task=task)
    (tmp_path / "t.csv").write_text("\n".join(rows).replace("val", "holdout"))
    for split in (None, "holdout"):  # never train where there is another
        with pytest.warns(UserWarning, match="a row of another split .train.: 1"):
            assert len(open_dataset(tmp_path / "t.csv", task="retrieval", split=split)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Names and labels as programs write them


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("index.csv", ",name\n1,dog\n0,cat\n", ("cat", "dog")),  # pandas' index
        ("class.csv", "class,description\n1,dog\n0,cat\n", ("cat", "dog")),  # a class of numbers is the label
        ("header.csv", "Class Name\ncat\ndog\n", ("cat", "dog")),
        ("tabs.csv", "id\tname\n0\tcat\n1\tdog\n", ("cat", "dog")),
        ("bars.csv", "id|name\n1|dog\n0|cat\n", ("cat", "dog")),
        ("excel.csv", "sep=;\r\nid;name\r\n1;dog\r\n0;cat\r\n", ("cat", "dog")),
        ("excel.txt", "sep=|\nid|name\n1|dog, tame\n0|cat\n", ("cat", "dog, tame")),
        ("unused.csv", "id;name;;\n1;dog;;\n0;cat;;\n;;;\n", ("cat", "dog")),
        ("pandas.csv", "id,name\n1.0,dog\n0.0,cat\n", ("cat", "dog")),
        ("comma.csv", "id;name\n1,0;dog\n0,0;cat\n", ("cat", "dog")),
        ("quoted.txt", '"cat, tame"\ndog\n"the ""big"" cat"\n', ("cat, tame", "dog", 'the "big" cat')),
        ("invisible.txt", "cat\n\ufeffdog\u200b\nbig\u00a0\u2028bird\n", ("cat", "dog", "big bird")),
        ("numbers.txt", "Boeing 737\nBoeing 747\n", ("Boeing 737", "Boeing 747")),
    ],
)
def test_names_are_in_label_order_however_a_program_wrote_them(name, text, names):
    assert names_of(text, name) == names


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("twice.yaml", "names:\n  0: cat\n  0: dog\n  1: bird\n", "0 comes twice in one mapping"),
        ("twice.txt", "names:\n  0: cat\n  0: dog\n  1: bird\n", "0 comes twice in one mapping"),
        ("deep.yaml", "names: " + "[" * 3000 + "]" * 3000, "is not YAML: it is nested more than 100 deep in line 1"),
        ("within.yaml", "names: &a [cat, *a]", "the alias .a in line 1 stands within what it stands for"),
        ("count.yaml", "nc: 3\nnames: [cat, dog]\n", "2 names, and its nc, the number of classes, is 3"),
        ("no_header.csv", "cat\ndog\n", "begins with 'cat', which may be a header.*call the header 'name'.*txt"),
        ("map_clsloc.txt", "n01440764 1 tench\nn01443537 2 goldfish\n", "ids and numbers.*can't be known"),
        ("printed.txt", "cat\ndog\n...\nzebra\n", "line 3 .'...'. stands where a printout leaves names out"),
        ("markdown.txt", "| id | name |\n|---|---|\n| 0 | cat |\n", "line 1 .* is a row of a table in Markdown"),
        (
            "series.txt",
            "0    cat\n1    dog\nName: label, dtype: object",
            "line 3 .* is the end of a printout of pandas",
        ),
        ("tabs.txt", "cat\tfeline\ndog\tcanine\n", "line 1 has a tab.*label and name"),
        ("counts.txt", "cat\t120\ndog\t300\n", "line 1 has a tab.*label and name"),
        ("hashes.txt", "#0 cat\n#1 dog\n", "line 1 .*number that counts the lines: write '0: NAME'"),
        ("class.txt", "class 1: cat\nclass 2: dog\n", "line 1 .*number that counts the lines"),
        ("find.txt", "/data/cat\n/data/dog\n", "line 1 .'/data/cat'. is a path"),
        ("ls-F.txt", "cat/\ndog/\n", "line 1 .'cat/'. is a path"),
        ("ls-l.txt", "drwxr-xr-x 2 u u 4096 Jan 1 cat\ndrwxr-xr-x 2 u u 4096 Jan 1 dog\n", "a listing of files"),
        ("blank.csv", 'name\ncat\n""\ndog\n', "is blank in row 3; the rows are the labels"),
        ("blank_row.csv", "name,kind\ncat,x\n,\ndog,y\n", "is blank in row 3; the rows are the labels"),
        ("comment.txt", "; pets\ncat\ndog\n", "line 1 looks like a comment .*class 0; write one name a line"),
        ("tex.txt", "cat\n% pets\ndog\n", "line 2 looks like a comment .*class 1"),
        ("sql.txt", "-- pets\ncat\ndog\n", "line 1 looks like a comment"),
        ("java.txt", "/* pets */\ncat\ndog\n", "line 1 looks like a comment"),
        ("labels.txt", "labels\ncat\ndog\n", "begins with 'labels', which may be a header"),
        ("colon.txt", "Fish:\ntench\ngoldfish\n", "begins with 'Fish:', which may be a header"),
        ("blank.txt", "cat\n\u200b\ndog\n", "entry 1 of the class names has no character that can be seen"),
        ("utf16.txt", "c\0a\0t\0", None),
    ],
)
def test_what_would_shift_or_spoil_names_is_refused_with_the_line(name, text, reason):
    if reason is None:
        assert names_of(text, name) == ("cat",)
        return
    with pytest.raises(ValueError, match=rf"(?s)^{re.escape(name)}.*{reason}"):
        names_of(text, name)


def open_labels(folder: Path, *labels: str, **options: object) -> LabelledImages:
    rows = ["image,label"]
    for number, label in enumerate(labels):
        write_picture(folder / f"{number}.png", number)
        rows.append(f'{number}.png,"{label.replace(chr(34), chr(34) * 2)}"')
    (folder / "t.csv").write_text("\n".join(rows))
    return open_dataset(folder / "t.csv", **options)


@pytest.mark.parametrize(
    "meant",
    [
        {"{cat,dog}": ["cat", "dog"], "{cat}": ["cat"], '{dog,"fire truck"}': ["dog", "fire truck"], "{}": []},
        {'{NULL,"cat"}': ["cat"], "{NA,dog}": ["NA", "dog"]},
        {"{1,2}": ["1", "2"], "{1}": ["1"], "{3.0,1}": ["1", "3"], "{NULL}": [], "[2]": ["2"]},
        {'["{cat}", "dog"]': ["dog", "{cat}"], "{cat}": ["cat"], '["{cat,dog}"]': ["{cat,dog}"]},
    ],
)
def test_arrays_of_labels_that_postgresql_wrote_are_lists_of_them(tmp_path, meant):
    data = open_labels(tmp_path, *meant)
    found = [[name for name, holds in zip(data.classnames, row, strict=True) if holds] for row in data.labels]
    assert found == list(meant.values())


def test_elements_of_a_list_of_labels_are_not_taken_for_arrays(tmp_path):
    rows = [{"image": f"{n}.png", "label": label} for n, label in enumerate((["{a,b}", "c"], ["{a}"], ["c"]))]
    for n in range(3):
        write_picture(tmp_path / f"{n}.png", n)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(open_dataset(tmp_path / "t.jsonl").classnames) == ["c", "{a,b}", "{a}"]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (("[0, 1, 0]", "[1, 0, 0]"), "a label twice in one list, '0, 1, 0'; a list holds an image's own labels"),
        (("[0., 1., 0.]", "[1., 0., 0.]"), "a label twice in one list"),
        (("[0, 1]", "[1, 0]"), "gives every image all of the labels '0, 1'"),
        (("0 1 0", "1 0 0"), r"the label '0 1 0', which is several in one cell; write them as a list, \["),
        (("cat|dog", "dog", "cat"), r"the label 'cat|dog', which is several.*as a list, \[.cat., .dog.\]"),
        (("cat, dog", "dog", "cat"), "the label 'cat, dog', which is several"),
        (("Hot_dog, Fox", "hot dog", "fox"), "the label 'Hot_dog, Fox', which is several"),
        (("猫、犬", "犬", "猫"), "the label '猫、犬', which is several"),
        (("16 0", "3"), "the label '16 0', which is several"),
        (("{'label': 'cat'}", "dog"), "row 1 .* has the code .* for a label"),
        (
            ("n01440764 85 1 499 272 n01440764 5 1 9 27", "n01440764 1 2 3 4"),
            "'n01440764 85 .* with the sides of a box",
        ),
        (("0 0.5 0.5 0.1 0.2", "1 0.5 0.5 0.1 0.2"), "a class with the sides of a box; write the class alone"),
        (
            ("{0.5,1}", "{1}"),
            r"row 1 .* has the code '\{0.5,1\}' for a label; .* list of those, as \[\"cat\", \"dog\"\]",
        ),
        (("{a=1,b}", "{b}"), r"row 1 .* has the code '\{a=1,b\}' for a label"),
        (("{a:1,b}", "{b}"), r"row 1 .* has the code '\{a:1,b\}' for a label"),
        (("tensor(3)", "tensor(1)"), r"row 1 .* has the code 'tensor\(3\)' for a label"),
        (("cat+dog", "dog", "cat"), "the label 'cat\\+dog', which is several"),
        (("cat/dog", "dog", "cat"), "the label 'cat/dog', which is several"),
        (("[cat, dog]", "dog", "cat"), r"the label '\[cat, dog\]', which is several"),
        (("cat|dog", "dog|bird", "bird|fish", "cat|fish"), "the label 'bird|fish', and 'bird' is in others, too"),
        (("cat;dog", "dog"), "the label 'cat;dog', and 'dog' is in others, too"),
        (("cat, dog", "dog, bird", "bird, fish", "cat, fish"), "the label 'bird, fish', and 'bird' is in others, too"),
        (("bird|cat|dog", "cat|fish"), r"several in one cell; write them as a list, \[.bird., .cat., .dog.\]"),
        (("a+b", "b+c", "c+a", "d"), "the label 'a\\+b'.* If it is one class, call it otherwise"),
        ((r"\N", "cat"), r"row 1 .* has no label .'\\\\N', as programs"),
        (("#VALUE!", "cat"), "row 1 .* has no label"),
        (("Cat", "cat"), "labels 'Cat' and 'cat', which would be two classes of one name.*--classnames"),
        (("tabby_cat", "tabby cat"), "labels 'tabby cat' and 'tabby_cat', which would be two classes"),
        (("001", "1"), "labels '001' and '1', which would be two classes"),
        (("0", "1", "-1"), "the label '-1'. -1 marks images without a label"),
        (("a.jpg", "b.jpg"), "row 1 has the picture 'a.jpg' for a label"),
    ],
)
def test_labels_that_would_be_other_classes_without_a_word_are_refused(tmp_path, labels, reason):
    with pytest.raises(ValueError, match=reason):
        open_labels(tmp_path, *labels)


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (("cat\u200b", "cat", "tabby\u00a0cat"), ("cat", "tabby cat"), (0, 0, 1)),
        (("0,0", "1,0", "2,00"), ("0", "1", "2"), (0, 1, 2)),  # Excel's decimal comma
        (("1.00", "0.0"), ("0", "1"), (1, 0)),
        (("Cats, wild", "dog"), ("Cats, wild", "dog"), (0, 1)),
        (("(" + "1000, " * 40 + "…)", "dog"), ("(" + "1000, " * 40 + "…)", "dog"), (0, 1)),
    ],
)
def test_labels_that_differ_in_nothing_that_can_be_seen_are_one(tmp_path, labels, names, indices):
    data = open_labels(tmp_path, *labels)
    assert (data.classnames, tuple(data.labels)) == (names, indices)


@pytest.mark.parametrize(
    "names",
    [
        ("salt, pepper", "pepper, chili", "sugar"),
        ("church/indoor", "church/outdoor", "garage/indoor", "garage/outdoor", "kitchen"),  # Places365's
        ("Tomato, healthy", "Tomato, blight", "Potato, healthy", "Potato, blight"),  # PlantVillage's
        ("polecat, fitch", "skunk, polecat, wood pussy", "crane, bird", "crane, machine"),
        ("1/2", "2/3", "3/4", "1/3"),
        ("A+", "B+", "A", "AB+"),
        ("Yes|No", "Maybe"),
    ],
)
def test_classes_whose_names_have_parts_in_common_are_no_lists(tmp_path, names):
    assert open_labels(tmp_path, *names).classnames == tuple(sorted(names))


@pytest.mark.parametrize(
    "names",
    [
        ("Toys|Puzzles", "Toys|Games", "Home|Chairs", "Home"),
        ("Animalia;Chordata;Aves", "Animalia;Chordata;Mammalia", "Animalia;Arthropoda;Insecta"),
        ("Corn|Healthy", "Corn|Rust", "Apple|Healthy"),
        ("male;young", "male;old", "female;young", "female;old"),
        ("en/de", "de/en", "fr/en", "en/fr"),
        ("black/white", "white/black", "brown/white", "red/white"),
        ("Georgia, USA", "Tbilisi, Georgia", "Atlanta, USA"),
        ("cat, dog", "dog, bird", "bird, fish"),
        ("cat/dog", "dog/bird", "bird/fish", "elk/fox"),
    ],
)
def test_classes_that_may_be_several_labels_in_a_cell_are_read_with_a_warning_unless_they_are_listed(tmp_path, names):
    with pytest.warns(UserWarning, match=r"has the label .* If it is several in one cell, write .* --classnames"):
        assert open_labels(tmp_path, *names).classnames == tuple(sorted(names))
    (tmp_path / "names.json").write_text(json.dumps(names))
    with warnings.catch_warnings(action="error"):
        data = open_labels(tmp_path, *names, classnames=tmp_path / "names.json")
    assert (data.classnames, tuple(data.labels)) == (names, tuple(range(len(names))))


@pytest.mark.parametrize("names", [("cat|dog", "dog|bird"), ("cat, dog", "cat", "dog"), ("a+b", "b+c", "c+a")])
def test_names_that_are_listed_are_classes_whatever_they_share(tmp_path, names):
    with pytest.raises(ValueError, match=r"in one cell; .*, or list the names of all classes with --classnames"):
        open_labels(tmp_path, *names)
    for file, text in (("names.txt", "\n".join(names)), ("names.json", json.dumps(names))):
        (tmp_path / file).write_text(text)
        assert open_labels(tmp_path, *names, classnames=tmp_path / file).classnames == names


def test_the_synonyms_of_imagenets_classes_are_no_lists():
    info = pytest.importorskip("timm.data").ImageNetInfo()
    names = [info.label_name_to_description(synset, detailed=False) for synset in info.label_names()]
    assert (len(names), sum(", " in name for name in names) > 400) == (1000, True)
    with warnings.catch_warnings(action="error"):
        refuse_joined(names, "ImageNet")


def test_sets_and_tuples_of_labels_that_were_written_as_text_are_lists(tmp_path):
    data = open_labels(tmp_path, "{'cat', 'dog'}", "('dog',)")
    assert data.classnames == ("cat", "dog")
    assert np.array_equal(data.labels, [[True, True], [False, True]])


def test_spellings_of_one_class_are_one_where_the_classes_are_named(tmp_path):
    (tmp_path / "names.txt").write_text("tabby cat\ndog\n")
    data = open_labels(tmp_path, "Tabby_cat", "tabby cat", "DOG", classnames=tmp_path / "names.txt")
    assert tuple(data.labels) == (0, 0, 1)


def test_an_image_whose_rows_have_different_labels_is_told(tmp_path):
    write_picture(tmp_path / "a.png", 1)
    (tmp_path / "t.csv").write_text("image,class,xmin,xmax\na.png,cat,0,5\na.png,dog,3,9\na.png,cat,4,8\n")
    with pytest.warns(UserWarning, match=r"a\.png have other labels in other rows.*one row with a list"):
        open_dataset(tmp_path / "t.csv")


def test_classes_in_folders_that_differ_in_case_alone_are_refused(tmp_path):
    write_picture(tmp_path / "Cat" / "a.png", 1)
    write_picture(tmp_path / "cat" / "a.png", 2)
    with pytest.raises(ValueError, match="labels 'Cat' and 'cat'"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(("text", "place"), [("a {} of {domain}.", "{domain}"), ("a {{}}", "{{}}"), ("{c} {0}", "{0}")])
def test_a_place_in_a_template_that_nothing_fills_is_refused(tmp_path, text, place):
    (tmp_path / "templates.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"nothing fills {re.escape(place)} in template"):
        open_labels(tmp_path, "cat", "dog", templates=tmp_path / "templates.txt")


def test_prompts_of_a_class_with_a_place_for_its_name_are_refused(tmp_path):
    (tmp_path / "templates.json").write_text(json.dumps({"cat": ["a photo of a {}"], "dog": ["a dog"]}))
    with pytest.raises(ValueError, match=r"nothing fills 'a photo of a \{\}'; the prompts of a class, here 'cat'"):
        open_labels(tmp_path, "cat", "dog", templates=tmp_path / "templates.json")


def test_names_in_yaml_are_texts_as_they_are_written(tmp_path):
    assert names_of("names: [0017, no, 12:30, 1.10, null]\n", "names.yaml") == ("0017", "no", "12:30", "1.10", "null")


@pytest.mark.parametrize("labels", [("c0", "c1", "c2", "c10"), ("s9", "s8", "s11", "s10")])
def test_keys_that_sort_as_texts_and_as_numbers_in_other_orders_get_no_names_by_their_rank(tmp_path, labels):
    (tmp_path / "names.txt").write_text("ant\nbee\ncod\nelk\n")
    with pytest.raises(ValueError, match=r"sort as texts in another order than as numbers.*keys of one width"):
        open_labels(tmp_path, *labels, classnames=tmp_path / "names.txt")
    wide = [f"{label[0]}{int(label[1:]):02d}" for label in labels]
    data = open_labels(tmp_path, *wide, classnames=tmp_path / "names.txt")
    assert [data.classnames[label] for label in data.labels] == [
        ("ant", "bee", "cod", "elk")[sorted(wide).index(label)] for label in wide
    ]


@pytest.mark.parametrize(
    "folders",
    [
        ("train/cat.0.png", "test/1.png"),  # the pictures lie right in the splits
        ("Train/0/0.png", "Test/1.png", "Meta/2.png"),
        ("train2017/0.png", "val2017/1.png"),
    ],
)
def test_folders_of_splits_are_no_classes(tmp_path, folders):
    for number, name in enumerate(folders):
        write_picture(tmp_path / name, number)
    with pytest.raises(ValueError, match=r"holds the splits .*, not the classes; choose one with --split"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("folders", "scored"),
    [
        ("train val test", "test"),
        ("train val", "val"),
        ("Training Testing", "Testing"),
        ("training_set test_set Meta", "test_set"),
        ("train validation dev", "validation"),
        ("train test2014 test2015", "has no split 'test'; it has test2014, test2015, train"),
    ],
)
def test_a_folder_above_the_splits_is_scored_on_that_of_testing_or_validation(tmp_path, folders, scored):
    names = folders.split()
    for number, (part, name) in enumerate(product(names, ("cat", "dog"))):
        write_picture(tmp_path / part / name / f"{number}.png", number)
    if scored not in names:
        with pytest.raises(ValueError, match=scored):
            open_dataset(tmp_path)
        return
    with pytest.warns(UserWarning, match=f"{len(names) - 1} left out: beside {scored}/, the split that is read"):
        data = open_dataset(tmp_path)
    assert data.classnames == ("cat", "dog")
    assert [path.parent for path in data.images] == [tmp_path / scored / name for name in ("cat", "dog")]
    (asked,) = [name for name in names if name.lower().startswith("train")]
    assert {path.parent.parent.name for path in open_dataset(tmp_path, split="train").images} == {asked}


@pytest.mark.parametrize("part", ["test", "validation", "test_images"])
def test_the_only_part_is_scored_unless_it_is_for_training(tmp_path, part):
    for number, name in enumerate(("cat", "dog")):
        write_picture(tmp_path / "whole" / part / name / "0.png", number)
        write_picture(tmp_path / "other/train" / name / "0.png", number)
    data = open_dataset(tmp_path / "whole")
    assert (data.classnames, data.labels) == (("cat", "dog"), (0, 1))
    assert data.classnames_from == f"the names of the folders in {part}/"
    with pytest.raises(ValueError, match="holds the splits train, not the classes; choose one with --split"):
        open_dataset(tmp_path / "other")
    assert open_dataset(tmp_path / "other", split="train").classnames == ("cat", "dog")


@pytest.mark.parametrize("parts", [("test",), ("train",), ("train", "test")])
def test_a_table_of_a_parts_pictures_has_its_labels(tmp_path, parts):
    """Hugging Face's `imagefolder`; a lone `test` was a class of that name."""
    for part in parts:
        for number in range(3):
            write_picture(tmp_path / part / f"{number}.png", number)
        (tmp_path / part / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n2.png,cat\n")
    table = tmp_path / parts[-1] / "metadata.csv"
    if parts == ("train",):
        with pytest.raises(ValueError, match=f"no folder for each class: name {re.escape(str(table))} as DATA"):
            open_dataset(tmp_path)
    for source, split in ((table, None), (table.parent, None), (tmp_path, parts[-1])):
        data = open_dataset(source, split=split)
        assert (data.labels, data.key(0)) == ((0, 1, 0), f"{table.parent}/0.png")
    if "test" in parts:
        data = open_dataset(tmp_path)
        assert (data.labels, data.key(0), data.name) == ((0, 1, 0), f"{tmp_path}/test/0.png", tmp_path.name)
        assert data.classnames_from == "column 'label' of test/metadata.csv"
        assert [each.source for each in data.left_out] == ["train/"] * (len(parts) - 1)
        (tmp_path / "classnames.txt").write_text("dog\ncat\n")
        assert open_dataset(tmp_path).classnames == ("dog", "cat")


@pytest.mark.parametrize("has_names", [False, True])
def test_of_tars_in_folders_of_splits_one_split_is_scored(tmp_path, has_names):
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "png")
    samples = {key: {"png": image.getvalue(), "cls": label} for key, label in (("0", b"1"), ("1", b"0"))}
    for part in ("train", "validation"):
        tar(tmp_path / part / "a.tar", samples)
    names = tmp_path / "classnames.txt"
    if has_names:
        names.write_text("cat\ndog\n")
    data = open_dataset(tmp_path)
    assert (data.labels, data.key(0), data.name) == ((1, 0), "a.tar:0", tmp_path.name)
    assert data.classnames == (("cat", "dog") if has_names else ("0", "1"))
    left_out = {"validation": "train", "train": "validation"}
    for split, other in left_out.items():
        found = open_dataset(tmp_path, split=split).left_out
        assert [(each.source, each.reason) for each in found] == [
            (f"{other}/", f"beside {split}/, the split that is read")
        ]
    for pattern in (f"{tmp_path}/{{train,validation}}/a.tar", f"{tmp_path}/*/*.tar"):
        data = open_dataset(pattern)
        assert (data.labels, data.classnames, data.name) == ((1, 0), open_dataset(tmp_path).classnames, tmp_path.name)
        assert [each.source for each in data.left_out] == ["train/a.tar"]
        assert [each.source for each in open_dataset(pattern, split="train").left_out] == ["validation/a.tar"]
    assert open_dataset(f"{tmp_path}/train/*.tar").left_out == ()  # what is named is of one split
    for part in left_out:
        index_shards(str(tmp_path / part))
    assert [each.source for each in open_dataset(tmp_path).left_out] == ["train/"]


def test_a_pattern_of_parquet_files_of_training_and_another_split_is_refused(tmp_path):
    for part in ("train", "test", "val"):
        pq.write_table(pa.table({"image": ["http://x/1.png"] * 2, "label": ["a", "b"]}), tmp_path / f"{part}-0.parquet")
    with pytest.raises(
        ValueError, match=r"\*\.parquet names files of the splits test, train, val, and none for training"
    ):
        open_dataset(tmp_path / "*.parquet")
    assert len(open_dataset(tmp_path / "{test,val}-0.parquet")) == 4


@pytest.mark.parametrize(
    ("folders", "says", "asked"),
    [
        ("train/steam test/tubes test/dna bus/city car/suv", "holds the splits test, train, not the classes", {}),
        ("train/a test/a bus car", "holds the splits test, train, not the classes", {}),
        (
            "train/a train/b val/a val/b test/unknown",
            "test has the folders unknown, and .*/val has a, b; .*choose with --split val or --split test",
            {"val": ("a", "b"), "test": ("unknown",)},
        ),
        ("train/a train/b test/c test/d", "choose with --split train or --split test", {"test": ("c", "d")}),
    ],
)
def test_folders_that_are_no_parts_of_one_set_of_classes_are_not_chosen_among(tmp_path, folders, says, asked):
    for number, each in enumerate(folders.split()):
        write_picture(tmp_path / each / f"{number}.png", number)
    with pytest.raises(ValueError, match=says):
        open_dataset(tmp_path)
    for split, names in asked.items():
        assert open_dataset(tmp_path, split=split).classnames == names


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    for number, name in enumerate(("train", "car", "plane")):
        write_picture(tmp_path / name / "0.png", number)
    assert open_dataset(tmp_path).classnames == ("car", "plane", "train")


@pytest.mark.parametrize("ending", ["", "2017", "_images"])
def test_folders_of_pairs_are_retrieved_from_by_their_split(tmp_path, ending):
    parts = [f"{part}{ending}" for part in ("train", "test")]
    for number, part in enumerate(parts):
        write_picture(tmp_path / part / f"{part}.png", number)
        (tmp_path / part / f"{part}.txt").write_text(f"of {part}")
    assert open_dataset(tmp_path, task="retrieval").captions == ((f"of test{ending}",),)
    for split in ("train", f"train{ending}"):
        assert open_dataset(tmp_path, task="retrieval", split=split).captions == ((f"of train{ending}",),)
    with pytest.raises(ValueError, match=f"has no split 'val'; it has test{ending}, train{ending}"):
        open_dataset(tmp_path, task="retrieval", split="val")


@pytest.mark.parametrize("is_column", [True, False])
def test_a_folder_with_one_table_is_retrieved_from_by_the_split_that_it_tells(tmp_path, is_column):
    lines = ["file_name,text" + ",split" * is_column]
    for number, part in enumerate(("train", "val")):
        name = f"{number}.png" if is_column else f"{part}/0.png"
        write_picture(tmp_path / name, number)
        lines.append(f"{name},of {part}" + f",{part}" * is_column)
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    for split, part in ((None, "val"), ("val", "val"), ("train", "train")):
        assert open_dataset(tmp_path, task="retrieval", split=split).captions == ((f"of {part}",),)
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        open_dataset(tmp_path, task="retrieval", split="test")


@pytest.mark.parametrize("texts", ["images", "captions"])
def test_pairs_in_a_folder_above_the_splits_are_retrieved_from_by_their_split(tmp_path, texts):
    for number, part in enumerate(("train", "val")):
        for name in "ab":
            write_picture(tmp_path / "images" / part / f"{name}.png", number)
            text = tmp_path / texts / part / f"{name}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(f"{name} of {part}")
    (tmp_path / texts / "val/alone.txt").write_text("of no picture")
    data = open_dataset(tmp_path, task="retrieval")
    assert data.captions == (("a of val",), ("b of val",))
    assert list(data.keys) == ["images/val/a.png", "images/val/b.png"]
    with Image.open(tmp_path / "images/val/a.png") as picture:
        assert data.open(0).tobytes() == picture.convert("RGB").tobytes()
    assert {each.source for each in data.left_out} == {f"{texts}/val/alone.txt", "images/train/", f"{texts}/train/"}
    assert open_dataset(tmp_path, task="retrieval", split="validation").fingerprint() == data.fingerprint()
    train = open_dataset(tmp_path, task="retrieval", split="train")
    assert train.captions == (("a of train",), ("b of train",))
    assert train.fingerprint() != data.fingerprint()
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        open_dataset(tmp_path, task="retrieval", split="test")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("split=train/0.parquet", "split=test/0.parquet"),  # as Spark and pandas partition
        ("training-0.parquet", "testing-0.parquet"),
        ("coco_train.parquet", "coco_test.parquet"),
        ("training/0.parquet", "testing/0.parquet"),
    ],
)
def test_parts_of_parquet_are_known_by_any_usual_name_and_those_of_trash_are_not_read(tmp_path, train, test):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name, label in ((train, "cat"), (test, "dog"), (".Trash-1000/0.parquet", "deleted")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cells = [{"bytes": png(len(label)), "path": None}]
        parquet.write_table(pyarrow.table({"image": cells, "label": [label], "caption": [label]}), tmp_path / name)
    with pytest.warns(UserWarning, match="left out"):
        data = open_dataset(tmp_path)
    assert data.classnames == ("dog",)
    assert {each.source: each.reason for each in data.left_out} == {
        train: "a file of another split", ".Trash-1000/": "in a hidden folder",
    }  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # of a folder for each part, one is read alone
        assert open_dataset(tmp_path, split="train", task="retrieval").captions == (("cat",),)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(3)])
def test_labels_of_bytes_are_refused_by_their_kind(tmp_path, kind):
    images = [str(write_picture(tmp_path / f"{n}.png", n)) for n in range(2)]
    labels = pa.array([b"cat", b"dog"], kind)
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"column 'label' has bytes for labels \(.*binary.*write the column as texts"):
        open_dataset(tmp_path / "t.parquet")


CLASSES = {"n02119789": "kit fox", "n02100735": "English setter", "n02110185": "Siberian husky"}  # ImageNet's own order
LISTS = {
    "LOC_synset_mapping.txt": [f"{wnid} {name}, another name" for wnid, name in CLASSES.items()],
    "map_clsloc.txt": [f"{wnid} {n} {name.replace(' ', '_')}" for n, (wnid, name) in enumerate(CLASSES.items(), 1)],
    "from_0.txt": [f"{wnid}\t{n}\t{name}" for n, (wnid, name) in enumerate(CLASSES.items())],
}


@pytest.mark.parametrize("name", LISTS)
def test_wordnets_ids_in_any_order_name_the_folders_that_are_called_by_them(tmp_path, name):
    lines = LISTS[name]
    (tmp_path / name).write_text("\n".join(lines))
    for wnid in CLASSES:
        write_picture(tmp_path / "set" / wnid / "0.png", 1)
    data = open_dataset(tmp_path / "set", classnames=tmp_path / name)
    found = {Path(data.key(n)).parent.name: data.classnames[data.labels[n]] for n in range(3)}
    assert found == CLASSES
    for wnid in CLASSES:
        (tmp_path / "set" / wnid).rename(tmp_path / "set" / f"class_{wnid}")
    with pytest.raises(ValueError, match=r"WordNet's ids .* can't be known"):
        open_dataset(tmp_path / "set", classnames=tmp_path / name)
    with pytest.raises(ValueError, match=r"WordNet's ids .* can't be known"):
        names_of("\n".join(lines), name)
