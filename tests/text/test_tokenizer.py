import builtins
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, StreamDecoder, Tokenizer, TokenizerError
from tests.tokenizer_fixtures import golden, golden_tokenizer

GOLDEN = golden("tokenizer_v1")
MAIN = GOLDEN["main"]


def test_pattern_and_special_tokens_are_the_reference_s():
    assert SPLIT_PATTERN == GOLDEN["split_pattern"]
    assert SPECIAL_TOKENS == GOLDEN["special_tokens"]


@pytest.mark.parametrize("case", GOLDEN["trained"], ids=lambda c: f"{c['corpus']}-{c['requested_vocab_size']}")
def test_training_gives_the_reference_s_merges(case):
    tokenizer = Tokenizer.train(iter(GOLDEN["corpora"][case["corpus"]]), case["requested_vocab_size"])
    assert tokenizer.ranks[:256] == [bytes([i]) for i in range(256)]
    assert [[token.hex(), 256 + i] for i, token in enumerate(tokenizer.ranks[256:])] == case["merged_ranks"]
    assert tokenizer.special_tokens == case["special"]
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (case["n_vocab"], case["bos"])
    short = case["n_vocab"] < case["requested_vocab_size"]
    assert ("warning" in tokenizer.training) == short
    if short:
        assert str(case["n_vocab"]) in tokenizer.training["warning"]
        assert str(case["requested_vocab_size"]) in tokenizer.training["warning"]


def test_the_main_tokenizer_trains_to_the_golden_one():
    corpus = [text for name in MAIN["corpora"] for text in GOLDEN["corpora"][name]]
    calls = []
    trained = Tokenizer.train(corpus, MAIN["requested_vocab_size"], progress=lambda *facts: calls.append(facts))
    assert calls and all(isinstance(stage, str) and done >= 0 for stage, done, _ in calls)
    assert trained.hash == golden_tokenizer().hash
    assert trained.vocab_size == MAIN["n_vocab"]
    assert set(trained.special_tokens) == set(MAIN["special_tokens_set"])


def test_encodings_equal_the_reference_s():
    tokenizer = golden_tokenizer()
    tokens, offsets = tokenizer.encode_to_numpy([case["text"] for case in MAIN["encodings"]])
    assert tokens.dtype == np.uint16 and offsets.dtype == np.int64
    for case, a, b in zip(MAIN["encodings"], offsets[:-1], offsets[1:], strict=True):
        assert tokens[a:b].tolist() == [tokenizer.bos_id, *case["ids"]]
    for case in MAIN["encodings"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
    for case in MAIN["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"]
        if case["bytes"] is not None:
            assert tokenizer.decode_bytes(case["ids"]) == bytes(case["bytes"])
    for case in MAIN["id_to_token"]:
        assert tokenizer.decode([case["id"]]) == case["text"]
    surrogate = MAIN["lone_surrogate"]
    assert tokenizer.encode("".join(map(chr, surrogate["text_codepoints"]))) == surrogate["ids"]


def test_prepend_append_and_batches():
    tokenizer = golden_tokenizer()
    for case in MAIN["prepend_append"]:
        assert tokenizer.encode(case["text"], prepend=case["prepend"], append=case["append"]) == case["ids"]
    for case in MAIN["batch"]:
        assert tokenizer.encode(case["texts"], prepend=case["prepend"], append=case["append"]) == case["ids"]


def test_errors_have_the_reference_s_types():
    tokenizer = golden_tokenizer()
    for case in MAIN["errors"]:
        call = case["call"].replace("n_vocab", str(tokenizer.vocab_size))
        with pytest.raises(getattr(builtins, case["exception"]["type"])):
            eval(f"tokenizer.{call}", {"tokenizer": tokenizer})
    ordinary = MAIN["encode_special_ordinary"]
    assert tokenizer.encode_special(ordinary["text"]) == ordinary["id"]
    assert tokenizer.encode_special("<|output_end|>") == MAIN["special"]["<|output_end|>"]


def test_special_strings_in_text_stay_text():
    tokenizer = golden_tokenizer()
    for name, special in tokenizer.special_tokens.items():
        assert special not in tokenizer.encode(f"before {name} after")
        tokens, _ = tokenizer.encode_to_numpy([name])
        assert tokens.tolist()[0] == tokenizer.bos_id and special not in tokens.tolist()[1:]


def test_token_bytes_are_raw_lengths_and_the_v1_ones_on_request():
    tokenizer = golden_tokenizer()
    raw = tokenizer.token_bytes()
    assert raw.dtype == np.int32 and raw.shape == (tokenizer.vocab_size,)
    assert raw[: len(tokenizer.ranks)].tolist() == [len(token) for token in tokenizer.ranks]
    assert not raw[len(tokenizer.ranks) :].any()
    assert tokenizer.token_bytes(v1_compat=True).tolist() == MAIN["token_bytes_v1"]
    assert raw.tolist() != MAIN["token_bytes_v1"]
    text = "Où est-il? 你好 🌍"  # the lengths of a text's tokens add up to its bytes
    assert raw[tokenizer.encode(text)].sum() == len(text.encode())


LONG = {"white space": " " * 1_100_000 + "x", "one word": "a" * 200_000, "symbols": "-" * 200_000}


@pytest.mark.parametrize("name", LONG)
def test_texts_that_other_splitters_give_up_on_are_encoded(name):
    """tiktoken panics (a BaseException that is no Exception), or takes minutes."""
    tokenizer, text = golden_tokenizer(), LONG[name]
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text and tokenizer.encode([text])[0] == ids


def test_a_foreign_pattern_that_gives_up_is_one_line():
    base = golden_tokenizer()
    foreign = Tokenizer(base.ranks, base.special_tokens, pattern=r"(?:\s|\s\s)*(?=x)|\S+|\s+")
    for call in (foreign.encode_text, foreign.encode, lambda text: foreign.encode([text]),
                 lambda text: foreign.encode_to_numpy([text])):  # fmt: skip
        with pytest.raises(TokenizerError, match="split pattern"):
            call("a" + " " * 1000 + "b")


def test_without_rust_tiktoken_encodes_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    tokenizer = Tokenizer(golden_tokenizer().ranks, golden_tokenizer().special_tokens)
    for case in MAIN["encodings"]:
        assert tokenizer.encode(case["text"]) == tokenizer.encode([case["text"]])[0] == case["ids"]
    with pytest.raises(TokenizerError, match="rustbpe"):
        tokenizer.encode_text(LONG["white space"])


def test_save_and_load(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tokenizer = Tokenizer.train([text for texts in GOLDEN["corpora"].values() for text in texts], 400)
    path = tokenizer.save()
    assert path == tmp_path / "base" / "tokenizer" / "tokenizer.json"
    again = Tokenizer.load()
    assert again.hash == tokenizer.hash and again.ranks == tokenizer.ranks and again.training == tokenizer.training
    assert again.encode("l'été dernier") == tokenizer.encode("l'été dernier")
    assert list(tmp_path.glob("**/*.tmp")) == []
    elsewhere = tokenizer.save(tmp_path / "other")
    assert elsewhere.read_bytes() == path.read_bytes()


def test_hash_depends_on_everything_that_decides_ids():
    base = golden_tokenizer()
    swapped = [*base.ranks[:-2], base.ranks[-1], base.ranks[-2]]
    hashes = {
        base.hash,
        Tokenizer(swapped, base.special_tokens).hash,
        Tokenizer(base.ranks, base.special_tokens, pattern=r"\s+|\S+").hash,
        Tokenizer(base.ranks, {"<|bos|>": base.bos_id}).hash,
        Tokenizer(base.ranks, base.special_tokens, bos="<|user_end|>").hash,
    }
    assert len(hashes) == 5


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="tok_train"):
        Tokenizer.load(tmp_path)
    path = golden_tokenizer().save(tmp_path)
    good = path.read_text()
    content = json.loads(good)
    content["ranks"][-1], content["ranks"][-2] = content["ranks"][-2], content["ranks"][-1]
    damaged = [
        json.dumps(content).encode(),
        good[: len(good) // 2].encode(),
        b"",
        json.dumps({**json.loads(good), "version": 99}).encode(),
        json.dumps({**json.loads(good), "ranks": ["!!"]}).encode(),
        b"[]",
        b"\xff\xfe\x00binary",
    ]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(TokenizerError, match="tokenizer.json"):
            Tokenizer.load(tmp_path)


def test_bad_constructions_are_refused():
    for tokens, special in [
        ([b"a", b"a"], {"<|bos|>": 2}),
        ([b"a", b"b"], {"<|bos|>": 1}),
        ([b"a", b"b"], {"<|eos|>": 2}),  # no bos
    ]:
        with pytest.raises(TokenizerError):
            Tokenizer(tokens, special)
    with pytest.raises(AssertionError, match="265"):
        Tokenizer.train(["text"], 264)


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_round_trip(text):
    tokenizer = golden_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    tokens, offsets = tokenizer.encode_to_numpy([text, text])
    assert tokens.tolist() == [tokenizer.bos_id, *ids] * 2 and offsets.tolist() == [0, len(ids) + 1, 2 * len(ids) + 2]


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_streaming_never_shows_half_a_character(text):
    tokenizer = golden_tokenizer()
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(token) for token in tokenizer.encode(text)]
    assert decoder.flush() == "" and "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, MAIN["n_vocab"] - 1), max_size=60))
def test_streaming_any_ids_joins_to_decode(ids):
    tokenizer = golden_tokenizer()
    decoder = StreamDecoder(tokenizer)
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == tokenizer.decode(ids)
