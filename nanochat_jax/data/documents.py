"""Documents from the user's own text: which files, which of them are held out, one re-iterable stream.

A *documents spec* is anything with ``fingerprint()`` (JSON-able identity of the stream), ``iterate(start)`` (its
documents from number ``start`` on, the same ones every time) and ``stats`` (what the latest iteration had to repair).
``FileDocuments``, ``ShardDocuments``, ``CallableDocuments`` are the kinds; ``data/build_rows.py`` makes rows of them.

How text is held out (``val``) of files, the first rule that applies:

1. files whose name starts with ``val`` are validation, all others train;
2. in a folder in the reference's layout (several ``shard_XXXXX.parquet`` and nothing else), shard 1822, the last one
   there is, or the last one present; the choice is pinned at first use, so later downloads never move it;
3. otherwise a document is validation if a hash of its text falls into 1 % (into more, if that would be none).
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nanochat_jax.data.fetch import FetchError, OfflineError
from nanochat_jax.data.hub import fetch_ahead
from nanochat_jax.data.readers import READER_VERSION, READERS, BadLine, DataError, document_count, read_documents
from nanochat_jax.data.shards import LAST_SHARD, LIST_NAME, Shard, ShardList, list_fingerprint
from nanochat_jax.utils.errors import InputError
from nanochat_jax.utils.paths import data_dir, sha256_file, sha256_hex, write_atomic

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
VAL_FRACTION = 0.01
_SHARD_NAME = re.compile(r"shard_\d{5}\.parquet")
_SAMPLE_CHUNK, _SAMPLE_CHUNKS = 64 * 1024, 16
KEPT_MESSAGES = 20
_SHARDS_AHEAD = 4  # downloaded while one is read


@dataclass
class TextStats:
    """What an iteration repaired or left out so far."""

    invalid_utf8: int = 0
    bad_lines: int = 0
    messages: list[str] = field(default_factory=list)  # the first few bad lines

    def add_bad_line(self, message: str) -> None:
        self.bad_lines += 1
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(message)
            logger.warning("left out a bad line: %s", message)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Documents(Protocol):
    """A re-iterable, resumable stream of documents.

    ``in_blocks``: they come in random order, so rows made of them are shuffled within blocks only (data/loader.py).
    ``stop()`` makes an iteration in another thread that waits for text give up.
    """

    stats: TextStats
    in_blocks: bool

    def fingerprint(self) -> dict[str, Any]: ...

    def iterate(self, start: int = 0) -> Iterator[str]: ...

    def stop(self) -> None: ...


class _AtHand:
    """Documents in any order, all available at once."""

    in_blocks = False

    def stop(self) -> None:
        """Nothing to give up."""


class CallableDocuments(_AtHand):
    """Documents made by a function: ``make(start)`` iterates from document number ``start``.

    ``name`` must tell streams apart: put every parameter that changes the text into it.
    """

    def __init__(self, name: str, make: Callable[[int], Iterator[str]]):
        self.name, self._make, self.stats = name, make, TextStats()

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "callable", "name": self.name}

    def iterate(self, start: int = 0) -> Iterator[str]:
        self.stats = TextStats()
        return iter(self._make(start))


class FileDocuments(_AtHand):
    """The documents of one split of files and folders (parquet, txt, md, jsonl), in order of their names.

    ``split`` is "train", "val" or "all". Raises DataError when there is nothing to read or nothing to hold out.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], split: str = "train", text_column: str = "text"):
        if split not in (*SPLITS, "all"):
            raise ValueError(f"split {split!r} is none of train, val, all")
        roots = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
        self.split, self.column, self.stats = split, text_column, TextStats()
        named = find_files(roots)
        self.rule: dict[str, Any] = {"mode": "all"} if split == "all" else _holdout_rule(roots, named, text_column)
        if self.rule["mode"] == "files":
            held_out = set(self.rule["val_files"])
            named = {name: path for name, path in named.items() if (name in held_out) == (split == "val")}
        self.files = named
        if not named:
            raise DataError(f"{roots[0]}: no file is left for the {split} split; add one")

    def fingerprint(self) -> dict[str, Any]:
        """Identity of the stream: names, sizes and sampled contents of the files, and how they are read and split."""
        return {
            "kind": "files",
            "split": self.split,
            "rule": self.rule,
            "column": self.column,
            "reader": READER_VERSION,
            "files": [{"name": name, **file_identity(path)} for name, path in self.files.items()],
        }

    def held_out(self) -> str:
        """What validation text is, for a person."""
        if self.rule["mode"] == "files":
            names = self.rule["val_files"]
            return ", ".join(names[:3]) + (f" and {len(names) - 3} more files" if len(names) > 3 else "")
        if self.rule["mode"] == "hash":
            return f"{100 * self.rule['threshold'] / 2**64:.2g} % of the documents, chosen by a hash of their text"
        return "nothing"

    def iterate(self, start: int = 0) -> Iterator[str]:
        """Texts from document number ``start`` of this split on; ``stats`` counts from there."""
        stats = self.stats = TextStats()
        by_hash = self.rule["mode"] == "hash"
        position = 0  # number, within the split, of the next document
        for path in self.files.values():
            skip = 0
            if start > position and not by_hash:  # then every document counts: pass over files and row groups unread
                count = document_count(path)
                if count is not None:
                    skip = min(start - position, count)
                    position += skip
                    if skip == count:
                        continue
            for item in read_documents(path, self.column, skip):
                if isinstance(item, BadLine):
                    if position >= start:
                        stats.add_bad_line(item.message)
                    continue
                if by_hash and is_held_out(item.text, self.rule["threshold"]) != (self.split == "val"):
                    continue
                position += 1
                if position > start:
                    stats.invalid_utf8 += item.invalid_utf8
                    yield item.text


class ShardDocuments:
    """The training or held-out documents of the data set whose list is kept in ``directory``.

    They are read in the list's order, so the stream is a function of the list alone. While one file is read the next
    ones are downloaded; ``expected`` (shards) is about how many will be read: of further ones none is begun before its
    turn. Every file's checksum is compared before it is read, whoever put it there.
    """

    in_blocks = True

    def __init__(
        self,
        directory: Path,
        listing: ShardList,
        split: str = "train",
        text_column: str = "text",
        expected: int | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of train, val")
        if not listing.checked:
            raise DataError(f"{directory / LIST_NAME} has files without a checksum; delete it and download again")
        self.directory, self.listing, self.split, self.column = directory, listing, split, text_column
        self.shards = listing.train if split == "train" else [listing.held_out]
        self.stats, self._expected, self._stopped = TextStats(), expected, threading.Event()

    def fingerprint(self) -> dict[str, Any]:
        """Identity of the stream: names and contents of all files of the list, whether they are here or not."""
        return {
            "kind": "shards",
            "split": self.split,
            "column": self.column,
            "reader": READER_VERSION,
            "count": len(self.shards),
            "sha256": list_fingerprint(self.shards),
        }

    def absent(self) -> int:
        """How many of the files that are expected to be read are not here yet."""
        return sum(not shard.is_at(self.directory / shard.name) for shard in self.shards[: self._expected])

    def stop(self) -> None:
        """Makes an iteration that waits for a file give up with a FetchError."""
        self._stopped.set()

    def iterate(self, start: int = 0) -> Iterator[str]:
        """Texts from document number ``start`` of this split on; ``stats`` counts from there.

        Raises FetchError for a file that cannot be downloaded, DataError for one that is damaged.
        """
        self.stats, self._stopped = TextStats(), threading.Event()
        return self._read(start, self.stats, self._stopped)

    def _read(self, start: int, stats: TextStats, stopped: threading.Event) -> Iterator[str]:
        position = 0
        for shard, file in fetch_ahead(self.listing, self.directory, self.shards, _SHARDS_AHEAD, self._expected):
            path = self._wait(file, stopped)
            skip = min(start - position, document_count(path) or 0) if start > position else 0
            position += skip
            if position < start:
                continue  # all of it was read by an earlier run
            self._compare(shard, path)
            for item in read_documents(path, self.column, skip):
                assert not isinstance(item, BadLine), "parquet has no lines"
                position += 1
                stats.invalid_utf8 += item.invalid_utf8
                yield item.text

    def _wait(self, file: "Future[Path]", stopped: threading.Event) -> Path:
        while not wait([file], timeout=0.1).done:
            if stopped.is_set():
                raise FetchError("stopped while waiting for text")
        try:
            return file.result()
        except OfflineError as error:
            raise OfflineError(
                f"{error}, or delete {LIST_NAME} there to use nothing but the files that are there"
            ) from error

    def _compare(self, shard: Shard, path: Path) -> None:
        if sha256_file(path) != shard.sha256:
            raise DataError(
                f"{path} is damaged (its SHA-256 is not the one in {LIST_NAME}); delete it and run again to have it "
                "downloaded anew"
            )


# --- files ----------------------------------------------------------------------------------------------------------


def find_files(roots: Sequence[Path]) -> dict[str, Path]:
    """Readable files below ``roots`` by name (relative to their root), sorted by name; hidden ones are left out.

    Raises FileNotFoundError for a missing path, DataError for an empty file or when nothing can be read.
    """
    found: dict[str, Path] = {}
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"there is no {root}; --data takes a file or folder of text")
        for path in [root] if root.is_file() else _files_below(root):
            name = path.name if root.is_file() else path.relative_to(root).as_posix()
            if path.suffix.lower() not in READERS:
                if root.is_file():
                    raise DataError(f"{path}: cannot read this kind of file; use one of {', '.join(READERS)}")
                continue
            found[name if name not in found else path.as_posix()] = path
    if not found:
        raise DataError(f"{', '.join(map(str, roots))} holds no file to read; use one of {', '.join(READERS)}")
    for path in found.values():
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; remove it or put text into it")
    return dict(sorted(found.items()))


def _files_below(root: Path) -> Iterator[Path]:
    """All files in a folder and its folders but hidden ones. Links to folders are followed, after the folders proper; a
    folder that can be reached in several ways, or that holds itself, is read once."""
    folders, links, seen = [root], deque[Path](), set[str]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        place = os.path.realpath(folder)
        if place in seen:
            continue
        seen.add(place)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif entry.is_file():
                yield path
            elif entry.is_symlink() and path.suffix.lower() in READERS:
                logger.warning("left out %s: it is a link to nothing", path)


def file_identity(path: Path) -> dict[str, Any]:
    """Size and a SHA-256 of sixteen 64 KiB samples spread over the file (of all of it, up to 1 MiB).

    Larger files add their time of change, since an edit may miss the samples. Reading hundreds of gigabytes in full at
    every start would cost minutes.
    """
    size = path.stat().st_size
    whole = size <= _SAMPLE_CHUNK * _SAMPLE_CHUNKS
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if whole:
            digest.update(file.read())
        else:
            for i in range(_SAMPLE_CHUNKS):
                file.seek((size - _SAMPLE_CHUNK) * i // (_SAMPLE_CHUNKS - 1))
                digest.update(file.read(_SAMPLE_CHUNK))
    identity: dict[str, Any] = {"size": size, "sha256" if whole else "sampled_sha256": digest.hexdigest()}
    return identity if whole else {**identity, "mtime_ns": path.stat().st_mtime_ns}


# --- what is held out -------------------------------------------------------------------------------------------------


def is_held_out(text: str, threshold: int) -> bool:
    """Whether a document belongs to validation: decided by its text alone, so duplicates never straddle the splits."""
    return _text_hash(text) < threshold


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def _holdout_rule(roots: Sequence[Path], named: dict[str, Path], column: str) -> dict[str, Any]:
    val = [name for name, path in named.items() if path.stem.startswith("val")]
    if val:
        if len(val) == len(named):
            raise DataError(f"{roots[0]}: every file is named val*, none is left for training; add training text")
        return {"mode": "files", "val_files": val}
    pin = pin_path(roots)
    if pin.is_file():
        rule = json.loads(pin.read_text(encoding="utf-8"))["rule"]
        missing = [name for name in rule.get("val_files", []) if name not in named]
        if missing:
            raise DataError(
                f"{roots[0]}: the validation file {missing[0]} chosen earlier is gone; put it back, or delete {pin} to "
                "choose another one (scores will not compare with earlier ones)"
            )
        return rule
    if len(named) > 1 and all(_SHARD_NAME.fullmatch(path.name) for path in named.values()):
        last = max(named, key=lambda name: (named[name].name == f"shard_{LAST_SHARD:05d}.parquet", named[name].name))
        rule = {"mode": "files", "val_files": [last]}
    else:
        rule = {"mode": "hash", "threshold": _hash_threshold(roots, named, column)}
    content = {"data": [str(root.resolve()) for root in roots], "rule": rule}
    write_atomic(pin, json.dumps(content, indent=1) + "\n")
    return rule


def pin_path(roots: Sequence[Path]) -> Path:
    """Where the choice of held-out text for these paths is remembered (below the base directory's data/splits)."""
    key = sha256_hex(json.dumps([str(root.resolve()) for root in roots]).encode())[:16]
    return data_dir() / "splits" / f"{key}.json"


def _hash_threshold(roots: Sequence[Path], named: dict[str, Path], column: str) -> int:
    """The hash below which a document is held out: 1 % of all hashes, or just enough for one document.

    Reads only until one document falls on either side, which for any but a tiny corpus is at once.
    """
    threshold = int(VAL_FRACTION * 2**64)
    lowest: int | None = None
    highest = 0
    for path in named.values():
        for item in read_documents(path, column):
            if isinstance(item, BadLine):
                continue
            value = _text_hash(item.text)
            lowest = value if lowest is None else min(lowest, value)
            highest = max(highest, value)
            if lowest < threshold <= highest:
                return threshold
    if lowest is None or lowest == highest:
        raise DataError(
            f"{roots[0]} is too small to hold anything out: it is a single document; add text, or a file whose name "
            "starts with val"
        )
    return lowest + 1


# --- text for the tokenizer -------------------------------------------------------------------------------------------


def text_iterator(documents: Iterable[str], doc_cap: int, max_chars: int | float) -> Iterator[str]:
    """Documents cut to ``doc_cap`` characters, until more than ``max_chars`` characters have been given.

    The document that crosses the limit is still given (golden ``tokenizer_v1.json`` ``text_iterator``).
    """
    if doc_cap < 1:
        raise InputError(f"doc_cap is {doc_cap}; it must be 1 or more")
    total = 0
    for document in documents:
        cut = document[:doc_cap]
        total += len(cut)
        yield cut
        if total > max_chars:
            return
