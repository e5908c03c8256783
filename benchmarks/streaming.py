"""Training from tars: exact order, stream and open_clip's webdataset pipeline; the first batch; memory.

    python benchmarks/streaming.py [--images 1024] [--rounds 5] [--passes 20] [--out benchmarks/results/streaming.md]

Throughput is processor time of this process with one thread and no workers, as the machine may be busy: a pass of JPEGs
in four tars to batches of 224², sides in turns, medians after a round that does not count. Before the first batch: the
bytes that a server on the loopback sends. Memory: a stream with two workers, all processes, shared pages counted once.
"""

from __future__ import annotations

import argparse
import http.server
import importlib.metadata
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import samples
import steps
import torch
from machine import this_machine, versions

from miniclip.common.files import write_text
from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.module import PairDataModule
from miniclip.data.pack import pack
from miniclip.data.sample_files import Packing
from miniclip.data.sources import read_pairs

BATCH_SIZE, IMAGE_SIZE, SMALL_TARS = 64, 224, 50
LIBRARIES = ("torch", "open_clip_torch", "webdataset")


def training_data(source: str | Path, order: str, **options: Any) -> PairDataModule:
    settings = {"batch_size": BATCH_SIZE, "num_workers": 0, "image_size": IMAGE_SIZE, **options}
    data = PairDataModule(str(source), order=order, **settings)  # type: ignore[arg-type]
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    facts = {"global_step": 0, "global_rank": 0, "world_size": 1, "is_global_zero": True}
    facts |= {"max_steps": 10**6, "max_epochs": -1}
    data.trainer = SimpleNamespace(strategy=strategy, **facts)  # type: ignore[assignment]
    data.setup("fit")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Throughput


def a_pass(loader: Any) -> Callable[[], None]:
    def run() -> None:
        for _ in loader:
            pass

    return run


def throughput(folder: Path, side: int, count: int, rounds: int) -> dict[str, float]:
    """Images per processor second of each side."""
    shards = samples.shards(folder, count, side)
    sides = {
        "miniclip, exact": a_pass(training_data(shards, "exact").train_dataloader()),
        "miniclip, stream": a_pass(training_data(shards, "stream").train_dataloader()),
        "open_clip": a_pass(steps.open_clips_data(shards, count, BATCH_SIZE, IMAGE_SIZE, 0).dataloader),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in (*list(sides)[number % 3 :], *list(sides)[: number % 3]):
            begin = time.process_time()
            sides[name]()
            if number:
                seconds[name].append(time.process_time() - begin)
    return {name: count / statistics.median(values) for name, values in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Before the first batch


class Counting(http.server.SimpleHTTPRequestHandler):
    sent = requests = 0

    def log_message(self, *_: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        data = source.read()
        Counting.sent, Counting.requests = Counting.sent + len(data), Counting.requests + 1
        outputfile.write(data)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Counting(*a, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def before_the_first_batch(folder: Path, count: int) -> dict[str, tuple[int, float]]:
    """Files and megabytes that are fetched."""
    samples.shards(folder, count, 256)  # draws the pictures
    tars = folder / "bucket"
    pack(
        read_pairs(folder / f"pairs-{count}-256"),
        tars,
        source="x",
        packing=Packing(samples_per_shard=-(-count // SMALL_TARS)),
    )
    names = f"{{00000..{len(list(tars.glob('*.tar'))) - 1:05d}}}.tar"
    found = {}
    with served(tars) as url:

        def fetched(name: str, action: Callable[[], object]) -> None:
            Counting.sent = Counting.requests = 0
            with tempfile.TemporaryDirectory(dir=folder) as cache, environment("MINICLIP_CACHE", cache):
                action()
            found[name] = Counting.requests, Counting.sent / 1e6

        def exact() -> None:
            index_shards(f"{url}/{names}", folder / "index")
            next(iter(training_data(folder / "index", "exact").train_dataloader()))

        fetched("index-only, then exact", exact)
        fetched("stream", lambda: next(iter(training_data(f"{url}/{names}", "stream").train_dataloader())))
    size = sum(tar.stat().st_size for tar in tars.glob("*.tar")) / 1e6
    found["all there is"] = len(list(tars.glob("*.tar"))), size
    return found


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    yield
    if before is None:
        del os.environ[name]
    else:
        os.environ[name] = before


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory(folder: Path, count: int, passes: int) -> list[float]:
    """Megabytes after each pass."""
    data = training_data(samples.shards(folder, count, 256), "stream", num_workers=2)
    loader, found = data.train_dataloader(), []
    for _ in range(passes):
        for _ in loader:
            assert data.trainer is not None
            data.trainer.global_step += 1  # type: ignore[misc]
        data.state_dict()  # as at a checkpoint
        found.append(sum(map(proportional_mb, ["self", *(child.pid for child in multiprocessing.active_children())])))
    return found


def proportional_mb(pid: object) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1000


# ---------------------------------------------------------------------------------------------------------------------


def report(options: argparse.Namespace, folder: Path) -> str:
    machine, library = this_machine(), versions()
    library["webdataset"] = importlib.metadata.version("webdataset")
    held = memory(folder, options.images, options.passes)
    return f"""# Training from tars: exact, stream, open_clip

`python benchmarks/streaming.py --images {options.images} --rounds {options.rounds}`, {time.strftime("%Y-%m-%d")}:
{machine.processor}, {machine.name}, one thread; {", ".join(f"{name} {library[name]}" for name in LIBRARIES)}.

Images per processor second: {options.images} JPEGs in four tars to batches of {BATCH_SIZE} of {IMAGE_SIZE}², without
workers, sides in turns, medians of {options.rounds} passes. open_clip normalises on the processor, miniclip on the
device.

| JPEGs of | miniclip, exact | miniclip, stream | open_clip |
|---|---|---|---|
{rows((f"{side}²", *rates(folder, side, options)) for side in (256, 512))}

Before the first batch of {BATCH_SIZE}, from a bucket of {SMALL_TARS} tars over http:

| | requests | MB |
|---|---|---|
{rows((name, str(n), f"{mb:.1f}") for name, (n, mb) in before_the_first_batch(folder, 1000).items())}

Memory of a stream of {options.images} JPEGs of 256², two workers, all processes, shared pages counted once and those of
libraries' files left out, in MB after passes 1 to {options.passes}: {", ".join(f"{mb:.0f}" for mb in held)}.
"""


def rates(folder: Path, side: int, options: argparse.Namespace) -> list[str]:
    return [f"{rate:.0f}" for rate in throughput(folder, side, options.images, options.rounds).values()]


def rows(cells: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is not")
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--out", type=Path, help="where the tables are written; by default they are printed alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        text = report(options, Path(place))
    print(text)
    if options.out:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
