"""Runs the model in this folder, without miniclip:  python run.py PICTURE… --labels "cat,dog"

Needs numpy, pillow, tokenizers, and onnxruntime (for .onnx), openvino (for .xml) or torch (for .pt2). As a module:
`Clip(FOLDER).classify([open_picture("cat.jpg")], ["cat", "dog"])`. Pictures are read as they are stored: EXIF turns
none, unless the export's threshold was calibrated with upright ones ("upright" in export.json).
N pictures or texts, C classes, E embedding, R pixels.
"""

import argparse
import csv
import ctypes
import html
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

RAW_SUFFIXES = (  # of cameras' files, which begin as TIFF does
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf",
    ".nrw", ".sr2", ".srf", ".srw", ".pef", ".raw", ".rwl", ".gpr",
    ".3fr", ".fff", ".iiq", ".mos", ".mef", ".erf", ".kdc", ".dcr",
)  # fmt: skip
# The formats that are read. The list is closed, because other plugins of Pillow's run programs, as for PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
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
        """(C, E): the mean of each class's prompts; templates are for every class, or a list for each.

        Raises a ValueError for a template without a place for the name: every class would get the same prompt.
        """
        for template in () if isinstance(templates, dict) else templates:
            if "{}" not in template and "{c}" not in template:
                raise ValueError(f"template {template!r} has no place for the class name; write {{}} where it goes")
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
        names = classnames or self.facts["classnames"]
        return self.nearest(pictures, names, self.class_features(names, templates or self.facts["templates"]))

    def nearest(
        self, pictures: Sequence[Image.Image], names: Sequence[str], classes: np.ndarray
    ) -> list[tuple[str, float, float]]:
        """As `classify`, of classes whose features (C, E) are known."""
        cosines = self.encode_images(pictures) @ classes.T  # (N, C)
        odds = np.exp(self.facts["logit_scale"] * (cosines - cosines.max(axis=1, keepdims=True)))
        answers = []
        for row, best in enumerate(cosines.argmax(axis=1).tolist()):
            cosine = float(cosines[row, best])
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
        """(3, R, R) float32, normalised. Raises a ValueError for floats whose black and white can't be known."""
        p = self.facts["pixels"]
        image = to_8_bits(upright(image) if self.facts["upright"] else image)
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


def open_picture(file: str | Path | BinaryIO) -> Image.Image:
    """A picture, decoded whole. Raises an OSError where there is no file, and a ValueError where it can't be read."""
    with open(file, "rb") if isinstance(file, str | Path) else nullcontext(file) as stream:
        Image.init()
        try:
            image = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
            is_called_raw = Path(getattr(stream, "name", None) or "").suffix.lower() in RAW_SUFFIXES
            if is_raw(image, stream) or (is_called_raw and image.format == "TIFF"):
                raise ValueError("a camera's raw file, whose first picture is a preview; save it as .jpg or .png")
            image.load()
        except Exception as error:  # a damaged picture can raise anything
            raise ValueError(f"it is no picture that can be read: {error}") from error
    return image


def is_raw(image: Image.Image, stream: BinaryIO) -> bool:
    """By the tags of TIFF, as miniclip.images does: NewSubfileType (with the sizes of pages), SubIFDs, DNGVersion;
    or by the mark of a CR2."""
    if not (tags := getattr(image, "tag_v2", {})):
        return False
    stream.seek(4)
    if 50706 in tags or stream.read(8) == b"\x10\0\0\0CR\2\0":
        return True
    if tags.get(254) != 1 or 330 in tags:
        return tags.get(254) == 1
    sizes = []
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        sizes.append(image.width * image.height)
    image.seek(0)
    return any(size >= sizes[0] for size in sizes[1:])


def upright(image: Image.Image) -> Image.Image:
    """As EXIF says that viewers show it; damaged EXIF turns nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def to_8_bits(image: Image.Image) -> Image.Image:
    """One of 16 bits (modes I;16 and I) or of floats (F) in 8 bits; Pillow would make most of it white, or black."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        if not (low >= 0 and high <= 255):
            raise ValueError(f"it has floats from {low:g} to {high:g} for pixels; scale them to 0 to 1, or 0 to 255")
        values = values * 255 if high <= 1 else values
    else:
        values = values.astype(np.int64)
        values = values >> 8 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else values
    return Image.fromarray(np.round(values).clip(0, 255).astype(np.uint8))


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


def names_in(labels: str) -> list[str]:
    """The names with commas between them; one that holds a comma stands in double quotes. Or a list, as JSON has it."""
    try:
        if labels.strip()[:1] + labels.strip()[-1:] == "[]":
            found = json.loads(labels)
        else:
            found = next(csv.reader([re.sub(r"\r\n?|\n", ",", labels)], skipinitialspace=True), [])
    except (ValueError, csv.Error) as error:
        raise ValueError(f'--labels {labels[:100]!r} can\'t be read: {error}; write "cat,dog"') from error
    names = [" ".join(name.split()) if isinstance(name, str) else "" for name in found]
    if not all(names) or not names:
        raise ValueError(f'--labels has an empty name: {labels!r}; write "cat,dog"')
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ValueError(f"--labels has {twice[0]!r} twice; once will do")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument(
        "--labels", help='such as "cat,dog"; one with a comma in double quotes; by default the classes of the export'
    )
    parser.add_argument("--templates", nargs="+", help='such as "a photo of a {}."')
    options = parser.parse_args()
    clip = Clip()
    try:
        names = [] if options.labels is None else names_in(options.labels)
    except ValueError as error:
        parser.error(str(error))
    if len(names) == 1 and clip.facts["threshold"] is None:
        parser.error(f"there is one class, {names[0]!r}, and its probability would be 1 for any picture; name several")
    if not (names or clip.facts["classnames"]):
        parser.error('this export has no classes of its own; name them, as --labels "cat,dog"')
    own = clip.facts["templates"]
    has_own = bool(own) and not (isinstance(own, dict) and not own.keys() >= set(names))
    templates = options.templates or (own if has_own else ["a photo of a {}."])
    if clip.facts["threshold"] is not None and names and set(names) != set(clip.facts["classnames"]):
        print('note: the threshold for "none of these" was calibrated with other classes', file=sys.stderr)
    names = names or clip.facts["classnames"]
    try:
        classes = clip.class_features(names, templates)
    except ValueError as error:
        parser.error(str(error))
    num_read = 0
    for path in options.pictures:
        try:
            ((name, probability, cosine),) = clip.nearest([open_picture(path)], names, classes)
            print(f"{path}\t{name or 'none of these'}\t{probability:.3f}\t{cosine:.4f}")
            num_read += 1
        except (OSError, ValueError) as error:
            print(f"left out: {path}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
    sys.exit(0 if num_read else 2)  # as `miniclip classify` does


if __name__ == "__main__":
    main()
