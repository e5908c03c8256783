"""Sets that torchvision knows, with its names and splits."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.wording import some
from ...images import run_no_program
from ..prompts import CLASSNAME_SETS, DefaultTemplates, classname_set, template_set
from .folders_and_tables import readable_sources
from .sets import Found

TORCHVISION_PREFIX = "torchvision:"
TORCHVISION_SETS = (
    "CIFAR10", "CIFAR100", "Caltech101", "Caltech256", "Country211", "DTD", "EuroSAT", "FER2013", "FGVCAircraft",
    "FashionMNIST", "Flowers102", "Food101", "GTSRB", "ImageNet", "Imagenette", "KMNIST", "MNIST", "OxfordIIITPet",
    "PCAM", "RenderedSST2", "STL10", "SUN397", "SVHN", "StanfordCars", "USPS",
)  # fmt: skip
# What the built-in prompts, and names where torchvision has none in words, are called: those of the paper.
_PAPERS_NAMES = {
    "CIFAR10": "cifar10", "CIFAR100": "cifar100", "Caltech101": "caltech101", "Country211": "country211", "DTD": "dtd",
    "EuroSAT": "eurosat", "FER2013": "fer2013", "FGVCAircraft": "fgvc_aircraft", "Flowers102": "flowers",
    "Food101": "food101", "GTSRB": "gtsrb", "ImageNet": "imagenet", "MNIST": "mnist", "OxfordIIITPet": "pets",
    "PCAM": "pcam", "RenderedSST2": "renderedsst2", "STL10": "stl10", "SUN397": "sun397", "SVHN": "svhn",
    "StanfordCars": "cars",
}  # fmt: skip
_NAMED_BY_TORCHVISION = ("Caltech101", "OxfordIIITPet")  # the first has one class less than the paper's
_COUNTRIES = """
AD AE AF AG AI AL AM AO AQ AR AT AU AW AX AZ BA BB BD BE BF BG BH BJ BM BN BO BQ BR BS BT BW BY BZ CA CD CF CH CI CK
CL CM CN CO CR CU CV CW CY CZ DE DK DM DO DZ EC EE EG ES ET FI FJ FK FO FR GA GB GD GE GF GG GH GI GL GM GP GR GS GT
GU GY HK HN HR HT HU ID IE IL IM IN IQ IR IS IT JE JM JO JP KE KG KH KN KP KR KW KY KZ LA LB LC LI LK LR LT LU LV LY
MA MC MD ME MF MG MK ML MM MN MO MQ MR MT MU MV MW MX MY MZ NA NC NG NI NL NO NP NZ OM PA PE PF PG PH PK PL PR PS PT
PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SS SV SX SY SZ TG TH TJ TL TM TN TO TR TT TW TZ UA
UG US UY UZ VA VE VG VI VN VU WS XK YE ZA ZM ZW
"""
# The folders of classes in the order of the built-in names, where torchvision numbers those that lie there.
CLASS_FOLDERS = {
    "EuroSAT": (
        "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
        "Residential", "River", "SeaLake",
    ),
    "Country211": tuple(_COUNTRIES.split()),
    "GTSRB": tuple(f"{label:05d}" for label in range(43)),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# torchvision's


def read_torchvision(source: str, root: Path, split: str | None, download: bool) -> Found:
    """A classification set of torchvision's.

    Some of those files are pickles (CIFAR's); torchvision compares them with its checksums before it opens them.
    """
    name = source.removeprefix(TORCHVISION_PREFIX)
    if name not in TORCHVISION_SETS:
        near = difflib.get_close_matches(name.lower(), [known.lower() for known in TORCHVISION_SETS], n=1)
        meant = [f" (is {known} meant?)" for known in TORCHVISION_SETS if [known.lower()] == near]
        raise ValueError(
            f"torchvision has no classification set {name!r}{''.join(meant)}; there are {', '.join(TORCHVISION_SETS)}"
        )
    from torchvision import datasets

    kind = getattr(datasets, name)
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {}
    if "split" in parameters:
        split = split or ("val" if name in ("ImageNet", "Imagenette") else "test")
        options["split"] = split
    elif "train" in parameters:
        split = split or "test"
        if split not in ("train", "test"):
            raise ValueError(f"torchvision's {name} has no split {split!r}; valid are train, test")
        options["train"] = split == "train"
    elif split:
        raise ValueError(f"torchvision's {name} comes in one piece, so --split {split} can't be followed")
    if "download" in parameters:
        options["download"] = download
    elif download:
        raise ValueError(f"torchvision can't download {name}; put its files into {root}")
    try:
        data = kind(root, **options)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        hint = "" if download or "download" not in parameters else "; --download lets torchvision fetch it there"
        raise ValueError(
            f"torchvision's {name} can't be had from {root} ({' '.join(str(error).split())}). --root names the folder "
            f"that it is in{hint}"
        ) from error
    own = next((found for a in ("classes", "categories") if (found := getattr(data, a, None)) is not None), None)
    classnames, names_from = None, "torchvision"
    built_in = _PAPERS_NAMES.get(name)
    if built_in in CLASSNAME_SETS and name not in _NAMED_BY_TORCHVISION:
        _refuse_other_folders(name, data, root)
        classnames, names_from = classname_set(built_in), f"the built-in {built_in!r}"
    elif own is not None:  # of several names for a class, the first
        classnames = readable_sources(each if isinstance(each, str) else each[0] for each in own)
    part = f"{name}/{split}" if split else name
    wordings = "imagenet80" if name == "ImageNet" else built_in
    return Found(
        name,
        _Pictures(data),
        [f"{part}/{index}" for index in range(len(data))],
        labels=[str(label) for label in _torchvision_labels(data)],
        labels_from="torchvision",
        classnames=classnames,
        classnames_from="" if classnames is None else names_from,
        templates=DefaultTemplates(template_set(wordings)) if wordings else None,
        templates_from=f"the built-in set {wordings!r}" if wordings else "",
        identity=f"{part} of {len(data)} in {root.resolve()}",  # its sets never change
    )


def _refuse_other_folders(name: str, data: Any, root: Path) -> None:
    """Built-in names are by position, and torchvision numbers the folders that lie there: all of them must, and no
    other."""
    from torchvision.datasets import GTSRB, ImageFolder, ImageNet
    from torchvision.datasets.folder import find_classes
    from torchvision.datasets.imagenet import load_meta_file

    if isinstance(data, ImageFolder):
        known = sorted(load_meta_file(data.root)[0]) if isinstance(data, ImageNet) else CLASS_FOLDERS[name]
        there = data.wnids if isinstance(data, ImageNet) else data.classes
    elif isinstance(data, GTSRB) and data._split == "train":  # the labels of the other part are in its table
        known, there = CLASS_FOLDERS[name], find_classes(data._target_folder)[0]
    else:
        return
    missing, unknown = sorted(set(known) - set(there)), sorted(set(there) - set(known))
    if missing or unknown:
        wrong = [f"without {some(missing)}"] if missing else []
        wrong += [f"with {some(unknown)}, no class of its"] if unknown else []
        raise ValueError(
            f"torchvision's {name} in {root} is a part of it or another set: {len(there)} class folders, "
            f"{', and '.join(wrong)}. Its labels count all {len(known)}; to evaluate on the folders that are there, "
            "name the folder that they lie in as DATA"
        )


class _Pictures(Sequence[Any]):
    """The pictures of a set, which torchvision itself opens."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: Any) -> Any:
        run_no_program()  # here, as workers call it too
        return self.data[number][0]


def _torchvision_labels(data: Any) -> list[int]:
    """Its names for them differ; where it has none, each image is opened to learn its label."""
    for attribute in ("targets", "labels", "_labels", "y"):
        if (labels := getattr(data, attribute, None)) is not None:
            return [int(label) for label in labels]
    if (samples := getattr(data, "_samples", None)) is not None:
        return [int(label) for _, label in samples]
    return [int(data[index][1]) for index in range(len(data))]
