"""Class names and templates of a set: from the data, from files, or built in; and labels as numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...common.files import is_readable
from ...common.wording import some
from ...data.reading.scan import same_name
from ..prompts import (
    CLASSNAME_SETS,
    DEFAULT_SET,
    TEMPLATE_SETS,
    DefaultTemplates,
    Prompts,
    classname_set,
    fill,
    template_set,
)
from .name_files import keyed_names_of, keys_in, names_of, read_text, spoken, templates_of
from .sets import Found

NUMBER_WORDS = "the labels, which are numbers"
_WORDNET = re.compile(r"n\d{8}", re.ASCII)
# n02085620-Chihuahua, 001.Black_footed_Albatross
_KEY_AND_NAME = re.compile(r"(n\d{8}|\d{2,})[-_. ]+([^\W\d_].*)")


# ---------------------------------------------------------------------------------------------------------------------
# Class names, prompts and groups


def settle_names(found: Found, classnames: str | Path | None, source: str) -> Found:
    """The class names to use: those asked for, else those beside the data, else the data's own."""
    names, names_from, class_labels = found.classnames, found.classnames_from, None
    beside = next((path for path in found.beside.get("classnames", ()) if path.is_file()), None)
    if classnames is not None and str(classnames) in CLASSNAME_SETS:
        names, names_from = classname_set(str(classnames)), f"the built-in {str(classnames)!r}"
    elif file := beside if classnames is None else classnames:
        names, names_from, class_labels = _names_in_file(file, found, source)
    if names is not None and found.classnames is not None and len(names) != len(found.classnames):
        raise ValueError(
            f"{source} has {len(found.classnames)} classes ({found.classnames_from}), and there are {len(names)} "
            f"class names in {names_from}"
        )
    if names is not None and found.classnames is not None:
        _refuse_another_order(found.classnames, names, source, found.classnames_from, names_from)
    return replace(found, classnames=names, classnames_from=names_from, class_labels=class_labels)


def _names_in_file(path: str | Path, found: Found, source: str) -> tuple[tuple[str, ...], str, tuple[str, ...] | None]:
    """The names of a file, where in it they are from, and the label of each, if the file has the data's own labels.

    Labels that are numbers from 0 say no more than the order does.

    Raises:
        ValueError: as `names_of`; the file has some of the labels and not all, or several names for one.
    """
    text, own = read_text(path), found.classnames
    each_label = (each for label in found.labels for each in (label if isinstance(label, list) else [label]))
    labels = sorted(set(keys_in(dict.fromkeys(map(str, each_label)) if own is None else own)))
    keyed = {where: _spelt_as(labels, names) for where, names in keyed_names_of(text, str(path)).items()}
    fitting = {where: names for where, names in keyed.items() if labels and names.keys() >= set(labels)}
    told = [where for where in fitting if where.lower() in ("column 'label'", "column 'labels'")]
    fitting = {where: fitting[where] for where in told or fitting}
    try:
        names, refusal = names_of(text, str(path), labels), None
    except ValueError as error:
        names, refusal = (), error

    def from_0(places: Mapping[str, Mapping[str, str]]) -> bool:
        return any(list(each) == list(map(str, range(len(each)))) for each in places.values())

    if not fitting or from_0(fitting):
        is_settled = own is not None and from_0(keyed) and not refusal
        if not is_settled and not {spoken(name) for name in names} >= set(map(spoken, labels)):
            _refuse_some_of_the_labels(path, keyed, labels, source)
        if refusal:
            raise refusal
        if not keyed:
            _refuse_one_too_many(path, names, labels, source)
        return names, str(path), None
    where, by_label = next(iter(fitting.items()))
    readings = {place: [each[label] for label in labels] for place, each in fitting.items()}
    if all(label.isdecimal() and int(label) < len(names) for label in labels):
        readings["their order"] = [names[int(label)] for label in labels]
    name_of = {spoken(name): name for name in names}
    if name_of.keys() >= set(map(spoken, labels)):
        readings["the names themselves"] = [name_of[spoken(label)] for label in labels]
    for other, reading in readings.items():
        if reading != readings[where]:
            label, one, two = next(z for z in zip(labels, readings[where], reading, strict=True) if z[1] != z[2])
            raise ValueError(
                f"{path}: the label {label!r} of {source} is {one!r} by {where} and {two!r} by {other}; which is meant "
                "can't be known: call the column of labels 'label', or leave the other out"
            )
    names_from = f"{path}, by {where}"
    if own is not None:
        return tuple(by_label[label] for label in own), names_from, None
    return tuple(by_label.values()), names_from, tuple(by_label)


def _spelt_as(labels: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """Names by keys, which are spelt as the labels are where they differ in case or underscores alone."""
    label_of = {spoken(label): label for label in labels}
    respelt = {label_of.get(spoken(key), key): name for key, name in names.items()}
    return respelt if len(label_of) == len(labels) and len(respelt) == len(names) else dict(names)


def _refuse_some_of_the_labels(
    path: str | Path, keyed: Mapping[str, Mapping[str, str]], labels: Sequence[str], source: str
) -> None:
    """Keys that are some of the data's labels, codes or words, are meant to be all of them."""
    there = {where: sorted(names.keys() & set(labels)) for where, names in keyed.items()}
    where = max(there, key=lambda where: len(there[where]), default="")
    if where and there[where] and not all(map(str.isdecimal, labels)):
        missing = [label for label in labels if label not in keyed[where]]
        raise ValueError(
            f"{path} has names by {where} for {len(there[where])} of the {len(labels)} labels of {source}; without any "
            f"are {_with_near(missing, list(keyed[where]))}"
        )


def _refuse_one_too_many(path: str | Path, names: Sequence[str], labels: Sequence[str], source: str) -> None:
    """A list that has the background before the classes, as TensorFlow's ImageNetLabels.txt, whose labels count from 1,
    for data whose labels count from 0."""
    numbers = {int(label) for label in labels} if all(map(str.isdecimal, labels)) else set()
    if re.fullmatch(r"\W*background\W*", spoken(names[0])) and 0 in numbers and max(numbers) < len(names) - 1:
        raise ValueError(
            f"{path} begins with {names[0]!r}, as lists for labels from 1 do, and {source} has the label 0, and none "
            f"above {max(numbers)} for {len(names)} names. Take that line out, or write '0: {names[0]}' and so on if 0 "
            "is that class"
        )


def _refuse_another_order(
    own: Sequence[str], names: Sequence[str], source: str, own_from: str, names_from: str
) -> None:
    """The same names at other labels than the data have them at."""
    pairs = list(zip(map(spoken, own), map(spoken, names), strict=True))
    label = next((label for label, (one, other) in enumerate(pairs) if one != other), None)
    if label is not None and sorted(one for one, _ in pairs) == sorted(other for _, other in pairs):
        raise ValueError(
            f"{source} has the names of {names_from} in another order: label {label} is {own[label]!r} ({own_from}) "
            f"and {names[label]!r} there; bring the list into the data's order, or leave it out"
        )


def _near_template_set(templates: str) -> str:
    if "{" in templates:
        return "; a template of your own stands in a file, one a line"
    near = difflib.get_close_matches(templates, TEMPLATE_SETS, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def settle_templates(
    found: Found, templates: str | Path | tuple[()] | None, names: tuple[str, ...]
) -> tuple[Prompts, str]:
    """The templates to use, and where they came from; those of the data are read if no others are given."""
    if isinstance(templates, tuple):
        return (), ""
    if templates is None:
        templates = next((path for path in found.beside.get("templates", ()) if path.is_file()), None)
    if templates is None and found.templates is not None:
        own = found.templates() if callable(found.templates) else found.templates
        return _checked_templates(own, found.templates_from), found.templates_from
    if templates is None:
        return DefaultTemplates(template_set(DEFAULT_SET)), f"the built-in set {DEFAULT_SET!r}"
    if str(templates) in TEMPLATE_SETS:
        return template_set(str(templates)), f"the built-in set {str(templates)!r}"
    path = Path(templates)
    if not is_readable(path):
        raise ValueError(
            f"templates {str(templates)!r} is no file and none of the sets {', '.join(TEMPLATE_SETS)}"
            + _near_template_set(str(templates))
        )
    found_there = templates_of(read_text(path), str(path))
    if isinstance(found_there, dict):
        return _prompts_by_class(path, found_there, names), str(path)
    return _checked_templates(found_there, str(path)), str(path)


def _checked_templates(templates: Any, where: str) -> Any:
    for template in templates:
        try:
            fill(template, "")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if isinstance(template, str) and (other := _unfilled(template)):
            raise ValueError(f"{where}: nothing fills {other} in template {template!r}; the class is {{}} or {{c}}")
    return templates


def _unfilled(template: str) -> str:
    """A place such as {domain} that is not the class's, or the doubled braces of a format string; empty if none is."""
    if "{{}}" in template:
        return "{{}}"
    other = re.search(r"\{\s*\w*\s*\}", template.replace("{c}", "").replace("{}", ""))
    return other[0] if other else ""


def _prompts_by_class(path: Path, values: dict[str, Any], names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """A file of {class name: [its prompts]}, as CuPL's (Pratt et al. 2023), for the classes of the data."""
    exact: dict[str, tuple[str, ...]] = {}
    by_spoken: dict[str, dict[tuple[str, ...], str]] = {}  # the first name of each list of prompts
    for name, prompts in values.items():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError(f"{path}: {name!r} must have a list of prompts, texts that are not empty")
        if unfilled := next((p for p in prompts if "{}" in p or _unfilled(p)), None):
            raise ValueError(
                f"{path}: nothing fills {unfilled!r}; the prompts of a class, here {name!r}, are whole texts"
            )
        exact[same_name(name)] = tuple(prompts)
        by_spoken.setdefault(spoken(name), {}).setdefault(tuple(prompts), name)
    missing = [name for name in names if spoken(name) not in by_spoken]
    if missing:
        raise ValueError(
            f"{path} has prompts for {len(values)} classes and the data have {len(names)}; without any are "
            f"{_with_near(missing, list(values))}"
        )
    found = {}
    for name in names:
        own, alike = exact.get(same_name(name)), by_spoken[spoken(name)]
        if own is None and len(alike) > 1:
            first, second = list(alike.values())[:2]
            raise ValueError(
                f"{path} has other prompts for {first!r} than for {second!r}, and the data have the class {name!r}; "
                "which are its own can't be known: spell one of those names as the data do"
            )
        found[name] = own or next(iter(alike))
    return found


def _with_near(names: Sequence[str], known: Sequence[str]) -> str:
    """The first few names, each with the known ones that look like it."""
    names_of_spoken = {spoken(name): name for name in known}
    parts = []
    for name in names[:5]:
        near = [names_of_spoken[each] for each in difflib.get_close_matches(spoken(name), names_of_spoken, n=2)]
        parts.append(repr(name) + (f" (near {' and '.join(map(repr, near))})" if near else ""))
    return some([*parts, *names[5:]])


def _refuse_one_name_twice(labels: Sequence[str], source: str) -> None:
    """Labels that differ in case or spelling alone would be two classes of the same prompt."""
    first_of: dict[str, str] = {}
    for label in labels:
        number = re.fullmatch(r"0*(\d+)([.,](?!000$)0+)?", label, re.ASCII)
        same = number[1] if number else spoken(label)
        if (first := first_of.setdefault(same, label)) != label:
            raise ValueError(
                f"{source} has the labels {first!r} and {label!r}, which would be two classes of one name; spell them "
                "alike, or name the classes with --classnames, which takes either"
            )


def number_labels(
    raw: Sequence[str],
    names: tuple[str, ...] | None,
    source: str,
    are_indices: bool = False,
    class_labels: Sequence[str] | None = None,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Labels as indices, and the class names in that order.

    Labels are indices already, or names: of the list if there is one, else sorted. An underscore in a label's name
    is read as the space that folder names often lack. Where the names' file has labels, those decide.

    Args:
        are_indices: labels that are numbers are no names, whatever the names are, as the source's own list says.
        class_labels: as those of `Found`.

    Raises:
        ValueError: labels that are none of the classes, or may be either of two.
    """
    if class_labels is not None and names is not None:
        index = {label: c for c, label in enumerate(class_labels)}
        return tuple(index[label] for label in keys_in(raw)), names
    raw = [same_name(label) for label in raw]
    spoken_names = None if names is None else tuple(spoken(name) for name in names)
    are_numbers = all(label.isascii() and label.isdigit() for label in raw)
    if are_numbers and names is not None:
        labels = tuple(int(label) for label in raw)
        most, are_names = max(labels, default=0), not are_indices and set(raw) <= set(spoken_names or ())
        if most >= len(names) and not are_names:
            from_1 = ". Labels count from 0: are these numbered from 1?" if most == len(names) and min(labels) else ""
            raise ValueError(f"{source} has labels up to {most}, but there are {len(names)} class names{from_1}")
        if most < len(names):
            if are_names:
                _refuse_names_elsewhere(sorted(set(raw), key=int), names, source)
            return labels, names
    found = sorted(set(raw), key=lambda label: (int(label), label)) if are_numbers else sorted(set(raw))
    if not found:
        raise ValueError(f"{source} has no label for any image")
    spoken_of = {label: spoken(label) for label in found}
    if names is None or spoken_names is None:
        _refuse_one_name_twice(found, source)
        index = {label: c for c, label in enumerate(found)}
        return tuple(index[label] for label in raw), tuple(name.replace("_", " ") for name in without_keys(found))
    unknown = [label for label in found if spoken_of[label] not in spoken_names]
    if unknown and set(alone := list(map(spoken, without_keys(found)))) <= set(spoken_names):
        spoken_of, unknown = dict(zip(found, alone, strict=True)), []
    if not unknown:
        if len(set(spoken_names)) < len(spoken_names):
            raise ValueError(f"the class names hold duplicates, so {source} must give labels as numbers")
        index = {name: c for c, name in enumerate(spoken_names)}
        return tuple(index[spoken_of[label]] for label in raw), names
    # Keys of their own, such as WordNet's n01440764: the names are in the keys' order.
    if len(unknown) == len(found) == len(names) and all(re.fullmatch(r"[A-Za-z]?\d+", label) for label in found):
        _refuse_two_orders(found, names, source)
        index = {label: c for c, label in enumerate(found)}
        return tuple(index[label] for label in raw), names
    hint = ". -1 marks images without a label: choose another split" if "-1" in unknown else ""
    raise ValueError(
        f"{source} has {len(found)} classes and there are {len(names)} class names; these labels are none of them: "
        f"{_with_near(unknown, names)}{hint}"
    )


def without_keys(labels: Sequence[str]) -> Sequence[str]:
    """What labels say behind their keys, if each has one of its own: WordNet's id, or a number as wide as the others,
    some with zeros before it; else the labels."""
    parts = [found.groups() for label in labels if (found := _KEY_AND_NAME.fullmatch(label))]
    keys, names = [key for key, _ in parts], [name for _, name in parts]
    are_keys = len({len(key) for key in keys}) == 1 and any(key[0] in "0n" for key in keys)
    is_told = 1 < len(labels) == len(set(keys)) == len(set(map(spoken, names)))
    return names if are_keys and is_told else labels


def key_of_no_words(names: Iterable[Any]) -> str | None:
    """What all classes are called by that no text encoder knows: "number", "WordNet id" (n01440764, as ImageNet's
    folders are), or None where one has a name in words."""
    kinds = {
        "number" if not isinstance(name, str) or name.isdigit() else "WordNet id" if _WORDNET.fullmatch(name) else None
        for name in names
    }
    return kinds.pop() if len(kinds) == 1 else None


def seem_numbered_from_1(raw: Sequence[str], names: Sequence[str] | None) -> bool:
    """Whether labels that are no names of the list, but indices, are 1, 2, 3 …, without a gap and without 0."""
    there = set(raw)
    is_counting = len(there) > 1 and there == {str(label) for label in range(1, len(there) + 1)}
    return names is not None and is_counting and not there <= set(map(spoken, names))


def _refuse_names_elsewhere(labels: Sequence[str], names: Sequence[str], source: str) -> None:
    """Labels that are names of the list, and indices of others of its names."""
    spoken_names = [spoken(name) for name in names]
    for label in labels:
        if spoken_names[int(label)] != label:
            raise ValueError(
                f"{source} has the label {label!r}, which is the name of class {spoken_names.index(label)} and the "
                f"number of the class that is called {names[int(label)]!r}. If the labels are names, leave the list of "
                "class names out; if they are numbers, give it names in words"
            )


def _refuse_two_orders(keys: Sequence[str], names: Sequence[str], source: str) -> None:
    """Sorted as texts, c10 comes before c2; sorted as numbers, after it. WordNet's are as wide as each other."""
    by_number = sorted(keys, key=lambda key: (re.sub(r"\d+", "", key), int(re.sub(r"\D", "", key))))
    if list(keys) != by_number:
        rank = next(rank for rank, (one, other) in enumerate(zip(keys, by_number, strict=True)) if one != other)
        raise ValueError(
            f"{source} has labels such as {keys[rank]!r} and {by_number[rank]!r}, which sort as texts in another order "
            f"than as numbers, so {names[rank]!r} may be the name of either; use the names themselves as labels, or "
            "keys of one width, such as c02 and c10"
        )
