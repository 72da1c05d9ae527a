"""Best fit of documents: the reference's rows, a slow version's, and an interrupted build resumes exactly."""

import itertools
import os
import random

import numpy as np
import pytest

from nanochat_jax.data import build_rows as module
from nanochat_jax.data.build_rows import build_rows
from nanochat_jax.data.documents import CallableDocuments
from nanochat_jax.data.packing import BestFitDocuments, Piece
from nanochat_jax.data.row_store import RowsError
from tests.tokenizer_fixtures import golden, golden_tokenizer

GOLDEN = golden("packing_modern")
BOS = 256
COUNTS = {"documents": 0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def piece(texts) -> Piece:
    ids = [token for text in texts for token in (BOS, *text.encode())]
    return Piece(np.array(ids, np.uint16), COUNTS)


def reference_order(case):
    """The reference's sublists of documents for one process, for ever: its row groups, in batches."""
    files = GOLDEN["files"][-1:] if case["split"] == "val" else GOLDEN["files"][:-1]
    for file in itertools.cycle(files):
        for group in file[case["rank"] :: case["world_size"]]:
            for at in range(0, len(group), case["tokenizer_batch_size"]):
                yield piece(group[at : at + case["tokenizer_batch_size"]])


@pytest.mark.parametrize("case", GOLDEN["pretrain_bestfit_crop"])
def test_rows_equal_the_reference(case):
    packer = BestFitDocuments(case["T"], BOS, np.dtype("<u2"), reference_order(case), COUNTS, None, case["buffer_size"])
    for batch in case["batches"]:
        rows = np.concatenate([packer.take()[0] for _ in range(case["B"])])
        assert rows[:, :-1].tolist() == batch["inputs"] and rows[:, 1:].tolist() == batch["targets"]


def slow_rows(documents, T, buffer, refill):
    """(rows, cropped tokens), by the rule itself."""
    waiting, chosen, rows, cropped = list(documents), [], [], 0
    while True:
        row = []
        while len(row) < T + 1:
            while waiting and len(chosen) < buffer:
                chosen += waiting[:refill]
                del waiting[:refill]
            if not chosen:
                return rows, cropped
            left = T + 1 - len(row)
            fitting = [d for d in chosen if len(d) <= left]
            best = max(fitting, key=len) if fitting else min(chosen, key=len)  # the first among equals
            chosen.pop(next(i for i, d in enumerate(chosen) if d is best))
            row += best[:left]
            cropped += max(0, len(best) - left)
        rows.append(row)


def texts(count, seed=0):
    source = random.Random(seed)
    return ["".join(source.choices("abcdefgh ", k=source.randint(1, 60))) for _ in range(count)]


def source_of(found, name="made"):
    return CallableDocuments(name, lambda start: iter(found[start:]))


@pytest.mark.parametrize(("T", "buffer", "refill"), [(24, 10, 3), (5, 4, 7), (200, 30, 30)])
def test_rows_equal_a_slow_version(tmp_path, monkeypatch, T, buffer, refill):
    monkeypatch.setattr(module, "BUFFER", buffer)
    monkeypatch.setattr(module, "REFILL", refill)
    tokenizer, documents = golden_tokenizer(), texts(80)
    found = build_rows(source_of(documents), tokenizer, T, tmp_path, packing="best_fit", rows_per_shard=7)
    expected, cropped = slow_rows([[tokenizer.bos_id, *tokenizer.encode(d)] for d in documents], T, buffer, refill)
    assert [found[i].tolist() for i in range(len(found))] == expected
    assert all(row[0] == tokenizer.bos_id for row in expected)
    facts = found.manifest
    assert facts["cropped"] == cropped > 0 and facts["documents"] == 80
    assert facts["stream_tokens"] >= cropped + len(expected) * (T + 1)
    stream = build_rows(source_of(documents), tokenizer, T, tmp_path)
    assert stream.key != found.key and "cropped" not in stream.manifest


@pytest.mark.parametrize("fail_at", [5, 23, 61, 79])
def test_an_interrupted_build_resumes_exactly(tmp_path, monkeypatch, fail_at):
    """Also what was in the buffer when the last shard was written, long documents that stay for ever among them."""
    monkeypatch.setattr(module, "BUFFER", 10)
    monkeypatch.setattr(module, "REFILL", 4)
    documents = texts(80)
    documents[3] = documents[3] * 30
    options = dict(packing="best_fit", rows_per_shard=4)

    def broken(start):
        for index, text in enumerate(documents[start:], start):
            if index == fail_at:
                raise KeyboardInterrupt
            yield text

    whole = build_rows(source_of(documents), golden_tokenizer(), 24, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        build_rows(CallableDocuments("made", broken), golden_tokenizer(), 24, tmp_path / "cut", **options)
    resumed = build_rows(source_of(documents), golden_tokenizer(), 24, tmp_path / "cut", **options)
    assert resumed.key == whole.key
    assert [resumed[i].tolist() for i in range(len(resumed))] == [whole[i].tolist() for i in range(len(whole))]
    assert resumed.manifest["cropped"] == whole.manifest["cropped"]
    resumed.verify()


def test_what_cannot_be_packed_is_refused(tmp_path):
    with pytest.raises(RowsError, match="too few"):
        build_rows(source_of(["a"]), golden_tokenizer(), 500, tmp_path, packing="best_fit")
    with pytest.raises(RowsError, match="packing"):
        build_rows(source_of(["a"]), golden_tokenizer(), 5, tmp_path, packing="crop")
