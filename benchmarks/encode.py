"""Speed beside open_clip and transformers, in one run: encoding, tokenising, and a training step.

    python benchmarks/encode.py [--repeats 5] [--out benchmarks/results/NAME.md]

The same random weights, inputs and threads for all; the libraries take turns, and the median of each is quoted. That
the outputs agree is checked in the same run. A ratio above 1 means that miniclip is faster.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from open_clip.loss import ClipLoss
from open_clip.tokenizer import SimpleTokenizer

import miniclip
from miniclip import prompts, tokenizer
from miniclip.config import OPENAI_MODELS, CLIPConfig, TextConfig, VisionConfig
from miniclip.weights import from_openai_keys

CAPTIONS = [
    "a brown dog runs across the wet grass after a ball",
    "two people sit at a small table outside a cafe and drink coffee",
    "sunset over the harbour",
    "a close-up of a red flower with drops of water on its petals in the morning light",
]


def race(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median and spread (largest less smallest) in seconds of each, in turns, after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, work in contestants.items():
            begin = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: (statistics.median(ts), max(ts) - min(ts)) for name, ts in times.items()}


def agreement(found: torch.Tensor, reference: torch.Tensor) -> str:
    difference = ((found - reference).abs().max() / reference.abs().max()).item()
    if difference > 1e-5:
        raise SystemExit(f"outputs differ by {difference:.1e}; the comparison would be void")
    return f"{difference:.0e}"


def peers() -> tuple[miniclip.CLIP, Any, Any]:
    """ViT-B/32 of the three libraries with the same random weights."""
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32-quickgelu").eval()
    ours = miniclip.CLIP(OPENAI_MODELS["ViT-B/32"]).eval()
    ours.load_state_dict(from_openai_keys(theirs.state_dict()))
    hf = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={"eos_token_id": 49407, "bos_token_id": 49406, "hidden_act": "quick_gelu"},
            vision_config={"hidden_act": "quick_gelu"},
        )
    ).eval()
    copy_to_transformers(ours, hf)
    return ours, theirs, hf


def copy_to_transformers(ours: miniclip.CLIP, hf: Any) -> None:
    state = {"logit_scale": ours.logit_scale, "text_projection.weight": ours.text.text_projection.T}
    state["visual_projection.weight"] = ours.visual.proj.T
    for theirs, tower, norms in (
        ("text_model", ours.text, {"final_layer_norm": ours.text.ln_final}),
        ("vision_model", ours.visual, {"pre_layrnorm": ours.visual.ln_pre, "post_layernorm": ours.visual.ln_post}),
    ):
        for name, norm in norms.items():
            state |= {f"{theirs}.{name}.weight": norm.weight, f"{theirs}.{name}.bias": norm.bias}
        for i, block in enumerate(tower.transformer.resblocks):
            layer = f"{theirs}.encoder.layers.{i}"
            for part, weight, bias in zip(
                "qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True
            ):
                state |= {f"{layer}.self_attn.{part}_proj.weight": weight, f"{layer}.self_attn.{part}_proj.bias": bias}
            for name, module in (
                ("self_attn.out_proj", block.attn.out_proj),
                ("layer_norm1", block.ln_1),
                ("layer_norm2", block.ln_2),
                ("mlp.fc1", block.mlp.c_fc),
                ("mlp.fc2", block.mlp.c_proj),
            ):
                state |= {f"{layer}.{name}.weight": module.weight, f"{layer}.{name}.bias": module.bias}
    state["text_model.embeddings.token_embedding.weight"] = ours.text.token_embedding.weight
    state["text_model.embeddings.position_embedding.weight"] = ours.text.positional_embedding
    state["vision_model.embeddings.class_embedding"] = ours.visual.class_embedding
    state["vision_model.embeddings.patch_embedding.weight"] = ours.visual.conv1.weight
    state["vision_model.embeddings.position_embedding.weight"] = ours.visual.positional_embedding
    hf.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()})


@torch.inference_mode()
def bench_encoding(repeats: int) -> list[list[str]]:
    ours, theirs, hf = peers()
    rows = []
    for batch in (16, 1):
        images = torch.randn(batch, 3, 224, 224)
        work = {
            "miniclip": lambda x=images: ours.encode_image(x),
            "open_clip": lambda x=images: theirs.encode_image(x),
            "transformers": lambda x=images: hf.get_image_features(pixel_values=x).pooler_output,
        }
        same = max(agreement(work["miniclip"](), work[peer]()) for peer in ("open_clip", "transformers"))
        rows.append(row(f"ViT-B/32 image, batch {batch}", race(work, repeats), same))
    texts = [prompts.fill(t, c) for c in prompts.imagenet_classnames()[:8] for t in prompts.template_set("imagenet7")]
    tokens = miniclip.tokenize(texts)
    longest = int((tokens == tokenizer.END_OF_TEXT).int().argmax(dim=1).max()) + 1
    work = {
        "miniclip": lambda: ours.encode_text(tokens),
        "open_clip": lambda: theirs.encode_text(tokens),
        # transformers' own tokenizer pads to the longest, so that is what it is given.
        "transformers": lambda: hf.get_text_features(input_ids=tokens[:, :longest].long()).pooler_output,
    }
    same = max(agreement(work["miniclip"](), work[peer]()) for peer in ("open_clip", "transformers"))
    rows.append(row(f"ViT-B/32 text, {len(texts)} prompts of at most {longest} tokens", race(work, repeats), same))
    return rows


def bench_tokenizer(repeats: int) -> list[list[str]]:
    texts = [
        prompts.fill(t, c) for c in prompts.imagenet_classnames()[:100] for t in prompts.template_set("imagenet80")
    ]
    theirs = SimpleTokenizer()
    assert [tokenizer.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    work = {"miniclip": lambda: miniclip.tokenize(texts), "open_clip": lambda: theirs(texts)}
    return [row(f"tokenizer, {len(texts)} template prompts, warm", race(work, repeats), "same ids")]


def bench_training(repeats: int) -> list[list[str]]:
    """One step of AdamW on 64 pairs, captions of real lengths: 64 pixels, 6 + 6 blocks of width 256."""
    torch.manual_seed(0)
    vision = {"image_size": 64, "patch_size": 8, "width": 256, "layers": 6, "head_width": 64}
    text = {"width": 256, "layers": 6}
    config = CLIPConfig(256, "gelu", VisionConfig(**vision), TextConfig(**text, head_width=64))  # type: ignore[arg-type]
    theirs = open_clip.model.CLIP(
        256, open_clip.model.CLIPVisionCfg(**vision), open_clip.model.CLIPTextCfg(**text, heads=4)
    )
    ours = miniclip.CLIP(config)
    ours.load_state_dict(from_openai_keys(theirs.state_dict()))
    images, tokens = torch.randn(64, 3, 64, 64), miniclip.tokenize(CAPTIONS * 16)
    loss_of_theirs = ClipLoss()

    def our_loss() -> torch.Tensor:
        features = ours.encode_image(images, normalize=True), ours.encode_text(tokens, normalize=True)
        return miniclip.clip_loss(*features, ours.logit_scale.exp())

    def their_loss() -> torch.Tensor:
        return loss_of_theirs(*theirs(images, tokens))

    same = agreement(our_loss().detach(), their_loss().detach())
    work = {}
    for name, model, loss in (("miniclip", ours, our_loss), ("open_clip", theirs, their_loss)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)  # so small a rate that both stay alike

        def step(loss: Any = loss, optimizer: Any = optimizer) -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        work[name] = step
    return [row("training step, 64 px, 6 + 6 blocks, batch 64", race(work, repeats), same)]


def row(case: str, times: dict[str, tuple[float, float]], same: str) -> list[str]:
    ours = times["miniclip"][0]
    cells = [case]
    cells += [
        f"{1000 * times[name][0]:.1f} ± {500 * times[name][1]:.1f}" if name in times else "–"
        for name in ("miniclip", "open_clip", "transformers")
    ]
    cells += [f"{times[name][0] / ours:.2f}" if name in times else "–" for name in ("open_clip", "transformers")]
    print(" | ".join([*cells, same]), flush=True)
    return [*cells, same]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds")
    parser.add_argument("--out", type=Path, help="a Markdown file to write, too")
    options = parser.parse_args()
    rows = bench_tokenizer(options.repeats) + bench_encoding(options.repeats) + bench_training(options.repeats)
    header = [
        "case",
        "miniclip, ms",
        "open_clip, ms",
        "transformers, ms",
        "open_clip / ours",
        "transformers / ours",
        "agree to",
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    versions = f"torch {torch.__version__}, open_clip {open_clip.__version__}, transformers {transformers.__version__}"
    settings = f"{torch.get_num_threads()} threads, {platform.machine()}, fp32; {options.repeats} rounds"
    lines += ["", f"Median ± half the spread. {settings}; {versions}."]
    print("\n".join(["", *lines]))
    if options.out:
        options.out.write_text("\n".join(["`" + " ".join(["python", *sys.argv]) + "`", "", *lines]) + "\n")


if __name__ == "__main__":
    main()
