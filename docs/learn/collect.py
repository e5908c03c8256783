"""Collects what the pages of Learn draw from a run of the demo: `python docs/learn/collect.py runs/digits`.

Writes docs/learn/demo.npz. Run it again after a change of the demo's recipe; the pages' figures are drawn from it when
the site is built, which then needs no trained model.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

import miniclip

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("red", "orange", "green", "turquoise", "blue", "purple", "pink", "black")
TEMPLATES = (
    "{c}",
    "a {c}",
    "a photo of a {c}.",
    "the digit {c}",
    "a handwritten {c}",
    "the number {c}",
    "a {c} drawn by hand",
    "a scan of the numeral {c}",
)
SHOTS = (1, 2, 4, 8, 16, 32)


def of_name(path: Path) -> tuple[str, str]:
    _, digit, ink = path.stem.split("_")
    return digit, ink


def main(run: Path) -> None:
    model, preprocess = miniclip.load(run / "best")
    torch.manual_seed(0)
    fresh = miniclip.CLIP(model.config).eval()
    test, train = (sorted((run / "data" / part).glob("*.png")) for part in ("test", "train"))
    seen = {(digit, ink) for digit, ink in map(of_name, train)}
    shown = [next(path for path in test if of_name(path) == (DIGITS[i], INKS[(3 * i) % 8])) for i in range(10)]

    @torch.no_grad()
    def features(paths: list[Path], clip: miniclip.CLIP = model) -> torch.Tensor:
        pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
        return torch.cat([clip.encode_image(part, normalize=True) for part in pixels.split(64)])

    @torch.no_grad()
    def texts(lines: list[str], clip: miniclip.CLIP = model) -> torch.Tensor:
        return clip.encode_text(miniclip.tokenize(lines, clip.context_length), normalize=True)

    captions = ["a handwritten {} in {} ink".format(*of_name(path)) for path in shown]
    found = {
        "pictures": np.stack([np.asarray(Image.open(path)) for path in shown]),
        "captions": np.array(captions),
        "before": features(shown, fresh) @ texts(captions, fresh).T,
        "after": features(shown) @ texts(captions).T,
        "logit_scale": model.logit_scale.detach().exp(),
        "positions": torch.nn.functional.normalize(model.visual.positional_embedding.detach()[1:], dim=1),
        "attention": attention(model, torch.stack([preprocess(Image.open(path)) for path in shown])),
    }
    with open(run / "logs/version_0/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "train/logit_scale", "val/loss", "val/zero_shot_acc1"):
        pairs = [(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]
        found[name.replace("/", "_")] = np.array(pairs)

    plain = [path for path in test if of_name(path) in seen]
    labels = np.array([DIGITS.index(of_name(path)[0]) for path in plain])
    image_features = features(plain)
    right = {}
    for template in TEMPLATES:
        classes = miniclip.zero_shot_classifier(model, DIGITS, [template])
        right[template] = ((image_features @ classes).argmax(dim=1).numpy() == labels).mean()
    classes = miniclip.zero_shot_classifier(model, DIGITS, TEMPLATES)
    found["templates"], found["templates_right"] = np.array(list(right)), np.array(list(right.values()))
    found["ensemble_right"] = ((image_features @ classes).argmax(dim=1).numpy() == labels).mean()

    random = np.random.default_rng(0)
    train_features, fresh_features = features(train).numpy(), features(train, fresh).numpy()
    train_labels = np.array([DIGITS.index(of_name(path)[0]) for path in train])
    for name, known, asked in (
        ("shots", train_features, image_features.numpy()),
        ("shots_untrained", fresh_features, features(plain, fresh).numpy()),
    ):
        scores = []
        for k in SHOTS:
            draws = []
            for _ in range(5):
                chosen = np.concatenate(
                    [random.choice(np.flatnonzero(train_labels == digit), k, replace=False) for digit in range(10)]
                )
                probe = LogisticRegression(C=10, max_iter=2000).fit(known[chosen], train_labels[chosen])
                draws.append(probe.score(asked, labels))
            scores.append((k, np.mean(draws), np.min(draws), np.max(draws)))
        found[name] = np.array(scores)

    both = texts([f"a handwritten {digit} in {ink} ink" for digit in DIGITS for ink in INKS])
    found["both_texts"] = both.reshape(10, 8, -1)
    found["is_seen"] = np.array([[(digit, ink) in seen for ink in INKS] for digit in DIGITS])
    np.savez_compressed(Path(__file__).with_name("demo.npz"), **{k: np.asarray(v) for k, v in found.items()})


@torch.no_grad()
def attention(model: miniclip.CLIP, pixels: torch.Tensor) -> torch.Tensor:
    """What the class token attends to in each block, the mean of its heads: (pictures, blocks, patches)."""
    seen = []
    for block in model.visual.transformer.resblocks:
        block.ln_1.register_forward_hook(lambda module, args, x, block=block: seen.append(weights(block.attn, x)))
    model.encode_image(pixels)
    return torch.stack(seen, dim=1)


def weights(attn: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ / √(D/H)) of the first token's query, without the first key: (B, N, D) -> (B, N - 1)."""
    q, k, _ = torch.nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q[:, :1], k))  # (B, H, 1 or N, D/H)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
    return scores.mean(dim=1)[:, 0, 1:]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
