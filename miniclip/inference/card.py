"""A model card: what a model is, what it learnt from, how well it does and where its limits are, as a hub shows it.

Every sentence is made from what lies with the model: its config.json, the run that trained it, results.json of `eval`,
threshold.json of `calibrate`. What is not known is named as unknown, and no path of the machine is published.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import jinja2

from ..common.arguments import FLOAT32
from ..common.files import ASSETS
from ..common.storage import SCHEMES, is_url, without_secrets
from ..common.version import __version__
from ..common.wording import counted, cut_short, percent, some
from ..config import CLIPConfig
from ..evaluation.encoder import from_clip
from ..reports.results import prompts_of
from ..weights.load import load
from ..weights.read import locate, read_checkpoint
from ..weights.write import pixel_changes
from .origin import Origin, read_origin
from .thresholds import FILE as THRESHOLD_FILE

CARD_FILE = "README.md"
LIBRARIES = {"native": "miniclip", "openclip": "open_clip", "hf": "transformers"}
_MARK = re.compile(r"<!-- written by miniclip [^>]*: ([0-9a-f]{16}) -->\n")
_MARKDOWN_SIGNS = re.compile(r"[\\`*<&~|]|(?<!\w)_|_(?!\w)|(?<=\])\(")  # ](, because brackets alone are no link
_IMAGES_FOLDER = re.compile(r"(?<=') in .+?(?=, (?:not|captions) from)")  # that --images named
_USERS_FOLDER = re.compile(r"(?:[a-z]:)?[\\/]+(?:home|users)[\\/]+[^\\/]+|[\\/]root(?=[\\/]|$)|~[^\\/]*", re.I)
_RECIPE = {  # what a reader asks first, by its place in the settings
    "loss": "model.loss",
    "positives": "model.positives",
    "optimizer": "model.optimizer.kind",
    "learning rate": "model.optimizer.lr",
    "weight decay": "model.optimizer.weight_decay",
    "warm-up": "model.optimizer.warmup",
    "decay of averaged weights": "model.ema_decay",
    "locked": "model.locked",
    "distillation from": "model.teacher",
    "patch dropout": "model.patch_dropout",
    "augmentation, crop scale": "data.augmentation.scale",
    "augmentation, flip": "data.augmentation.flip",
    "seed": "seed_everything",
}


class Section(NamedTuple):
    """A part of the card: heading, a sentence, a table, and remarks. Empty parts are left out."""

    heading: str
    intro: str = ""
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# The card


def card_for(
    model: str | Path,
    repository: str = "owner/name",
    *,
    to: str = "native",
    results: Sequence[str | Path] = (),
    license: str | None = None,  # noqa: A002 (the hub's word)
    thumbnails: Sequence[str] = (),
    **hints: Any,
) -> str:
    """The card of a checkpoint and what lies with it.

    Args:
        model: as `miniclip.load` takes it.
        to, license, thumbnails: the `layout` and the others of `model_card`.
        results: as those of `read_origin`.
        hints: as `read_checkpoint` takes them.

    Raises:
        ValueError: the threshold was calibrated with other weights; or as `read_checkpoint` and `read_origin`.
    """
    config = read_checkpoint(locate(model), **hints).config
    origin = read_origin(model, results)
    if origin.threshold is not None:
        origin.threshold.check_model(from_clip(*load(model, device="cpu", **hints), str(model)))
    return model_card(origin, config, repository=repository, layout=to, license=license, thumbnails=thumbnails)


def model_card(
    origin: Origin,
    config: CLIPConfig,
    *,
    repository: str = "owner/name",
    layout: str = "native",
    license: str | None = None,  # noqa: A002 (the hub's word)
    thumbnails: Sequence[str] = (),
) -> str:
    """The README.md of a model's repository: YAML for the hub's search, then Markdown for people.

    Args:
        layout: of the files beside it, one of `LIBRARIES`.
        license: an identifier of the hub's, such as "mit"; the card says that none is stated if there is none.
        thumbnails: names of pictures in the repository.
    """
    changes = pixel_changes(config, layout)
    origin = replace(origin, threshold=None) if changes else origin  # `convert` leaves it out
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=False,  # Markdown, in which names are escaped by `plain`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = _markdown
    text = environment.get_template("model_card.md").render(
        title=origin.name,
        summary=_summary(origin, config),
        thumbnails=thumbnails,
        usage=_usage_lines(repository, layout, origin),
        sections=[section for section in _sections(origin, config, license, changes) if section.rows or section.notes],
    )
    body = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    mark = f"<!-- written by miniclip {__version__}: {_digest(body)} -->"
    return f"---\n{_metadata(origin, config, layout, license, thumbnails)}\n---\n{mark}\n\n{body}"


def is_untouched(card: str) -> bool:
    """Whether `model_card` wrote this text, and nobody has edited its body since."""
    found = _MARK.search(card)
    return found is not None and _digest(card[found.end() :]) == found[1]


def _digest(body: str) -> str:
    return hashlib.sha256(body.strip().encode()).hexdigest()[:16]


def _markdown(text: str) -> str:
    """A text in one line, in which nothing is Markdown, HTML or the end of a table's cell."""
    return _MARKDOWN_SIGNS.sub(r"\\\g<0>", " ".join(str(text).split()))


def _metadata(
    origin: Origin,
    config: CLIPConfig,
    layout: str,
    license: str | None,  # noqa: A002
    thumbnails: Sequence[str],
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    settings = (origin.settings or {}).get("model") or {}
    started = str(settings.get("start_from") or "")
    scores = [
        EvalResult(
            task_type=str(result["task"]).replace("zeroshot_classification", "zero-shot-image-classification"),
            dataset_type=_slug(_public(result["dataset"])),
            dataset_name=_public(result["dataset"]),
            metric_type="accuracy" if metric == "acc1" else metric,
            metric_name=metric,
            metric_args=_conditions(result) or None,
            metric_value=round(float(result["metrics"][metric]), 4),
        )
        for result in origin.results
        for metric in _headline(result)
    ]
    data = ModelCardData(
        license=license,
        library_name=LIBRARIES[layout],
        pipeline_tag="zero-shot-image-classification" if config.towers == "both" else "feature-extraction",
        tags=["clip", "contrastive", f"{config.vision.kind}-image-tower", "miniclip"],
        base_model=started.removeprefix("hf-hub:") if started.startswith("hf-hub:") else None,
        model_name=origin.name if scores else None,
        eval_results=scores or None,
        thumbnail=thumbnails[0] if thumbnails else None,
    )
    return data.to_yaml().strip()


def _conditions(result: Mapping[str, Any]) -> dict[str, Any]:
    """What sets scores apart that are of the same pictures, by name."""
    prompts = prompts_of(str(result.get("templates_from") or "")) if result.get("templates") else ""
    precision = result.get("precision", FLOAT32)
    return {
        **({"prompts": prompts} if prompts else {}),
        **({"upright": True} if result.get("upright") else {}),
        **({} if precision == FLOAT32 else {"precision": precision}),
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "data"


def _public(name: Any, most: int = 1) -> str:
    """The last parts of a path, at most so many: where data lie on the machine is nobody's business. A URL without its
    secrets; other names stay."""
    text = without_secrets(str(name))
    if text.lower().startswith("file:"):
        text = "/" + unquote(re.sub(r"^file:(//[^/]*)?/*", "", text, flags=re.I))
    elif is_url(text):
        return text if urlsplit(text).scheme in SCHEMES else f"{text.partition(':')[0]}:…"  # a program to run
    if not re.match(r"[/\\~.$%]|[a-z]:[/\\]", text, re.I):
        return text
    parts = re.split(r"[\\/]+", _USERS_FOLDER.sub("", text, 1) if _USERS_FOLDER.match(text) else text)
    return "/".join([part for part in parts if part not in ("", ".", "..", Path.home().name)][-most:]) or "…"


def _summary(origin: Origin, config: CLIPConfig) -> str:
    towers = {"both": "an image tower and a text tower", "image": "an image tower", "text": "a text tower"}
    trained = "" if origin.run is None or not (samples := _num_pairs(origin)) else f", trained on {samples:,} pairs"
    return (
        f"A CLIP model ([Radford et al. 2021](https://arxiv.org/abs/2103.00020)) with {towers[config.towers]}, for "
        f"pictures of {config.vision.image_size} × {config.vision.image_size} pixels and texts of up to "
        f"{config.text.context_length} tokens{trained}. It gives pictures and texts embeddings of "
        f"{config.embed_dim} numbers, whose cosine says how well they fit."
    )


def _usage_lines(repository: str, layout: str, origin: Origin) -> str:
    if layout == "hf":
        lines = [
            "from transformers import CLIPModel, CLIPProcessor",
            "",
            f'model = CLIPModel.from_pretrained("{repository}")',
        ]
        return "\n".join([*lines, f'processor = CLIPProcessor.from_pretrained("{repository}")'])
    if layout == "openclip":
        lines = [
            "import open_clip",
            "",
            f'model, preprocess = open_clip.create_model_from_pretrained("hf-hub:{repository}")',
        ]
        return "\n".join([*lines, f'tokenizer = open_clip.get_tokenizer("hf-hub:{repository}")'])
    labels: list[str] = next((each["classnames"] for each in origin.results if each.get("classnames")), [])
    # A comma parts labels, and a dash begins an option.
    labels = [text for text in map(str, labels) if text.isprintable() and "," not in text and not text.startswith("-")]
    listed = ",".join(labels[:3] or ["cat", "dog"])
    shown = shlex.quote(listed) if set(listed) & set('"$`\\!') else f'"{listed}"'
    return "\n".join(
        [
            "import miniclip",
            "",
            f'model, preprocess = miniclip.from_pretrained("{repository}")',
            "",
            "# or, in a shell:",
            f"# miniclip classify photo.jpg --model hf-hub:{repository} --labels {shown}",
        ]
    )


def _sections(
    origin: Origin,
    config: CLIPConfig,
    license: str | None,  # noqa: A002
    changes: Sequence[str],
) -> list[Section]:
    return [
        _architecture_section(config),
        _data_section(origin),
        _training_section(origin),
        _scores_section(origin),
        _calibration_section(origin),
        _limits_section(origin, config, license, changes),
    ]


def _architecture_section(config: CLIPConfig) -> Section:
    vision, text = config.vision, config.text
    kinds = {
        "vit": f"ViT, {vision.layers} layers of width {vision.width}, patches of {vision.patch_size}",
        "resnet": f"ResNet of CLIP's, blocks {', '.join(map(str, vision.blocks))}, width {vision.width}",
        "timm": f"{vision.timm_model} of timm's",
    }
    rows = [("image tower", kinds[vision.kind])] if config.towers != "text" else []
    rows += [("text tower", f"{text.layers} layers of width {text.width}")] if config.towers != "image" else []
    rows += [("embedding", str(config.embed_dim)), ("activation", config.activation)]
    return Section("Architecture", "", ("part", "what it is"), tuple(rows))


def _training_data(origin: Origin) -> list[Mapping[str, Any]]:
    """What the run recorded of each source when it read it. Nothing that lies there now is asked, as it may be other
    data; a run that recorded nothing has its sources' names in its settings."""
    assert origin.run is not None
    train = _setting(origin.settings or {}, "data.train") or []
    named = [{"source": each} for each in ([train] if isinstance(train, str) else train)]
    return list(origin.run.record.get("training_data") or named)


def _num_pairs(origin: Origin) -> int | None:
    data = [] if origin.run is None else _training_data(origin)
    return sum(facts["pairs"] for facts in data) if data and all("pairs" in facts for facts in data) else None


def _data_section(origin: Origin) -> Section:
    if origin.run is None:
        return Section("Data", notes=("What it was trained on is not recorded with these weights.",))
    data = _training_data(origin)
    rows = [
        (
            _public(facts["source"], 2),
            _IMAGES_FOLDER.sub("", str(facts.get("found", "unknown"))),
            *(f"{facts[name]:,}" if name in facts else "unknown" for name in ("pairs", "rejected")),
        )
        for facts in data
    ]
    notes = []
    if rejected := max(origin.run.values("train/rejected"), default=0.0):
        notes.append(f"{rejected:,.0f} samples could not be read while training, and were left out.")
    if truncated := max(origin.run.values("train/truncated"), default=0.0):
        notes.append(f"{truncated:,.0f} captions were longer than the context and were cut.")
    return Section("Data", "", ("source", "what was found", "pairs", "rejected"), tuple(rows), tuple(notes))


def _training_section(origin: Origin) -> Section:
    if origin.run is None or not origin.run.record:
        return Section("Training")
    record = origin.run.record
    seconds = sum(float(start.get("seconds", 0)) for start in origin.run.starts)
    rows = [
        ("steps", f"{record['step']:,} of {record['max_steps']:,} ({record['status']})"),
        ("batch size", f"{record['batch_size']:,} over {record.get('world_size', 1)} process(es)"),
        ("device", str(record["device"])),
        ("precision", str(record["precision"])),
        ("time", f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    for label, place in _RECIPE.items():
        value = _setting(origin.settings or {}, place)
        if value not in (None, "", "none") and (value or label == "seed"):
            rows.append((label, _public(value, 2)))
    best = origin.run.best()
    notes = [f"The best {_markdown(best[0])} was {best[2]:.4g}, after {best[1]:,} steps."] if best else []
    return Section("Training", "", ("setting", "value"), tuple(rows), tuple(notes))


def _word(name: str, value: Any) -> str:
    return name if value is True else f"{name} {value}"


def _setting(settings: Mapping[str, Any], place: str) -> Any:
    value: Any = settings
    for name in place.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _headline(result: Mapping[str, Any]) -> list[str]:
    """The metrics that have an interval; all, where none has."""
    with_interval = [name for name in result["intervals_95"] if result["metrics"].get(name) is not None]
    return with_interval or [name for name, value in result["metrics"].items() if value is not None]


def _scores_section(origin: Origin) -> Section:
    rows = []
    for result in origin.results:
        prompts, conditions = str(len(result.get("templates") or ()) or "–"), _conditions(result)
        if name := conditions.pop("prompts", ""):
            prompts = f"{prompts}, {name}"
        name = ", ".join([_public(result["dataset"]), *(_word(*each) for each in conditions.items())])
        for metric in _headline(result):
            interval = result["intervals_95"].get(metric)
            between = f"{interval[0]:.3f} – {interval[1]:.3f}" if interval else "–"
            rows.append((name, f"{result['num_images']:,}", prompts, metric,
                         f"{result['metrics'][metric]:.3f}", between))  # fmt: skip
    unreadable = sum(len(result["unreadable"]) for result in origin.results)
    notes = [f"Left out: {counted(unreadable, 'picture')} that could not be read."] if unreadable else []
    intro = (
        "Scores of `miniclip eval`, as shares of 1, with intervals of 95 %. No label of these sets was learnt from."
        if rows
        else ""
    )
    header = ("data", "images", "prompts", "measure", "score", "interval")
    return Section("Scores", intro, header, tuple(rows), tuple(notes))


def _calibration_section(origin: Origin) -> Section:
    if origin.threshold is None:
        return Section("None of these")
    text = str(replace(origin.threshold, source="")).replace("cosine ≥", "a cosine of at least", 1)
    return Section(
        "None of these",
        notes=(
            f"{THRESHOLD_FILE} rejects pictures of none of the classes: {_markdown(text)}.",
            "That holds for pictures like those it was calibrated on, and for its classes and prompts.",
        ),
    )


def _limits_section(
    origin: Origin,
    config: CLIPConfig,
    license: str | None,  # noqa: A002
    changes: Sequence[str],
) -> Section:
    notes = ["Probabilities are relative to the list of labels: some label always wins, even if none fits"]
    notes[0] += "." if origin.threshold is None else ", unless the threshold is applied."
    for result in origin.results:
        weakest = sorted(
            (each for each in result.get("per_class") or () if each.get("recall") is not None and each["recall"] < 0.9),
            key=lambda each: each["recall"],
        )
        if weakest:
            named = some([f"{each['class']} ({percent(each['recall'])} %)" for each in weakest], 5)
            where = "".join(
                [_public(result["dataset"]), *(f", {_word(*each)}" for each in _conditions(result).items())]
            )
            where = _markdown(where) + ("," if _conditions(result) else "")
            notes.append(f"On {where} it finds fewer than 90 % of: {_markdown(cut_short(named, 300))}.")
    if not origin.results:
        notes.append(
            "No scores are published with these weights: measure it on your own pictures before you rely on it."
        )
    notes.append(f"Texts are cut after {config.text.context_length} tokens, and pictures are seen at "
                 f"{config.vision.image_size} pixels: smaller detail is lost.")  # fmt: skip
    notes += [f"{change}. Training and scores are of the latter." for change in changes]
    if origin.run is not None:
        notes.append("It knows what its captions named. Words, styles and languages that they lack were never learnt.")
    notes.append("It repeats what its training data are biased to; it was not examined for that.")
    if license is None:
        notes.append("No license is stated.")
    return Section("Limits", notes=tuple(notes))
