"""Search over a million pictures: LanceDB's store with our exact product, and its approximate index, beside faiss.

    python benchmarks/search.py --rows 1000000 --dim 512

Features are clustered as those of pictures are (2,000 centres, a falling spectrum, a common direction). Exact queries
of both are timed alternating, with the same threads; the best time of each counts, since others may share the machine.
Peak memory is about three times the features'.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from miniclip.evaluation.measures.ties import SAME
from miniclip.inference.search.nearest import TIES, nearest
from miniclip.inference.search.store import Facts, create_store


def features(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    spectrum = (1 / np.arange(1, dim + 1) ** 0.5).astype(np.float32)
    centres = random.standard_normal((2000, dim), dtype=np.float32) * spectrum
    found = np.empty((rows, dim), dtype=np.float32)
    for start in range(0, rows, 50_000):
        part = found[start : start + 50_000]
        part[:] = random.standard_normal(part.shape, dtype=np.float32) * (0.7 * spectrum)
        part += centres[random.integers(0, len(centres), len(part))]
        part[:, 7] += 1
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return found


def seconds(action: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor


def best(times: list[tuple[float, float]]) -> str:
    wall, processor = (min(each) for each in zip(*times, strict=True))
    return f"{1e3 * wall:9.1f} ms wall {1e3 * processor:9.1f} ms processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-approximate", action="store_true")
    options = parser.parse_args()
    import faiss

    faiss.omp_set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    rows = features(options.rows, options.dim)
    random = np.random.default_rng(1)
    noise = random.standard_normal((64, options.dim), dtype=np.float32) * 0.02
    queries = rows[random.choice(options.rows, 64, replace=False)] + noise
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)

    flat = faiss.IndexFlatIP(options.dim)
    flat.add(rows)
    held = [(np.arange(options.rows, dtype=np.uint64), torch.from_numpy(rows))]
    for count in (1, 8, 64):
        asked = torch.from_numpy(queries[:count])
        times: dict[str, list[tuple[float, float]]] = {"faiss": [], "ours": []}
        for _ in range(options.repeats):
            times["faiss"].append(seconds(lambda: flat.search(queries[:count], 10)))  # noqa: B023
            times["ours"].append(seconds(lambda: nearest(held, asked, 10 + TIES)))  # noqa: B023
        expected, found = flat.search(queries[:count], 10)[0], nearest(held, asked, 10)[1]
        print(f"exact, {count:2} queries: largest difference of cosines {np.abs(expected - found).max():.1e}")
        for name, each in times.items():
            print(f"  {name:6}{best(each)}", flush=True)
        walls, processors = ([min(t[place] for t in times[name]) for name in ("ours", "faiss")] for place in (0, 1))
        print(f"  ours / faiss: {walls[0] / walls[1]:.2f} wall, {processors[0] / processors[1]:.2f} processor")
    if options.no_approximate:
        return

    folder = Path(tempfile.mkdtemp())
    try:
        store = create_store(folder / "an.index", Facts("none", None, None, ""), options.dim)
        wall, _ = seconds(lambda: fill(store, rows))
        print(f"store: {options.rows:,} rows written in {wall:.0f} s")
        print(f"store: all features read in {seconds(lambda: sum(len(ids) for ids, _ in store.blocks()))[0]:.1f} s")
        wall, processor = seconds(store.build_approximate)
        print(f"approximate: built in {wall:.0f} s ({processor:.0f} s processor)")
        least = nearest(held, torch.from_numpy(queries), 10)[1][:, -1]
        for nprobes, refined in ((2, 4), (8, 4), (32, 4), (32, 16)):
            answers: list[Any] = []
            wall, processor = seconds(
                lambda: answers.extend(store.search_approximate(queries, 10 + TIES, nprobes, refined))  # noqa: B023
            )
            counts = [min(10, (c >= low - SAME).sum()) for (_, c), low in zip(answers, least, strict=True)]
            recall = np.mean(counts) / 10
            a_query = f"{1e3 * wall / 64:.1f} ms wall, {1e3 * processor / 64:.1f} ms processor a query"
            print(f"  {nprobes:3} partitions, {refined:2} candidates: recall@10 {recall:.3f}, {a_query}", flush=True)
    finally:
        shutil.rmtree(folder)


def fill(store: Any, rows: np.ndarray) -> None:
    for start in range(0, len(rows), 50_000):
        part = rows[start : start + 50_000]
        keys = [f"/some/where/photo-{number:08d}.jpg" for number in range(start, start + len(part))]
        facts = {"path": keys, "source": ["/some/where"] * len(part), "stamp": keys, "content": keys}
        columns = {"key": keys, **facts, "features": store.as_features(part)}
        store.put(pa.table(columns, schema=store.schema.remove_metadata()))


if __name__ == "__main__":
    main()
