"""Results as a table, JSON, CSV and Parquet, in pipes and files; a process of its own for each, as users have it."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pyarrow.parquet
import pytest
from reader import run_in_terminal

from miniclip.commands.main import main
from miniclip.commands.output import add_output

ROWS = [
    {"image": "a b.jpg", "label": "Bär, grün", "probability": 0.75, "rank": 1, "set": ["x", 'y "z"']},
    {"image": "写真.png", "label": 'a "quoted"\nname', "probability": float("nan"), "rank": 12, "set": []},
    {
        "image": os.fsdecode(b"caf\xe9.png"),
        "label": "half of one: \ud83d",
        "probability": 1e-9,
        "rank": 3,
        "set": ["w"],
    },
]
COLUMNS = "{'image': str, 'label': str, 'probability': float, 'rank': int, 'set': list}"
PROGRAM = f"""
import argparse, sys
from miniclip.commands.output import add_output, results
from miniclip.common.files import user_errors
parser = argparse.ArgumentParser()
add_output(parser)
options, (rows, count) = parser.parse_known_args()
with user_errors(), results(options, {COLUMNS}) as write:
    for _ in range(int(count)):
        for row in eval(rows, {{'nan': float('nan')}}):
            write(row)
print("done", file=sys.stderr)
"""


def command(*options: str, count: int = 1) -> list[str]:
    return [sys.executable, "-c", PROGRAM, repr(ROWS), str(count), *options]


def run(*options: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(command(*options), capture_output=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == code, done.stderr.decode()
    return done


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "Bär"),
        ("UTF8:strict", "Bär"),
        ("ascii", r"B\u00e4r"),
        ("cp1252", r"B\u00e4r"),
        ("utf-16", r"B\u00e4r"),
    ],
)
def test_json_is_one_array_with_a_row_a_line_on_any_terminal(encoding, shown):
    out = run("--json", PYTHONIOENCODING=encoding).stdout
    rows = json.loads(out)
    assert rows == [*ROWS[:1], {**ROWS[1], "probability": None}, *ROWS[2:]]
    lines = out.decode().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == rows
    assert shown in lines[1]


def test_csv_comes_back_as_it_was():
    out = run("--csv", PYTHONIOENCODING="ascii").stdout
    header, *rows = csv.reader(io.StringIO(out.decode("utf-8", "surrogateescape"), newline=""))
    assert header == list(ROWS[0])
    assert rows[0] == ["a b.jpg", "Bär, grün", "0.75", "1", '["x", "y \\"z\\""]']
    assert rows[1] == ["写真.png", 'a "quoted"\nname', "", "12", "[]"]
    assert rows[2][:2] == [ROWS[2]["image"], r"half of one: \ud83d"]


@pytest.mark.parametrize("name", ["a\rb.png", "a\nb.png", "a\r\nb.png", "\r", '"\r', "a,\r", "", " "])
def test_every_name_comes_back_from_csv(tmp_path, name):
    row = {**ROWS[0], "image": name}
    program = command("--csv")
    program[3] = repr([row, row])
    (tmp_path / "rows.csv").write_bytes(subprocess.run(program, capture_output=True, check=True).stdout)
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        assert [each["image"] for each in csv.DictReader(file)] == [name, name]
    read = pandas.read_csv(tmp_path / "rows.csv", keep_default_na=False)
    assert (read["image"].tolist(), read["rank"].tolist()) == ([name, name], [1, 1])
    data = (tmp_path / "rows.csv").read_bytes()
    assert data.count(b"\r\n") == 2 * name.count("\r\n")  # lines end as those of other commands do


def test_pandas_reads_a_csv_with_a_name_that_is_no_utf_8(tmp_path):
    (tmp_path / "rows.csv").write_bytes(run("--csv").stdout)
    read = pandas.read_csv(tmp_path / "rows.csv", encoding_errors="backslashreplace")
    assert read["image"].tolist() == ["a b.jpg", "写真.png", r"caf\xe9.png"]
    assert read["rank"].tolist() == [1, 12, 3]


@pytest.mark.parametrize("name", ["-", "new/rows.parquet"])
def test_parquet_goes_into_a_new_file_or_a_pipe(tmp_path, name):
    path = name if name == "-" else str(tmp_path / name)
    out = run("--parquet", path).stdout
    table = pyarrow.parquet.read_table(io.BytesIO(out) if name == "-" else path)
    assert [str(field.type) for field in table.schema] == [
        "string",
        "string",
        "double",
        "int64",
        "list<element: string>",
    ]
    expected = [
        *ROWS[:1],
        {**ROWS[1], "probability": None},
        {**ROWS[2], "image": r"caf\udce9.png", "label": r"half of one: \ud83d"},
    ]
    assert table.to_pylist() == expected


def test_a_parquet_file_that_is_there_stays_and_one_that_breaks_off_never_is(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("mine")
    assert f"{path} is already there" in run("--parquet", str(path), code=2).stderr.decode()
    assert path.read_text() == "mine"
    broken = command("--parquet", str(tmp_path / "other.parquet"))
    broken[3] = "[{'rank': 'no number'}]"
    subprocess.run(broken, capture_output=True, check=False)
    assert [each.name for each in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_table_has_straight_columns_and_no_cell_that_steers_the_terminal():
    out = run(PYTHONIOENCODING="utf-8").stdout.decode()
    assert out.splitlines() == [
        "image     label             probability  rank  set",
        'a b.jpg   Bär, grün              0.7500     1  x, y "z"',
        '写真.png  a "quoted"\\nname            -    12',
        "caf?.png  half of one: ?         0.0000     3  w",
    ]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_can_not_show_loses_characters_and_no_row(encoding):
    lines = run(PYTHONIOENCODING=encoding).stdout.decode(encoding).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("??.png")
    assert "12" in lines[2]


@pytest.mark.parametrize("options", [(), ("--json",), ("--csv",), ("--parquet", "-")], ids=str)
def test_a_reader_that_goes_ends_the_command_quietly(options):
    with subprocess.Popen(command(*options, count=20_000), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


FORMS = [(), ("--json",), ("--csv",), ("--parquet", "-")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_full_disk_behind_standard_output_is_an_error_that_names_it(options):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command(*options), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "No space left on device: 'standard output'" in done.stderr


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_results_for_a_closed_standard_output_are_refused(options):
    for before in ("", "from miniclip.commands.terminal import print_in_any_encoding as p; p()\n"):
        program, *rest = command(*options)[2:]
        closed = ["bash", "-c", '"$@" >&-', "bash", sys.executable, "-c", before + program, *rest]
        done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False)
        # A table may come beside what a command has written to files, and is refused where it is all.
        assert ("error: standard output is closed" in done.stderr) == bool(options), done.stderr


@pytest.mark.parametrize("call", ["info M", "eval --compare A B", "push M me/m --dry-run", "index P M.index --dry-run"])
def test_what_is_only_printed_is_refused_where_standard_output_is_closed(call, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        with pytest.raises(SystemExit) as end:
            main(call.split())
    assert (end.value.code, "error: standard output is closed" in capsys.readouterr().err) == (2, True)


def test_no_rows_are_an_empty_result():
    header = "image,label,probability,rank,set\n"
    for options, out in (((), header.replace(",", "  ")), (("--json",), "[]\n"), (("--csv",), header)):
        nothing = command(*options)
        nothing[3] = "[]"
        assert subprocess.run(nothing, capture_output=True, text=True, check=True).stdout == out


def test_one_form_at_a_time(capsys):
    parser = argparse.ArgumentParser()
    add_output(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", "--csv"])
    assert "not allowed with" in capsys.readouterr().err


def test_it_waits_for_no_torch():
    code = "import sys, miniclip.commands.output; assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path.cwd())


WITH_A_BAR = """
from miniclip.commands.terminal import progress_bar
with progress_bar("photos", total=2) as show:
    show(1)
    print('{"a": 1}')
    show(2)
print('{"a": 2}')
"""


def test_a_bar_on_the_terminal_stays_out_of_results_that_go_elsewhere(tmp_path):
    output = run_in_terminal(subprocess.Popen, [sys.executable, "-c", WITH_A_BAR], tmp_path, dict(os.environ))
    assert [json.loads(line) for line in output.splitlines()] == [{"a": 1}, {"a": 2}]
