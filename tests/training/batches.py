"""Batches for several processes, and how near their results have to be."""

from __future__ import annotations

import torch

B, E = 12, 5  # twelve can be shared by 1, 2 and 3

CASES = {
    "plain": {},
    "chunks": {"chunk_size": 3},
    "holes": {"mask": [True, False, True, True, True, True, False, True, True, True, False, True]},
    "holes in one process alone": {"mask": [False] * 4 + [True] * 8},
    "holes and chunks": {"mask": [True, False] * 6, "chunk_size": 2},
    "groups": {"groups": [0, 1, 2, 0, 4, 5, 1, 7, 8, 0, 10, 11]},
    "groups, holes and chunks": {"groups": [0, 1, 2, 3] * 3, "mask": [True, True, False] * 4, "chunk_size": 1},
}


def options(case, rows=slice(None)):
    made = {name: torch.tensor(value)[rows] for name, value in CASES[case].items() if name != "chunk_size"}
    return made | {name: value for name, value in CASES[case].items() if name == "chunk_size"}


def assert_near(found, expected, dtype):
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in expected.items():
        difference = (found[name] - value).norm() / value.norm().clamp(min=1e-3)
        assert difference <= limit, (name, float(difference))
