"""Whatever people have becomes pairs: every source gives the same pairs, shows what it found, and loses none."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tracemalloc
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest
from helpers import (
    Served,
    everything_below,
    pack_folder,
    picture,
    rejected_rows,
    rejections,
    table,
    write_pairs,
    write_picture,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from miniclip.commands import main as cli
from miniclip.data.pack import pack
from miniclip.data.reading.pair import Pairs, fingerprint
from miniclip.data.reading.rows import caption_columns_of
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs

SENTENCES = [["ein Käfer, rot"], ["zwei Katzen", "two cats"], ["三匹の犬"], ["vier"], ["fünf", "five", "cinq"]]


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path) -> Path:
    """Five pictures: pictures/0.jpg …"""
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(jpeg(number))
    return tmp_path / "pictures"


def check(pairs: Pairs, out: Path, bad: dict[str, str] | None = None) -> Shards:
    """Packs them: all that are not in `bad` are there, those that are have their reasons, and the numbers add up."""
    bad = bad or {}
    packed = pack(pairs, out, source="here")
    assert packed.kept + packed.rejected == len(pairs)
    rows = rejected_rows(out)
    assert {row[1] for row in rows} == set(bad)
    for key, source, reason in rows:
        assert pairs[int(key)].source == source
        assert bad[source] in reason
    shards = Shards(out)
    keys = [record.key for record in shards]
    assert sorted([*keys, *(row[0] for row in rows)]) == [f"{n:09d}" for n in range(len(pairs))]
    return shards


def check_all_five(pairs: Pairs, out: Path, captions=SENTENCES) -> Shards:
    shards = check(pairs, out)
    assert [record.image for record in shards] == [jpeg(n) for n in range(5)]
    assert [list(record.captions) for record in shards] == captions
    return shards


# ---------------------------------------------------------------------------------------------------------------------
# One test for each source: the same five pairs


def test_a_folder_gives_its_pairs_and_says_how_many_images_it_found(images, tmp_path):
    for number, captions in enumerate(SENTENCES):
        (images / f"{number}.txt").write_text("\n".join(captions), encoding="utf-8")
    pairs = read_pairs(images)
    assert pairs.found == "5 images, captions from the .txt beside each"
    check_all_five(pairs, tmp_path / "out")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_csv_or_tsv_gives_its_pairs(images, tmp_path, suffix):
    with open(tmp_path / f"t{suffix}", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t")
        writer.writerow(["image_path", "caption"])
        writer.writerows([f"pictures/{n}.jpg", text] for n, captions in enumerate(SENTENCES) for text in captions)
    pairs = read_pairs(tmp_path / f"t{suffix}")
    assert pairs.found == (
        "5 images from column 'image_path', captions from 'caption' (8 rows: those of one image are put together)"
    )
    check_all_five(pairs, tmp_path / "out")


def test_a_cell_longer_than_csvs_bound_is_read_and_the_bound_stays_that_of_the_process(tmp_path):
    write_picture(tmp_path / "a.png")
    bound, caption = csv.field_size_limit(), "a" * 2 * csv.field_size_limit()
    pairs = read_pairs(table(tmp_path / "pairs.csv", "image,caption", f"a.png,{caption}"))
    assert [list(pair.captions) for pair in pairs] == [[caption]]
    assert csv.field_size_limit() == bound


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
def test_json_lines_give_their_pairs_with_captions_as_lists(images, tmp_path, suffix):
    lines = [
        json.dumps({"file_name": f"{n}.jpg", "captions": captions, "id": n}, ensure_ascii=bool(n % 2))
        for n, captions in enumerate(SENTENCES)
    ]
    source = table(tmp_path / f"t{suffix}", *lines[:2], "", *lines[2:])
    shards = check_all_five(read_pairs(source, images=images), tmp_path / "out")
    assert shards.info(3) == {"source": "3.jpg", "id": 3, "width": 24, "height": 20}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_caption_of_json_lines_may_hold_any_character(images, tmp_path, separator):
    """Only a line feed ends a line of JSON; str.splitlines knows more ends, and text from the web has them."""
    line = json.dumps({"file": "0.jpg", "text": f"one{separator}two"}, ensure_ascii=False)
    (pair,) = read_pairs(table(images / "t.jsonl", line))
    assert " ".join(" ".join(pair.captions).split()) == "one two"


@pytest.mark.parametrize("group", [1, 2, 5])
def test_parquet_with_paths_gives_its_pairs_whatever_its_row_groups(images, tmp_path, group):
    columns = {"filepath": [f"pictures/{n}.jpg" for n in range(5)], "captions": SENTENCES, "width": [24] * 5}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=group)
    check_all_five(read_pairs(tmp_path / "t.parquet"), tmp_path / "out")


@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("kind", ["bytes", "struct", "struct without paths"])
def test_parquet_with_the_images_in_it_gives_its_pairs(tmp_path, kind, group):
    cells = [jpeg(n) for n in range(5)]
    if kind != "bytes":
        cells = [{"bytes": cell, "path": f"{n}.jpg" if kind == "struct" else None} for n, cell in enumerate(cells)]
    parquet.write_table(pa.table({"image": cells, "text": SENTENCES}), tmp_path / "t.parquet", row_group_size=group)
    pairs = read_pairs(tmp_path / "t.parquet")
    assert pairs.names == [f"row {n}" for n in range(5)]
    check_all_five(pairs, tmp_path / "out")


def test_a_parquet_struct_without_bytes_names_a_file(images, tmp_path):
    cells = [{"bytes": None, "path": f"{n}.jpg"} for n in range(5)]
    parquet.write_table(pa.table({"image": cells, "text": SENTENCES}), tmp_path / "t.parquet")
    check_all_five(read_pairs(tmp_path / "t.parquet", images=images), tmp_path / "out")


WITHOUT_PANDAS = """
import sys
class NoPandas:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "pandas":
            raise ImportError(name)
sys.meta_path.insert(0, NoPandas())
from pathlib import Path
from miniclip.data.reading.parquet import ParquetRows
rows = ParquetRows([Path(sys.argv[1])])
print([rows[0], *({name: value} for name in ("taken", "dur", "at") for value in rows.column(name))])
print([list(rows.whole(name)) for name in ("taken", "dur", "at")])
"""


@pytest.mark.parametrize("has_pandas", [True, False])
def test_times_in_nanoseconds_are_exact_with_pandas_and_without(images, tmp_path, has_pandas):
    kinds = {"taken": pa.timestamp("ns"), "dur": pa.duration("ns"), "at": pa.time64("ns")}
    columns = {name: pa.array([1_123_456_789], kind) for name, kind in kinds.items()}
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"image": [str(images / "0.jpg")], "text": ["words"], **columns}), path)
    if has_pandas:
        taken, dur, at = "1970-01-01 00:00:01.123456789", "0 days 00:00:01.123456789", "00:00:01.123456789"
        (pair,) = read_pairs(path)
        assert {name: str(value) for name, value in pair.extra.items()} == {"taken": taken, "dur": dur, "at": at}
    else:
        done = subprocess.run([sys.executable, "-c", WITHOUT_PANDAS, str(path)], capture_output=True, text=True)
        for name, text in (
            ("taken", "1970-01-01 00:00:01.123456789"),
            ("dur", "1123456789 ns"),
            ("at", "00:00:01.1234"),
        ):
            assert done.stdout.count(f"'{name}': '{text}") == 2, done.stderr
        assert done.stdout.endswith("[['1970-01-01 00:00:01.123456789'], ['1123456789 ns'], ['00:00:01.123456789']]\n")


def test_embedded_images_that_are_bad_or_missing_are_rejected_alone(tmp_path):
    cells = [jpeg(0), None, b"", b"no picture", jpeg(1)[:300], jpeg(2)]
    captions = pa.array([f"caption {n}" for n in range(5)] + [None])
    parquet.write_table(pa.table({"image": pa.array(cells, pa.binary()), "text": captions}), tmp_path / "t.parquet")
    bad = {"row 1": "no image", "row 2": "image", "row 3": "not an image", "row 4": "unreadable image"}
    bad["row 5"] = "every caption is empty"
    check(read_pairs(tmp_path / "t.parquet"), tmp_path / "out", bad)


def test_images_in_a_parquet_file_are_not_all_held_in_memory(tmp_path):
    """Such files are larger than memory; only their names and some row groups may be there at once."""
    cells = [jpeg(0) + b"\0" * 20_000 + n.to_bytes(2) for n in range(400)]
    parquet.write_table(
        pa.table({"image": [{"bytes": c, "path": None} for c in cells], "text": ["words"] * 400}),
        tmp_path / "t.parquet",
        row_group_size=20,
        compression="none",
        use_dictionary=False,
    )
    before = pa.default_memory_pool().max_memory()
    tracemalloc.start()
    try:
        pairs = read_pairs(tmp_path / "t.parquet")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(pairs) == 400
    assert pairs[399].image == cells[399]
    assert peak < 4_000_000, f"{peak / 1e6:.1f} MB of Python's memory for a file of 8.6 MB"
    assert max(pa.default_memory_pool().max_memory() - before, 0) < 6_000_000


def coco(path: Path, names: list[str], captions: list[list[str]]) -> Path:
    annotations = [{"image_id": 100 + n, "id": 7, "caption": text} for n, each in enumerate(captions) for text in each]
    images = [{"id": 100 + n, "file_name": name, "height": 20} for n, name in enumerate(names)]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations[::-1][::-1]}))
    return path


def test_cocos_captions_give_their_pairs_from_the_folder_of_images(images, tmp_path):
    source = coco(tmp_path / "captions_train2017.json", [f"{n}.jpg" for n in range(5)], SENTENCES)
    pairs = read_pairs(source, images=images)
    assert pairs.found == f"5 images from column 'file_name' in {images}, captions from 'captions'"
    shards = check_all_five(pairs, tmp_path / "out")
    assert shards.info(4)["id"] == 104


def test_an_image_of_cocos_without_captions_is_rejected(images, tmp_path):
    source = coco(images / "captions.json", [f"{n}.jpg" for n in range(3)], [["one"], [], ["three"]])
    check(read_pairs(source), tmp_path / "out", {"1.jpg": "every caption is empty"})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": []}', '{"images": 1, "annotations": []}', "[" * 100_000])
def test_a_json_that_is_not_cocos_says_what_that_would_be(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t\.json (holds|is not JSON).*COCO's \(images with id and file_name"):
        read_pairs(tmp_path / "t.json")


def data_set(kind: str):
    import datasets

    cells = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(5)]
    image = datasets.Image()
    features = {"image": image, "captions": datasets.Sequence(datasets.Value("string")), "id": datasets.Value("int64")}
    columns = {"image": cells, "captions": SENTENCES, "id": list(range(5))}
    if kind == "other names":
        columns = {"id": columns["id"], "photograph": cells, "captions": SENTENCES}
        features = {"id": features["id"], "photograph": image, "captions": features["captions"]}
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


@pytest.mark.parametrize("kind", ["plain", "other names"])
def test_a_saved_data_set_gives_its_pairs_with_the_bytes_as_they_are(tmp_path, kind):
    data_set(kind).save_to_disk(tmp_path / "set")
    pairs = read_pairs(tmp_path / "set")
    column = "image" if kind == "plain" else "photograph"
    assert pairs.found == f"5 images from column {column!r}, captions from 'captions'"
    shards = check_all_five(pairs, tmp_path / "out")
    assert shards.info(2) == {"source": "row 2", "id": 2, "width": 24, "height": 20}


def test_a_split_of_a_saved_data_set_is_chosen_by_name(tmp_path):
    import datasets

    both = data_set("plain")
    datasets.DatasetDict(train=both.select([0, 1, 2]), test=both.select([3, 4])).save_to_disk(tmp_path / "set")
    assert len(read_pairs(tmp_path / "set")) == 3
    assert [r.image for r in check(read_pairs(tmp_path / "set", split="test"), tmp_path / "out")] == [jpeg(3), jpeg(4)]
    with pytest.raises(ValueError, match=r"set has no split 'val'; valid are train, test"):
        read_pairs(tmp_path / "set", split="val")


def test_of_a_table_of_very_many_columns_an_error_names_some(tmp_path):
    (tmp_path / "wide.csv").write_text(",".join(["image", *map(str, range(2000))]) + "\n" + "a.jpg" + ",1" * 2000)
    with pytest.raises(ValueError, match=r"its columns are 'image', '0', .* '28' and 1971 more; one must be called"):
        read_pairs(tmp_path / "wide.csv")


def test_a_data_set_without_captions_names_its_columns(tmp_path):
    data_set("plain").remove_columns("captions").save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set has no column for the captions: its columns are 'image', 'id'"):
        read_pairs(tmp_path / "set")


def test_rows_of_a_data_set_without_an_image_are_rejected_alone(tmp_path):
    import datasets

    columns = {"image": [{"bytes": jpeg(0), "path": None}, None], "text": ["words", "words"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "set")
    check(read_pairs(tmp_path / "set"), tmp_path / "out", {"row 1": "no image in this row"})


def test_images_are_fetched_from_their_urls_and_those_that_are_not_there_are_rejected(images, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    (images / "broken.jpg").write_bytes(jpeg(1)[:300])
    with Served(images) as server:
        urls = [f"{server.url}/{name}" for name in ("0.jpg", "gone.jpg", "1.jpg", "broken.jpg", "4.jpg")]
        lines = [f"{url},caption {n}" for n, url in enumerate(urls)]
        pairs = read_pairs(table(tmp_path / "t.csv", "URL,TEXT", *lines))
        assert server.gets == []  # names and tables only, so far
        shards = check(pairs, tmp_path / "out", {urls[1]: "404", urls[3]: "unreadable image"})
    assert [record.image for record in shards] == [jpeg(0), jpeg(1), jpeg(4)]
    assert [record.captions for record in shards] == [("caption 0",), ("caption 2",), ("caption 4",)]


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "http://127.0.0.1:9/a.jpg::b", "file+pipe:x"])
def test_a_url_that_would_run_a_program_is_rejected_alone(images, tmp_path, url):
    source = table(images / "t.csv", "file,text", "0.jpg,words", f"{url},words")
    check(read_pairs(source), tmp_path / "out", {url: "refused" if "::" in url else "no program is run"})


# ---------------------------------------------------------------------------------------------------------------------
# Which columns


@pytest.mark.parametrize("form", ["caption_{}", "caption{}", "sentence{}", "Caption {}", "title_{}", "comment_{}"])
def test_numbered_columns_are_the_captions_in_their_order(images, tmp_path, form):
    names = [form.format(n) for n in range(5)]
    source = table(images / "t.csv", ",".join(["image", *names]), "0.jpg," + ",".join(f"text {n}" for n in range(5)))
    pairs = read_pairs(source)
    assert pairs.found.endswith(f"captions from {', '.join(map(repr, names))}")
    assert check(pairs, tmp_path / "out")[0].captions == tuple(f"text {n}" for n in range(5))


@pytest.mark.parametrize(
    ("columns", "captions"),
    [
        ("caption,comment_1,comment_2", ["caption"]),
        ("title 2,caption", ["caption"]),
        ("Text,description_1,comments_1", ["Text"]),
        ("caption,caption_2,comment_1", ["caption", "caption_2"]),
        ("comment_1,caption_0,caption_1", ["caption_0", "caption_1"]),
        ("title,caption_1,caption_2", ["caption_1", "caption_2"]),
        ("captions_1,captions_2,title_1", ["captions_1", "captions_2"]),
        ("titles_1,titles_2,comment", ["titles_1", "titles_2"]),
        ("caption,captions", ["caption"]),
        ("title,text_1,text_2", ["text_1", "text_2"]),
        ("title,sentences_1,sentences_2", ["sentences_1", "sentences_2"]),
        ("caption,text_1,text_2", ["text_1", "text_2"]),
        ("text_1,caption_1,title", ["caption_1"]),
        ("title_1,title_2,text", ["text"]),
        ("title_1,title_2,texts", ["texts"]),
        ("description_1,description_2,captions", ["captions"]),
        ("title_1,title_2,description", ["title_1", "title_2"]),
        ("title,text,comment_1", ["title"]),
        ("title,title_1,text", ["text"]),
        ("Caption,caption,title_1", ["Caption"]),
    ],
)
def test_numbered_columns_come_in_the_order_of_their_names_as_others_do(columns, captions):
    assert caption_columns_of("t.csv", ["image", *columns.split(",")]) == captions


def test_blank_cells_of_numbered_columns_are_no_captions(images, tmp_path):
    source = table(images / "t.csv", "image,caption_1,caption_2", "0.jpg,,two", "1.jpg,one,", "2.jpg,,")
    shards = check(read_pairs(source), tmp_path / "out", {"2.jpg": "every caption is empty"})
    assert [record.captions for record in shards] == [("two",), ("one",)]


def test_columns_are_taken_as_they_are_named_and_the_others_go_into_the_json(images, tmp_path):
    source = table(images / "t.csv", "image,caption,bild,titel,satz", "x.jpg,no,0.jpg,eins,zwei")
    pairs = read_pairs(source, image_column="bild", caption_columns=["satz", "titel"])
    assert pairs.found == "1 image from column 'bild', captions from 'satz', 'titel'"
    shards = check(pairs, tmp_path / "out")
    assert shards[0].captions == ("zwei", "eins")
    assert shards.info(0) == {"image": "x.jpg", "caption": "no", "source": "0.jpg", "width": 24, "height": 20}


@pytest.mark.parametrize("options", [{"image_column": "imgae"}, {"caption_columns": ["caption", "titel"]}])
def test_a_misspelt_column_is_named_with_those_there_are(images, options):
    source = table(images / "t.csv", "image,caption", "0.jpg,words")
    wrong = options.get("image_column") or options["caption_columns"][1]
    with pytest.raises(ValueError, match=rf"t\.csv has no column {wrong!r}; its columns are 'image', 'caption'"):
        read_pairs(source, **options)


def test_two_columns_of_one_name_are_refused(images):
    with pytest.raises(ValueError, match=r"t\.csv has several columns called 'caption'"):
        read_pairs(table(images / "t.csv", "image,caption,caption", "0.jpg,one,two"))
    many = ",".join(map(str, range(20_000)))
    with pytest.raises(ValueError, match=r"t\.csv has several columns called '7'"):
        read_pairs(table(images / "t.csv", f"image,caption,{many},7", "0.jpg,one"))
    cells = [pa.array([cell]) for cell in ("0.jpg", "one", "two")]
    parquet.write_table(pa.table(cells, names=["image", "caption", "caption"]), images / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet has several columns called 'caption'"):
        read_pairs(images / "t.parquet")
    (images / "parts").mkdir()
    (images / "t.parquet").rename(images / "parts/1.parquet")
    parquet.write_table(pa.table(cells[:2], names=["image", "caption"]), images / "parts/0.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet has several columns called 'caption'"):
        read_pairs(images / "parts")


def test_a_table_of_one_column_is_asked_for_its_separator(images):
    with pytest.raises(ValueError, match="has no column for the image paths") as caught:
        read_pairs(table(images / "t.csv", "image#caption", "0.jpg#words"))
    assert "its columns are 'image#caption'" in str(caught.value)
    assert "they may be separated by comma, tab, semicolon, bar" in str(caught.value)


@pytest.mark.parametrize("separator", [";", "|", "\t"])
def test_another_separator_than_the_suffix_says_is_found_out(images, tmp_path, separator):
    source = table(images / "t.csv", f"image{separator}caption", f"0.jpg{separator}eins, zwei")
    assert check(read_pairs(source), tmp_path / "out")[0].captions == ("eins, zwei",)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of one image


def test_rows_of_one_image_are_one_pair_and_are_counted(images, tmp_path, capsys):
    """As Flickr30k comes: five rows an image."""
    rows = [(n, line) for line in range(5) for n in range(3)]
    source = table(
        images / "t.csv", "image,caption,line", *(f"{n}.jpg,caption {line} of {n},{line}" for n, line in rows)
    )
    pairs = read_pairs(source)
    assert pairs.found == (
        "3 images from column 'image', captions from 'caption' (15 rows: those of one image are put together)"
    )
    shards = check(pairs, tmp_path / "out")
    assert [r.captions for r in shards] == [tuple(f"caption {line} of {n}" for line in range(5)) for n in range(3)]
    cli.main(["shards", str(source), str(tmp_path / "by command")])
    assert "(15 rows: those of one image are put together)" in capsys.readouterr().err


def test_rows_of_one_image_are_put_together_across_row_groups(images, tmp_path):
    columns = {"image": [f"{n % 3}.jpg" for n in range(12)], "caption": [f"caption {n}" for n in range(12)]}
    parquet.write_table(pa.table(columns), images / "t.parquet", row_group_size=5)
    shards = check(read_pairs(images / "t.parquet"), tmp_path / "out")
    assert [r.captions for r in shards] == [tuple(f"caption {n}" for n in range(i, 12, 3)) for i in range(3)]


NO_VALUE = (  # as programs, data bases and spreadsheets write it
    "nan", "NaN", "-nan", "<NA>", "None", "null", "NULL", "NA", "N/A", "n/a", "#N/A", "#NA", "\\N",
    "#VALUE!", "#REF!", "#NAME?", "#DIV/0!", "#NULL!", "#NUM!",
)  # fmt: skip
# Neither that nor a list in a cell, which have tests of their own.
captions = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\u2028\u2029"), max_size=12
).filter(lambda text: text.strip() not in NO_VALUE and text.strip()[:1] not in ("[", "{", "("))


def is_seen(text: str) -> bool:
    """By a reader, who sees no space, control or mark of format."""
    return any(unicodedata.category(character) not in ("Zs", "Zl", "Zp", "Cc", "Cf") for character in text)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.lists(captions, max_size=3)), min_size=1, max_size=10))
def test_every_kind_of_table_gives_the_same_pairs_for_any_captions(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("tables")
    texts = [lines for _, lines in rows]
    files = [f"{number}.jpg" for number, _ in rows]
    cells = [(name, text) for name, lines in zip(files, texts, strict=True) for text in lines or [""]]
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        with open(folder / f"t{suffix}", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerows([("file", "text"), *cells])
    json_rows = [{"file": name, "text": lines} for name, lines in zip(files, texts, strict=True)]
    table(folder / "t.jsonl", *(json.dumps(row, ensure_ascii=False) for row in json_rows))
    lists = pa.array(texts, pa.list_(pa.string()))
    parquet.write_table(pa.table({"file": files, "text": lists}), folder / "t.parquet", row_group_size=3)
    wanted: dict[str, list[str]] = {}
    for name, lines in zip(files, texts, strict=True):
        wanted.setdefault(name, []).extend(" ".join(line.split()) for line in lines if is_seen(line))
    for suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        pairs = (
            read_pairs(folder / f"t{suffix}", images=folder) if len(wanted) == 1 else _without_probing(folder, suffix)
        )
        found = {p.source: [" ".join(c.split()) for c in p.captions if c.strip()] for p in pairs}
        assert found == wanted, suffix


def _without_probing(folder: Path, suffix: str) -> Pairs:
    """The images are there, or the table would be refused."""
    for number in range(5):
        (folder / f"{number}.jpg").touch()
    return read_pairs(folder / f"t{suffix}")


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def test_paths_relative_to_elsewhere_are_noticed_at_once_and_the_option_is_named(images, tmp_path, capsys):
    source = table(tmp_path / "tables" / "t.csv", "image,caption", *(f"{n}.jpg,words" for n in range(5)))
    with pytest.raises(ValueError, match=r"none of the first 5 images of .*t\.csv is there") as caught:
        read_pairs(source)
    said = str(caught.value)
    assert str(tmp_path / "tables" / "0.jpg") in said
    assert "aths are relative to the table's folder; --images names another" in said
    before = everything_below(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["shards", str(source), str(tmp_path / "out")])
    assert "--images" in capsys.readouterr().err
    assert everything_below(tmp_path) == before
    check(read_pairs(source, images=images), tmp_path / "out")


def test_a_wrong_folder_of_images_is_named(images, tmp_path):
    source = table(tmp_path / "t.csv", "image,caption", "0.jpg,words", "1.jpg,words")
    with pytest.raises(ValueError, match=r"there is no folder of images .*nowhere"):
        read_pairs(source, images=tmp_path / "nowhere")
    (tmp_path / "wrong").mkdir()
    with pytest.raises(ValueError, match=r"aths are relative to .*wrong, as --images says"):
        read_pairs(source, images=tmp_path / "wrong")


def test_some_missing_images_are_rejected_alone_each_with_its_path(images, tmp_path):
    source = table(images / "t.csv", "image,caption", "0.jpg,words", "gone.jpg,words", "1.jpg,words")
    shards = check(read_pairs(source), tmp_path / "out", {"gone.jpg": f"no image file {images / 'gone.jpg'}"})
    assert len(shards) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Broken tables


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", r"t\.jsonl is empty; each line must be a mapping"),
        (b"\n\n", r"t\.jsonl is empty; each line must be a mapping"),
        (b'{"image": "a.jpg"}\n{"image"\n', r"t\.jsonl, line 2 is not JSON"),
        (b'{"image": "a.jpg"}\n[1]\n', r"t\.jsonl, line 2 holds list; each must be a mapping"),
        (b"[" * 100_000, r"t\.jsonl, line 1 is not JSON"),
        ('{"image": "ä"}'.encode("latin-1"), r"t\.jsonl is not UTF-8 text"),
    ],
)
def test_a_broken_line_of_json_is_named(tmp_path, content, says):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_pairs(tmp_path / "t.jsonl")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_broken_parquet_file_is_named(tmp_path, damage):
    parquet.write_table(pa.table({"image": ["a"], "text": ["b"]}), tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes({"cut": data[:-20], "garbage": b"x" * 500, "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"t\.parquet is no Parquet file, or a damaged one"):
        read_pairs(tmp_path / "t.parquet")


def test_a_folder_that_only_looks_like_a_data_set_says_so(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="set can't be read as a data set"):
        read_pairs(tmp_path / "set")


# ---------------------------------------------------------------------------------------------------------------------
# The sequence itself


def test_pairs_are_a_sequence(tmp_path):
    pairs = read_pairs(write_pairs(tmp_path / "src", 5))
    assert [pair.source for pair in pairs] == list(pairs.names) == [f"000{n}.png" for n in range(5)]
    assert pairs[-1] == pairs[4]
    assert pairs[1:3] == [pairs[1], pairs[2]]
    with pytest.raises(IndexError):
        pairs[5]


def test_the_fingerprint_tells_other_names_and_another_order(tmp_path):
    write_pairs(tmp_path / "src", 3)
    pairs = read_pairs(tmp_path / "src")
    assert fingerprint(pairs) == fingerprint(read_pairs(tmp_path / "src"))
    assert fingerprint(pairs[::-1]) != fingerprint(list(pairs))
    before = fingerprint(pairs)
    (tmp_path / "src" / "0001.txt").write_text("another caption, corrected")
    assert fingerprint(pairs) != before
    write_picture(tmp_path / "src" / "x.png").with_suffix(".txt").write_text("words")
    assert fingerprint(read_pairs(tmp_path / "src")) != fingerprint(pairs)


def test_nothing_of_a_folder_is_read_before_it_is_asked_for(tmp_path):
    """A source of millions must not be read twice, nor be wrong for one bad file."""
    source = write_pairs(tmp_path / "src", 3)
    pairs = read_pairs(source)
    (source / "0001.txt").write_text("written later")
    (source / "0002.png").write_bytes(b"spoilt later")
    assert pairs[1].captions == ("written later",)
    pack_folder(source, tmp_path / "out")
    assert list(rejections(tmp_path / "out")) == ["0002.png"]
