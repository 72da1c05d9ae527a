"""Rows on disk: shards of a 2-D array, a manifest that makes them valid, the writer that fills a directory, the reader.

    rows_00000.npy   (n, T+1) uint16, or uint32 above 65,536 tokens; memory-mapped by readers
    mask_00000.npy   (n, T+1) uint8, only where rows carry a loss mask: 1 = the token is trained on
    manifest.json    written last: what the rows were made from, and name, size and SHA-256 of every file
    progress.json    only while building: the shards that are complete, and where to resume

A shard appears under its name only when it is complete, and counts once ``progress.json`` or the manifest lists it.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np

from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import DISK_FULL, UserError
from nanochat_jax.utils.paths import atomic_writer, lock_file, sha256_file, sha256_hex, write_atomic

logger = logging.getLogger(__name__)

ROWS_FORMAT, ROWS_VERSION = "nanochat_jax.rows", 1
SHARD_BYTES = 64 * 1024 * 1024
MANIFEST, PROGRESS, LOCK = "manifest.json", "progress.json", "build.lock"
_SPARE_BYTES = 16 * 1024 * 1024


class RowsError(UserError, ValueError):
    """Rows that cannot be made or read; the message names the place and the remedy."""


def row_dtype(vocab_size: int) -> np.dtype:
    """Little-endian uint16 where every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


def shard_rows(T: int, dtype: np.dtype) -> int:
    """How many rows of T+1 tokens a shard has, unless told. Raises RowsError for T below 1."""
    if T < 1:
        raise RowsError(f"a row of T = {T} tokens is too short; T must be 1 or more")
    return max(1, SHARD_BYTES // ((T + 1) * dtype.itemsize))


def identity_key(identity: dict[str, Any]) -> str:
    """SHA-256 of a JSON-able identity."""
    return sha256_hex(json.dumps(identity, sort_keys=True).encode())


# --- writing ---------------------------------------------------------------------------------------------------------


class _HashingFile:
    """A file to write to that knows the SHA-256 of what went through it."""

    def __init__(self, file: IO[bytes]):
        self._file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


class RowWriter:
    """Fills a directory with shards of rows, and resumes where an interrupted writer stopped.

    Use as a context manager; a second process that wants the same directory waits. ``identity`` (JSON-able) says what
    the rows are made from: shards left by a writer with another identity are discarded. After entering, ``complete``
    tells that there is nothing to do and ``state`` is what the last ``commit`` was given (None at first).
    ``add`` takes rows up to the end of a shard; when ``full``, call ``commit`` with the state from which the rows that
    follow can be rebuilt. ``finish`` writes the last shard and the manifest.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: dict[str, Any],
        T: int,
        dtype: np.dtype,
        masked: bool = False,
        rows_per_shard: int | None = None,
    ):
        self.directory, self.identity, self.T = Path(directory), identity, T
        self._dtype, self._masked = np.dtype(dtype), masked
        self._rows_per_shard = rows_per_shard or shard_rows(T, self._dtype)
        self._shards: list[dict[str, Any]] = []
        self._filled = 0
        self._rows = self._masks = np.empty((0, T + 1), self._dtype)
        self.state: Any = None
        self.complete = False
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> "RowWriter":
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self.directory / LOCK)
        except OSError as error:
            raise RowsError(
                f"cannot write rows to {self.directory} ({error}); choose another base directory"
            ) from error
        for leftover in self.directory.glob("*.tmp"):
            leftover.unlink()
        self.complete = (self.directory / MANIFEST).is_file()
        if not self.complete:
            self._resume()
            self._rows = np.empty((self._rows_per_shard, self.T + 1), self._dtype)
            if self._masked:
                self._masks = np.empty((self._rows_per_shard, self.T + 1), np.uint8)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()  # this releases the lock
            self._lock = None

    def _resume(self) -> None:
        path = self.directory / PROGRESS
        if not path.is_file():
            return
        try:
            progress = json.loads(path.read_text(encoding="utf-8"))
            state = progress["resume_at"]  # "state" was that of an earlier program, which had another form
            intact = progress["identity"] == json.loads(json.dumps(self.identity))
            for shard in progress["shards"]:
                for file in shard["files"].values():
                    intact = intact and (self.directory / file["name"]).stat().st_size == file["size"]
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s cannot be resumed (%s); starting over", path, error)
            return
        if not intact:
            logger.warning("%s belongs to other rows; starting over", path)
            return
        self._shards, self.state = progress["shards"], state

    @property
    def rows(self) -> int:
        """Rows taken so far, those of earlier runs included."""
        return sum(shard["rows"] for shard in self._shards) + self._filled

    @property
    def space(self) -> int:
        """How many rows the current shard still takes."""
        return self._rows_per_shard - self._filled

    @property
    def full(self) -> bool:
        """Whether the current shard must be committed before more rows are added."""
        return self.space == 0

    def add(self, rows: np.ndarray, masks: np.ndarray | None = None) -> int:
        """Takes rows (n, T+1), and their masks where the rows are masked, up to the shard's end; returns how many."""
        if self._masked != (masks is not None):
            raise ValueError("masks must be given for masked rows, and only for them")
        count = min(len(rows), self.space)
        place = slice(self._filled, self._filled + count)
        self._rows[place] = rows[:count]
        if masks is not None:
            self._masks[place] = masks[:count]
        self._filled += count
        return count

    def commit(self, state: Any) -> None:
        """Writes the current shard, then the note that it is complete and that ``state`` comes next."""
        self._close_shard()
        self.state = state
        progress = {"identity": self.identity, "shards": self._shards, "resume_at": state}
        self._guarded(PROGRESS, 0, lambda: write_atomic(self.directory / PROGRESS, json.dumps(progress)))

    def _close_shard(self) -> None:
        if self._filled:
            number = len(self._shards)
            files = {"rows": self._write(f"rows_{number:05d}.npy", self._rows[: self._filled])}
            if self._masked:
                files["mask"] = self._write(f"mask_{number:05d}.npy", self._masks[: self._filled])
            self._shards.append({"rows": self._filled, "files": files})
            self._filled = 0

    def finish(self, facts: dict[str, Any]) -> None:
        """Writes what is left and the manifest: from here on the rows are valid. ``facts`` go into the manifest."""
        self._close_shard()  # not noted as progress: an interruption here makes it again, from the same state
        manifest = {
            "format": ROWS_FORMAT,
            "version": ROWS_VERSION,
            "T": self.T,
            "dtype": self._dtype.str,
            "masked": self._masked,
            "rows": self.rows,
            "rows_per_shard": self._rows_per_shard,
            **facts,
            "identity": self.identity,
            "shards": self._shards,
        }
        text = json.dumps(manifest, indent=1) + "\n"
        self._guarded(MANIFEST, len(text), lambda: write_atomic(self.directory / MANIFEST, text))
        (self.directory / PROGRESS).unlink(missing_ok=True)
        self.complete = True

    def _write(self, name: str, array: np.ndarray) -> dict[str, Any]:
        facts: dict[str, Any] = {}

        def write() -> None:
            with atomic_writer(self.directory / name) as file:
                hashing = _HashingFile(file)
                np.lib.format.write_array(hashing, array, allow_pickle=False)  # type: ignore[arg-type]
                facts.update(name=name, size=hashing.size, sha256=hashing.sha256.hexdigest())

        self._guarded(name, array.nbytes, write)
        return facts

    def _guarded(self, name: str, size: int, write: Any) -> None:
        """Runs a write; a full disk becomes an error that says how much is missing, where, and what to do."""
        free = shutil.disk_usage(self.directory).free
        try:
            if size and free < size + _SPARE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise RowsError(
                f"no space for {self.directory / name}: {(size + _SPARE_BYTES) / 2**20:.0f} MiB needed (a reserve for "
                f"checkpoints included), {free / 2**20:.0f} MiB free. "
                f"{self.rows - self._filled} rows are safe; free some space and run again to resume from there, or set "
                "NANOCHAT_BASE_DIR to a larger disk, or ask for fewer tokens"
            ) from error


# --- reading ---------------------------------------------------------------------------------------------------------


class RowSet:
    """Rows on disk, read through memory maps: ``len(rows)``, ``rows[i]``, safe to share between threads."""

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory, self.manifest = directory, manifest
        self.T: int = manifest["T"]
        self.masked: bool = manifest["masked"]
        self._count: int = manifest["rows"]
        self._per_shard: int = manifest["rows_per_shard"]
        self._shards = [self._map(shard["files"]["rows"], shard["rows"]) for shard in manifest["shards"]]
        self._masks = [self._map(shard["files"]["mask"], shard["rows"]) for shard in manifest["shards"] if self.masked]

    @classmethod
    def open(cls, directory: str | Path, tokenizer: Tokenizer | str | None = None, verify: bool = False) -> "RowSet":
        """Opens finished rows; ``tokenizer`` (or its hash) must be the one that made them, if given.

        Checks that every file is there in its full size; ``verify`` reads them all and compares hashes. Raises
        RowsError when the rows are unfinished, damaged, or made by another tokenizer.
        """
        directory = Path(directory)
        path = directory / MANIFEST
        if not path.is_file():
            raise RowsError(
                f"{directory} holds no finished rows (no {MANIFEST}); run the command that builds them again"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            kind = (manifest["format"], manifest["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise RowsError(f"{path} is damaged ({error}); delete {directory} and build the rows again") from error
        if kind != (ROWS_FORMAT, ROWS_VERSION):
            raise RowsError(
                f"{path} has format {kind}, this program reads {(ROWS_FORMAT, ROWS_VERSION)}; rebuild the rows"
            )
        wanted = tokenizer.hash if isinstance(tokenizer, Tokenizer) else tokenizer
        if wanted is not None and manifest["tokenizer_hash"] != wanted:
            raise RowsError(
                f"{directory} was made by tokenizer {manifest['tokenizer_hash'][:12]}, not by {wanted[:12]}; load that "
                "tokenizer or build the rows again"
            )
        rows = cls(directory, manifest)
        if verify:
            rows.verify()
        return rows

    def verify(self) -> None:
        """Reads every file and compares its SHA-256. Raises RowsError naming a file that differs."""
        for shard in self.manifest["shards"]:
            for file in shard["files"].values():
                if sha256_file(self.directory / file["name"]) != file["sha256"]:
                    raise RowsError(
                        f"{self.directory / file['name']} is damaged; delete {self.directory} and rebuild it"
                    )

    def _map(self, file: dict[str, Any], rows: int) -> np.ndarray:
        path = self.directory / file["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != file["size"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {file['size']}"
            raise RowsError(f"{path} {found}; delete {self.directory} and build the rows again")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.shape != (rows, self.T + 1):
            raise RowsError(f"{path} has shape {array.shape}, not {(rows, self.T + 1)}; rebuild the rows")
        return array

    def __len__(self) -> int:
        return self._count

    def _find(self, index: int) -> tuple[int, int]:
        index = int(index)
        if not 0 <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        return divmod(index, self._per_shard)

    def __getitem__(self, index: int) -> np.ndarray:
        """Row ``index`` (T+1,) in the dtype on disk."""
        shard, row = self._find(index)
        return self._shards[shard][row]

    def mask(self, index: int) -> np.ndarray | None:
        """Loss mask of row ``index`` (T+1,) uint8, or None where rows carry none."""
        if not self.masked:
            return None
        shard, row = self._find(index)
        return self._masks[shard][row]

    @property
    def block(self) -> int | None:
        """Rows are shuffled only within blocks of so many (``data/loader.py``); None: all of them together."""
        return self.manifest["identity"].get("block")

    @property
    def key(self) -> str:
        """Hash of everything the rows were made from."""
        return identity_key(self.manifest["identity"])
