"""Prompt templates and class names, kept as data in assets/ (its NOTICE says where they come from). No torch here.

A template is a text with a place for the class name, `{}` or `{c}`, or a function of the name:

>>> fill("a photo of a {}.", "tabby cat")
'a photo of a tabby cat.'
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.arguments import check_texts, shown
from ..common.files import ASSETS, is_readable
from ..common.wording import some

if TYPE_CHECKING:
    from ..data.wordings.kept import Wordings

Template = str | Callable[[str], str]
Prompts = Sequence[Template] | Mapping[str, Sequence[str]]  # for every class, or by class

DEFAULT_SET = "simple"
MINED_FROM = "the wordings of the captions that it was trained on"
# Sets of templates by name. "simple" is the one prompt of the paper's section 3.1.4.
_TEMPLATE_FILES = {"imagenet80": "imagenet_templates_80.txt", "imagenet7": "imagenet_templates_7.txt"}
# OpenAI's of other data sets of the paper (appendix A), and names of classes where the data have none in words.
_WITH_TEMPLATES = (
    "food101", "cifar10", "cifar100", "sun397", "cars", "fgvc_aircraft", "voc2007", "dtd", "pets", "caltech101",
    "flowers", "mnist", "fer2013", "stl10", "eurosat", "resisc45", "gtsrb", "kitti_closest_vehicle_distance",
    "country211", "pcam", "clevr_count_all", "renderedsst2", "svhn",
)  # fmt: skip
_WITH_CLASSNAMES = (
    "pets", "caltech101", "flowers", "mnist", "fer2013", "eurosat", "gtsrb", "kitti_closest_vehicle_distance",
    "country211", "pcam", "clevr_count_all", "svhn",
)  # fmt: skip
TEMPLATE_SETS = ("simple", *_TEMPLATE_FILES, *_WITH_TEMPLATES)
CLASSNAME_SETS = ("imagenet", *_WITH_CLASSNAMES)


class DefaultTemplates(tuple[str, ...]):
    """Templates that nobody chose: a model that knows the wordings of its captions has better ones."""


def fill(template: Template, classname: str) -> str:
    """The prompt for one class.

    Plain replacement and not `str.format`, so that a class name or template may hold any other brace.

    Raises:
        ValueError: a text template without a place for the name, by which every class would get the same prompt; or a
            function that gives no text.
    """
    if callable(template):
        prompt: Any = template(classname)
        if not isinstance(prompt, str):
            called = getattr(template, "__qualname__", shown(template))
            raise ValueError(f"template {called} gives {shown(prompt)} for {classname!r}; it must give a text (str)")
        return prompt
    if not isinstance(template, str) or not isinstance(classname, str):
        what, value = ("class name", classname) if isinstance(template, str) else ("template", template)
        raise ValueError(f"a {what} is {shown(value)}; it must be a text (str)")
    if "{}" not in template and "{c}" not in template:
        raise ValueError(f"template {template!r} has no place for the class name; write {{}} or {{c}} where it goes")
    return template.replace("{c}", "{}").replace("{}", classname)


def class_prompts(prompts: Prompts, classname: str) -> list[str]:
    """The prompts of one class, from templates for all or from its own.

    Raises:
        ValueError: there are none for it, or a template is without a place for the name.
    """
    if not isinstance(prompts, Mapping):
        return [fill(template, classname) for template in prompts]
    if not prompts.get(classname):
        near = difflib.get_close_matches(classname, prompts, n=2)
        hint = f"; near is {' and '.join(map(repr, near))}" if near else ""
        raise ValueError(f"there are prompts for {len(prompts)} classes, and none for {classname!r}{hint}")
    return check_texts(f"the prompts of {classname!r}", prompts[classname])


def suited(data: Any, wordings: Wordings | None) -> Any:
    """The same classes with prompts worded as a model's captions, if nobody chose others and the model knows them.

    Args:
        data: has classnames, templates and templates_from, as a `LabelledImages`.
        wordings: the model's.
    """
    if wordings is None or not isinstance(getattr(data, "templates", None), DefaultTemplates):
        return data
    return replace(data, templates=wordings.templates(data.classnames), templates_from=MINED_FROM)


def warn_if_unseen(data: Any, wordings: Wordings | None, model: str) -> None:
    """Warns, in one sentence, of prompts whose wording none of the captions had that a model was trained on."""
    if wordings is None or not getattr(data, "templates", None):
        return
    texts = dict.fromkeys(_gapped(data))
    unseen = [repr(each) for each in texts if not wordings.knows(each)]
    if unseen:
        warnings.warn(
            f"{data.name}: {len(unseen)} of {len(texts)} prompts ({some(unseen, 2)}) have a wording that is in none of "
            f"the captions kept from the training of {model}, and scores can hang on it; where neither --templates nor "
            "a file beside the data names prompts, they are worded as those captions",
            stacklevel=3,
        )


def _gapped(data: Any) -> Iterator[str]:
    """The prompts with a gap for the class; those that functions make are unknown."""
    if not isinstance(data.templates, Mapping):
        yield from (fill(each, "{}") for each in data.templates if isinstance(each, str))
        return
    for name in data.classnames:
        yield from (each.replace(name, "{}") for each in class_prompts(data.templates, name) if name in each)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file without their ends; blank lines at the end of the file do not count.

    Raises:
        ValueError: no such file, not text, nothing in it, or a blank line among the others (line numbers are labels).
    """
    path = Path(path)
    if not is_readable(path):
        raise ValueError(f"{path} is a folder, not a file" if path.is_dir() else f"no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    lines = [line.strip() for line in text.rstrip().split("\n")]
    for number, line in enumerate(lines, 1):
        if not line:
            raise ValueError(f"{path} is {'empty' if len(lines) == 1 else f'blank in line {number}'}")
    return lines


@cache
def imagenet_classnames() -> tuple[str, ...]:
    """OpenAI's names of ImageNet's 1,000 classes in label order. Two names occur twice: never key by name."""
    return tuple(read_lines(ASSETS / "imagenet_classnames.txt"))


@cache
def template_set(name: str) -> tuple[str, ...]:
    """The templates of a built-in set, one of `TEMPLATE_SETS`.

    Raises:
        ValueError: no such set.
    """
    if name == "simple":
        return ("a photo of a {c}.",)
    if name in _WITH_TEMPLATES:
        return tuple(_prompt_sets()["templates"][name])
    if name not in _TEMPLATE_FILES:
        raise ValueError(f"no template set {name!r}; built in are {', '.join(TEMPLATE_SETS)}")
    return tuple(read_lines(ASSETS / _TEMPLATE_FILES[name]))


def classname_set(name: str) -> tuple[str, ...]:
    """The names of a data set's classes in label order, one of `CLASSNAME_SETS`.

    Raises:
        ValueError: no such set.
    """
    if name == "imagenet":
        return imagenet_classnames()
    if name not in _WITH_CLASSNAMES:
        raise ValueError(f"no class names for {name!r}; built in are those of {', '.join(CLASSNAME_SETS)}")
    return tuple(_prompt_sets()["classnames"][name])


@cache
def _prompt_sets() -> dict[str, dict[str, list[str]]]:
    return json.loads((ASSETS / "prompt_sets.json").read_text(encoding="utf-8"))
