"""`miniclip export MODEL OUT --to TARGET`: a model as files that run without miniclip, proven."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...common.wording import printable, some
from ..evaluate import told_of_prompts
from ..terminal import CHECKPOINTS, lasting_imports, new_parser, progress_bar, refuse_bad_encoding

if TYPE_CHECKING:
    from ...inference.exporting.export import Exported
    from ...inference.exporting.proof import Agreement, Proof


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "export",
        "Writes a folder that runs without miniclip: an image and a text tower that take any number of images and\n"
        "texts of any length, the preprocessing, the tokenizer, the model's threshold and class names where it has\n"
        "some, and run.py, which needs numpy, pillow, tokenizers and the target's own library alone.\n\n"
        "  onnx       for onnxruntime; also read by transformers.js\n"
        "  torch      a program of torch.export's (.pt2), for PyTorch without miniclip\n"
        "  openvino   OpenVINO's representation (.xml, .bin)\n"
        "  web        a page that classifies and searches in the browser, for any host of static files\n\n"
        "The folder gets its name only after it gave the model's features: on random images and texts, and with\n"
        "--prove on your pictures, from the file to the guess. An export that differs is kept as OUT.differs, and the\n"
        "command ends with status 2.\n\n" + CHECKPOINTS,
        notes="OUT/run.py PICTURE --labels 'cat,dog' classifies; proof.json has the proof's numbers. float16 and\n"
        "bfloat16 are how weights are stored (torch: also how they are multiplied); int8 multiplies 8-bit numbers.",
        examples="""
miniclip export runs/digits/best digits-onnx --to onnx
miniclip export runs/digits/best digits-int8 --to onnx --precision int8 --prove my_photos
miniclip export runs/digits/best site --to web --precision int8 --search my_photos
miniclip export ViT-B/32 clip-torch --to torch""",
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--to", required=True, metavar="TARGET", help="onnx, torch, openvino or web")
    parser.add_argument("--precision", default="float32", help="float32, float16, bfloat16 or int8")
    parser.add_argument("--prove", metavar="DATA", help="images to run both on, as `miniclip eval` takes them")
    parser.add_argument("--search", metavar="DATA", help="web: images that the page finds by words, at most 5,000")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an export and nothing else")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="of the proof: images at once")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="of the proof: processes that decode"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    refuse_bad_encoding(options)
    with lasting_imports():
        from ...inference.exporting.export import export

    found = export(
        options.model,
        options.out,
        options.to,
        precision=options.precision,
        prove=options.prove,
        search=options.search,
        overwrite=options.overwrite,
        batch_size=options.batch_size,
        num_workers=options.workers,
        progress=progress_bar,
    )
    print(printable("\n".join(_lines_of(found))))


def _lines_of(found: Exported) -> list[str]:
    """The export in lines for people."""
    proof, megabytes = found.proof, 1e-6
    sizes = ", ".join(f"{tower} {megabytes * size:.1f} MB" for tower, size in proof.bytes.items())
    lines = [f"{found.folder}: {found.target}, {proof.precision}; {sizes}"]
    for kind in ("image", "text"):
        of_kind = [each for each in proof.agreements if each.what.startswith(f"random {kind}")]
        if of_kind:
            lines.append(_agreement_line(f"random {kind}s, {len(of_kind)} kinds of batch", of_kind))
    lines += [_agreement_line(f"{each.what} ({each.count})", [each]) for each in proof.agreements
              if not each.what.startswith("random")]  # fmt: skip
    return lines + _guess_lines(found) + _time_lines(proof)


def _agreement_line(what: str, agreements: Sequence[Agreement]) -> str:
    least, most = min(each.cosine_min for each in agreements), max(each.difference for each in agreements)
    mean = sum(each.cosine_mean * each.count for each in agreements) / sum(each.count for each in agreements)
    return f"  {what}: cosine {least:.6f} at least, {mean:.6f} in the mean; coordinates differ by at most {most:.1e}"


def _guess_lines(found: Exported) -> list[str]:
    proof = found.proof
    lines, guesses = [], proof.guesses
    if guesses is not None:
        lines.append(
            f"  first guesses: {guesses.changed} of {guesses.num_images} changed; accuracy "
            f"{100 * guesses.before:.2f} % before, {100 * guesses.after:.2f} % after "
            f"({len(guesses.comparison.gained)} gained, {len(guesses.comparison.lost)} lost, McNemar's p = "
            f"{guesses.comparison.p_value:.2g})"
        )
        data: Any = found.data  # of labelled images, as there are guesses
        lines.append(f"  {told_of_prompts(data, data.classnames)}")
    elif proof.precision == "int8":
        lines.append("  int8 is another computation; --prove DATA counts the guesses that it changes on your pictures")
    if proof.unreadable:
        lines.append(f"  {len(proof.unreadable)} pictures can't be read by either: {some(proof.unreadable, 2)}")
    return lines


def _time_lines(proof: Proof) -> list[str]:
    parts = []
    for each in proof.timings:
        plain = "" if each.float32 is None else f", float32 {each.float32:.1f}"
        parts.append(f"{each.what} {each.export:.1f} ms (miniclip {each.model:.1f}{plain})")
    lines = [f"  time on this processor: {'; '.join(parts)}"]
    if proof.is_slower():
        lines.append(f"  note: here, {proof.precision} is slower than the same export in float32; it is only smaller")
    return lines
