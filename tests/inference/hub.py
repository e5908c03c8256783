"""A hub on the loopback: as much of Hugging Face's API as uploads and downloads need. It fails on request."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field

from servers import InBackground


@dataclass
class Repository:
    """Commits, the newest last: the files of each by name."""

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def sha(self, number: int = -1) -> str:
        return hashlib.sha1(repr((len(self.commits[: number % len(self.commits) + 1]), number)).encode()).hexdigest()


class Hub(InBackground):
    """Answers at `url`. Files above 1,000 bytes go the way of large ones: their bytes first, a reference in the commit.

    `fault` maps a request's method and path to a status, or to None for a sound answer.
    """

    token = "hf_loopback"

    def __init__(self, fault=lambda method, path: None):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by their SHA-256
        self.requests: list[tuple[str, str]] = []
        self.fault = fault
        hub, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(handler):  # noqa: N805
                body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
                path = handler.path.partition("?")[0]
                with lock:
                    hub.requests.append((handler.command, path))
                    status = hub.fault(handler.command, path)
                    found = (status, b"{}", {}) if status else hub.answer(handler, path, body)
                status, content, headers = found
                handler.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    handler.send_header(name, value)
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                if handler.command != "HEAD":
                    handler.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

            def log_message(handler, *_):  # noqa: N805
                pass

        self.listen(Handler)

    def answer(self, handler, path, body):
        is_writing = handler.command != "GET" and handler.command != "HEAD" and not path.startswith("/lfs/")
        if is_writing and handler.headers.get("Authorization") != f"Bearer {self.token}":
            return 401, b'{"error": "Invalid username or password."}', {}
        if path == "/api/validate-yaml":
            return 200, b'{"errors": [], "warnings": []}', {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            is_new = name not in self.repositories
            self.repositories.setdefault(name, Repository())
            return (200 if is_new else 409), json.dumps({"url": f"{self.url}/{name}"}).encode(), {}
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            self.objects[found[1]] = body
            return 200, b"{}", {}
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return 200, json.dumps(self.batch(json.loads(body))).encode(), {}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/.*)?", path):
            if found[1] not in self.repositories:
                return 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
            return self.of_repository(self.repositories[found[1]], found[1], found[2] or "", body)
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(self.repositories[found[1]], found[3])
        return 404, b"{}", {}

    def batch(self, asked):
        objects = []
        for each in asked["objects"]:
            action = {"actions": {"upload": {"href": f"{self.url}/lfs/{each['oid']}", "header": {}}}}
            objects.append({**each, **({} if each["oid"] in self.objects else action)})
        return {"transfer": "basic", "objects": objects}

    def of_repository(self, repository, name, rest, body):
        if rest.startswith("/preupload/"):
            files = []
            for each in json.loads(body)["files"]:
                mode = "lfs" if each["size"] > 1000 else "regular"
                oid = oid_of(repository.files[each["path"]]) if each["path"] in repository.files else None
                files.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return 200, json.dumps({"files": files}).encode(), {}
        if rest.startswith("/commit/"):
            files = dict(repository.files)
            for line in body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
            repository.commits.append(files)
            sha = repository.sha()
            return 200, json.dumps({"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha}).encode(), {}
        if rest.startswith("/tree/"):
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": git_blob(data)}
                for file, data in repository.files.items()
            ]
            return 200, json.dumps(tree).encode(), {}
        siblings = [sibling(file, data) for file, data in repository.files.items()]
        return 200, json.dumps({"id": name, "sha": repository.sha(), "siblings": siblings}).encode(), {}

    def resolve(self, repository, file):
        if file not in repository.files:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        data = repository.files[file]
        return 200, data, {"X-Repo-Commit": repository.sha(), "ETag": f'"{oid_of(data)}"'}


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if len(data) > 1000 else git_blob(data)


def sibling(file: str, data: bytes) -> dict[str, object]:
    found: dict[str, object] = {"rfilename": file, "size": len(data), "blobId": git_blob(data)}
    if len(data) > 1000:
        found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return found
