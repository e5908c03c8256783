"""YAML in which no key hides another, and that is no larger than it looks.

PyYAML keeps the last of several values of one key without a word, and follows nesting and aliases as far as they go.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class RepeatedKeyError(ValueError):
    """A key comes twice in one mapping; names it and its lines."""


_MOST_DEPTH = 100
_MOST_ALIASED, _MOST_TIMES = 10_000, 10  # values that aliases stand for: so many, or so many times those written


class UnboundedYAMLError(yaml.YAMLError):
    """A YAML is nested too deep, or a few lines of it stand for endlessly many values."""


class Bounded(yaml.composer.Composer):
    """Of a loader: raises an `UnboundedYAMLError` before a spiteful YAML takes the stack, the memory or the hours."""

    _depth = _num_aliased = _num_written = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        sizes: dict[int, int] = self.__dict__.setdefault("_sizes", {})  # values in a node, by its id
        event: Any = self.peek_event()  # type: ignore[attr-defined]
        where = f"in line {event.start_mark.line + 1}"
        if self._depth >= _MOST_DEPTH:
            raise UnboundedYAMLError(f"it is nested more than {_MOST_DEPTH} deep {where}")
        is_alias = isinstance(event, yaml.AliasEvent)
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            self._num_written += 1
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            within = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(sizes[id(each)] for each in within)
        elif id(node) not in sizes:
            raise UnboundedYAMLError(f"the alias *{event.anchor} {where} stands within what it stands for")
        else:
            self._num_aliased += sizes[id(node)]
            most = max(_MOST_ALIASED, _MOST_TIMES * self._num_written)
            if self._num_aliased > most:
                raise UnboundedYAMLError(f"its aliases stand for more than {most:,} values, the last {where}")
        return node


class BoundedSafe(Bounded, yaml.SafeLoader):
    """PyYAML's safe loader, `Bounded`."""


class UniqueKeys(Bounded, yaml.BaseLoader):
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
