"""`miniclip calibrate MODEL`: a threshold for "none of these", and sets of classes, that travel with the model."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ...common.files import expand_home
from ...common.wording import percent
from ..evaluate import print_what_was_read
from ..terminal import (
    add_cache,
    add_encoding,
    add_reading,
    add_upright,
    lasting_imports,
    new_parser,
    progress_bar,
    refuse_bad_encoding,
)


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "calibrate",
        "Chooses the cosine below which an image is none of the classes, and writes it as threshold.json into the\n"
        "model's folder, where `classify` and `search` find it. It is chosen on one half of the images and tried on\n"
        "the other. Cuts for sets of classes that hold the true one as often as stated (conformal sets) are chosen\n"
        "likewise, for `classify --coverage`.\n\n"
        "MODEL and --data are as `miniclip eval` takes them; --outside is a plain folder of images, or any set:\n"
        "images of none of the classes, of the kind that you expect to meet. What is promised is promised of fresh\n"
        "images from the same sources, with the same classes and prompts, and of no others.",
        notes="A model that is not a folder (ViT-B/32, openclip:…, a file) needs --out FILE, which other verbs then\n"
        "take as --threshold FILE. The file is JSON, and has what it was calibrated with.",
        examples="""
miniclip calibrate runs/digits/best --data my_photos --outside street_scenes
miniclip calibrate runs/digits/best --data my_photos --outside street_scenes --false-acceptance 0.01 --overwrite
miniclip calibrate ViT-B/32 --data birds.csv --group-column photographer --outside other --out birds.json""",
    )
    parser.add_argument("model", metavar="MODEL", help="a model, as `miniclip eval --model` takes it")
    parser.add_argument("--data", required=True, metavar="DATA", help="labelled images of the classes")
    parser.add_argument("--outside", required=True, metavar="DATA", help="images of none of the classes")
    parser.add_argument(
        "--false-acceptance",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of fresh images of no class that may pass as one, above 0 and below 1",
    )
    parser.add_argument(
        "--coverage",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="of sets that hold the true class, one or several; default: 0.9 0.95 0.99, as far as images suffice",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="where to write it; default: threshold.json in the model's folder"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    parser.add_argument("--classnames", help='"imagenet", "mnist", …, or a file with one name a line, in label order')
    parser.add_argument(
        "--templates", metavar="SET", help='"simple", "imagenet80", …, or a file; default: those with the data'
    )
    add_reading(parser)
    add_encoding(parser)
    add_upright(parser)
    add_cache(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    refuse_bad_encoding(options)
    if options.outside == options.data:
        raise ValueError(f"--outside is {options.data}, as is --data; it must hold images of none of the classes")

    with lasting_imports():
        from ...evaluation.datasets.open import open_dataset, open_images
        from ...evaluation.datasets.sets import labelled
        from ...evaluation.features import open_cache
        from ...evaluation.other_libraries import open_model
        from ...inference.calibration import calibrate
        from ...inference.thresholds import refuse_unwritable, threshold_path, write_threshold

    data = open_dataset(
        options.data,
        options.classnames,
        options.templates,
        options.group_column,
        options.split,
        options.label_column,
        options.image_column,
        expand_home(options.root),
        options.download,
        task="classification",
    )
    outside = open_images(options.outside, options.group_column)
    data, outside = (replace(each, upright=options.upright) for each in (data, outside))
    model = open_model(options.model, options.device, options.precision)
    path = expand_home(options.out) if options.out else threshold_path(options.model)
    refuse_unwritable(path, options.overwrite)
    threshold, result = calibrate(
        model,
        labelled(data),
        outside,
        false_acceptance=options.false_acceptance,
        coverages=options.coverage,
        batch_size=options.batch_size,
        num_workers=options.workers,
        cache=open_cache(options.cache, not options.no_cache),
        progress=progress_bar,
    )
    write_threshold(path, threshold, options.overwrite)
    print_what_was_read([result])
    print(replace(threshold, source=str(path)))
    assert result.outside is not None
    auroc = percent(result.outside.separation.auroc)
    print(f"AUROC of the best cosine: {auroc} % (100 % separates the two sets without a mistake, 50 % not at all)")
    for coverage in threshold.coverages:
        print(coverage)
    if options.out:
        print(f"for other verbs: --threshold {path}")
