"""The list of a data set's files: what it consists of is fixed before any of them is downloaded.

``shards.json`` in a folder names every file of the data set with size and SHA-256, where the files come from, and which
one is held out. How many of them are on the disk is no part of what the data set is: a file that is not there is
downloaded when it is needed (``data/hub.py``), so the same command makes the same rows wherever it runs.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.data.readers import DataError
from nanochat_jax.utils.paths import sha256_hex, write_atomic

LIST_NAME = "shards.json"
LIST_FORMAT, LIST_VERSION = "nanochat_jax.shards", 1
# Number of the reference's last shard, which is held out.
LAST_SHARD = 1822
# A shard of the reference holds about so many characters of text, and a token of its tokenizer about so many.
SHARD_CHARS, CHARS_PER_TOKEN = 250_000_000, 4.8
_NAME = re.compile(r"[\w][\w.=@+-]*\.parquet")


def shard_name(index: int) -> str:
    """File name of a shard in the reference's layout, 0 .. 1822."""
    return f"shard_{index:05d}.parquet"


def shards_for(tokens: float) -> int:
    """About how many training shards hold so many tokens (4.8 characters each, as with 65,536 of them)."""
    return max(1, -(-int(tokens * CHARS_PER_TOKEN) // SHARD_CHARS))


@dataclass(frozen=True)
class Shard:
    """One file: its size in bytes and SHA-256, or git's blob hash where that is all the hub knows of it."""

    name: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` is there in the full size. (It gets its name only after its checksum has been compared.)"""
        return path.is_file() and self.size in (None, path.stat().st_size)


@dataclass(frozen=True)
class ShardList:
    """The files of a data set in order. ``base`` is the address of their folder, absolute or on the hub; ``val`` is the
    name of the one that is held out. Raises ValueError for a list that cannot be one."""

    base: str
    shards: tuple[Shard, ...]
    val: str

    def __post_init__(self) -> None:
        names = [shard.name for shard in self.shards]
        if len(names) < 2:
            raise ValueError(f"{len(names)} parquet files; at least two are needed, one of them to hold out")
        if bad := [name for name in names if not _NAME.fullmatch(name)]:
            raise ValueError(f"{bad[0]!r} is no plain name of a parquet file")
        if len(set(names)) < len(names):
            raise ValueError("a name occurs twice")
        if self.val not in names:
            raise ValueError(f"the held-out file {self.val!r} is not in the list")

    @property
    def train(self) -> list[Shard]:
        return [shard for shard in self.shards if shard.name != self.val]

    @property
    def held_out(self) -> Shard:
        return next(shard for shard in self.shards if shard.name == self.val)

    @property
    def checked(self) -> bool:
        """Whether every file's size and SHA-256 are known."""
        return all(shard.size is not None and shard.sha256 for shard in self.shards)

    def first(self, count: int) -> list[Shard]:
        """The held-out shard, without which nothing can be measured, and ``count`` training shards (-1: all)."""
        return [self.held_out, *(self.train if count < 0 else self.train[:count])]

    def save(self, directory: Path) -> None:
        """Writes ``shards.json``."""
        content = {
            "format": LIST_FORMAT,
            "version": LIST_VERSION,
            "base": self.base,
            "val": self.val,
            "shards": [{"name": shard.name, "size": shard.size, "sha256": shard.sha256} for shard in self.shards],
        }
        write_atomic(directory / LIST_NAME, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "ShardList | None":
        """The list kept in a folder, or None. Raises DataError for a damaged one."""
        path = directory / LIST_NAME
        if not path.is_file():
            return None
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}); delete it and download again") from error

    @classmethod
    def parse(cls, text: str) -> "ShardList":
        """The list in the text of a ``shards.json``. Raises ValueError."""
        content: Any = json.loads(text)
        try:
            kind = (content["format"], content["version"])
            if kind != (LIST_FORMAT, LIST_VERSION):
                raise ValueError(f"its format is {kind}, not {(LIST_FORMAT, LIST_VERSION)}")
            shards = [Shard(str(s["name"]), int(s["size"]), str(s["sha256"])) for s in content["shards"]]
            if bad := [shard.name for shard in shards if not re.fullmatch("[0-9a-f]{64}", shard.sha256 or "")]:
                raise ValueError(f"{bad[0]} has no SHA-256")
            return cls(str(content["base"]), tuple(shards), str(content["val"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"something is missing: {error!r}") from error

    def moved_to(self, base: str) -> "ShardList":
        """The same files at another address."""
        return dataclasses.replace(self, base=base)


def list_fingerprint(shards: list[Shard]) -> str:
    """One SHA-256 for names and contents of files in order."""
    return sha256_hex(json.dumps([(shard.name, shard.sha256) for shard in shards]).encode())
