"""Text to token rows, once, before training: the stream of all documents, cut into rows of T+1 tokens.

Every document becomes bos and its tokens; all of them in order are one stream. Row r holds stream[rT : rT + T+1], so
consecutive rows share one token and every token is an input once and a target once. With ``batch_rows = B`` the
reference's stride is reproduced: each batch of B rows consumes B*T+1 tokens, whose last one is never an input.

Reading (and, for shards, downloading) goes on in a thread while the batch of documents at hand is encoded.
Conversations become rows in ``data/conversation_rows.py``.
"""

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.data.documents import KEPT_MESSAGES, Documents, TextStats
from nanochat_jax.data.row_store import (
    MANIFEST,
    ROWS_FORMAT,
    ROWS_VERSION,
    SHARD_BYTES,
    RowsError,
    RowSet,
    RowWriter,
    identity_key,
    row_dtype,
)
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.paths import rows_dir

logger = logging.getLogger(__name__)

# Documents are encoded in batches of about this size: enough for all threads, little enough to hold twice.
_BATCH_CHARS, _BATCH_DOCUMENTS = 4_000_000, 8192

Progress = Callable[[int, int, int], None]


def place_of_rows(
    documents: Documents,
    tokenizer: Tokenizer,
    T: int,
    out_dir: str | Path | None = None,
    split: str = "train",
    *,
    batch_rows: int | None = None,
    max_tokens: int | None = None,
    max_rows: int | None = None,
    rows_per_shard: int | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Directory and identity of the rows that ``build_rows`` makes from the same arguments."""
    if T < 1:
        raise RowsError(f"a row of T = {T} tokens is too short; T must be 1 or more")
    limits = [limit for limit in (max_rows, None if max_tokens is None else -(-max_tokens // T)) if limit is not None]
    if any(limit < 1 for limit in limits):
        raise RowsError(f"max_rows={max_rows}, max_tokens={max_tokens}: at least one row must be allowed")
    limit = min(limits) if limits else None
    dtype = row_dtype(tokenizer.vocab_size)
    rows_per_shard = rows_per_shard or max(1, SHARD_BYTES // ((T + 1) * dtype.itemsize))
    if batch_rows:  # a shard ends where a batch ends, so that building can resume from there
        rows_per_shard = -(-rows_per_shard // batch_rows) * batch_rows
    identity = {
        "format": [ROWS_FORMAT, ROWS_VERSION],
        "source": documents.fingerprint(),
        "tokenizer": tokenizer.hash,
        "split": split,
        "T": T,
        "batch_rows": batch_rows,
        "max_rows": limit,
        "rows_per_shard": rows_per_shard,
    }
    if documents.in_blocks:  # the order of training is part of what such rows are: data/loader.py
        identity["block"] = rows_per_shard
    name = f"{split}-T{T}-{identity_key(identity)[:12]}"
    return Path(out_dir if out_dir is not None else rows_dir()) / name, identity


def build_rows(
    documents: Documents,
    tokenizer: Tokenizer,
    T: int,
    out_dir: str | Path | None = None,
    split: str = "train",
    *,
    batch_rows: int | None = None,
    max_tokens: int | None = None,
    max_rows: int | None = None,
    progress: Progress | None = None,
    rows_per_shard: int | None = None,
    num_threads: int = 0,
) -> RowSet:
    """Rows of T+1 tokens of ``documents`` in a directory below ``out_dir`` (default: the base directory's rows/).

    The directory's name ends in a hash of everything that decides the bytes (text, tokenizer, T, options): rows made
    before from the same are opened as they are, an interrupted build resumes after its last complete shard, with the
    same bytes in the end. At most ``max_rows`` rows, or enough for ``max_tokens`` targets. ``progress(rows, tokens,
    documents)`` is called after every batch of documents. Raises RowsError when there is not enough text or space.
    """
    # 1. what decides the bytes, and the directory that is named after it
    directory, identity = place_of_rows(
        documents,
        tokenizer,
        T,
        out_dir,
        split,
        batch_rows=batch_rows,
        max_tokens=max_tokens,
        max_rows=max_rows,
        rows_per_shard=rows_per_shard,
    )
    limit, rows_per_shard, dtype = identity["max_rows"], identity["rows_per_shard"], row_dtype(tokenizer.vocab_size)
    # 2. rows made before are used as they are, also where the place is read-only
    if (directory / MANIFEST).is_file():
        return RowSet.open(directory, tokenizer)
    # 3. lock the directory (a second process waits here), take over the complete shards of an interrupted build
    with RowWriter(directory, identity, T, dtype, rows_per_shard=rows_per_shard) as writer:
        if not writer.complete:
            # 4. read, encode and slice the documents that are left
            facts = _fill(writer, documents, tokenizer, batch_rows, limit, progress, num_threads)
            # 5. say what the text was like, refuse too little of it
            if facts["invalid_utf8"] or facts["bad_lines"]:
                logger.warning(
                    "%s text: %d invalid UTF-8 sequences replaced, %d lines left out",
                    split,
                    facts["invalid_utf8"],
                    facts["bad_lines"],
                )
            if writer.rows == 0:
                raise RowsError(
                    f"the {split} text has only {facts['stream_tokens']} tokens, too few for one "
                    f"{'batch' if batch_rows else 'row'} of {(batch_rows or 1) * T + 1}; give more text or shorter rows"
                )
            # 6. the manifest makes the rows valid
            writer.finish(
                {"split": split, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, **facts}
            )
    return RowSet.open(directory, tokenizer)


def _fill(
    writer: RowWriter,
    documents: Documents,
    tokenizer: Tokenizer,
    batch_rows: int | None,
    limit: int | None,
    progress: Progress | None,
    num_threads: int,
) -> dict[str, Any]:
    """Encodes documents into the writer from where it stands; returns facts for the manifest.

    Positions are offsets in the whole stream of tokens. The state kept with a shard is where its next row begins and
    the batch of documents that this position lies in: from there the same batches, hence the same rows, follow again.
    """
    # 1. begin where the last complete shard ended
    zero = TextStats().as_dict()
    start = writer.state or {"offset": 0, "batch": {"offset": 0, "document": 0, "characters": 0, "stats": zero}}
    batch: dict[str, Any] = start["batch"]
    base = start["offset"]  # of the first token in `tokens`
    skip = base - batch["offset"]  # tokens of rows that an earlier run has written
    tokens = np.empty(0, row_dtype(tokenizer.vocab_size))
    recent = deque([batch])  # batches that the next row may begin in
    now = dict(batch)  # the same facts after the batch at hand

    def commit(offset: int) -> None:
        while len(recent) > 1 and recent[1]["offset"] <= offset:
            recent.popleft()
        writer.commit({"offset": offset, "batch": recent[0], "now": now})

    if limit is not None and writer.rows >= limit:  # interrupted between the last shard and the manifest
        return _facts(writer, start["now"])
    with contextlib.closing(read_ahead(_batches(documents, batch["document"]), documents.stop)) as batches:
        for texts, repairs in batches:
            # 2. encode a batch of documents, dropping the tokens of rows that are there already
            encoded, _ = tokenizer.encode_to_numpy(texts, num_threads)
            recent.append(now)
            now = {
                "offset": now["offset"] + len(encoded),
                "document": now["document"] + len(texts),
                "characters": now["characters"] + sum(map(len, texts)),
                "stats": _plus(batch["stats"], repairs),
            }
            dropped = min(skip, len(encoded))
            skip -= dropped
            tokens = np.concatenate([tokens, encoded[dropped:]])
            # 3. cut all complete rows out of what has not been used yet
            rows, used, row_start = _cut(tokens, writer.T, batch_rows)
            if limit is not None:
                rows = rows[: limit - writer.rows]
            # 4. write them; a full shard is committed with the position after it
            done = 0
            while done < len(rows):
                done += writer.add(rows[done:])
                if writer.full:
                    commit(base + row_start(done))
            # 5. keep the rest for the next batch
            tokens = tokens[used:]
            base += used
            while len(recent) > 1 and recent[1]["offset"] <= base:
                recent.popleft()
            if progress is not None:
                progress(writer.rows, writer.rows * writer.T, now["document"])
            if limit is not None and writer.rows >= limit:
                break
    return _facts(writer, now)


def _facts(writer: RowWriter, now: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens": writer.rows * writer.T,
        "documents": now["document"],
        "characters": now["characters"],
        "stream_tokens": now["offset"],
        **now["stats"],
    }


def _cut(tokens: np.ndarray, T: int, batch_rows: int | None) -> tuple[np.ndarray, int, Callable[[int], int]]:
    """All complete rows (n, T+1) of a piece of stream, the tokens they use up, and where row i begins."""
    if batch_rows is None:
        count = max(0, (len(tokens) - 1) // T)
        windows = (
            np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[::T]
            if count
            else np.empty((0, T + 1), tokens.dtype)
        )
        return windows[:count], count * T, lambda row: row * T
    stride = batch_rows * T + 1
    count = len(tokens) // stride
    batches = tokens[: count * stride].reshape(count, stride)
    if not count:
        return np.empty((0, T + 1), tokens.dtype), 0, lambda row: 0
    rows = np.lib.stride_tricks.sliding_window_view(batches, T + 1, axis=1)[:, ::T].reshape(-1, T + 1)
    return rows, count * stride, lambda row: row // batch_rows * stride


def _batches(documents: Documents, start: int) -> Iterator[tuple[list[str], TextStats]]:
    """Documents from number ``start`` in batches, each with the repairs since ``start`` up to its end.

    Where a batch ends depends only on the documents from its own first one on.
    """
    texts: list[str] = []
    chars = 0
    for text in documents.iterate(start):
        texts.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS or len(texts) >= _BATCH_DOCUMENTS:
            yield texts, TextStats(**documents.stats.as_dict())
            texts, chars = [], 0
    yield texts, TextStats(**documents.stats.as_dict())  # the repairs after the last document, and what is left


def _plus(before: dict[str, Any], since: TextStats) -> dict[str, Any]:
    total = TextStats(before["invalid_utf8"] + since.invalid_utf8, before["bad_lines"] + since.bad_lines)
    total.messages = (before["messages"] + since.messages)[:KEPT_MESSAGES]
    return total.as_dict()


def read_ahead(items: Iterable[Any], stop: Callable[[], None] = lambda: None) -> Generator[Any, None, None]:
    """The same items, the next one being made in a thread while the caller works on this one.

    Closing it waits for the item at hand; ``stop``, called then, may hurry that up.
    """
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set():
            try:
                waiting.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # noqa: B036 - handed to the caller, who raises it
            put("error", error)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        stop()
        thread.join()
