"""Fetching a file over HTTP so that it is either whole or resumable, and never opens a socket when told not to.

Proxies come from the usual environment variables (``https_proxy``, ``no_proxy`` ...), as urllib does it.
"""

import contextlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat_jax.paths import OFFLINE_VARIABLE, offline, write_atomic

ATTEMPTS = 5
TIMEOUT_S = 30
_CHUNK = 1024 * 1024
# Answers that may be different in a moment; any other error status is final.
_PASSING = (408, 425, 429, 500, 502, 503, 504)


class FetchError(ConnectionError):
    """A file that could not be fetched; the message names the address and the remedy."""


class OfflineError(FetchError):
    """Refused before any socket was opened, because ``NANOCHAT_OFFLINE`` is set."""


def refuse_offline(what: str) -> None:
    """Raises OfflineError if ``NANOCHAT_OFFLINE`` is set."""
    if offline():
        raise OfflineError(f"{OFFLINE_VARIABLE} is set, so {what} is not fetched; unset it, or put the file in place")


def fetch_file(
    url: str,
    path: Path,
    token: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    wait: float = 1.0,
) -> None:
    """Fetch ``url`` to ``path``; what an earlier attempt got (``path`` + ".part") is kept and gone on from.

    Tries five times, waiting ``wait`` x 1, 2, 4, 8 seconds in between (longer if the server says so). ``token`` is sent
    to the named host only, never to one it redirects to. ``progress(done, total)`` counts bytes, total 0 if unknown.
    Raises FetchError; the destination appears only when it is whole.
    """
    refuse_offline(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            _attempt(url, path, token, progress)
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403):
                raise FetchError(
                    f"{url}: access denied (HTTP {error.code}); set HF_TOKEN to a token that may read it"
                ) from error
            if error.code not in _PASSING:
                raise FetchError(f"{url}: HTTP {error.code} {error.reason}") from error
            problem: Exception = error
            pause = max(wait * 2**attempt, _retry_after(error))
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts, resets, answers cut short
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise
            problem, pause = error, wait * 2**attempt
        if attempt < ATTEMPTS - 1:
            time.sleep(pause)
    raise FetchError(f"{url}: {ATTEMPTS} attempts failed, the last with: {problem}; run again to go on from here")


_DISK_ERRORS = {28, 30, 122, 13}  # no space, read-only, over quota, not permitted: trying again will not help


def fetch_bytes(url: str, timeout: float = TIMEOUT_S) -> bytes:
    """Contents of a small file, one attempt. Raises OfflineError or OSError."""
    refuse_offline(url)
    with _open(url, timeout) as answer:
        return answer.read()


def _open(request: str | urllib.request.Request, timeout: float) -> Any:
    # urllib keeps the proxies of its first call for ever unless an opener is made anew.
    return urllib.request.build_opener().open(request, timeout=timeout)


def _retry_after(error: urllib.error.HTTPError) -> float:
    value = (error.headers.get("Retry-After") or "") if error.headers else ""
    return min(float(value), 60.0) if value.isdigit() else 0.0


def _attempt(url: str, path: Path, token: str | None, progress: Callable[[int, int], None] | None) -> None:
    part, note = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    before = _read_note(note) if part.is_file() else {}
    done = part.stat().st_size if before else 0
    request = urllib.request.Request(url, headers={"User-Agent": "nanochat_jax"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        answer = _open(request, TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing is left to send: the part is whole, or it is not this file's
            error.close()
            if done == before.get("size"):
                _finish(part, note, path)
                return
            part.unlink()
            return _attempt(url, path, token, progress)
        raise
    with answer:
        size, etag = _size_and_tag(answer)
        if done and (answer.status != 206 or size != before.get("size") or etag != before.get("etag")):
            done = 0  # the server sends all of it, or the file has changed
            if answer.status == 206:
                part.unlink()
                raise FetchError("the file has changed on the server")
        write_atomic(note, json.dumps({"size": size, "etag": etag}))
        with open(part, "ab" if done else "wb") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, size or 0)
            file.flush()
            os.fsync(file.fileno())
    if size is not None and done != size:
        raise FetchError(f"the answer ended after {done} of {size} bytes")
    _finish(part, note, path)


def _finish(part: Path, note: Path, path: Path) -> None:
    os.replace(part, path)
    note.unlink(missing_ok=True)


def _read_note(note: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(note.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def _size_and_tag(answer: Any) -> tuple[int | None, str | None]:
    """Size of the whole file and its version tag, from the headers of a full or partial answer."""
    content_range = answer.headers.get("Content-Range")
    if content_range:
        total = content_range.rpartition("/")[2]
        return int(total) if total.isdigit() else None, answer.headers.get("ETag")
    length = answer.headers.get("Content-Length")
    return int(length) if length else None, answer.headers.get("ETag")


_tiktoken_lock = threading.Lock()


def stock_encoding(name: str) -> Any:
    """tiktoken's encoding ``name``, from its cache or fetched (time limit, proxies, offline mode as everywhere here).

    Raises ValueError for an unknown name, FetchError when it is not cached and cannot be fetched.
    """
    import tiktoken
    import tiktoken.load

    with _tiktoken_lock:
        original = tiktoken.load.read_file
        # Its own reader has no time limit and knows nothing of offline mode.
        tiktoken.load.read_file = lambda path: fetch_bytes(path) if "://" in path else original(path)
        try:
            return tiktoken.get_encoding(name)
        except OSError as error:
            raise FetchError(
                f"the encoding {name} is not in tiktoken's cache and cannot be fetched ({error}); load it once with a "
                "network, or point TIKTOKEN_CACHE_DIR to a copy of the cache"
            ) from error
        finally:
            tiktoken.load.read_file = original
