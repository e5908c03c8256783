"""What programs change of a tokenizer acts: added words, other merges, overridden methods. Oracle: open_clip's own."""

import copy
import html
import pickle

import open_clip
import pytest
import regex
import torch

import miniclip.openai as clip
import miniclip.openclip as ours

TEXTS = ["a photo of sksdog, on the sofa", "SKSDOG <cat-toy> dogs 12", "", "zebrafish " * 60, "日本 sksdog 😀 <mask>"]


def add_word(tokenizer):
    """As kohya's scripts and others for textual inversion do."""
    index = len(tokenizer.encoder)
    tokenizer.encoder["sksdog</w>"] = index
    tokenizer.decoder[len(tokenizer.decoder)] = "sksdog</w>"
    tokenizer.cache["sksdog"] = "sksdog</w>"


def add_word_with_punctuation(tokenizer):
    tokenizer.encoder["<cat-toy></w>"] = 49408
    tokenizer.cache["<cat-toy>"] = "<cat-toy></w>"
    tokenizer.pat = regex.compile("<cat-toy>|" + tokenizer.pat.pattern)


def move_an_id(tokenizer):
    tokenizer.encoder["dogs</w>"] = 7


def split_a_word(tokenizer):
    tokenizer.cache["sofa"] = "so fa</w>"


def forget_merges(tokenizer):
    for pair in [pair for pair in tokenizer.bpe_ranks if "z" in "".join(pair)]:
        del tokenizer.bpe_ranks[pair]


def look_at_merges(tokenizer):
    assert len(tokenizer.bpe_ranks) == 48894


def rank_a_merge_otherwise(tokenizer):
    tokenizer.bpe_ranks |= {("k", "s"): -1}


def forget_by_pop(tokenizer):
    tokenizer.bpe_ranks.pop(("z", "e"))


def spell_bytes_otherwise(tokenizer):
    tokenizer.byte_encoder = {**tokenizer.byte_encoder, ord("z"): "y"}


def replace_a_method(tokenizer):
    tokenizer.bpe = letters


def letters(token):
    return token if token.startswith("<") else " ".join([*token[:-1], token[-1] + "</w>"])


CHANGES = [add_word, add_word_with_punctuation, move_an_id, split_a_word, forget_merges, forget_by_pop, look_at_merges,
           rank_a_merge_otherwise, spell_bytes_otherwise, replace_a_method]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_of_a_tokenizer_acts_as_in_open_clips(change):
    found, expected = ours.SimpleTokenizer(), open_clip.SimpleTokenizer()
    plain = found(TEXTS)
    for each in (found, expected):
        change(each)
    assert [found.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    tokens = found(TEXTS)
    assert torch.equal(tokens, expected(TEXTS))
    assert torch.equal(pickle.loads(pickle.dumps(found))(TEXTS), tokens)
    assert torch.equal(tokens, plain) == (change is look_at_merges)  # no change goes unseen in these texts
    assert torch.equal(ours.SimpleTokenizer()(TEXTS), plain)  # an instance's tables are its own


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_of_openais_tokenizer_acts(change):
    """OpenAI's code is open_clip's but for the spelling of two tokens, which these texts have not."""
    found, expected = clip.SimpleTokenizer(), open_clip.SimpleTokenizer()
    for each in (found, expected):
        change(each)
    assert [found.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]


def test_a_word_added_to_a_modules_tokenizer_is_tokenized_and_decoded(monkeypatch):
    expected = open_clip.SimpleTokenizer()
    add_word(expected)
    for library in (clip, ours):
        assert library._tokenizer is library._tokenizer
        monkeypatch.setattr(library, "_tokenizer", type(library._tokenizer)())  # for this test alone
        add_word(library._tokenizer)
        tokens = library.tokenize("a photo of sksdog")
        assert (
            tokens[0, :6].tolist()
            == expected("a photo of sksdog")[0, :6].tolist()
            == [49406, 320, 1125, 539, 49408, 49407]
        )
        assert library._tokenizer.decode(tokens[0, 1:5]) == expected.decode([320, 1125, 539, 49408])
    assert ours.decode(tokens[0, :6]) == expected.decode(tokens[0, :6].tolist())


def test_a_subclass_and_a_class_that_is_patched_act(monkeypatch):
    class Letters(ours.SimpleTokenizer):
        def bpe(self, token):
            return letters(token)

    expected = open_clip.SimpleTokenizer()
    expected.bpe = letters
    assert torch.equal(Letters()("a dog"), expected("a dog"))
    plain = ours.SimpleTokenizer()
    assert plain("a dog")[0].count_nonzero() == 4
    monkeypatch.setattr(ours.SimpleTokenizer, "bpe", Letters.bpe)
    assert torch.equal(plain("a dog"), expected("a dog"))


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize(
    "options", [{"additional_special_tokens": ["<mask>", "<x>"]}, {"clean": "canonicalize"}, {"clean": "whitespace"}]
)
def test_a_tokenizer_takes_their_options(options):
    found, expected = ours.get_tokenizer(**options), open_clip.SimpleTokenizer(**options)
    texts = [*TEXTS, "A_b, Dog!  <MASK><x> it's", "&lt;mask&gt;"]
    assert [found.encode(text) for text in texts] == [expected.encode(text) for text in texts]
    assert torch.equal(found(texts), expected(texts))
    assert found.vocab_size == expected.vocab_size
    assert [*found.all_special_ids] == expected.all_special_ids
    assert found.decode(found.encode("a <mask> b")) == expected.decode(expected.encode("a <mask> b"))


def test_options_that_it_has_not_are_refused():
    for options, message in (
        ({"reduction_mask": "random"}, "reduction_mask is 'random'; texts are cut at their end"),
        ({"clean": "upper"}, "clean is 'upper'; valid are lower, whitespace, canonicalize"),
        ({"tokenizer_mode": "clips"}, "tokenizer_mode"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.get_tokenizer(**options)


def test_a_tokenizer_that_was_only_asked_and_decoded_with_is_as_fast_as_before(monkeypatch):
    tokenizer = ours.SimpleTokenizer()
    assert tokenizer.decode(tokenizer("a dog")[0, 1:3]) == "a dog "
    assert min(map(len, (tokenizer.encoder, tokenizer.bpe_ranks, tokenizer.byte_encoder, tokenizer.cache))) == 2
    monkeypatch.setattr(clip, "basic_clean", None)  # which the way by tables needs
    assert tokenizer("a dog")[0, 2] == 1929
    assert tokenizer.encode("a dog") == [320, 1929]


def test_openais_looks_words_up_in_its_own_tables_only_where_a_program_changed_something(monkeypatch):
    expected = open_clip.SimpleTokenizer()
    monkeypatch.setattr(clip, "_tokenizer", clip.SimpleTokenizer())
    assert torch.equal(clip.tokenize(TEXTS[0]).long(), expected(TEXTS[0]))
    assert vars(clip._tokenizer).keys() == {"encoder"}  # for the ends of a text
    for text in ("<|endoftext|>", "&lt;|endoftext|&gt;", "<start_of_text>"):
        ids = clip.SimpleTokenizer().encode(text)
        assert (ids == [49407]) == ("endoftext" in text)
        assert ids == clip.SimpleTokenizer().encode_cleaned(html.unescape(text))
    monkeypatch.setattr(clip, "basic_clean", str.upper)
    monkeypatch.setattr(clip, "whitespace_clean", lambda text: text.replace("CAT", "DOG"))
    assert clip.SimpleTokenizer().encode("a cat") == expected.encode("a dog")


@pytest.mark.parametrize("module", [clip, ours])
def test_pickles_and_copies_of_a_tokenizer_do_not_grow_with_the_texts_that_it_saw(module):
    tokenizer = module.SimpleTokenizer()
    tokenizer.encode("a <word>")
    assert len(tokenizer.encoder) == 49408
    assert len(pickle.dumps(tokenizer)) < 200
    tokenizer.encode("<a sofa>")
    tokenizer.cache.update(sofa="so fa</w>")
    before = len(pickle.dumps(tokenizer))
    ids = tokenizer.encode("a photo of a sofa and of a zebrafish")
    assert {"sofa", "zebrafish"} < tokenizer.cache.keys()
    assert len(pickle.dumps(tokenizer)) == before
    for copied in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert copied.cache == {**module.SimpleTokenizer().cache, "sofa": "so fa</w>"}
        assert copied.encode("a photo of a sofa and of a zebrafish") == ids


def test_a_model_with_rows_for_added_words_has_a_tokenizer(monkeypatch):
    for module in (open_clip, ours):
        configs = module.factory._MODEL_CONFIGS
        config = copy.deepcopy(configs["ViT-B-32"])
        config["text_cfg"]["vocab_size"] = 49410
        monkeypatch.setitem(configs, "grown", config)
    words = {"additional_special_tokens": ["<a>", "<b>"]}
    ids = [module.get_tokenizer("grown", **words)("x <a>", 6).tolist() for module in (open_clip, ours)]
    assert ids[0] == ids[1] == [[49406, 343, 49408, 49407, 0, 0]]
    with pytest.raises(ValueError, match="grown has vocab_size 49410"):
        ours.get_tokenizer("grown")
