"""Tiny models in other libraries' formats, written as those libraries write them."""

from __future__ import annotations

import struct

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from transformers import CLIPConfig as HFConfig
from transformers import CLIPModel as HFModel

from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.weights.load import load

OpenClip = open_clip.model.CLIP

TINY_TEXT = TextConfig(context_length=16, vocab_size=60, eot_token=59, width=128, layers=2)
TINY_VIT = CLIPConfig(24, "quick_gelu", VisionConfig(image_size=24, patch_size=8, width=128, layers=2), TINY_TEXT)
TINY_RESNET = CLIPConfig(
    24, "quick_gelu", VisionConfig(kind="resnet", image_size=64, width=4, blocks=(1, 2, 1, 1)), TINY_TEXT
)
TINY = {"vit": TINY_VIT, "resnet": TINY_RESNET}


# ---- random models of the other libraries


def openclip_settings(config):
    vision, text = config.vision, config.text
    tower = {"image_size": vision.image_size, "width": vision.width, "head_width": vision.head_width}
    if vision.kind == "vit":
        tower |= {"layers": vision.layers, "patch_size": vision.patch_size, "mlp_ratio": vision.mlp_ratio}
    else:
        tower |= {"layers": list(vision.blocks), "patch_size": None}
    words = {"context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width}
    words |= {"heads": text.heads, "layers": text.layers, "mlp_ratio": text.mlp_ratio}
    return {"embed_dim": config.embed_dim, "vision_cfg": tower, "text_cfg": words}


@torch.no_grad()
def randomised(model, seed):
    """Nothing is exactly 0 or 1, and nothing so large that half precision overflows."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=random) if tensor.is_floating_point() else None
        if name.endswith("num_batches_tracked"):
            tensor.fill_(3)
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.2 * noise.tanh())
        elif name.endswith("running_mean"):
            tensor.copy_(0.1 * noise)
        elif name.endswith("logit_scale"):
            tensor.fill_(3.2)
        elif tensor.ndim == 1 and name.endswith("weight"):
            tensor.copy_((0.3 if "bn3" in name else 1.0) + 0.1 * noise)
        elif name.endswith(("positional_embedding", "position_embedding.weight")):
            tensor.copy_(0.1 * noise)
        elif noise is not None:
            tensor.add_(0.02 * noise)
    return model.eval()


def openclip_model(config, seed=0, cls=OpenClip):
    settings = openclip_settings(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(
            settings["embed_dim"],
            CLIPVisionCfg(**settings["vision_cfg"]),
            CLIPTextCfg(**settings["text_cfg"]),
            quick_gelu=config.activation == "quick_gelu",
        )
    return randomised(model, seed)


def hf_model(seed=0, act="quick_gelu", end=59):
    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 16, "hidden_act": act}
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
    vision |= {"image_size": 24, "patch_size": 8, "hidden_act": act}
    text |= {"eos_token_id": end, "bos_token_id": 58, "pad_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HFModel(HFConfig(text_config=text, vision_config=vision, projection_dim=20))
    return randomised(model, seed)


def probe(config, seed=0):
    """Images, and texts of different lengths that are padded with 0."""
    random = torch.Generator().manual_seed(seed)
    R, L = config.vision.image_size, config.text.context_length
    end = config.text.eot_token
    tokens = torch.zeros(3, L, dtype=torch.long)
    for row, length in zip(tokens, (3, 9, L), strict=True):
        row[: length - 1] = torch.randint(1, end - 2, (length - 1,), generator=random)
        row[length - 1] = end
    return torch.randn(2, 3, R, R, generator=random), tokens


@torch.no_grad()
def assert_same_as_openclip(path, reference, config, **options):
    model, _ = load(path, device="cpu", **options)
    assert model.config == config
    images, tokens = probe(config)
    assert_close(model.encode_image(images), reference.encode_image(images))
    assert_close(model.encode_text(tokens), reference.encode_text(tokens))
    for ours, theirs in zip(model(images, tokens), reference.get_logits(images, tokens), strict=True):
        assert_close(ours, theirs)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == torch.float32
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-5, error
    assert expected.std() > 1e-4 * expected.abs().max(), "the outputs are all alike, so they say nothing"


@torch.no_grad()
def write_archive(model, config, path, halved=lambda name, tensor: True):
    """A TorchScript archive as OpenAI's: traced in full precision, then halved. Rounds `model` alike."""
    sizes = {
        "input_resolution": config.vision.image_size,
        "context_length": config.text.context_length,
        "vocab_size": config.text.vocab_size,
    }
    for name, size in sizes.items():
        if name in vars(model):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(size))
    images, tokens = probe(config)
    traced = torch.jit.trace_module(model, {"encode_image": images[:1], "encode_text": tokens[:1]}, check_trace=False)
    copies = {}
    for name, tensor in [*traced.named_parameters(), *traced.named_buffers()]:
        if tensor.is_floating_point() and halved(name, tensor):
            copies[name] = tensor.data.half()
            tensor.data = copies[name]
    traced.save(path)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, copy in copies.items():  # the traced module shares its tensors with the model
        own[name].data = copy.float()
    return path


def write_openai_state_dict(model, config, path, half=True):
    sizes = (config.vision.image_size, config.text.context_length, config.text.vocab_size)
    names = ("input_resolution", "context_length", "vocab_size")
    tensors = {key: rounded(tensor) if half else tensor for key, tensor in model.state_dict().items()}
    tensors |= {name: torch.tensor(size) for name, size in zip(names, sizes, strict=True)}
    torch.save(tensors, path)
    if half:
        round_model(model)
    return path


def rounded(tensor):
    return tensor.half() if tensor.is_floating_point() else tensor.clone()


@torch.no_grad()
def round_model(model):
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()
