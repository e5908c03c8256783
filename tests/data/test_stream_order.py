"""Which tars the readers of a stream take: shared without a gap, and gone on from wherever a run was."""

from collections import Counter
from itertools import islice

import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from miniclip.data.sampling.stream import Mark, Progress, Streaming, TarOrder, refuse_idle_readers


def shared(progress: Progress, each: int) -> list[list[int]]:
    """The first positions of each reader."""
    readers = len(progress.tars)
    return [list(islice(progress.positions(), n, n + readers * each, readers)) for n in range(readers)]


@pytest.mark.parametrize("num_tars", [1, 3, 50])
def test_each_pass_is_each_tar_once_in_an_order_of_its_own(num_tars):
    order = TarOrder(num_tars, seed=1)
    passes = [[order[number * num_tars + place] for place in range(num_tars)] for number in range(4)]
    for number, found in enumerate(passes):
        assert sorted(found) == [(number, tar) for tar in range(num_tars)]
    assert num_tars < 50 or len({tuple(tar for _, tar in found) for found in passes}) == 4


def test_a_draw_is_any_tar_alike_whatever_came_before():
    order = TarOrder(5, seed=2, resampled=True)
    draws = Counter(order[position][1] for position in range(5000))
    assert sorted(draws) == [0, 1, 2, 3, 4]
    assert all(900 < count < 1100 for count in draws.values())
    assert any(order[n][1] == order[n + 1][1] for n in range(20))


@pytest.mark.parametrize("world_size, num_workers", [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2)])
def test_readers_take_what_webdatasets_own_splitters_give_them(monkeypatch, world_size, num_workers):
    positions = shared(Progress.start(world_size * num_workers), 7)
    for rank in range(world_size):
        for worker in range(num_workers):
            for name, value in {"RANK": rank, "WORLD_SIZE": world_size}.items():
                monkeypatch.setenv(name, str(value))
            for name, value in {"WORKER": worker, "NUM_WORKERS": num_workers}.items():
                monkeypatch.setenv(name, str(value))
            split = wds.split_by_worker(wds.split_by_node(iter(range(7 * world_size * num_workers))))
            assert list(split) == positions[rank + world_size * worker]


# Of each stretch of a run: how many tars each reader had done when it was stopped.
@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=4))
def test_whatever_the_readers_of_each_stretch_every_tar_is_taken_and_none_twice(stretches):
    progress, taken = Progress.start(len(stretches[0])), Counter[int]()
    for tars in stretches:
        progress = progress.shared_by(len(tars))
        before = progress.tars
        for reader, (mine, old, new) in enumerate(zip(shared(progress, 40), before, tars, strict=True)):
            taken.update(mine[old : old + new])
            progress = progress.after([Mark(reader, old + new, 0)])
    progress = progress.shared_by(9)  # as none had
    missing = [position for position in range(progress.first + 400) if position not in taken]
    assert max(taken.values(), default=1) == 1
    assert list(islice(progress.positions(), 20)) == missing[:20]


def test_the_same_number_of_readers_goes_on_inside_its_blocks_and_another_begins_them_again():
    progress = Progress.start(2).after([Mark(0, 2, 5), Mark(1, 1, 7)])
    assert progress.shared_by(2) == progress
    assert progress.shared_by(3) == Progress((0, 0, 0), (0, 0, 0), first=3)  # 0, 2 and 1 are done
    assert Progress.start(2).after([Mark(0, 3, 0)]).shared_by(1) == Progress((0,), (0,), first=1, done=(2, 4))


@pytest.mark.parametrize(
    "num_tars, num_workers, world_size, words",
    [
        (3, 4, 1, ["3 tars", "4 readers", "data.num_workers to 3", "resampled"]),
        (3, 2, 2, ["3 tars", "4 readers", "2 for each of 2 processes", "data.num_workers to 1", "resampled"]),
        (1, 0, 2, ["1 tar ", "2 readers", "1 processes at most", "resampled"]),
    ],
)
def test_more_readers_than_tars_are_refused_with_both_numbers_and_the_remedies(
    num_tars, num_workers, world_size, words
):
    with pytest.raises(ValueError, match=r"data\.order is stream") as error:
        refuse_idle_readers(num_tars, num_workers, world_size)
    assert all(word in str(error.value) for word in words), error.value
    refuse_idle_readers(max(1, num_workers) * world_size, num_workers, world_size)


@pytest.mark.parametrize("name, value", [("shuffle", 0), ("epoch_samples", 0)])
def test_a_setting_below_one_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"data\.stream\.{name} is {value}.*at least 1"):
        Streaming(**{name: value})
