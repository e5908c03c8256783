"""The page itself: fields and buttons of Gradio's around `Answers`, served on the loopback.

Gradio may neither count visits, nor fetch fonts, nor open a picture by itself: a picture is opened by `open_image`
alone, which has a closed list of formats.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .answers import MOST_CHOICES, MOST_FOUND, Answers, wrong
from .limits import LOOPBACK, UPLOAD_MB, Limits, own_upload

_KEPT_S = 600  # how long an upload stays, and how often old ones are looked for
STYLE = Path(__file__).parents[2] / "assets" / "app.css"
# Set before Gradio is imported: no visits counted, nothing looked up on the hub.
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SSR_MODE": "False"}


def build(answers: Answers, title: str) -> Any:
    """Gradio's Blocks with a tab for each question that `answers` can answer."""
    os.environ.update(_QUIET)
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError("the page needs Gradio: pip install 'miniclip[app]'") from error

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_KEPT_S, _KEPT_S)) as blocks:
        gr.HTML(f"<h1>{title}</h1>")
        with gr.Tabs():
            with gr.Tab("Classify"):
                _classify_tab(gr, answers)
            with gr.Tab("Compare prompts"):
                _prompts_tab(gr, answers)
            if answers.index is not None:
                with gr.Tab("Search"):
                    _search_tab(gr, answers)
            for name, _ in answers.reports:
                with gr.Tab(name) as tab:
                    shown = gr.HTML()
                    tab.select(lambda name=name: answers.report(name), None, shown, api_visibility="private")
    for block in blocks.blocks.values():
        _fetch_nothing(block)
    blocks.queue(max_size=32, default_concurrency_limit=2, api_open=False)
    return blocks


def _classify_tab(gr: Any, answers: Answers) -> None:
    with gr.Row():
        with gr.Column():
            image = _picture_field(gr, "picture")
            labels = gr.Textbox(
                label="Labels, with commas between them", value=_first_labels(answers), max_lines=4, elem_id="labels"
            )
            button = gr.Button("Classify", variant="primary", elem_id="classify")
        with gr.Column():
            bars = gr.HTML(elem_id="bars")
            word = gr.Radio([], label="Show what in the picture speaks for", visible=False, elem_id="words")
            heat = gr.HTML(elem_id="heat")

    def classify(path: Path | None, names: str) -> tuple[Any, Any, str]:
        shown, classnames = answers.guess(path, names)
        choices = _choices(classnames)
        offered, num_others = choices[:MOST_CHOICES], len(choices) - MOST_CHOICES
        info = f"left out here: {num_others:,} more labels, or words of labels" if num_others > 0 else ""
        return shown, gr.Radio(offered, value=None, visible=bool(choices) and answers.can_explain, info=info), ""

    def explain(path: Path | None, text: str | None) -> str:
        return answers.heat_map(path, text) if text else ""

    for event in (button.click, labels.submit):
        _ask(event, classify, [image, labels], [bars, word, heat])
    _ask(word.change, explain, [image, word], [heat])
    _clear(image.change, lambda: ("", gr.Radio([], value=None, visible=False), ""), [bars, word, heat])


def _picture_field(gr: Any, name: str) -> Any:
    """A field whose value is the path of an upload: Gradio's own would open it with any decoder that Pillow has."""
    field = gr.Image(label="Picture", sources=["upload", "webcam", "clipboard"], buttons=[], height=260, elem_id=name)

    def upload(payload: Any) -> Path | None:
        if payload is None or payload.path is None:
            return None
        try:
            return own_upload(payload.path, field.GRADIO_CACHE)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    field.preprocess = upload
    return field


def _fetch_nothing(block: Any) -> None:
    """A client may write the address of a file into any field, and Gradio would fetch it."""
    move = block.async_move_resource_to_block_cache

    async def move_upload(path: Any) -> Any:
        if "://" in str(path):
            raise ValueError("a picture is uploaded, not fetched from an address")
        return await move(path)

    block.async_move_resource_to_block_cache = move_upload


def _prompts_tab(gr: Any, answers: Answers) -> None:
    with gr.Row():
        with gr.Column():
            image = _picture_field(gr, "picture-2")
            labels = gr.Textbox(label="Labels, with commas between them", value=_first_labels(answers))
            own = answers.encoder.wordings
            lines = "\n".join(
                [*([] if own is None else own.templates()[:3]), "a photo of a {}.", "a drawing of a {}.", "{}"]
            )
            templates = gr.Textbox(
                label="Prompts, one a line; {} is the label", value=lines, lines=4, elem_id="prompts"
            )
            button = gr.Button("Compare", variant="primary", elem_id="compare")
        with gr.Column():
            table = gr.HTML(elem_id="table")

    def compare(path: Path | None, names: str, wordings: str) -> str:
        return answers.compare(path, names, wordings)

    _ask(button.click, compare, [image, labels, templates], [table])
    _clear(image.change, lambda: "", [table])


def _search_tab(gr: Any, answers: Answers) -> None:
    with gr.Row():
        words = gr.Textbox(label="Words", placeholder="a red car", elem_id="query", scale=4)
        num = gr.Slider(1, MOST_FOUND, value=12, step=1, label="Pictures")
        num.preprocess = lambda payload: payload  # `search` says what is wrong with it; Gradio's own would fail
    button = gr.Button("Search", variant="primary", elem_id="search")
    found = gr.HTML(elem_id="found")
    for event in (button.click, words.submit):
        _ask(event, answers.search, [words, num], [found])


def _ask(event: Any, answer: Callable[..., Any], fields: Sequence[Any], places: Sequence[Any]) -> None:
    """Answers an event; what Gradio itself refuses leaves no answer to another question in its place."""
    failed = wrong("this could not be answered; the page says why, or is no longer there")
    asked = event(answer, fields, places, api_visibility="private")
    _clear(asked.failure, lambda: [failed, *[None] * (len(places) - 1)] if places[1:] else failed, places)


def _clear(event: Any, values: Callable[[], Any], places: Sequence[Any]) -> None:
    """At once, while answers may be under way."""
    event(values, None, places, queue=False, api_visibility="private", show_progress="hidden")


def _first_labels(answers: Answers) -> str:
    names = () if answers.threshold is None else answers.threshold.classnames
    return ", ".join(f'"{name}"' if "," in name else name for name in names) or "cat, dog"


def _choices(classnames: Sequence[str]) -> list[str]:
    """What can be asked for in the picture: each label, and each of its words."""
    words = [word for name in classnames for word in name.split()]
    return list(dict.fromkeys([*classnames, *words]))


def _theme(gr: Any) -> Any:
    """The system's own letters, and colours with enough contrast to read (WCAG 2.1, 1.4.3)."""
    theme = gr.themes.Default(primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    dark, light = "#9a3412", "#fdba74"
    return theme.set(
        button_primary_background_fill=dark,
        button_primary_background_fill_hover="#7c2d12",
        button_primary_background_fill_dark=dark,
        button_primary_text_color="white",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        block_info_text_color="*neutral_700",
        block_info_text_color_dark="*neutral_200",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color_dark="*neutral_200",
        color_accent=dark,
        link_text_color=dark,
        link_text_color_dark=light,
    )


@contextmanager
def served(answers: Answers, title: str, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serves the page while the context lasts; gives its address.

    Args:
        host: the address to listen at. Other machines reach the page at any but the loopback's.
        port: by default the first free one from 7860.

    Raises:
        ValueError: Gradio is missing, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="miniclip-app-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        blocks = build(answers, title)
        import gradio as gr
        from starlette.middleware import Middleware

        hosts = LOOPBACK if host in LOOPBACK else ()
        limits = Middleware(Limits, upload_bytes=UPLOAD_MB * 1_000_000, hosts=hosts)
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=UPLOAD_MB * 1_000_000,
                allowed_paths=[],
                enable_monitoring=False,
                footer_links=[],
                app_kwargs={"middleware": [limits]},
                theme=_theme(gr),
                css=STYLE.read_text(encoding="utf-8"),
            )
        except OSError as error:
            raise ValueError(f"the page can't be served at {host}, port {port or 'from 7860'}: {error}") from error
        try:
            yield address
        finally:
            blocks.close(verbose=False)
