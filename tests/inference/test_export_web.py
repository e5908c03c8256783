"""The page of `export --to web` in a real browser: miniclip's ids, pixels and guesses; no request to another host."""

from pathlib import Path

import numpy as np
import pytest
from exports import saved, small_clip, texts
from helpers import Served, picture, write_picture
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from miniclip import tokenizer
from miniclip.inference.exporting.export import export, refuse_existing
from miniclip.inference.exporting.runner import Clip

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page, its pictures, and more pictures of every kind that a browser opens."""
    root = tmp_path_factory.mktemp("served")
    for number in range(12):
        size = (20 + 7 * (number % 5), 20 + 5 * (number % 4))
        write_picture(root / "pictures" / CLASSES[number % 3] / f"{number}.png", number, size)
    source = str(root / "pictures")
    export(saved(root / "clip", small_clip()), root / "page", "web", prove=source, search=source)
    smooth = picture(5, (9, 7)).resize((90, 61), Image.Resampling.BICUBIC)
    for mode in ("RGB", "L", "P", "1", "RGBA"):
        smooth.convert(mode).save(root / f"{mode}.png")
    smooth.save(root / "photo.jpg", quality=90)
    smooth.save(root / "photo.webp", lossless=True)
    smooth.convert("P").save(root / "photo.gif")
    smooth.resize((3, 200)).save(root / "strip.png")
    smooth.resize((5, 4)).save(root / "small.png")
    grey, few = smooth.convert("L"), smooth.quantize(32)
    grey.save(root / "grey.gif")  # of a palette that Pillow reads as none
    grey.save(root / "grey.bmp")
    few.save(root / "palette.bmp")
    index = few.getpixel((40, 30))
    few.save(root / "transparent.gif", transparency=index)
    few.save(root / "transparent_palette.png", transparency=index)
    few.save(root / "half_transparent_palette.png", transparency=bytes([128, 0] * 16))
    grey.save(root / "transparent_grey.png", transparency=grey.getpixel((40, 30)))
    smooth.save(root / "transparent_rgb.png", transparency=smooth.getpixel((40, 30)))
    smooth.convert("1").save(root / "transparent_1.png", transparency=0)
    for name in ("transparent.gif", "photo.gif"):
        (root / f"partial_{name}").write_bytes(with_larger_screen((root / name).read_bytes()))
    return root


def with_larger_screen(gif):
    """The picture's one frame 9 pixels to the right and 4 down on a screen that is 20 wider and 10 higher."""
    changed, frame = bytearray(gif), gif.index(b",\0\0\0\0" + gif[6:10])
    for at, added in ((6, 20), (8, 10), (frame + 1, 9), (frame + 3, 4)):
        changed[at : at + 2] = (int.from_bytes(gif[at : at + 2], "little") + added).to_bytes(2, "little")
    return bytes(changed)


@pytest.fixture(scope="module")
def url(folder):
    with Served(folder) as served:
        yield served.url


@pytest.fixture
def page(browser, url):
    """The browser, at the page, with its module at hand."""
    if browser.driver.current_url != f"{url}/page/index.html":
        browser.driver.set_script_timeout(200)
        browser.driver.get_log("browser")
        browser.driver.get_log("performance")
        browser.driver.get(f"{url}/page/index.html")
        WebDriverWait(browser.driver, 300).until(lambda driver: driver.find_element(By.ID, "work").is_displayed())
    browser.url = url
    return browser


def in_page(page, body, *arguments):
    """What an asynchronous function of JavaScript gives, with the module's names and `clip` at hand."""
    found = page.driver.execute_async_script(
        "const args = [...arguments], done = args.pop();"
        "const run = async () => {"
        "  const [{ Clip }, pixels] = await Promise.all([import('/page/clip.js'), import('/page/pixels.js')]);"
        "  const clip = (window.clip ??= await Clip.load());"
        "  const open = async (name) => (await fetch('/' + name)).blob();" + body + "};"
        "run().then((value) => done({ value }), (error) => done({ error: String(error.stack) }));",
        *arguments,
    )
    assert "error" not in found, found["error"]
    return found["value"]


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.long)])
def test_its_token_ids_are_ours_or_the_text_is_refused(page, count):
    sentences = [*texts(count, seed=count), "ΣΑΣ ΑΣ. Σ", "İi", "don't", "a " * 100]
    body = "return args[0].map((text) => { try { return clip.tokenizer.encode(text) } catch (e) { return e.message } })"
    found, refused = in_page(page, body, sentences), 0
    for text, ids in zip(sentences, found, strict=True):
        if isinstance(ids, str):
            assert "decoded wrongly" in ids
            refused += 1
        else:
            assert ids == tokenizer.encode_for_model(text, truncate=True), ascii(text)
    assert 0 < refused < count / 4


def levels(page, name, facts):
    body = "return [...pixels.toInput(await pixels.decode(await open(args[0]), false, args[2]), args[1])]"
    return np.array(in_page(page, body, name, facts, facts["style"] == "hf")).reshape(3, facts["size"], -1)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interpolation": "bilinear", "resize_size": 23},
        {"interpolation": "lanczos"},
        {"interpolation": "hamming"},
        {"interpolation": "box"},
        {"interpolation": "nearest"},
        {"resize": "squash"},
        {"resize": "none"},
        {"style": "hf", "resize_size": 19},
    ],
    ids=str,
)
def test_its_pixels_are_pillows_within_a_level(page, folder, changes):
    runner = Clip(folder / "page")
    plain = {"mean": [0, 0, 0], "std": [1 / 255] * 3}
    facts = runner.facts["pixels"] = runner.facts["pixels"] | plain | changes
    for path in sorted(each for each in folder.iterdir() if each.is_file()):
        expected = runner.pixels(Image.open(path))
        difference = np.abs(levels(page, path.name, facts) - expected).max()
        assert difference <= 1.001, (path.name, difference)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_partly_transparent_pixels_are_pillows_or_the_picture_is_refused(page, folder, mode):
    """A canvas loses colours under transparency, which count where nothing multiplies them by it."""
    runner = Clip(folder / "page")
    R = runner.facts["pixels"]["size"]
    own = runner.facts["pixels"] | {"mean": [0, 0, 0], "std": [1 / 255] * 3}
    (folder / "alpha").mkdir(exist_ok=True)
    cases = (
        ((90, 61), 0, "png", {}, False),
        ((90, 61), 0, "webp", {}, False),
        ((90, 61), 0, "png", {"resize": "squash"}, False),
        ((90, 61), 0, "png", {"style": "hf"}, False),
        ((R, R), 0, "png", {"style": "hf"}, False),
        ((R, R), 128, "png", {}, False),
        ((R, R), 127, "png", {}, True),
        ((R, R), 0, "webp", {}, True),
        ((90, 61), 0, "png", {"resize": "none"}, True),
        ((90, 61), 0, "png", {"interpolation": "nearest"}, True),
    )
    for number, (size, least, suffix, changes, is_refused) in enumerate(cases):
        name = f"alpha/{mode}{number}.{suffix}"  # browsers keep what they fetched by its name
        image = picture(6, (9, 7)).resize(size, Image.Resampling.BICUBIC).convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(size).point(lambda value, least=least: max(value, least)))
        image.save(folder / name, lossless=True, exact=True)
        facts = runner.facts["pixels"] = own | changes
        if is_refused:
            with pytest.raises(AssertionError, match=f"{size[0]} × {size[1]} pixels is partly transparent and is not"):
                levels(page, name, facts)
            continue
        expected = runner.pixels(Image.open(folder / name))
        difference = np.abs(levels(page, name, facts) - expected).max()
        assert difference <= 1.001, (name, difference)


def test_its_guesses_are_those_of_the_runner(page, folder):
    paths = sorted((folder / "pictures").rglob("*.png"))
    names = [str(path.relative_to(folder)) for path in paths]
    expected = Clip(folder / "page").classify([Image.open(path) for path in paths])
    limit = float(np.median([cosine for *_, cosine in expected]))  # no picture's own: there are twelve
    body = (
        "const files = await Promise.all(args[0].map(open)), plain = clip.facts;"
        "clip.facts = { ...plain, threshold: args[1] };"
        "try { return await clip.classify(files) } finally { clip.facts = plain }"
    )
    found = in_page(page, body, names, limit)
    assert [each["guesses"][0]["name"] for each in found] == [name for name, *_ in expected]
    assert [each["isNone"] for each in found] == [cosine < limit for *_, cosine in expected]
    assert sum(each["isNone"] for each in found) == 6
    np.testing.assert_allclose(
        [[each["guesses"][0]["probability"], each["guesses"][0]["cosine"]] for each in found],
        [[probability, cosine] for _, probability, cosine in expected],
        atol=1e-4,
    )


def test_a_person_classifies_and_searches_and_nothing_leaves_the_host(page, folder):
    driver = page.driver
    path = folder / "pictures" / "dog" / "1.png"
    labels = driver.find_element(By.ID, "labels")
    assert labels.get_attribute("value") == "cat, dog, owl"
    driver.find_element(By.ID, "files").send_keys(str(path))
    WebDriverWait(driver, 300).until(lambda driver: page.count("#answers li") == 1)
    ((name, probability, _),) = Clip(folder / "page").classify([Image.open(path)])
    assert page.text(".answer") == name
    assert f"{name}: {100 * probability:.1f} %" in page.text("#answers")
    driver.find_element(By.ID, "words").send_keys("a dog")
    driver.find_element(By.CSS_SELECTOR, "#search button").click()
    WebDriverWait(driver, 300).until(lambda driver: page.count("#found li") == 12)
    runner = Clip(folder / "page")
    files = sorted((folder / "pictures").rglob("*.png"))
    cosines = runner.encode_images([Image.open(file) for file in files]) @ runner.encode_texts(["a dog"])[0]
    assert page.text("#found li").startswith(files[int(cosines.argmax())].name)
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    hosts = {url.split("/")[2] for url in page.requests() if url.startswith("http")}
    assert hosts == {page.url.split("/")[2]}
    labels.clear()
    labels.send_keys('"Paris, ""Texas""", London\t')  # the tab leaves the field
    WebDriverWait(driver, 300).until(lambda driver: 'Paris, "Texas": ' in page.text("#answers"))
    assert page.text("#answers").count(" %, cosine ") == 2
    words = driver.find_element(By.ID, "words")
    for query, message in (
        ("   ", "a query is empty; it must be a text"),
        ("<|endoftext|>", "holds the name of a special token"),
        ("", "a query is empty; it must be a text"),
    ):
        words.clear()
        words.send_keys(query, "\n")
        WebDriverWait(driver, 300).until(lambda driver, message=message: message in page.text("#state"))
        assert page.count("#found li") == 0  # the hits of another query are no answer to this one
        words.clear()
        words.send_keys("a dog\n")
        WebDriverWait(driver, 300).until(lambda driver: page.count("#found li") == 12)
        assert page.text("#state") == ""
    labels.clear()
    labels.send_keys(" \t")
    WebDriverWait(driver, 300).until(lambda driver: "Name the classes first" in page.text("#state"))
    assert page.count("#answers li") == 0


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_it_turns_pictures_only_where_the_threshold_was_calibrated_with_upright_ones(page, folder, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "turned").mkdir(exist_ok=True)
    Image.open(folder / "RGB.png").save(folder / f"turned/a.{suffix}", exif=exif, quality=90)
    stored, name = Image.open(folder / f"turned/a.{suffix}"), f"turned/a.{suffix}"
    body = (
        "const { data, width, height } = await pixels.decode(await open(args[0]), args[1]);"
        "return [width, height, [...data]]"
    )
    for turns, expected in ((False, stored), (True, stored.transpose(Image.Transpose.ROTATE_270))):
        width, height, values = in_page(page, body, name, turns)
        assert (width, height) == expected.size
        pixels = np.array(values).reshape(height, width, 4)[..., :3]
        assert np.abs(pixels - np.asarray(expected.convert("RGB"), dtype=int)).max() <= 2
    body = (
        "const files = [await open(args[0])], plain = clip.facts; clip.facts = { ...plain, upright: true };"
        "try { return (await clip.classify(files))[0].guesses } finally { clip.facts = plain }"
    )
    runner = Clip(folder / "page")
    runner.facts["upright"] = True
    ((label, probability, _),) = runner.classify([stored])
    best = in_page(page, body, name)[0]
    assert (best["name"], best["probability"]) == (label, pytest.approx(probability, abs=2e-3))


def test_a_page_is_replaced_and_what_a_host_needs_beside_it_is_not(folder):
    refuse_existing(folder / "page", overwrite=True)
    (folder / "page" / "CNAME").write_text("birds.example")
    with pytest.raises(ValueError, match="`miniclip export` did not write, so it is not overwritten: CNAME;"):
        refuse_existing(folder / "page", overwrite=True)
    (folder / "page" / "CNAME").unlink()


def test_opened_from_a_disk_it_says_how_to_serve_it(browser, folder):
    browser.driver.get((folder / "page" / "index.html").as_uri())
    assert "python -m http.server" in browser.text()


def test_pictures_to_search_are_for_a_page_alone(tmp_path):
    with pytest.raises(ValueError, match="belong to --to web"):
        export(saved(tmp_path / "clip", small_clip()), tmp_path / "out", "onnx", search=str(tmp_path))
    assert [path.name for path in Path(tmp_path).iterdir()] == ["clip"]
