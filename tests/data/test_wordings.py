"""Wordings of captions: found without class names, kept with few captions, and turned into prompts for any classes."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from miniclip import tokenizer
from miniclip.data.wordings.kept import Wording, Wordings
from miniclip.data.wordings.mine import mine
from miniclip.data.wordings.units import units, units_of_tokens
from miniclip.evaluation.prompts import imagenet_classnames

NAMES = tuple(name for name in imagenet_classnames() if "(" not in name)
COLOURS, SHAPES = ("red", "green", "blue", "pink"), ("circle", "star", "moon", "bar", "cross")
PAIRS = tuple(" ".join(pair) for pair in itertools.product(COLOURS, SHAPES))


def captions(templates: tuple[str, ...], names: tuple[str, ...], count: int = 2000) -> list[str]:
    draw = random.Random(0)
    return [draw.choice(templates).replace("{}", draw.choice(names)) for _ in range(count)]


def free_texts(count: int) -> list[str]:
    """Of nine words each, drawn from 400."""
    words = [
        "".join(letters) for letters in itertools.islice(itertools.product("bdfgk", "aeiou", "lmnrs", "aeiou"), 400)
    ]
    return [" ".join(random.Random(n).choices(words, k=9)) for n in range(count)]


def found(texts: list[str]) -> Wordings | None:
    return mine([units(text) for text in texts])


def texts_of(wordings: Wordings | None) -> set[str]:
    assert wordings is not None
    return {each.text for each in wordings.wordings}


# ---------------------------------------------------------------------------------------------------------------------
# Units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A photo of a dog.", ["a", " photo", " of", " a", " dog", "."]),
        ("it's t-shirt 0042, (blue)", ["it", "'s", " t", "-", "shirt", " 0042", ",", " (", "blue", ")"]),
        ("一张猫的照片", ["一", "张", "猫", "的", "照", "片"]),
        ("Größe: ОДИН кот", ["größe", ":", " один", " кот"]),
        ("&amp; 12 34", ["&", " 1234"]),
        ("", []),
    ],
)
def test_units_are_what_the_tokenizer_sees_and_joined_have_its_tokens(text, expected):
    assert list(units(text)) == list(units_of_tokens(tokenizer.encode(text))) == expected
    assert tokenizer.encode("".join(units(text))) == tokenizer.encode(text)


# ---------------------------------------------------------------------------------------------------------------------
# Mining


@pytest.mark.parametrize(
    ("templates", "names"),
    [
        (("a sketch of a {}", "this is a {}, drawn by hand", "picture: {}", "someone drew a {}."), NAMES),
        (("a photo of a {}.",), NAMES),
        (("a photo of a {}",), PAIRS),
        (("{} on a shelf", "the old {} of my aunt"), ("cat", "dog")),
        (("ein Foto: {}", "das ist {} – von Hand"), ("eine Kuh", "ein Haus", "Großmutters Hut", "zwei Äpfel")),
        (("一张{}的照片", "这是{}。"), ("猫", "大象", "红色的花", "汽车", "狗")),
        (("the digit {} by hand",), tuple("0123456789")),
        (("{}",), NAMES),
        (("{}",), PAIRS),
    ],
)
def test_the_wordings_that_captions_were_made_of_are_found_without_the_names(templates, names):
    wordings = found(captions(templates, names))
    assert texts_of(wordings) == {each.lower() for each in templates}
    assert sum(each.share for each in wordings.wordings) == pytest.approx(1, abs=0.01)


def test_a_number_that_differs_is_no_gap_where_something_else_differs_too():
    draw = random.Random(0)
    texts = [f"image {draw.randrange(10_000)}: a {draw.choice(('cat', 'dog', 'cow', 'hen'))}" for _ in range(500)]
    (only,) = texts_of(found(texts))
    assert only.startswith("image ")
    assert only.endswith(": a {}")


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["a photo"] * 300,
        free_texts(800),
        ["{} of {}"] * 50 + ["{a} of {b}"] * 50,
        [" ".join(["long"] * 50 + [str(n)]) for n in range(50)],
    ],
    ids=["none", "one caption", "free texts", "braces", "long texts"],
)
def test_captions_without_a_common_wording_have_none(texts):
    assert found(texts) is None


def test_free_captions_with_few_of_a_wording_have_none():
    free = free_texts(1600)
    assert found([*free, *captions(("a photo of a {}",), NAMES, 400)]) is None
    assert texts_of(found([*free[:400], *captions(("a photo of a {}",), NAMES, 1600)])) == {"a photo of a {}"}


def test_the_order_of_captions_does_not_change_what_is_found():
    texts = captions(("a sketch of a {}", "picture: {}"), PAIRS, 600)
    first = found(texts)
    again = found(sorted(texts))
    assert first is not None
    assert again is not None
    assert set(first.wordings) == set(again.wordings)


def test_no_example_has_words_side_by_side_that_no_other_caption_has():
    secret = "a sketch of a visit of mister smith"
    wordings = found([*captions(("a sketch of a {}", "picture: {}"), PAIRS, 600), secret])
    assert wordings is not None
    assert len(wordings.examples) == 40  # 20 names in two wordings
    assert not any("smith" in each for each in wordings.examples)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

TWO_GAPS = [
    wording.format(colour=colour, shape=shape)
    for colour, shape in itertools.product(COLOURS, SHAPES)
    for wording in ("a {colour} {shape} by hand", "{shape} in {colour} ink", "someone drew a {shape}, {colour}")
]


def test_the_gap_is_where_captions_name_the_classes_that_are_asked_for():
    wordings = found(TWO_GAPS * 4)
    assert wordings is not None
    shapes = set(wordings.templates(SHAPES))
    assert shapes == {
        text.format(colour=colour)
        for colour in COLOURS
        for text in ("a {colour} {{}} by hand", "{{}} in {colour} ink", "someone drew a {{}}, {colour}")
    }
    assert "someone drew a star, {}" in wordings.templates(COLOURS)
    assert wordings.templates(PAIRS) == ("a {} by hand",)
    assert set(wordings.templates(("Red", "GREEN", "blue"))) <= set(wordings.templates(COLOURS))


def test_classes_that_captions_do_not_name_are_asked_for_in_the_commonest_wordings():
    wordings = found(captions(("a sketch of a {}", "picture: {}", "picture: {}"), PAIRS, 900))
    assert wordings is not None
    assert wordings.templates() == wordings.templates(("zebra", "yak")) == ("picture: {}", "a sketch of a {}")
    assert set(wordings.templates((*PAIRS, "zebra"))) == {"picture: {}", "a sketch of a {}"}


def test_the_longer_of_two_names_counts():
    texts = captions(("a sketch of a {}",), ("polar bear", "bear", "cat"), 300)
    wordings = found(texts)
    assert wordings is not None
    assert wordings.templates(("bear", "polar bear", "cat")) == ("a sketch of a {}",)


@pytest.mark.parametrize(
    ("template", "is_known"),
    [
        ("a sketch of a {}", True),
        ("A sketch of a {}!", True),
        ("a sketch of {}", True),
        ("{}", True),
        ("a {}", True),
        ("a photo of a {}.", False),
        ("sketch a of {}", False),
        ("an {}", False),
        ("picture: {}", True),
        ("picture: {} red", True),
    ],
)
def test_a_template_is_known_if_its_words_stand_side_by_side_in_the_captions(template, is_known):
    wordings = found(captions(("a sketch of a {}", "picture: {}"), PAIRS, 600))
    assert wordings is not None
    assert wordings.knows(template) is is_known


def test_the_file_gives_back_what_was_written_and_anything_else_is_refused_by_name():
    wordings = Wordings((Wording("a {} “von” 手", 0.5),), ("a cat",), 7)
    assert Wordings.from_json(wordings.to_json(), "x.json") == wordings
    values = json.loads(wordings.to_json())
    for change, reason in (
        ({"schema": 9}, "schema is 9"),
        ({"wordings": []}, "no wording"),
        ({"wordings": [{"text": "a photo", "share": 1}]}, "no {} for"),
        ({"wordings": [{"text": "a {}"}]}, "no 'share'"),
        ({"examples": None}, "NoneType"),
    ):
        with pytest.raises(ValueError, match=f"x.json holds no wordings.*{reason}.*delete it"):
            Wordings.from_json(json.dumps({**values, **change}), "x.json")
    with pytest.raises(ValueError, match=r"x\.json holds no wordings"):
        Wordings.from_json("{", "x.json")
