"""What the page answers: pictures and words in, HTML out. Whatever can be wrong with an input is a sentence, and what
the command line notes beside a result stands below it.

C classes.
"""

from __future__ import annotations

import base64
import html
import io
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...common.arguments import FLOAT32, shown
from ...common.pictures import shrunk, thumbnail
from ...common.storage import is_url
from ...common.wording import percent, printable
from ...data.reading.huggingface import HUB_PREFIX
from ...evaluation.datasets.sets import EvaluationSet
from ...evaluation.encoder import Encoder
from ...evaluation.prompts import suited
from ...evaluation.suite import CachedEncoder, silent
from ...images import open_image, orientation, turned, upright
from ..classify import Classes, Guesses, choose_classes, guess
from ..thresholds import ModelThreshold
from .limits import read_upload

if TYPE_CHECKING:
    from ..search.index import Hit, Index

MOST_CLASSES, MOST_PROMPTS, MOST_FOUND = 1000, 20, 60
MOST_CHOICES = 40  # of what is looked for in the picture
_BARS = 10  # bars
_FIELD = "the field of labels"
_FOUND_BOX = (200, 200)  # pixels
_MAP_SIDE = 448  # pixels, of the longer side
_CAUGHT: ContextVar[list[str] | None] = ContextVar("caught", default=None)  # warnings of the answer under way
Picture = bytes | Path | None


@dataclass(frozen=True)
class Answers:
    """A model, and what came with it.

    Args:
        encoder: the model.
        threshold: its threshold for "none of these".
        index: pictures to search.
        reports: pages of the model's run, by title.
        upright: pictures are turned as EXIF says that viewers show them.
    """

    encoder: Encoder
    threshold: ModelThreshold | None = None
    index: Index | None = None
    reports: tuple[tuple[str, Path], ...] = ()
    upright: bool = False

    @property
    def can_explain(self) -> bool:
        """Whether there are heat maps, which are gradients."""
        return self.encoder.precision == FLOAT32

    def guess(self, picture: Picture, labels: str) -> tuple[str, tuple[str, ...]]:
        """A bar for each of the nearest classes; and the classes, none where the question is wrong. They are in their
        own order, or the nearest first where there are more than `MOST_CHOICES`."""
        names: list[str] = []

        def bars() -> str:
            (guesses,) = self._guesses(picture, labels, [()])
            if self.threshold is not None:
                self.threshold.warn_if_other(guesses.classes.classnames, guesses.classes.templates, self.upright)
            classnames = guesses.classes.classnames
            is_long = len(classnames) > MOST_CHOICES
            names.extend([classnames[c] for c in guesses.ranked[0]] if is_long else classnames)
            return _bars(guesses, self.threshold)

        return _answered(bars), tuple(names)

    def _opened(self, picture: Picture) -> Image.Image:
        if picture is None:
            raise ValueError("there is no picture yet; drop one, or take one with the camera")
        try:
            data = read_upload(picture) if isinstance(picture, Path) else picture
        except FileNotFoundError as error:
            raise ValueError(
                "the picture is no longer here, as uploads are deleted after a while; drop it anew"
            ) from error
        image = open_image(data, "the picture")
        return upright(image) if self.upright else image

    def compare(self, picture: Picture, labels: str, templates: str) -> str:
        """A row for each template, and one for all of them together."""
        return _answered(lambda: self._compared(picture, labels, _template_lines(templates)))

    def _compared(self, picture: Picture, labels: str, templates: Sequence[str]) -> str:
        if not 1 <= len(templates) <= MOST_PROMPTS:
            raise ValueError(f"there are {len(templates)} templates; write one a line, 1 to {MOST_PROMPTS}")
        wordings: dict[str, tuple[str, ...]] = {template: (template,) for template in templates}
        if len(wordings) > 1:
            wordings[f"all {len(wordings)} together"] = tuple(wordings)
        found = self._guesses(picture, labels, list(wordings.values()))
        names = found[0].classes.classnames
        body = []
        for title, guesses in zip(wordings, found, strict=True):
            by_class = dict(zip(guesses.ranked[0].tolist(), guesses.probabilities[0].tolist(), strict=True))
            cells = [
                _td(f"{percent(by_class[c])} %", "best" if c == guesses.ranked[0, 0] else "") for c in range(len(names))
            ]
            body.append(f'<tr><th scope="row">{_text(title)}</th>{"".join(cells)}</tr>')
        header = "".join(f'<th scope="col">{_text(name)}</th>' for name in names)
        caption = "<caption>Probability of each label, by prompt</caption>"
        head = f'<thead><tr><th scope="col">prompt</th>{header}</tr></thead>'
        return f'<div class="wide"><table>{caption}{head}<tbody>{"".join(body)}</tbody></table></div>'

    def _guesses(self, picture: Picture, labels: str, wordings: Sequence[tuple[str, ...]]) -> list[Guesses]:
        """For each set of templates; an empty one stands for those of the threshold, or the default."""
        image = self._opened(picture)
        chosen = suited(
            choose_classes(_on_one_line(labels) or None, threshold=self.threshold, field=_FIELD), self.encoder.wordings
        )
        names = chosen.classnames
        if len(names) > MOST_CLASSES:
            raise ValueError(f"there are {len(names):,} labels; at most {MOST_CLASSES:,} are compared here")
        encoder = CachedEncoder(self.encoder, 1, 0, None, silent)
        images = encoder.images(EvaluationSet("the picture", [image], keys=["the picture"]))
        found = []
        for templates in wordings:
            classes = Classes(names, templates, "the page") if templates else chosen
            classifier = encoder.classifier(classes)
            guesses = guess(images, classes, classifier, encoder.logit_scale, len(names), self.threshold)
            for sentence in guesses.notes("the tab Compare prompts"):
                warnings.warn(sentence, stacklevel=2)
            found.append(guesses)
        return found

    # -----------------------------------------------------------------------------------------------------------------

    def heat_map(self, picture: Picture, text: str) -> str:
        """The picture with what speaks for the text in it, and the text with the words that matter."""
        return _answered(lambda: self._explained(picture, text.strip()))

    def _explained(self, picture: Picture, text: str) -> str:
        from ...reports.heat import overlay
        from ..explanation.explain import Explainer

        image = self._opened(picture)
        (explanation,) = Explainer(self.encoder)(image, [text])
        small = shrunk(image, _MAP_SIDE)
        heat = overlay(small, explanation.map.on_picture(small.size))
        shown = _data_url(turned(heat, orientation(image)))  # as the browser shows the picture beside it
        about = f"Heat map: what in the picture speaks for “{_text(text)}” (cosine {explanation.map.cosine:.3f})"
        most = max((abs(value) for value in explanation.words.relevances), default=0.0) or 1.0
        words = " ".join(
            f'<mark style="background:{_tint(value / most)}" title="{value:+.3f}">{_text(word.strip())}</mark>'
            for word, value in zip(explanation.words.words, explanation.words.relevances, strict=True)
        )
        return (
            f'<figure><img src="{shown}" alt="{about}"><figcaption>{about}. The words: {words}; the darker, the more '
            f"the cosine falls without it. {_text(str(explanation.map.deletion))}</figcaption></figure>"
        )

    # -----------------------------------------------------------------------------------------------------------------

    def search(self, words: str, num: Any) -> str:
        """The nearest pictures of the index."""
        return _answered(lambda: self._found(words.strip(), num))

    def _found(self, words: str, num: Any) -> str:
        if self.index is None:
            raise ValueError("there is no index; start the page with one: miniclip app MODEL INDEX")
        if not words:
            raise ValueError("there is nothing to search for; write some words")
        if num is None:
            raise ValueError(f"it is not said how many pictures to show; give a number from 1 to {MOST_FOUND}")
        if num not in range(1, MOST_FOUND + 1):
            raise ValueError(f"{shown(num)} pictures are asked for; give a number from 1 to {MOST_FOUND}")
        threshold = None if self.threshold is None else self.threshold.cosine
        hits = self.index.search(words, topk=int(num), threshold=threshold)
        if self.index.store.approximate is not None:
            warnings.warn(f"approximate, {self.index.store.approximate}", stacklevel=2)
        if not hits:
            nothing = (
                "The index is empty." if threshold is None else f"No picture reaches the threshold, {self.threshold}."
            )
            return f"<p>{_text(nothing)}</p>"
        if threshold is not None:
            warnings.warn(f"what is below the threshold is left out: {self.threshold}", stacklevel=2)
        return f'<ol class="found">{"".join(_hit(hit, self.index) for hit in hits)}</ol>'

    def report(self, title: str) -> str:
        """A page of the run, in a frame that can't reach this one."""
        return _answered(lambda: _framed(title, dict(self.reports)[title].read_text(encoding="utf-8")))


def _answered(answer: Callable[[], str]) -> str:
    """The answer, or the sentence that says what is wrong with the question; and what was warned of meanwhile."""
    _collect_warnings()
    caught: list[str] = []
    under_way = _CAUGHT.set(caught)
    try:
        shown = answer()
    except (ValueError, OSError, RuntimeError) as error:
        shown = wrong(str(error))
    except Exception as error:  # Gradio would leave the answer to another question in its place
        traceback.print_exc()
        shown = wrong(f"this could not be answered, by a mistake of the program: {type(error).__name__}: {error}")
    finally:
        _CAUGHT.reset(under_way)
    shown += "".join(f"<p>Note: {_text(sentence)}</p>" for sentence in dict.fromkeys(caught))
    return shown.encode("utf-8", "backslashreplace").decode()  # bytes of a file's name may be no UTF-8, and JSON is


def wrong(sentence: str) -> str:
    """What is shown in the place of an answer."""
    return f'<p role="alert" class="wrong">{_text(sentence)}</p>'


def _collect_warnings() -> None:
    """From now on warnings are of the answer under way in their thread, where there is one."""
    before: Any = warnings.showwarning
    if getattr(before, "is_collecting", False):
        return

    def show(message: Any, category: type[Warning], *place: Any) -> None:
        caught = _CAUGHT.get()
        if caught is None:
            before(message, category, *place)
        elif category is UserWarning:  # as on the command line, where others are for programmers
            caught.append(str(message))

    show.is_collecting = True  # type: ignore[attr-defined]
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = show  # type: ignore[assignment]  # other arguments are the place


def _framed(title: str, page: str) -> str:
    return f'<iframe title="{_text(title)}" sandbox="allow-scripts" srcdoc="{html.escape(page, quote=True)}"></iframe>'


def _on_one_line(labels: str) -> str:
    """Labels with commas between them, which may stand at the ends of lines, too; lists as JSON has them stay."""
    if labels.strip()[:1] in ("[", "{"):
        return labels
    *others, last = labels.split("\n")
    lines = [line.strip().removesuffix(",") for line in others] + [last.strip()]
    return ", ".join(line for line in lines if line)


def _template_lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _bars(guesses: Guesses, threshold: ModelThreshold | None) -> str:
    names, verdict = guesses.classes.classnames, guesses.label(0)
    rows: list[str] = []
    for c, probability, cosine in zip(
        guesses.ranked[0].tolist(), guesses.probabilities[0].tolist(), guesses.cosines[0].tolist(), strict=True
    ):
        if len(rows) == _BARS:
            break
        bar = f'<span class="bar" aria-hidden="true"><span style="width:{100 * probability:.1f}%"></span></span>'
        rows.append(
            f'<tr><th scope="row">{_text(names[c])}</th><td class="bars">{bar}</td>'
            f"<td>{percent(probability)} %</td><td>{cosine:.3f}</td></tr>"
        )
    more = f"<p>… and {len(names) - _BARS} more labels.</p>" if len(names) > _BARS else ""
    header = '<thead><tr><th scope="col">label</th><td></td><th scope="col">probability</th><th scope="col">cosine</th>'
    note = (
        "Probabilities are relative to these labels: a picture of something else goes to one of them, too."
        if threshold is None
        else f"One of the labels is a picture with {threshold}."
    )
    title = f'<p class="verdict" role="status">{_text(verdict)}</p>'
    return f"{title}<table>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}<p>{_text(note)}</p>"


def _hit(hit: Hit, index: Index) -> str:
    from ..search.index import CHANGED

    name, place = _text(hit.key.rpartition("/")[2]), hit.path or hit.source
    note = ""
    try:
        if is_url(place) or place.startswith(HUB_PREFIX):
            raise ValueError(f"{hit.key} is at an address, and this page asks no other host")
        picture = f'<img src="{thumbnail(index.open(hit), _FOUND_BOX)}" alt="{name}" loading="lazy">'
        note = f"<br>{CHANGED}" if index.has_changed(hit) else ""
    except (ValueError, OSError) as error:
        picture = f"<span>{_text(str(error))}</span>"
    caption = f'<figcaption title="{_text(hit.key)}">{name}<br>{hit.cosine:.3f}{note}</figcaption>'
    return f"<li><figure>{picture}{caption}</figure></li>"


def _td(text: str, kind: str) -> str:
    return f'<td class="{kind}">{_text(text)}</td>' if kind else f"<td>{_text(text)}</td>"


def _text(text: str) -> str:
    return html.escape(printable(text), quote=True)


def _tint(share: float) -> str:
    """Of a word: orange for what raises the cosine, blue for what lowers it; pale enough to read black on it."""
    return f"rgba({'230,120,0' if share > 0 else '0,110,200'},{0.55 * abs(share):.2f})"


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "jpeg", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
