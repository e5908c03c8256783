"""A loopback server that fails on request."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading

PIECE = 100_000


class _ManyAtOnce(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # of more than Python's 5 that ask at once some ask again after 1, 2, 4, 8, … seconds
    daemon_threads = True
    block_on_close = False


class InBackground:
    """Its `http` answers on the loopback, at `url`, while the context lasts."""

    def listen(self, handler) -> None:
        self.http = _ManyAtOnce(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


class Server(InBackground):
    """Serves `files` by path, in pieces, each after a call of `before` with its first byte.

    `fault` maps a request's number to a status, or after how many bytes to hang up. `etags` are sent by path, and no
    length is where `has_length` is False. `refusal` is the status of what is not there. Parts begin `shift` bytes
    later than asked for.
    """

    def __init__(self, files, has_range=True, fault=lambda number: None, before=lambda path, start: None):
        self.files, self.has_range, self.fault, self.before = files, has_range, fault, before
        self.gets, self.heads, self.headers, self.has_head = [], [], [], True
        self.etags, self.has_length, self.refusal, self.shift = {}, True, 404, 0
        lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(handler):  # noqa: N805
                with lock:
                    self.heads.append(handler.path)
                    fault = self.fault(len(self.heads) - 1) if self.has_head else 501
                self.answer(handler, fault, None, has_body=False)

            def do_GET(handler):  # noqa: N805
                with lock:
                    asked = handler.headers.get("Range")
                    self.gets.append((handler.path, asked))
                    self.headers.append(handler.headers)
                    fault = self.fault(len(self.gets) - 1)
                self.answer(handler, fault, asked, has_body=True)

            def log_message(handler, *_):  # noqa: N805
                pass

        self.listen(Handler)

    def answer(self, handler, fault, asked, has_body):
        content = self.files.get(handler.path.partition("?")[0])
        start, end = 0, len(content or b"") - 1
        if asked and self.has_range:
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
            start, end = int(found[1]) + self.shift, min(int(found[2] or end), end)
        status = fault if fault in (403, 429, 500, 501, 503) else self.refusal if content is None else 200
        if status == 200 and asked and self.has_range:
            status = 206 if start <= end else 416
        body = content[start : end + 1] if status in (200, 206) else b"no"
        handler.send_response(status)
        if self.has_length:
            handler.send_header("Content-Length", str(len(body)))
        handler.close_connection = handler.close_connection or not self.has_length
        if etag := self.etags.get(handler.path.partition("?")[0]):
            handler.send_header("ETag", etag)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        handler.end_headers()
        if has_body:
            is_cut = fault is not None and status in (200, 206)
            body = body[:fault] if is_cut else body
            with contextlib.suppress(ConnectionError):
                for first in range(0, len(body), PIECE):
                    self.before(handler.path, start + first)
                    handler.wfile.write(body[first : first + PIECE])
            handler.close_connection = handler.close_connection or is_cut
