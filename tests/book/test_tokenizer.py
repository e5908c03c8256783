# Oracle: open_clip.tokenizer.SimpleTokenizer, OpenAI's tokenizer with its merges. Over 200,000 strings are compared.

import hashlib
import random
import re
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from miniclip import tokenizer
from miniclip.common.files import ASSETS
from miniclip.evaluation.prompts import fill, imagenet_classnames, template_set
from miniclip.tokenizer import TextTooLongError, clean, decode, encode, encode_for_model, tokenize

START, END = 49406, 49407
reproducible = settings(derandomize=True, deadline=None, max_examples=1500)


@cache
def reference():
    return SimpleTokenizer()


# ---- the strings, kind by kind

BLOCKS = [
    (0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xD7A3), (0x0600, 0x06FF), (0x0590, 0x05FF), (0x0900, 0x097F),
    (0x0E00, 0x0E7F), (0x0400, 0x04FF), (0x0370, 0x03FF), (0x0080, 0x00FF), (0x0100, 0x024F), (0x0250, 0x02AF),
    (0x0300, 0x036F), (0x2000, 0x206F), (0x2070, 0x209F), (0x20A0, 0x20CF), (0x2150, 0x218F), (0x2200, 0x22FF),
    (0x2460, 0x24FF), (0x1E00, 0x1EFF), (0xFB00, 0xFB06), (0xFF00, 0xFFEF), (0xFE00, 0xFE0F), (0x1F300, 0x1FAFF),
    (0x1D400, 0x1D7FF), (0x20000, 0x2A6DF), (0xE0020, 0xE007F), (0x0020, 0x007E), (0x0000, 0x001F), (0xD800, 0xDFFF),
]  # fmt: skip

FRAGMENTS = [
    # HTML entities: single, double and triple escaped, malformed, numeric, of control and white space characters
    "&amp;", "&amp;amp;", "&amp;amp;amp;", "&lt;", "&lt;b&gt;", "&amp;lt;", "&amp;eacute;", "&eacute",
    "&EACUTE;", "&nbsp;", "&amp;nbsp;", "&", "&;", "&#;", "&#x;", "&#", "&bogus;", "&ampamp;", "&#39;",
    "&#x27;s", "&quot;", "&#28;", "&#x1c;", "&#x2028;", "&#133;", "&#x85;", "&#0;", "&#x0;", "&#xD800;",
    "&#x110000;", "&#99999999999;", "&#128;", "&#150;", "&#12288;", "&#x3000;", "&#32;", "&#9;", "&#10;",
    "&#173;", "&#x1f;", "&amp;#x1e;", "&#383;", "&lt", "&gt", "<br>", "<p>", "</p>", "<", ">",
    "&lt;start_of_text&gt;", "&amp;lt;end_of_text&amp;gt;",
    # special tokens in any case, whole and broken, with letters that fold to ASCII ones
    "<start_of_text>", "<end_of_text>", "<START_OF_TEXT>", "<End_Of_Text>", "<|startoftext|>", "<|endoftext|>",
    "<start_of_text", "end_of_text>", "< end_of_text >", "<\u017ftart_of_text>", "<\u017fTART_OF_TEXT>",
    "<end_of_te\u0335xt>",
    # contractions, with the long s and the Kelvin sign
    "'s", "'S", "'t", "'re", "'RE", "'ve", "'m", "'ll", "'LL", "'d", "'\u017f", "\u2019s", "\u2019re", "don't",
    "we'll've", "''s", "'", "\u02bcs", "\u212a", "\u212b", "o'clock", "'sss", "'res",
    # exotic white space and invisible characters
    "\u2028", "\u2029", "\x85", "\u3000", "\x1c", "\x1d", "\x1e", "\x1f", "\x0b", "\x0c", "\t", "\n", "\r",
    "\r\n", "\xa0", "\u1680", "\u180e", "\u2000", "\u200a", "\u202f", "\u205f", "\u200b", "\u200c", "\u200d",
    "\u2060", "\ufeff", "\xad", "\u200e", "\u202e", "\u2066", "\ufff9", "\ufffb", " ",
    # control characters and terminal escapes
    "\x00", "\x01", "\x07", "\x08", "\x0e", "\x1a", "\x1b", "\x7f", "\x80", "\x9b", "\x1b[31m", "\x1b[0m",
    "\x1b[1;4m", "\x1b[", "\x1b]0;x\x07", "[0m",
    # mojibake, curly quotes, ligatures, full width, combining marks, letters whose lower case is longer
    "\u00c3\u00a9", "\u00c3", "\u00e2\u20ac\u2122", "\u00e2\u20ac\u0153", "\u00c2\u00a0", "\u00ef\u00bb\u00bf",
    "schĂ¶n", "â€”", "ï¿½", "Ã\x83Â©", "\ufffd", "\u201cquoted\u201d", "\ufb01ne", "\ufb03", "ＡＢＣ", "\uff01",
    "ｶﾞ", "e\u0301", "\u0130", "i\u0307", "ß", "ẞ", "Σς", "ǅ", "\u1fbc", "\u0345", "½", "²", "Ⅷ", "①", "٣", "१",
    "\ud83d", "\udc00", "\ud83d\udc4d",
    # emoji with joiners, skin tones, flags, keycaps
    "👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪", "1️⃣", "❤️", "☺",
    # plain pieces between them
    "a", "Dog", "photo", "12", "3.14", "-", "...", "!?", "_", "#tag", "@user", "http://a.b/c?d=e&f=g", "x", "s",
    "t", "\\u00e9",
]  # fmt: skip


def character(random):
    return chr(random.randint(*random.choice(BLOCKS)))


def unicode_text(random):
    """A few runs, each from one block, as in text of that script; or of characters from anywhere."""
    runs = []
    for _ in range(random.randint(1, 5)):
        low, high = random.choice(BLOCKS)
        runs.append("".join(chr(random.randint(low, high)) for _ in range(random.randint(1, 7))))
        if random.random() < 0.3:
            runs.append(character(random))
    return random.choice(["", " "]).join(runs)


def mojibake(random):
    """Text of some script, its UTF-8 read as another encoding, once or twice: what ftfy is there to repair."""
    text = unicode_text(random)
    for _ in range(random.randint(1, 2)):
        text = text.encode("utf-8", "replace").decode(
            random.choice(["latin-1", "cp1252", "cp1251", "mac_roman"]), "replace"
        )
    return "caf" + text


def fragments_text(random):
    return random.choice(["", "", " "]).join(random.choices(FRAGMENTS, k=random.randint(1, 8)))


@cache
def dictionary():
    """Words of class names and whole words of the vocabulary."""
    names = [word for name in imagenet_classnames() for word in name.split()]
    return names + [word[:-4] for word in reference().encoder if word.endswith("</w>") and word[:-4].isascii()]


def caption(random):
    words = []
    for word in random.choices(dictionary(), k=random.randint(2, 14)):
        word = random.choice([str, str, str, str.lower, str.upper, str.title])(word)
        words.append(
            word
            + random.choice(
                ["", "", "", "", ",", ".", "!", "?", ":", "...", "'s", " & co", " -", f" {random.randint(0, 9999)}"]
            )
        )
    return random.choice(["", "A ", "photo: ", '"']) + random.choice([" ", " ", "  ", "-", "\n"]).join(words)


def made(make, number, seed):
    source = random.Random(seed)
    return [make(source) for _ in range(number)]


KINDS = {
    "ImageNet prompts": lambda: [fill(t, name) for name in imagenet_classnames() for t in template_set("imagenet80")],
    "captions": lambda: made(caption, 60_000, seed=1),
    "scripts of the world": lambda: made(unicode_text, 25_000, seed=2),
    "mojibake": lambda: made(mojibake, 8_000, seed=3),
    "nasty fragments": lambda: made(fragments_text, 40_000, seed=4),
    "each fragment alone and in words": lambda: FRAGMENTS + [f"a{f}b {f} c" for f in FRAGMENTS],
    "each character of the basic plane": lambda: [f"a{chr(point)}1" for point in range(0x10000)],
}  # fmt: skip


@cache
def corpus(kind):
    return KINDS[kind]()


def mismatches(texts):
    expected = reference()
    return [text for text in texts if encode(text) != expected.encode(text)]


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.long)])
def test_ids_equal_the_reference(kind, every):
    wrong = mismatches(corpus(kind)[::every])
    assert not wrong, f"{len(wrong)} differ, the first: {wrong[:5]!r}"


@pytest.mark.long
def test_at_least_200_000_different_strings_are_compared():
    assert len({text for kind in KINDS for text in corpus(kind)}) >= 200_000


@pytest.mark.long
def test_ids_equal_the_reference_for_each_character_there_is():
    wrong = mismatches(f"{chr(point)} {chr(point)}s" for point in range(0x110000))
    assert not wrong, f"{len(wrong)} differ, the first: {wrong[:5]!r}"


# ---- properties


@reproducible
@given(st.text())
@example("")
@example(" \u3000\x85 ")
def test_ids_of_any_text_equal_the_reference(text):
    assert encode(text) == reference().encode(text)


@pytest.mark.long
@reproducible
@given(st.lists(st.sampled_from(FRAGMENTS) | st.characters(), max_size=12).map("".join))
def test_ids_of_any_mixture_of_fragments_equal_the_reference(text):
    assert encode(text) == reference().encode(text)


@reproducible
@given(st.text(alphabet=[chr(point) for point in range(0x80)]))
def test_ids_of_any_ascii_text_equal_the_reference(text):
    assert encode(text) == reference().encode(text)


@reproducible
@given(
    st.lists(st.sampled_from(["& ", "&\n", "&amp; ", "&amp;\t", *"ab'\"<>_- \t\n\r.,!?sStTdDmMlLvVeErR0123~%\\[{#;"]))
    .map("".join)
    .flatmap(lambda text: st.sampled_from([text, text + "&", text + "&amp;"]))
)
@example("<START_OF_TEXT>\r\nIt'LL <b>do</b> &amp; <i>dont</i>")
def test_text_that_skips_cleaning_would_not_be_changed_by_it(text):
    assert tokenizer._IS_CLEAN(text)  # else this test would compare the slow path with itself
    pieces = [piece for word in clean(text).split() for piece in tokenizer._PIECES.findall(word)]
    assert encode(text) == [i for piece in pieces for i in tokenizer.encode_piece(piece)]


@reproducible
@given(
    st.text(st.characters(exclude_characters="\u0345", codec="utf-8"))
)  # the one character that CLIP's pattern drops
@example("<END_OF_TEXT> It's &amp;amp; 1 café 👍🏽")
def test_decoding_gives_the_cleaned_text_back_but_for_spaces(text):
    assert decode(encode(text)).replace(" ", "") == "".join(clean(text).split())


@reproducible
@given(st.lists(st.integers(0, 49407), max_size=10))
def test_decoding_any_ids_equals_the_reference(ids):
    assert decode([*ids, 320]) == reference().decode([*ids, 320])  # a last word, so that no zero reads as padding


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(alphabet="ab 1'é你&;", max_size=150), st.integers(2, 77))
def test_truncated_rows_equal_the_reference(text, context_length):
    assert torch.equal(tokenize(text, context_length, truncate=True).long(), reference()(text, context_length))


def test_both_ways_to_merge_lead_to_the_same_ids():
    source = random.Random(6)
    words = [
        "".join(source.choices("aeiostnr" * 8 + "bcdfghlmpuvwxyz'é東", k=source.randint(1, 60))) for _ in range(2000)
    ]
    for word in words:
        byte_ids = [tokenizer._byte_ids()[byte] for byte in word.encode()]
        assert tokenizer._merge_by_search([*byte_ids]) == tokenizer._merge_by_heap([*byte_ids]), word


# ---- tokenize


@pytest.mark.parametrize(
    "text, ids",
    [
        ("hello world", [START, 3306, 1002, END]),
        ("a diagram", [START, 320, 22697, END]),
        ("a dog", [START, 320, 1929, END]),
        ("a cat", [START, 320, 2368, END]),
        ("", [START, END]),
    ],
)
def test_known_ids_of_openais_package(text, ids):
    assert tokenize(text)[0].tolist() == ids + [0] * (77 - len(ids))


def test_a_list_gives_int32_rows_padded_with_zeros():
    tokens = tokenize(["a diagram", "a dog", "a cat"])
    assert tokens.dtype == torch.int32
    assert tokens.shape == (3, 77)
    assert tokens[:, 0].tolist() == [START] * 3
    assert tokens[:, 3].tolist() == [END] * 3
    assert not tokens[:, 4:].any()


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.lists(
        st.lists(st.sampled_from([*FRAGMENTS, "two dogs", " ", "\0", " \0 "]), max_size=6).map("".join), max_size=5
    ),
    st.integers(3, 20),
)
@example(["a dog", "\0", "a \0 cat &amp;", "&amp;", ""], 5)
def test_texts_together_have_the_rows_that_each_has_alone(texts, context_length):
    expected = reference()(texts, context_length) if texts else torch.zeros(0, context_length)
    assert torch.equal(tokenize(texts, context_length, truncate=True).long(), expected.long())


def test_many_texts_have_the_references_rows_in_order(monkeypatch):
    monkeypatch.setattr(tokenizer, "_TOGETHER", 7)
    monkeypatch.setattr(tokenizer, "_MAX_LETTERS_TOGETHER", 40)  # some parts have a longer text, and go one by one
    texts = made(caption, 60, seed=7) + made(fragments_text, 60, seed=8)
    random.Random(9).shuffle(texts)
    assert torch.equal(tokenize(texts, truncate=True).long(), reference()(texts).long())


def test_a_single_text_gives_one_row():
    assert torch.equal(tokenize("a dog"), tokenize(["a dog"]))


def test_no_texts_give_no_rows():
    assert tokenize([]).shape == (0, 77)


def test_a_tuple_of_texts_is_a_sequence_too():
    assert torch.equal(tokenize(("a dog", "a cat")), tokenize(["a dog", "a cat"]))


@pytest.mark.parametrize("context_length", [4, 16, 100])
def test_context_length_is_the_number_of_columns(context_length):
    tokens = tokenize(["a dog"], context_length=context_length)
    assert tokens.shape == (1, context_length)
    assert tokens[0, :4].tolist() == [START, 320, 1929, END]


@pytest.mark.parametrize("words", [76, 77, 200])
def test_truncation_keeps_the_beginning_and_puts_the_end_token_last(words):
    row = tokenize("dog " * words, truncate=True)[0].tolist()
    assert row == [START, *[1929] * 75, END]


def test_a_text_that_just_fits_is_neither_cut_nor_refused():
    assert tokenize("dog " * 75)[0].tolist() == [START, *[1929] * 75, END]


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_too_long_a_text_is_both_kinds_of_error_and_names_text_and_count(error):
    with pytest.raises(error, match=r"\b78 tokens.*\b77\b.*truncate=True.*dog dog dog"):
        tokenize(["short", "dog " * 76])


def test_the_count_in_the_error_is_that_of_the_given_text_and_context():
    with pytest.raises(TextTooLongError, match=r"\b5 tokens.*context length is 4;.*'two dogs run'"):
        tokenize("two dogs run", context_length=4)
    assert len(encode_for_model("two dogs run")) == 5


def test_the_error_shows_only_the_beginning_of_a_very_long_text():
    with pytest.raises(TextTooLongError) as caught:
        tokenize("dog " * 10_000)
    assert "10002 tokens" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("context_length", [1, 0, -3])
def test_a_context_without_room_for_start_and_end_is_refused(context_length):
    with pytest.raises(ValueError, match=rf"context_length is {context_length};"):
        tokenize("a dog", context_length=context_length, truncate=True)


@pytest.mark.parametrize("wrong", [None, 3, 2.5, b"bytes", ["nested"]])
def test_something_else_than_text_among_the_texts_is_named(wrong):
    with pytest.raises(ValueError, match=re.escape(repr(wrong))):
        tokenize(["a dog", wrong])


@pytest.mark.parametrize("wrong", [None, 3, 2.5])
def test_something_that_is_no_sequence_of_texts_is_named(wrong):
    with pytest.raises(ValueError, match=repr(wrong)):
        tokenize(wrong)


@pytest.mark.parametrize("wrong", [{"a dog", "a cat"}, {"a dog": 1}, np.array("a")])
def test_texts_whose_rows_could_be_others_are_refused_by_their_kind(wrong):
    with pytest.raises(ValueError, match=f"texts is a {type(wrong).__name__}.*; it must be a list of texts"):
        tokenize(wrong)
    assert tokenize({"a dog": 1}.keys()).shape == (1, 77)


# ---- decode


def test_decoding_leaves_out_padding():
    assert decode(tokenize("A  dog!")[0]) == "<start_of_text>a dog ! <end_of_text>"


def test_decoding_keeps_the_exclamation_mark_whose_id_is_0():
    assert decode([0, 0, 256]) == "!!! "
    assert decode([START, 0, END, 0, 1929]) == "<start_of_text>!<end_of_text>!dog "


def test_decoding_accepts_tensor_list_and_generator():
    ids = encode("two dogs")
    assert decode(torch.tensor(ids)) == decode(ids) == decode(i for i in ids) == "two dogs "


@pytest.mark.parametrize("wrong", [-1, 49408, 10**12])
def test_decoding_refuses_a_number_that_is_no_id(wrong):
    with pytest.raises(ValueError, match=rf"^{wrong} is no token id; ids are 0 to 49407"):
        decode([START, wrong, END])


# ---- the rest


def test_the_word_cache_is_bounded_and_emptying_it_changes_no_id(monkeypatch):
    texts = made(caption, 200, seed=5)
    before = [encode(text) for text in texts]
    words = tokenizer._Words()
    monkeypatch.setattr(tokenizer, "_words", words)
    monkeypatch.setattr(tokenizer, "_MAX_CACHED_WORDS", 7)
    after, sizes = [], []
    for text in texts:
        after.append(encode(text))
        sizes.append(len(words))
    assert after == before
    assert 0 < max(sizes) <= 7


LONG_WORDS = {
    "emoji": lambda n: "😀" * n,
    "one letter": lambda n: "a" * n,
    "dashes": lambda n: "-" * n,
    "DNA": lambda n: "".join(random.Random(0).choices("acgt", k=n)),
    "Chinese": lambda n: "".join(chr(0x4E00 + random.Random(0).randrange(3000)) for _ in range(n)),
    "base64": lambda n: "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz0123456789+/", k=n)),
}


@pytest.mark.parametrize("kind", LONG_WORDS)
def test_one_word_of_thousands_of_letters_has_the_references_ids(kind):
    word = LONG_WORDS[kind](1500)
    assert encode(word) == reference().encode(word)


@pytest.mark.timeout(600)  # with a search for each merge, hours
@pytest.mark.parametrize("kind", LONG_WORDS)
def test_a_word_of_a_hundred_thousand_letters_is_encoded_and_not_kept(kind):
    tokens = tokenize(LONG_WORDS[kind](100_000), truncate=True)
    assert (tokens[0, 0], tokens[0, -1]) == (START, END)
    assert not any(len(word) > 64 for word in tokenizer._words)


def test_of_a_text_that_is_cut_only_the_first_words_are_encoded(monkeypatch):
    words = tokenizer._Words()
    monkeypatch.setattr(tokenizer, "_words", words)
    text = " ".join(f"word{letter}" for letter in "abcdefghij")
    assert encode_for_model(text, 6, truncate=True) == [START, *encode(text)[:4], END]
    words.clear()
    encode_for_model(text, 6, truncate=True)
    assert 0 < len(words) < 5


def test_every_asset_has_its_recorded_checksum():
    lines = (ASSETS / "SHA256SUMS").read_text().splitlines()
    recorded = dict(reversed(line.split(maxsplit=1)) for line in lines)
    assert "bpe_simple_vocab_16e6.txt.gz" in recorded
    for name, checksum in recorded.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == checksum, name


def test_a_word_of_the_vocabulary_is_what_its_merges_lead_to():
    """That is why such a word needs none of them."""
    words = {symbol.removesuffix("</w>"): i for symbol, i in tokenizer.symbol_ids().items() if symbol.endswith("</w>")}
    words = {word: i for word, i in words.items() if word.isascii() and word}
    assert len(words) > 33_000
    assert all(tokenizer.merge(word.encode()) == [i] for word, i in words.items())
