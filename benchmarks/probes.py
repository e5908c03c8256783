"""How long a linear probe takes, penalty by penalty, and what warm starts and float32 would save.

    python benchmarks/probes.py [--images 10000] [--width 512] [--classes 100]

Features are random: a centre for each class plus noise, normalised. A fifth of the images validate.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
from sklearn.linear_model import LogisticRegression

from miniclip.evaluation.probes import linear_probe
from miniclip.evaluation.splits import Labelled, make_splits


def draw(count: int, centres: np.ndarray, seed: int) -> Labelled:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(centres)
    features = centres[labels] + random.normal(size=(count, centres.shape[1]))
    return Labelled((features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    given = parser.parse_args()
    centres = 0.15 * np.random.default_rng(0).normal(size=(given.classes, given.width))
    names = [str(c) for c in range(given.classes)]
    splits = make_splits(draw(given.images, centres, 1), draw(2000, centres, 2), names)
    train, validation = splits.train, splits.validation
    print("| C | fit | iterations | seconds | validation % |\n|---|---|---|---|---|")
    start: tuple[np.ndarray, np.ndarray] | None = None  # of the penalty before
    for C in (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6):
        for kind in ("float64", "float64, warm", "float32"):
            features = train.features.astype(kind[:7])
            model = LogisticRegression(C=C, max_iter=1000, tol=1e-4 / len(train), warm_start=True)
            if kind == "float64, warm" and start is not None:
                model.coef_, model.intercept_ = (part.copy() for part in start)
            begin = time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.fit(features, train.labels)
            seconds = time.perf_counter() - begin
            if kind == "float64, warm":
                start = model.coef_, model.intercept_
            accuracy = model.score(validation.features.astype(kind[:7]), validation.labels)
            note = " (not converged)" if caught else ""
            print(f"| {C:g} | {kind} | {model.n_iter_[0]}{note} | {seconds:.1f} | {100 * accuracy:.1f} |", flush=True)
    begin = time.perf_counter()
    probe = linear_probe(splits)
    print(
        f"\nlinear_probe: {time.perf_counter() - begin:.0f} s for {len(probe.sweep)} penalties and the last fit, "
        f"C = {probe.C:.3g}, test {100 * probe.outcome.accuracy:.1f} %"
    )


if __name__ == "__main__":
    main()
