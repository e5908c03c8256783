"""Every shape that a comment of the book or of `fast/` names is the shape that is there when the code runs."""

import ast
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import shape_comments
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from shape_comments import Call, Comment, Dims, Source, judge, recording

import miniclip
from miniclip import CLIP, CLIPConfig, TextConfig, VisionConfig, clip_loss, openai, openclip_model, siglip_loss
from miniclip.fast import bfloat16, folded, matmul
from miniclip.fast.packed_texts import pack_text
from miniclip.model import Rectangle
from miniclip.tokenizer import END_OF_TEXT, tokenize
from miniclip.training.recompute import drop_patches

FOLDER = Path(miniclip.__path__[0])
BOOK = [f"{name}.py" for name in ("config", "tokenizer", "images", "model", "resnet", "timm_tower", "loss")]
OTHERS = ["openai.py", "openclip_model.py", "training/recompute.py"]  # these compute the book's features, too
FILES = [*BOOK, *sorted(f"fast/{path.name}" for path in FOLDER.glob("fast/*.py")), *OTHERS]
E = 20  # all numbers of a run differ, so that a wrong letter has a wrong size
TEXT = TextConfig(context_length=11, width=24, layers=2, head_width=8)
VISION = VisionConfig(image_size=32, patch_size=8, width=48, layers=2, head_width=12)
RESNET = VisionConfig(kind="resnet", image_size=64, width=8, blocks=(1, 1, 1, 1))


@cache
def source(name: str) -> Source:
    return Source.of(FOLDER / name)


def model_of(vision: VisionConfig) -> CLIP:
    torch.manual_seed(0)
    return CLIP(CLIPConfig(E, "quick_gelu", vision, TEXT))


def texts(first: int = 1) -> torch.Tensor:
    """(5, 11): words, the end of text, padding; the first words are shared by all."""
    tokens = torch.zeros(5, 11, dtype=torch.int)
    for row, length in enumerate((4, 6, 10, 6, 7)):
        tokens[row, :length] = torch.arange(length) + 20 * row
        tokens[row, :first] = torch.arange(first)
        tokens[row, length - 1] = END_OF_TEXT
    return tokens


# ---- the runs: each gives what it knows of its letters, and what was seen

Run = tuple[dict[str, int], list[Call]]


def run(known: dict[str, int], files: list[str], function, *args, **options) -> Run:
    with recording(map(source, files)) as calls:
        function(*args, **options)
    return known, list(calls.values())


def image_runs() -> Iterator[Run]:
    images, tower, observed = torch.randn(6, 3, 32, 32), model_of(VISION).visual, model_of(VISION).visual
    observed.register_forward_hook(lambda *_: None)
    known = {"B": 6, "N": 17, "patches": 16, "D": 48, "H": 4, "E": E, "R": 32}
    yield run(known, ["model.py"], tower, images)
    yield run(known, ["model.py"], tower, images, all_tokens=True)
    yield run(known, ["model.py"], observed, images)
    known = {"B": 6, "patches": 8, "rows": 2, "P": 8, "columns": 4}
    yield run(known, ["fast/folded.py"], folded.patches, tower.conv1, images[:, :, :16])
    images, tower = torch.randn(6, 3, 64, 64), model_of(RESNET).visual
    known = {"B": 6, "R": 64, "E": E, "D": 8, "N": 5, "H": 2, "W": 2, "C": 256, "heads": 4}
    yield run(known, ["resnet.py"], tower, images)
    yield run(known, ["resnet.py"], tower, images, all_tokens=True)


def text_runs() -> Iterator[Run]:
    model, known = model_of(VISION), {"B": 5, "L": 11, "N": 11, "D": 24, "H": 3, "E": E}
    yield run(known, ["model.py"], model.text, texts())
    yield run(known, ["model.py"], model.text, texts(), all_tokens=True)
    yield run(known, ["model.py"], model.text, texts(), layout=Rectangle.of(texts(), END_OF_TEXT))
    for num_shared, num_prefixes in ((1, 29), (3, 21)):
        tokens, known = texts(num_shared), {"B": 5, "L": 10, "T": 33, "U": num_prefixes, "D": 24, "H": 3, "E": E}
        yield run(known, ["fast/packed_texts.py"], model.encode_text, tokens)
        packed, layout, _ = pack_text(tokens, END_OF_TEXT)
        yield run(known, ["fast/packed_texts.py"], model.text, packed, True, layout)
        # All texts lie one behind the other, in a batch of one row.
        yield run({"D": 24, "H": 3, "E": E}, ["model.py"], model.encode_text, tokens)


CASES = [
    {**chunks, **mask, **groups}
    for chunks, mask, groups in itertools.product(
        ({}, {"chunk_size": 2}),
        ({}, {"mask": torch.tensor([True, False, *[True] * 6])}),
        ({}, {"groups": torch.tensor([0, 1, 0, 2, 3, 1, 4, 5])}),
    )
]


def loss_runs(rank: int = 0, world_size: int = 1) -> Iterator[Run]:
    features, b = F.normalize(torch.randn(2, 8, E), dim=2), 8 // world_size
    own = slice(rank * b, (rank + 1) * b)
    for case, sigmoid in itertools.product(CASES, (False, True)):
        options = {name: value if name == "chunk_size" else value[own] for name, value in case.items()}
        images, texts = (each[own].clone().requires_grad_() for each in features)

        def learn(images, texts, options, sigmoid):
            arguments = (images, texts, 10.0, -10.0) if sigmoid else (images, texts, 10.0)
            function = siglip_loss if sigmoid else clip_loss
            function(*arguments, **options, across_processes=world_size > 1).backward()

        known = {"B": 8, "b": b, "E": E, "groups": 6, "chunk": options.get("chunk_size", b)}
        yield run(known, ["loss.py", "fast/sliced_loss.py"], learn, images, texts, options, sigmoid)


def product_runs() -> Iterator[Run]:
    """The products that go to oneDNN, where PyTorch has it."""
    if matmul.ONEDNN not in matmul.available():
        return
    x, weight = torch.randn(80, 256, requires_grad=True), torch.randn(208, 256, requires_grad=True)
    with matmul.using(matmul.ONEDNN):
        y = matmul.linear(x, weight)
        yield run({"N": 80, "K": 256, "M": 208}, ["fast/matmul.py"], y.sum().backward)


def bfloat16_runs() -> Iterator[Run]:
    images, tower = torch.randn(6, 3, 32, 32), model_of(VISION).visual
    patches = bfloat16.Patches(tower.conv1)
    yield run({"B": 6, "rows": 2, "P": 8, "columns": 4}, ["fast/bfloat16.py"], patches, images[:, :, :16])
    bfloat16.lower(tower)
    with torch.no_grad():
        yield run({"B": 6, "N": 17, "D": 48, "H": 4}, ["fast/bfloat16.py"], tower, images)
    yield run({"M": 208, "K": 256}, ["fast/bfloat16.py"], bfloat16.Linear, torch.randn(208, 256), None)


def token_runs() -> Iterator[Run]:
    words = ["a cat", "a dog in the rain", "seven", "a red car beside a blue one", "x"]
    num_ids = int((tokenize(words, 11) != 0).sum()) - 5  # without the starts of text
    yield run({"B": 5, "L": 11, "M": num_ids}, ["tokenizer.py"], tokenize, words, 11)


def other_runs() -> Iterator[Run]:
    """The other libraries' modules, and patches that are left out in training."""
    images, config = torch.randn(6, 3, 32, 32), model_of(VISION).config
    for file, model in (
        ("openai.py", openai._from_config(config, "")),
        ("openclip_model.py", openclip_model.CLIP.of(config)),
    ):
        yield run({"B": 6, "N": 17, "patches": 16, "D": 48}, [file], model.encode_image, images)
        yield run({"B": 5, "N": 11, "D": 24}, [file], model.encode_text, texts())
    yield run({"B": 6, "N": 17, "kept": 12}, ["training/recompute.py"], drop_patches, torch.randn(6, 17, 48), 0.25)


def example_runs() -> Iterator[Run]:
    examples = shape_comments.examples(FOLDER / "loss.py")
    with recording([examples]) as calls:
        exec(compile(examples.text, examples.path, "exec"), {"clip_loss": clip_loss})
    yield {"B": 8, "E": 16}, list(calls.values())


def all_comments() -> set[Comment]:
    listed = [comment for file in FILES for comment in source(file).comments()]
    return {*listed, *shape_comments.examples(FOLDER / "loss.py").comments()}


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [
        *image_runs(),
        *text_runs(),
        *loss_runs(),
        *product_runs(),
        *bfloat16_runs(),
        *token_runs(),
        *other_runs(),
        *example_runs(),
    ]


# ---- what they show


def test_every_shape_comment_of_the_book_is_reached_and_true(runs):
    reached = set[Comment]()
    for known, calls in runs:
        found, wrong = judge(calls, known)
        assert not wrong
        reached |= found
    no_onednn = matmul.ONEDNN not in matmul.available()
    unreached = {str(comment) for comment in all_comments() - reached}
    assert not {comment for comment in unreached if not (no_onednn and "fast/matmul.py" in comment)}
    assert len(reached) > 35


def test_each_comment_would_be_found_if_it_were_wrong(runs):
    """With a dimension more, with two dimensions exchanged, with one more in a dimension."""
    count = 0
    for comment in all_comments():
        where = [(known, call) for known, calls in runs for call in calls if comment in [each[0] for each in call.seen]]
        for changed in mutants(comment):
            found = [judge([replaced(call, comment, changed)], known)[1] for known, call in where]
            assert any(found) or not where, f"{comment}: {[ast.unparse(each[0]) for each in changed.shapes[0]]}"
            count += bool(where)
    assert count > 150


def mutants(comment: Comment) -> Iterator[Comment]:
    for number, dims in enumerate(comment.shapes):
        for changed in wrong_shapes(dims):
            yield dataclasses.replace(
                comment, shapes=(*comment.shapes[:number], changed, *comment.shapes[number + 1 :])
            )


def wrong_shapes(dims: Dims) -> Iterator[Dims]:
    yield (*dims, dims[0])
    yield dims[1:] + (() if len(dims) > 1 else ((ast.Constant(1),), *dims))
    for index, alternatives in enumerate(dims):
        more = tuple(ast.parse(f"1 + {ast.unparse(each)}", mode="eval").body for each in alternatives)
        yield (*dims[:index], more, *dims[index + 1 :])
    for left, right in itertools.combinations(range(len(dims)), 2):
        exchanged = list(dims)
        exchanged[left], exchanged[right] = dims[right], dims[left]
        if ast.unparse(dims[left][0]) != ast.unparse(dims[right][0]):
            yield tuple(exchanged)


def replaced(call: Call, comment: Comment, changed: Comment) -> Call:
    seen = [(comment, changed.shapes, values) if each == comment else (each, shapes, values)
            for each, shapes, values in call.seen]  # fmt: skip
    return dataclasses.replace(call, seen=seen)


def of_a_rank(rank: int, folder: str) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    judged = [judge(calls, known) for known, calls in loss_runs(rank, 2)]
    reached = sorted({str(comment) for comments, _ in judged for comment in comments})
    wrong = [line for _, lines in judged for line in lines]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({"reached": reached, "wrong": wrong}, file)
    dist.destroy_process_group()


def test_the_comments_of_the_losses_are_true_on_each_of_two_processes(tmp_path):
    warm.spawn(of_a_rank, (str(tmp_path),), 2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not found["wrong"]
        assert len(found["reached"]) > 10


# ---- the checker itself


def checked(tmp_path, code: str, **known: int) -> tuple[int, list[str]]:
    path = tmp_path / "code.py"
    path.write_text(code)
    own = Source.of(path)
    with recording([own]) as calls:
        exec(compile(code, str(path), "exec"), {"torch": torch})
    reached, wrong = judge(calls.values(), known)
    assert len(reached) == len(own.comments())
    return len(reached), wrong


RIGHT = """
def halves(x):  # (B, N, D) -> (B, N, D/2)
    B, N, D = x.shape
    left, right = x.chunk(2, dim=2)  # (B, N, D / 2)
    y = torch.cat([left, right[:, :1]], dim=1)  # both, (B, N + 1, D/2); the rest is prose (a, list)
    # y is (B, N + 1 or 1, D/2), and left and right are (…, D/2)
    rows, flat = y.unbind(1)[0], left.flatten()  # (B, D/2), (B·N·D/2,)
    return left


class Pair:
    first: torch.Tensor  # (K,)
    second: torch.Tensor  # (K, 2)

    def __init__(self):
        self.first, self.second = torch.zeros(3), torch.zeros(3, 2)


def pair():
    return Pair()


halves(torch.zeros(2, 3, 8))
halves(torch.zeros(4, 5, 6))
pair()
"""


def test_what_is_right_passes(tmp_path):
    assert checked(tmp_path, RIGHT) == (8, [])


@pytest.mark.parametrize("right, wrong", [
    ("# (B, N, D) ->", "# (B, D, N) ->"),
    ("-> (B, N, D/2)", "-> (B, N, D)"),
    ("# (B, N, D / 2)", "# (B, N, D / 3)"),
    ("(B, N + 1, D/2); the", "(B, N + 2, D/2); the"),
    ("N + 1 or 1", "N or 1"),
    ("(…, D/2)", "(…, D)"),
    ("# (B, D/2), (B·", "# (D/2, B), (B·"),
    ("(B·N·D/2,)", "(B, N·D/2)"),
    ("# (K, 2)", "# (2, K)"),
])  # fmt: skip
def test_what_is_wrong_is_found(tmp_path, right, wrong):
    assert RIGHT.count(right) == 1
    assert checked(tmp_path, RIGHT.replace(right, wrong))[1]


def test_a_letter_has_the_size_that_the_test_knows(tmp_path):
    code = "def f(x):\n    y = x + 1  # (B, D)\n    return y\n\n\nf(torch.zeros(2, 3))\n"
    assert checked(tmp_path, code, B=2, D=3)[1] == []
    assert "D is not 3" in checked(tmp_path, code, B=2, D=4)[1][0]
