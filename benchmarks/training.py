"""A training step with what saves memory or time: activation checkpointing, patch dropout, torch.compile.

    python benchmarks/training.py [--steps 3] [--batch 64] [--compile]

Loss, gradients and AdamW, of the model of configs/small.yaml and of a ResNet like RN50 with half its blocks and width,
on noise and captions of about eleven words. Each case is a process of its own, with the same seed. Time is the median
of the steps after the first; memory is the process's peak less what it has with model, optimiser and their state made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

MEASURE = """
import json, re, statistics, sys, time
import numpy as np, torch
import miniclip
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.data import Batch
from miniclip.optim import OptimizerConfig, make_optimizer
from miniclip.training import CLIPTraining
tower, number, steps, options = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
torch.manual_seed(0)
vision = VisionConfig(image_size=64, patch_size=8, width=256, layers=6)
if tower == "resnet":
    vision = VisionConfig(kind="resnet", image_size=128, width=32, blocks=(2, 2, 3, 2))
module = CLIPTraining(CLIPConfig(256, "gelu", vision, TextConfig(width=256, layers=6)), **options).train()
optimizer = make_optimizer(module.clip, OptimizerConfig())
chance = np.random.default_rng(0)
words = "a photo of the small red house by river with two old trees and people on grass under blue sky".split()
def step(number):
    texts = [" ".join(chance.choice(words, size=max(3, int(chance.normal(11, 4))))) for _ in range(number)]
    images = torch.randint(0, 256, (number, 3, vision.image_size, vision.image_size), dtype=torch.uint8)
    batch = Batch(images, miniclip.tokenize(texts).long(), None, texts, [], 0, torch.arange(number))
    begin = time.perf_counter()
    loss = miniclip.clip_loss(*module.features(batch), module.clip.logit_scale.exp())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - begin
step(2)
before = peak()
times = [step(number) for _ in range(steps + 1)]
print(statistics.median(times[1:]), times[0], peak() - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="measured ones")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too; minutes on a CPU")
    options = parser.parse_args()
    cases = {
        "vit": {"plain": "{}", "checkpoint_activations": '{"checkpoint_activations": true}'},
        "resnet": {"plain": "{}", "checkpoint_activations": '{"checkpoint_activations": true}'},
    }
    cases["vit"]["patch_dropout 0.5"] = '{"patch_dropout": 0.5}'
    if options.compile:
        for tower in cases:
            cases[tower]["compile"] = '{"compile": true}'
    print("| | s a step | s the first step | memory above model and optimiser, MB |\n|---|---|---|---|")
    for tower, settings in cases.items():
        for name, setting in settings.items():
            command = [sys.executable, "-c", MEASURE, tower, str(options.batch), str(options.steps), setting]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, first, memory = map(float, done.stdout.split())
            print(f"| {tower}, {name} | {seconds:.2f} | {first:.2f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
