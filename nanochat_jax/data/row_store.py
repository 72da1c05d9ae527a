"""Rows of tokens on disk, as they are read."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.data.row_files import MANIFEST, ROWS_FORMAT, ROWS_VERSION, RowsError
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.paths import sha256_file, sha256_hex


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

    def reach(self, count: int) -> int:
        """``count``, or the number of rows if that is smaller; where rows are still being made, waits for them."""
        return min(count, self._count)

    def close(self) -> None:
        """Stops the making of rows, where they are still being made."""

    @property
    def block(self) -> int | None:
        """Rows are shuffled only within blocks of so many (``data/growing.py``); None: all of them together."""
        return self.manifest["identity"].get("block")

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer that made the rows."""
        return self.manifest["tokenizer_hash"]

    @property
    def key(self) -> str:
        """Hash of everything the rows were made from."""
        return identity_key(self.manifest["identity"])


def identity_key(identity: dict[str, Any]) -> str:
    """SHA-256 of a JSON-able identity."""
    return sha256_hex(json.dumps(identity, sort_keys=True).encode())
