"""Training with rustbpe against a slow trainer written from the definition; bad input. test_tokenizer.py has the golden
merges."""

import random
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import regex  # a dependency of tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.skips import NOT_BUILT

rustbpe = pytest.importorskip("rustbpe", reason=NOT_BUILT)


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


@settings(max_examples=100, deadline=None)
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
    stems = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 7))) for _ in range(200)]
    texts = [" ".join(rng.choices(stems, k=200)) + f" {rng.randint(0, 9999)}.\n" for _ in range(30)]
    expected = slow_train(texts, 500, rustbpe.DEFAULT_PATTERN)
    assert [token for token, _ in train(texts, 500).get_mergeable_ranks()] == expected


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab -1", max_size=30), max_size=5))
def test_custom_pattern(texts):
    pattern = r"[ab]+| ?\d"  # does not cover everything: the rest is dropped
    tokenizer = train(texts, 290, pattern=pattern)
    assert tokenizer.get_pattern() == pattern
    assert [token for token, _ in tokenizer.get_mergeable_ranks()] == slow_train(texts, 290, pattern)


def test_ties_repeated_training_iterables_and_lone_surrogates():
    tokenizer = train(["cd", "ab", "ba"], 258)
    assert merged(tokenizer) == [["6162", 256], ["6261", 257]]  # the smallest pair first
    tokenizer.train_from_iterator(iter(["cd cd"]), 257)
    assert merged(tokenizer) == [["6364", 256]]  # afresh
    assert merged(train(["ab"], 257)) == merged(train(("ab",), 257)) == merged(train({"ab": 0}, 257))
    # Read as U+FFFD, as tiktoken does when encoding: EF BF BD; the pair BF BD is smaller.
    assert merged(train(["\ud800\ud800"], 257)) == [["bfbd", 256]]


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["a"], ["1"]])
def test_nothing_to_merge_gives_the_bytes(texts):
    tokenizer = train(texts, 1000)
    assert tokenizer.vocab_size == 256
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


def test_bad_arguments_leave_the_tokenizer_as_it_was():
    tokenizer = train(["ab ab"], 257)
    before = tokenizer.get_mergeable_ranks()
    backtracks = dict(pattern=r"(?:(a|aa|b)+)+(?<=x)c", buffer_size=1)
    wrong: list[tuple[Any, int, dict[str, Any], type]] = [
        (["x"], 255, {}, ValueError),
        (["x"], -1, {}, ValueError),
        (["x"], 300, {"pattern": "("}, ValueError),
        (["x"], 300, {"buffer_size": 0}, ValueError),
        (["a" * 40] * 500, 300, backtracks, ValueError),
        (["x", "y", b"z"], 300, {}, TypeError),
        ("text", 300, {}, TypeError),
        (None, 300, {}, TypeError),
    ]
    for texts, vocab_size, options, error in wrong:
        with pytest.raises(error):
            tokenizer.train_from_iterator(texts, vocab_size, **options)
    assert tokenizer.get_mergeable_ranks() == before


@pytest.mark.parametrize("at", [0, 3, 5000])
def test_exceptions_of_the_iterator_propagate(at):
    class Odd(Exception):
        pass

    def texts():
        for _ in range(at):
            yield "some text " * 100
        raise Odd

    with pytest.raises(Odd):
        train(texts(), 300)


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
    texts = ["".join(rng.choices("abcdefghij ", k=400_000)) for _ in range(4)]
    ticks, done = 0, threading.Event()

    def tick():
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    before = ticks
    train(texts, 4000)
    inside = ticks - before
    done.set()
    ticker.join()
    assert inside >= 10


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs Linux: interval timers")
def test_keyboard_interrupt_stops_training():
    def endless():
        while True:
            yield "words and words " * 20

    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
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
    """A stream of 100 MB with few different pieces: the process must not grow by more than a fraction of it."""
    text = "the quick brown fox jumps over the lazy dog. " * 2000
    before = peak = resident_bytes()

    def texts():
        nonlocal peak
        for i in range(1100):
            if i % 100 == 0:
                peak = max(peak, resident_bytes())
            yield text + str(i)

    train(texts(), 300)
    assert peak - before < 30e6
