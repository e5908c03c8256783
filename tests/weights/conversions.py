"""Conversions there and back."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from foreign_models import (
    TINY,
    openclip_model,
    write_archive,
)

from miniclip.weights.convert import convert


def target(folder, to, number=0):
    return folder / f"{number}-{to}{'.pt' if to == 'openai' else ''}"


def archive(folder, kind="vit", halved=lambda *_: True):
    path = folder / "model.pt"
    path.write_bytes(openai_archive(kind, halved))
    return path


@cache
def openai_archive(kind, halved):
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.pt")
        return write_archive(openclip_model(TINY[kind], seed=1), TINY[kind], path, halved).read_bytes()


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


# ---- what can't be written


def refused(source, out, to, *words, **options):
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        convert(source, out, to, **options)
    for word in words:
        assert word in str(caught.value), caught.value
    assert sorted(out.parent.rglob("*")) == before
