"""Runs the model in this folder, without miniclip:  python run.py PICTURE… --labels "cat,dog"

Needs numpy, pillow, tokenizers, and onnxruntime (for .onnx), openvino (for .xml) or torch (for .pt2). As a module:
`Clip(FOLDER).classify(pictures, ["cat", "dog"])`. Pictures are read as they are stored:
EXIF turns none. N pictures or texts, C classes, E embedding, R pixels.
"""

import argparse
import ctypes
import html
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ASCII = re.compile(r"[\t\n\r -%'-~]*")  # text that cleaning only lower-cases


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Clip:
    """The two towers of an export, with what belongs in front of them."""

    def __init__(self, folder: str | Path = Path(__file__).parent, threads: int = 0) -> None:
        self.folder, self.threads = Path(folder), threads
        self.facts = json.loads((self.folder / "export.json").read_text(encoding="utf-8"))
        self.towers: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self.tokenizer: Any = None

    def encode_images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(N, E), of unit length."""
        return unit(self.run("image", np.stack([self.pixels(each) for each in pictures])))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, E), of unit length."""
        return unit(self.run("text", self.tokenize(texts)))

    def class_features(self, classnames: Sequence[str], templates: Any) -> np.ndarray:
        """(C, E): the mean of each class's prompts; templates are for every class, or a list for each."""
        rows = []
        for name in classnames:
            forms = templates[name] if isinstance(templates, dict) else templates
            texts = [t if isinstance(templates, dict) else t.replace("{c}", "{}").replace("{}", name) for t in forms]
            rows.append(unit(self.encode_texts(texts).mean(axis=0)))
        return np.stack(rows)

    def classify(
        self, pictures: Sequence[Image.Image], classnames: Sequence[str] = (), templates: Any = ()
    ) -> list[tuple[str, float, float]]:
        """For each picture the best class, its probability among the classes, and its cosine; by default the export's
        own classes. The class is "" where the export has a threshold and the cosine does not reach it."""
        classes = self.class_features(classnames or self.facts["classnames"], templates or self.facts["templates"])
        cosines = self.encode_images(pictures) @ classes.T  # (N, C)
        odds = np.exp(self.facts["logit_scale"] * (cosines - cosines.max(axis=1, keepdims=True)))
        answers = []
        for row, best in enumerate(cosines.argmax(axis=1).tolist()):
            cosine, names = float(cosines[row, best]), classnames or self.facts["classnames"]
            is_none = self.facts["threshold"] is not None and cosine < self.facts["threshold"]
            answers.append(("" if is_none else names[best], float(odds[row, best] / odds[row].sum()), cosine))
        return answers

    def run(self, tower: str, x: np.ndarray) -> np.ndarray:
        if tower not in self.towers:
            if tower not in self.facts["files"]:
                raise ValueError(f"this model has no {tower} tower")
            self.towers[tower] = open_tower(self.folder / self.facts["files"][tower], self.threads)
        return self.towers[tower](x)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """(3, R, R) float32, normalised."""
        p = self.facts["pixels"]
        if image.mode.startswith("I"):  # 16 bits
            values = np.asarray(image).astype(np.int64)
            is_wide = image.mode.startswith("I;16") or values.max(initial=0) > 255
            image = Image.fromarray((values >> 8 if is_wide else values).clip(0, 255).astype(np.uint8))
        if p["style"] == "hf":
            image = on_white(image)
        W, H = image.size
        short, long, side = min(W, H), max(W, H), p["resize_size"]
        if p["resize"] == "shortest" and side * side * long > p["most_pixels"] * short:  # a long strip: its centre
            cut = (long - 8 * short) // 2
            image = image.crop((cut, 0, W - cut, H) if W > H else (0, cut, W, H - cut))
            W, H = image.size
            long = max(W, H)
        size = {"none": (W, H), "squash": (side, side)}.get(p["resize"])
        size = size or ((side, int(side * long / short)) if W <= H else (int(side * long / short), side))
        if image.size != size:
            image = image.resize(size, Image.Resampling[p["interpolation"].upper()])
        R, (W, H) = p["size"], image.size
        left, top = ((W - R) // 2, (H - R) // 2) if p["style"] == "hf" else (round((W - R) / 2), round((H - R) / 2))
        x = np.asarray(image.crop((left, top, left + R, top + R)).convert("RGB"), dtype=np.float32) / np.float32(255)
        return ((x - np.float32(p["mean"])) / np.float32(p["std"])).transpose(2, 0, 1)

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids, (N, L) int64, cut to the context length; L is that of the longest."""
        if not self.facts["text"]:
            raise ValueError("this model reads other token ids than CLIP's, so its export has no tokenizer")
        if self.tokenizer is None:
            from tokenizers import Tokenizer, normalizers

            self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            self.tokenizer.normalizer = normalizers.Sequence([])  # `clean` does all of it, and exactly
            self.cleaning = Cleaning(self.folder / "cleaning.json")
        rows = [self.tokenizer.encode(self.cleaning.clean(text)).ids for text in texts]
        ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        for out, row in zip(ids, rows, strict=True):
            out[: len(row)] = row
        return ids


def open_tower(path: Path, threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """threads: of the processor; 0 lets the library choose."""
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # On a GPU: onnxruntime-gpu, and "CUDAExecutionProvider" before the other.
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]
    if path.suffix == ".xml":
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        with own_signal_stack():
            model = openvino.Core().compile_model(path, "CPU", settings)
        return lambda x: model(x)[0]
    import torch

    module = torch.export.load(path).module()
    return lambda x: module(torch.from_numpy(x)).detach().numpy()


@contextmanager
def own_signal_stack() -> Iterator[None]:
    """Puts the stack of signal handlers back. OpenVINO gives them one of its own and frees it with its last model, so
    that Ctrl-C would crash Python (see sigaltstack(2) for the structure: address, flags, size)."""
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), (ctypes.c_size_t * 3)()
    library.sigaltstack(None, before)
    try:
        yield
    finally:
        library.sigaltstack(before, None)


def on_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


class Cleaning:
    """Text as the model was trained to read it: what ftfy and HTML's rules make of it, lower-cased."""

    def __init__(self, path: Path) -> None:
        tables = json.loads(path.read_text(encoding="utf-8"))
        self.entities, self.mojibake = tables["entities"], re.compile(tables["mojibake"])
        self.characters = {ord(old): new for old, new in tables["characters"].items()}
        self.controls = dict.fromkeys(map(ord, tables["controls"]))
        self.special = tables["special"]

    def clean(self, text: str) -> str:
        """Raises a ValueError for text that was decoded wrongly: miniclip repairs it with ftfy, and this does not."""
        if not ASCII.fullmatch(text):
            is_plain, lines = True, []
            for line in text.split("\n"):
                is_plain = is_plain and "<" not in line  # ftfy unescapes up to the first line that may be HTML
                lines.append(self._line(line, is_plain))
            text = html.unescape(html.unescape("\n".join(lines)))
        text = " ".join(text.split()).lower()
        if any(name in text for name in self.special):
            raise ValueError(f"{text!r} holds the name of a special token; write it in other words")
        return text

    def _line(self, line: str, is_plain: bool) -> str:
        before = None
        while line != before:
            before = line
            if is_plain:
                line = re.sub("&#?[0-9A-Za-z]{1,24};", lambda found: self._entity(found[0]), line)
            if not line.isascii() and self.mojibake.search(line):
                raise ValueError(f"{line!r} looks like text that was decoded wrongly; write it as it is meant")
            line = line.translate(self.characters)
            line = line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            line = re.sub("\x1b\\[[\\d;]*[a-zA-Z]", "", line).translate(self.controls)
            line = unicodedata.normalize("NFC", line)
        return line

    def _entity(self, text: str) -> str:
        found = html.unescape(text) if text.startswith("&#") else self.entities.get(text, text)
        return text if ";" in found else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument("--labels", default="", help='such as "cat,dog"; by default the classes of the export')
    parser.add_argument("--templates", nargs="+", help='such as "a photo of a {}."')
    options = parser.parse_args()
    clip = Clip()
    names = [name.strip() for name in options.labels.split(",") if name.strip()]
    if not (names or clip.facts["classnames"]):
        parser.error('this export has no classes of its own; name them, as --labels "cat,dog"')
    own = clip.facts["templates"]
    templates = options.templates or (own if own and not (names and isinstance(own, dict)) else ["a photo of a {}."])
    if clip.facts["threshold"] is not None and names and set(names) != set(clip.facts["classnames"]):
        print('note: the threshold for "none of these" was calibrated with other classes', file=sys.stderr)
    try:
        for path in options.pictures:
            ((name, probability, cosine),) = clip.classify([Image.open(path)], names, templates)
            print(f"{path}\t{name or 'none of these'}\t{probability:.3f}\t{cosine:.4f}")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
