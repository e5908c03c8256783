"""The benchmarks: what they measure is right, disagreement is a failure, and every case runs, at a tiny size."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from rich.console import Console

from miniclip import tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402
import machine  # noqa: E402
import samples  # noqa: E402
import tables  # noqa: E402
from contenders import LIMIT, OURS, OURS_BF16, precision  # noqa: E402
from harness import Case, Job, Patience, Timing  # noqa: E402
from machine import Machine  # noqa: E402

ONCE = Patience(rounds=1, slow_rounds=1, most_rounds=1)
MACHINE = Machine("here", "a processor", flops=1e9, source="by hand", bandwidth=1e8)


def case(name: str = "case", **changes: Any) -> Case:
    """Two contenders that agree."""
    contenders = {OURS: lambda: Job(lambda: torch.ones(2)), "open_clip": lambda: Job(lambda: torch.ones(2))}
    return Case(**{"name": name, "title": f"the {name}", "contenders": contenders, **changes})


def run(cases: list[Case], out: Path | None = None, **options: Any) -> tuple[bool, str]:
    said = io.StringIO()
    is_well = harness.run(cases, MACHINE, ONCE, out, "full", console=Console(file=said, width=200), **options)
    return is_well, said.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def test_a_time_is_a_median_and_half_of_the_range():
    timing = Timing(wall=[3.0, 1.0, 2.0, 10.0, 1.5], cpu=[1.0, 2.0, 6.0])
    assert (timing.median, timing.spread, timing.cpu_median) == (2.0, 4.5, 2.0)


@pytest.mark.parametrize("is_slow, warm_up", [(False, ["a", "b", "c"]), (True, [])])
def test_contenders_take_turns_and_each_round_begins_with_another(is_slow, warm_up):
    seen: list[str] = []
    jobs = {name: Job(lambda n=name: seen.append(n), prepare=lambda n=name: seen.append(f"{n}?")) for name in "abc"}
    times, _, _ = harness.race(jobs, Patience(rounds=3, most_rounds=3, slow_rounds=3), is_slow)
    assert seen[::2] == [f"{name}?" for name in seen[1::2]]
    assert seen[1::2] == [*warm_up, *"abc", *"bca", *"cab"]
    assert {len(timing.wall) for timing in times.values()} == {3}


@pytest.mark.parametrize("is_slow", [False, True])
def test_the_run_whose_products_are_counted_is_not_timed(is_slow):
    a = torch.ones(8, 8)
    counting = []
    job = Job(lambda: counting.append(bool(torch.utils._python_dispatch._len_torch_dispatch_stack())) or a @ a)
    times, _, flops = harness.race({OURS: job}, Patience(rounds=3, most_rounds=3, slow_rounds=3), is_slow)
    assert flops == 2 * 8**3
    assert counting == ([False] * 3 + [True] if is_slow else [True] + [False] * 3)
    assert len(times[OURS].wall) == 3


def test_what_limits_a_slow_case_otherwise_spares_counting():
    runs = []
    jobs = {OURS: Job(lambda: runs.append(OURS)), LIMIT: Job(lambda: runs.append(LIMIT))}
    harness.race(jobs, Patience(rounds=1, slow_rounds=1), is_slow=True)
    assert sorted(runs) == sorted([OURS, LIMIT])


def test_a_process_of_its_own_that_fails_says_why():
    broken = [sys.executable, "-c", "raise SystemExit('no shards')"]
    with pytest.raises(RuntimeError, match="case miniclip failed:\nno shards"):
        harness.measure(case(measures_memory=True), MACHINE, ONCE, broken)


def test_rounds_go_on_until_the_seconds_have_passed():
    times, _, _ = harness.race({OURS: Job(lambda: sum(range(1000)))}, Patience(rounds=1, seconds=0.05, most_rounds=20))
    assert len(times[OURS].wall) == 20
    times, _, _ = harness.race({OURS: Job(lambda: sum(range(10**6)))}, Patience(rounds=1, seconds=1e-9))
    assert len(times[OURS].wall) == 1


def test_preparation_is_not_timed():
    work = lambda count: lambda: sum(range(count))  # noqa: E731
    jobs = {"light": Job(work(10), prepare=work(10**6)), "heavy": Job(work(10**6))}
    times, _, _ = harness.race(jobs, Patience(rounds=3))
    assert 10 * times["light"].median < times["heavy"].median
    assert 10 * times["light"].cpu_median < times["heavy"].cpu_median


@pytest.mark.parametrize(
    "found, reference, expected",
    [
        (torch.tensor([1.0, 4.0]), torch.tensor([1.0, 4.0]), 0.0),
        (torch.tensor([1.5, -4.0]), torch.tensor([1.0, -4.0]), 0.125),
        (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), 0.0),
        (torch.tensor([[1, 2], [5, 6]]), torch.tensor([[1, 3], [5, 6]]), 0.5),  # of two rows
        (torch.tensor([1.0]), torch.tensor([1.0, 1.0]), float("inf")),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), float("inf")),
        ({"a": torch.tensor(1.0), "b": torch.tensor(3.0)}, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 0.5),
        ({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, float("inf")),
        (7, 7, 0.0),
        (7, 8, float("inf")),
        (None, None, 0.0),
    ],
)
def test_difference_is_of_the_largest_number(found, reference, expected):
    assert harness.difference(found, reference) == expected


def test_flops_are_those_of_the_products_and_of_attention_with_its_gradient():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert harness.count_flops(lambda: a @ b)[0] == 2 * 3 * 5 * 7
    q = torch.ones(2, 4, 6, 8, requires_grad=True)
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)  # noqa: E731
    forward = 2 * (2 * 2 * 4 * 6 * 6 * 8)
    assert harness.count_flops(attend)[0] == forward
    assert harness.count_flops(lambda: attend().sum().backward())[0] == forward * 7 // 2  # products: 2, and 5 backward


def test_the_limit_is_what_products_and_bytes_take_or_what_was_measured():
    a = torch.ones(100, 100)
    product = {OURS: lambda: Job(lambda: a @ a)}
    row = harness.measure(case(contenders=product, bytes_moved=5e5), MACHINE, ONCE)
    assert row["flops"] == 2 * 100**3
    assert row["limit_seconds"] == pytest.approx(2e6 / 1e9 + 5e5 / 1e8)
    row = harness.measure(case(contenders={**product, LIMIT: lambda: Job(lambda: None)}), MACHINE, ONCE)
    assert row["limit_seconds"] == row["seconds"][LIMIT]
    assert harness.measure(case(), MACHINE, ONCE)["limit_seconds"] is None


MEMORY = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import torch
from harness import Case, Job, memory_alone

def make():
    kept = torch.ones(10_000_000)  # 40 MB
    return Job(lambda: kept.add_(torch.ones(15_000_000)[: len(kept)]))  # 60 MB, and then none

case = Case("case", "a case", {{"ours": make}})
memory_alone(case, "ours")  # pages of the libraries that a fork has not touched yet, 8 MB
print(memory_alone(case, "ours"))
"""


def test_memory_is_the_peak_above_what_there_was():
    """In a process of its own: in one with a past, what others leave may go meanwhile."""
    assert float(warm.run([sys.executable, "-c", MEMORY], check=True).stdout) == pytest.approx(100, abs=8)


def test_threads_of_a_case_are_its_own():
    before, seen = torch.get_num_threads(), []
    harness.measure(
        case(contenders={OURS: lambda: Job(lambda: seen.append(torch.get_num_threads()))}, threads=3), MACHINE, ONCE
    )
    assert set(seen) == {3}
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------------------------------------------------------------
# Telling


def test_outputs_that_differ_are_shown_and_are_a_failure(tmp_path):
    apart = {OURS: lambda: Job(lambda: torch.ones(2)), "open_clip": lambda: Job(lambda: torch.ones(2) + 2e-5)}
    is_well, said = run([case("apart", contenders=apart), case("alike")], tmp_path / "out")
    assert not is_well
    assert "outputs differ from open_clip by 2.0e-05; at most 1e-05 is allowed" in said
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (rows["apart"]["agrees"], rows["alike"]["agrees"]) == (False, True)
    near = {**apart, "open_clip": lambda: Job(lambda: torch.ones(2) + 9e-6)}
    assert run([case(contenders=near)])[0]


def test_a_case_that_fails_leaves_the_others_and_is_a_failure(tmp_path):
    def broken() -> Job:
        raise ValueError("no such thing")

    is_well, said = run([case("broken", contenders={OURS: broken}), case("sound")], tmp_path / "out")
    assert not is_well
    assert "broken: failed" in said
    assert "no such thing" in said
    assert list(json.loads((tmp_path / "out.json").read_text())["rows"]) == ["sound"]


def test_results_are_written_and_rows_that_were_not_measured_stay(tmp_path):
    assert run([case("one"), case("two")], tmp_path / "deep/out")[0]
    first = json.loads((tmp_path / "deep/out.json").read_text())
    assert first["machine"] == dataclasses.asdict(MACHINE)
    assert first["versions"]["torch"] == importlib.metadata.version("torch")
    run([case("two", title="second")], tmp_path / "deep/out")
    second = json.loads((tmp_path / "deep/out.json").read_text())
    assert second["rows"]["one"] == first["rows"]["one"]
    assert second["rows"]["two"]["title"] == "second"
    page = (tmp_path / "deep/out.md").read_text()
    assert "| the one |" in page
    assert "| second |" in page
    assert "Matrix products reach 1 GFLOP/s (by hand), copies 0.1 GB/s." in page


ROW = {
    "title": "a step",
    "seconds": {OURS: 0.1, "open_clip": 0.25, "transformers": 0.2},
    "spread": {OURS: 0.01, "open_clip": 0.02, "transformers": 0.0},
    "times_as_fast": {"open_clip": 2.5, "transformers": 2.0},
    "times_as_fast_cpu": {"open_clip": 2.4, "transformers": 1.9},
    "difference": {"open_clip": 3e-7, "transformers": 4e-7},
    "limit_seconds": 0.08,
    "targets": {"open_clip": 2.0},
    "memory_target": 0.75,
    "memory_mb": {OURS: 300.0, "open_clip": 500.0},
}


def test_a_row_of_the_table():
    cells = tables._cells({**ROW, "reached": True})
    assert cells == [
        "a step",
        "100 ms ± 10.0 ms",
        "250 ms ± 20.0 ms",
        "200 ms ± 0.0 ms",
        "–",  # OpenAI's package
        "2.50",
        "2.00",
        "2.40",
        "2 × open_clip, 0.75 of its memory",
        "80%",
        "300 / 500 / 0.60",
        "4e-07",
    ]
    assert tables._cells({**ROW, "targets": {"open_clip": 2.6}})[8] == "**2.6 × open_clip, 0.75 of its memory**"


def test_less_precise_arithmetic_is_reported_beside_ours_of_the_same_and_does_not_fail(tmp_path):
    def returns(number: float) -> Any:
        return lambda: Job(lambda: torch.tensor([1.0, number]))

    contenders = {OURS: returns(1.0), "OpenVINO": returns(1.0), "OpenVINO bf16": returns(1.02)}
    contenders["OpenVINO int8"] = returns(1.2)
    targets = {"OpenVINO": 1e-9, "OpenVINO bf16": 1e9}
    alone = harness.measure(case(contenders=contenders, targets=targets), MACHINE, ONCE)
    assert (alone["agrees"], alone["reached"]) == (True, True)  # there is no bf16 of ours to reach a target
    assert set(alone["beside"].values()) == {OURS}
    both = harness.measure(case(contenders=contenders | {OURS_BF16: returns(0.99)}, targets=targets), MACHINE, ONCE)
    assert (both["agrees"], both["reached"]) == (True, False)
    assert both["beside"] == {"OpenVINO": OURS, "OpenVINO bf16": OURS_BF16, "OpenVINO int8": OURS_BF16, OURS_BF16: OURS}
    lines = {cells[0]: cells for cells in (tables._rival_cells(both, name) for name in both["beside"])}
    assert [lines["OpenVINO"][5], lines["OpenVINO bf16"][5]] == ["1e-09", "**1e+09**"]
    assert [lines["OpenVINO bf16"][6], lines["OpenVINO int8"][6]] == ["2e-02", "**2e-01**"]
    wrong = {**contenders, "OpenVINO": returns(1.001)}
    assert not harness.measure(case(contenders=wrong), MACHINE, ONCE)["agrees"]
    assert harness.measure(case(contenders=wrong, may_differ=("OpenVINO",)), MACHINE, ONCE)["agrees"]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, True),
        ({"targets": {"open_clip": 2.6}}, False),
        ({"targets": {"best": 2.0}}, True),
        ({"targets": {"best": 2.1}}, False),
        ({"memory_target": 0.5}, False),
        ({"memory_target": 0.5, "memory_mb": {}}, True),
        ({"targets": {"OpenAI": 2.0}, "memory_target": None}, None),
    ],
)
def test_targets(changes, expected):
    assert tables.reached({**ROW, **changes}) is expected


# ---------------------------------------------------------------------------------------------------------------------
# What is fed


def test_captions_are_as_long_as_those_of_conceptual_captions():
    counts = [len(text.split()) for text in samples.captions(4000)]
    assert statistics.mean(counts) == pytest.approx(samples.MEAN_WORDS, abs=0.3)
    assert statistics.pstdev(counts) == pytest.approx(samples.DEVIATION_WORDS, abs=0.4)
    assert samples.captions(5) == samples.captions(5) != samples.captions(5, seed=1)
    assert max(len(tokenizer.encode_for_model(text)) for text in samples.captions(4000)) <= 77


def test_prompts_are_of_the_lengths_that_their_cases_tell():
    lengths = [len(tokenizer.encode_for_model(text)) for text in samples.template_prompts(300)]
    assert 6 <= min(lengths) < 9 < 15 < max(lengths) <= 18
    assert {len(tokenizer.encode_for_model(text)) for text in samples.prompts_of_length(64)} == {13}
    assert all(text.isascii() for text in samples.web_texts(50))
    assert not any(text.isascii() for text in samples.unicode_texts(50))


# ---------------------------------------------------------------------------------------------------------------------
# The cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("made")


def rows_of(folder: Path, *names: str) -> dict[str, Any]:
    import run as script

    out = folder / "-".join(names)
    assert script.main(["--tiny", "--folder", str(folder), "--out", str(out), *names]) == 0
    return json.loads(out.with_suffix(".json").read_text())["rows"]


@pytest.mark.long
def test_images_texts_and_classifiers_agree_with_all_peers(folder):
    agree_with_all_peers(rows_of(folder, "image-rn50-1", "image-b32-32", "text-prompts", "classifier", "tokenizer"))


@pytest.mark.long
def test_all_images_and_texts_agree_with_all_peers(folder):
    rows = rows_of(folder, "image", "text")
    assert len(rows) == 8 + 3
    agree_with_all_peers(rows)


def agree_with_all_peers(rows: dict[str, Any]) -> None:
    import engines

    for name, row in rows.items():
        peers = {"open_clip"}
        if not ("rn50" in name or name.startswith(("class", "token"))):
            peers.add("transformers")
        if name.startswith(("image-b32", "text")):
            peers |= set(engines.ENGINES)
        if name.startswith("token"):
            peers |= {"tokenizers", "instant_clip_tokenizer"}
        assert set(row["difference"]) - {"OpenAI", OURS_BF16} == peers, name
        exact = {one for one in peers if not precision(one)} - {"tokenizers", "instant_clip_tokenizer"}
        assert all(row["difference"][one] <= 1e-5 for one in exact), name
        assert (row["flops"] > 0) == (not name.startswith("token"))
        assert row["limit_seconds"] > 0
        if name.startswith("tokenizer-captions"):
            assert set(row["difference"].values()) == {0.0}
        if name.startswith("tokenizer-unicode"):
            assert row["difference"]["tokenizers"] > 0  # it repairs no text


@pytest.mark.long
def test_steps_and_losses_agree_with_open_clip(folder):
    rows = rows_of(folder, "train", "loss", "gradcache")
    assert len(rows) == 5 + 4 + 1
    compared = {name for name, row in rows.items() if row["difference"]}
    assert compared == set(rows) - {"train-small-dropout"}
    assert all(row["difference"]["open_clip"] <= 1e-5 for name, row in rows.items() if name in compared)


def test_a_wrong_gradient_would_be_seen(folder):
    import peers
    import steps

    config, texts = peers.architecture("small", "tiny"), samples.captions(4)
    ours, theirs = steps.our_step(config, folder, texts), steps.their_step(config, folder, [*texts[:3], "another"])
    assert harness.difference(ours.result(), theirs.result()) > 1e-3


@pytest.mark.long
def test_pipelines_loading_and_evaluation(folder):
    rows = rows_of(folder, "pipeline", "load", "load-archive", "evaluate")
    assert set(rows) == {"pipeline-64", "load", "load-archive", "evaluate-small", "evaluate-b32"}
    assert all(rows[name]["difference"]["open_clip"] <= 1e-5 for name in ("evaluate-small", "evaluate-b32"))
    assert set(rows["load"]["difference"]) == {"open_clip", "transformers"}
    assert rows["pipeline-64"]["threads"] == 1


@pytest.mark.long
def test_an_epoch_of_both_trainers(folder):
    rows = rows_of(folder, "epoch")
    assert rows["epoch"]["difference"] == {"open_clip": 0.0}  # as many samples
    assert rows["epoch"]["flops"] > 0


@pytest.mark.long
def test_imports_and_commands(folder):
    rows = rows_of(folder, "import", "help")
    assert rows["help"]["times_as_fast"]["open_clip"] > 1


@pytest.mark.long
def test_memory_of_a_contender_in_a_process_of_its_own(folder):
    rows_of(folder, "load")  # makes what is loaded
    command = [sys.executable, ROOT / "benchmarks/run.py", "--tiny", "--folder", folder, "--alone", "load", OURS]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout.split()[-1]) < 200


def test_a_case_is_meant_by_its_name_its_beginning_or_its_words():
    import run as script

    every = [case(name) for name in ("train", "train-b32", "text-b32", "tokenizer-ascii-warm", "tokenizer-ascii-cold")]
    meant = lambda *names: [one.name for one in script.chosen(every, list(names))]  # noqa: E731
    assert meant() == [one.name for one in every]
    assert meant("train") == ["train"]  # not what begins with it as well
    assert meant("t") == meant()
    assert meant("tokenizer-warm", "b32") == ["train-b32", "text-b32", "tokenizer-ascii-warm"]


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "expected"),
    [
        ("GenuineIntel", "6", "avx avx2 avx512f", "cpu-2-cores"),
        ("GenuineIntel", "6", "avx avx2 avx512f amx_tile", "cpu-2-cores-amx"),
        ("AuthenticAMD", "25", "avx avx2 avx512f", "cpu-2-cores-amd-family-25"),
        ("AuthenticAMD", "25", "avx avx2", "cpu-2-cores-amd-family-25-avx2"),
    ],
)
def test_processors_of_other_instruction_sets_have_files_of_their_own(vendor, family, flags, expected, monkeypatch):
    facts = {"vendor_id": vendor, "cpu family": family, "flags": flags}
    monkeypatch.setattr(machine, "_cpu_fact", facts.__getitem__)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert machine._cpu_name() == expected


def test_figures_of_another_processor_are_not_mixed_with_ours(tmp_path):
    run([case("one")], tmp_path / "out")
    assert tables.other_processor(tmp_path / "out", MACHINE) is None
    assert tables.other_processor(tmp_path / "new", MACHINE) is None
    assert tables.other_processor(tmp_path / "out", dataclasses.replace(MACHINE, processor="another")) == "a processor"


def test_a_case_that_is_none_is_refused_with_those_there_are(capsys):
    import run as script

    with pytest.raises(SystemExit) as ended:
        script.main(["--tiny", "imgae"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "no case is, begins with or has the words of 'imgae'" in said
    assert "image-b32-32" in said
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "training step, ViT-B/32, batch 32" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# GPU and growth


def test_the_largest_batch_is_found_whatever_it_is():
    import gpu

    for most in (1, 2, 3, 7, 8, 40):
        for step in (1, 2, 3):
            for fitting in range(45):
                asked: list[int] = []
                found = gpu.largest(lambda n, f=fitting, a=asked: a.append(n) or n <= f, step, most)
                assert found == max((n for n in range(0, most + 1, step) if n <= fitting), default=0)
                assert all(n <= most for n in asked)


@pytest.mark.long
def test_the_gpus_benchmark_goes_through_on_a_cpu(tmp_path, capsys):
    import gpu

    assert gpu.main(["--tiny", "--out", str(tmp_path / "gpu")]) == 0
    document = json.loads((tmp_path / "gpu.json").read_text())
    agreement = [row for row in document["rows"] if "differences" in row]
    assert [row["case"] for row in agreement] == ["ViT-B/32, 4 pairs", "RN50, 4 pairs", "ViT-B/16, 4 pairs"]
    for row in agreement:
        assert max(row["differences"]["open_clip, cpu, fp64"].values()) <= 1e-12
    cases = [row["case"] for row in document["rows"] if "differences" not in row]
    assert cases == [
        *(f"{model} training step, batch 4" for model in gpu.MODELS),
        "ViT-B/32 optimiser alone",
        *(f"{model} encoding, 4 {what}" for model in gpu.MODELS for what in ("images", "captions")),
        "ViT-B/32 GradCache, batch 4 in parts of 2",
        "ViT-B/32 GradCache, batch 8 in parts of 2",
        "loss alone, 8 pairs",
        *(f"{model} largest batch" for model in gpu.MODELS),
    ]
    assert document["rows"][-1][OURS]["largest_batch"] == 4
    assert (tmp_path / "gpu.md").read_text().count("\n| ViT-") == len(cases) - 2 + 4  # and agreement has lines of both
    # A run of some parts leaves the rows of the others.
    assert gpu.main(["--tiny", "--only", "loss", "--out", str(tmp_path / "gpu")]) == 0
    again = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["case"] for row in again["rows"]} == {row["case"] for row in document["rows"]}


def test_a_part_has_its_time_and_no_more():
    import gpu

    def wait() -> None:
        with gpu.at_most(0.05):
            while True:
                pass

    with pytest.raises(gpu.OutOfTimeError):
        wait()
    with gpu.at_most(60):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    import gpu

    with pytest.raises(SystemExit):
        gpu.main([])
    assert "torch finds no CUDA GPU on this machine; --tiny" in capsys.readouterr().err


def test_model_flops_are_of_each_text_at_its_own_length():
    import gpu
    import peers

    config = peers.architecture("small", "tiny")
    short, long = gpu.model_flops(config, ["a"]), gpu.model_flops(config, ["a b c d"])
    assert short < long
    assert gpu.model_flops(config, ["a", "a b c d"]) == short + long


def test_what_a_step_sends_for_numbers_worked_out_by_hand():
    """Two processes with two pairs each, embeddings of three numbers, ten parameters."""
    import growth

    found = growth.communication(2, batch_size=4, width=3, num_parameters=10)
    one_side = 2 * 3 * 4  # the other's two texts, of three numbers of four bytes
    assert found["miniclip"] == {
        "features": one_side + 4 * 3 * 4,  # and the gradients of all four
        "sums": 3 * 4 * 4,
        "weights": 10 * 4,
        "logits": 3 * (2 * 4 * 3 * 2),
    }
    assert found["open_clip"]["features"] == 2 * one_side
    assert found["open_clip"]["logits"] == 2 * found["miniclip"]["logits"]
    assert found["open_clip, exact"]["features"] == 4 * one_side
    few, many = (growth.communication(n, 64 * n, 512, 10**8) for n in (64, 1024))
    assert many["miniclip"]["features"] < 17 * few["miniclip"]["features"]  # in proportion to the processes
    assert many["miniclip"]["sums"] < 0.01 * many["miniclip"]["features"]


@pytest.mark.long
def test_growth_draws_what_it_measures(tmp_path):
    found = growth_of(tmp_path, "text", "communication")
    assert [point["x"] for point in found["text"]["open_clip"]] == [8, 77]


@pytest.mark.long
def test_growth_with_all_else(tmp_path):
    found = growth_of(tmp_path, "batch", "classes", "shards", "ranks")
    assert [point["x"] for point in found["ranks"]["a step of 4 pairs"]] == [1, 2]
    assert len(found["batch"]["miniclip, parts of 2"]) == 1


def growth_of(folder: Path, *names: str) -> dict[str, Any]:
    import growth

    out = folder / "growth.json"
    assert growth.main(["--tiny", "--only", *names, "--pictures", str(folder), "--out", str(out)]) == 0
    assert {path.stem for path in folder.glob("*.png")} == {f"growth-{name}" for name in names}
    found = json.loads(out.read_text())
    curves = [curve for name in names if name != "communication" for curve in found[name].values()]
    assert all(point["seconds"] > 0 for curve in curves for point in curve)
    return found
