"""tokenizer.json gives our ids with the library that it is for, and is read back."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from nanochat_jax.convert import InterchangeError, tokenizer_json
from nanochat_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.tokenizer_fixtures import golden_tokenizer

_SPACES = " \t\n\r\x0b\x0c\u00a0\u2003\u3000\u0085\u200b\u2028"
_WORDS = "it's I'LL we'Re '\u017f don't 'tis naïve 你好 한국 e\u0301 👩\u200d👧 🙂 ﬁ".split()


def fuzzed(rng: random.Random) -> str:
    """All planes of Unicode, runs of white space, digits, names of special tokens and their pieces, letters, signs."""
    kinds = [
        lambda: "".join(chr(c) for _ in range(5) if not 0xD800 <= (c := rng.randrange(0x110000)) <= 0xDFFF),
        lambda: "".join(rng.choices(_SPACES, k=rng.randint(1, 8))),
        lambda: "".join(rng.choices("0123456789٣४Ⅷ½²", k=rng.randint(1, 9))),
        lambda: rng.choice([*SPECIAL_TOKENS, "<|", "|>", "<|bos", "<|endoftext|>"]),
        lambda: rng.choice(_WORDS),
        lambda: "".join(rng.choices("etaoin shrdlu", k=rng.randint(1, 20))),
        lambda: "".join(chr(rng.randrange(0x20, 0x250)) for _ in range(rng.randint(1, 10))),
        lambda: "".join(rng.choices("!?.,;:-_()[]{}#@'\n\r ", k=rng.randint(1, 8))),
    ]
    return "".join(rng.choice(kinds)() for _ in range(rng.randint(1, 12)))


@pytest.fixture(scope="module", params=["golden", "trained"])
def tokenizer(request):
    if request.param == "golden":
        return golden_tokenizer()
    rng = random.Random(1)
    return Tokenizer.train([fuzzed(rng) for _ in range(2000)] + ["the cat sat on the mat " * 9] * 20, 900)


def test_the_library_gives_our_ids_on_ten_thousand_strings(tokenizer):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json.to_json(tokenizer)))
    rng = random.Random(3)
    texts = [fuzzed(rng) for _ in range(10_000)]
    bos = [tokenizer.bos_id]
    assert [e.ids for e in theirs.encode_batch(["a b"])] == [bos + tokenizer.encode("a b")]
    for name, token in tokenizer.special_tokens.items():
        assert theirs.encode(name, add_special_tokens=False).ids == [token]
    theirs.encode_special_tokens = True  # names of special tokens are plain text, as in our encode
    ours = tokenizer.encode(texts)
    assert [e.ids for e in theirs.encode_batch(texts, add_special_tokens=False)] == ours
    assert theirs.decode_batch(ours, skip_special_tokens=False) == [tokenizer.decode(ids) for ids in ours]


def test_reading_gives_the_same_tokenizer(tokenizer, tmp_path):
    path, content = tmp_path / "tokenizer.json", tokenizer_json.to_json(tokenizer)
    path.write_text(json.dumps(content))
    assert tokenizer_json.read(path).hash == tokenizer.hash
    # as transformers' own conversion of tiktoken files lists them: all pairs that join to a token, "a b" in one string
    known = {token: rank for rank, token in enumerate(tokenizer.ranks)}
    pairs = [
        (token[:i], token[i:])
        for token in tokenizer.ranks
        for i in range(1, len(token))
        if token[:i] in known and token[i:] in known
    ]
    content["model"]["merges"] = [f"{tokenizer_json.spelled(a)} {tokenizer_json.spelled(b)}" for a, b in pairs]
    path.write_text(json.dumps(content))
    assert tokenizer_json.read(path).hash == tokenizer.hash


def test_files_that_would_give_other_ids_are_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"

    def refused(change) -> str:
        content = tokenizer_json.to_json(tokenizer)
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(InterchangeError, match=str(path)) as caught:
            tokenizer_json.read(path)
        return str(caught.value)

    def swap(content):
        merges = content["model"]["merges"]
        merges[0], merges[-1] = merges[-1], merges[0]

    assert "merges" in refused(swap)
    assert "merges" in refused(lambda c: c["model"]["merges"].pop())
    assert "merges" in refused(lambda c: c["model"]["merges"].append(["zz", "zz"]))
    assert "normalizer" in refused(lambda c: c.update(normalizer={"type": "NFC"}))
    assert "unk_token" in refused(lambda c: c["model"].update(unk_token="?"))
    assert "byte-level BPE" in refused(lambda c: c["model"].update(type="Unigram"))
    assert "gaps" in refused(lambda c: c["model"]["vocab"].pop("a"))
    assert "split" in refused(lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0))
    assert "damaged" in refused(lambda c: c["model"]["vocab"].update({"\U0001f600": c["model"]["vocab"].pop("a")}))
    assert "damaged" in refused(lambda c: c.pop("model"))
    Path(path).write_text("{")
    with pytest.raises(InterchangeError, match="damaged"):
        tokenizer_json.read(path)
