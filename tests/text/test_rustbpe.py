"""Training with rustbpe: golden merges, a slow trainer written from the definition, streaming, and bad input."""

import json
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import regex  # a dependency of tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.skips import NOT_BUILT

rustbpe = pytest.importorskip("rustbpe", reason=NOT_BUILT)
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer_v1.json").read_text(encoding="utf-8"))
NUM_SPECIAL = len(GOLDEN["special_tokens"])


def train(texts, vocab_size, **kwargs) -> Any:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **kwargs)
    return tokenizer


def merged(tokenizer):
    """The ranks from 256 on as the golden file writes them."""
    return [[token.hex(), rank] for token, rank in tokenizer.get_mergeable_ranks()[256:]]


def slow_train(texts, vocab_size, pattern):
    """BPE by the definition, every pair counted afresh for every merge: all tokens in order of their ids."""
    counts = Counter(piece.encode() for text in texts for piece in regex.findall(pattern, text))
    words = {piece: list(piece) for piece in counts}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for piece, word in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += counts[piece]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for piece, word in words.items():
            out = []
            for symbol in word:
                # A symbol just made cannot be half of another: `best` holds older ids only.
                if out and (out[-1], symbol) == best:
                    out[-1] = len(tokens)
                else:
                    out.append(symbol)
            words[piece] = out
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def test_default_pattern_is_the_reference_pattern():
    assert rustbpe.DEFAULT_PATTERN == GOLDEN["split_pattern"]
    assert rustbpe.Tokenizer().get_pattern() == GOLDEN["split_pattern"]


@pytest.mark.parametrize("case", GOLDEN["trained"], ids=lambda c: f"{c['corpus']}-{c['requested_vocab_size']}")
@pytest.mark.parametrize("buffer_size", [1, 8192])
def test_golden_merges(case, buffer_size):
    vocab_size = case["requested_vocab_size"] - NUM_SPECIAL
    tokenizer = train(GOLDEN["corpora"][case["corpus"]], vocab_size, buffer_size=buffer_size)
    assert merged(tokenizer) == case["merged_ranks"]
    assert tokenizer.vocab_size == case["n_vocab"] - NUM_SPECIAL
    assert tokenizer.get_mergeable_ranks()[:256] == [(bytes([b]), b) for b in range(256)]


def test_golden_main_tokenizer():
    main = GOLDEN["main"]
    texts = [text for corpus in main["corpora"] for text in GOLDEN["corpora"][corpus]]
    tokenizer = train(texts, main["requested_vocab_size"] - NUM_SPECIAL)
    assert merged(tokenizer) == main["merged_ranks"]
    for case in main["encodings"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    for case in main["decode"]:
        if case["bytes"] is not None:  # the others are about special tokens, of which rustbpe knows nothing
            assert tokenizer.decode(case["ids"]) == case["text"]
            assert tokenizer.decode_bytes(case["ids"]) == bytes(case["bytes"])
    lone = main["lone_surrogate"]
    assert tokenizer.encode("".join(map(chr, lone["text_codepoints"]))) == lone["ids"]


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="ab c1'\nsé你", max_size=40), max_size=8),
    extra=st.integers(0, 60),
    buffer_size=st.integers(1, 4),
)
def test_merges_by_the_definition(texts, extra, buffer_size):
    tokenizer = train(texts, 256 + extra, buffer_size=buffer_size)
    expected = slow_train(texts, 256 + extra, rustbpe.DEFAULT_PATTERN)
    assert [token for token, _ in tokenizer.get_mergeable_ranks()] == expected


def test_merges_by_the_definition_on_more_text():
    rng = random.Random(7)
    stems = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(400)]
    texts = [" ".join(rng.choices(stems, k=200)) + f" {rng.randint(0, 9999)}.\n" for _ in range(60)]
    expected = slow_train(texts, 700, rustbpe.DEFAULT_PATTERN)
    assert [token for token, _ in train(texts, 700).get_mergeable_ranks()] == expected


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab -1", max_size=30), max_size=5))
def test_custom_pattern(texts):
    pattern = r"[ab]+| ?\d"  # does not cover everything: the rest is dropped
    tokenizer = train(texts, 290, pattern=pattern)
    assert tokenizer.get_pattern() == pattern
    assert [token for token, _ in tokenizer.get_mergeable_ranks()] == slow_train(texts, 290, pattern)


def test_ties_go_to_the_smallest_pair():
    assert merged(train(["cd", "ab", "ba"], 258)) == [["6162", 256], ["6261", 257]]


def test_training_again_starts_afresh():
    tokenizer = train(["aaaa bbbb"], 300)
    tokenizer.train_from_iterator(iter(["cd cd"]), 257)
    assert merged(tokenizer) == [["6364", 256]]


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["a"], ["1"]])
def test_nothing_to_merge_gives_the_bytes(texts):
    tokenizer = train(texts, 1000)
    assert tokenizer.vocab_size == 256
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


def test_any_iterable_and_lone_surrogates():
    assert merged(train(["ab"], 257)) == merged(train(("ab",), 257)) == merged(train({"ab": 0}, 257))
    # Read as U+FFFD, as tiktoken does when encoding: EF BF BD; the pair BF BD is smaller.
    assert merged(train(["\ud800\ud800"], 257)) == [["bfbd", 256]]


@pytest.mark.parametrize("vocab_size", [-1, 0, 255])
def test_vocab_size_too_small(vocab_size):
    with pytest.raises(ValueError, match="at least 256"):
        train(["text"], vocab_size)


def test_bad_arguments_leave_the_tokenizer_as_it_was():
    tokenizer = train(["ab ab"], 257)
    before = tokenizer.get_mergeable_ranks()
    with pytest.raises(ValueError, match=r"invalid split pattern"):
        tokenizer.train_from_iterator(iter(["x"]), 300, pattern="(")
    with pytest.raises(ValueError, match="buffer_size"):
        tokenizer.train_from_iterator(iter(["x"]), 300, buffer_size=0)
    with pytest.raises(TypeError, match=r"item\[2\] must be str, not bytes"):
        tokenizer.train_from_iterator(iter(["x", "y", b"z"]), 300)
    with pytest.raises(TypeError, match="single str"):
        tokenizer.train_from_iterator("text", 300)
    with pytest.raises(TypeError):
        tokenizer.train_from_iterator(None, 300)
    assert tokenizer.get_mergeable_ranks() == before


@pytest.mark.parametrize("at", [0, 3, 5000])
def test_exceptions_of_the_iterator_propagate(at):
    class Odd(Exception):
        pass

    def texts():
        for _ in range(at):
            yield "some text " * 100
        raise Odd("from the iterator")

    with pytest.raises(Odd, match="from the iterator"):
        train(texts(), 300)


def test_a_pattern_that_backtracks_too_much_is_an_error():
    with pytest.raises(ValueError, match="failed on a text of 40 bytes"):
        train(["a" * 40] * 500, 300, pattern=r"(?:(a|aa|b)+)+(?<=x)c", buffer_size=1)


def test_progress_callback():
    calls = []
    rng = random.Random(3)
    texts = [" ".join("".join(rng.choices("abcdefgh", k=6)) for _ in range(20)) for _ in range(3000)]
    train(texts, 600, buffer_size=10, progress=lambda *args: calls.append(args))
    assert calls[-1][0] == "merge" and calls[-1][1] == calls[-1][2] == 600 - 256
    counting = [done for stage, done, total in calls if stage == "count" and total == 0]
    assert counting and counting == sorted(counting) and counting[-1] == 3000
    assert len(calls) < 500  # throttled

    def stop(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(["text"], 300, progress=stop)


def test_other_python_threads_run_meanwhile():
    """The interpreter lock is free while pieces are counted and merged."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefghij ", k=400_000)) for _ in range(10)]
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.monotonic()
    train(texts, 8000)
    end = time.monotonic()
    done.set()
    ticker.join()
    inside = [t for t in ticks if start <= t <= end]
    assert len(inside) >= 10, f"{len(inside)} ticks in {end - start:.2f} s"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs Linux: interval timers")
def test_keyboard_interrupt_stops_training():
    def endless():
        while True:
            yield "words and words " * 20

    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(endless(), 300)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux: reads the memory in use from /proc")
def test_memory_is_bounded_by_the_different_pieces():
    """A stream of 400 MB with few different pieces: the process must not grow by more than a fraction of it."""
    text = "the quick brown fox jumps over the lazy dog. " * 2000
    before = peak = resident_bytes()

    def texts():
        nonlocal peak
        for i in range(4500):
            if i % 100 == 0:
                peak = max(peak, resident_bytes())
            yield text + str(i)

    train(texts(), 300)
    assert peak - before < 60e6
