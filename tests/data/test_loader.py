import itertools
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.data.build_rows import build_rows
from nanochat_jax.data.documents import CallableDocuments
from nanochat_jax.data.loader import RowLoader, val_batches
from nanochat_jax.data.row_store import RowsError, RowSet
from tests.reference_stride import ReferenceStride
from tests.tokenizer_fixtures import golden, golden_tokenizer

GOLDEN = golden("loader_v1")


class FakeRows:
    """Rows whose every token tells their number; masks on request."""

    def __init__(self, count, T=4, masked=False):
        self.count, self.T, self.masked = count, T, masked

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return np.full(self.T + 1, index, np.uint16)

    def mask(self, index):
        return self.a_mask(index) if self.masked else None

    def a_mask(self, index):
        return (np.arange(self.T + 1) % 2 == index % 2).astype(np.uint8)


@pytest.mark.parametrize(
    "case", GOLDEN["cases"], ids=lambda c: f"{c['split']}-B{c['B']}-{c['rank']}of{c['world_size']}"
)
def test_batches_equal_the_reference_token_for_token(case, tmp_path):
    """shuffle=False over rows of the reference's stride, on the endlessly repeated text of one process."""
    files = []
    for i, groups in enumerate(GOLDEN["files"]):
        files.append(tmp_path / f"shard_{i:05d}.parquet")
        schema = pa.schema([("text", pa.string())])
        with pq.ParquetWriter(files[-1], schema) as writer:
            for group in groups:
                writer.write_table(pa.table({"text": group}, schema=schema))
    files = files[:-1] if case["split"] == "train" else files[-1:]

    # as there: every process has its own row groups, and the stride begins anew in every file
    readers = [pq.ParquetFile(file) for file in files]
    groups = [(file, g) for file in readers for g in range(case["rank"], file.num_row_groups, case["world_size"])]
    texts = [text for file, g in groups for text in file.read_row_group(g)["text"].to_pylist()]

    def make(start):
        return itertools.islice(itertools.cycle(texts), start, None)

    B, T, wanted = case["B"], case["T"], case["batches"]
    documents = CallableDocuments("golden, for ever", make)
    enough = -(-len(wanted) * (B * T + 1) // T)
    ours = build_rows(documents, golden_tokenizer(), T, tmp_path, max_rows=enough)
    rows = ReferenceStride(ours, B)
    loader = RowLoader(rows, B, shuffle=False)
    with loader.iterate() as batches:
        for step, batch in enumerate(wanted):
            inputs, targets, weights = next(batches)
            assert (inputs.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
            assert inputs.tolist() == batch["inputs"] and targets.tolist() == batch["targets"], step
            assert (weights == 1).all()
    in_order = list(val_batches(rows, B))[: len(wanted)]
    assert [inputs.tolist() for inputs, _, _ in in_order] == [batch["inputs"] for batch in wanted]


def rows_at(loader, step):
    """The tokens of a whole batch."""
    return np.stack([loader.rows[i] for i in loader.indices_for(step)]).astype(np.int32)


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 7), (5, 8), (64, 16)])
def test_every_epoch_has_every_row_once_in_a_new_order(count, batch):
    loader = RowLoader(FakeRows(count), batch, seed=3)
    steps = -(-4 * count // batch)
    seen = [int(row[0]) for step in range(steps) for row in rows_at(loader, step)]
    epochs = [tuple(seen[e * count : (e + 1) * count]) for e in range(4)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_a_batch_is_a_pure_function_of_seed_and_step():
    loader = RowLoader(FakeRows(100), 8, seed=1)
    steps = [5, 0, 1000, 5, 31, 0]
    batches = [rows_at(loader, step) for step in steps]
    again = [rows_at(RowLoader(FakeRows(100), 8, seed=1), step) for step in steps]
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    assert (batches[0] == batches[3]).all() and batches[0].dtype == np.int32 and batches[0].shape == (8, 5)
    assert (rows_at(loader, 0) != rows_at(RowLoader(FakeRows(100), 8, seed=2), 0)).any()
    other_batch = RowLoader(FakeRows(100), 16, seed=1)  # the order is the same, however it is cut
    assert (np.concatenate([rows_at(loader, 2), rows_at(loader, 3)]) == rows_at(other_batch, 1)).all()


def test_shuffling_is_a_fixed_function():
    """A change here changes which data a resumed run sees: it must be noticed."""
    loader = RowLoader(FakeRows(20), 10, seed=42)
    assert [loader.indices_for(step) for step in (0, 1)] == [
        [1, 7, 17, 11, 0, 8, 4, 10, 13, 2],
        [5, 12, 14, 16, 18, 6, 19, 15, 9, 3],
    ]


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_the_global_batch_does_not_depend_on_processes(processes):
    rows = FakeRows(50, masked=True)
    loader = RowLoader(rows, 16, seed=5)
    whole = rows_at(loader, 9)
    each = 16 // processes
    parts = [loader.batch_for(9, range(index * each, (index + 1) * each)) for index in range(processes)]
    assert (np.concatenate([part[0] for part in parts]) == whole[:, :-1]).all()
    assert (np.concatenate([part[1] for part in parts]) == whole[:, 1:]).all()
    masks = np.stack([rows.a_mask(i) for i in loader.indices_for(9)])
    assert (np.concatenate([part[2] for part in parts]) == masks[:, 1:]).all()


@pytest.mark.parametrize("start", [0, 7, 123_456])
def test_iterating_from_anywhere(start):
    loader = RowLoader(FakeRows(50), 6, seed=5)
    with loader.iterate(start, part=[3, 5]) as batches:
        for step in range(start, start + 20):
            for got, wanted in zip(next(batches), loader.batch_for(step, [3, 5]), strict=True):
                assert got.dtype == wanted.dtype and (got == wanted).all()


def test_only_the_own_part_is_read_and_errors_in_the_reading_thread_surface():
    read = []

    class Noting(FakeRows):
        def __getitem__(self, index):
            read.append(index)
            if index == 13:
                raise OSError("disk gone")
            return super().__getitem__(index)

    loader = RowLoader(Noting(20), 4, shuffle=False)
    loader.batch_for(2, range(2, 4))
    assert read == [10, 11]
    batches = loader.iterate()
    for _ in range(3):
        next(batches)
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    batches.close()


def test_a_changed_byte_in_a_file_of_rows_ends_the_iteration_and_is_named(tmp_path):
    documents = CallableDocuments("few", lambda start: iter(["a few words of text " * 40] * 30))
    rows = build_rows(documents, golden_tokenizer(), 16, tmp_path, rows_per_shard=50)
    victim = rows.directory / "rows_00001.npy"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    with RowLoader(RowSet.open(rows.directory), 4).iterate() as batches:
        with pytest.raises(RowsError, match="rows_00001.npy"):
            for _ in range(2000):
                next(batches)
                time.sleep(0.001)


def test_read_ahead_is_bounded_and_ends():
    read = []

    class Counting(FakeRows):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    before = threading.active_count()
    batches = RowLoader(Counting(1000), 2, shuffle=False).iterate()
    next(batches)
    time.sleep(0.1)
    assert len(read) <= 2 * 8
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before


def test_bad_sizes():
    rows = FakeRows(10)
    loader = RowLoader(rows, 6)
    for wrong in (
        lambda: RowLoader(rows, 0),
        lambda: RowLoader(FakeRows(0), 2),
        lambda: loader.iterate(0, [5, 6]),  # a part that the batch does not have
        lambda: loader.iterate(-1),
        lambda: next(val_batches(rows, 4, max_tokens=15)),
        lambda: next(val_batches(rows, 0)),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_validation_is_in_order_and_padded_with_nothing():
    rows = FakeRows(10, T=4, masked=True)
    batches = list(val_batches(rows, 4))
    assert len(batches) == 3
    inputs, targets, weights = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert inputs.shape == (12, 4) and (inputs[:10, 0] == np.arange(10)).all()
    assert (targets[10:] == -1).all() and (weights[10:] == 0).all() and (targets[:10] >= 0).all()
    assert (weights[:10] == np.stack([rows.a_mask(i) for i in range(10)])[:, 1:]).all()
    assert len(list(val_batches(rows, 4, max_tokens=4 * 4 * 2 + 15))) == 2
    assert len(list(val_batches(rows, 5))) == 2 and len(list(val_batches(rows, 16))) == 1
