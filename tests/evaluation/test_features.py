"""Features computed once: what is kept is the same to the bit, what was begun is gone on with, what changed is new."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread, current_thread

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
import warm
from helpers import pack_folder, tiny_clip, write_pairs, write_picture
from PIL import Image
from torch import Tensor

from miniclip.common.waiting import PatientLoader
from miniclip.evaluation import features as embedding
from miniclip.evaluation.datasets.open import open_dataset
from miniclip.evaluation.datasets.sets import EvaluationSet
from miniclip.evaluation.encoder import from_clip
from miniclip.evaluation.features import (
    FeatureCache,
    ImageFeatures,
    encode_images,
    encode_texts,
    open_cache,
    own_tokenize,
)
from miniclip.inference.embedding.source_rows import SourceRows
from miniclip.weights.load import preprocess_for

NUM_IMAGES = 11


class Counting:
    """A tiny CLIP that knows how many images it has seen, and may be stopped. In float64, as in float32 the last bits
    hang on the size of a batch, and on the CPU how many."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.model, self.seen, self.stop_at = tiny_clip().double(), 0, stop_at

    def __call__(self, images: Tensor) -> Tensor:
        if self.stop_at is not None and self.seen >= self.stop_at:
            raise KeyboardInterrupt
        self.seen += len(images)
        return self.model.encode_image(images.double()).float()

    def encode(self, data: EvaluationSet, **options) -> ImageFeatures:
        return encode_images(self, preprocess_for(self.model.config), data, **options)


@pytest.fixture
def data(tmp_path: Path) -> EvaluationSet:
    folder = tmp_path / "pictures"
    return EvaluationSet("pictures", tuple(write_picture(folder / f"{n}.png", n) for n in range(NUM_IMAGES)))


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


def assert_same(found: ImageFeatures, expected: ImageFeatures) -> None:
    np.testing.assert_array_equal(found.indices, expected.indices)
    assert found.unreadable == expected.unreadable
    torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pictures_that_do_not_come_are_named(data, num_workers, monkeypatch):
    """The seventh is a pipe, which can't be opened until somebody opens the other end."""
    pipe = Path(data.images[6])
    content = pipe.read_bytes()
    pipe.unlink()
    os.mkfifo(pipe)
    monkeypatch.setattr(PatientLoader, "silence_s", 0.05)
    is_told = threading.Event()

    class Said(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            if "No batch has come for" in self.getvalue() and f"{pipe}" in self.getvalue():
                is_told.set()
            return written

    said = Said()
    monkeypatch.setattr(sys, "stderr", said)

    def fill() -> None:
        is_told.wait(60)
        pipe.write_bytes(content)

    threading.Thread(target=fill, daemon=True).start()
    assert Counting().encode(data, batch_size=3, num_workers=num_workers).indices.tolist() == list(range(NUM_IMAGES))
    third = ", ".join(str(path) for path in data.images[6:9])
    assert re.search(rf"No batch has come for \d+ s\. The next one needs {re.escape(third)}\.\n", said.getvalue())


def test_features_are_what_the_model_gives_image_after_image(data):
    one = Counting()
    preprocess = preprocess_for(one.model.config)
    found = Counting().encode(data, batch_size=4)
    with torch.no_grad():
        expected = torch.cat([one(preprocess(Image.open(path))[None]) for path in data.images])
    torch.testing.assert_close(found.features, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.unit.norm(dim=1), torch.ones(NUM_IMAGES))
    assert found.indices.tolist() == list(range(NUM_IMAGES))


def test_a_second_run_encodes_nothing_and_is_the_same_to_the_bit(data, cache):
    first, second, done = Counting(), Counting(), []
    expected = first.encode(data, batch_size=4, cache=cache, key="k" * 64)
    found = second.encode(data, batch_size=3, cache=cache, key="k" * 64, progress=done.append)
    assert (first.seen, second.seen, done) == (NUM_IMAGES, 0, [NUM_IMAGES])
    assert torch.equal(found.features, expected.features)
    np.testing.assert_array_equal(found.indices, expected.indices)


@pytest.mark.parametrize("options", [{}, {"key": "k" * 64}, {"cache": True}], ids=["neither", "key", "cache"])
def test_without_a_cache_or_a_key_nothing_is_kept(data, cache, options):
    if "cache" in options:
        options = {"cache": cache}
    for model in (Counting(), Counting()):
        model.encode(data, **options)
        assert model.seen == NUM_IMAGES
    assert not cache.folder.exists()


@pytest.mark.parametrize("stop_at", [2, 4, 10])
def test_a_stopped_run_is_gone_on_with_under_another_batch_size(data, cache, stop_at):
    expected = Counting().encode(data)
    stopped, second, third = Counting(stop_at), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        stopped.encode(data, batch_size=2, cache=cache, key="k" * 64)
    done: list[int] = []
    found = second.encode(data, batch_size=3, cache=cache, key="k" * 64, progress=done.append)
    assert second.seen == NUM_IMAGES - stop_at
    assert (done[0], done[-1]) == (stop_at, NUM_IMAGES)
    assert_same(found, expected)
    third.encode(data, cache=cache, key="k" * 64)
    assert third.seen == 0
    assert [path.name for path in cache.folder.iterdir()] == ["k" * 64 + ".safetensors"]  # the parts are in it


KILLED = """
import os, signal, sys
import torch
from test_features import Counting, cached
from miniclip.evaluation import features as embedding
embedding._SECONDS_BETWEEN_PARTS = 0.0
class Killed(Counting):
    def __call__(self, images):
        if self.seen == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(images)
cached(Killed(), sys.argv[1], sys.argv[2])
"""


def cached(model: Counting, folder: str, cache: str) -> ImageFeatures:
    return model.encode(open_dataset(folder), batch_size=2, cache=FeatureCache(cache), key="k" * 64)


@pytest.mark.long
def test_a_killed_run_loses_what_no_part_has_and_no_more(tmp_path):
    folder = tmp_path / "images"
    for n in range(NUM_IMAGES):
        write_picture(folder / f"class {n % 2}" / f"{n}.png", n)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "cache")]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    second = Counting()
    found = cached(second, str(folder), str(tmp_path / "cache"))
    assert second.seen == NUM_IMAGES - 6
    assert_same(found, Counting().encode(open_dataset(folder)))


def test_unreadable_images_are_tried_again_and_count_once_they_are_mended(data, cache):
    good = data.images[3].read_bytes()
    data.images[3].write_bytes(b"no picture")
    first, second, third = Counting(), Counting(), Counting()
    found = first.encode(data, cache=cache, key="k" * 64)
    assert 3 not in found.indices
    assert len(found.unreadable) == 1
    assert "3.png" in found.unreadable[0]
    assert_same(second.encode(data, cache=cache, key="k" * 64), found)
    assert second.seen == 1  # the picture that takes its place
    data.images[3].write_bytes(good)
    assert_same(third.encode(data, cache=cache, key="k" * 64), Counting().encode(data))


def test_a_damaged_file_of_the_cache_is_computed_anew(data, cache):
    expected = Counting().encode(data, cache=cache, key="k" * 64)
    (path,) = cache.folder.iterdir()
    for content in (b"", path.read_bytes()[:-5], b"no tensors at all"):
        path.write_bytes(content)
        again = Counting()
        assert torch.equal(again.encode(data, cache=cache, key="k" * 64).features, expected.features)
        assert again.seen == NUM_IMAGES


@pytest.fixture
def homeless(monkeypatch, tmp_path):  # pytest asks for the user when it makes that folder
    """A user without a name, and no HOME, as in a container that was started with --user 54321."""
    for name in ("HOME", "XDG_CACHE_HOME", "MINICLIP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)


def test_who_has_no_home_is_warned_and_keeps_no_features_unless_a_folder_is_named(tmp_path, homeless):
    with pytest.warns(UserWarning, match=r"not kept.*home.*set HOME, or MINICLIP_CACHE"):
        assert open_cache(None) is None
    assert open_cache(str(tmp_path)).folder == tmp_path
    with pytest.raises(ValueError, match=r"~/features needs a home"):
        open_cache("~/features")


def test_a_cache_that_can_not_be_written_costs_a_warning_and_no_features(data, tmp_path):
    expected = Counting().encode(data)
    (tmp_path / "file").write_text("in the way")
    cache = FeatureCache(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match=r"features can't be kept in .*file/cache: Not a directory"):
        assert_same(Counting().encode(data, cache=cache, key="k" * 64), expected)
    # What stopped the run is what is told, not that its part could not be kept.
    with pytest.warns(UserWarning, match="features can't be kept"), pytest.raises(KeyboardInterrupt):
        Counting(4).encode(data, batch_size=2, cache=cache, key="k" * 64)


def test_features_without_a_direction_are_an_error(data):
    preprocess = preprocess_for(tiny_clip().config)
    for factor, says in ((float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "zero")):
        with pytest.raises(ValueError, match=f"features that are {says}, for images of pictures"):
            encode_images(lambda images, by=factor: torch.full((len(images), 4), by), preprocess, data)


# ---------------------------------------------------------------------------------------------------------------------
# What stands for what


def test_a_key_depends_on_every_fact_and_is_none_if_one_is_not_known():
    facts = ["images", False, "weights", ["a", "b"]]
    keys = {FeatureCache.key(*facts), FeatureCache.key("texts", *facts[1:]), FeatureCache.key(*facts[:-1], ["ab"])}
    assert len(keys) == 3
    assert FeatureCache.key(*facts) in keys
    assert FeatureCache.key("images", None) is None


def test_files_are_known_by_path_size_and_time(data):
    before = data.fingerprint()
    assert before == replace(data, name="other").fingerprint()
    assert before != replace(data, images=data.images[::-1]).fingerprint()
    os.utime(data.images[5], ns=(1, 1))
    after = data.fingerprint()
    assert after != before
    edited = bytearray(data.images[5].read_bytes())
    edited[-1] ^= 1
    data.images[5].write_bytes(edited)  # as what unpacks an archive, it gets its time back
    os.utime(data.images[5], ns=(1, 1))
    assert data.fingerprint() != after
    after = data.fingerprint()
    data.images[5].unlink()
    assert data.fingerprint() != after


def test_pictures_bytes_and_addresses_are_known_by_what_they_are():
    picture = Image.new("RGB", (3, 2))
    others = [
        picture,
        picture.resize((2, 3)),
        picture.convert("L"),
        b"a",
        b"b",
        "http://a/1.png",
        "http://a/2.png",
        None,
    ]
    prints = [EvaluationSet("x", (each,), keys=("key",)).fingerprint() for each in others]
    assert len(set(prints)) == len(others)
    assert EvaluationSet("x", (picture.copy(),), keys=("key",)).fingerprint() == prints[0]


def test_pictures_of_equal_pixels_are_known_by_what_gives_them_their_colours():
    picture = Image.frombytes("P", (2, 2), bytes([0, 1, 2, 1]))
    colours = [255, 0, 0, 0, 255, 0, 0, 0, 255]

    def painted(mode: str, palette: list[int], rawmode: str = "RGB", **info: object) -> Image.Image:
        found = picture.copy() if mode == "P" else Image.frombytes(mode, (2, 2), picture.tobytes() * len(mode))
        if palette:
            found.putpalette(palette, rawmode)
        found.info |= info
        return found

    def turned_colours(picture: Image.Image) -> Image.Image:
        found = picture.copy()
        found.putpalette(colours[3:] + colours[:3])
        return found

    pa = painted("P", colours).convert("PA")
    kinds = [
        painted("P", colours),
        painted("P", colours[3:] + colours[:3]),
        painted("P", colours, transparency=1),
        painted("P", colours, transparency=2),
        painted("P", colours, transparency=b"\x00\x80\xff"),
        painted("P", [255, 0, 0, 9, 0, 255, 0, 9, 0, 0, 255, 9], "RGBA"),
        painted("P", [255, 0, 0, 8, 0, 255, 0, 9, 0, 0, 255, 9], "RGBA"),
        pa,
        turned_colours(pa),
        painted("L", []),
        painted("L", [], transparency=1),
        painted("RGB", []),
        painted("RGB", [], transparency=(0, 1, 2)),
    ]

    def known(picture: Image.Image) -> tuple[str, str]:
        data = EvaluationSet("x", (picture,), keys=("key",))
        return data.fingerprint(), SourceRows(data).fingerprint()

    prints = [known(each) for each in kinds]
    assert [len(set(each)) for each in zip(*prints, strict=True)] == [len(kinds)] * 2
    assert [known(each.copy()) for each in kinds] == prints
    for each in kinds:
        each.convert("RGBA")  # which brings a palette into another shape
    assert [known(each) for each in kinds] == prints


@pytest.mark.parametrize("mode", ["1", "I", "L", "RGB", "P", "RGBA"])
def test_a_picture_that_was_made_of_one_with_a_transparent_palette_has_a_fingerprint(mode):
    palette = Image.new("P", (4, 4))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.info["transparency"] = b"\x00\xff"  # Pillow keeps it in other modes, where it can't be followed
    picture = palette.convert(mode)
    same = EvaluationSet("one", (picture,), keys=("key",)).fingerprint()
    assert same == EvaluationSet("one", (picture.copy(),), keys=("key",)).fingerprint()
    picture.putpixel((0, 0), 1)
    assert same != EvaluationSet("one", (picture,), keys=("key",)).fingerprint()


def test_a_palette_of_other_colours_is_not_answered_from_the_cache(tmp_path):
    preprocess = preprocess_for(tiny_clip().config)
    cache = FeatureCache(tmp_path)

    def mean_colour(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(2).mean(2) + torch.tensor([3.0, 5.0, 7.0])

    found = []
    for colour in ([255, 0, 0], [0, 0, 255]):
        picture = Image.new("P", (32, 32))
        picture.putpalette(colour)
        data = EvaluationSet("plain", (picture,), keys=("key",))
        encoded = [
            encode_images(mean_colour, preprocess, data, cache=kept, key=FeatureCache.key(data.fingerprint()))
            for kept in (cache, None)
        ]
        assert torch.equal(encoded[0].features, encoded[1].features)
        found.append(encoded[0].features)
    assert not torch.equal(*found)


def test_shards_are_known_by_their_content_wherever_they_lie(tmp_path):
    write_pairs(tmp_path / "pairs", 5)
    pack_folder(tmp_path / "pairs", tmp_path / "shards")
    first = open_dataset(tmp_path / "shards", task="retrieval").fingerprint()
    (tmp_path / "shards").rename(tmp_path / "moved")
    assert open_dataset(tmp_path / "moved", task="retrieval").fingerprint() == first
    write_pairs(tmp_path / "others", 6)
    pack_folder(tmp_path / "others", tmp_path / "more")
    assert open_dataset(tmp_path / "more", task="retrieval").fingerprint() != first


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_columns_of_images_in_one_file_are_told_apart(tmp_path, kind):
    columns = {
        side: [(write_picture(tmp_path / side / f"{n}.png", first + n)).read_bytes() for n in range(3)]
        for first, side in enumerate(("left", "right"))
    }
    content = datasets.Dataset.from_dict({**columns, "label": ["a", "b", "a"]})
    source = tmp_path / "set"
    if kind == "parquet":
        source = tmp_path / "set.parquet"
        pyarrow.parquet.write_table(content.data.table, source)
    else:
        content.save_to_disk(source)
    left, right = (open_dataset(source, label_column="label", image_column=side) for side in ("left", "right"))
    assert left.images[1] == columns["left"][1]
    assert right.images[1] == columns["right"][1]
    assert left.fingerprint() != right.fingerprint()
    again = open_dataset(source, label_column="label", image_column="left")
    assert again.fingerprint() == left.fingerprint()


def test_the_least_recently_used_goes_when_room_is_needed(tmp_path):
    cache = FeatureCache(tmp_path / "cache", limit_bytes=10_000)
    names = [letter * 64 for letter in "abc"]
    for age, name in enumerate(names[:2]):
        cache.write(name, {"features": torch.zeros(1000)})
        os.utime(tmp_path / "cache" / f"{name}.safetensors", ns=(age, age))
    (tmp_path / "cache" / "notes.txt").write_text("not ours")
    assert cache.read(names[0]) is not None  # now the older one was used last
    cache.write(names[2], {"features": torch.zeros(1000)})
    assert [name for name in names if cache.read(name) is not None] == [names[0], names[2]]
    assert (tmp_path / "cache" / "notes.txt").is_file()


@pytest.mark.parametrize(
    ("variable", "where"), [("MINICLIP_CACHE", "features"), ("XDG_CACHE_HOME", "miniclip/features")]
)
def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path, variable, where):
    monkeypatch.delenv("MINICLIP_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert FeatureCache().folder == tmp_path / where


# ---------------------------------------------------------------------------------------------------------------------
# Texts that are cut


def test_texts_that_are_cut_are_one_note_of_all_in_the_order_that_they_have(monkeypatch):
    """Those of the same tokens are encoded once, and count each."""
    monkeypatch.setattr(embedding, "_PROMPTS_PER_BATCH", 2)
    model = from_clip(tiny_clip(), preprocess_for(tiny_clip().config), "tiny")
    texts = ["an owl", "a zebra " * 30, "an owl " * 20, "An owl " * 20, "a kea"]
    with pytest.warns(UserWarning, match="cut") as caught:
        encode_texts(model, texts, model.tokenize)
    (note,) = caught
    assert note.category is UserWarning
    assert str(note.message).startswith("tiny reads 16 tokens; 3 of 5 texts are longer and were cut, the first: 'a zeb")


def test_threads_that_encode_at_once_have_notes_of_their_own_and_leave_the_filters_of_warnings_alone(monkeypatch):
    """The second begins within the first and ends after it."""
    shown: list[tuple[str, str]] = []
    # Both are what `catch_warnings` puts back, which would be that of another thread.
    monkeypatch.setattr(
        warnings, "showwarning", lambda message, *_: shown.append((current_thread().name, str(message)))
    )
    monkeypatch.setattr(warnings, "filters", [("always", None, UserWarning, None, 0), *warnings.filters])
    is_begun = {name: Event() for name in ("first", "second")}
    first_is_done = Event()
    filters, show = list(warnings.filters), warnings.showwarning

    def encode(name: str, long: str) -> None:
        model = from_clip(tiny_clip(), preprocess_for(tiny_clip().config), name)

        def waiting(tokens: Tensor) -> Tensor:
            is_begun[name].set()
            assert (is_begun["second"] if name == "first" else first_is_done).wait(60)
            warnings.warn(f"another library's, {name}", stacklevel=1)
            return model.encode_text(tokens)

        encode_texts(replace(model, encode_text=waiting), ["an owl", long * 30], model.tokenize)

    first = Thread(target=encode, args=("first", "zebra "), name="first")
    second = Thread(target=encode, args=("second", "kea "), name="second")
    first.start()
    assert is_begun["first"].wait(60)
    second.start()
    first.join(60)
    first_is_done.set()
    second.join(60)
    assert warnings.filters == filters
    assert warnings.showwarning is show
    assert [(thread, note.split(" reads")[0]) for thread, note in shown] == [
        ("first", "another library's, first"),
        ("first", "first"),
        ("second", "another library's, second"),
        ("second", "second"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


TEXTS = [f"a photo of thing {n}{' indeed' * (n % 5)}" for n in range(40)] * 2


def work(rank: int, world_size: int, folder: str, cache: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=world_size)
    embedding._PROMPTS_PER_BATCH = 8  # so that there are several batches to share
    model = Counting()
    images = cached(model, folder, cache)
    done: list[int] = []
    texts = encode_texts(model.model, TEXTS, own_tokenize(model.model), done.append)
    torch.save((model.seen, images.features, torch.from_numpy(images.indices), texts, done), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_what_one_process_began_any_number_ends(tmp_path, monkeypatch, world_size):
    folder = tmp_path / "images"
    for n in range(NUM_IMAGES):
        write_picture(folder / f"class {n % 2}" / f"{n}.png", n)
    (folder / "class 1" / "spoilt.png").write_bytes(b"no picture")
    stopped = Counting(stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        cached(stopped, str(folder), str(tmp_path / "cache"))
    with tempfile.TemporaryDirectory() as out:
        warm.spawn(work, (world_size, str(folder), str(tmp_path / "cache"), out), world_size)
        found = [torch.load(Path(out, f"{rank}.pt")) for rank in range(world_size)]
    alone = Counting()
    expected = alone.encode(open_dataset(folder))
    monkeypatch.setattr(embedding, "_PROMPTS_PER_BATCH", 8)
    texts = encode_texts(alone.model, TEXTS, own_tokenize(alone.model))
    each = -(-(NUM_IMAGES + 1 - 4) // world_size)
    for seen, features, indices, found_texts, done in found:
        assert seen == each
        torch.testing.assert_close(features, expected.features, rtol=0, atol=1e-6)
        assert indices.tolist() == expected.indices.tolist()
        torch.testing.assert_close(found_texts, texts, rtol=0, atol=1e-6)
        assert done[-1] == 40
    again = Counting()
    cached(again, str(folder), str(tmp_path / "cache"))
    assert again.seen == 1  # the spoilt one, tried again
