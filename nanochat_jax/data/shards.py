"""The list of a data set's files: what it consists of is fixed before any of them is fetched.

``shards.json`` in a folder names every file of the data set with size and SHA-256, where the files come from, and which
one is held out. How many of them are on the disk is no part of what the data set is: a file that is not there is
fetched when it is needed, so the same command makes the same rows whenever and wherever the files arrive.

The list comes from the hub (a folder of parquet files in any repository), from a ``shards.json`` on any web server
(``dev/repackage_data.py`` writes one beside its shards), or, for a mirror of the default data set that can only give
files, from the reference's naming rule, without checksums.
"""

import dataclasses
import json
import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_jax.data.documents import LAST_SHARD
from nanochat_jax.data.fetch import Wanted
from nanochat_jax.data.readers import DataError
from nanochat_jax.data.web import FetchError, fetch_json
from nanochat_jax.utils.paths import sha256_hex, write_atomic

LIST_NAME = "shards.json"
LIST_FORMAT, LIST_VERSION = "nanochat_jax.shards", 1
DEFAULT_ENDPOINT = "https://huggingface.co"
DEFAULT_REPO = "karpathy/fineweb-edu-100b-shuffle"
# A shard of the reference holds about so many characters of text, and a token of its tokenizer about so many.
SHARD_CHARS, CHARS_PER_TOKEN = 250_000_000, 4.8
_NAME = re.compile(r"[\w][\w.=@+-]*\.parquet")


def endpoint() -> str:
    """The hub's address: ``HF_ENDPOINT``, or the usual one."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def token_for(url: str) -> str | None:
    """``HF_TOKEN`` for an address on the hub's own host, None for any other."""
    token = os.environ.get("HF_TOKEN") or None
    return token if urllib.parse.urlsplit(url).netloc == urllib.parse.urlsplit(endpoint()).netloc else None


def shard_name(index: int) -> str:
    """File name of a shard in the reference's layout, 0 .. 1822."""
    return f"shard_{index:05d}.parquet"


def shards_for(tokens: float) -> int:
    """About how many training shards hold so many tokens (4.8 characters each, as with 65,536 of them)."""
    return max(1, -(-int(tokens * CHARS_PER_TOKEN) // SHARD_CHARS))


@dataclass(frozen=True)
class Shard:
    """One file; size and SHA-256 are None where nobody has told them."""

    name: str
    size: int | None = None
    sha256: str | None = None

    def wanted(self) -> Wanted:
        """What the fetched file must be."""
        return Wanted(self.size, self.sha256, check_parquet)


@dataclass(frozen=True)
class ShardList:
    """The files of a data set in order. ``base`` is the address of their folder, absolute or on the hub; ``val`` is the
    name of the one that is held out."""

    base: str
    shards: tuple[Shard, ...]
    val: str

    @property
    def train(self) -> list[Shard]:
        return [shard for shard in self.shards if shard.name != self.val]

    @property
    def held_out(self) -> Shard:
        return next(shard for shard in self.shards if shard.name == self.val)

    @property
    def checked(self) -> bool:
        """Whether every file's size and checksum is known."""
        return all(shard.size is not None and shard.sha256 for shard in self.shards)

    def first(self, count: int) -> list[Shard]:
        """The held-out shard, without which nothing can be measured, and ``count`` training shards (-1: all)."""
        return [self.held_out, *(self.train if count < 0 else self.train[:count])]

    def url(self, shard: Shard) -> str:
        """Where a shard is fetched from, on ``HF_ENDPOINT`` if that is set."""
        base = self.base if "://" in self.base else f"{endpoint()}/{self.base}"
        return f"{base}/{urllib.parse.quote(shard.name)}"

    def save(self, directory: Path) -> None:
        """Writes ``shards.json``."""
        content = {
            "format": LIST_FORMAT,
            "version": LIST_VERSION,
            "base": self.base,
            "val": self.val,
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
        write_atomic(directory / LIST_NAME, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "ShardList | None":
        """The list kept in a folder, or None. Raises DataError for a damaged one."""
        path = directory / LIST_NAME
        if not path.is_file():
            return None
        try:
            return _parse(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}); delete it and download again") from error


def list_fingerprint(shards: list[Shard]) -> str:
    """One SHA-256 for names and contents of files in order."""
    return sha256_hex(json.dumps([(shard.name, shard.sha256) for shard in shards]).encode())


def check_parquet(path: Path) -> None:
    """Raises FetchError unless the file begins and ends as parquet does."""
    with open(path, "rb") as file:
        head = file.read(64)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4))
        if size >= 12 and head[:4] == file.read(4) == b"PAR1":
            return
    kind = "a web page" if head.lstrip()[:1] == b"<" else f"{size} bytes beginning with {head[:8]!r}"
    raise FetchError(f"what the server sent is no parquet file but {kind}; check HF_ENDPOINT and your proxy")


# --- where lists come from --------------------------------------------------------------------------------------------


def hub_list(repo: str = DEFAULT_REPO, folder: str = "", revision: str = "main", wait: float = 1.0) -> ShardList:
    """The parquet files directly in a folder of a data set on the hub, by name, the last one held out.

    Raises FetchError, also where the folder holds fewer than two.
    """
    folder = folder.strip("/")
    place = f"{urllib.parse.quote(revision, safe='')}{'/' if folder else ''}{urllib.parse.quote(folder)}"
    url: str | None = f"{endpoint()}/api/datasets/{repo}/tree/{place}"
    entries: list[Any] = []
    while url:
        page, following = fetch_json(url, token_for(url), wait)
        if not isinstance(page, list):
            raise FetchError(f"{url} sent no list of files: {str(page)[:200]}")
        entries += page
        url = urllib.parse.urljoin(url, following) if following else None
    try:
        files = [entry for entry in entries if entry["type"] == "file"]
        shards = [_hub_shard(file) for file in files if file["path"].endswith(".parquet")]
    except (KeyError, TypeError) as error:
        raise FetchError(f"the hub's list of {repo} has an entry without {error}") from error
    if repo == DEFAULT_REPO:
        shards = [shard for shard in shards if re.fullmatch(r"shard_\d{5}\.parquet", shard.name)]
    shards.sort(key=lambda shard: shard.name)
    try:
        return _checked(f"datasets/{repo}/resolve/{place}", shards, shards[-1].name if shards else "")
    except ValueError as error:
        raise FetchError(f"{repo}{'/' + folder if folder else ''}: {error}") from error


def _hub_shard(entry: dict[str, Any]) -> Shard:
    """A file of the hub's listing. Large files have their SHA-256 there; for a small one git's own hash is no use."""
    large = entry.get("lfs") or {}
    return Shard(entry["path"].rpartition("/")[2], int(entry["size"]), large.get("oid"))


def web_list(url: str, wait: float = 1.0) -> ShardList:
    """A ``shards.json`` on a web server, its files being beside it. Raises FetchError."""
    content, _ = fetch_json(url, token_for(url), wait)
    try:
        return dataclasses.replace(_parse(content), base=url.rpartition("/")[0])
    except ValueError as error:
        raise FetchError(f"{url} is no list of shards ({error})") from error


def reference_list() -> ShardList:
    """The default data set by its naming rule alone."""
    shards = tuple(Shard(shard_name(index)) for index in range(LAST_SHARD + 1))
    return ShardList(f"datasets/{DEFAULT_REPO}/resolve/main", shards, shard_name(LAST_SHARD))


def _parse(content: Any) -> ShardList:
    try:
        kind = (content["format"], content["version"])
        if kind != (LIST_FORMAT, LIST_VERSION):
            raise ValueError(f"its format is {kind}, not {(LIST_FORMAT, LIST_VERSION)}")
        shards = [Shard(str(s["name"]), int(s["size"]), str(s["sha256"])) for s in content["shards"]]
        if bad := [shard.name for shard in shards if not re.fullmatch("[0-9a-f]{64}", shard.sha256 or "")]:
            raise ValueError(f"{bad[0]} has no SHA-256")
        return _checked(str(content["base"]), shards, str(content["val"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"something is missing: {error!r}") from error


def _checked(base: str, shards: list[Shard], val: str) -> ShardList:
    """A list that can be trusted with names on our disk."""
    names = [shard.name for shard in shards]
    if len(names) < 2:
        raise ValueError(f"{len(names)} parquet files; at least two are needed, one of them to hold out")
    if bad := [name for name in names if not _NAME.fullmatch(name)]:
        raise ValueError(f"{bad[0]!r} is no plain name of a parquet file")
    if len(set(names)) < len(names):
        raise ValueError("a name occurs twice")
    if val not in names:
        raise ValueError(f"the held-out file {val!r} is not in the list")
    return ShardList(base, tuple(shards), val)
