# storage.py with real files, servers on this machine that misbehave as told (http, and S3 by moto), and real processes.

import base64
import contextlib
import gc
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import servers
from servers import PIECE, InBackground, Server

from miniclip.common import cache as cache_module
from miniclip.common import storage
from miniclip.common.cache import Cache, download
from miniclip.common.ranges import RangeFile, ReadWholeError
from miniclip.common.storage import (
    NotKeptError,
    check_scheme,
    exists,
    expand,
    is_url,
    join,
    name_of,
    parent_of,
    read_bytes,
    read_range,
    stamps_of,
    without_secrets,
)

CONTENT = random.Random(0).randbytes(1_000_003)
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Short waits and small pieces, for forked children too; and no proxy between here and here."""
    monkeypatch.setattr(storage, "_WAITS_S", (0.001,) * 5)
    monkeypatch.setattr(storage, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(storage, "_BLOCK_BYTES", PIECE)
    monkeypatch.setattr(cache_module, "PIECE_BYTES", PIECE)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(Server(*args, **options))


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def fetched(cache, url, **expected):
    with cache.open(url, **expected) as file:
        return file.read()


def held(cache):
    """The names of the files in the cache, and those on their way, without their hashes."""
    names = [path.name for path in cache.folder.iterdir() if path.suffix != ".lock"]
    return sorted(re.sub("-[0-9a-f]{32}.cached", "", name) for name in names)


def held_bytes(cache):
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def in_processes(actions, timeout_s=300):
    """Runs each in a forked process, all at once; they have to end well and in time."""
    processes = [FORK.Process(target=action) for action in actions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            pytest.fail(f"a process hangs after {timeout_s} s")
    assert [process.exitcode for process in processes] == [0] * len(processes)


def check_content(cache, url, **expected):
    gc.collect()  # a forked child may drop what it has from its parent at any time
    assert hashlib.sha256(fetched(cache, url, **expected)).hexdigest() == CHECKSUM


# ---- names


@pytest.mark.parametrize(
    "location, names",
    [
        ("a/b.tar", ["a/b.tar"]),
        ("", [""]),
        ("a/{00008..00011}.tar", ["a/00008.tar", "a/00009.tar", "a/00010.tar", "a/00011.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..9}", ["08", "09"]),
        ("{0..1}", ["0", "1"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{7..7}", ["7"]),
        ("{train,val}/x", ["train/x", "val/x"]),
        ("{a,}x", ["ax", "x"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{a,b{0..1},{c,d}e}.tar", ["a.tar", "b0.tar", "b1.tar", "ce.tar", "de.tar"]),
    ],
)
def test_braces_stand_for_what_a_shell_makes_of_them(location, names):
    assert expand(location) == names
    if location:
        shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {location}"], capture_output=True, text=True, check=True)
        assert shell.stdout.splitlines() == names


@pytest.mark.parametrize(
    "location, named",
    [
        ("a{0..12.tar", "a{0..12.tar"),
        ("a0..12}.tar", "a0..12}.tar"),
        ("a{0-12}.tar", "{0-12}"),
        ("{0..x}", "{0..x}"),
        ("{}", "{}"),
        ("{a,{b}}", "{b}"),
        ("{0..99999999999}", "{0..99999999999}"),
        ("{0..9999}{0..9999}", "{0..9999}{0..9999}"),
    ],
)
def test_a_malformed_range_is_named(location, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        expand(location)


PROGRAMS = ["pipe:touch {}", "PIPE:touch {}", "shell:touch {}", "file+pipe:touch {}", "file+pipe://touch {}",
            "pipe+https:touch {}", "simplecache::pipe:touch {}", "simplecache::http://h/{}", "pipe::touch {}",
            "exec://touch {}", "file:///a::pipe:touch {}"]  # fmt: skip


@pytest.mark.parametrize("location", PROGRAMS)
def test_whatever_would_run_a_program_or_chains_schemes_is_refused_everywhere(location, tmp_path, cache):
    location = location.format(tmp_path / "ran")
    assert is_url(location)
    for action in (check_scheme, exists, read_bytes, cache.open):
        with pytest.raises(ValueError, match=r"refused|no program is run"):
            action(location)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", ["gopher://h/a", "reference://x", "zip://a.zip", "htttp://h/a"])
def test_other_schemes_are_refused_with_those_that_are_allowed(location):
    with pytest.raises(ValueError, match=f"'{location.partition(':')[0]}'.*http, https, s3.*hf"):
        check_scheme(location)


def test_schemes_have_no_case(serve, cache, tmp_path):
    server = serve({"/a": CONTENT, "/b": b"b"})
    for scheme in ("HTTP", "Http"):
        url = server.url.replace("http", scheme)
        check_content(cache, url + "/a", size=len(CONTENT))
        assert read_bytes(url + "/b?key") == b"b"
        assert exists(url + "/b")
        assert not exists(url + "/c")
        assert stamps_of([url + "/b"]) == [(1, "")]
        assert read_range(url + "/a", 5, 9, len(CONTENT)) == CONTENT[5:9]
        assert join(f"{url}/d?key", "e") == f"{url}/d/e?key"
    (tmp_path / "f").write_bytes(b"f")
    assert read_bytes((tmp_path / "f").as_uri().replace("file", "FILE")) == b"f"
    for location in ("GOPHER://h/a", "Pipe:touch x", "ZIP://a.zip"):
        with pytest.raises(ValueError, match="no program is run"):
            check_scheme(location)


def test_urls_and_paths_are_told_apart():
    urls = ["http://h/a", "http://[::1]:80/a", "s3://b/k", "hf://datasets/o/n/x", "file:///a", "pipe:ls"]
    paths = ["a/b.tar", "/a/b.tar", "C:\\a", "12:30.tar", "a/b::c.tar", "a/http://b", "", "~/x", "pipes.tar"]
    assert [is_url(location) for location in urls + paths] == [True] * len(urls) + [False] * len(paths)
    for path in [*urls[:-1], *paths]:
        check_scheme(path)


def test_names_are_joined_to_paths_and_urls():
    assert join("a/b", "c.tar") == "a/b/c.tar"
    assert join("", "c.tar") == "c.tar"
    assert join("/", "c.tar") == "/c.tar"
    assert join("s3://bucket/a/", "b/c.tar") == "s3://bucket/a/b/c.tar"
    assert join("https://h/a?token=1/2", "c.tar") == "https://h/a/c.tar?token=1/2"


def test_the_query_of_a_url_is_no_part_of_names_and_stays_at_each(tmp_path):
    query = "?sv=2024-11-04&se=2026-01-01T00:00:00Z&sig=a/b{c}*%2F.tar"
    assert expand(f"https://h/a/{{0..1}}.tar{query}") == [f"https://h/a/0.tar{query}", f"https://h/a/1.tar{query}"]
    assert name_of(f"https://h/a/0.tar{query}") == name_of("a/0.tar") == name_of("0.tar") == "0.tar"
    assert parent_of(f"https://h/a/0.tar{query}") == f"https://h/a{query}"
    assert join(parent_of(f"https://h/a/0.tar{query}"), "index.json") == f"https://h/a/index.json{query}"
    assert (parent_of("a/b/0.tar"), parent_of("0.tar"), parent_of("/0.tar")) == ("a/b", ".", "/")
    assert (name_of("s3://b/a?.tar"), expand("a?{0..1}.tar")) == ("a?.tar", ["a?0.tar", "a?1.tar"])  # no query


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "file:///etc/passwd", "pipe:ls"])
def test_a_name_that_leads_out_of_its_folder_is_refused(name):
    for folder in ("a", "https://h/a"):
        with pytest.raises(ValueError, match="leads out of it"):
            join(folder, name)


# ---- local files


def test_local_files_are_read_where_they_lie_and_never_cached(tmp_path, cache):
    path = tmp_path / "a b%.bin"
    path.write_bytes(CONTENT)
    for location in (str(path), path.as_uri()):
        assert read_bytes(location) == CONTENT
        assert fetched(cache, location) == CONTENT
        assert exists(location)
        assert not exists(location + "x")
    assert not cache.folder.exists()


@pytest.mark.parametrize("action", [read_bytes, Cache().open])
def test_a_missing_local_file_is_an_error_that_names_it(action, tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.bin can't be"):
        action(str(tmp_path / "nothing.bin"))


def test_local_use_and_http_need_no_package_of_the_extra(tmp_path):
    code = """if True:
        import sys
        for name in ("fsspec", "aiohttp", "s3fs"):
            sys.modules[name] = None  # as if it were not installed
        from miniclip.common import storage
        from miniclip.common.cache import Cache
        assert storage.read_bytes(__file__) and storage.exists(__file__) and Cache().open(__file__).read()
        storage._WAITS_S = ()
        for url in ("http://127.0.0.1:9/a", "s3://bucket/a"):
            try:
                storage.read_bytes(url)
            except ValueError as error:
                print(error)
    """
    script = tmp_path / "script.py"
    script.write_text(code)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    web, s3 = run.stdout.splitlines()
    assert "http://127.0.0.1:9/a can't be read (1 try)" in web
    assert "pip install 'miniclip[remote]'" not in web
    assert "pip install 'miniclip[remote]'" in s3


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("MINICLIP_CACHE", "/m")
    assert Cache().folder == Path("/m/shards")
    monkeypatch.delenv("MINICLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert Cache().folder == Path("/x/miniclip/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Cache().folder == Path.home() / ".cache/miniclip/shards"


# ---- one remote file


def test_a_file_is_fetched_once_in_one_request(serve, cache):
    server = serve({"/a.tar": CONTENT})
    for _ in range(2):
        check_content(cache, server.url + "/a.tar", size=len(CONTENT), sha256=CHECKSUM)
    assert server.gets == [("/a.tar", None)]
    assert held(cache) == ["a.tar"]


def test_without_a_known_size_the_server_is_asked(serve, cache):
    server = serve({"/a.tar": CONTENT})
    check_content(cache, server.url + "/a.tar")
    assert server.heads == ["/a.tar"]
    assert server.gets == [("/a.tar", None)]


def test_a_server_that_knows_get_alone_is_asked_for_a_byte(serve, cache):
    server = serve({"/a.tar": CONTENT, "/empty": b""})
    server.has_head = False
    check_content(cache, server.url + "/a.tar")
    assert server.gets == [("/a.tar", "bytes=0-0"), ("/a.tar", None)]
    assert exists(server.url + "/empty")
    assert not exists(server.url + "/b")


def test_an_empty_file_is_a_file(serve, cache):
    server = serve({"/a": b""})
    assert fetched(cache, server.url + "/a") == b""
    assert read_bytes(server.url + "/a") == b""


def unreliable(seed=0):
    """Answers one request in five with 500, and hangs up in the middle of the others."""
    faults = [
        generator.choice([500, 1_000, 150_000, 150_000, 150_000])
        for generator in [random.Random(seed)]
        for _ in range(999)
    ]
    return lambda number: faults[number]


def test_a_server_that_fails_hangs_up_and_answers_late_still_gives_the_file(serve, cache):
    pause = threading.Event()  # never set: a wait for it is a delay
    server = serve({"/a.tar": CONTENT}, fault=unreliable(), before=lambda path, start: pause.wait(0.01))
    check_content(cache, server.url + "/a.tar")
    assert len(server.gets) > 7
    server.fault = lambda number: 500 if number % 2 else None
    assert read_bytes(server.url + "/a.tar") == CONTENT


@pytest.mark.parametrize("fault", [429, 503, 5])
def test_an_error_that_stays_is_tried_six_times_and_named(serve, cache, fault):
    server = serve({"/a.tar": CONTENT}, fault=lambda number: fault)
    with pytest.raises(ValueError, match=rf"{server.url}/a.tar can't be read \(6 tries\): \w+Error"):
        cache.open(server.url + "/a.tar", size=len(CONTENT))
    assert len(server.gets) == 6


def test_nobody_there_is_an_error_after_six_tries(cache):
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/a can't be read \(6 tries\): URLError"):
        cache.open("http://127.0.0.1:9/a", size=5)
    with pytest.raises(ValueError, match=r"\(6 tries\)"):
        exists("http://127.0.0.1:9/a")


def test_a_server_that_stops_answering_is_given_up(serve, cache, monkeypatch):
    monkeypatch.setattr(storage, "_TIMEOUT_S", 0.05)
    release = threading.Event()
    server = serve({"/a.tar": CONTENT}, before=lambda path, start: release.wait(300))
    try:
        with pytest.raises(ValueError, match=r"\(6 tries\): .*[Tt]imeout"):
            cache.open(server.url + "/a.tar", size=len(CONTENT))
    finally:
        release.set()


def test_a_server_that_sends_a_byte_now_and_then_is_given_up_and_what_has_come_is_kept(serve, tmp_path, monkeypatch):
    pause, content = threading.Event(), CONTENT[:2_000]  # never set: a wait for it is a delay
    server = serve({"/a": content}, before=lambda path, start: pause.wait(0.002 if start > 300 else 0))
    monkeypatch.setattr(servers, "PIECE", 1)
    with monkeypatch.context() as impatient:
        impatient.setattr(storage, "_WINDOW_S", 0.01)
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"/a can't be read \(6 tries\): TimeoutError: only \d+ bytes came in 0"
            ):
                download(server.url + "/a", tmp_path / "part", len(content))
        with pytest.raises(ValueError, match=r"6 tries\): TimeoutError: only"):
            read_range(server.url + "/a", 400, 1_000, len(content))
    came = (tmp_path / "part").read_bytes()
    assert 300 < len(came) < len(content)
    server.gets.clear()
    server.before = lambda path, start: None
    assert download(server.url + "/a", tmp_path / "part", len(content)) is None
    assert server.gets == [("/a", f"bytes={len(came)}-")]
    assert (tmp_path / "part").read_bytes() == content


class EndlessHeader(InBackground):
    """A server that never comes to an end of what it sends before its answer."""

    def __init__(self, pause):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):  # noqa: N805
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                with contextlib.suppress(ConnectionError):
                    while not pause.wait(0.002):
                        handler.wfile.write(b"x")

            def log_message(handler, *_):  # noqa: N805
                pass

        self.listen(Handler)


def test_headers_that_come_a_byte_at_a_time_are_given_up(monkeypatch):
    monkeypatch.setattr(storage, "_WINDOW_S", 0.01)
    pause = threading.Event()
    with (
        EndlessHeader(pause) as server,
        pytest.raises(ValueError, match=r"6 tries\): TimeoutError: only \d+ bytes came"),
    ):
        read_bytes(server.url + "/a")
    pause.set()


@pytest.mark.parametrize("fault, named", [(None, "404"), (403, "403")])
def test_an_error_that_no_waiting_mends_is_raised_at_once(serve, cache, fault, named):
    server = serve({}, fault=lambda number: fault)
    for action in (partial(cache.open, size=5), read_bytes):
        server.gets.clear()
        with pytest.raises(ValueError, match=rf"{server.url}/a can't be read \(1 try\): .*{named}"):
            action(server.url + "/a")
        assert len(server.gets) == 1


def test_only_a_missing_file_does_not_exist(serve):
    server = serve({"/a": b"1"}, fault=lambda number: 500 if number == 0 else None)
    assert exists(server.url + "/a")
    assert not exists(server.url + "/b")
    server.fault = lambda number: 403
    with pytest.raises(ValueError, match="can't be read"):
        exists(server.url + "/a")


def test_a_server_without_ranges_gives_the_whole_file(serve, cache):
    server = serve({"/a.tar": CONTENT}, has_range=False)
    check_content(cache, server.url + "/a.tar", size=len(CONTENT))
    assert len(server.gets) == 1
    with pytest.raises(ValueError, match=r"has at least 900,001 bytes, 900,000 are expected"):
        cache.open(server.url + "/a.tar", size=900_000)


def test_a_wrong_checksum_is_tried_once_more_and_named(serve, cache):
    server = serve({"/a.tar": CONTENT})
    with pytest.raises(ValueError, match=f"{server.url}/a.tar has the checksum {CHECKSUM}, 0{{64}} is expected"):
        cache.open(server.url + "/a.tar", size=len(CONTENT), sha256="0" * 64)
    assert len(server.gets) == 2
    (note,) = held(cache)
    assert re.fullmatch(rf"a\.tar\.{len(CONTENT)}\.[0-9a-f]{{16}}\.refused", note)


def open_what_is_not_as_expected(cache, url):
    for _ in range(20):
        with pytest.raises(ValueError, match=f"{url} has the checksum {CHECKSUM}, 0{{64}} is expected; it was fetched"):
            cache.open(url, sha256="0" * 64)


def test_a_wrong_checksum_costs_two_requests_however_often_and_in_however_many_processes_it_is_asked_for(serve, cache):
    server = serve({"/a.tar": CONTENT})
    in_processes([partial(open_what_is_not_as_expected, cache, server.url + "/a.tar")] * 4)
    open_what_is_not_as_expected(pickle.loads(pickle.dumps(cache)), server.url + "/a.tar")
    assert (len(server.heads), len(server.gets)) == (1, 2)


def let_time_pass(cache, seconds):
    """For the notes of what was refused, which tell its time by their own."""
    for note in cache.folder.glob("*.refused"):
        then_ns = note.stat().st_mtime_ns - int(seconds * 1e9)
        os.utime(note, ns=(then_ns, then_ns))


def test_a_file_that_was_refused_is_asked_for_again_after_a_minute(serve, cache):
    server = serve({"/a.tar": b"wrong"})
    expected = {"size": len(CONTENT), "sha256": CHECKSUM}
    for age, requests in ((0, 2), (50, 2), (15, 4), (50, 4)):
        let_time_pass(cache, age)
        with pytest.raises(ValueError, match="fetched twice and thrown away, and is asked for again after 60 seconds"):
            cache.open(server.url + "/a.tar", **expected)
        assert len(server.gets) == requests
    let_time_pass(cache, -1000)  # the clock was set back
    server.files = {"/a.tar": CONTENT}
    check_content(cache, server.url + "/a.tar", **expected)
    assert held(cache) == ["a.tar"]


def test_each_cache_finds_for_itself_that_a_file_is_wrong_and_none_asks_for_it_more_often_for_the_others(serve, cache):
    server = serve({"/a.tar": CONTENT})
    caches = [cache, Cache(cache.folder), Cache(cache.folder)]
    for each in caches * 5:
        with pytest.raises(ValueError, match="fetched twice"):
            each.open(server.url + "/a.tar", size=len(CONTENT), sha256="0" * 64)
    assert len(server.gets) == 2 * len(caches)
    server.files = {"/a.tar": b"right"}
    sha256 = hashlib.sha256(b"right").hexdigest()
    with pytest.raises(ValueError, match="fetched twice"):
        cache.open(server.url + "/a.tar", size=7, sha256=sha256)
    assert [fetched(each, server.url + "/a.tar", size=5, sha256=sha256) for each in caches] == [b"right"] * 3


def test_what_came_wrong_ahead_is_asked_for_again_by_who_opens_it(serve, cache):
    server = serve({"/a.tar": b"wrong"})
    expected = {"size": len(CONTENT), "sha256": CHECKSUM}
    assert cache.prefetch(server.url + "/a.tar", **expected) == 0
    assert (len(server.gets), held(cache)) == (2, [])
    with pytest.raises(ValueError, match="fetched twice"):
        cache.open(server.url + "/a.tar", **expected)
    assert cache.prefetch(server.url + "/a.tar", **expected) == 0  # what is known to be wrong is not fetched ahead
    assert len(server.gets) == 4
    let_time_pass(cache, 61)
    server.files = {"/a.tar": CONTENT}
    assert cache.prefetch(server.url + "/a.tar", **expected) == len(CONTENT)


def test_a_file_that_was_refused_is_had_by_a_new_cache_once_its_server_has_the_right_one(serve, cache):
    server = serve({"/a.tar": b"wrong"})
    expected = {"size": len(CONTENT), "sha256": CHECKSUM}
    with pytest.raises(ValueError, match=r"has 5 bytes, 1,000,003 are expected"):
        cache.open(server.url + "/a.tar", **expected)
    server.files = {"/a.tar": CONTENT}
    with pytest.raises(ValueError, match=r"has 5 bytes, 1,000,003 are expected"):
        cache.open(server.url + "/a.tar", **expected)
    check_content(Cache(cache.folder), server.url + "/a.tar", **expected)
    check_content(cache, server.url + "/a.tar", **expected)


def test_a_file_that_came_damaged_is_fetched_again(serve, cache):
    damaged = CONTENT[:500_000] + b"?" + CONTENT[500_001:]
    server = serve({"/a.tar": damaged})

    def mend(path, start):
        if start == 1_000_000:
            server.files = {"/a.tar": CONTENT}

    server.before = mend
    check_content(cache, server.url + "/a.tar", size=len(CONTENT), sha256=CHECKSUM)
    assert len(server.gets) == 2


def test_a_file_that_is_replaced_while_it_is_fetched_is_fetched_anew_and_not_joined_from_two(serve, cache):
    """Both have the same size, and the connection breaks in the first."""
    server = serve({"/a": b"1" * len(CONTENT)}, fault=lambda number: None if number else 500_000)
    server.etags["/a"] = "old"

    def replace(path, start):
        if start == 4 * PIECE:
            server.files["/a"], server.etags["/a"] = CONTENT, "new"

    server.before = replace
    check_content(cache, server.url + "/a")
    assert server.gets == [("/a", None), ("/a", "bytes=500000-"), ("/a", None)]


def test_a_server_that_sends_another_part_than_it_was_asked_for_is_not_believed(serve, cache):
    server = serve({"/a": CONTENT}, fault=lambda number: None if number else 500_000)
    server.shift = -1000
    check_content(cache, server.url + "/a")
    for server.shift in (-1000, 1000):
        with pytest.raises(
            ValueError, match=r"6 tries\).*the bytes from [46]000 on came, those from 5000 on were asked"
        ):
            read_range(server.url + "/a", 5_000, 8_000, len(CONTENT))
    server.gets.clear()
    with pytest.raises(
        ValueError, match=r"6 tries\).*the bytes from 501000 on came, those from 500000 on were asked for"
    ):
        Cache(cache.folder / "other").open(server.url + "/a")


def test_a_file_without_a_size_is_not_fetched_beyond_the_bound(serve, cache):
    cache.limit_bytes = 3 * PIECE
    server = serve({"/a": CONTENT})
    server.has_length = False
    with pytest.raises(ValueError, match=r"/a has \d\d\d,\d\d\d bytes; the cache holds at most limit_bytes=300,000"):
        cache.open(server.url + "/a")
    assert len(server.gets) == 1
    assert held(cache) == []


def test_a_redirect_of_which_no_end_comes_is_followed(serve, monkeypatch):
    there, release = serve({"/b": b"found"}), threading.Event()

    class Redirect(http.server.BaseHTTPRequestHandler):
        def do_GET(handler):  # noqa: N805
            handler.send_response(302)
            handler.send_header("Location", there.url + "/b")
            handler.end_headers()
            release.wait(300)

        def log_message(handler, *_):  # noqa: N805
            pass

    here = InBackground()
    here.listen(Redirect)
    with here:
        assert read_bytes(here.url + "/a") == b"found"
    release.set()


@pytest.mark.parametrize("size", [1_000_002, 500_000])
def test_a_file_longer_than_expected_is_noticed(serve, cache, size):
    server = serve({"/a.tar": CONTENT})
    with pytest.raises(ValueError, match=f"has at least {size + 1:,} bytes, {size:,} are expected"):
        cache.open(server.url + "/a.tar", size=size)


def test_a_file_shorter_than_expected_is_noticed(serve, cache):
    server = serve({"/a.tar": CONTENT})
    with pytest.raises(ValueError, match=r"has 1,000,003 bytes, 1,000,004 are expected"):
        cache.open(server.url + "/a.tar", size=1_000_004)


def test_a_file_replaced_under_its_url_is_fetched_anew_when_size_or_checksum_tell(serve, cache):
    server = serve({"/a": b"old"})
    assert fetched(cache, server.url + "/a") == b"old"
    server.files = {"/a": b"newer"}
    assert fetched(cache, server.url + "/a") == b"old"
    assert fetched(cache, server.url + "/a", size=5) == b"newer"
    server.files = {"/a": b"other"}
    assert fetched(cache, server.url + "/a", size=5, sha256=hashlib.sha256(b"other").hexdigest()) == b"other"


def test_files_of_one_name_under_different_urls_are_kept_apart(serve, cache):
    server = serve({"/a/0.tar": b"1", "/b/0.tar": b"2"})
    assert fetched(cache, server.url + "/a/0.tar") == b"1"
    assert fetched(cache, server.url + "/b/0.tar") == b"2"
    assert fetched(cache, server.url + "/b/0.tar?version=3") == b"2"
    assert held(cache) == ["0.tar", "0.tar", "0.tar"]


def test_a_long_name_in_any_script_can_be_kept(serve, cache):
    server = serve({"/" + "%E5%9B%BE" * 70 + ".tar": b"1"})
    assert fetched(cache, server.url + "/" + "图" * 70 + ".tar") == b"1"


def test_a_user_name_in_the_url_is_sent_to_its_own_server(serve):
    server = serve({"/a": b"1"})
    assert read_bytes(server.url.replace("//", "//someone:p%40ss@") + "/a") == b"1"
    assert server.headers[0]["Authorization"] == "Basic " + base64.b64encode(b"someone:p@ss").decode()


def test_a_file_too_large_for_memory_is_refused(serve, monkeypatch):
    monkeypatch.setattr(storage, "_MOST_BYTES", 10)
    server = serve({"/a": b"a" * 10, "/b": b"b" * 11})
    assert read_bytes(server.url + "/a") == b"a" * 10
    with pytest.raises(ValueError, match=f"{server.url}/b can't be read .*more than 10 bytes"):
        read_bytes(server.url + "/b")


# ---- what tells a file from another


def test_the_tests_server_lets_in_more_at_once_than_ask():
    """Before it answers any. Who is not let in tries again after a second, then after two, four, eight and so on."""
    server = InBackground()
    server.listen(http.server.BaseHTTPRequestHandler)
    with server.http, contextlib.ExitStack() as stack:
        for _ in range(4 * storage._ASKED_AT_ONCE):
            stack.enter_context(socket.create_connection(server.http.server_address, timeout=30))


def test_a_stamp_is_what_a_server_says_of_size_and_version_by_head_or_by_a_byte(serve):
    server = serve({"/a": b"12345", "/b": b"", "/c": b"123"})
    server.etags = {"/a": '"x"', "/b": '"y"'}
    urls = [f"{server.url}/{name}" for name in "abcd"]
    expected = [(5, '"x"'), (0, '"y"'), (3, ""), None]
    assert stamps_of(urls) == expected
    server.has_head = False
    assert stamps_of(urls) == [expected[0], (0, ""), *expected[2:]]  # of an empty file no byte can be had
    server.has_head, server.has_length = True, False
    assert stamps_of(urls[::2]) == [(None, '"x"'), (None, "")]
    server.fault = lambda number: 503
    with pytest.raises(ValueError, match=r"\(6 tries\).*503"):
        stamps_of(urls)
    server.fault, server.refusal = (lambda number: None), 403
    assert stamps_of(urls[::3], needs_all=False) == [(None, '"x"'), None]
    with pytest.raises(ValueError, match=r"/d can't be read \(1 try\): .*403"):
        stamps_of(urls[::3])


def test_a_stamp_of_a_local_file_is_its_size_and_time(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    os.utime(tmp_path / "a", ns=(5, 7))
    assert stamps_of([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a" / "c")]) == [(3, "7"), None, None]


def test_another_version_under_the_same_url_is_another_file_and_both_are_kept(serve, cache):
    server = serve({"/a": b"old"})
    assert fetched(cache, server.url + "/a", size=3, version="1") == b"old"
    server.files["/a"] = b"new"
    assert fetched(cache, server.url + "/a", size=3, version="1") == b"old"
    assert fetched(cache, server.url + "/a", size=3, version="2") == b"new"
    assert len(server.gets) == 2
    checksum = hashlib.sha256(b"new").hexdigest()
    cache.verified(server.url + "/a", checksum, "2")
    assert fetched(cache, server.url + "/a", sha256=checksum) == b"new"
    assert len(server.gets) == 2


def test_a_location_is_shown_without_what_gives_access():
    assert without_secrets("https://me:p@ss@h:1/a/b.tar?sv=1&sig=a%2F=&key") == "https://h:1/a/b.tar?sv=1&sig=…&…"
    assert without_secrets("s3://id:secret@bucket/a@b") == "s3://bucket/a@b"
    for plain in ("http://h/a.tar", "data/a?.tar", "me@host/a.tar"):
        assert without_secrets(plain) == plain


# ---- the bound


def test_the_least_recently_used_are_deleted_to_keep_the_bound(serve, cache):
    cache.limit_bytes = 30
    server = serve({f"/{name}": name.encode() * 10 for name in "abcd"})
    for name in "abc":
        fetched(cache, f"{server.url}/{name}")
    fetched(cache, server.url + "/a")  # so that b is the oldest
    fetched(cache, server.url + "/d")
    assert held(cache) == ["a", "c", "d"]


def test_a_file_that_is_open_can_be_read_after_it_was_deleted(serve, cache):
    cache.limit_bytes = 10
    server = serve({"/a": b"a" * 10, "/b": b"b" * 10})
    with cache.open(server.url + "/a") as file:
        fetched(cache, server.url + "/b")
        assert held(cache) == ["b"]
        assert file.read() == b"a" * 10


@pytest.mark.parametrize("size", [11, None])
def test_a_file_larger_than_the_bound_is_refused_before_it_is_fetched(serve, cache, size):
    cache.limit_bytes = 10
    server = serve({"/a": b"a" * 11})
    with pytest.raises(ValueError, match=r"/a has 11 bytes; the cache holds at most limit_bytes=10"):
        cache.open(server.url + "/a", size=size)
    assert server.gets == []


def test_what_is_not_the_caches_own_is_never_deleted(serve, cache):
    cache.limit_bytes = 10
    cache.folder.mkdir()
    (cache.folder / "thesis.cached").write_bytes(b"x" * 100)
    server = serve({"/a": b"a" * 10})
    fetched(cache, server.url + "/a")
    assert held(cache) == ["a", "thesis.cached"]


def test_a_cache_that_cannot_be_written_is_an_error_that_names_both(serve, tmp_path):
    (tmp_path / "file").write_text("")
    server = serve({"/a": b"a"})
    with pytest.raises(ValueError, match=f"{server.url}/a can't be kept in {tmp_path / 'file' / 'cache'}: "):
        Cache(tmp_path / "file" / "cache").open(server.url + "/a")


def fetch_onto_a_full_disk(cache, url, most_bytes):
    """What a process may write is bounded, which fails in the middle of a file as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    with pytest.raises(NotKeptError, match=f"{url} can't be kept in {cache.folder}: .*File too large"):
        cache.open(url)


def test_a_disk_that_is_full_is_said_to_be_at_fault_and_no_request_is_repeated_for_it(serve, cache):
    server = serve({"/a": CONTENT})
    for most_bytes in (0, PIECE // 2, 3 * PIECE):  # before and after enough has come to go on at once
        server.gets.clear()
        in_processes([partial(fetch_onto_a_full_disk, cache, server.url + "/a", most_bytes)])
        assert len(server.gets) == 1
    check_content(cache, server.url + "/a")


# ---- many processes


def test_processes_that_want_the_same_file_fetch_it_once(serve, cache):
    server = serve({"/a.tar": CONTENT})
    in_processes([partial(check_content, cache, server.url + "/a.tar", size=len(CONTENT))] * 3)
    assert len(server.gets) == 1
    assert held(cache) == ["a.tar"]


def fetch_many(cache, url, seed):
    names = [f"{number:02d}" for number in range(12)]
    random.Random(seed).shuffle(names)
    for name in names:
        assert fetched(cache, f"{url}/{name}", size=50_000) == name.encode() * 25_000
        on_disk = held_bytes_while_others_work(cache)
        assert on_disk <= cache.limit_bytes + 3 * 50_000, on_disk


def held_bytes_while_others_work(cache):
    total = 0
    for path in cache.folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_the_bound_holds_with_many_processes_and_what_they_read_is_right(serve, cache):
    cache.limit_bytes = 170_000
    server = serve({f"/{number:02d}": b"%02d" % number * 25_000 for number in range(12)})
    in_processes([partial(fetch_many, cache, server.url, seed) for seed in range(4)])
    assert held_bytes(cache) == 150_000  # three whole files, no partial


@pytest.fixture
def broken(serve, cache):
    """A server and a cache after a process was killed in the middle of a.tar: five pieces have come."""
    reached, release = threading.Event(), threading.Event()

    def stall(path, start):
        if start == 5 * PIECE and not release.is_set():
            reached.set()
            release.wait(300)

    server = serve({"/a.tar": CONTENT, "/b": b"b" * 10}, before=stall)

    def start(**expected):
        process = FORK.Process(target=check_content, args=(cache, server.url + "/a.tar"), kwargs=expected)
        process.start()
        assert reached.wait(300)
        end = time.monotonic() + 300
        while held_bytes(cache) < 5 * PIECE:  # what was sent has to be read, too
            assert time.monotonic() < end
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        release.set()
        server.gets.clear()
        assert held(cache) == ["a.tar.part"]
        return server

    yield start
    release.set()


def test_what_a_killed_process_left_is_continued_if_a_checksum_can_tell_that_it_fits(broken, cache):
    server = broken(sha256=CHECKSUM, size=len(CONTENT))
    check_content(cache, server.url + "/a.tar", sha256=CHECKSUM, size=len(CONTENT))
    assert server.gets == [("/a.tar", f"bytes={5 * PIECE}-")]
    assert held(cache) == ["a.tar"]


@pytest.mark.long
def test_what_a_killed_process_left_is_thrown_away_without_a_checksum(broken, cache):
    server = broken(size=len(CONTENT))
    check_content(cache, server.url + "/a.tar", size=len(CONTENT))
    assert server.gets == [("/a.tar", None)]
    assert held(cache) == ["a.tar"]


@pytest.mark.long
def test_what_a_killed_process_left_makes_room_for_others(broken, cache):
    server = broken(size=len(CONTENT))
    cache.limit_bytes = 300_000
    fetched(cache, server.url + "/b")
    assert held(cache) == ["b"]


def test_what_another_process_is_fetching_is_not_deleted(serve, cache):
    reached, release = threading.Event(), threading.Event()

    def stall(path, start):
        if start == 5 * PIECE:
            reached.set()
            release.wait(300)

    server = serve({"/a.tar": CONTENT, "/b": b"b" * 10}, before=stall)
    process = FORK.Process(target=check_content, args=(cache, server.url + "/a.tar"), kwargs={"size": len(CONTENT)})
    process.start()
    assert reached.wait(300)
    fetched(Cache(cache.folder, limit_bytes=100_000), server.url + "/b")
    assert held(cache) == ["a.tar.part", "b"]
    release.set()
    process.join(300)
    assert process.exitcode == 0


# ---- fork


@pytest.mark.long
def test_forked_workers_fetch_after_their_parent_did_and_it_goes_on_after_them(serve, tmp_path):
    server = serve({"/a.tar": CONTENT})
    for number in range(3):
        check_content(Cache(tmp_path / f"parent{number}"), server.url + "/a.tar")
        in_processes(
            [partial(check_content, Cache(tmp_path / f"{number}{worker}"), server.url + "/a.tar") for worker in "ab"]
        )


@pytest.mark.long
def test_a_worker_forked_while_fsspec_held_its_lock_does_not_hang(bucket, cache):
    assert read_bytes("s3://shards/train/a.tar") == CONTENT
    from fsspec.asyn import get_lock

    with get_lock():
        in_processes([partial(check_content, cache, "s3://shards/train/a.tar")])


def test_workers_forked_while_a_thread_fetches_do_not_hang(serve, tmp_path):
    reached, release = threading.Event(), threading.Event()

    def stall(path, start):
        if path == "/slow" and start == 5 * PIECE:
            reached.set()
            release.wait(300)

    server = serve({"/a.tar": CONTENT, "/slow": CONTENT}, before=stall)
    cache = Cache(tmp_path / "cache")
    thread = threading.Thread(target=check_content, args=(cache, server.url + "/slow"))
    thread.start()
    assert reached.wait(300)
    in_processes([partial(check_content, cache, server.url + "/a.tar")] * 2)
    release.set()
    thread.join(300)
    assert held(cache) == ["a.tar", "slow"]


# ---- ranges


def test_a_file_is_read_in_ranges_over_a_server_that_fails_at_times(serve):
    server = serve({"/a.tar": CONTENT}, fault=lambda number: [None, 503, None, 100][number % 4])
    check_ranges(f"{server.url}/a.tar")


@pytest.mark.parametrize("skipped, most", [(100_000, 9_000), (20_000, 9_000), (0, 210_000)])
def test_no_more_of_a_file_is_fetched_than_blocks_around_what_is_read(serve, skipped, most):
    """Ten pieces of 4 kB with gaps between them: a block for each; without gaps, fewer and larger ones."""
    content = random.Random(0).randbytes(10 * (4_000 + skipped))
    server = serve({"/a.tar": content})
    file = RangeFile(f"{server.url}/a.tar", len(content))
    for number in range(10):
        file.seek(number * (4_000 + skipped))
        assert file.read(4_000) == content[file.tell() - 4_000 : file.tell()]
    assert file.num_requests == len(server.gets) <= 10
    assert file.bytes_read <= (10 if skipped else 1) * most


def test_a_file_that_became_another_while_it_was_read_in_ranges_is_an_error(serve):
    server = serve({"/a.tar": CONTENT})
    file = RangeFile(f"{server.url}/a.tar", len(CONTENT))
    file.read(10)
    server.files["/a.tar"] = CONTENT * 2
    file.seek(len(CONTENT) - 20)
    with pytest.raises(ValueError, match=r"/a\.tar can't be read \(1 try\): .*it had .* bytes and has .* now"):
        file.read(10)


def test_where_a_server_knows_no_ranges_the_file_is_to_be_read_whole(serve):
    server = serve({"/a.tar": CONTENT}, has_range=False)
    with pytest.raises(ReadWholeError):
        RangeFile(f"{server.url}/a.tar", len(CONTENT)).read(10)


def test_where_ranges_save_less_than_they_should_the_file_is_to_be_read_whole(serve):
    server = serve({"/a.tar": CONTENT})
    file = RangeFile(f"{server.url}/a.tar", len(CONTENT), max_share=0.5)
    with pytest.raises(ReadWholeError):
        list(iter(lambda: file.read(5_000), b""))
    assert file.bytes_read < len(CONTENT)


# ---- S3


@pytest.fixture
def bucket(s3):
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    client.put_object(Bucket="shards", Key="train/a.tar", Body=CONTENT)
    client.put_object(Bucket="shards", Key="train/b.tar", Body=b"b")
    client.put_object(Bucket="shards", Key="train/sub/c.tar", Body=b"c")
    return client


def test_s3_gives_files_and_what_exists(bucket, cache):
    check_content(cache, "s3://shards/train/a.tar")
    check_content(cache, "s3://shards/train/a.tar", size=len(CONTENT), sha256=CHECKSUM)
    assert read_bytes("s3://shards/train/b.tar") == read_bytes("S3://shards/train/b.tar") == b"b"
    assert not exists("s3://shards/train/d.tar")
    bucket.put_object(Bucket="shards", Key="train/d.tar", Body=b"d")
    assert exists("s3://shards/train/d.tar")
    assert exists("s3://shards/train/b.tar")
    assert not exists("s3://shards/train/x.tar")
    bucket.delete_object(Bucket="shards", Key="train/d.tar")


def test_an_object_of_s3_that_is_replaced_by_one_of_its_size_has_another_stamp(bucket):
    urls = [f"s3://shards/train/{name}.tar" for name in "cx"]
    stamps = []
    for body in (b"1", b"1", b"2"):
        bucket.put_object(Bucket="shards", Key="train/c.tar", Body=body)
        stamps.append(stamps_of(urls))
    assert [found[0].size for found in stamps] == [1, 1, 1]
    assert hashlib.md5(b"1").hexdigest() in stamps[0][0].version
    assert hashlib.md5(b"2").hexdigest() in stamps[2][0].version
    assert stamps[0][1] is None
    bucket.delete_object(Bucket="shards", Key="train/c.tar")


def check_ranges(url):
    """Any seek and read of a file of which blocks are fetched is that of the whole file."""
    chance, file, whole = random.Random(0), RangeFile(url, len(CONTENT)), io.BytesIO(CONTENT)
    for _ in range(40):
        place, size = chance.randrange(len(CONTENT) + 5), chance.choice([0, 1, 512, 10_000, 10**9])
        assert file.seek(place) == whole.seek(place)
        assert (file.read(size), file.tell()) == (whole.read(size), whole.tell())


def test_s3_and_files_are_read_in_ranges(bucket, tmp_path):
    check_ranges("s3://shards/train/a.tar")
    (tmp_path / "a.tar").write_bytes(CONTENT)
    check_ranges(str(tmp_path / "a.tar"))


def test_what_s3_does_not_have_is_an_error_at_once(bucket, cache):
    for action in (partial(cache.open, size=5), cache.open, read_bytes):
        with pytest.raises(ValueError, match=r"s3://shards/x/y.tar can't be read \(1 try\): (FileNotF|NoSuchKey)"):
            action("s3://shards/x/y.tar")


@pytest.mark.parametrize("fault", [503, 2])
def test_an_s3_that_fails_is_tried_six_times_in_all(serve, monkeypatch, bucket, cache, fault):
    server = serve({"/shards/train/a.tar": b"12345"}, fault=lambda number: fault)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    storage._filesystem_of.cache_clear()
    with pytest.raises(ValueError, match=r"s3://shards/train/a.tar can't be read \(6 tries\): "):
        cache.open("s3://shards/train/a.tar", size=5)
    assert len(server.gets) == 6


@pytest.mark.long
def test_forked_workers_read_s3_after_their_parent_did(bucket, tmp_path):
    assert read_bytes("s3://shards/train/a.tar") == CONTENT
    in_processes([partial(check_content, Cache(tmp_path / name), "s3://shards/train/a.tar") for name in "ab"])
    assert read_bytes("s3://shards/train/a.tar") == CONTENT
