"""benchmarks/time_to_quality.py and scenes.py: all of it at tiny size, and its arithmetic by hand."""

import csv
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from miniclip.images import Preprocess, normalize

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import scenes  # noqa: E402
import sides  # noqa: E402
import time_to_quality  # noqa: E402
from sides import Batches, Clock, Point, Stretch, stretches  # noqa: E402
from time_to_quality import TINY, Bench, best, reached  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The scenes' tiny comparison."""
    bench = Bench(tmp_path_factory.mktemp("quality") / "tiny", "scenes", TINY["scenes"])
    return bench, bench.compare([0])


def test_no_class_left_out_is_ever_seen_and_each_word_is():
    unseen = [scenes.CLASSES[n] for n in range(len(scenes.CLASSES)) if scenes.is_unseen(n)]
    seen = [scenes.CLASSES[n] for n in range(len(scenes.CLASSES)) if not scenes.is_unseen(n)]
    assert (len(unseen), len(seen)) == (160, 1120)
    for words in zip(*seen, strict=True):
        assert len(set(words)) in (8, 4, 5)
    for words in zip(*unseen, strict=True):
        counts = Counter(words).values()
        assert max(counts) - min(counts) <= 1


def test_scenes_are_split_by_seed_and_their_captions_say_what_they_are(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        scenes.make(tmp_path / name, seed, pairs_per_class=2, every=40)
    a, b, c = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).glob("*/*")} for n in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert len(set(a.values()) & set(c.values())) < len(a) / 4  # some captions alone
    pictures = [data for path, data in a.items() if path.suffix == ".png"]
    assert len(set(pictures)) == len(pictures)  # none is in two parts
    for path in (tmp_path / "a").glob("*/*.txt"):
        number = int(path.stem.split("_")[0])
        shape, colour, filling, place = scenes.CLASSES[number]
        lines = path.read_text().splitlines()
        assert len(set(lines)) == (1 if path.parent.name == "test" else 2)
        for line in lines:
            assert all(word in line for word in (shape, colour, place))
            assert filling in line or scenes.FILLINGS[filling] in line
        assert path.parent.name == "test" or not scenes.is_unseen(number)
    with open(tmp_path / "a/unseen.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(scenes.is_unseen(int(Path(row["filepath"]).stem.split("_")[0])) for row in rows)
    with pytest.raises(ValueError, match="exists already"):
        scenes.make(tmp_path / "a")


def test_pictures_show_the_colour_and_the_place():
    random = np.random.default_rng(0)
    names, inks = list(scenes.COLOURS), np.array(list(scenes.COLOURS.values()))
    for number in range(0, len(scenes.CLASSES), 37):
        _, colour, filling, place = scenes.CLASSES[number]
        pixels = np.asarray(scenes.draw(number, random), dtype=float)
        change = np.abs(pixels - np.median(pixels, axis=(0, 1))).sum(axis=2)  # from the paper
        rows, columns = np.nonzero(change > max(80, change.max() / 2))
        for at, side in zip((columns.mean(), rows.mean()), scenes.PLACES[place], strict=True):
            off = at - (scenes.SIZE - 1) / 2
            assert (off < -4, off > 4) == (side < 0, side > 0)
        if filling == "plain":
            ink = np.median(pixels[rows, columns], axis=0)
            assert names[np.abs(inks - ink).sum(axis=1).argmin()] == colour


def test_a_score_is_reached_between_two_evaluations():
    points = [Point(10, 640, 2.0, 4.0, 20.0), Point(20, 1280, 4.0, 10.0, 15.0), Point(30, 1920, 6.0, 16.0, 40.0)]
    assert reached(points, 10.0) == Point(5, 320, 1.0, 2.0, 10.0)  # on the way from nothing
    assert reached(points, 30.0) == Point(26, 1664, 5.2, 13.6, 30.0)  # 15 + 0.6 * 25
    assert reached(points, 40.0) == points[2]
    assert reached(points, 40.1) is None
    assert best([*points, replace(points[2], step=40)]) == points[2]


def test_evaluations_share_a_run_out():
    assert stretches(2) == [(0, 1), (1, 1)]
    for steps in (5, 100, 401):
        parts = stretches(steps)
        assert len(parts) == min(steps, sides.EVALUATIONS)
        assert [first + count for first, count in parts] == [*(first for first, _ in parts[1:]), steps]


@pytest.mark.long
def test_both_sides_see_the_same_batches(tiny):
    bench, _ = tiny
    batches = Batches(bench.work / "seed0", bench.clip, bench.augmentation, 16, 0)
    clock = Clock()
    with clock:
        stretch = list(Stretch(batches, 1, 2, bench.clip, clock))
    assert 0 <= clock.cpu_s < 0.01  # batches are not counted
    for n, (images, tokens) in enumerate(stretch, start=1):
        vision = bench.clip.vision
        torch.testing.assert_close(images, normalize(batches[n].images, vision.mean, vision.std))
        length = batches[n].tokens.shape[1]
        assert tokens.shape == (16, bench.clip.text.context_length)
        assert torch.equal(tokens[:, :length], batches[n].tokens)
        assert not tokens[:, length:].any()


@pytest.mark.long
def test_the_examination_of_open_clips_weights_is_that_of_open_clip(tiny, monkeypatch):
    """Its own encoders on its own preprocessing of the same files find the same classes."""
    bench, _ = tiny
    made = []
    plain = sides.open_clip.model.CLIP
    monkeypatch.setattr(sides.open_clip.model, "CLIP", lambda *a, **k: made.append(plain(*a, **k)) or made[-1])
    folder = bench.work / "seed0"
    exam = sides.Examination(folder / "data/val.csv", Preprocess(32, *_mean_and_std(bench)))
    course = sides.Course(exam)
    batches = Batches(folder, bench.clip, bench.augmentation, 16, 0)
    sides.train(sides.open_clip_side(bench.clip, batches, 2, 1e-3, 0.5, 0), course, 2, 16)
    model = made[0].eval()
    texts = [f"a {name}" for name in (folder / "data/val.classnames.txt").read_text().splitlines()]
    tokens = sides.open_clip.SimpleTokenizer(context_length=32)(texts)
    with torch.no_grad():
        cosines = model.encode_image(exam.images, normalize=True) @ model.encode_text(tokens, normalize=True).T
    names = {text.removeprefix("a "): n for n, text in enumerate(texts)}
    with open(folder / "data/val.csv", newline="") as file:
        labels = torch.tensor([names[row["label"]] for row in csv.DictReader(file)])
    score = 100 * (cosines.argmax(dim=1) == labels).double().mean().item()
    assert course.points[-1].val == pytest.approx(score)
    assert course.points[-1].samples == 32


def _mean_and_std(bench):
    return bench.clip.vision.mean, bench.clip.vision.std


@pytest.mark.long
def test_a_comparison_chooses_by_validation_and_is_not_run_twice(tiny, capsys):
    bench, comparison = tiny
    values = {setting: point.val for setting, point in comparison.grid.items()}
    assert values[comparison.chosen] == max(values.values())
    files = sorted(bench.work.glob("seed*/*.json"))
    before = {path: path.stat().st_mtime_ns for path in files}
    again = bench.compare([0])
    assert again == comparison
    assert {path: path.stat().st_mtime_ns for path in sorted(bench.work.glob("seed*/*.json"))} == before
    for _, theirs, ours in comparison.rows:
        assert theirs.tests["best"].keys() == ours.tests["best"].keys() == {"scenes", "unseen"}
        assert {"top1", "r1"} == theirs.tests["best"]["scenes"].keys()
        for run in (theirs, ours):
            seconds = [point.cpu_s for point in run.points]
            assert seconds == sorted(seconds)
            assert all(math.isfinite(point.wall_s) and 0 <= point.val <= 100 for point in run.points)
        is_reached = reached(ours.points, best(theirs.points).val) is not None
        assert is_reached == ("reached" in ours.tests)


@pytest.mark.long
def test_the_report_has_every_seed_and_the_picture_is_drawn(tiny, tmp_path):
    _, comparison = tiny
    text = comparison.markdown()
    assert text.startswith("## scenes\n")
    assert re.search(r"^\| 0 \| open_clip's best \| \d+\.\d \| \d+ \| \d+ \|", text, re.MULTILINE)
    assert re.search(r"^\| 0 \| ours, best \|", text, re.MULTILINE)
    time_to_quality.draw_curves([comparison], tmp_path / "new/curves.png")
    assert (tmp_path / "new/curves.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_of_what_it_takes_to_open_clips_best():
    theirs = time_to_quality.Run([Point(10, 640, 20.0, 30.0, 50.0), Point(20, 1280, 40.0, 60.0, 40.0)], {})
    ours = time_to_quality.Run([Point(4, 128, 4.0, 5.0, 100.0)], {})
    never = time_to_quality.Run([Point(4, 128, 4.0, 5.0, 49.0)], {})
    rows = [(0, theirs, ours), (1, theirs, never)]
    found = time_to_quality.Comparison(bench=None, grid={}, chosen=(16, 1e-3, 0.5), rows=rows, costs={}).ratios()
    assert found == {"steps": [5.0, 0.0], "samples": [10.0, 0.0], "processor": [10.0, 0.0], "wall-clock": [12.0, 0.0]}


def run_command(work, monkeypatch, *options):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["time_to_quality.py", "--tiny", "--seeds", "0", f"--work={work}", *options])
    time_to_quality.main()
    torch.set_num_threads(threads)


def test_the_command_reports_on_what_has_run(tiny, tmp_path, monkeypatch, capsys):
    bench, comparison = tiny
    out, picture = tmp_path / "report.md", tmp_path / "curves.png"
    work = bench.work.parents[1]
    run_command(work, monkeypatch, "--sets=scenes", f"--out={out}", f"--picture={picture}")
    assert out.read_text() == capsys.readouterr().out
    assert comparison.markdown() in out.read_text()
    assert picture.is_file()


@pytest.mark.long
def test_the_demos_set_runs_at_tiny_size(tmp_path, monkeypatch, capsys):
    run_command(tmp_path, monkeypatch, "--sets=digits")
    assert "## digits" in capsys.readouterr().out
    assert (tmp_path / "tiny/time-to-quality.png").is_file()
    kept = json.loads(next((tmp_path / "tiny/digits/seed0").glob("ours_*.json")).read_text())
    assert len(kept["points"]) == 2
