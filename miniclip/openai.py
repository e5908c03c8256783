"""OpenAI's `clip` package, for scripts that reach into it: `import miniclip.openai as clip`, or `install()` first.

`import miniclip as clip` serves scripts that load, tokenize and encode. This module also has the names, signatures,
axis orders and precisions of OpenAI's modules: transformers take (N, B, D), the text tower's parts stand at the top of
the model and of its state dict, attention is `nn.MultiheadAttention`, weights are float16 on a GPU. Texts are neither
packed nor cut. The module is at once `clip`, `clip.clip`, `clip.model` and `clip.simple_tokenizer`.

N tokens, B batch, H heads, D width, E embedding, R resolution.
"""

from __future__ import annotations

import hashlib
import html
import math
import opcode
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import cache, cached_property, wraps
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import ftfy
import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import resnet, tokenizer
from .common.device import find_device
from .common.files import ASSETS
from .config import CLIP_LOGIT_SCALE, OPENAI_MEAN, OPENAI_STD, Activation, CLIPConfig, VisionConfig
from .model import pick, project
from .resnet import Bottleneck
from .weights.download import OPENAI_BASE_URL, OPENAI_FILES, download, openai_folder
from .weights.heads import NotToldError
from .weights.layouts import to_openai_keys
from .weights.load import build, preprocess_for
from .weights.read import Checkpoint, locate, read_checkpoint
from .weights.shapes import Unfilled

# ---------------------------------------------------------------------------------------------------------------------
# clip.model


class LayerNorm(nn.LayerNorm):
    """Computed in float32 at least, whatever the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if each is None else each.to(wide) for each in (self.weight, self.bias))
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


# A program may put a class of its own in place of one of these, in this module, before it makes a model. Such a class
# takes OpenAI's arguments, so it is given another only where a checkpoint needs it.
_USUAL: dict[str, Any] = {"activation": "quick_gelu", "vision_heads": None}
_USUAL |= dict.fromkeys(("mlp_ratio", "vision_mlp_ratio", "transformer_mlp_ratio"), 4.0)


def _unusual(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value != _USUAL[name]}


class ResidualAttentionBlock(nn.Module):
    """(N, B, D) -> (N, B, D), under a mask (N, N) or, for each row and head of its own, (B * H, N, N)."""

    def __init__(
        self,
        d_model: int,
        n_head: int,
        attn_mask: Tensor | None = None,
        *,
        activation: Activation = "quick_gelu",
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        hidden = int(d_model * mlp_ratio)
        self.attn = nn.MultiheadAttention(d_model, n_head)
        self.ln_1 = LayerNorm(d_model)
        layers = OrderedDict[str, nn.Module](c_fc=nn.Linear(d_model, hidden))
        layers["gelu"] = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        layers["c_proj"] = nn.Linear(hidden, d_model)
        self.mlp = nn.Sequential(layers)
        self.ln_2 = LayerNorm(d_model)
        self.attn_mask = attn_mask  # no buffer, so it is in no state dict

    def attention(self, x: Tensor) -> Tensor:
        mask = self.attn_mask
        if mask is not None:
            mask = self.attn_mask = mask.to(x.device, x.dtype)
            mask = mask[..., : x.shape[0], : x.shape[0]]
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """(N, B, D) -> (N, B, D)."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        attn_mask: Tensor | None = None,
        *,
        activation: Activation = "quick_gelu",
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        options = _unusual(activation=activation, mlp_ratio=mlp_ratio)
        self.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads, attn_mask, **options) for _ in range(layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """(B, 3, R, R) -> (B, E), or (B, D) where `proj` is None."""

    def __init__(
        self,
        input_resolution: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        *,
        activation: Activation = "quick_gelu",
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = input_resolution, output_dim
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        num_tokens = (input_resolution // patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(num_tokens, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, **_unusual(activation=activation, mlp_ratio=mlp_ratio))
        self.ln_post = LayerNorm(width)
        self.proj: nn.Parameter | None = nn.Parameter(width**-0.5 * torch.randn(width, output_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)  # (B, N, D)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        return project(self.ln_post(x[:, 0]), self.proj)


class AttentionPool2d(resnet.AttentionPool):
    """(B, C, H, W) -> (B, E)."""

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int, output_dim: int | None = None) -> None:
        nn.Module.__init__(self)  # `resnet` draws in another order
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(3))
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)

    def forward(self, x: Tensor, all_tokens: bool = False) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        q = self._split(self.q_proj(x if all_tokens else x[:, :1]))
        k, v = self._split(self.k_proj(x)), self._split(self.v_proj(x))
        y = self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y if all_tokens else y[:, 0]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class Explained(nn.Module):
    """A module that names what stands in place of an attribute that it lacks."""

    instead: ClassVar[Mapping[str, str]] = {}
    explained_as = ("OpenAI's", __name__)  # whose modules have it, and where it is not

    def __getattr__(self, name: str) -> Any:
        if (remedy := type(self).instead.get(name)) is not None:
            whose, module = self.explained_as
            raise AttributeError(f"{type(self).__name__}.{name} is {whose}, and not in {module}: {remedy}")
        return super().__getattr__(name)


class ModifiedResNet(Explained, resnet.ModifiedResNet):
    """(B, 3, R, R) -> (B, E)."""

    instead = {  # noqa: RUF012
        "_make_layer": "layers are made with the tower",
        "_inplanes": "layers are made with the tower",
    }

    def __init__(
        self, layers: Sequence[int], output_dim: int, heads: int, input_resolution: int = 224, width: int = 64
    ) -> None:  # fmt: skip
        blocks: Any = tuple(layers)
        head_width = 32 * width // heads
        config = VisionConfig("resnet", input_resolution, width=width, blocks=blocks, head_width=head_width)
        super().__init__(config, output_dim)
        self.output_dim = output_dim

    @property
    def block(self) -> type[Bottleneck]:  # type: ignore[override]
        return Bottleneck

    @property
    def pool(self) -> Callable[..., resnet.AttentionPool]:  # type: ignore[override]
        return lambda num_positions, *sizes: AttentionPool2d(math.isqrt(num_positions), *sizes)

    def forward(self, x: Tensor, all_tokens: bool = False) -> Tensor:
        return super().forward(x.to(self.conv1.weight.dtype), all_tokens)


def initialize_resnet(tower: nn.Module) -> None:
    """Draws the projections of a ResNet's pool, and has each of its blocks begin as its shortcut alone."""
    for module in tower.modules():
        if isinstance(module, resnet.Bottleneck):
            nn.init.zeros_(module.bn3.weight)
        elif isinstance(module, resnet.AttentionPool):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.c_proj):
                nn.init.normal_(projection.weight, std=module.c_proj.in_features**-0.5)


class CLIP(nn.Module):
    """OpenAI's model; the arguments after the star are for other checkpoints than OpenAI's."""

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: int | Sequence[int],
        vision_width: int,
        vision_patch_size: int | None,
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
        *,
        vision_heads: int | None = None,
        vision_mlp_ratio: float = 4.0,
        transformer_mlp_ratio: float = 4.0,
        activation: Activation = "quick_gelu",
    ) -> None:
        super().__init__()
        self.context_length, self.vocab_size = context_length, vocab_size
        self.visual: ModifiedResNet | VisionTransformer
        if not isinstance(vision_layers, int):
            heads = vision_heads or vision_width * 32 // 64
            self.visual = ModifiedResNet(
                layers=vision_layers,
                output_dim=embed_dim,
                heads=heads,
                input_resolution=image_resolution,
                width=vision_width,
            )
        else:
            if vision_patch_size is None:
                raise ValueError("vision_patch_size is None; a vision transformer needs one")
            heads = vision_heads or vision_width // 64
            self.visual = VisionTransformer(
                input_resolution=image_resolution,
                patch_size=vision_patch_size,
                width=vision_width,
                layers=vision_layers,
                heads=heads,
                output_dim=embed_dim,
                **_unusual(activation=activation, mlp_ratio=vision_mlp_ratio),
            )
        self.transformer = Transformer(
            width=transformer_width,
            layers=transformer_layers,
            heads=transformer_heads,
            attn_mask=self.build_attention_mask(),
            **_unusual(activation=activation, mlp_ratio=transformer_mlp_ratio),
        )
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(CLIP_LOGIT_SCALE))
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """OpenAI's standard deviations, drawn in its order, so that a seed gives its weights.

        A vision transformer keeps those that it was made with, as OpenAI's does.
        """
        D, layers = self.transformer.width, self.transformer.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        self.initialize_image_tower()
        block: Any
        for block in self.transformer.resblocks:
            residual_std = D**-0.5 * (2 * layers) ** -0.5
            nn.init.normal_(block.attn.in_proj_weight, std=D**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * D) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=D**-0.5)

    def initialize_image_tower(self) -> None:
        initialize_resnet(self.visual)

    def build_attention_mask(self) -> Tensor:
        """(N, N), added to the scores: minus infinity above the diagonal."""
        return torch.full((self.context_length, self.context_length), -torch.inf).triu(1)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image.to(self.dtype))

    def encode_text(self, text: Tensor) -> Tensor:
        """(B, N) -> (B, E), read at each row's largest id, which is the end of text."""
        x = self.token_embedding(text).to(self.dtype)  # (B, N, D)
        x = x + self.positional_embedding[: text.shape[1]].to(self.dtype)
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        x = self.ln_final(x).to(self.dtype)
        return pick(x, text.argmax(dim=-1)) @ self.text_projection

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        image_features, text_features = self.encode_image(image), self.encode_text(text)
        image_features = image_features / image_features.norm(dim=1, keepdim=True)
        text_features = text_features / text_features.norm(dim=1, keepdim=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()
        return logits_per_image, logits_per_image.t()


def convert_weights(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """To `dtype`, in place: convolutions, linear layers, attention and projections. Norms and embeddings stay."""
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")
    for module in model.modules():
        lowered = []
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            lowered = [module.weight, module.bias]
        elif isinstance(module, nn.MultiheadAttention):
            lowered = [getattr(module, name) for name in names]
        lowered += [getattr(module, name, None) for name in ("text_projection", "proj")]
        for parameter in lowered:
            if isinstance(parameter, Tensor):
                parameter.data = parameter.data.to(dtype)


def build_model(state_dict: Mapping[str, Tensor]) -> CLIP:
    """The model that OpenAI's tensors belong to, in float16 and evaluation mode."""
    tensors = {name: value for name, value in state_dict.items() if name not in SIZES}

    def count(pattern: str) -> int:
        return len({match[0] for name in tensors if (match := regex.match(pattern, name))})

    try:
        layers: int | tuple[int, ...]
        if "visual.proj" in tensors:
            layers = count(r"visual\.transformer\.resblocks\.\d+\.")
            width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
            side = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
        else:
            layers = tuple(count(rf"visual\.layer{stage}\.\d+\.") for stage in (1, 2, 3, 4))
            width, patch_size = len(tensors["visual.layer1.0.conv1.weight"]), 32
            side = round((len(tensors["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        context_length, text_width = tensors["positional_embedding"].shape
        vocab_size, embed_dim = len(tensors["token_embedding.weight"]), tensors["text_projection"].shape[1]
    except KeyError as error:
        raise ValueError(f"these are not the tensors of an OpenAI CLIP: there is no {error}") from error
    text_layers, heads = count(r"transformer\.resblocks\.\d+\."), text_width // 64
    sizes = (embed_dim, side * patch_size, layers, width, patch_size)
    model = CLIP(*sizes, context_length, vocab_size, text_width, heads, text_layers)
    convert_weights(model)
    model.load_state_dict(tensors)
    if isinstance(state_dict, MutableMapping):  # as OpenAI's code leaves it: all of it can be loaded into the model
        for name in SIZES:
            state_dict.pop(name, None)
    return model.eval()


_OWN_BUILD_MODEL = build_model
SIZES = ("input_resolution", "context_length", "vocab_size")  # entries of OpenAI's files that are no parameters


# ---------------------------------------------------------------------------------------------------------------------
# clip.simple_tokenizer


def bytes_to_unicode() -> dict[int, str]:
    """Byte -> the printable character that the vocabulary spells it as, in the order of their ids."""
    return dict(tokenizer.byte_symbols())


def get_pairs(word: Sequence[str]) -> set[tuple[str, str]]:
    """The neighbours in a word of symbols."""
    return set(pairwise(word))


def basic_clean(text: str) -> str:
    """Repairs mojibake and unescapes HTML, twice."""
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def whitespace_clean(text: str) -> str:
    """Folds white space."""
    return " ".join(text.split())


_PIECES_OF_TEXT = r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MAX_KEPT_WORDS, _MAX_KEPT_LETTERS = 1 << 19, 64


@cache
def _byte_of_symbol() -> dict[str, int]:
    return {symbol: byte for byte, symbol in tokenizer.byte_symbols().items()}


@cache
def _symbol_of_id() -> dict[int, str]:
    """Id -> symbol, without the special tokens, in the order of the ids."""
    return {index: symbol for symbol, index in sorted(tokenizer.symbol_ids().items(), key=lambda item: item[1])}


def pieces_pattern(special: Iterable[str]) -> regex.Pattern[str]:
    """What cuts a text into words, runs of other characters, and the special tokens, which are patterns themselves."""
    return regex.compile("|".join(special) + _PIECES_OF_TEXT, regex.IGNORECASE)


def _changing(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @wraps(method)
    def change(self: _WatchedTable, *args: Any, **options: Any) -> Any:
        self.is_changed = True
        return method(self, *args, **options)

    return change


class _WatchedTable(dict[Any, Any]):
    """A table that programs may change, and whether one did; copies and pickles leave out what was only remembered."""

    is_changed = False
    __setitem__, __delitem__, __ior__, clear, pop, popitem, setdefault, update = map(
        _changing, ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")
    )

    @cached_property
    def _remembered(self) -> dict[Any, Any]:
        return {}

    def remember(self, key: Any, value: Any) -> None:
        """Sets what follows from other tables, which is no change."""
        self._remembered[key] = value
        super().__setitem__(key, value)

    def __reduce__(self) -> Any:
        return dict, ({key: value for key, value in self.items() if self._remembered.get(key) is not value},)


def _is_untouched(value: Any) -> bool:
    """Whether this is a table that nobody changed or put in the place of another."""
    return type(value) is _WatchedTable and not value.is_changed


def has_own_tables(of: SimpleTokenizer) -> bool:
    """Whether ids are by tables that nobody changed, and by nothing that was put into an instance."""
    return all(name in _CHANGE_NO_IDS or _is_untouched(value) for name, value in vars(of).items())


_CHANGE_NO_IDS = {"context_length", "decoder", "byte_decoder", "vocab_size"}


class SimpleTokenizer:
    """Text to ids and back. The special tokens are spelt <|startoftext|> and <|endoftext|>.

    The tables are an instance's own, and words that are added to them count, as in OpenAI's code.
    """

    special: Mapping[str, int] = {
        "<|startoftext|>": tokenizer.START_OF_TEXT,
        "<|endoftext|>": tokenizer.END_OF_TEXT,
    }
    pat = pieces_pattern(map(regex.escape, special))

    def __init__(self, bpe_path: str | None = None) -> None:
        if bpe_path is not None and Path(bpe_path).read_bytes() != Path(default_bpe()).read_bytes():
            raise ValueError(f"bpe_path is {bpe_path}; only OpenAI's own vocabulary is supported, {default_bpe()}")

    # None of these follows from another one, which may have been changed before.

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables that nobody changed, which are made again when they are asked for."""
        return {name: value for name, value in vars(self).items() if not _is_untouched(value)}

    @cached_property
    def encoder(self) -> dict[str, int]:
        return _WatchedTable({symbol: index for index, symbol in _symbol_of_id().items()} | dict(self.special))

    @cached_property
    def decoder(self) -> dict[int, str]:
        return _WatchedTable(_symbol_of_id() | {index: name for name, index in self.special.items()})

    @cached_property
    def bpe_ranks(self) -> dict[tuple[str, str], int]:
        symbols = _symbol_of_id()
        pairs = ((symbols[left], symbols[right]) for left, right in tokenizer.learnt_merges())
        return _WatchedTable((pair, rank) for rank, pair in enumerate(pairs))

    @cached_property
    def byte_encoder(self) -> dict[int, str]:
        return _WatchedTable(bytes_to_unicode())

    @cached_property
    def byte_decoder(self) -> dict[str, int]:
        return _WatchedTable(_byte_of_symbol())

    @cached_property
    def cache(self) -> dict[str, str]:
        """Words that were looked up, and the special tokens, which are not split."""
        return _WatchedTable({name: name for name in self.special})

    def bpe(self, token: str) -> str:
        """A word in the characters of `byte_encoder` -> the symbols that it is encoded as, with spaces between."""
        cache = self.cache
        if token in cache:
            return cache[token]
        word = " ".join(self._merged(token))
        if len(token) <= _MAX_KEPT_LETTERS and len(cache) < _MAX_KEPT_WORDS:
            (cache.remember if isinstance(cache, _WatchedTable) else cache.__setitem__)(token, word)
        return word

    def _merged(self, token: str) -> list[str]:
        ranks = vars(self).get("bpe_ranks")
        if (ranks is None or _is_untouched(ranks)) and type(self).bpe_ranks is SimpleTokenizer.bpe_ranks:
            symbols, byte_of = _symbol_of_id(), _byte_of_symbol()
            return [symbols[i] for i in tokenizer.merge(bytes(byte_of[symbol] for symbol in token))]
        ranks = self.bpe_ranks
        word = [*token[:-1], token[-1] + "</w>"]
        while pairs := [pair for pair in pairwise(word) if pair in ranks]:
            first = min(pairs, key=ranks.__getitem__)
            merged: list[str] = []
            for symbol in word:
                if merged and (merged[-1], symbol) == first:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            word = merged
        return word

    def encode(self, text: str) -> list[int]:
        if has_own_tables(self) and _ways_to_ids(type(self)) == _OWN_WAYS:
            cleaned = tokenizer.cleaned(text)
            if "<" not in cleaned:  # no special token, however it is spelt
                return tokenizer.encode_words(cleaned.split())
        return self.encode_cleaned(whitespace_clean(basic_clean(text)).lower())

    def encode_cleaned(self, text: str) -> list[int]:
        ids: list[int] = []
        spelt, id_of = self.byte_encoder.__getitem__, self.encoder.__getitem__
        for piece in regex.findall(self.pat, text):
            ids += map(id_of, self.bpe("".join(map(spelt, piece.encode("utf-8")))).split(" "))
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        ids = [int(token) for token in tokens]
        for i in ids:
            if i not in self.decoder:
                raise ValueError(f"{i} is no token id; ids are 0 to {max(self.decoder)}")
        text = "".join(self.decoder[i] for i in ids)
        written = bytes(self.byte_decoder[symbol] for symbol in text)
        return written.decode("utf-8", errors="replace").replace("</w>", " ")


def _ways_to_ids(tokenizer_class: type[SimpleTokenizer]) -> list[Any]:
    """What makes ids of texts, of the class or a subclass and of this module, as it is now."""
    names = ("bpe", "bpe_ranks", "byte_encoder", "cache", "encode_cleaned", "encoder", "pat", "special")
    return [basic_clean, whitespace_clean, *(getattr(tokenizer_class, name) for name in names)]


_OWN_WAYS = _ways_to_ids(SimpleTokenizer)


def default_bpe() -> str:
    return str(ASSETS / "bpe_simple_vocab_16e6.txt.gz")


# ---------------------------------------------------------------------------------------------------------------------
# clip.clip

_MODELS = {name: f"{OPENAI_BASE_URL}/{file}" for name, file in OPENAI_FILES.items()}
_ADDRESSES = frozenset(_MODELS.values())
_Tokenizer = SimpleTokenizer
_tokenizer = _Tokenizer()
_TRANSFORMS = ("CenterCrop", "Compose", "InterpolationMode", "Normalize", "Resize", "ToTensor")


def missing_name(module: str, message: str) -> AttributeError | ImportError:
    """The error of a module's `__getattr__` for a name that it lacks, such that the message reaches the reader.

    `hasattr` and `getattr` need an AttributeError, and `from … import …` replaces one by a sentence of Python's own.
    """
    try:
        caller = sys._getframe(2)  # which asked `__getattr__`
    except ValueError:  # C asked
        return AttributeError(message)
    is_import = caller.f_code.co_code[caller.f_lasti] == opcode.opmap["IMPORT_FROM"]
    return ImportError(message, name=module) if is_import else AttributeError(message)


def __getattr__(name: str) -> Any:
    if name == "BICUBIC" or name in _TRANSFORMS:
        from torchvision import transforms  # a second, and only these names need it

        return transforms.InterpolationMode.BICUBIC if name == "BICUBIC" else getattr(transforms, name)
    message = (
        f"miniclip.openai has no {name}; it has the names of OpenAI's clip, clip.clip, clip.model and "
        "clip.simple_tokenizer, and miniclip has its own"
    )
    raise missing_name(__name__, message)


def available_models() -> list[str]:
    return list(_MODELS)


def _download(url: str, root: str | None = None) -> str:
    """A file whose folder in the address is its SHA-256, fetched once.

    Raises:
        ValueError: it can't be had; or the address is not OpenAI's, and another file has its name.
    """
    checksum, file = url.split("/")[-2:]
    path = openai_folder(root) / file
    if url not in _ADDRESSES and path.is_file():
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != checksum:
            raise ValueError(f"{path} is not the file of {url}: its SHA-256 is {found}; move it away")
    return str(download(url, path, checksum))


def _transform(
    n_px: int, mean: Sequence[float] = OPENAI_MEAN, std: Sequence[float] = OPENAI_STD
) -> Callable[[Image.Image], Tensor]:  # fmt: skip
    own = sys.modules[__name__]  # whose names of torchvision's a program may replace
    return own.Compose(
        [
            own.Resize(n_px, interpolation=own.BICUBIC),
            own.CenterCrop(n_px),
            _convert_image_to_rgb,
            own.ToTensor(),
            own.Normalize(mean, std),
        ]
    )


def _convert_image_to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def load(
    name: str,
    device: str | torch.device | None = None,
    jit: bool = False,
    download_root: str | None = None,
) -> tuple[CLIP, Callable[[Image.Image], Tensor]]:
    """A model in evaluation mode, float16 on a GPU and float32 on the CPU, and its preprocessing.

    Args:
        name: one of OpenAI's names, or a checkpoint in any layout that `miniclip.load` reads, if its architecture is
            one that OpenAI's code has. A file of tensors that does not tell its activation has QuickGELU, and a
            warning says so.
        jit: warned about and ignored.

    Raises:
        RuntimeError: no such name or file.
        ValueError: no checkpoint, or another architecture.
    """
    if jit:
        warnings.warn("jit=True is ignored: no code of a checkpoint is run", stacklevel=2)
    if name not in _MODELS and not Path(name).exists() and not str(name).startswith("hf-hub:"):
        raise RuntimeError(f"Model {name} not found; available models = {available_models()}")
    device = find_device(device)
    path = _download(_MODELS[name], download_root) if name in _MODELS else locate(name, download_root)
    checkpoint = _read_as_openai(Path(path))
    config, source = checkpoint.config, str(path if name in _MODELS else name)
    tensors = to_openai_keys(build(checkpoint, source).state_dict())
    with Unfilled():
        model = _from_config(config, source)
    if build_model is not _OWN_BUILD_MODEL:  # a program's own, which is called as OpenAI's code calls it
        if beside := _beside_tensors(config):
            raise ValueError(
                f"{source} has {', '.join(beside)}, which tensors don't tell, and clip.build_model is replaced by one "
                "that is given tensors alone; load it with miniclip's own"
            )
        model = build_model(tensors).to(device)
        return model.float() if device.type == "cpu" else model, _transform(model.visual.input_resolution)
    model.load_state_dict(tensors)
    if device.type != "cpu":
        convert_weights(model)
    vision = config.vision
    usual = VisionConfig()
    is_openais = all(
        getattr(vision, name) == getattr(usual, name)
        for name in ("preprocess", "resize", "resize_size", "interpolation")
    )
    pixels = () if (vision.mean, vision.std) == (usual.mean, usual.std) else (vision.mean, vision.std)
    preprocess = _transform(vision.image_size, *pixels) if is_openais else preprocess_for(config)
    return model.to(device).eval(), preprocess


def _read_as_openai(path: Path) -> Checkpoint:
    try:
        return read_checkpoint(path)
    except NotToldError:
        found = read_checkpoint(path, activation="quick_gelu", head_width=64)
    warnings.warn(
        f"{path} does not tell its activation or its heads; it is taken to have QuickGELU and heads 64 wide, as "
        "OpenAI's code takes tensors alone. If it has others, miniclip.load takes activation= and head_width=",
        stacklevel=3,
    )
    return found


def _from_config(config: CLIPConfig, source: str) -> CLIP:
    vision, text = config.vision, config.text
    for holds, otherwise in (
        (config.towers == "both", f"this checkpoint has the {config.towers} tower alone"),
        (vision.kind != "timm", f"this one is timm's {vision.timm_model}"),
        (config.init_logit_bias is None, "this model has a bias of its logits"),
        (
            text.eot_token in (None, text.vocab_size - 1),
            f"here the end of a text is {text.eot_token}, not the largest id",
        ),
    ):
        if not holds:
            raise ValueError(f"{source} is no model that OpenAI's code has: {otherwise}; use miniclip.load")
    is_vit = vision.kind == "vit"
    width = vision.width if is_vit else 32 * vision.width  # of what the heads share
    return CLIP(
        config.embed_dim,
        vision.image_size,
        vision.layers if is_vit else vision.blocks,
        vision.width,
        vision.patch_size if is_vit else None,
        text.context_length,
        text.vocab_size,
        text.width,
        text.heads,
        text.layers,
        **_unusual(
            vision_heads=None if width == 64 * vision.heads else vision.heads,
            vision_mlp_ratio=vision.mlp_ratio,
            transformer_mlp_ratio=text.mlp_ratio,
            activation=config.activation,
        ),
    )


def _beside_tensors(config: CLIPConfig) -> list[str]:
    """What a model has otherwise than OpenAI's code makes it of tensors."""
    vision, text, usual = config.vision, config.text, VisionConfig()
    width = vision.width if vision.kind == "vit" else 32 * vision.width  # of what the heads share
    pixels = ("mean", "std", "preprocess", "resize", "resize_size", "interpolation")
    found = {
        f"activation {config.activation}": config.activation != "quick_gelu",
        f"{vision.heads} heads of images": width != 64 * vision.heads,
        f"{text.heads} heads of texts": text.width != 64 * text.heads,
        "an MLP of another width": not vision.mlp_ratio == text.mlp_ratio == 4,
        "other pixels": any(getattr(vision, name) != getattr(usual, name) for name in pixels),
    }
    return [what for what, is_so in found.items() if is_so]


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """(B, context_length) int32: start, text, end, zeros.

    Raises:
        RuntimeError: a text has more tokens, unless `truncate`, which cuts it and puts the end token last.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokens = np.zeros((len(texts), context_length), dtype=np.int32)
    start, end = (_tokenizer.encoder[name] for name in ("<|startoftext|>", "<|endoftext|>"))
    for row, text in zip(tokens, texts, strict=True):
        ids = [start, *_tokenizer.encode(text), end]
        if len(ids) > context_length:
            if not truncate:
                raise tokenizer.TextTooLongError(f"Input {text} is too long for context length {context_length}")
            ids = [*ids[: context_length - 1], end]
        row[: len(ids)] = ids
    return torch.from_numpy(tokens)


# ---------------------------------------------------------------------------------------------------------------------


def install() -> None:
    """Gives this module the names `clip`, `clip.clip`, `clip.model` and `clip.simple_tokenizer` in this process.

    Raises:
        ValueError: another `clip` is imported already.
    """
    install_as(sys.modules[__name__], "clip", "clip.clip", "clip.model", "clip.simple_tokenizer")


def install_as(module: ModuleType, *names: str) -> None:
    """Has `import NAME` find `module`, for each of the names; the ValueError of `install` if one finds another."""
    for name in names:
        if sys.modules.get(name, module) is not module:
            where = getattr(sys.modules[name], "__file__", "elsewhere")
            raise ValueError(f"{name} is imported already, from {where}; call {module.__name__}.install() before that")
    sys.modules.update(dict.fromkeys(names, module))


clip = model = simple_tokenizer = sys.modules[__name__]
