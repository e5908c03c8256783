"""Results as people get them: a table, JSON, and a page that is opened in a real browser from disk."""

from __future__ import annotations

import io
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import write_picture
from rich.console import Console

import miniclip
from miniclip.datasets import LabelledImages
from miniclip.evaluate import Scores, measure
from miniclip.report import Result, as_dict, confused_pairs, read_curves, table, write_html, write_json

NAMES = ("cat", "dog", "kea", "owl", "tench", "zebra")


def result(
    folder: Path,
    guesses: list[tuple[int, int]],
    names: tuple[str, ...] = NAMES,
    *,
    name: str = "pets",
    unreadable: tuple[str, ...] = (),
    templates: tuple[str, ...] = ("a photo of a {c}.",),
    size: tuple[int, int] = (24, 20),
    picture_name: str = "{}.png",
) -> Result:
    """A result for images of given (label, first guess); the other guesses follow in turn."""
    N, C = len(guesses), len(names)
    K = min(5, C)
    paths = tuple(write_picture(folder / picture_name.format(number), number, size) for number in range(N))
    missing = tuple(folder / f"missing{number}.png" for number in range(len(unreadable)))
    labels = [label for label, _ in guesses]
    everything = paths + missing
    data = LabelledImages(
        name,
        everything,
        (*labels, *[0] * len(missing)),
        names,
        templates,
        tuple(map(str, range(len(everything)))),
    )
    ranked = np.array([[(guess + k) % C for k in range(K)] for _, guess in guesses])
    cosines = np.tile(np.linspace(0.3, 0.1, K), (N, 1))
    first = np.linspace(0.9, 0.5, N)  # how sure it is falls from image to image
    probabilities = np.column_stack([first, *[(1 - first) / 8] * (K - 1)])
    scores = Scores(data, np.arange(N), np.array(labels), ranked, cosines, probabilities, unreadable)
    return Result(scores, measure(scores), 1.25)


# cat: 2 of 3 right, dog: 0 of 2, kea: right; owl, tench and zebra have no images
GUESSES = [(0, 0), (0, 0), (0, 1), (1, 0), (1, 0), (2, 2)]

# What training logs: a row of its own for validation.
FULL_LOG = (
    "epoch,step,train/loss,train/accuracy,train/chance,val/loss,val/retrieval_r1,val/zero_shot_acc1",
    "0,10,5.0,0.1,5.5,,,",
    "0,10,,,,4.0,0.2,0.3",
    "0,20,4.0,0.2,5.5,,,",
)

# ---------------------------------------------------------------------------------------------------------------------
# JSON


def test_the_dictionary_holds_every_number_and_what_it_takes_to_measure_it_again(tmp_path):
    found = as_dict("runs/x/best", [result(tmp_path, GUESSES, unreadable=("gone.png can't be read",))])
    assert set(found) == {"schema", "model", "created", "versions", "results"}
    assert (found["schema"], found["model"]) == (1, "runs/x/best")
    assert found["versions"]["miniclip"] == miniclip.__version__
    assert set(found["versions"]) == {"miniclip", "torch", "python"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["created"])
    (one,) = found["results"]
    assert (one["dataset"], one["task"], one["num_images"]) == ("pets", "zeroshot_classification", 6)
    assert one["unreadable"] == ["gone.png can't be read"]
    assert one["metrics"] == {
        "acc1": pytest.approx(3 / 6),
        "acc5": pytest.approx(5 / 6),  # of six classes the one before the first guess is missing: cat, after dog
        "mean_per_class_recall": pytest.approx((2 / 3 + 0 + 1) / 3),
    }
    low, high = one["acc1_interval_95"]
    assert 0 <= low < 0.5 < high <= 1
    assert one["classnames"] == list(NAMES)
    assert one["templates"] == ["a photo of a {c}."]
    assert one["per_class"][:3] == [
        {"class": "cat", "images": 3, "acc1": pytest.approx(2 / 3)},
        {"class": "dog", "images": 2, "acc1": 0.0},
        {"class": "kea", "images": 1, "acc1": 1.0},
    ]
    assert one["per_class"][3:] == [{"class": name, "images": 0, "acc1": None} for name in NAMES[3:]]
    assert one["confused_pairs"] == [
        {"class": "dog", "guess": "cat", "images": 2},
        {"class": "cat", "guess": "dog", "images": 1},
    ]
    assert np.array(one["confusion"])[:3, :3].tolist() == [[2, 1, 0], [2, 0, 0], [0, 0, 1]]
    assert one["seconds"] == 1.25


def test_every_image_has_its_guesses_with_cosine_and_probability(tmp_path):
    (one,) = as_dict("m", [result(tmp_path, GUESSES)])["results"]
    assert [prediction["path"] for prediction in one["predictions"]] == [str(tmp_path / f"{n}.png") for n in range(6)]
    third = one["predictions"][2]
    assert third["label"] == "cat"
    assert [guess["class"] for guess in third["guesses"]] == ["dog", "kea", "owl", "tench", "zebra"]
    assert third["guesses"][0] == {"class": "dog", "cosine": 0.3, "probability": pytest.approx(0.74)}


def test_the_json_file_is_strict_json_that_keeps_umlauts(tmp_path):
    results = [result(tmp_path, [(0, 0), (2, 1)], ("Käse", "<b>", '"x"')), result(tmp_path, GUESSES)]
    write_json(tmp_path / "results.json", "m", results)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert "Käse" in text

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert {**found, "created": None} == {**as_dict("m", results), "created": None}


def test_very_many_classes_keep_the_confused_pairs_and_drop_the_matrix(tmp_path):
    names = tuple(f"class {number}" for number in range(201))
    (one,) = as_dict("m", [result(tmp_path, [(200, 0), (1, 1)], names)])["results"]
    assert one["confusion"] is None
    assert one["confused_pairs"] == [{"class": "class 200", "guess": "class 0", "images": 1}]


def test_the_most_frequent_mistakes_come_first_and_right_guesses_are_none(tmp_path):
    guesses = [(0, 0)] * 9 + [(0, 1)] * 2 + [(2, 3)] * 5 + [(1, 0)] + [(4, 5)] * 3
    assert confused_pairs(result(tmp_path, guesses)) == [
        ("kea", "owl", 5),
        ("tench", "zebra", 3),
        ("cat", "dog", 2),
        ("dog", "cat", 1),
    ]
    assert confused_pairs(result(tmp_path, guesses), most=1) == [("kea", "owl", 5)]
    assert confused_pairs(result(tmp_path, [(0, 0), (1, 1)])) == []


# ---------------------------------------------------------------------------------------------------------------------
# The table in the terminal


def printed(model: str, *results: Result) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table(model, results))
    return console.file.getvalue()


def test_the_table_has_a_row_of_numbers_for_each_data_set(tmp_path):
    templates = ("a {}", "the {}")
    first = result(tmp_path, GUESSES, unreadable=("gone",), templates=templates)
    text = printed("runs/x/best", first, result(tmp_path, [(0, 0)] * 4, name="easy"))
    assert "runs/x/best" in text
    rows = {
        row[0]: row[1:]
        for line in text.splitlines()
        if "│" in line
        for row in [[c.strip() for c in line.split("│")[1:-1]]]
    }
    low, high = (f"{100 * bound:.1f}" for bound in first.metrics.interval)
    assert rows["pets"] == ["6 of 7", "6", "2", "50.0", f"{low} – {high}", "83.3", "55.6"]
    assert rows["easy"] == ["4", "6", "1", "100.0", "100.0 – 100.0", "100.0", "100.0"]


@pytest.mark.parametrize("name", ["photos [old]", "photos [/old]", "[bold]x", "a\\[b]"])
def test_square_brackets_in_names_are_printed_as_they_are(tmp_path, name):
    assert name in printed("m", result(tmp_path, GUESSES, name=name))
    assert f"runs/{name}/best" in printed(f"runs/{name}/best", result(tmp_path, GUESSES))


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def log(run: Path, version: str, *lines: str) -> None:
    path = run / "logs" / version / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")


def test_curves_of_a_resumed_run_are_one_and_the_later_log_counts(tmp_path):
    log(tmp_path, "version_0", "epoch,step,train/loss,val/loss", "0,10,5.0,", "0,10,,4.5", "0,20,4.0,", "0,30,9.0,")
    log(tmp_path, "version_2", "step,val/loss,train/loss", "20,,3.5", "30,3.0,3.25")
    log(tmp_path, "version_10", "epoch,step,train/loss", "1,30,2.5", "1,40,2.0")
    for model in (tmp_path / "best", tmp_path / "checkpoints" / "last.ckpt", str(tmp_path / "best")):
        assert read_curves(model) == {
            "train/loss": [(10, 5.0), (20, 3.5), (30, 2.5), (40, 2.0)],
            "val/loss": [(10, 4.5)],  # that of step 30 came before step 30 was trained once more
        }


def test_a_model_without_a_run_has_no_curves(tmp_path):
    assert read_curves(tmp_path / "models" / "best") == {}


def test_a_log_that_a_killed_run_left_unfinished_is_read_as_far_as_it_goes(tmp_path):
    log(tmp_path, "version_0", "epoch,step,train/loss", "0,10,5.0", "0,20,")
    log(tmp_path, "version_1", "")
    assert read_curves(tmp_path / "best") == {"train/loss": [(10, 5.0)]}


def test_a_folder_of_another_name_among_the_logs_is_no_crash(tmp_path):
    log(tmp_path, "version_0", "epoch,step,train/loss", "0,10,5.0")
    log(tmp_path, "version_old", "epoch,step,train/loss", "0,10,6.0")
    assert read_curves(tmp_path / "best")["train/loss"][0][0] == 10


# ---------------------------------------------------------------------------------------------------------------------
# The page, without a browser


def page_text(path: Path, *results: Result, model: str = "m") -> str:
    write_html(path, model, results)
    return path.read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    log(tmp_path, "version_0", *FULL_LOG)
    text = page_text(tmp_path / "report.html", result(tmp_path, GUESSES), model=str(tmp_path / "best"))
    without_namespaces = re.sub(r'xmlns(:\w+)?="https?://[^"]*"', "", text)
    metadata = re.sub(r"<metadata>.*?</metadata>", "", without_namespaces, flags=re.S)
    assert "http://" not in metadata
    assert "https://" not in metadata
    assert not re.search(r"<(script|link|iframe|object|embed)\b", text)
    references = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(references) > 6
    assert [reference for reference in references if not reference.startswith(("#", "data:image/"))] == []


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("costs $5", "costs $6 to $7"), id="dollars"),
        pytest.param(("$\\frac$", "$x_$"), id="broken formula"),
        pytest.param(("100 %", "a--b"), id="per cent"),
        pytest.param(("猫", "🐈"), id="not in the font of the chart"),
    ],
)
def test_class_names_of_any_characters_make_a_page_without_a_warning(tmp_path, names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = page_text(tmp_path / "report.html", result(tmp_path, [(0, 0), (1, 0)], names))
    assert all(name in text for name in names)


def test_a_run_that_logged_its_loss_alone_makes_a_page_without_a_warning(tmp_path):
    log(tmp_path, "version_0", "epoch,step,train/loss", "0,10,5.0", "0,20,nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = page_text(tmp_path / "report.html", result(tmp_path, GUESSES), model=str(tmp_path / "best"))
    assert 'id="curves"' in text


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path):
    write_html(tmp_path / "report.html", "m", [result(tmp_path, GUESSES)])
    before = (tmp_path / "report.html").read_bytes()
    broken = result(tmp_path / "other", GUESSES)
    (tmp_path / "other" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"0\.png"):
        write_html(tmp_path / "report.html", "m", [broken])
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------------------------------------------------------------
# The page, in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
WIDTHS = (1200, 390)


class Browser:
    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path: Path, width: int) -> None:
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(path.as_uri())
        assert self.js("return window.innerWidth") == width

    def js(self, script: str):
        return self.driver.execute_script(script)

    def text(self, css: str = "body") -> str:
        return self.js(f"return document.querySelector({css!r}).innerText")

    def count(self, css: str) -> int:
        return self.js(f"return document.querySelectorAll({css!r}).length")

    def cells(self) -> list[list[str]]:
        script = (
            "return [...document.querySelectorAll('#summary tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
        )
        return self.js(script)

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def check(self) -> None:
        """What holds for every page."""
        assert [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        assert {url.split(":")[0] for url in self.requests()} <= {"file", "data"}
        widest = "return [document.documentElement.scrollWidth, window.innerWidth]"
        content, window = self.js(widest)
        assert content <= window, f"the page is {content} pixels wide in a window of {window}"
        broken = "return [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt)"
        assert self.js(broken) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM or not CHROMEDRIVER:
        pytest.skip("no chromium with its driver on this machine")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture
def show(browser, tmp_path) -> Callable[..., Browser]:
    """Writes the page of some results and opens it, after the checks that hold for every page in every width."""

    def write_and_open(*results: Result, model: str = "runs/x/best", width: int = 1200) -> Browser:
        path = tmp_path / "report.html"
        write_html(path, model, results)
        for each in sorted(WIDTHS, key=lambda w: w == width):
            browser.open(path, each)
            browser.check()
        return browser

    return write_and_open


@pytest.mark.parametrize("width", WIDTHS)
def test_the_summary_shows_the_measured_numbers(show, tmp_path, width):
    first = result(tmp_path / "1", GUESSES)
    page = show(first, result(tmp_path / "2", [(0, 0)] * 3, name="easy"), width=width)
    low, high = (f"{100 * bound:.1f}" for bound in first.metrics.interval)
    assert page.cells() == [
        ["data", "images", "classes", "top-1 %", "95 % interval", "top-5 %", "mean per class %"],
        ["pets", "6", "6", "50.0", f"{low} – {high}", "83.3", "55.6"],
        ["easy", "3", "6", "100.0", "100.0 – 100.0", "100.0", "100.0"],
    ]
    assert page.text("h1") == "runs/x/best"
    assert page.js("return document.title") == "runs/x/best – zero-shot report"
    for number, name in ((1, "pets"), (2, "easy")):
        assert page.text(f"#data-{number}") == name
        assert page.count(f'a[href="#data-{number}"]') == 1


def test_galleries_show_wrong_ones_surest_first_and_right_ones(show, tmp_path):
    page = show(result(tmp_path, GUESSES))
    wrong = page.js("return [...document.querySelectorAll('.gallery.wrong figure')].map(f => f.innerText.split('\\n'))")
    assert [figure[:3] for figure in wrong] == [
        ["is cat", "dog", "74.0"],
        ["is dog", "cat", "66.0"],
        ["is dog", "cat", "58.0"],
    ]
    assert page.count(".gallery.right figure") == 3
    assert page.count(".gallery.right .guess.is-right") == 3
    assert page.count(".gallery img") == 6
    text = page.text()
    assert "Wrong, surest first (3 of 3)" in text
    assert "dog for cat (2), cat for dog (1)" in text


def test_classes_are_listed_worst_first_without_those_that_have_no_images(show, tmp_path):
    page = show(result(tmp_path, GUESSES))
    bars = page.js(
        "return [...document.querySelectorAll('.bar')].map(b => b.innerText.split('\\n').map(t => t.trim()))"
    )
    assert [(bar[0], bar[-1]) for bar in bars] == [("dog (2)", "0.0"), ("cat (3)", "66.7"), ("kea (1)", "100.0")]
    assert page.count(".confusion svg") == 1


def test_a_data_set_where_all_is_right_has_no_gallery_of_wrong_ones(show, tmp_path):
    page = show(result(tmp_path, [(0, 0), (1, 1), (2, 2)]))
    assert page.count(".gallery.wrong") == 0
    assert page.count(".gallery.right figure") == 3
    assert "Wrong" not in page.text()
    assert "Most often mistaken" not in page.text()


def test_a_data_set_where_all_is_wrong_has_no_gallery_of_right_ones(show, tmp_path):
    page = show(result(tmp_path, [(0, 1)] * 30))
    assert page.count(".gallery.right") == 0
    assert page.count(".gallery.wrong figure") == 24
    assert "Wrong, surest first (24 of 30)" in page.text()


def test_names_with_markup_quotes_and_umlauts_are_shown_as_they_are(show, tmp_path):
    evil = "<script>x()</script>"
    names = (evil, "\"quoted\" & 'single'", "Käse–Brötchen", "<img src=x onerror=x()>")
    one = result(
        tmp_path,
        [(0, 0), (1, 0), (2, 3), (3, 1)],
        names,
        name=f"data {evil}",
        templates=(f"a {{}} {evil}",),
        unreadable=(f"{evil}.png can't be read",),
        picture_name='{}"><b>x.png',
    )
    page = show(one, model=f'model {evil} "best"')
    text = page.text()
    assert page.js("return document.title") == f'model {evil} "best" – zero-shot report'
    assert page.count("script") == 0
    for shown in (*names, f"data {evil}", f"a {{}} {evil}", f"{evil}.png can't be read", f'model {evil} "best"'):
        assert shown in text
    assert page.js("return document.images[0].alt").endswith('"><b>x.png')


def test_unreadable_images_are_listed(show, tmp_path):
    problems = tuple(f"photo {number}.png is not an image" for number in range(13))
    page = show(result(tmp_path, GUESSES, unreadable=problems))
    text = page.text()
    assert "13 images could not be read and do not count" in text
    assert sum(problem in text for problem in problems) == 10
    assert "and 3 more, in results.json" in text


@pytest.mark.parametrize("where", ["path", "class name", "data name", "template", "model"])
def test_a_very_long_word_does_not_widen_the_page(show, tmp_path, where):
    word = "Donaudampfschiffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2
    options = {
        "path": {"unreadable": (f"/home/{word}/a.png can't be read",)},
        "class name": {"names": (word, "b")},
        "data name": {"name": word},
        "template": {"templates": (f"{word}: {{}}",)},
        "model": {},
    }[where]
    page = show(result(tmp_path, [(0, 0), (1, 0)], **options), model=word if where == "model" else "m")
    assert word in page.text()


def test_a_page_of_a_run_shows_its_curves_and_one_without_has_no_such_section(show, tmp_path):
    one = result(tmp_path, GUESSES)
    page = show(one, model=str(tmp_path / "best"))
    assert page.count("#training") == 0
    assert page.count("#curves") == 0
    log(tmp_path, "version_0", *FULL_LOG)
    page = show(one, model=str(tmp_path / "best"))
    assert page.count("#training") == 1
    assert page.count("#curves svg") == 2
    sizes = page.js(
        "return [...document.querySelectorAll('#curves svg')].map(s => s.getBoundingClientRect())"
        ".map(r => Math.min(r.width, r.height))"
    )
    assert min(sizes) > 100


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (400, 3), (8, 1), (2000, 1500)])
def test_pictures_of_any_size_are_shown(show, tmp_path, size):
    page = show(result(tmp_path, [(0, 0), (1, 0)], size=size))
    assert page.count(".gallery img") == 2


@pytest.mark.parametrize("num_classes", [1, 2, 13, 46, 300])
def test_any_number_of_classes_makes_a_page(show, tmp_path, num_classes):
    names = tuple(f"class number {number}" for number in range(num_classes))
    guesses = [(number, number if number % 3 else 0) for number in range(num_classes)]
    page = show(result(tmp_path, guesses, names))
    assert page.cells()[1][2] == str(num_classes)
    assert page.count(".bar") == min(60, num_classes)
    assert ("and 240 better ones, in results.json" in page.text()) == (num_classes == 300)
    assert page.count(".confusion svg") == 1


def test_many_data_sets_stand_below_each_other(show, tmp_path):
    page = show(*(result(tmp_path / str(number), GUESSES, name=f"set {number}") for number in range(4)))
    assert page.count("h2") == 4
    assert [row[0] for row in page.cells()[1:]] == [f"set {number}" for number in range(4)]
    identifiers = page.js("return [...document.querySelectorAll('h2[id]')].map(h => h.id)")
    assert identifiers == [f"data-{number}" for number in range(1, 5)]
