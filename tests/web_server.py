"""HTTP servers on this machine that misbehave on demand and keep what was asked of them: one for files, one that
speaks as much of the hub's language as we need, and one that stands in for `nanochat_jax.serve` before the chat page.
"""

import contextlib
import hashlib
import http.server
import json
import select
import socket
import struct
import threading
import time
import urllib.parse
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from nanochat_jax.serve import page


class LocalServer:
    """Answers each request in a thread of its own, by `_get`, `_head` or `_post`, and closes the connection."""

    def __init__(self, port: int = 0):
        self.open_now = self.most_open = 0
        self._lock, self._closing = threading.Lock(), threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self):
                with outer._lock:
                    outer.open_now += 1
                    outer.most_open = max(outer.most_open, outer.open_now)
                with contextlib.suppress(OSError):  # the client is gone
                    super().handle_one_request()
                with outer._lock:
                    outer.open_now -= 1
                self.close_connection = True

            def do_HEAD(self):
                outer._head(self)

            def do_GET(self):
                outer._get(self)

            def do_POST(self):
                outer._post(self)

            def log_message(self, format, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass

        self.http = Server(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def _get(self, handler) -> None:
        handler.send_error(405)

    _head = _post = _get

    def _send(self, handler, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        """An answer with the whole body, or only the beginning of one of `length` bytes."""
        handler.send_response(status)
        length = len(body) if length is None else length
        for key, value in {**headers, "Content-Length": str(length), "Connection": "close"}.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(body)

    def _reset(self, handler) -> None:
        """Ends the connection so that the client sees an error."""
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    def close(self) -> None:
        self._closing.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


# --- files and the hub ------------------------------------------------------------------------------------------------


class WebServer(LocalServer):
    """``files`` by path (or by the last part of it). ``plan``: what is odd about the next answers, one dict each.

    cut=n: the connection ends after n bytes of the body; reset=n: it is reset; stall=n: nothing comes after them;
    status=s: that, and no body.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.plan: list[dict[str, Any]] = []
        self.delay = 0.0
        super().__init__()

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]

    def publish_json(self, path: str, value: Any) -> None:
        self.files[path] = json.dumps(value).encode()

    def _get(self, handler) -> None:
        path = urllib.parse.unquote(handler.path)
        with self._lock:
            self.requests.append((handler.path, dict(handler.headers)))
            odd = self.plan.pop(0) if self.plan else {}
        time.sleep(self.delay)
        name = path if path in self.files else path.partition("?")[0].rpartition("/")[2]
        status = odd.get("status", 200 if name in self.files else 404)
        if status != 200:
            return self._send(handler, status, b"", {})
        body, headers = self.files[name], {"Content-Type": "application/octet-stream"}
        if wanted := handler.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[start:]
        limit = min(odd.get(key, len(body)) for key in ("cut", "reset", "stall"))
        self._send(handler, status, body[:limit], headers, len(body))
        if "stall" in odd:
            self._closing.wait(30)
        if "reset" in odd:
            self._reset(handler)
        elif "cut" in odd:
            handler.connection.shutdown(socket.SHUT_RDWR)


COMMIT = "c0ffee" + "0" * 34


class HubServer(WebServer):
    """As much of the hub as `huggingface_hub` asks for: listings of folders, and files with their commit and ETag.

    ``heads``: the requests for a file's facts; ``plan_heads``: status codes that the next of them get. ``plan`` holds
    for everything else, as in WebServer.
    """

    def __init__(self):
        self.heads: list[tuple[str, dict[str, str]]] = []
        self.plan_heads: list[int] = []
        super().__init__()

    def publish(
        self, repo: str, files: dict[str, bytes], folder: str = "", revision: str = "main", lfs: bool = True
    ) -> None:
        """Files of a data set's folder and the hub's listing of it."""
        start = f"{folder}/" if folder else ""
        entries: list[dict[str, Any]] = [{"type": "directory", "oid": "2" * 40, "path": f"{start}more", "size": 0}]
        for name, content in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "oid": blob, "size": len(content), "path": start + name}
            if lfs:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            entries.append(entry)
            self.files[f"/datasets/{repo}/resolve/{revision}/{start}{name}"] = content
        self.publish_json(f"/api/datasets/{repo}/tree/{revision}{f'/{folder}' if folder else ''}", entries)

    def downloads(self) -> list[str]:
        """Names of the files that were asked for, in order."""
        return [path.rpartition("/")[2] for path in self.paths() if "/resolve/" in path]

    def _head(self, handler) -> None:
        with self._lock:
            self.heads.append((handler.path, dict(handler.headers)))
            status = self.plan_heads.pop(0) if self.plan_heads else 200
        content = self.files.get(urllib.parse.unquote(handler.path))
        if status == 200 and content is None:
            return self._send(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content or b"").hexdigest()
        self._send(handler, status, b"", {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, len(content or b""))

    def _get(self, handler) -> None:
        handler.path = handler.path.partition("?")[0]
        super()._get(handler)


def no_real_network(monkeypatch) -> None:
    """An environment in which `huggingface_hub` knows of no proxy, token or home, and waits for nothing."""
    import huggingface_hub

    names = "http_proxy https_proxy all_proxy no_proxy NANOCHAT_OFFLINE HF_HUB_OFFLINE HF_TOKEN"
    for name in names.split():
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")
    huggingface_hub.close_session()  # it keeps the proxies of its first request
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "nanochat_jax.data.fetch"):
        monkeypatch.setattr(f"{module}.time", NoWaiting())


class NoWaiting:
    """The module `time`, in which nobody sleeps."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        pass


# --- the chat page ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A call of the calculator and its result."""

    expression: str
    result: str | None


@dataclass(frozen=True)
class Die:
    """The connection breaks off here."""


@dataclass(frozen=True)
class Raw:
    """Bytes as they are, in a network packet of their own."""

    data: bytes


@dataclass(frozen=True)
class Fail:
    """An HTTP error in place of a stream (`status`), or an error event in the middle of one (status 0)."""

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        error = {"message": self.message, "type": "error", "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()


class Gate(threading.Event):
    """The stream waits here until the test opens it."""

    open = threading.Event.set


Step = str | Tool | Die | Raw | Fail | Gate


class PageServer(LocalServer):
    """What the chat page talks to: `script(...)` queues the answer to a request, misbehaviour included.

    ``requests``: the bodies that the page sent; ``cancelled``: how many answers it hung up on; while ``answering`` is
    cleared, the server takes connections and says nothing. The wire format is that of `nanochat_jax.serve`, with which
    test_page_server.py tests the page too.
    """

    def __init__(self, port: int = 0):
        self._streams = 0  # that have not ended
        self.reset()
        super().__init__(port)

    def reset(self) -> None:
        """Forgets everything; for the next test, whose page has not asked anything yet."""
        end = time.monotonic() + 20
        while self._streams:
            assert time.monotonic() < end, "a stream of the test before has not ended"
            time.sleep(0.005)
        self.model: dict[str, Any] = {"stage": "sft", "step": 300, "chat": True, "context_length": 256, "defaults": {}}
        self.usage = {"prompt_tokens": 40, "completion_tokens": 20}
        self.finish_reason, self.health, self.cancelled = "stop", 200, 0
        self.warmed_up = 1.0
        self.api_key: str | None = None
        self.requests: list[dict[str, Any]] = []
        self._scripts: deque[tuple[Step, ...]] = deque()
        self.answering = threading.Event()
        self.answering.set()

    def script(self, *steps: Step) -> None:
        self._scripts.append(steps)

    def _get(self, handler) -> None:
        self.answering.wait()
        if handler.path == "/":
            html, policy = page.load()
            headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}
            self._send(handler, 200, html, headers)
        elif handler.path == "/health":
            status = "ok" if self.warmed_up == 1 else "warming up"
            health = {"status": status, "model": "tiny-sft", "step": self.model["step"], "warmed_up": self.warmed_up}
            self._json(handler, self.health if self.warmed_up == 1 else 503, health)
        elif handler.path == "/v1/models" and self._admits(handler):
            self._json(handler, 200, {"object": "list", "data": [{"id": "tiny-sft", "object": "model", **self.model}]})
        elif handler.path != "/v1/models":
            self._send(handler, 404, b"", {})

    def _json(self, handler, status: int, value: Any) -> None:
        self._send(handler, status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, handler, fail: Fail) -> None:
        self._send(handler, fail.status, fail.body(), {**fail.headers, "Content-Type": "application/json"})

    def _admits(self, handler) -> bool:
        if self.api_key is None or handler.headers.get("authorization") == f"Bearer {self.api_key}":
            return True
        self._fail(handler, Fail(401, "a key is needed", "invalid_api_key"))
        return False

    def _post(self, handler) -> None:
        self.answering.wait()
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if not self._admits(handler):
            return
        self.requests.append(body)
        steps = self._scripts.popleft() if self._scripts else ("An answer.",)
        if isinstance(steps[0], Fail) and steps[0].status:
            return self._fail(handler, steps[0])
        with self._lock:
            self._streams += 1
        try:
            self._stream(handler, steps)
        finally:
            with self._lock:
                self._streams -= 1

    def _stream(self, handler, steps: tuple[Step, ...]) -> None:
        handler.send_response(200)
        headers = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked", "Connection": "close"}
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        chat = handler.path == "/v1/chat/completions"

        def write(data: bytes) -> None:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        def event(data: Any) -> None:
            write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())

        def choice(text: str, finish_reason: str | None = None, **more: Any) -> None:
            said = {"delta": {"content": text, **more}} if chat else {"text": text}
            event({"choices": [{"index": 0, "finish_reason": finish_reason, **said}], "model": "tiny-sft"})

        choice("", role="assistant")
        open_call = False
        for step in steps:
            if isinstance(step, Gate):
                if not self._opened(step, handler):
                    return
            elif isinstance(step, Die):
                return self._reset(handler)
            elif isinstance(step, Raw):
                write(step.data)
                time.sleep(0.03)
            elif isinstance(step, Fail):
                write(b"data: %s\n\n" % step.body())
                return write(b"")
            elif isinstance(step, Tool):
                choice(f"<{step.expression}", tool={"call": step.expression})
                if step.result is not None:
                    choice(f"={step.result}>", tool={"result": step.result})
                open_call = step.result is None
            else:
                choice(">" + step if open_call else step)
                open_call = False
        choice("", self.finish_reason)
        event({"choices": [], "usage": self.usage})
        write(b"data: [DONE]\n\n")
        write(b"")  # the last chunk

    def _opened(self, gate: Gate, handler) -> bool:
        """Waits for the gate; False when the client has hung up, or this server is closed."""
        while not gate.is_set():
            if self._closing.is_set():
                self._reset(handler)
                return False
            if select.select([handler.connection], [], [], 0.01)[0]:
                self.cancelled += 1
                return False
        return True
