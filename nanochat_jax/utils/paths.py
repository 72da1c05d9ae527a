"""Where things live on disk, and how they get there without ever being seen half written.

Everything the project makes goes below one base directory (``NANOCHAT_BASE_DIR``, default
``~/.cache/nanochat_jax``). A file appears under its final name only when it is complete: it is written beside
its destination, flushed to the disk, then renamed.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeGuard

from nanochat_jax.utils.errors import DISK_FULL, StorageError

logger = logging.getLogger(__name__)

BASE_DIR_VARIABLE = "NANOCHAT_BASE_DIR"
OFFLINE_VARIABLE = "NANOCHAT_OFFLINE"


def base_dir() -> Path:
    """The directory that holds everything the project makes (an absolute path), created if it is missing.

    Raises StorageError, naming the variable, where there is no home directory, or the place cannot be made or used.
    """
    chosen = os.environ.get(BASE_DIR_VARIABLE) or "~/.cache/nanochat_jax"
    path = Path(os.path.expanduser(chosen))
    if path.parts[:1] and path.parts[0].startswith("~"):
        what = "this user has no home directory" if path.parts[0] == "~" else f"there is no home of {path.parts[0]}"
        raise StorageError(f"{what}: set {BASE_DIR_VARIABLE} to a folder that everything may be kept in")
    return _made(path.absolute())


def _made(path: Path) -> Path:
    """A folder of the base directory, created if it is missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise StorageError(f"{path} cannot be used ({why}): set {BASE_DIR_VARIABLE} to a folder of yours") from error
    return path


def check_writable(folder: Path) -> None:
    """Makes sure that files can be written into a folder, which is created if it is missing: to be called before what
    takes long. Raises StorageError where they cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = f"change its permissions, or set {BASE_DIR_VARIABLE} to another folder"
        raise StorageError(f"{folder} cannot be written to ({error.strerror}): {remedy}") from error


def _sub(name: str) -> Path:
    return _made(base_dir() / name)


def tokenizer_dir() -> Path:
    """Directory of the trained tokenizer."""
    return _sub("tokenizer")


def data_dir() -> Path:
    """Directory of downloaded or made text."""
    return _sub("data")


def rows_dir() -> Path:
    """Directory of token rows made from text."""
    return _sub("rows")


def runs_dir() -> Path:
    """Directory of training runs (checkpoints, metrics, reports)."""
    return _sub("runs")


def offline() -> bool:
    """True when ``NANOCHAT_OFFLINE`` asks that no socket be opened."""
    return os.environ.get(OFFLINE_VARIABLE, "").strip().lower() not in ("", "0", "false", "no")


@contextlib.contextmanager
def atomic_writer(path: str | Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """Open a binary file that takes the name ``path`` only if the block ends without an error.

    The bytes are flushed to the disk before the rename, and the rename itself is made durable by flushing the
    directory, so that after a power cut there is either the old file or the whole new one. On any error the
    temporary file is removed and the old file is untouched. Where the disk is full that is an OSError which names the
    file, the space needed (``size`` in bytes, where the caller knows it), the space there is, and the remedy.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_full(error) and error.filename in (None, str(temporary)):
            raise no_space(path, error, size) from error
        raise
    sync_directory(path.parent)


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether the operating system says that a disk, or somebody's share of it, is full."""
    return isinstance(error, OSError) and error.errno in DISK_FULL and error.strerror is not None


def no_space(path: Path, error: OSError, size: int | None) -> OSError:
    """What to raise instead of ``error`` where ``path`` could not be written. It has the same errno, so that a caller
    who knows more can still say it better."""
    needed = f"{_amount(size)} needed, " if size is not None else ""
    free = ""
    with contextlib.suppress(OSError):
        free = f"{_amount(shutil.disk_usage(path.parent).free)} free"
    clear = StorageError(
        f"no space for {path} ({needed}{free}; {error.strerror}): free some space on that disk, then run the same "
        "command again. What was there before is whole"
    )
    clear.errno = error.errno
    return clear


def _amount(n: int) -> str:
    return f"{n:,} bytes" if n < 10_000 else f"{n / 1e6:,.2f} MB" if n < 1e9 else f"{n / 1e9:,.2f} GB"


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    # Some systems (Windows, a few network file systems) cannot flush a directory; the rename is still atomic there.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make everything in a folder durable."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_directory(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_directory(folder)


def lock_file(path: str | Path, wait: bool = True) -> IO[bytes]:
    """Open ``path`` and hold it exclusively until the file is closed (or the process ends, however it ends).

    While another process holds it: waits, and says so, or raises BlockingIOError at once if ``wait`` is false.
    """
    file = open(path, "wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            file.close()
            raise
        logger.warning("another process is at work in %s; waiting for it", Path(path).parent)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a whole file (text as UTF-8) so that it is never seen half written."""
    content = data.encode("utf-8") if isinstance(data, str) else data
    with atomic_writer(path, len(content)) as file:
        file.write(content)


def sha256_hex(*parts: bytes) -> str:
    """Hexadecimal SHA-256 of the concatenation of ``parts``."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
