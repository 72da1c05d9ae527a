"""Tokens into rows of T+1: one after another as a stream, or documents or conversations side by side by best fit.

A packer takes what it packs from a source and keeps a tally, JSON-able, of what has been read. Its state is what it
needs to make the rows that follow again.
"""

import base64
import contextlib
import itertools
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

_KEPT_PROBLEMS = 20  # in the manifest

Tally = dict[str, Any]


class Packer(Protocol):
    """Makes rows, one shard's worth after the other."""

    source: Generator[Any, None, None]
    tally: Tally

    def take(self, most: int) -> tuple[np.ndarray, np.ndarray | None] | None:
        """The next rows, (n, T+1) with 1 <= n <= most, and their masks; None when the source is used up."""
        ...

    def state(self) -> dict[str, Any]:
        """From where the rows that follow can be made again; "now" is the tally."""
        ...


class Piece(NamedTuple):
    """Tokens of some documents, or of a conversation (none where it is left out), and the tally once they are read."""

    ids: np.ndarray
    tally: Tally


class TokenStream:
    """Rows of one stream of tokens: row r holds stream[rT : rT + T+1], so consecutive rows share one token and every
    token is an input once and a target once. What is left at the end is too short for a row.

    source: pieces, from the one on in which the next row begins, at its token number ``token``; before: the tally
    before that piece.
    """

    def __init__(self, T: int, source: Generator[Piece, None, None], before: Tally, token: int = 0):
        self.source, self.tally = source, before
        self._T = T
        self._waiting: deque[tuple[Tally, np.ndarray]] = deque()  # the tally before a piece, and its tokens
        self._token, self._available = token, -token

    def state(self) -> dict[str, Any]:
        return {"before": self._waiting[0][0], "token": self._token, "now": self.tally}

    def take(self, most: int) -> tuple[np.ndarray, None] | None:
        # 1. read until there is a row
        while self._available <= self._T:
            piece = next(self.source, None)
            if piece is None:
                return None
            self._waiting.append((self.tally, piece.ids))
            self._available += len(piece.ids)
            self.tally = piece.tally
        # 2. the tokens of as many rows as there are
        count = min(most, (self._available - 1) // self._T)
        parts, missing, start = [], count * self._T + 1, self._token
        for _, ids in self._waiting:
            parts.append(ids[start : start + missing])
            missing -= len(parts[-1])
            start = 0
            if not missing:
                break
        # 3. the last token begins the next row; pieces that are used up go
        self._available -= count * self._T
        self._token += count * self._T
        while self._token >= len(self._waiting[0][1]):
            self._token -= len(self._waiting.popleft()[1])
        return np.lib.stride_tricks.sliding_window_view(np.concatenate(parts), self._T + 1)[:: self._T], None


# --- best fit ---------------------------------------------------------------------------------------------------------

Item = TypeVar("Item")


class LengthBuffer(Generic[Item]):
    """Items by length; among equals, the first to arrive comes first."""

    def __init__(self):
        self._items: dict[int, Item] = {}  # arrival -> item
        self._sorted: list[tuple[int, int]] = []  # (length, -arrival)
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        """In the order of arrival."""
        return iter(self._items.values())

    def add(self, length: int, item: Item) -> None:
        arrival = next(self._arrivals)
        self._items[arrival] = item
        insort(self._sorted, (length, -arrival))

    def pop_longest(self, most: int) -> Item | None:
        """The longest of at most so many tokens; None where there is none."""
        return self._pop(bisect_right(self._sorted, (most, 1)) - 1)

    def pop_shortest(self) -> Item | None:
        return self._pop(bisect_right(self._sorted, (self._sorted[0][0], 1)) - 1 if self._sorted else -1)

    def _pop(self, index: int) -> Item | None:
        if index < 0:
            return None
        _, arrival = self._sorted.pop(index)
        return self._items.pop(-arrival)


class TokenizedDocument(NamedTuple):
    """Its length, and as many of its tokens as a row can hold."""

    length: int
    ids: np.ndarray


class BestFitDocuments:
    """Rows that each begin with a document and are full: always the longest document in the buffer that still fits;
    where none does, the shortest is cropped to what is left of the row, and its rest is lost (reference behaviour).

    source: pieces, those first that follow the state's; every document begins with `bos`. buffer: whenever there are
    fewer documents to choose from, those of another piece are added. The tally counts the `cropped` tokens. What is
    left in the end is too little for a row; then the buffer has run dry, so the last rows fit less well.
    """

    def __init__(
        self,
        T: int,
        bos: int,
        dtype: np.dtype,
        source: Generator[Piece, None, None],
        tally: Tally,
        state: dict[str, Any] | None,
        buffer: int,
    ):
        self.source, self.tally = source, {**tally, "cropped": tally.get("cropped", 0)}
        self._T, self._bos, self._dtype, self._size = T, bos, dtype, buffer
        self._buffer: LengthBuffer[TokenizedDocument] = LengthBuffer()
        if state:
            ids, at = np.frombuffer(base64.b64decode(state["ids"]), dtype), 0
            for length in state["lengths"]:
                self._buffer.add(length, TokenizedDocument(length, ids[at : at + min(length, T + 1)]))
                at += min(length, T + 1)

    def state(self) -> dict[str, Any]:
        """The documents themselves, cut to what a row can hold: some stay in the buffer for as long as it exists."""
        ids = np.concatenate([np.empty(0, self._dtype), *(document.ids for document in self._buffer)])
        return {
            "lengths": [document.length for document in self._buffer],
            "ids": base64.b64encode(ids.astype(self._dtype).tobytes()).decode(),
            "now": self.tally,
        }

    def _refill(self) -> None:
        while len(self._buffer) < self._size:
            piece = next(self.source, None)
            if piece is None:
                return
            self.tally = {**piece.tally, "cropped": self.tally["cropped"]}
            starts = np.flatnonzero(piece.ids == self._bos)
            for start, length in zip(starts, np.diff(starts, append=len(piece.ids)), strict=True):
                kept = piece.ids[start : start + min(length, self._T + 1)]
                self._buffer.add(int(length), TokenizedDocument(int(length), kept))

    def take(self, most: int = 1) -> tuple[np.ndarray, None] | None:
        """One row."""
        row, filled = np.empty((1, self._T + 1), self._dtype), 0
        while filled <= self._T:
            self._refill()
            left = self._T + 1 - filled
            document = self._buffer.pop_longest(left) or self._buffer.pop_shortest()
            if document is None:
                return None
            kept = document.ids[:left]
            row[0, filled : filled + len(kept)] = kept
            filled += len(kept)
            self.tally = {**self.tally, "cropped": self.tally["cropped"] + document.length - len(kept)}
        return row, None


class Rendered(NamedTuple):
    """A conversation's ids and loss mask (1-D, equally long), cut to the limit if ``cut``."""

    ids: np.ndarray
    mask: np.ndarray
    cut: bool


# Conversations by their numbers, each rendered or the reason why it cannot be used.
RenderedConversations = Generator[tuple[int, Rendered | str], None, None]

NO_CONVERSATIONS: Tally = {
    "conversations": 0, "truncated": 0, "skipped": 0, "supervised_tokens": 0, "padding": 0,
    "problems": [],  # [index, reason] of the first few that were skipped
}  # fmt: skip


def _used(tally: Tally, rendered: Rendered) -> Tally:
    counts = {"conversations": tally["conversations"] + 1, "truncated": tally["truncated"] + rendered.cut}
    return {**tally, **counts}


def _skipped(tally: Tally, index: int, reason: str) -> Tally:
    problems = [*tally["problems"], [index, reason]][:_KEPT_PROBLEMS]
    return {**tally, "skipped": tally["skipped"] + 1, "problems": problems}


def conversation_pieces(source: RenderedConversations, tally: Tally) -> Generator[Piece, None, None]:
    """All tokens of conversations one after another, for a `TokenStream`."""
    with contextlib.closing(source):
        for index, rendered in source:
            if isinstance(rendered, str):
                tally = _skipped(tally, index, rendered)
                yield Piece(np.empty(0, np.uint16), tally)
            else:
                tally = _used(tally, rendered)
                yield Piece(rendered.ids, tally)


class BestFitConversations:
    """Rows of unsplit conversations: always the longest in the buffer that still fits (the first among equals), then
    `pad`, which is never supervised.

    source: conversations, those first that were in the buffer of the state.
    """

    def __init__(
        self,
        capacity: int,
        pad: int,
        dtype: np.dtype,
        source: RenderedConversations,
        state: dict[str, Any] | None,
        buffer: int,
    ):
        self.source, self.tally = source, state["now"] if state else NO_CONVERSATIONS
        self._capacity, self._pad, self._dtype, self._size = capacity, pad, dtype, buffer
        self._buffer: LengthBuffer[tuple[int, Rendered]] = LengthBuffer()  # by number
        self._next: int = state["next"] if state else 0

    def state(self) -> dict[str, Any]:
        return {"next": self._next, "buffer": [index for index, _ in self._buffer], "now": self.tally}

    def _refill(self) -> None:
        while len(self._buffer) < self._size:
            index, rendered = next(self.source, (-1, ""))
            if index < 0:
                return
            self._next = max(self._next, index + 1)
            if isinstance(rendered, str):
                self.tally = _skipped(self.tally, index, rendered)
            elif not rendered.mask.any():
                within = f" in the first {len(rendered.ids)} tokens" if rendered.cut else ""
                self.tally = _skipped(self.tally, index, f"no token of the assistant{within}, so nothing to learn")
            else:
                self._buffer.add(len(rendered.ids), (index, rendered))

    def take(self, most: int = 1) -> tuple[np.ndarray, np.ndarray] | None:
        """One row and its mask."""
        self._refill()
        if not self._buffer:
            return None
        row = np.full((1, self._capacity), self._pad, self._dtype)
        mask = np.zeros((1, self._capacity), np.uint8)
        filled = 0
        while (found := self._buffer.pop_longest(self._capacity - filled)) is not None:
            _, rendered = found
            end = filled + len(rendered.ids)
            row[0, filled:end], mask[0, filled:end] = rendered.ids, rendered.mask
            filled = end
            self.tally = _used(self.tally, rendered)
            self._refill()
        counts = {"padding": self._capacity - filled, "supervised_tokens": int(mask[0, 1:].sum())}
        self.tally = {**self.tally, **{name: self.tally[name] + n for name, n in counts.items()}}
        return row, mask
