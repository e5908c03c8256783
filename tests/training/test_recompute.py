"""What makes training faster, smaller or less precise, and what it must not change: recomputed activations, patch
dropout, compiled towers, the memory's layout, mixed precision, fused steps. Oracle: the same without."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import pack_folder, tiny_clip, tiny_config, write_pairs
from pytorch_lightning import Callback
from torch import Tensor, nn

import miniclip
from miniclip.commands import train as trainer
from miniclip.config import VisionConfig
from miniclip.data.module import PairDataModule
from miniclip.data.pairs import Batch, Sample, collate
from miniclip.fast.packed_texts import trim_text
from miniclip.model import MLP
from miniclip.resnet import Bottleneck
from miniclip.tokenizer import END_OF_TEXT
from miniclip.training.optimizer import OptimizerConfig, make_optimizer
from miniclip.training.recompute import drop_patches
from miniclip.training.step import CLIPTraining

VIT = tiny_config().vision
RESNET = VisionConfig(kind="resnet", image_size=32, width=8, blocks=(1, 2, 1, 1), head_width=8)
TIMM = VisionConfig(kind="timm", image_size=160, timm_model="test_vit")


def training(vision: VisionConfig = VIT, **options: Any) -> CLIPTraining:
    """In fp64, the same weights for the same tower."""
    torch.manual_seed(0)
    return CLIPTraining(tiny_config(vision=vision), **options).double().train()


def random_batch(count: int, resolution: int = 16, length: int = 10) -> Batch:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1000, (count, length), generator=random)
    tokens[:, -1] = END_OF_TEXT
    images = torch.randint(0, 256, (count, 3, resolution, resolution), dtype=torch.uint8, generator=random)
    return Batch(images, tokens, None, ["key"] * count, [], 0, torch.arange(count))


def loss_of(module: CLIPTraining, features: tuple[Tensor, Tensor]) -> Tensor:
    return miniclip.clip_loss(*features, module.clip.logit_scale.exp())


def results(module: CLIPTraining, batch: Batch) -> dict[str, Tensor]:
    """Loss, gradients and buffers after a forward and a backward pass."""
    torch.manual_seed(1)
    loss = loss_of(module, module.features(batch))
    loss.backward()
    out = {"loss": loss.detach()}
    out |= {f"{name}.grad": parameter.grad for name, parameter in module.named_parameters()}
    return out | {name: buffer.double() for name, buffer in module.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm().clamp(min=1e-3), name


# ---------------------------------------------------------------------------------------------------------------------
# Activations computed again


def with_dropout(module: CLIPTraining) -> CLIPTraining:
    """Dropout inside every block: what is computed again has to meet the same random numbers."""
    for part in module.modules():
        if isinstance(part, MLP):
            part.activation = nn.Sequential(part.activation, nn.Dropout(0.3))
        elif isinstance(part, Bottleneck):
            part.avgpool = nn.Sequential(part.avgpool, nn.Dropout(0.3))
    return module


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("vision", [VIT, RESNET, TIMM], ids=lambda vision: vision.kind)
def test_checkpointed_activations_change_neither_loss_nor_gradients_nor_running_statistics(vision, micro_batch_size):
    batch = random_batch(5, vision.image_size)
    plain = with_dropout(training(vision, micro_batch_size=micro_batch_size))
    saving = with_dropout(training(vision, micro_batch_size=micro_batch_size, checkpoint_activations=True))
    expected = results(plain, batch)
    assert_same(results(saving, batch), expected)
    if vision.kind == "resnet":
        assert expected["clip.visual.layer2.0.bn1.num_batches_tracked"] == (1 if micro_batch_size is None else 2)


def bytes_kept(module: CLIPTraining, batch: Batch) -> int:
    """Of all tensors that the forward pass leaves for the backward one, parameters aside."""
    storages: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = module.features(batch)
    assert all(each.requires_grad for each in features)
    return sum(storages.values())


@pytest.mark.parametrize("vision", [VIT, RESNET, TIMM], ids=lambda vision: vision.kind)
def test_checkpointed_activations_are_not_kept(vision):
    batch = random_batch(8, vision.image_size)
    plain, saving = training(vision), training(vision, checkpoint_activations=True)
    kept = bytes_kept(plain, batch)
    assert bytes_kept(saving, batch) < kept / 2
    if vision.kind != "timm":  # its own flag also holds where nothing is trained
        assert bytes_kept(saving.eval(), batch) == bytes_kept(plain.eval(), batch)


@pytest.mark.parametrize(
    "name, size, reason", [("test_resnet", 160, "has batch norms"), ("crossvit_tiny_240", 240, "timm can't do that")]
)
def test_timm_models_whose_activations_can_not_be_checkpointed_exactly_are_refused(name, size, reason):
    vision = VisionConfig(kind="timm", image_size=size, timm_model=name)
    with pytest.raises(ValueError, match=rf"model\.checkpoint_activations: .*{reason}.*model\.micro_batch_size"):
        CLIPTraining(tiny_config(vision=vision), checkpoint_activations=True)


# ---------------------------------------------------------------------------------------------------------------------
# Patch dropout

PATCHES = dataclasses.replace(VIT, image_size=32)  # 16 of them


def test_a_random_share_of_the_patches_is_left_out_and_the_class_token_never():
    torch.manual_seed(0)
    x = torch.arange(17.0).repeat(4000, 1)[..., None]  # token n is the number n
    kept = drop_patches(x, 0.25)[..., 0]
    assert kept.shape == (4000, 1 + 12)
    assert (kept[:, 0] == 0).all()
    patches = kept[:, 1:].sort(dim=1).values
    assert (patches.diff(dim=1) > 0).all()  # none twice
    assert patches.min() == 1
    assert patches.max() == 16
    times = patches.long().flatten().bincount(minlength=17)[1:]
    assert (times - 3000).abs().max() < 6 * 27.4  # standard deviation of 4000 draws of 3/4
    assert drop_patches(x, 0.999).shape[1] == 2  # one patch at least


@pytest.mark.parametrize("share, left", [(0.0, 16), (0.5, 8), (0.75, 4)])
def test_training_sees_the_kept_patches_alone_and_inference_all(share, left):
    module = training(PATCHES, patch_dropout=share)
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64, requires_grad=True)

    def patches_seen() -> list[int]:
        (gradient,) = torch.autograd.grad(module.clip.visual(images).square().sum(), images)
        is_seen = F.max_pool2d(gradient.abs().sum(dim=1), 8) > 0  # (B, 4, 4)
        return is_seen.sum(dim=(1, 2)).tolist()

    assert patches_seen() == [left] * 6
    module.eval()
    assert patches_seen() == [16] * 6
    assert torch.equal(module.clip.visual(images), training(PATCHES).eval().clip.visual(images))
    assert module.train().clip.visual(images, all_tokens=True).shape == (6, 17, 16)


def test_a_hook_in_the_tower_does_not_turn_patch_dropout_off():
    module, seen = training(PATCHES, patch_dropout=0.5), []
    module.clip.visual.transformer.resblocks[0].register_forward_hook(lambda *all_: seen.append(all_[-1].shape[1]))
    module.clip.visual(torch.randn(3, 3, 32, 32, dtype=torch.float64))
    module.clip.visual(torch.randn(3, 3, 32, 32, dtype=torch.float64), all_tokens=True)
    assert seen == [1 + 8, 1 + 16]


def test_patch_dropout_is_the_tower_on_the_tokens_that_were_drawn():
    module = training(PATCHES, patch_dropout=0.5)
    visual, images = module.clip.visual, torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(7)
    found = visual(images)
    torch.manual_seed(7)
    order = torch.rand(3, 16).argsort(dim=1)
    patches = visual.conv1(images).flatten(2).mT + visual.positional_embedding[1:]
    for image, kept in enumerate(order[:, :8]):
        tokens = torch.stack([visual.class_embedding + visual.positional_embedding[0], *patches[image][kept]])
        last = visual.transformer(visual.ln_pre(tokens[None]))[:, 0]
        torch.testing.assert_close(found[image], (visual.ln_post(last) @ visual.proj)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_micro_batches_with_patch_dropout_equal_plain_backpropagation_through_the_same_ones(checkpoint_activations):
    options = {"patch_dropout": 0.5, "checkpoint_activations": checkpoint_activations}
    module, batch = training(PATCHES, micro_batch_size=3, **options), random_batch(8, 32)
    found = results(module, batch)
    plain = training(PATCHES, patch_dropout=0.5)
    torch.manual_seed(1)
    splits = zip(batch.images.split(3), batch.tokens.split(3), strict=True)
    parts = [(plain.encode_images(images), plain.encode_texts(tokens)) for images, tokens in splits]
    loss = loss_of(plain, tuple(torch.cat(each) for each in zip(*parts, strict=True)))
    loss.backward()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in plain.named_parameters()}
    assert_same(found, {"loss": loss.detach(), **gradients})


def test_a_model_that_is_trained_with_less_can_be_pickled_and_goes_on_dropping_patches():
    module = CLIPTraining(tiny_config(), patch_dropout=0.5, checkpoint_activations=True)
    images = torch.randn(2, 3, 16, 16)
    found = pickle.loads(pickle.dumps(module.clip.train()))
    features = []
    for model in (module.clip, found):
        torch.manual_seed(0)
        features.append(model.encode_image(images))
    assert torch.equal(*features)
    assert not torch.equal(features[0], module.clip.eval().encode_image(images))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_of_patches_outside_of_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=rf"model\.patch_dropout is {share}; it is a share, 0 to below 1"):
        CLIPTraining(tiny_config(), patch_dropout=share)


@pytest.mark.parametrize("vision", [RESNET, TIMM], ids=lambda vision: vision.kind)
def test_patch_dropout_is_for_vision_transformers(vision):
    with pytest.raises(ValueError, match=rf"patch_dropout is 0.5 and model\.clip\.vision\.kind '{vision.kind}'"):
        CLIPTraining(tiny_config(vision=vision), patch_dropout=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """train: 40 pictures whose captions have 4 to 23 tokens; val: 10."""
    folder = tmp_path_factory.mktemp("pairs")
    for part, count in (("train", 40), ("val", 10)):
        write_pairs(folder / "src" / part, count)
        for number, path in enumerate(sorted((folder / "src" / part).glob("*.txt"))):
            path.write_text(" ".join(["red"] * (1 + number % 20) + [str(number)]) + "\n")
        pack_folder(folder / "src" / part, folder / part)
    return folder


def arguments(pairs: Path, run: Path, *more: str, steps: int = 6) -> list[str]:
    clip = ["embed_dim=16", "vision.image_size=16", "vision.patch_size=4", "text.context_length=24"]
    clip += [f"{tower}.{field}" for tower in ("vision", "text") for field in ("width=16", "layers=2", "head_width=8")]
    return [
        "fit",
        *(f"--model.clip.{setting}" for setting in clip),
        "--model.optimizer.lr=0.01",
        f"--data.train={pairs / 'train'}",
        f"--data.val={pairs / 'val'}",
        "--data.batch_size=4",
        "--data.num_workers=1",
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
        "--trainer.val_check_interval=3",
        f"--trainer.default_root_dir={run}",
        f"--trainer.max_steps={steps}",
        *more,
    ]


def callback(name: str, **init_args: Any) -> str:
    inner = ", ".join(f'"{key}": {value}' for key, value in init_args.items())
    return f'--trainer.callbacks=[{{"class_path": "{__name__}.{name}", "init_args": {{{inner}}}}}]'


def weights_of(run: Path) -> dict[str, Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


class Observer(Callback):
    """Notes what training does; `seen` is of the latest run."""

    seen: dict[str, Any]

    def __init__(self, stop_at: int = 0, notes_products: bool = False) -> None:
        self.stop_at, self.notes_products = stop_at, notes_products
        Observer.seen = {"losses": [], "drawn": [], "lengths": [], "dtypes": {}}

    def on_train_start(self, trainer, module) -> None:
        text = module.clip.text
        text.register_forward_pre_hook(lambda _, inputs: self.seen["lengths"].append(inputs[0].shape[1]))
        if self.notes_products:  # not where blocks are compiled: what leaves a trace elsewhere ends a graph
            note = lambda *all_: self.seen["dtypes"].update(matrix_product=all_[-1].dtype)  # noqa: E731
            text.transformer.resblocks[0].mlp.c_fc.register_forward_hook(note)

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.stop_at - 1:
            os.kill(os.getpid(), signal.SIGINT)

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        self.seen["drawn"].append(torch.initial_seed())

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.seen["dtypes"]["gradients"] = {parameter.grad.dtype for parameter in module.parameters()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.seen["losses"].append(float(outputs["loss"]))
        states = trainer.optimizers[0].state.values()
        self.seen["dtypes"] |= {
            "loss": outputs["loss"].dtype,
            "parameters": {parameter.dtype for parameter in module.parameters()},
            "states": {tensor.dtype for state in states for tensor in state.values() if tensor.ndim},
        }


@pytest.mark.long
def test_a_resumed_run_draws_the_patches_that_it_would_have_drawn(pairs, tmp_path):
    options = ["--model.patch_dropout=0.5", "--seed_everything=5"]
    trainer.main(arguments(pairs, tmp_path / "straight", *options, callback("Observer")))
    drawn = Observer.seen["drawn"]
    assert len(set(drawn)) == 6  # each step draws anew
    broken = tmp_path / "broken"
    with pytest.raises(SystemExit):
        trainer.main(arguments(pairs, broken, *options, callback("Observer", stop_at=2)))
    trainer.main(arguments(pairs, broken, *options, callback("Observer"), "--ckpt_path=last"))
    assert Observer.seen["drawn"] == drawn[2:]
    expected, found = weights_of(tmp_path / "straight"), weights_of(broken)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    trainer.main(arguments(pairs, tmp_path / "all patches", "--seed_everything=5"))
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in weights_of(tmp_path / "all patches").items())


# ---------------------------------------------------------------------------------------------------------------------
# Compiled towers


class Graphs:
    """A compiler that compiles nothing and notes what it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    counter = Graphs()
    with torch.compiler.set_stance("default", force_backend=counter):
        yield counter
    torch._dynamo.reset()


SAVING = ["--model.checkpoint_activations=true", "--model.micro_batch_size=3"]


@pytest.mark.long
@pytest.mark.parametrize("more", [[], pytest.param(SAVING, marks=pytest.mark.long)])
def test_a_compiled_run_has_few_graphs_and_the_same_weights_under_the_same_names(pairs, tmp_path, graphs, more):
    trainer.main(arguments(pairs, tmp_path / "plain", callback("Observer"), *more))
    losses = Observer.seen["losses"]
    assert graphs.count == 0
    options = ["--model.compile=true", callback("Observer"), *more]
    trainer.main(arguments(pairs, tmp_path / "compiled", *options))
    assert set(Observer.seen["lengths"]) <= {8, 16, 24}
    assert len(set(Observer.seen["lengths"])) > 1
    # One of the image tower and, at most, one of the text tower for each length; and all of that once more where the
    # last micro-batch is smaller. None is of the validation, whose batches are of 4 and 2.
    assert 2 <= graphs.count <= (2 if more else 1) * (1 + 3)
    plain, compiled = weights_of(tmp_path / "plain"), weights_of(tmp_path / "compiled")
    assert compiled.keys() == plain.keys()
    np.testing.assert_allclose(Observer.seen["losses"], losses, rtol=1e-4)  # longer rows of zeros change bits at most
    model, _ = miniclip.load(tmp_path / "compiled/best", device="cpu")
    assert model.encode_text(miniclip.tokenize("red", context_length=24)).shape == (1, 16)


@pytest.mark.long
@pytest.mark.parametrize("vision", [VIT, pytest.param(RESNET, marks=pytest.mark.long)], ids=["vit", "resnet"])
def test_compiled_towers_compute_the_same_whatever_else_is_on(graphs, vision):
    vision = dataclasses.replace(vision, layers=1, blocks=(1, 1, 1, 1))
    batch = random_batch(5, vision.image_size)
    options = {"checkpoint_activations": True, "micro_batch_size": 3}
    module = training(vision, compile=True, **options)
    assert_same(results(module, batch), results(training(vision, **options), batch))
    count = graphs.count
    assert count > 0
    results(module, batch)
    assert graphs.count == count  # nothing is compiled again


@pytest.mark.sample(1)
@pytest.mark.parametrize("tower", ["vit", "resnet", "text"])
@pytest.mark.parametrize(
    "is_mixed", [False, pytest.param(True, marks=pytest.mark.long)], ids=["float64", "bf16 autocast"]
)
def test_a_tower_is_one_graph_without_a_break_and_computes_the_same(tower, is_mixed):
    torch._dynamo.reset()
    vision = RESNET if tower == "resnet" else VIT
    model, batch = training(vision).clip, random_batch(4, vision.image_size)
    model = model.float() if is_mixed else model
    part, inputs = (
        (model.text, batch.tokens) if tower == "text" else (model.visual, (batch.images / 255).to(model.dtype))
    )
    found = []
    for run in (part, torch.compile(part, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            features = run(inputs)
        features.double().square().sum().backward()
        found.append([features.detach(), *(p.grad.clone() for p in part.parameters())])
    for plain, compiled in zip(*found, strict=True):
        assert (compiled - plain).norm() <= (2e-2 if is_mixed else 1e-9) * plain.norm().clamp(min=1e-2)


@pytest.mark.long
@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_torchs_own_compiler_trains_to_the_same_losses(pairs, tmp_path, vision):
    torch._dynamo.reset()
    losses = {}
    for is_compiled in ("false", "true"):
        more = [f"--model.compile={is_compiled}", f"--model.clip.vision.kind={vision}", "--model.optimizer.lr=0.001"]
        more += ["--model.clip.vision.layers=1", "--model.clip.text.layers=1"]
        if vision == "resnet":
            more += ["--model.clip.vision.image_size=32", "--model.clip.vision.blocks=[1, 1, 1, 1]"]
            # In float64, as batch norm over 4 pairs makes 1e-4 of the last bits of float32 within 14 steps.
            more += ["--model.clip.text.context_length=8", "--trainer.precision=64-true"]
        trainer.main(arguments(pairs, tmp_path / is_compiled, *more, callback("Observer"), steps=20))
        losses[is_compiled] = Observer.seen["losses"]
    assert len(losses["true"]) == 20
    np.testing.assert_allclose(losses["true"], losses["false"], atol=1e-4)
    assert losses["true"] != losses["false"]  # or nothing was compiled


def sample(length: int) -> Sample:
    return Sample(torch.zeros(3, 2, 2, dtype=torch.uint8), [[1] * (length - 1) + [END_OF_TEXT]], "key")


@pytest.mark.parametrize(
    "longest, multiple, columns", [(5, 1, 5), (5, 8, 8), (8, 8, 8), (9, 8, 16), (17, 8, 20), (20, 8, 20)]
)
def test_batches_are_as_long_as_a_multiple_or_the_context(longest, multiple, columns):
    tokens = collate([sample(3), sample(longest)], multiple, context_length=20).tokens
    assert tokens.shape == (2, columns)
    assert tokens[1].tolist() == [1] * (longest - 1) + [END_OF_TEXT] + [0] * (columns - longest)
    assert trim_text(tokens, END_OF_TEXT, multiple).shape == (2, columns)
    assert trim_text(tokens, END_OF_TEXT).shape == (2, longest)


def test_a_multiple_below_one_is_refused():
    with pytest.raises(ValueError, match=r"data\.text_length_multiple is 0; it must be at least 1"):
        PairDataModule("shards", text_length_multiple=0)


# ---------------------------------------------------------------------------------------------------------------------
# The memory's layout


def test_convolutions_work_on_channels_side_by_side_and_weights_are_kept_in_order(pairs, tmp_path):
    model = tiny_clip(vision=RESNET)
    layouts = set()
    for part in model.visual.modules():
        if isinstance(part, Bottleneck):
            part.register_forward_hook(
                lambda *all_: layouts.add(all_[-1].is_contiguous(memory_format=torch.channels_last))
            )
    images = torch.randn(2, 3, 32, 32)
    features = model.encode_image(images)
    assert layouts == {True}
    assert torch.equal(model.encode_image(images.contiguous(memory_format=torch.channels_last)), features)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    more = ["--model.clip.vision.kind=resnet", "--model.clip.vision.image_size=32", "--model.clip.vision.width=8"]
    trainer.main(arguments(pairs, tmp_path / "run", *more, "--model.clip.vision.blocks=[1, 1, 1, 1]", steps=2))
    assert all(tensor.is_contiguous() for tensor in weights_of(tmp_path / "run").values())


# ---------------------------------------------------------------------------------------------------------------------
# Precision


def dtypes_of_a_run(pairs: Path, run: Path, precision: str, *more: str) -> dict[str, Any]:
    options = [
        f"--trainer.precision={precision}",
        "--model.optimizer.kind=muon",
        callback("Observer", notes_products="true"),
        *more,
    ]
    trainer.main(arguments(pairs, run, *options, steps=3))
    return Observer.seen["dtypes"]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "precision, matrix_product, rest",
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_weights_gradients_optimizer_and_loss_keep_their_precision(pairs, tmp_path, precision, matrix_product, rest):
    found = dtypes_of_a_run(pairs, tmp_path / "run", precision)
    assert found == {
        "matrix_product": matrix_product,
        "loss": rest,
        "gradients": {rest},
        "parameters": {rest},
        "states": {rest},
    }


@pytest.mark.long
def test_float16_is_bfloat16_on_a_cpu_and_says_so(pairs, tmp_path):
    with pytest.warns(UserWarning, match="fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        assert dtypes_of_a_run(pairs, tmp_path / "run", "16-mixed")["matrix_product"] == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_masters_are_float32_on_a_gpu(pairs, tmp_path, precision):
    found = dtypes_of_a_run(pairs, tmp_path / "run", precision, "--trainer.accelerator=gpu", "--trainer.devices=1")
    assert found["matrix_product"] == {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}[precision]
    assert found["loss"] == torch.float32
    assert found["gradients"] == found["parameters"] == found["states"] == {torch.float32}


@pytest.mark.parametrize("precision, instead", [("bf16-true", "bf16-mixed"), ("16-true", "16-mixed")])
def test_half_precision_without_masters_is_refused(pairs, tmp_path, capsys, precision, instead):
    with pytest.raises(SystemExit):
        trainer.main(arguments(pairs, tmp_path / "run", f"--trainer.precision={precision}"))
    said = capsys.readouterr().err
    assert f"trainer.precision is {precision}" in said
    assert instead in said
    assert not (tmp_path / "run").exists()


def test_features_are_of_unit_length_in_float32_under_autocast():
    model, images = tiny_clip(), torch.randn(5, 3, 16, 16)
    tokens = miniclip.tokenize(["a", "b c"], context_length=16)
    with torch.autocast("cpu", torch.bfloat16):
        for encode, inputs in ((model.encode_image, images), (model.encode_text, tokens)):
            features, raw = encode(inputs, normalize=True), encode(inputs)
            assert raw.dtype == torch.bfloat16
            assert features.dtype == torch.float32
            torch.testing.assert_close(features.double(), F.normalize(raw.double(), dim=-1), rtol=1e-6, atol=1e-7)
    half = tiny_clip().half()
    assert half.encode_image(images, normalize=True).dtype == torch.float16


def stepped(gradient_scale: float | None, spoilt: bool = False) -> tuple[dict[str, Tensor], torch.amp.GradScaler]:
    """A model after one Muon step; through a scaler where the loss was multiplied."""
    model = tiny_clip().train()
    optimizer = make_optimizer(model, OptimizerConfig(kind="muon"))
    optimizer.load_state_dict(optimizer.state_dict())  # as a resumed run does
    scaler = torch.amp.GradScaler("cpu", init_scale=gradient_scale or 1.0, enabled=gradient_scale is not None)
    images, tokens = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    tokens = torch.stack([tokens + 1, torch.full((4,), END_OF_TEXT)], dim=1)
    features = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    scaler.scale(miniclip.clip_loss(*features, model.logit_scale.exp())).backward()
    if spoilt:
        model.text.transformer.resblocks[1].mlp.c_fc.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, scaler


def test_a_scaled_loss_gives_the_step_of_the_plain_one_and_an_overflow_gives_none():
    before = tiny_clip().state_dict()
    plain, _ = stepped(None)
    scaled, _ = stepped(2.0**10)  # of a power of two no bit is lost
    assert any(not torch.equal(plain[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(scaled[name], tensor) for name, tensor in plain.items())
    untouched, scaler = stepped(2.0**10, spoilt=True)
    assert all(torch.equal(untouched[name], tensor) for name, tensor in before.items())
    assert scaler.get_scale() == 2.0**9


# ---------------------------------------------------------------------------------------------------------------------
# Fused steps


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_step_is_fused_where_torch_can_and_works_where_it_can_not(kind):
    for device, is_fused in (("cpu", True), ("meta", None)):
        model = tiny_clip().to(device)
        optimizer = make_optimizer(model, OptimizerConfig(kind=kind))
        assert {group["fused"] for group in optimizer.param_groups} == {is_fused}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    fused = torch.optim.AdamW(model.parameters(), fused=True)
    with pytest.raises(RuntimeError, match="fused"):  # what would have become of it
        fused.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_step_is_fused_on_a_gpu():
    optimizer = make_optimizer(tiny_clip().cuda(), OptimizerConfig())
    assert all(group["fused"] for group in optimizer.param_groups)
