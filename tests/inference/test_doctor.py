"""What doctor finds: planted faults, nothing in a clean set, and numbers worked by hand."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import digits
import planted_faults
import scenes

from miniclip.data.findings import Look, count
from miniclip.data.sources import read_pairs
from miniclip.data.wordings.equal_captions import words_of
from miniclip.evaluation.encoder import from_object
from miniclip.images import Preprocess
from miniclip.inference.doctor import costs, lists
from miniclip.inference.doctor.captions import doubt_in, junk_in, naming, normalised, repeated
from miniclip.inference.doctor.examine import Diagnosis, examine
from miniclip.inference.doctor.findings import CERTAIN, REASONS, chosen_reasons
from miniclip.inference.doctor.languages import languages
from miniclip.inference.doctor.parts import TEST, VAL, of_images, of_pairs
from miniclip.inference.doctor.pictures import BLANK_LEVELS, blur_of, see
from miniclip.inference.search.nearest import near_duplicates
from miniclip.inference.sources import image_set

OPENAIS = Preprocess(32, (0, 0, 0), (1, 1, 1))


@contextlib.contextmanager
def silent(what, total):
    yield lambda done: None


def diagnose(train: Path, val: Path | None = None, test: Path | None = None, **options) -> Diagnosis:
    sources = [of_pairs(str(train), read_pairs(train))]
    sources += [of_images(part, str(path), image_set(str(path))) for part, path in ((VAL, val), (TEST, test)) if path]
    return examine(sources, **{"image_size": 32, **options})


def reasons_of(found: Diagnosis) -> dict[str, set[str]]:
    """Reasons by the key of the pair."""
    out: dict[str, set[str]] = {}
    for finding in found.findings:
        out.setdefault(found.looked.key(finding.row), set()).add(finding.reason)
    return out


def draw(folder: Path, name: str, caption: str | list[str], seed: int = 0, number: int | None = None) -> Path:
    """A scene of a class of its own, with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    scenes.draw(37 * seed % len(scenes.CLASSES) if number is None else number, np.random.default_rng(seed)).save(path)
    path.with_suffix(".txt").write_text(caption if isinstance(caption, str) else "\n".join(caption))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Planted faults


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("doctor") / "scenes"
    scenes.make(out, pairs_per_class=5, every=8)
    return out


@pytest.mark.long
def test_planted_faults_are_found_and_little_else_is(scenes_folder, tmp_path):
    planted = tmp_path / "planted"
    planted_faults.plant(scenes_folder, planted, most=700, seed=1)
    found = diagnose(planted / "train", planted / "val", planted / "test")
    lists.write_findings(tmp_path, found)
    scores = {kind: (recall, precision) for kind, _, _, recall, precision, _ in planted_faults.score(planted, tmp_path)}
    for kind in ("copy", "blank", "turned", "tiny", "language", "blurred"):
        assert scores[kind] >= (0.9, 1.0), kind
    assert scores["junk-caption"] >= (0.8, 1.0)
    assert scores["boilerplate"] >= (0.3, 1.0)  # those of ten pictures and more
    assert scores["near-duplicate"] >= (0.5, 0.9)
    assert scores["leak"] >= (0.6, 0.9)
    assert scores["names-others"][0] >= 0.9
    assert (scores["mismatch"][0], scores["turned-pixels"][0]) == (0, 0)  # without a model they are not looked for


def write_digits(folder: Path, scans: range) -> Path:
    """Pictures as the demo's: each scan in two inks, with a caption of its own."""
    pictures, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(scans.start)
    folder.mkdir()
    for scan in scans:
        for ink in random.permutation(list(digits.INKS))[:2]:
            path = folder / f"{scan:04d}_{ink}.png"
            digits.compose(pictures[scan].reshape(8, 8), ink, random).save(path)
            path.with_suffix(".txt").write_text(digits.captions(digits.DIGITS[labels[scan]], ink, random)[0])
    return folder


def test_a_clean_set_has_no_leak_and_one_that_is_planted_is_found(tmp_path):
    train, val = write_digits(tmp_path / "train", range(400)), write_digits(tmp_path / "val", range(400, 450))
    test = write_digits(tmp_path / "test", range(450, 600))
    clean = diagnose(train, val, test, image_size=28)
    assert set(clean.counts()) <= {"names-others", "blurred", "language"}
    assert not clean.dropped(CERTAIN)
    first, second = sorted(test.glob("*.png"))[:2]
    Image.open(first).save(train / "same.webp", lossless=True)  # equal pixels in other bytes
    data, _ = planted_faults.slightly_changed(Image.open(second), np.random.default_rng(3))
    (train / "changed.jpg").write_bytes(data)
    for name in ("same", "changed"):
        (train / f"{name}.txt").write_text("a new caption")
    found = diagnose(train, val, test, image_size=28)
    leaks = {each.reason: found.looked.key(each.like) for each in found.findings if "leak" in each.reason}
    assert leaks == {"leak": str(first), "near-leak": str(second)}
    dropped = found.dropped(CERTAIN)
    assert {found.looked.key(row): each.reason for row, each in dropped.items()} == {"same.webp": "leak"}
    assert "near-leak" in {each.reason for each in found.dropped(chosen_reasons("certain,near-leak")).values()}


def test_a_leak_from_test_into_val_names_the_picture_of_val(tmp_path):
    draw(tmp_path / "train", "a", "one thing", 1)
    shutil.copy(draw(tmp_path / "test", "b", "", 2), (tmp_path / "val").mkdir() or tmp_path / "val" / "c.png")
    found = diagnose(tmp_path / "train", tmp_path / "val", tmp_path / "test")
    assert reasons_of(found) == {str(tmp_path / "val" / "c.png"): {"leak"}}


def a_little_lighter(path: Path, out: Path) -> Path:
    out.parent.mkdir(exist_ok=True)
    Image.open(path).point(lambda level: min(255, level + 2)).save(out)
    return out


def test_a_leak_is_one_whichever_nearly_equal_picture_stands_first(tmp_path):
    """The very pixels of a picture of val or test are a leak where that part holds another that is nearly the same."""
    train, val, test = (tmp_path / part for part in ("train", "val", "test"))
    frames = [draw(test, "a", "", 1), draw(test, "d", "", 3)]
    second, of_val = a_little_lighter(frames[0], test / "b.png"), a_little_lighter(frames[1], val / "e.png")
    for known, name in ((second, "c"), (of_val, "f")):
        shutil.copy(known, draw(train, name, f"a scene, {name}"))
    found = diagnose(train, val, test)
    assert {(found.looked.key(each.row), each.reason, found.looked.key(each.like)) for each in found.findings} == {
        ("c.png", "leak", str(second)),
        ("f.png", "leak", str(of_val)),
        (str(of_val), "near-leak", str(frames[1])),
        (str(second), "near-duplicate", str(frames[0])),
    }
    assert sorted(found.looked.key(row) for row in found.dropped(CERTAIN)) == ["c.png", "f.png"]


def test_a_copy_in_train_is_one_where_test_has_nearly_the_same_picture(tmp_path):
    frame = draw(tmp_path / "test", "a", "", 1)
    for name in ("b", "c"):
        a_little_lighter(frame, tmp_path / "train" / f"{name}.png").with_suffix(".txt").write_text("one thing")
    found = diagnose(tmp_path / "train", None, tmp_path / "test")
    assert reasons_of(found) == {"b.png": {"near-leak"}, "c.png": {"near-leak", "copy"}}
    assert [found.looked.key(row) for row in found.dropped(CERTAIN)] == ["c.png"]


def test_of_nearly_equal_pictures_one_that_is_no_copy_is_kept(tmp_path):
    """The first has nothing that its copy lacks: without both, the picture would be lost."""
    draw(tmp_path, "a", "a thing", 1)
    draw(tmp_path, "b", ["a thing", "more of it"], 1)
    assert reasons_of(diagnose(tmp_path)) == {"a.png": {"copy"}}


# ---------------------------------------------------------------------------------------------------------------------
# Near duplicates


@pytest.mark.parametrize("seed", range(3))
def test_confirmed_near_duplicates_are_the_connected_components_of_what_is_confirmed(seed):
    features = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(seed).normal(size=(60, 3))), dim=1)
    near = (features @ features.T).numpy() >= 0.97
    ids = np.arange(100, 160)
    allowed = np.add.outer(np.arange(60), np.arange(60)) % 3 > 0

    def confirm(first, second):
        return np.where(allowed[first - 100, second - 100], 0.5, -np.inf).astype(np.float32)

    found = near_duplicates(lambda: [(ids[:25], features[:25]), (ids[25:], features[25:])], 0.97, confirm=confirm)
    _, labels = connected_components(coo_array(near & allowed & ~np.eye(60, dtype=bool)))
    expected = {frozenset(np.flatnonzero(labels == label) + 100) for label in labels if (labels == label).sum() > 1}
    assert {frozenset(found.ids[found.group == group]) for group in found.group} == expected
    assert set(found.cosine.tolist()) == {0.5}


def test_equal_pixels_with_fewer_captions_are_a_copy_and_with_others_a_near_duplicate(tmp_path):
    for number, texts in enumerate(
        (["A thing!", "more of it"], ["a thing"], ["another view"], ["a thing", "more of it"])
    ):
        draw(tmp_path, str(number), texts, seed=5)
    draw(tmp_path, "other", "something else", seed=6)
    found = diagnose(tmp_path)
    alike = {each for each in found.findings if each.reason != "names-others"}
    assert {found.looked.key(each.row): each.reason for each in alike} == {
        "1.png": "copy",
        "2.png": "near-duplicate",
        "3.png": "copy",
    }
    assert {each.score for each in found.findings if each.reason == "copy"} == {1}
    assert [sorted(found.looked.key(row) for row in group) for group in found.groups] == [
        [f"{n}.png" for n in range(4)]
    ]


def test_the_largest_of_near_duplicates_is_kept(tmp_path):
    small = draw(tmp_path, "a", "one thing", seed=7)
    Image.open(small).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("another thing")
    (finding,) = (each for each in diagnose(tmp_path).findings if each.reason == "near-duplicate")
    assert (finding.row, finding.like) == (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_more_blur_is_more_blurred_and_noise_on_one_colour_is_blank():
    picture = scenes.draw(3, np.random.default_rng(0)).resize((96, 96))
    blurs = [blur_of(picture.filter(ImageFilter.GaussianBlur(radius)), 96) for radius in (0, 1, 2, 4)]
    assert blurs == sorted(blurs)
    assert blurs[0] < blurs[-1] - 0.2
    noise = np.random.default_rng(0).normal(128, 4, size=(50, 70, 3)).clip(0, 255).astype(np.uint8)
    assert see(Image.fromarray(noise), 32, OPENAIS).levels < BLANK_LEVELS < see(picture, 32, OPENAIS).levels


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (300, 1), (3, 400)])
def test_pictures_of_any_shape_and_mode_are_looked_at(size):
    for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK"):
        seen = see(Image.new(mode, size), 16, OPENAIS)
        assert seen.small.shape == (32, 32, 3)
        assert 0 <= seen.blur <= 1


def test_a_drawing_under_transparency_is_blank_to_the_model_that_sees_black():
    """Black ink on nothing: OpenAI's way makes all of it black, Hugging Face's lays it on white."""
    ink = np.zeros((64, 64, 4), np.uint8)
    ink[16:48, 16:48, 3] = 255
    ink[:16, :, :3] = 255  # what a viewer does not show
    drawing, on_white = Image.fromarray(ink), Preprocess(32, (0, 0, 0), (1, 1, 1), "hf")
    assert see(drawing, 32, OPENAIS).levels == 0
    seen = see(drawing, 32, on_white)
    assert seen.levels == 255
    assert seen.small[0, 0].tolist() == [255, 255, 255]
    stored = see(drawing, 64, Preprocess(64, (0, 0, 0), (1, 1, 1)))  # nothing is resized, so nothing is multiplied
    assert stored.small[0, 0].tolist() == [255, 255, 255]
    assert stored.small[-1, -1].tolist() == [0, 0, 0]


def test_what_is_blank_is_no_duplicate_of_anything(tmp_path):
    for number in range(3):
        path = draw(tmp_path, str(number), ("house", "tree", "river")[number], seed=number)
        if number:
            Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
    assert reasons_of(diagnose(tmp_path)) == {"1.png": {"blank"}, "2.png": {"blank"}}


# ---------------------------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize(
    "caption, reason",
    [
        ("https://example.com/a.jpg", "a URL"), ("www.example.com", "a URL"), ("see https://example.com", "a URL"),
        ("IMG_1234.JPG", "a file name"), ("photos/cat.png", "a file name"), ("DSC01234", "a file name"),
        ("20210304_123456", "a file name"), ("a3f5e1b2c4d9c7b2", "a file name"),
        ("Screenshot 2021-03-04 at 10.11.12", "a file name"), ("my holiday photo.jpeg", "a file name"),
        ("image of", "a placeholder"), ("no description available", "a placeholder"),
        ("<img src='x'>", "markup"), ("...", "no words"), ("https://x.org/" + "a" * 600, "a URL"),
        ("image of a dog", ""), ("7", ""), ("1984", ""), ("a cat, see https://example.com", ""), ("猫", ""), ("🐈", ""),
        ("p", ""), ("a dog.", ""), ("photo of the year 2021", ""), ("a " * 400, ""), ("red", ""), ("", "no words"),
    ],
)  # fmt: skip
def test_a_caption_that_says_nothing_is_known_by_what_it_is(caption, reason):
    assert junk_in(caption) == reason
    assert not (reason and junk_in(f"a red fox, {caption}"))


@pytest.mark.parametrize(
    "caption, reason",
    [
        ("Untitled", "a placeholder"), ("a picture", "a placeholder"), ("the", "a placeholder"),
        ("empty", "a placeholder"), ("a tap", "a placeholder"), ("Zoom", "a placeholder"), ("banner", "a placeholder"),
        ("<p>logo</p>", "a URL"), ("booking.com logo", "a URL"), ("https://booking.com logo", "a URL"),
        ("image 12", "a file name"), ("photo 51", "a file name"), ("Scan 3", "a file name"),
        ("001a2b3c4d5e", "a file name"),
        ("1234567", "a number"), ("00012345", "a number"), ("10:30:45", "a number"), ("2021-03-04", "a number"),
        ("737-800", "a number"), ("4006381333931", "a number"), ("?", "no words"), ("(", "no words"),
        ("P-51", ""), ("P 38", ""), ("WP 7", ""), ("A320", ""), ("DC-10", ""), ("no findings", ""), ("normal", ""),
        ("an empty street", ""), ("a photo of <sks>", ""), ("<cat-toy>", ""), ("C++", ""), ("+", ""), ("7", ""),
        ("🐈", ""), ("a dog in snow https://x.org snow dog.jpg", ""),
    ],
)  # fmt: skip
def test_a_word_or_a_number_may_be_a_caption_and_is_never_certainly_none(caption, reason):
    assert junk_in(caption) == ""
    assert doubt_in(caption) == reason
    assert doubt_in(f"a red fox, {caption}") == ""


def test_signs_that_stand_between_words_say_nothing_and_what_is_not_seen_makes_no_difference():
    certain = {"► Click to enlarge": "a placeholder", "https://x.com/a © shutterstock": "a URL"}
    assert {caption: junk_in(caption) for caption in certain} == certain
    for caption in ("© Getty Images", "Photo | Alamy", "stock photo®", "image = ", "Copyright ©", "photo ~"):
        assert junk_in(caption) == ""
        assert doubt_in(caption) == "a placeholder", caption
    for caption in ("C++", "🐈", "a cat → a dog", "5 %"):
        assert (junk_in(caption), doubt_in(caption)) == ("", "")
    for unseen in "\u200b\ufeff\u00ad\ufe0f\u200e":
        assert normalised(f"a crow{unseen} on a roof") == normalised("a crow on a roof")


def test_a_name_by_numbers_that_pictures_share_is_no_name_of_a_file(tmp_path):
    for caption in ("IMG 2000", "a3f5e1b2c4d9c7b2"):
        assert (junk_in(caption), doubt_in(caption)) == ("a file name", "a file name")
        assert (junk_in(caption, is_shared=True), doubt_in(caption, is_shared=True)) == ("", "a file name")
    for caption in ("737-800", "photo 51"):
        assert doubt_in(caption, is_shared=True) == ""
    assert junk_in("IMG_2000.jpg", is_shared=True) == "a file name"
    for name, caption, seed in (("a", "IMG 2000", 1), ("b", "IMG 2000", 2), ("c", "IMG 2001", 3), ("d", "IMG 2001", 3)):
        draw(tmp_path, name, caption, seed)
    assert reasons_of(diagnose(tmp_path)) == {
        "a.png": {"says-little"},
        "b.png": {"says-little"},
        "c.png": {"junk-caption"},
        "d.png": {"junk-caption", "copy"},
    }


@pytest.mark.parametrize(
    "classes",
    [
        ("empty", "occupied"), ("737-800", "747-400", "A320", "DC-10"), ("logo", "banner", "icon"),
        ("?", "!", "&", "+"),
    ],
)  # fmt: skip
def test_no_class_is_dropped_for_its_name(classes, tmp_path):
    for number in range(12):
        draw(tmp_path, str(number), classes[number % len(classes)], number)
    found = diagnose(tmp_path)
    assert not found.dropped(CERTAIN)
    assert set(found.counts()) <= {"says-little"}


def test_a_sentence_of_many_pictures_is_boilerplate_and_a_class_of_many_is_not():
    own = [[f"a thing called {n}"] for n in range(200)]
    assert repeated([*own, *[["Welcome, all!"]] * 8, *[["welcome all"]] * 8]) == {"welcome all": 16}
    assert repeated([*own, *[["welcome"]] * 9]) == {}  # fewer than ten
    assert repeated([["a cat"], ["a dog"], ["a bird"]] * 40) == {}


def test_captions_that_name_others_are_counted_by_hand():
    captions = [["a red seven"], ["someone wrote seven in red"], ["a seven", "ink"], ["a red seven"], ["photo of"]]
    found = naming(captions, [False] * 4 + [True])
    # "red seven" is in one further caption; "seven" in three; equal captions are no others.
    assert found.most.tolist() == [1, 0, 3, 1, 0]
    assert found.mean.tolist() == [1, 0, 1.5, 1, 0]
    assert set(found.examples) == {
        ("a red seven", 2, 1, "someone wrote seven in red"),
        ("a seven", 1, 3, "a red seven"),
    }


def test_captions_of_another_language_are_known_where_none_is_of_the_sets():
    things = ("dog", "cat", "bird", "boat", "bicycle", "child", "horse", "kite", "basket", "guitar")
    english = [[f"a woman is walking along the river with her {thing}"] for thing in things]
    others = [["eine Frau geht mit ihrem Hund am Fluss spazieren"], ["женщина гуляет с собакой у реки"]]
    both = [["a house by the sea", "une maison au bord de la mer"]]
    main, found = languages([*english, *others, *both], [False] * 13, lambda done: None)
    assert main == "en"
    assert [each and each[0] for each in found] == [None] * 10 + ["de", "ru", None]


# ---------------------------------------------------------------------------------------------------------------------
# What a model sees


class Colours:
    """Pictures by their middle's colour and by where they are light; texts by the names of both."""

    NAMES = ("red", "green", "blue")
    logit_scale = 0.0

    def preprocess(self, image):
        return torch.from_numpy(np.asarray(image.resize((8, 8), Image.Resampling.BOX))).permute(2, 0, 1).float() / 255

    def encode_image(self, images):
        light = images[:, :, :2].mean(dim=(1, 2, 3)) - images[:, :, 6:].mean(dim=(1, 2, 3))
        return torch.cat([images.mean(dim=(2, 3)) - images.mean(dim=(1, 2, 3))[:, None], light[:, None]], dim=1)

    def tokenize(self, texts):
        return torch.tensor([[float(name in text) for name in self.NAMES] + [1.0] for text in texts])

    def encode_text(self, tokens):
        return tokens - torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5])


def write_lit(folder: Path, count: int) -> None:
    """Pictures of red, green or blue, light above and dark below, with that as their captions."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((32, 32, 3)) + np.linspace(90, 0, 32)[:, None, None]
        pixels[:, :, number % 3] += random.integers(140, 160)
        Image.fromarray((pixels + random.integers(0, 9, pixels.shape)).astype(np.uint8)).save(
            folder / f"{number:03d}.png"
        )
        (folder / f"{number:03d}.txt").write_text(f"a {Colours.NAMES[number % 3]} wall no {number}")


def test_captions_that_do_not_fit_and_turned_pictures_are_found_by_a_model(tmp_path):
    write_lit(tmp_path / "in", 120)
    for number in (5, 50, 95):  # blue in the place of others
        (tmp_path / "in" / f"{number:03d}.txt").write_text("a red wall of another")
    for number in (10, 70):
        path = tmp_path / "in" / f"{number:03d}.png"
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    found = diagnose(tmp_path / "in", model=from_object(Colours(), "colours"))
    by_reason = {
        reason: sorted(found.looked.key(each.row) for each in found.findings if each.reason == reason)
        for reason in ("mismatch", "turned-pixels")
    }
    assert by_reason["turned-pixels"] == ["010.png", "070.png"]
    assert {"005.png", "050.png", "095.png"} <= set(by_reason["mismatch"])
    assert len(by_reason["mismatch"]) <= 6
    notes = {each.note for each in found.findings if each.reason == "turned-pixels"}
    assert notes == {"a turn to the left by 180° fits"}
    assert found.costs[-1].what == "captions that do not fit"


def test_a_clean_set_is_not_accused_by_a_model_that_sees_nothing(tmp_path):
    write_lit(tmp_path / "in", 60)

    class Blind(Colours):
        def encode_image(self, images):
            return torch.ones(len(images), 4)

    found = diagnose(tmp_path / "in", model=from_object(Blind(), "blind"))
    assert "mismatch" not in found.counts()
    assert "turned-pixels" not in found.counts()


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def test_what_duplicates_cost_is_worked_by_hand():
    # Of a, a, b, c two of the 12 ordered pairs are equal. A row of a (half of all) meets k others of it among 2, each
    # with 1/3: 4/9 for one, 1/9 for two.
    cost = costs.of_equal("copies", [["a"], ["a"], ["b"], ["c"]], 3)
    assert cost.others == pytest.approx(2 * 2 / 12)
    assert cost.lowest_loss == pytest.approx(0.5 * (4 / 9 * math.log(2) + 1 / 9 * math.log(3)))


def test_no_features_undercut_the_loss_of_duplicates():
    """Two equal pictures in a batch of two: both directions are ln 2 for any captions' features."""
    from miniclip.loss import clip_loss

    image = torch.nn.functional.normalize(torch.randn(1, 8), dim=1).repeat(2, 1)
    texts = torch.nn.functional.normalize(torch.randn(2, 8), dim=1)
    bound = costs.of_equal("copies", [[0], [0]], 2).lowest_loss
    assert bound == pytest.approx(math.log(2))
    for scale in (1.0, 10.0, 100.0):
        assert float(clip_loss(image, texts, torch.tensor(scale))) >= bound - 1e-6


def test_what_pairs_by_chance_cost_is_worked_by_hand():
    # A quarter of the pairs; in a batch of three, two others: none, one or two of them by chance.
    expected = 1 / 4 * (2 * 1 / 4 * 3 / 4 * math.log(2) + 1 / 16 * math.log(3))
    assert costs.of_chance(0.25, 3).lowest_loss == pytest.approx(expected)
    assert costs.of_chance(0.0, 3).lowest_loss == 0
    assert costs.of_chance(1.0, 8).lowest_loss == pytest.approx(math.log(8))


def test_what_naming_costs_is_a_number_of_others_and_no_bound():
    cost = costs.of_naming(np.array([2.0, 0, 0, 0]), 4)
    assert (cost.others, cost.lowest_loss) == (pytest.approx(2 / 4 / 3 * 3), None)


# ---------------------------------------------------------------------------------------------------------------------
# Groups and lists


def test_groups_are_of_equal_captions_or_near_pictures_and_junk_joins_none(tmp_path):
    draw(tmp_path, "a", "A Thing.", 1)
    draw(tmp_path, "b", "a thing", 2)
    draw(tmp_path, "c", "another", 2)  # the picture of b
    draw(tmp_path, "d", "untitled", 3)
    draw(tmp_path, "e", "untitled", 4)
    draw(tmp_path, "f", ["a thing", "and more"], 5)
    found = diagnose(tmp_path)
    lists.write_groups(tmp_path, found)
    assert (tmp_path / "groups.csv").read_text() == "key,group\na.png,0\nb.png,0\nc.png,0\n"


def test_a_pair_is_dropped_once_for_its_gravest_reason():
    assert chosen_reasons("certain") == CERTAIN
    assert chosen_reasons("all") == tuple(REASONS)
    assert chosen_reasons("none") == ()
    assert chosen_reasons(" tiny , leak") == ("leak", "tiny")
    with pytest.raises(ValueError, match=r"'leeks' is no reason.*certain, all, none, leak"):
        chosen_reasons("leeks")


@pytest.mark.parametrize(
    "given, lacks",
    [
        ([], {"leak", "near-leak", "mismatch", "turned-pixels"}),
        (["--test"], {"mismatch", "turned-pixels"}),
        (["--model"], {"leak", "near-leak"}),
        (["--val", "--model"], set()),
    ],
)
def test_what_is_not_looked_for_is_no_reason(given, lacks):
    assert chosen_reasons("all", given) == tuple(reason for reason in REASONS if reason not in lacks)
    assert chosen_reasons("certain", given) == tuple(reason for reason in CERTAIN if reason not in lacks)
    for reason in REASONS:
        if reason not in lacks:
            assert chosen_reasons(reason, given) == (reason,)
            continue
        option = "--val or --test" if "leak" in reason else "--model"
        with pytest.raises(ValueError, match=f"names {reason}, which is looked for only with {option}"):
            chosen_reasons(f"all,{reason}", given)


def test_normalised_captions_are_equal_but_for_case_accents_encoding_and_punctuation():
    assert normalised("A  Café, at night!") == normalised("a cafe\u0301 at NIGHT")
    assert normalised("room 1") != normalised("room 2")


@pytest.mark.parametrize(
    "one, other",
    [
        ("เสือ", "เสื่อ"), ("दिन", "दान"), ("किताब", "कीताब"), ("بَيْت", "بيت"),  # tiger and mat, day and donation
        ("C++", "C#"), ("C", "C#"), ("5 %", "5"), ("10²", "102"), ("🐶", "🐱"), ("!", "?"), ("...", "!"),
    ],
)  # fmt: skip
def test_captions_that_differ_in_marks_and_symbols_are_different_ones(one, other, tmp_path):
    assert normalised(one) != normalised(other)
    for name, caption in (("a", one), ("b", other)):
        draw(tmp_path, name, [caption, "one thing"], 1)
    found = diagnose(tmp_path)
    assert "copy" not in found.counts()


def test_words_are_what_stands_between_punctuation_and_white_space():
    assert words_of("“It’s” 3\u00a0o'clock: rock 'n' roll—AC/DC's dogs'!_x") == [
        "it's", "3", "o'clock", "rock", "n", "roll", "ac", "dc's", "dogs", "x",
    ]  # fmt: skip
    assert words_of("นก กินปลา 🐈 C# e\u0301") == ["นก", "กินปลา", "🐈", "c#", "é"]


def test_check_and_doctor_agree_on_what_equal_captions_cost(tmp_path):
    captions = ["🐶", "🐱", "A dog", "a  DOG", "a dog!", "เสือ", "เสื่อ", "café", "cafe\u0301"]
    for number, caption in enumerate(captions):
        draw(tmp_path, str(number), caption, number)
    cost = diagnose(tmp_path, batch_size=4).costs[0]
    checked = count([Look(str(n), captions=(text,), size=(32, 32)) for n, text in enumerate(captions)], 9, 32, 77, 4)
    assert cost.lowest_loss == pytest.approx(checked.lowest_loss)
    # Two times two of nine rows have one other like them: one of 8, of which a batch of 4 draws 3 as if put back.
    p = 1 / 8
    chances = [math.comb(3, k) * p**k * (1 - p) ** (3 - k) for k in range(4)]
    expected = 4 / 9 * sum(chance * math.log(k + 1) for k, chance in enumerate(chances))
    assert cost.lowest_loss == pytest.approx(expected)


def test_arguments_out_of_range_are_refused(tmp_path, monkeypatch):
    draw(tmp_path, "a", "a thing")
    for options, words in (
        ({"near": 2}, "near is 2"),
        ({"image_size": 0}, "image_size is 0"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"workers": 0}, "workers is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            diagnose(tmp_path, **options)
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ValueError, match=r"needs imagehash: pip install 'miniclip\[doctor\]'"):
        diagnose(tmp_path)
