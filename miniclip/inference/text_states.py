"""The text tower's states of every token, which diffusion models and other decoders condition on.

| what takes them                 | in its own library                  | here                   |
|---------------------------------|-------------------------------------|------------------------|
| Stable Diffusion 1              | transformers' `last_hidden_state`   | `layer=-1`             |
| Stable Diffusion 2              | open_clip's last block but one, and `ln_final` | `layer=-2`  |
| Stable Diffusion XL, both CLIPs | transformers' `hidden_states[-2]`   | `layer=-2, norm=False` |
"""

from __future__ import annotations

from torch import Tensor

from ..model import CLIP, MissingTower


def text_states(model: CLIP, tokens: Tensor, layer: int = -1, norm: bool = True) -> Tensor:
    """The states of all tokens after one of the text tower's blocks: (B, L) ids, padding included -> (B, L, D).

    A token's state depends on the ids up to its own. Behind a text's end that is the padding, so the states there
    differ between libraries: `tokenize` and open_clip pad with 0, transformers' tokenizer with the end of text.

    Args:
        tokens: on the model's device, L at most the context length.
        layer: a block by its index: -1 the last, -2 the last but one, 0 the first.
        norm: whether the tower's final norm is applied, whichever the layer.

    Raises:
        ValueError: no such layer, tokens of another shape or type, or a model without a text tower.
    """
    text = model.text
    if isinstance(text, MissingTower):
        raise ValueError("this model has no text tower, so it has no states of texts")
    model.check_tokens(tokens)
    blocks = [*text.transformer.resblocks]
    if not -len(blocks) <= layer < len(blocks):
        raise ValueError(f"layer is {layer}; this text tower has {len(blocks)}, {-len(blocks)} to {len(blocks) - 1}")
    x = text.token_embedding(tokens) + text.positional_embedding[: tokens.shape[1]]
    for block in blocks[: layer % len(blocks) + 1]:
        x = block(x)
    return text.ln_final(x) if norm else x
