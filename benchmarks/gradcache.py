"""A contrastive batch that does not fit: micro-batches against a plain small batch, memory and time.

    python benchmarks/gradcache.py [--batch 4096] [--micro 64] [--plain 128]

One training step (loss, gradients, AdamW) of the model of configs/small.yaml on noise and captions of about eleven
words, each in a process of its own, warm. Memory is the process's peak less what it has with model, optimiser and their
state made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

MEASURE = """
import re, sys, time
import numpy as np, torch
import miniclip
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.data import Batch
from miniclip.training import CLIPTraining
number, micro = int(sys.argv[1]), int(sys.argv[2])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
torch.manual_seed(0)
vision = VisionConfig(image_size=64, patch_size=8, width=256, layers=6)
module = CLIPTraining(CLIPConfig(256, "gelu", vision, TextConfig(width=256, layers=6)), micro_batch_size=micro or None)
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
def step(number):
    chance = np.random.default_rng(0)
    words = "a photo of the small red house by river with two old trees and people on grass under blue sky".split()
    texts = [" ".join(chance.choice(words, size=max(3, int(chance.normal(11, 4))))) for _ in range(number)]
    images = torch.randint(0, 256, (number, 3, 64, 64), dtype=torch.uint8)
    tokens = miniclip.tokenize(texts).long()
    tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]
    features = module.features(Batch(images, tokens, None, texts, [], 0, torch.arange(number)))
    loss = miniclip.clip_loss(*features, module.clip.logit_scale.exp(), chunk_size=min(1024, number))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
step(8)
before = peak()
step(128)  # the first step of a size is slower
times = []
for _ in range(max(1, 1024 // number)):
    begin = time.perf_counter()
    step(number)
    times.append(time.perf_counter() - begin)
print(sorted(times)[len(times) // 2] / number * 1000, peak() - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--micro", type=int, default=64)
    parser.add_argument("--plain", type=int, default=128)
    options = parser.parse_args()
    cases = {
        f"plain, batch {options.plain}": (options.plain, 0),
        f"micro-batches of {options.micro}, batch {options.batch}": (options.batch, options.micro),
    }
    print("| | ms a sample | memory above model and optimiser, MB |\n|---|---|---|")
    for name, (number, micro) in cases.items():
        command = [sys.executable, "-c", MEASURE, str(number), str(micro)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        milliseconds, memory = map(float, done.stdout.split())
        print(f"| {name} | {milliseconds:.1f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
