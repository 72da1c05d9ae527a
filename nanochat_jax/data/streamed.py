"""Documents of a data set whose files may still be on their way: read in the list's order, each file when it is there.

The stream is a function of the list (``shards.json``) alone. While one file is read the next ones are fetched, no more
of them than the token budget needs; a file that is there already is never asked for again.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat_jax.data.documents import SPLITS, TextStats
from nanochat_jax.data.download import ShardFetcher, is_there
from nanochat_jax.data.readers import READER_VERSION, BadLine, DataError, document_count, read_documents
from nanochat_jax.data.shards import LIST_NAME, Shard, ShardList, list_fingerprint
from nanochat_jax.data.web import OfflineError
from nanochat_jax.utils.paths import OFFLINE_VARIABLE, sha256_file

logger = logging.getLogger(__name__)

# Files on their way ahead of the one that is read, where nothing is known about how much will be read.
_AHEAD = 4


class ShardDocuments:
    """The training or held-out documents of the data set whose list is kept in ``directory``.

    Files are fetched from where the list says; ``expected`` (shards) is about how many will be read: further ones are
    fetched only one at a time. Every file's checksum is compared once before it is read, whoever put it there.
    """

    growing = True  # documents arrive while they are read: rows made of them can be used before the last one is made

    def __init__(
        self,
        directory: Path,
        listing: ShardList,
        split: str = "train",
        text_column: str = "text",
        expected: int | None = None,
        workers: int = 4,
        wait: float = 1.0,
    ):
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of train, val")
        if not listing.checked:
            raise DataError(f"{directory / LIST_NAME} has files without a checksum; delete it and download again")
        self.directory, self.listing, self.split, self.column = directory, listing, split, text_column
        self.shards = listing.train if split == "train" else [listing.held_out]
        self.stats = TextStats()
        self._expected, self._workers, self._wait = expected, workers, wait
        self._compared: set[str] = set()
        self._fetcher: ShardFetcher | None = None

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

    def held_out(self) -> str:
        """What validation text is, for a person."""
        return self.listing.val

    def absent(self) -> int:
        """How many of the files that are expected to be read are not here yet."""
        shards = self.shards if self._expected is None else self.shards[: self._expected]
        return sum(not is_there(shard, self.directory) for shard in shards)

    def stop(self) -> None:
        """Makes an iteration that waits for a file give up (with ``fetch.Stopped``)."""
        if (fetcher := self._fetcher) is not None:
            fetcher.close()

    def iterate(self, start: int = 0) -> Iterator[str]:
        """Texts from document number ``start`` of this split on; ``stats`` counts from there.

        Raises FetchError for a file that cannot be fetched, DataError for one that is damaged.
        """
        stats = self.stats = TextStats()
        position = 0
        with ShardFetcher(self.listing, self.directory, self._workers, wait=self._wait) as self._fetcher:
            for number, shard in enumerate(self.shards):
                path = self._get(number, self._fetcher)
                skip = min(start - position, document_count(path) or 0) if start > position else 0
                position += skip
                if position < start:
                    continue  # all of it was read by an earlier run
                self._compare(shard, path)
                for item in read_documents(path, self.column, skip):
                    if isinstance(item, BadLine):  # not in parquet
                        continue
                    position += 1
                    stats.invalid_utf8 += item.invalid_utf8
                    yield item.text

    def _get(self, number: int, fetcher: ShardFetcher) -> Path:
        expected = number + 1 + _AHEAD if self._expected is None else self._expected
        try:
            ahead = self.shards[number : max(number + 1, min(expected, number + 1 + 2 * self._workers))]
            here = is_there(self.shards[number], self.directory)
            try:
                fetcher.ask(ahead)
            except OfflineError:
                if not here:
                    raise
            return fetcher.get(self.shards[number])
        except OfflineError as error:
            needed = f"more than the {number} training shards" if self.split == "train" else "the held-out shard"
            raise OfflineError(
                f"{self.shards[number].name} is not in {self.directory} and {OFFLINE_VARIABLE} is set: the run needs "
                f"{needed}. Unset it, or delete {LIST_NAME} there to use nothing but the files that are there"
            ) from error

    def _compare(self, shard: Shard, path: Path) -> None:
        if shard.name in self._compared:
            return
        if sha256_file(path) != shard.sha256:
            raise DataError(
                f"{path} is damaged (its SHA-256 is not the one in {LIST_NAME}); delete it and run again to have it "
                "fetched anew"
            )
        self._compared.add(shard.name)
