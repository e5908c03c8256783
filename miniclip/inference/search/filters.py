"""Filters in SQL on an index's columns: the names in them, and what is wrong with one that can't be followed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# Texts and comments, names in quotes, and other names.
_TOKENS = re.compile(r"""'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/|`[^`]*`|"[^"]*"|[^\W\d]\w*""", re.DOTALL)
_OTHER_TYPE = re.compile(
    r"convert to literal|coerce|common argument type|not return a boolean|but received|Cannot cast|parsing t"
)
_MALFORMED = re.compile(r"(?:sql parser error|invalid SQL predicate): (?:(.+) at Line: .*|(.+?)\)?)$")
_FORMS = (  # of Arrow's types: what a column of it holds, and how it is asked for
    ("is_string", "texts", "{0} = 'a text', or TRY_CAST({0} AS DOUBLE) > 2020 to compare numbers"),
    ("is_boolean", "true and false", "{0}, or NOT {0}"),
    ("is_integer", "numbers", "{0} = 2020"),
    ("is_floating", "numbers", "{0} > 1.5"),
    ("is_date", "days", "{0} > DATE '2020-12-31'"),
    ("is_timestamp", "times", "{0} > TIMESTAMP '2020-12-31 00:00:00'"),
)


def with_key_for_path(where: str, schema: Any) -> str:
    """The filter, in which `path` is what results show: the key, of a picture in a table or in shards."""

    def replaced(token: re.Match[str]) -> str:
        name = token[0]
        if token.string[: token.start()].rstrip().endswith("."):  # of a structure
            return name
        # LanceDB finds a name without quotes in any case, but first a column that is written so.
        is_path = name in ("path", "`path`", '"path"') or (name.lower() == "path" and name not in schema.names)
        return "coalesce(`path`, `key`)" if is_path else name

    return _TOKENS.sub(replaced, where)


def what_is_wrong(where: str, reason: str, schema: Any) -> str:
    """Why a filter can't be followed, from what LanceDB says of it."""
    if _OTHER_TYPE.search(reason) and (forms := list(_forms_of(where, schema))):
        return f"it uses a column as what it is not: {', and '.join(forms)}"
    columns = columns_of(schema)
    if absent := re.search(r"No field named \"?(.+?)\"?$", reason):
        return f"there is no column {absent[1]}; {columns}; texts stand in single quotes, '{absent[1]}'"
    if malformed := _MALFORMED.search(reason):
        return (
            f"it is no whole condition, as year = 2020 AND camera = 'X' is ({malformed[1] or malformed[2]}); {columns}"
        )
    return f"{reason}; {columns}"


def columns_of(schema: Any) -> str:
    return "columns are " + ", ".join(name for name in schema.names if name != "features")


def _forms_of(where: str, schema: Any) -> Iterator[str]:
    """How each column that a filter names is asked for."""
    from pyarrow import types

    lower = {name.lower(): name for name in reversed(schema.names)}
    words = (token.strip('`"') for token in _TOKENS.findall(where))
    for name in dict.fromkeys(word if word in schema.names else lower.get(word.lower(), "") for word in words):
        kind = schema.field(name).type if name else None
        for holds, holding, form in _FORMS:
            if name and getattr(types, holds)(kind):
                quoted = name if re.fullmatch(r"[a-z_][a-z0-9_]*", name) else f"`{name}`"
                yield f"{name} holds {holding} (write {form.format(quoted)})"
