"""The forward pass as a table: shapes are those that run, and figures were worked out by hand."""

import pytest
import torch
from command_line import fails
from helpers import tiny_clip, tiny_config

from miniclip import save
from miniclip.commands import main as cli
from miniclip.config import OPENAI_MODELS, TextConfig, VisionConfig
from miniclip.model import CLIP
from miniclip.weights.facts import Call, fold, forward_flops, trace


def flat(call: Call) -> list[Call]:
    return [call, *(each for inside in call.inside for each in flat(inside))]


def by_name(calls: list[Call]) -> dict[str, Call]:
    return {each.name: each for call in calls for each in flat(call)}


def test_figures_are_those_of_a_block_worked_out_by_hand():
    # 16 pixels in patches of 8: 4 patches and the class token; width 16, 2 heads of 8, hidden layers of 64
    calls = by_name(trace(tiny_config()))
    N, D, hidden = 5, 16, 64
    projections = 2 * N * D * 3 * D + 2 * N * D * D  # to q, k and v, and from the heads
    scores_and_sums = 2 * (2 * N * N * D)
    layers = 2 * (2 * N * D * hidden)
    block = calls["visual.transformer.resblocks.0"]
    assert calls["visual.conv1"].flops == 2 * 4 * (3 * 8 * 8) * D
    assert calls["visual.transformer.resblocks.0.attn"].flops == projections + scores_and_sums
    assert block.flops == projections + scores_and_sums + layers
    assert block.parameters == 12 * D * D + 13 * D
    assert (block.shape, block.bytes) == ((1, N, D), 4 * N * D)
    # the last block's output is the class token's alone: its queries, its hidden layer
    last = 2 * N * D * 2 * D + 2 * (2 * D * D) + 2 * (2 * N * D) + 2 * (2 * D * hidden)
    assert (calls["visual.transformer.resblocks.1"].flops, calls["visual"].shape) == (last, (1, 16))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_shapes_are_those_of_a_pass_that_is_run(kind):
    resnet = VisionConfig(kind="resnet", image_size=32, width=8, blocks=(1, 2, 1, 1))
    model = tiny_clip(**({"vision": resnet} if kind == "resnet" else {}))
    seen = {}
    # Under hooks from outside, what is computed for the pooled token alone (the last block) is computed for all tokens.
    names = [name for name, _ in model.named_modules() if name and ".resblocks.1" not in name]
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: tuple(output.shape)})
        )
    R = model.visual.input_resolution
    model.visual(torch.randn(3, 3, R, R))
    model.text(torch.full((3, 7), model.config.text.eot_token))
    calls = by_name(trace(model.config, batch_size=3, text_length=7))
    whole_stack = {"visual.transformer", "text.transformer", "visual.ln_post", "text.ln_final"}
    assert seen.keys() == {name for name in calls if ".resblocks.1" not in name}
    assert {name: calls[name].shape for name in seen.keys() - whole_stack} == {
        name: seen[name] for name in seen.keys() - whole_stack
    }


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_towers_add_up_to_what_info_prints(name):
    config = OPENAI_MODELS[name]
    visual, text = trace(config)
    with torch.device("meta"):
        model = CLIP(config).eval()
        R = model.visual.input_resolution
        images, tokens = torch.zeros(1, 3, R, R), torch.zeros(1, 77, dtype=torch.long)
    assert visual.flops == forward_flops(model.visual, images)
    assert text.flops == forward_flops(model.text, tokens)
    assert visual.parameters == sum(each.numel() for each in model.visual.parameters())


def test_blocks_that_are_alike_are_one_line(capsys, tmp_path):
    save(tiny_clip(text=TextConfig(context_length=16, width=16, layers=4, head_width=8)), tmp_path / "model")
    cli.main(["info", str(tmp_path / "model"), "--trace", "--batch", "2", "--text-length", "5"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shapes = {line[0]: " ".join(line[2:5]) for line in lines if "ResidualAttentionBlock" in line}
    assert shapes == {"0": "(2, 5, 16)", "1": "(2, 1, 16)", "0–2": "(2, 5, 16)", "3": "(2, 1, 16)"}


def test_the_folded_table_loses_no_call():
    calls = trace(OPENAI_MODELS["RN50"])
    number = sum(len(flat(call)) for call in calls)

    def count(call: Call) -> int:
        first, last = (int(name.rsplit(".", 1)[-1]) for name in (call.name, call.last)) if call.last else (0, 0)
        return (last - first + 1) * (1 + sum(map(count, call.inside)))

    assert sum(map(count, fold(calls))) == number


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "2"], ["--batch 2", "--trace"]),
        (["--trace", "--batch", "0"], ["0 images", "at least 1"]),
        (["--trace", "--text-length", "17"], ["17 tokens", "2 (start and end) to 16"]),
        (["--trace", "--text-length", "1"], ["1 tokens", "2 (start and end) to 16"]),
    ],
)
def test_what_it_cannot_trace_is_refused(capsys, tmp_path, options, words):
    save(tiny_clip(), tmp_path / "model")
    message = fails(capsys, ["info", str(tmp_path / "model"), *options])
    assert all(word in message for word in words)
