"""Batches from rows, as a pure function of the step: (seed, step, global batch) decide a batch, nothing else.

So a run resumes exactly where it stopped, without reading anything again, and 1, 2 or 8 processes see the same global
batch, each its own slice of it.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from nanochat_jax.data.row_store import RowsError, RowSet
from nanochat_jax.utils.errors import UserError

# Read-ahead of whole batches. Rows are memory-mapped and cheap; more threads would only fight with the host's work.
_THREADS, _BUFFERED = 1, 4


class LoaderError(UserError, ValueError):
    """Sizes that do not fit; the message names the flag to change."""


Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


class RowSource(Protocol):
    """What a loader reads: T, a length, rows of T+1 ids, and a mask per row or None (see ``data/row_store.py``)."""

    T: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...

    def mask(self, index: int) -> np.ndarray | None: ...


class BlockOrder:
    """Position in the endless stream of training rows -> row number, rows being shuffled within *blocks* only.

    That is as good as a shuffle of all rows only if the documents themselves come in random order, as those of the
    default data set and of ``dev/repackage_data.py`` do. A block is one file of rows (64 MiB, about 33 M tokens at two
    bytes), so that a batch reads from one file at a time. Every epoch shuffles every block anew. The generator is
    numpy's frozen one, so that an upgrade never changes the order of a run.
    """

    def __init__(self, rows: int, block: int, seed: int):
        self._rows, self._block, self._seed = rows, block, seed & 0xFFFFFFFF
        self._latest: tuple[tuple[int, int], np.ndarray] | None = None

    def __getitem__(self, position: int) -> int:
        epoch, position = divmod(position, self._rows)
        block, place = divmod(position, self._block)
        return block * self._block + int(self._shuffled(epoch, block)[place])

    def _shuffled(self, epoch: int, block: int) -> np.ndarray:
        latest = self._latest
        if latest is None or latest[0] != (epoch, block):
            size = min(self._block, self._rows - block * self._block)
            generator = np.random.RandomState([self._seed, epoch, block])
            self._latest = latest = (epoch, block), generator.permutation(size).astype(np.int32)
        return latest[1]


class RowLoader:
    """Shuffled (anew in every epoch) or ordered batches of ``global_batch`` rows, for ever.

    Rows that say so (``RowSet.block``) are shuffled within blocks, all others together.
    """

    def __init__(self, rows: RowSource, global_batch: int, seed: int = 0, shuffle: bool = True):
        if global_batch < 1:
            raise LoaderError(f"global_batch is {global_batch}; it must be 1 or more")
        if len(rows) < 1:
            raise LoaderError("there are no rows to load; build rows from more text")
        self.rows, self.global_batch = rows, global_batch
        # position in the endless stream -> row number
        if shuffle and isinstance(rows, RowSet) and rows.block is not None:
            self._order: Any = BlockOrder(len(rows), rows.block, seed)
        else:
            order = grain.MapDataset.range(len(rows)).seed(seed)
            self._order = (order.shuffle() if shuffle else order).repeat()

    def indices_for(self, step: int, part: Sequence[int] | None = None) -> list[int]:
        """Row numbers of the batch of ``step``, or of some positions in it."""
        first = step * self.global_batch
        return [int(self._order[first + position]) for position in (range(self.global_batch) if part is None else part)]

    def batch_for(self, step: int, part: Sequence[int] | None = None) -> Batch:
        """Inputs, targets (int32) and weights (float32), each (global_batch, T), or only some positions of them. Pure.

        A weight is the target's mask, or 1 where rows carry none.
        """
        return _as_batch(self.rows, self.indices_for(step, part))

    def iterate(self, start_step: int = 0, part: Sequence[int] | None = None) -> "BatchIterator":
        """Endless batches from ``start_step`` on, made ahead of need in a thread; ``close()`` it in the end.

        part: the positions in every batch that this process works on; rows of the others are not read. Whatever goes
        wrong in the thread is raised by ``next``; so is damage, which a second thread looks for in files of rows.
        """
        if start_step < 0:
            raise LoaderError(f"start_step is {start_step}; it must be 0 or more")
        if part is not None and not all(0 <= place < self.global_batch for place in part):
            raise LoaderError(f"a batch has {self.global_batch} rows; part {part} names others")
        return BatchIterator(self, start_step, part)


class BatchIterator(Iterator[Batch]):
    """Iterator over the batches of a loader; a context manager that stops its thread on leaving."""

    def __init__(self, loader: RowLoader, start_step: int, part: Sequence[int] | None):
        steps = grain.MapDataset.range(start_step, sys.maxsize)
        batches = steps.map(lambda step: loader.batch_for(int(step), part))
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BUFFERED)
        self._iterator: Any = iter(batches.to_iter_dataset(options))
        self._damage: RowsError | None = None
        if isinstance(loader.rows, RowSet):
            threading.Thread(target=self._verify, args=(loader.rows,), name="verify-rows", daemon=True).start()

    def _verify(self, rows: RowSet) -> None:
        """Compares checksums while training runs: shuffled rows come from all files at once, so waiting for it would
        mean to read everything first."""
        try:
            rows.verify()
        except (RowsError, OSError) as error:
            self._damage = RowsError(f"{error}. Since the last start, training may have seen what is damaged")

    def __next__(self) -> Batch:
        if self._damage is not None:
            raise self._damage
        if self._iterator is None:
            raise LoaderError("this iterator is closed")
        return next(self._iterator)

    def close(self) -> None:
        """Stops reading ahead."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def val_batches(rows: RowSource, batch: int, max_tokens: int | None = None) -> Iterator[Batch]:
    """Rows from the first on, in order, in batches of ``batch``: floor(max_tokens / (batch * T)) of them, or all.

    If the rows end earlier, the last batch is filled up with rows of target -1 and weight 0, which count for nothing.
    """
    if batch < 1:
        raise LoaderError(f"batch is {batch}; it must be 1 or more")
    available = -(-len(rows) // batch)
    count = available if max_tokens is None else min(available, max_tokens // (batch * rows.T))
    if count < 1:
        raise LoaderError(
            f"max_tokens={max_tokens} is less than one batch of {batch} x {rows.T} tokens; raise it (--eval_tokens)"
        )
    for number in range(count):
        indices = range(number * batch, min((number + 1) * batch, len(rows)))
        inputs, targets, weights = _as_batch(rows, indices)
        missing = batch - len(indices)
        if missing:
            inputs = np.pad(inputs, ((0, missing), (0, 0)))
            targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-1)
            weights = np.pad(weights, ((0, missing), (0, 0)))
        yield inputs, targets, weights


def _as_batch(rows: RowSource, indices: Any) -> Batch:
    tokens = np.stack([rows[i] for i in indices])
    masks = [rows.mask(i) for i in indices]
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    if masks[0] is None:
        return inputs, targets, np.ones(targets.shape, np.float32)
    return inputs, targets, np.stack([mask for mask in masks if mask is not None])[:, 1:].astype(np.float32)
