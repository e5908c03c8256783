"""YAML in which no key hides another: PyYAML keeps the last of several values of one key without a word."""

from __future__ import annotations

import re
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class RepeatedKeyError(ValueError):
    """A key comes twice in one mapping; names it and its lines."""


class UniqueKeys(yaml.BaseLoader):
    """Raises a `RepeatedKeyError`, or what PyYAML does. 0017, no and 12:30 are texts as they are written.

    `<<` merges other mappings as in PyYAML's safe loader, and may come several times.
    """

    flatten_mapping: Any = yaml.constructor.SafeConstructor.flatten_mapping

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key for key, _ in node.value if key.tag != _MERGE]
        for key, value in node.value:
            if key.tag == _MERGE:
                self.construct_object(value, deep=True)  # for the keys in it
        keys = [self.construct_object(key, deep=True) for key in written]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                lines = [written[index].start_mark.line + 1 for index in (keys.index(key), number)]
                where = f"line {lines[0]}" if lines[0] == lines[1] else f"lines {lines[0]} and {lines[1]}"
                raise RepeatedKeyError(f"{key} comes twice in one mapping, in {where}")
        self.flatten_mapping(node)
        return super().construct_mapping(node, deep)


UniqueKeys.add_implicit_resolver(_MERGE, re.compile("<<$"), ["<"])
