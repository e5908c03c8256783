"""The pages of reference, made from what they describe: docstrings, parsers of the commands, keys of a training run."""

from __future__ import annotations

import importlib
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import miniclip
from miniclip.commands.main import VERBS, _train_parser

GROUPS = {
    "Models and weights": ["load", "save", "from_pretrained", "available_models", "CLIP", "CLIPConfig", "VisionConfig",
                           "TextConfig"],
    "Text and loss": ["tokenize", "clip_loss", "siglip_loss", "text_states"],
    "Use": ["zero_shot_classifier", "ZeroShotClassifier", "embed", "Index"],
    "open_clip's names": ["create_model_and_transforms", "get_tokenizer", "list_pretrained"],
}  # fmt: skip

# Keys whose help is Lightning's; empty ones are left out.
OF_LIGHTNING = {
    "ckpt_path": "A checkpoint to resume from; `last` is the run's own, and begins the run if there is none.",
    "weights_only": "",
    "config": "",
}


def write(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in {"api": api(), "commands": commands(), "settings": settings()}.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:  # an unchanged page is not built again
            path.write_text(text)


def api() -> str:
    """Every public name, from its docstring."""
    missing = set(miniclip._HOME) - {"__version__"} - {name for names in GROUPS.values() for name in names}
    assert not missing, f"give {', '.join(sorted(missing))} a group"
    lines = ["# Python", "", "Everything that `import miniclip` offers; names are imported when first used.", ""]
    for group, names in GROUPS.items():
        lines += [f"## {group}", ""]
        for name in names:
            home = f"miniclip.{miniclip._HOME[name]}"
            is_class = isinstance(getattr(miniclip, name), type)
            kind = "autoclass" if is_class else "autofunction"
            lines += ["```{eval-rst}", f".. py:currentmodule:: {home}", "", f".. {kind}:: {name}"]
            # scikit-learn's own methods, whose text is scikit-learn's
            options = ["   :members:", "   :exclude-members: set_score_request, set_fit_request", ""]
            lines += options if is_class else [""]
            lines += ["```", ""]
    return "\n".join(lines)


def commands() -> str:
    """Every verb's `--help`."""
    lines = ["# Commands", "", "What `miniclip VERB --help` prints, verb by verb.", ""]
    for verb, (file, purpose) in VERBS.items():
        parser = _train_parser() if verb == "train" else importlib.import_module(f"miniclip.commands.{file}").parser()
        lines += [f"## miniclip {verb}", "", purpose[0].upper() + purpose[1:] + ".", ""]
        lines += ["```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def settings() -> str:
    """Every key of a training run's YAML file."""
    lines = [
        "# Settings of a training run",
        "",
        "Every key of the YAML file; each is a flag as well: `model.optimizer.lr` is `--model.optimizer.lr 5e-4`.",
        "`miniclip train fit --print_config` prints all of them with their values. `trainer` has the arguments of",
        "PyTorch Lightning's `Trainer`; [training](../training.md#what-to-set) says which of them matter.",
        "",
    ]
    rows: dict[str, list[str]] = {"run": [], "model": [], "data": []}
    for action in _fit_parser()._actions:
        group = action.dest.split(".")[0] if "." in action.dest else "run"
        meaning = OF_LIGHTNING.get(action.dest, action.help)
        if group in rows and meaning and "SUPPRESS" not in f"{action.default}{meaning}":
            default = "empty" if action.default == "" else f"`{action.default}`"
            meaning = " ".join(meaning.split())
            text = f": {_kind(action)}, default {default}. {meaning[0].upper()}{meaning[1:]}"
            rows[group] += [f"`{action.dest}`", text, ""]
    for group, entries in rows.items():
        lines += [f"## {group}", "", *entries]
    return "\n".join(lines)


def _fit_parser() -> Any:
    """The parser of `miniclip train fit`, taken from the command line before it parses anything."""
    from miniclip.commands import train

    class ParserError(Exception):
        """Carries the parser out of the constructor, which would go on to train."""

    class Parsers(train.TrainingCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise ParserError(self._subcommand_parsers["fit"])

    try:
        Parsers(
            train.CLIPTraining,
            train.PairDataModule,
            args=["fit"],
            until_end=ExitStack(),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=train._Parser,
        )
    except ParserError as stopped:
        return stopped.args[0]


def _kind(action: object) -> str:
    kind = getattr(action, "_typehint", None) or getattr(action, "type", None)
    is_class = isinstance(kind, type) and not getattr(kind, "__args__", None)
    words = kind.__name__ if is_class else re.sub(r"(?:[A-Za-z_]+[.])+", "", str(kind))
    return f"`{words.replace('NoneType', 'None')}`"
