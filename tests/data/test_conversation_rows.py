import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.data import build_rows, row_store
from nanochat_jax.data import conversation_rows as module
from nanochat_jax.data.conversation_rows import build_conversation_rows, render_many
from nanochat_jax.data.loader import RowLoader, val_batches
from nanochat_jax.data.packing import BestFitConversations, Rendered
from nanochat_jax.data.row_store import RowsError, RowSet
from nanochat_jax.text.tokenizer import Tokenizer
from tests.reference_stride import ReferenceStride
from tests.tokenizer_fixtures import golden, golden_tokenizer

TOKENIZER = golden_tokenizer()
WORDS = "the river runs past old mill and miller counts his sacks while rain falls on stone roof at night".split()
GOLDEN_CONVERSATIONS = [{"messages": c["messages"]} for c in golden("render_v1")["conversations"]]


class Listed:
    """Conversations from a list; remembers what was read."""

    def __init__(self, items, name="listed", fail_at=None):
        self.items, self.name, self.fail_at, self.read = list(items), name, fail_at, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if index == self.fail_at:
            raise KeyboardInterrupt
        self.read.append(index)
        return self.items[index]

    def fingerprint(self):
        return f"{self.name}-{len(self.items)}"


def talk(*contents) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


def made(i):
    source = random.Random(i)
    texts = [" ".join(source.choices(WORDS, k=source.randint(1, 12))) for _ in range(2 * source.randint(1, 3))]
    if i % 4 == 0:
        texts[1] = [{"type": "python", "text": "2+2"}, {"type": "python_output", "text": "4"}, {"type": "text", "text": texts[1]}]  # fmt: skip  # noqa: E501
    if i % 11 == 5:
        texts[0] = " "
    if i % 13 == 7:
        texts = texts[:1]  # nothing to learn in best fit
    return talk(*texts)


def usable(conversation):
    return conversation["messages"][0]["content"] != " "


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name != row_store.LOCK}


def listed_rows(found):
    return [found[i].tolist() for i in range(len(found))]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "_RENDER_AT_ONCE", 7)
    monkeypatch.setattr(build_rows, "_REPORT_EVERY", 7)


# --- rendering ------------------------------------------------------------------------------------


def test_many_at_once_render_as_one_at_a_time():
    for limit in (2048, 20, 5, 1):
        for conversation, found in zip(
            GOLDEN_CONVERSATIONS, render_many(GOLDEN_CONVERSATIONS, TOKENIZER, limit), strict=True
        ):
            ids, mask = TOKENIZER.render_conversation(conversation, limit)
            whole, _ = TOKENIZER.render_conversation(conversation, 10**9)
            if isinstance(found, str):
                continue  # why it is empty
            assert (found.ids.tolist(), found.mask.tolist(), found.cut) == (ids, mask, len(whole) > limit)
            assert found.ids.dtype == np.uint16 and found.mask.dtype == np.uint8


TEXTS = st.text(min_size=1, max_size=20).filter(lambda text: not text.isspace())
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": TEXTS}), min_size=1
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(TEXTS, TEXTS | PARTS), min_size=1, max_size=3), max_size=6), st.integers(1, 60))
def test_any_conversations_render_the_same(several, limit):
    several = [talk(*itertools.chain(*turns)) for turns in several]
    for conversation, found in zip(several, render_many(several, TOKENIZER, limit), strict=True):
        assert isinstance(found, Rendered)
        assert (found.ids.tolist(), found.mask.tolist()) == TOKENIZER.render_conversation(conversation, limit)


BAD: list[Any] = [  # test_chat_files.py has more
    {}, None, "text", {"messages": []}, {"messages": [{"role": "user"}]}, talk("a", "b", "", "c"), talk("a", []),
    talk(["a"], "b"), talk("a", None), talk("a", [{"type": "image", "text": "x"}]), talk("a", [{"type": "text"}]),
]  # fmt: skip
GOOD = [talk("who runs past", "the miller"), talk("what falls", "rain on the stone roof")]


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_what_cannot_be_used_is_counted_and_told(tmp_path, caplog, packing):
    def build(items, name):
        options: dict[str, Any] = {"packing": packing, "split": "train", "out_dir": tmp_path / name}
        return build_conversation_rows(Listed(items), TOKENIZER, 16, **options)

    found = build([GOOD[0], *BAD, GOOD[1]], "mixed")
    assert listed_rows(found) == listed_rows(build(GOOD, "good"))
    assert found.manifest["conversations"] == 2 and found.manifest["skipped"] == len(BAD)
    assert [index for index, reason in found.manifest["problems"] if reason] == [*range(1, 1 + len(BAD))]
    assert f"{len(BAD)} of {len(BAD) + 2} train conversations" in caplog.text and "conversation 1:" in caplog.text


@pytest.mark.parametrize(
    ("items", "T", "options"),
    [
        (BAD, 16, {"packing": "stream"}),  # nothing to use
        ([talk("a long question " * 10, "the answer is cut off"), talk("only a question")], 8, {}),
        ([], 8, {}),
        (GOOD, 512, {"packing": "stream"}),  # too short
        (GOOD, 8, {"packing": "crop"}),
        (GOOD, 0, {"packing": "stream"}),
        (GOOD, 8, {"max_rows": 0}),
    ],
)
def test_what_gives_no_rows_is_refused(tmp_path, items, T, options):
    options = {"packing": "best_fit", "split": "val", "out_dir": tmp_path, **options}
    with pytest.raises(RowsError):
        build_conversation_rows(Listed(items), TOKENIZER, T, **options)
    plain = Tokenizer(TOKENIZER.ranks, {"<|bos|>": len(TOKENIZER.ranks)})
    with pytest.raises(RowsError, match=r"<\|user_start\|>"):
        build_conversation_rows(Listed(GOOD), plain, 8, packing="stream", split="train", out_dir=tmp_path)


# --- stream ---------------------------------------------------------------------------------------


def wrapped(conversations, rank, world, length):
    """The reference's endless order for one process."""
    return [conversations[(rank + world * i) % len(conversations)] for i in range(length)]


@pytest.mark.parametrize("expected", golden("sft_v1")["mid"])
def test_stream_equals_the_reference(tmp_path, expected):
    B, T = expected["B"], expected["T"]
    chosen = [GOLDEN_CONVERSATIONS[i] for i in expected["conversation_indices"]]
    enough = len(expected["batches"]) * (B * T + 1)  # tokens, and there is one at least in every conversation
    items = wrapped(chosen, expected["rank"], expected["world_size"], enough)
    found = build_conversation_rows(Listed(items), TOKENIZER, T, packing="stream", split="train", out_dir=tmp_path)
    loader = RowLoader(ReferenceStride(found, B), B, shuffle=False)
    for step, batch in enumerate(expected["batches"]):
        inputs, targets, weights = loader.batch_for(step)
        assert inputs.tolist() == batch["inputs"] and targets.tolist() == batch["targets"] and (weights == 1).all()


@pytest.mark.parametrize(("T", "per_shard"), [(1, 50), (8, 9), (64, 4)])
def test_stream_is_all_conversations(tmp_path, small_batches, T, per_shard):
    items = [made(i) for i in range(40)]
    stream = [t for item in items if usable(item) for t in TOKENIZER.render_conversation(item)[0]]
    found = build_conversation_rows(
        Listed(items), TOKENIZER, T, packing="stream", split="train", out_dir=tmp_path,
        rows_per_shard=per_shard,
    )  # fmt: skip
    expected = [stream[s : s + T + 1] for s in range(0, len(stream) - T, T)]
    assert listed_rows(found) == expected
    facts = found.manifest
    assert facts["conversations"] == sum(map(usable, items)) and facts["skipped"] == 40 - facts["conversations"] == 4
    assert facts["tokens"] == facts["supervised_tokens"] == len(expected) * T and facts["padding"] == 0
    assert not found.masked and found.mask(0) is None and facts["truncated"] == 0
    found.verify()


def test_stream_cuts_where_the_reference_does(tmp_path, caplog):
    items = [talk("x" * 3000, "y"), talk("z", "w")]
    found = build_conversation_rows(
        Listed(items), TOKENIZER, 16, packing="stream", split="train", out_dir=tmp_path / "a"
    )
    stream = [t for item in items for t in TOKENIZER.render_conversation(item)[0]]
    assert TOKENIZER.render_conversation(items[0], 10**6)[0][2047:] != stream[2047:]
    assert listed_rows(found) == [stream[s : s + 17] for s in range(0, len(stream) - 16, 16)]
    assert found.manifest["truncated"] == 1 and "1 of 2 train conversations cut to 2048 tokens" in caplog.text
    long = build_conversation_rows(
        Listed(items), TOKENIZER, 3001, packing="stream", split="train", out_dir=tmp_path / "b"
    )
    assert long.manifest["truncated"] == 1  # 3,006 tokens
    assert listed_rows(long) == [[*TOKENIZER.render_conversation(items[0], 3001)[0], TOKENIZER.bos_id]]


# --- best fit -------------------------------------------------------------------------------------


def slow_best_fit(rendered, capacity, pad, buffer):
    """The packing by its definition: list positions, no sorting. Endless input gives endless rows."""
    source, waiting = iter(rendered), []
    while True:
        ids, mask = [], []
        while True:
            while len(waiting) < buffer and (more := next(source, None)) is not None:
                waiting.append(more)
            fitting = [item for item in waiting if len(item[0]) <= capacity - len(ids)]
            if not fitting:
                break
            longest = max(fitting, key=lambda item: len(item[0]))  # max gives the first among equals
            waiting.remove(longest)
            ids, mask = ids + longest[0], mask + longest[1]
        if not ids:
            return
        yield ids + [pad] * (capacity - len(ids)), mask + [0] * (capacity - len(mask))


@pytest.mark.parametrize("expected", golden("packing_modern")["sft_bestfit_pad"])
def test_best_fit_equals_the_reference(expected):
    T, B = expected["T"], expected["B"]
    pad = expected["conversations"][0]["ids"][0]  # bos
    given_conversations = [
        Rendered(np.array(c["ids"], np.uint16), np.array(c["mask"], np.uint8), False) for c in expected["conversations"]
    ]
    enough = len(expected["batches"]) * B * (T + 1) + expected["buffer_size"]
    source = (
        pair for pair in enumerate(wrapped(given_conversations, expected["rank"], expected["world_size"], enough))
    )
    packer = BestFitConversations(T + 1, pad, np.dtype("<u2"), source, None, expected["buffer_size"])

    class Packed:
        def __init__(self):
            self.T, self.taken = T, [packer.take() for _ in range(B * len(expected["batches"]))]

        def __len__(self):
            return len(self.taken)

        def __getitem__(self, index):
            return self.taken[index][0][0]

        def mask(self, index):
            return self.taken[index][1][0]

    loader = RowLoader(Packed(), B, shuffle=False)
    for step, batch in enumerate(expected["batches"]):
        inputs, targets, weights = loader.batch_for(step)
        assert inputs.tolist() == batch["inputs"]
        assert np.where(weights == 1, targets, -1).tolist() == batch["targets"]


@pytest.mark.parametrize(("T", "per_shard"), [(47, 5), (80, 3), (200, 100)])
def test_best_fit_is_its_definition(tmp_path, small_batches, monkeypatch, T, per_shard):
    monkeypatch.setattr(module, "BUFFER", 6)
    items = [made(i) for i in range(150)]
    rendered = [TOKENIZER.render_conversation(item, T + 1) for item in items if usable(item)]
    learnt = [(ids, mask) for ids, mask in rendered if any(mask)]
    whole = [len(TOKENIZER.render_conversation(item, 10**6)[0]) for item in items if usable(item)]
    found = build_conversation_rows(
        Listed(items), TOKENIZER, T, packing="best_fit", split="train", out_dir=tmp_path, rows_per_shard=per_shard
    )
    expected = list(slow_best_fit(learnt, T + 1, TOKENIZER.bos_id, 6))
    assert listed_rows(found) == [ids for ids, _ in expected]
    assert [found.mask(i).tolist() for i in range(len(found))] == [mask for _, mask in expected]  # type: ignore[union-attr]
    facts = found.manifest
    assert facts["conversations"] == len(learnt) and facts["skipped"] == 150 - len(learnt)
    cut = [len_ > T + 1 for len_, (_, mask) in zip(whole, rendered, strict=True) if any(mask)]
    assert facts["truncated"] == sum(cut) and (T != 47 or sum(cut) > 5)
    assert facts["padding"] == len(expected) * (T + 1) - sum(len(ids) for ids, _ in learnt)
    assert facts["supervised_tokens"] == sum(sum(mask) for _, mask in learnt)
    weights = sum(batch[2].sum() for batch in val_batches(found, 4))
    assert weights == facts["supervised_tokens"] and facts["tokens"] == len(expected) * T
    found.verify()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=40), capacity=st.integers(12, 30), buffer=st.integers(1, 8))
def test_best_fit_of_any_lengths(lengths, capacity, buffer):
    rendered = [([i] * n, [1] * n) for i, n in enumerate(lengths)]
    source = ((i, Rendered(np.array(a), np.array(b), False)) for i, (a, b) in enumerate(rendered))
    packer = BestFitConversations(capacity, 99, np.dtype("<u2"), source, None, buffer)
    rows = []
    while (taken := packer.take()) is not None:
        rows.append((taken[0][0].tolist(), taken[1][0].tolist()))
    assert rows == list(slow_best_fit(rendered, capacity, 99, buffer))


def nothing_to_learn(conversation):
    """Whether a content is empty, or no token of the assistant is there: the reference trains the end token alone, or
    nothing; we leave it out."""
    texts = [m["content"] for m in conversation["messages"] if m["role"] != "system"]
    texts = ["".join(part["text"] for part in text) if isinstance(text, list) else text for text in texts]
    return len(texts) < 2 or not all(text.strip() for text in texts)


@pytest.mark.parametrize("expected", golden("sft_v1")["sft"])
def test_supervised_targets_equal_the_references_finetuning(tmp_path, expected):
    """Whatever the packing: behind each token of a conversation the reference and we learn the same next token."""
    pad = golden("sft_v1")["pad_token"]
    chosen = [GOLDEN_CONVERSATIONS[i] for i in expected["conversation_indices"]]
    order = itertools.cycle(chosen[expected["rank"] :: expected["world_size"]])  # every epoch begins at the rank
    longest = max(len(TOKENIZER.render_conversation(conversation)[0]) for conversation in chosen)
    options: dict[str, Any] = {"packing": "best_fit", "split": "train", "out_dir": tmp_path}
    found = build_conversation_rows(Listed(chosen), TOKENIZER, longest, **options)
    ours: dict[tuple[int, ...], list[int]] = {}  # conversation -> targets, -1 where there is nothing to learn
    for inputs, targets, weights in (RowLoader(found, 1, shuffle=False).batch_for(i) for i in range(len(found))):
        learnt = np.where(weights == 1, targets, -1)[0].tolist()
        row = [*inputs[0].tolist(), int(targets[0, -1])]
        starts = [i for i, token in enumerate(row) if token == TOKENIZER.bos_id]
        for start, stop in itertools.pairwise([*starts, len(row)]):
            ours[tuple(row[start:stop])] = learnt[start : stop - 1]
            assert stop == len(row) or learnt[stop - 1] == -1  # the next conversation's bos is nobody's target
    left_out, seen = set(), set()
    for batch in expected["batches"]:
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
            conversation = next(order)
            seen.add(expected["conversation_indices"][chosen.index(conversation)])
            ids = TOKENIZER.render_conversation(conversation)[0]
            n = len(ids) - 1
            assert inputs == ids[:-1] + [pad] * (len(inputs) - n) and set(targets[n:]) <= {-1}
            if tuple(ids) in ours:
                assert ours[tuple(ids)] == targets[:n]
            else:
                left_out.add(expected["conversation_indices"][chosen.index(conversation)])
    unusable = {i for i in expected["conversation_indices"] if nothing_to_learn(GOLDEN_CONVERSATIONS[i])}
    assert left_out == unusable & seen and found.manifest["skipped"] == len(unusable)


# --- the same bytes, whatever happens -------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {"packing": "stream"},
    {"packing": "stream", "max_rows": 380},
    {"packing": "stream", "max_rows": 384},  # at the end of a file
    {"packing": "best_fit"},
    {"packing": "best_fit", "max_rows": 84},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_interrupted_anywhere_gives_the_same_bytes(tmp_path, small_batches, monkeypatch, options):
    monkeypatch.setattr(module, "BUFFER", 9)
    items = [made(i) for i in range(120)]
    options = {"split": "train", "rows_per_shard": 12, **options}
    T = 20 if options["packing"] == "stream" else 60
    whole = build_conversation_rows(Listed(items), TOKENIZER, T, out_dir=tmp_path / "whole", **options)
    assert len(whole) > 12 and whole.manifest["skipped"] > 0
    reads = []
    for stop in range(3, 120, 29):
        place = tmp_path / str(stop)
        try:
            build_conversation_rows(Listed(items, fail_at=stop), TOKENIZER, T, out_dir=place, **options)
        except KeyboardInterrupt:
            [unfinished] = place.iterdir()
            with pytest.raises(RowsError):
                RowSet.open(unfinished)
        again = Listed(items)
        found = build_conversation_rows(again, TOKENIZER, T, out_dir=place, **options)
        reads.append(len(again.read))
        assert contents(found.directory) == contents(whole.directory)
    assert reads[0] > min(count for count in reads if count), "it never resumed from the middle"


@pytest.mark.parametrize("options", CASES[::2], ids=str)
@pytest.mark.parametrize("where", ["before finish", "before the manifest", "inside a shard"])
def test_killed_at_the_end_gives_the_same_bytes(tmp_path, small_batches, monkeypatch, options, where):
    items = [made(i) for i in range(120)]
    options = {"split": "train", "rows_per_shard": 6, **options}
    whole = build_conversation_rows(Listed(items), TOKENIZER, 40, out_dir=tmp_path / "whole", **options)
    real, real_close = row_store.write_atomic, row_store.RowWriter._close_shard

    def write_atomic(path, data):
        if where == "before the manifest" and Path(path).name == row_store.MANIFEST:
            raise KeyboardInterrupt
        real(path, data)

    def close_shard(self):  # the shard's files are there, but nobody was told
        real_close(self)
        if where == "inside a shard" and len(self._shards) == 3:
            raise KeyboardInterrupt

    def interrupt(*facts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(row_store, "write_atomic", write_atomic)
        patch.setattr(row_store.RowWriter, "_close_shard", close_shard)
        if where == "before finish":
            patch.setattr(row_store.RowWriter, "finish", interrupt)
        build_conversation_rows(Listed(items), TOKENIZER, 40, out_dir=tmp_path / "again", **options)
    [unfinished] = (tmp_path / "again").iterdir()
    assert len(json.loads((unfinished / "progress.json").read_text())["shards"]) >= 2
    found = build_conversation_rows(Listed(items), TOKENIZER, 40, out_dir=tmp_path / "again", **options)
    assert contents(found.directory) == contents(whole.directory)


def test_the_same_rows_are_not_built_twice(tmp_path, small_batches):
    items, calls = [made(i) for i in range(60)], []

    def build(conversations=None, T=40, **changes):
        options: dict[str, Any] = {"packing": "best_fit", "split": "train", "out_dir": tmp_path, **changes}
        return build_conversation_rows(conversations or Listed(items), TOKENIZER, T, **options)

    first = build(progress=lambda *facts: calls.append(facts))
    assert calls[-1] == (len(first), len(first) * 40, first.manifest["conversations"])
    assert calls == sorted(calls) and len(calls) > 5
    again = Listed(items)
    assert build(again).directory == first.directory and not again.read
    others = [
        build(Listed(items[:-1])),
        build(Listed(items, "other")),
        build(T=41),
        build(packing="stream"),
        build(split="val"),
        build(max_rows=2),
    ]
    assert len({rows.directory for rows in [first, *others]}) == 7 and len(others[-1]) == 2
