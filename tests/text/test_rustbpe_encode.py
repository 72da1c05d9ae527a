"""Encoding with rustbpe: the same ids as tiktoken, whatever the text, one by one, in lists and into NumPy arrays."""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.skips import NOT_BUILT

rustbpe = pytest.importorskip("rustbpe", reason=NOT_BUILT)
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer_v1.json").read_text(encoding="utf-8"))
BYTES = [(bytes([b]), b) for b in range(256)]
MAIN = BYTES + [(bytes.fromhex(token), rank) for token, rank in GOLDEN["main"]["merged_ranks"]]
FREE = 1 + max(rank for _, rank in MAIN)

# Everything that the split pattern tells apart: white space of all kinds, line ends, contractions in every case and
# with the long s, digits and numbers of many scripts, combining marks, letters of one to four bytes.
PARTS = st.sampled_from(
    [" ", "  ", "\t", "\n", "\r", "\r\n", "\u0085", "\u00a0", "\u2003", "\u2028", "\u3000", "\u001c", "\u200b"]
    + ["'s", "'S", "'ſ", "'ll", "'Ll", "'l", "'ve", "'RE", "'r", "'d", "'m", "'t", "'", "''", "’s", "K"]
    + ["0", "42", "007", "٣", "½", "Ⅷ", "²", "𝟗", "e\u0301", "\u0301", "ä", "ß", "ſ", "你好", "𐐀", "ª", "😀"]
    + ["a", "the", " the", "Bread", "harbor", "x" * 20, "!", "...", " (", "_", "<|bos|>", "\0"]
)
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.one_of(PARTS, st.text(max_size=3)), max_size=40).map("".join),
    st.text(alphabet="a s'\n\r1.é\u00a0٣\u0301ſ", max_size=60),
)


def both(ranks, pattern=rustbpe.DEFAULT_PATTERN) -> tuple[Any, Any]:
    ours = rustbpe.Tokenizer.from_ranks(ranks, pattern)
    return ours, tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})


OURS, THEIRS = both(MAIN)


def as_lists(tokens, offsets):
    return [tokens[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_encode_is_tiktoken(text):
    ids = OURS.encode(text)
    assert ids == THEIRS.encode_ordinary(text)
    assert OURS.decode(ids) == text
    assert OURS.decode_bytes(ids) == text.encode()


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=12), bos=st.one_of(st.none(), st.integers(0, 65535)), threads=st.integers(0, 3))
def test_batches_are_tiktoken(texts, bos, threads):
    expected = THEIRS.encode_ordinary_batch(texts)
    assert OURS.batch_encode(texts) == expected
    with_bos = expected if bos is None else [[bos, *ids] for ids in expected]
    for dtype in ("uint16", "uint32"):
        tokens, offsets = OURS.encode_to_numpy(texts, bos=bos, dtype=dtype, num_threads=threads)
        assert tokens.dtype == dtype and offsets.dtype == np.int64
        assert tokens.ndim == offsets.ndim == 1 and offsets.shape == (len(texts) + 1,)
        assert as_lists(tokens, offsets) == with_bos and offsets[-1] == len(tokens)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), text=TEXTS)
def test_any_ranks(seed, text):
    """Ranks that no training would give: byte ids shuffled, merges in random order, gaps between the ranks."""
    rng = random.Random(seed)
    tokens = {bytes([b]) for b in range(256)}
    pool = [bytes([b]) for b in "aehtr '\n1é你".encode()]
    for _ in range(80):
        tokens.add(rng.choice(pool) + rng.choice(pool))
        pool.append(max(rng.sample(sorted(tokens), 3), key=len))
    ranks = list(zip(sorted(tokens, key=lambda _: rng.random()), rng.sample(range(1000), len(tokens)), strict=True))
    ours, theirs = both(ranks)
    text += "the other hat are here"
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.vocab_size == theirs.n_vocab == 1 + max(rank for _, rank in ranks)
    assert ours.get_mergeable_ranks() == sorted(ranks, key=lambda pair: pair[1])


@pytest.mark.parametrize(
    "pattern", [r"\p{L}+|\s+", r".{1,3}(?=.)|.+", rustbpe.DEFAULT_PATTERN.replace("{1,2}", "{1,3}")]
)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_other_patterns(pattern, text):
    ours, theirs = both(MAIN, pattern)
    assert ours.encode(text) == theirs.encode_ordinary(text)


def test_every_character_is_tiktoken():
    """Both have the same idea of letters, numbers and white space: every character, in contexts that show its class."""
    assigned = [*range(0, 0x33000, 0x800), 0xE0000, 0x10F800]  # and two of what lies between and above
    for first in assigned:
        text = "".join(
            f"a{chr(c)}b {chr(c)}1{chr(c)}\n" for c in range(first, first + 0x800) if not 0xD800 <= c < 0xE000
        )
        assert OURS.encode(text) == THEIRS.encode_ordinary(text), f"among U+{first:04X}..U+{first + 0x7FF:04X}"


def test_the_memory_of_pieces_never_changes_the_result():
    """More different pieces than are remembered, short ones and long ones, met again and in several threads at once."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdehinorstuy", k=rng.randint(1, 30))) for _ in range(40_000)]
    texts = [" ".join(rng.choices(words, k=2000)) for _ in range(30)]
    texts += [" ".join(rng.choices(words[:50], k=500)) for _ in range(20)] + [""] * 3
    ours, theirs = both(MAIN)
    expected = theirs.encode_ordinary_batch(texts)
    with ThreadPoolExecutor(2) as pool:
        for tokens, offsets in pool.map(lambda _: ours.encode_to_numpy(texts), range(2)):
            assert as_lists(tokens, offsets) == expected


@pytest.mark.parametrize("text", ["a" * 300_000, "ab" * 150_000, "abcdefghij" * 30_000, "é" * 150_000, "!" * 300_000])
def test_one_huge_piece_is_not_quadratic(text):
    start = time.process_time()
    ids = OURS.encode(text)
    assert time.process_time() - start < 6
    assert OURS.decode(ids) == text
    # Far from its ends a periodic text encodes the same as a shorter one, which tiktoken can do in time.
    assert ids[:100] == THEIRS.encode_ordinary(text[:10_000])[:100]


def test_nothing_and_lone_surrogates():
    tokens, offsets = OURS.encode_to_numpy([])
    assert tokens.shape == (0,) and offsets.tolist() == [0]
    assert OURS.encode("") == [] and OURS.batch_encode([]) == [] and OURS.decode([]) == ""
    lone = GOLDEN["main"]["lone_surrogate"]
    text = "".join(map(chr, lone["text_codepoints"]))
    assert OURS.encode(text) == lone["ids"] and OURS.batch_encode([text, "a"]) == [lone["ids"], [97]]
    assert OURS.encode_to_numpy([text])[0].tolist() == lone["ids"]


def test_uint16_must_be_enough():
    big = MAIN + [(b"zq", 65536)]
    ours, theirs = both(big)
    for _ in range(2):
        with pytest.raises(ValueError, match="uint32"):
            ours.encode_to_numpy(["text"])
    tokens, _ = ours.encode_to_numpy(["zq a"], dtype="uint32")
    assert tokens.tolist() == theirs.encode_ordinary("zq a") and 65536 in tokens
    # The largest rank there can be, met twice: computed, then remembered.
    huge, theirs = both(MAIN + [(b"zq", (1 << 24) - 1)])
    for _ in range(2):
        assert huge.encode("zq zq") == theirs.encode_ordinary("zq zq")


def test_bad_arguments():
    wrong: list[tuple[type, Callable[[], Any]]] = [
        (ValueError, lambda: OURS.encode_to_numpy(["a"], bos=65536)),
        (ValueError, lambda: OURS.encode_to_numpy(["a"], bos=-1)),
        (ValueError, lambda: OURS.encode_to_numpy(["a"], dtype="int32")),
        (TypeError, lambda: OURS.encode(b"bytes")),
        *((TypeError, partial(OURS.batch_encode, texts)) for texts in (["a", 1], "text")),
        *((TypeError, partial(OURS.encode_to_numpy, texts)) for texts in (["a", 1], "text")),
        *((ValueError, partial(OURS.decode, [97, unknown])) for unknown in (-1, OURS.vocab_size, 1 << 40)),
        (ValueError, lambda: rustbpe.Tokenizer.from_ranks(BYTES, "[")),
    ]
    for error, call in wrong:
        with pytest.raises(error):
            call()


@pytest.mark.parametrize(
    ("ranks", "error"),
    [
        (MAIN[:65] + MAIN[66:], ValueError),  # a byte is missing
        ([*MAIN, (MAIN[-1][0], FREE)], ValueError),  # there already
        ([*MAIN, (b"zq", MAIN[-1][1])], ValueError),  # of another token
        ([*MAIN, (b"zq", -1)], ValueError),
        ([*MAIN, (b"zq", 1 << 30)], ValueError),
        ([*MAIN, (b"", FREE)], ValueError),
        ([*MAIN, ("zq", FREE)], TypeError),
        ([*MAIN, FREE], TypeError),
    ],
)
def test_bad_ranks(ranks, error):
    with pytest.raises(error):
        rustbpe.Tokenizer.from_ranks(ranks, rustbpe.DEFAULT_PATTERN)
