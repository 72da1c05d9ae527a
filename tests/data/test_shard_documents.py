"""Documents of a data set whose files are downloaded while they are read, and the rows made of them."""

import hashlib
import json
import os
import signal
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
from nanochat_jax.data.build_rows import build_rows
from nanochat_jax.data.documents import ShardDocuments
from nanochat_jax.data.fetch import FetchError, OfflineError
from nanochat_jax.data.loader import BlockOrder, RowLoader
from nanochat_jax.data.readers import DataError
from nanochat_jax.data.row_store import RowsError, RowSet
from nanochat_jax.data.shards import Shard, ShardList
from nanochat_jax.data.sources import text_source
from nanochat_jax.training.shutdown import Interrupted, stop_on_signals
from tests import children
from tests.data.test_rows import contents, document, slow_stream
from tests.tokenizer_fixtures import golden_tokenizer
from tests.web_server import WebServer, no_real_network

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
    no_real_network(monkeypatch)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(rows, "_BATCH_DOCUMENTS", 7)


@pytest.fixture
def server():
    server = WebServer()
    server.files = dict(FILES)
    yield server
    server.close()


def listing(base):
    shards = [Shard(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()]
    return ShardList(base, tuple(shards), shards[-1].name)


def documents(base, place, split="train", **options):
    place.mkdir(parents=True, exist_ok=True)
    return ShardDocuments(place, listing(base), split, **options)


def build(text, place, max_rows=MAX):
    return build_rows(text, golden_tokenizer(), T, place, max_rows=max_rows, rows_per_shard=PER_SHARD)


def at_hand(tmp_path):
    """The same documents with all files there, and nobody to ask for others."""
    place = tmp_path / "at hand"
    place.mkdir(exist_ok=True)
    for name, data in FILES.items():
        (place / name).write_bytes(data)
    return documents("http://127.0.0.1:9", place)


# --- documents --------------------------------------------------------------------------------------------------------


def test_documents_from_any_number_on(server, tmp_path):
    everything = [text for texts in TEXTS[:-1] for text in texts]
    stream = documents(server.url, tmp_path / "text")
    assert stream.fingerprint() == documents(server.url, tmp_path / "elsewhere").fingerprint()
    assert list(stream.iterate()) == everything and len(server.requests) == SHARDS - 1
    for start in (0, 1, 59, 60, 61, 123, len(everything) - 1, len(everything)):
        assert list(stream.iterate(start)) == everything[start:]
    held_out = documents(server.url, tmp_path / "text", "val")
    assert list(held_out.iterate()) == TEXTS[-1] and held_out.fingerprint() != stream.fingerprint()
    assert len(server.requests) == SHARDS


def test_no_more_is_downloaded_than_the_budget_needs(server, tmp_path):
    stream = documents(server.url, tmp_path / "text", expected=2)
    texts = stream.iterate()
    for _ in range(3 * DOCUMENTS):
        next(texts)
    time.sleep(0.1)
    assert sorted(server.paths()) == [f"/{name}" for name in list(FILES)[:3]]  # the third when it was needed
    assert stream.absent() == 0 and documents(server.url, tmp_path / "other").absent() == SHARDS - 1


def test_the_folder_of_a_list_is_its_data_set(server, tmp_path, monkeypatch):
    place = tmp_path / "base" / "data" / "fineweb_edu"
    place.mkdir(parents=True)
    listing(server.url).save(place)
    for source in (text_source(tokens=1e9), text_source(str(place))):
        assert isinstance(source.train, ShardDocuments)
        assert "shard_00005.parquet" in source.description
    assert list(source.val.iterate()) == TEXTS[-1]
    for name in list(FILES)[:2]:
        (place / name).write_bytes(FILES[name])
    # Offline: what is there serves, and what is not is named only when it is needed.
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    offline = text_source().train.iterate()
    assert [next(offline) for _ in range(2 * DOCUMENTS)] == TEXTS[0] + TEXTS[1]
    with pytest.raises(OfflineError, match="shard_00002.parquet"):
        next(offline)
    (place / list(FILES)[5]).unlink()
    with pytest.raises(OfflineError, match="shard_00005.parquet"):
        list(text_source().val.iterate())
    (place / list(FILES)[5]).write_bytes(FILES[list(FILES)[5]])
    # Without the list the files that are there are all there is, shuffled as a whole.
    (place / "shards.json").unlink()
    assert build_rows(text_source().train, golden_tokenizer(), T, tmp_path / "rows", max_rows=10).block is None


def test_what_cannot_be_read(server, tmp_path):
    text = documents(server.url, tmp_path / "text")
    name = list(FILES)[2]
    (tmp_path / "text" / name).write_bytes(FILES[name][:-9] + b"?" * 9)
    with pytest.raises(DataError, match=name):
        build(text, tmp_path / "rows")
    with pytest.raises(DataError):  # a list without checksums
        ShardDocuments(tmp_path, ShardList("", tuple(Shard(name) for name in FILES), list(FILES)[-1]))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_when_text_arrives(server, tmp_path):
    expected = build(at_hand(tmp_path), tmp_path / "expected")
    server.delay = 0.05
    server.plan = [{"cut": 100}, {"status": 503}, {}, {"cut": 1}]
    found = build(documents(server.url, tmp_path / "text"), tmp_path / "rows")
    assert found.key == expected.key and contents(found.directory) == contents(expected.directory)
    stream = slow_stream([text for texts in TEXTS[:-1] for text in texts], golden_tokenizer())
    assert [found[i].tolist() for i in (0, 7, MAX - 1)] == [stream[i * T : i * T + T + 1] for i in (0, 7, MAX - 1)]


def test_a_download_that_fails_is_raised_and_the_next_run_resumes(server, tmp_path):
    expected = build(at_hand(tmp_path), tmp_path / "expected")
    server.files = {name: FILES[name] for name in list(FILES)[:3]}
    with pytest.raises(FetchError, match="shard_00003.parquet.*404"):
        build(documents(server.url, tmp_path / "text"), tmp_path / "rows")
    [unfinished] = (tmp_path / "rows").iterdir()
    with pytest.raises(RowsError):
        RowSet.open(unfinished)
    assert len(list(unfinished.glob("rows_*.npy"))) > 20  # what was complete is kept ...
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("rows_*.npy")}
    server.files = dict(FILES)
    found = build(documents(server.url, tmp_path / "text"), tmp_path / "rows")
    assert contents(found.directory) == contents(expected.directory)
    after = {path.name: path.stat().st_mtime_ns for path in found.directory.glob("rows_*.npy")}
    assert before.items() <= after.items()  # ... and not made again


CHILD = textwrap.dedent("""
    import os, sys
    os.fsync = lambda handle: None
    from pathlib import Path
    from nanochat_jax.data import build_rows as rows
    from tests.data.test_shard_documents import build, documents
    rows._BATCH_DOCUMENTS = 7
    print("ready", flush=True)
    build(documents(sys.argv[2], Path(sys.argv[1]) / "text"), Path(sys.argv[1]) / "rows")
""")


def test_killed_while_rows_are_built_and_two_at_once(server, tmp_path):
    """The first process dies while it makes rows for two; the other takes over."""
    expected = build(at_hand(tmp_path), tmp_path / "expected")
    server.delay = 0.1
    command = [sys.executable, "-c", CHILD, str(tmp_path / "killed"), server.url]
    builders = [
        children.start(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True) for _ in range(2)
    ]
    for child in builders:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("rows/*/rows_*.npy")) and time.monotonic() < deadline:
        time.sleep(0.02)
    builders[0].kill()
    for child in builders:
        child.communicate()
    assert [child.returncode for child in builders] == [-signal.SIGKILL, 0]
    [made] = (tmp_path / "killed" / "rows").iterdir()
    assert contents(made) == contents(expected.directory)


def test_a_signal_ends_the_wait_for_text(server, tmp_path):
    server.plan = [{}, *[{"stall": 10}] * 20]
    signalled = []

    def signal_us():
        signalled.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    with stop_on_signals() as stop:
        threading.Timer(0.2, signal_us).start()
        with pytest.raises(Interrupted, match="SIGTERM"), stop.ends_this():
            build(documents(server.url, tmp_path / "text"), tmp_path / "rows")
    assert time.monotonic() - signalled[0] < 2 and stop.name == "SIGTERM"


# --- order ------------------------------------------------------------------------------------------------------------


def test_every_epoch_uses_every_row_once_and_stays_in_its_blocks(tmp_path):
    found = build(at_hand(tmp_path), tmp_path / "rows", max_rows=95)
    assert found.block == PER_SHARD and len(found) == 95
    order = BlockOrder(95, PER_SHARD, seed=3)
    epochs = [[order[e * 95 + p] for p in range(95)] for e in range(3)]
    assert all(sorted(epoch) == list(range(95)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        assert [p // PER_SHARD for p in range(95)] == [row // PER_SHARD for row in epoch]
        assert epoch[:PER_SHARD] != list(range(PER_SHARD))
    again = BlockOrder(95, PER_SHARD, seed=3)
    assert [again[p] for p in (200, 7, 94)] == [epochs[2][10], epochs[0][7], epochs[0][94]]
    assert [BlockOrder(95, PER_SHARD, seed=4)[p] for p in range(95)] != epochs[0]
    assert BlockOrder(95, PER_SHARD, seed=-1)[0] < PER_SHARD
    assert RowLoader(found, 8, seed=3).indices_for(0) == epochs[0][:8]
    # numpy's frozen generator: these numbers may never change
    assert epochs[0][:8] == [int(row) for row in np.random.RandomState([3, 0, 0]).permutation(PER_SHARD)[:8]]
    assert epochs[0][:8] == [23, 27, 12, 3, 15, 36, 8, 38]


def test_the_identity_of_such_rows_is_that_of_earlier_runs(tmp_path):
    """Rows made while training went on, as earlier versions did it, have this identity; runs on them resume."""
    found = build(at_hand(tmp_path), tmp_path / "rows", max_rows=95)
    identity = json.loads((found.directory / "manifest.json").read_text())["identity"]
    assert identity == {
        "format": ["nanochat_jax.rows", 1],
        "source": {
            "kind": "shards",
            "split": "train",
            "column": "text",
            "reader": 1,
            "count": 5,
            "sha256": hashlib.sha256(
                json.dumps([(n, hashlib.sha256(d).hexdigest()) for n, d in list(FILES.items())[:-1]]).encode()
            ).hexdigest(),
        },
        "tokenizer": golden_tokenizer().hash,
        "split": "train",
        "T": T,
        "batch_rows": None,
        "max_rows": 95,
        "rows_per_shard": PER_SHARD,
        "block": PER_SHARD,
    }
