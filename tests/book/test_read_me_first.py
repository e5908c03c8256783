"""The book in four short tests: what the towers and the loss compute, written out as in the paper.

Nothing here is fast. Everything in `miniclip/fast/` has to give these numbers.
"""

import torch
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear, normalize

from miniclip import CLIP, CLIPConfig, TextConfig, VisionConfig, clip_loss, tokenize
from miniclip.tokenizer import END_OF_TEXT

CONFIG = CLIPConfig(
    embed_dim=8,
    activation="gelu",
    vision=VisionConfig(image_size=32, patch_size=16, width=24, layers=2, head_width=12),
    text=TextConfig(width=16, layers=2, head_width=8),
)


def block(x, weights, heads, is_causal):
    """Attention and MLP of one transformer block for a single image or text: (N, D) -> (N, D)."""
    N, D = x.shape
    y = layer_norm(x, (D,), weights.ln_1.weight, weights.ln_1.bias)
    q, k, v = linear(y, weights.attn.in_proj_weight, weights.attn.in_proj_bias).split(D, dim=1)  # (N, D) each
    attended = []
    for head in range(heads):
        channels = slice(head * D // heads, (head + 1) * D // heads)
        scores = q[:, channels] @ k[:, channels].T / (D // heads) ** 0.5  # (N, N), row i is what token i looks at
        if is_causal:
            scores[torch.ones(N, N).triu(1).bool()] = -torch.inf  # nothing that comes after it
        attended.append(scores.softmax(dim=1) @ v[:, channels])
    x = x + linear(torch.cat(attended, dim=1), weights.attn.out_proj.weight, weights.attn.out_proj.bias)
    y = layer_norm(x, (D,), weights.ln_2.weight, weights.ln_2.bias)
    y = gelu(linear(y, weights.mlp.c_fc.weight, weights.mlp.c_fc.bias))
    return x + linear(y, weights.mlp.c_proj.weight, weights.mlp.c_proj.bias)


def encode_image(tower, image):
    """(3, R, R) -> (E,)"""
    P, D = CONFIG.vision.patch_size, CONFIG.vision.width
    R = CONFIG.vision.image_size
    patches = [image[:, y : y + P, x : x + P].flatten() for y in range(0, R, P) for x in range(0, R, P)]
    x = torch.stack(patches) @ tower.conv1.weight.flatten(1).T  # (patches, D)
    x = torch.cat([tower.class_embedding[None], x]) + tower.positional_embedding
    x = layer_norm(x, (D,), tower.ln_pre.weight, tower.ln_pre.bias)
    for weights in tower.transformer.resblocks:
        x = block(x, weights, CONFIG.vision.heads, is_causal=False)
    return layer_norm(x[0], (D,), tower.ln_post.weight, tower.ln_post.bias) @ tower.proj  # the class token


def encode_text(tower, tokens):
    """(77,) -> (E,)"""
    D = CONFIG.text.width
    x = tower.token_embedding.weight[tokens] + tower.positional_embedding
    for weights in tower.transformer.resblocks:
        x = block(x, weights, CONFIG.text.heads, is_causal=True)
    end = tokens.tolist().index(END_OF_TEXT)
    return layer_norm(x[end], (D,), tower.ln_final.weight, tower.ln_final.bias) @ tower.text_projection


def a_clip():
    torch.manual_seed(0)
    return CLIP(CONFIG).double().eval()


@torch.no_grad()
def test_the_image_tower_is_patches_blocks_and_a_projection():
    model, images = a_clip(), torch.randn(3, 3, 32, 32, dtype=torch.double)
    expected = torch.stack([encode_image(model.visual, image) for image in images])
    torch.testing.assert_close(model.encode_image(images), expected)


@torch.no_grad()
def test_the_text_tower_is_tokens_causal_blocks_and_a_projection():
    """Shared prefixes ("a photo of a") and padding are computed here as often as they occur."""
    model = a_clip()
    tokens = tokenize(["a photo of a cat", "a photo of a dog in the rain", "seven"])
    expected = torch.stack([encode_text(model.text, row) for row in tokens.long()])
    torch.testing.assert_close(model.encode_text(tokens), expected)


@torch.no_grad()
def test_logits_are_scaled_cosines():
    model, images, tokens = a_clip(), torch.randn(2, 3, 32, 32, dtype=torch.double), tokenize(["a cat", "a dog", "x"])
    logits_per_image, logits_per_text = model(images, tokens)
    for i, image in enumerate(images):
        for j, row in enumerate(tokens.long()):
            cosine = torch.cosine_similarity(
                encode_image(model.visual, image), encode_text(model.text, row), dim=0
            )  # fmt: skip
            torch.testing.assert_close(logits_per_image[i, j], model.logit_scale.exp() * cosine)
    assert torch.equal(logits_per_text, logits_per_image.T)


def test_the_loss_is_two_cross_entropies():
    image_features, text_features = normalize(torch.randn(2, 6, 8, dtype=torch.double), dim=2)
    logits = 10 * image_features @ text_features.T
    labels = torch.arange(6)  # image i belongs to text i
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(clip_loss(image_features, text_features, 10), expected)
    torch.testing.assert_close(clip_loss(image_features, text_features, 10, chunk_size=2), expected)
