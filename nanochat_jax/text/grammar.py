"""Completions that must follow a JSON schema, a regular expression or a grammar: what may come next. No JAX here.

The work is `llguidance`'s: a parser that knows for every prefix which tokens of the vocabulary may follow (a tenth of a
millisecond a token). Special tokens never may, but for the end tokens where the text may end; so there are no calls of
the calculator in such a completion.
"""

import functools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.tiktoken
import numpy as np

from nanochat_jax.text import chat_format
from nanochat_jax.text.tokenizer import Tokenizer
from nanochat_jax.utils.errors import InputError

# What a grammar forces is written out at once, which takes the parser minutes for "a{100000000}".
MOST_REPEATED = 5_000
_AT_LEAST = re.compile(r'\{(\d+)|~\s*(\d+)|min(?:Items|Length|Properties)\\*"\s*:\s*(\d+)')
# At most one space between JSON's parts: a small model that may write any white space writes nothing else.
_SPACING: Any = {"whitespace_flexible": True, "whitespace_pattern": " ?"}


def of_json_schema(schema: dict[str, Any] | bool) -> str:
    """The grammar of JSON documents that a schema describes. Raises InputError for what is no schema."""
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), _SPACING)
    except ValueError as error:
        raise InputError(_short(str(error))) from None


def of_regex(pattern: str) -> str:
    """The grammar of texts that match a regular expression as a whole (Rust's syntax)."""
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def of_choice(texts: Sequence[str]) -> str:
    """The grammar of some texts."""
    return of_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


def of_lark(grammar: str) -> str:
    """A context-free grammar in Lark's syntax."""
    return llguidance.LLMatcher.grammar_from_lark(grammar)


def check(grammar: str, tokenizer: Tokenizer) -> None:
    """Raises InputError for a grammar that cannot be used, saying why."""
    if math.prod(max(1, int(n)) for found in _AT_LEAST.findall(grammar) for n in found if n) > MOST_REPEATED:
        raise InputError(f"it repeats something more than {MOST_REPEATED:,} times")
    wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, _vocabulary(tokenizer))
    if wrong:
        raise InputError(_short(messages[0]))
    state = GrammarState(grammar, tokenizer)
    if not state.allowed().any():
        raise InputError(_short(state.problem or "no text follows this grammar"))


def _short(message: str) -> str:
    """The first line of what llguidance says; the others show the grammar."""
    return message.strip().split("\n")[0][:300]


@functools.lru_cache(maxsize=2)  # takes a second for a large vocabulary
def _vocabulary(tokenizer: Tokenizer) -> Any:
    special = tokenizer.special_tokens
    ends = [tokenizer.bos_id, *(special[name] for name in (chat_format.ASSISTANT_END,) if name in special)]
    return llguidance.tiktoken.lltokenizer_from_encoding(
        tokenizer._encoding, n_vocab=tokenizer.vocab_size, eos_token=ends[::-1]
    )


class GrammarState:
    """How far one completion has come in its grammar."""

    def __init__(self, grammar: str, tokenizer: Tokenizer):
        self._matcher = llguidance.LLMatcher(_vocabulary(tokenizer), grammar, log_level=0)
        self._size = tokenizer.vocab_size

    @property
    def complete(self) -> bool:
        """Whether nothing can follow (or the parser gave up: a grammar beyond its limits)."""
        return self._matcher.is_stopped()

    @property
    def problem(self) -> str:
        """Why the parser gave up, or nothing."""
        return self._matcher.get_error()

    def forced(self) -> list[int]:
        """The next tokens, as far as there is no choice."""
        return self._matcher.compute_ff_tokens()

    def advance(self, tokens: Sequence[int]) -> None:
        """These tokens have come."""
        self._matcher.consume_tokens(list(tokens))

    def allowed(self) -> np.ndarray:
        """bool (vocab_size,): which tokens may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").astype(bool)
