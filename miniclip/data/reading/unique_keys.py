"""YAML in which no key hides another: PyYAML keeps the last of several values of one key without a word."""

from __future__ import annotations

from typing import Any

import yaml


class RepeatedKeyError(ValueError):
    """A key comes twice in one mapping; names it and its lines."""


class UniqueKeys(yaml.BaseLoader):
    """Raises a `RepeatedKeyError`, or what PyYAML does. 0017, no and 12:30 are texts as they are written."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                lines = [node.value[index][0].start_mark.line + 1 for index in (keys.index(key), number)]
                where = f"line {lines[0]}" if lines[0] == lines[1] else f"lines {lines[0]} and {lines[1]}"
                raise RepeatedKeyError(f"{key} comes twice in one mapping, in {where}")
        return super().construct_mapping(node, deep)
