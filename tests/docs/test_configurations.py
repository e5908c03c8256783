"""Every configuration that ships trains, and says by which command."""

from pathlib import Path

import pytest
import torch
from helpers import pack_folder, table, tiny_clip, write_pairs

from miniclip import load, save
from miniclip.commands import train as trainer

ROOT = Path(__file__).parents[2]

SECTIONS = [
    "--model.clip.embed_dim=32",
    "--model.optimizer.lr=0.002",
    "--data.num_workers=0",
    "--trainer.log_every_n_steps=1",
]


# What makes a step of the large ones a matter of a second, and gives what they start or learn from.
SMALL_TEXT = ["--model.clip.text.width=64", "--model.clip.text.layers=1"]
SMALL = {
    "vit-b32.yaml": ["--model.clip.vision={image_size: 32, width: 64, layers: 1}", *SMALL_TEXT],
    "rn50.yaml": ["--model.clip.vision={image_size: 32, width: 8, blocks: [1, 1, 1, 1]}", *SMALL_TEXT],
    "timm.yaml": ["--model.clip.vision.image_size=32", *SMALL_TEXT],
    "lit.yaml": [
        "--model.clip.vision={timm_model: test_resnet, image_size: 32}",
        "--model.image_weights=test_resnet.pth",
        *SMALL_TEXT,
    ],
    "siglip-b16.yaml": [
        "--model.clip.vision={image_size: 32, patch_size: 16, width: 64, layers: 1}",
        "--model.micro_batch_size=8",
        *SMALL_TEXT,
    ],
    "finetune.yaml": ["--model.start_from=start"],
    "distill.yaml": [
        "--model.clip.vision={image_size: 32, width: 64, layers: 1}",
        "--model.teacher=start",
        *SMALL_TEXT,
    ],
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_configuration_trains_with_a_field_of_each_section_overridden(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        pack_folder(write_pairs(Path("pairs", part), 40), Path("shards", part))
    labels = [f"../../../pairs/val/{number:04d}.png,{'odd' if number % 2 else 'even'}" for number in range(40)]
    table(Path("runs/digits/data/val.csv"), "filepath,label", *labels)  # the demo's
    shards = [f"--data.{part}=shards/{part}" for part in ("train", "val")]
    short = [
        "--trainer.max_steps=2",
        "--data.val_pairs=16",
        "--data.batch_size=16",
        f"--name={config}",
    ]
    import timm

    save(tiny_clip(embed_dim=32), "start", overwrite=True)
    torch.save(timm.create_model("test_resnet").state_dict(), "test_resnet.pth")
    more = ["--trainer.accelerator=cpu", *SMALL.get(config, [])]
    trainer.main(["fit", "--config", str(ROOT / "configs" / config), *shards, *short, *SECTIONS, *more])
    model, _ = load(f"runs/{config}/best")
    assert model.config.embed_dim == 32


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_configuration_opens_with_its_command(config):
    head = (ROOT / "configs" / config).read_text().split("\nseed_everything")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"configs/{config}" in head
