"""The preflight: numbers worked out by hand, spoilt samples, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser
from command_line import fails, run
from helpers import pack_folder, picture, write_pairs, write_picture
from PIL import Image
from rich.console import Console

from miniclip.data.advice import advice
from miniclip.data.findings import Findings, false_negatives
from miniclip.data.open_pairs import is_shards, open_pairs, shard_pairs
from miniclip.data.pipeline_speed import time_pipeline
from miniclip.data.preflight import brief, examine, sample_indices
from miniclip.data.reading.pair import Pair
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs
from miniclip.loss import clip_loss
from miniclip.reports.preflight_page import rows, tables, write_html

# Short sides 60, of which no two are alike, and captions that are all different.
GOOD = ("a red fox runs", "two boats at sea", "an old oak", "night over the town", "bread and butter")


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pairs_of(*captions: str | tuple[str, ...], size: tuple[int, int] = (60, 60)) -> list[Pair]:
    """A pair for each caption or tuple of them, with a picture of its own."""
    texts = [(caption,) if isinstance(caption, str) else caption for caption in captions]
    return [Pair(f"{n}.png", encoded(picture(n, size)), text) for n, text in enumerate(texts)]


def look(pairs: list[Pair], **options) -> Findings:
    return examine(pairs, **{"image_size": 32, "batch_size": 4, "workers": 2, **options})


def printed(findings: Findings, width: int = 150) -> str:
    console = Console(width=width, file=io.StringIO())
    for table in tables(findings):
        console.print(table)
    return console.file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Equal captions and the loss


def test_false_negatives_are_the_equal_pairs_among_all_pairs():
    # Of 4 * 3 ordered pairs two are equal: (a, a') and (a', a).
    share, lowest = false_negatives([["a"], ["a"], ["b"], ["c"]], 3)
    assert share == pytest.approx(2 / 12)
    # Half of the rows show "a", which one in three of the others has. Of two others in the batch none has it with
    # 4/9, one with 4/9, both with 1/9.
    assert lowest == pytest.approx(1 / 2 * (4 / 9 * math.log(2) + 1 / 9 * math.log(3)))


@pytest.mark.parametrize(
    "captions, batch_size, share, lowest",
    [
        pytest.param([["a"]] * 5, 256, 1, math.log(256), id="all equal: chance"),
        pytest.param([["a"], ["b"], ["c"]], 256, 0, 0, id="all different"),
        pytest.param([["a", "a"], ["b"]], 256, 0, 0, id="twice with one image is no false negative"),
        # The first shows a with 1/2, and the other has it; the other shows a, and the first does with 1/2.
        pytest.param([["a", "b"], ["a"]], 2, 1 / 2, 1 / 2 * math.log(2), id="one of two captions at random"),
        pytest.param([["a"]], 256, 0, 0, id="one image"),
        pytest.param([], 256, 0, 0, id="none"),
    ],
)
def test_false_negatives_at_the_extremes(captions, batch_size, share, lowest):
    assert false_negatives(captions, batch_size) == (pytest.approx(share), pytest.approx(lowest))


def test_the_share_of_false_negatives_is_estimated_without_bias():
    everything = [["a"], ["a"], ["a"], ["b"], ["b"], ["c"]]  # 6 + 2 of 30 ordered pairs
    samples = [false_negatives(list(some), 2)[0] for some in itertools.combinations(everything, 3)]
    assert np.mean(samples) == pytest.approx(8 / 30)


def test_the_lowest_loss_is_reached_by_the_best_features_and_undercut_by_none():
    texts = torch.tensor([0, 0, 0, 1, 1, 2])  # the batch a a a b b c
    lowest = (3 * math.log(3) + 2 * math.log(2)) / 6
    best = torch.eye(3, dtype=torch.float64)[texts]
    assert clip_loss(best, best, torch.tensor(100.0, dtype=torch.float64)).item() == pytest.approx(lowest)
    torch.manual_seed(0)
    for scale in (1.0, 10.0, 100.0):
        for _ in range(100):
            images = torch.nn.functional.normalize(best + torch.randn(6, 3, dtype=torch.float64), dim=1)
            text_features = torch.nn.functional.normalize(torch.randn(3, 3, dtype=torch.float64), dim=1)[texts]
            assert clip_loss(images, text_features, torch.tensor(scale, dtype=torch.float64)).item() >= lowest - 1e-12


def test_a_batch_of_65536_has_a_lowest_loss_without_overflow():
    share, lowest = false_negatives([["a"], ["a"], *([str(n)] for n in range(998))], 65536)
    assert share == pytest.approx(2 / (1000 * 999))
    assert lowest == pytest.approx(2 / 1000 * math.log(1 + 65535 / 999), rel=0.01)  # about 66 others have it


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


def test_images_are_measured_as_they_are_stored(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    sixteen = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000)
    same = encoded(picture(7, (40, 20)))
    files = [
        encoded(picture(1, (10, 30)), "JPEG", exif=turned),
        encoded(picture(2, (64, 16), "L"), "JPEG"),
        encoded(picture(3, (8, 8), "CMYK"), "JPEG"),
        encoded(picture(4, (9, 9), "RGBA")),
        encoded(sixteen),
        same,
        same,
        encoded(picture(8, (50, 50)), "WEBP"),
    ]
    found = look([Pair(str(n), data, (f"text {n}",)) for n, data in enumerate(files)])
    assert found.short_sides.tolist() == [10, 16, 8, 9, 3, 20, 20, 50]
    assert found.aspects.tolist() == [3, 4, 1, 1, 4 / 3, 2, 2, 1]
    assert found.formats == {"PNG": 4, "JPEG": 3, "WEBP": 1}
    assert found.modes == {"RGB": 4, "L": 1, "CMYK": 1, "RGBA": 1, "I;16, 16 bit": 1}
    assert (found.num_rotated, found.num_copies) == (1, 2)
    assert found.mean_bytes == pytest.approx(np.mean([len(data) for data in files]))
    assert min(found.read_bytes_per_s, found.decode_images_per_s) > 0
    images = dict(next(lines for heading, lines in rows(found).items() if heading == "images (8)"))
    assert images["below 32 pixels"] == "87.5 %"
    assert images["turned by an EXIF tag"] == "12.5 %"
    assert images["with a copy, byte for byte"] == "25.0 %"
    assert images["pixels"] == "RGB 50.0 %, L 12.5 %, CMYK 12.5 %, RGBA 12.5 %, I;16, 16 bit 12.5 %"


def test_captions_are_counted_folded_and_their_tokens_before_the_cut():
    found = look(pairs_of(("A  Cat", "", "dog 1"), "a cat", "dog, 22!", "owl " * 9), context_length=7)
    assert found.captions_per_image.tolist() == [2, 1, 1, 1]
    assert found.num_blank == 1
    # start, end, and: a cat | dog 1 | a cat | dog , 2 2 ! | nine owls
    assert found.token_counts.tolist() == [4, 4, 4, 7, 11]
    assert found.num_repeated == 2
    assert found.top_captions == (("a cat", 2),)
    # "a cat" and "dog" have two each; the first that came is named
    assert (found.template, found.template_share, found.template_texts) == ("a cat", 2 / 5, 1)
    # "a cat" is shown by the first image with 1/2 and by the second: 2 * 1/2 of the 12 ordered pairs
    assert found.false_negatives == pytest.approx(1 / 12)
    captions = dict(rows(found)["captions (5)"])
    assert captions["cut at 7 tokens"] == "20.0 %"
    assert captions["that another image has, too"] == "40.0 %"


def test_a_caption_that_one_image_has_twice_is_not_repeated():
    found = look(pairs_of(("a fox", "A fox"), "an owl"))
    assert (found.num_repeated, found.top_captions, found.lowest_loss) == (0, (), 0)
    assert found.token_counts.tolist() == [4, 4, 4]


def test_samples_to_look_at_are_those_that_can_be_used():
    pairs = pairs_of(*(f"text {n}" for n in range(30)), size=(8, 8))
    found = look([*pairs, *[Pair("gone", problem="no image")] * 18])
    assert len({contact.source for contact in found.contacts} - {"gone"}) == 24


def test_captions_that_differ_in_marks_or_emoji_are_other_wordings_and_in_the_encoding_of_accents_none():
    found = look(pairs_of("เสือ", "เสื่อ", "🐶", "🐱", "café 1", "cafe\u0301 2"))
    assert (found.template, found.template_share, found.template_texts) == ("café", 2 / 6, 2)
    assert found.lowest_loss == 0
    found = look(pairs_of("café", "cafe\u0301"))
    assert found.top_captions == (("café", 2),)


def test_captions_that_differ_in_digits_are_one_wording():
    found = look(pairs_of("IMG_001.jpg", "IMG_002.jpg", "img 3 (jpg)", "a fox"))
    assert (found.template, found.template_share, found.template_texts) == ("img jpg", 3 / 4, 3)
    assert any(said.startswith("75.0 % of the captions are 'img jpg' but for digits") for said in advice(found))


def test_captions_without_a_word_are_counted_with_an_example():
    """As of a list of images and numbers of classes in which one line has a word, so that all are captions."""
    found = look(pairs_of("7", "a dog", "-1", "3,5", "🐶", "C#"))
    said = "3 of 6 captions (50.0 %) have no word, as '7' of 0.png: are they numbers of classes or rows?"
    assert sum(each.startswith(said) for each in advice(found)) == 1
    assert not any("but for digits" in each for each in advice(found))
    assert dict(rows(found)["captions (6)"])["without a word"] == "50.0 %"
    assert not any("have no word" in each for each in advice(look(pairs_of("a dog", "route 66"))))


def test_the_sample_is_random_seeded_and_told():
    assert sample_indices(10, None, 0) == sample_indices(10, 10, 1) == list(range(10))
    some = sample_indices(1000, 50, 3)
    assert some == sorted(set(some)) == sample_indices(1000, 50, 3) != sample_indices(1000, 50, 4)
    assert len(some) == 50
    done = []
    pairs = pairs_of(*(f"text {n}" for n in range(150)), size=(8, 8))
    found = look(pairs, samples=130, progress=done.append)
    assert (found.num_pairs, found.num_sampled, found.num_usable) == (150, 130, 130)
    assert done == [64, 128, 130]
    assert len({contact.source for contact in found.contacts}) == 24
    assert "chosen at random" in printed(found)
    assert "chosen at random" not in printed(look(pairs, samples=None))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"image_size": -1}, "image_size is -1; it must be at least 1"),
        ({"context_length": 2}, "context_length is 2; it must be at least 3"),
        ({"batch_size": 1}, "batch_size is 1; it must be at least 2"),
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"needed": 0}, "needed is 0; it is a number of images a second, above 0"),
    ],
)
def test_arguments_out_of_range_are_named(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        look(pairs_of(*GOOD), **options)
    with pytest.raises(ValueError, match="no pairs found in nowhere"):
        look([], source="nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# What can't be used


def test_spoilt_samples_are_grouped_by_reason_with_their_names(tmp_path):
    folder = write_pairs(tmp_path / "my photos", 3)
    jpeg = encoded(picture(0, (60, 60)), "JPEG")
    for name, data, text in (
        ("cut a", jpeg[:900], "x"),
        ("cut b", jpeg[:700], "x"),
        ("words 1", b"no picture", "x"),
        ("blank", jpeg, " \n\n"),
        ("none", jpeg, ""),
        ("latin", jpeg, "ä".encode("latin-1")),
        ("lonely 1", jpeg, None),
        ("lonely 2", jpeg, None),
        ("lonely 3", jpeg, None),
        ("text 1", None, "x"),
    ):
        if data is not None:
            (folder / f"{name}.jpg").write_bytes(data)
        if text is not None:
            (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = look(read_pairs(folder))
    assert (found.num_sampled, found.num_usable) == (13, 3)
    groups = {problem.kind: (problem.num_samples, problem.examples) for problem in found.problems}
    assert found.problems[0].num_samples == 3
    lonely = ("lonely 1.jpg", "lonely 2.jpg", "lonely 3.jpg")
    assert groups.pop("no captions: there is no ….txt beside it") == (3, lonely)
    assert groups.pop("every caption is empty") == (1, ("blank.jpg",))
    assert groups.pop("it has no caption") == (1, ("none.jpg",))
    assert groups.pop(next(kind for kind in groups if "not an image" in kind)) == (1, ("words 1.jpg",))
    assert groups.pop("no image: there is no ….jpg, .png, … beside it") == (1, ("text 1.txt",))
    truncated = next(kind for kind in groups if "truncated" in kind)
    assert groups.pop(truncated) == (2, ("cut a.jpg", "cut b.jpg"))
    ((kind, samples),) = groups.items()
    assert "is not UTF-8 text" in kind
    assert samples == (1, ("latin.jpg",))
    assert advice(found)[0].startswith(
        "10 of 13 samples (76.9 %) can't be used; 3 like this one: lonely 1.jpg: no captions: there is no lonely 1.txt"
    )
    assert "lonely 1.jpg, lonely 2.jpg, lonely 3.jpg" in printed(found)


def test_a_source_where_nothing_can_be_used_has_findings_advice_and_a_page(tmp_path):
    found = look([Pair(str(n), b"x", ("a",)) for n in range(3)], image_size=224)
    assert (found.num_usable, found.lowest_loss) == (0, 0)
    (sentence,) = advice(found)
    assert sentence.startswith("3 of 3 samples (100.0 %) can't be used; 3 like this one: 0: it is not an image")
    assert "3 (100.0 %)" in printed(found)
    write_html(tmp_path / "check.html", found)
    assert "<svg" not in (tmp_path / "check.html").read_text(encoding="utf-8")


def test_a_shard_that_is_cut_short_is_one_kind_of_problem(tmp_path):
    pack_folder(write_pairs(tmp_path / "in", 12), tmp_path / "out")
    os.truncate(tmp_path / "out" / "00000.tar", 20_000)
    found = look(shard_pairs(str(tmp_path / "out")))
    assert 0 < found.num_usable < 12
    (problem,) = found.problems
    assert problem.kind == "… is cut short: sample … should end at byte …"
    assert problem.num_samples == 12 - found.num_usable
    assert problem.examples[-1].startswith("00000.tar:0000000")


def test_whatever_reading_a_pair_raises_is_a_problem_of_its_own():
    class Broken(list):
        def __getitem__(self, number):
            if number == 1:
                raise KeyError("gone")
            return super().__getitem__(number)

    found = look(Broken(pairs_of(*GOOD)))
    assert [(p.kind, p.examples) for p in found.problems] == [("KeyError: 'gone'", ("sample 1",))]
    assert found.num_usable == 4


# ---------------------------------------------------------------------------------------------------------------------
# Advice


def test_good_pairs_get_no_warning():
    said = advice(look(pairs_of(*GOOD), batch_size=5, context_length=7, image_size=120))  # each just enough
    assert said[0] == "Nothing was found that would spoil training"
    assert len(said) == 2
    assert re.fullmatch(r"Each worker feeds about [\d,]+ images/s; with --needed N .*", said[1])


@pytest.mark.parametrize(
    "pairs, options, said",
    [
        pytest.param(
            pairs_of("a", "a", "a", "a"),
            {},
            "100.0 % of the captions occur with more than one image: in a batch of 4 a pair meets 3 others with its "
            "own caption, which no model can tell from it, so the loss can't fall below 1.39 (chance is 1.39). Use "
            "captions that say more; for model.loss=siglip, which pushes such pairs apart, also set "
            "model.positives=caption",
            id="equal captions",
        ),
        pytest.param(
            pairs_of("a b c d", "a", "b", "c"),
            {"context_length": 5},
            "25.0 % of the captions are longer than 5",
            id="cut",
        ),
        pytest.param(
            pairs_of(*GOOD), {"image_size": 128}, "100.0 % of the images have a short side under 64 pixels", id="small"
        ),
        pytest.param(pairs_of(*GOOD), {"batch_size": 6}, "A batch of 6 is more than the 5 pairs", id="batch"),
        pytest.param(pairs_of(("a", " "), *GOOD), {}, "Blank captions: 1;", id="blank"),
        pytest.param(pairs_of(*GOOD)[:1] * 2, {"batch_size": 2}, "100.0 % of the images have a copy", id="copies"),
        pytest.param(pairs_of(*GOOD), {"needed": 1}, "Workers for 1 images/s: 1, as each feeds about", id="few"),
        pytest.param(pairs_of(*GOOD), {"needed": 1e9}, "cores; smaller images (miniclip shards --resize)", id="many"),
        pytest.param(pairs_of(*GOOD), {"needed": 1e9}, "images/s, fewer than are needed", id="reading"),
    ],
)
def test_advice_names_what_is_wrong(pairs, options, said):
    assert said in "\n".join(advice(look(pairs, **options)))


def test_equal_captions_are_worth_a_warning_from_a_tenth_of_chance_on():
    # Two of N rows share a text, each with a probability of 1 / (N - 1) in a batch of 2: 2 / N / (N - 1) of ln 2.
    four, six = look(pairs_of("a", "a", *GOOD[:2]), batch_size=2), look(pairs_of("a", "a", *GOOD[:4]), batch_size=2)
    assert four.lowest_loss == pytest.approx(2 / 4 / 3 * math.log(2))
    assert "50.0 % of the captions occur with more than one image" in advice(four)[0]
    assert six.lowest_loss == pytest.approx(2 / 6 / 5 * math.log(2))
    assert advice(six)[0] == "Nothing was found that would spoil training"


def test_square_brackets_are_printed_as_they_are():
    assert "[red]a[/red]" in printed(look(pairs_of("[red]a[/red]", "[red]a[/red]")))


# ---------------------------------------------------------------------------------------------------------------------
# The glance before training


def shards_of(folder: Path, captions: list[str], size: tuple[int, int] = (60, 60)) -> Shards:
    for number, caption in enumerate(captions):
        write_picture(folder / "in" / f"{number:04d}.png", number, size).with_suffix(".txt").write_text(caption)
    pack_folder(folder / "in", folder / "out")
    return Shards(folder / "out")


def test_a_glance_at_good_shards_says_nothing_and_is_quick(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    shards = shards_of(tmp_path, [f"{a}{a} {b}{b}" for a in letters for b in letters][:300])
    begin = time.process_time()
    assert brief(shards, 77, 256, image_size=64) == []
    assert time.process_time() - begin < 2


def test_a_glance_at_huge_images_is_quick(tmp_path):
    folder = write_pairs(tmp_path / "in", 80)
    Image.new("RGB", (5000, 5000)).save(tmp_path / "huge.png")
    for path in folder.glob("*.png"):
        path.write_bytes((tmp_path / "huge.png").read_bytes())
        path.with_suffix(".txt").write_text(chr(97 + int(path.stem) // 9) * (1 + int(path.stem) % 9))
    pack_folder(folder, tmp_path / "out")
    begin = time.process_time()
    assert brief(Shards(tmp_path / "out"), 77, 64) == []
    assert time.process_time() - begin < 2


def test_a_glance_warns_of_what_would_spoil_training(tmp_path):
    shards = shards_of(tmp_path, ["a photo of something", *["a photo"] * 19])
    said = brief(shards, 5, 32)
    assert [sentence[:28] for sentence in said] == [
        "5.0 % of the captions are lo",
        "95.0 % of the captions occur",
        "100.0 % of the images have a",
    ]
    assert "model.positives=caption" in said[1]
    assert brief(shards, 5, 32, positives="caption") == [said[0], said[2]]
    data = bytearray((tmp_path / "out" / "00000.tar").read_bytes())
    start = data.index(b"IDAT")
    data[start + 8 : start + 900] = bytes(892)
    (tmp_path / "out" / "00000.tar").write_bytes(data)
    assert brief(shards, 77, 32)[0].startswith("1 of 20 samples (5.0 %) can't be used; 1 like this one: sample 0: ")


def test_a_glance_never_raises_and_fetches_nothing(tmp_path):
    shards = shards_of(tmp_path, list(GOOD))
    (tmp_path / "out" / "00000.tar").unlink()
    (said,) = brief(shards, 77, 4)
    assert said.startswith("5 of 5 samples (100.0 %) can't be used")
    assert "shard" in said
    shards.entries = [dataclasses.replace(entry, file="https://localhost:1/x.tar") for entry in shards.entries]
    assert brief(shards, 77, 4) == []
    (tmp_path / "out" / "00000.npz").write_bytes(b"x")
    assert "is damaged or gone" in brief(Shards(tmp_path / "out"), 77, 4)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture
def show(browser, tmp_path):
    def write_and_open(findings: Findings, pipeline=None) -> Browser:
        write_html(tmp_path / "check.html", findings, pipeline)
        for width in (390, 1280):
            browser.open(tmp_path / "check.html", width)
            browser.check()  # no error, no request, no horizontal scrolling, no broken image
        return browser

    return write_and_open


def test_the_page_shows_advice_numbers_lengths_and_samples(show):
    found = look([*pairs_of(*["a photo"] * 30, *GOOD), Pair("gone.png", problem="no image")], source="my photos")
    page = show(found)
    assert page.js("return document.title") == "my photos – check"
    assert page.text("h1") == "my photos"
    said = page.js("return [...document.querySelectorAll('#advice li')].map(l => [l.innerText, l.className])")
    assert [text for text, _ in said] == [f"{sentence}." for sentence in advice(found)]
    assert [kind for _, kind in said] == ["grave", "grave", ""]
    cells = page.js("return [...document.querySelectorAll('#groups tr')].map(r => [...r.cells].map(c => c.innerText))")
    assert cells == [[name, value] for lines in rows(found).values() for name, value in lines]
    assert page.count("#pictures svg") == 2
    assert page.count(".gallery img") == 24
    sizes = page.js("return [...document.images].map(i => Math.min(i.naturalWidth, i.naturalHeight))")
    assert set(sizes) == {128}


def test_hostile_captions_and_names_are_shown_as_they_are(show):
    evil = "<script>document.title='x'</script>"
    word = "Donaudampfschiffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2
    pairs = pairs_of(evil, evil, f"{word} <img src=x onerror=x()>", "猫 $5 & \"quoted\" 'single'", size=(300, 3))
    pairs.append(Pair(f"{evil}.png", problem=f"{word}: <b>not there</b>"))
    page = show(look(pairs, source=f"data {evil}"))
    assert page.count("script") == 0
    assert page.js("return document.title") == f"data {evil} – check"
    text = page.text()
    for shown in (evil, f"{word} <img src=x onerror=x()>", "猫 $5 & \"quoted\" 'single'", f"{word}: <b>not there</b>"):
        assert shown in text


def test_a_page_of_any_amount_of_findings_holds(show, tmp_path):
    assert show(look(pairs_of("a"))).count(".gallery img") == 1
    nothing = show(look([Pair("x", b"", ("a",))]))
    assert (nothing.count("img"), nothing.count("svg"), nothing.count("#advice .grave")) == (0, 0, 1)
    pipeline = time_pipeline(shards_of(tmp_path, list(GOOD)), image_size=16, context_length=77, workers=1)
    assert "decode and augment" in show(look(pairs_of(*GOOD)), pipeline).text()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def command(*args: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "miniclip", "check", *map(str, args), code=code, is_warm=True)


def test_the_command_looks_at_a_folder_and_writes_a_page(tmp_path):
    folder = write_pairs(tmp_path / "photos", 30)
    done = command(folder, "--out", tmp_path / "check.html", "--image-size", "16", "--samples", "20")
    assert "30 images, captions from the .txt beside each" in done.stderr
    assert "20, chosen at random" in done.stdout
    assert "but for digits and punctuation" in done.stdout
    assert f"page: {tmp_path / 'check.html'}" in done.stdout
    assert (tmp_path / "check.html").is_file()
    again = command(folder, "--out", tmp_path / "check.html", code=2)
    assert "exists already; pass --overwrite" in again.stderr
    assert "20, chosen" not in command(folder, "--out", tmp_path / "check.html", "--overwrite", "--all").stdout


def test_the_command_times_the_pipeline_of_shards(tmp_path):
    pack_folder(write_pairs(tmp_path / "in", 40), tmp_path / "out")
    done = command(tmp_path / "out", "--speed", "--workers", "2", "--image-size", "16")
    table = done.stdout[done.stdout.index("input pipeline (40 samples)") :]
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in table.splitlines()[2:8]]
    names = ["read", "decode and augment", "tokenise", "collate", "all in one process", "DataLoader, workers: 2"]
    assert [name for name, _ in cells] == names
    shares = [float(re.search(r"([\d.]+) %$", value)[1]) for _, value in cells[:4]]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert all(float(value.removesuffix(" images/s").replace(",", "")) > 0 for _, value in cells[4:])


def test_the_command_fails_when_nothing_can_be_used(tmp_path):
    folder = write_pairs(tmp_path / "photos", 2)
    for path in folder.glob("*.png"):
        path.write_bytes(b"x")
    assert "2 of 2 samples (100.0 %) can't be used" in command(folder, code=1).stdout


def test_what_cannot_be_done_is_said(tmp_path, capsys):
    folder = write_pairs(tmp_path / "photos", 2)
    assert "--speed times how shards are read" in fails(capsys, ["check", str(folder), "--speed"])
    assert "no folder or file" in fails(capsys, ["check", str(tmp_path / "nothing")])
    assert "batch_size is 1" in fails(capsys, ["check", str(folder), "--batch-size", "1"])
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"")
    assert "--index-only" in fails(capsys, ["check", str(tmp_path / "tars")])
    (tmp_path / "empty").mkdir()
    assert "no pairs found" in fails(capsys, ["check", str(tmp_path / "empty")])


def test_shards_are_told_from_what_is_not_packed(tmp_path):
    folder = write_pairs(tmp_path / "photos", 4)
    pack_folder(folder, tmp_path / "out", val_fraction=0.5)
    assert [is_shards(str(path)) for path in (folder, tmp_path / "out", tmp_path / "out" / "train")] == [
        False,
        True,
        True,
    ]
    assert is_shards("https://example.org/shards")
    assert is_shards("a/{00000..00009}.tar")
    assert not is_shards("hf-hub:owner/name")
    assert not is_shards("pairs.csv")


@pytest.mark.parametrize("layout", ["images/{}.jpg captions/{}.txt", "{}.jpg {}.txt", "deep/down/{} deep/down/{}.txt"])
def test_a_tar_that_was_left_beside_what_it_held_makes_no_shards_of_it(tmp_path, layout):
    image, text = layout.split()
    for name in "ab":
        for path in (tmp_path / "d" / image.format(name), tmp_path / "d" / text.format(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"text of {name}")
        picture(ord(name)).save(tmp_path / "d" / image.format(name), "JPEG")
    with tarfile.open(tmp_path / "d" / "images.tar", "w") as tar:
        tar.add(tmp_path / "d" / image.format("a"), "a.jpg")
    assert not is_shards(str(tmp_path / "d"))
    pairs = open_pairs(str(tmp_path / "d"))
    assert [pair.captions for pair in pairs] == [("text of a",), ("text of b",)]
    reason = "a tar, which is read where it is named itself"
    assert [(each.source, each.reason) for each in pairs.left_out] == [("images.tar", reason)]
    (tmp_path / "tars").mkdir()
    (tmp_path / "d" / "images.tar").rename(tmp_path / "tars" / "images.tar")
    assert is_shards(str(tmp_path / "tars"))


def write_tars(folder: Path, *names_of_each: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, names in enumerate(names_of_each):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for name in names.split():
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())


def write_files(folder: Path, names: str) -> None:
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize("others", ["docs/preview.png", "docs/preview.png logos/logo.png", "preview.png", "docs/0.jpg"])
def test_a_few_pictures_below_tars_leave_them_shards(tmp_path, others):
    write_tars(tmp_path / "d", "0.jpg 0.txt 1.jpg 1.txt", "2.jpg 2.cls x/3.jpg x/._3.jpg")
    write_files(tmp_path / "d", others)
    assert is_shards(str(tmp_path / "d"))


@pytest.mark.parametrize(
    "others",
    ["a.jpg b.jpg c.jpg d.jpg", "x/a.jpg x/b.jpg x/c.jpg x/0.jpg", "images/a.jpg texts/a.txt", "x/a.jpg x/b y/c.jpg"],
)
def test_pictures_that_may_be_meant_as_well_as_tars_are_refused(tmp_path, others):
    write_tars(tmp_path / "d", "0.jpg 0.txt 1.jpg 1.txt", "2.jpg 2.cls x/3.jpg x/._3.jpg")
    write_files(tmp_path / "d", others.replace("x/b y/c.jpg", "x/b.png y/c.jpg y/d.jpg"))
    with pytest.raises(ValueError, match=r"holds 2 tars without an index, and \d pictures? .*/d/\*\.tar'"):
        is_shards(str(tmp_path / "d"))
    assert is_shards(str(tmp_path / "d" / "*.tar"))


@pytest.mark.parametrize("held", [("n01/0.JPEG n02/1.JPEG",), ("0.JPEG", "1.JPEG"), ("n01.tar n02.tar",), ("0.npy",)])
def test_tars_whose_pictures_were_unpacked_or_that_hold_none_are_no_shards(tmp_path, held):
    write_tars(tmp_path / "d", *held)
    write_files(tmp_path / "d", "n01/0.JPEG n02/1.JPEG n02/2.JPEG")
    assert not is_shards(str(tmp_path / "d"))


def test_a_tar_that_can_not_be_read_beside_pictures_is_refused(tmp_path):
    write_files(tmp_path / "d", "docs/preview.png")
    (tmp_path / "d" / "0.tar").write_bytes(b"no tar" * 100)
    with pytest.raises(
        ValueError, match=r"holds 1 tar without an index, and 1 picture .* for the pictures name .*docs"
    ):
        is_shards(str(tmp_path / "d"))


def test_help_teaches_without_waiting_for_torch():
    code = "import sys; from miniclip.commands.main import main\ntry: main(['check', '--help'])\n"
    done = run(sys.executable, "-c", code + "except SystemExit: print('torch' in sys.modules)")
    assert done.stdout.endswith("False\n")
    assert "miniclip check shards/train --speed --workers 4" in done.stdout
