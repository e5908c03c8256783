"""The page in a real browser, served by the real command; and what it refuses, by requests that no browser makes."""

import asyncio
import base64
import html
import http.client
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import axe_core_python
import pytest
import warm
from command_line import fails
from helpers import picture, tiny_clip, write_picture
from PIL import ExifTags, Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from miniclip.common.pictures import thumbnail
from miniclip.evaluation.datasets.sets import EvaluationSet
from miniclip.evaluation.encoder import from_clip
from miniclip.inference.app.answers import Answers
from miniclip.inference.app.limits import Limits
from miniclip.inference.app.page import build
from miniclip.inference.classify import Classes, classify_images
from miniclip.inference.search.index import Hit, Index
from miniclip.inference.thresholds import ModelThreshold
from miniclip.weights.load import load, save

AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
CHECK = """
const done = arguments[0];
axe.run(document, {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}).then(found => done(found.violations
    .filter(v => v.impact == "serious" || v.impact == "critical").map(v => [v.id, ...v.nodes.map(n => n.html)])));
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """RUN/best with a page of the run beside it."""
    run = tmp_path_factory.mktemp("runs") / "birds"
    save(tiny_clip(3), run / "best")
    (run / "report.html").write_text("<!doctype html><title>r</title><h1>The curves of the run</h1>")
    return run


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def index(run):
    """Of five pictures."""
    (run.parent / "photos").mkdir()
    for number in range(5):
        write_picture(run.parent / f"photos/bird {number}.png", seed=number)
    Index(run.parent / "photos.index", str(run / "best"), device="cpu").update([str(run.parent / "photos")])
    return run.parent / "photos.index"


@pytest.fixture(scope="module")
def page(run, index):
    """The address of the page, while the command runs."""
    command = [sys.executable, "-m", "miniclip", "app", str(run / "best"), str(index)]
    command += ["--port", str(free_port()), "--device", "cpu"]
    process = warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = process.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+/)", line)
        assert found, line + process.stdout.read()
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0


class Visitor:
    """What a person does with the page."""

    def __init__(self, driver, address, width=1200):
        self.driver, self.wait = driver, WebDriverWait(driver, 300)
        driver.get("about:blank")
        driver.get_log("performance")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(address)
        self.one("#labels textarea")

    def one(self, css):
        return self.wait.until(lambda driver: driver.find_elements(By.CSS_SELECTOR, css))[0]

    def upload(self, path):
        self.one("#picture input[type=file]").send_keys(str(path))

    def show(self, path):
        """Uploads a picture that the browser can draw, and waits for it."""
        self.upload(path)
        self.one("#picture img")

    def write(self, css, text):
        field = self.one(css)
        field.clear()
        field.send_keys(text)

    def classify(self, labels):
        self.write("#labels textarea", labels)
        self.one("#classify").click()
        return self.answer("#bars")

    def answer(self, css):
        self.one(f"{css} table, {css} [role=alert], {css} figure")
        return self.driver.find_element(By.CSS_SELECTOR, css).text

    def open_tab(self, name):
        self.driver.find_element(By.XPATH, f"//button[@role='tab'][normalize-space()='{name}']").click()

    def problems(self):
        self.driver.execute_script(AXE)
        return self.driver.execute_async_script(CHECK)

    def hosts(self):
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {url.split("/")[2] for url in urls if url.startswith(("http", "ws"))}


def test_a_picture_is_classified_as_in_python_and_no_other_host_is_asked(page, browser, run, tmp_path):
    path = write_picture(tmp_path / "robin.png", seed=5)
    visitor = Visitor(browser.driver, page)
    assert visitor.problems() == []
    visitor.show(path)
    shown = visitor.classify("a robin, a wren, an owl")
    model, preprocess = load(run / "best", device="cpu")
    expected, _ = Answers(from_clip(model, preprocess, "x")).guess(path.read_bytes(), "a robin, a wren, an owl")
    for cell in re.findall(r"<td>([^<]+)</td>", expected):
        assert cell in shown
    assert "Probabilities are relative to these labels" in shown
    assert visitor.problems() == []
    visitor.open_tab("Training")
    frame = visitor.one("iframe")
    browser.driver.switch_to.frame(frame)
    assert visitor.one("h1").text == "The curves of the run"
    browser.driver.switch_to.default_content()
    assert visitor.hosts() == {page.split("/")[2]}


def test_an_index_is_searched_by_words(page, browser, index):
    visitor = Visitor(browser.driver, page)
    visitor.open_tab("Search")
    visitor.write("#query textarea, #query input", "a robin")
    visitor.one("#search").click()
    visitor.one("#found li img")
    shown = visitor.driver.find_element(By.CSS_SELECTOR, "#found").text.split("\n")
    hits = Index(index, device="cpu").search("a robin", topk=12)
    assert shown == [text for hit in hits for text in (Path(hit.key).name, f"{hit.cosine:.3f}")]
    assert visitor.problems() == []


def test_a_word_is_chosen_for_its_heat_map(page, browser, tmp_path):
    visitor = Visitor(browser.driver, page)
    visitor.show(write_picture(tmp_path / "robin.png", seed=5))
    visitor.classify("a robin, a wren")
    visitor.one("#words input[value='wren']").click()
    assert "speaks for “wren”" in visitor.answer("#heat")
    assert visitor.one("#heat img").size["width"] > 0
    assert visitor.problems() == []


@pytest.mark.long
def test_of_many_labels_those_of_the_answer_can_be_looked_for(page, browser, tmp_path):
    """And what is left out is counted: here the words of labels, and the labels that are furthest."""
    visitor = Visitor(browser.driver, page)
    visitor.show(write_picture(tmp_path / "robin.png", seed=5))
    visitor.classify(", ".join(f"bird {number}" for number in range(60)))
    answered = [cell.text for cell in browser.driver.find_elements(By.CSS_SELECTOR, "#bars tbody th")]
    visitor.one("#words label")
    offered = [label.text for label in browser.driver.find_elements(By.CSS_SELECTOR, "#words label")]
    assert len(answered) == 10
    assert (offered[:10], len(offered)) == (answered, 40)
    assert "left out here: 81 more labels, or words of labels" in visitor.one("#words").text  # bird, 0 to 59
    assert visitor.problems() == []


def test_a_removed_picture_takes_its_answers_along(page, browser, tmp_path):
    visitor = Visitor(browser.driver, page)
    visitor.show(write_picture(tmp_path / "robin.png", seed=5))
    visitor.classify("a robin, a wren")
    visitor.one("#words input[value='wren']").click()
    visitor.answer("#heat")
    visitor.one("#picture .icon-button-wrapper button").click()
    visitor.wait.until(lambda driver: not driver.find_elements(By.CSS_SELECTOR, "#bars table, #heat img, #words input"))


def test_enter_asks(page, browser, tmp_path):
    visitor = Visitor(browser.driver, page)
    visitor.show(write_picture(tmp_path / "robin.png", seed=5))
    visitor.write("#labels textarea", "a robin, a wren" + Keys.ENTER)
    assert "a wren" in visitor.answer("#bars")


def test_a_phone_shows_all_of_it(page, browser, tmp_path):
    visitor = Visitor(browser.driver, page, width=390)
    visitor.show(write_picture(tmp_path / "robin.png"))
    visitor.classify("a robin with a rather long name, a wren")
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    assert visitor.problems() == []


def test_prompts_are_compared_beside_each_other(page, browser, tmp_path):
    visitor = Visitor(browser.driver, page)
    visitor.open_tab("Compare prompts")
    visitor.one("#picture-2 input[type=file]").send_keys(str(write_picture(tmp_path / "robin.png")))
    visitor.one("#picture-2 img")
    visitor.write("#prompts textarea", "a photo of a {}.\n{}")
    visitor.one("#compare").click()
    shown = visitor.answer("#table")
    assert "a photo of a {}." in shown
    assert "all 2 together" in shown


def test_a_file_that_is_no_picture_is_answered_in_a_sentence(page, browser, tmp_path):
    """Neither by its name nor by its bytes; PostScript, which Pillow would hand to Ghostscript, is none."""
    (tmp_path / "evil.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    visitor = Visitor(browser.driver, page)
    visitor.show(tmp_path / "evil.png")
    assert "the picture is not an image that can be read" in visitor.classify("a robin, a wren")
    assert "there is no picture yet" in Visitor(browser.driver, page).classify("a robin, a wren")


def test_two_people_get_their_own_answers(page, browser, tmp_path):
    visitor = Visitor(browser.driver, page)
    visitor.show(write_picture(tmp_path / "robin.png", seed=1))
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("window")
    other = Visitor(browser.driver, page)
    other.upload(write_picture(tmp_path / "wren.png", seed=2))
    other.one("#picture img")
    second = other.classify("one, two")
    browser.driver.switch_to.window(first)
    assert visitor.classify("three, four") != second
    assert "three" in visitor.answer("#bars")


def ask(page, method, path, body=b"", **headers):
    connection = http.client.HTTPConnection(page.split("/")[2], timeout=300)
    connection.request(method, path, body, headers)
    return connection.getresponse()


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", "%2fetc%2fpasswd", "C:%5cboot.ini"])
def test_no_file_is_given_away(page, path):
    answer = ask(page, "GET", f"/gradio_api/file={path}")
    assert answer.status in (400, 403, 404)
    assert b"root:" not in answer.read()


def test_no_file_of_the_model_or_of_this_program_is_given_away(page, run):
    for path in (run / "best/config.json", Path(os.__file__)):
        assert ask(page, "GET", f"/gradio_api/file={path}").status in (403, 404)


@pytest.mark.parametrize("path", ["file=http://127.0.0.1:9/x", "file=https%3A%2F%2Fa.b/x", "proxy=https://a.b/x"])
def test_the_page_fetches_nothing_for_anyone(page, path):
    assert ask(page, "GET", f"/gradio_api/{path}").status == 403


def test_another_sites_name_for_this_machine_is_refused(page):
    assert ask(page, "GET", "/", Host="evil.example:80").status == 403
    assert ask(page, "GET", "/", Host=page.split("/")[2].replace("127.0.0.1", "localhost")).status == 200


def test_an_upload_of_200_mb_is_refused_by_its_size_before_it_comes(page):
    connection = http.client.HTTPConnection(page.split("/")[2], timeout=300)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Length", "200000000")
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (413, b"an upload has at most 20 MB")
    assert ask(page, "POST", "/gradio_api/upload", iter([b"x"]), **{"Transfer-Encoding": "chunked"}).status == 411


def asked(page, button, *data):
    """What the page answers to a button, as a program would ask: the event that ends it, as text."""
    config = json.loads(ask(page, "GET", "/config").read())
    (target,) = [each["id"] for each in config["components"] if each["props"].get("elem_id") == button]
    (number,) = [each["id"] for each in config["dependencies"] if [target, "click"] in map(list, each["targets"])]
    session = secrets.token_hex(8)
    body = json.dumps({"data": data, "fn_index": number, "session_hash": session})
    assert ask(page, "POST", "/gradio_api/queue/join", body, **{"Content-Type": "application/json"}).status == 200
    for line in ask(page, "GET", f"/gradio_api/queue/data?session_hash={session}"):
        if b"process_completed" in line:
            return line.decode()
    raise AssertionError("no answer")


def uploaded(page, data, **headers):
    """What the page answers to a file that is sent to it."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + data + b"\r\n--x--\r\n"
    return ask(
        page, "POST", "/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"}, **headers
    )


@pytest.mark.parametrize(
    "num, reason",
    [
        (None, "it is not said how many pictures to show"),
        *[(num, f"{num!r} pictures are asked for") for num in (0, 61, -1, 2.5, "three")],
        ([3], "a list pictures are asked for"),
    ],
)
def test_a_number_of_pictures_that_can_not_be_shown_is_answered_with_the_reason(page, num, reason):
    answer = asked(page, "search", "a robin", num)
    assert f"{html.escape(reason)}; give a number from 1 to 60" in answer
    assert "<li>" not in answer


@pytest.mark.parametrize("num", [3, 3.0])
def test_as_many_pictures_are_shown_as_are_asked_for(page, num):
    assert asked(page, "search", "a robin", num).count("<li>") == 3


META = {"_type": "gradio.FileData"}


@pytest.mark.parametrize("meta", [{}, {"meta": META}])
def test_a_picture_that_was_not_uploaded_is_not_opened(page, tmp_path, meta):
    """Its path is what a client names: a picture of this machine, by a link, a pipe, what never ends."""
    upload = Path(json.loads(uploaded(page, png(90 + len(meta))).read())[0])
    assert 'role=\\"status' in asked(page, "classify", {"path": str(upload), **meta}, "one, two")
    secret = write_picture(tmp_path / "secret.png")
    os.mkfifo(tmp_path / "pipe")
    link = upload.with_name("link.png")  # nobody can upload one
    link.symlink_to(secret)
    os.mkfifo(upload.with_name("pipe.png"))
    paths = [secret, tmp_path / "pipe", "/dev/zero", "/proc/self/environ", link, upload.parents[1], upload.parent]
    paths += [f"{upload.parent}/../../../{secret}", f"{upload.parents[1]}-other/a.png", "a\0b", "", "x" * 5000]
    paths += ["http://127.0.0.1:9/a.png", f"file://{secret}", upload.with_name("pipe.png")]
    for path in paths:
        picture = {"path": str(path), **meta}
        for answer in (
            asked(page, "classify", picture, "one, two"),
            asked(page, "compare", picture, "one, two", "{}"),
        ):
            assert 'role=\\"status' not in answer, path
            assert "<table" not in answer, path
            assert "bytes)" not in answer, path  # how large it is


def test_no_field_fetches_what_a_client_writes_into_it(answers):
    """Any of Gradio's fields takes a file, and would fetch it."""
    blocks = build(answers, "x").blocks.values()
    assert len(blocks) > 9
    for block in blocks:
        with pytest.raises(ValueError, match="not fetched from an address"):
            asyncio.run(block.async_move_resource_to_block_cache("https://192.0.2.1/a.png"))


def test_a_page_of_another_site_is_refused(page):
    host = page.split("/")[2]
    port = host.split(":")[1]
    own = [f"http://{host}", f"http://localhost:{port}"]
    for origin in ("http://evil.example", "null", f"https://{host}", f"http://localhost:{port}", "http://127.0.0.1:9999",
                   "http://127.0.0.1", f"http://127.0.0.1.evil.example:{port}", "http://[::1", f"{own[0]}@evil.example",
                   "file://", ""):  # fmt: skip
        assert uploaded(page, png(), Origin=origin).status == 403, origin
        assert ask(page, "GET", "/config", Origin=origin).status == 403, origin
        assert ask(page, "POST", "/gradio_api/queue/join", "{}", Origin=origin).status == 403, origin
    assert uploaded(page, png(), Origin=own[0]).status == 200
    assert uploaded(page, png(), Origin=own[1], Host=f"localhost:{port}").status == 200
    assert uploaded(page, png()).status == 200


@pytest.mark.parametrize(
    ("host", "headers", "origin", "is_answered"),
    [
        ("a.example", {}, "http://a.example:80", True),
        ("A.example", {}, "http://a.example", True),
        ("a.example", {}, "https://a.example", False),
        ("a.example", {"x-forwarded-proto": "https"}, "https://a.example", True),
        ("127.0.0.1:7860", {"x-forwarded-host": "a.example", "x-forwarded-proto": "https"}, "https://a.example", True),
        ("127.0.0.1:7860", {"x-forwarded-host": "a.example"}, "http://b.example", False),
        # What a page can send itself, because Gradio allows it: to this machine those of this machine, to others all.
        ("127.0.0.1:7860", {"x-forwarded-host": "localhost:9"}, "http://localhost:9", False),
        ("[::1]:7860", {"x-forwarded-host": "evil.example"}, "http://evil.example", False),
        ("a.example", {"x-forwarded-host": "evil.example"}, "http://evil.example", False),
    ],
)
def test_a_proxy_may_stand_before_the_page(host, headers, origin, is_answered):
    given = {"host": host, "origin": origin, **headers}
    pairs = [(name.encode(), value.encode()) for name, value in given.items()]
    refusal = Limits(None, upload_bytes=10)._refusal({"type": "http", "path": "/", "method": "POST", "headers": pairs})
    assert (refusal is None) == is_answered


def test_uploads_are_counted_by_client_and_minute():
    limits = Limits(None, upload_bytes=10, uploads_per_minute=2)

    def status(client):
        headers = [(b"content-length", b"3")]
        scope = {"type": "http", "path": "/gradio_api/upload", "method": "POST", "headers": headers}
        refusal = limits._refusal({**scope, "client": (client, 1)})
        return refusal and refusal[0]

    assert [status("a"), status("a"), status("a"), status("b")] == [None, None, 429, None]


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.fixture(scope="module")
def answers(run):
    model, preprocess = load(run / "best", device="cpu")
    return Answers(from_clip(model, preprocess, "birds"))


def png(seed=0):
    import io

    buffer = io.BytesIO()
    picture(seed).save(buffer, "png")
    return buffer.getvalue()


def test_names_are_shown_as_text(answers):
    shown, names = answers.guess(png(), "<script>alert(1)</script>, b")
    assert names == ("<script>alert(1)</script>", "b")
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown


def test_a_label_may_hold_a_comma(answers):
    shown, names = answers.guess(png(), '"a cat, asleep", a dog')
    assert names == ("a cat, asleep", "a dog")
    assert "a cat, asleep" in shown


def test_all_prompts_together_are_those_that_classify_takes(answers):
    """By hand: the row of all prompts has the probabilities of a classifier of all of them."""
    templates = ("a photo of a {}.", "{}")
    guesses = classify_images(
        answers.encoder, EvaluationSet("x", [picture()]), Classes(("cat", "dog"), templates, ""), num_guesses=2
    )
    expected = dict(zip(guesses.ranked[0].tolist(), guesses.probabilities[0].tolist(), strict=True))
    row = answers.compare(png(), "cat, dog", "\n".join(templates)).rpartition("all 2 together")[2]
    assert re.findall(r">([\d.]+) %<", row) == [f"{100 * expected[c]:.1f}" for c in (0, 1)]


def test_a_prompt_ends_at_the_end_of_its_line_alone(answers):
    assert "there are 21 templates" in answers.compare(png(), "cat, dog", "{}\n" * 21)
    assert "there are 0 templates" in answers.compare(png(), "cat, dog", " \n")
    assert "all 2 together" in answers.compare(png(), "cat, dog", "a\u2028{}\x85\r\n{}")


@pytest.mark.parametrize(
    "labels", ["a cat, a dog\n", "a cat\na dog", "a cat,\n\na dog", '["a cat",\n"a dog"\n]', "a cat, a dog"]
)
def test_labels_may_stand_on_lines(answers, labels):
    assert answers.guess(png(), labels)[1] == ("a cat", "a dog")


@pytest.mark.parametrize(
    "labels",
    ["", ",", "cat", "cat, cat", "cat,,dog", "1: cat, 2: dog", '["a", "a"]', '["a", ""]', "{", "none of these, b"],
)
def test_what_is_wrong_with_labels_is_said_in_words_of_the_page(answers, labels):
    """It has none of the command's options."""
    threshold = ModelThreshold(-1.0, "of nothing") if "none" in labels else None
    shown, _ = replace(answers, threshold=threshold).guess(png(), labels)
    assert 'role="alert"' in shown
    assert "--" not in shown


def test_a_label_of_half_a_character_is_answered(answers):
    """As a program may send it; an answer in UTF-8 can't hold it."""
    shown, _ = answers.guess(png(), "caf\udce9, b")
    assert b"caf" in shown.encode()


@pytest.mark.parametrize(
    ("labels", "word"), [("cat", "there is one class"), ("cat, cat", "twice"), (",", "holds no name")]
)
def test_labels_that_can_not_be_compared_are_answered_with_the_reason(answers, labels, word):
    shown, names = answers.guess(png(), labels)
    assert names == ()
    assert 'role="alert"' in shown
    assert word in shown


LONG = "a photo of a very old and rather dusty piece of furniture that stands in the corner of"


def test_what_the_command_line_notes_stands_below_an_answer(answers, run):
    def notes(shown):
        assert 'role="alert"' not in shown
        return re.findall("<p>Note: (.*?)</p>", shown)

    assert notes(answers.guess(png(), "one, two")[0]) == []
    (same,) = notes(answers.guess(png(), "one, One, two")[0])
    assert "2 classes have the prompts of &#x27;one&#x27;; all go to the first" in same
    for _ in range(2):  # Python's own filter shows a warning once
        first, *others = notes(answers.guess(png(), f"{LONG} one, {LONG} two")[0])
        assert "birds reads 16 tokens; 2 of 2 texts are longer and were cut" in first
        assert f"2 classes have the prompts of &#x27;{LONG} one&#x27;" in others[-1]
    assert same in notes(answers.compare(png(), "one, One", "{}\na {}"))
    threshold = ModelThreshold(
        -1.0, "at most 5 % of outside images accepted", classnames=("cat", "dog"), templates=("{}",)
    )
    calibrated = replace(answers, threshold=threshold)
    assert notes(calibrated.guess(png(), "cat, dog")[0]) == []
    (other,) = notes(calibrated.guess(png(), "cat, cow")[0])
    assert "was calibrated with" in other


def test_a_search_says_what_it_leaves_out(answers, index, tmp_path):
    copy = tmp_path / "photos.index"
    shutil.copytree(index, copy)
    searched = replace(answers, index=Index(copy, answers.encoder), threshold=ModelThreshold(-1.0, "of nothing"))
    found = searched.search("a robin", 12)
    assert found.count("<li>") == 5
    assert "Note: what is below the threshold is left out: cosine ≥ -1" in found
    assert "Note" not in replace(searched, threshold=None).search("a robin", 12)
    nothing = replace(searched, threshold=ModelThreshold(0.9999, "of nothing")).search("a robin", 12)
    assert "No picture reaches the threshold, cosine ≥ 0.9999" in nothing
    assert "Note: birds reads 16 tokens; 1 of 1 texts" in searched.search(LONG, 12)
    shutil.rmtree(copy)
    assert 'role="alert"' in searched.search("a robin", 12)
    assert "there is no index at" in searched.search("a robin", 12)


def test_a_hit_whose_name_is_no_utf_8_is_shown(answers, tmp_path):
    write_picture(tmp_path / "odd" / os.fsdecode(b"caf\xe9.png"))
    index = Index(tmp_path / "an.index", answers.encoder)
    index.update(tmp_path / "odd")
    shown = replace(answers, index=index).search("a robin", 12)
    assert r">caf\udce9.png<" in shown
    assert "<img" in shown
    shown.encode()


def test_a_mistake_of_the_program_is_an_answer_in_words(answers, monkeypatch, capsys):
    def broken(*_):
        return {}["x"]

    monkeypatch.setattr(Answers, "_found", broken)
    assert "by a mistake of the program: KeyError" in answers.search("a robin", 12)
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.undo()
    assert "how many pictures" in replace(answers, index=1).search("a robin", None)


@pytest.mark.parametrize("kind", ["table", "shards"])
def test_hits_of_a_table_or_of_shards_are_shown_as_they_were_indexed(answers, tmp_path, kind):
    folder = tmp_path / "photos"
    pictures = [write_picture(folder / f"{n}.png", seed=n) for n in range(3)]
    if kind == "table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = tmp_path / "a.parquet"
        pq.write_table(pa.table({"image": [each.read_bytes() for each in pictures]}), source)
    else:
        source = tmp_path / "a.tar"
        with tarfile.open(source, "w") as tar:
            for each in pictures:
                tar.add(each, each.name)
    index = Index(tmp_path / "an.index", answers.encoder)
    index.update(source)
    searched = replace(answers, index=index)
    found = re.findall(r'<img src="([^"]+)"', searched.search("a robin", 12))
    expected = [thumbnail(Image.open(each), (200, 200)) for each in pictures]
    assert sorted(found) == sorted(expected)
    source.unlink()
    gone = searched.search("a robin", 12)
    assert gone.count("<li>") == 3
    assert str(source) in gone
    assert "0 bytes" not in gone
    assert "<img" not in gone


def test_a_file_that_was_replaced_or_is_gone_says_so(answers, tmp_path, capsys):
    folder = tmp_path / "photos"
    names = ("same", "touched", "other", "gone")
    _, touched, other, gone = (write_picture(folder / f"{name}.png", seed=n) for n, name in enumerate(names))
    index = Index(tmp_path / "an.index", answers.encoder)
    index.update(folder)
    os.utime(touched, (5, 5))
    write_picture(other, seed=9)
    gone.unlink()
    shown = replace(answers, index=index).search("a robin", 12)
    captions = {name: text for text in shown.split("<li>")[1:] for name in names
                if f">{name}.png<" in text}  # fmt: skip
    assert {name for name, text in captions.items() if "changed since it was indexed" in text} == {"other"}
    assert {name for name, text in captions.items() if "<img" not in text} == {"gone"}
    assert "No such file" in captions["gone"]
    hits = index.search("a robin", topk=4)
    assert [Path(hit.path).stem for hit in hits if index.has_changed(hit)] == ["other"]


def test_pictures_at_addresses_are_not_fetched_for_the_page(answers, index, monkeypatch):
    hit = Hit("https://192.0.2.1/a.png", "https://192.0.2.1/a.png", "s", 0.5, {})
    searched = Index(index, answers.encoder)
    monkeypatch.setattr(searched, "search", lambda *_, **__: [hit])
    assert "asks no other host" in replace(answers, index=searched).search("a robin", 12)


def test_a_wide_picture_is_explained_as_the_command_does(run, answers, tmp_path):
    """From all of its pixels, and not from a strip of 448 by 13."""
    import numpy as np

    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 2000, 3), dtype=np.uint8))
    wide.save(tmp_path / "wide.png")
    shown = answers.heat_map(tmp_path / "wide.png", "a robin")
    where = ["--model", str(run / "best"), "--device", "cpu", "--out", str(tmp_path / "m.png"), "--json"]
    command = [sys.executable, "-m", "miniclip", "explain", str(tmp_path / "wide.png"), "a robin", *where]
    (row,) = json.loads(warm.run(command, check=True).stdout)
    assert f"(cosine {row['cosine']:.3f})" in shown
    for name in ("deletion", "insertion"):
        assert f"{name} {row[name]:.2f}" in shown
    data = base64.b64decode(re.search(r"base64,([^\"]+)", shown)[1])
    assert Image.open(io.BytesIO(data)).size == (448, 13)


def test_a_turned_pictures_map_stands_as_the_browser_shows_the_picture(answers):
    stored = Image.new("RGB", (300, 200), "navy")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    stored.save(file, "jpeg", exif=exif, quality=95)

    def shown_map(answers):
        data = base64.b64decode(re.search(r"base64,([^\"]+)", answers.heat_map(file.getvalue(), "a robin"))[1])
        return Image.open(io.BytesIO(data))

    for each in (answers, replace(answers, upright=True)):
        width, height = shown_map(each).size
        assert width * 3 == height * 2


def test_an_answer_waits_for_no_other_and_has_its_own_notes(answers, monkeypatch):
    began, may_end = threading.Event(), threading.Event()

    def slow(*_) -> str:
        began.set()
        assert may_end.wait(60)
        warnings.warn("of the map", stacklevel=2)
        return "<p>a map</p>"

    monkeypatch.setattr(Answers, "_explained", slow)
    with ThreadPoolExecutor() as threads:
        shown = threads.submit(answers.heat_map, png(), "one")
        assert began.wait(60)
        meanwhile, _ = answers.guess(png(), "one, One, two")
        may_end.set()
    assert shown.result() == "<p>a map</p><p>Note: of the map</p>"
    assert "all go to the first" in meanwhile
    assert "of the map" not in meanwhile


def test_a_file_that_is_gone_is_answered_in_a_sentence(answers, tmp_path):
    for shown in (
        answers.guess(tmp_path / "gone.png", "one, two")[0],
        answers.compare(tmp_path / "gone.png", "one, two", "{}"),
        answers.heat_map(tmp_path / "gone.png", "one"),
    ):
        assert "the picture is no longer here" in shown
        assert "drop it anew" in shown
    assert answers.guess(write_picture(tmp_path / "there.png"), "one, two")[1] == ("one", "two")
    lost = replace(answers, reports=(("Training", tmp_path / "report.html"),)).report("Training")
    assert 'role="alert"' in lost
    assert "report.html" in lost


def test_people_who_ask_at_once_get_their_own_notes(answers):
    questions = ["one, two", "one, One", f"{LONG} one, two", "three, four"] * 2
    alone = [answers.guess(png(), each) for each in questions]
    with ThreadPoolExecutor(4) as people:
        assert list(people.map(lambda each: answers.guess(png(), each), questions)) == alone


def test_a_page_without_an_index_says_how_to_get_one(answers):
    assert "miniclip app MODEL INDEX" in answers.search("a red car", 3)


@pytest.mark.parametrize("arguments", [["nowhere"], ["MODEL", "--port", "70000"], ["MODEL", "no.index"]])
def test_mistakes_of_the_command_line_are_one_sentence(run, capsys, arguments):
    message = fails(capsys, ["app", *(str(run / "best") if each == "MODEL" else each for each in arguments)])
    assert "Traceback" not in message
    assert arguments[-1] in message
