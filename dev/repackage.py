"""Shards for pretraining from any text: shuffled, of about equal size, in the layout of the reference's data set.

Every document gets a random 64-bit key (from the seed and its number in the input); the output is all documents sorted
by key. So the order is a function of the seed and the input alone, whatever memory there is. It is made in two passes,
as an external sort:

1. spill: documents are read once and dealt to buckets on the disk by the high bits of their keys, so many buckets that
   one of them fits into memory several times;
2. merge: bucket after bucket is sorted and written on as shards.

A shard is ``shard_XXXXX.parquet``: one column ``text``, row groups of 1024 documents, zstd, no dictionary, no
statistics. The last one is held out: one document in a hundred, but no more than a shard. ``shards.json`` (size and
SHA-256 of each) is written last. An interrupted spill starts over; an interrupted merge goes on after its last complete
shard.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat_jax.data.documents import TextStats, file_identity, find_files
from nanochat_jax.data.readers import BadLine, DataError, decode_utf8, read_documents
from nanochat_jax.data.shards import SHARD_CHARS, Shard, ShardList, shard_name
from nanochat_jax.utils.errors import DISK_FULL
from nanochat_jax.utils.paths import atomic_writer, lock_file, sha256_file, write_atomic

ROW_GROUP, VAL_SHARE = 1024, 0.01
ZSTD_LEVEL = 3
# What Python, numpy and arrow take before the first document, and the least that is left for documents.
BASE_BYTES, LEAST_BYTES = 256 * 2**20, 64 * 2**20
_SPILL, _STATE, _LOCK = ".repackage", ".repackage.json", ".repackage.lock"
_READ_DOCUMENTS, _MOST_BUCKETS = 256, 4096
_SCHEMA = pa.schema([("key", pa.uint64()), ("text", pa.large_string())])

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Repackaged:
    """What was made."""

    listing: ShardList
    documents: int
    characters: int
    stats: TextStats


def repackage(
    data: str | Path,
    out: str | Path,
    *,
    text_column: str = "text",
    seed: int = 42,
    shard_chars: int = SHARD_CHARS,
    max_memory: int = 2 * 2**30,
    progress: Progress | None = None,
) -> Repackaged:
    """Shuffled shards in the folder ``out`` of all documents of ``data`` (parquet, jsonl, txt, md; a file or folder).

    ``max_memory`` (bytes) bounds the whole process, single documents of a size near it aside. ``progress(what, share)``
    is called now and then. The disk must hold the text twice, compressed. Raises DataError; run again with the same
    arguments to go on.
    """
    out, budget = Path(out), max_memory - BASE_BYTES
    if budget < LEAST_BYTES:
        raise DataError(f"--max_memory: {(BASE_BYTES + LEAST_BYTES) >> 20} MiB is the least, got {max_memory >> 20}")
    if shard_chars < 1:
        raise DataError(f"--shard_chars must be at least 1, got {shard_chars}")
    files = find_files([Path(data)])
    if any(path.resolve().is_relative_to(out.resolve()) for path in files.values()):
        raise DataError(f"{out} holds the text that is to be read; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with lock_file(out / _LOCK):
        for leftover in out.glob("*.tmp"):
            leftover.unlink()
        job = _Job(files, out, text_column, seed, shard_chars, budget, progress or (lambda what, share: None))
        try:
            return job.run()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise DataError(
                f"no space in {out}: {shutil.disk_usage(out).free / 2**20:,.0f} MiB are free; free some space (it must "
                "hold the text twice, compressed) and run again to go on"
            ) from error


@dataclass
class _Job:
    files: dict[str, Path]
    out: Path
    column: str
    seed: int
    shard_chars: int
    budget: int
    progress: Progress

    def run(self) -> Repackaged:
        spill = self.out / _SPILL
        identity = {
            "files": [{"name": name, **file_identity(path)} for name, path in self.files.items()],
            "column": self.column,
            "seed": self.seed,
            "shard_chars": self.shard_chars,
        }
        state, finished = _read_state(self.out / _STATE), ShardList.load(self.out)
        same = state.get("identity") == identity
        if finished is not None and same:
            return self._made(finished, state)
        if finished is not None or (not state and any(self.out.glob("*.parquet"))):
            raise DataError(
                f"{self.out} holds shards already, of other text or options; choose another --out, or empty it"
            )
        if not same or max(state["bytes"]) > self.budget // 3:
            for old in self.out.glob("shard_*.parquet"):  # of an unfinished job
                old.unlink()
            shutil.rmtree(spill, ignore_errors=True)
            spill.mkdir()
            write_atomic(self.out / _STATE, "{}")
            state = {"identity": identity, **self._spill(spill), "shards": []}
            write_atomic(self.out / _STATE, json.dumps(state))
        shards = self._merge(spill, state)
        listing = ShardList("", tuple(shards), shards[-1].name)
        listing.save(self.out)
        return self._made(listing, state)

    def _made(self, listing: ShardList, state: dict[str, Any]) -> Repackaged:
        shutil.rmtree(self.out / _SPILL, ignore_errors=True)
        return Repackaged(listing, state["documents"], state["characters"], TextStats(**state["stats"]))

    # --- first pass ---

    def _spill(self, spill: Path) -> dict[str, Any]:
        total = max(1, sum(_text_bytes(path, self.column) for path in self.files.values()))
        chunk = self.budget // 6
        # Each bucket a sixth of the budget: reading and sorting hold it three times, and chance makes some larger.
        buckets = max(1, -(-total // chunk))
        if buckets > _MOST_BUCKETS:
            least = (total // _MOST_BUCKETS * 6 + BASE_BYTES) >> 20
            raise DataError(
                f"--max_memory is too small for {total / 1e9:,.0f} GB of text: give {least + 1} MiB or more"
            )
        keys = np.random.Philox(key=self.seed & (2**64 - 1))
        counts, sizes = np.zeros(buckets, np.int64), np.zeros(buckets, np.int64)
        stats, characters, done = TextStats(), 0, 0
        for texts in _chunks(self.files, self.column, stats, chunk):
            key = keys.random_raw(len(texts)).astype(np.uint64)
            # floor(key * buckets / 2^64), without a number above 2^64; sorted by key means sorted by bucket
            bucket = ((key >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)
            order = np.argsort(bucket, kind="stable")
            batch = pa.record_batch([pa.array(key[order]), texts.take(pa.array(order))], schema=_SCHEMA)
            ends = np.searchsorted(bucket[order], np.arange(buckets + 1))
            lengths = pc.binary_length(batch.column(1)).to_numpy()  # type: ignore[attr-defined]
            for b in np.flatnonzero(np.diff(ends)):
                part = batch.slice(ends[b], ends[b + 1] - ends[b])
                options = pa.ipc.IpcWriteOptions(compression="zstd")
                with (
                    open(spill / f"{b:04d}", "ab") as file,
                    pa.ipc.new_stream(file, _SCHEMA, options=options) as writer,
                ):
                    writer.write_batch(part)
                counts[b] += len(part)
                sizes[b] += int(lengths[ends[b] : ends[b + 1]].sum())
            characters += pc.sum(pc.utf8_length(batch.column(1))).as_py()  # type: ignore[attr-defined]
            done += int(lengths.sum())
            self.progress("dealing documents out", 0.5 * min(1.0, done / total))
            del texts, batch
        documents = int(counts.sum())
        if documents < 2:
            raise DataError(f"{documents} documents are too few: one is to be held out")
        facts = {"documents": documents, "characters": characters, "stats": stats.as_dict()}
        return {"counts": counts.tolist(), "bytes": sizes.tolist(), **facts}

    # --- second pass ---

    def _merge(self, spill: Path, state: dict[str, Any]) -> list[Shard]:
        """Writes the shards that are not there yet."""
        bounds = _bounds(state["documents"], state["characters"], self.shard_chars)
        starts = np.concatenate([[0], np.cumsum(state["counts"])])  # of the buckets, in documents
        shards = [Shard(**shard) for shard in state["shards"]]
        first = bounds[len(shards)][0] if len(shards) < len(bounds) else state["documents"]
        with contextlib.closing(self._sorted(spill, starts, first)) as groups:
            rest = pa.chunked_array([], pa.large_string())
            for number in range(len(shards), len(bounds)):
                path, (at, end) = self.out / shard_name(number), bounds[number]
                with (
                    atomic_writer(path) as file,
                    pq.ParquetWriter(
                        file,
                        pa.schema([("text", pa.string())]),
                        compression="zstd",
                        compression_level=ZSTD_LEVEL,
                        use_dictionary=False,
                        write_statistics=False,
                    ) as writer,
                ):
                    while at < end:
                        count = min(ROW_GROUP, end - at)
                        while len(rest) < count:
                            rest = pa.chunked_array([*rest.chunks, next(groups)], pa.large_string())
                        # In one piece: where buckets ended must not show in the pages.
                        texts = rest.slice(0, count).combine_chunks()
                        table = pa.table({"text": texts.cast(pa.string())})
                        writer.write_table(table, row_group_size=ROW_GROUP)
                        rest = rest.slice(count)
                        at += count
                        self.progress(path.name, 0.5 + 0.5 * at / state["documents"])
                shards.append(Shard(path.name, path.stat().st_size, sha256_file(path)))
                state["shards"] = [dataclasses.asdict(shard) for shard in shards]
                write_atomic(self.out / _STATE, json.dumps(state))
                for bucket in np.flatnonzero(starts[1:] <= end):  # nobody needs these any more
                    (spill / f"{bucket:04d}").unlink(missing_ok=True)
        return shards

    def _sorted(self, spill: Path, starts: np.ndarray, first: int) -> Generator[pa.Array, None, None]:
        """Texts in order of their keys from number ``first`` on, in pieces."""
        for bucket in range(len(starts) - 1):
            if starts[bucket + 1] <= max(first, starts[bucket]):
                continue
            table = _read_bucket(spill / f"{bucket:04d}")
            order = np.argsort(table.column("key").to_numpy(), kind="stable")[max(0, first - starts[bucket]) :]
            texts = table.column("text").combine_chunks()
            del table
            for at in range(0, len(order), ROW_GROUP):
                yield texts.take(pa.array(order[at : at + ROW_GROUP]))
            del texts
            pa.default_memory_pool().release_unused()


def _bounds(documents: int, characters: int, shard_chars: int) -> list[tuple[int, int]]:
    """First and past-the-end document of every shard, the held-out one last.

    By number, not by size: documents are in random order, so equal numbers are about equal sizes, and every row group
    but the last of training is full.
    """
    held_out = max(1, round(documents * min(VAL_SHARE, shard_chars / max(1, characters))))
    train = documents - held_out
    groups = -(-train // ROW_GROUP)
    count = min(groups, max(1, round(characters * train / documents / shard_chars)))
    ends = [min(train, ROW_GROUP * round(groups * (i + 1) / count)) for i in range(count)] + [documents]
    return list(zip([0, *ends], ends, strict=False))


def _read_bucket(path: Path) -> pa.Table:
    tables = []
    with open(path, "rb") as file:
        end = path.stat().st_size
        while file.tell() < end:
            with pa.ipc.open_stream(file) as reader:
                tables.append(reader.read_all())
    return pa.concat_tables(tables)


def _read_state(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


# --- reading ----------------------------------------------------------------------------------------------------------


def _text_bytes(path: Path, column: str) -> int:
    """About how much text a file holds; parquet's metadata tell."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size
    metadata = _open(path, column).metadata
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    place = next(i for i, name in enumerate(names) if name.partition(".")[0] == column)
    return sum(metadata.row_group(g).column(place).total_uncompressed_size for g in range(metadata.num_row_groups))


def _open(path: Path, column: str) -> pq.ParquetFile:
    try:
        # Page by page, not by row group: some writers put everything into one.
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable parquet file ({error}); remove it or fetch it again") from error
    if column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise DataError(f"{path} has no column {column!r}; its columns are {names}: name one with --text_column")
    return file


def _chunks(files: dict[str, Path], column: str, stats: TextStats, size: int) -> Iterator[pa.Array]:
    """All documents in order, as arrays of about ``size`` bytes. ``stats`` counts what was repaired or left out."""
    waiting: list[pa.Array] = []
    held = 0
    for path in files.values():
        read = _parquet_arrays if path.suffix.lower() == ".parquet" else _other_arrays
        for texts in read(path, column, stats):
            waiting.append(texts)
            held += texts.nbytes
            if held >= size:
                whole = pa.concat_arrays(waiting)
                waiting, held = [], 0
                yield whole
    if waiting:
        yield pa.concat_arrays(waiting)


def _parquet_arrays(path: Path, column: str, stats: TextStats) -> Iterator[pa.Array]:
    file = _open(path, column)
    kind = file.schema_arrow.field(column).type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(is_kind(kind) for is_kind in texts):
        raise DataError(f"{path}: column {column!r} holds {kind}, not text")
    try:
        for batch in file.iter_batches(_READ_DOCUMENTS, columns=[column], use_threads=False):
            yield _as_text(batch.column(0), stats)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); fetch the file again") from error


def _as_text(values: pa.Array, stats: TextStats) -> pa.Array:
    """Valid text; a null is an empty document, invalid UTF-8 is repaired as everywhere (``readers.decode_utf8``)."""
    raw = values.cast(pa.large_binary()) if pa.types.is_large_string(values.type) else values.cast(pa.binary())
    try:
        return pc.fill_null(raw.cast(pa.large_binary()).cast(pa.large_string()), "")
    except pa.ArrowInvalid:
        repaired = [decode_utf8(value or b"") for value in raw.to_pylist()]
        stats.invalid_utf8 += sum(count for _, count in repaired)
        return pa.array([text for text, _ in repaired], pa.large_string())


def _other_arrays(path: Path, column: str, stats: TextStats) -> Iterator[pa.Array]:
    texts: list[str] = []
    size = 0
    for item in read_documents(path, column):
        if isinstance(item, BadLine):
            stats.add_bad_line(item.message)
            continue
        stats.invalid_utf8 += item.invalid_utf8
        texts.append(item.text)
        size += len(item.text)
        if len(texts) >= _READ_DOCUMENTS or size >= 2**20:
            yield pa.array(texts, pa.large_string())
            texts, size = [], 0
    if texts:
        yield pa.array(texts, pa.large_string())
