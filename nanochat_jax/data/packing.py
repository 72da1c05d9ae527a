"""Conversations into rows: one after another as a stream, or side by side by best fit.

A packer takes rendered conversations from a source, row by row, and counts what became of them. Its state is what it
needs to make the rows that follow again.
"""

import itertools
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

_KEPT_PROBLEMS = 20  # in the manifest


class Rendered(NamedTuple):
    """A conversation's ids and loss mask (1-D, equally long), cut to the limit if ``cut``."""

    ids: np.ndarray
    mask: np.ndarray
    cut: bool


# What a packer reads: (index, the rendered conversation or the reason why there is none).
Source = Iterator[tuple[int, Rendered | str]]


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


class TokenStream:
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
        """From where the rows that follow can be rebuilt."""
        now = asdict(self.tally)
        if not self._waiting:
            return {"next": self._next, "token": 0, "before": now, "now": now}
        first, _, (conversations, truncated, skipped) = self._waiting[0]
        before = {**now, "conversations": conversations, "truncated": truncated, "skipped": skipped}
        before["problems"] = [problem for problem in now["problems"] if problem[0] < first]
        return {"next": first, "token": self._offset, "before": before, "now": now}

    def take(self, source: Source) -> tuple[np.ndarray, None] | None:
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


class BestFit:
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
        """From where the rows that follow can be rebuilt."""
        buffer = [index for index, _ in self._buffer.values()]
        return {"next": self._next, "buffer": buffer, "now": asdict(self.tally)}

    def _refill(self, source: Source) -> None:
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

    def take(self, source: Source) -> tuple[np.ndarray, np.ndarray] | None:
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
