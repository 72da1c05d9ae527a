"""Rows used while they are made: the same batches whenever the text arrives, whoever makes them, after any restart."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.data import build_rows as rows
from nanochat_jax.data import growing, web
from nanochat_jax.data.build_rows import build_rows
from nanochat_jax.data.documents import CallableDocuments
from nanochat_jax.data.growing import BlockOrder, GrowingRows, grow_rows
from nanochat_jax.data.loader import RowLoader
from nanochat_jax.data.readers import DataError
from nanochat_jax.data.row_files import RowsError
from nanochat_jax.data.row_store import RowSet
from nanochat_jax.data.shards import Shard, ShardList
from nanochat_jax.data.sources import text_source
from nanochat_jax.data.streamed import ShardDocuments
from nanochat_jax.data.web import FetchError, OfflineError
from nanochat_jax.training.shutdown import Interrupted, stop_on_signals
from tests import children
from tests.data.test_rows import contents, document, slow_stream
from tests.tokenizer_fixtures import golden_tokenizer
from tests.web_server import WebServer

T, PER_SHARD, DOCUMENTS, SHARDS = 8, 40, 60, 6
MAX = 1900  # rows: into the last of five training shards of 379 to 492 rows each
TEXTS = [[document(1000 * s + i) for i in range(DOCUMENTS)] for s in range(SHARDS)]


def shard_bytes(texts):
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), buffer, row_group_size=16)
    return buffer.getvalue().to_pybytes()


FILES = {f"shard_{s:05d}.parquet": shard_bytes(texts) for s, texts in enumerate(TEXTS)}


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NANOCHAT_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(rows, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr("nanochat_jax.data.web._sleep", lambda seconds, stop: None)


@pytest.fixture
def server():
    server = WebServer()
    server.files = dict(FILES)
    yield server
    server.close()


def listing(base):
    shards = [Shard(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()]
    return ShardList(base, tuple(shards), shards[-1].name)


def documents(server, place, split="train", **options):
    place.mkdir(parents=True, exist_ok=True)
    return ShardDocuments(place, listing(server.url), split, wait=0, **options)


def whole(tmp_path, max_rows=MAX):
    """The rows of all training shards, made from files that are all there, by `build_rows` alone."""
    place = tmp_path / "all there"
    place.mkdir(exist_ok=True)
    for name, data in FILES.items():
        (place / name).write_bytes(data)
    found = build_rows(
        ShardDocuments(place, listing("http://127.0.0.1:9")),
        golden_tokenizer(),
        T,
        tmp_path / "whole",
        max_rows=max_rows,
        rows_per_shard=PER_SHARD,
    )
    assert len(found) == min(max_rows, len(found)) and found.block == PER_SHARD
    return found


def grow(server, tmp_path, name="grown", max_rows=MAX, **options):
    return grow_rows(
        documents(server, tmp_path / name / "text", **options),
        golden_tokenizer(),
        T,
        tmp_path / name / "rows",
        max_rows=max_rows,
        rows_per_shard=PER_SHARD,
    )


# --- order ------------------------------------------------------------------------------------------------------------


def test_every_epoch_uses_every_row_once_and_stays_in_its_blocks(tmp_path):
    found = whole(tmp_path, max_rows=95)
    order = BlockOrder(found, seed=3)
    epochs = [[order[e * 95 + p] for p in range(95)] for e in range(3)]
    assert all(sorted(epoch) == list(range(95)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        assert [p // PER_SHARD for p in range(95)] == [row // PER_SHARD for row in epoch]
        assert epoch[:PER_SHARD] != list(range(PER_SHARD))
    assert [BlockOrder(found, seed=3)[p] for p in (200, 7, 94)] == [epochs[2][10], epochs[0][7], epochs[0][94]]
    assert [BlockOrder(found, seed=4)[p] for p in range(95)] != epochs[0]
    assert BlockOrder(found, seed=-1)[0] < PER_SHARD
    # numpy's frozen generator: these numbers may never change
    assert epochs[0][:8] == [int(row) for row in np.random.RandomState([3, 0, 0]).permutation(PER_SHARD)[:8]]
    assert epochs[0][:8] == GOLDEN_ORDER


GOLDEN_ORDER = [23, 27, 12, 3, 15, 36, 8, 38]


def test_the_order_needs_no_more_rows_than_its_block(server, tmp_path):
    server.files = {name: FILES[name] for name in list(FILES)[:1]}
    expected = RowLoader(whole(tmp_path), 8, seed=1)
    with_one = grow(server, tmp_path)
    try:
        loader = RowLoader(with_one, 8, seed=1)
        assert isinstance(with_one, GrowingRows) and len(with_one) == MAX
        for step in range(10):  # two blocks of 40 rows
            assert (loader.rows_for(step) == expected.rows_for(step)).all()
        with pytest.raises(FetchError, match="shard_00001.parquet.*404"):  # a later one is needed now
            loader.rows_for(100)
    finally:
        with_one.close()


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_batches_do_not_depend_on_when_text_arrives(server, tmp_path, delay):
    expected = RowLoader(whole(tmp_path), 12, seed=5)
    server.delay = delay
    server.plan = [{"cut": 100}, {"status": 503}, {}, {"cut": 1}]
    grown = grow(server, tmp_path)
    loader = RowLoader(grown, 12, seed=5)
    with loader.iterate(0) as batches:
        for step in range(165):  # into the second epoch
            for mine, theirs in zip(next(batches), expected.batch_for(step), strict=True):
                assert (mine == theirs).all()
    grown.close()
    assert len(grown) == MAX and grown.key == expected.rows.key  # type: ignore[attr-defined]
    assert contents(grown.directory) == contents(expected.rows.directory)  # type: ignore[attr-defined]
    again = grow(server, tmp_path)
    assert type(again) is RowSet and again.block == PER_SHARD  # all there: opened as they are, in the same order
    assert (RowLoader(again, 12, seed=5).rows_for(160) == expected.rows_for(160)).all()
    grown.verify()


def test_text_that_ends_early(server, tmp_path):
    everything = whole(tmp_path, max_rows=10_000)
    expected = RowLoader(everything, 16, seed=2)
    stream = slow_stream([text for texts in TEXTS[:-1] for text in texts], golden_tokenizer())
    assert len(everything) == (len(stream) - 1) // T
    grown = grow(server, tmp_path, max_rows=10_000)
    loader = RowLoader(grown, 16, seed=2)
    steps = 2 * len(everything) // 16 + 2
    assert len(grown) == 10_000
    for step in range(steps):
        assert (loader.rows_for(step) == expected.rows_for(step)).all()
    assert len(grown) == len(everything)
    with pytest.raises(IndexError):
        grown[len(everything)]
    grown.close()


# --- interruption -----------------------------------------------------------------------------------------------------


def test_closing_ends_those_who_wait_and_the_rest_follows(server, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT_S", 0.5)
    expected = whole(tmp_path)
    server.plan = [{}, {}, {"stall": 10}, {"stall": 10}]
    grown = grow(server, tmp_path, workers=1)
    assert (grown[100] == expected[100]).all()
    caught = []

    def wait():
        try:
            grown[MAX - 1]
        except RowsError as error:
            caught.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    began = time.monotonic()
    grown.close()
    thread.join()
    assert time.monotonic() - began < 4 and "have been closed" in caught[0]
    server.plan = []
    rest = grow(server, tmp_path)
    assert (rest[MAX - 1] == expected[MAX - 1]).all()
    rest.close()
    assert contents(rest.directory) == contents(expected.directory)


CHILD = textwrap.dedent("""
    import os, sys, time
    os.fsync = lambda handle: None
    from pathlib import Path
    from nanochat_jax.data import rows
    from nanochat_jax.data.loader import RowLoader
    from nanochat_jax.data.streamed import ShardDocuments
    from nanochat_jax.data.growing import grow_rows
    from tests.test_growing import MAX, PER_SHARD, T, listing
    from tests.tokenizer_fixtures import golden_tokenizer
    rows._BATCH_DOCUMENTS = 7
    place = Path(sys.argv[1])
    (place / "text").mkdir(parents=True, exist_ok=True)
    text = ShardDocuments(place / "text", listing(sys.argv[2]), wait=0)
    found = grow_rows(text, golden_tokenizer(), T, place / "rows", max_rows=MAX, rows_per_shard=PER_SHARD)
    print("ready", flush=True)
    loader = RowLoader(found, 12, seed=5)
    for step in range(int(sys.argv[3]), 160):
        print(step, loader.rows_for(step).tobytes().hex(), flush=True)
    found.close()
""")


def child(server, tmp_path, start=0):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "killed"), server.url, str(start)]
    return children.start(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)


def test_a_signal_ends_the_wait_for_text(server, tmp_path):
    server.plan = [{}, {}, {"stall": 10}, {"stall": 10}]
    grown = grow(server, tmp_path, workers=1)
    signalled = []

    def signal_us():
        signalled.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    with stop_on_signals() as stop:
        batches = RowLoader(grown, 12, seed=5).iterate(0)
        with pytest.raises(Interrupted, match="SIGTERM"):
            for step in range(1000):
                if step == 20:
                    threading.Timer(1.0, signal_us).start()
                with stop.ends_this():
                    next(batches)
        batches.close()
        grown.close()
    assert time.monotonic() - signalled[0] < 1 and stop.name == "SIGTERM"


def test_killed_and_gone_on_and_two_at_once(server, tmp_path):
    """The first process dies while it makes rows for two; the other takes over; a third goes on from the middle."""
    expected = RowLoader(whole(tmp_path), 12, seed=5)
    server.delay = 0.3
    first, second = child(server, tmp_path), child(server, tmp_path)
    for process in (first, second):
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert first.stdout is not None and first.stdout.readline().startswith("0 ")
    first.kill()
    first.wait()
    first.stdout.close()
    output = second.communicate()[0].splitlines()
    assert second.returncode == 0 and len(output) == 160
    for step, line in enumerate(output):
        assert line == f"{step} {expected.rows_for(step).tobytes().hex()}"
    assert set(server.paths()) == {f"/{name}" for name in FILES if name != listing("").val}
    assert len(server.paths()) < 2 * (SHARDS - 1)  # again only what was on its way to the one that died
    third = child(server, tmp_path, start=120)
    assert third.communicate()[0].splitlines()[1:] == output[120:]


def test_a_server_that_comes_back_while_nobody_waits(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(growing, "_RETRY_S", 0.3)
    server.files = {name: FILES[name] for name in list(FILES)[:2]}
    grown = grow(server, tmp_path)
    assert grown.reach(80) == 80
    deadline = time.monotonic() + 10
    while "trying again" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    server.files = dict(FILES)
    time.sleep(0.5)
    assert grown.reach(MAX) == MAX
    grown.close()


def test_errors_come_where_the_rows_are_needed(server, tmp_path):
    damaged = documents(server, tmp_path / "text")
    name = list(FILES)[2]
    (tmp_path / "text" / name).write_bytes(FILES[name][:-9] + b"?" * 9)
    grown = grow_rows(damaged, golden_tokenizer(), T, tmp_path / "rows", max_rows=MAX, rows_per_shard=PER_SHARD)
    assert grown.reach(800) == 800
    with (
        RowLoader(grown, 40, seed=0).iterate(0) as batches,
        pytest.raises(DataError, match=f"{name} is damaged.*delete"),
    ):
        for _ in range(30):
            next(batches)
    grown.close()


# --- documents --------------------------------------------------------------------------------------------------------


def test_documents_from_any_number_on(server, tmp_path):
    everything = [text for texts in TEXTS[:-1] for text in texts]
    stream = documents(server, tmp_path / "text")
    assert stream.fingerprint() == documents(server, tmp_path / "elsewhere").fingerprint()
    assert list(stream.iterate()) == everything and len(server.requests) == SHARDS - 1
    for start in (0, 1, 59, 60, 61, 123, len(everything) - 1, len(everything)):
        assert list(stream.iterate(start)) == everything[start:]
    held_out = documents(server, tmp_path / "text", "val")
    assert list(held_out.iterate()) == TEXTS[-1] and held_out.fingerprint() != stream.fingerprint()
    assert len(server.requests) == SHARDS


def test_no_more_is_fetched_than_the_budget_needs(server, tmp_path):
    stream = documents(server, tmp_path / "text", expected=2, workers=2)
    texts = stream.iterate()
    for _ in range(3 * DOCUMENTS):
        next(texts)
    time.sleep(0.1)
    assert sorted(server.paths()) == [f"/{name}" for name in list(FILES)[:3]]  # the third when it was needed
    texts.close()  # type: ignore[attr-defined]
    assert stream.absent() == 0 and documents(server, tmp_path / "other").absent() == SHARDS - 1


def test_the_folder_of_a_list_is_its_data_set(server, tmp_path, monkeypatch):
    place = tmp_path / "base" / "data" / "fineweb_edu"
    place.mkdir(parents=True)
    listing(server.url).save(place)
    for source in (text_source(tokens=1e9), text_source(str(place))):
        assert isinstance(source.train, ShardDocuments) and source.train.growing
        assert "held out: shard_00005.parquet, 5 shards being fetched meanwhile" in source.description
    assert list(source.val.iterate()) == TEXTS[-1]
    assert build_rows(source.val, golden_tokenizer(), T, tmp_path / "rows", "val", max_tokens=100).T == T
    # Offline: what is there serves, and what is not is named only when it is needed.
    texts = text_source().train.iterate()
    next(texts)
    texts.close()  # type: ignore[attr-defined]
    for name in list(FILES)[2:5]:
        (place / name).unlink(missing_ok=True)
    (place / list(FILES)[1]).write_bytes(FILES[list(FILES)[1]])
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", None)
    offline = text_source().train.iterate()
    assert [next(offline) for _ in range(2 * DOCUMENTS)] == TEXTS[0] + TEXTS[1]
    with pytest.raises(OfflineError, match="shard_00002.parquet is not in .*more than the 2 training shards. Unset it"):
        next(offline)
    (place / list(FILES)[5]).unlink()
    with pytest.raises(OfflineError, match="needs the held-out shard"):
        list(text_source().val.iterate())
    (place / list(FILES)[5]).write_bytes(FILES[list(FILES)[5]])
    # Without the list the files that are there are all there is, shuffled as a whole.
    (place / "shards.json").unlink()
    source = text_source()
    found = build_rows(source.train, golden_tokenizer(), T, tmp_path / "rows", max_rows=10)
    assert found.block is None and found.reach(50) == 10
    found.close()


def test_a_list_without_checksums_is_no_stream(server, tmp_path):
    plain = ShardList(server.url, tuple(Shard(name) for name in FILES), list(FILES)[-1])
    with pytest.raises(DataError, match="without a checksum"):
        ShardDocuments(tmp_path, plain)
    with pytest.raises(ValueError, match="no blocks"):
        BlockOrder(build_rows(CallableDocuments("x", lambda s: iter(TEXTS[0][s:])), golden_tokenizer(), T, tmp_path), 0)
    assert json.loads(json.dumps(documents(server, tmp_path).fingerprint()))["count"] == SHARDS - 1
