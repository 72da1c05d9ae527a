"""Chance that can be repeated anywhere, and the one rule that keeps training text and held-out text apart.

Two properties matter more than statistical polish:

* **The same document everywhere.** A document is a pure function of (seed, split, index). Only `random.Random.random`
  is used, the one method whose sequence Python promises to keep between versions; `hash()`, which differs between
  processes, is not used at all.
* **A combination lives on one side.** `side(*key)` assigns every combination (two numbers to add, a word to spell, a
  hero with a place and a thing, ...) to "train" or "val" by a stable hash. A document of one split may use only
  combinations of that side, so held-out text is new by construction and not by luck.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")

TRAIN = "train"
VAL = "val"
SPLITS = (TRAIN, VAL)
VAL_ONE_IN = 10  # one combination in ten is held out


def stable_hash(text: str) -> int:
    """A 64-bit number for `text`, the same in every process, on every machine and in every Python version."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def side(*key: object) -> str:
    """ "train" or "val": where the combination `key` belongs. The parts are compared by their `str`, in order."""
    return VAL if stable_hash("\x1f".join(map(str, key))) % VAL_ONE_IN == 0 else TRAIN


@cache
def sum_side(a: int, b: int) -> str:
    """The side of the number family {a, b, a + b}: a + b, b + a, (a + b) - a and (a + b) - b always go together.

    The families every child learns by heart (both numbers at most 10) are for training only: nobody can be asked to
    work out 34 + 27 who has never seen 4 + 7.
    """
    low, high = sorted((a, b))
    return TRAIN if high <= 10 else side("sum", low, high)


@cache
def word_side(word: str) -> str:
    """The side on which `word` is spelled or has its letters counted. (As a plain word it may occur in both.)"""
    return side("spell", word.lower())


class Draw:
    """The chance of one document: every choice that the document makes comes from here, in order."""

    __slots__ = ("_next", "split")

    def __init__(self, seed: int, split: str, index: int):
        """Raises ValueError for a split other than "train" and "val" and for a negative index."""
        if split not in SPLITS:
            raise ValueError(f"split must be 'train' or 'val', not {split!r}")
        if index < 0:
            raise ValueError(f"document index must not be negative, got {index}")
        self.split = split
        self._next = random.Random(stable_hash(f"{seed}/{split}/{index}")).random

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self._next() * n)

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._next() * (high - low + 1))

    def chance(self, p: float) -> bool:
        """True with probability `p`."""
        return self._next() < p

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`, all equally likely."""
        return items[int(self._next() * len(items))]

    def some(self, items: Sequence[T], k: int) -> list[T]:
        """`k` different members of `items` (fewer if there are fewer), in random order."""
        pool = list(items)
        n = len(pool)
        for i in range(min(k, n)):
            j = i + int(self._next() * (n - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]

    def combination(self, name: str, *pools: Sequence) -> tuple:
        """One member of each pool, such that the combination (name, members...) belongs to this draw's split."""
        while True:
            chosen = tuple(self.pick(pool) for pool in pools)
            if side(name, *chosen) == self.split:
                return chosen

    def selection(self, name: str, items: Sequence[T], k: int) -> list[T]:
        """`k` different members of `items` whose set, under `name`, belongs to this draw's split, in random order."""
        while True:
            chosen = self.some(items, k)
            if side(name, *sorted(map(str, chosen))) == self.split:
                return chosen

    def addends(self, low: int, high: int, low2: int | None = None, high2: int | None = None) -> tuple[int, int]:
        """Two numbers whose family belongs to this split: the first in [low, high], the second in [low2, high2].

        The held-out side has no families with both numbers at most 10, so the ranges must reach above 10; ranges in
        which no family of this split is met raise ValueError instead of searching for ever.
        """
        low2 = low if low2 is None else low2
        high2 = high if high2 is None else high2
        for _ in range(2000):
            a, b = self.between(low, high), self.between(low2, high2)
            if sum_side(a, b) == self.split:
                return a, b
        raise ValueError(f"no {self.split} sums with numbers in [{low}, {high}] and [{low2}, {high2}]")

    def word(self, words: Sequence[str]) -> str:
        """One of `words` that this split may spell."""
        while True:
            word = self.pick(words)
            if word_side(word) == self.split:
                return word
