"""The contrastive losses in slices against the whole matrix of logits: memory, time, and agreement.

    python benchmarks/loss.py [--batch 16384] [--width 512] [--chunks 512 256 128] [--repeats 3]

Each measurement is a process of its own. Memory is its peak less what it had with features, and gradients of them,
made; the sides take turns. The plain forms are the papers' formulas in torch's operations.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

MEASURE = """
import re, sys, time
import torch, torch.nn.functional as F
from miniclip.loss import clip_loss, siglip_loss
batch, width, chunk = map(int, sys.argv[1:4])
kind = sys.argv[4]
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
random = torch.Generator().manual_seed(0)
images, texts = (F.normalize(torch.randn(batch, width, generator=random), dim=-1).requires_grad_() for _ in range(2))
images.grad, texts.grad = torch.zeros_like(images), torch.zeros_like(texts)
scale, bias = torch.tensor(30.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
clip_loss(images[:64], texts[:64], scale).backward()
siglip_loss(images[:64], texts[:64], scale, bias).backward()
images.grad.zero_(), texts.grad.zero_()
scale.grad = None
before, begin = peak(), time.perf_counter()
if kind == "plain clip":  # as written in the paper, figure 3
    logits = scale * images @ texts.T
    labels = torch.arange(batch)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
elif kind == "plain siglip":  # as written in its paper, algorithm 1
    z = 2 * torch.eye(batch) - 1
    loss = -F.logsigmoid(z * (scale * images @ texts.T + bias)).sum() / batch
elif kind == "clip":
    loss = clip_loss(images, texts, scale, chunk_size=chunk or None)
else:
    loss = siglip_loss(images, texts, scale, bias, chunk_size=chunk or None)
loss.backward()
seconds = time.perf_counter() - begin
print(seconds, peak() - before, loss.item(), scale.grad.item(), images.grad.norm().item(), texts.grad.norm().item())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 256, 128], help="images in a slice")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cases = {
        "cross-entropy, the whole matrix": (0, "plain clip"),
        "clip_loss, the whole matrix": (0, "clip"),
        **{f"clip_loss, chunk_size={chunk}": (chunk, "clip") for chunk in options.chunks},
        "log-sigmoid, the whole matrix": (0, "plain siglip"),
        "siglip_loss, the whole matrix": (0, "siglip"),
        **{f"siglip_loss, chunk_size={chunk}": (chunk, "siglip") for chunk in options.chunks},
    }
    seen: dict[str, list[list[float]]] = {name: [] for name in cases}
    for _ in range(options.repeats):
        for name, (chunk, kind) in cases.items():
            command = [sys.executable, "-c", MEASURE, str(options.batch), str(options.width), str(chunk), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seen[name].append([float(word) for word in done.stdout.split()])
    print("| | s, forward and backward | extra memory, MB | loss, gradients' norms |\n|---|---|---|---|")
    for name, values in seen.items():
        seconds, memory, *numbers = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"| {name} | {seconds:.2f} | {memory:.0f} | {', '.join(f'{number:.6g}' for number in numbers)} |")


if __name__ == "__main__":
    main()
