import itertools
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.data import build_rows as rows
from nanochat_jax.data import row_store
from nanochat_jax.data.build_rows import build_rows
from nanochat_jax.data.documents import CallableDocuments, FileDocuments
from nanochat_jax.data.row_store import RowsError, RowSet, RowWriter
from nanochat_jax.text.tokenizer import Tokenizer
from tests.tokenizer_fixtures import golden_tokenizer

WORDS = "the river runs past old mill and miller counts his sacks while rain falls on stone roof at night".split()


def document(i):
    source = random.Random(i)
    return " ".join(source.choices(WORDS, k=source.randint(0, 40))) + "."


def numbered(count, name="numbered"):
    return CallableDocuments(f"{name}-{count}", lambda start: (document(i) for i in range(start, count)))


def slow_stream(texts, tokenizer):
    """The whole stream, the slow way: one list, one document at a time, through tiktoken."""
    return [token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text))]


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name != row_store.LOCK}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # hundreds of tiny shards; nobody cuts the power in a test


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(rows, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(rows, "_BATCH_CHARS", 300)
    monkeypatch.setattr(rows, "_REPORT_EVERY", 7)


@pytest.mark.parametrize("T", [1, 5, 64])
def test_rows_are_the_stream(tmp_path, small_batches, T):
    tokenizer = golden_tokenizer()
    found = build_rows(numbered(50), tokenizer, T, tmp_path, rows_per_shard=130 // T)
    stream = slow_stream([document(i) for i in range(50)], tokenizer)
    assert len(found) == (len(stream) - 1) // T and found.T == T
    for r in range(len(found)):
        assert found[r].dtype == np.uint16 and found[r].tolist() == stream[r * T : r * T + T + 1]
    manifest = found.manifest
    assert manifest["documents"] == 50 and manifest["stream_tokens"] == len(stream)
    assert manifest["tokens"] == len(found) * T and manifest["characters"] == sum(len(document(i)) for i in range(50))
    assert found.mask(0) is None
    for index in (-1, len(found)):
        with pytest.raises(IndexError, match="of"):
            found[index]
    found.verify()


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30) | st.just("<|bos|> \0"), min_size=1, max_size=30),
    T=st.integers(1, 12),
    per_shard=st.integers(1, 9),
    batch_documents=st.integers(1, 10),
)
def test_any_documents_any_shape(texts, T, per_shard, batch_documents):
    tokenizer = golden_tokenizer()
    stream = slow_stream(texts, tokenizer)
    expected = [stream[s : s + T + 1] for s in range(0, len(stream) - T, T)]
    spec = CallableDocuments("any", lambda start: iter(texts[start:]))
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_BATCH_DOCUMENTS", batch_documents)
        if not expected:
            with pytest.raises(RowsError):
                build_rows(spec, tokenizer, T, place, rows_per_shard=per_shard)
            return
        found = build_rows(spec, tokenizer, T, place, rows_per_shard=per_shard)
        assert [found[i].tolist() for i in range(len(found))] == expected


def test_limits(tmp_path, small_batches):
    tokenizer, calls = golden_tokenizer(), []
    whole = build_rows(numbered(50), tokenizer, 8, tmp_path, progress=lambda *facts: calls.append(facts))
    assert calls[-1] == (len(whole), len(whole) * 8, 50) and calls == sorted(calls) and len(calls) > 3
    cases: list[tuple[dict[str, Any], int]] = [
        ({"max_rows": 5}, 5),
        ({"max_rows": 4}, 4),
    ]
    for options, expected in cases:
        found = build_rows(numbered(50), tokenizer, 8, tmp_path, rows_per_shard=3, **options)
        assert len(found) == expected
        assert all((found[i] == whole[i]).all() for i in range(expected))
        assert found.manifest["documents"] < 50  # it does not read on


def test_what_cannot_be_built(tmp_path):
    tokenizer = golden_tokenizer()
    (tmp_path / "file").write_text("")
    for count, T, place, options in [
        (50, 8, tmp_path, {"max_rows": 0}),
        (50, 8, tmp_path, {"max_rows": -5}),
        (3, 0, tmp_path, {}),
        (1, 64, tmp_path, {}),  # too little text
        (3, 8, tmp_path / "file", {}),
    ]:
        with pytest.raises(RowsError):
            build_rows(numbered(count), tokenizer, T, place, **options)


def test_the_same_rows_are_not_built_twice(tmp_path):
    def build(documents, T=8, tokenizer=None, **options):
        return build_rows(documents, tokenizer or golden_tokenizer(), T, tmp_path, **options)

    def never(start):
        raise AssertionError("read again")

    first = build(numbered(30))
    first.directory.chmod(0o555)
    again = build(CallableDocuments("numbered-30", never))
    first.directory.chmod(0o755)
    assert again.directory == first.directory and again.key == first.key
    others = [
        build(numbered(31)),
        build(numbered(30), 9),
        build(numbered(30), split="val"),
        build(numbered(30), max_rows=3),
        build(numbered(30), tokenizer=Tokenizer(golden_tokenizer().ranks[:400], {"<|bos|>": 400})),
    ]
    assert len({rows.directory for rows in [first, *others]}) == 6


def test_wide_vocabularies_use_uint32(tmp_path):
    ranks = [bytes([i]) for i in range(256)]
    ranks += [bytes([a, b, c]) for a, b, c in itertools.product(range(256), range(256), range(1))]
    tokenizer = Tokenizer(ranks, {"<|bos|>": len(ranks)})
    found = build_rows(numbered(3), tokenizer, 4, tmp_path)
    assert found[0].dtype == np.uint32 and found[0][0] == tokenizer.bos_id > 65535
    exact = Tokenizer(ranks[:65535], {"<|bos|>": 65535})
    assert build_rows(numbered(3), exact, 4, tmp_path)[0].dtype == np.uint16


# --- interruption ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_rows": 200}, {"max_rows": 210}])
def test_an_error_anywhere_then_again_gives_the_same_bytes(tmp_path, small_batches, options):
    tokenizer = golden_tokenizer()
    whole = build_rows(numbered(60), tokenizer, 8, tmp_path / "whole", rows_per_shard=30, **options)
    started_at = []
    for stop in range(0, 60, 19):

        def make(start, stop=stop):
            started_at.append(start)
            for i in range(start, 60):
                if i == stop:
                    raise OSError("the network drive is gone")
                yield document(i)

        place = tmp_path / str(stop)
        read = whole.manifest["documents"]
        if stop < read:
            with pytest.raises(OSError, match="network drive"):
                build_rows(CallableDocuments("numbered-60", make), tokenizer, 8, place, rows_per_shard=30, **options)
            [unfinished] = place.iterdir()
            with pytest.raises(RowsError):
                RowSet.open(unfinished)
        rest = CallableDocuments(
            "numbered-60", lambda start: started_at.append(start) or map(document, range(start, 60))
        )
        found = build_rows(rest, tokenizer, 8, place, rows_per_shard=30, **options)
        assert contents(found.directory) == contents(whole.directory)
    assert max(started_at) > 10, "it never resumed from the middle"


def test_half_written_files_are_never_read(tmp_path):
    tokenizer = golden_tokenizer()
    found = build_rows(numbered(60), tokenizer, 8, tmp_path, rows_per_shard=6)
    shard = found.directory / "rows_00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(RowsError, match="rows_00001.npy"):
        build_rows(numbered(60), tokenizer, 8, tmp_path, rows_per_shard=6)
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RowsError, match="rows_00001.npy"):
        RowSet.open(found.directory, verify=True)
    shard.unlink()
    with pytest.raises(RowsError, match="rows_00001.npy"):
        RowSet.open(found.directory)
    (found.directory / "manifest.json").write_text("{")
    with pytest.raises(RowsError, match="manifest.json"):
        RowSet.open(found.directory)


def test_progress_that_does_not_fit_is_started_over(tmp_path, small_batches, caplog):
    tokenizer = golden_tokenizer()
    whole = build_rows(numbered(60), tokenizer, 8, tmp_path / "whole", rows_per_shard=6)
    for damage in ("cut", "identity", "shard"):
        place = tmp_path / damage / whole.directory.name
        place.mkdir(parents=True)
        for name, data in contents(whole.directory).items():
            (place / name).write_bytes(data)
        manifest = json.loads((place / "manifest.json").read_text())
        (place / "manifest.json").unlink()
        progress = {"identity": manifest["identity"], "shards": manifest["shards"][:2], "resume_at": {}}
        text = json.dumps(progress)
        if damage == "cut":
            text = text[:-10]
        elif damage == "identity":
            text = json.dumps({**progress, "identity": {}})
        else:
            (place / "rows_00001.npy").write_bytes(b"short")
        (place / "progress.json").write_text(text)
        found = build_rows(numbered(60), tokenizer, 8, tmp_path / damage, rows_per_shard=6)
        assert contents(found.directory) == contents(whole.directory)
        assert "starting over" in caplog.text
        caplog.clear()


def test_full_disk_is_told_and_loses_nothing(tmp_path, small_batches, monkeypatch):
    tokenizer = golden_tokenizer()
    whole = build_rows(numbered(60), tokenizer, 8, tmp_path / "whole", rows_per_shard=6)
    usage = row_store.shutil.disk_usage(tmp_path)
    answers = itertools.chain([10**12] * 6, itertools.repeat(1000))
    with monkeypatch.context() as patch:
        patch.setattr(row_store.shutil, "disk_usage", lambda path: usage._replace(free=next(answers)))
        with pytest.raises(RowsError, match="rows_00003.npy.*NANOCHAT_BASE_DIR"):
            build_rows(numbered(60), tokenizer, 8, tmp_path / "full", rows_per_shard=6)
    with monkeypatch.context() as patch:  # the disk fills up while a file is being written
        calls = itertools.count()

        def fsync(handle):
            if next(calls) == 4:
                raise OSError(row_store.errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", fsync)
        with pytest.raises(RowsError):
            build_rows(numbered(60), tokenizer, 8, tmp_path / "full", rows_per_shard=6)
    assert not list((tmp_path / "full").glob("*/*.tmp"))
    found = build_rows(numbered(60), tokenizer, 8, tmp_path / "full", rows_per_shard=6)
    assert contents(found.directory) == contents(whole.directory)


def test_repairs_are_counted_the_same_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(rows, "_BATCH_DOCUMENTS", 4)
    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for i in range(60):
        lines.append(json.dumps({"text": document(i)}) if i % 5 else "{bad")
        lines += [b"\xff".decode("latin1")] if i % 9 == 0 else []
    (data / "a.jsonl").write_bytes("\n".join(lines).encode("latin1"))
    (data / "b.txt").write_bytes(b"tail \xff\xff")
    (data / "val.txt").write_text("held out")
    tokenizer = golden_tokenizer()
    whole = build_rows(FileDocuments(data), tokenizer, 8, tmp_path / "whole", rows_per_shard=6)
    assert whole.manifest["bad_lines"] == 12 + 7 and whole.manifest["invalid_utf8"] == 2
    for stop in (3, 17, 30, 44):
        spec = FileDocuments(data)
        real = spec.iterate

        def interrupted(start=0, stop=stop, real=real):
            for count, text in enumerate(real(start), start):
                if count == stop:
                    raise KeyboardInterrupt
                yield text

        spec.iterate = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            build_rows(spec, tokenizer, 8, tmp_path / str(stop), rows_per_shard=6)
        again = build_rows(FileDocuments(data), tokenizer, 8, tmp_path / str(stop), rows_per_shard=6)
        assert contents(again.directory) == contents(whole.directory)


# --- opening, masks, progress ---------------------------------------------------------------------------


def test_another_tokenizer_is_named(tmp_path):
    tokenizer = golden_tokenizer()
    found = build_rows(numbered(30), tokenizer, 8, tmp_path)
    other = Tokenizer(tokenizer.ranks[:-1], {"<|bos|>": 600})
    with pytest.raises(RowsError, match=f"{tokenizer.hash[:12]}.*{other.hash[:12]}"):
        RowSet.open(found.directory, other)
    assert len(RowSet.open(found.directory, tokenizer.hash)) == len(found)
    manifest = json.loads((found.directory / "manifest.json").read_text())
    (found.directory / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(RowsError):
        RowSet.open(found.directory)


def test_masked_rows(tmp_path):
    source = np.random.default_rng(0)
    tokens = source.integers(0, 500, (20, 9)).astype(np.uint16)
    masks = source.integers(0, 2, (20, 9)).astype(np.uint8)
    with RowWriter(tmp_path / "masked", {"kind": "chat"}, 8, np.dtype("<u2"), masked=True, rows_per_shard=6) as writer:
        done = 0
        while done < len(tokens):
            done += writer.add(tokens[done:], masks[done:])
            if writer.full:
                writer.commit({"row": done})
        with pytest.raises(ValueError, match="masks"):
            writer.add(tokens)
        writer.finish({"tokenizer_hash": "x"})
    found = RowSet.open(tmp_path / "masked", verify=True)
    assert all((found[i] == tokens[i]).all() and (found.mask(i) == masks[i]).all() for i in range(20))
    assert len(list((tmp_path / "masked").glob("mask_*.npy"))) == 4
