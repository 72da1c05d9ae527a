"""Grammars: what may come next in a completion that must follow a schema or a regular expression."""

import json
import re

import numpy as np
import pytest

from nanochat_jax.text import grammar
from tests.tokenizer_fixtures import golden_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "ages": {"type": "array", "items": {"enum": [1, 22]}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}
CHOICES = ["yes", "日本 😀", 'a "quoted" \n no', "ye"]
CASES = {
    "schema": (grammar.of_json_schema(SCHEMA), lambda text: set(json.loads(text)) == {"name", "ages"}),
    "object": (grammar.of_json_schema({"type": "object"}), lambda text: isinstance(json.loads(text), dict)),
    "regex": (grammar.of_regex("[a-c]{3}-(x|yé)"), lambda text: re.fullmatch("[a-c]{3}-(x|yé)", text)),
    "choice": (grammar.of_choice(CHOICES), lambda text: text in CHOICES),
    "lark": (grammar.of_lark('start: "a" b+\nb: "x"'), lambda text: re.fullmatch("ax+", text)),
}  # fmt: skip


def written(source: str, seed: int, limit: int = 400) -> str | None:
    """A text that follows the grammar, drawn at random; None for one that is not complete after `limit` tokens."""
    tokenizer, rng, said = golden_tokenizer(), np.random.default_rng(seed), []
    state = grammar.GrammarState(source, tokenizer)
    while not state.complete and len(said) < limit:
        tokens = state.forced() or [int(rng.choice(np.flatnonzero(state.allowed())))]
        if tokens[0] >= len(tokenizer.ranks):
            return tokenizer.decode(said)
        state.advance(tokens)
        said += tokens
    return tokenizer.decode(said) if state.complete else None


@pytest.mark.parametrize("name", CASES)
def test_whatever_is_drawn_follows_the_grammar(name):
    source, holds = CASES[name]
    grammar.check(source, golden_tokenizer())
    texts = [text for seed in range(8) if (text := written(source, seed)) is not None]
    assert len(texts) >= 3 and all(holds(text) for text in texts)


def test_only_end_tokens_may_follow_what_can_end():
    state = grammar.GrammarState(grammar.of_regex("a+"), golden_tokenizer())
    special = np.array(sorted(golden_tokenizer().special_tokens.values()))
    assert not state.allowed()[special].any()
    state.advance([97])
    ends = {golden_tokenizer().bos_id, golden_tokenizer().encode_special("<|assistant_end|>")}
    assert {int(token) for token in special[state.allowed()[special]]} == ends and state.allowed()[97]


@pytest.mark.parametrize(
    "make",
    [
        lambda: grammar.of_regex("(a"),
        lambda: grammar.of_json_schema({"type": "wat"}),
        lambda: grammar.of_json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
        lambda: grammar.of_json_schema({"$ref": "http://127.0.0.1/x"}),
        lambda: grammar.of_json_schema([]),  # pyright: ignore
        lambda: grammar.of_lark("start: nothing"),
        lambda: grammar.of_regex("((a{1000}){1000}){1000}"),
        lambda: grammar.of_json_schema({"type": "string", "minLength": 10**9, "pattern": "a*"}),
        lambda: grammar.of_json_schema({"type": "string", "pattern": "a{100000000}"}),
        lambda: grammar.of_json_schema({"type": "array", "items": {"const": 1}, "minItems": 10**7}),
    ],
)
def test_what_is_no_grammar_is_refused_in_a_line(make):
    with pytest.raises(ValueError) as caught:
        grammar.check(make(), golden_tokenizer())
    assert str(caught.value) and "\n" not in str(caught.value)
