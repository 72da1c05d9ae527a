"""Token rows, made once, before training: from documents here, from conversations in ``data/conversation_rows.py``.

Every document becomes bos and its tokens. ``data/packing.py`` makes rows of T+1 tokens of them: all in order are one
stream to be sliced, or each row is filled with documents by best fit. Reading (and, for shards, downloading) goes on in
a thread while the batch of documents at hand is encoded.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from nanochat_jax.data.documents import KEPT_MESSAGES, Documents, TextStats
from nanochat_jax.data.packing import BestFitDocuments, Packer, Piece, Tally, TokenStream
from nanochat_jax.data.row_store import (
    MANIFEST,
    ROWS_FORMAT,
    ROWS_VERSION,
    RowsError,
    RowSet,
    RowWriter,
    identity_key,
    row_dtype,
    shard_rows,
)
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.paths import rows_dir

logger = logging.getLogger(__name__)

# Documents are encoded in batches of about this size: enough for all threads, little enough to hold twice.
_BATCH_CHARS, _BATCH_DOCUMENTS = 4_000_000, 8192
_REPORT_EVERY = 512  # documents or conversations

PACKINGS = ("stream", "best_fit")
# Best fit chooses among so many documents; where there are fewer, so many are added (the reference's numbers).
BUFFER, REFILL = 1000, 128

Progress = Callable[[int, int, int], None]


# --- rows of anything -------------------------------------------------------------------------------------------------


def write_rows(
    identity: dict[str, Any],
    tokenizer: Tokenizer,
    T: int,
    split: str,
    packer_at: Callable[[Any], Packer],
    judge: Callable[[Tally, int], dict[str, Any]],
    *,
    name: str = "",
    counted: str = "documents",
    masked: bool = False,
    out_dir: str | Path | None = None,
    max_rows: int | None = None,
    rows_per_shard: int | None = None,
    progress: Progress | None = None,
) -> RowSet:
    """Rows of T+1 tokens in a directory below ``out_dir`` (default: the base directory's rows/).

    The directory's name ends in a hash of everything that decides the bytes (``identity``, tokenizer, T, options): rows
    made before from the same are opened as they are, an interrupted build resumes after its last complete shard, with
    the same bytes in the end. At most ``max_rows`` rows. ``progress(rows, tokens, how much was read)``.

    packer_at: state -> what makes the rows that follow (None: from the start). judge(tally, rows): facts for the
    manifest about what was read; warns of what was left out, raises RowsError where there are no rows.
    name: begins the directory's. counted: what ``progress`` shows of the tally.
    """
    # 1. what decides the bytes, and the directory that is named after it
    dtype = row_dtype(tokenizer.vocab_size)
    per_shard = rows_per_shard or shard_rows(T, dtype)
    if max_rows is not None and max_rows < 1:
        raise RowsError(f"max_rows={max_rows}: at least one row must be allowed")
    identity = {
        "format": [ROWS_FORMAT, ROWS_VERSION],
        **identity,
        "tokenizer": tokenizer.hash,
        "split": split,
        "T": T,
        "batch_rows": None,  # kept for the sake of rows made before
        "max_rows": max_rows,
        "rows_per_shard": per_shard,
    }
    directory = Path(out_dir or rows_dir()) / f"{name}{split}-T{T}-{identity_key(identity)[:12]}"
    # 2. rows made before are used as they are, also where the place is read-only
    if (directory / MANIFEST).is_file():
        return RowSet.open(directory, tokenizer)
    # 3. lock the directory (a second process waits here), take over the complete shards of an interrupted build
    with RowWriter(directory, identity, T, dtype, masked, per_shard) as writer:
        if not writer.complete:
            # 4. make and write the rows that are left
            tally = _fill(writer, packer_at, max_rows, counted, progress)
            # 5. the manifest makes the rows valid
            facts = {"split": split, "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
            writer.finish({**facts, "tokens": writer.rows * T, **judge(tally, writer.rows)})
    return RowSet.open(directory, tokenizer)


def _fill(
    writer: RowWriter,
    packer_at: Callable[[Any], Packer],
    max_rows: int | None,
    counted: str,
    progress: Progress | None,
) -> Tally:
    """Takes rows from where the writer stands until there are no more, or enough; returns what was read."""
    if max_rows is not None and writer.rows >= max_rows:  # interrupted between the last shard and the manifest
        return writer.state["now"]
    packer, reported = packer_at(writer.state), -1
    with contextlib.closing(packer.source):
        while max_rows is None or writer.rows < max_rows:
            taken = packer.take(writer.space if max_rows is None else min(writer.space, max_rows - writer.rows))
            if taken is None:
                break
            writer.add(*taken)
            if writer.full:
                writer.commit(packer.state())
            if progress is not None and packer.tally[counted] // _REPORT_EVERY != reported:
                reported = packer.tally[counted] // _REPORT_EVERY
                progress(writer.rows, writer.rows * writer.T, packer.tally[counted])
    if progress is not None:
        progress(writer.rows, writer.rows * writer.T, packer.tally[counted])
    return packer.tally


# --- rows of documents ------------------------------------------------------------------------------------------------


PACKINGS = ("stream", "best_fit")


def packing_of(recipe: str, off: str = "") -> str:
    """How a recipe makes rows of documents; off: its parts that are left out, comma-separated."""
    left_out = {part.strip() for part in off.split(",")}
    return "best_fit" if recipe == "modern" and "best_fit" not in left_out else "stream"


def build_rows(
    documents: Documents,
    tokenizer: Tokenizer,
    T: int,
    out_dir: str | Path | None = None,
    split: str = "train",
    *,
    packing: str = "stream",
    max_rows: int | None = None,
    rows_per_shard: int | None = None,
    progress: Progress | None = None,
) -> RowSet:
    """Rows of ``documents``, as ``write_rows`` has it; ``packing`` is "stream" (nothing is lost) or "best_fit" (every
    row begins with a document, and what does not fit is cropped).

    The manifest tells ``documents``, ``characters``, ``stream_tokens`` that were read, in best fit how many tokens of
    them were ``cropped``, and what had to be repaired. Raises RowsError for too little text or space.
    """
    if packing not in PACKINGS:
        raise RowsError(f"packing {packing!r} is none of {', '.join(PACKINGS)}")
    identity: dict[str, Any] = {"source": documents.fingerprint()}
    if packing == "best_fit":
        identity["packing"] = [packing, BUFFER, REFILL]
    if documents.in_blocks:  # the order of training is part of what such rows are: data/loader.py
        identity["block"] = rows_per_shard or shard_rows(T, row_dtype(tokenizer.vocab_size))

    def packer_at(state: Any) -> Packer:
        nothing = {"documents": 0, "characters": 0, "stream_tokens": 0, **TextStats().as_dict()}
        if packing == "best_fit":
            read, dtype = state["now"] if state else nothing, row_dtype(tokenizer.vocab_size)
            pieces = _pieces(documents, tokenizer, read, REFILL)
            return BestFitDocuments(T, tokenizer.bos_id, dtype, pieces, read, state, BUFFER)
        state = state or {"before": nothing, "token": 0}
        return TokenStream(T, _pieces(documents, tokenizer, state["before"]), state["before"], state["token"])

    def judge(tally: Tally, rows: int) -> dict[str, Any]:
        invalid, bad = tally["invalid_utf8"], tally["bad_lines"]
        if invalid or bad:
            logger.warning("%s text: %d invalid UTF-8 sequences replaced, %d lines left out", split, invalid, bad)
        if rows == 0:
            raise RowsError(
                f"the {split} text has only {tally['stream_tokens']} tokens, too few for one row of {T + 1}; give more "
                "text or shorter rows"
            )
        if cropped := tally.get("cropped"):
            logger.info("%s text: %.1f%% of its tokens were cropped", split, 100 * cropped / tally["stream_tokens"])
        return tally

    return write_rows(
        identity, tokenizer, T, split, packer_at, judge, name="best_fit-" if packing == "best_fit" else "",
        out_dir=out_dir, max_rows=max_rows, rows_per_shard=rows_per_shard, progress=progress,
    )  # fmt: skip


def _pieces(
    documents: Documents, tokenizer: Tokenizer, before: Tally, most: int | None = None
) -> Generator[Piece, None, None]:
    """The documents that follow those of the tally ``before``, encoded in batches (of up to ``most``)."""
    tally, most = before, most or _BATCH_DOCUMENTS
    with contextlib.closing(read_ahead(_batches(documents, before["documents"], most), documents.stop)) as batches:
        for texts, repairs in batches:
            ids, _ = tokenizer.encode_to_numpy(texts)
            tally = {
                "documents": tally["documents"] + len(texts),
                "characters": tally["characters"] + sum(map(len, texts)),
                "stream_tokens": tally["stream_tokens"] + len(ids),
                "invalid_utf8": before["invalid_utf8"] + repairs.invalid_utf8,
                "bad_lines": before["bad_lines"] + repairs.bad_lines,
                "messages": (before["messages"] + repairs.messages)[:KEPT_MESSAGES],
            }
            yield Piece(ids, tally)


def _batches(documents: Documents, start: int, most: int) -> Iterator[tuple[list[str], TextStats]]:
    """Documents from number ``start`` in batches, each with the repairs since ``start`` up to its end.

    Where a batch ends depends only on the documents from its own first one on.
    """
    texts: list[str] = []
    chars = 0
    for text in documents.iterate(start):
        texts.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS or len(texts) >= most:
            yield texts, TextStats(**documents.stats.as_dict())
            texts, chars = [], 0
    yield texts, TextStats(**documents.stats.as_dict())  # the repairs after the last document, and what is left


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
