"""Loading ViT-B/32 from disk: OpenAI's archive by miniclip, against open_clip's create-and-load from safetensors.

    python benchmarks/load.py [--repeats 5]

Every load is a process of its own, whose imports are done before the clock starts; the two take turns. Memory is the
process's peak less what it had before loading. The weights are random, in the genuine layouts (half precision in the
archive, as OpenAI's are, single in safetensors).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURE = """
import re, sys, time
{imports}
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, begin = peak(), time.perf_counter()
{load}
print(time.perf_counter() - begin, peak() - before)
"""
CASES = {
    "miniclip, OpenAI's archive": (
        "import miniclip; miniclip.load",
        "model, _ = miniclip.load(sys.argv[1] + '/archive.pt', device='cpu')",
    ),
    "miniclip, safetensors": (
        "import miniclip; miniclip.load",
        "model, _ = miniclip.load(sys.argv[1] + '/native', device='cpu')",
    ),
    "open_clip, safetensors": (
        "import open_clip",
        "model = open_clip.create_model('ViT-B-32-quickgelu', pretrained=sys.argv[1] + '/openclip.safetensors')",
    ),
}


def make(folder: Path) -> None:
    """The same random weights in the three layouts."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    import miniclip
    from miniclip.config import OPENAI_MODELS
    from miniclip.weights import from_openai_keys

    theirs = open_clip.create_model("ViT-B-32-quickgelu").eval()
    save_file(
        {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, folder / "openclip.safetensors"
    )
    ours = miniclip.CLIP(OPENAI_MODELS["ViT-B/32"])
    ours.load_state_dict(from_openai_keys(theirs.state_dict()))
    miniclip.save(ours, folder / "native")
    examples = {"encode_image": (torch.ones(1, 3, 224, 224),), "encode_text": (torch.zeros(1, 77, dtype=torch.int),)}
    archive = torch.jit.trace_module(theirs, examples, check_trace=False)
    for tensor in [*archive.parameters(), *archive.buffers()]:
        tensor.data = tensor.data.half()
    archive.save(str(folder / "archive.pt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, after one that is not")
    options = parser.parse_args()
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for turn in range(options.repeats + 1):
            for name, (imports, load) in CASES.items():
                code = MEASURE.format(imports=imports, load=load)
                done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
                seconds, megabytes = map(float, done.stdout.split()[-2:])
                if turn:
                    seen[name].append((seconds, megabytes))
    print("| | s | peak memory, MB (the model in float32: 605) |\n|---|---|---|")
    for name, values in seen.items():
        seconds, memory = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"| {name} | {seconds:.2f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
