"""An HTTP server on this machine that serves bytes and misbehaves on demand; it keeps what was asked of it."""

import contextlib
import hashlib
import http.server
import json
import socket
import struct
import threading
import time
import urllib.parse
from typing import Any


class WebServer:
    """``files`` by path (or by the last part of it). ``plan``: what is odd about the next answers, one dict each.

    cut=n: the connection ends after n bytes of the body; reset=n: it is reset; stall=n: nothing comes after them;
    length=n: the Content-Length says n; status=s, headers={}; body=b, type=t: something else is sent; ranges=False:
    the whole file whatever was asked; first=n: a part that begins at n whatever was asked; chunked=True: no length;
    change=b: the file becomes b after this answer; crawl=True: a byte every 20 ms.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.plan: list[dict[str, Any]] = []
        self.send_etag = True
        self.open_now = self.most_open = 0
        self.delay = 0.0
        self._lock, self._closing = threading.Lock(), threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                with contextlib.suppress(OSError):
                    outer._head(self)
                self.close_connection = True

            def do_GET(self):
                with outer._lock:
                    outer.open_now += 1
                    outer.most_open = max(outer.most_open, outer.open_now)
                try:
                    outer._answer(self)
                except OSError:
                    pass  # the client is gone
                finally:
                    with outer._lock:
                        outer.open_now -= 1
                    self.close_connection = True

            def log_message(self, format, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]

    def publish_json(self, path: str, value: Any) -> None:
        self.files[path] = json.dumps(value).encode()

    def _head(self, handler) -> None:
        """Nobody asks a plain file server for one."""
        handler.send_error(405)

    def _answer(self, handler) -> None:
        with self._lock:
            self.requests.append((handler.path, dict(handler.headers)))
            odd = self.plan.pop(0) if self.plan else {}
        if self.delay:
            time.sleep(self.delay)
        path = urllib.parse.unquote(handler.path)
        name = path if path in self.files else path.partition("?")[0].rpartition("/")[2]
        status = odd.get("status", 200 if name in self.files or "body" in odd else 404)
        if status != 200:
            return self._send(handler, status, b"", odd.get("headers", {}), {})
        body = odd["body"] if "body" in odd else self.files[name]
        etag = self.etags.get(name, f'"{hash(body) & 0xFFFFFFFF:x}"')
        headers = {"Content-Type": odd.get("type", "application/octet-stream"), **odd.get("headers", {})}
        if self.send_etag:
            headers["ETag"] = etag
        wanted, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        start = odd.get("first", start)
        if not wanted or odd.get("ranges") is False or (condition and condition != etag):
            self._send(handler, 200, body, headers, odd)
        elif start >= len(body):
            self._send(handler, 416, b"", {"Content-Range": f"bytes */{len(body)}"}, {})
        else:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._send(handler, 206, body[start:], headers, odd)
        if "change" in odd:
            self.files[name] = odd["change"]

    def _send(self, handler, status, body, headers, odd) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(status)
        if odd.get("chunked"):
            headers = {**headers, "Transfer-Encoding": "chunked"}
        else:
            headers = {**headers, "Content-Length": str(odd.get("length", len(body)))}
        for key, value in {**headers, "Connection": "close"}.items():
            handler.send_header(key, value)
        handler.end_headers()
        limit = min(odd.get(key, len(body)) for key in ("cut", "reset", "stall"))
        if odd.get("chunked"):
            handler.wfile.write(b"%x\r\n" % len(body) + body[:limit])
            if limit == len(body):
                handler.wfile.write(b"\r\n0\r\n\r\n")
        elif odd.get("crawl"):
            for i in range(limit):
                handler.wfile.write(body[i : i + 1])
                if self._closing.wait(0.02):
                    return
        else:
            handler.wfile.write(body[:limit])
        handler.wfile.flush()
        if "stall" in odd:
            self._closing.wait(30)
        if "reset" in odd:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        elif "cut" in odd:
            with contextlib.suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closing.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


COMMIT = "c0ffee" + "0" * 34


class HubServer(WebServer):
    """As much of the hub as `huggingface_hub` asks for: listings of folders, and files with their commit and ETag.

    ``heads``: the requests for a file's facts; ``plan_heads``: status codes that the next of them get. ``plan`` holds
    for everything else, as in WebServer.
    """

    def __init__(self):
        super().__init__()
        self.heads: list[tuple[str, dict[str, str]]] = []
        self.plan_heads: list[int] = []

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
            handler.protocol_version = "HTTP/1.1"
            handler.send_response(404)
            handler.send_header("X-Error-Code", "EntryNotFound")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content or b"")))
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        handler.send_header("Connection", "close")
        handler.end_headers()

    def _answer(self, handler) -> None:
        handler.path = handler.path.partition("?")[0]
        super()._answer(handler)


def no_real_network(monkeypatch) -> None:
    """An environment in which `huggingface_hub` knows of no proxy, token or home, and waits for nothing."""
    import huggingface_hub

    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "NANOCHAT_OFFLINE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
    ):
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
