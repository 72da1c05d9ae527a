"""Fetching a file over HTTP so that it is either whole or resumable, and never opens a socket when told not to.

A file that is under way lies in ``<name>.part``; ``<name>.part.json`` beside it says which version of the file these
bytes belong to (address, size, ETag or date of change, expected SHA-256). Bytes are only ever put behind bytes of the
same version: the server is asked for the rest *if* the version still holds (``If-Range``), and its answer is checked
again. The part is locked while somebody works on it, so several processes may ask for the same file: one fetches, the
others wait and find it there.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from nanochat_jax.data import web
from nanochat_jax.data.web import FetchError, FinalError, Stopped, refuse_offline
from nanochat_jax.utils.errors import DISK_FULL
from nanochat_jax.utils.paths import sha256_file, sync_directory, write_atomic

logger = logging.getLogger(__name__)

# An answer that gives fewer bytes in web.TIMEOUT_S is as good as none: let another connection try.
_CRAWL_BYTES = 32 * 1024
_CHUNK = 1024 * 1024
_SPARE_BYTES = 16 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a file must be: its size in bytes and SHA-256 where they are known, and a last look at it.

    ``check(path)`` is called with the whole file before it takes its name; it raises FetchError for a wrong one.
    """

    size: int | None = None
    sha256: str | None = None
    check: Callable[[Path], None] | None = None


def fetch_file(
    url: str,
    path: Path,
    token: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    wait: float = 1.0,
    wanted: Wanted | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Fetch ``url`` to ``path``, unless it is there; what an earlier attempt got is kept and gone on from.

    Gives up after five attempts in a row that got nowhere, with ``wait`` x 1, 2, 4, 8 seconds in between (a quarter
    more or less by chance; longer if the server says so). ``token`` is sent to the named host only, never to one it
    redirects to. ``progress(done, total)`` counts bytes, total 0 if unknown. Safe to call from several threads and
    processes for the same file. Raises FetchError (Stopped when ``stop`` is set); the destination appears only when it
    is whole and as ``wanted``.
    """
    refuse_offline(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(path) as part:
        if part is None:
            return
        transfer = _Transfer(url, path, part, token, progress, wanted or Wanted(), stop)
        try:
            web.persist(url, transfer.attempt, wait, stop, transfer.gained)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise _no_space(path, transfer.size) from error


# --- one file ---------------------------------------------------------------------------------------------------------


def part_of(path: Path) -> Path:
    """Where a file lies while it is under way."""
    return path.with_name(path.name + ".part")


def _note_of(path: Path) -> Path:
    return path.with_name(path.name + ".part.json")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[IO[bytes] | None]:
    """The part of ``path``, open for appending and locked; None if the file is there, perhaps since a moment ago."""
    part = part_of(path)
    while True:
        if path.is_file():
            yield None
            return
        with open(part, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process is fetching %s; waiting for it", path)
                fcntl.flock(file, fcntl.LOCK_EX)
            # While this one waited the part may have become the file, or been removed: then this is not it any more.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                    yield file
                    return


@dataclasses.dataclass
class _Transfer:
    """One file on its way."""

    url: str
    path: Path
    part: IO[bytes]
    token: str | None
    progress: Callable[[int, int], None] | None
    wanted: Wanted
    stop: threading.Event | None
    size: int | None = None  # as far as it is known
    spoilt: int = 0  # whole files thrown away
    _gained: int = 0

    def gained(self) -> int:
        return self._gained

    def attempt(self) -> None:
        """Asks for what is missing, appends it, and gives the whole file its name."""
        self._gained = 0
        note = _read_note(_note_of(self.path))
        done = self._size()
        if done and not self._may_go_on(note):
            self._drop()
            done = 0
        if done and done == (self.wanted.size or note.get("size")):
            return self._finish()
        request = web.request_for(self.url, self.token)
        if done:
            request.add_header("Range", f"bytes={done}-")
            if note.get("url") == self.url and note.get("version"):
                request.add_header("If-Range", note["version"])
        try:
            answer = web.open_answer(request, web.TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code == 416 and done:  # there is nothing behind our bytes: they are not this file's
                error.close()
                self._drop()
                raise FetchError("the file has changed on the server") from error
            raise
        with answer:
            self._take(answer, note, done)
        self._finish()

    def _may_go_on(self, note: dict[str, Any]) -> bool:
        """Whether the bytes at hand are known to be the beginning of the file that is wanted now."""
        if self.wanted.sha256:  # then the end will tell
            return note.get("sha256") == self.wanted.sha256
        return note.get("url") == self.url and bool(note.get("version"))

    def _take(self, answer: Any, note: dict[str, Any], done: int) -> None:
        if (coding := answer.headers.get("Content-Encoding") or "identity") != "identity":
            raise FinalError(f"{self.url}: it came compressed ({coding}) though nobody asked for it; check your proxy")
        size, version = _size_and_version(answer)
        if done and answer.status == 206:
            first = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
            same = version == note.get("version") or note.get("url") != self.url
            if first != str(done) or size != note.get("size") or not same:
                self._drop()
                raise FetchError("the file has changed on the server")
        elif answer.status == 200:
            self._drop()  # the server sends all of it, because it always does or because the file has changed
            done = 0
        else:
            raise FetchError(f"an unexpected answer, HTTP {answer.status}")
        if size is not None and self.wanted.size is not None and size != self.wanted.size:
            kind = answer.headers.get("Content-Type") or "no type"
            raise FinalError(
                f"{self.url}: the server has {size} bytes ({kind}) where {self.wanted.size} are expected; the file has "
                "changed, or HF_ENDPOINT or a proxy gives another one"
            )
        self.size = size = self.wanted.size if self.wanted.size is not None else size
        facts = {"url": self.url, "size": size, "version": version, "sha256": self.wanted.sha256}
        write_atomic(_note_of(self.path), json.dumps(facts))
        if size is not None and shutil.disk_usage(self.path.parent).free < size - done + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._copy(answer, done, size)

    def _copy(self, answer: Any, done: int, size: int | None) -> None:
        since, lately = time.monotonic(), 0
        while chunk := answer.read1(_CHUNK):
            self.part.write(chunk)
            self.part.flush()
            done += len(chunk)
            self._gained += len(chunk)
            if self.progress is not None:
                self.progress(done, size or 0)
            if self.stop is not None and self.stop.is_set():
                raise Stopped("stopped")
            lately += len(chunk)
            if (elapsed := time.monotonic() - since) >= web.TIMEOUT_S:
                if lately < _CRAWL_BYTES:
                    raise FetchError(f"only {lately} bytes in {elapsed:.0f} s")
                since, lately = time.monotonic(), 0
        if size is not None and done != size:
            if done > size:
                self._drop()
            raise FetchError(f"the answer ended after {done} of {size} bytes")

    def _finish(self) -> None:
        os.fsync(self.part.fileno())
        part = part_of(self.path)
        try:
            if self.wanted.sha256 and (found := sha256_file(part)) != self.wanted.sha256:
                raise FetchError(
                    f"its SHA-256 is {found[:12]}..., not {self.wanted.sha256[:12]}...: damaged on the way or changed "
                    "on the server"
                )
            if self.wanted.check is not None:
                self.wanted.check(part)
        except FetchError as error:
            self._drop()
            self._gained = 0
            self.spoilt += 1
            if self.spoilt > 1 or not self.wanted.sha256:
                raise FinalError(f"{self.url}: {error}") from error
            raise
        os.replace(part, self.path)
        sync_directory(self.path.parent)
        _note_of(self.path).unlink(missing_ok=True)

    def _size(self) -> int:
        return os.fstat(self.part.fileno()).st_size

    def _drop(self) -> None:
        """Back to nothing. The note goes first: bytes without one are never continued."""
        _note_of(self.path).unlink(missing_ok=True)
        self.part.truncate(0)


def _no_space(path: Path, size: int | None) -> FinalError:
    kept, free = part_of(path).stat().st_size, shutil.disk_usage(path.parent).free
    needed = f"{(size - kept) / 2**20:,.0f} MiB are missing" if size else "its size is unknown"
    return FinalError(
        f"no space for {path}: {needed}, {free / 2**20:,.0f} MiB are free. {kept / 2**20:,.0f} MiB are kept; free some "
        "space and run again to go on from there, or set NANOCHAT_BASE_DIR to a larger disk"
    )


def _read_note(note: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(note.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}


def _size_and_version(answer: Any) -> tuple[int | None, str | None]:
    """Size of the whole file and what tells its versions apart, from the headers of a full or partial answer.

    A weak ETag promises nothing about single bytes (RFC 9110, 8.8.1), so the date of change is better then.
    """
    etag = answer.headers.get("ETag")
    version = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
    content_range = answer.headers.get("Content-Range")
    if content_range:
        total = content_range.rpartition("/")[2]
        return int(total) if total.isdigit() else None, version
    length = answer.headers.get("Content-Length") or ""
    return int(length) if length.isdigit() else None, version
