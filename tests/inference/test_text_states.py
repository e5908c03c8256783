"""States of all tokens. Oracles: transformers' text model and open_clip's text tower, on the same weights."""

import pytest
import torch
from foreign_models import TINY_VIT, hf_model, openclip_model, probe, write_openai_state_dict
from helpers import tiny_clip, tiny_config

import miniclip

TOKENS = torch.tensor([[58, 3, 17, 59, 59, 59], [58, 4, 5, 6, 7, 59]])


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    theirs, folder = hf_model(), tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    model, _ = miniclip.load(folder, device="cpu")
    with torch.no_grad():
        return model, theirs.text_model(TOKENS, output_hidden_states=True)


def test_the_last_states_are_transformers(hugging_face):
    model, expected = hugging_face
    torch.testing.assert_close(miniclip.text_states(model, TOKENS), expected.last_hidden_state)


@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
def test_states_without_the_final_norm_are_transformers(hugging_face, layer):
    model, expected = hugging_face
    states = expected.hidden_states[1:]  # before them are the embeddings
    torch.testing.assert_close(miniclip.text_states(model, TOKENS, layer, norm=False), states[layer])


@pytest.mark.parametrize("layer", [-1, -2])
def test_states_are_open_clips(tmp_path, layer):
    theirs = openclip_model(TINY_VIT)
    write_openai_state_dict(theirs, TINY_VIT, tmp_path / "model.pt", half=False)
    model, _ = miniclip.load(tmp_path / "model.pt", device="cpu")
    _, tokens = probe(TINY_VIT)
    x = theirs.token_embedding(tokens) + theirs.positional_embedding
    for block in [*theirs.transformer.resblocks][: 2 + layer + 1]:
        x = block(x, attn_mask=theirs.attn_mask)
    torch.testing.assert_close(miniclip.text_states(model, tokens, layer), theirs.ln_final(x))


def test_the_end_of_texts_state_is_what_encode_text_projects():
    model = tiny_clip()
    tokens = miniclip.tokenize(["a cat", "two large dogs"], context_length=16)
    states = miniclip.text_states(model, tokens)
    assert states.shape == (2, 16, 16)
    ends = states[torch.arange(2), tokens.argmax(dim=1)]
    torch.testing.assert_close(ends @ model.text.text_projection, model.encode_text(tokens))


def test_gradients_reach_the_embeddings():
    model = tiny_clip()
    miniclip.text_states(model, miniclip.tokenize("a cat", context_length=16), -2).sum().backward()
    assert model.text.token_embedding.weight.grad.abs().sum() > 0
    assert model.text.transformer.resblocks[-1].ln_1.weight.grad is None


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(ValueError, match=f"layer is {layer}.*-2 to 1"):
        miniclip.text_states(tiny_clip(), TOKENS, layer)


def test_tokens_of_another_shape_and_a_model_without_texts_are_refused():
    with pytest.raises(ValueError, match=r"\(17,\).*context length 16"):
        miniclip.text_states(tiny_clip(), torch.zeros(17, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(1, 17\)"):
        miniclip.text_states(tiny_clip(), torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match=r"is a list; .*miniclip\.tokenize"):
        miniclip.text_states(tiny_clip(), ["a cat"])
    with pytest.raises(ValueError, match=r"is of torch\.float32"):
        miniclip.text_states(tiny_clip(), torch.zeros(1, 16))
    with pytest.raises(ValueError, match="no text tower"):
        miniclip.text_states(miniclip.CLIP(tiny_config(towers="image")), TOKENS)
