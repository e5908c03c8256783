"""Every command and every Python that the pages show runs as it stands there, page by page, in a reader's folder.

Only places and names are exchanged (`STAND_INS`), and training is cut short. What needs a cluster, a GPU, another
program or minutes is parsed alone, and named with its reason (`PARSED_ALONE`).
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import shown
import torch
import warm
from helpers import Served, pack_folder, write_pairs, write_picture
from hub import Hub
from reader import commands_of, run_in_terminal, write_table, write_world
from shown import PAGES, ROOT, Step

import miniclip
from miniclip.commands import main as cli

PARSED_ALONE = {
    r"make ": "the targets set up an environment of their own and take minutes; the demo is test_demo.py's",
    r"pip install": "the tests run in what it installs",
    r"img2dataset ": "another program, which wants an environment of its own; tests/data has what it writes",
    r"miniclip app |python -m http.server": "they serve until they are stopped; tests/inference asks them",
    r"miniclip eval .* --download": "Imagenette's files come from another host",
    r"python benchmarks/": "minutes; tests/benchmarks runs them small",
    r"RAY_ADDRESS=auto ": "a cluster; tests/data and tests/inference run the engine on this machine",
}
PYTHON_NOT_RUN = {
    "docs/openclip.md": "the weights are on the hub; tests/book/test_openclip_module.py has the names",
    "docs/exercises.md:121": "a fragment, whose names the reader has to make; tests/training does it",
}
STAND_INS = [
    ("openclip:ViT-B-32/laion2b_s34b_b79k", "runs/digits/best"),
    ("torchvision:CIFAR10", "animals"),
    ("torchvision:OxfordIIITPet", "pets_of_two_splits --split test"),
    ("hf-hub:clip-benchmark/wds_flickr8k", "runs/mine/shards/val --task retrieval"),
    ("[--validation val_photos] [--shots 1 2 4 8 16]", "--validation val_photos --shots 1 2 4"),
    ("--nproc_per_node 8", "--nproc_per_node 2"),
    ("srun ", ""),
    ("my_pairs runs/mine/shards --val-fraction 0.05", "my_pairs runs/mine/shards --val-fraction 0.2"),
    ("{00000..00999}", "{00000..00007}"),
    ("{00000..01242}", "{00000..00003}"),
    ("imagenet/val --classnames imagenet", "imagenet/val --classnames two.txt"),
    ("imagenet-r.csv --classnames imagenet", "imagenet-r.csv --classnames two.txt"),
    (
        "fit --config configs/small.yaml",
        "fit --config configs/small.yaml "
        + " ".join(f"--model.clip.{tower}.{size}" for tower in ("vision", "text") for size in ("width 64", "layers 2")),
    ),
    ("--max_samples 10000000", "--max_samples 16 --data.batch_size 8 --data.num_workers 0"),
]
SHORT = "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.batch_size 8 --data.num_workers 0"


def steps_of(page: Path) -> list[Step]:
    return [step for step in shown.steps(page) if not is_parsed_alone(step)]


def is_parsed_alone(step: Step) -> bool:
    if step.is_python:
        return any(str(step).startswith(where) for where in PYTHON_NOT_RUN)
    return any(re.match(pattern, step.text) for pattern in PARSED_ALONE)


def exchanged(text: str) -> str:
    for stands, stand_in in STAND_INS:
        text = text.replace(stands, stand_in)
    return text


# ---- every command is there and is understood


def test_few_commands_are_parsed_alone_and_each_reason_is_needed():
    everything = [step for page in PAGES for step in shown.steps(page)]
    commands = [step for step in everything if not step.is_python]
    alone = [step for step in commands if is_parsed_alone(step)]
    assert len(commands) > 100
    assert len(alone) < 25
    for pattern in PARSED_ALONE:
        assert any(re.match(pattern, step.text) for step in alone), pattern
    for where in PYTHON_NOT_RUN:
        assert any(str(step).startswith(where) for step in everything if step.is_python), where


def parser_of(verb: str):
    return importlib.import_module(f"miniclip.commands.{cli.VERBS[verb][0]}").parser()


def test_the_verbs_know_the_words_of_every_command():
    for step in [step for page in PAGES for step in shown.steps(page) if not step.is_python]:
        for words in commands_of(re.sub(r"\$\w+", "1", exchanged(step.text))):
            if "miniclip" in words and "pip" not in words:
                _, *rest = words[words.index("miniclip") :]
                assert rest[0] in cli.VERBS, step
                if rest[0] != "train":
                    parser_of(rest[0]).parse_args(rest[1:])


def test_the_commands_within_sentences_have_verbs_and_options_that_there_are():
    for span in [span for page in PAGES for span in shown.spans(page)]:
        match span.text.replace("…", " ").replace(" | ", "|").split():
            case ["miniclip", verb, *words]:
                assert verb in cli.VERBS, span
                options = {word for word in words if word.startswith("--")} - {"--help", "--config"}
                assert verb == "train" or options <= parser_of(verb)._option_string_actions.keys(), span
            case ["python", script, *_] if not script.startswith("-"):
                assert (ROOT / script).is_file(), span


def test_the_targets_extras_and_scripts_of_the_commands_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for step in [step for page in PAGES for step in shown.steps(page) if not step.is_python]:
        for name in [
            each for names in re.findall(r"pip install.*\[([\w,]+)\]", step.text) for each in names.split(",")
        ]:
            assert name in extras, step
        for target in re.findall(r"^make ([\w-]+)", step.text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), step
        for script in re.findall(r"python (benchmarks/\S+)", step.text):
            assert (ROOT / script).is_file(), step


def test_training_knows_the_settings_of_every_command(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "docs"))
    import reference_pages

    monkeypatch.chdir(ROOT)
    lines = [step.text for page in PAGES for step in shown.steps(page) if "miniclip train fit" in step.text]
    for config in ROOT.glob("configs/*.yaml"):  # each opens with its command
        head = config.read_text().replace("\\\n#", " ")
        lines += re.findall(r"^#   (miniclip train fit .*)$", head, re.MULTILINE)
    parser = reference_pages._fit_parser()
    for line in lines:
        parser.parse_args(shlex.split(line.partition("miniclip train fit ")[2]))
    assert len(lines) > 15


# ---- every command runs


def write_more() -> None:
    """What the pages name and the help does not."""
    import pyarrow
    import pyarrow.parquet

    write_pairs(Path("my_pairs"), 40)
    pack_folder(Path("my_pairs"), Path("runs/mine/shards"), val_fraction=0.2)
    for name in ("animals", "pets", "my_pets", "test_photos", "train_photos", "val_photos", "imagenet/val",
                 "imagenet-sketch", "imagenet_val", "Meine Fotos Übersicht", "labelled", "DATA",
                 "pets_of_two_splits/trainval", "pets_of_two_splits/test"):  # fmt: skip
        for label, animal in enumerate(("cat", "dog")):
            for number in range(20 if name.endswith(("pets", "animals")) else 5):
                path = write_picture(Path(name, animal, f"{number}.png"), 10_000 + 100 * label + number, (12, 10))
                path.with_suffix(".txt").write_text(f"a {animal}, the {number}th of {name}")
    for number in range(100):
        write_picture(Path("letters", f"{number}.png"), 20_000 + number)
    write_pairs(Path("held_out"), 4)
    for name in ("photo.jpg", "picture.png"):
        write_picture(Path(name))
    Path("two.txt").write_text("cat\ndog\n")
    shutil.copytree("photos", ".photos")
    shutil.copytree("my_pairs", "SRC")
    shutil.copytree("packed", "OUT_OF_SRC")
    shutil.copytree("runs/mine/best", "runs/other/best")
    shutil.copytree("runs/digits/logs", "runs/mine/logs")
    shutil.copytree("runs/digits/logs", "runs/other/logs")
    rows = [(f"animals/{animal}/{n}.png", animal) for animal in ("cat", "dog") for n in range(20)]
    for name in ("photos.csv", "imagenet-r.csv"):
        write_table(name, ["filepath", "label"], rows)
    pictures = [
        (name, animal, n) for name in ("animals", "pets", "my_pets") for animal in ("cat", "dog") for n in range(20)
    ]
    products = [
        (f"{name}/{animal}/{n}.png", f"a {animal}, number {n} of {name}", n // 2) for name, animal, n in pictures
    ]
    write_table("products.csv", ["filepath", "caption", "product_id"], products)
    columns = {
        "filepath": [path for path, _ in rows],
        "expression": [label for _, label in rows],
        "gender": ["f", "m"] * 20,
        "age_group": ["20s", "20s", "30s", "30s"] * 10,
        "person": [f"p{n // 2}" for n in range(40)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), "faces.parquet")
    shutil.copy("cache/clip/ViT-B-32.pt", "ViT-B-32.pt")
    for name in ("RN50", "RN101"):
        shutil.copy("cache/clip/ViT-B-32.pt", f"cache/clip/{name}.pt")
    vision = miniclip.VisionConfig(image_size=16, patch_size=8, width=160, layers=1, head_width=80)
    other = miniclip.CLIP(miniclip.CLIPConfig(64, "gelu", vision, miniclip.TextConfig(width=64, layers=1)))
    torch.save({key.removeprefix("text."): value for key, value in other.state_dict().items()}, "epoch_32.pt")
    for name in ("train.py", "benchmarks"):
        Path(name).symlink_to(ROOT / name)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    with contextlib.chdir(folder):
        write_world()
        write_more()
    return folder


@pytest.fixture
def world(untouched, tmp_path, monkeypatch) -> Path:
    folder = shutil.copytree(untouched, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def in_buckets() -> None:
    """The tars of laion/, as objects of an S3."""
    from miniclip.common import storage

    filesystem = storage.filesystem("s3://bucket")
    filesystem.mkdir("bucket")
    for number in range(8):
        for folder in ("laion", "cc12m"):
            filesystem.pipe(f"bucket/{folder}/{number:05d}.tar", Path(f"laion/{number:05d}.tar").read_bytes())


@pytest.fixture
def environment(world, s3):
    with Hub() as hub:
        yield {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
            "XDG_CACHE_HOME": str(world / "cache"),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(world / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": Hub.token,
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_ARRAY_TASK_COUNT": "1",
        }


TWO_REPORTS = [
    "miniclip eval --model runs/digits/best --data my_photos --out reports/before",
    "miniclip eval --model runs/pets/best --data my_photos --out reports/after",
]
# What a page takes for granted: commands before its own.
BEFORE = {
    "README.md": ["rm -r runs/mine"],
    "docs/start.md": ["rm -r runs/mine"],
    "docs/check.md": ["miniclip shards my_pairs shards"],
    "docs/embed.md": ["cp .photos/cat/*.png .photos/bird/*.jpg .photos"],
    "docs/none_of_these.md": ["miniclip calibrate runs/pets/best --data pets --outside street_scenes"],
    "docs/training.md": ["rm -r runs/mine/logs runs/mine/best"],
    "docs/evaluation.md": TWO_REPORTS,
    "docs/report.md": TWO_REPORTS,
}


def text_to_run(step: Step, served: str) -> str:
    if step.is_python:
        return step.text
    short = SHORT if "miniclip train fit" in step.text and "--max_samples" not in step.text else ""
    return f"{exchanged(step.text)} {short}".replace("https://host", served)


IN_BRIEF = ("README.md",)  # `make test` runs these; of the others it parses the commands


@pytest.mark.parametrize("page", [
    pytest.param(shown.name(page), marks=[] if shown.name(page) in IN_BRIEF else pytest.mark.long)
    for page in PAGES if steps_of(page)
])  # fmt: skip
def test_the_commands_and_code_of_a_page_run(page, world, environment, request):
    steps = steps_of(ROOT / page)
    if any(re.search("runs/digits/(data|shards)|configs/digits", step.text) for step in steps):
        demo = request.getfixturevalue("folder") / "runs/digits"
        shutil.copytree(demo, world / "runs/digits", copy_function=os.link, dirs_exist_ok=True)
    if any("s3://" in step.text for step in steps):
        in_buckets()
    lines = [(0, line, 0, False) for line in BEFORE.get(page, [])]
    with Served(world) as server:
        lines += [(step.line, text_to_run(step, server.url), step.block, step.is_python) for step in steps]
        run = [sys.executable, ROOT / "tests/docs/run_page.py", page, json.dumps(lines)]
        run_in_terminal(warm.Popen, run, world, environment)
    if page == "README.md":
        assert len([*Path("runs/sorted").rglob("*.png")]) == 926
        for result in ("runs/sevens.html", "runs/photos/report.html", "runs/mine/best/config.json"):
            assert Path(result).is_file()
