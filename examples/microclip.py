"""CLIP in one file: tokenizer, two towers, loss, training, zero-shot classification. Read it from top to bottom.

    python examples/digits.py data            # pictures of handwritten digits with captions
    python examples/microclip.py data         # 164 s of one core of an AMD EPYC: 78 % of the digits right

It computes what the package computes: parameters have the same names, so `load_state_dict` takes those of a model that
the package trained; tokens, features, loss and guesses are equal (tests/docs/test_microclip.py). The package adds what
is missing here: exact epochs, resuming, several GPUs, OpenAI's weights, speed, and errors that explain.

Radford et al. 2021, https://arxiv.org/abs/2103.00020. B batch, N tokens, L text tokens, D width, H heads, E embedding.
"""

import csv
import functools
import gzip
import html
import math
import random
import sys
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import ftfy
import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

# --- 1. Text becomes tokens: byte-pair encoding (section 2.4) ---------------------------------------------------------

VOCABULARY = Path(__file__).parents[1] / "miniclip" / "assets" / "bpe_simple_vocab_16e6.txt.gz"
START, END = 49406, 49407


class Tokenizer:
    """A word's bytes, of which the pair that was learnt first is merged, again and again, until none is left."""

    def __init__(self) -> None:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        lines = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
        merges = [tuple(line.split()) for line in lines]
        bytes_ = list(self.letters.values())
        symbols = [*bytes_, *(letter + "</w>" for letter in bytes_), *("".join(merge) for merge in merges)]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.order = {merge: i for i, merge in enumerate(merges)}
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        self.word_ids = functools.cache(self.encode_word)  # most words come again

    def encode_word(self, word: str) -> list[int]:
        parts = [self.letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(pairwise(parts), key=lambda p: self.order.get(p, math.inf))
            if pair not in self.order:
                break
            place = list(pairwise(parts)).index(pair)
            parts[place : place + 2] = ["".join(pair)]
        return [self.ids[part] for part in parts]

    def __call__(self, texts: list[str], length: int) -> Tensor:
        """Texts -> (B, length): start, text, end, zeros. A longer text is cut, and its last token is the end."""
        tokens = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            text = " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
            ids = [START, *(i for word in self.words.findall(text) for i in self.word_ids(word))][: length - 1]
            row[: len(ids) + 1] = torch.tensor([*ids, END])
        return tokens


# --- 2. Two towers map pictures and tokens to one space (section 2.4) -------------------------------------------------


class Attention(nn.Module):
    """softmax(q kᵀ / √(D/H)) v in each head: every token takes from the others what its query asks for."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # (B, N, D) -> (B, N, D)
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, H, N, D/H)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, N, N)
        if causal:  # a token of a text sees itself and what comes before it
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Tokens read from each other (attention), then each is computed on alone (MLP); both add to their input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # (B, N, D) -> (B, N, D)
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # (B, N, D) -> (B, N, D)
        for block in self.resblocks:
            x = block(x, causal)
        return x


class ImageTower(nn.Module):
    """A vision transformer: patches of the picture are the tokens, and a class token collects what they know."""

    def __init__(self, size: int, patch: int, width: int, heads: int, layers: int, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)  # a matrix for every patch
        self.class_embedding = nn.Parameter(0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(0.5 * torch.randn(1 + (size // patch) ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, R, R) -> (B, E)
        x = self.conv1(images).flatten(2).mT  # (B, patches, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x), causal=False)
        return self.ln_post(x[:, 0]) @ self.proj


class TextTower(nn.Module):
    """A causal transformer, read at the end-of-text token: the only one that has seen the whole text."""

    def __init__(self, length: int, width: int, heads: int, layers: int, embed_dim: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(END + 1, width)
        self.positional_embedding = nn.Parameter(0.05 * torch.randn(length, width))
        self.transformer = Transformer(width, heads, layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L) -> (B, E)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.transformer(x, causal=True)
        end = (tokens == END).int().argmax(dim=1)
        return self.ln_final(x[torch.arange(len(x)), end]) @ self.text_projection


class Micro(nn.Module):
    size, length = 28, 32  # pixels of a side, tokens of a text; these and the numbers below are configs/digits.yaml's

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Tokenizer()
        self.visual = ImageTower(self.size, patch=7, width=128, heads=2, layers=4, embed_dim=128)
        self.text = TextTower(self.length, width=128, heads=2, layers=3, embed_dim=128)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # learnt as a logarithm (section 2.5)

    def encode_image(self, images: Tensor) -> Tensor:  # (B, 3, R, R) -> (B, E), of unit length
        return F.normalize(self.visual(images), dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:  # B texts -> (B, E), of unit length
        return F.normalize(self.text(self.tokenizer(texts, self.length)), dim=-1)


# --- 3. The loss: which text belongs to which picture? (section 2.3, figure 3) ----------------------------------------


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Each picture chooses among all texts of the batch, each text among all pictures; ln B is chance."""
    logits = logit_scale.exp() * image_features @ text_features.T  # (B, B); the right pairs are on the diagonal
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


# --- 4. Training (section 2.5) ----------------------------------------------------------------------------------------

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


def pixels(path: Path, size: int) -> Tensor:
    """A picture as the image tower takes it: (3, size, size). Real pictures are cropped, too; these are square."""
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD


def train(model: Micro, folder: Path, steps: int = 400, batch_size: int = 128, lr: float = 1e-3) -> None:
    """On the pictures of a folder, each with captions in a .txt beside it, one of which is drawn each time."""
    paths = sorted(folder.glob("*.png")) or sys.exit(f"no .png in {folder}; examples/digits.py makes some")
    images = torch.stack([pixels(path, model.size) for path in paths])
    captions = [path.with_suffix(".txt").read_text().splitlines() for path in paths]
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}
    others = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}  # norms, biases, the scale
    optimizer = torch.optim.AdamW([matrices, others], lr, betas=(0.9, 0.98), eps=1e-6)
    for step in range(steps):
        for group in optimizer.param_groups:  # 20 steps of warm-up, then half a cosine
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = random.sample(range(len(paths)), min(batch_size, len(paths)))
        texts = [random.choice(captions[i]) for i in chosen]
        loss = clip_loss(model.encode_image(images[chosen]), model.encode_text(texts), model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss.item():.3f}  (chance {math.log(len(chosen)):.3f})")


# --- 5. Zero-shot classification: prompts are the classifier (section 3.1) --------------------------------------------


@torch.no_grad()
def classifier(model: Micro, names: list[str], templates: list[str]) -> Tensor:
    """(E, C): a class is the mean direction of its prompts."""
    prompts = [model.encode_text([template.format(c=name) for template in templates]) for name in names]
    return F.normalize(torch.stack([features.mean(dim=0) for features in prompts]), dim=-1).T


@torch.no_grad()
def classify(model: Micro, paths: list[Path], names: list[str], templates: list[str]) -> list[str]:
    """Each picture's class: the one whose direction is nearest."""
    features = torch.cat([model.encode_image(pixels(path, model.size)[None]) for path in paths])
    return [names[i] for i in (features @ classifier(model, names, templates)).argmax(dim=1)]


if __name__ == "__main__":
    data = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
    torch.manual_seed(0)
    random.seed(0)
    model = Micro()
    train(model, data / "train")
    rows = list(csv.DictReader((data / "digits.csv").open()))
    names = (data / "digits.classnames.txt").read_text().split()
    templates = (data / "digits.templates.txt").read_text().splitlines()
    guesses = classify(model, [data / row["filepath"] for row in rows], names, templates)
    right = sum(guess == row["label"] for guess, row in zip(guesses, rows, strict=True))
    print(f"zero-shot: {right} of {len(rows)} digits right ({right / len(rows):.1%})")
