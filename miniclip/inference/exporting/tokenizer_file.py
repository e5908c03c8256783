"""CLIP's tokenizer as the `tokenizer.json` of Hugging Face's `tokenizers`, which transformers.js reads as well."""

from __future__ import annotations

from typing import Any

import regex

from ...tokenizer import END_OF_TEXT, START_OF_TEXT, learnt_merges, symbol_ids

START, END = "<|startoftext|>", "<|endoftext|>"


def pieces() -> str:
    """`tokenizer._PIECES` for any engine: its classes are ranges here, as engines know different years' Unicode."""
    everything = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    letters, digits, others = (
        regex.findall(each, everything, regex.IGNORECASE) for each in (r"[\p{L}]+", r"[\p{N}]+", r"[^\s\p{L}\p{N}]+")
    )
    rest = everything.translate(dict.fromkeys(map(ord, "".join(others)), "\n")).split("\n")
    # ſ is what ignoring case adds to the s of contractions.
    return rf"'[sſ]|'t|'re|'ve|'m|'ll|'d|[{_class_of(letters)}]+|[{_class_of(digits)}]|[^\n{_class_of(rest)}]+"


def _class_of(runs: list[str]) -> str:
    """What a class in brackets has for runs of consecutive characters."""
    return "".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else run for run in runs)


def tokenizer_json(context_length: int) -> dict[str, Any]:
    """Ids between start and end of text, cut to the context length, not padded.

    Its own normalisation is NFC, white space and case alone; `runner.Cleaning` has the rest.
    """
    names = {index: symbol for symbol, index in symbol_ids().items()}
    vocabulary = symbol_ids() | {START: START_OF_TEXT, END: END_OF_TEXT}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": context_length, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [_special(START, START_OF_TEXT), _special(END, END_OF_TEXT)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pieces()}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_token(START), {"Sequence": {"id": "A", "type_id": 0}}, _token(END)],
            "pair": [
                _token(START),
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
                _token(END),
            ],
            "special_tokens": {
                START: {"id": START, "ids": [START_OF_TEXT], "tokens": [START]},
                END: {"id": END, "ids": [END_OF_TEXT], "tokens": [END]},
            },
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": [f"{names[left]} {names[right]}" for left, right in learnt_merges()],
        },
    }


def _special(content: str, index: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def _token(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}
