# Downloads from a server on this machine that misbehaves as told.

import contextlib
import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch
import warm
from foreign_models import TINY_VIT, assert_same_as_openclip, hf_model, openclip_model, write_archive
from servers import InBackground

from miniclip.common import storage
from miniclip.weights import download as fetch
from miniclip.weights.download import download, fetch_hub, openai_folder
from miniclip.weights.load import load

CONTENT = random.Random(0).randbytes(3_000_000)
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


class Server(InBackground):
    """Serves one content; `faults` are taken one a request: a status, or after how many bytes to hang up."""

    def __init__(self, content=CONTENT, has_range=True, faults=()):
        self.content, self.has_range, self.faults = content, has_range, list(faults)
        self.ranges, self.paths, self.bytes_sent = [], [], 0
        lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):  # noqa: N805
                with lock:
                    fault = self.faults.pop(0) if self.faults else None
                    asked = handler.headers.get("Range")
                    self.ranges.append(asked)
                    self.paths.append(handler.path)
                self.answer(handler, fault, asked)

            def log_message(handler, *_):  # noqa: N805
                pass

        self.listen(Handler)

    def answer(self, handler, fault, asked):
        if isinstance(fault, str):
            handler.send_error(int(fault))
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.has_range else 0
        if start >= len(self.content):
            handler.send_error(416)
            return
        body = self.content[start:]
        handler.send_response(206 if asked and self.has_range else 200)
        handler.send_header("Content-Length", str(len(body)))
        if asked and self.has_range:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.end_headers()
        sent = body if fault is None else body[:fault]
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(sent)
        self.bytes_sent += len(sent)
        if fault is not None:
            handler.close_connection = True

    @property
    def requests(self):
        return len(self.ranges)


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(Server(*args, **options))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "model.pt"


def visible(folder):
    """What lies there and is no lock, which may stay."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock")) if folder.exists() else []


# ---- one file


def test_a_file_is_fetched_whole_and_named_once_it_is_verified(serve, path):
    server = serve()
    assert download(f"{server.url}/model.pt", path, CHECKSUM) == path
    assert path.read_bytes() == CONTENT
    assert visible(path.parent) == ["model.pt"]
    assert server.ranges == [None]


def test_a_second_call_asks_nothing_and_does_not_read_the_file_again(serve, path):
    server = serve()
    download(f"{server.url}/model.pt", path, CHECKSUM)
    path.write_bytes(b"something else")
    assert download(f"{server.url}/model.pt", path, CHECKSUM) == path
    assert path.read_bytes() == b"something else"
    assert server.requests == 1


def test_a_connection_that_breaks_twice_goes_on_where_it_broke(serve, path):
    server = serve(faults=[1_000_000, 700_001])
    download(f"{server.url}/model.pt", path, CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-", "bytes=1700001-"]
    assert server.bytes_sent == len(CONTENT)


def test_a_server_that_knows_no_ranges_starts_again(serve, path):
    server = serve(faults=[1_000_000], has_range=False)
    download(f"{server.url}/model.pt", path, CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert server.requests == 2
    assert visible(path.parent) == ["model.pt"]


@pytest.mark.parametrize("status", ["500", "503", "429"])
def test_a_server_that_is_busy_is_asked_again(serve, path, status):
    server = serve(faults=[status])
    download(f"{server.url}/model.pt", path, CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert server.requests == 2


@pytest.mark.parametrize("status", ["401", "403", "404", "410"])
def test_a_file_that_is_not_there_is_told_at_once_with_what_to_put_where(serve, path, status):
    server = serve(faults=[status] * 9)
    with pytest.raises(ValueError, match=status) as caught:
        download(f"{server.url}/model.pt", path, CHECKSUM)
    assert server.requests == 1
    assert f"{server.url}/model.pt" in str(caught.value)
    assert str(path) in str(caught.value)
    assert visible(path.parent) == []


def test_a_server_that_keeps_failing_is_given_up_in_words(serve, path, monkeypatch):
    monkeypatch.setattr(storage, "_WAITS_S", (0.001,))
    server = serve(faults=["500"] * 9)
    with pytest.raises(ValueError, match="500") as caught:
        download(f"{server.url}/model.pt", path, CHECKSUM)
    assert server.requests == 2
    assert str(path) in str(caught.value)


def test_a_server_that_is_not_there_is_told_in_words(path, monkeypatch):
    monkeypatch.setattr(storage, "_WAITS_S", ())
    with Server() as server:
        url = f"{server.url}/model.pt"
    with pytest.raises(ValueError, match="can't be read") as caught:
        download(url, path, CHECKSUM)
    assert str(path) in str(caught.value)


def test_another_content_than_expected_is_thrown_away(serve, path):
    server = serve(content=CONTENT[:-1] + b"?")
    with pytest.raises(ValueError, match="checksum") as caught:
        download(f"{server.url}/model.pt", path, CHECKSUM)
    assert CHECKSUM in str(caught.value)
    assert visible(path.parent) == []


def test_what_had_come_is_kept_for_the_next_try(serve, path, monkeypatch):
    monkeypatch.setattr(storage, "_WAITS_S", ())
    server = serve(faults=[1_234_567])
    with pytest.raises(ValueError, match="1234567 of 3000000"):
        download(f"{server.url}/model.pt", path, CHECKSUM)
    assert not path.exists()
    download(f"{server.url}/model.pt", path, CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1234567-"]
    assert server.bytes_sent == len(CONTENT)


def test_what_had_come_is_kept_when_a_person_interrupts(serve, path, monkeypatch):
    server = serve(faults=[1_000_000])

    def interrupt(_seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            download(f"{server.url}/model.pt", path, CHECKSUM)
    download(f"{server.url}/model.pt", path, CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000000-"]


def test_a_part_that_is_complete_already_is_verified_and_named(serve, path):
    """As when it was killed between the last byte and the name."""
    path.parent.mkdir()
    (path.parent / ".model.pt.part").write_bytes(CONTENT)
    server = serve()
    download(f"{server.url}/model.pt", path, CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert server.bytes_sent == 0


@pytest.mark.parametrize("rubbish", [b"x" * 1000, CONTENT + b"more"], ids=["other", "longer"])
def test_a_part_of_something_else_is_got_rid_of(serve, path, rubbish):
    path.parent.mkdir()
    (path.parent / ".model.pt.part").write_bytes(rubbish)
    server = serve()
    with contextlib.suppress(ValueError):  # the first try may say so
        download(f"{server.url}/model.pt", path, CHECKSUM)
    download(f"{server.url}/model.pt", path, CHECKSUM)
    assert path.read_bytes() == CONTENT
    assert visible(path.parent) == ["model.pt"]


def test_processes_that_want_the_same_file_at_once_fetch_it_once(serve, path):
    server = serve()
    code = "import sys; from pathlib import Path; from miniclip.weights.download import download; "
    code += "print(download(sys.argv[1], Path(sys.argv[2]), sys.argv[3]).read_bytes()[:4])"
    command = [sys.executable, "-c", code, f"{server.url}/model.pt", str(path), CHECKSUM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [warm.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert str(CONTENT[:4]) in out
    assert server.requests == 1
    assert server.bytes_sent == len(CONTENT)


def test_threads_that_want_the_same_file_at_once_fetch_it_once(serve, path):
    server = serve()
    threads = [threading.Thread(target=download, args=(f"{server.url}/model.pt", path, CHECKSUM)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert server.requests == 1
    assert path.read_bytes() == CONTENT


def test_a_download_says_nothing_on_standard_output(serve, path, capsys):
    """Which may be piped into another program."""
    download(f"{serve().url}/model.pt", path, CHECKSUM)
    assert capsys.readouterr().out == ""


# ---- where it is kept


def test_downloads_are_kept_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert openai_folder() == tmp_path / ".cache" / "clip"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert openai_folder() == tmp_path / ".cache" / "clip"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert openai_folder() == tmp_path / "elsewhere" / "clip"
    assert openai_folder(tmp_path / "here") == tmp_path / "here"
    assert openai_folder("~/there") == tmp_path / "there"


# ---- OpenAI's names


@pytest.fixture
def published(tmp_path, serve, monkeypatch):
    """A tiny model in place of OpenAI's ViT-B/32: the server, and what it should compute."""
    reference = openclip_model(TINY_VIT, seed=1)
    content = write_archive(reference, TINY_VIT, tmp_path / "published.pt").read_bytes()
    server = serve(content)
    checksum = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fetch, "OPENAI_BASE_URL", f"{server.url}/clip/models")
    monkeypatch.setitem(fetch.OPENAI_FILES, "ViT-B/32", f"{checksum}/ViT-B-32.pt")
    return server, reference, checksum


def test_an_openai_name_is_fetched_once_and_loaded(published, tmp_path):
    server, reference, checksum = published
    root = tmp_path / "root"
    assert_same_as_openclip("ViT-B/32", reference, TINY_VIT, download_root=root)
    load("ViT-B/32", device="cpu", download_root=str(root))
    assert server.paths == [f"/clip/models/{checksum}/ViT-B-32.pt"]
    assert visible(root) == ["ViT-B-32.pt"]


def test_an_openai_name_goes_to_the_users_cache(published, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load("ViT-B/32", device="cpu")
    assert visible(tmp_path / "xdg" / "clip") == ["ViT-B-32.pt"]


def test_a_file_that_was_put_there_by_hand_needs_no_network(published, tmp_path):
    server, reference, _ = published
    (tmp_path / "root").mkdir()
    os.rename(tmp_path / "published.pt", tmp_path / "root" / "ViT-B-32.pt")
    assert_same_as_openclip("ViT-B/32", reference, TINY_VIT, download_root=tmp_path / "root")
    assert server.requests == 0


def test_every_openai_model_has_an_address_with_its_checksum():
    from miniclip.config import OPENAI_MODELS

    assert fetch.OPENAI_FILES.keys() == OPENAI_MODELS.keys()
    for name, file in fetch.OPENAI_FILES.items():
        expected = name.replace("/", "-").replace("@", "-")
        assert re.fullmatch(rf"[0-9a-f]{{64}}/{re.escape(expected)}\.pt", file)


def test_the_checksums_are_those_that_open_clip_knows():
    from open_clip.pretrained import _PRETRAINED

    for name, file in fetch.OPENAI_FILES.items():
        theirs = name.replace("/", "-").replace("@336px", "-336")
        assert file in _PRETRAINED[theirs]["openai"]["url"]


# ---- hf-hub:owner/name

OFFLINE = """
import sys
from miniclip.weights.load import load
try:
    load(sys.argv[1], device="cpu", download_root=sys.argv[2])
    print("loaded")
except ValueError as error:
    print("refused:", error)
"""


def run_with_hub(name, root, **environment):
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return warm.run(
        [sys.executable, "-c", OFFLINE, name, str(root)], env={**os.environ, **nowhere, **environment}, timeout=300
    )


def write_hub_cache(root, revision="0123456789abcdef0123456789abcdef01234567"):
    folder = root / "models--owner--name"
    hf_model().save_pretrained(folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return folder / "snapshots" / revision


def test_a_hub_model_without_a_network_is_told_with_what_to_do(tmp_path):
    result = run_with_hub("hf-hub:owner/name", tmp_path)
    assert result.stdout.startswith("refused: 'hf-hub:owner/name' can't be had"), result.stderr[-800:]
    assert "copy the model's folder" in result.stdout


@pytest.mark.parametrize("name", ["owner/name@main", "owner/name/model.safetensors", "https://host/owner/name", "ä/b"])
def test_what_the_hub_has_no_names_like_is_told_as_that(name):
    with pytest.raises(ValueError, match=f"'hf-hub:{name}' is no model: a name is hf-hub:owner/name, without a rev"):
        load(f"hf-hub:{name}")


@pytest.mark.sample(1)
@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_model_that_is_cached_needs_no_network(tmp_path, offline):
    write_hub_cache(tmp_path)
    result = run_with_hub("hf-hub:owner/name", tmp_path, HF_HUB_OFFLINE=offline)
    assert result.stdout.strip() == "loaded", result.stdout + result.stderr[-800:]


def test_a_cached_hub_model_is_the_one_that_is_meant(tmp_path):
    folder = write_hub_cache(tmp_path)
    assert fetch_hub("hf-hub:owner/name", tmp_path) == folder


class Hub(http.server.BaseHTTPRequestHandler):
    """The three answers of the hub's API that a download needs."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    refuses: ClassVar[tuple[str, ...]] = ()  # a status and the hub's word for why
    revision = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self):
        path = self.path.partition("?")[0]
        if self.refuses:
            self.answer(b"{}", self.refuses[0], **{"X-Error-Code": self.refuses[1]})
            return
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()
            ]
            self.answer(json.dumps(tree).encode())
            return
        if path.startswith("/api/models/owner/name"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": "owner/name", "sha": self.revision, "siblings": siblings}).encode())
            return
        name = path.partition(f"/resolve/{self.revision}/")[2]
        if self.command == "GET":
            self.asked.append(name)
        self.answer(
            self.files[name],
            **{"X-Repo-Commit": self.revision, "ETag": f'"{hashlib.sha256(name.encode()).hexdigest()}"'},
        )

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def answer(self, body, status="200", **headers):
        self.send_response(int(status))
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def load_from_hub(root):
    server = InBackground()
    server.listen(Hub)
    with server:
        return run_with_hub("hf-hub:owner/name", root, HF_ENDPOINT=server.url)


@pytest.mark.sample(1)
@pytest.mark.parametrize("only_pt", [False, True])
def test_one_copy_of_the_weights_is_fetched_from_the_hub(tmp_path, only_pt):
    """Whichever of the copies that repositories hold for several libraries; and a .pt alone is one, too."""
    hf_model().save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    if only_pt:
        torch.save(safetensors.torch.load(files.pop("model.safetensors")), tmp_path / "model/clip.pt")
        files["clip.pt"] = (tmp_path / "model/clip.pt").read_bytes()
    else:
        files |= dict.fromkeys(("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "flax_model.msgpack"), b"other")
    Hub.files, Hub.asked = files, []
    result = load_from_hub(tmp_path)
    assert result.stdout.strip() == "loaded", result.stdout + result.stderr[-800:]
    weights = [name for name in Hub.asked if not name.endswith((".json", ".txt"))]
    assert weights == (["clip.pt"] if only_pt else ["model.safetensors"])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("status", "word", "told"),
    [
        ("401", "RepoNotFound", "the name is wrong, or it is private"),
        ("404", "RepoNotFound", "the name is wrong, or it is private"),
        ("403", "GatedRepo", "ask on its page"),
        ("401", "GatedRepo", "ask on its page"),
    ],
)
def test_a_repository_that_is_not_for_everyone_is_told_with_what_to_do(tmp_path, monkeypatch, status, word, told):
    """As the hub answers (huggingface_hub.errors)."""
    monkeypatch.setattr(Hub, "refuses", (status, word))
    result = load_from_hub(tmp_path)
    assert told in result.stdout, result.stdout + result.stderr[-800:]
    assert "`hf auth login`" in result.stdout


@pytest.mark.parametrize("name", ["hf-hub:", "hf-hub:a/b/c", "hf-hub:../../etc", "hf-hub:owner/na me", "hf-hub:a--b/c"])
def test_a_name_that_the_hub_can_not_have_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=re.escape(name)):
        fetch_hub(name, tmp_path)
    assert list(Path(tmp_path).iterdir()) == []


def test_a_path_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B").mkdir()
    reference = openclip_model(TINY_VIT, seed=3)
    write_archive(reference, TINY_VIT, tmp_path / "ViT-B" / "32")
    assert_same_as_openclip("ViT-B/32", reference, TINY_VIT)
