"""Rows that are used while they are made.

A thread builds rows from documents that are still arriving; a reader who asks for a row that is not there yet waits for
it. So that the order of training never depends on when a file arrived, such rows are shuffled within *blocks* that are
fixed before the first row is made (one block is one file of rows, 64 MiB, about 33 M tokens at two bytes): batch s
takes the same rows whether all of them were there at the start or came one by one, and whether the run began here or
goes on. That is as good as a shuffle of everything only if the documents themselves come in random order, as those of
the default data set and of ``dev/repackage_data.py`` do; text of one's own, which may be sorted, is shuffled as a whole
instead, and has to be there as a whole.

Every process that opens the same rows starts a builder; the directory's lock lets one of them work, and all see its
progress on the disk. If that process ends, another one goes on.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.data.build_rows import Progress, build_rows, place_of_rows
from nanochat_jax.data.documents import Documents
from nanochat_jax.data.row_files import MANIFEST, PROGRESS, RowsError
from nanochat_jax.data.row_store import RowSet
from nanochat_jax.data.web import FetchError, Stopped
from nanochat_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# While nobody waits for a row there is time: a server may come back.
_RETRY_S = 60.0
_POLL_S = 0.05
_SAY_EVERY_S = 30.0


class BlockOrder:
    """Position in the endless stream of training rows -> row number: a pure function of seed and rows.

    ``order[position]`` waits until the position's block of rows is there. Every epoch shuffles every block anew. The
    generator is numpy's frozen one, so that an upgrade never changes the order of a run.
    """

    def __init__(self, rows: RowSet, seed: int):
        if rows.block is None:
            raise ValueError("these rows have no blocks")
        self._rows, self._block, self._seed = rows, rows.block, seed & 0xFFFFFFFF
        self._latest: tuple[tuple[int, int, int], np.ndarray] | None = None

    def __getitem__(self, position: int) -> int:
        end = (position // self._block + 1) * self._block
        count = self._rows.reach(end)
        # With `end` rows there the block is full and this is the first epoch; fewer are all there ever are.
        epoch, position = (0, position) if count == end else divmod(position, count)
        block, place = divmod(position, self._block)
        size = min(self._block, count - block * self._block)
        return block * self._block + int(self._shuffled(epoch, block, size)[place])

    def _shuffled(self, epoch: int, block: int, size: int) -> np.ndarray:
        key, latest = (epoch, block, size), self._latest
        if latest is None or latest[0] != key:
            generator = np.random.RandomState([self._seed, epoch, block])
            self._latest = latest = key, generator.permutation(size).astype(np.int32)
        return latest[1]


class GrowingRows(RowSet):
    """Rows that a thread, here or in another process, is making; reading one waits until it is there.

    ``len`` is the number of rows asked for until all are made, then the number there are. ``close`` stops the thread
    and whoever waits; what is made stays, and the same call goes on from there.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], build: Callable[[Progress], RowSet], stop: Any):
        super().__init__(directory, manifest)
        self._finished = self._closed = False
        self._error: BaseException | None = None
        self._stop_documents, self._stopping = stop, threading.Event()
        self._refreshing = threading.Lock()
        self.progress: Progress | None = None
        self._build = build
        self._thread = threading.Thread(target=self._work, name="rows", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        def progress(rows: int, tokens: int, documents: int) -> None:
            if self._stopping.is_set():
                raise Stopped("stopped")
            if self.progress is not None:
                self.progress(rows, tokens, documents)

        while not self._stopping.is_set():
            try:
                self._build(progress)
                return
            except Stopped:
                return
            except FetchError as error:
                self._error = error
                logger.warning("training text: %s; trying again in %.0f s", error, _RETRY_S)
                self._stopping.wait(_RETRY_S)
                self._error = None
            except BaseException as error:  # noqa: B036 - raised where the rows are needed
                self._error = error
                return

    def reach(self, count: int) -> int:
        """Waits until ``count`` rows are there, or all there will be; returns the smaller number.

        Raises what stopped the making of rows, once a row is needed that is not there.
        """
        began = said = time.monotonic()
        while self._count < count and not self._finished:
            self._refresh()
            if self._count >= count or self._finished:
                break
            if self._closed:
                raise RowsError(f"the rows in {self.directory} have been closed")
            if (error := self._error) is not None:
                raise error
            now = time.monotonic()
            if now - said > _SAY_EVERY_S:
                said = now
                logger.warning("waiting for text: row %d is not made yet (for %.0f s)", count - 1, now - began)
            time.sleep(_POLL_S)
        return min(count, self._count)

    def _refresh(self) -> None:
        """Takes in what has been made since the last look."""
        with self._refreshing:
            if self._finished:
                return
            if finished := (self.directory / MANIFEST).is_file():
                made = RowSet.open(self.directory, self.tokenizer_hash).manifest
            else:
                try:
                    made = json.loads((self.directory / PROGRESS).read_text(encoding="utf-8"))
                except (OSError, ValueError):  # not there yet, or just becoming the manifest
                    return
                if made["identity"] != self.manifest["identity"]:
                    return
            for shard in made["shards"][len(self._shards) :]:
                self._shards.append(self._map(shard["files"]["rows"], shard["rows"]))
                self._count += shard["rows"]
            if finished:
                self.manifest = made
                self._finished = True

    def __len__(self) -> int:
        return self._count if self._finished else self.manifest["limit"]

    def __getitem__(self, index: int) -> np.ndarray:
        self.reach(int(index) + 1)
        return super().__getitem__(index)

    def verify(self) -> None:
        self.reach(len(self))
        super().verify()

    def close(self) -> None:
        self._closed = True
        self._stopping.set()
        self._stop_documents()
        self._thread.join(timeout=5.0)


def grow_rows(
    documents: Documents,
    tokenizer: Tokenizer,
    T: int,
    out_dir: str | Path | None = None,
    split: str = "train",
    *,
    max_rows: int,
    rows_per_shard: int | None = None,
    num_threads: int = 0,
) -> RowSet:
    """As ``build_rows``, but returns at once; ``documents`` must be ``growing``. ``close`` the rows in the end."""
    options: dict[str, Any] = {"max_rows": max_rows, "rows_per_shard": rows_per_shard}
    directory, identity = place_of_rows(documents, tokenizer, T, out_dir, split, **options)
    if (directory / MANIFEST).is_file():
        return RowSet.open(directory, tokenizer)
    manifest = {
        "T": T,
        "masked": False,
        "rows": 0,
        "rows_per_shard": identity["rows_per_shard"],
        "shards": [],
        "tokenizer_hash": tokenizer.hash,
        "identity": json.loads(json.dumps(identity)),
        "limit": identity["max_rows"],
    }

    def build(progress: Progress) -> RowSet:
        return build_rows(
            documents, tokenizer, T, out_dir, split, progress=progress, num_threads=num_threads, **options
        )

    return GrowingRows(directory, manifest, build, getattr(documents, "stop", lambda: None))


def training_rows(
    documents: Documents, tokenizer: Tokenizer, T: int, rows: int, progress: Progress | None = None
) -> RowSet:
    """``rows`` training rows of T+1 tokens, or all there are; from growing documents once the first block is made.

    ``close`` them in the end. Raises as ``build_rows``, and FetchError.
    """
    if not getattr(documents, "growing", False):
        return build_rows(documents, tokenizer, T, max_rows=rows, progress=progress)
    found = grow_rows(documents, tokenizer, T, max_rows=rows)
    if isinstance(found, GrowingRows):
        found.progress = progress
        try:
            found.reach(min(rows, found.block or rows))
        except BaseException:
            found.close()
            raise
        found.progress = None
    return found
