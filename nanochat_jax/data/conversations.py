"""Conversations to token rows, once, in one of two packings.

``stream`` (midtraining): all rendered conversations one after another, every token supervised, cut into rows of T+1
tokens as in ``data/rows.py``. ``best_fit`` (finetuning): whole conversations side by side in rows of T+1 tokens, with a
loss mask; what is left of a row is padded with bos, which is never supervised.

Both make one pass over the conversations in their order. The reference goes round: it fills its last batch with the
first conversations again. Here a stream's incomplete last row is left out (and with ``batch_rows`` the incomplete last
batch), a constant difference of less than one; best fit empties its buffer in the end, so nothing is left out.
"""

import contextlib
import itertools
import logging
import sys
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from nanochat_jax import conversation as rendering
from nanochat_jax.data.row_files import (
    MANIFEST,
    ROWS_FORMAT,
    ROWS_VERSION,
    SHARD_BYTES,
    RowsError,
    RowWriter,
    row_dtype,
)
from nanochat_jax.data.rows import Progress, RowSet, identity_key, read_ahead
from nanochat_jax.paths import rows_dir
from nanochat_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PACKINGS = ("stream", "best_fit")
# Best fit chooses among this many conversations (the reference's number).
BUFFER = 100
# Part of the identity of the rows: raise it when a rule below changes.
CONVERSATION_ROWS_VERSION = 1

_KEPT_PROBLEMS = 20  # in the manifest
_SHOWN_PROBLEMS = 5  # in a message
_RENDER_AT_ONCE = 512


class Conversations(Protocol):
    """What rows are made from: ``{"messages": [...]}`` by number, and a name that changes when any of them does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def fingerprint(self) -> str: ...


class Rendered(NamedTuple):
    """A conversation's ids and loss mask (1-D, equally long), cut to the limit if ``cut``."""

    ids: np.ndarray
    mask: np.ndarray
    cut: bool


def check_contents(conversation: dict[str, Any]) -> None:
    """Raises ValueError when a user's or the assistant's message is empty or only white space.

    Such a conversation would teach the model to say nothing; the renderer itself accepts it, as the reference does.
    """
    for index, message in enumerate(conversation["messages"]):
        content = message["content"]
        texts = [part["text"] for part in content] if isinstance(content, list) else [content]
        if message["role"] != "system" and all(isinstance(t, str) and (not t or t.isspace()) for t in texts):
            raise ValueError(f"message {index} ({message['role']}) is empty")


def render_many(conversations: Iterable[dict[str, Any]], tokenizer: Tokenizer, max_tokens: int) -> list[Rendered | str]:
    """Each conversation as ``tokenizer.render_conversation`` renders it, or the reason why it cannot be used.

    Fast because all texts of all conversations are encoded in one threaded call: ``render_conversation`` gets an
    encoder that notes the text and leaves a negative number in its place, and the ids are put there afterwards.
    """
    texts: list[str] = []

    def note(text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"a part's text is {type(text).__name__}, not a string")
        texts.append(text)
        return [-1]

    layout: list[int] = []  # ids of special tokens, and -1 where the next text goes
    learn: list[int] = []
    ends: list[int] = []  # of each usable conversation in the layout
    found: list[str | None] = []
    for conversation in conversations:
        noted = len(texts)
        try:
            check_contents(conversation)
            ids, mask = rendering.render_conversation(conversation, note, tokenizer.encode_special, sys.maxsize)
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            del texts[noted:]
            found.append(f"no key {error}" if isinstance(error, KeyError) else str(error))
            continue
        layout += ids
        learn += mask
        ends.append(len(layout))
        found.append(None)
    encoded, offsets = tokenizer.encode_to_numpy(texts)  # with a bos before each text, which is dropped here
    encoded = np.delete(encoded, offsets[:-1])
    places = np.asarray(layout, np.int64)
    is_text = places < 0
    sizes = np.ones(len(places), np.int64)
    sizes[is_text] = np.diff(offsets) - 1
    all_ids = np.repeat(np.where(is_text, 0, places).astype(row_dtype(tokenizer.vocab_size)), sizes)
    all_ids[np.repeat(is_text, sizes)] = encoded
    all_masks = np.repeat(np.asarray(learn, np.uint8), sizes)
    stops = np.concatenate([[0], np.cumsum(sizes)])[np.asarray([0, *ends], np.int64)].tolist()
    spans = iter(itertools.pairwise(stops))

    def cut_out(reason: str | None) -> Rendered | str:
        if reason is not None:
            return reason
        start, stop = next(spans)
        kept = min(stop, start + max_tokens)
        return Rendered(all_ids[start:kept], all_masks[start:kept], kept < stop)

    return [cut_out(reason) for reason in found]


def build_conversation_rows(
    conversations: Conversations,
    tokenizer: Tokenizer,
    T: int,
    *,
    packing: str,
    split: str,
    out_dir: str | Path | None = None,
    max_rows: int | None = None,
    batch_rows: int | None = None,
    progress: Progress | None = None,
    rows_per_shard: int | None = None,
) -> RowSet:
    """Rows of T+1 tokens of ``conversations`` in a directory below ``out_dir`` (default: the base directory's rows/).

    ``packing`` is "stream" (no masks; ``batch_rows = B`` gives the reference's stride of B*T+1 tokens a batch) or
    "best_fit" (with masks). A rendered conversation is cut to max(2048, T) tokens (the reference: always to 2048), in
    best fit also to T+1, so that it fits into a row: in the reference a longer one stays in the buffer for ever and at
    last blocks it. Conversations that cannot be used are left out, counted and reported: wrong roles, empty contents,
    in best fit also those without a supervised token (after the cut).

    Rows made before from the same are opened as they are and an interrupted build goes on, as in ``data/rows.py``. The
    manifest tells ``conversations`` (used), ``skipped``, ``truncated``, ``problems`` (the first few, as [index,
    reason]), ``tokens`` (targets), ``supervised_tokens``, ``padding``. ``progress(rows, tokens, conversations)``.

    Raises RowsError when no conversation can be used, when they do not fill one row, or when there is no space.
    """
    if packing not in PACKINGS:
        raise RowsError(f"packing {packing!r} is none of {', '.join(PACKINGS)}")
    if T < 1:
        raise RowsError(f"a row of T = {T} tokens is too short; T must be 1 or more")
    if max_rows is not None and max_rows < 1:
        raise RowsError(f"max_rows={max_rows}: at least one row must be allowed")
    if batch_rows and packing != "stream":
        raise RowsError("batch_rows belongs to the packing 'stream' only")
    missing = [name for name in _CHAT_TOKENS if name not in tokenizer.special_tokens]
    if missing:
        raise RowsError(f"the tokenizer lacks {', '.join(missing)}: it cannot render conversations; train one of ours")
    dtype = row_dtype(tokenizer.vocab_size)
    rows_per_shard = rows_per_shard or max(1, SHARD_BYTES // ((T + 1) * dtype.itemsize))
    if batch_rows:
        rows_per_shard = -(-rows_per_shard // batch_rows) * batch_rows
    identity = {
        "format": [ROWS_FORMAT, ROWS_VERSION],
        "kind": ["conversations", CONVERSATION_ROWS_VERSION, packing, BUFFER],
        "source": conversations.fingerprint(),
        "tokenizer": tokenizer.hash,
        "split": split,
        "T": T,
        "batch_rows": batch_rows,
        "max_rows": max_rows,
        "rows_per_shard": rows_per_shard,
    }
    name = f"{packing}-{split}-T{T}-{identity_key(identity)[:12]}"
    directory = Path(out_dir if out_dir is not None else rows_dir()) / name
    if (directory / MANIFEST).is_file():  # also where the place is read-only
        return RowSet.open(directory, tokenizer)
    masked = packing == "best_fit"
    with RowWriter(directory, identity, T, dtype, masked=masked, rows_per_shard=rows_per_shard) as writer:
        if not writer.complete:
            limit = max(rendering.DEFAULT_MAX_TOKENS, T)
            if packing == "stream":
                packer: _Stream | _BestFit = _Stream(T, batch_rows, writer.state)
            else:
                packer = _BestFit(T + 1, tokenizer.bos_id, dtype, writer.state, BUFFER)
                limit = min(limit, T + 1)
            if max_rows is not None and writer.rows >= max_rows:  # interrupted just before the manifest
                tally = Tally(**writer.state["now"])
            else:
                source = _render_ahead(conversations, packer.order(len(conversations)), tokenizer, limit)
                with contextlib.closing(source):
                    _fill(writer, packer, source, max_rows, progress)
                tally = packer.tally
            _report(tally, split, len(conversations), writer.rows, (batch_rows or 1) * T + 1, limit)
            writer.finish(
                {
                    "split": split,
                    "packing": packing,
                    "tokenizer_hash": tokenizer.hash,
                    "vocab_size": tokenizer.vocab_size,
                    "tokens": writer.rows * T,
                    **asdict(tally),
                    "supervised_tokens": tally.supervised_tokens if masked else writer.rows * T,
                }
            )
    return RowSet.open(directory, tokenizer)


_CHAT_TOKENS = (rendering.USER_START, rendering.USER_END, rendering.ASSISTANT_START, rendering.ASSISTANT_END)

# What a packer reads: (index, the rendered conversation or the reason why there is none).
_Source = Iterator[tuple[int, Rendered | str]]


@dataclass
class Tally:
    """What became of the conversations so far."""

    conversations: int = 0
    truncated: int = 0
    skipped: int = 0
    supervised_tokens: int = 0
    padding: int = 0
    problems: list[list[Any]] = field(default_factory=list)  # [index, reason] of the first few skipped

    def skip(self, index: int, reason: str) -> None:
        """Counts a conversation that is left out."""
        self.skipped += 1
        if len(self.problems) < _KEPT_PROBLEMS:
            self.problems.append([index, reason])


def _report(tally: Tally, split: str, total: int, rows: int, need: int, limit: int) -> None:
    shown = "; ".join(f"conversation {index}: {reason}" for index, reason in tally.problems[:_SHOWN_PROBLEMS])
    if tally.conversations == 0:
        why = f" ({shown})" if shown else ""
        raise RowsError(f"none of the {total} {split} conversations can be used{why}; give other conversations")
    if rows == 0:
        raise RowsError(
            f"the {total} {split} conversations are too short for {need} tokens, the least that is needed; give more "
            "of them or shorter rows"
        )
    if tally.skipped:
        logger.warning("%d of %d %s conversations left out: %s", tally.skipped, total, split, shown)
    if tally.truncated:
        logger.warning("%d of %d %s conversations cut to %d tokens", tally.truncated, total, split, limit)


def _render_ahead(conversations: Conversations, order: Iterable[int], tokenizer: Tokenizer, limit: int) -> Any:
    """Rendered conversations in ``order``, the next batch being made in a thread. Close it in the end."""

    def batches() -> Iterator[list[tuple[int, Rendered | str]]]:
        indices = iter(order)
        while batch := list(itertools.islice(indices, _RENDER_AT_ONCE)):
            rendered = render_many((conversations[index] for index in batch), tokenizer, limit)
            yield list(zip(batch, rendered, strict=True))

    with contextlib.closing(read_ahead(batches())) as ahead:
        for batch in ahead:
            yield from batch


def _fill(
    writer: RowWriter,
    packer: "_Stream | _BestFit",
    source: _Source,
    max_rows: int | None,
    progress: Progress | None,
) -> None:
    reported = -1
    while max_rows is None or writer.rows < max_rows:
        taken = packer.take(source)
        if taken is not None:
            rows, masks = taken
            writer.add(rows if max_rows is None else rows[: max_rows - writer.rows], masks)
            if writer.full:
                writer.commit(packer.state())
        now = packer.tally.conversations // _RENDER_AT_ONCE
        if progress is not None and (now != reported or taken is None):
            reported = now
            progress(writer.rows, writer.rows * writer.T, packer.tally.conversations)
        if taken is None:
            break


class _Stream:
    """Rows from all conversations one after another.

    Its state is where the next row begins (a conversation's number and a token in it) and the tally before that
    conversation, besides the tally at hand.
    """

    def __init__(self, T: int, batch_rows: int | None, state: dict[str, Any] | None):
        self._T = T
        self._need = (batch_rows or 1) * T + 1
        self._use = self._need if batch_rows else T  # without batches, the last token begins the next row
        # index, ids, (conversations, truncated, skipped) before; the next row begins at token `offset` of the first
        self._waiting: deque[tuple[int, np.ndarray, tuple[int, int, int]]] = deque()
        self._next: int = state["next"] if state else 0  # the conversation to read next
        self._offset: int = state["token"] if state else 0
        self._available = -self._offset
        self.tally = Tally(**state["before"]) if state else Tally()

    def order(self, count: int) -> Iterable[int]:
        """Numbers of the conversations still to be read."""
        return range(self._next, count)

    def state(self) -> dict[str, Any]:
        """From where the rows that follow can be made again."""
        now = asdict(self.tally)
        if not self._waiting:
            return {"next": self._next, "token": 0, "before": now, "now": now}
        first, _, (conversations, truncated, skipped) = self._waiting[0]
        before = {**now, "conversations": conversations, "truncated": truncated, "skipped": skipped}
        before["problems"] = [problem for problem in now["problems"] if problem[0] < first]
        return {"next": first, "token": self._offset, "before": before, "now": now}

    def take(self, source: _Source) -> tuple[np.ndarray, None] | None:
        """The next row (1, T+1), or batch of rows; None when the conversations are used up."""
        tally = self.tally
        while self._available < self._need:
            index, rendered = next(source, (-1, ""))
            if index < 0:
                return None
            self._next = index + 1
            if isinstance(rendered, str):
                tally.skip(index, rendered)
                continue
            self._waiting.append((index, rendered.ids, (tally.conversations, tally.truncated, tally.skipped)))
            self._available += len(rendered.ids)
            tally.conversations += 1
            tally.truncated += rendered.cut
        pieces, missing, start = [], self._need, self._offset
        for _, ids, _ in self._waiting:
            pieces.append(ids[start : start + missing])
            missing -= len(pieces[-1])
            start = 0
            if not missing:
                break
        self._available -= self._use
        self._offset += self._use
        while self._waiting and self._offset >= len(self._waiting[0][1]):
            self._offset -= len(self._waiting.popleft()[1])
        return np.lib.stride_tricks.sliding_window_view(np.concatenate(pieces), self._T + 1)[:: self._T], None


class _BestFit:
    """Rows of whole conversations: always the longest in the buffer that still fits (the first among equals), then bos.

    Its state is the conversation to read next and the numbers of those in the buffer, besides the tally.
    """

    def __init__(self, capacity: int, pad: int, dtype: np.dtype, state: dict[str, Any] | None, buffer: int):
        self._capacity, self._pad, self._dtype, self._size = capacity, pad, dtype, buffer
        self._buffer: dict[int, tuple[int, Rendered]] = {}  # arrival -> index, conversation
        self._sorted: list[tuple[int, int]] = []  # (length, -arrival)
        self._arrivals = 0
        self._resumed: list[int] = state["buffer"] if state else []
        self._next: int = state["next"] if state else 0
        self.tally = Tally(**state["now"]) if state else Tally()

    def order(self, count: int) -> Iterable[int]:
        """Numbers of the conversations still to be read, those that were in the buffer first."""
        return itertools.chain(self._resumed, range(self._next, count))

    def state(self) -> dict[str, Any]:
        """From where the rows that follow can be made again."""
        buffer = [index for index, _ in self._buffer.values()]
        return {"next": self._next, "buffer": buffer, "now": asdict(self.tally)}

    def _refill(self, source: _Source) -> None:
        while len(self._buffer) < self._size:
            index, rendered = next(source, (-1, ""))
            if index < 0:
                return
            self._next = max(self._next, index + 1)
            if isinstance(rendered, str):
                self.tally.skip(index, rendered)
            elif not rendered.mask.any():
                within = f" in the first {len(rendered.ids)} tokens" if rendered.cut else ""
                self.tally.skip(index, f"no token of the assistant{within}, so nothing to learn")
            else:
                self._buffer[self._arrivals] = index, rendered
                insort(self._sorted, (len(rendered.ids), -self._arrivals))
                self._arrivals += 1

    def take(self, source: _Source) -> tuple[np.ndarray, np.ndarray] | None:
        """The next row and its mask, (1, T+1) each; None when the conversations are used up."""
        self._refill(source)
        if not self._buffer:
            return None
        row = np.full((1, self._capacity), self._pad, self._dtype)
        mask = np.zeros((1, self._capacity), np.uint8)
        filled = 0
        while place := bisect_right(self._sorted, (self._capacity - filled, 1)):
            _, arrival = self._sorted.pop(place - 1)
            _, rendered = self._buffer.pop(-arrival)
            end = filled + len(rendered.ids)
            row[0, filled:end], mask[0, filled:end] = rendered.ids, rendered.mask
            filled = end
            self.tally.conversations += 1
            self.tally.truncated += rendered.cut
            self._refill(source)
        self.tally.padding += self._capacity - filled
        self.tally.supervised_tokens += int(mask[0, 1:].sum())
        return row, mask
