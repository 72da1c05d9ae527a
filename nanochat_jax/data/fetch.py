"""Downloads one file: with `huggingface_hub` from the hub, by plain https from anywhere else.

A file takes its name only when it is complete and its checksum has been compared: the SHA-256 of the hub's listing or
of ``shards.json``; for a file that is not in LFS (or Xet), its git blob hash. ``HF_ENDPOINT``, ``HF_TOKEN`` and
``*_proxy`` mean what they mean to the library; ``NANOCHAT_OFFLINE=1`` and ``HF_HUB_OFFLINE=1`` refuse to open a socket.

The library resumes a transfer that breaks off. A process that is killed leaves complete files only: the next one begins
the file that was on its way anew.
"""

import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from nanochat_jax.data.shards import LIST_NAME, Shard
from nanochat_jax.utils import paths
from nanochat_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_ENDPOINT = "https://huggingface.co"
# Beside the files while they are on their way; hidden from everything that reads data.
STAGING = ".download"
# The library has tried again by itself before an error reaches us; this is for answers to a GET that it lets through.
ATTEMPTS = 4
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_TIMEOUT_S = 30.0
_HUB_BASE = re.compile(r"datasets/(.+?)/resolve/([^/]+)(?:/(.*))?")

Result = TypeVar("Result")


class FetchError(UserError, ConnectionError):
    """A file that could not be downloaded; the message names it and the remedy."""


class OfflineError(FetchError):
    """Refused before any socket was opened."""


# --- the hub ----------------------------------------------------------------------------------------------------------


def offline() -> bool:
    """Whether ``NANOCHAT_OFFLINE`` or the library's own ``HF_HUB_OFFLINE`` asks that no socket be opened."""
    return paths.offline() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def refuse_offline(what: str) -> None:
    """Raises OfflineError in offline mode."""
    if offline():
        name = paths.OFFLINE_VARIABLE if paths.offline() else "HF_HUB_OFFLINE"
        raise OfflineError(f"{name} is set, so {what} is not downloaded; unset it, or put the file in place")


def endpoint() -> str:
    """The hub's address: ``HF_ENDPOINT``, or the usual one."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def hub_base(repo: str, folder: str = "", revision: str = "main") -> str:
    """The address, on the hub, of a folder in a data set, as ``ShardList.base`` has it."""
    place = f"datasets/{repo}/resolve/{urllib.parse.quote(revision, safe='')}"
    return f"{place}/{urllib.parse.quote(folder.strip('/'))}" if folder.strip("/") else place


def list_files(repo: str, folder: str = "", revision: str = "main") -> list[Shard]:
    """The parquet files directly in a folder of a data set, by name. Raises FetchError."""
    refuse_offline(f"the list of files of {repo}")
    folder = folder.strip("/")

    api = _library().HfApi(endpoint=endpoint())

    def ask() -> list[Any]:
        return list(api.list_repo_tree(repo, folder or None, revision=revision, repo_type="dataset"))

    entries = _persist(f"the list of files of {repo}{f'/{folder}' if folder else ''} ({revision})", ask)
    files = [entry for entry in entries if hasattr(entry, "blob_id") and entry.path.endswith(".parquet")]
    shards = [
        Shard(file.path.rpartition("/")[2], file.size, *((file.lfs.sha256,) if file.lfs else (None, file.blob_id)))
        for file in files
    ]
    return sorted(shards, key=lambda shard: shard.name)


def _library() -> Any:
    """`huggingface_hub`, which is slow to import, without its own bars and without requests for anything but files."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return huggingface_hub


# --- one file ---------------------------------------------------------------------------------------------------------


def fetch(base: str, wanted: Shard, path: Path) -> Path:
    """Downloads ``wanted`` from the folder ``base`` (on the hub, or any address) to ``path``, unless it is there.

    Safe to call from several threads and processes for the same path: one downloads, the others wait. ``path`` appears
    when the file is complete and its checksum has been compared. Raises FetchError.
    """
    if wanted.is_at(path):
        return path
    place = _HUB_BASE.fullmatch(base)
    if place is None:
        return fetch_url(f"{base}/{urllib.parse.quote(wanted.name)}", path, wanted)
    repo, revision, folder = place[1], urllib.parse.unquote(place[2]), urllib.parse.unquote(place[3] or "")
    name = f"{folder}/{wanted.name}" if folder else wanted.name

    library = _library()

    def get(staging: Path) -> Path:
        options: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "endpoint": endpoint()}
        return Path(library.hf_hub_download(repo, name, local_dir=staging, **options))

    return _land(f"{name} of {repo} ({revision})", path, wanted, get)


def fetch_url(url: str, path: Path, wanted: Shard | None = None) -> Path:
    """The same for a file at any address, with a checksum where one is known."""
    wanted = wanted or Shard(path.name)
    if wanted.is_at(path):
        return path

    def get(staging: Path) -> Path:
        with _open(url) as answer, open(staging / path.name, "wb") as file:
            shutil.copyfileobj(answer, file, 2**20)
            expected = answer.headers.get("Content-Length")
            if expected and file.tell() != int(expected):
                raise OSError(f"the answer ended after {file.tell()} of {expected} bytes")
        return staging / path.name

    return _land(url, path, wanted, get)


def fetch_text(url: str) -> str:
    """The text of a small file. Raises FetchError."""
    refuse_offline(url)

    def get() -> str:
        with _open(url) as answer:
            return answer.read().decode()

    return _persist(url, get)


def _open(url: str) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "nanochat_jax", "Accept-Encoding": "identity"})
    # urllib keeps the proxies of its first call for ever unless an opener is made anew.
    return urllib.request.build_opener().open(request, timeout=_TIMEOUT_S)


def _land(what: str, path: Path, wanted: Shard, get: Callable[[Path], Path]) -> Path:
    """Gives the file that ``get`` makes in a folder of its own the name ``path`` once it has been compared."""
    refuse_offline(f"{path.name} (wanted in {path.parent})")
    staging = path.parent / STAGING / path.name
    staging.parent.mkdir(parents=True, exist_ok=True)
    with paths.lock_file(staging.with_name(path.name + ".lock")):
        if wanted.is_at(path):  # another thread or process was first
            return path
        shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
        staging.mkdir()
        try:
            made = _persist(what, lambda: get(staging))
            compare(made, wanted)
            os.replace(made, path)
            paths.sync_directory(path.parent)
        except OSError as error:
            if paths.is_full(error):
                raise paths.no_space(path, error, wanted.size) from error
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return path


def compare(path: Path, wanted: Shard) -> None:
    """Raises FetchError, and removes the file, unless it has the size and checksum of ``wanted`` (where known)."""
    found: list[tuple[str, Any, Any]] = [("size", path.stat().st_size, wanted.size)]
    if wanted.sha256:
        found.append(("SHA-256", paths.sha256_file(path), wanted.sha256))
    elif wanted.git_sha1:
        found.append(("git blob hash", git_blob_hash(path), wanted.git_sha1))
    for what, is_, should_be in found:
        if should_be not in (None, is_):
            path.unlink()
            raise FetchError(
                f"{wanted.name}: its {what} is {is_} where {should_be} is expected, so it was removed: damaged on the "
                f"way, or the data set has changed (then delete {LIST_NAME}); check HF_ENDPOINT and your proxy, "
                "run again"
            )


def git_blob_hash(path: Path) -> str:
    """What git calls a file's contents: the SHA-1 of "blob <size>", a zero byte and the contents."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _persist(what: str, action: Callable[[], Result]) -> Result:
    """The action's result, after some attempts where the server is in trouble. Raises FetchError in one line."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:  # whatever a library raises belongs to the one who asked for the file
            if isinstance(error, FetchError) or (isinstance(error, OSError) and paths.is_full(error)):
                raise
            status, reason = _status(error), _reason(error)
            if attempt == ATTEMPTS or not _may_pass(error, status):
                raise FetchError(f"cannot download {what}: {reason}") from error
            logger.info("%s: %s; trying again", what, reason)
            time.sleep(2 ** (attempt - 1))
    raise AssertionError("not reached")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error, or what caused it, speaks of."""
    for cause in _chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None) or getattr(cause, "code", None)
        if isinstance(status, int):
            return status
    return None


def _may_pass(error: Exception, status: int | None) -> bool:
    if status is not None:
        return status in _PASSING
    # Of a file that it cannot locate the library has asked five times.
    transport = isinstance(error, OSError | http.client.HTTPException) or type(error).__module__.startswith("httpx")
    return transport and not isinstance(error, FileNotFoundError)


def _reason(error: Exception) -> str:
    status = _status(error)
    if status in (401, 403):
        return f"access denied, or there is no such data set (HTTP {status}); set HF_TOKEN to a token that may read it"
    if status == 404:
        return "there is no such file (HTTP 404); check its name, folder and revision, and HF_ENDPOINT"
    if status is not None:
        return f"HTTP {status}; run again later, what is complete is kept"
    *_, root = _chain(error)
    words = " ".join((str(root) or type(root).__name__).split())
    return f"{words[:300]}; check your connection, HF_ENDPOINT and your proxy, and run again to resume"
