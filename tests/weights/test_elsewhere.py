"""Where others pick a model up: each library loads what `convert` writes by its own ways, and computes our numbers."""

import pytest
import timm
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from foreign_models import randomised
from helpers import picture
from sentence_transformers import SentenceTransformer
from transformers import CLIPTextModel, CLIPTokenizer

from miniclip import CLIP, CLIPConfig, TextConfig, VisionConfig, load, save, tokenize
from miniclip.weights.convert import convert

TEXTS = ["a photo of a cat", "two dogs, running along a beach"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with CLIP's whole vocabulary in our layout, Hugging Face's and OpenCLIP's."""
    folder = tmp_path_factory.mktemp("elsewhere")
    vision = VisionConfig(image_size=32, patch_size=16, width=128, layers=2)
    config = CLIPConfig(32, "quick_gelu", vision, TextConfig(width=64, layers=3))
    save(randomised(CLIP(config), seed=5), folder / "native")
    for to in ("hf", "openclip"):
        convert(folder / "native", folder / to, to)
    return folder


@pytest.fixture(scope="module")
def ours(folders):
    return load(folders / "native", device="cpu")


@torch.no_grad()
def test_sentence_transformers_encodes_texts_and_pictures_with_the_hugging_face_layout(folders, ours):
    model, preprocess = ours
    theirs = SentenceTransformer(str(folders / "hf"), device="cpu")
    texts = theirs.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(texts, model.encode_text(tokenize(TEXTS)), rtol=1e-4, atol=1e-5)
    square = picture(3, size=(32, 32))  # no resizing, which transformers does by other arithmetic than Pillow's
    images = theirs.encode([square], convert_to_tensor=True)
    torch.testing.assert_close(images, model.encode_image(preprocess(square)[None]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_pipeline_of_diffusers_is_conditioned_by_the_text_tower(folders, ours):
    """Its embeddings are the normed states of all tokens. It pads a text with other tokens than our tokenizer."""
    model, _ = ours
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=[8], latent_channels=4, norm_num_groups=4, **blocks),
        text_encoder=CLIPTextModel.from_pretrained(folders / "hf"),
        tokenizer=CLIPTokenizer.from_pretrained(folders / "hf"),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    states, _ = pipeline.encode_prompt(TEXTS, "cpu", 1, False)
    tokens = tokenize(TEXTS)
    expected = model.text(tokens, all_tokens=True)
    for row, length in enumerate((tokens != 0).sum(dim=1).tolist()):
        torch.testing.assert_close(states[row, :length], expected[row, :length], rtol=1e-4, atol=1e-4)
    latents = pipeline(TEXTS[0], num_inference_steps=1, output_type="latent").images
    assert latents.isfinite().all()


@torch.no_grad()
def test_timm_reads_the_image_tower_of_the_openclip_layout(folders, ours):
    model, preprocess = ours
    weights = {"file": str(folders / "openclip/open_clip_model.safetensors"), "num_classes": 32}
    tower = timm.create_model(
        "vit_base_patch32_clip_quickgelu_224",
        pretrained=True,
        pretrained_cfg_overlay=weights,
        img_size=32,
        patch_size=16,
        embed_dim=128,
        depth=2,
        num_heads=2,
        num_classes=32,
    ).eval()
    images = torch.stack([preprocess(picture(seed, size=(50, 40))) for seed in range(3)])
    torch.testing.assert_close(tower(images), model.encode_image(images), rtol=1e-4, atol=1e-4)
