"""Cases of trained models: images, texts, classifiers, tokenizers, loading and starting."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import engines
import numpy as np
import open_clip
import peers
import samples
import torch
import transformers
from contenders import LIMIT, OURS, OURS_BF16, PEERS
from harness import Case, Job, process
from machine import vendor_name
from open_clip.openai import load_openai_model
from open_clip.tokenizer import SimpleTokenizer
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import miniclip
from miniclip import tokenizer
from miniclip.config import CLIPConfig
from miniclip.evaluation import prompts
from miniclip.evaluation.datasets.open import open_images
from miniclip.evaluation.features import encode_images
from miniclip.fast.packed_texts import trim_text
from miniclip.images import open_image
from miniclip.weights.load import preprocess_for

try:
    import instant_clip_tokenizer
except ImportError:  # there are no wheels for the newest Pythons
    instant_clip_tokenizer = None

MODELS = ("small", "ViT-B/32", "ViT-B/16", "RN50")
_PROGRAM = "import sys; sys.argv[0] = 'miniclip'; from miniclip.commands.main import main; main()"


def cases(size: str, folder: Path) -> list[Case]:
    """size: "full", "quick" or "tiny". folder: where what they read is made when first needed."""
    return [
        *(images(name, batch, size, folder) for name in MODELS for batch in (1, 32)),
        *texts(size, folder),
        classifier(size, folder),
        *tokenizers(size, folder),
        *loading(size, folder),
        *starting(size),
        *(evaluation(name, size, folder) for name in ("small", "ViT-B/32")),
    ]


def _short(name: str) -> str:
    return name.removeprefix("ViT-").replace("/", "").lower()


def _contenders(config: CLIPConfig, make: Callable[[str], Job]) -> dict[str, Callable[[], Job]]:
    """The libraries that have the architecture."""
    return {name: partial(make, name) for name in (OURS, OURS_BF16, *PEERS) if peers.takes_part(name, config)}


def _engines(
    tower: str, config: CLIPConfig, folder: Path, inputs: Callable[[], Tensor]
) -> Mapping[str, Callable[[], Job]]:
    """Inference engines in their precisions. inputs: returns images, or ids padded to the longest text."""

    def make(name: str) -> Job:
        run, array = engines.open_engine(name, tower, config, folder), inputs().numpy()
        return Job(lambda: torch.from_numpy(run(array)))

    return {name: partial(make, name) for name in engines.ENGINES}


def images(name: str, batch: int, size: str, folder: Path) -> Case:
    config = peers.architecture(name, size)
    count = {"full": batch, "quick": min(batch, 4), "tiny": min(batch, 2)}[size]
    side = config.vision.image_size

    def draw() -> Tensor:
        return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))

    def make(contender: str) -> Job:
        model, pixels = peers.for_inference(contender, config, folder), draw()
        if contender == "transformers":
            return Job(torch.inference_mode()(lambda: model.get_image_features(pixel_values=pixels).pooler_output))
        return Job(torch.inference_mode()(lambda: model.encode_image(pixels)))

    contenders, targets = _contenders(config, make), dict[str, float]()
    if name in ("ViT-B/32", "RN50"):
        targets["best"] = 1.05 if batch > 1 else 1.1
    if name == "ViT-B/32":
        contenders |= _engines("image", config, folder, draw)
        targets |= {"OpenVINO": 1.0, "OpenVINO bf16": 0.9} | ({"best": 1.9} if vendor_name() == "AMD" else {})
    return Case(f"image-{_short(name)}-{batch}", f"{name} image, batch {count}", contenders, targets)


def texts(size: str, folder: Path) -> list[Case]:
    config = peers.architecture("ViT-B/32", size)
    count = {"full": 64, "quick": 16, "tiny": 4}[size]

    def padded(kind: Callable[[int], list[str]]) -> Tensor:
        return trim_text(miniclip.tokenize(kind(count)), tokenizer.END_OF_TEXT).long()

    def make(kind: Callable[[int], list[str]], contender: str) -> Job:
        model = peers.for_inference(contender, config, folder)
        if contender == "transformers":  # its own tokenizer pads to the longest
            ids = padded(kind)
            return Job(torch.inference_mode()(lambda: model.get_text_features(input_ids=ids).pooler_output))
        tokens = miniclip.tokenize(kind(count))
        return Job(torch.inference_mode()(lambda: model.encode_text(tokens)))

    engines_too = {"OpenVINO": 1.5, "ONNX Runtime": 1.5}
    kinds = (
        ("equal", "prompts of 13 tokens each", samples.prompts_of_length, {"open_clip": 7.0, "transformers": 1.05}),
        (
            "prompts",
            "shuffled prompts of 6 to 18 tokens",
            samples.template_prompts,
            {"transformers": 1.3, **engines_too},
        ),
        ("captions", "captions", samples.captions, {}),
    )
    return [
        Case(
            f"text-{name}",
            f"ViT-B/32 text, {count} {what}",
            _contenders(config, partial(make, kind)) | _engines("text", config, folder, partial(padded, kind)),
            targets,
            note=f"{_different_beginnings(kind(count)):.0%} of the tokens are left where shared beginnings count once",
        )
        for name, what, kind, targets in kinds
    ]


def _different_beginnings(lines: list[str]) -> float:
    ids = [tokenizer.encode_for_model(line) for line in lines]
    return len({tuple(row[:n]) for row in ids for n in range(1, 1 + len(row))}) / sum(map(len, ids))


def classifier(size: str, folder: Path) -> Case:
    config = peers.architecture("ViT-B/32", size)
    count = {"full": 20, "quick": 2, "tiny": 2}[size]  # of 20, open_clip's takes a minute
    classnames = prompts.imagenet_classnames()[:count]
    templates = prompts.template_set("imagenet80")[: 4 if size == "tiny" else 80]

    def ours() -> Job:
        model = peers.for_inference(OURS, config, folder)
        return Job(lambda: miniclip.zero_shot_classifier(model, classnames, templates))

    def theirs() -> Job:
        model = peers.for_inference("open_clip", config, folder)
        with_braces = [partial(prompts.fill, template) for template in templates]
        return Job(partial(build_zero_shot_classifier, model, SimpleTokenizer(), classnames, with_braces))

    return Case(
        "classifier",
        f"ViT-B/32 classifier, {count} classes of ImageNet × {len(templates)} templates",
        {OURS: ours, "open_clip": theirs},
        targets={"open_clip": 7.0},
        is_slow=True,
    )


def tokenizers(size: str, folder: Path) -> list[Case]:
    """Cold: as after the vocabulary was read. The Rust tokenizers repair no text, so some ids of theirs differ."""
    count = {"full": 5000, "quick": 1000, "tiny": 20}[size]
    kinds = {"captions": samples.captions, "ASCII": samples.web_texts, "Unicode": samples.unicode_texts}
    found = []
    for kind, draw in kinds.items():
        for is_cold in (False, True):

            def ours(draw: Callable[[int], list[str]] = draw, is_cold: bool = is_cold) -> Job:
                lines = draw(count)
                tokenizer.tokenize("The vocabulary is read.")
                return Job(lambda: miniclip.tokenize(lines), prepare=tokenizer._words.clear if is_cold else None)

            def theirs(draw: Callable[[int], list[str]] = draw, is_cold: bool = is_cold) -> Job:
                lines, their_tokenizer = draw(count), SimpleTokenizer()
                known = dict(their_tokenizer.cache)

                def forget() -> None:
                    their_tokenizer.cache = dict(known)

                return Job(lambda: their_tokenizer(lines), prepare=forget if is_cold else None)

            def by_hugging_face(draw: Callable[[int], list[str]] = draw, is_cold: bool = is_cold) -> Job:
                lines, fast = draw(count), peers.transformers_tokenizer()
                return Job(
                    lambda: _ids(fast.encode_batch_fast(lines)), prepare=fast.model._clear_cache if is_cold else None
                )

            def by_instant(draw: Callable[[int], list[str]] = draw) -> Job:
                lines, rust = draw(count), instant_clip_tokenizer.Tokenizer()  # it keeps no words
                return Job(lambda: torch.from_numpy(rust.tokenize_batch(lines, context_length=77)))

            def shortest(draw: Callable[[int], list[str]] = draw) -> Job:
                lines = draw(count)
                return Job(lambda: [hash(word) for line in lines for word in line.lower().split()] and None)

            state = "cold" if is_cold else "warm"
            rust = {"tokenizers": by_hugging_face} | (
                {"instant_clip_tokenizer": by_instant} if instant_clip_tokenizer else {}
            )
            targets = {"open_clip": 3.0 if is_cold else 8.0, "instant_clip_tokenizer": 0.3 if is_cold else 0.9}
            found.append(
                Case(
                    f"tokenizer-{kind.lower()}-{state}",
                    f"tokenizer, {count:,} texts, {kind}, {state} cache",
                    {OURS: ours, "open_clip": theirs, **rust, LIMIT: shortest},
                    targets if kind == "captions" else {},
                    may_differ=() if kind == "captions" else tuple(rust),
                    note="the limit is lower-casing, splitting and hashing the words in Python"
                    if kind == "captions" and not is_cold
                    else "",
                )
            )
    return found


def _ids(encodings: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.array([encoding.ids for encoding in encodings]))


def loading(size: str, folder: Path) -> list[Case]:
    """Loads ViT-B/32 in float32 from a file that the disk's cache holds."""
    config = peers.architecture("ViT-B/32", size)
    side = config.vision.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    def features(model: Any) -> Tensor:
        with torch.inference_mode():
            if isinstance(model, transformers.CLIPModel):
                return model.get_image_features(pixel_values=pixels).pooler_output
            return model.eval().encode_image(pixels)

    def job(load: Callable[[], Any]) -> Job:
        loaded: list[Any] = []

        def run() -> None:
            loaded.append(load())

        return Job(run, result=lambda: features(loaded[-1]), prepare=loaded.clear)

    def ours() -> Job:
        native = folder / "native"
        if not native.is_dir():
            miniclip.save(peers.for_inference(OURS, config, folder), native)
        return job(lambda: miniclip.load(str(native), device="cpu")[0])

    def theirs() -> Job:
        path, name = peers.weights(config, folder), peers.model_name(config, folder)
        return job(lambda: open_clip.create_model(name, pretrained=str(path)))

    def with_transformers() -> Job:
        saved = folder / "transformers"
        if not saved.is_dir():
            peers.for_inference("transformers", config, folder).save_pretrained(saved)
        return job(lambda: transformers.CLIPModel.from_pretrained(saved))

    def archive() -> Path:
        path = folder / "archive.pt"
        if not path.is_file():
            traced = {"encode_image": (pixels,), "encode_text": (torch.zeros(1, 77, dtype=torch.int),)}
            model = peers.openclips(config, folder).eval()
            model.attn_mask = model.__dict__["_buffers"].pop("attn_mask")  # OpenAI's archives hold none
            sizes = (config.vision.image_size, config.text.context_length, config.text.vocab_size)
            for name, size in zip(("input_resolution", "context_length", "vocab_size"), sizes, strict=True):
                vars(model).pop(name, None)
                model.register_buffer(name, torch.tensor(size))  # by which they are known
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch would rather have another format
                model = torch.jit.trace_module(model, traced, check_trace=False)
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.half()
            model.save(str(path))
        return path

    def ours_of_archive() -> Job:
        path = str(archive())
        return job(lambda: miniclip.load(path, device="cpu")[0])

    def theirs_of_archive() -> Job:
        path = str(archive())
        return job(lambda: load_openai_model(path, precision="fp32", device="cpu"))

    return [
        Case(
            "load",
            "load ViT-B/32, local safetensors",
            {OURS: ours, "open_clip": theirs, "transformers": with_transformers},
            targets={"open_clip": 2.0},
            measures_memory=size == "full",
            note="miniclip maps the file, so its time and memory grow with what is read of the weights",
        ),
        Case(
            "load-archive",
            "load ViT-B/32, OpenAI's archive",
            {OURS: ours_of_archive, "open_clip": theirs_of_archive},
            measures_memory=size == "full",
        ),
    ]


def starting(size: str) -> list[Case]:
    """Processes that start and end."""

    def start(*command: str) -> Job:
        def run() -> None:
            process(sys.executable, *command)

        return Job(run)

    def case(name: str, title: str, commands: Mapping[str, Sequence[str]]) -> Case:
        contenders = {who: partial(start, *command) for who, command in commands.items()}
        return Case(name, title, contenders, is_slow=True)

    ours = "import miniclip; miniclip.load, miniclip.tokenize, miniclip.zero_shot_classifier"
    theirs = "import open_clip"
    found = [
        case(
            "import",
            "import; the limit is torch's",
            {
                OURS: ("-c", ours),
                "open_clip": ("-c", theirs),
                "transformers": ("-c", "from transformers import CLIPModel, CLIPProcessor"),
                LIMIT: ("-c", "import torch"),
            },
        ),
        case(
            "help",
            "`miniclip --help`, beside `import open_clip`",
            {OURS: ("-c", _PROGRAM, "--help"), "open_clip": ("-c", theirs), LIMIT: ("-c", "pass")},
        ),
        case(
            "help-eval",
            "`miniclip eval --help`, beside `import open_clip`",
            {OURS: ("-c", _PROGRAM, "eval", "--help"), "open_clip": ("-c", theirs), LIMIT: ("-c", "pass")},
        ),
    ]
    return found[:2] if size == "quick" else found


def evaluation(name: str, size: str, folder: Path) -> Case:
    """Features of all JPEGs of a folder, which the disk's cache holds: most of what an evaluation does.

    The limit is two processes that decode and encode one half each on a core of their own, and never wait for each
    other: the whole processor's time.
    """
    config = peers.architecture(name, size)
    is_small = name == "small"
    count = {"full": 10_000 if is_small else 1000, "quick": 128 if is_small else 64, "tiny": 6}[size]
    side, cores = 512, 2

    def ours() -> Job:
        model = peers.for_inference(OURS, config, folder)
        data = open_images(samples.photographs(folder, count, side))
        preprocess = preprocess_for(config)
        return Job(lambda: encode_images(model.encode_image, preprocess, data, num_workers=cores).features)

    def theirs() -> Job:
        model = peers.for_inference("open_clip", config, folder)
        mean, std = config.vision.mean, config.vision.std
        preprocess = open_clip.image_transform(config.vision.image_size, is_train=False, mean=mean, std=std)
        data = ImageFolder(samples.photographs(folder, count, side).parent, preprocess)

        @torch.inference_mode()
        def run() -> Tensor:
            return torch.cat([model.encode_image(images) for images, _ in DataLoader(data, 64, num_workers=cores)])

        return Job(run)

    def apart() -> Job:
        paths = sorted(samples.photographs(folder, count, side).iterdir())
        model, preprocess = peers.for_inference(OURS, config, folder), preprocess_for(config)
        halves = [paths[number::cores] for number in range(cores)]

        def run() -> None:
            workers = [multiprocessing.Process(target=_encode_alone, args=(model, preprocess, half)) for half in halves]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
                assert not worker.exitcode

        return Job(run)

    return Case(
        f"evaluate-{_short(name)}",
        f"{name} features of {count:,} JPEGs of {side}² in a folder, {cores} workers",
        {OURS: ours, "open_clip": theirs, LIMIT: apart},
        is_slow=True,
        note=f"the limit is {cores} processes that decode and encode their half without waiting for each other",
    )


@torch.inference_mode()
def _encode_alone(model: Any, preprocess: Callable[[Any], Tensor], paths: Sequence[Path]) -> None:
    torch.set_num_threads(1)
    for start in range(0, len(paths), 64):
        batch = [preprocess(open_image(path.read_bytes(), str(path))) for path in paths[start : start + 64]]
        model.encode_image(torch.stack(batch))
