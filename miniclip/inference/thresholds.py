""" "None of these" that travels with a model: threshold.json in its folder, written once and applied by every verb.

`miniclip calibrate` (and `eval --save-threshold`) writes it, `find_threshold` finds it, `ModelThreshold` applies it. It
knows the model by what that makes of a picture and a text, so that a threshold of other weights is refused.

N images, C classes, E embedding.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch.nn.functional as F

from ..common.arguments import FLOAT32
from ..common.files import expand_home, write_text
from ..common.version import __version__
from ..common.wording import cut_short, some
from ..evaluation.datasets.class_folders import NONE
from ..evaluation.encoder import Encoder
from ..evaluation.fingerprints import probe_pictures
from ..evaluation.measures.conformal import Coverage, is_in_set, surprisals
from ..evaluation.prompts import Prompts, class_prompts
from ..weights.download import HUB_PREFIX, fetch_hub
from ..weights.folders import THRESHOLD_FILE

FILE = THRESHOLD_FILE
_FILE_SCHEMA = 1
_BY_HAND = "given by hand"
_FOLDER_PREFIXES = ("transformers:", "openclip:local-dir:")
_PROBE_TEXT = "a photo of a cat."  # short enough for every context
# Unit features of one picture by one model differ by less than the first where only the machine or the library is
# another, and by less than the second where weights are rounded to bfloat16.
_SAME_FEATURES, _LIKE_FEATURES = 0.005, 0.05


@dataclass(frozen=True)
class Tried:
    """Images that a threshold was chosen and tried on.

    Args:
        name: of the data set.
        num_chosen, num_tried: images of the half that it was chosen on, and of the other half.
        accepted: the share of the latter that it accepts as one of the classes.
        interval: its 95 % interval.
    """

    name: str
    num_chosen: int
    num_tried: int
    accepted: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class CalibratedModel:
    """What the model of a threshold can be recognised by.

    Args:
        name, library: as reports have them; of a path the last two parts, as the file may be published.
        logit_scale: what multiplied cosines for probabilities.
        image_probe, text_probe: (E,) unit features of a fixed picture and text.
        precision: of its products.
    """

    name: str
    library: str
    logit_scale: float
    image_probe: tuple[float, ...]
    text_probe: tuple[float, ...]
    precision: str = FLOAT32

    @classmethod
    def of(cls, encoder: Encoder) -> CalibratedModel:
        image = encoder.encode_image(encoder.preprocess(probe_pictures()[0])[None])
        text = encoder.encode_text(encoder.tokenize([_PROBE_TEXT]))
        probes = [F.normalize(each.detach().float(), dim=-1)[0].cpu().tolist() for each in (image, text)]
        first, second = (tuple(round(value, 5) for value in each) for each in probes)
        path = Path(encoder.name)
        name = "/".join(path.absolute().parts[-2:]) if path.exists() else encoder.name
        scale = float(encoder.logit_scale.detach().exp())
        return cls(name, encoder.library, scale, first, second, encoder.precision)

    def distance(self, other: CalibratedModel) -> float:
        """Between features of the same picture, or of the same text, whichever is larger; infinite for other widths."""
        pairs = (self.image_probe, other.image_probe), (self.text_probe, other.text_probe)
        return max(math.dist(*pair) if len(pair[0]) == len(pair[1]) else math.inf for pair in pairs)


@dataclass(frozen=True)
class ModelThreshold:
    """An image whose best cosine is below `cosine` is none of the classes.

    All but the first two are unknown of a number that was given by hand.

    Args:
        rule: how it was chosen, in words.
        source: the file that it was read from.
        false_acceptance: the share of fresh outside images that it was calibrated to accept at most; None if it was
            chosen to balance both mistakes.
        inside, outside: images of the classes, and of none.
        classnames, templates: C names and their prompts, as those of `LabelledImages`.
        coverages: sets of classes that were calibrated.
        model: whose cosines they were.
        upright: images were turned as EXIF says.
        written: when, and by which version.
    """

    cosine: float
    rule: str
    source: str = ""
    false_acceptance: float | None = None
    inside: Tried | None = None
    outside: Tried | None = None
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] | dict[str, tuple[str, ...]] | None = None
    coverages: tuple[Coverage, ...] = ()
    model: CalibratedModel | None = None
    upright: bool = False
    written: str = ""

    def __str__(self) -> str:
        """In words: the number, where it comes from, and what it was seen to do."""
        text = f"cosine ≥ {self.cosine:.4f}, {self.rule}"
        if self.inside is None or self.outside is None:
            return text
        low, high = (100 * end for end in self.outside.interval)
        return (
            f"{text} ({self.source or FILE}); of images held out it accepts {100 * self.inside.accepted:.1f} % of "
            f"{self.inside.num_tried} of {self.inside.name} and {100 * self.outside.accepted:.1f} % of "
            f"{self.outside.num_tried} of {self.outside.name}, which are none of the classes ({low:.1f} – {high:.1f} %)"
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Applied

    def rejects(self, cosines: Any) -> np.ndarray:
        """(N,) whether each image is none of the classes.

        Args:
            cosines: (N, C) of images and classes, or (N,) the best of each image.

        Raises:
            ValueError: another shape, or cosines that are not finite.
        """
        values = np.asarray(cosines, dtype=np.float64)
        if values.ndim not in (1, 2) or 0 in values.shape[1:]:
            raise ValueError(f"cosines have shape (N, C), or (N,) for the best ones; these have {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("some cosines are not finite; none can be compared with a threshold")
        return (values.max(axis=1) if values.ndim == 2 else values) < self.cosine

    def sets(self, cosines: Any, coverage: float) -> np.ndarray:
        """(N, C) the classes of each image's set, which holds the true one in at least a share `coverage` of images.

        The promise is for images of the classes, from where the calibration images came.

        Args:
            cosines: (N, C) of images and classes, those of the calibration and in any order.

        Raises:
            ValueError: sets of this coverage, or of this number of classes, were not calibrated.
        """
        found = next((each for each in self.coverages if math.isclose(each.coverage, coverage)), None)
        if found is None or self.model is None:
            known = [each.coverage for each in self.coverages]
            has = ", ".join(f"{each:g}" for each in known) or "none"
            every = " ".join(f"{each:g}" for each in sorted([*known, coverage])) + " --overwrite" * bool(self.source)
            raise ValueError(
                f"sets of coverage {coverage:g} were not calibrated; {self.source or 'a threshold given by hand'} has "
                f"{has}; `miniclip calibrate … --coverage {every}` calibrates these"
            )
        values = np.asarray(cosines)
        if values.ndim != 2 or values.shape[1] != len(self.classnames):
            raise ValueError(
                f"sets of classes were calibrated for {len(self.classnames)} classes, so cosines have shape "
                f"(N, {len(self.classnames)}); these have {values.shape}"
            )
        return is_in_set(surprisals(values, self.model.logit_scale), found.cut, self.model.logit_scale)

    def templates_for(self, classnames: Iterable[str]) -> Prompts | None:
        """The prompts of the calibration; None if it has none, or not for all of these classes."""
        is_whole = not isinstance(self.templates, Mapping) or self.templates.keys() >= set(classnames)
        return self.templates if is_whole else None

    # -----------------------------------------------------------------------------------------------------------------
    # Does it belong here?

    def check_model(self, encoder: Encoder) -> None:
        """Compares what the model makes of a picture and a text with what the calibrated one made of them.

        Warns where they differ by no more than a lower precision explains.

        Raises:
            ValueError: they differ by more; the threshold is another model's.
        """
        if self.model is None:
            return
        distance = self.model.distance(CalibratedModel.of(encoder))
        file = self.source or FILE
        if not distance <= _LIKE_FEATURES:
            raise ValueError(
                f"{file} was calibrated with other weights or other preprocessing than {encoder.name} has now (with "
                f"{self.model.name}, {self.written}); run `miniclip calibrate` again, delete the file, or give a number"
            )
        if distance > _SAME_FEATURES or self.model.precision != encoder.precision:
            warnings.warn(
                f"{encoder.name} (in {encoder.precision}) gives slightly other features than when {file} was "
                f"calibrated (in {self.model.precision}), as another precision does; its promise holds only roughly",
                stacklevel=2,
            )

    def warn_if_other(self, classnames: Sequence[str], templates: Prompts, upright: bool = False) -> None:
        """Warns, in one sentence, where classes, prompts, or how images are opened are not those of the calibration."""
        if difference := self.difference(classnames, templates, upright):
            warnings.warn(
                f"{self.source or FILE} was calibrated with {difference}; what it promises is for those alone",
                stacklevel=2,
            )

    def difference(self, classnames: Sequence[str], templates: Prompts, upright: bool = False) -> str:
        """How the calibration's classes, prompts and images differ from these, in words; empty if they do not."""
        if self.templates is None:
            return ""
        if self.upright != upright:
            was, is_now = ("upright", "as they are stored")[:: 1 if self.upright else -1]
            return f"images read {was}, and now they are read {is_now}"
        if set(self.classnames) != set(classnames):
            return f"{_counted(self.classnames)}, and now there are {_counted(classnames)}"
        for name in classnames:
            before, now = class_prompts(self.templates, name), class_prompts(templates, name)
            if set(before) != set(now):
                before, now = ([repr(text) for text in texts] for texts in (before, now))
                return f"other prompts: {name!r} had {some(before, 2)}, and now has {some(now, 2)}"
        return ""


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({some([repr(name) for name in names], 3)})"


def refuse_class_called_none(classnames: Sequence[str]) -> None:
    """Raises ValueError if a class has the name of what is below the threshold."""
    if NONE in classnames:
        raise ValueError(
            f"a class is called {NONE!r}, which is what a picture below the threshold is called; rename it"
        )


def plain_templates(classnames: Sequence[str], templates: Prompts) -> tuple[str, ...] | dict[str, tuple[str, ...]]:
    """Prompts as a file can have them: functions are replaced by what they make of each class."""
    texts = [] if isinstance(templates, Mapping) else [each for each in templates if isinstance(each, str)]
    if texts and len(texts) == len(templates):
        return tuple(texts)
    return {name: tuple(class_prompts(templates, name)) for name in classnames}


# ---------------------------------------------------------------------------------------------------------------------
# Found


def find_threshold(model: str, given: str | Path | float | None = None) -> ModelThreshold | None:
    """The threshold of a model that a command line names.

    Args:
        model: as `open_model` takes it.
        given: a cosine or a file, as `--threshold` has it; by default threshold.json of the model's folder, if the
            model is a folder and has one, or of the hub's repository, which is fetched as `load` fetches it.

    Raises:
        ValueError: `given` is no cosine and no such file; or as `read_threshold` and `fetch_hub`.
    """
    if given is None:
        folder = fetch_hub(model) if model.startswith(HUB_PREFIX) else model_folder(model)
        return read_threshold(folder / FILE) if folder is not None and (folder / FILE).is_file() else None
    try:
        cosine = float(str(given))
    except ValueError:
        path = expand_home(str(given))
        return read_threshold(path / FILE if path.is_dir() else path)
    if not -1 <= cosine <= 1:
        raise ValueError(f"threshold {given} is no cosine; it must be from -1 to 1, or a file that calibrate wrote")
    return ModelThreshold(cosine, _BY_HAND)


def threshold_path(model: str) -> Path:
    """Where the threshold of a model belongs.

    Raises:
        ValueError: the model is no folder.
    """
    folder = model_folder(model)
    if folder is None:
        raise ValueError(
            f"model {model!r} is no folder that {FILE} could lie in; name a file with --out FILE, and give it to other "
            "verbs with --threshold FILE"
        )
    return folder / FILE


def model_folder(model: str) -> Path | None:
    """The folder that a model's name stands for; None for a file or for a name of a library's.

    >>> model_folder("ViT-B/32"), model_folder("openclip:ViT-B-32/openai")
    (None, None)
    """
    prefix = next((each for each in _FOLDER_PREFIXES if model.startswith(each)), "")
    name = model.removeprefix(prefix)
    return Path(name) if name and Path(name).is_dir() else None


# ---------------------------------------------------------------------------------------------------------------------
# The file


def write_threshold(path: str | Path, threshold: ModelThreshold, overwrite: bool = False) -> None:
    """Writes threshold.json, whole or not at all.

    Raises:
        ValueError: the file is there, and `overwrite` is False.
    """
    path = Path(path)
    refuse_unwritable(path, overwrite)
    values = {"schema": _FILE_SCHEMA, **asdict(threshold)}
    del values["source"]
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def refuse_unwritable(path: Path, overwrite: bool) -> None:
    """Raises a ValueError, or an OSError, if a threshold can't be written there; makes the folder."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a threshold is a file, such as {path / FILE}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already; pass --overwrite to replace it, or name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} can't be written to; name a file elsewhere for the threshold")


def read_threshold(path: str | Path) -> ModelThreshold:
    """What `write_threshold` wrote.

    Raises:
        ValueError: no such file, not a threshold's, damaged, or of a later version; names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"threshold {str(path)!r} is no file and no number; `miniclip calibrate` writes such a file")
    try:
        values = json.loads(path.read_bytes())
        if values["schema"] != _FILE_SCHEMA:
            raise ValueError(f"its schema is {values['schema']!r}, and miniclip {__version__} reads {_FILE_SCHEMA}")
        del values["schema"]
        return _from_json(ModelThreshold, values | {"source": str(path)}, "")
    except (ValueError, TypeError, KeyError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a threshold that miniclip calibrate wrote: {what}") from error


def _from_json(kind: Any, value: Any, name: str) -> Any:
    """A value of JSON as an annotation has it: lists become tuples, and mappings records.

    Raises:
        ValueError: it is something else; names it.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    is_mapping = isinstance(value, dict)
    if origin is UnionType:
        if value is None:
            return None
        kind = next(each for each in arguments if (is_dataclass(each) or get_origin(each) is dict) == is_mapping)
        return _from_json(kind, value, name)
    if is_mapping and is_dataclass(kind):
        kinds, record = get_type_hints(kind), cast(Any, kind)
        if unknown := sorted(value.keys() - kinds.keys()):
            raise ValueError(f"it has {unknown[0]!r}, which means nothing here")
        return record(**{key: _from_json(kinds[key], each, key) for key, each in value.items()})
    if is_mapping and origin is dict:
        return {key: _from_json(arguments[1], each, name) for key, each in value.items()}
    if isinstance(value, list) and origin is tuple:
        return tuple(_from_json(arguments[0], each, name) for each in value)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    raise ValueError(f"its {name} is {cut_short(repr(value), 60)}")
