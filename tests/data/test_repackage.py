"""Shards of any text: the same documents in and out, in an order that only the seed and the input decide."""

import collections
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dev import repackage as module
from dev.repackage import BASE_BYTES, LEAST_BYTES, repackage
from dev.repackage_data import main
from nanochat_jax.data.readers import DataError
from nanochat_jax.data.shards import ShardList
from nanochat_jax.data.sources import text_source
from nanochat_jax.utils.paths import sha256_file
from tests.data.test_rows import document

LEAST = BASE_BYTES + LEAST_BYTES
CHARS = 170_000
TEXTS = [f"{i} {document(i)}" for i in range(5000)] + ["", "", "é\u4e2d\U0001f600", "line\nline", "x" * 100_000]


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The texts in four files of three kinds, one of them with everything in one row group."""
    place = tmp_path_factory.mktemp("corpus")
    pq.write_table(pa.table({"text": TEXTS[:2000], "url": TEXTS[:2000]}), place / "a.parquet", row_group_size=2000)
    binary = pa.table({"text": pa.array([text.encode() for text in TEXTS[2000:3000]], pa.binary())})
    pq.write_table(binary, place / "b.parquet", row_group_size=100)
    lines = [json.dumps({"text": text, "more": 1}) for text in TEXTS[3000:]]
    (place / "c.jsonl").write_text("\n".join(lines[:1000]) + "\n")
    (place / "below").mkdir()
    (place / "below" / "d.jsonl").write_text("\n".join(lines[1000:]) + "\n")
    return place


def read(place):
    """Documents of all shards in order."""
    return [text for path in sorted(place.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist()]


def contents(place):
    return {path.name: path.read_bytes() for path in place.iterdir() if not path.name.startswith(".")}


def test_the_same_documents_in_another_order(corpus, tmp_path):
    seen = []
    made = repackage(
        corpus, tmp_path / "out", shard_chars=CHARS, max_memory=LEAST, progress=lambda *facts: seen.append(facts)
    )
    found = read(tmp_path / "out")
    assert collections.Counter(found) == collections.Counter(TEXTS) and found != TEXTS
    assert made.documents == len(TEXTS) and made.characters == sum(map(len, TEXTS))
    # As a shuffle should: neighbours come from everywhere, and the two halves of the input are evenly spread.
    numbers = [int(text.split()[0]) for text in found if text[:1].isdigit()]
    assert sum(abs(a - b) for a, b in zip(numbers, numbers[1:], strict=False)) / len(numbers) == pytest.approx(
        5000 / 3, rel=0.05
    )
    assert abs(sum(number < 2500 for number in numbers[:2500]) - 1250) < 4 * 25
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and 0 < shares[0] < 0.5 and shares[-1] == 1


def test_the_layout(corpus, tmp_path):
    out = tmp_path / "out"
    made = repackage(corpus, out, shard_chars=CHARS)
    names = [path.name for path in sorted(out.glob("*.parquet"))]
    assert names == [f"shard_{i:05d}.parquet" for i in range(len(names))] and len(names) == 5
    for path in sorted(out.glob("*.parquet")):
        file = pq.ParquetFile(path)
        assert file.schema_arrow == pa.schema([("text", pa.string())])
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        if path.name not in names[-2:]:
            assert all(group.num_rows == 1024 for group in groups)
        column = groups[0].column(0)
        assert column.compression == "ZSTD" and not column.is_stats_set and "DICTIONARY" not in str(column.encodings)
    characters = [sum(map(len, pq.read_table(out / name)["text"].to_pylist())) for name in names]
    assert (
        all(chars < 450_000 for chars in characters) and len(pq.read_table(out / names[-1])) == 50
    )  # one in a hundred
    listing = ShardList.load(out)
    assert listing == made.listing and listing is not None and listing.val == names[-1]
    assert all(shard.sha256 == sha256_file(out / shard.name) for shard in listing.shards)
    assert not (out / ".repackage").exists()
    assert repackage(corpus, out, shard_chars=CHARS) == made  # nothing is left to do
    source = text_source(str(out))  # and all of it is there, so nobody asks a server
    assert [*source.train.iterate(), *source.val.iterate()] == read(out)


def test_only_seed_and_input_decide_the_order(corpus, tmp_path):
    first = repackage(corpus, tmp_path / "1", shard_chars=CHARS, seed=1, max_memory=LEAST)
    assert first.listing.shards == repackage(corpus, tmp_path / "2", shard_chars=CHARS, seed=1).listing.shards
    one = read(tmp_path / "1")
    repackage(corpus, tmp_path / "3", shard_chars=10**9, seed=1)
    assert read(tmp_path / "3") == one and len(list((tmp_path / "3").glob("*.parquet"))) == 2
    repackage(corpus, tmp_path / "4", shard_chars=CHARS, seed=2)
    assert read(tmp_path / "4") != one and sorted(read(tmp_path / "4")) == sorted(one)


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0.0, 0.5, 0.7, 1.0])
def test_stopped_anywhere_and_again(corpus, tmp_path, monkeypatch, stop):
    """0.0: while the input is read; 0.5: as soon as it has been; 1.0: with everything written but the last shard."""
    monkeypatch.setattr(module, "_text_bytes", lambda path, column: 10**8)  # many buckets
    whole = repackage(corpus, tmp_path / "whole", shard_chars=CHARS, max_memory=LEAST)
    reads = []
    real = module.read_documents

    def reading(*facts):
        if stop == 0.0 and len(reads) == 1:
            reads.clear()
            monkeypatch.setattr(module, "read_documents", lambda *facts: reads.append(facts) or real(*facts))
            raise KeyboardInterrupt
        reads.append(facts)
        return real(*facts)

    def interrupt(what, share):
        if stop and what.startswith("shard_") and share >= stop * 0.999:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "read_documents", reading)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        repackage(corpus, out, shard_chars=CHARS, max_memory=LEAST, progress=interrupt)
    assert not (out / "shards.json").exists() and not list(out.glob("*.tmp"))
    complete = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    reads.clear()
    repackage(corpus, out, shard_chars=CHARS, max_memory=LEAST)
    assert contents(out) == contents(tmp_path / "whole") and whole.documents == len(TEXTS)
    assert complete == {name: (out / name).stat().st_mtime_ns for name in complete}, "a complete shard was made again"
    assert bool(complete) == (stop > 0.65) and bool(reads) == (stop == 0.0), "the spill was made again"


def test_a_full_disk(corpus, tmp_path, monkeypatch):
    calls = iter(range(1000))

    def fsync(handle):
        if next(calls) == 6:  # the second shard; every other call is for a folder
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DataError, match=str(tmp_path)):
            repackage(corpus, tmp_path / "out", shard_chars=CHARS)
    repackage(corpus, tmp_path / "out", shard_chars=CHARS)
    assert collections.Counter(read(tmp_path / "out")) == collections.Counter(TEXTS)


# --- input ------------------------------------------------------------------------------------------------------------


def test_other_input_does_not_mix_with_what_was_begun(corpus, tmp_path):
    def interrupt(what, share):
        if share > 0.8:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        repackage(corpus, out, shard_chars=100_000, progress=interrupt)
    assert len(list(out.glob("*.parquet"))) > 1
    made = repackage(corpus / "a.parquet", out, shard_chars=100_000)
    assert sorted(read(out)) == sorted(TEXTS[:2000]) and made.documents == 2000
    for text in (corpus, out):  # other text than was begun; its own shards
        with pytest.raises(DataError, match=str(out)):
            repackage(text, out, shard_chars=100_000)
    assert sorted(read(out)) == sorted(TEXTS[:2000])


def test_input_and_options_that_cannot_be(corpus, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("a single document")
    for text, options in [
        (corpus, {"max_memory": 10**6}),
        (corpus, {"shard_chars": 0}),
        (corpus / "a.parquet", {"text_column": "body"}),
        (tmp_path / "one.txt", {}),
    ]:
        with pytest.raises(DataError):
            repackage(text, tmp_path / "out", **options)
    monkeypatch.setattr(module, "_text_bytes", lambda path, column: 10**14)
    with pytest.raises(DataError, match="--max_memory"):
        repackage(corpus, tmp_path / "out", max_memory=LEAST)


def test_the_command(corpus, tmp_path, capsys, monkeypatch):
    command = ["repackage_data", f"--data={corpus}", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", [*command, f"--shard_chars={CHARS}"])
    assert main() == 0
    shown = capsys.readouterr().out
    assert "5,005 documents" in shown and "shard_00004.parquet" in shown
    monkeypatch.setattr(sys, "argv", [*command, "--seed=3"])
    assert main() == 1
    assert capsys.readouterr().err.startswith("error: ")
